"""A structured fuzzer over the live server: valid requests, mutated at the field and at the byte level.

What makes the server answer in a new way (method, status, reason, field) joins the corpus and is mutated further. Meanwhile
a neighbour sends the same streams over and over: its tokens must not change.
"""

from __future__ import annotations

import hashlib
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from lopa.v1 import inference_pb2, inference_pb2_grpc

from trustbench import requests
from trustbench.server import Server, beside

DEADLINE = 300.0
"""Seconds. Far more than any answer needs, so that a call that reaches it hangs."""
WORKERS = 8
STOP_SECONDS = 33.0
"""gRPC's core drops what its server hasn't taken up for 30 s, unless told otherwise; a connection outlives a stop of a minute."""
BETWEEN_STOPS = 10.0
NUMBERS = (0, 1, 2, 3, 255, 256, 65535, 1 << 20, (1 << 31) - 1, (1 << 32) - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "\x00", "a" * 10_000, "\U0001f600" * 50, "\ufffd", "{", "../../etc/passwd", "<|endoftext|>", "%s%n")


@dataclass
class Report:
    """What came of it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    untyped: list[str] = field(default_factory=list)
    hangs: int = 0
    corpus: int = 0
    neighbour_streams: int = 0
    neighbours_changed: int = 0

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())


def mutated(message: Message, rng: random.Random) -> bytes:
    """Some fields changed, then perhaps some bytes."""
    copy = type(message)()
    copy.CopyFrom(message)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        _mutate_field(copy, rng)
    data = bytearray(copy.SerializePartialToString())
    for _ in range(rng.choice((0, 0, 0, 1, 3, 10))):
        _mutate_bytes(data, rng)
    return bytes(data)


def _mutate_bytes(data: bytearray, rng: random.Random) -> None:
    place = rng.randrange(len(data) + 1)
    kind = rng.randrange(4)
    if kind == 0 and data:
        data[place % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[place:place] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 2:
        del data[place : place + rng.randrange(1, 33)]
    else:
        del data[place:]


def _mutate_field(message: Message, rng: random.Random) -> None:
    """Walk down to a field at random and change it."""
    fields = message.DESCRIPTOR.fields
    if not fields:
        return
    chosen = rng.choice(fields)
    if chosen.message_type is not None and chosen.message_type.GetOptions().map_entry:
        key, value = chosen.message_type.fields
        getattr(message, chosen.name)[_value(key, rng, None)] = _value(value, rng, None)
    elif chosen.is_repeated:
        _mutate_repeated(message, chosen, rng)
    elif chosen.type == FieldDescriptor.TYPE_MESSAGE:
        if rng.random() < 0.2:
            message.ClearField(chosen.name)
        else:
            child = getattr(message, chosen.name)
            child.SetInParent()
            _mutate_field(child, rng)
    elif rng.random() < 0.15:
        message.ClearField(chosen.name)
    else:
        setattr(message, chosen.name, _value(chosen, rng, getattr(message, chosen.name)))


def _mutate_repeated(message: Message, chosen: FieldDescriptor, rng: random.Random) -> None:
    entries = getattr(message, chosen.name)
    if chosen.type == FieldDescriptor.TYPE_MESSAGE:
        if not entries or rng.random() < 0.2:
            entries.add()
        elif rng.random() < 0.2:
            del entries[rng.randrange(len(entries))]
        elif rng.random() < 0.1:
            entries.MergeFrom([entries[0]] * rng.choice((1, 8, 600)))
        else:
            _mutate_field(rng.choice(entries), rng)
    elif rng.random() < 0.2:
        message.ClearField(chosen.name)
    else:
        entries.extend([_value(chosen, rng, None)] * rng.choice((1, 1, 3, 100)))


def _value(chosen: FieldDescriptor, rng: random.Random, old: Any) -> Any:
    kinds = FieldDescriptor
    if chosen.type == kinds.TYPE_BYTES:
        data = bytearray(old or b"")
        if rng.random() < 0.5:
            _mutate_bytes(data, rng)
            return bytes(data)
        return rng.randbytes(len(data)) if rng.random() < 0.5 else b"\xff" * rng.choice((0, 4, len(data)))
    if chosen.type == kinds.TYPE_STRING:
        return rng.choice(TEXTS)
    if chosen.type == kinds.TYPE_BOOL:
        return rng.random() < 0.5
    if chosen.type in (kinds.TYPE_FLOAT, kinds.TYPE_DOUBLE):
        return rng.choice(FLOATS)
    if chosen.type in (kinds.TYPE_INT32, kinds.TYPE_ENUM):
        return rng.choice(NUMBERS[:-1])
    return rng.choice(NUMBERS)


def _paused(error: grpc.RpcError) -> bool:
    """The connection ended since this process and the server were stopped together (SIGSTOP) for more than a minute."""
    return error.code() is grpc.StatusCode.UNAVAILABLE and "ping_timeout" in (error.details() or "")


@contextmanager
def stopped_now_and_then(server: Server, times: int) -> Iterator[list[float]]:
    """Inside: server and engine are stopped so often and go on after a while, as when a container is frozen. Gives their seconds."""
    over, made = threading.Event(), list[float]()

    def run() -> None:
        while len(made) < times and not over.wait(BETWEEN_STOPS):
            server.send(signal.SIGSTOP)
            if not over.wait(STOP_SECONDS):
                made.append(STOP_SECONDS)
            server.send(signal.SIGCONT)

    with beside(run, over):
        yield made


class Fuzzer:
    """`run` sends the requests; the same seed sends the same first generation."""

    def __init__(self, server: Server, seed: int, corpus: Path | None) -> None:
        info = server.model()
        self._server, self._seed, self._folder, self._hidden = server, seed, corpus, info.hidden_size
        self._pool = [
            (path, message) for path, messages in requests.seeds(info.hidden_size, info.bundle_id).items() for message in messages
        ]
        self._types = {path: type(message) for path, message in self._pool}
        self._seen: set[str] = set()
        self._lock = threading.Lock()
        self.report = Report()

    def run(self, count: int) -> Report:
        """Send `count` requests from WORKERS connections, with a neighbour beside them."""
        done = threading.Event()
        with ThreadPoolExecutor(WORKERS + 1) as pool:
            neighbour = pool.submit(self._neighbour, done)
            shares = [count // WORKERS + (index < count % WORKERS) for index in range(WORKERS)]
            workers = [pool.submit(self._work, index, share) for index, share in enumerate(shares)]
            try:
                for worker in workers:
                    worker.result()
            finally:
                done.set()
            neighbour.result()
        self.report.corpus = len(self._seen)
        return self.report

    def _work(self, index: int, count: int) -> None:
        rng = random.Random(self._seed * 1000 + index)
        with self._server.channel(private=True) as channel:
            for _ in range(count):
                with self._lock:
                    path, message = rng.choice(self._pool)
                data = mutated(message, rng)
                self._judge(path, data, *self._send(channel, path, data))

    def _send(self, channel: grpc.Channel, path: str, data: bytes) -> tuple[str, str]:
        """(status, "reason field"); a stream is left after two messages."""
        stream = path.endswith(("Generate", "FetchBundle"))
        method = (channel.unary_stream if stream else channel.unary_unary)(path, None, None)
        try:
            reply = method(data, metadata=self._server.as_tenant("acme"), timeout=DEADLINE)
            if stream:
                for _ in range(2):
                    next(reply, None)
                reply.cancel()
        except grpc.RpcError as error:
            if _paused(error):
                return self._send(channel, path, data)
            reason, _ = requests.reason_of(error)
            where = re.sub(r"\d+", "N", error.details() or "")[:60]
            return error.code().name, f"{reason} {where}" if reason else f"untyped {error.debug_error_string()}"
        return "OK", "OK"

    def _judge(self, path: str, data: bytes, status: str, told: str) -> None:
        with self._lock:
            self.report.outcomes[f"{path.rsplit('/', 1)[1]} {status} {told.split(' ')[0]}"] += 1
            if told.startswith("untyped"):
                self.report.untyped.append(f"{path} {status} {data[:200].hex()} {told}")
            self.report.hangs += status == "DEADLINE_EXCEEDED"
            signature = f"{path} {status} {told}"
            if signature in self._seen:
                return
            self._seen.add(signature)
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                (self._folder / f"{path.rsplit('/', 1)[1]}-{hashlib.sha256(data).hexdigest()[:16]}.bin").write_bytes(data)
            try:
                self._pool.append((path, self._types[path].FromString(data)))
            except DecodeError:
                return

    def _neighbour(self, done: threading.Event) -> None:
        """The other tenant's streams, compared with what they were before."""
        with self._server.channel(private=True) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            asked = [requests.generate(self._hidden, seed, tokens=12) for seed in range(4)]

            def tokens(request: inference_pb2.GenerateRequest) -> list[int]:
                call = stub.Generate(request, metadata=self._server.as_tenant("other"), timeout=DEADLINE)
                return [token for reply in call for token in reply.token_ids]

            expected = [tokens(request) for request in asked]
            while not done.is_set():
                for request, before in zip(asked, expected, strict=True):
                    try:
                        found = tokens(request)
                    except grpc.RpcError as error:
                        if not _paused(error):
                            raise
                        continue
                    self.report.neighbour_streams += 1
                    self.report.neighbours_changed += found != before
