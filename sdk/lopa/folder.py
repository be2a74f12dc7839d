"""A user's folder on disk. Everything personal is in it, and nothing else.

    <folder>/lopa.json                              schema version
    <folder>/personas/NAME/persona.json             what it belongs to, its versions, which one is current
    <folder>/personas/NAME/factors/000001.safetensors ...
    <folder>/personas/NAME/tuning.safetensors       an unfinished tuning run
    <folder>/personas/NAME/lock                     held while something is written

A version exists once persona.json names it: its factors file is written first, so a crash at any moment leaves the version before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from lopa.bundle import MAX_FILE_BYTES, Bundle, TensorSpec, check_tensors
from lopa.errors import FactorsError, FolderError
from lopa.factors import Factors
from lopa.files import locked, make_folder, read_limited, sweep, write_atomic
from lopa.values import Placement

SCHEMA = 1
KEPT_VERSIONS = 32
"""Older versions are removed, the current one never."""
_MAX_RECORD_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_HEX = re.compile(r"[0-9a-f]{64}")
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What reading a damaged JSON file can raise."""


@dataclass(frozen=True)
class Version:
    """One saved state of the factors."""

    version: int
    """Counts from 1."""
    created: str
    """UTC, ISO 8601."""
    origin: str
    """"start" for the bundle's starting values, "tune" for a tuning run's result."""
    parent: int
    """The version that it was tuned from; 0 for none."""
    size: int
    """Bytes of the factors file."""
    sha256: str
    validation_nll: float | None
    """Nats per target token on the run's validation examples."""
    placement: Placement = "front"
    """Where the soft prompt stood in that run, and stands by default."""

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """One entry of persona.json.

        Raises:
            ValueError, TypeError: a field is missing, unknown, of another type or out of range.
        """
        version = cls(**row)
        nll = version.validation_nll
        rules = {
            "version": type(version.version) is int and 1 <= version.version < 1 << 31,
            "created": isinstance(version.created, str) and version.created.isascii() and version.created.isprintable(),
            "origin": version.origin in ("start", "tune"),
            "parent": type(version.parent) is int and 0 <= version.parent < 1 << 31,
            "size": type(version.size) is int and 0 < version.size <= MAX_FILE_BYTES,
            "sha256": isinstance(version.sha256, str) and _HEX.fullmatch(version.sha256),
            "placement": version.placement in ("front", "after_prefix"),
            "validation_nll": nll is None or (type(nll) in (int, float) and math.isfinite(nll)),
        }
        if wrong := [name for name, holds in rules.items() if not holds]:
            raise ValueError(f"a version has a bad {', '.join(wrong)}")
        return version


@dataclass(frozen=True)
class Record:
    """persona.json."""

    persona: str
    bundle_id: str
    fm_name: str
    fm_fingerprint: str
    tensors: tuple[TensorSpec, ...]
    current: int
    versions: tuple[Version, ...]
    """Oldest first."""
    schema: int = SCHEMA

    @property
    def placement(self) -> Placement:
        """Where the current version's soft prompt stands."""
        return self.version(self.current).placement

    def version(self, number: int) -> Version:
        """One version by number.

        Raises:
            FolderError: there is none.
        """
        for version in self.versions:
            if version.version == number:
                return version
        known = ", ".join(str(version.version) for version in self.versions)
        raise FolderError(f"persona {self.persona} has no version {number}; it has {known}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Parse and check.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError: not such a record.
        """
        document: dict[str, Any] = json.loads(text)
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema is {document['schema']!r}, this version of lopa reads {SCHEMA}")
        tensors = tuple(TensorSpec(str(row["name"]), tuple(row["shape"]), str(row["dtype"])) for row in document["tensors"])
        versions = tuple(Version.from_row(row) for row in document["versions"])
        record = cls(**{**document, "tensors": tensors, "versions": versions})
        if not (_NAME.fullmatch(record.persona) and _HEX.fullmatch(record.bundle_id) and _HEX.fullmatch(record.fm_fingerprint)):
            raise ValueError("persona, bundle_id or fm_fingerprint is malformed")
        check_tensors("tensors", tensors)
        numbers = [version.version for version in versions]
        if numbers != sorted(set(numbers)) or type(record.current) is not int or record.current not in numbers:
            raise ValueError("the versions are not in order, or the current one is not among them")
        if not isinstance(record.fm_name, str):
            raise ValueError("fm_name is not text")
        return record


class PersonaStore:
    """One persona's files. Readers need no lock; every reading sees the latest completed state."""

    def __init__(self, root: Path | str, name: str) -> None:
        """Raises FolderError for a name that is not 1 to 64 letters, digits, _ or -."""
        if not _NAME.fullmatch(name):
            raise FolderError(f"persona name {name[:80]!r}: 1 to 64 letters, digits, _ and - are allowed, the first a letter or digit")
        self.root = Path(root).expanduser()
        self.name = name
        self.folder = self.root / "personas" / name
        self.tuning_path = self.folder / "tuning.safetensors"

    @property
    def exists(self) -> bool:
        """Whether this persona was created completely."""
        return (self.folder / "persona.json").is_file()

    def create(self, bundle: Bundle) -> None:
        """Write the first version, the bundle's starting values. If another process was faster, its persona stays.

        Raises:
            StorageError: the place can't be written. FactorsError: the bundle's starting values are damaged.
        """
        make_folder(self.folder / "factors")
        with self.lock(wait=10.0):
            if self.exists:
                return
            _check_root(self.root, create=True)
            manifest = bundle.manifest
            factors = Factors.start(bundle)
            version = self._write_factors(factors, 1, origin="start", parent=0, validation_nll=None)
            record = Record(self.name, manifest.id, manifest.fm.name, manifest.fm.fingerprint, manifest.personal, 1, (version,))
            self._write_record(record)

    def record(self) -> Record:
        """The persona's record as it is on disk now.

        Raises:
            FolderError: there is none, or it is damaged.
        """
        path = self.folder / "persona.json"
        try:
            _check_root(self.root, create=False)
            return Record.from_json(read_limited(path, _MAX_RECORD_BYTES).decode("utf-8"))
        except FileNotFoundError as error:
            raise FolderError(f"{self.root} has no persona {self.name}") from error
        except _DAMAGE as error:
            raise FolderError(f"{path} is damaged: {type(error).__name__}: {error}") from error

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
        factors = Factors.from_bytes(data, record.tensors)
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
        version = self._write_factors(factors, number, origin="tune", parent=record.current, validation_nll=validation_nll)
        version = replace(version, placement=placement)
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

    def _write_factors(self, factors: Factors, number: int, *, origin: str, parent: int, validation_nll: float | None) -> Version:
        data = factors.to_bytes()
        write_atomic(self.factors_path(number), data)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return Version(number, created, origin, parent, len(data), hashlib.sha256(data).hexdigest(), validation_nll)

    def _write_record(self, record: Record) -> None:
        write_atomic(self.folder / "persona.json", record.to_json().encode())


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
        FileNotFoundError: no lopa.json. FolderError: it is damaged, or of another schema.
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
    except _DAMAGE as error:
        raise FolderError(f"{path} can't be used: {type(error).__name__}: {error}") from error
