"""What goes wrong on a device: a full disk, a place that can't be written, files cut short, a clock that goes back. Each is a typed error
that says what to do, and nothing is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import lopa
import pytest
from lopa import cache as cache_module
from lopa import folder as folder_module
from lopa.cache import cached_bundle, clean_bundles

from tests.sdk.conftest import EXAMPLES, SETTINGS

READ_ONLY = """
import sys, lopa
from pathlib import Path
address, folder, cache = sys.argv[1:]
with lopa.connect(address, config=lopa.ClientConfig(cache=Path(cache))) as client:
    me = client.personal(folder)
    assert me.generate("def f(a, b):", max_tokens=2).receipt.rows and len(me.history()) == 1
    calls = [lambda: me.tune([("a", "b"), ("c", "d")], steps=1), lambda: me.rollback(1), lambda: client.personal(folder, "other")]
    for call in calls:
        try:
            call()
        except lopa.StorageError as error:
            print(error)
"""


class FullFile:
    """A file on a disk that takes only so many more bytes."""

    def __init__(self, file: IO[Any], room: list[int]) -> None:
        self._file, self._room = file, room

    def write(self, data: bytes) -> int:
        if len(data) > self._room[0]:
            self._file.write(data[: self._room[0]])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._room[0] -= len(data)
        return self._file.write(data)

    def __enter__(self) -> FullFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def disk_with(room: int) -> Iterator[None]:
    """Room for so many bytes in all; the write that goes beyond leaves its first part."""
    real, left = Path.open, [room]

    def opening(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = real(path, mode, *args, **options)
        return FullFile(file, left) if mode in ("wb", "ab") else file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", opening)
        yield


def test_a_disk_that_fills_while_tuning(client: lopa.Client, tmp_path: Path) -> None:
    unbroken = client.personal(tmp_path / "unbroken")
    unbroken.tune(EXAMPLES, **SETTINGS)
    persona, told = client.personal(tmp_path / "me"), [0]
    with disk_with(60_000), pytest.raises(lopa.StorageError, match="make room there and do it again; nothing of before was lost"):
        persona.tune(EXAMPLES, on_step=lambda now: told.append(now.step), **SETTINGS)
    assert persona.version == 1 and persona.unfinished and 0 < told[-1] < SETTINGS["steps"]
    assert not list(tmp_path.rglob("*.tmp"))
    report = persona.tune(EXAMPLES, **SETTINGS)
    assert report.resumed_from == told[-1]
    assert persona.factors_path.read_bytes() == unbroken.factors_path.read_bytes()


@pytest.mark.parametrize("room", [0, 20, 2000])
def test_a_full_disk_makes_no_half_persona(client: lopa.Client, tmp_path: Path, room: int) -> None:
    client.bundle()
    with disk_with(room), pytest.raises(lopa.StorageError, match="No space left on device; make room"):
        client.personal(tmp_path / "me")
    assert client.personal(tmp_path / "me").version == 1


@pytest.mark.parametrize("share", [0.001, 1.5])
def test_a_disk_that_fills_while_fetching(address: str, tmp_path: Path, share: float) -> None:
    """Neither what came before is lost, nor a download that is whole but can't be unpacked."""
    config = lopa.ClientConfig(cache=tmp_path)
    with lopa.connect(address, config=config) as client:
        room = int(share * client.model.bundle_bytes)
        with disk_with(room), pytest.raises(lopa.StorageError, match="make room there"):
            client.bundle()
        (partial,) = (tmp_path / "bundles").glob("*.partial")
        assert partial.stat().st_size == min(room, client.model.bundle_bytes)
        before = client.traffic
        assert client.bundle().manifest.id == client.model.bundle_id
        received = (client.traffic - before).received_bytes
        assert received < client.model.bundle_bytes - partial_size(room, client) + 10_000


def partial_size(room: int, client: lopa.Client) -> int:
    return min(room, client.model.bundle_bytes)


def test_a_file_system_that_refuses(client: lopa.Client) -> None:
    """One that nobody can write, root included."""
    if not Path("/sys/kernel").is_dir():
        pytest.skip("there is no /sys here")
    with pytest.raises(lopa.StorageError, match=r"can't create /sys/kernel/lopa.*; (choose|look)"):
        client.personal("/sys/kernel/lopa-me")


def test_a_read_only_folder_is_read(client: lopa.Client, address: str, cache: Path, tmp_path: Path) -> None:
    client.personal(tmp_path)
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", str(tmp_path)]
    probe = subprocess.run([*command, "true"], capture_output=True, check=False) if sys.platform == "linux" else None
    if probe is None or probe.returncode:
        pytest.skip("this machine makes no read-only mounts")
    device = [sys.executable, "-c", READ_ONLY, address, str(tmp_path), str(cache)]
    told = subprocess.run([*command, *device], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(told) == 3 and all("Read-only file system; choose a place that this user can write" in line for line in told)


def test_a_clock_that_goes_back(client: lopa.Client, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions follow their numbers, not their dates; a bundle that was used "tomorrow" stays, and can be removed."""
    persona = client.personal(tmp_path)
    year = 365 * 86400

    class LastYear(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.fromtimestamp(datetime.now(UTC).timestamp() - year, tz)

    monkeypatch.setattr(folder_module, "datetime", LastYear)
    now = time.time
    monkeypatch.setattr(cache_module, "time", SimpleNamespace(time=lambda: now() - year, monotonic=time.monotonic))
    assert persona.tune(EXAMPLES, **SETTINGS).kept
    first, second = persona.history()
    assert second.created < first.created and persona.version == second.version == 2
    assert persona.rollback(1).version == 1 and persona.tune(EXAMPLES, **SETTINGS).version == 3
    assert not clean_bundles(90.0, cache) and cached_bundle(persona.bundle_id, cache) is not None
    os.utime(cache / "bundles" / persona.bundle_id, (now(), now()))
    assert persona.bundle_id in {entry.bundle_id for entry in clean_bundles(0.0, cache)}  # other tests may have left bundles of their own
    assert client.bundle().manifest.id == persona.bundle_id


@pytest.mark.parametrize("name, way_out", [("persona.json", "begin another persona"), ("factors/000002.safetensors", "`rollback`")])
def test_a_file_cut_short_is_said_with_the_way_out(client: lopa.Client, tmp_path: Path, name: str, way_out: str) -> None:
    persona = client.personal(tmp_path)
    assert persona.tune(EXAMPLES, **SETTINGS).kept
    path = tmp_path / "personas/default" / name
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:size])
        with pytest.raises((lopa.FolderError, lopa.FactorsError), match=way_out):
            _ = client.personal(tmp_path).factors
    if name != "persona.json":
        persona.rollback(1)
        assert client.personal(tmp_path).factors.finite
    path.write_bytes(whole)
    assert client.personal(tmp_path).factors.finite


def test_an_error_of_the_apps_own_callback_is_not_taken_for_the_servers(client: lopa.Client, tmp_path: Path) -> None:
    """An app may call the server in its callback: what goes wrong there reaches it at once, and the run goes on later."""
    persona, calls = client.personal(tmp_path), []

    def watch(now: lopa.TuneProgress) -> None:
        calls.append(now.step)
        raise lopa.Unavailable("the app's own call")

    with pytest.raises(lopa.Unavailable, match="the app's own call"):
        persona.tune(EXAMPLES, on_step=watch, **SETTINGS)
    assert calls == [1] and persona.tune(EXAMPLES, **SETTINGS).resumed_from == 1
