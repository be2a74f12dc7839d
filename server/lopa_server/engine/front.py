"""An engine as the service sees it, the asyncio side: who may enter, and where answers arrive. What computes is behind a `Backend`."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from lopa_server.engine.admission import Admission, AdmissionLimits, Arrival
from lopa_server.engine.base import Delta, EngineSpec, EngineStats, EngineStopped, GenerateRequest, PairRequest, PairResult
from lopa_server.engine.mailbox import Mailbox, Receiver
from lopa_server.engine.pair_queue import PairKind
from lopa_server.engine.torch_engine.config import TorchEngineConfig


class Backend(Protocol):
    """Computes what has been admitted, in a thread or a process of its own. Used on one asyncio loop, on which events arrive too.

    Methods that take something in raise EngineStopped once it has ended.
    """

    def stream(self, request: GenerateRequest, receiver: Receiver) -> None:
        """Its deltas go to the receiver, or an exception as the last event."""
        ...

    def pairs(self, name: str, kind: PairKind, pairs: Sequence[PairRequest], receiver: Receiver) -> None:
        """The receiver gets all results, or an exception."""
        ...

    def abort(self, name: str) -> None:
        """Forget a request or call, if it is still known."""
        ...

    def nudge(self) -> None:
        """Ask for new stats after the present step."""
        ...

    def stats(self) -> EngineStats: ...


class EngineFront:
    """The `Engine` protocol over a backend."""

    def __init__(self, spec: EngineSpec, backend: Backend, config: TorchEngineConfig) -> None:
        weights, batch = config.limits.tenant_weights, config.limits.max_batch
        self._spec, self._backend = spec, backend
        self._streams = Admission(AdmissionLimits("generate queue", batch, config.max_waiting, config.max_waiting_tokens), weights)
        self._calls = Admission(AdmissionLimits("pair queue", 0, config.max_waiting_pairs, config.max_waiting_pair_tokens), weights)
        self._numbers = itertools.count(1)
        self._stopped = False

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        self._check_running()
        arrival = Arrival(request.tenant, 1, len(request.input), request.sampling.max_tokens, request.deadline)
        self._streams.enter(request.id, arrival, time.monotonic())
        mailbox, finished = Mailbox(), False
        try:
            self._backend.stream(request, mailbox)
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
        self._backend.abort(request_id)

    def check_room(self, tenant: str, *, pairs: bool) -> None:
        self._check_running()
        (self._calls if pairs else self._streams).check_room(tenant, time.monotonic())

    def nudge(self) -> None:
        """Have new stats published after the present step: an engine that doesn't is stuck."""
        self._backend.nudge()

    def stats(self) -> EngineStats:
        return self._backend.stats()

    async def _run_pairs(self, kind: PairKind, pairs: Sequence[PairRequest]) -> list[PairResult]:
        self._check_running()
        name = f"pairs-{next(self._numbers)}"
        arrival = Arrival(pairs[0].tenant, len(pairs), sum(map(len, pairs)), 0, pairs[0].deadline)
        self._calls.enter(name, arrival, time.monotonic())
        mailbox, finished = Mailbox(), False
        try:
            self._backend.pairs(name, kind, pairs, mailbox)
            results = await mailbox.results()
            self._calls.progress(name, 0, time.monotonic())
            finished = True
        finally:
            self._calls.leave(name, time.monotonic(), finished=finished)
            self.abort(name)
        return results

    def _check_running(self) -> None:
        if self._stopped:
            raise EngineStopped("the engine was stopped")
