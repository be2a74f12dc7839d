"""The door: no RPC of any service gets further than here without credentials, and nothing of its request is decoded before."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from grpc_status import rpc_status
from lopa.wire.errors import WireError

from lopa_server.identity.authenticator import Authenticator
from lopa_server.identity.caller import set_caller
from lopa_server.identity.methods import OPEN
from lopa_server.service.status import status_for

Admit = Callable[[Any], Awaitable[None]]
Decode = Callable[[bytes], Any]


class Door(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Wraps every method but the open ones. Put it first: interceptors before it see strangers."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None or method in OPEN:
            return handler
        metadata = tuple(handler_call_details.invocation_metadata or ())

        async def admit(context: Any) -> None:
            try:
                set_caller(await self._authenticator.admit(method, metadata, context.auth_context()))
            except WireError as error:
                await context.abort_with_status(rpc_status.to_status(status_for(error)))

        return guarded(handler, admit)


def guarded(handler: Any, admit: Admit) -> Any:
    """The same RPC handler behind `admit`. Requests arrive as bytes and are decoded after it."""
    kinds = {
        (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
        (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
        (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
        (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
    }
    name, make = kinds[(handler.request_streaming, handler.response_streaming)]
    behaviour, decode = getattr(handler, name), handler.request_deserializer
    decoded = (lambda data: _decoded(data, decode)) if handler.request_streaming else decode
    if inspect.isasyncgenfunction(behaviour):
        wrapped = _generator(behaviour, admit, decoded)
    elif inspect.iscoroutinefunction(behaviour):
        wrapped = _coroutine(behaviour, admit, decoded)
    else:
        wrapped = _coroutine(_unimplemented, admit, decoded)
    return make(wrapped, request_deserializer=None, response_serializer=handler.response_serializer)


def _coroutine(behaviour: Callable[[Any, Any], Awaitable[Any]], admit: Admit, decode: Decode) -> Any:
    async def behind_the_door(request: Any, context: Any) -> Any:
        await admit(context)
        return await behaviour(decode(request), context)

    return behind_the_door


def _generator(behaviour: Callable[[Any, Any], Any], admit: Admit, decode: Decode) -> Any:
    async def behind_the_door(request: Any, context: Any) -> AsyncIterator[Any]:
        await admit(context)
        async with aclosing(behaviour(decode(request), context)) as replies:
            async for reply in replies:
                yield reply

    return behind_the_door


async def _unimplemented(request: Any, context: Any) -> None:
    """For what isn't asynchronous: on this server those are only the generated placeholders of methods that nobody wrote."""
    del request
    await context.abort(grpc.StatusCode.UNIMPLEMENTED)


async def _decoded(requests: AsyncIterator[bytes], decode: Decode) -> AsyncIterator[Any]:
    async for request in requests:
        yield decode(request)
