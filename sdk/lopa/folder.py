"""A user's folder on disk. Everything personal is in it, and nothing else.

    <folder>/lopa.json                              schema version
    <folder>/personas/NAME/persona.json             what it belongs to, its versions, which one is current
    <folder>/personas/NAME/factors/000001.safetensors ...
    <folder>/personas/NAME/tuning.safetensors       an unfinished tuning run
    <folder>/personas/NAME/examples.jsonl           what it learnt from, only if `keep_examples` asked for that
    <folder>/personas/NAME/former-ID.json           the record for bundle ID, before `migrate`
    <folder>/personas/NAME/lock                     held while something is written

With a secret, everything but the records is encrypted (see `lopa.vault`).
A version exists once persona.json names it: its factors file is written first, so a crash at any moment leaves the version before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from lopa.bundle import Bundle
from lopa.errors import FactorsError, FolderError, StorageError
from lopa.factors import Factors
from lopa.files import locked, make_folder, read_limited, sweep, write_atomic
from lopa.record import NAME, SCHEMA, Record, Version
from lopa.values import Placement
from lopa.vault import OVERHEAD, Secret, Vault

KEPT_VERSIONS = 32
"""Older versions are removed, the current one never."""
_MAX_RECORD_BYTES = 1 << 20
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What reading a damaged JSON file can raise."""


class PersonaStore:
    """One persona's files. Readers need no lock; every reading sees the latest completed state."""

    def __init__(self, root: Path | str, name: str, secret: Secret | None = None) -> None:
        """secret: a passphrase, or a key of 32 bytes; only with it an encrypted persona's files can be read.

        Raises:
            FolderError: a name that is not 1 to 64 letters, digits, _ or -.
        """
        if not NAME.fullmatch(name):
            raise FolderError(f"persona name {name[:80]!r}: 1 to 64 letters, digits, _ and - are allowed, the first a letter or digit")
        self.root = Path(root).expanduser()
        self.name = name
        self.folder = self.root / "personas" / name
        self.tuning_path = self.folder / "tuning.safetensors"
        self.examples_path = self.folder / "examples.jsonl"
        self._secret = secret
        self._vault: Vault | None = None

    @property
    def exists(self) -> bool:
        """Whether this persona was created completely.

        Raises:
            StorageError: the folder can't be read.
        """
        try:
            return (self.folder / "persona.json").is_file()
        except PermissionError as error:
            raise _unreadable(self.folder / "persona.json") from error

    def create(self, bundle: Bundle) -> None:
        """Write the first version, the bundle's starting values. If another process was faster, its persona stays.

        Raises:
            StorageError: the place can't be written. FactorsError: the bundle's starting values are damaged. FolderError: there are
            tuned factors without a record.
        """
        make_folder(self.folder / "factors")
        with self.lock(wait=10.0):
            if self.exists:
                return
            if tuned := sorted(path for path in (self.folder / "factors").glob("*.safetensors") if path != self.factors_path(1)):
                way_out = "put a copy of it back, or begin another persona"
                raise FolderError(f"persona {self.name} has lost its persona.json, but not its factors ({tuned[-1].name}): {way_out}")
            self.prepare()
            manifest = bundle.manifest
            self._vault = None if self._secret is None else Vault.new(self._secret)
            version = self._write_factors(Factors.start(bundle), 1, origin="start", parent=0)
            fm, lock = manifest.fm, None if self._vault is None else self._vault.lock
            self._write_record(Record(self.name, manifest.id, fm.name, fm.fingerprint, manifest.personal, 1, (version,), lock))

    def rebase(self, bundle: Bundle) -> None:
        """Begin anew with another bundle's starting values; the record so far is kept beside the new one. Call it with the lock held.

        Raises:
            StorageError: it can't be written. FactorsError: the bundle's starting values are damaged.
        """
        record, manifest = self.record(), bundle.manifest
        number = record.versions[-1].version + 1
        write_atomic(self.folder / f"former-{record.bundle_id[:12]}.json", record.to_json().encode())
        version = self._write_factors(Factors.start(bundle), number, origin="start", parent=record.current, placement=record.placement)
        changed = replace(record, bundle_id=manifest.id, fm_name=manifest.fm.name, fm_fingerprint=manifest.fm.fingerprint)
        self._write_record(replace(changed, tensors=manifest.personal, current=number, versions=(version,), pending=True))
        self.tuning_path.unlink(missing_ok=True)

    def settle(self) -> None:
        """A migration has finished. Call it with the lock held."""
        self._write_record(replace(self.record(), pending=False))

    def unlock(self) -> None:
        """Check the secret against the record.

        Raises:
            FolderError: a secret is missing, wrong, or there is nothing to unlock.
        """
        lock = self.record().lock
        if lock is None and self._secret is not None:
            raise FolderError(f"persona {self.name} is not encrypted: open it without a secret")
        if lock is not None and self._secret is None:
            raise FolderError(f"persona {self.name} is encrypted: give its passphrase or key as `secret`")
        if lock is not None and self._secret is not None and (self._vault is None or self._vault.lock != lock):
            self._vault = Vault.unlock(self._secret, lock)

    def write(self, path: Path, data: bytes) -> bytes:
        """Write one of the persona's files, whole or not at all, encrypted if the persona is. What was written.

        Raises:
            StorageError: it can't be written.
        """
        if self._vault is not None:
            data = self._vault.seal(data, path.relative_to(self.folder).as_posix())
        write_atomic(path, data)
        return data

    def read(self, path: Path, limit: int) -> bytes:
        """One of the persona's files, decrypted; `limit` bounds its plain size in bytes.

        Raises:
            ValueError: too large, or damaged. OSError: it can't be read. FolderError: it is encrypted and no secret was given.
        """
        return self._opened(path, read_limited(path, limit + OVERHEAD))

    def _opened(self, path: Path, data: bytes) -> bytes:
        self.unlock()
        return data if self._vault is None else self._vault.open(data, path.relative_to(self.folder).as_posix())

    def prepare(self) -> None:
        """Make the root a user's folder, if it is not one yet.

        Raises:
            FolderError: it is one of another schema. StorageError: it can't be written.
        """
        _check_root(self.root, create=True)

    def record(self) -> Record:
        """The persona's record as it is on disk now.

        Raises:
            FolderError: there is none, or it is damaged. StorageError: it can't be read.
        """
        path = self.folder / "persona.json"
        try:
            _check_root(self.root, create=False)
            return Record.from_json(read_limited(path, _MAX_RECORD_BYTES).decode("utf-8"))
        except FileNotFoundError as error:
            raise FolderError(f"{self.root} has no persona {self.name}") from error
        except PermissionError as error:
            raise _unreadable(path) from error
        except DAMAGE as error:
            way_out = "put an earlier copy of the folder or an exported persona in its place, or begin another persona"
            raise FolderError(f"{path} is damaged ({type(error).__name__}: {error}): {way_out}") from error

    def factors(self, record: Record, number: int | None = None) -> Factors:
        """The factors of a version; by default of the current one.

        Raises:
            FolderError: no such version. FactorsError: its file is missing, damaged, or belongs to another bundle.
        """
        version = record.version(record.current if number is None else number)
        path = self.factors_path(version.version)
        try:
            data = read_limited(path, version.size)
        except (OSError, ValueError) as error:
            raise FactorsError(
                f"version {version.version} of persona {self.name} can't be read: {error}; `rollback` to another one"
            ) from error
        if hashlib.sha256(data).hexdigest() != version.sha256:
            raise FactorsError(f"{path} was changed or damaged since it was written; `rollback` to another version")
        try:
            plain = self._opened(path, data)
        except ValueError as error:
            raise FactorsError(f"{error}; `rollback` to another version") from error
        factors = Factors.from_bytes(plain, record.tensors)
        if (factors.bundle_id, factors.fm_fingerprint) != (record.bundle_id, record.fm_fingerprint):
            raise FactorsError(f"{path} belongs to bundle {factors.bundle_id[:12]}, the persona to {record.bundle_id[:12]}")
        return factors

    def factors_path(self, version: int) -> Path:
        return self.folder / "factors" / f"{version:06d}.safetensors"

    @contextlib.contextmanager
    def lock(self, *, wait: float = 0.0) -> Iterator[None]:
        """Keep other writers out. wait: seconds.

        Raises:
            FolderError: somebody else is writing.
        """
        with locked(self.folder / "lock", f"persona {self.name} in {self.root} is being tuned or changed by another process", wait=wait):
            for folder in (self.folder, self.folder / "factors"):
                sweep(folder)
            yield

    def append(self, factors: Factors, *, validation_nll: float, placement: Placement = "front") -> Version:
        """Save tuned factors as a new version and make it the current one. Call it with the lock held."""
        record = self.record()
        number = record.versions[-1].version + 1
        self.unlock()
        version = self._write_factors(
            factors, number, origin="tune", parent=record.current, validation_nll=validation_nll, placement=placement
        )
        versions = (*record.versions, version)[-KEPT_VERSIONS:]
        self._write_record(replace(record, current=number, versions=versions))
        for old in set(record.versions) - set(versions):
            self.factors_path(old.version).unlink(missing_ok=True)
        return version

    def rollback(self, number: int) -> Version:
        """Make an older (or newer) version the current one; its file is checked first.

        Raises:
            FolderError: no such version, or somebody else is writing. FactorsError: its file is damaged.
        """
        if not self.exists:
            self.record()
        with self.lock():
            record = self.record()
            self.factors(record, number)
            self._write_record(replace(record, current=number))
            return record.version(number)

    def _write_factors(
        self,
        factors: Factors,
        number: int,
        *,
        origin: str,
        parent: int,
        validation_nll: float | None = None,
        placement: Placement = "front",
    ) -> Version:
        data = self.write(self.factors_path(number), factors.to_bytes())
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return Version(number, created, origin, parent, len(data), hashlib.sha256(data).hexdigest(), validation_nll, placement)

    def _write_record(self, record: Record) -> None:
        write_atomic(self.folder / "persona.json", record.to_json().encode())


def _unreadable(path: Path) -> StorageError:
    return StorageError(f"{path} can't be read: this process is not allowed to; nothing of it is damaged")


def personas(root: Path | str) -> list[str]:
    """Names of the personas in a folder, sorted.

    Raises:
        FolderError: not a personal folder, or one of another schema.
    """
    root = Path(root).expanduser()
    try:
        _check_root(root, create=False)
    except OSError as error:
        raise FolderError(f"{root} is not a personal folder: {error}") from error
    return sorted(path.parent.name for path in root.glob("personas/*/persona.json"))


def _check_root(root: Path, *, create: bool) -> None:
    """Check the folder's schema; with `create`, write it when it is not there yet.

    Raises:
        FileNotFoundError: no lopa.json. FolderError: it is damaged, or of another schema. StorageError: it can't be read.
    """
    path = root / "lopa.json"
    if create and not path.exists():
        write_atomic(path, (json.dumps({"schema": SCHEMA}) + "\n").encode())
    try:
        schema = json.loads(read_limited(path, _MAX_RECORD_BYTES))["schema"]
        if schema != SCHEMA:
            raise ValueError(f"it has schema {schema!r}, this version of lopa reads {SCHEMA}")
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise _unreadable(path) from error
    except DAMAGE as error:
        raise FolderError(f"{path} can't be used: {type(error).__name__}: {error}") from error
