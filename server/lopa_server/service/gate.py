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

from lopa_server.identity.caller import Caller, current_caller
from lopa_server.service.decoding import Undecodable
from lopa_server.service.status import status_for


class State(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class Gate:
    """One for the whole server; used on its loop only."""

    def __init__(self, max_message_bytes: int) -> None:
        self.state = State.STARTING
        self._max_message_bytes = max_message_bytes
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextlib.asynccontextmanager
    async def call(self, request: Message | Undecodable, context: Any) -> AsyncIterator[Caller]:
        """Around a call's body; gives who calls. An exception inside ends the call with the status that belongs to it."""
        self._inside += 1
        self._empty.clear()
        try:
            self._check(request)
            yield current_caller()
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

    def _check(self, request: Message | Undecodable) -> None:
        if self.state is State.STARTING:
            raise WireError(Reason.STARTING)
        if self.state is State.DRAINING:
            raise WireError(Reason.DRAINING)
        if isinstance(request, Undecodable):
            raise WireError(Reason.MALFORMED_REQUEST, "request", limit=request.method)
        size = request.ByteSize()
        if size > self._max_message_bytes:
            raise WireError(Reason.MESSAGE_TOO_LARGE, "request", limit=self._max_message_bytes, found=size)
