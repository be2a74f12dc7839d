"""Compiles the kernels for this very processor, once: later starts load the file from the user's cache.

Nothing is linked against an OpenMP library. The kernels' parallel loops find the one that torch brought, so that there is
one pool of threads; a process without it can't load them, and the engine goes on with torch alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).parent / name for name in ("attention.c", "elementwise.c"))
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC")
COMPILE_SECONDS = 120


class NotAvailable(Exception):
    """There is no compiler, or it or the dynamic loader doesn't do here what is needed; the message says which."""


def load_library() -> ctypes.CDLL:
    """The compiled kernels, from the cache or compiled now, which takes a second.

    Raises:
        NotAvailable: they can't be had on this machine.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    try:
        name = f"kernels-{_digest(compiler)}.so"
        with _folder() as folder:
            if not (folder / name).exists():
                _compile(compiler, folder, name)
            return ctypes.CDLL(str(folder / name), os.RTLD_NOW | os.RTLD_LOCAL)
    except subprocess.CalledProcessError as error:
        raise NotAvailable(f"{shlex.join(error.cmd)} failed: {error.stderr.decode(errors='replace')[-500:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotAvailable(str(error)) from error


def _digest(compiler: Sequence[str]) -> str:
    """Of all that the compiled file depends on: a home may be shared by machines with different processors."""
    digest = hashlib.sha256()
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, timeout=COMPILE_SECONDS).stdout
    parts = [version, " ".join([*compiler, *FLAGS]).encode(), platform.machine().encode(), _processor()]
    for part in (*parts, *(source.read_bytes() for source in SOURCES)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _processor() -> bytes:
    """The instructions that this processor has, as Linux names them; elsewhere its name."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Where compiled files stay. What is loaded from there runs as this user: nobody else may write to it.

    Where there is no such place, a folder for this start only.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lopa" / "kernels"
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = cache.stat()
        usable = found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(cache, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):
        usable = False
    if usable:
        yield cache
        return
    with tempfile.TemporaryDirectory(prefix="lopa-kernels-") as name:
        yield Path(name)


def _compile(compiler: Sequence[str], folder: Path, name: str) -> None:
    """Into place in one move: others may start at the same time."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in SOURCES]
        library = str(Path(scratch) / name)
        commands = [[*compiler, *FLAGS, "-c", str(source), "-o", built] for source, built in zip(SOURCES, objects, strict=True)]
        for command in (*commands, [*compiler, "-shared", "-o", library, *objects, "-lm"]):
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)
        Path(library).replace(folder / name)
    log.info("compiled the CPU kernels with %s", shlex.join(compiler))
