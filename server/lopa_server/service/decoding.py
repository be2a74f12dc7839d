"""Bytes that can't be a request reach the gate too: they are counted, and get a typed error instead of gRPC's bare UNKNOWN."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message


@dataclass(frozen=True)
class Unusable:
    """Stands in for a request that can't be decoded, or is too large to be looked at."""

    method: str
    """Full name of the method that was called, `/lopa.v1.Inference/Generate`."""
    size: int
    """In bytes."""


class TolerantDecoding(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Makes the methods of some services take `Unusable` where there is no request for them."""

    def __init__(self, services: Collection[str], max_message_bytes: int) -> None:
        """`services`: full names; their methods must pass every request through the gate."""
        self._prefixes = tuple(f"/{name}/" for name in services)
        self._max_message_bytes = max_message_bytes
        self._tolerant: dict[str, Any] = {}
        """Handlers by method: made once, not for every call."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        method = handler_call_details.method
        if method in self._tolerant:
            return self._tolerant[method]
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith(self._prefixes):
            return handler
        decode = handler.request_deserializer

        def tolerant(data: bytes) -> Message | Unusable:
            if len(data) > self._max_message_bytes:
                return Unusable(method, len(data))
            try:
                message: Message = decode(data)
                return message
            except DecodeError:
                return Unusable(method, len(data))

        self._tolerant[method] = handler._replace(request_deserializer=tolerant)
        return self._tolerant[method]
