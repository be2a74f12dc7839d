"""Several bundles: the current one is announced, older ones are still found by their id."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from lopa.bundle import Bundle, extract_archive
from lopa.v1 import catalog_pb2
from lopa_server.app import ServerConfig, start_server
from lopa_server.config import ConfigError

from tests.server.client import Client
from tests.tiny import build_tiny_fm
from tests.tiny_bundle import build_tiny_bundle


def test_older_bundles_can_be_fetched_by_their_id(tmp_path: Path) -> None:
    fm = build_tiny_fm(tmp_path / "fm")
    current, older = (Bundle.open(build_tiny_bundle(fm, tmp_path / name, seed=seed)) for name, seed in (("new", 1), ("old", 0)))
    assert current.manifest.id != older.manifest.id
    config = ServerConfig(fm=fm, bundle=current.folder, older_bundles=(older.folder,), device="cpu", dtype="float32")
    with start_server(config) as server, grpc.insecure_channel(server.address) as channel:
        client = Client(channel)
        assert client.catalog.GetModel(catalog_pb2.GetModelRequest()).bundle_id == current.manifest.id
        for bundle in (current, older):
            chunks = client.catalog.FetchBundle(catalog_pb2.FetchBundleRequest(bundle_id=bundle.manifest.id))
            archive = tmp_path / f"{bundle.folder.name}.zip"
            archive.write_bytes(b"".join(chunk.data for chunk in chunks))
            assert extract_archive(archive, tmp_path / f"{bundle.folder.name}.copy").manifest == bundle.manifest


def test_an_older_bundle_for_another_model_is_refused(tmp_path: Path) -> None:
    fm, other = build_tiny_fm(tmp_path / "fm"), build_tiny_fm(tmp_path / "other", seed=1)
    bundle = build_tiny_bundle(other, tmp_path / "bundle")
    with pytest.raises(ConfigError, match="was made for other"), start_server(ServerConfig(fm=fm, older_bundles=(bundle,), device="cpu")):
        pass
