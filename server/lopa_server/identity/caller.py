"""Who is calling and what they may do: the one thing that the rest of the server knows about identity."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum

TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:/=+-]{0,127}")
"""What a tenant's name may look like: it appears in logs, counters and file names of tools."""


class Scope(Enum):
    """What a credential allows. The value is what keys and tokens say."""

    GENERATE = "generate"
    SCORE = "score"
    TUNE = "tune"
    FETCH = "fetch"
    ADMIN = "admin"


DEVICE_SCOPES = frozenset(Scope) - {Scope.ADMIN}
"""What a device needs."""


@dataclass(frozen=True)
class Caller:
    """An authenticated caller. Quotas, usage, fairness and the prefix cache go by `tenant`."""

    tenant: str
    scopes: frozenset[Scope]
    credential: str
    """Which credential it was, without its secret: "key:ID", "token:ISSUER" or "certificate"; for logs."""


ANONYMOUS = Caller("anonymous", frozenset(Scope), "none")
"""Everybody, where identity is off."""

_current: ContextVar[Caller] = ContextVar("lopa_caller", default=ANONYMOUS)
# gRPC gives every call a task, and its context object takes no attributes: a context variable is the place per call.


def current_caller() -> Caller:
    """Who the call at hand comes from."""
    return _current.get()


def set_caller(caller: Caller) -> None:
    """For the rest of this call."""
    _current.set(caller)


def cache_salt(secret: bytes, tenant: str) -> bytes:
    """What keeps tenants apart in a shared cache: HMAC-SHA256(secret, tenant), 32 bytes. Clients neither choose nor learn it."""
    return hmac.new(secret, tenant.encode(), hashlib.sha256).digest()


def parse_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """Raises ValueError for a name that is no scope."""
    known = {scope.value: scope for scope in Scope}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"unknown scopes {', '.join(unknown)}; there are {', '.join(known)}")
    return frozenset(known[name] for name in names)
