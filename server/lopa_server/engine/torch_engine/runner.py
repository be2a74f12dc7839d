"""The model runner: everything that touches tensors for generation. It knows rows and positions, no requests.

Legend: b rows in a step, q new positions, d hidden size, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lopa_server.engine.base import InputSequence
from lopa_server.engine.slots import Move, Swap
from lopa_server.engine.torch_engine.cache import DecodePlan, PrefillPlan, SlotCache
from lopa_server.engine.torch_engine.loader import FoundationModel

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class PreparedInput:
    """An input ready to be read in pieces. ids: (t,) with 0 where soft rows stand."""

    ids: Int64
    soft: torch.Tensor | None
    """(m, d) on the device, in the compute dtype."""
    offset: int
    """Where the soft rows begin."""


@dataclass(frozen=True)
class Piece:
    """Positions start..start+count of an input, for a row of the cache."""

    row: int
    input: PreparedInput
    start: int
    count: int


class ModelRunner:
    """Reads prompts and decodes, over a cache with one row per request."""

    def __init__(self, fm: FoundationModel) -> None:
        self._fm = fm
        self.cache = SlotCache()

    def prepare(self, sequence: InputSequence) -> PreparedInput:
        """Move an input's soft rows to the device."""
        return prepare(self._fm, sequence)

    @torch.inference_mode()
    def prefill(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Read a piece of each input. The logits after each piece's last position, (b, v) float32."""
        width = max(piece.count for piece in pieces)
        starts = [piece.start for piece in pieces]
        self.cache.reserve(max(piece.row for piece in pieces) + 1, max(piece.start + piece.count for piece in pieces))
        device = self._fm.device
        embeds = embed_pieces(self._fm, [(piece.input, piece.start, piece.count) for piece in pieces], width)
        first = torch.tensor(starts, device=device)[:, None]
        positions = first + torch.arange(width, device=device)
        past = max(starts)
        mask = self._prefill_mask(first, positions, past) if past else None
        self.cache.begin(_prefill_plan(pieces, past, device))
        ends = torch.tensor([piece.count - 1 for piece in pieces], device=device)
        return self._forward(embeds, positions, mask, ends)

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Read one token in each of rows 0..b-1, at the given positions. The logits after it, (b, v) float32."""
        device, length = self._fm.device, max(positions) + 1
        self.cache.reserve(len(tokens), length)
        place = torch.tensor(positions, device=device)
        query = place[:, None]
        key = torch.arange(length, device=device).expand(len(tokens), length)
        mask = self._fm.masks(query, key, key <= query)
        self.cache.begin(DecodePlan(torch.arange(len(tokens), device=device), place, length))
        embeds = self._fm.embed(torch.tensor(tokens, device=device)[:, None])
        return self._forward(embeds, query, mask, torch.zeros_like(place))

    @torch.inference_mode()
    def apply(self, change: Move | Swap) -> None:
        """Carry out what the slot table says."""
        if isinstance(change, Move):
            self.cache.move(change.source, change.target)
        else:
            self.cache.swap(change.first, change.second)

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """Zero a row, so that nothing of its request is left for the next one."""
        self.cache.clear(row)

    def _prefill_mask(self, first: torch.Tensor, positions: torch.Tensor, past: int) -> object:
        """The mask over [cached past, new positions] when some rows have a past."""
        old = torch.arange(past, device=positions.device).expand(len(first), past)
        key = torch.cat([old, positions], dim=1)
        readable = torch.cat([old < first, torch.ones_like(positions, dtype=torch.bool)], dim=1)
        return self._fm.masks(positions, key, readable)

    def _forward(self, embeds: torch.Tensor, positions: torch.Tensor, mask: object, ends: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(ends), device=ends.device)
        try:
            return self._fm.logits_at(
                rows, ends, inputs_embeds=embeds, position_ids=positions, attention_mask=mask, past_key_values=self.cache, use_cache=True
            )
        finally:
            self.cache.end()


def prepare(fm: FoundationModel, sequence: InputSequence, target: Sequence[int] = ()) -> PreparedInput:
    """An input with an optional target behind it, its soft rows on the device."""
    ids = np.array([*sequence.before, *[0] * sequence.rows, *sequence.after, *target], dtype=np.int64)
    soft = None if sequence.soft is None else torch.from_numpy(sequence.soft).to(fm.device, fm.dtype)
    return PreparedInput(ids, soft, len(sequence.before))


def embed_pieces(fm: FoundationModel, pieces: Sequence[tuple[PreparedInput, int, int]], width: int) -> torch.Tensor:
    """Input embeddings of (input, start, count) pieces, padded on the right with token 0: (b, width, d)."""
    ids = np.zeros((len(pieces), width), dtype=np.int64)
    for row, (source, start, count) in enumerate(pieces):
        ids[row, :count] = source.ids[start : start + count]
    embeds = fm.embed(torch.from_numpy(ids).to(fm.device))
    for row, (source, start, count) in enumerate(pieces):
        if source.soft is None:
            continue
        low, high = max(source.offset, start), min(source.offset + len(source.soft), start + count)
        if low < high:
            embeds[row, low - start : high - start] = source.soft[low - source.offset : high - source.offset]
    return embeds


def _prefill_plan(pieces: Sequence[Piece], past: int, device: torch.device) -> PrefillPlan:
    counts = np.array([piece.count for piece in pieces])
    batch = np.repeat(np.arange(len(pieces)), counts)
    offset = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    rows = np.array([piece.row for piece in pieces])
    starts = np.array([piece.start for piece in pieces])
    tensors = [torch.from_numpy(values).to(device) for values in (rows, batch, offset, rows[batch], offset + starts[batch])]
    return PrefillPlan(tensors[0], past, *tensors[1:])
