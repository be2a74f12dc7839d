"""The compiled kernels as functions of tensors. Every bound is checked here: the C code trusts what it gets.

Legend: n decoding rows, t positions of a step, h heads, k key-value heads, s slots, e head width.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import TYPE_CHECKING

import torch

from lopa_server.engine.torch_engine.native.build import NotAvailable, load_library
from lopa_server.engine.torch_engine.native.elementwise import Elementwise
from lopa_server.engine.torch_engine.paging import KeysValues, PagedRows, Slots, positions_of
from lopa_server.engine.torch_engine.rows import DTYPES

if TYPE_CHECKING:
    from lopa_server.engine.torch_engine.attention import Score

log = logging.getLogger(__name__)

LANES, MAX_WIDTH = 8, 256
"""As in attention.c: head widths are multiples of LANES up to MAX_WIDTH."""


class _Pool(ctypes.Structure):
    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("kv_heads", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("bfloat16", ctypes.c_int32),
    )


class _Decode(ctypes.Structure):
    _fields_ = (
        ("query", ctypes.c_void_p),
        ("query_head_stride", ctypes.c_int64),
        ("query_row_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("begins", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class NativeKernels:
    """The library's functions, for a pool on the CPU. Calls let go of the interpreter's lock and run on torch's threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._decode, self._write = library.lopa_decode, library.lopa_write
        self._decode.argtypes = [ctypes.POINTER(_Decode), ctypes.POINTER(_Pool)]
        self._write.argtypes = [ctypes.POINTER(_Pool), ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 4]
        self._decode.restype = self._write.restype = None
        self.elementwise = self.prompts = Elementwise(library)

    @staticmethod
    def fit(keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether a pool of such keys and values, (n, k, s, e) each, can be read and written."""
        width = keys.shape[-1]
        return keys.shape == values.shape and width % LANES == 0 and 0 < width <= MAX_WIDTH and keys.dtype == values.dtype in DTYPES

    def write(self, pool: KeysValues, slots: Slots, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put (k, t, e) keys and values into the slots of a pool that fits.

        Raises:
            IndexError: shapes or dtypes don't go together.
        """
        heads, count, _ = keys.shape
        if keys.shape != values.shape or count != len(slots.numbers) or pool[0].shape[1] != heads or positions_of(pool) != slots.total:
            raise IndexError(f"keys {tuple(keys.shape)}, values {tuple(values.shape)} for {len(slots.numbers)} of {slots.total} slots")
        _check_same(pool[0], keys, values)
        keys, values = _rows(keys), _rows(values)
        strides = [(ctypes.c_int64 * 2)(*tensor.stride()[:2]) for tensor in (keys, values)]
        self._write(_pool(pool), slots.numbers.ctypes.data, count, keys.data_ptr(), strides[0], values.data_ptr(), strides[1])

    def decode(self, pool: KeysValues, rows: PagedRows, window: int, query: torch.Tensor, score: Score) -> torch.Tensor:
        """(h, n, e) queries, one position a row, to (n, h, e). score: what the model does to its scores.

        Raises:
            IndexError: shapes or dtypes don't go together.
        """
        heads, count, width = query.shape
        keys = pool[0]
        if count != len(rows.ends) or keys.shape[::2] != (rows.blocks, rows.block_size) or heads % keys.shape[1]:
            raise IndexError(f"queries {tuple(query.shape)} for {len(rows.ends)} rows over a pool {tuple(keys.shape)}")
        _check_same(keys, query)
        query = _rows(query)
        out = torch.empty(count, heads, width, dtype=query.dtype)
        sinks = None if score.sinks is None else score.sinks.float().contiguous()
        if sinks is not None and sinks.shape != (heads,):
            raise IndexError(f"{tuple(sinks.shape)} attention sinks for {heads} heads")
        begins = rows.begins(window)
        call = _Decode(
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            out.data_ptr(),
            rows.tables.ctypes.data,
            begins.ctypes.data,
            rows.ends.ctypes.data,
            None if sinks is None else sinks.data_ptr(),
            count,
            heads,
            rows.tables.shape[1],
            score.scaling,
            score.softcap or 0.0,
        )
        self._decode(call, _pool(pool))
        return out


@functools.cache
def find_native_kernels() -> NativeKernels | None:
    """The kernels, or None where they can't be had; the log says why."""
    try:
        return NativeKernels(load_library())
    except NotAvailable as error:
        log.warning("decoding without CPU kernels, which is slower: %s", error)
        return None


def _pool(pool: KeysValues) -> _Pool:
    keys, values = pool
    _, heads, block_size, width = keys.shape
    strides = keys.stride(1), keys.stride(0)
    return _Pool(keys.data_ptr(), values.data_ptr(), heads, block_size, width, *strides, keys.dtype == torch.bfloat16)


def _check_same(keys: torch.Tensor, *others: torch.Tensor) -> None:
    for other in others:
        if other.dtype != keys.dtype or other.shape[-1] != keys.shape[-1] or other.device.type != "cpu":
            raise IndexError(f"{other.dtype} of width {other.shape[-1]} for a pool of {keys.dtype} of width {keys.shape[-1]}")


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """With the numbers of a row side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
