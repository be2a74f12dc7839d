"""What both kinds of connection share: channel settings, credentials, and the border where gRPC's errors become ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc
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
from lopa.tracing import trace_headers
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
    Reason.TOO_MANY_CALLS: ResourceExhausted,
    Reason.DEADLINE_TOO_SHORT: ResourceExhausted,
    Reason.STARTING: Unavailable,
    Reason.DRAINING: Unavailable,
    Reason.MESSAGE_TOO_LARGE: InvalidRequest,
    Reason.MALFORMED_REQUEST: InvalidRequest,
    Reason.NO_CREDENTIALS: Unauthenticated,
    Reason.INVALID_CREDENTIALS: Unauthenticated,
    Reason.EXPIRED_CREDENTIALS: Unauthenticated,
    Reason.MISSING_SCOPE: PermissionDenied,
    Reason.RATE_EXCEEDED: ResourceExhausted,
    Reason.QUOTA_EXCEEDED: ResourceExhausted,
    Reason.TIME_LIMIT: DeadlineExceeded,
    Reason.ENGINE_RESTARTING: Unavailable,
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
    oversized = re.search(r"message larger than max \((\d+) vs\. (\d+)\)", text) if code is grpc.StatusCode.RESOURCE_EXHAUSTED else None
    if oversized is not None:  # gRPC's own words, at either end
        return InvalidRequest(text, field="message", limit=oversized[2], found=oversized[1])
    if kind is Unavailable and details.reason is None:
        text = f"no connection to {address} ({call.details()}); is the server running there?"
    return kind(text, reason=details.reason, retry_after=details.retry_after)


Token = str | Callable[[], str]
"""An API key or JWT, or a function that gives the current one; it is called for every attempt."""
_LOOPBACK = ("localhost:", "127.", "[::1]:", "unix:")


@dataclass(frozen=True)
class Tls:
    """TLS with certificates of your own, all as PEM. Without `roots` the system's are trusted; key and chain are for mutual TLS."""

    roots: bytes | None = None
    """Certificates to trust."""
    key: bytes | None = field(default=None, repr=False)
    """This device's private key."""
    chain: bytes | None = None
    """This device's certificate, and those that lead to a root."""

    @classmethod
    def from_files(cls, *, roots: Path | None = None, key: Path | None = None, chain: Path | None = None) -> Tls:
        """Read PEM files.

        Raises:
            InvalidRequest: a file can't be read, or key and chain don't come together.
        """
        parts = {"roots": roots, "key": key, "chain": chain}
        try:
            return cls(**{name: path.expanduser().read_bytes() if path else None for name, path in parts.items()})
        except OSError as error:
            raise InvalidRequest(f"tls: can't read {error.filename}: {error.strerror}", field="tls", limit="a PEM file") from error

    def credentials(self) -> grpc.ChannelCredentials:
        """As gRPC takes them.

        Raises:
            InvalidRequest: a key without its certificate, or the other way round; something that is no PEM, or damaged.
        """
        from lopa.pem import PemError, check_certificates, check_key, check_pair

        if (self.key is None) != (self.chain is None):
            raise InvalidRequest("tls: a client's key and its certificate chain are needed together", field="tls", limit="key and chain")
        part = ""
        try:
            for part, check in (("roots", check_certificates), ("key", check_key), ("chain", check_certificates)):
                data: bytes | None = getattr(self, part)
                if data is not None:
                    check(data)
            if self.key is not None and self.chain is not None:
                part = "key"
                check_pair(self.key, self.chain)
        except PemError as error:
            raise InvalidRequest(f"tls: {part}: {error}", field=f"tls.{part}", limit="PEM") from error
        return grpc.ssl_channel_credentials(self.roots, self.key, self.chain)


@dataclass(frozen=True)
class Endpoint:
    """Where a server is and how it is reached."""

    address: str
    """HOST:PORT."""
    credentials: grpc.ChannelCredentials | None = None
    """TLS; None speaks plain text."""
    token: Token | None = field(default=None, repr=False)
    max_message_bytes: int = 64 << 20
    """Larger replies are refused."""
    keepalive: float = 30.0
    """Seconds without data after which an ongoing call's connection is tested; 0 never tests."""

    @classmethod
    def of(
        cls, address: str, tls: bool | Tls | grpc.ChannelCredentials, token: Token | None, *, max_bytes: int, keepalive: float
    ) -> Endpoint:
        """Check what the caller gave.

        Raises:
            InvalidRequest: a token that would travel unencrypted over a network, or TLS files that don't fit.
        """
        if isinstance(tls, bool):
            credentials = grpc.ssl_channel_credentials() if tls else None
        else:
            credentials = tls.credentials() if isinstance(tls, Tls) else tls
        if token is not None and credentials is None and not address.startswith(_LOOPBACK):
            raise InvalidRequest(f"token: it would travel unencrypted to {address}; use tls", field="token", limit="TLS, or this machine")
        return cls(address, credentials, token, max_bytes, keepalive)

    def options(self) -> list[tuple[str, int]]:
        """Channel arguments."""
        options = [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.enable_retries", 0),  # ours know RetryInfo and the reasons
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if self.keepalive:
            # A mobile network forgets a silent connection without telling either end.
            options += [("grpc.keepalive_time_ms", int(1000 * self.keepalive)), ("grpc.keepalive_timeout_ms", 10_000)]
            options += [("grpc.http2.max_pings_without_data", 0)]
        return options

    def metadata(self) -> list[tuple[str, str]]:
        """What goes with every call.

        Raises:
            InvalidRequest: a token that is not printable ASCII.
        """
        traced = trace_headers()
        if self.token is None:
            return traced
        token = self.token if isinstance(self.token, str) else self.token()
        if not token or not token.isascii() or not token.isprintable():
            raise InvalidRequest("token: it must be printable ASCII and not empty", field="token", limit="printable ASCII")
        return [("authorization", f"Bearer {token}"), *traced]
