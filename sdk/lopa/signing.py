"""Who made a bundle: an Ed25519 signature over its id, checked against the public keys that an app trusts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lopa.errors import BundleError

if TYPE_CHECKING:
    from lopa.manifest import Manifest

_CONTEXT = b"lopa.bundle.v1\n"


def signed_message(bundle_id: str) -> bytes:
    """What is signed: a fixed line, then the id in hex."""
    return _CONTEXT + bundle_id.encode()


def check_signature(manifest: Manifest, trusted: Sequence[str]) -> None:
    """Accept a manifest that one of these public keys (32 bytes, in hex) signed.

    Raises:
        BundleError: it is not signed, or by none of them; or a key is malformed; or the package `cryptography` is not installed.
    """
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ModuleNotFoundError as error:
        raise BundleError("trusted keys need the Python package cryptography: pip install cryptography") from error
    if not manifest.signature:
        raise BundleError(f"bundle {manifest.id[:12]} is not signed, and only signed bundles are trusted")
    for key in trusted:
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(manifest.signature), signed_message(manifest.id))
        except InvalidSignature:
            continue
        except ValueError as error:
            raise BundleError(f"the trusted key {key[:80]!r} is not an Ed25519 public key: 64 hex digits are needed") from error
        return
    raise BundleError(f"bundle {manifest.id[:12]} is signed by none of the {len(trusted)} trusted keys")
