"""A user's factors: named tensors in one safetensors file of a few kilobytes, tied to a bundle and a foundation model (FM)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lopa.bundle import Bundle, TensorSpec
from lopa.errors import FactorsError
from lopa.values import Float32

FORMAT = "lopa.factors.1"
_DTYPES: Mapping[str, type[np.floating[Any]]] = {"F16": np.float16, "F32": np.float32}
_MAX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class Factors:
    """The personal tensors, as float32, and what they belong to."""

    tensors: Mapping[str, Float32]
    specs: tuple[TensorSpec, ...]
    """Names, shapes and the dtypes at rest."""
    bundle_id: str
    fm_fingerprint: str

    def at_rest(self) -> Factors:
        """The same factors rounded to what the file will hold. A value beyond F16's range becomes infinite: check `finite`."""
        with np.errstate(over="ignore"):
            rounded = {spec.name: self.tensors[spec.name].astype(_DTYPES[spec.dtype]).astype(np.float32) for spec in self.specs}
        return Factors(rounded, self.specs, self.bundle_id, self.fm_fingerprint)

    @property
    def finite(self) -> bool:
        """Whether no value is infinite or NaN."""
        return all(bool(np.isfinite(tensor).all()) for tensor in self.tensors.values())

    @property
    def count(self) -> int:
        """How many numbers the user owns."""
        return sum(math.prod(spec.shape) for spec in self.specs)

    def to_bytes(self) -> bytes:
        """The file's content; the same factors always give the same bytes."""
        with np.errstate(over="ignore"):
            stored = {spec.name: np.ascontiguousarray(self.tensors[spec.name], _DTYPES[spec.dtype]) for spec in self.specs}
        return save(stored, {"format": FORMAT, "bundle_id": self.bundle_id, "fm_fingerprint": self.fm_fingerprint})

    @classmethod
    def from_bytes(cls, data: bytes, specs: Sequence[TensorSpec]) -> Factors:
        """Parse a file's content; names, shapes, dtypes and length must be exactly those of `specs`.

        Raises:
            FactorsError: they are not, or a value is not finite.
        """
        metadata = read_metadata(data)
        if metadata.get("format") != FORMAT:
            raise FactorsError(f"not a factors file: its format is {metadata.get('format')!r}, {FORMAT} is expected")
        factors = cls(read_tensors(data, specs), tuple(specs), metadata.get("bundle_id", ""), metadata.get("fm_fingerprint", ""))
        if not factors.finite:
            raise FactorsError("the factors have values that are not finite")
        return factors

    @classmethod
    def start(cls, bundle: Bundle) -> Factors:
        """A bundle's starting values.

        Raises:
            FactorsError: the bundle's file does not fit its manifest.
        """
        manifest = bundle.manifest
        tensors = read_tensors(bundle.path("factors.safetensors").read_bytes(), manifest.personal)
        return cls(tensors, manifest.personal, manifest.id, manifest.fm.fingerprint)


def read_tensors(data: bytes, specs: Sequence[TensorSpec]) -> dict[str, Float32]:
    """Exactly these tensors from safetensors bytes, as float32. Everything is checked before an array is made.

    Raises:
        FactorsError: another name, shape, dtype or length.
    """
    header = {name: entry for name, entry in _header(data).items() if name != "__metadata__"}
    if set(header) != {spec.name for spec in specs}:
        odd = sorted(set(header) ^ {spec.name for spec in specs})
        raise FactorsError(f"other tensors than expected: {', '.join(odd)[:300]}")
    for spec in specs:
        entry = header[spec.name]
        found = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else entry
        if found != (spec.dtype, list(spec.shape)):
            raise FactorsError(f"tensor {spec.name} is {found}; {spec.dtype} of shape {list(spec.shape)} is expected")
    try:
        arrays = load(data)
    except SafetensorError as error:
        raise FactorsError(f"damaged safetensors file: {error}") from error
    return {spec.name: arrays[spec.name].astype(np.float32) for spec in specs}


def _header(data: bytes) -> dict[str, Any]:
    """The JSON header: 8 bytes of length, then the text (safetensors format)."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, len(data) - 8):
        raise FactorsError("not a safetensors file, or cut short")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError as error:
        raise FactorsError(f"damaged safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise FactorsError("damaged safetensors header: not an object")
    return header


def read_metadata(data: bytes) -> dict[str, str]:
    """A safetensors file's metadata; empty without any.

    Raises:
        FactorsError: not such a file.
    """
    metadata = _header(data).get("__metadata__", {})
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}
