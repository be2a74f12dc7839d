"""Kills of the server, at random moments, during many tunes: each must end with what it ends with undisturbed."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lopa
from lopa.retry import RetryPolicy

from trustbench.server import free_port, launch, wait_ready

TOLERANCE = 1e-4
"""Nats per token: the batch that a gradient is computed in changes its last bits, not more."""
OPTIONS = ("--dtype", "float32")


@dataclass
class Chaos:
    """What the kills did."""

    kills: int
    changed: int
    repeated_steps: int
    """Steps that were computed more often than undisturbed, at most, over all tunes."""


class Victim:
    """A server on one port that is killed and started again."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.kills = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        self._process, ready = launch(self._folder, self._port, OPTIONS)
        wait_ready(self._process, ready)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self.kills += 1

    @contextmanager
    def killed_at_random(self, kills: int, seed: int) -> Iterator[None]:
        """Inside: so many kills, each some moments after the server is back."""
        rng, over = random.Random(seed), threading.Event()

        def run() -> None:
            for _ in range(kills):
                if over.wait(rng.uniform(0.2, 3.0)):
                    return
                self.kill()
                self.start()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _examples(user: int) -> list[tuple[str, str]]:
    return [(f"def f{user}_{index}(a, b):", f" return a + {user * 7 + index % 5}") for index in range(12)]


def _tunes(address: str, folder: Path, tunes: int, steps: int) -> list[lopa.TuneReport]:
    """All at the same time, each with a folder and a connection of its own."""

    def tune(user: int) -> lopa.TuneReport:
        config = lopa.ClientConfig(cache=folder / "cache", retry=RetryPolicy(), connect_timeout=120)
        with lopa.connect(address, config=config) as client:
            persona = client.personal(folder / f"user-{user}")
            return persona.tune(_examples(user), steps=steps, seed=user, patience=600.0)

    with ThreadPoolExecutor(tunes) as pool:
        return list(pool.map(tune, range(tunes)))


def chaos(folder: Path, tunes: int, steps: int, kills: int) -> Chaos:
    """The same tunes twice: undisturbed, then with kills until that many have happened or all tunes are done."""
    victim = Victim(folder / "server")
    victim.start()
    try:
        calm = _tunes(victim.address, folder / "calm", tunes, steps)
        started = time.monotonic()
        with victim.killed_at_random(kills, seed=1):
            wild = _tunes(victim.address, folder / "wild", tunes, steps)
        done = victim.kills
        print(f"chaos: {done} kills, {time.monotonic() - started:.0f} s")
    finally:
        victim.kill()
    changed = sum(not _same(before, after) for before, after in zip(calm, wild, strict=True))
    return Chaos(done, changed, max(0, *(after.steps - before.steps for before, after in zip(calm, wild, strict=True))))


def _same(before: lopa.TuneReport, after: lopa.TuneReport) -> bool:
    close = len(before.losses) == len(after.losses) and all(
        abs(mine - theirs) < TOLERANCE for mine, theirs in zip(before.losses, after.losses, strict=True)
    )
    return close and before.best_step == after.best_step and abs(before.end_nll - after.end_nll) < TOLERANCE
