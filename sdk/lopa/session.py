"""What a client says to a server: every call as a flow, with deadlines, retries, limits and checks, and no I/O of its own.

Legend: m soft-prompt rows, d hidden size of the foundation model (FM).
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from google.protobuf.message import Message as ProtoMessage

from lopa.config import ClientConfig
from lopa.errors import Cancelled, InvalidRequest, ProtocolError, RemoteError
from lopa.protocol import replies, requests
from lopa.protocol.flow import (
    FETCH_BUNDLE,
    GENERATE,
    GET_MODEL,
    PROMPT_GRADIENTS,
    SCORE,
    Ask,
    Finish,
    Flow,
    Meanwhile,
    Meter,
    Method,
    Open,
    OpenCall,
    OpenStream,
    Receive,
    Signal,
    Start,
    wait,
)
from lopa.v1 import catalog_pb2, common_pb2, inference_pb2, tuning_pb2
from lopa.values import Delta, Dtype, Float32, Generation, Model, Pair, PairGradient, PairScore, Placement, Prompt, Sampling

if TYPE_CHECKING:
    from lopa.bundle import Bundle
    from lopa.encoder import PromptEncoder

Reply = TypeVar("Reply", bound=ProtoMessage)
Result = TypeVar("Result")


@dataclass
class Shared:
    """What a client and its metered twins have in common."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    model: Model | None = None
    encoders: dict[str, PromptEncoder] = field(default_factory=dict)


@dataclass(frozen=True)
class WireOptions:
    """How pairs travel."""

    dtype: Dtype = "F32"
    """Of soft prompts."""
    gradient_dtype: Dtype = "F32"
    placement: Placement = "front"
    max_pairs: int | None = None
    """Pairs in one request at most, if fewer than the server's limit."""
    timeout: float | None = None
    """Seconds for each request; None takes the client's."""


class Session:
    """One server, one model. Safe between threads."""

    def __init__(
        self, address: str, config: ClientConfig, *, shared: Shared | None = None, meter: Meter | None = None, stop: Signal | None = None
    ) -> None:
        """stop: cancels calls under way and refuses new ones."""
        self.address, self.config = address, config
        self.shared = shared or Shared()
        self.meter = meter or Meter()
        self._stop = stop
        self._rng = random.Random()
        self._noise = np.random.default_rng()

    def metered(self, stop: Signal | None = None) -> Session:
        """The same server with a byte count of its own, which starts at zero."""
        return Session(self.address, self.config, shared=self.shared, meter=Meter(self.meter), stop=stop or self._stop)

    def encoder(self, bundle: Bundle) -> PromptEncoder:
        """The prompt encoder of a bundle; one for all."""
        from lopa.encoder import PromptEncoder

        with self.shared.lock:
            known = self.shared.encoders
            if bundle.manifest.id not in known:
                known[bundle.manifest.id] = PromptEncoder(bundle, threads=self.config.threads)
            return known[bundle.manifest.id]

    def model(self) -> Flow[Model]:
        """What the server hosts; asked once and kept."""
        return self.shared.model or (yield from self.refresh())

    def refresh(self) -> Flow[Model]:
        """Ask the server again what it hosts."""
        info = yield from self.call(GET_MODEL, catalog_pb2.GetModelRequest(), self.config.connect_timeout)
        self.shared.model = model = replies.parse_model(info)
        return model

    def open_generation(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        prefix: str | Sequence[int] | None,
        soft_prompt: Float32 | None,
        wire: WireOptions,
    ) -> Flow[GenerationFlow]:
        """Begin a generation; its first message has arrived. Retried until then, never after."""
        model = yield from self.model()
        soft = None if soft_prompt is None else requests.soft_prompt(self._sendable(soft_prompt), wire.dtype, wire.placement)
        request = requests.generate_request(prompt, sampling, prefix=prefix, soft=soft, fingerprint=model.fingerprint)
        stream = yield from self.open(GENERATE, request, _or(wire.timeout, self.config.generate_timeout))
        return GenerationFlow(self, stream, replies.GenerationReader(request))

    def score(self, pairs: Sequence[Pair], wire: WireOptions, *, low_priority: bool = False) -> Flow[list[PairScore]]:
        """Negative log-likelihoods, in as many requests as the server's limits ask for."""
        model = yield from self.model()
        scores, priority = list[PairScore](), _priority(low_priority)
        for batch in self._batches(pairs, wire, model):
            first = len(scores)
            request = inference_pb2.ScoreRequest(pairs=batch, fm_fingerprint=model.fingerprint, priority=priority)
            reply = yield from _numbered(self.call(SCORE, request, _or(wire.timeout, self.config.timeout)), first)
            revision = yield from self.revision(_first_revision(reply.scores))
            scores += replies.check_scores(reply.scores, batch, revision)
        return scores

    def prompt_gradients(
        self, pairs: Sequence[Pair], wire: WireOptions, *, low_priority: bool = False, meanwhile: Meanwhile | None = None
    ) -> Flow[list[PairGradient]]:
        """Losses and gradients, in as many requests as the server's limits ask for. meanwhile: see `call`."""
        model = yield from self.model()
        code = requests.dtype_code(wire.gradient_dtype, "gradient_dtype")
        gradients, priority = list[PairGradient](), _priority(low_priority)
        for batch in self._batches(pairs, wire, model, reply_dtype=code):
            first = len(gradients)
            request = tuning_pb2.PromptGradientsRequest(
                pairs=batch, gradient_dtype=code, fm_fingerprint=model.fingerprint, priority=priority
            )
            call = self.call(PROMPT_GRADIENTS, request, _or(wire.timeout, self.config.timeout), meanwhile)
            reply = yield from _numbered(call, first)
            revision = yield from self.revision(_first_revision(reply.gradients))
            gradients += replies.check_gradients(reply.gradients, batch, revision, code)
        return gradients

    def open_bundle(self, bundle_id: str, offset: int) -> Flow[OpenStream]:
        """The archive's chunks from `offset` (bytes) on."""
        request = catalog_pb2.FetchBundleRequest(bundle_id=bundle_id, offset=offset)
        return (yield from self.open(FETCH_BUNDLE, request, self.config.bundle_timeout))

    def revision(self, replied: str | None) -> Flow[str]:
        """The revision that receipts must name. A new one is asked for once: the server may have been restarted in another version."""
        model = yield from self.model()
        if replied is not None and replied != model.revision:
            fresh = yield from self.refresh()
            if fresh.fingerprint != model.fingerprint:
                raise ProtocolError(
                    f"{self.address} changed its model from {model.fingerprint[:12]} to {fresh.fingerprint[:12]} during a call"
                )
            model = fresh
        return model.revision

    def call(self, method: Method[Reply], request: ProtoMessage, timeout: float, meanwhile: Meanwhile | None = None) -> Flow[Reply]:
        """Call a method that is safe to repeat, with retries; `timeout` (seconds) bounds all of them together.

        meanwhile: what to do on this device while an attempt is under way; its errors end the call.
        """

        def attempt(left: float) -> Flow[Reply]:
            reply: Reply
            ask = Ask(method, request, left, self.meter, self._stop)
            if meanwhile is None:
                reply = yield ask
                return reply
            call: OpenCall = yield Start(ask)
            try:
                yield from meanwhile()
                self._check_stop()  # the reply may have been faster than whoever set it
                reply = yield Finish(call)
            finally:
                call.cancel()
            return reply

        return (yield from self._with_retries(attempt, timeout))

    def open(self, method: Method[Any], request: ProtoMessage, timeout: float) -> Flow[OpenStream]:
        """Call a streaming method. Retried only until its first message; after that an error reaches the caller."""

        def attempt(left: float) -> Flow[OpenStream]:
            stream: OpenStream = yield Open(method, request, left, self.meter)
            return stream

        return (yield from self._with_retries(attempt, timeout))

    def _with_retries(self, attempt: Callable[[float], Flow[Result]], timeout: float) -> Flow[Result]:
        deadline, failures = time.monotonic() + timeout, 0
        while True:
            self._check_stop()
            try:
                return (yield from attempt(max(0.0, deadline - time.monotonic())))
            except RemoteError as error:
                failures += 1
                delay = self.config.retry.delay(failures, error, self._rng)
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
            yield from wait(delay, self._stop)

    def _sendable(self, soft_prompt: Float32) -> Float32:
        """What may leave the device."""
        noise = self.config.soft_prompt_noise
        return soft_prompt if noise is None else noise(soft_prompt, self._noise)

    def _check_stop(self) -> None:
        if self._stop is not None and self._stop.is_set:
            raise Cancelled("the call was cancelled")

    def _batches(
        self, pairs: Sequence[Pair], wire: WireOptions, model: Model, *, reply_dtype: common_pb2.DType.ValueType | None = None
    ) -> Iterator[list[common_pb2.Pair]]:
        limits = model.limits
        for i, pair in enumerate(pairs):
            if not isinstance(pair, Pair):
                raise InvalidRequest(f"pairs[{i}] is {type(pair).__name__}; a Pair is needed", field=f"pairs[{i}]")
        noised = [pair if pair.soft_prompt is None else replace(pair, soft_prompt=self._sendable(pair.soft_prompt)) for pair in pairs]
        messages = [requests.pair_message(pair, wire.dtype, wire.placement, f"pairs[{i}]") for i, pair in enumerate(noised)]
        return requests.split_pairs(
            messages,
            max_pairs=min(wire.max_pairs or limits.max_pairs, limits.max_pairs),
            max_bytes=min(limits.max_message_bytes, self.config.max_message_bytes),
            reply_dtype=reply_dtype,
        )


class GenerationFlow:
    """A generation under way, as a flow for each delta."""

    def __init__(self, session: Session, stream: OpenStream, reader: replies.GenerationReader) -> None:
        self._session, self._stream, self._reader = session, stream, reader
        self._generation: Generation | None = None

    def close(self) -> None:
        """Stop the server's work; harmless after the end."""
        self._stream.close()

    def next_delta(self) -> Flow[Delta | None]:
        """The next delta; None when the whole text has arrived and is verified."""
        if self._generation is not None:
            return None
        message: inference_pb2.GenerateResponse | None = yield Receive(self._stream)
        if message is not None:
            return self._reader.feed(message)
        self._generation = self._reader.finish((yield from self._session.revision(self._reader.revision)))
        return None

    def to_end(self) -> Flow[Generation]:
        """Read on to the end."""
        try:
            while (yield from self.next_delta()) is not None:
                pass
        finally:
            self.close()
        return self.generation

    @property
    def generation(self) -> Generation:
        """The whole text, verified.

        Raises:
            ProtocolError: the stream was not read to its end.
        """
        if self._generation is None:
            raise ProtocolError("the generation is not finished: iterate over the stream to its end first")
        return self._generation


def whole(flow: Flow[GenerationFlow]) -> Flow[Generation]:
    """Begin a generation and read it to its end."""
    generation = yield from flow
    return (yield from generation.to_end())


def _numbered(flow: Flow[Result], first: int) -> Flow[Result]:
    """Let a refusal name the pair by its place in the caller's list, not in the request of which `first` is the first."""
    try:
        return (yield from flow)
    except InvalidRequest as error:
        match = re.match(r"pairs\[(\d+)\]", error.field)
        if match is not None and first:
            old, new = match.group(0), f"pairs[{first + int(match.group(1))}]"
            error.field, error.args = error.field.replace(old, new, 1), (str(error).replace(old, new, 1),)
        raise


def _priority(low: bool) -> common_pb2.Priority.ValueType:
    return common_pb2.PRIORITY_LOW if low else common_pb2.PRIORITY_UNSPECIFIED


def _or(given: float | None, default: float) -> float:
    return default if given is None else given


def _first_revision(items: Sequence[inference_pb2.PairScore] | Sequence[tuning_pb2.PairGradient]) -> str | None:
    receipts = map(replies.receipt_of, items)
    return next((receipt.model_revision for receipt in receipts if receipt is not None), None)
