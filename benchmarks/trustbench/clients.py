"""Clients in a process of their own, made cheap: requests are serialized beforehand and replies stay bytes. What is measured is the server.

Two kinds. Patient ones each want one stream after the other and wait as a refusal tells them to, the way lopa's own client does.
Impatient ones come at a fixed rate, whatever happened to those before them, and never come back: they spare the server nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

import grpc
import numpy as np
from lopa import event_loop
from lopa.retry import RetryPolicy
from lopa.v1 import inference_pb2

from trustbench import requests
from trustbench.server import Metadata, Server

GENERATE = "/lopa.v1.Inference/Generate"
DEADLINE = 120.0
CONNECTIONS = 8
VARIETY = 64
"""Different requests that a process sends."""


@dataclass(frozen=True)
class Demand:
    """What one process of clients asks for."""

    tenant: str = "acme"
    clients: int = 1
    """Patient ones. 0 where `per_second` is given."""
    per_second: float = 0.0
    """Impatient ones, Poisson arrivals."""
    tokens: int = 16
    """In each reply."""
    cancel: float = 0.0
    """Part of the streams that is left after a few tokens."""
    warm_up: float = 0.0
    """Seconds at the start that aren't counted."""
    seed: int = 0


@dataclass
class Result:
    """Of what ended while it was counted."""

    tokens: int = 0
    """Of streams that were finished."""
    finished: int = 0
    first: list[float] = field(default_factory=list)
    """Seconds from the request that was admitted to its first token."""
    refusals: Counter[str] = field(default_factory=Counter)
    unhelpful: int = 0
    """Refusals other than RESOURCE_EXHAUSTED with a reason of the catalogue and RetryInfo."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of the process."""

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def p99(self) -> float:
        """Of the time to the first token, in seconds."""
        return p99(self.first)


def p99(values: list[float]) -> float:
    return float(np.quantile(values, 0.99))


class Clients:
    """A process full of clients. `stop` ends it and gives what it saw."""

    def __init__(self, server: Server, demand: Demand, finished: int | None = None) -> None:
        """finished: end by itself after so many streams."""
        hidden, context = server.model().hidden_size, multiprocessing.get_context("spawn")
        seeds = range(demand.seed * VARIETY, (demand.seed + 1) * VARIETY)
        bodies = [requests.generate(hidden, seed, tokens=demand.tokens).SerializeToString() for seed in seeds]
        self._enough, (self._results, theirs) = context.Event(), context.Pipe(duplex=False)
        arguments = (server.address, server.as_tenant(demand.tenant), bodies, demand, finished, self._enough, theirs)
        self._process = context.Process(target=_main, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._results.recv()

    def wait(self) -> Result:
        """Until it ends by itself."""
        result: Result = self._results.recv()
        self._process.join()
        return result

    def stop(self) -> Result:
        self._enough.set()
        return self.wait()


def run_for(server: Server, demand: Demand, seconds: float) -> Result:
    """Clients for so many seconds beyond their warm-up."""
    clients = Clients(server, demand)
    time.sleep(demand.warm_up + seconds)
    return clients.stop()


def _main(
    address: str, metadata: Metadata, bodies: list[bytes], demand: Demand, finished: int | None, enough: Event, results: Connection
) -> None:
    crowd = _Crowd(address, metadata, bodies, demand, finished)
    results.send("ready")
    results.send(event_loop.run(crowd.run(enough)))


class _Crowd:
    def __init__(self, address: str, metadata: Metadata, bodies: list[bytes], demand: Demand, finished: int | None) -> None:
        self._address, self._metadata, self._bodies, self._demand, self._finished = address, metadata, bodies, demand, finished
        self._rng, self._policy = random.Random(demand.seed), RetryPolicy()
        self._methods: list[Any] = []
        self._result = Result()

    async def run(self, enough: Event) -> Result:
        """Until `enough`; streams that are under way then are left."""
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(CONNECTIONS):
                channel = grpc.aio.insecure_channel(self._address, [("grpc.use_local_subchannel_pool", 1)])
                self._methods.append((await stack.enter_async_context(channel)).unary_stream(GENERATE))
            tasks = [asyncio.create_task(task) for task in self._tasks()]
            await self._watch(enough)
            for task in tasks:
                task.cancel()
            failures = [end for end in await asyncio.gather(*tasks, return_exceptions=True) if not isinstance(end, asyncio.CancelledError)]
        if failures:
            raise RuntimeError(f"clients ended: {failures[0]!r}")
        return self._result

    async def _watch(self, enough: Event) -> None:
        """Count from the end of the warm-up until it is enough."""
        await asyncio.sleep(self._demand.warm_up)
        self._result = Result()
        started, cpu = time.monotonic(), time.process_time()
        while not enough.is_set() and (self._finished is None or self._result.finished < self._finished):
            await asyncio.sleep(0.02)
        self._result.seconds, self._result.cpu_seconds = time.monotonic() - started, time.process_time() - cpu

    def _tasks(self) -> list[Coroutine[Any, Any, None]]:
        if self._demand.per_second:
            return [self._impatient()]
        return [self._patient(self._methods[number % CONNECTIONS]) for number in range(self._demand.clients)]

    async def _patient(self, method: Any) -> None:
        failures = 0
        while True:
            wish = await self._stream(method)
            failures = failures + 1 if wish is not None else 0
            if wish is not None:
                await asyncio.sleep(wish + self._policy.backoff(failures, self._rng))

    async def _impatient(self) -> None:
        async with asyncio.TaskGroup() as calls:
            due = time.monotonic()
            while True:
                due += self._rng.expovariate(self._demand.per_second)
                await asyncio.sleep(due - time.monotonic())
                calls.create_task(self._stream(self._rng.choice(self._methods)))

    async def _stream(self, method: Any) -> float | None:
        """One stream; when it was refused, the seconds that it was asked to wait."""
        leave = self._rng.randrange(1, self._demand.tokens) if self._rng.random() < self._demand.cancel else None
        started, first, messages, reply = time.perf_counter(), 0.0, 0, b""
        call = method(self._rng.choice(self._bodies), metadata=self._metadata, timeout=DEADLINE)
        try:
            async for message in call:
                reply = message
                first = first or time.perf_counter() - started
                messages += 1
                if messages == leave:
                    call.cancel()
                    return None
        except grpc.aio.AioRpcError as error:
            return self._refused(error)
        self._result.tokens += inference_pb2.GenerateResponse.FromString(reply).usage.completion_tokens
        self._result.finished += 1
        self._result.first.append(first)
        return None

    def _refused(self, error: grpc.aio.AioRpcError) -> float:
        reason, seconds = requests.reason_of(error)
        self._result.refusals[f"{error.code().name} {reason}"] += 1
        self._result.unhelpful += error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or not reason or seconds is None
        return seconds or 0.0
