"""Whole decode steps as CUDA graphs: a step's hundreds of kernels are started by one call, so that the GPU never waits for Python.

A graph repeats the very same work on the very same places in memory. So it is captured for a few batch sizes, and a step fills
the places of the smallest that holds it; rows that are left over write nothing and read nothing.
Legend: n decoding rows, h heads, t positions of a step, e head width, v vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lopa_server.engine.content import blocks_for
from lopa_server.engine.torch_engine.gpu.kernels import GpuKernels
from lopa_server.engine.torch_engine.kv_pool import KvPool
from lopa_server.engine.torch_engine.layout import Piece, padded_tables
from lopa_server.engine.torch_engine.paging import PagedRows, Slots

if TYPE_CHECKING:
    from lopa_server.engine.torch_engine.attention import Score
    from lopa_server.engine.torch_engine.loader import FoundationModel

Forward = Callable[[], torch.Tensor]
Record = Callable[[Forward], Forward]
"""From a pass to something that repeats it, into the same result. Passes are recorded largest first."""
IDS, POSITIONS, SLOTS, ENDS = range(4)
"""What is known of each row, in this order."""
NOTHING = ((IDS, 0), (POSITIONS, 0), (SLOTS, -1), (ENDS, 0))
"""Of a row that is left over."""


class NoGraphs(Exception):
    """This model's decode steps can't be captured; the message says why."""


@dataclass(frozen=True)
class StaticStep:
    """As `attention.PackedStep`, for rows that decode, with all that changes between steps in tensors."""

    pool: KvPool
    kernels: GpuKernels
    windows: Sequence[int]
    slots: torch.Tensor
    """(n,) int64."""
    tables: torch.Tensor
    """(n, blocks) int32."""
    ends: torch.Tensor
    """(n,) int32."""
    longest: int

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score: Score) -> torch.Tensor:
        """(1, h, n, e) queries, keys and values of the new positions to (1, n, h, e)."""
        held = self.pool.hold(layer, key[0], value[0])
        if not self.kernels.fit(*held):
            raise NoGraphs(f"keys {tuple(held[0].shape)} and values {tuple(held[1].shape)} don't fit the kernels")
        self.kernels.write_at(held, self.slots, key[0], value[0])
        return self.kernels.decode_at(held, self.tables, self.ends, self.longest, self.windows[layer], query[0], score)[None]


class DecodeGraphs:
    """The captured steps of one runner, for one thread."""

    def __init__(self, fm: FoundationModel, pool: KvPool, largest: int, record: Record) -> None:
        """Capture steps of up to `largest` rows; allocates the pool, which must have kernels for a GPU.

        Raises:
            NoGraphs: the model can't be captured. Or what the pass or `record` raises.
        """
        if not isinstance(pool.kernels, GpuKernels):
            raise NoGraphs("there are no kernels of ours for it")
        self._fm, self._pool, self._kernels = fm, pool, pool.kernels
        self._sizes = sizes_up_to(largest)
        rows, blocks = self._sizes[-1], blocks_for(fm.spec.context_length, pool.block_size)
        pinned = fm.device.type == "cuda"
        self._host = torch.zeros(len(NOTHING), rows, dtype=torch.int64, pin_memory=pinned)
        self._host_tables = torch.zeros(rows * blocks, dtype=torch.int32, pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None
        """What is in host memory is on the device: it may be filled again."""
        with torch.inference_mode():
            self._known = torch.zeros(len(NOTHING), rows, dtype=torch.int64, device=fm.device)
            self._tables = torch.zeros(rows, blocks, dtype=torch.int32, device=fm.device)
            self._places = torch.arange(rows, device=fm.device)
            """Kept, as all that a captured step reads must be: it knows addresses only."""
            self._fill(0)
            self._passes = {size: record(self._forward(size)) for size in reversed(self._sizes)}

    def __len__(self) -> int:
        """How many steps were captured."""
        return len(self._passes)

    def hold(self, pieces: Sequence[Piece]) -> bool:
        """Whether a step is one of these: a single position of each sequence, none of them a soft row."""
        if len(pieces) > self._sizes[-1]:
            return False
        return all(piece.count == 1 and not piece.soft for piece in pieces)

    @torch.inference_mode()
    def step(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Compute such a step. Logits after each position, (n, v) float32: a view that the next step overwrites.

        Raises:
            IndexError: a piece leads out of the pool.
        """
        pool, count = self._pool, len(pieces)
        tables, ends = padded_tables([piece.table for piece in pieces]), np.array([piece.end for piece in pieces])
        rows = PagedRows(tables, ends, pool.block_size, pool.blocks)
        last = rows.ends - 1
        slots = rows.tables[np.arange(count), last // pool.block_size] * pool.block_size + last % pool.block_size
        if self._copied is not None:
            self._copied.synchronize()
        host = self._host.numpy()
        host[IDS, :count] = [piece.content.ids[piece.start] for piece in pieces]
        host[POSITIONS, :count], host[SLOTS, :count], host[ENDS, :count] = last, Slots(slots, pool.slots).numbers, rows.ends
        self._fill(count)
        wide = rows.tables.shape[1]
        some = self._host_tables[: count * wide].view(count, wide)
        some.numpy()[:] = rows.tables
        self._tables[:count, :wide].copy_(some, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        size = next(size for size in self._sizes if size >= count)
        return self._passes[size]()[:count]

    def _fill(self, count: int) -> None:
        """What is known of the first `count` rows is in host memory; the others get nothing to do."""
        for kind, nothing in NOTHING:
            self._host[kind, count:] = nothing
        self._known.copy_(self._host, non_blocking=True)

    def _forward(self, size: int) -> Forward:
        fm, known = self._fm, self._known[:, :size]
        places = self._places[:size]

        def forward() -> torch.Tensor:
            ends = known[ENDS].to(torch.int32)
            tables, longest = self._tables[:size], fm.spec.context_length
            step = StaticStep(self._pool, self._kernels, fm.windows, known[SLOTS], tables, ends, longest)
            return fm.logits_at(
                places,
                inputs_embeds=fm.embed(known[IDS])[None],
                position_ids=known[POSITIONS][None],
                use_cache=False,
                paged_step=step,
            )

        return forward


class Capture:
    """Records passes as CUDA graphs, all in one pool of memory and on one stream: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, forward: Forward) -> Forward:
        """Run it, so that all is compiled and allocated, and again to see whether it waits for the GPU; then capture it.

        A pass that waits can't be captured, and the attempt would leave the allocator as if it still went on.

        Raises:
            RuntimeError: it waits, or does something else that a graph can't repeat.
        """
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            forward()
            with _waiting_is_an_error():
                forward()
        present.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.stream(present), recording:  # the present stream comes back where the capture fails, too
            result = forward()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def sizes_up_to(largest: int) -> list[int]:
    """Batch sizes to capture: close together, so that few rows are left over, and few, so that a start is quick."""
    sizes = [size for size in (1, 2, 4) if size < largest]
    size = 8
    while size < largest:
        sizes.append(size)
        size += 8 if size < 64 else 16 if size < 256 else 64
    return [*sizes, largest]
