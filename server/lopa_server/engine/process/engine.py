"""ProcessEngine: the `Engine` protocol over a torch engine in a process of its own. This side imports no torch."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import logging
import socket
import subprocess
import sys
from collections.abc import Sequence

from lopa_server.engine.base import EngineSpec, EngineStats, EngineStopped, GenerateRequest, PairRequest, QueueFull
from lopa_server.engine.front import EngineFront
from lopa_server.engine.mailbox import Receiver
from lopa_server.engine.pair_queue import PairKind
from lopa_server.engine.process import wire
from lopa_server.engine.process.failures import error_of, load_error_of
from lopa_server.engine.torch_engine.config import TorchEngineConfig

HOST = "lopa_server.engine.process"
NEEDED = ("torch", "transformers", "llguidance")
"""What it imports and this side doesn't."""
STANDARD_ERROR = 2
MOST_UNSENT = 128 << 20
"""Bytes that may wait for an engine which doesn't read: what is cancelled meanwhile waits too."""
ENDING_SECONDS = 30.0
"""For a killed process to be gone. One that the kernel can't end, as in a driver that hangs, still has its device."""

log = logging.getLogger(__name__)


class ProcessEngine(EngineFront):
    """Serves one Hugging Face model in a process of its own. Load it on a loop, and use it on that loop only."""

    def __init__(self, spec: EngineSpec, link: Link, process: subprocess.Popen[bytes], config: TorchEngineConfig) -> None:
        super().__init__(spec, link, config)
        self._process, self._link, self._killed = process, link, False
        self._reading = asyncio.create_task(link.read())

    @classmethod
    async def load(cls, config: TorchEngineConfig) -> ProcessEngine:
        """Start the process and have it load the model; seconds to minutes.

        Raises:
            ConfigError, FileNotFoundError, UnsupportedModel: as `TorchEngine.load`.
            ChildProcessError: it failed in another way, or was ended.
            ModuleNotFoundError: a package that it needs is not installed.
        """
        for package in NEEDED:
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        ours, theirs = socket.socketpair()
        reader, stream = await asyncio.open_unix_connection(sock=ours, limit=wire.READ_AHEAD)
        writer = wire.MessageWriter(stream)
        process = None
        try:
            with theirs:
                process = _start(theirs)
            writer.write(wire.Begin(config, logging.getLogger().getEffectiveLevel()))
            greeting = await wire.MessageReader[wire.Loaded | wire.NotLoaded](reader, wire.Loaded | wire.NotLoaded).next()
            if greeting is None:
                raise ChildProcessError(f"the engine's process ended while it loaded the model: {await _end_of(process)}")
            if isinstance(greeting, wire.NotLoaded):
                raise load_error_of(greeting)
        except BaseException:
            writer.close()
            if process is not None:
                process.kill()
                await _end_of(process)
            raise
        return cls(greeting.spec, Link(reader, writer, process.pid), process, config)

    def start(self) -> None:
        """It has started already."""

    async def stop(self) -> None:
        """End the process, whatever it is doing; whoever still waits for an answer gets EngineStopped."""
        self.ask_to_stop()
        try:
            await self.wait_ended()
        except subprocess.TimeoutExpired:
            log.critical("the engine's process %d can't be ended", self._process.pid)

    def ask_to_stop(self) -> None:
        """As `stop`, without waiting."""
        self._stopped = True
        self.kill()

    def kill(self) -> bool:
        """True: a process can be ended at once. Everybody is told without waiting for its end."""
        self._killed = True
        self._process.kill()
        self._link.end()
        self._reading.cancel()
        return True

    async def wait_ended(self) -> None:
        """Returns when the process has ended, by `stop` or by dying, and everybody has been told.

        Raises:
            subprocess.TimeoutExpired: it has been killed, and is still there.
        """
        await asyncio.wait({self._reading})
        end = await _end_of(self._process)
        if not self._killed:
            log.error("the engine's process ended: %s", end)


class Link:
    """The `Backend` at the other end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: wire.MessageWriter, pid: int) -> None:
        self._reader = wire.MessageReader[wire.Report](reader, wire.Report)
        self._writer, self._pid = writer, pid
        self._receivers: dict[str, Receiver] = {}
        self._stats = EngineStats(pid=pid)
        self._ended = False

    def stream(self, request: GenerateRequest, receiver: Receiver) -> None:
        self._send(request.id, wire.StreamCommand(request), receiver)

    def pairs(self, name: str, kind: PairKind, pairs: Sequence[PairRequest], receiver: Receiver) -> None:
        self._send(name, wire.PairsCommand(name, kind, list(pairs)), receiver)

    def abort(self, name: str) -> None:
        """What has had its last event is forgotten there, too."""
        if self._receivers.pop(name, None) is not None:
            self._writer.write(wire.AbortCommand(name))

    def nudge(self) -> None:
        """A name that nobody has."""
        self._writer.write(wire.AbortCommand(""))

    def stats(self) -> EngineStats:
        return self._stats

    async def read(self) -> None:
        """Hand out what the engine reports, until its process has ended; whoever still waits is told."""
        try:
            while (report := await self._reader.next()) is not None:
                for event in report.events:
                    self._hand_out(event)
                if report.stats is not None:
                    self._stats = dataclasses.replace(report.stats, pid=self._pid)
        except Exception:
            log.critical("what the engine's process says can't be understood", exc_info=True)
        finally:
            self.end()

    def end(self) -> None:
        """Take and give nothing any more."""
        self._ended = True
        self._writer.close()
        for receiver in self._receivers.values():
            receiver.put(EngineStopped("the engine's process has ended"))
        self._receivers.clear()

    def _send(self, name: str, command: wire.Command, receiver: Receiver) -> None:
        if self._ended:
            raise EngineStopped("the engine's process has ended")
        if (unsent := self._writer.unsent) > MOST_UNSENT:
            raise QueueFull("bytes for the engine", unsent, MOST_UNSENT, 1.0)
        self._writer.write(command)
        self._receivers[name] = receiver

    def _hand_out(self, event: wire.Event) -> None:
        """An event for whoever has gone meanwhile is dropped."""
        receiver = self._receivers.get(event.name)
        if receiver is None:
            return
        if isinstance(event, wire.Said):
            receiver.put(event.delta)
            if event.delta.finish is None:
                return
        elif isinstance(event, wire.Measured):
            receiver.put(event.results)
        else:
            receiver.put(error_of(event))
        del self._receivers[event.name]


def _start(connection: socket.socket) -> subprocess.Popen[bytes]:
    """In the server's process group: whoever stops or kills the group means both."""
    number = connection.fileno()
    command = [sys.executable, "-P", "-m", HOST, str(number)]
    return subprocess.Popen(command, pass_fds=[number], stdin=subprocess.DEVNULL, stdout=STANDARD_ERROR)


async def _end_of(process: subprocess.Popen[bytes]) -> str:
    """Wait for a process that ends; how it did. Raises subprocess.TimeoutExpired after ENDING_SECONDS."""
    code = await asyncio.to_thread(process.wait, ENDING_SECONDS)
    return f"exit code {code}" if code >= 0 else f"killed by signal {-code}" + (", perhaps for want of memory" if code == -9 else "")
