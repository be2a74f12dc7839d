"""A persona's life beyond one device, one model and one owner of the disk: encrypted, moved, migrated."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import lopa
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lopa.bundle import Bundle
from lopa.folder import PersonaStore
from lopa.vault import KEY_BYTES, Lock, Vault

from tests.sdk.conftest import EXAMPLES, SETTINGS
from tests.tiny import build_tiny_fm
from tests.tiny_bundle import build_tiny_bundle

KEY = bytes(range(KEY_BYTES))


@pytest.fixture(scope="module")
def tuned(address: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encrypted persona that was tuned, keeps its examples, and has an unfinished run."""
    folder = tmp_path_factory.mktemp("sealed") / "me"
    with lopa.connect(address, config=lopa.ClientConfig(cache=cache)) as client:
        persona = client.personal(folder, secret="correct horse")
        assert persona.tune(EXAMPLES, keep_examples=True, **SETTINGS).kept
        persona.tune(EXAMPLES, **{**SETTINGS, "max_steps": 2})
    return folder


def test_nothing_personal_is_readable_without_the_secret(tuned: Path, client: lopa.Client) -> None:
    persona = client.personal(tuned, secret="correct horse")
    assert persona.version == 2 and persona.unfinished and persona.kept_examples == [*persona.kept_examples]
    assert sorted(str(one.prompt) for one in persona.kept_examples) == sorted(str(one.prompt) for one in EXAMPLES)
    for path in (tuned / "personas/default").rglob("*"):
        if path.is_file() and path.name not in ("persona.json", "lock"):
            data = path.read_bytes()
            assert data.startswith(b"lopa.sealed.1\n") and b"bundle_id" not in data and b"function_" not in data
    for secret, words in ((None, "is encrypted"), ("wrong horse", "wrong passphrase"), (KEY, "encrypted with a passphrase")):
        with pytest.raises(lopa.FolderError, match=words):
            client.personal(tuned, secret=secret)
    assert lopa.open_personal(tuned).history()[-1].origin == "tune"
    with pytest.raises(lopa.FolderError, match="is encrypted"):
        _ = lopa.open_personal(tuned).factors


def test_an_encrypted_run_goes_on_and_the_secret_changes_nothing_else(client: lopa.Client, tmp_path: Path) -> None:
    plain, sealed = client.personal(tmp_path / "plain"), client.personal(tmp_path / "sealed", secret=KEY)
    plain.tune(EXAMPLES, **SETTINGS)
    assert sealed.tune(EXAMPLES, **{**SETTINGS, "max_steps": 5}).outcome == "max_steps"
    again = client.personal(tmp_path / "sealed", secret=KEY)
    assert again.tune(EXAMPLES, **SETTINGS).resumed_from == 5
    assert all(np.array_equal(again.factors.tensors[name], value) for name, value in plain.factors.tensors.items())
    again.rollback(1)
    assert again.generate("def f(", max_tokens=2).receipt is not None
    with pytest.raises(lopa.FolderError, match="not encrypted"):
        client.personal(tmp_path / "plain", secret=KEY)
    for secret in ("", b"short"):
        with pytest.raises(lopa.InvalidRequest, match="secret"):
            client.personal(tmp_path / "new", secret=secret)
        assert not (tmp_path / "new/personas/default/persona.json").exists()


def test_sealed_files_can_be_neither_changed_nor_exchanged(client: lopa.Client, tmp_path: Path) -> None:
    persona = client.personal(tmp_path, secret=KEY)
    assert persona.tune(EXAMPLES, keep_examples=True, **SETTINGS).kept
    kept = tmp_path / "personas/default/examples.jsonl"
    kept.write_bytes(persona.factors_path.read_bytes())
    with pytest.raises(lopa.FolderError, match="exchanged"):
        _ = persona.kept_examples
    persona.forget_examples()
    assert persona.kept_examples == []


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(1, 255))
@settings(max_examples=60)
def test_a_vault_opens_only_what_it_sealed(data: bytes, at: int, change: int) -> None:
    vault = Vault.new(KEY)
    sealed = bytearray(vault.seal(data, "a"))
    assert vault.open(bytes(sealed), "a") == data
    sealed[at % len(sealed)] ^= change
    with pytest.raises(ValueError, match="a "):
        vault.open(bytes(sealed), "a")


@pytest.mark.parametrize(
    "change", [{"n": 1 << 30}, {"n": 3}, {"r": 0}, {"p": 1 << 20}, {"salt": "zz"}, {"kdf": "md5"}, {"check": 5}, {"x": 1}]
)
def test_a_hostile_lock_is_refused_before_any_work(change: dict[str, object]) -> None:
    row = {"kdf": "scrypt", "check": "00", "salt": "00" * 16, "n": 1 << 15, "r": 8, "p": 3, **change}
    with pytest.raises((ValueError, TypeError)):
        Lock.from_row(row)


def test_a_persona_moves_to_another_device(tuned: Path, client: lopa.Client, cache: Path, tmp_path: Path) -> None:
    persona = lopa.open_personal(tuned, secret="correct horse", cache=cache)
    persona.export(tmp_path / "me.lopa")
    assert lopa.import_persona(tmp_path / "me.lopa", tmp_path / "phone", "mail") == "mail"
    with pytest.raises(lopa.FolderError, match="already"):
        lopa.import_persona(tmp_path / "me.lopa", tmp_path / "phone", "mail")
    moved = client.personal(tmp_path / "phone", "mail", secret="correct horse")
    assert moved.history() == persona.history() and moved.unfinished and moved.kept_examples == persona.kept_examples
    assert moved.generate("def f(", max_tokens=6) == client.personal(tuned, secret="correct horse").generate("def f(", max_tokens=6)
    assert moved.tune(EXAMPLES, **SETTINGS).resumed_from == 2


def rewrite(path: Path, change: Callable[[dict[str, bytes]], object]) -> None:
    with zipfile.ZipFile(path) as archive:
        files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    change(files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def _index(contents: dict[str, bytes], **changes: object) -> None:
    contents["index.json"] = json.dumps({**json.loads(contents["index.json"]), **changes}).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda files: files.pop("persona.json"),
        lambda files: files.pop("factors/000001.safetensors"),
        lambda files: files.update({"factors/000001.safetensors": b"other"}),
        lambda files: files.update({"../../evil": b""}),
        lambda files: files.update({"extra.txt": b""}),
        lambda files: _index(files, format="lopa.persona.9"),
        lambda files: _index(files, files={"../../evil": {"size": 0, "sha256": ""}}),
        lambda files: _index(files, files=[]),
        lambda files: files.update({"index.json": b"[]"}),
    ],
)
def test_a_damaged_or_hostile_export_is_refused_and_leaves_nothing(
    tuned: Path, tmp_path: Path, change: Callable[[dict[str, bytes]], object]
) -> None:
    lopa.open_personal(tuned).export(tmp_path / "me.lopa")
    rewrite(tmp_path / "me.lopa", change)
    with pytest.raises(lopa.FolderError):
        lopa.import_persona(tmp_path / "me.lopa", tmp_path / "phone")
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("cut", [0, 10, 500, -1])
def test_a_truncated_export_is_refused(tuned: Path, tmp_path: Path, cut: int) -> None:
    lopa.open_personal(tuned).export(tmp_path / "me.lopa")
    data = (tmp_path / "me.lopa").read_bytes()
    (tmp_path / "me.lopa").write_bytes(data[:cut])
    with pytest.raises(lopa.FolderError, match="not an exported persona"):
        lopa.import_persona(tmp_path / "me.lopa", tmp_path / "phone")


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model was replaced by another of other size."""
    from lopa_server.app import ServerConfig, start_server

    folder = tmp_path_factory.mktemp("newer")
    fm = build_tiny_fm(folder / "fm", hidden=48, seed=5)
    bundle = build_tiny_bundle(fm, folder / "bundle", seed=5)
    with start_server(ServerConfig(fm=fm, bundle=bundle, threads=1)) as server:
        yield server.address


def test_a_replaced_model_answers_plainly_until_the_persona_has_migrated(
    client: lopa.Client, newer: str, bundle: Bundle, cache: Path, tmp_path: Path
) -> None:
    persona = client.personal(tmp_path, secret=KEY)
    assert persona.tune(EXAMPLES, keep_examples=True, placement="front", **SETTINGS).kept
    with lopa.connect(newer, config=lopa.ClientConfig(cache=cache)) as other:
        with pytest.raises(lopa.FingerprintMismatch, match="migrate"):
            other.personal(tmp_path, secret=KEY)
        mine = other.personal(tmp_path, secret=KEY, mismatch="plain")
        assert mine.plain and mine.version == 2
        assert mine.generate("def f(", max_tokens=4) == other.generate("def f(", max_tokens=4)
        assert mine.score(EXAMPLES[:2]) == other.score([lopa.Pair(one.prompt, one.target) for one in EXAMPLES[:2]])
        with pytest.raises(lopa.FingerprintMismatch, match="`migrate` first"):
            mine.tune(EXAMPLES, **SETTINGS)
        assert mine.migrate(**{**SETTINGS, "max_steps": 3}).outcome == "max_steps"
        assert mine.plain and mine.generate("def f(", max_tokens=4).receipt is None
        again = other.personal(tmp_path, secret=KEY)
        report = again.migrate(**SETTINGS)
        assert report.resumed_from == 3 and report.outcome == "finished" and not again.plain
        assert again.generate("def f(", max_tokens=4).receipt is not None
        assert again.bundle_id == other.model.bundle_id and again.history()[0].parent == 2
    former = json.loads((tmp_path / f"personas/default/former-{bundle.manifest.id[:12]}.json").read_text())
    assert former["current"] == 2
    store = PersonaStore(tmp_path, "default", KEY)
    assert store.factors_path(2).exists()


def test_without_kept_examples_there_is_no_migration(client: lopa.Client, newer: str, cache: Path, tmp_path: Path) -> None:
    client.personal(tmp_path)
    with lopa.connect(newer, config=lopa.ClientConfig(cache=cache)) as other:
        persona = other.personal(tmp_path, mismatch="plain")
        with pytest.raises(lopa.FolderError, match="kept no examples"):
            persona.migrate()
        assert persona.plain and persona.version == 1
