"""The asynchronous connection: the same flows, carried out on an event loop with grpc.aio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message as ProtoMessage
from grpc import aio

from lopa.errors import Cancelled
from lopa.link import CLOSED
from lopa.protocol.flow import Ask, Finish, Flow, Meter, Open, Receive, Signal, Start, Step, Wait
from lopa.transport import Endpoint, translate
from lopa.v1.catalog_pb2_grpc import CatalogStub
from lopa.v1.inference_pb2_grpc import InferenceStub
from lopa.v1.tuning_pb2_grpc import TuningStub

Result = TypeVar("Result")


class AsyncLink:
    """A channel and its stubs, for one event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._closed = False
        options = endpoint.options()
        plain = grpc.Compression.NoCompression  # noise of tensors doesn't compress
        if endpoint.credentials is None:
            self._channel = aio.insecure_channel(endpoint.address, options, compression=plain)
        else:
            self._channel = aio.secure_channel(endpoint.address, endpoint.credentials, options, compression=plain)
        stubs: list[Callable[[Any], Any]] = [CatalogStub, InferenceStub, TuningStub]
        self._stubs: dict[str, Any] = {
            name: stub(self._channel) for name, stub in zip(("catalog", "inference", "tuning"), stubs, strict=True)
        }

    async def close(self) -> None:
        """Close the channel; calls under way end as `Cancelled`."""
        self._closed = True
        await self._channel.close(None)

    async def run(self, flow: Flow[Result]) -> Result:
        """Carry a flow out and give its result. Cancelling the task unwinds the flow.

        Raises:
            RemoteError: as `translate` says. Others: as the flow says.
        """
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                step = flow.send(value) if error is None else flow.throw(error)
            except StopIteration as end:
                result: Result = end.value
                return result
            value, error = None, None
            try:
                value = await self._perform(step)
            except BaseException as problem:  # whatever it is, the flow's own `finally` and `except` decide
                error = problem

    async def _perform(self, step: Step) -> Any:
        if isinstance(step, Ask | Start | Open) and self._closed:
            raise Cancelled(CLOSED)
        try:
            if isinstance(step, Ask):
                return await self._start(step).reply()
            if isinstance(step, Start):
                return self._start(step.ask)
            if isinstance(step, Finish):
                return await step.call.reply()  # type: ignore[attr-defined]
            if isinstance(step, Open):
                return await self._open(step)
            if isinstance(step, Receive):
                return await step.stream.receive()  # type: ignore[attr-defined]
        except grpc.RpcError as error:
            raise translate(error, address=self.endpoint.address) from error
        if isinstance(step, Wait):
            return await _wait(step)
        return await _work(step.function)

    def _start(self, step: Ask) -> AsyncCall:
        method = getattr(self._stubs[step.method.service], step.method.name)
        step.meter.add(sent=step.request.ByteSize(), requests=1)
        return AsyncCall(method(step.request, timeout=step.timeout, metadata=self.endpoint.metadata()), step, lambda: self._closed)

    async def _open(self, step: Open) -> AsyncReplyStream:
        method = getattr(self._stubs[step.method.service], step.method.name)
        step.meter.add(sent=step.request.ByteSize(), requests=1)
        stream = AsyncReplyStream(method(step.request, timeout=step.timeout, metadata=self.endpoint.metadata()), step.meter)
        await stream.begin()
        return stream


class AsyncCall:
    """A unary call under way on this event loop."""

    def __init__(self, call: Any, step: Ask, closed: Callable[[], bool]) -> None:
        self._call, self._step, self._closed = call, step, closed
        loop = asyncio.get_running_loop()
        self._unsubscribe = step.stop.subscribe(lambda: loop.call_soon_threadsafe(call.cancel)) if step.stop is not None else lambda: None

    async def reply(self) -> ProtoMessage:
        """Wait for it.

        Raises:
            Cancelled: the call was given up. RpcError: it failed.
        """
        stop = self._step.stop
        try:
            reply: ProtoMessage = await self._call
        except asyncio.CancelledError as error:
            if self._call.cancelled() and (self._closed() or (stop is not None and stop.is_set)):
                raise Cancelled(CLOSED if self._closed() else "the call was cancelled") from error
            raise
        finally:
            self._unsubscribe()
        self._step.meter.add(received=reply.ByteSize())
        return reply

    def cancel(self) -> None:
        """Give it up; harmless after its end."""
        self._unsubscribe()
        self._call.cancel()


class AsyncReplyStream:
    """A stream of replies; its first message has arrived after `begin`."""

    def __init__(self, call: Any, meter: Meter) -> None:
        self._call, self._meter = call, meter
        self._closed = False
        self._first: ProtoMessage | None = None

    async def begin(self) -> None:
        """Wait for the first message."""
        self._first = await self._read()

    async def _read(self) -> ProtoMessage | None:
        try:
            reply = await self._call.read()
        except asyncio.CancelledError as error:
            if self._closed:
                raise Cancelled("the stream was closed before its end") from error
            self._call.cancel()
            raise
        if reply is aio.EOF:  # type: ignore[attr-defined]
            return None
        self._meter.add(received=reply.ByteSize())
        message: ProtoMessage = reply
        return message

    async def receive(self) -> ProtoMessage | None:
        """The next reply, None at the end."""
        if self._first is None:
            return await self._read()
        reply, self._first = self._first, None
        return reply

    def close(self) -> None:
        """Cancel the call."""
        self._closed = True
        self._call.cancel()


async def _wait(step: Wait) -> None:
    if step.until is None:
        await asyncio.sleep(step.seconds or 0.0)
        return
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(_raised(step.until), step.seconds)


async def _raised(signal: Signal) -> None:
    loop, up = asyncio.get_running_loop(), asyncio.Event()
    unsubscribe = signal.subscribe(lambda: loop.call_soon_threadsafe(up.set))
    try:
        await up.wait()
    finally:
        unsubscribe()


async def _work(function: Callable[[], Any]) -> Any:
    """In a thread, and never left behind: a flow that unwinds must not be overtaken by its own work."""
    future = asyncio.get_running_loop().run_in_executor(None, function)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise
