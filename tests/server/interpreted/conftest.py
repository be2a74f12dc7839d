"""The interpreter's bfloat16 as GPUs compute it: rounded to the nearest, where the interpreter cuts off, and numbers in a product,
where the interpreter multiplies their bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@pytest.fixture(scope="session", autouse=True)
def _bfloat16() -> None:
    own_cast = InterpreterBuilder.cast_impl

    def cast(builder: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            return TensorHandle(_rounded(source.data), tl.bfloat16)
        return own_cast(builder, source, kind)

    def dot(_: Any, left: Any, right: Any, sums: Any, *_precision: Any) -> Any:
        product = np.matmul(_numbers(left), _numbers(right), dtype=np.float32) + sums.data
        return TensorHandle(product, sums.dtype.scalar)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_dot = dot


def _rounded(numbers: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bfloat16, of two that are as near the even one."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, nearest).astype(np.uint16)


def _numbers(handle: Any) -> np.ndarray:
    data = handle.data
    return (data.astype(np.uint32) << 16).view(np.float32) if data.dtype == np.uint16 else data
