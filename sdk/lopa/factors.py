"""A user's factors: named tensors in one safetensors file of a few kilobytes, tied to a bundle and a foundation model (FM)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lopa.bundle import Bundle
from lopa.errors import FactorsError
from lopa.manifest import TensorSpec
from lopa.tensorfile import STORED, read_metadata, read_tensors, write_tensors
from lopa.values import Float32

FORMAT = "lopa.factors.1"


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
            rounded = {spec.name: self.tensors[spec.name].astype(STORED[spec.dtype]).astype(np.float32) for spec in self.specs}
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
        metadata = {"format": FORMAT, "bundle_id": self.bundle_id, "fm_fingerprint": self.fm_fingerprint}
        return write_tensors(self.tensors, self.specs, metadata)

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
            FactorsError: the bundle's file does not fit its manifest, or a value is not finite.
        """
        manifest = bundle.manifest
        tensors = read_tensors(bundle.path("factors.safetensors").read_bytes(), manifest.personal)
        start = cls(tensors, manifest.personal, manifest.id, manifest.fm.fingerprint)
        if not start.finite:
            raise FactorsError(f"factors.safetensors of bundle {manifest.id[:12]} has values that are not finite")
        return start
