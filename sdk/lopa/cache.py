"""Bundles on this device: fetched once, every byte checked, shared by all processes of the user.

    <cache>/bundles/<id>            a verified bundle's folder, renamed into place when complete
    <cache>/bundles/<id>.partial    an interrupted download; it goes on where it stopped
    <cache>/bundles/<id>.lock       held while one process downloads

The cache folder is $LOPA_CACHE, else $XDG_CACHE_HOME/lopa, else ~/.cache/lopa.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lopa.bundle import Bundle, extract_archive
from lopa.errors import BundleError, FingerprintMismatch, FolderError, NotFound, ProtocolError, RemoteError, StorageError, Unavailable
from lopa.files import locked, make_folder, read_limited, storage_error, sync_folder
from lopa.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest
from lopa.protocol.flow import Flow, OpenStream, Receive, wait, work
from lopa.signing import check_signature
from lopa.v1 import catalog_pb2
from lopa.values import Model

if TYPE_CHECKING:
    from lopa.session import Session

Progress = Callable[[int, int], None]
"""Called with (bytes so far, bytes in all)."""
MAX_ARCHIVE_BYTES = 4 << 30
_SPARE_BYTES = 16 << 20
_HEX_DIGITS = 64


def cache_folder(chosen: Path | None = None) -> Path:
    """The cache's root: the chosen one, else as the environment says."""
    if chosen is not None:
        return chosen.expanduser()
    if os.environ.get("LOPA_CACHE"):
        return Path(os.environ["LOPA_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lopa"


def cached_bundle(bundle_id: str, chosen: Path | None = None, trusted: Sequence[str] = ()) -> Bundle | None:
    """A bundle that is already here, verified again; None when it is not here, was damaged, or none of the `trusted` keys signed it."""
    folder = cache_folder(chosen) / "bundles" / bundle_id
    if len(bundle_id) != _HEX_DIGITS or not folder.is_dir():
        return None
    try:
        bundle = Bundle.open(folder)
        if trusted:
            check_signature(bundle.manifest, trusted)
    except BundleError:
        return None  # whoever asked downloads it again, over this one
    with contextlib.suppress(OSError):  # a cache that can only be read is never cleaned either
        os.utime(folder)
    return bundle if bundle.manifest.id == bundle_id else None


@dataclass(frozen=True)
class CacheEntry:
    """A bundle in the cache, or the beginning of one."""

    bundle_id: str
    folder: Path
    size: int
    """Bytes."""
    used: float
    """When it was last opened, in seconds since 1970."""
    made_for: str
    """The foundation model's name; empty for a download that did not end."""


def list_bundles(chosen: Path | None = None) -> list[CacheEntry]:
    """What is in the cache, most recently used first."""
    entries = []
    for path in (cache_folder(chosen) / "bundles").glob("*"):
        bundle_id = path.name.removesuffix(".partial")
        if len(bundle_id) != _HEX_DIGITS:
            continue
        size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
        name = ""
        if path.is_dir():
            with contextlib.suppress(BundleError, OSError, ValueError):
                name = Manifest.from_json(read_limited(path / MANIFEST, MAX_MANIFEST_BYTES).decode("utf-8")).fm.name
        entries.append(CacheEntry(bundle_id, path, size, path.stat().st_mtime, name))
    return sorted(entries, key=lambda entry: -entry.used)


def clean_bundles(days: float, chosen: Path | None = None) -> list[CacheEntry]:
    """Remove what was not used for so many days, and tell it. What another process is downloading now stays."""
    gone = []
    for entry in list_bundles(chosen):
        if max(0.0, time.time() - entry.used) < 86400 * days:  # a clock that went back makes nothing younger than now
            continue
        with contextlib.suppress(FolderError), locked(entry.folder.with_name(f"{entry.bundle_id}.lock"), "in use"):
            shutil.rmtree(entry.folder, ignore_errors=True) if entry.folder.is_dir() else entry.folder.unlink(missing_ok=True)
            gone.append(entry)
    return gone


def fetch_bundle(session: Session, *, progress: Progress | None = None) -> Flow[Bundle]:
    """The server's bundle, from the cache or downloaded into it. Safe between processes: one downloads, the others wait.

    Raises:
        NotFound: the server publishes none. BundleError: what came is not what its id says.
        FingerprintMismatch: the bundle was made for another FM. StorageError: no space. RemoteError: the call failed.
    """
    model = yield from session.model()
    if not model.bundle_id:
        raise NotFound(f"the server of {model.name} publishes no bundle: start it with one, or give the path of one here")
    if len(model.bundle_id) != _HEX_DIGITS or not set(model.bundle_id) <= set("0123456789abcdef"):
        raise ProtocolError(f"the server's bundle id {model.bundle_id[:80]!r} is not 64 hex digits")
    chosen = session.config.cache
    root = cache_folder(chosen) / "bundles"
    trusted = session.config.trusted_keys
    bundle = yield from work(lambda: cached_bundle(model.bundle_id, chosen, trusted))
    if bundle is None:
        make_folder(root)
        patience = session.config.bundle_timeout
        busy = f"another process has been downloading this bundle for {patience:.0f} s"
        with contextlib.ExitStack() as held:
            yield from _hold(held, root / f"{model.bundle_id}.lock", busy, patience)
            bundle = yield from work(lambda: cached_bundle(model.bundle_id, chosen, trusted))
            if bundle is None:
                bundle = yield from _download(session, model, root, progress)
        if session.config.bundle_days:
            yield from work(lambda: clean_bundles(session.config.bundle_days, chosen))
    check_model(bundle, model)
    if trusted:
        check_signature(bundle.manifest, trusted)
    return bundle


def _hold(held: contextlib.ExitStack, path: Path, busy: str, patience: float) -> Flow[None]:
    """Wait for a lock, for so many seconds, without holding a thread."""
    deadline = time.monotonic() + patience
    while True:
        try:
            held.enter_context(locked(path, busy))
        except FolderError:
            if time.monotonic() >= deadline:
                raise
        else:
            return
        yield from wait(0.05)


def check_model(bundle: Bundle, model: Model) -> None:
    """Refuse a bundle that was made for another foundation model.

    Raises:
        FingerprintMismatch: its fingerprint, hidden size or row count does not fit.
    """
    made_for = bundle.manifest.fm
    if (made_for.fingerprint, made_for.hidden_size) != (model.fingerprint, model.hidden_size):
        raise FingerprintMismatch(
            f"the bundle {bundle.manifest.id[:12]} was made for {made_for.name} ({made_for.fingerprint[:12]}); "
            f"the server hosts {model.name} ({model.fingerprint[:12]})"
        )
    if bundle.manifest.rows > model.limits.max_virtual_tokens:
        raise FingerprintMismatch(
            f"the bundle's soft prompts have {bundle.manifest.rows} rows; the server allows {model.limits.max_virtual_tokens}"
        )


def _download(session: Session, model: Model, root: Path, progress: Progress | None) -> Flow[Bundle]:
    partial, final = root / f"{model.bundle_id}.partial", root / model.bundle_id
    if not 0 < model.bundle_bytes <= MAX_ARCHIVE_BYTES:
        raise ProtocolError(f"the server says that its bundle has {model.bundle_bytes} bytes; 1 to {MAX_ARCHIVE_BYTES} are accepted")
    if partial.exists() and partial.stat().st_size > model.bundle_bytes:
        partial.unlink()
    here = partial.stat().st_size if partial.exists() else 0
    _check_space(root, 2 * model.bundle_bytes - here + _SPARE_BYTES)
    yield from _receive(session, model, partial, progress)
    return (yield from work(lambda: _unpack(partial, final, model.bundle_id)))


def _unpack(partial: Path, final: Path, bundle_id: str) -> Bundle:
    """Check a complete archive and put its folder in place."""
    staging = final.with_name(f".{bundle_id}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        bundle = extract_archive(partial, staging)
        if bundle.manifest.id != bundle_id:
            raise BundleError(f"the server sent bundle {bundle.manifest.id[:12]} as {bundle_id[:12]}")
        _install(staging, final, bundle.manifest.file_names)
    except StorageError:
        shutil.rmtree(staging, ignore_errors=True)
        raise  # the download is whole: with more room it goes on from here
    except BundleError:
        shutil.rmtree(staging, ignore_errors=True)
        partial.unlink(missing_ok=True)  # complete but damaged: nothing to go on from
        raise
    partial.unlink(missing_ok=True)
    return Bundle(final, bundle.manifest)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(f"the bundle needs {needed >> 20} MiB in {folder}, {free >> 20} MiB are free; set LOPA_CACHE to another place")


def _install(staging: Path, final: Path, files: Sequence[str]) -> None:
    """Make the files durable, then visible under the final name; a damaged folder of that name goes."""
    try:
        for name in (MANIFEST, *files):
            with (staging / name).open("rb+") as file:
                os.fsync(file.fileno())
        sync_folder(staging)
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        sync_folder(final.parent)
    except OSError as error:
        raise storage_error("write", final, error) from error


def _receive(session: Session, model: Model, partial: Path, progress: Progress | None) -> Flow[None]:
    """Append chunks until the archive is complete. Each interruption without any progress counts against the retry policy."""
    failures, rng = 0, random.Random()
    while (offset := partial.stat().st_size if partial.exists() else 0) < model.bundle_bytes:
        try:
            with partial.open("ab") as file:
                stream = yield from session.open_bundle(model.bundle_id, offset)
                try:
                    yield from _append(stream, file, offset, model.bundle_bytes, progress)
                finally:
                    stream.close()
            error: RemoteError = Unavailable("the server's bundle stream ended before the archive's end")
        except OSError as problem:
            raise storage_error("write", partial, problem) from problem
        except RemoteError as problem:
            error = problem
        received = partial.stat().st_size
        if received == model.bundle_bytes:
            return
        failures = 1 if received > offset else failures + 1
        delay = session.config.retry.delay(failures, error, rng)
        if delay is None:
            raise error
        yield from wait(delay)


def _append(stream: OpenStream, file: BinaryIO, offset: int, total: int, progress: Progress | None) -> Flow[None]:
    while True:
        chunk: catalog_pb2.BundleChunk | None = yield Receive(stream)
        if chunk is None:
            return
        if chunk.offset != offset or chunk.total_bytes != total or offset + len(chunk.data) > total:
            got = f"{chunk.offset} to {chunk.offset + len(chunk.data)} of {chunk.total_bytes}"
            raise ProtocolError(f"the server sent bytes {got}; {offset} to {total} were due")
        file.write(chunk.data)
        offset += len(chunk.data)
        if progress is not None:
            progress(offset, total)
