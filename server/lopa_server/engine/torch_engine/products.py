"""Attention of prompts by plain products, with or without positions in front that all sequences read, such as a system prompt.

Shared keys and values are read once for the whole group, and all queries meet them in one product a head, as in Hydragen
(arXiv 2402.05099). One softmax spans the scores of the shared and of a sequence's own positions: nothing has to be merged
afterwards.
Legend: b sequences, q new positions of each (padded), p shared positions, l positions of its own, k key-value heads,
g query heads that share one, e head width.
"""

from __future__ import annotations

import torch

from lopa_server.engine.torch_engine.native.elementwise import WIDEST, Elementwise
from lopa_server.engine.torch_engine.paging import KeysValues

SCORE_BYTES = 1 << 24
"""Of scores in work at a time: bounds memory; fewer and larger products are faster."""


def attend(
    query: torch.Tensor,
    shared: KeysValues | None,
    own: KeysValues,
    mask: torch.Tensor | None,
    scaling: float,
    kernels: Elementwise | None = None,
) -> torch.Tensor:
    """(b, k * g, q, e) queries over (k, p, e) shared and (b, k, l, e) own keys and values: as the queries.

    mask: additive (b or 1, 1, q, l) for the own part; every query reads all of the shared part. None, with kernels that
    `span` the scores: causal order.
    """
    size, heads, width, head = query.shape
    count, behind = own[0].shape[1], own[0].shape[2] + (0 if shared is None else shared[0].shape[1])
    folded = query.transpose(0, 1).reshape(count, -1, head).contiguous()
    out = torch.empty_like(folded)
    at_once = max(1, SCORE_BYTES // (folded.shape[1] * behind * folded.element_size()))
    for low in range(0, count, at_once):
        some = slice(low, low + at_once)
        fronts = None if shared is None else (shared[0][some], shared[1][some])
        own_keys, own_values = (_for_each_query_head(tensor[:, some], heads // count) for tensor in own)
        rows = folded[some]
        scores = torch.bmm(rows.view(-1, width, head), own_keys.transpose(1, 2))
        before = None if fronts is None else torch.bmm(rows, fronts[0].transpose(1, 2))
        before, weights = _weights(before, scores, mask, scaling, kernels if spans(behind) else None)
        mine = out[some].view(-1, width, head)
        if fronts is None or before is None:
            torch.bmm(weights, own_values, out=mine)
        else:
            torch.bmm(before, fronts[1], out=out[some])
            mine.baddbmm_(weights, own_values)
    return out.view(heads, size, width, head).transpose(0, 1)


def spans(positions: int) -> bool:
    """Whether kernels take a softmax over so many positions."""
    return positions <= WIDEST


def _weights(
    shared: torch.Tensor | None, scores: torch.Tensor, mask: torch.Tensor | None, scaling: float, kernels: Elementwise | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The softmax over (k, g * b * q, p) shared and (k * g * b, q, l) own scores together, each part's; they may be overwritten."""
    if kernels is not None:
        kernels.softmax(shared, scores, scores.shape[1], scaling, mask)
        return shared, scores
    scores.mul_(scaling)
    if mask is not None:
        scores.unflatten(0, (-1, len(mask))).add_(mask.transpose(0, 1))
    if shared is None:
        return None, torch.softmax(scores, dim=-1)
    border = shared.shape[2]
    both = torch.softmax(torch.cat([shared.mul_(scaling).view(len(scores), -1, border), scores], dim=-1), dim=-1)
    return both[..., :border].reshape(shared.shape), both[..., border:]


def _for_each_query_head(tensor: torch.Tensor, queries: int) -> torch.Tensor:
    """(b, k, l, e) to (k * g * b, l, e)."""
    return tensor.transpose(0, 1)[:, None].expand(-1, queries, -1, -1, -1).flatten(0, 2)
