"""From a call's metadata and connection to its `Caller`, or a typed refusal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from lopa.wire.errors import Reason, WireError

from lopa_server.identity.caller import DEVICE_SCOPES, TENANT, Caller, set_caller
from lopa_server.identity.config import AccessConfig
from lopa_server.identity.keys import PREFIX, KeyFile
from lopa_server.identity.methods import required_scope
from lopa_server.identity.tokens import KeySet, TokenVerifier

Metadata = Sequence[tuple[str, str | bytes]]
LONGEST_CREDENTIAL = 8192
"""Characters; gRPC's own bound on all headers together comes first unless it was raised."""


class Authenticator:
    """Knows every kind of credential that this server accepts."""

    def __init__(self, config: AccessConfig) -> None:
        self._key_file = KeyFile(config.keys) if config.keys is not None else None
        self._key_set = KeySet(config.jwks) if config.jwks is not None else None
        self._tokens = TokenVerifier(config, self._key_set) if self._key_set is not None else None
        self._by_certificate_too = config.client_certificates_identify

    async def start(self) -> None:
        """Read what credentials are checked against. Raises KeyFileError, JwksError."""
        if self._key_file is not None:
            self._key_file.check()
        if self._key_set is not None:
            await self._key_set.load()

    async def identify(self, method: str, context: Any) -> None:
        """Say who calls to everything that follows in this call. Raises as `admit` does.

        context: gRPC's, of the call.
        """
        metadata = tuple(context.invocation_metadata() or ())
        connection = context.auth_context() if self._by_certificate_too else {}
        set_caller(await self.admit(method, metadata, connection))

    async def admit(self, method: str, metadata: Metadata, connection: Mapping[str, Iterable[bytes]]) -> Caller:
        """Who calls `method`, if they may.

        Args:
            connection: gRPC's authentication context: what TLS found out about the peer.

        Raises:
            WireError: NO_CREDENTIALS, INVALID_CREDENTIALS, EXPIRED_CREDENTIALS, MISSING_SCOPE.
        """
        caller = await self._identify(metadata, connection)
        scope = required_scope(method)
        if scope is not None and scope not in caller.scopes:
            raise WireError(Reason.MISSING_SCOPE, method, limit=scope.value)
        return caller

    async def _identify(self, metadata: Metadata, connection: Mapping[str, Iterable[bytes]]) -> Caller:
        values = [value for name, value in metadata if name == "authorization"]
        if not values:
            return self._by_certificate(connection)
        scheme, _, credential = str(values[0]).partition(" ")
        if len(values) > 1 or scheme.lower() != "bearer" or len(credential) > LONGEST_CREDENTIAL:
            raise WireError(Reason.INVALID_CREDENTIALS)
        if credential.startswith(PREFIX) and self._key_file is not None:
            return self._by_key(self._key_file, credential)
        if self._tokens is not None:
            return await self._tokens.caller(credential)
        raise WireError(Reason.INVALID_CREDENTIALS)

    def _by_key(self, keys: KeyFile, credential: str) -> Caller:
        key = keys.find(credential)
        if key is None:
            raise WireError(Reason.INVALID_CREDENTIALS)
        if key.expired(datetime.now(UTC)):
            raise WireError(Reason.EXPIRED_CREDENTIALS)
        return Caller(key.tenant, key.scopes, f"key:{key.id}")

    def _by_certificate(self, connection: Mapping[str, Iterable[bytes]]) -> Caller:
        """TLS has checked the certificate against the authority already."""
        if not self._by_certificate_too:
            raise WireError(Reason.NO_CREDENTIALS)
        names = [name.decode("utf-8", "replace") for name in connection.get("x509_common_name", ())]
        if len(names) != 1 or not TENANT.fullmatch(names[0]):
            raise WireError(Reason.INVALID_CREDENTIALS)
        return Caller(names[0], DEVICE_SCOPES, "certificate")
