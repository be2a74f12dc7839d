"""Damaged or hostile files and text: every one is refused with an error of the tree, and nothing is read without a bound."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import lopa
import numpy as np
import pytest
from lopa.bundle import Bundle, extract_archive
from lopa.encoder import Moments, PromptEncoder
from lopa.errors import BundleError, FactorsError, FolderError, InvalidRequest, TuningError
from lopa.examples import text_for_encoder
from lopa.factors import Factors
from lopa.folder import PersonaStore, personas
from lopa.manifest import MANIFEST, AlignedSpec, Manifest, PriorSpec, TensorSpec, TuningDefaults
from lopa.priors import trial_steps
from lopa.protocol.requests import prompt_message, target_message
from lopa.sources import read_jsonl
from lopa.tensorfile import write_tensors
from lopa.tune_state import Progress, TuneState, load_state

DEEP = "[" * 200_000
STEPS = 12


@pytest.fixture
def store(bundle: Bundle, tmp_path: Path) -> PersonaStore:
    store = PersonaStore(tmp_path / "me", "default")
    store.create(bundle)
    return store


def endless(path: Path, kind: str) -> None:
    """Replace a file by one that never ends, or that never begins."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.skipif(sys.platform == "win32", reason="needs devices and named pipes in the file system")
@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_only_regular_files_are_read(store: PersonaStore, bundle: Bundle, tmp_path: Path, kind: str) -> None:
    record = store.record()
    endless(store.factors_path(1), kind)
    with pytest.raises(FactorsError, match="not a regular file"):
        store.factors(record)
    endless(store.tuning_path, kind)
    with pytest.raises(FolderError, match="not a regular file"):
        load_state(store, "0" * 64, record.tensors, STEPS)
    endless(store.folder / "persona.json", kind)
    with pytest.raises(FolderError, match="not a regular file"):
        lopa.open_personal(store.root)
    endless(store.root / "lopa.json", kind)
    with pytest.raises(FolderError, match="not a regular file"):
        personas(store.root)
    copy = extract_archive(archived(bundle, tmp_path), tmp_path / "copy")
    for name in ("encode.onnx", MANIFEST):
        endless(copy.path(name), kind)
        with pytest.raises(BundleError):
            Bundle.open(copy.folder)


@pytest.mark.parametrize("text", [DEEP, "[]", "null", "{}", '{"schema": 9}', "\xff", " " * (2 << 20)], ids=lambda text: text[:9])
def test_damaged_json_is_a_folder_error(store: PersonaStore, bundle: Bundle, text: str) -> None:
    for path in (store.folder / "persona.json", store.root / "lopa.json"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(FolderError):
            store.record()
    with pytest.raises(FolderError):
        personas(store.root)
    with pytest.raises(FolderError):
        PersonaStore(store.root, "other").create(bundle)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((("versions", 0, "version"), value) for value in (1.0, True, None, "../../x", 0, -1)),
        *((("versions", 0, "size"), value) for value in (0, 1 << 40, "1")),
        (("versions", 0, "created"), "\ud800"),
        (("versions", 0, "validation_nll"), float("nan")),
        *((("tensors", 0, "shape", 0), value) for value in (float("inf"), 1.5, 0, 1 << 30)),
        (("tensors", 0, "shape"), [1 << 20, 1 << 20]),
        (("current",), 1.0),
        (("fm_name",), None),
    ],
    ids=str,
)
def test_a_record_out_of_range_is_a_folder_error(store: PersonaStore, place: tuple[Any, ...], value: object) -> None:
    path = store.folder / "persona.json"
    document = json.loads(path.read_text())
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(FolderError, match="damaged"):
        store.record()


def test_a_deep_header_is_refused(store: PersonaStore) -> None:
    record = store.record()
    data = len(DEEP).to_bytes(8, "little") + DEEP.encode()
    store.tuning_path.write_bytes(data)
    with pytest.raises(FolderError, match="damaged"):
        load_state(store, "0" * 64, record.tensors, STEPS)
    with pytest.raises(FactorsError, match="damaged"):
        Factors.from_bytes(data, record.tensors)


SOUND: dict[str, Any] = {"step": 1, "before_nll": 2.0, "best_nll": 2.0, "losses": [1.0], "gradient_norms": [1.0], "validation": [(0, 2.0)]}


def resumed(store: PersonaStore, **changes: Any) -> TuneState | None:
    specs = store.record().tensors
    tensors = store.factors(store.record()).tensors
    TuneState("0" * 64, tensors, Moments.zeros(specs), tensors, Progress(**{**SOUND, **changes})).save(store)
    return load_state(store, "0" * 64, specs, STEPS)


def test_sound_progress_comes_back(store: PersonaStore) -> None:
    state = resumed(store, before_nll=float("inf"))
    assert state is not None and state.progress == Progress(**{**SOUND, "before_nll": float("inf")})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("step", value) for value in ("x", None, True, -5, 0, STEPS, 10**9)),
        *(("best_nll", value) for value in (None, float("nan"), -float("inf"))),
        *(("candidate", value) for value in (None, 1, [])),
        *(("candidate_nll", value) for value in (None, "x", float("nan"))),
        *(("judged_step", value) for value in (None, -1, 2, 0.5)),
        *(("losses", value) for value in (None, ["x"], [])),
        *(("validation", value) for value in ([1], [(0,)], [("x", 1.0)], [(5, 1.0)], [], None)),
        *(("outcome", value) for value in ("finished", "x", [])),
        ("best_step", 2),
        *(("seconds", value) for value in ("x", 10**400)),
        ("unknown", 1),
    ],
    ids=str,
)
def test_damaged_progress_is_a_folder_error(store: PersonaStore, monkeypatch: pytest.MonkeyPatch, field: str, value: object) -> None:
    text = json.dumps({**SOUND, field: value})
    monkeypatch.setattr("lopa.tune_state.Progress.to_json", lambda _: text)
    with pytest.raises(FolderError, match="damaged"):
        resumed(store)


@pytest.mark.parametrize(("step", "last", "sound"), [(1, 0, True), (5, 5, True), (5, 4, False), (6, 5, False)])
def test_a_candidate_waits_for_its_trial_only(store: PersonaStore, step: int, last: int, *, sound: bool) -> None:
    """It is judged by what was measured after the trial's last step."""
    assert trial_steps(STEPS) == 5
    progress = {"step": step, "losses": [1.0] * step, "gradient_norms": [1.0] * step, "validation": [(0, 2.0), (last, 2.0)]}
    if sound:
        assert resumed(store, candidate="naming", **progress) is not None
        return
    with pytest.raises(FolderError, match="damaged"):
        resumed(store, candidate="naming", **progress)


def test_a_foreign_folder_among_the_leftovers_is_left_alone(store: PersonaStore) -> None:
    (store.folder / ".x.tmp").mkdir()
    with store.lock():
        assert (store.folder / ".x.tmp").is_dir()


def archived(bundle: Bundle, folder: Path) -> Path:
    bundle.write_archive(folder / "bundle.zip")
    return folder / "bundle.zip"


def test_a_compressed_archive_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with zipfile.ZipFile(archived(bundle, tmp_path)) as stored, zipfile.ZipFile(tmp_path / "small.zip", "w", zipfile.ZIP_DEFLATED) as small:
        for name in stored.namelist():
            small.writestr(name, stored.read(name))
    with pytest.raises(BundleError, match="compressed"):
        extract_archive(tmp_path / "small.zip", tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (field, value)
            for field in ("learning_rate", "clip", "weight_decay")
            for value in (-1.0, float("nan"), float("inf"), True, "1", None)
        ),
        ("learning_rate", 0.0),
        ("clip", 0),
        ("weight_decay", 10**400),
    ],
)
def test_tuning_defaults_must_be_numbers_in_range(bundle: Bundle, field: str, value: Any) -> None:
    changed = dataclasses.replace(bundle.manifest, tuning=dataclasses.replace(TuningDefaults(), **{field: value}))
    with pytest.raises(BundleError, match=f"tuning.{field}"):
        Manifest.from_json(changed.to_json())


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 20), (1,) * 65])
def test_a_tensor_beyond_any_use_is_refused(bundle: Bundle, shape: tuple[int, ...]) -> None:
    changed = dataclasses.replace(bundle.manifest, personal=(TensorSpec("a", shape),))
    with pytest.raises(BundleError, match=r"personal\.a\.shape"):
        Manifest.from_json(changed.to_json())


@pytest.mark.parametrize(
    ("names", "spread", "words"),
    [
        (("nobody",), 1.0, "manifest.aligned has nobody"),
        (("W1u.Q", "W1u.Q"), 1.0, "manifest.aligned has W1u.Q, W1u.Q"),
        *((("W1u.Q",), spread, r"aligned.W1u.Q.spread") for spread in (0.0, -1.0, float("nan"), float("inf"), "1", True)),
    ],
)
def test_aligned_tensors_out_of_range_are_refused(bundle: Bundle, names: tuple[str, ...], spread: Any, words: str) -> None:
    changed = dataclasses.replace(bundle.manifest, aligned=tuple(AlignedSpec(name, spread) for name in names))
    with pytest.raises(BundleError, match=words):
        Manifest.from_json(changed.to_json())


def test_a_width_that_would_fill_the_memory_is_refused(bundle: Bundle) -> None:
    """Instance tensors are kept for every example; what aligned tensors read is for hundreds at a time."""
    wide = TensorSpec("wide", (1 << 20, 1), "F16")
    for changes, words in (
        ({"instance": (TensorSpec("x", (1 << 24, 16)),)}, "manifest.instance, all elements is 268435456"),
        (
            {"personal": (*bundle.manifest.personal, wide), "aligned": (AlignedSpec("wide"),)},
            "manifest.aligned, all that is read is 1048576",
        ),
    ):
        with pytest.raises(BundleError, match=words):
            Manifest.from_json(dataclasses.replace(bundle.manifest, **changes).to_json())


@pytest.mark.parametrize("name", [None, 5, "x" * 2000])
def test_names_that_are_no_short_text_are_refused(bundle: Bundle, name: Any) -> None:
    """A persona's record or its tuning file would hold them and then not be read again."""
    manifest = bundle.manifest
    for changes, field in (
        ({"fm": dataclasses.replace(manifest.fm, name=name)}, r"fm\.name"),
        ({"encoder": dataclasses.replace(manifest.encoder, name=name)}, r"encoder\.name"),
        ({"profile": name}, "profile"),
        ({"composition": name}, "composition"),
        ({"priors": (PriorSpec(name),)}, r"priors\.0\.name"),
        ({"aligned": (AlignedSpec(name),), "personal": (TensorSpec(str(name)[:100], (2, 2)),)}, r"aligned\.0\.name"),
    ):
        with pytest.raises(BundleError, match=rf"manifest\.{field} is .* text"):
            Manifest.from_json(dataclasses.replace(manifest, **changes).to_json())


@pytest.mark.parametrize(
    "path", ["rows", "tuning.clip", "tuning.steps", "encoder.truncation_side", "schema", "id", "fm.unknown", "personal.0.dtype"]
)
def test_an_error_quotes_little_of_a_manifest(bundle: Bundle, path: str) -> None:
    """A megabyte of it would end in whoever's log."""
    document = json.loads(bundle.manifest.to_json())
    *parents, last = path.split(".")
    place = document
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = "x" * 100_000
    if last == "unknown":
        place["y" * 100_000] = place.pop(last)
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps(document))
    assert len(str(caught.value)) < 500


def test_a_start_that_is_not_finite_makes_no_persona(bundle: Bundle, store: PersonaStore, tmp_path: Path) -> None:
    """Its first version could never be read back; nor may a migration begin there."""
    copy = extract_archive(archived(bundle, tmp_path), tmp_path / "copy")
    specs = bundle.manifest.personal
    copy.path("factors.safetensors").write_bytes(write_tensors({spec.name: np.full(spec.shape, np.nan) for spec in specs}, specs, {}))
    new = PersonaStore(tmp_path / "new", "default")
    with pytest.raises(FactorsError, match=r"factors\.safetensors of bundle .* not finite"):
        new.create(copy)
    assert not new.exists
    with pytest.raises(FactorsError, match="not finite"):
        store.rebase(copy)
    assert store.factors(store.record()).bundle_id == bundle.manifest.id


def test_a_deep_manifest_is_refused() -> None:
    with pytest.raises(BundleError, match="not a bundle manifest"):
        Manifest.from_json(DEEP)


def test_soft_prompts_that_are_not_finite_are_refused(bundle: Bundle) -> None:
    encoder = PromptEncoder(bundle)
    tensors = {name: np.full_like(value, np.nan) for name, value in Factors.start(bundle).tensors.items()}
    with pytest.raises(FactorsError, match="not finite"):
        encoder.compose(encoder.encode(["x"]), tensors)


def test_lone_surrogates_are_refused_by_field(bundle: Bundle) -> None:
    text = "a\udcff"
    chat = [{"role": "user", "content": text}]
    for call, field in (
        (lambda: prompt_message(text), "prompt"),
        (lambda: prompt_message(chat), "prompt[0].content"),
        (lambda: target_message(text, False), "target"),
        (lambda: text_for_encoder(text, None), "prompt"),
        (lambda: text_for_encoder("a", text), "encoder_text"),
        (lambda: text_for_encoder(chat, None), "prompt"),
        (lambda: PromptEncoder(bundle).encode(["a", text]), "texts[1]"),
    ):
        with pytest.raises(InvalidRequest, match="lone surrogate") as caught:
            call()
        assert caught.value.field == field


def test_a_deep_line_of_examples_is_named(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"prompt": "a", "target": "b"}\n' + DEEP)
    with pytest.raises(TuningError, match=r"examples\.jsonl:2: "):
        read_jsonl(path)
