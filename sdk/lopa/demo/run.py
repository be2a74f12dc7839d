"""Run the demo: start a server, let every user's device tune at the same time, measure, then generate in one mixed batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from threading import Barrier, Thread
from typing import IO, Any

import lopa
from lopa.demo.device import PATIENT, nll_per_token, personal_scores
from lopa.demo.results import DemoResult, MixedBatch, UserResult
from lopa.demo.users import HELD_OUT, TASKS, Item, NoSuchUser, TaskData, load_task

START_SECONDS = 180
"""How long the server may take until it serves."""
STEP_POSITIONS = 4096
"""Larger steps than the server's default: eight devices that tune care for throughput."""
MIXED_TOKENS = 48
MIXED_ROUNDS = 3
MIXED_REQUESTS_PER_USER = 4


class DemoError(lopa.LopaError):
    """A part of the demo could not be started or failed."""


@dataclass(frozen=True)
class DemoOptions:
    users: int = 8
    steps: int | None = None
    """Tuning steps a task; None stands for what `lopa.demo.device.PLANS` says."""
    folder: Path | None = None
    """Where the users' folders go; None for a temporary one."""


Report = Callable[[str, dict[str, Any]], None]
"""Told what happens: (event, values). Events: phase, step, done."""


def choose_users(count: int) -> list[str]:
    """The first `count` held-out packages that this Python has.

    Raises:
        DemoError: there are fewer.
    """
    found = []
    for user in HELD_OUT:
        try:
            for task in TASKS:
                load_task(user, task)
        except NoSuchUser:
            continue
        found.append(user)
        if len(found) == count:
            return found
    raise DemoError(f"{count} users were asked for; this Python has the source of only {len(found)}: {', '.join(found)}")


def compute_dtype() -> str:
    """bfloat16 where the processor multiplies it in hardware, which tunes about twice as fast; else float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


@contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """A `lopa serve` process of its own on a free port; yields its address.

    Raises:
        DemoError: it ended or did not serve in time; the message has the end of its log.
    """
    ready, log = folder / "address", folder / "server.log"
    command = [sys.executable, "-m", "lopa.cli", "serve", "--port", "0", "--ready-file", str(ready), "--dtype", compute_dtype()]
    command += ["--step-positions", str(STEP_POSITIONS)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield ready.read_text().strip()
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tune_all(address: str, folder: Path, users: Sequence[str], steps: int | None, report: Report) -> list[dict[str, Any]]:
    """Every user's device as a process, all at the same time; returns their "done" events.

    Raises:
        DemoError: a device failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOPA_CACHE": str(folder / "cache")}
    devices = []
    for user in users:
        command = [sys.executable, "-m", "lopa.demo.device", "--address", address, "--folder", str(folder / user), "--user", user]
        command += [word for task in TASKS for word in ("--task", task)]
        command += [] if steps is None else ["--steps", str(steps)]
        errors = (folder / f"{user}.log").open("w+")
        devices.append((user, errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)))
    done: list[dict[str, Any]] = []
    try:
        readers = [Thread(target=_follow, args=(process.stdout, done, report)) for _, _, process in devices]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        for user, errors, process in devices:
            if process.wait() != 0:
                errors.seek(0)
                raise DemoError(f"the device of {user} failed:\n{errors.read()[-2000:]}")
    finally:
        for _, errors, process in devices:
            if process.poll() is None:
                process.kill()
            errors.close()
    return done


def _follow(lines: IO[str] | None, done: list[dict[str, Any]], report: Report) -> None:
    """Pass on a device's events; `list.append` is atomic, so devices may share `done`."""
    for line in lines or ():
        values = json.loads(line)
        event = values.pop("event")
        if event == "done":
            done.append(values)
        report(event, values)


def cross_scores(client: lopa.Client, folder: Path, data: dict[tuple[str, str], TaskData]) -> dict[tuple[str, str], dict[str, float]]:
    """NLL per target token of every user's test items under every user's factors, task by task."""
    jobs = [(task, owner) for task in TASKS for owner in dict.fromkeys(user for user, _ in data)]
    table: dict[tuple[str, str], dict[str, float]] = {key: {} for key in data}

    def measure(job: tuple[str, str]) -> None:
        task, owner = job
        persona = client.personal(folder / owner, persona=task)
        for (user, its_task), items in data.items():
            if its_task == task:
                table[user, task][owner] = nll_per_token(personal_scores(persona, items.test))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(measure, jobs))
    return table


def mixed_batch(client: lopa.Client, folder: Path, data: dict[tuple[str, str], TaskData]) -> MixedBatch:
    """All users stream at the same time, with and without soft prompts, in turn; tokens a second, medians over rounds."""
    speakers: list[tuple[lopa.Persona, Item]] = []
    for (user, task), items in data.items():
        persona = client.personal(folder / user, persona=task)
        speakers += [(persona, item) for item in items.test[: MIXED_REQUESTS_PER_USER // len(TASKS)]]
    rates: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(MIXED_ROUNDS):
        for personal in (True, False):
            rates[personal].append(_stream_together([(persona if personal else client, item) for persona, item in speakers]))
    return MixedBatch(len({user for user, _ in data}), len(speakers), median(rates[True]), median(rates[False]))


def _stream_together(speakers: Sequence[tuple[lopa.Persona | lopa.Client, Item]]) -> float:
    """Tokens a second over all streams, from the common start to the last token."""
    barrier = Barrier(len(speakers) + 1)

    def stream(speaker: lopa.Persona | lopa.Client, item: Item) -> int:
        barrier.wait()
        return sum(
            len(delta.token_ids)
            for delta in speaker.stream(item.prompt, prefix=item.prefix or None, max_tokens=MIXED_TOKENS, ignore_end=True)
        )

    with ThreadPoolExecutor(len(speakers)) as pool:
        futures = [pool.submit(stream, speaker, item) for speaker, item in speakers]
        barrier.wait()
        started = time.monotonic()
        tokens = sum(future.result() for future in futures)
        return tokens / (time.monotonic() - started)


def run(options: DemoOptions, report: Report) -> DemoResult:
    """The whole demo.

    Raises:
        DemoError: too few users on this machine, or a process failed.
        LopaError: the server refused something.
    """
    users = choose_users(options.users)
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str, title: str) -> Iterator[None]:
        report("phase", {"name": name, "title": title})
        started = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - started, 1)

    with tempfile.TemporaryDirectory(prefix="lopa-demo-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data = {(user, task): load_task(user, task) for user in users for task in TASKS}
        with ExitStack() as stack:
            with phase("start", "the server starts and warms up"):
                address = stack.enter_context(running_server(Path(temporary)))
            with phase("tune", f"{len(users)} devices tune at the same time"):
                done = tune_all(address, folder, users, options.steps, report)
            client = stack.enter_context(lopa.connect(address, config=replace(PATIENT, cache=folder / "cache")))
            with phase("cross", "every user's items under every user's factors"):
                table = cross_scores(client, folder, data)
            with phase("mixed", "all users generate in one batch"):
                mixed = mixed_batch(client, folder, data)
            fm = {"name": client.model.name, "fingerprint": client.model.fingerprint, "dtype": compute_dtype()}
    results = [_result(values, table[values["user"], values["task"]]) for values in done]
    results.sort(key=lambda result: (TASKS.index(result.task), users.index(result.name)))
    return DemoResult(results, mixed, fm, seconds)


def _result(values: dict[str, Any], row: dict[str, float]) -> UserResult:
    others = [nll for owner, nll in row.items() if owner != values["user"]]
    fields = {name: value for name, value in values.items() if name not in ("user", "kept")}
    return UserResult(name=values["user"], other_nll=fmean(others), nll_by_factors=row, **fields)
