"""What stands between a model's products, one pass over memory each. Every bound is checked here: the C code trusts what it gets.

Legend: n rows in all, d their width; b sequences, h heads, t positions, e head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from lopa_server.engine.torch_engine.rows import DTYPES, check_alike, check_turns, check_weight, shape_of

DEVICE = "cpu"
WIDEST = 8192
"""As in elementwise.c: positions that a softmax spans at most."""


class _Scores(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "front", "own", "queries", "masks")),
        ("scaling", ctypes.c_float),
    )


class Elementwise:
    """The library's functions of rows, (..., d) each, on CPUs, float32 or bfloat16. All raise IndexError where arrays don't go together."""

    def __init__(self, library: ctypes.CDLL) -> None:
        shape = [ctypes.c_int64, ctypes.c_int64]
        norm = [*shape, ctypes.c_float, ctypes.c_float]
        self._rms_norm = _function(library.lopa_rms_norm, 3, norm)
        self._rms_norm_backward = _function(library.lopa_rms_norm_backward, 4, norm)
        self._silu_mul = _function(library.lopa_silu_mul, 3, [*shape, ctypes.c_int64, ctypes.c_int64])
        self._silu_mul_backward = _function(library.lopa_silu_mul_backward, 5, shape)
        self._rotate = _function(library.lopa_rotate, 4, [ctypes.POINTER(ctypes.c_int64), ctypes.c_int32])
        self._softmax = _function(library.lopa_softmax, 3, [ctypes.POINTER(_Scores)])

    def rms_norm(self, rows: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> torch.Tensor:
        """Rows over the root of their mean square, times offset + weight, (d,)."""
        (rows,) = _alike(rows)
        check_weight(DEVICE, weight, rows)
        out = torch.empty_like(rows)
        self._rms_norm(*_places(out, rows, weight), *shape_of(rows), epsilon, offset, rows.dtype == torch.bfloat16)
        return out

    def rms_norm_backward(
        self, flowing: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float
    ) -> torch.Tensor:
        """The gradient of the rows, from that of their norm."""
        flowing, rows = _alike(flowing, rows)
        check_weight(DEVICE, weight, rows)
        out = torch.empty_like(rows)
        self._rms_norm_backward(*_places(out, flowing, rows, weight), *shape_of(rows), epsilon, offset, rows.dtype == torch.bfloat16)
        return out

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """SiLU of the gate, times up."""
        check_alike(DEVICE, gate, up)
        gate, up = _rows(gate), _rows(up)
        out = torch.empty(gate.shape, dtype=gate.dtype)
        strides = gate.stride(-2) if gate.dim() > 1 else 0, up.stride(-2) if up.dim() > 1 else 0
        self._silu_mul(*_places(out, gate, up), *shape_of(gate), *strides, gate.dtype == torch.bfloat16)
        return out

    def silu_mul_backward(self, flowing: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of gate and up, from that of `silu_mul`."""
        flowing, gate, up = _alike(flowing, gate, up)
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(gate)
        self._silu_mul_backward(*_places(of_gate, of_up, flowing, gate, up), *shape_of(gate), gate.dtype == torch.bfloat16)
        return of_gate, of_up

    def rotate(self, rows: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """Rotary positions of (b, h, t, e) rows, e even: the first half of a row goes with the second. back: of gradients.

        cosine, sine: (b or 1, t, e), one after the other.
        """
        check_turns(DEVICE, rows, cosine, sine)
        batches, heads, places, width = rows.shape
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        out = torch.empty_like(rows)
        turn = 0 if len(cosine) == 1 else places * width
        layout = (ctypes.c_int64 * 11)(batches, heads, places, width, *rows.stride()[:3], *out.stride()[:3], turn)
        self._rotate(*_places(out, rows, cosine, sine), layout, back, rows.dtype == torch.bfloat16)
        return out

    def softmax(self, shared: torch.Tensor | None, scores: torch.Tensor, queries: int, scaling: float, mask: torch.Tensor | None) -> None:
        """In place, over each row of (n, p) shared and (n, l) own scores together, times `scaling`. The n rows are `queries` of a sequence,
        then those of the next one. shared: None where p is 0.

        mask: additive (b or 1, 1, queries, l) for the own scores; None: there every query reads one more than the last, the first one 1.
        """
        rows, own = shape_of(scores)
        front = 0 if shared is None else shared.shape[-1]
        for array in (scores,) if shared is None else (scores, shared):
            if array.dtype != scores.dtype or array.dtype not in DTYPES or array.device.type != DEVICE or not array.is_contiguous():
                raise IndexError(f"softmax of {array.dtype} {tuple(array.shape)}, beside {scores.dtype}")
        if own + front > WIDEST or not own or (shared is not None and shared.numel() != rows * front):
            raise IndexError(f"softmax over {own} and {front} scores of {rows} rows")
        if not queries or rows % queries or (mask is None and queries > own):
            raise IndexError(f"{queries} queries over {own}, {rows} rows")
        masks, place = (1, None) if mask is None else (len(mask), mask.data_ptr())
        if mask is not None and (mask.shape != (masks, 1, queries, own) or not masks or not mask.is_contiguous()):
            raise IndexError(f"mask {tuple(mask.shape)} for {queries} queries over {own}")
        if mask is not None and (mask.dtype != scores.dtype or mask.device.type != DEVICE):
            raise IndexError(f"mask {mask.dtype} for scores {scores.dtype}")
        call = _Scores(rows, front, own, queries, masks, scaling)
        before = None if shared is None else shared.data_ptr()
        self._softmax(before, scores.data_ptr(), place, call, scores.dtype == torch.bfloat16)


def _function(function: Any, arrays: int, numbers: Sequence[Any]) -> Any:
    """With so many arrays, these numbers and whether all is bfloat16 as its arguments."""
    function.argtypes = [*[ctypes.c_void_p] * arrays, *numbers, ctypes.c_int32]
    function.restype = None
    return function


def _alike(*arrays: torch.Tensor) -> list[torch.Tensor]:
    """With the numbers side by side."""
    check_alike(DEVICE, *arrays)
    return [array.contiguous() for array in arrays]


def _rows(array: torch.Tensor) -> torch.Tensor:
    """With the numbers of a row side by side, and rows all equally far apart."""
    apart = array.stride(-1) == 1 and all(
        array.stride(axis) == array.shape[axis + 1] * array.stride(axis + 1) for axis in range(array.dim() - 2) if array.shape[axis] > 1
    )
    return array if apart else array.contiguous()


def _places(*arrays: torch.Tensor) -> list[int]:
    return [array.data_ptr() for array in arrays]
