"""The kernels as functions of tensors on CUDA. Every bound is checked here: the device's code trusts what it gets.

Legend: n decoding rows, t positions of a step, h heads, k key-value heads, s slots, e head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from lopa_server.engine.torch_engine.gpu import device_code
from lopa_server.engine.torch_engine.gpu.elementwise import GpuElementwise
from lopa_server.engine.torch_engine.paging import KeysValues, PagedRows, Slots, positions_of
from lopa_server.engine.torch_engine.rows import DTYPES

if TYPE_CHECKING:
    from lopa_server.engine.torch_engine.attention import Score

MAX_WIDTH = 256
"""Of a head."""
SMALLEST_DOT, MOST_HEADS = 16, 32
"""Rows and columns that a tensor core's product takes at least; query heads, of those that share keys, which a program answers."""
MOST_PLACES, TILE_BYTES = 64, 1 << 14
"""Positions read at a time, and how many bytes of keys these are at most: keys and values of two such tiles are in shared memory."""
MAX_PARTS = 16
"""Programs that share a long row's positions."""


class GpuKernels:
    """For a pool on CUDA."""

    prompts = None
    """torch's fused attention is the fastest there."""

    def __init__(self, device: torch.device, processors: int) -> None:
        """processors: streaming multiprocessors, all of which a step should keep busy."""
        self._device, self._processors = device.type, processors
        self.elementwise = GpuElementwise(device.type)

    def fit(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether a pool of such keys and values can be read and written."""
        return keys.shape == values.shape and 0 < keys.shape[-1] <= MAX_WIDTH and keys.dtype == values.dtype in DTYPES

    def write(self, pool: KeysValues, slots: Slots, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put (k, t, e) keys and values into the slots of a pool that fits.

        Raises:
            IndexError: shapes or dtypes don't go together.
        """
        if slots.total != positions_of(pool):
            raise IndexError(f"slots of a pool of {slots.total} for one of {positions_of(pool)}")
        self.write_at(pool, slots.tensor, keys, values)

    def write_at(self, pool: KeysValues, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The same with (t,) int64 slots on the device, which were checked before they went there. Below zero: it goes nowhere."""
        heads, count, width = keys.shape
        if keys.shape != values.shape or slots.shape != (count,) or slots.dtype != torch.int64 or pool[0].shape[1] != heads:
            raise IndexError(f"keys {tuple(keys.shape)}, values {tuple(values.shape)} for slots {slots.dtype} {tuple(slots.shape)}")
        self._check_same(pool[0], keys, values)
        keys, values = _rows(keys), _rows(values)
        strides = (*keys.stride()[:2], *values.stride()[:2], *pool[0].stride()[:2])
        lanes = triton.next_power_of_2(width)
        if count:
            device_code.write_slots[(count, heads)](
                *pool, keys, values, slots, *strides, BLOCK_SIZE=pool[0].shape[2], WIDTH=width, LANES=lanes
            )

    def decode(self, pool: KeysValues, rows: PagedRows, window: int, query: torch.Tensor, score: Score) -> torch.Tensor:
        """(h, n, e) queries, one position a row, to (n, h, e). score: what the model does to its scores.

        Raises:
            IndexError: shapes or dtypes don't go together.
        """
        if pool[0].shape[::2] != (rows.blocks, rows.block_size):
            raise IndexError(f"rows over a pool of {rows.blocks} blocks of {rows.block_size} for one {tuple(pool[0].shape)}")
        return self.decode_at(pool, *rows.tensors, int(rows.ends.max()), window, query, score)

    def decode_at(
        self,
        pool: KeysValues,
        tables: torch.Tensor,
        ends: torch.Tensor,
        longest: int,
        window: int,
        query: torch.Tensor,
        score: Score,
    ) -> torch.Tensor:
        """The same with (n, blocks) tables and (n,) ends on the device, int32, which were checked before they went there.

        longest: what no end is beyond. A row that ends at 0 reads nothing, and gets zeros.
        """
        heads, count, width = query.shape
        kv_heads = pool[0].shape[1]
        sharing = heads // kv_heads
        if heads % kv_heads:
            raise IndexError(f"{heads} query heads over {kv_heads}")
        if tables.shape[:1] != (count,) or ends.shape != (count,) or tables.stride(1) != 1 or not ends.is_contiguous():
            raise IndexError(f"queries {tuple(query.shape)} for tables {tuple(tables.shape)} and ends {tuple(ends.shape)}")
        self._check_same(pool[0], query)
        query = _rows(query)
        sinks = None if score.sinks is None else score.sinks.float().contiguous()
        if sinks is not None and sinks.shape != (heads,):
            raise IndexError(f"{tuple(sinks.shape)} attention sinks for {heads} heads")
        out = torch.empty(count, heads, width, dtype=query.dtype, device=query.device)
        tile = min(MOST_HEADS, max(SMALLEST_DOT, triton.next_power_of_2(sharing)))
        programs = kv_heads * triton.cdiv(sharing, tile)
        parts = self._parts(count * programs, longest)
        partial = out if parts == 1 else torch.empty(count, heads, parts, width + 2, dtype=torch.float32, device=query.device)
        lanes = max(SMALLEST_DOT, triton.next_power_of_2(width))
        some_sinks = ends if sinks is None else sinks  # a place that nothing reads
        places = max(SMALLEST_DOT, min(MOST_PLACES, TILE_BYTES // (lanes * query.element_size())))
        shape = {"WIDTH": width, "LANES": lanes, "PARTS": parts, "SINKS": sinks is not None}
        device_code.decode[(count, programs, parts)](
            out,
            partial,
            query,
            *pool,
            tables,
            ends,
            some_sinks,
            *query.stride()[:2],
            pool[0].stride(0),
            pool[0].stride(1),
            tables.stride(0),
            score.scaling,
            score.softcap or 1.0,
            window,
            HEADS=heads,
            BLOCK_SIZE=pool[0].shape[2],
            SHARING=sharing,
            HEADS_TILE=tile,
            PLACES=places,
            CAPPED=score.softcap is not None,
            num_stages=2,
            **shape,
        )
        if parts > 1:
            device_code.join[(count, heads)](out, partial, some_sinks, **shape)
        return out

    def _parts(self, programs: int, longest: int) -> int:
        """Into how many programs a row's positions are divided: enough for all processors, none for fewer than MOST_PLACES."""
        wanted = triton.next_power_of_2(triton.cdiv(2 * self._processors, programs))
        return int(max(1, min(wanted, MAX_PARTS, triton.next_power_of_2(triton.cdiv(longest, MOST_PLACES)))))

    def _check_same(self, keys: torch.Tensor, *others: torch.Tensor) -> None:
        for other in others:
            if other.dtype != keys.dtype or other.shape[-1] != keys.shape[-1] or other.device.type != self._device:
                raise IndexError(f"{other.dtype} of width {other.shape[-1]} for a pool of {keys.dtype} of width {keys.shape[-1]}")


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """With the numbers of a row side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
