"""Runs a workload over gRPC and keeps the time of every message.

One asyncio loop, one connection and raw stubs, so that thousands of users cost the client little.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from lopa.bench.requests import RequestMaker
from lopa.bench.workload import Planned, Workload, plan
from lopa.transport import Endpoint, translate
from lopa.v1 import catalog_pb2, catalog_pb2_grpc, inference_pb2_grpc
from lopa.wire.errors import Reason

CONNECT_SECONDS = 30.0


@dataclass
class Trace:
    """One request as its client saw it; times in seconds after the workload's start."""

    planned: Planned
    sent: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """Of each message with tokens: when, and how many."""
    ended: float = 0.0
    error: str = ""
    """The catalogue's reason or the gRPC status; empty when the request was answered."""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.arrivals)


@dataclass(frozen=True)
class LoadResult:
    """Everything that happened, in order of the plan."""

    workload: Workload
    traces: list[Trace]
    seconds: float
    """From the start to the end of the last request."""


Progress = Callable[[int, int, int], None]
"""Told after every request: requests done, errors among them, tokens so far."""


def _ignore(done: int, errors: int, tokens: int) -> None:
    del done, errors, tokens


async def run_load(endpoint: Endpoint, workload: Workload, progress: Progress = _ignore) -> LoadResult:
    """Run a workload to its end. Failed requests are results too.

    Raises:
        RemoteError: the server can't be reached, or refuses to say what it serves.
        ValueError: the workload doesn't fit the server's model.
    """
    async with _channel(endpoint) as channel:
        try:
            catalog: Any = catalog_pb2_grpc.CatalogStub(channel)
            model = await catalog.GetModel(catalog_pb2.GetModelRequest(), timeout=CONNECT_SECONDS, metadata=endpoint.metadata())
        except grpc.RpcError as error:
            raise translate(error, address=endpoint.address) from error
        connect: Callable[[Any], Any] = inference_pb2_grpc.InferenceStub  # its annotations know synchronous channels only
        run = _Run(connect(channel), endpoint, RequestMaker(model, workload), workload, progress)
        return await run.all()


class _Run:
    def __init__(self, stub: Any, endpoint: Endpoint, maker: RequestMaker, workload: Workload, progress: Progress) -> None:
        self._stub, self._endpoint, self._maker, self._workload, self._progress = stub, endpoint, maker, workload, progress
        self._traces: list[Trace] = []
        self._start = 0.0
        self._done = self._errors = self._tokens = 0

    async def all(self) -> LoadResult:
        self._start = time.perf_counter()
        if self._workload.concurrency is None:
            await self._open_loop()
        else:
            requests = plan(self._workload)
            await asyncio.gather(*(self._client(requests) for _ in range(self._workload.concurrency)))
        traces = sorted(self._traces, key=lambda trace: trace.planned.number)
        return LoadResult(self._workload, traces, max((trace.ended for trace in traces), default=0.0))

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _client(self, requests: Iterator[Planned]) -> None:
        end = self._workload.duration
        for planned in requests:
            if end is not None and self._now() >= end:
                return
            await self._request(planned)

    async def _open_loop(self) -> None:
        async with asyncio.TaskGroup() as group:
            for planned in plan(self._workload):
                await asyncio.sleep(planned.at - self._now())
                group.create_task(self._request(planned))

    async def _request(self, planned: Planned) -> None:
        message = self._maker.generate(planned)
        trace = Trace(planned, self._now())
        self._traces.append(trace)
        try:
            async for reply in self._stub.Generate(message, timeout=self._workload.timeout, metadata=self._endpoint.metadata()):
                if reply.token_ids:
                    trace.arrivals.append((self._now(), len(reply.token_ids)))
        except grpc.RpcError as error:
            trace.error = _name(error)
        trace.ended = self._now()
        self._done += 1
        self._errors += bool(trace.error)
        self._tokens += trace.tokens
        self._progress(self._done, self._errors, self._tokens)


def _channel(endpoint: Endpoint) -> grpc.aio.Channel:
    if endpoint.credentials is None:
        return grpc.aio.insecure_channel(endpoint.address, endpoint.options())
    return grpc.aio.secure_channel(endpoint.address, endpoint.credentials, endpoint.options())


def _name(error: grpc.RpcError) -> str:
    """The reason from the catalogue where there is one, else the status."""
    translated = translate(error)
    reason: Reason | None = translated.reason
    if reason is not None:
        return reason.value
    code: grpc.StatusCode = error.code()
    return code.name
