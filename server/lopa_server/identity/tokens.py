"""Bearer tokens of an identity provider: JWT, verified against its JWKS (RFC 7519, RFC 7517, OpenID Connect).

Only asymmetric algorithms are accepted, and each key only with its own algorithm: neither `none` nor a public key taken
for an HMAC secret can get in.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
from lopa.wire.errors import Reason, WireError

from lopa_server.identity.caller import TENANT, Caller, Scope
from lopa_server.identity.config import AccessConfig

log = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
LEEWAY_SECONDS = 30
"""Clocks of provider and server may differ by so much."""
FRESH_SECONDS = 600.0
"""A JWKS from an address is fetched again after so long."""
AGAIN_SECONDS = 30.0
"""An unknown key id, or an address that doesn't answer, causes a fetch this often at most: strangers can't make us hammer the provider."""
FETCH_SECONDS = 5.0
JWKS_BYTES = 1 << 20


class JwksError(ValueError):
    """A JWKS that can't be had or read."""


class KeySet:
    """The provider's public keys by key id, kept fresh."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._state: tuple[int, ...] | None = None
        self._next_fetch = 0.0
        self._stale_at = 0.0
        self._lock = asyncio.Lock()

    async def load(self) -> None:
        """Read the keys. Raises JwksError."""
        self._keys = parse_jwks(await asyncio.to_thread(self._read))
        now = time.monotonic()
        self._stale_at, self._next_fetch = now + FRESH_SECONDS, now + AGAIN_SECONDS

    async def key(self, key_id: str) -> jwt.PyJWK | None:
        """The key of that id; a source that can't be read leaves the keys as they were, and is logged."""
        if self._due(key_id):
            async with self._lock:
                if self._due(key_id):
                    self._next_fetch = time.monotonic() + AGAIN_SECONDS
                    try:
                        await self.load()
                    except JwksError as error:
                        log.error("the token keys in force stay as they were: %s", error)
        return self._keys.get(key_id)

    def _due(self, key_id: str) -> bool:
        if "://" not in self._source:
            return self._file_state() != self._state
        now = time.monotonic()
        return now >= self._next_fetch and (now >= self._stale_at or key_id not in self._keys)

    def _file_state(self) -> tuple[int, ...] | None:
        try:
            state = Path(self._source).stat()
        except OSError:
            return None
        return (state.st_ino, state.st_mtime_ns, state.st_size)

    def _read(self) -> bytes:
        try:
            if "://" in self._source:
                return _fetch(self._source)
            self._state = self._file_state()
            return Path(self._source).read_bytes()
        except (OSError, ValueError) as error:
            raise JwksError(f"can't read the JWKS {self._source}: {error}") from error


def parse_jwks(data: bytes) -> dict[str, jwt.PyJWK]:
    """Asymmetric signing keys with a key id; others are passed over. Raises JwksError when nothing is left."""
    try:
        entries = json.loads(data)["keys"]
        keys = {}
        for entry in entries:
            if entry.get("kty") in ("RSA", "EC", "OKP") and entry.get("use", "sig") == "sig" and entry.get("kid"):
                keys[str(entry["kid"])] = jwt.PyJWK(entry)
    except (ValueError, KeyError, TypeError, AttributeError, jwt.PyJWTError) as error:
        raise JwksError(f"not a JWKS: {type(error).__name__}: {error}") from error
    keys = {name: key for name, key in keys.items() if key.algorithm_name in ALGORITHMS}
    if not keys:
        raise JwksError("the JWKS has no asymmetric signing key with a key id")
    return keys


class TokenVerifier:
    """From a token to a caller."""

    def __init__(self, config: AccessConfig, keys: KeySet) -> None:
        self._config = config
        self._keys = keys

    async def caller(self, token: str) -> Caller:
        """Raises WireError: INVALID_CREDENTIALS, EXPIRED_CREDENTIALS."""
        try:
            key = await self._keys.key(str(jwt.get_unverified_header(token).get("kid", "")))
            if key is None:
                raise WireError(Reason.INVALID_CREDENTIALS)
            claims = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                audience=self._config.audience,
                issuer=self._config.issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.ExpiredSignatureError as error:
            raise WireError(Reason.EXPIRED_CREDENTIALS) from error
        except jwt.PyJWTError as error:
            raise WireError(Reason.INVALID_CREDENTIALS) from error
        return self._caller(claims)

    def _caller(self, claims: Mapping[str, Any]) -> Caller:
        tenant = claims.get(self._config.tenant_claim)
        if not isinstance(tenant, str) or not TENANT.fullmatch(tenant):
            raise WireError(Reason.INVALID_CREDENTIALS)
        given = claims.get(self._config.scope_claim, ())
        names = set(given.split() if isinstance(given, str) else [str(name) for name in given] if isinstance(given, list) else ())
        return Caller(tenant, frozenset(scope for scope in Scope if scope.value in names), f"token:{self._config.issuer}")


def _fetch(address: str) -> bytes:
    """Over https only: an opener without any other handler follows no redirect and opens no file."""
    opener = urllib.request.OpenerDirector()
    handlers = (
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    )
    for handler in handlers:
        opener.add_handler(handler)
    with opener.open(address, timeout=FETCH_SECONDS) as reply:
        data: bytes = reply.read(JWKS_BYTES + 1)
    if len(data) > JWKS_BYTES:
        raise ValueError(f"more than {JWKS_BYTES} bytes")
    return data
