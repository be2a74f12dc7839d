"""Fixtures of the exporters' tests: tiny models on disk, and LoPA over them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from lopa_exporters.encoder import Encoder
from lopa_exporters.lopa import LoPA

from tests.tiny import build_tiny_fm
from tests.tiny_bundle import build_tiny_parts


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only lose by being shared between cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def fm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers: d 32, context 512."""
    return build_tiny_fm(tmp_path_factory.mktemp("fm") / "llama")


@pytest.fixture(scope="session")
def parts(fm_folder: Path) -> tuple[Encoder, LoPA]:
    """Encoder and LoPA, profile factors: m 4, r 2, h 32."""
    encoder, lopa = build_tiny_parts(fm_folder)
    if not isinstance(encoder, Encoder):
        raise TypeError("profile factors has an encoder")
    return encoder, lopa


@pytest.fixture
def encoder(parts: tuple[Encoder, LoPA]) -> Encoder:
    return parts[0]


@pytest.fixture
def lopa(parts: tuple[Encoder, LoPA]) -> LoPA:
    return parts[1]
