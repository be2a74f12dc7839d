"""Load: capacity, ten times as much, a light tenant beside a flood, and a soak with random cancels."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import numpy as np
from lopa.v1 import inference_pb2_grpc

from trustbench import requests
from trustbench.server import Server

TOKENS = 16
DEADLINE = 120.0


@dataclass
class Result:
    """Of some streams."""

    tokens: int = 0
    """Of streams that were finished."""
    finished: int = 0
    first: list[float] = field(default_factory=list)
    """Seconds to the first token."""
    refusals: Counter[str] = field(default_factory=Counter)
    unhelpful: int = 0
    """Refusals without a reason of the catalogue or without RetryInfo."""
    seconds: float = 0.0

    def p99(self) -> float:
        """Of the time to the first token, in seconds."""
        return float(np.quantile(self.first, 0.99))


class Load:
    """Clients in a closed loop: each sends its next stream when the last one is over, or when a refusal says so."""

    def __init__(self, server: Server, tenant: str, clients: int, *, tokens: int = TOKENS, cancel: float = 0.0) -> None:
        """cancel: part of the streams that is left after a few tokens."""
        self._server, self._tenant, self._clients, self._tokens, self._cancel = server, tenant, clients, tokens, cancel
        self._hidden = server.model().hidden_size
        self._lock = threading.Lock()
        self.result = Result()

    def run(self, enough: Callable[[], bool]) -> Result:
        """Until `enough`; streams that have begun then are finished."""
        started = time.monotonic()
        with ThreadPoolExecutor(self._clients) as pool:
            for client in [pool.submit(self._client, index, enough) for index in range(self._clients)]:
                client.result()
        self.result.seconds = time.monotonic() - started
        return self.result

    def run_for(self, seconds: float) -> Result:
        end = time.monotonic() + seconds
        return self.run(lambda: time.monotonic() >= end)

    def _client(self, index: int, enough: Callable[[], bool]) -> None:
        rng = random.Random(index)
        with self._server.channel() as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            while not enough():
                pause = self._stream(stub, rng)
                if pause:
                    time.sleep(min(pause, 1.0))

    def _stream(self, stub: inference_pb2_grpc.InferenceStub, rng: random.Random) -> float:
        """One stream; the seconds that a refusal asks to wait."""
        request = requests.generate(self._hidden, rng.randrange(1 << 30), tokens=self._tokens)
        leave = rng.randrange(1, self._tokens) if rng.random() < self._cancel else None
        started, first, tokens = time.perf_counter(), None, 0
        try:
            call = stub.Generate(request, metadata=self._server.as_tenant(self._tenant), timeout=DEADLINE)
            for reply in call:
                first = first or time.perf_counter() - started
                tokens += len(reply.token_ids)
                if leave is not None and tokens >= leave:
                    call.cancel()
                    return 0.0
        except grpc.RpcError as error:
            reason, seconds = requests.reason_of(error)
            with self._lock:
                self.result.refusals[f"{error.code().name} {reason}"] += 1
                self.result.unhelpful += not reason or seconds is None
            return seconds or 0.05
        with self._lock:
            self.result.tokens += tokens
            self.result.finished += 1
            if first is not None:
                self.result.first.append(first)
        return 0.0


def overload(server: Server, batch: int, seconds: float) -> tuple[Result, Result]:
    """At capacity (as many clients as the batch has rows), then with ten times as many."""
    Load(server, "acme", batch).run_for(min(5.0, seconds))
    return Load(server, "acme", batch).run_for(seconds), Load(server, "acme", 10 * batch).run_for(seconds)


def light_tenant(server: Server, streams: int, flood: int) -> tuple[Result, Result]:
    """A client that sends one stream at a time: alone, then beside a tenant with `flood` clients."""

    def some() -> Result:
        load = Load(server, "other", 1)
        return load.run(lambda: load.result.finished >= streams)

    alone, done = some(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        flooding = pool.submit(Load(server, "acme", flood).run, done.is_set)
        time.sleep(2.0)
        try:
            beside = some()
        finally:
            done.set()
        flooding.result()
    return alone, beside


@dataclass
class Soak:
    """After a soak."""

    growth: float
    """Of resident memory, over what it was when the warm-up ended."""
    leaked_blocks: int
    stuck: bool
    finished: int


def soak(server: Server, clients: int, seconds: float) -> Soak:
    """`clients` streams all the time, a third of them left at some token; the first fifth of the time is warm-up."""
    Load(server, "acme", clients, cancel=0.33).run_for(seconds / 5)
    server.wait_idle()
    before = server.resident_bytes()
    result = Load(server, "acme", clients, cancel=0.33).run_for(seconds * 4 / 5)
    idle = server.wait_idle()
    growth = server.resident_bytes() / before - 1
    return Soak(growth, int(server.metric("lopa_kv_blocks_used")), not idle, result.finished)
