"""What the engine thread has not taken in yet."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import TypeAlias

from lopa_server.engine.base import EngineStopped
from lopa_server.engine.torch_engine.live import LiveJob, LiveStream


@dataclass(frozen=True)
class Abort:
    """Forget a request or a call's pairs."""

    id: str


@dataclass(frozen=True)
class Stop:
    """Give up everything and end the thread."""


Incoming: TypeAlias = LiveStream | LiveJob
Command: TypeAlias = Incoming | Abort | Stop


class Inbox:
    """Commands in order, except that whoever is aborted in here isn't kept until the thread has time for it. `put` in any thread, all
    else in the engine's.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[list[Incoming] | Abort | Stop] = queue.SimpleQueue()
        """An arrival is in a list, which is empty once it has been aborted."""
        self._arriving: dict[str, list[Incoming]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.aborted = 0
        """Arrivals that were aborted in here."""

    @property
    def empty(self) -> bool:
        return self._queue.empty()

    def put(self, command: Command) -> None:
        """Raises EngineStopped once it is closed."""
        with self._lock:
            if self._closed:
                raise EngineStopped("the engine has ended")
            if isinstance(command, LiveStream | LiveJob):
                self._arriving[command.id] = [command]
                self._queue.put(self._arriving[command.id])
            elif isinstance(command, Abort) and command.id in self._arriving:
                self._arriving.pop(command.id).clear()
                self.aborted += 1
            else:
                self._queue.put(command)

    def get(self, *, wait: bool) -> Command | None:
        """The next one. None: there is none at the moment. wait: until there is."""
        while True:
            try:
                command = self._queue.get(block=wait)
            except queue.Empty:
                return None
            if not isinstance(command, list):
                return command
            with self._lock:
                for arrival in command:
                    del self._arriving[arrival.id]
                    return arrival

    def close(self) -> list[Incoming]:
        """Take nothing any more; what was still to arrive."""
        with self._lock:
            self._closed = True
            return [arrival for arrivals in self._arriving.values() for arrival in arrivals]
