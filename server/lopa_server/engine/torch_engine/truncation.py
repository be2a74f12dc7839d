"""Draws tokens from distributions that temperature, min_p, top_k and top_p have changed, for many rows at once.

Tokens exactly as likely as the last one that is kept are kept too: then no order among equals matters, and a row gives the
same token in any batch. Legend: k rows, c rows among them with a top_k or top_p, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lopa_server.engine.base import SamplingParams

HEAD = 1024
"""How many of the likeliest tokens are looked at first: sorting a whole vocabulary is rarely needed, and slow."""
PIECE = 512
"""Tokens whose weights are summed up together."""
LEAST_TEMPERATURE = 1e-20
"""Below this only the best token is left anyway, and a division could overflow."""


@dataclass(frozen=True)
class Cut:
    """The rows that keep only their likeliest tokens."""

    rows: torch.Tensor
    """(c,) places among the k."""
    top_k: torch.Tensor
    """(c,) int64; the vocabulary's size where all may stay."""
    top_p: torch.Tensor
    """(c,) float64; 1 keeps all."""
    head: int
    """Tokens to look at first: HEAD, or the largest top_k."""


@dataclass(frozen=True)
class Truncation:
    """How each of k rows is drawn."""

    temperature: torch.Tensor
    """(k, 1) float32, above 0."""
    min_p: torch.Tensor
    """(k, 1) float32: tokens less likely than this part of the likeliest are dropped; 0 drops none."""
    cut: Cut | None

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocabulary: int, device: torch.device) -> Truncation:
        """For rows with these parameters, every temperature above 0."""
        temperature = [max(one.temperature, LEAST_TEMPERATURE) for one in params]
        rows = [row for row, one in enumerate(params) if one.top_p < 1 or 0 < one.top_k < vocabulary]
        cut = None
        if rows:
            top_k = [params[row].top_k or vocabulary for row in rows]
            cut = Cut(
                torch.tensor(rows, device=device),
                torch.tensor(top_k, device=device),
                torch.tensor([params[row].top_p for row in rows], dtype=torch.float64, device=device),
                min(vocabulary, max(HEAD, *(one for one in top_k if one < vocabulary), 0)),
            )
        min_p = torch.tensor([one.min_p for one in params], device=device)
        return cls(torch.tensor(temperature, device=device)[:, None], min_p[:, None], cut)


def draw(logits: torch.Tensor, truncation: Truncation, numbers: torch.Tensor) -> torch.Tensor:
    """A token of each row: (k, v) logits, (k,) float64 uniform numbers in [0, 1) -> (k,) ids."""
    return _inverse(kept_weights(logits, truncation), numbers)


def kept_weights(logits: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    """(k, v) float32 probabilities after temperature, with 0 for what is dropped; the rest isn't scaled up again."""
    shifted = logits - logits.amax(dim=1, keepdim=True)
    weights = torch.softmax(shifted / truncation.temperature, dim=1)
    weights = weights.masked_fill(weights < truncation.min_p * weights.amax(dim=1, keepdim=True), 0)
    cut = truncation.cut
    if cut is not None:
        part = weights[cut.rows]
        weights[cut.rows] = part.masked_fill(part < _edges(part, cut)[:, None], 0)
    return weights


def _edges(weights: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Each row's smallest weight that is kept: (c,)."""
    size = weights.shape[1]
    edges, certain = _edges_within(weights, cut, cut.head)
    if cut.head < size and not certain.all():
        edges, _ = _edges_within(weights, cut, size)
    return edges


def _edges_within(weights: torch.Tensor, cut: Cut, looked_at: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The edges as the `looked_at` likeliest tokens tell them, and in which rows these were enough: (c,), (c,) bool."""
    whole = looked_at == weights.shape[1]
    head = weights.sort(dim=1, descending=True).values if whole else weights.topk(looked_at, dim=1).values
    limited = cut.top_k <= looked_at
    kth = head.gather(1, (cut.top_k.clamp(max=looked_at) - 1)[:, None])
    floor = torch.where(limited[:, None], kth, 0.0)
    total = weights.masked_fill(weights < floor, 0).sum(dim=1, dtype=torch.float64)
    sums = head.cumsum(dim=1, dtype=torch.float64)
    last = (sums - head < (cut.top_p * total)[:, None]).sum(dim=1) - 1
    by_mass = torch.where(cut.top_p < 1, head.gather(1, last.clamp(min=0)[:, None])[:, 0], 0.0)
    return torch.maximum(floor[:, 0], by_mass), limited | (last < looked_at - 1)


def _inverse(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Index at which each row's sum of weights passes its number times the whole: (k,).

    First which piece of the vocabulary, then which token in it: only sums of pieces are made of the whole row.
    """
    rows, size = weights.shape
    pieces = torch.nn.functional.pad(weights, (0, -size % PIECE)).unflatten(1, (-1, PIECE))
    sums = pieces.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    wanted = numbers[:, None] * sums[:, -1:]
    piece = _passing(sums, wanted)
    before = torch.where(piece > 0, sums.gather(1, (piece - 1).clamp(min=0)), 0.0)
    inner = pieces[torch.arange(rows, device=weights.device), piece[:, 0]].cumsum(dim=1, dtype=torch.float64)
    return (piece * PIECE + _passing(inner, wanted - before)).clamp(max=size - 1)[:, 0]


def _passing(sums: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """First index whose sum is above the wanted one; at the end of what rounding leaves, the last one that adds anything."""
    index = torch.searchsorted(sums, wanted, right=True)
    return torch.minimum(index, torch.searchsorted(sums, sums[:, -1:].contiguous()))
