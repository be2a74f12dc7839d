"""OpenTelemetry spans around calls, children of the client's where it sent a `traceparent`. Needs the extra `otel`.

    lopa serve --traces        # where to: OTEL_EXPORTER_OTLP_ENDPOINT and the other standard variables

Attributes are the method, the code and the reason, in OpenTelemetry's own words; never anything of a request or reply.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry import propagate
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer

from lopa_server.observability.interceptor import WatchedContext, ended_with

SERVER_FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
"""Codes that make a server's span an error, as OpenTelemetry's conventions for gRPC say."""


def exporting_provider(version: str) -> TracerProvider:
    """Sends spans by OTLP over gRPC; the standard environment variables say where to, and how many."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    provider = TracerProvider(resource=Resource.create({"service.name": "lopa", "service.version": version}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Tracing(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """A span for every call."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer: Tracer = provider.get_tracer("lopa_server")

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        metadata = dict(handler_call_details.invocation_metadata or ())
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behaviour = getattr(handler, kind)
            if behaviour is not None:
                return handler._replace(**{kind: self._spanned(handler_call_details.method, behaviour, metadata)})
        return handler

    def _spanned(self, method: str, behaviour: Any, metadata: dict[str, Any]) -> Any:
        async def call(request: Any, context: Any) -> Any:
            with self._span(method, metadata, context) as watched:
                return await behaviour(request, watched)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            with self._span(method, metadata, context) as watched:
                async for message in behaviour(request, watched):
                    yield message

        if inspect.isasyncgenfunction(behaviour):
            return stream
        return call if inspect.iscoroutinefunction(behaviour) else behaviour

    @contextmanager
    def _span(self, method: str, metadata: dict[str, Any], context: Any) -> Iterator[WatchedContext]:
        service, _, name = method.lstrip("/").partition("/")
        watched = WatchedContext(context)
        span = self._tracer.start_span(
            method.lstrip("/"),
            propagate.extract(metadata),
            SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        )
        error: BaseException | None = None
        try:
            yield watched
        except BaseException as raised:
            error = raised
            raise
        finally:
            code = ended_with(watched, error)
            span.set_attribute("rpc.grpc.status_code", code.value[0])
            if watched.reason:
                span.set_attribute("error.type", watched.reason)
            if code.name in SERVER_FAULTS:
                span.set_status(Status(StatusCode.ERROR, code.name))
            span.end()
