"""`lopa serve --restart`: a parent that starts the server again when it has crashed, or has given its engine up.

For places that have nothing of the kind. systemd and Kubernetes do the same, and more.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from types import FrameType

log = logging.getLogger(__name__)

EXIT_BROKEN = 70
"""The engine failed for good (sysexits.h, EX_SOFTWARE): whoever started the server should start it again."""
RESTARTS = 5
"""So many within WINDOW_SECONDS; then the last end is the end."""
WINDOW_SECONDS = 600.0
PAUSE_SECONDS = 1.0
"""Before the first restart; twice as long before each further one within the window."""


def keep_running(command: Sequence[str]) -> int:
    """Run a command, again and again while it ends by a signal or with EXIT_BROKEN. Gives the exit code of its last end.

    SIGTERM and SIGINT go on to it, and its end is then the end. Call it in the main thread.
    """
    stop, restarts = threading.Event(), list[float]()
    process: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, _: FrameType | None) -> None:
        stop.set()
        if process is not None:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            process = subprocess.Popen(command)
            if stop.is_set():  # it came before there was anybody to hand it on to
                process.terminate()
            code = process.wait()
            now = time.monotonic()
            restarts = [at for at in restarts if now - at < WINDOW_SECONDS]
            if stop.is_set() or (code >= 0 and code != EXIT_BROKEN):
                return code if code >= 0 else 128 - code
            if len(restarts) >= RESTARTS:
                log.critical("the server has ended %d times within %.0f s: giving up", RESTARTS + 1, WINDOW_SECONDS)
                return EXIT_BROKEN
            log.error("the server has ended with %d: starting it again", code)
            stop.wait(PAUSE_SECONDS * 2 ** len(restarts))
            if stop.is_set():
                return 0
            restarts.append(now)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
