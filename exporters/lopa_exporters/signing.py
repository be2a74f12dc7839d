"""Signing bundles with Ed25519. The signature covers the bundle's id, and with it every byte of every file."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from lopa.bundle import Bundle
from lopa.manifest import MANIFEST
from lopa.signing import signed_message


def create_key(path: Path) -> str:
    """Write a new private key (PEM, mode 600) to a file that must not exist; returns the public key in hex.

    Raises:
        FileExistsError, OSError: the file exists or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key.public_key().public_bytes_raw().hex()


def sign_bundle(folder: Path, key: Path) -> Bundle:
    """Put a signature into the manifest, replaced by one rename. The id does not change.

    Raises:
        BundleError: not a bundle. ValueError: not an unencrypted Ed25519 key. OSError: a file cannot be read or written.
    """
    bundle = Bundle.open(folder)
    try:
        private = load_pem_private_key(key.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key} is not an unencrypted private key in PEM form: {error}") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise ValueError(f"{key} is not an Ed25519 key")
    signature = private.sign(signed_message(bundle.manifest.id)).hex()
    signed = dataclasses.replace(bundle.manifest, signature=signature)
    staged = folder / f".{MANIFEST}.new"
    staged.write_text(signed.to_json(), encoding="utf-8")
    staged.replace(folder / MANIFEST)
    return Bundle.open(folder)
