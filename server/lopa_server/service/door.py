"""The door: no RPC of any service gets further than here before its caller is known and there is a place, and nothing of its request is
received before.

Every method is served as if its requests were a stream, whatever its kind. For a method with one request, gRPC would first wait for the
whole message, from anybody and for as long as it takes: strangers could fill the memory and hold all places without ever finishing one.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio
from lopa.wire.errors import Reason, WireError

from lopa_server.identity.methods import OPEN
from lopa_server.limits import TrafficLimits
from lopa_server.service.gate import Gate
from lopa_server.service.status import refuse

Keeper = Callable[[str, Any], Awaitable[None]]
"""Looks at a call's method (its full name) and context. Raises what the call is refused with."""
Receive = Callable[[Any, Any], Awaitable[Any]]
"""Gets the request, given gRPC's iterator of messages and the call's context."""
FIRST_SECONDS = 5.0
"""For a stream's headers and first message to be on their way, once the call is to end."""
PROBE_SECONDS = 10.0
"""Until a health check's message is there: such calls need neither credentials nor a place."""


class Door(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Wraps every method. Put it first: interceptors before it see strangers."""

    def __init__(self, gate: Gate, identify: Keeper | None, traffic: TrafficLimits) -> None:
        """identify: says who calls to everything behind it; None where everybody may."""
        self._gate, self._identify, self._traffic = gate, identify, traffic
        self._guarded: dict[str, Any] = {}
        """Handlers by method: made once, not for every call, so that they hold nothing of one."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        method = handler_call_details.method
        if method in self._guarded:
            return self._guarded[method]
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        self._guarded[method] = patient(handler, PROBE_SECONDS) if method in OPEN else self._guard(method, handler)
        return self._guarded[method]

    def _guard(self, method: str, handler: Any) -> Any:
        behaviour, receive = _behaviour(handler), _receiving(method, handler, self._traffic.receive_seconds)
        streams, stall = handler.response_streaming, self._traffic.stall_seconds

        async def behind_the_door(requests: Any, context: Any) -> Any:
            try:
                async with self._gate.bounded(method, streams=streams):
                    if self._identify is not None:
                        await self._identify(method, context)
                    with self._gate.place(method):
                        return await behaviour(await receive(requests, context), _Begun(context, stall))
            except aio.BaseError:  # its client has been told, or is gone
                raise
            except Exception as error:
                await refuse(context, error)

        return _streaming(handler, behind_the_door)


class _Begun:
    """A call's context that doesn't wait for ever for a client that doesn't read, and whose first write isn't left half-done: gRPC couldn't
    send a status after it, and the call would never end.
    """

    def __init__(self, context: Any, stall_seconds: float) -> None:
        self._context, self._stall_seconds, self._has_begun = context, stall_seconds, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        bound = asyncio.timeout(self._stall_seconds)
        try:
            async with bound:
                await (self._context.write(message) if self._has_begun else self._begin(message))
        except TimeoutError as error:
            if not bound.expired():
                raise
            raise WireError(Reason.TIME_LIMIT, "reading", limit=f"{self._stall_seconds:g} s") from error

    async def _begin(self, message: Any) -> None:
        first = asyncio.ensure_future(self._context.write(message))
        first.add_done_callback(lambda done: done.cancelled() or done.exception())  # looked at, in any case
        try:
            await asyncio.shield(first)
        except asyncio.CancelledError:
            await asyncio.wait({first}, timeout=FIRST_SECONDS)
            raise
        self._has_begun = True


def patient(handler: Any, seconds: float) -> Any:
    """The same RPC handler, which waits so long for its message at most."""
    behaviour, receive = _behaviour(handler), _receiving("", handler, seconds)

    async def answer(requests: Any, context: Any) -> Any:
        try:
            return await behaviour(await receive(requests, context), context)
        except WireError as error:
            await refuse(context, error)

    return _streaming(handler, answer)


def _streaming(handler: Any, answer: Any) -> Any:
    """A handler that receives bytes, one after the other, and sends what `handler` sends."""
    make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    return make(answer, request_deserializer=None, response_serializer=handler.response_serializer)


def _behaviour(handler: Any) -> Callable[[Any, Any], Awaitable[Any]]:
    """What a handler does, as a coroutine whatever it is."""
    name = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
    behaviour = getattr(handler, name)
    if inspect.isasyncgenfunction(behaviour):
        return _writing(behaviour)
    coroutine: Callable[[Any, Any], Awaitable[Any]] = behaviour if inspect.iscoroutinefunction(behaviour) else _unimplemented
    return coroutine


def _writing(generator: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Awaitable[None]]:
    """Writes instead of yielding: a client that goes away interrupts it inside, and nothing is left to be collected."""

    async def write_all(request: Any, context: Any) -> None:
        async with aclosing(generator(request, context)) as replies:
            async for reply in replies:
                await context.write(reply)

    return write_all


async def _unimplemented(request: Any, context: Any) -> None:
    """For what isn't asynchronous: on this server those are only the generated placeholders of methods that nobody wrote."""
    del request
    await context.abort(grpc.StatusCode.UNIMPLEMENTED)


def _receiving(method: str, handler: Any, seconds: float) -> Receive:
    """How a handler's request is had: one message in time, or all of them as they come."""
    decode = handler.request_deserializer

    async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
        del context
        return _decoded(requests, method, decode)

    async def one(requests: Any, context: Any) -> Any:
        del requests
        bound = asyncio.timeout(seconds)
        try:
            async with bound:
                data = await context.read()
        except TimeoutError as error:
            raise WireError(Reason.TIME_LIMIT, "request", limit=f"{seconds:g} s") from error
        if data is aio.EOF:  # type: ignore[attr-defined]  # the stubs lack it
            raise WireError(Reason.MISSING_FIELD, "request")
        return _decode(data, method, decode)

    return stream if handler.request_streaming else one


def _decode(data: bytes, method: str, decode: Callable[[bytes], Any]) -> Any:
    try:
        return decode(data)
    except DecodeError as error:
        raise WireError(Reason.MALFORMED_REQUEST, "request", limit=method) from error


async def _decoded(requests: AsyncIterator[bytes], method: str, decode: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    async for data in requests:
        yield _decode(data, method, decode)
