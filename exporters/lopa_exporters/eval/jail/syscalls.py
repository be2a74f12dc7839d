"""System calls that code which only computes does not need, with their numbers.

From linux/arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h. Calls from 424 on have one number everywhere.
"""

from __future__ import annotations

_TABLE = """
# network
socket 41 198, socketpair 53 199, connect 42 203, accept 43 202, accept4 288 242, bind 49 200, listen 50 201, sendto 44 206,
sendmsg 46 211, sendmmsg 307 269,
# processes, threads, programs, signals
fork 57 -, vfork 58 -, clone 56 220, clone3 435 435, execve 59 221, execveat 322 281, kill 62 129, tkill 200 130, tgkill 234 131,
rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_open 434 434, pidfd_getfd 438 438, pidfd_send_signal 424 424, ptrace 101 117,
process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, unshare 272 97, setns 308 268, setpriority 141 140,
sched_setparam 142 118, sched_setscheduler 144 119, sched_setaffinity 203 122, sched_setattr 314 274, ioprio_set 251 30,
migrate_pages 256 238, move_pages 279 239, process_madvise 440 440, process_mrelease 448 448,
# changes to files
creat 85 -, openat2 437 437, open_by_handle_at 304 265, truncate 76 45, fallocate 285 47, rename 82 -, renameat 264 38,
renameat2 316 276, mkdir 83 -, mkdirat 258 34, rmdir 84 -, link 86 -, linkat 265 37, unlink 87 -, unlinkat 263 35, symlink 88 -,
symlinkat 266 36, mknod 133 -, mknodat 259 33, chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -,
fchownat 260 54, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7,
removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, memfd_create 319 279, ioctl 16 29, fchmodat2 452 452, setxattrat 463 463,
removexattrat 466 466, file_setattr 469 469, memfd_secret 447 447,
# the system, and ways around the rest
shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, semop 65 193, semtimedop 220 192, semctl 66 191, msgget 68 186, msgsnd 69 189,
msgrcv 70 188, msgctl 71 187, mq_open 240 180, mq_unlink 241 181, modify_ldt 154 -,
add_key 248 217, request_key 249 218, keyctl 250 219, bpf 321 280,
perf_event_open 298 241, userfaultfd 323 282, io_uring_setup 425 425, fanotify_init 300 262, personality 135 92, syslog 103 116,
mount 165 40, umount2 166 39, mount_setattr 442 442, move_mount 429 429, open_tree 428 428, fsopen 430 430, fsconfig 431 431,
fsmount 432 432, fspick 433 433, pivot_root 155 41, chroot 161 51, swapon 167 224, swapoff 168 225, quotactl 179 60, acct 163 89,
reboot 169 142, sethostname 170 161, settimeofday 164 170, init_module 175 105, finit_module 313 273, delete_module 176 106,
kexec_load 246 104, kexec_file_load 320 294, open_tree_attr 467 467, quotactl_fd 443 443
"""
"""Name, number on x86-64, number on arm64; "-" where there is none."""
CHECKED: dict[str, tuple[int, int | None]] = {"open": (2, None), "openat": (257, 56), "prlimit64": (302, 261), "fcntl": (72, 25)}
"""Calls that are denied with some arguments only; numbers likewise."""


def denied() -> dict[str, tuple[int, int | None]]:
    """Name to its numbers on x86-64 and arm64."""
    lines = " ".join(line for line in _TABLE.splitlines() if not line.startswith("#"))
    rows = (entry.split() for entry in lines.split(","))
    return {name: (int(first), None if second == "-" else int(second)) for name, first, second in rows}
