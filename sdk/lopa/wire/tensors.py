"""Tensor bytes on the wire: exact length and explicit dtype, checked before anything is allocated.

Legend: m rows, d hidden size.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lopa.v1 import common_pb2 as pb
from lopa.wire.errors import Reason, WireError

Float32 = NDArray[np.float32]

ITEM_BYTES: Mapping[int, int] = {pb.DTYPE_F32: 4, pb.DTYPE_F16: 2, pb.DTYPE_BF16: 2, pb.DTYPE_I8: 1}


def dtype_name(dtype: int) -> str:
    """`F32` for DTYPE_F32; the number itself for one that this version doesn't know."""
    return pb.DType.Name(pb.DType.ValueType(dtype)).removeprefix("DTYPE_") if dtype in pb.DType.values() else str(dtype)


def encode_rows(rows: Float32, dtype: pb.DType.ValueType) -> tuple[bytes, bytes]:
    """Serialize (m, d) float32 rows as (data, scales).

    F16 saturates nothing: a value beyond its range becomes infinite and is refused by the receiver. BF16 rounds to nearest even.
    I8 is symmetric per row with scale max|row| / 127.

    Raises:
        WireError: SOFT_PROMPT_DTYPE for an unknown dtype.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if dtype == pb.DTYPE_F32:
        return rows.astype("<f4").tobytes(), b""
    if dtype == pb.DTYPE_F16:
        with np.errstate(over="ignore"):
            return rows.astype("<f2").tobytes(), b""
    if dtype == pb.DTYPE_BF16:
        bits = rows.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = np.isnan(rows)
        return np.where(nan, 0x7FC0, rounded).astype("<u2").tobytes(), b""
    if dtype == pb.DTYPE_I8:
        scales = np.maximum(rows.max(axis=1, keepdims=True), -rows.min(axis=1, keepdims=True)) / np.float32(127)
        with np.errstate(invalid="ignore"):  # what is not finite gets a scale that the receiver refuses
            steps = rows / np.where(scales > 0, scales, np.float32(1))
            data = np.rint(steps, out=steps).astype(np.int8).tobytes()
        return data, scales.astype("<f4").tobytes()
    raise WireError(Reason.SOFT_PROMPT_DTYPE, "dtype", limit="F32, F16, BF16, I8", found=dtype_name(dtype))


def decode_rows(data: bytes, scales: bytes, *, rows: int, hidden: int, dtype: int) -> Float32:
    """Parse (m, d) rows into a fresh float32 array. Finiteness and norms are the caller's to check, after its own cast.

    Raises:
        WireError: SOFT_PROMPT_DTYPE, or SOFT_PROMPT_BYTES when `data` or `scales` has not exactly the length that
            rows, hidden and dtype ask for.
    """
    if dtype not in ITEM_BYTES:
        raise WireError(Reason.SOFT_PROMPT_DTYPE, "dtype", limit="F32, F16, BF16, I8", found=dtype_name(dtype))
    expected = rows * hidden * ITEM_BYTES[dtype]
    if len(data) != expected:
        raise WireError(Reason.SOFT_PROMPT_BYTES, "data", limit=expected, found=len(data))
    expected_scales = 4 * rows if dtype == pb.DTYPE_I8 else 0
    if len(scales) != expected_scales:
        raise WireError(Reason.SOFT_PROMPT_BYTES, "scales", limit=expected_scales, found=len(scales))
    shape = (rows, hidden)
    if dtype == pb.DTYPE_F32:
        return np.frombuffer(data, "<f4").reshape(shape).astype(np.float32)
    if dtype == pb.DTYPE_F16:
        return np.frombuffer(data, "<f2").reshape(shape).astype(np.float32)
    if dtype == pb.DTYPE_BF16:
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    scale = np.frombuffer(scales, "<f4").astype(np.float32).reshape(rows, 1)
    if not np.all(scale >= 0):
        raise WireError(Reason.OUT_OF_RANGE, "scales", limit="finite and not negative", found="a negative or NaN scale")
    values = np.frombuffer(data, np.int8).reshape(shape).astype(np.float32)
    values *= scale
    return values


def soft_prompt_message(
    rows: Float32, dtype: pb.DType.ValueType = pb.DTYPE_F32, placement: pb.Placement.ValueType = pb.PLACEMENT_FRONT
) -> pb.SoftPrompt:
    """A SoftPrompt message for (m, d) float32 rows."""
    data, scales = encode_rows(rows, dtype)
    return pb.SoftPrompt(rows=rows.shape[0], hidden=rows.shape[1], dtype=dtype, data=data, scales=scales, placement=placement)


def soft_prompt_digest(message: pb.SoftPrompt) -> bytes:
    """SHA-256 of a soft prompt as Receipt.soft_prompt_sha256 defines it: 32 bytes."""
    placement = message.placement or pb.PLACEMENT_FRONT
    header = struct.pack("<4I", message.rows, message.hidden, message.dtype, placement)
    return hashlib.sha256(b"lopa.v1.SoftPrompt\n" + header + message.scales + message.data).digest()
