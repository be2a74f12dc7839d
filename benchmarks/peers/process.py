"""The measuring side of a peer: its process, and who may compute when.

Whoever isn't being measured is stopped (SIGSTOP), so that no busy waiting of one slows another down.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from peers.worker import Job, Outcome

ROOT = Path(__file__).resolve().parents[2]


class PeerFailed(RuntimeError):
    """A peer could not be built or ended; the message has the end of its log."""


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and its children until `continue_group`."""
    os.killpg(process.pid, signal.SIGSTOP)


def continue_group(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGCONT)


@dataclass
class PeerProcess:
    """One running peer, stopped except while it computes a round."""

    name: str
    process: subprocess.Popen[bytes]
    results: IO[str]
    log: Path

    @classmethod
    def start(cls, name: str, python: Path, job: Job, log: Path, environment: dict[str, str]) -> PeerProcess:
        """Begin to build it; `built` waits for that."""
        read, write = os.pipe()
        command = [str(python), "-m", f"peers.{name}", "--folder", str(job.folder), "--results", str(write)]
        command += [word for field in ("requests", "prompt", "threads") for word in (f"--{field}", str(getattr(job, field)))]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                cwd=ROOT / "benchmarks",
                env=os.environ | environment,
                start_new_session=True,
            )
        os.close(write)
        return cls(name, process, os.fdopen(read), log)

    def built(self) -> None:
        """Wait until it is ready, then stop it. Raises PeerFailed, once it has ended."""
        try:
            self._answer()
        except BaseException:
            self.end()
            raise
        stop_group(self.process)

    def round(self, number: int, new: int) -> Outcome:
        """Raises PeerFailed."""
        continue_group(self.process)
        try:
            if self.process.stdin is None:
                raise PeerFailed(f"{self.name} has no standard input")
            self.process.stdin.write(f"{number} {new}\n".encode())
            self.process.stdin.flush()
            return Outcome(**self._answer())
        finally:
            if self.process.poll() is None:
                stop_group(self.process)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            continue_group(self.process)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.results.close()

    def _answer(self) -> dict[str, float]:
        line = self.results.readline()
        if not line:
            raise PeerFailed(f"{self.name} ended:\n{self.log.read_text(errors='replace')[-1500:]}")
        answer: dict[str, float] = json.loads(line)
        return answer


@contextlib.contextmanager
def ended(peers: dict[str, PeerProcess]) -> Iterator[dict[str, PeerProcess]]:
    """Whatever happens, every peer ends."""
    try:
        yield peers
    finally:
        for peer in peers.values():
            peer.end()
