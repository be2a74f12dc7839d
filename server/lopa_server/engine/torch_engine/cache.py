"""The key-value cache: one row per running request, written in place.

It plugs into transformers as a `Cache`, so the model's own attention code reads and writes it. Legend: b rows in this
step, n rows held, h key-value heads, q new positions, l positions read, e head width.

A value that isn't finite times a weight of zero is still not finite: what lies behind a row's own length must therefore
be zero, whoever used the row before. `clear` and `move` see to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

GRANULE = 64
"""Capacity grows in multiples of this many positions."""


@dataclass(frozen=True)
class DecodePlan:
    """One new position for each of rows 0..b-1."""

    rows: torch.Tensor
    """(b,) int64: 0..b-1."""
    positions: torch.Tensor
    """(b,) int64: where each row's new position goes."""
    length: int
    """l: the longest row, its new position included."""


@dataclass(frozen=True)
class PrefillPlan:
    """Several new positions for some rows, padded on the right."""

    rows: torch.Tensor
    """(b,) int64: cache row of each batch row."""
    past: int
    """Positions that were in the cache before, the longest over the batch; 0 when all rows are fresh."""
    batch_index: torch.Tensor
    """(tokens,) int64: batch row of each real new position."""
    offset_index: torch.Tensor
    """(tokens,) int64: its place among the new positions."""
    slot_index: torch.Tensor
    """(tokens,) int64: its cache row."""
    position_index: torch.Tensor
    """(tokens,) int64: its place in that row."""


class _Shape:
    """Rows and positions that every layer has room for."""

    def __init__(self) -> None:
        self.rows = 0
        self.positions = 0
        self.plan: DecodePlan | PrefillPlan | None = None


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (n, h, capacity, e)."""

    def __init__(self, shape: _Shape) -> None:
        super().__init__()
        self._shape = shape

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate; h and e are only known once the model has computed some."""
        self.keys, self.values = self._zeros(key_states), self._zeros(value_states)
        self.is_initialized = True

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(self._shape.rows, like.shape[1], self._shape.positions, like.shape[3])

    def grow(self) -> None:
        """Grow to what the shape asks for; what was there stays."""
        if self.keys is not None and self.keys.shape[::2] != (self._shape.rows, self._shape.positions):
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)

    def _grown(self, held: torch.Tensor) -> torch.Tensor:
        grown = self._zeros(held)
        grown[: held.shape[0], :, : held.shape[2]] = held
        return grown

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new (b, h, q, e) keys and values; give back all that attention reads, (b, h, l, e)."""
        if self.keys is None:
            self.lazy_initialization(key_states, value_states)
        plan = self._shape.plan
        if isinstance(plan, DecodePlan):
            return _decode(self.keys, key_states, plan), _decode(self.values, value_states, plan)
        if isinstance(plan, PrefillPlan):
            return _prefill(self.keys, key_states, plan), _prefill(self.values, value_states, plan)
        raise RuntimeError("the cache was used outside of a step")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: masks and positions are given explicitly wherever there is a past."""
        return 0

    def get_max_length(self) -> int:
        return -1


def _decode(held: torch.Tensor, new: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
    held[plan.rows, :, plan.positions] = new[:, :, 0]
    return held[: new.shape[0], :, : plan.length]


def _prefill(held: torch.Tensor, new: torch.Tensor, plan: PrefillPlan) -> torch.Tensor:
    past = held[plan.rows, :, : plan.past] if plan.past else None
    held[plan.slot_index, :, plan.position_index] = new[plan.batch_index, :, plan.offset_index]
    return new if past is None else torch.cat([past, new], dim=2)


class SlotCache(Cache):
    """All layers' rows, growing as needed and never beyond what is asked for."""

    def __init__(self) -> None:
        self._shape = _Shape()
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(self._shape))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for layer in self.layers for tensor in (layer.keys, layer.values) if tensor is not None)

    @property
    def bytes_per_position(self) -> int:
        """Bytes that one position of one row takes over all layers; 0 before the first step."""
        return self.nbytes // max(1, self._shape.rows * self._shape.positions)

    def reserve(self, rows: int, positions: int) -> None:
        """Make room for this many rows and positions. Grows at least by half, so that copying stays rare."""
        if rows > self._shape.rows:
            self._shape.rows = max(rows, self._shape.rows * 3 // 2)
        if positions > self._shape.positions:
            wanted = max(positions, self._shape.positions * 3 // 2)
            self._shape.positions = -(-wanted // GRANULE) * GRANULE
        for layer in self.layers:
            layer.grow()

    def begin(self, plan: DecodePlan | PrefillPlan) -> None:
        """The next forward pass follows this plan."""
        self._shape.plan = plan

    def end(self) -> None:
        self._shape.plan = None

    def move(self, source: int, target: int) -> None:
        """Copy a whole row over another, unused positions' zeros included."""
        for held in self._tensors(source, target):
            held[target] = held[source]

    def swap(self, first: int, second: int) -> None:
        for held in self._tensors(first, second):
            held[[first, second]] = held[[second, first]]

    def clear(self, row: int) -> None:
        """Zero a row that its request has left."""
        for held in self._tensors(row):
            held[row] = 0

    def _tensors(self, *rows: int) -> Iterator[torch.Tensor]:
        """All layers' keys and values. After a step that failed for want of memory some may not have these rows yet."""
        for layer in self.layers:
            if layer.keys is not None and max(rows) < len(layer.keys):
                yield from (layer.keys, layer.values)
