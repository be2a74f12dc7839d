"""What a persona's record says: which model and bundle its factors belong to, their versions, how they are kept.

It comes from outside as much as any file does: everything is checked before it is used.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Self

from lopa.errors import FolderError
from lopa.manifest import MAX_FILE_BYTES, TensorSpec, check_tensors
from lopa.values import Placement
from lopa.vault import Lock

SCHEMA = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Version:
    """One saved state of the factors."""

    version: int
    """Counts from 1."""
    created: str
    """UTC, ISO 8601."""
    origin: str
    """"start" for a bundle's starting values, "tune" for a tuning run's result."""
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
    lock: Lock | None = None
    """How the other files are encrypted; None when they are not."""
    pending: bool = False
    """The model or bundle changed and `migrate` has not finished: until then the plain model answers."""
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
        lock = None if document.get("lock") is None else Lock.from_row(document["lock"])
        record = cls(**{**document, "tensors": tensors, "versions": versions, "lock": lock})
        if not (NAME.fullmatch(record.persona) and _HEX.fullmatch(record.bundle_id) and _HEX.fullmatch(record.fm_fingerprint)):
            raise ValueError("persona, bundle_id or fm_fingerprint is malformed")
        check_tensors("tensors", tensors)
        numbers = [version.version for version in versions]
        if numbers != sorted(set(numbers)) or type(record.current) is not int or record.current not in numbers:
            raise ValueError("the versions are not in order, or the current one is not among them")
        if not isinstance(record.fm_name, str) or type(record.pending) is not bool:
            raise ValueError("fm_name or pending is of another type")
        return record
