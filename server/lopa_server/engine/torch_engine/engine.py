"""TorchEngine: the `Engine` protocol over one engine thread. This file is the asyncio side; no tensor is touched here."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Sequence

import torch

from lopa_server.engine.admission import Admission, AdmissionLimits, Arrival
from lopa_server.engine.base import (
    Delta,
    EngineSpec,
    EngineStats,
    EngineStopped,
    GenerateRequest,
    PairRequest,
    PairResult,
    UnsupportedSchema,
)
from lopa_server.engine.content import blocks_for
from lopa_server.engine.pair_queue import PairKind
from lopa_server.engine.torch_engine.config import PAIR_POSITIONS, STEP_POSITIONS, TorchEngineConfig
from lopa_server.engine.torch_engine.constraints import Constraint, Grammars
from lopa_server.engine.torch_engine.live import LiveJob, LiveStream, Mailbox
from lopa_server.engine.torch_engine.loader import FoundationModel, load_foundation_model, text_decoder
from lopa_server.engine.torch_engine.selfcheck import check_runner, positions_that_fit
from lopa_server.engine.torch_engine.worker import Abort, Stop, Worker


class TorchEngine:
    """Serves one Hugging Face model. Load it, start it on a loop, and use it from that loop only."""

    def __init__(self, fm: FoundationModel, config: TorchEngineConfig) -> None:
        self._fm = fm
        self._config = config
        self._grammars = Grammars.of(fm.tokenizer, fm.spec)
        self._spec = dataclasses.replace(fm.spec, json_schemas=self._grammars is not None)
        self._worker = Worker(fm, config.limits, lambda: _set_threads(config.threads))
        weights, batch = config.limits.tenant_weights, config.limits.max_batch
        self._streams = Admission(AdmissionLimits("generate queue", batch, config.max_waiting, config.max_waiting_tokens), weights)
        self._calls = Admission(AdmissionLimits("pair queue", 0, config.max_waiting_pairs, config.max_waiting_pair_tokens), weights)
        self._job_numbers = itertools.count(1)
        self._decode_text = text_decoder(fm.tokenizer)
        self._stopped = False

    @classmethod
    def load(cls, config: TorchEngineConfig) -> TorchEngine:
        """Load the model and check that it can be served exactly. Blocks; seconds to minutes.

        Raises:
            FileNotFoundError, UnsupportedModel: see `load_foundation_model` and `check_runner`.
        """
        _set_threads(config.threads)
        fm = load_foundation_model(config.fm, dtype=config.dtype, device=config.device, native=config.native)
        size = config.limits.block_size
        fitting = positions_that_fit(fm, check_runner(fm, size), config.kv_memory)
        limits = dataclasses.replace(
            config.limits,
            kv_positions=max(blocks_for(fm.spec.context_length, size) * size, min(config.limits.kv_positions, fitting)),
            step_positions=config.step_positions or STEP_POSITIONS[fm.device.type],
            pair_positions=config.step_positions or PAIR_POSITIONS[fm.device.type],
        )
        return cls(fm, dataclasses.replace(config, limits=limits))

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @property
    def tokenizer(self) -> object:
        """The FM's Hugging Face tokenizer."""
        return self._fm.tokenizer

    def start(self) -> None:
        """Start the engine thread; its events arrive on the running loop."""
        self._worker.start(asyncio.get_running_loop())

    async def stop(self) -> None:
        """End the thread; whoever still waits for an answer gets EngineStopped."""
        if self._stopped:
            return
        self.ask_to_stop()
        await asyncio.to_thread(self._worker.join)
        if self._grammars is not None:
            self._grammars.close()

    def ask_to_stop(self) -> None:
        """The thread ends after its present step, if that ever ends."""
        self._stopped = True
        with contextlib.suppress(EngineStopped):
            self._worker.send(Stop())

    async def wait_ended(self) -> None:
        """Returns when the engine thread has ended, by `stop` or by dying."""
        await asyncio.to_thread(self._worker.join)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        self._check_running()
        constraint = await self._constraint(request.sampling.json_schema)
        arrival = Arrival(request.tenant, 1, len(request.input), request.sampling.max_tokens, request.deadline)
        self._streams.enter(request.id, arrival, time.monotonic())
        mailbox, finished = Mailbox(), False
        try:
            self._worker.send(LiveStream(request, mailbox, self._decode_text, self.spec.end_ids, constraint))
            while not finished:
                delta = await mailbox.delta()
                self._streams.progress(request.id, len(delta.token_ids), time.monotonic())
                finished = delta.finish is not None
                yield delta
        finally:
            self._streams.leave(request.id, time.monotonic(), finished=finished)
            self.abort(request.id)

    async def score(self, pairs: Sequence[PairRequest]) -> list[PairResult]:
        return await self._run_pairs(PairKind.SCORE, pairs)

    async def prompt_gradients(self, pairs: Sequence[PairRequest]) -> list[PairResult]:
        return await self._run_pairs(PairKind.GRADIENTS, pairs)

    def abort(self, request_id: str) -> None:
        """An engine that has ended has forgotten everything already."""
        with contextlib.suppress(EngineStopped):
            self._worker.send(Abort(request_id))

    def check_room(self, tenant: str, *, pairs: bool) -> None:
        self._check_running()
        (self._calls if pairs else self._streams).check_room(tenant, time.monotonic())

    def nudge(self) -> None:
        """Make the thread publish new stats after its present step: one that doesn't is stuck."""
        self.abort("")

    def stats(self) -> EngineStats:
        return self._worker.stats()

    async def _run_pairs(self, kind: PairKind, pairs: Sequence[PairRequest]) -> list[PairResult]:
        self._check_running()
        job = LiveJob(f"pairs-{next(self._job_numbers)}", kind, pairs, Mailbox())
        arrival = Arrival(pairs[0].tenant, len(pairs), sum(map(len, pairs)), 0, pairs[0].deadline)
        self._calls.enter(job.id, arrival, time.monotonic())
        finished = False
        try:
            self._worker.send(job)
            results = await job.mailbox.results()
            self._calls.progress(job.id, 0, time.monotonic())
            finished = True
        finally:
            self._calls.leave(job.id, time.monotonic(), finished=finished)
            self.abort(job.id)
        return results

    async def _constraint(self, schema: str | None) -> Constraint | None:
        if schema is None:
            return None
        if self._grammars is None:
            raise UnsupportedSchema("this model's tokenizer can't be held to a schema")
        return await self._grammars.constraint(schema)

    def _check_running(self) -> None:
        if self._stopped:
            raise EngineStopped("the engine was stopped")


def _set_threads(threads: int | None) -> None:
    """Torch keeps the number of CPU threads by calling thread, so each one that computes has to set it."""
    if threads is not None:
        torch.set_num_threads(threads)
