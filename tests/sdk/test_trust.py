"""Whom a device trusts: bundles signed by keys that the app knows, and keys that the system keeps."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import lopa
import pytest
from lopa.bundle import Bundle
from lopa.cache import cached_bundle
from lopa.manifest import MANIFEST
from lopa_exporters.signing import create_key, sign_bundle

from tests.sdk.conftest import EXAMPLES

keyring = pytest.importorskip("keyring")


@pytest.fixture(scope="module")
def signed(fm_folder: Path, bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A server that publishes a signed bundle, and the signer's public key."""
    from lopa_server.app import ServerConfig, start_server

    folder = tmp_path_factory.mktemp("signed")
    shutil.copytree(bundle_folder, folder / "bundle")
    key = create_key(folder / "key.pem")
    sign_bundle(folder / "bundle", folder / "key.pem")
    with start_server(ServerConfig(fm=fm_folder, bundle=folder / "bundle", threads=1)) as server:
        yield server.address, key


def config(cache: Path, *keys: str) -> lopa.ClientConfig:
    return lopa.ClientConfig(cache=cache, trusted_keys=keys)


def test_a_bundle_of_a_trusted_signer_is_fetched_tuned_and_opened_again(signed: tuple[str, str], tmp_path: Path) -> None:
    (address, key), other = signed, create_key(tmp_path / "other.pem")
    with lopa.connect(address, config=config(tmp_path / "cache", other, key)) as client:
        persona = client.personal(tmp_path / "me")
        assert persona.tune(EXAMPLES, steps=1, batch_size=2).steps == 1
        assert persona.generate("def f(a, b):", max_tokens=2).receipt
        manifest = client.bundle().manifest
        assert manifest.signature and cached_bundle(manifest.id, tmp_path / "cache", [key]) is not None
        assert cached_bundle(manifest.id, tmp_path / "cache", [other]) is None


def test_nothing_is_made_of_a_bundle_that_nobody_trusted_signed(signed: tuple[str, str], address: str, tmp_path: Path) -> None:
    stranger = create_key(tmp_path / "stranger.pem")
    cases = (
        (signed[0], stranger, "signed by none of the 1 trusted keys"),
        (address, signed[1], "is not signed"),
        (signed[0], "ab", "64 hex"),
    )
    for number, (at, key, words) in enumerate(cases):
        with lopa.connect(at, config=config(tmp_path / f"cache{number}", key)) as client, pytest.raises(lopa.BundleError, match=words):
            client.personal(tmp_path / "me")
        assert not (tmp_path / "me").exists()


def test_a_signature_is_not_taken_from_an_untrusting_clients_cache(signed: tuple[str, str], tmp_path: Path) -> None:
    """The id doesn't cover the signature: a copy without one is fetched again."""
    (address, key), cache = signed, tmp_path / "cache"
    with lopa.connect(address, config=config(cache)) as client:
        bundle = client.bundle()
    unsigned = bundle.manifest.to_json().replace(bundle.manifest.signature, "0" * 128)
    (bundle.folder / MANIFEST).write_text(unsigned, encoding="utf-8")
    assert Bundle.open(bundle.folder).manifest.id == bundle.manifest.id
    with lopa.connect(address, config=config(cache, key)) as client:
        assert client.bundle().manifest.signature == bundle.manifest.signature


class Drawer(keyring.backend.KeyringBackend):  # type: ignore[misc, name-defined]
    """A keyring in memory, by keyring's own interface."""

    priority = 1

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[tuple[str, str], str] = {}
        self.locked = False

    def get_password(self, service: str, username: str) -> str | None:
        if self.locked:
            raise keyring.errors.KeyringLocked("locked")
        return self.held.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.held[service, username] = password


@pytest.fixture
def drawer() -> Iterator[Drawer]:
    before, drawer = keyring.get_keyring(), Drawer()
    keyring.set_keyring(drawer)
    yield drawer
    keyring.set_keyring(before)


def test_a_key_of_the_systems_keyring_opens_what_it_closed(client: lopa.Client, drawer: Drawer, tmp_path: Path) -> None:
    with pytest.raises(lopa.StorageError, match="no key for ada"):
        lopa.keyring_key("app", "ada", create=False)
    persona = client.personal(tmp_path, secret=lopa.keyring_key("app", "ada"))
    assert persona.factors_path.read_bytes().startswith(b"lopa.sealed")
    assert client.personal(tmp_path, secret=lopa.keyring_key("app", "ada", create=False)).factors.finite
    with pytest.raises(lopa.FolderError, match="wrong passphrase or key"):
        client.personal(tmp_path, secret=lopa.keyring_key("app", "bob"))
    drawer.locked = True
    with pytest.raises(lopa.StorageError, match="unlock it"):
        lopa.keyring_key("app", "ada")
    drawer.locked, drawer.held["app", "ada"] = False, "a password"
    with pytest.raises(lopa.StorageError, match="no key of lopa"):
        lopa.keyring_key("app", "ada")


def test_without_the_package_the_message_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(lopa.MissingDependency, match=r"lopa\[keyring\]"):
        lopa.keyring_key("app", "ada")
