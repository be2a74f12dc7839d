"""Bytes that are no message reach the gate too, so that they get a typed error instead of gRPC's bare UNKNOWN."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message


@dataclass(frozen=True)
class Undecodable:
    """Stands in for a request that can't be decoded."""

    method: str
    """Full name of the method that was called, `/lopa.v1.Inference/Generate`."""


class TolerantDecoding(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Makes the methods of some services take `Undecodable` where their request can't be decoded."""

    def __init__(self, services: Collection[str]) -> None:
        """`services`: full names; their methods must pass every request through the gate."""
        self._prefixes = tuple(f"/{name}/" for name in services)
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

        def tolerant(data: bytes) -> Message | Undecodable:
            try:
                message: Message = decode(data)
                return message
            except DecodeError:
                return Undecodable(method)

        self._tolerant[method] = handler._replace(request_deserializer=tolerant)
        return self._tolerant[method]
