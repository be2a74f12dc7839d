"""API keys: 256 random bits each, shown once, kept as SHA-256 in a JSON file that servers read again when it changes.

The secret is random, not chosen by people, so a plain hash is enough: there is nothing to guess that salt or stretching
would slow down.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from lopa_server.identity.caller import TENANT, Scope, parse_scopes

log = logging.getLogger(__name__)

PREFIX = "lopa_"
SECRET_BYTES = 32
VERSION = 1
_NO_HASH = bytes(32)


class KeyFileError(ValueError):
    """A key file that can't be used. The message says which and why."""


@dataclass(frozen=True)
class ApiKey:
    """What the file keeps of a key: everything but the secret."""

    id: str
    """16 hex digits; part of the key, no secret."""
    tenant: str
    scopes: frozenset[Scope]
    created: datetime
    expires: datetime | None
    sha256: bytes
    """Of the secret part."""

    def expired(self, now: datetime) -> bool:
        return self.expires is not None and now >= self.expires


class KeyFile:
    """A file of API keys. Reading is cheap when nothing has changed; writing locks, and replaces the file atomically."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._keys: Mapping[str, ApiKey] = {}

    def check(self) -> None:
        """Raises KeyFileError when the file is missing or damaged."""
        if not self._path.is_file():
            raise KeyFileError(f"there is no key file {self._path}: make one with `lopa keys create`")
        _read(self._path)

    def entries(self) -> list[ApiKey]:
        """All keys, expired ones too, oldest first. A missing file has none.

        Raises:
            KeyFileError: the file is damaged.
        """
        return sorted(_read(self._path).values(), key=lambda key: key.created) if self._path.exists() else []

    def find(self, presented: str) -> ApiKey | None:
        """The key whose text this is, expired or not; None for anything else. Never raises, compares in constant time.

        A file that has gone has no keys; a damaged one changes nothing and is logged.
        """
        self._refresh()
        name, _, secret = presented.removeprefix(PREFIX).partition("_")
        key = self._keys.get(name)
        digest = hashlib.sha256(secret.encode("utf-8", "replace")).digest()
        matches = hmac.compare_digest(digest, key.sha256 if key is not None else _NO_HASH)
        return key if matches and presented.startswith(PREFIX) else None

    def create(self, tenant: str, scopes: frozenset[Scope], expires: datetime | None) -> tuple[ApiKey, str]:
        """Add a key; returns it with its text, which is nowhere else.

        Raises:
            ValueError: not a tenant's name, or no scope.
            KeyFileError: the file is damaged.
        """
        if not TENANT.fullmatch(tenant):
            raise ValueError(f"{tenant!r} can't name a tenant: letters, digits and . _ @ : / = + - are allowed, 128 characters at most")
        if not scopes:
            raise ValueError("a key without scopes would open nothing")
        secret = secrets.token_urlsafe(SECRET_BYTES)
        now = datetime.now(UTC).replace(microsecond=0)
        key = ApiKey(secrets.token_hex(8), tenant, scopes, now, expires, hashlib.sha256(secret.encode()).digest())
        with self._lock():
            self._write({**self._existing(), key.id: key})
        return key, f"{PREFIX}{key.id}_{secret}"

    def revoke(self, key_id: str) -> ApiKey:
        """Take a key out. Raises KeyFileError when there is none of that id."""
        with self._lock():
            keys = dict(self._existing())
            if key_id not in keys:
                raise KeyFileError(f"{self._path} has no key {key_id}")
            key = keys.pop(key_id)
            self._write(keys)
        return key

    def _lock(self) -> FileLock:
        return FileLock(self._path.with_name(f".{self._path.name}.lock"))

    def _existing(self) -> Mapping[str, ApiKey]:
        return _read(self._path) if self._path.exists() else {}

    def _write(self, keys: Mapping[str, ApiKey]) -> None:
        document = {"version": VERSION, "keys": [_entry(key) for key in keys.values()]}
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
        finally:
            partial.unlink(missing_ok=True)

    def _refresh(self) -> None:
        """Read the file again when it is another one than last time."""
        try:
            state = self._path.stat()
        except OSError:
            if self._keys:
                log.error("the key file %s has gone: no API key is valid", self._path)
            self._keys, self._seen = {}, None
            return
        seen = (state.st_ino, state.st_mtime_ns, state.st_size)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keys = _read(self._path)
        except KeyFileError as error:
            log.error("the keys in force stay as they were: %s", error)


def _entry(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "scopes": sorted(scope.value for scope in key.scopes),
        "created": key.created.isoformat(),
        "expires": key.expires.isoformat() if key.expires else None,
        "sha256": key.sha256.hex(),
    }


def _read(path: Path) -> dict[str, ApiKey]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != VERSION:
            raise KeyFileError(f"{path}: version {document['version']!r} is not known here, only {VERSION}")
        keys = [_key(entry) for entry in document["keys"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, KeyFileError):
            raise
        raise KeyFileError(f"{path} is no key file: {type(error).__name__}: {error}") from error
    return {key.id: key for key in keys}


def _key(entry: Mapping[str, Any]) -> ApiKey:
    expires = entry["expires"]
    key = ApiKey(
        id=str(entry["id"]),
        tenant=str(entry["tenant"]),
        scopes=parse_scopes(entry["scopes"]),
        created=_moment(entry["created"]),
        expires=None if expires is None else _moment(expires),
        sha256=bytes.fromhex(entry["sha256"]),
    )
    if len(key.sha256) != 32 or not TENANT.fullmatch(key.tenant):
        raise ValueError(f"key {key.id} is malformed")
    return key


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text} has no time zone")
    return moment
