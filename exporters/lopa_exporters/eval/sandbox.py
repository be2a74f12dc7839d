"""Running code that a model wrote, against tests, at a distance.

Two processes without site-packages, each confined for good before it reads anything (`jail.confine`): a worker that executes the
code, and a judge that holds the tests. The judge asks for values and compares them on its own side (`jail.judge`), so a verdict
can't be forged: there is no token to find and no assert to reach.

What is guaranteed: CPU seconds, memory, and wall-clock time are bounded, output goes nowhere, the environment is empty, and both
processes are killed at the end. Whether processes, network, writing and reading strangers' files are prevented depends on the
machine (Linux on x86-64 or arm64: yes): `Sandbox.measure` tries them. It is no virtual machine: a hole in the kernel is a hole here.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopa_exporters.eval.jail import channel

FOLDER = Path(__file__).parent
BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from jail.{role} import main; main()"
LONGEST_PROGRAM = 1 << 20
"""Bytes of a program or test."""
NOBODY = 65534


class SandboxError(RuntimeError):
    """The sandbox itself can't be used here."""


class CodeExecutionRefused(ValueError):
    """Nobody said that a model's code may be executed."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    cpu_seconds: int = 10
    """mxeval's and CruxEval's own timeouts are 10 s of wall-clock time; CPU time does not depend on what else the machine does."""
    wall_seconds: float = 30.0
    memory_bytes: int = 1 << 30
    """Address space."""
    reply_bytes: int = 1 << 20
    """One value that it returns."""
    files: int = 32

    def __post_init__(self) -> None:
        if min(self.cpu_seconds, self.files, self.reply_bytes) < 1 or self.wall_seconds <= 0 or self.memory_bytes < 64 << 20:
            raise ValueError("cpu_seconds, wall_seconds, reply_bytes and files must be positive, memory_bytes at least 64 MiB")

    def inside(self) -> str:
        """For the processes, as JSON."""
        names = ("cpu_seconds", "memory_bytes", "files", "reply_bytes")
        return json.dumps({name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Verdict:
    """reason: one line of printable characters; of a failure it may hold text that the program chose."""

    passed: bool
    reason: str


@dataclass(frozen=True)
class Check:
    """One program with its test.

    test: source of a function `check(candidate)` that asserts; trusted.
    entry: the program's function that `candidate` calls. expression: instead, an expression whose value `candidate()` is.
    """

    program: str
    test: str
    entry: str = ""
    expression: str | None = None


class Sandbox:
    """Judges programs. It keeps nothing between them."""

    def __init__(self, limits: Limits | None = None, *, allow_code_execution: bool) -> None:
        """Raises:
        CodeExecutionRefused: unless allowed in so many words. SandboxError: not a POSIX system.
        """
        if not allow_code_execution:
            raise CodeExecutionRefused("this task executes code that a model wrote: say so with --allow-code-execution")
        if os.name != "posix":
            raise SandboxError("programs are executed on POSIX systems only")
        self.limits = limits or Limits()

    def check(self, check: Check) -> Verdict:
        """Run one program against its test."""
        if max(len(check.program), len(check.test), len(check.expression or "")) > LONGEST_PROGRAM:
            return Verdict(False, f"longer than {LONGEST_PROGRAM} characters")
        job = {"program": check.program, "entry": check.entry, "expression": check.expression}
        with _Pair(self.limits) as pair:
            try:
                verdict = pair.judge(job, check.test)
            except TimeoutError:
                return Verdict(False, f"not finished after {self.limits.wall_seconds:g} s")
        if verdict is None:
            return Verdict(False, "the test did not finish")
        # What the program chose may have line ends in it, or orders to a terminal.
        reason = "".join(character if character.isprintable() else " " for character in str(verdict["reason"]))
        return Verdict(verdict["passed"] is True, reason)

    def check_all(self, checks: Sequence[Check], processes: int = 0) -> Iterator[Verdict]:
        """Verdicts in order. processes: how many at the same time; 0 is the machine's cores."""
        with ThreadPoolExecutor(processes or os.cpu_count() or 1) as pool:
            yield from pool.map(self.check, checks)

    def measure(self) -> dict[str, Any]:
        """What a program could still do here, by trying: "possible" (processes, network, writing, reading) and "measures" taken.

        Raises:
            SandboxError: no confined process could be started.
        """
        with _Pair(self.limits) as pair:
            found = pair.ask({"attempts": True})
        if not found or "possible" not in found:
            raise SandboxError(f"no confined process could be started: {(found or {}).get('unusable', 'it ended at once')}")
        return dict(found)


class _Pair:
    """Worker and judge of one check, in a fresh folder; both are killed at the end, with all that they started."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Pair:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lopa-eval-", ignore_cleanup_errors=True))
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        self.folder = folder
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def judge(self, job: dict[str, Any], test: str) -> Any:
        """The judge's verdict, or None when it ended without one.

        Raises:
            TimeoutError: the time is over.
        """
        requests, replies = self._worker(job)
        judge = self._start("judge", (requests, replies), subprocess.PIPE)
        self._close(requests, replies)
        if judge.stdin is None or judge.stdout is None:
            raise SandboxError("the judge was started without pipes")
        with contextlib.suppress(BrokenPipeError):
            judge.stdin.write(test.encode("utf-8", "surrogatepass"))
            judge.stdin.close()
        return self._read(judge.stdout.fileno())

    def ask(self, job: dict[str, Any]) -> Any:
        """The worker's first reply."""
        requests, replies = self._worker(job)
        reply = self._read(replies)
        self._close(requests, replies)
        return reply

    def _worker(self, job: dict[str, Any]) -> tuple[int, int]:
        """Start it with a job; the ends for asking and hearing it."""
        read_requests, requests = os.pipe()
        replies, write_replies = os.pipe()
        self._start("worker", (read_requests, write_replies), subprocess.DEVNULL)
        self._close(read_requests, write_replies)
        with contextlib.suppress(BrokenPipeError):
            channel.send(requests, job, 16 * LONGEST_PROGRAM)
        return requests, replies

    def _start(self, role: str, pipes: tuple[int, int], streams: int) -> subprocess.Popen[bytes]:
        """One process: its own session, an empty environment, no pipes but its own. streams: its input and output."""
        command = [sys.executable, "-I", "-S", "-B", "-c", BOOT.format(role=role), str(FOLDER), *map(str, pipes), self.limits.inside()]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={},
            pass_fds=pipes,
            stdin=streams,
            stdout=streams,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._stack.callback(_end, process)
        return process

    def _read(self, pipe: int) -> Any:
        """One message before the time is over, counted from now; None at the end."""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            # Once more at the end: this process may have been stopped meanwhile, and the other one finished.
            if not selector.select(self.limits.wall_seconds) and not selector.select(0):
                raise TimeoutError
        # Whoever wrote its first byte is about to write the rest: no untrusted code has this pipe while a verdict is awaited.
        try:
            return channel.receive(pipe, self.limits.reply_bytes)
        except channel.ChannelError:
            return None

    def _close(self, *pipes: int) -> None:
        for pipe in pipes:
            os.close(pipe)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and everything in its session, and collect it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    process.wait()
