"""How kernels are told where in the pool a step writes and reads, and what they must be able to do.

Legend: n decoding rows, t positions of a step, h heads, k key-value heads, s slots, e head width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lopa_server.engine.torch_engine.attention import Score
    from lopa_server.engine.torch_engine.native.elementwise import Elementwise


HOST = torch.device("cpu")
KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Two arrays of one shape. A pool's: (blocks, k, positions of a block, e)."""


def positions_of(pool: KeysValues) -> int:
    """How many positions a pool has."""
    return pool[0].shape[0] * pool[0].shape[2]


@dataclass(frozen=True)
class Slots:
    """Where t new positions go in a pool of so many slots."""

    numbers: NDArray[np.int64]
    """(t,)."""
    total: int
    device: torch.device = HOST
    """Where the pool is."""

    def __post_init__(self) -> None:
        """Raises IndexError for a slot that the pool doesn't have."""
        numbers = self.numbers
        if numbers.dtype != np.int64 or numbers.ndim != 1 or not numbers.flags.c_contiguous:
            raise IndexError(f"slots {numbers.dtype} {numbers.shape}")
        if numbers.min(initial=0) < 0 or numbers.max(initial=0) >= self.total:
            raise IndexError(f"a slot is outside of 0..{self.total - 1}")

    @functools.cached_property
    def tensor(self) -> torch.Tensor:
        """(t,) int64 on the device."""
        return torch.from_numpy(self.numbers).to(self.device)


@dataclass(frozen=True)
class PagedRows:
    """Where n rows that decode read: each position before the row's end, through the row's block table."""

    tables: NDArray[np.int64]
    """(n, blocks) block numbers; anything behind a row's last block."""
    ends: NDArray[np.int64]
    """(n,) positions of each, the new one included."""
    block_size: int
    blocks: int
    """Of the pool, block 0 included."""
    device: torch.device = HOST
    """Where the pool is."""

    def __post_init__(self) -> None:
        """Raises IndexError for a table that leads out of the pool, or ends before its row does."""
        tables, ends = self.tables, self.ends
        if tables.dtype != np.int64 or ends.dtype != np.int64 or not tables.flags.c_contiguous or tables.shape[:1] != ends.shape:
            raise IndexError(f"block tables {tables.dtype} {tables.shape} don't go with ends {ends.dtype} {ends.shape}")
        if tables.min(initial=0) < 0 or tables.max(initial=0) >= self.blocks:
            raise IndexError(f"a block table names a block outside of 0..{self.blocks - 1}")
        if ends.min(initial=1) < 1 or ends.max(initial=1) > tables.shape[1] * self.block_size:
            raise IndexError(f"a row ends outside of its block table: 1..{tables.shape[1] * self.block_size}")

    @functools.cached_property
    def whole(self) -> NDArray[np.int64]:
        """(n,) where each row's reading begins under full attention."""
        return np.zeros_like(self.ends)

    def begins(self, window: int) -> NDArray[np.int64]:
        """(n,) where each row's reading begins. window: 0 for full attention."""
        return np.maximum(self.ends - window, 0) if window else self.whole

    @functools.cached_property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables and ends on the device, int32."""
        tables, ends = (torch.from_numpy(array.astype(np.int32)).to(self.device) for array in (self.tables, self.ends))
        return tables, ends


class RowFunctions(Protocol):
    """What stands between a model's products, one pass over memory each, over (..., d) rows. All raise IndexError where arrays
    don't go together."""

    def rms_norm(self, rows: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> torch.Tensor:
        """Rows over the root of their mean square, times offset + weight, (d,)."""

    def rms_norm_backward(
        self, flowing: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float
    ) -> torch.Tensor:
        """The gradient of the rows, from that of their norm."""

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """SiLU of the gate, times up."""

    def silu_mul_backward(self, flowing: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of gate and up, from that of `silu_mul`."""

    def rotate(self, rows: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """Rotary positions of (b, h, t, e) rows, e even: the first half of a row goes with the second. back: of gradients.

        cosine, sine: (b or 1, t, e), one after the other.
        """


class Kernels(Protocol):
    """Ours for a device: they read and write the pool in place."""

    @property
    def elementwise(self) -> RowFunctions:
        """What stands between products."""

    @property
    def prompts(self) -> Elementwise | None:
        """With a softmax for prompts, where that is faster than torch's fused attention."""

    def fit(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether a pool of such keys and values can be read and written."""

    def write(self, pool: KeysValues, slots: Slots, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put (k, t, e) keys and values into the slots of a pool that fits.

        Raises:
            IndexError: shapes or dtypes don't go together.
        """

    def decode(self, pool: KeysValues, rows: PagedRows, window: int, query: torch.Tensor, score: Score) -> torch.Tensor:
        """(h, n, e) queries, one position a row, to (n, h, e). score: what the model does to its scores.

        Raises:
            IndexError: shapes or dtypes don't go together.
        """
