"""What the arrays of a kernel must have in common, on whichever device. Kernels trust what they get.

Legend: n rows in all, d their width; b sequences, h heads, t positions, e head width.
"""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16)


def check_alike(device: str, *arrays: torch.Tensor) -> None:
    """Raises IndexError unless all arrays have one shape and one dtype that kernels know, and are on a device of that type."""
    first = arrays[0]
    for array in arrays:
        if array.shape != first.shape or array.dtype != first.dtype or array.dtype not in DTYPES or array.device.type != device:
            raise IndexError(f"{array.dtype} {tuple(array.shape)} beside {first.dtype} {tuple(first.shape)} on {array.device}")


def check_weight(device: str, weight: torch.Tensor, rows: torch.Tensor) -> None:
    """Raises IndexError unless a (d,) weight goes with (..., d) rows."""
    if weight.shape != rows.shape[-1:] or weight.dtype != rows.dtype or not weight.is_contiguous() or weight.device.type != device:
        raise IndexError(f"norm of {rows.dtype} {tuple(rows.shape)} with a weight {weight.dtype} {tuple(weight.shape)}")


def check_turns(device: str, rows: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
    """Raises IndexError unless (b or 1, t, e) turns, e even, go with (b, h, t, e) rows."""
    batches, _, places, width = rows.shape
    shape = (1 if len(cosine) == 1 else batches, places, width)
    for array in (rows, cosine, sine):
        if array.dtype != rows.dtype or array.dtype not in DTYPES or array.device.type != device:
            raise IndexError(f"{rows.dtype} rows with turns {array.dtype}")
    if width % 2 or not cosine.shape == sine.shape == shape or not (cosine.is_contiguous() and sine.is_contiguous()):
        raise IndexError(f"{tuple(rows.shape)} rows with turns {tuple(cosine.shape)} and {tuple(sine.shape)}")


def shape_of(rows: torch.Tensor) -> tuple[int, int]:
    """n and d."""
    width = rows.shape[-1]
    return rows.numel() // max(1, width), width
