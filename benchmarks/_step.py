"""One tuning step at a large model's width, without network and model: what the device itself needs, and what goes over the wire.

The real tuner runs against a server that answers after a fixed time with random gradients. What counts is the time of a step beyond
that round trip: what the device does meanwhile, saving, costs nothing unless it takes longer.
Legend: m soft-prompt rows, d hidden size.
"""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from lopa.bundle import Bundle
from lopa.config import ClientConfig
from lopa.encoder import PromptEncoder
from lopa.examples import Example
from lopa.folder import PersonaStore
from lopa.protocol.flow import Ask, Finish, Start, Step, Work, drive
from lopa.session import Session
from lopa.tune_job import TuneJob
from lopa.tuner import Tuner
from lopa.tuning import TuneConfig
from lopa.v1 import common_pb2, inference_pb2, tuning_pb2
from lopa.values import Limits, Model
from lopa.wire.tensors import encode_rows, soft_prompt_digest

BATCH, STEPS = 8, 40
ROUND_TRIP = 0.02
"""Seconds from a request to its answer: less than any network and model of this width need."""
TOKENS = 64
"""Of an example: prompt and target."""
PETALS_TENSORS = 5
"""Hidden states of every position that Petals sends for one span and step: forward in and out, backward in, gradient in and out
(petals, client/sequential_autograd.py); 16 bits an element."""


class Answer:
    """On its way until `due`."""

    def __init__(self, message: Any, due: float) -> None:
        self.message, self.due = message, due

    def reply(self) -> Any:
        time.sleep(max(0.0, self.due - time.perf_counter()))
        return self.message

    def cancel(self) -> None:
        """It has been answered."""


class InstantServer:
    """Answers Score and PromptGradients without a model; `round_trip` seconds pass between a request for gradients and its answer."""

    def __init__(self, rows: int, hidden: int, round_trip: float) -> None:
        rng = np.random.default_rng(0)
        self.gradient = rng.standard_normal((rows, hidden), np.float32) * 1e-3
        self.round_trip = round_trip
        self.seconds = 0.0
        """That were not the device's: making answers, and the round trips."""
        self.pairs = self.bytes = 0

    def perform(self, step: Step) -> Any:
        if isinstance(step, Work):
            return step.function()
        if isinstance(step, Finish):
            return step.call.reply()  # type: ignore[attr-defined]
        if not isinstance(step, Start | Ask):
            raise TypeError(f"a tuning run asked for {type(step).__name__}")
        ask = step.ask if isinstance(step, Start) else step
        began = time.perf_counter()
        reply = self._score(ask.request) if ask.method.name == "Score" else self._gradients(ask.request)
        self.seconds += time.perf_counter() - began
        return self._call(reply) if isinstance(step, Start) else reply

    def _call(self, reply: Any) -> Answer:
        self.seconds += self.round_trip
        return Answer(reply, time.perf_counter() + self.round_trip)

    def _score(self, request: Any) -> inference_pb2.ScoreResponse:
        scores = [inference_pb2.PairScore(nll_sum=1, target_tokens=16, receipt=self._receipt(pair)) for pair in request.pairs]
        return inference_pb2.ScoreResponse(scores=scores)

    def _gradients(self, request: Any) -> tuning_pb2.PromptGradientsResponse:
        rows, hidden = self.gradient.shape
        data, scales = encode_rows(self.gradient, request.gradient_dtype)
        gradient = common_pb2.SoftPromptGradient(rows=rows, hidden=hidden, dtype=request.gradient_dtype, data=data, scales=scales)
        reply = tuning_pb2.PromptGradientsResponse(
            gradients=[
                tuning_pb2.PairGradient(nll_sum=1, target_tokens=16, gradient=gradient, receipt=self._receipt(pair))
                for pair in request.pairs
            ]
        )
        self.pairs += len(request.pairs)
        self.bytes += request.ByteSize() + reply.ByteSize()
        return reply

    def _receipt(self, pair: common_pb2.Pair) -> common_pb2.Receipt:
        return common_pb2.Receipt(soft_prompt_sha256=soft_prompt_digest(pair.soft_prompt), rows=pair.soft_prompt.rows, model_revision="r")


def measure_step(bundle: Bundle, folder: Path, *, round_trip: float = ROUND_TRIP, **options: Any) -> tuple[float, float]:
    """(milliseconds of a step beyond the round trip, saving included; bytes per example, both ways)."""
    manifest = bundle.manifest
    limits = Limits(**dict.fromkeys((field.name for field in fields(Limits)), 1 << 26))
    model = Model(
        manifest.fm.name, manifest.fm.fingerprint, "r", manifest.fm.hidden_size, 512, 100, limits, ("F32",), (), manifest.id, 1, "0"
    )
    session = Session("instant", ClientConfig())
    session.shared.model = model
    store, encoder = PersonaStore(folder, "default"), PromptEncoder(bundle)
    store.create(bundle)
    examples = [Example(f"{number:03d} " + "word " * (TOKENS - 17), "word " * 16) for number in range(4 * BATCH)]
    config = TuneConfig.for_bundle(manifest, steps=STEPS, batch_size=BATCH, validate_every=STEPS, **options)
    times: list[float] = []
    server = InstantServer(manifest.rows, manifest.fm.hidden_size, round_trip)

    def tell(_: object) -> None:
        times.append(time.perf_counter() - server.seconds)

    job = TuneJob(config, examples, examples[:1], tell)
    with store.lock():
        drive(Tuner(session, encoder, store, job).run(), server.perform)
    steps = np.diff(times)[3:-1]  # the first ones load the graphs, the last one validates
    return 1000 * float(np.median(steps)), server.bytes / server.pairs


def petals_bytes(rows: int, hidden: int) -> float:
    """Bytes of one example that Petals sends for prompt tuning through one span, counted from its protocol."""
    return PETALS_TENSORS * (rows + TOKENS) * hidden * 2
