"""safetensors files: named arrays and text metadata. Written here so that the same content always gives the same bytes
(the library's writer orders metadata at random); read with the library after every length and shape was checked.

Format: 8 bytes of little-endian header length, the JSON header, the arrays without gaps.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from lopa.errors import FactorsError
from lopa.manifest import TensorSpec
from lopa.values import Float32

STORED: Mapping[str, type[np.floating[Any]]] = {"F16": np.float16, "F32": np.float32}
MAX_HEADER_BYTES = 1 << 20
_ALIGNMENT = 8


def write_tensors(tensors: Mapping[str, Float32], specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """A file's bytes, each array rounded to its spec's dtype. A value beyond F16's range becomes infinite."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    parts, end = [], 0
    for spec in sorted(specs, key=lambda spec: (spec.dtype != "F32", spec.name)):  # wider items first keeps every array aligned
        with np.errstate(over="ignore"):
            data = np.ascontiguousarray(tensors[spec.name], np.dtype(STORED[spec.dtype]).newbyteorder("<")).tobytes()
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + len(data)]}
        parts.append(data)
        end += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


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
            raise FactorsError(f"tensor {spec.name} is {reprlib.repr(found)}; {spec.dtype} of shape {list(spec.shape)} is expected")
    try:
        arrays = load(data)
    except SafetensorError as error:
        raise FactorsError(f"damaged safetensors file: {error}") from error
    return {spec.name: arrays[spec.name].astype(np.float32) for spec in specs}


def _header(data: bytes) -> dict[str, Any]:
    """The JSON header: 8 bytes of length, then the text (safetensors format)."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise FactorsError("not a safetensors file, or cut short")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
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
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FactorsError("damaged safetensors header: the metadata is not text by name")
    return metadata
