"""File access by path (Linux, Landlock): reading the interpreter's own files, and nothing else. Needs no privileges.

Source: include/uapi/linux/landlock.h; Documentation/userspace-api/landlock.rst of the Linux kernel.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

_CREATE, _ADD, _RESTRICT = 444, 445, 446
"""System calls, one number on every machine."""
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_EXECUTE, _READ_FILE, _READ_FOLDER = 1 << 0, 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Interface version to the number of rights over files; all of them are handled, that is denied unless a rule allows."""
_CONNECT_AND_BIND, _SCOPES = 0b11, 0b11
"""TCP (version 4); abstract sockets and signals (version 6)."""


def apply(libc: ctypes.CDLL, readable: Iterable[str]) -> int:
    """Restrict this thread and what comes after it; needs no_new_privs. Returns the interface version, 0 where there is none."""
    version = int(libc.syscall(_CREATE, None, 0, _VERSION_FLAG))
    if version < 1:
        return 0
    rights = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    attributes = struct.pack("=QQQ", rights, _CONNECT_AND_BIND, _SCOPES)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = int(libc.syscall(_CREATE, attributes, len(attributes), 0))
    if rules < 0:
        return 0
    try:
        for path in readable:
            _allow(libc, rules, path)
        return version if libc.syscall(_RESTRICT, rules, 0) == 0 else 0
    finally:
        os.close(rules)


def _allow(libc: ctypes.CDLL, rules: int, path: str) -> None:
    """Reading beneath a path; one that is not there needs no rule."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rights = _READ_FILE | _EXECUTE | (_READ_FOLDER if stat.S_ISDIR(os.fstat(place).st_mode) else 0)
        libc.syscall(_ADD, rules, _PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
    finally:
        os.close(place)
