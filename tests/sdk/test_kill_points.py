"""Death at a random moment of saving, fetching and tuning: the folder opens, at most one step is lost, and everything can go on.

The process dies at a random call that changes the disk: before it, or, for a write, after a random part of it. What was written but not
synced may be gone afterwards, as when the power fails. (Real kills of real processes: test_resume.py.)
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import lopa
import numpy as np
import pytest
from lopa.bundle import Bundle
from lopa.folder import PersonaStore
from lopa.tensorfile import read_metadata

from tests.sdk.conftest import EXAMPLES, SETTINGS
from tests.sdk.test_cache import Shop, visit
from tests.sdk.test_folder import moved

MANY = [pytest.param(30, id="some"), pytest.param(334, marks=pytest.mark.slow, id="many")]
"""Of each kind: three times 334 are the thousand."""


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
    """Comes at the `at`-th call that changes the disk."""

    def __init__(self, rng: random.Random, at: int) -> None:
        self.rng, self.left = rng, at

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

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", self.before(os.fsync))
            patch.setattr(shutil, "rmtree", self.before(shutil.rmtree))
            for name in ("replace", "rename", "unlink"):
                patch.setattr(Path, name, self.before(getattr(Path, name)))
            patch.setattr(Path, "open", opening)
            try:
                yield
            except Died:
                return


def same(factors: lopa.Factors, other: lopa.Factors) -> bool:
    return all(np.array_equal(value, other.tensors[name]) for name, value in factors.tensors.items())


@pytest.mark.parametrize("count", MANY)
def test_saving(bundle: Bundle, tmp_path: Path, count: int) -> None:
    """One folder, one death after the other: it is always at the version before or at the new one."""
    rng, store = random.Random(0), PersonaStore(tmp_path, "default")
    store.create(bundle)
    saved = 0
    for _ in range(count):
        before = store.record()
        old, new = store.factors(before), moved(store, 1e-3).at_rest()
        with Death(rng, rng.randrange(9)).waiting(), store.lock():
            store.append(new, validation_nll=1.0)
        store = PersonaStore(tmp_path, "default")
        after = store.record()
        assert after.current in (before.current, before.current + 1)
        assert same(store.factors(after), new if after.current > before.current else old)
        saved += after.current > before.current
    assert 0 < saved < count
    with store.lock():
        store.append(moved(store, 1e-3), validation_nll=1.0)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("count", MANY)
def test_fetching(bundle: Bundle, tmp_path: Path, count: int) -> None:
    """After each death the next fetch gives the whole bundle, whatever the one before left; tails that were not synced may be gone."""
    rng, cache = random.Random(1), tmp_path / "cache"
    bundle.write_archive(tmp_path / "archive")
    shop = Shop(bundle, (tmp_path / "archive").read_bytes())
    partial, cut = cache / "bundles" / f"{shop.bundle_id}.partial", 0
    with visit(shop, cache) as client:
        for _ in range(count):
            with Death(rng, rng.randrange(24)).waiting():
                client.bundle()
            if partial.exists() and rng.random() < 0.5:
                cut += 1
                os.truncate(partial, rng.randrange(partial.stat().st_size + 1))
            if rng.random() < 0.3:
                assert client.bundle().manifest == bundle.manifest
                shutil.rmtree(cache / "bundles" / shop.bundle_id)
        assert client.bundle().manifest == bundle.manifest and cut
    assert {path.suffix for path in (cache / "bundles").iterdir()} <= {"", ".lock"}


@pytest.mark.parametrize("count", MANY)
def test_tuning(client: lopa.Client, tmp_path: Path, count: int) -> None:
    """Every step that was told is on disk, whatever happens, and the run ends with the same factors as one that nothing happened to."""
    rng = random.Random(2)
    unbroken = client.personal(tmp_path / "unbroken")
    report = unbroken.tune(EXAMPLES, **SETTINGS)
    assert report.kept
    deaths = runs = 0
    while deaths < count:
        runs += 1
        folder, told = tmp_path / f"run{runs}", 0

        def tell(now: lopa.TuneProgress) -> None:
            nonlocal told
            told = now.step

        persona = client.personal(folder)
        while persona.version == 1:
            with Death(rng, rng.randrange(30)).waiting():
                persona.tune(EXAMPLES, on_step=tell, **SETTINGS)
            deaths += 1
            persona = client.personal(folder)
            state = folder / "personas/default/tuning.safetensors"
            on_disk = json.loads(read_metadata(state.read_bytes())["progress"])["step"] if state.exists() else 0
            assert persona.version == 2 or on_disk in (told, told + 1), "at most the step under way is lost"
            told = on_disk  # it may have died between saving a step and telling it
        assert persona.factors_path.read_bytes() == unbroken.factors_path.read_bytes()
