"""What the server and its engine's process say to each other: msgpack messages over a socket pair, each behind its length.

Both are ours and of one version, so nothing here is a format to keep. Messages are decoded into the engine's own types, by type.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

from lopa_server.engine.base import Delta, EngineSpec, EngineStats, GenerateRequest, PairRequest, PairResult
from lopa_server.engine.pair_queue import PairKind
from lopa_server.engine.torch_engine.config import TorchEngineConfig

LENGTH = struct.Struct("<I")
READ_AHEAD = 1 << 20
"""Bytes that either side takes in before it looks at them: soft prompts and gradients of a call are megabytes."""


class Begin(msgspec.Struct, array_like=True):
    """The first message to the engine: what to load."""

    config: TorchEngineConfig
    log_level: int


class StreamCommand(msgspec.Struct, array_like=True, tag=1):
    """As `Backend.stream`."""

    request: GenerateRequest


class PairsCommand(msgspec.Struct, array_like=True, tag=2):
    """As `Backend.pairs`."""

    name: str
    kind: PairKind
    pairs: list[PairRequest]


class AbortCommand(msgspec.Struct, array_like=True, tag=3):
    """As `Backend.abort`."""

    name: str


Command = StreamCommand | PairsCommand | AbortCommand


class Loaded(msgspec.Struct, array_like=True, tag=1):
    """The first message from the engine, when it has started."""

    spec: EngineSpec


class NotLoaded(msgspec.Struct, array_like=True, tag=2):
    """The same when it can't. kind: one of `failures.NOT_LOADED`, empty for anything else."""

    kind: str
    message: str


class Said(msgspec.Struct, array_like=True, tag=1):
    """A stream's delta."""

    name: str
    delta: Delta


class Measured(msgspec.Struct, array_like=True, tag=2):
    """A call's results."""

    name: str
    results: list[PairResult]


class Failed(msgspec.Struct, array_like=True, tag=3):
    """A request or call that gets no answer. See `failures`."""

    name: str
    kind: str
    arguments: list[str | int | float]
    trace: str


Event = Said | Measured | Failed


class Report(msgspec.Struct, array_like=True):
    """Every further message from the engine: a step's events, often none, and the stats after it. None: the engine thread has no part
    in it, so it is no sign that it is alive.
    """

    events: list[Event]
    stats: EngineStats | None


class _Rows(msgspec.Struct, array_like=True):
    """A float32 array."""

    shape: tuple[int, ...]
    data: bytes


def to_plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _Rows(value.shape, np.ascontiguousarray(value, dtype="<f4").tobytes())
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"{type(value).__name__} is no part of a message")


def from_plain(_: Any, value: Any) -> Any:
    rows = msgspec.convert(value, _Rows)
    return np.frombuffer(bytearray(rows.data), dtype="<f4").reshape(rows.shape)


M = TypeVar("M")


class MessageWriter:
    """Writes messages to a connection."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer, self._encoder = writer, msgspec.msgpack.Encoder(enc_hook=to_plain)

    def write(self, message: object) -> None:
        """What can't be written yet is kept; on a connection that has ended it is dropped."""
        data = self._encoder.encode(message)
        if not self._writer.is_closing():
            self._writer.writelines((LENGTH.pack(len(data)), data))

    async def flush(self) -> None:
        """Returns when a later `write` won't have to keep much."""
        await self._writer.drain()

    @property
    def unsent(self) -> int:
        """Bytes that the other side hasn't taken."""
        return self._writer.transport.get_write_buffer_size()

    def close(self) -> None:
        self._writer.close()


class MessageReader(Generic[M]):
    """Reads messages of one type from a connection."""

    def __init__(self, reader: asyncio.StreamReader, kind: Any) -> None:
        self._reader, self._decoder = reader, msgspec.msgpack.Decoder(kind, dec_hook=from_plain)

    async def next(self) -> M | None:
        """None: the other side has ended."""
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            message: M = self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return message
