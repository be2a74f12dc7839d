"""Bundles come whole or not at all: resumed, checked, shared between processes."""

from __future__ import annotations

import io
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import lopa
import pytest
from lopa.bundle import Bundle
from lopa.cache import cache_folder, cached_bundle, list_bundles
from lopa.manifest import FMSpec
from lopa.retry import RetryPolicy
from lopa.v1 import catalog_pb2, catalog_pb2_grpc

from tests.sdk.conftest import variant

LOCAL_HEADER = 30
"""Bytes of a ZIP entry before its name (APPNOTE 4.3.7)."""
CHUNK = 1 << 14


class Shop(catalog_pb2_grpc.CatalogServicer):
    """Publishes an archive, and can be told to misbehave."""

    def __init__(self, bundle: Bundle, archive: bytes) -> None:
        self.bundle, self.archive, self.bundle_id = bundle, archive, bundle.manifest.id
        self.offsets: list[int] = []
        self.cut_after = 0
        """Chunks after which every call breaks off; 0 never."""
        self.shift = 0
        """Added to every chunk's offset."""

    def GetModel(self, request: object, context: object) -> catalog_pb2.ModelInfo:
        del request, context
        fm = self.bundle.manifest.fm
        limits = catalog_pb2.Limits(max_pairs=1, max_message_bytes=1 << 20, max_virtual_tokens=64)
        return catalog_pb2.ModelInfo(
            name="m",
            fingerprint=fm.fingerprint,
            hidden_size=fm.hidden_size,
            limits=limits,
            bundle_id=self.bundle_id,
            bundle_bytes=len(self.archive),
        )

    def FetchBundle(self, request: catalog_pb2.FetchBundleRequest, context: grpc.ServicerContext) -> Iterator[catalog_pb2.BundleChunk]:
        self.offsets.append(request.offset)
        for count, at in enumerate(range(request.offset, len(self.archive), CHUNK)):
            if self.cut_after and count == self.cut_after:
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            yield catalog_pb2.BundleChunk(offset=at + self.shift, data=self.archive[at : at + CHUNK], total_bytes=len(self.archive))


@pytest.fixture
def shop(bundle: Bundle, tmp_path: Path) -> Shop:
    bundle.write_archive(tmp_path / "archive")
    return Shop(bundle, (tmp_path / "archive").read_bytes())


@contextmanager
def visit(shop: Shop, cache: Path, attempts: int = 2) -> Iterator[lopa.Client]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    catalog_pb2_grpc.add_CatalogServicer_to_server(shop, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    config = lopa.ClientConfig(cache=cache, retry=RetryPolicy(attempts=attempts, initial=0.001))
    try:
        with lopa.connect(f"127.0.0.1:{port}", config=config) as client:
            yield client
    finally:
        server.stop(None)


def test_the_real_servers_bundle_is_fetched_once(client: lopa.Client, bundle: Bundle, tmp_path: Path) -> None:
    config = lopa.ClientConfig(cache=tmp_path)
    seen: list[tuple[int, int]] = []
    with lopa.connect(client.address, config=config) as fresh:
        got = fresh.bundle(progress=lambda done, total: seen.append((done, total)))
        assert got.manifest == bundle.manifest and got.folder == tmp_path / "bundles" / bundle.manifest.id
        assert seen[-1] == (fresh.model.bundle_bytes, fresh.model.bundle_bytes)
        before = fresh.traffic
        assert fresh.bundle().folder == got.folder and fresh.traffic == before
    left = {path.name for path in (tmp_path / "bundles").iterdir()} - {f"{bundle.manifest.id}.lock"}
    assert left == {bundle.manifest.id}


def test_the_real_server_goes_on_from_an_offset(client: lopa.Client, bundle: Bundle, tmp_path: Path) -> None:
    """A download that another process began and did not finish."""
    bundle.write_archive(tmp_path / "archive")
    archive = (tmp_path / "archive").read_bytes()
    partial = tmp_path / "bundles" / f"{bundle.manifest.id}.partial"
    partial.parent.mkdir()
    partial.write_bytes(archive[: len(archive) // 2 + 3])
    with lopa.connect(client.address, config=lopa.ClientConfig(cache=tmp_path)) as fresh:
        assert fresh.bundle().manifest == bundle.manifest
        assert len(archive) // 2 - 3 < fresh.traffic.received_bytes < len(archive) // 2 + 4096
    assert not partial.exists()


def test_an_interrupted_download_goes_on_where_it_stopped(shop: Shop, tmp_path: Path) -> None:
    shop.cut_after = 2
    with visit(shop, tmp_path / "cache") as client:
        assert client.bundle().manifest == shop.bundle.manifest
    assert shop.offsets == list(range(0, len(shop.archive), 2 * CHUNK))


def test_a_download_that_never_moves_gives_up_and_keeps_what_it_has(shop: Shop, tmp_path: Path) -> None:
    with visit(shop, tmp_path / "cache", attempts=1) as client:
        shop.cut_after = 1
        with pytest.raises(lopa.Unavailable, match="cut"):
            client.bundle()
        partial = tmp_path / "cache" / "bundles" / f"{shop.bundle_id}.partial"
        assert partial.read_bytes() == shop.archive[:CHUNK]
        shop.cut_after = 0
        client.bundle()
    assert shop.offsets == [0, CHUNK]


@pytest.mark.parametrize("name", ["manifest.json", "encode.onnx", "reads.onnx"])
def test_a_corrupt_download_is_refused_and_not_kept(shop: Shop, tmp_path: Path, name: str) -> None:
    """One bit, in the last byte of a file's content; the archive's directory has bytes that mean nothing, such as times."""
    good = shop.archive
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        info = archive.getinfo(name)
    at = info.header_offset + LOCAL_HEADER + len(name) + info.file_size - 1
    assert good[at] == shop.bundle.path(name).read_bytes()[-1]
    shop.archive = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    with visit(shop, tmp_path / "cache") as client:
        with pytest.raises(lopa.BundleError):
            client.bundle()
        assert [path.suffix for path in (tmp_path / "cache" / "bundles").iterdir()] == [".lock"]
        shop.archive = good
        assert client.bundle().manifest == shop.bundle.manifest


def test_another_bundle_under_this_id_is_refused(shop: Shop, tmp_path: Path) -> None:
    shop.bundle_id = "0" * 64
    with visit(shop, tmp_path / "cache") as client, pytest.raises(lopa.BundleError, match="as 000000000000"):
        client.bundle()


def test_chunks_out_of_place_are_refused(shop: Shop, tmp_path: Path) -> None:
    shop.shift = 1
    with visit(shop, tmp_path / "cache") as client, pytest.raises(lopa.ProtocolError, match="were due"):
        client.bundle()


@pytest.mark.parametrize("bundle_id", ["../../x", "A" * 64, "ab"])
def test_an_id_that_is_no_digest_is_refused(shop: Shop, tmp_path: Path, bundle_id: str) -> None:
    shop.bundle_id = bundle_id
    with visit(shop, tmp_path / "cache") as client, pytest.raises(lopa.ProtocolError, match="not 64 hex digits"):
        client.bundle()
    assert not (tmp_path / "cache").exists()


def test_no_bundle_and_no_space_are_said(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with visit(shop, tmp_path / "cache") as client:
        full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(lopa.StorageError, match="LOPA_CACHE"):
            client.bundle()
        assert shop.offsets == []
    shop.bundle_id = ""
    with visit(shop, tmp_path / "cache") as client, pytest.raises(lopa.NotFound, match="publishes no bundle"):
        client.bundle()


def test_a_bundle_for_another_model_is_refused(shop: Shop, bundle: Bundle, tmp_path: Path) -> None:
    fm = FMSpec("another", "cd" * 32, 32)
    other = variant(bundle, tmp_path / "other", fm=fm)
    other.write_archive(tmp_path / "other.zip")
    shop.archive, shop.bundle_id = (tmp_path / "other.zip").read_bytes(), other.manifest.id
    with visit(shop, tmp_path / "cache") as client, pytest.raises(lopa.FingerprintMismatch, match="was made for another"):
        client.bundle()


def test_a_damaged_cache_heals(shop: Shop, tmp_path: Path) -> None:
    with visit(shop, tmp_path / "cache") as client:
        folder = client.bundle().folder
        (folder / "compose.onnx").write_bytes(b"")
        assert cached_bundle(shop.bundle_id, tmp_path / "cache") is None
        client.bundle()
    assert cached_bundle(shop.bundle_id, tmp_path / "cache") is not None


def test_bundles_that_nobody_uses_go_when_another_comes(shop: Shop, bundle: Bundle, tmp_path: Path) -> None:
    """By the time of their last use; a clock that was set back only keeps them longer."""
    bundles = tmp_path / "cache" / "bundles"
    for name, days in (("a" * 64, 200), ("b" * 64, 10), ("c" * 64, -5)):
        folder = bundles / name
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - 86400 * days,) * 2)
    with visit(shop, tmp_path / "cache") as client:
        client.bundle()
    assert {path.name for path in bundles.iterdir() if path.is_dir()} == {"b" * 64, "c" * 64, bundle.manifest.id}
    assert [entry.made_for != "" for entry in list_bundles(tmp_path / "cache")].count(True) == 1


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOPA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lopa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "lopa"
    monkeypatch.setenv("LOPA_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    assert cache_folder(tmp_path / "chosen") == tmp_path / "chosen"
