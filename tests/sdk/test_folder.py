"""A user's folder on disk: written whole or not at all, checked on reading."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import lopa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lopa import files
from lopa.bundle import Bundle
from lopa.folder import KEPT_VERSIONS, PersonaStore
from lopa.manifest import TensorSpec
from lopa.tensorfile import read_metadata, read_tensors, write_tensors
from safetensors.numpy import load


@pytest.fixture
def store(bundle: Bundle, tmp_path: Path) -> PersonaStore:
    store = PersonaStore(tmp_path / "me", "default")
    store.create(bundle)
    return store


def moved(store: PersonaStore, by: float) -> lopa.Factors:
    factors = store.factors(store.record())
    return dataclasses.replace(factors, tensors={name: value + np.float32(by) for name, value in factors.tensors.items()})


def test_a_file_is_what_other_readers_expect(store: PersonaStore) -> None:
    data = store.factors_path(1).read_bytes()
    record = store.record()
    arrays = load(data)
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        spec.name: ({"F16": "float16", "F32": "float32"}[spec.dtype], spec.shape) for spec in record.tensors
    }
    metadata = read_metadata(data)
    assert metadata["bundle_id"] == record.bundle_id and metadata["fm_fingerprint"] == record.fm_fingerprint
    assert store.factors(record).to_bytes() == data


def test_versions_grow_and_the_oldest_go(store: PersonaStore) -> None:
    with store.lock():
        for i in range(KEPT_VERSIONS + 2):
            store.append(moved(store, 0.001), validation_nll=1.0 - i / 100)
    record = store.record()
    assert record.current == KEPT_VERSIONS + 3 and len(record.versions) == KEPT_VERSIONS
    assert sorted(store.factors_path(1).parent.glob("*")) == [store.factors_path(version.version) for version in record.versions]
    assert record.versions[-1].parent == record.current - 1


@pytest.mark.parametrize("crash_at", range(4))
def test_a_crash_between_any_two_writes_leaves_the_version_before(
    store: PersonaStore, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    """Two files, each a write and a rename: the process dies before one of the four."""

    class Died(BaseException):
        pass

    calls = []
    real_sync, real_replace = files.os.fsync, Path.replace

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object) -> object:
            calls.append(1)
            if len(calls) == crash_at + 1:
                raise Died
            return real(*args)

        return wrapper

    before = store.factors(store.record())
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", counted(real_sync))
        patch.setattr(files, "sync_folder", lambda _: None)
        patch.setattr(Path, "replace", counted(real_replace))
        with pytest.raises(Died), store.lock():
            store.append(moved(store, 0.1), validation_nll=1.0)
    reopened = PersonaStore(store.root, "default")
    record = reopened.record()
    assert record.current == 1
    assert all(np.array_equal(reopened.factors(record).tensors[name], value) for name, value in before.tensors.items())
    with reopened.lock():
        assert reopened.append(moved(reopened, 0.2), validation_nll=0.5).version == 2
    assert not list(store.folder.rglob("*.tmp"))
    assert reopened.factors(reopened.record()).finite


def test_creation_that_crashed_is_done_again(bundle: Bundle, store: PersonaStore) -> None:
    (store.folder / "persona.json").unlink()
    assert not store.exists
    store.create(bundle)
    assert store.record().current == 1


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    changed = {"flip": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-2], "longer": data + b"\0", "empty": b""}
    path.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["flip", "cut", "longer", "empty"])
def test_damaged_factors_are_told_and_rolled_back_from(store: PersonaStore, how: str) -> None:
    with store.lock():
        store.append(moved(store, 0.1), validation_nll=1.0)
    damage(store.factors_path(2), how)
    with pytest.raises(lopa.FactorsError, match="rollback"):
        store.factors(store.record())
    store.rollback(1)
    assert store.factors(store.record()).finite
    with pytest.raises(lopa.FactorsError):
        store.rollback(2)
    assert store.record().current == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(schema=2),
        lambda document: document.update(current=7),
        lambda document: document.update(bundle_id="x"),
        lambda document: document.pop("versions"),
        lambda document: document.update(extra=1),
        lambda document: document["tensors"][0].update(dtype="F64"),
        lambda document: document.update(tensors=3),
    ],
)
def test_a_damaged_record_is_told(store: PersonaStore, change: Callable[[dict[str, object]], object]) -> None:
    path = store.folder / "persona.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(lopa.FolderError, match=r"persona.json is damaged"):
        store.record()


def test_factors_without_a_record_are_not_written_over(bundle: Bundle, store: PersonaStore) -> None:
    with store.lock():
        store.append(moved(store, 0.1), validation_nll=1.0)
    tuned = store.factors_path(2).read_bytes()
    (store.folder / "persona.json").unlink()
    with pytest.raises(lopa.FolderError, match="has lost its persona"):
        store.create(bundle)
    assert store.factors_path(2).read_bytes() == tuned


def test_a_record_that_may_not_be_read_is_not_called_damaged(store: PersonaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for owner, name, look in ((os, "open", store.record), (Path, "stat", lambda: store.exists)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(lopa.StorageError, match="not allowed"):
                look()


def test_no_folder_and_another_schema(store: PersonaStore, tmp_path: Path) -> None:
    with pytest.raises(lopa.FolderError, match="has no persona default"):
        lopa.open_personal(tmp_path / "nowhere")
    with pytest.raises(lopa.FolderError, match="not a personal folder"):
        lopa.personas(tmp_path)
    (store.root / "lopa.json").write_text('{"schema": 9}')
    with pytest.raises(lopa.FolderError, match="schema 9"):
        store.record()


def _hold(store: PersonaStore, held: object, release: object) -> None:
    with store.lock():
        held.set()  # type: ignore[attr-defined]
        release.wait(240)  # type: ignore[attr-defined]


def test_the_lock_holds_between_processes_and_falls_with_them(store: PersonaStore) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(store, held, release))
    process.start()
    try:
        assert held.wait(240)
        with pytest.raises(lopa.FolderError, match="another process"), store.lock():
            pass
    finally:
        process.kill()
        process.join()
    with store.lock():
        assert store.record().current == 1


SPECS = (TensorSpec("a", (2, 3)), TensorSpec("b.c", (5,), "F16"))


@given(st.lists(st.floats(-6e4, 6e4, width=16), min_size=11, max_size=11))
def test_tensors_come_back_as_they_were(values: list[float]) -> None:
    flat = np.array(values, np.float32)
    tensors = {"a": flat[:6].reshape(2, 3), "b.c": flat[6:]}
    data = write_tensors(tensors, SPECS, {"k": "v"})
    assert data == write_tensors(dict(reversed(tensors.items())), SPECS[::-1], {"k": "v"})
    back = read_tensors(data, SPECS)
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors) and read_metadata(data) == {"k": "v"}


@given(st.binary(max_size=200) | st.tuples(st.integers(0, 200), st.integers(0, 255)))
def test_no_bytes_do_more_than_raise(noise: bytes | tuple[int, int]) -> None:
    """Random bytes, and a sound file with one byte changed, either parse to the right shapes or raise FactorsError."""
    data = write_tensors({"a": np.ones((2, 3), np.float32), "b.c": np.ones(5, np.float32)}, SPECS, {})
    if isinstance(noise, tuple):
        at, value = noise[0] % len(data), noise[1]
        data = data[:at] + bytes([value]) + data[at + 1 :]
    else:
        data = noise
    try:
        tensors = read_tensors(data, SPECS)
    except lopa.FactorsError:
        return
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"a": (2, 3), "b.c": (5,)}


@pytest.mark.parametrize(
    "wrong", [SPECS[:1], (*SPECS, TensorSpec("z", (1,))), (TensorSpec("a", (3, 2)), SPECS[1]), (SPECS[0], TensorSpec("b.c", (5,)))]
)
def test_other_tensors_than_expected(wrong: tuple[TensorSpec, ...]) -> None:
    data = write_tensors({"a": np.ones((2, 3), np.float32), "b.c": np.ones(5, np.float32)}, SPECS, {})
    with pytest.raises(lopa.FactorsError):
        read_tensors(data, wrong)


def test_rounding_at_rest_is_what_the_file_holds(store: PersonaStore) -> None:
    factors = moved(store, 0.12345)
    again = lopa.Factors.from_bytes(factors.to_bytes(), factors.specs)
    assert all(np.array_equal(again.tensors[name], value) for name, value in factors.at_rest().tensors.items())
    huge = moved(store, 1e6).at_rest()
    assert not huge.finite
    with pytest.raises(lopa.FactorsError, match="not finite"):
        lopa.Factors.from_bytes(huge.to_bytes(), huge.specs)
