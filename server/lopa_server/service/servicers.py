"""The servicers: every method passes the gate and hands over to a handler.

Streams are written with `context.write`, not yielded: a client that goes away then interrupts us inside the `async with`,
and everything the call held is given back at once instead of when a generator is collected.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any, TypeVar

from google.protobuf.message import Message
from grpc import aio
from lopa.v1 import catalog_pb2, catalog_pb2_grpc, inference_pb2, inference_pb2_grpc, tuning_pb2, tuning_pb2_grpc

from lopa_server.metering.meter import MeteredCall
from lopa_server.service.catalog import CatalogHandler
from lopa_server.service.gate import Gate
from lopa_server.service.handlers import RequestHandlers

NAMES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in ((catalog_pb2, "Catalog"), (inference_pb2, "Inference"), (tuning_pb2, "Tuning"))
)
"""Full names of our services, for health and reflection."""


Reply = TypeVar("Reply", bound=Message)


def _counted(call: MeteredCall, reply: Reply) -> Reply:
    """The reply, its bytes counted."""
    call.sent(reply.ByteSize())
    return reply


async def write(reply: Message, context: Any) -> None:
    """Send one message of a stream.

    A client that goes away in the middle of a write fails the write, instead of the usual cancellation. It is the same event, and
    nobody is left to tell of an error.
    """
    try:
        await context.write(reply)
    except aio.InternalError as error:
        raise asyncio.CancelledError from error


class Handlers:
    """What answers; empty while the model is loading. The gate keeps calls out until then."""

    catalog: CatalogHandler
    requests: RequestHandlers


class CatalogServicer(catalog_pb2_grpc.CatalogServicer):
    def __init__(self, gate: Gate, handlers: Handlers) -> None:
        self._gate, self._handlers = gate, handlers

    async def GetModel(self, request: catalog_pb2.GetModelRequest, context: Any) -> catalog_pb2.ModelInfo:
        del context
        async with self._gate.call("GetModel", request) as call:
            return _counted(call, self._handlers.catalog.model_info())

    async def FetchBundle(self, request: catalog_pb2.FetchBundleRequest, context: Any) -> None:  # type: ignore[override]  # grpc.aio takes writing coroutines
        async with (
            self._gate.call("FetchBundle", request) as call,
            aclosing(self._handlers.catalog.bundle_chunks(request)) as chunks,
        ):
            async for chunk in chunks:
                await write(_counted(call, chunk), context)


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    def __init__(self, gate: Gate, handlers: Handlers) -> None:
        self._gate, self._handlers = gate, handlers

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> None:  # type: ignore[override]
        async with (
            self._gate.call("Generate", request) as call,
            aclosing(self._handlers.requests.generate(request, call, _deadline(context))) as responses,
        ):
            async for response in responses:
                await write(_counted(call, response), context)

    async def Score(self, request: inference_pb2.ScoreRequest, context: Any) -> inference_pb2.ScoreResponse:
        async with self._gate.call("Score", request) as call:
            return _counted(call, await self._handlers.requests.score(request, call, _deadline(context)))


class TuningServicer(tuning_pb2_grpc.TuningServicer):
    def __init__(self, gate: Gate, handlers: Handlers) -> None:
        self._gate, self._handlers = gate, handlers

    async def PromptGradients(self, request: tuning_pb2.PromptGradientsRequest, context: Any) -> tuning_pb2.PromptGradientsResponse:
        async with self._gate.call("PromptGradients", request) as call:
            return _counted(call, await self._handlers.requests.prompt_gradients(request, call, _deadline(context)))


def _deadline(context: Any) -> float | None:
    """When the client stops waiting, on time.monotonic(); None: never."""
    left = context.time_remaining()
    return None if left is None else time.monotonic() + left
