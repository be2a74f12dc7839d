"""Watches every call from outside: how long it took, how it ended, when its tokens left. It changes nothing.

Put it first, so that it sees what later interceptors refuse.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from lopa_server.observability.metrics import Metrics

DETAILS = "grpc-status-details-bin"
CODES = {known.value[0]: known for known in grpc.StatusCode}
OTHER = "other"
"""Label of methods that this server doesn't know, whatever they are called."""


class WatchedContext:
    """A servicer context that notes what passes through it. Everything else is the context's own."""

    def __init__(self, context: Any, on_write: Callable[[Any], None] | None = None) -> None:
        self._context, self._on_write = context, on_write
        self.reason = ""
        """The error catalogue's, once the call was ended with one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        if self._on_write is not None:
            self._on_write(message)
        await self._context.write(message)

    async def abort_with_status(self, status: Any) -> None:
        self.reason = reason_of(status)
        await self._context.abort_with_status(status)


class Observer(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Feeds `Metrics`."""

    def __init__(self, metrics: Metrics, streams: Collection[str] = ("/lopa.v1.Inference/Generate",)) -> None:
        """streams: methods whose messages are tokens."""
        self._metrics, self._streams = metrics, streams
        self._known: dict[str, Any] = {}
        """Watched handlers by method: made once, not for every call."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        method = handler_call_details.method
        if method in self._known:
            return self._known[method]
        handler = await continuation(handler_call_details)
        if handler is None:
            self._metrics.calls.labels(OTHER, grpc.StatusCode.UNIMPLEMENTED.name).observe(0)
            return None
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behaviour = getattr(handler, kind)
            if behaviour is not None:
                self._known[method] = handler._replace(**{kind: self._watched(method, behaviour)})
                return self._known[method]
        return handler

    def _watched(self, method: str, behaviour: Any) -> Any:
        """The same behaviour, watched: a coroutine stays one, an asynchronous generator too."""

        async def call(request: Any, context: Any) -> Any:
            watch = _Watch(self._metrics, method, method in self._streams, context)
            with watch:
                return await behaviour(request, watch.context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            watch = _Watch(self._metrics, method, method in self._streams, context)
            with watch:
                async for message in behaviour(request, watch.context):
                    watch.wrote(message)
                    yield message

        if inspect.isasyncgenfunction(behaviour):
            return stream
        return call if inspect.iscoroutinefunction(behaviour) else behaviour


class _Watch:
    """One call."""

    def __init__(self, metrics: Metrics, method: str, is_stream: bool, context: Any) -> None:
        self._metrics, self._method, self._is_stream = metrics, method, is_stream
        self.context = WatchedContext(context, self.wrote)
        self._started = self._last = time.perf_counter()
        self._first = True

    def wrote(self, message: Any) -> None:
        """A message is on its way to the client."""
        if not self._is_stream or not message.token_ids:
            return
        now = time.perf_counter()
        (self._metrics.first_token if self._first else self._metrics.gap).observe(now - self._last)
        self._first, self._last = False, now

    def __enter__(self) -> None:
        self._metrics.in_flight.labels(self._method).inc()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        code = ended_with(self.context, error)
        self._metrics.calls.labels(self._method, code.name).observe(time.perf_counter() - self._started)
        if self.context.reason:
            self._metrics.rejects.labels(self._method, self.context.reason).inc()
        self._metrics.in_flight.labels(self._method).dec()


def ended_with(context: Any, error: BaseException | None) -> grpc.StatusCode:
    """The code that a call ends with, given the exception that leaves its body."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        left = context.time_remaining()
        return grpc.StatusCode.DEADLINE_EXCEEDED if left is not None and left <= 0 else grpc.StatusCode.CANCELLED
    code = context.code()
    if isinstance(code, int):
        code = CODES.get(code)
    if error is not None and code in (None, grpc.StatusCode.OK):
        return grpc.StatusCode.UNKNOWN
    return code or grpc.StatusCode.OK


def reason_of(status: Any) -> str:
    """The catalogue's reason in a rich status; empty when there is none."""
    packed = dict(status.trailing_metadata or ()).get(DETAILS)
    info = error_details_pb2.ErrorInfo()
    for detail in status_pb2.Status.FromString(packed).details if packed else ():
        if detail.Unpack(info):
            return str(info.reason)
    return ""
