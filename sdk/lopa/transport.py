"""The device's one connection to a server: channel, deadlines, retries, byte counts, and the border where gRPC's errors become ours."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar, cast

import grpc
from google.protobuf.message import Message as ProtoMessage
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lopa.errors import (
    Cancelled,
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    RemoteError,
    ResourceExhausted,
    ServerError,
    Unauthenticated,
    Unavailable,
)
from lopa.retry import RetryPolicy
from lopa.v1.catalog_pb2_grpc import CatalogStub
from lopa.v1.inference_pb2_grpc import InferenceStub
from lopa.v1.tuning_pb2_grpc import TuningStub
from lopa.values import Traffic
from lopa.wire.errors import DOMAIN, Reason

STATUS: Mapping[grpc.StatusCode, type[RemoteError]] = {
    grpc.StatusCode.OK: ServerError,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: PreconditionFailed,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionFailed,
    grpc.StatusCode.ABORTED: ServerError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: ServerError,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DATA_LOSS: ServerError,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
}
"""Every gRPC status, and what callers catch."""

REASONS: Mapping[Reason, type[RemoteError]] = {
    Reason.MISSING_FIELD: InvalidRequest,
    Reason.EMPTY_PROMPT: InvalidRequest,
    Reason.EMPTY_TARGET: InvalidRequest,
    Reason.OUT_OF_RANGE: InvalidRequest,
    Reason.TOO_MANY: InvalidRequest,
    Reason.UNSUPPORTED: InvalidRequest,
    Reason.UNKNOWN_TOKEN: InvalidRequest,
    Reason.CONTEXT_EXCEEDED: InvalidRequest,
    Reason.SOFT_PROMPT_HIDDEN: InvalidRequest,
    Reason.SOFT_PROMPT_ROWS: InvalidRequest,
    Reason.SOFT_PROMPT_DTYPE: InvalidRequest,
    Reason.SOFT_PROMPT_BYTES: InvalidRequest,
    Reason.SOFT_PROMPT_NOT_FINITE: InvalidRequest,
    Reason.SOFT_PROMPT_NORM: InvalidRequest,
    Reason.BUNDLE_OFFSET: InvalidRequest,
    Reason.FINGERPRINT_MISMATCH: FingerprintMismatch,
    Reason.UNKNOWN_BUNDLE: NotFound,
    Reason.QUEUE_FULL: ResourceExhausted,
    Reason.STARTING: Unavailable,
    Reason.DRAINING: Unavailable,
    Reason.MESSAGE_TOO_LARGE: InvalidRequest,
    Reason.MALFORMED_REQUEST: InvalidRequest,
    Reason.INTERNAL: ServerError,
}
"""Every reason of the catalogue; it says more than the status, so it wins."""


@dataclass(frozen=True)
class _Details:
    """What google.rpc details said."""

    reason: Reason | None = None
    field: str = ""
    limit: str = ""
    found: str = ""
    retry_after: float | None = None


def _details(error: grpc.RpcError) -> _Details:
    """Read ErrorInfo, BadRequest and RetryInfo. A status without details, or with unreadable ones, gives none."""
    try:
        status = rpc_status.from_call(cast(grpc.Call, error))
    except ValueError:
        return _Details()
    reason, text, retry_after = None, {"field": "", "limit": "", "found": ""}, None
    for packed in status.details if status is not None else ():
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if packed.Unpack(info) and info.domain == DOMAIN:
            reason = Reason(info.reason) if info.reason in Reason.__members__ else None
            text.update({key: value for key, value in info.metadata.items() if key in text})
        elif packed.Unpack(bad) and bad.field_violations:
            text["field"] = text["field"] or bad.field_violations[0].field
        elif packed.Unpack(retry):
            retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos * 1e-9
    return _Details(reason, text["field"], text["limit"], text["found"], retry_after)


def translate(error: grpc.RpcError, *, address: str = "the server") -> RemoteError:
    """Our exception for a failed call; the caller raises it `from error`."""
    call = cast(grpc.Call, error)
    code, text = call.code(), call.details() or ""
    details = _details(error)
    kind = REASONS[details.reason] if details.reason is not None else STATUS.get(code, ServerError)
    if details.reason is None:
        text = f"{address}: {code.name}: {text}"
    if kind is InvalidRequest:
        return InvalidRequest(text, field=details.field, limit=details.limit, found=details.found, reason=details.reason)
    if kind is Unavailable and details.reason is None:
        text = f"no connection to {address} ({call.details()}); is the server running there?"
    return kind(text, reason=details.reason, retry_after=details.retry_after)


class Meter:
    """Counts message bytes, for itself and for the meter above it. Safe between threads."""

    def __init__(self, parent: Meter | None = None) -> None:
        self._parent = parent
        self._lock = threading.Lock()
        self._traffic = Traffic()

    @property
    def traffic(self) -> Traffic:
        with self._lock:
            return self._traffic

    def add(self, *, sent: int = 0, received: int = 0, requests: int = 0) -> None:
        with self._lock:
            now = self._traffic
            self._traffic = Traffic(now.sent_bytes + sent, now.received_bytes + received, now.requests + requests)
        if self._parent is not None:
            self._parent.add(sent=sent, received=received, requests=requests)


@dataclass(frozen=True)
class LinkConfig:
    """Of one connection."""

    credentials: grpc.ChannelCredentials | None = None
    """TLS; None speaks plain text."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    max_message_bytes: int = 64 << 20
    """Larger replies are refused."""


Request = TypeVar("Request", bound=ProtoMessage)
Reply = TypeVar("Reply", bound=ProtoMessage)
Result = TypeVar("Result")


class Link:
    """A channel and its stubs. Safe between threads."""

    def __init__(self, address: str, config: LinkConfig | None = None) -> None:
        self.address = address
        self.config = config or LinkConfig()
        options = [
            ("grpc.max_send_message_length", self.config.max_message_bytes),
            ("grpc.max_receive_message_length", self.config.max_message_bytes),
            ("grpc.enable_retries", 0),  # ours below know RetryInfo and the reasons
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if self.config.credentials is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, self.config.credentials, options)
        self.catalog = CatalogStub(self._channel)
        self.inference = InferenceStub(self._channel)
        self.tuning = TuningStub(self._channel)
        self._rng = random.Random()
        self._closed = False

    def close(self) -> None:
        """Close the channel; calls under way end as `Cancelled`."""
        self._closed = True
        self._channel.close()

    def unary(self, method: grpc.UnaryUnaryMultiCallable[Request, Reply], request: Request, *, timeout: float, meter: Meter) -> Reply:
        """Call a method that is safe to repeat, with retries; `timeout` (seconds) bounds all of them together.

        Raises:
            RemoteError: as `translate` says.
        """
        deadline = time.monotonic() + timeout

        def attempt() -> Reply:
            meter.add(sent=request.ByteSize(), requests=1)
            reply = method(request, timeout=max(0.0, deadline - time.monotonic()))
            meter.add(received=reply.ByteSize())
            return reply

        return self._with_retries(attempt, deadline)

    def stream(
        self, method: grpc.UnaryStreamMultiCallable[Request, Reply], request: Request, *, timeout: float, meter: Meter
    ) -> ReplyStream[Reply]:
        """Call a streaming method. Retried only until its first message; after that an error reaches the caller.

        Raises:
            RemoteError: as `translate` says; also from the stream's `next`.
        """
        deadline = time.monotonic() + timeout

        def attempt() -> ReplyStream[Reply]:
            meter.add(sent=request.ByteSize(), requests=1)
            call = method(request, timeout=max(0.0, deadline - time.monotonic()))
            return ReplyStream(call, meter, self._raise)

        return self._with_retries(attempt, deadline)

    def _raise(self, error: grpc.RpcError) -> NoReturn:
        raise translate(error, address=self.address) from error

    def _with_retries(self, attempt: Callable[[], Result], deadline: float) -> Result:
        failures = 0
        while True:
            if self._closed:
                raise Cancelled("this client is closed")
            try:
                return attempt()
            except grpc.RpcError as error:
                self._wait_or_raise(translate(error, address=self.address), error, failures := failures + 1, deadline)
            except RemoteError as error:
                self._wait_or_raise(error, error.__cause__, failures := failures + 1, deadline)

    def _wait_or_raise(self, error: RemoteError, cause: BaseException | None, failures: int, deadline: float) -> None:
        delay = self.config.retry.delay(failures, error, self._rng)
        if delay is None or time.monotonic() + delay >= deadline:
            raise error from cause
        time.sleep(delay)


class ReplyStream(Iterator[Reply]):
    """A stream of replies whose first message has arrived. `close` cancels the call."""

    def __init__(self, call: grpc.CallIterator[Reply], meter: Meter, fail: Callable[[grpc.RpcError], NoReturn]) -> None:
        self._call = call
        self._replies = iter(call)
        self._meter = meter
        self._fail = fail
        self._first: Reply | None = self._receive()

    def _receive(self) -> Reply | None:
        try:
            reply = next(self._replies, None)
        except grpc.RpcError as error:
            self._fail(error)
        if reply is not None:
            self._meter.add(received=reply.ByteSize())
        return reply

    def __next__(self) -> Reply:
        reply, self._first = (self._first, None) if self._first is not None else (self._receive(), None)
        if reply is None:
            raise StopIteration
        return reply

    def close(self) -> None:
        cancel: Callable[[], bool] = self._call.cancel
        cancel()
