"""Fixtures of the device's tests: a real server over a tiny model and its real bundle."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import lopa
import pytest
from lopa.bundle import Bundle
from lopa.manifest import MANIFEST
from lopa.tuning import TuneOptions

from tests.tiny import build_tiny_fm
from tests.tiny_bundle import build_tiny_bundle

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

EXAMPLES = [
    lopa.Example(f"def function_{i}(a, b):\n    return ", target)
    for i, target in enumerate(["a + b\n", "a - b\n", "a * b\n", "b + a\n", "a + b\n", "a + b + 1\n", "b - a\n", "a + b\n", "a\n", "b\n"])
]

SETTINGS: TuneOptions = {"steps": 12, "batch_size": 4, "learning_rate": 0.02, "validate_every": 3}
"""A short run over EXAMPLES that ends better than it began."""


TOO_LATE = (lopa.DeadlineExceeded, lopa.ResourceExhausted)
"""What comes of a deadline that can't be met: a server that has measured its pace by then refuses at once."""


def variant(bundle: Bundle, folder: Path, **changes: object) -> Bundle:
    """The same graphs under a changed manifest, and so another id."""
    shutil.copytree(bundle.folder, folder)
    manifest = dataclasses.replace(bundle.manifest, **changes)  # type: ignore[arg-type]
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(folder)


@pytest.fixture(scope="session")
def fm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers: d 32, context 512, with a chat template."""
    return build_tiny_fm(tmp_path_factory.mktemp("fm") / "llama", chat=True)


@pytest.fixture(scope="session")
def bundle_folder(fm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle, by the real exporter: m 4, profile factors."""
    return build_tiny_bundle(fm_folder, tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path) -> Bundle:
    return Bundle.open(bundle_folder)


@pytest.fixture(scope="session")
def address(fm_folder: Path, bundle_folder: Path) -> Iterator[str]:
    """A server for the whole session. Its engine has a process of its own, since other tests let every engine of this one fail."""
    from lopa_server.app import ServerConfig, start_server

    with start_server(ServerConfig(fm=fm_folder, bundle=bundle_folder, threads=1, engine_process=True)) as server:
        yield server.address


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the tests share, apart from the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def client(address: str, cache: Path) -> Iterator[lopa.Client]:
    with lopa.connect(address, config=lopa.ClientConfig(cache=cache)) as client:
        yield client
