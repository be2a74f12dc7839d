"""Lays pieces of many sequences out in one packed row, and says which slots and masks each group of them reads by.

Everything is computed once a step for all layers. Legend: n pieces, t positions in all, b pieces of a group, q new
positions of each (padded), l positions read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lopa_server.engine.content import Content
from lopa_server.engine.torch_engine.attention import DecodingRows, Group
from lopa_server.engine.torch_engine.kv_pool import KvPool
from lopa_server.engine.torch_engine.paging import Kernels, PagedRows

Int64 = NDArray[np.int64]
SIMILAR_COUNT = 0.75
"""Pieces share a group when the shorter has at least this part of the longer's new positions."""
SIMILAR_END = 0.5
"""And at least this part of what the longer one reads: the rest is read for nothing."""
SHARED_POSITIONS = 64
"""Positions in front that are read once for a group, at least."""
SHARED_COUNT = 16
"""New positions from which on a piece alone is worth a group of its own for that."""


@dataclass(frozen=True)
class Piece:
    """Positions start..start+count of a sequence, whose blocks are in `table`."""

    content: Content
    table: Sequence[int]
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def soft(self) -> bool:
        """Whether any of them is a soft row."""
        low, high = self.content.soft_within(self.start, self.end)
        return low < high


@dataclass(frozen=True)
class Layout:
    """The packed row."""

    order: list[int]
    """Which piece comes where, as indices into what was given."""
    ids: Int64
    """(t,) token ids, 0 where soft rows stand."""
    positions: Int64
    """(t,) place in its own sequence."""
    write: Int64
    """(t,) slot of each position."""
    first: Int64
    """(n,) where each piece, in packed order, begins."""
    groups: list[Group | DecodingRows]


class LayoutMaker:
    """Knows what all steps of an engine have in common."""

    def __init__(self, pool: KvPool, windows: Iterable[int], device: torch.device, dtype: torch.dtype) -> None:
        """windows: of the layers; 0 for full attention."""
        self._pool = pool
        self._block_size = pool.block_size
        self._windows = tuple(dict.fromkeys(windows))
        self._device, self._dtype = device, dtype
        self._on_cpu = device.type == "cpu"
        """Prefixes are shared there only: fused attention of a GPU needs no scores in memory."""

    def pack(self, pieces: Sequence[Piece]) -> Layout:
        """One row of all pieces, those of like shape side by side."""
        fronts = self._fronts(pieces)
        order = sorted(range(len(pieces)), key=lambda index: _shape(pieces[index], fronts[index]))
        ordered = [pieces[index] for index in order]
        counts = np.array([piece.count for piece in ordered])
        starts = np.array([piece.start for piece in ordered])
        first = counts.cumsum() - counts
        positions = np.arange(counts.sum()) + np.repeat(starts - first, counts)
        tables = padded_tables([piece.table for piece in ordered])
        row = np.repeat(np.arange(len(ordered)), counts)
        write = tables[row, positions // self._block_size] * self._block_size + positions % self._block_size
        ids = np.concatenate([np.frombuffer(piece.content.ids, dtype=np.int64)[piece.start : piece.end] for piece in ordered])
        groups: list[Group | DecodingRows] = []
        kernels, decoding = self._pool.kernels, 0
        if kernels is not None and counts[0] == 1:
            decoding = int((counts == 1).sum())
            groups.append(self._decoding(kernels, ordered[:decoding], tables[:decoding], first[:decoding]))
        groups += self._groups(ordered[decoding:], tables[decoding:], first[decoding:], [fronts[index] for index in order[decoding:]])
        return Layout(order, ids, positions, write, first, groups)

    def _decoding(self, kernels: Kernels, pieces: Sequence[Piece], tables: Int64, first: Int64) -> DecodingRows:
        rows = PagedRows(tables, np.array([piece.end for piece in pieces]), self._block_size, self._pool.blocks, self._device)
        return DecodingRows(0, rows, kernels, lambda: self._groups(pieces, tables, first, [0] * len(pieces)))

    def _groups(self, pieces: Sequence[Piece], tables: Int64, first: Int64, fronts: Sequence[int]) -> list[Group]:
        return [self._group(pieces[low:high], tables[low:high], int(first[low])) for low, high in _group_bounds(pieces, fronts)]

    def slots(self, tables: Sequence[Sequence[int]], ends: Sequence[int]) -> torch.Tensor:
        """(b * l,) slots of each table's positions up to its end, padded on the right with slot 0."""
        return self._tensor(self._slots(padded_tables(tables), np.array(ends)).ravel())

    def masks(self, query: Int64, key: Int64, readable: NDArray[np.bool_]) -> dict[int, torch.Tensor]:
        """Additive (b, 1, q, l) masks by window, 0 where a position may be read.

        query: (b, q), key: (b, l), the places in their own sequence; readable: (b, l), whether anything is there.
        """
        causal = (key[:, None] <= query[:, :, None]) & readable[:, None]
        masks = {}
        for window in self._windows:
            allowed = causal & (key[:, None] > query[:, :, None] - window) if window else causal
            masks[window] = self._additive(allowed)
        return masks

    def causal(self, count: int, *, explicit: bool = False) -> dict[int, torch.Tensor | None]:
        """Masks by window where nothing stands before `count` positions: none but for windows that they cross, unless `explicit`."""
        place = np.arange(count)[None]
        crossed = any(0 < window < count for window in self._windows)
        if not crossed and not explicit:
            return dict.fromkeys(self._windows)
        made = self.masks(place, place, np.ones((1, count), dtype=bool))
        return {window: made[window] if explicit or 0 < window < count else None for window in self._windows}

    def _group(self, pieces: Sequence[Piece], tables: Int64, start: int) -> Group:
        counts = np.array([piece.count for piece in pieces])
        width, total = int(counts.max()), int(counts.sum())
        padded = real = None
        if width * len(pieces) != total:
            column = np.arange(width)
            inside = column < counts[:, None]
            padded = self._tensor((np.where(inside, column, 0) + (counts.cumsum() - counts)[:, None]).ravel())
            real = self._tensor(np.flatnonzero(inside))
        starts = np.array([piece.start for piece in pieces])
        ends = starts + counts
        shared = self._shared(tables, starts, int(ends.max())) if width > 1 else 0
        own, offset = tables[:, shared:], shared * self._block_size
        slots, masks = None, self.causal(width, explicit=bool(shared))
        if width == 1 or starts.max() > offset:
            slots = self._tensor(self._slots(own, ends - offset).ravel())
            key = np.broadcast_to(np.arange(offset, int(ends.max())), (len(pieces), int(ends.max()) - offset))
            masks = {**self.masks(np.minimum(starts[:, None] + np.arange(width), ends[:, None] - 1), key, key < ends[:, None])}
        front = self._tensor(tables[0, :shared]) if shared else None
        return Group(start, start + total, len(pieces), padded, real, front, slots, masks)

    def _fronts(self, pieces: Sequence[Piece]) -> list[int]:
        """For each piece the first of the blocks that it reads together with others, or alone with many positions; 0: none of these."""
        if not self._on_cpu:
            return [0] * len(pieces)
        firsts = [piece.table[0] if piece.count > 1 and piece.start >= SHARED_POSITIONS else 0 for piece in pieces]
        often = Counter(firsts)
        return [first if often[first] > 1 or piece.count >= SHARED_COUNT else 0 for first, piece in zip(firsts, pieces, strict=True)]

    def _shared(self, tables: Int64, starts: Int64, end: int) -> int:
        """Blocks in front that all sequences have in common and none writes to; 0 where that is too little, or a window hides some."""
        whole = int(starts.min()) // self._block_size
        alike = (tables[:, :whole] == tables[0, :whole]).all(axis=0)
        count = whole if alike.all() else int(alike.argmin())
        enough = count * self._block_size >= SHARED_POSITIONS and not any(0 < window < end for window in self._windows)
        return count if enough and self._on_cpu else 0

    def _slots(self, tables: Int64, ends: Int64) -> Int64:
        place = np.arange(int(ends.max()))
        slots = tables[:, place // self._block_size] * self._block_size + place % self._block_size
        return np.where(place < ends[:, None], slots, 0)

    def _additive(self, allowed: NDArray[np.bool_]) -> torch.Tensor:
        mask = torch.from_numpy(np.where(allowed, np.float32(0), np.float32(-np.inf))[:, None])
        return mask.to(self._device, self._dtype)

    def _tensor(self, values: Int64) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)


def padded_tables(tables: Sequence[Sequence[int]]) -> Int64:
    """(b, blocks) padded with block 0."""
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = table
    return padded


def _shape(piece: Piece, front: int) -> tuple[bool, bool, int, int, int]:
    """Decoding first; of the others those that read nothing before them last; the long ones of a kind first."""
    return (piece.count > 1, piece.start == 0, front, -piece.count, -piece.end)


def _group_bounds(pieces: Sequence[Piece], fronts: Sequence[int]) -> list[tuple[int, int]]:
    """Where groups of ordered pieces begin and end."""
    bounds: list[tuple[int, int]] = []
    low = 0
    for index in range(1, len(pieces) + 1 if pieces else 0):
        if index == len(pieces) or fronts[low] != fronts[index] or not _alike(pieces[low], pieces[index]):
            bounds.append((low, index))
            low = index
    return bounds


def _alike(leader: Piece, piece: Piece) -> bool:
    if leader.count == 1 or piece.count == 1:
        return leader.count == piece.count and piece.end >= SIMILAR_END * leader.end
    if (leader.start == 0) != (piece.start == 0):
        return False
    return piece.count >= SIMILAR_COUNT * leader.count and SIMILAR_END * leader.end <= piece.end <= leader.end / SIMILAR_END
