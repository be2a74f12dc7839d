"""Encryption at rest: AES-256-GCM over each personal file, with a key from the app or from a passphrase.

A sealed file is MAGIC, a nonce of 12 bytes, the ciphertext and a tag of 16 bytes. The file's own name is authenticated with it, so that
files can't be swapped. Keys from passphrases come from scrypt (RFC 7914) with OWASP's parameters for 32 MiB.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lopa.errors import FolderError, InvalidRequest, MissingDependency

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MAGIC = b"lopa.sealed.1\n"
OVERHEAD = len(MAGIC) + 12 + 16
"""Bytes that sealing adds."""
KEY_BYTES = 32
Secret = str | bytes
"""A passphrase, or a key of 32 bytes."""
_CHECK = "check"
_HEX = re.compile(r"(?:[0-9a-f]{2})+")


@dataclass(frozen=True)
class Lock:
    """How a persona's key is made, and what proves that it is the right one. Public; it is part of persona.json."""

    kdf: str
    """"scrypt" for a passphrase, "none" for a key."""
    check: str = ""
    """A sealed nothing, in hex."""
    salt: str = ""
    n: int = 1 << 15
    r: int = 8
    p: int = 3

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Lock:
        """Parse and check; a hostile file must not make scrypt take all memory.

        Raises:
            ValueError, TypeError: not such a row.
        """
        lock = cls(**row)
        numbers = all(type(value) is int for value in (lock.n, lock.r, lock.p))
        fits = numbers and 1 < lock.n <= 1 << 17 and lock.n & (lock.n - 1) == 0 and 1 <= lock.r <= 16 and 1 <= lock.p <= 16
        texts = all(isinstance(value, str) and len(value) <= 256 for value in (lock.check, lock.salt))
        if lock.kdf not in ("scrypt", "none") or not fits or not texts or not _HEX.fullmatch(lock.check):
            raise ValueError("its encryption parameters are out of range")
        if lock.kdf == "scrypt" and not _HEX.fullmatch(lock.salt):
            raise ValueError("its encryption has no salt")
        return lock


@dataclass(frozen=True)
class Vault:
    """Seals and opens files with one key."""

    lock: Lock
    _cipher: AESGCM = field(repr=False)

    @classmethod
    def new(cls, secret: Secret) -> Vault:
        """For a new persona.

        Raises:
            InvalidRequest: an empty passphrase, or a key of another length. MissingDependency: cryptography is not installed.
        """
        lock = Lock("scrypt", salt=os.urandom(16).hex()) if isinstance(secret, str) else Lock("none")
        vault = cls(lock, _cipher(_key(secret, lock)))
        check = vault.seal(b"", _CHECK).hex()
        return cls(Lock(lock.kdf, check, lock.salt, lock.n, lock.r, lock.p), vault._cipher)

    @classmethod
    def unlock(cls, secret: Secret, lock: Lock) -> Vault:
        """For a persona that has this lock.

        Raises:
            FolderError: the wrong passphrase or key. Others: as `new`.
        """
        if (lock.kdf == "none") == isinstance(secret, str):
            raise FolderError(f"this persona was encrypted with a {'key' if lock.kdf == 'none' else 'passphrase'}; give that as `secret`")
        vault = cls(lock, _cipher(_key(secret, lock)))
        try:
            vault.open(bytes.fromhex(lock.check), _CHECK)
        except ValueError as error:
            raise FolderError("wrong passphrase or key for this persona; without the right one nothing in it can be read") from error
        return vault

    def seal(self, data: bytes, name: str) -> bytes:
        """Encrypt what belongs in the file `name`."""
        nonce = os.urandom(12)
        return MAGIC + nonce + self._cipher.encrypt(nonce, data, MAGIC + name.encode())

    def open(self, data: bytes, name: str) -> bytes:
        """Decrypt the content of the file `name`.

        Raises:
            ValueError: not sealed with this key under this name, or damaged.
        """
        from cryptography.exceptions import InvalidTag

        if not data.startswith(MAGIC) or len(data) < OVERHEAD:
            raise ValueError(f"{name} is not an encrypted file")
        nonce, sealed = data[len(MAGIC) : len(MAGIC) + 12], data[len(MAGIC) + 12 :]
        try:
            return self._cipher.decrypt(nonce, sealed, MAGIC + name.encode())
        except InvalidTag as error:
            raise ValueError(f"{name} can't be decrypted: it was damaged or exchanged") from error


def _key(secret: Secret, lock: Lock) -> bytes:
    if isinstance(secret, bytes):
        if len(secret) != KEY_BYTES:
            raise InvalidRequest(
                f"secret: a key of {len(secret)} bytes was given; {KEY_BYTES} are needed", field="secret", limit="32 bytes"
            )
        return secret
    if not secret:
        raise InvalidRequest("secret: the passphrase is empty", field="secret", limit="not empty")
    memory = 128 * lock.r * (lock.n + lock.p + 2) + (1 << 20)
    return hashlib.scrypt(secret.encode(), salt=bytes.fromhex(lock.salt), n=lock.n, r=lock.r, p=lock.p, maxmem=memory, dklen=KEY_BYTES)


def _cipher(key: bytes) -> AESGCM:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise MissingDependency('encryption needs the package cryptography: pip install "lopa[crypto]"') from error
    return AESGCM(key)
