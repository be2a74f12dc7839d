"""Attention of prompts by plain products, with or without positions in front that all sequences read, such as a system prompt.

Shared keys and values are read once for the whole group, and all queries meet them in one product a head, as in Hydragen
(arXiv 2402.05099). Scores of the shared and of a sequence's own positions stand side by side in one buffer, so that one
softmax spans both: nothing has to be merged afterwards.
Legend: b sequences, q new positions of each (padded), p shared positions, l positions of its own, k key-value heads,
g query heads that share one, e head width.
"""

from __future__ import annotations

import torch

from lopa_server.engine.torch_engine.native.elementwise import WIDEST, Elementwise

SCORE_BYTES = 1 << 24
"""Of scores in work at a time: bounds memory; fewer and larger products are faster."""

KeysValues = tuple[torch.Tensor, torch.Tensor]


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
        scores = _scores(folded[some], fronts, own_keys, width)
        weights = _weights(scores, own_keys.shape[1], width, mask, scaling, kernels if spans(behind) else None)
        _add_up(weights, fronts, own_values, width, out[some])
    return out.view(heads, size, width, head).transpose(0, 1)


def spans(positions: int) -> bool:
    """Whether kernels take a softmax over so many positions."""
    return positions <= WIDEST


def _scores(query: torch.Tensor, shared: KeysValues | None, keys: torch.Tensor, width: int) -> torch.Tensor:
    """(k, g * b * q, e) queries with (k, p, e) and (k * g * b, l, e) keys: (k, g * b * q, p + l), not scaled."""
    if shared is None:
        return torch.bmm(query.view(-1, width, query.shape[2]), keys.transpose(1, 2)).view(*query.shape[:2], -1)
    border = shared[0].shape[1]
    scores = query.new_empty(*query.shape[:2], border + keys.shape[1])
    torch.bmm(query, shared[0].transpose(1, 2), out=scores[..., :border])
    torch.bmm(query.view(-1, width, query.shape[2]), keys.transpose(1, 2), out=scores.view(-1, width, scores.shape[2])[..., border:])
    return scores


def _weights(
    scores: torch.Tensor, own: int, width: int, mask: torch.Tensor | None, scaling: float, kernels: Elementwise | None
) -> torch.Tensor:
    """Their softmax; the scores may be overwritten."""
    if kernels is not None:
        kernels.softmax(scores, own, width, scaling, mask)
        return scores
    scores.mul_(scaling)
    if mask is not None:
        scores.view(-1, width, scores.shape[2])[..., -own:].unflatten(0, (-1, len(mask))).add_(mask.transpose(0, 1))
    return torch.softmax(scores, dim=-1)


def _add_up(weights: torch.Tensor, shared: KeysValues | None, values: torch.Tensor, width: int, out: torch.Tensor) -> None:
    """Weights times (k, p, e) and (k * g * b, l, e) values, into (k, g * b * q, e)."""
    each, mine = weights.view(-1, width, weights.shape[2]), out.view(-1, width, out.shape[2])
    if shared is None:
        torch.bmm(each, values, out=mine)
        return
    border = shared[1].shape[1]
    torch.bmm(weights[..., :border], shared[1], out=out)
    mine.baddbmm_(each[..., border:], values)


def _for_each_query_head(tensor: torch.Tensor, queries: int) -> torch.Tensor:
    """(b, k, l, e) to (k * g * b, l, e)."""
    return tensor.transpose(0, 1)[:, None].expand(-1, queries, -1, -1, -1).flatten(0, 2)
