"""Settings of identity and encryption."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AccessConfig:
    """One line a field. Nothing set: everybody is the tenant "anonymous", and everything is in plain text."""

    keys: Path | None = None
    """File of API keys (`lopa keys`)."""
    jwks: str | None = None
    """Public keys of the token issuer: a file, or an https URL."""
    issuer: str | None = None
    """`iss` that tokens must have."""
    audience: str | None = None
    """`aud` that tokens must name."""
    tenant_claim: str = "sub"
    """Claim that holds the tenant's name."""
    scope_claim: str = "scope"
    """Claim that holds the scopes: one string with spaces between, or a list."""
    certificate: Path | None = None
    """The server's certificate chain, PEM. With its key: TLS."""
    key: Path | None = None
    """The certificate's private key, PEM."""
    client_ca: Path | None = None
    """Certificates that sign clients' certificates, PEM: mutual TLS, every client must have one."""
    client_certificates_identify: bool = False
    """A call without a bearer credential is of the tenant in its client certificate's common name, with a device's scopes."""

    @property
    def encrypted(self) -> bool:
        """TLS is on."""
        return self.certificate is not None

    @property
    def identified(self) -> bool:
        """Callers must say who they are."""
        return self.keys is not None or self.jwks is not None or self.client_certificates_identify

    def problems(self) -> list[str]:
        """What can't work, one sentence each."""
        found = []
        if (self.certificate is None) != (self.key is None):
            found.append("TLS needs both a certificate and its key (--tls-certificate, --tls-key)")
        if self.client_ca is not None and not self.encrypted:
            found.append("client certificates (--client-ca) need TLS: give --tls-certificate and --tls-key too")
        if self.client_certificates_identify and self.client_ca is None:
            found.append("client certificates can't identify anybody without the authority that signs them (--client-ca)")
        if self.jwks is not None and (not self.issuer or not self.audience):
            found.append("tokens (--jwks) need the --issuer and the --audience that they must have")
        if self.jwks is None and (self.issuer or self.audience):
            found.append("--issuer and --audience say nothing without --jwks")
        if self.jwks is not None and "://" in self.jwks and not self.jwks.startswith("https://"):
            found.append(f"the JWKS address {self.jwks} is not https")
        for name in ("keys", "certificate", "key", "client_ca"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                found.append(f"there is no file {path} ({name})")
        if self.jwks is not None and "://" not in self.jwks and not Path(self.jwks).is_file():
            found.append(f"there is no file {self.jwks} (jwks)")
        return found
