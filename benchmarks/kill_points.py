"""Death at random moments of saving, fetching and tuning: what opens afterwards, and what is lost.

    python benchmarks/kill_points.py --points 1000 --json benchmarks/results/kill-points.json

The device's process dies at a random call that changes the disk: before it, or, for a write, after a random part of it. A download's
tail that was not synced may be gone afterwards, as when the power fails. The server is a real one. (Real kills of real processes:
benchmarks/trust.py.)

`not_opened`: folders and caches that were not at a completed state when they were opened again. `most_steps_lost`: optimizer steps that
were computed and not on disk. `changed`: runs that ended with other factors than one that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import lopa
import numpy as np
from lopa.bundle import Bundle
from lopa.encoder import PromptEncoder
from lopa.folder import PersonaStore
from lopa.tensorfile import read_metadata
from lopa.tuning import TuneOptions

TUNING_CALLS = 30
"""Death comes within so many calls, about five steps; while saving and fetching, within those of the whole."""
TORN, AGAIN = 0.5, 0.3
"""How often a download loses a tail that was not synced, and how often it is let finish, after a death while fetching."""


class Died(BaseException):
    """The process is gone: no handler of ours may catch it."""


class DyingFile:
    """A file whose writes may be the last thing that happens."""

    def __init__(self, file: IO[Any], death: Death) -> None:
        self._file, self._death = file, death

    def write(self, data: bytes) -> int:
        if self._death.now():
            self._file.write(data[: self._death.rng.randrange(len(data) + 1)])
            raise Died
        return self._file.write(data)

    def __enter__(self) -> DyingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Death:
    """Comes at the `at`-th call that changes the disk, and at every later one: nobody acts after it."""

    def __init__(self, rng: random.Random, at: int) -> None:
        self.rng, self.left, self.came = rng, at, False

    def now(self) -> bool:
        self.left -= 1
        return self.left < 0

    def before(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            if self.now():
                raise Died
            return real(*args, **options)

        return wrapper

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, it may come. True to the name, it is not told to anybody."""
        real_open = Path.open

        def opening(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = real_open(path, mode, *args, **options)
            return DyingFile(file, self) if mode in ("wb", "ab") else file

        with ExitStack() as patches:
            patches.enter_context(patch.object(os, "fsync", self.before(os.fsync)))
            patches.enter_context(patch.object(shutil, "rmtree", self.before(shutil.rmtree)))
            for name in ("replace", "rename", "unlink"):
                patches.enter_context(patch.object(Path, name, self.before(getattr(Path, name))))
            patches.enter_context(patch.object(Path, "open", opening))
            try:
                yield
            except Died:
                self.came = True


@dataclass
class Tally:
    """What deaths of one kind did."""

    points: int = 0
    not_opened: int = 0
    most_steps_lost: int = 0
    changed: int = 0
    completed: int = 0
    """Versions, downloads and runs that were done all the same."""


def calls(action: Callable[[], object]) -> int:
    """How often an action changes the disk."""
    never = Death(random.Random(), 1 << 60)
    with never.waiting():
        action()
    return (1 << 60) - never.left


def same(factors: lopa.Factors, other: lopa.Factors) -> bool:
    return all(np.array_equal(value, other.tensors[name]) for name, value in factors.tensors.items())


def saving(bundle: Bundle, folder: Path, points: int, rng: random.Random) -> Tally:
    """One folder, one death after the other: it is always at the version before or at the new one, whole."""
    store, tally = PersonaStore(folder, "default"), Tally()
    store.create(bundle)
    old = store.factors(store.record())

    def save(factors: lopa.Factors) -> None:
        with store.lock():
            store.append(factors, validation_nll=1.0)

    needed = calls(lambda: save(old))
    while tally.points < points:
        before = store.record().current
        new = replace(old, tensors={name: value + np.float32(1e-3) for name, value in old.tensors.items()}).at_rest()
        death = Death(rng, rng.randrange(needed + 1))
        with death.waiting():
            save(new)
        tally.points += death.came
        store = PersonaStore(folder, "default")
        try:
            after = store.record().current
            found = store.factors(store.record())
        except lopa.LopaError:
            tally.not_opened += 1
            return tally
        tally.completed += after > before
        tally.not_opened += after not in (before, before + 1) or not same(found, new if after > before else old)
        old = found
    return tally


def fetching(client: lopa.Client, bundle_id: str, cache: Path, points: int, rng: random.Random) -> Tally:
    """After each death the next fetch gives the whole bundle, whatever the one before left."""
    tally, partial = Tally(), cache / "bundles" / f"{bundle_id}.partial"
    needed = calls(client.bundle)
    shutil.rmtree(cache / "bundles" / bundle_id)
    while tally.points < points:
        death = Death(rng, rng.randrange(needed + 1))
        with death.waiting():
            client.bundle()
            tally.completed += 1
        tally.points += death.came
        if partial.exists() and rng.random() < TORN:
            os.truncate(partial, rng.randrange(partial.stat().st_size + 1))
        if rng.random() < AGAIN or tally.points == points:
            try:
                tally.not_opened += client.bundle().manifest.id != bundle_id
            except lopa.LopaError:
                tally.not_opened += 1
            shutil.rmtree(cache / "bundles" / bundle_id, ignore_errors=True)
    return tally


@contextmanager
def counting_steps() -> Iterator[list[int]]:
    """How many optimizer steps were computed inside."""
    real, count = PromptEncoder.update, [0]

    def update(*args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        count[0] += 1
        return result

    with patch.object(PromptEncoder, "update", update):
        yield count


def steps_on_disk(folder: Path) -> int:
    state = folder / "personas/default/tuning.safetensors"
    return int(json.loads(read_metadata(state.read_bytes())["progress"])["step"]) if state.exists() else 0


def tuning(
    client: lopa.Client, folder: Path, points: int, rng: random.Random, examples: list[lopa.Example], settings: TuneOptions
) -> Tally:
    """Runs that die again and again until they are done. Every step that was told must be on disk, and of those computed all but one."""
    tally, unbroken = Tally(), client.personal(folder / "unbroken")
    if not unbroken.tune(examples, **settings).kept:
        raise RuntimeError("the run keeps nothing: there is nothing to compare")
    while tally.points < points:
        mine, done, told = folder / f"run{tally.completed}", 0, [0]
        persona = client.personal(mine)
        while persona.version == 1:
            death = Death(rng, rng.randrange(TUNING_CALLS))
            with counting_steps() as computed, death.waiting():
                persona.tune(examples, on_step=lambda now, told=told: told.append(now.step), **settings)
            tally.points += death.came
            try:
                persona = client.personal(mine)
                on_disk = settings["steps"] if persona.version > 1 else steps_on_disk(mine)
            except lopa.LopaError:
                tally.not_opened += 1
                break
            tally.most_steps_lost = max(tally.most_steps_lost, done + computed[0] - on_disk)
            tally.not_opened += on_disk < told[-1]
            done, told = on_disk, [on_disk]
        tally.completed += 1
        tally.changed += persona.version > 1 and persona.factors_path.read_bytes() != unbroken.factors_path.read_bytes()
    return tally


def main() -> None:
    from lopa_server.app import ServerConfig, start_server
    from lopa_server.models import nano_bundle_folder, nano_folder
    from report import write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1000, help="in all: a third while saving, fetching and tuning each")
    parser.add_argument("--json", type=Path, help="write machine, figures and rows here")
    args = parser.parse_args()
    each = -(-args.points // 3)
    examples = [lopa.Example(f"def function_{i}(a, b):\n    return ", f"a + {i % 3} * b\n") for i in range(10)]
    settings: TuneOptions = {"steps": 12, "batch_size": 4, "learning_rate": 0.02, "validate_every": 3}
    bundle, server = Bundle.open(nano_bundle_folder()), ServerConfig(fm=nano_folder(), bundle=nano_bundle_folder(), threads=1)
    with tempfile.TemporaryDirectory() as work, start_server(server) as running:
        folder = Path(work)
        with lopa.connect(running.address, config=lopa.ClientConfig(cache=folder / "cache")) as client:
            tallies = {
                "saving": saving(bundle, folder / "saving", each, random.Random(0)),
                "fetching": fetching(client, bundle.manifest.id, folder / "cache", each, random.Random(1)),
                "tuning": tuning(client, folder / "tuning", each, random.Random(2), examples, settings),
            }
    rows = [{"while": name, **asdict(tally)} for name, tally in tallies.items()]
    figures = {"kill_points": sum(tally.points for tally in tallies.values())}
    for name in ("not_opened", "changed"):
        figures[f"kill_points_{name}"] = sum(getattr(tally, name) for tally in tallies.values())
    figures["kill_points_most_steps_lost"] = tallies["tuning"].most_steps_lost
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    for name, value in figures.items():
        print(f"{name:28s} {value:6}")
    write(args.json, figures, rows)


if __name__ == "__main__":
    main()
