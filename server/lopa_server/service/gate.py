"""Every call passes the gate: it refuses while the server isn't serving, and counts who is inside. The door gives errors their status."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from enum import Enum

from google.protobuf.message import Message
from lopa.wire.errors import Reason, WireError

from lopa_server.bounds import Bounds, OutOfTime
from lopa_server.engine.base import Engine
from lopa_server.identity.caller import ANONYMOUS, current_caller
from lopa_server.limits import TrafficLimits
from lopa_server.metering.meter import Meter, MeteredCall
from lopa_server.service.decoding import Unusable

COMPUTED = {"/lopa.v1.Inference/Generate": False, "/lopa.v1.Inference/Score": True, "/lopa.v1.Tuning/PromptGradients": True}
"""Methods that wait for the engine, and whether with pairs."""
OURS = "/lopa.v1."
"""Begins the names of methods that answer while the server is serving only. Health and reflection answer at any time."""
SHARE = 4
"""A tenant may have this many times the places that are still free: it can't take the last fifth from all others."""


class State(Enum):
    STARTING = "starting"
    SERVING = "serving"
    RESTARTING = "restarting"
    DRAINING = "draining"


class Gate:
    """One for the whole server; used on its loop only."""

    def __init__(self, places: int, max_message_bytes: int, meter: Meter, traffic: TrafficLimits) -> None:
        """places: calls of every kind and of everybody together."""
        self.state = State.STARTING
        self._places, self._taken = places, 0
        self._max_message_bytes = max_message_bytes
        self._meter, self._traffic = meter, traffic
        self._bounds = Bounds()
        self._ended = False
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self.engine: Engine | None = None
        """What calls will wait for, once there is one."""

    @contextlib.asynccontextmanager
    async def bounded(self, method: str, *, streams: bool) -> AsyncIterator[None]:
        """Around a whole call: none lives for ever, whatever deadline its client has set.

        Raises:
            WireError: TIME_LIMIT inside the call, or DRAINING once `end_all` was called.
        """
        seconds = self._traffic.stream_seconds if streams else self._traffic.unary_seconds
        try:
            async with self._bounds.limit(seconds):
                yield
        except OutOfTime as error:
            if self._ended:
                raise WireError(Reason.DRAINING) from error
            raise WireError(Reason.TIME_LIMIT, method.rpartition("/")[2], limit=f"{seconds:g} s") from error

    @contextlib.contextmanager
    def place(self, method: str) -> Iterator[None]:
        """A place for a call of the caller at hand, from before anything of its request is received to its end. What is sure to be
        refused is refused here, so that a flood costs as little as it can.

        Raises:
            WireError: the server isn't serving, or TOO_MANY_CALLS.
            OverLimit, QueueFull, EngineStopped, EngineRestarting
        """
        if method.startswith(OURS):
            self._check_state()
        caller, free = current_caller(), self._places - self._taken
        if free <= 0 or (caller is not ANONYMOUS and self._meter.open_calls(caller) >= SHARE * free):
            raise WireError(Reason.TOO_MANY_CALLS, "calls", limit=self._places, found=self._taken)
        with self._meter.open(caller):
            if method in COMPUTED and self.engine is not None:
                self._meter.check(caller)
                self.engine.check_room(caller.tenant, pairs=COMPUTED[method])
            self._taken += 1
            try:
                yield
            finally:
                self._taken -= 1

    @contextlib.asynccontextmanager
    async def call(self, kind: str, request: Message | Unusable) -> AsyncIterator[MeteredCall]:
        """Around a call's body; gives who calls, and what counts its use.

        kind: the method's name.
        """
        self._inside += 1
        self._empty.clear()
        try:
            self._check_state()  # again: receiving the request may have taken a while
            size = request.size if isinstance(request, Unusable) else request.ByteSize()
            call = self._meter.enter(current_caller(), kind, size)
            self._check_request(request, size)
            yield call
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    async def wait_empty(self, seconds: float) -> bool:
        """Wait until nobody is inside, for so long at most; whether that came true."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), seconds)
        return self._empty.is_set()

    def end_all(self) -> None:
        """Every call that still runs, be it that its request is being received, ends with DRAINING."""
        self._ended = True
        self._bounds.end_all()

    def _check_state(self) -> None:
        if self.state is State.STARTING:
            raise WireError(Reason.STARTING)
        if self.state is State.RESTARTING:
            raise WireError(Reason.ENGINE_RESTARTING)
        if self.state is State.DRAINING:
            raise WireError(Reason.DRAINING)

    def _check_request(self, request: Message | Unusable, size: int) -> None:
        if size > self._max_message_bytes:
            raise WireError(Reason.MESSAGE_TOO_LARGE, "request", limit=self._max_message_bytes, found=size)
        if isinstance(request, Unusable):
            raise WireError(Reason.MALFORMED_REQUEST, "request", limit=request.method)
