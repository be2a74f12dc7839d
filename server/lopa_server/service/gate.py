"""Every call passes the gate: it refuses while the server isn't serving, counts who is inside, and gives errors their status."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from enum import Enum
from typing import Any

from google.protobuf.message import Message
from grpc_status import rpc_status
from lopa.wire.errors import Reason, WireError

from lopa_server.engine.base import Engine
from lopa_server.identity.caller import current_caller
from lopa_server.limits import TrafficLimits
from lopa_server.metering.meter import Meter, MeteredCall
from lopa_server.service.decoding import Undecodable
from lopa_server.service.status import status_for

STREAMS = ("Generate", "FetchBundle")
COMPUTED = {"/lopa.v1.Inference/Generate": False, "/lopa.v1.Inference/Score": True, "/lopa.v1.Tuning/PromptGradients": True}
"""Methods that wait for the engine, and whether with pairs."""


class State(Enum):
    STARTING = "starting"
    SERVING = "serving"
    RESTARTING = "restarting"
    DRAINING = "draining"


class Gate:
    """One for the whole server; used on its loop only."""

    def __init__(self, max_message_bytes: int, meter: Meter, traffic: TrafficLimits) -> None:
        self.state = State.STARTING
        self._max_message_bytes = max_message_bytes
        self._meter, self._traffic = meter, traffic
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self.engine: Engine | None = None
        """What calls will wait for, once there is one."""

    async def keep(self, method: str, context: Any) -> None:
        """A keeper of the door: what is sure to be refused isn't even decoded, so that a flood costs as little as it can.

        Raises:
            OverLimit, QueueFull, EngineStopped, EngineRestarting
        """
        del context
        if method in COMPUTED and self.state is State.SERVING and self.engine is not None:
            caller = current_caller()
            self._meter.check(caller)
            self.engine.check_room(caller.tenant, pairs=COMPUTED[method])

    @contextlib.asynccontextmanager
    async def call(self, kind: str, request: Message | Undecodable, context: Any) -> AsyncIterator[MeteredCall]:
        """Around a call's body; gives who calls, and what counts its use. An exception inside ends the call with its status.

        kind: the method's name.
        """
        self._inside += 1
        self._empty.clear()
        try:
            async with self._bounded(kind):
                self._check_state()
                size = 0 if isinstance(request, Undecodable) else request.ByteSize()
                with self._meter.enter(current_caller(), kind, size) as call:
                    self._check_request(request, size)
                    yield call
        except Exception as error:
            await context.abort_with_status(rpc_status.to_status(status_for(error)))
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    async def wait_empty(self, seconds: float) -> bool:
        """Wait until nobody is inside, for so long at most; whether that came true."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), seconds)
        return self._empty.is_set()

    @contextlib.asynccontextmanager
    async def _bounded(self, kind: str) -> AsyncIterator[None]:
        """No call lives for ever, whatever deadline its client has set: raises TIME_LIMIT inside the call."""
        seconds = self._traffic.stream_seconds if kind in STREAMS else self._traffic.unary_seconds
        bound = asyncio.timeout(seconds)
        try:
            async with bound:
                yield
        except TimeoutError as error:
            if not bound.expired():
                raise
            raise WireError(Reason.TIME_LIMIT, kind, limit=f"{seconds:g} s") from error

    def _check_state(self) -> None:
        if self.state is State.STARTING:
            raise WireError(Reason.STARTING)
        if self.state is State.RESTARTING:
            raise WireError(Reason.ENGINE_RESTARTING)
        if self.state is State.DRAINING:
            raise WireError(Reason.DRAINING)

    def _check_request(self, request: Message | Undecodable, size: int) -> None:
        if isinstance(request, Undecodable):
            raise WireError(Reason.MALFORMED_REQUEST, "request", limit=request.method)
        if size > self._max_message_bytes:
            raise WireError(Reason.MESSAGE_TOO_LARGE, "request", limit=self._max_message_bytes, found=size)
