"""Files that survive a crash at any moment: written whole or not at all, and locked between processes."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lopa.errors import FolderError, StorageError

_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there and do it again"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose a place that this user can write, or allow it"),
}


def storage_error(doing: str, path: Path, error: OSError) -> StorageError:
    """What went wrong at a place, and what to do. doing: "write", "create", ..."""
    advice = _ADVICE.get(error.errno or 0, "look after this place and do it again")
    return StorageError(f"can't {doing} {path}: {error.strerror or error}; {advice}; nothing of before was lost")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that readers, and a crash at any moment, see the old content or the new one, never a part.

    Raises:
        StorageError: the disk is full or the place can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise storage_error("write", path, error) from error


def read_limited(path: Path, limit: int) -> bytes:
    """A regular file's whole content, which must not be larger than `limit` bytes; never more than that is read.

    Its size is not taken from the file system: a device or a growing file has another than it says.

    Raises:
        ValueError: not a regular file, or larger. OSError: it can't be read.
    """
    # Without waiting, or a named pipe would hold the caller here for ever.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is not a regular file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} is larger than {limit} bytes")
    return data


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable. Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        StorageError: it can't be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("create", path, error) from error


def sweep(folder: Path) -> None:
    """Remove what a crashed `write_atomic` left in a folder. Call it with the folder's lock held."""
    for leftover in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # a folder of such a name is not ours, and what can't go does no harm
            leftover.unlink()


@contextlib.contextmanager
def locked(path: Path, busy: str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`, against other processes and other threads. The lock falls with the process that held it.

    wait: seconds to wait for whoever holds it.

    Raises:
        FolderError: somebody else holds it; the message is `busy`. StorageError: the lock file can't be made.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=wait)
    except Timeout as error:
        raise FolderError(busy) from error
    except OSError as error:
        raise storage_error("lock", path, error) from error
    try:
        yield
    finally:
        lock.release()
