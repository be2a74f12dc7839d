"""The door: no RPC of any service gets further than here before its keepers let it in, and nothing of its request is decoded before."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from grpc_status import rpc_status

from lopa_server.identity.authenticator import Authenticator
from lopa_server.identity.caller import set_caller
from lopa_server.identity.methods import OPEN
from lopa_server.service.status import status_for

Keeper = Callable[[str, Any], Awaitable[None]]
"""Looks at a call's method (its full name) and context. Raises what the call is refused with."""
Admit = Callable[[Any], Awaitable[None]]
Decode = Callable[[bytes], Any]


def identifying(authenticator: Authenticator) -> Keeper:
    """Keeps strangers out, and says who calls to everything behind it."""

    async def identify(method: str, context: Any) -> None:
        metadata = tuple(context.invocation_metadata() or ())
        connection = context.auth_context() if authenticator.by_certificate else {}
        set_caller(await authenticator.admit(method, metadata, connection))

    return identify


class Door(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Wraps every method but the open ones. Put it first: interceptors before it see strangers."""

    def __init__(self, keepers: Sequence[Keeper]) -> None:
        """keepers: asked one after the other."""
        self._keepers = tuple(keepers)
        self._guarded: dict[str, Any] = {}
        """Handlers by method: made once, not for every call, so that they hold nothing of one."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        method = handler_call_details.method
        if method in self._guarded:
            return self._guarded[method]
        handler = await continuation(handler_call_details)
        if handler is None or method in OPEN:
            return handler

        async def admit(context: Any) -> None:
            try:
                for keeper in self._keepers:
                    await keeper(method, context)
            except Exception as error:
                await context.abort_with_status(rpc_status.to_status(status_for(error)))

        self._guarded[method] = guarded(handler, admit)
        return self._guarded[method]


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
