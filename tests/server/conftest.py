"""Fixtures of the server's tests: tiny models on disk, a server over one of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lopa_server.app import RunningServer, ServerConfig, start_server

from tests.server.client import Client
from tests.tiny import build_tiny_fm


@pytest.fixture(scope="session")
def tiny_fm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers: d 32, context 512, 300 tokens."""
    return build_tiny_fm(tmp_path_factory.mktemp("fm") / "llama")


@pytest.fixture(scope="module")
def server(tiny_fm: Path) -> Iterator[RunningServer]:
    """A server without a bundle, real and over a real port."""
    with start_server(ServerConfig(fm=tiny_fm, threads=1)) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with grpc.insecure_channel(server.address) as channel:
        yield Client(channel)
