"""Give up, for good, what code that only computes does not need. Runs in the process that will execute it, before it does.

Every measure that the machine has is taken; `attempts` then tells what holds by trying it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import stat
import sys
from collections.abc import Callable
from pathlib import Path

if sys.platform == "linux":
    from . import landlock, seccomp

NOBODY = 65534
LIBRARY = Path(os.__file__).parent
"""The interpreter's own."""
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x04000000, 0x08000000, 0x10000000, 0x40000000


class ConfinementError(Exception):
    """What this process may do can't be limited enough."""


def confine(cpu_seconds: int, memory_bytes: int, files: int) -> list[str]:
    """Lock this process down. Returns the names of the measures that took hold.

    Raises:
        ConfinementError: started by root, whose rights can't be given up.
    """
    measures = []
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        measures += _namespaces(libc)
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
            measures.append("no_new_privileges")
        # Neither ptrace nor /proc/PID/mem of another process of this user.
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        if version := landlock.apply(libc, needed()):
            measures.append(f"landlock_{version}")
    measures += _limit(cpu_seconds, memory_bytes, files)
    if sys.platform == "linux" and seccomp.apply(libc):
        measures.append("seccomp")
    return measures


def _namespaces(libc: ctypes.CDLL) -> list[str]:
    """A network without any interface, and no rights of root: another user, or root of an empty namespace only.

    Raises:
        ConfinementError: root stays root.
    """
    spaces = _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
    if os.geteuid() != 0:
        return ["namespaces"] * (libc.unshare(spaces | _CLONE_NEWUSER) == 0)
    if _readable_for_all(LIBRARY):
        own = libc.unshare(spaces) == 0
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return ["namespaces"] * own + ["other_user"]
    if libc.unshare(spaces | _CLONE_NEWUSER) != 0:
        raise ConfinementError(f"root's rights can't be given up, since {LIBRARY} is readable for root only; use another user")
    return ["namespaces"]


def _readable_for_all(folder: Path) -> bool:
    """Whether any user may read a folder."""
    return all(place.stat().st_mode & stat.S_IXOTH for place in (folder, *folder.parents)) and bool(folder.stat().st_mode & stat.S_IROTH)


def needed() -> list[str]:
    """What the interpreter reads: its library, shared libraries, time zones, randomness."""
    prefixes = (Path("/"), Path("/usr"), Path(sys.base_exec_prefix))
    shared = [str(prefix / name) for prefix in prefixes for name in ("lib", "lib64")]
    return [str(LIBRARY), *shared, "/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache", "/dev/null", "/dev/urandom"]


def _limit(cpu_seconds: int, memory_bytes: int, files: int) -> list[str]:
    """Resource limits, hard ones too; the names of those that this system has."""
    limits = {"cpu": cpu_seconds, "fsize": 0, "core": 0, "nproc": 0, "nofile": files, "as": memory_bytes}
    done = []
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name.upper()}", None)
        if kind is None:
            continue
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (most, most + 1 if name == "cpu" else most))
            done.append(f"rlimit_{name}")
    return done


def attempts() -> dict[str, bool]:
    """What this process can still do: start another one, reach a network, write a file, read a stranger's file."""
    return {
        "processes": _succeeds(_fork),
        "network": _succeeds(_connect),
        "writing": _succeeds(lambda: os.close(os.open("attempt", os.O_WRONLY | os.O_CREAT, 0o600))),
        "reading": _succeeds(lambda: os.close(os.open("/etc/passwd", os.O_RDONLY))),
    }


def _fork() -> None:
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _connect() -> None:
    """To this machine's own loopback: where it is cut off, nothing answers, not even with a refusal."""
    import socket

    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 9), timeout=1).close()


def _succeeds(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True
