"""`lopa serve` with a switch: SIGUSR1 kills the engine's thread at whatever it is doing, as a fault in native code or in Python would.

The product has no such switch; this is the whole of it.
"""

from __future__ import annotations

import ctypes
import signal
import threading

from lopa.cli import main


def kill_engine(*_: object) -> None:
    """SystemExit passes every handler of a step's failures: the thread ends, not the step."""
    for thread in threading.enumerate():
        if thread.name == "lopa-engine" and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, kill_engine)
    main()
