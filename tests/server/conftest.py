"""Fixtures of the server's tests: tiny models on disk, engines and servers over them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.tiny import build_tiny_fm

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(scope="session")
def tiny_fm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers: d 32, context 512."""
    return build_tiny_fm(tmp_path_factory.mktemp("fm") / "llama")
