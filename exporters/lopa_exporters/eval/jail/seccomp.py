"""A system-call filter (Linux, seccomp BPF): no processes, threads, programs, sockets, signals, and no change to a file or another process.

Untrusted code in one thread that computes needs none of these. The filter can't be taken off again, and needs no privileges.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

from . import syscalls

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine to its column in the table of calls, and its audit architecture."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0o20000000
"""Flags of an open that could change something; the last one is O_TMPFILE's own bit."""
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_X32 = 0x40000000
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_SETOWN, _SETSIG, _SETOWN_EX = 8, 10, 15
"""Of fcntl: a pipe's input can then send any signal to any process of the same user."""
_CONDITIONS = (
    ("open", 1, _ANY_BIT, (_WRITING,)),
    ("openat", 2, _ANY_BIT, (_WRITING,)),
    ("prlimit64", 0, _ANY_BIT, (0xFFFFFFFF,)),
    ("fcntl", 1, _EQUAL, (_SETOWN, _SETSIG, _SETOWN_EX)),
)
"""Call, position of an argument, and what denies it: one of these comparisons is true. prlimit64's is the process, 0 for one's own."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def apply(libc: ctypes.CDLL) -> bool:
    """Install the filter; needs no_new_privs. False where the machine or the kernel has none."""
    if platform.machine() not in _MACHINES:
        return False
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in _instructions(*_MACHINES[platform.machine()]))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    return bool(libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) == 0)


def _instructions(column: int, architecture: int) -> list[tuple[int, int, int, int]]:
    """The filter as (code, jump if true, jump if false, operand); jumps are counted from the next instruction."""
    numbers = sorted(number for numbers in syscalls.denied().values() if (number := numbers[column]) is not None)
    rows: list[tuple[int, str | int, str | int, int]] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 0, "kill", architecture),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, "deny", 0, _X32),
        *((_EQUAL, "deny", 0, number) for number in numbers),
    ]
    for name, position, comparison, operands in _CONDITIONS:
        number = syscalls.CHECKED[name][column]
        if number is not None:
            # Another call than this one: over all of its instructions.
            rows += [(_EQUAL, 0, 2 + len(operands), number), (_LOAD, 0, 0, 16 + 8 * position)]
            rows += [*((comparison, "deny", 0, operand) for operand in operands), (_RETURN, 0, 0, _ALLOW)]
    ends = {"allow": len(rows), "deny": len(rows) + 1, "kill": len(rows) + 2}
    rows += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _DENY), (_RETURN, 0, 0, _KILL)]

    def jump(here: int, target: str | int) -> int:
        return target if isinstance(target, int) else ends[target] - here - 1

    return [(code, jump(i, true), jump(i, false), operand) for i, (code, true, false, operand) in enumerate(rows)]
