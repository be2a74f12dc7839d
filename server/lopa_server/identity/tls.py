"""TLS whose certificate, key and client authority are read again when their files change, without a restart."""

from __future__ import annotations

import logging
import ssl
from datetime import UTC, datetime

import grpc

from lopa_server.identity.config import AccessConfig

log = logging.getLogger(__name__)


class CertificateError(ValueError):
    """A certificate, key or authority that can't be used. The message says which and why."""


class CertificateFiles:
    """The server's certificates on disk."""

    def __init__(self, config: AccessConfig) -> None:
        if config.certificate is None or config.key is None:
            raise CertificateError("TLS needs a certificate and its key")
        self._certificate, self._key, self._authority = config.certificate, config.key, config.client_ca
        self._seen: tuple[int, ...] | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """For a secure port. gRPC asks `_changed` at every handshake; open connections keep what they began with.

        Raises:
            CertificateError: the files can't be used.
        """
        self._seen = self._state()
        first = self._load()
        return grpc.dynamic_ssl_server_credentials(first, self._changed, self._authority is not None)  # type: ignore[arg-type]  # None is documented

    def check(self) -> None:
        """Raises CertificateError when the files can't be used."""
        self._load(quietly=True)

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """A new configuration, or None to go on with the last one. Files that can't be used change nothing, and are logged."""
        try:
            seen = self._state()
            if seen == self._seen:
                return None
            self._seen = seen
            return self._load()
        except CertificateError as error:
            log.error("the certificate in force stays as it was: %s", error)
            return None

    def _state(self) -> tuple[int, ...]:
        state: list[int] = []
        for path in (self._certificate, self._key, self._authority):
            if path is not None:
                try:
                    found = path.stat()
                except OSError as error:
                    raise CertificateError(f"can't read {path}: {error.strerror}") from error
                state += [found.st_ino, found.st_mtime_ns, found.st_size]
        return tuple(state)

    def _load(self, *, quietly: bool = False) -> grpc.ServerCertificateConfiguration:
        try:
            # An empty passphrase: without one, a locked key would have OpenSSL ask for it at the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._certificate, self._key, password=lambda: "")
            if self._authority is not None:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(self._authority)
            authority = self._authority.read_bytes() if self._authority is not None else None
            chain = self._certificate.read_bytes()
            until = expiry(chain)
            configuration = grpc.ssl_server_certificate_configuration([(self._key.read_bytes(), chain)], authority)
        except (OSError, ssl.SSLError, ValueError) as error:
            authority_too = f" (with the authority {self._authority})" if self._authority is not None else ""
            raise CertificateError(f"{self._certificate} and {self._key}{authority_too} can't be used for TLS: {error}") from error
        if not quietly and until <= datetime.now(UTC):
            log.error("the TLS certificate %s has expired: clients will refuse it", self._certificate)
        if not quietly:
            log.info("TLS certificate of %s, valid until %s", self._certificate, until.isoformat())
        return configuration


def expiry(chain: bytes) -> datetime:
    """When the first certificate of a PEM file expires. Raises ValueError when there is none."""
    from cryptography import x509

    return x509.load_pem_x509_certificates(chain)[0].not_valid_after_utc
