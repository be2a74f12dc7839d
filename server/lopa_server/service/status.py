"""From exceptions to google.rpc.Status: the one place where a failure gets its public face."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from lopa.wire.errors import DOMAIN, Reason, WireError

from lopa_server.engine.base import DeadlineTooShort, EngineRestarting, EngineStopped, QueueFull, UnsupportedSchema
from lopa_server.metering.meter import OverLimit

log = logging.getLogger(__name__)

RETRY_SECONDS = {Reason.STARTING: 5.0, Reason.DRAINING: 1.0, Reason.ENGINE_RESTARTING: 5.0, Reason.TOO_MANY_CALLS: 1.0}
"""Where no queue tells how long it takes: a replica comes back in about so long."""
TELL_SECONDS = 5.0
LONGEST_RETRY, SHORTEST_RETRY = 60.0, 0.05


async def refuse(context: Any, error: Exception) -> None:
    """End a call with its status. Raises gRPC's AbortError, or returns when the client doesn't read it within TELL_SECONDS.

    gRPC sends the status behind what has been written already: who reads nothing would hold the call for ever.
    """
    bound = asyncio.timeout(TELL_SECONDS)
    try:
        async with bound:
            await context.abort_with_status(rpc_status.to_status(status_for(error)))
    except TimeoutError:
        if not bound.expired():
            raise


def status_for(error: Exception) -> status_pb2.Status:
    """The status that a client sees. What isn't in the catalogue is logged under a request id, and only the id goes out."""
    if isinstance(error, WireError):
        return _status(error, RETRY_SECONDS.get(error.reason))
    if isinstance(error, QueueFull):
        full = WireError(Reason.QUEUE_FULL, error.queue, limit=error.limit, found=error.waiting)
        return _status(full, min(LONGEST_RETRY, max(SHORTEST_RETRY, error.retry_after)))
    if isinstance(error, DeadlineTooShort):
        late = WireError(Reason.DEADLINE_TOO_SHORT, "deadline", limit=f"{error.left:.2g}", found=f"{error.needed:.2g}")
        return _status(late, None if error.retry_after is None else min(LONGEST_RETRY, max(SHORTEST_RETRY, error.retry_after)))
    if isinstance(error, UnsupportedSchema):
        return _status(WireError(Reason.UNSUPPORTED, "sampling.json_schema", found=error), None)
    if isinstance(error, OverLimit):
        return _over_limit(error)
    if isinstance(error, EngineRestarting):
        return _status(WireError(Reason.ENGINE_RESTARTING), RETRY_SECONDS[Reason.ENGINE_RESTARTING])
    if isinstance(error, EngineStopped):
        return _status(WireError(Reason.DRAINING), RETRY_SECONDS[Reason.DRAINING])
    request_id = secrets.token_hex(8)
    log.error("request %s failed", request_id, exc_info=error)
    return _status(WireError(Reason.INTERNAL, found=request_id), None)


def _over_limit(error: OverLimit) -> status_pb2.Status:
    """With a QuotaFailure that names the quota, besides what every refusal has."""
    limit, used = f"{error.limit:g}", f"{error.used:g}"
    if error.daily:
        refusal = WireError(Reason.QUOTA_EXCEEDED, error.name, limit=limit, found=used)
    else:
        refusal = WireError(Reason.RATE_EXCEEDED, error.name, limit=limit, found=used)
    status = _status(refusal, max(SHORTEST_RETRY, error.retry_after))
    violation = error_details_pb2.QuotaFailure.Violation(subject=f"tenant:{error.tenant}", description=str(refusal), quota_id=error.name)
    status.details.add().Pack(error_details_pb2.QuotaFailure(violations=[violation]))
    return status


def _status(error: WireError, retry_seconds: float | None) -> status_pb2.Status:
    code: int = error.status.value[0]
    status = status_pb2.Status(code=code, message=str(error))
    metadata = {"field": error.field, "limit": error.limit, "found": error.found}
    known = {key: value for key, value in metadata.items() if value}
    info = error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=known)
    status.details.add().Pack(info)
    if error.status.name == "INVALID_ARGUMENT":
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error), reason=error.reason.value)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_seconds is not None:
        delay = Duration()
        delay.FromNanoseconds(int(retry_seconds * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status
