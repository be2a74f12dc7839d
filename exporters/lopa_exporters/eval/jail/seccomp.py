"""A system-call filter (Linux, seccomp BPF): no processes, threads, programs, sockets, signals, and no change to any file.

Untrusted code in one thread that computes needs none of these. The filter can't be taken off again, and needs no privileges.
Numbers: linux/arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

_SHARED = range(424, 426), range(428, 436), range(437, 439), range(442, 443)
"""pidfd_send_signal, io_uring_setup; open_tree to pidfd_open and clone3; openat2, pidfd_getfd; mount_setattr: one number everywhere."""

_X86_64 = {
    "network": (41, 42, 43, 44, 46, 49, 50, 53, 288),
    "processes": (56, 57, 58, 59, 62, 101, 129, 200, 234, 272, 297, 308, 310, 311, 312, 322),
    "files": (
        76,
        *range(82, 89),
        *range(90, 95),
        132,
        133,
        188,
        189,
        190,
        197,
        198,
        199,
        235,
        *range(258, 262),
        *range(263, 267),
        268,
        280,
    ),
    "more files": (285, 304, 316, 319),
    "system": (29, 64, 68, 103, 135, 155, 161, *range(163, 171), 175, 176, 179, 240, 246, 248, 249, 250, 298, 300, 313, 320, 321, 323),
}
_AARCH64 = {
    "network": (198, 199, 200, 201, 202, 203, 206, 211, 242),
    "processes": (97, 117, 129, 130, 131, 138, 220, 221, 240, 268, 270, 271, 272, 281),
    "files": (5, 6, 7, 14, 15, 16, *range(33, 39), 45, 47, *range(52, 56), 88, 265, 276, 279),
    "system": (
        39,
        40,
        41,
        51,
        60,
        89,
        92,
        104,
        105,
        106,
        116,
        142,
        161,
        180,
        186,
        190,
        194,
        217,
        218,
        219,
        224,
        225,
        241,
        262,
        273,
        280,
        282,
    ),
}
_MACHINES = {"x86_64": (0xC000003E, _X86_64, {2: 1, 257: 2}), "aarch64": (0xC00000B7, _AARCH64, {56: 2})}
"""Machine to (audit architecture, denied calls, calls that open files with the position of their flags)."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0o20000000
"""Flags of an open that could change something; the last one is O_TMPFILE's own bit."""
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_X32 = 0x40000000
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


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


def _instructions(architecture: int, denied: dict[str, tuple[int, ...]], opens: dict[int, int]) -> list[tuple[int, int, int, int]]:
    """The filter as (code, jump if true, jump if false, operand); jumps are counted from the next instruction."""
    numbers = sorted({number for group in (*denied.values(), *_SHARED) for number in group})
    rows: list[tuple[int, str | int, str | int, int]] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 0, "kill", architecture),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, "deny", 0, _X32),
        *((_EQUAL, "deny", 0, number) for number in numbers),
    ]
    for number, position in opens.items():
        # Another call than this one: over the next three.
        rows += [(_EQUAL, 0, 3, number), (_LOAD, 0, 0, 16 + 8 * position), (_ANY_BIT, "deny", 0, _WRITING), (_RETURN, 0, 0, _ALLOW)]
    ends = {"allow": len(rows), "deny": len(rows) + 1, "kill": len(rows) + 2}
    rows += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _DENY), (_RETURN, 0, 0, _KILL)]

    def jump(here: int, target: str | int) -> int:
        return target if isinstance(target, int) else ends[target] - here - 1

    return [(code, jump(i, true), jump(i, false), operand) for i, (code, true, false, operand) in enumerate(rows)]
