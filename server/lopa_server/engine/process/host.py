"""The engine's process: `python -m lopa_server.engine.process FD`, where FD is its end of a socket pair to the server.

It ends when the server does: the connection's end is the only sign it needs. Signals that are meant for the server are left to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence

from lopa import event_loop

from lopa_server import heap
from lopa_server.engine.base import EngineFailed, EngineStats
from lopa_server.engine.mailbox import Event, Receiver
from lopa_server.engine.process import wire
from lopa_server.engine.process.failures import failed, not_loaded
from lopa_server.engine.torch_engine.intake import Intake
from lopa_server.logs import log_to_stderr
from lopa_server.threads import apart

log = logging.getLogger(__name__)


class Addressee:
    """Stands for a request's receiver on the server's side."""

    def __init__(self, name: str, host: Host) -> None:
        self.name, self._host = name, host

    def put(self, event: Event) -> None:
        """What the engine thread doesn't deliver itself."""
        self._host.report([(self, event)], None)


class Host:
    """Feeds an intake from the connection, and reports what becomes of it."""

    def __init__(self, reader: asyncio.StreamReader, writer: wire.MessageWriter) -> None:
        self._commands = wire.MessageReader[wire.Command](reader, wire.Command)
        self._writer = writer
        self._unreported = asyncio.get_running_loop().create_future()
        """Fails when an event could not be told: whoever waits for it would wait for ever."""
        self._obeying = asyncio.create_task(self._obey())
        """Is over when the server has ended."""
        self.intake: Intake
        """Set before the server hears that it may send commands."""

    async def load(self, load: Callable[[], Intake]) -> bool:
        """False: the server has ended meanwhile. Raises what `load` raises."""
        loading = asyncio.create_task(apart(load))
        await asyncio.wait({self._obeying, loading}, return_when=asyncio.FIRST_COMPLETED)
        if self._obeying.done():
            return False
        self.intake = loading.result()
        return True

    async def run(self) -> None:
        """Until the server has ended.

        Raises:
            EngineFailed: the engine thread has died.
        """
        loop = asyncio.get_running_loop()

        def deliver(events: Sequence[tuple[Receiver, Event]], stats: EngineStats) -> None:
            loop.call_soon_threadsafe(self.report, events, stats)

        heap.settle()
        self._writer.write(wire.Loaded(self.intake.spec))
        self.intake.start(deliver)
        ending = asyncio.create_task(asyncio.to_thread(self.intake.worker.join))
        await asyncio.wait({self._obeying, self._unreported, ending}, return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            raise EngineFailed("the engine thread has died")
        await (self._unreported if self._unreported.done() else self._obeying)

    def report(self, events: Sequence[tuple[Receiver, Event]], stats: EngineStats | None) -> None:
        """On the loop. stats: from the engine thread alone."""
        try:
            self._writer.write(wire.Report([_message(receiver, event) for receiver, event in events], stats))
        except Exception as error:
            if not self._unreported.done():
                self._unreported.set_exception(error)

    async def _obey(self) -> None:
        while (command := await self._commands.next()) is not None:
            if isinstance(command, wire.StreamCommand):
                self.intake.stream(command.request, Addressee(command.request.id, self))
            elif isinstance(command, wire.PairsCommand):
                self.intake.pairs(command.name, command.kind, command.pairs, Addressee(command.name, self))
            else:
                self.intake.abort(command.name)


def _message(receiver: Receiver, event: Event) -> wire.Event:
    if not isinstance(receiver, Addressee):
        raise TypeError("an event for nobody of this connection")
    if isinstance(event, Exception):
        return failed(receiver.name, event)
    return wire.Measured(receiver.name, event) if isinstance(event, list) else wire.Said(receiver.name, event)


async def serve(connection: socket.socket) -> None:
    """What this process is for."""
    reader, stream = await asyncio.open_unix_connection(sock=connection, limit=wire.READ_AHEAD)
    writer = wire.MessageWriter(stream)
    begin = await wire.MessageReader[wire.Begin](reader, wire.Begin).next()
    if begin is None:
        return
    log_to_stderr(logging.getLevelName(begin.log_level))
    host = Host(reader, writer)
    try:
        if not await host.load(lambda: Intake.load(begin.config)):
            return
    except Exception as error:
        message = not_loaded(error)
        if not message.kind:
            log.critical("the engine can't be loaded", exc_info=True)
        writer.write(message)
        await writer.flush()
        return
    await host.run()


async def main(connection: socket.socket) -> None:
    """Ends the process itself: a step under way would keep the interpreter from ending."""
    code = 1
    try:
        await serve(connection)
        code = 0
    except Exception:
        log.critical("the engine's process ends", exc_info=True)
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def run(connection: socket.socket) -> None:
    """The whole process."""
    event_loop.run(main(connection))
