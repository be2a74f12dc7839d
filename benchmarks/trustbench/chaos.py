"""Kills of server, engine and devices, at random, during many tunes and streams: each must end with what it ends with undisturbed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import _family
import grpc
import lopa
from lopa.v1 import inference_pb2, inference_pb2_grpc

from trustbench import requests
from trustbench.device import log_of
from trustbench.server import beside, environment, free_port, launch, wait_ready

TOLERANCE = 1e-4
"""Nats per token: the batch that a gradient is computed in changes its last bits, not more."""
OPTIONS = ("--dtype", "float32", "--threads", "1")
USERS_A_DEVICE = 4
PAUSE = (0.2, 3.0)
"""Seconds between two kills, beyond what is needed to start again."""


@dataclass
class Chaos:
    """What the kills did."""

    kills: Counter[str]
    """Of "server", "engine" and "device"."""
    changed: int
    """Tunes with another loss in any step, or another end."""
    repeated: int
    """Steps that were told more than once: saved, and yet computed again."""
    streams: int
    """That finished meanwhile."""
    wrong: int
    """Streams with other tokens than undisturbed, cut off or not."""
    untyped: int
    """Streams that ended with an error that is not in the catalogue and not the connection's."""


class Victim:
    """A server on one port, started again whenever it has ended, as systemd would."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def ensure(self) -> None:
        """Returns while it serves."""
        if self._process is None or self._process.poll() is not None:
            self._process, ready = launch(self._folder, self._port, OPTIONS)
            wait_ready(self._process, ready)

    def kill(self) -> None:
        """Its engine's process ends by itself then."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def kill_engine(self) -> bool:
        """The engine's process alone. False: there is none at the moment."""
        engines = list(_family.children(self._process.pid)) if self._process is not None else []
        for engine in engines:
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)
        return bool(engines)


class Devices:
    """Processes that tune; whoever dies is started again until its tunes are done."""

    def __init__(self, address: str, folder: Path, tunes: int, steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        firsts = range(0, tunes, USERS_A_DEVICE)
        self._commands = [[address, str(folder), str(first), str(min(USERS_A_DEVICE, tunes - first)), str(steps)] for first in firsts]
        self._log = (folder / "devices.log").open("ab")
        self._processes = [self._start(command) for command in self._commands]
        self._lock = threading.Lock()

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        own = {**environment(), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-m", "trustbench.device", *command], stdout=self._log, stderr=self._log, env=own)

    def kill(self, number: int) -> bool:
        """One of those that are at work, started again at once. False: all are done."""
        with self._lock:
            working = [place for place, process in enumerate(self._processes) if process.poll() is None]
            if not working:
                return False
            place = working[number % len(working)]
            self._processes[place].kill()
            self._processes[place].wait()
            self._processes[place] = self._start(self._commands[place])
            return True

    def wait(self) -> None:
        """Until all tunes are done. Raises RuntimeError when a device has failed by itself."""
        while True:
            with self._lock:
                ends = [process.poll() for process in self._processes]
            if any(end not in (None, 0) for end in ends):
                raise RuntimeError(f"a device has failed: see {self._log.name}")
            if None not in ends:
                return
            time.sleep(0.1)


@dataclass
class Streams:
    """A client that generates all the time, always the same text, and compares."""

    address: str
    finished: int = 0
    wrong: int = 0
    untyped: int = 0
    expected: list[int] = field(default_factory=list)

    def run(self, enough: Callable[[], bool]) -> None:
        with grpc.insecure_channel(self.address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            request = inference_pb2.GenerateRequest(sampling=inference_pb2.Sampling(max_tokens=48, ignore_end=True))
            request.prompt.text = requests.TEXTS[0]
            while not enough():
                self._one(stub, request)

    def _one(self, stub: inference_pb2_grpc.InferenceStub, request: inference_pb2.GenerateRequest) -> None:
        tokens: list[int] = []
        try:
            for reply in stub.Generate(request, timeout=300):
                tokens += reply.token_ids
        except grpc.RpcError as error:
            reason, _ = requests.reason_of(error)
            self.untyped += not reason and error.code() is not grpc.StatusCode.UNAVAILABLE
            self.wrong += tokens != self.expected[: len(tokens)]
            time.sleep(0.2)
            return
        self.expected = self.expected or tokens
        self.finished += 1
        self.wrong += tokens != self.expected


@contextmanager
def killed_at_random(victim: Victim, devices: Devices, kills: int, seed: int, last: threading.Event) -> Iterator[Counter[str]]:
    """Inside: so many kills of the server, and about half as many of its engine and of devices each, until the body is done. Sets
    `last` after the last one."""
    rng, over, done = random.Random(seed), threading.Event(), Counter[str]()

    def run() -> None:
        while done["server"] < kills and not over.wait(rng.uniform(*PAUSE)):
            victim.ensure()
            what = rng.choice(("server", "server", "engine", "device"))
            if what == "device":
                done[what] += devices.kill(rng.randrange(1 << 16))
            elif what == "engine":
                done[what] += victim.kill_engine()
            else:
                victim.kill()
                done[what] += 1
            victim.ensure()
        last.set()
        while not over.wait(1.0):
            victim.ensure()

    with beside(run, over):
        yield done


def chaos(folder: Path, tunes: int, steps: int, kills: int) -> Chaos:
    """The same tunes twice: undisturbed, then with kills, and streams beside them, until that many have happened or all tunes are done."""
    victim, over = Victim(folder / "server"), threading.Event()
    victim.ensure()
    try:
        Devices(victim.address, folder / "calm", tunes, steps).wait()
        streams = Streams(victim.address)
        streams.run(lambda: streams.finished > 0)
        streaming = threading.Thread(target=streams.run, args=(over.is_set,))
        streaming.start()
        devices = Devices(victim.address, folder / "wild", tunes, steps)
        with killed_at_random(victim, devices, kills, seed=1, last=over) as done:
            try:
                devices.wait()
            finally:
                over.set()
                streaming.join()
        victim.ensure()
        ends = [[_end(victim.address, folder / kind, user) for user in range(tunes)] for kind in ("calm", "wild")]
    finally:
        victim.kill()
    calm, wild = ends
    changed = sum(not _same(before, after) for before, after in zip(calm, wild, strict=True))
    return Chaos(done, changed, sum(end.repeated for end in wild), streams.finished, streams.wrong, streams.untyped)


@dataclass(frozen=True)
class End:
    """Of a tune."""

    steps: int
    losses: dict[int, float]
    """By step. One that was saved and not told before its device died is missing."""
    repeated: int
    version: int
    nll: float | None
    """On the validation pairs."""


def _end(address: str, folder: Path, user: int) -> End:
    told = [json.loads(line) for line in log_of(folder, user).read_text().splitlines()]
    with lopa.connect(address, config=lopa.ClientConfig(cache=folder / "cache")) as client:
        last = client.personal(folder / f"user-{user}").history()[-1]
    losses = dict(told)
    return End(max(losses), losses, len(told) - len(losses), last.version, last.validation_nll)


def _same(before: End, after: End) -> bool:
    shared = before.losses.keys() & after.losses.keys()
    close = before.steps == after.steps and all(abs(before.losses[step] - after.losses[step]) < TOLERANCE for step in shared)
    if before.nll is None or after.nll is None:
        return close and before.nll is after.nll
    return close and before.version == after.version and abs(before.nll - after.nll) < TOLERANCE
