"""The error catalogue: every failure has one reason, one gRPC status and one public message.

A reason travels as google.rpc.ErrorInfo (domain `lopa.v1`); its metadata names the field, the limit and what was found.
Private detail (stack traces, paths, other requests) stays in the server's log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import grpc

DOMAIN = "lopa.v1"


class Reason(Enum):
    """What went wrong, in the words of the wire. The value is ErrorInfo.reason."""

    MISSING_FIELD = "MISSING_FIELD"
    EMPTY_PROMPT = "EMPTY_PROMPT"
    EMPTY_TARGET = "EMPTY_TARGET"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    TOO_MANY = "TOO_MANY"
    UNSUPPORTED = "UNSUPPORTED"
    UNKNOWN_TOKEN = "UNKNOWN_TOKEN"
    CONTEXT_EXCEEDED = "CONTEXT_EXCEEDED"
    SOFT_PROMPT_HIDDEN = "SOFT_PROMPT_HIDDEN"
    SOFT_PROMPT_ROWS = "SOFT_PROMPT_ROWS"
    SOFT_PROMPT_DTYPE = "SOFT_PROMPT_DTYPE"
    SOFT_PROMPT_BYTES = "SOFT_PROMPT_BYTES"
    SOFT_PROMPT_NOT_FINITE = "SOFT_PROMPT_NOT_FINITE"
    SOFT_PROMPT_NORM = "SOFT_PROMPT_NORM"
    BUNDLE_OFFSET = "BUNDLE_OFFSET"
    FINGERPRINT_MISMATCH = "FINGERPRINT_MISMATCH"
    UNKNOWN_BUNDLE = "UNKNOWN_BUNDLE"
    QUEUE_FULL = "QUEUE_FULL"
    TOO_MANY_CALLS = "TOO_MANY_CALLS"
    DEADLINE_TOO_SHORT = "DEADLINE_TOO_SHORT"
    STARTING = "STARTING"
    DRAINING = "DRAINING"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    MALFORMED_REQUEST = "MALFORMED_REQUEST"
    NO_CREDENTIALS = "NO_CREDENTIALS"
    INVALID_CREDENTIALS = "INVALID_CREDENTIALS"
    EXPIRED_CREDENTIALS = "EXPIRED_CREDENTIALS"
    MISSING_SCOPE = "MISSING_SCOPE"
    RATE_EXCEEDED = "RATE_EXCEEDED"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    TIME_LIMIT = "TIME_LIMIT"
    ENGINE_RESTARTING = "ENGINE_RESTARTING"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue. `message` is a format string over field, limit and found."""

    status: grpc.StatusCode
    message: str


_INVALID = grpc.StatusCode.INVALID_ARGUMENT
CATALOGUE: Mapping[Reason, Entry] = {
    Reason.MISSING_FIELD: Entry(_INVALID, "{field} is missing"),
    Reason.EMPTY_PROMPT: Entry(_INVALID, "{field} has no tokens; at least {limit} is needed"),
    Reason.EMPTY_TARGET: Entry(_INVALID, "{field} has no tokens; at least {limit} is needed"),
    Reason.OUT_OF_RANGE: Entry(_INVALID, "{field} is {found}; it must be {limit}"),
    Reason.TOO_MANY: Entry(_INVALID, "{field} has {found} entries; the limit is {limit}"),
    Reason.UNSUPPORTED: Entry(_INVALID, "{field} is not supported here: {found}"),
    Reason.UNKNOWN_TOKEN: Entry(_INVALID, "{field} holds token id {found}; ids must be below {limit}"),
    Reason.CONTEXT_EXCEEDED: Entry(_INVALID, "{field} needs {found} positions; the context has {limit}"),
    Reason.SOFT_PROMPT_HIDDEN: Entry(_INVALID, "{field} is {found}; the model's hidden size is {limit}"),
    Reason.SOFT_PROMPT_ROWS: Entry(_INVALID, "{field} is {found}; it must be {limit}"),
    Reason.SOFT_PROMPT_DTYPE: Entry(_INVALID, "{field} is {found}; accepted are {limit}"),
    Reason.SOFT_PROMPT_BYTES: Entry(_INVALID, "{field} has {found} bytes; rows, hidden and dtype ask for exactly {limit}"),
    Reason.SOFT_PROMPT_NOT_FINITE: Entry(_INVALID, "{field} has values that are not finite in the model's compute dtype {limit}"),
    Reason.SOFT_PROMPT_NORM: Entry(_INVALID, "{field} has a row of L2 norm {found}; the limit is {limit}"),
    Reason.BUNDLE_OFFSET: Entry(grpc.StatusCode.OUT_OF_RANGE, "{field} is {found}; the archive has {limit} bytes"),
    Reason.FINGERPRINT_MISMATCH: Entry(
        grpc.StatusCode.FAILED_PRECONDITION,
        "{field} is {found}; this server's model has {limit}: the factors or the bundle belong to another model",
    ),
    Reason.UNKNOWN_BUNDLE: Entry(grpc.StatusCode.NOT_FOUND, "{field} {found} is not published here; the current bundle is {limit}"),
    Reason.DEADLINE_TOO_SHORT: Entry(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the call's {field} leaves {limit} s; at the present load it would take about {found} s: allow more time, or try again later",
    ),
    Reason.QUEUE_FULL: Entry(grpc.StatusCode.RESOURCE_EXHAUSTED, "{field} is full: {found} waiting, the limit is {limit}; try again later"),
    Reason.TOO_MANY_CALLS: Entry(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "there are too many {field}: {found} of {limit} at a time; try again later"
    ),
    Reason.STARTING: Entry(grpc.StatusCode.UNAVAILABLE, "the server is still loading its model; try again"),
    Reason.DRAINING: Entry(
        grpc.StatusCode.UNAVAILABLE, "the server is shutting down; try again, another replica or a restarted one will answer"
    ),
    Reason.MESSAGE_TOO_LARGE: Entry(grpc.StatusCode.RESOURCE_EXHAUSTED, "{field} has {found} bytes; the limit is {limit}"),
    Reason.MALFORMED_REQUEST: Entry(_INVALID, "{field} can't be decoded as the message that {limit} takes"),
    Reason.NO_CREDENTIALS: Entry(
        grpc.StatusCode.UNAUTHENTICATED, "this server wants credentials: send `authorization: Bearer` with an API key or a token"
    ),
    Reason.INVALID_CREDENTIALS: Entry(grpc.StatusCode.UNAUTHENTICATED, "the credentials are not valid here"),
    Reason.EXPIRED_CREDENTIALS: Entry(grpc.StatusCode.UNAUTHENTICATED, "the credentials have expired"),
    Reason.MISSING_SCOPE: Entry(grpc.StatusCode.PERMISSION_DENIED, "{field} needs the scope {limit}, which these credentials don't have"),
    Reason.RATE_EXCEEDED: Entry(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "{field} is used up for now: {found} asked for, the limit is {limit}; try again later"
    ),
    Reason.QUOTA_EXCEEDED: Entry(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "{field} is used up: {found} of {limit}; it starts anew with the next day (UTC)"
    ),
    Reason.TIME_LIMIT: Entry(grpc.StatusCode.DEADLINE_EXCEEDED, "{field} took longer than the {limit} that this server allows"),
    Reason.ENGINE_RESTARTING: Entry(grpc.StatusCode.UNAVAILABLE, "the engine has failed and is being restarted; try again"),
    Reason.INTERNAL: Entry(grpc.StatusCode.INTERNAL, "internal error; the server's log has the detail under request id {found}"),
}


class WireError(ValueError):
    """A catalogued failure. `field` is the path in the request (`pairs[3].soft_prompt.data`).

    Raised by the codecs of this package and by the server's validation; the service turns it into a gRPC status.
    """

    def __init__(self, reason: Reason, field: str = "", *, limit: object = "", found: object = "") -> None:
        self.reason = reason
        self.field = field
        self.limit = str(limit)
        self.found = str(found)[:200]
        super().__init__(CATALOGUE[reason].message.format(field=field, limit=self.limit, found=self.found))

    @property
    def status(self) -> grpc.StatusCode:
        return CATALOGUE[self.reason].status

    def at(self, prefix: str) -> WireError:
        """The same failure with its field path below `prefix`."""
        return WireError(self.reason, f"{prefix}.{self.field}" if self.field else prefix, limit=self.limit, found=self.found)
