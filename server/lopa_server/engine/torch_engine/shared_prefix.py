"""Attention of many sequences over positions that all of them read, such as a system prompt.

The shared keys and values are read once for the whole group, and all queries meet them in one product a head, as in
Hydragen (arXiv 2402.05099). Scores of the shared and of a sequence's own positions stand side by side in one buffer, so
that one softmax spans both: nothing has to be merged afterwards.
Legend: b sequences, q new positions of each (padded), p shared positions, l positions of its own, k key-value heads,
g query heads that share one, e head width.
"""

from __future__ import annotations

import torch

SCORE_BYTES = 1 << 24
"""Of scores in work at a time: bounds memory; fewer and larger products are faster."""

KeysValues = tuple[torch.Tensor, torch.Tensor]


def attend_behind(query: torch.Tensor, shared: KeysValues, own: KeysValues, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    """(b, k * g, q, e) queries over (k, p, e) shared and (b, k, l, e) own keys and values: as the queries.

    mask: additive (b or 1, 1, q, l) for the own part; every query reads all of the shared part.
    """
    size, heads, width, head = query.shape
    count, behind = shared[0].shape[0], shared[0].shape[1] + own[0].shape[2]
    folded = (query.transpose(0, 1) * scaling).reshape(count, -1, head)
    out = torch.empty_like(folded)
    at_once = max(1, SCORE_BYTES // (folded.shape[1] * behind * folded.element_size()))
    for low in range(0, count, at_once):
        some = slice(low, low + at_once)
        keys, values = (tensor[some] for tensor in shared)
        own_keys, own_values = (_for_each_query_head(tensor[:, some], heads // count) for tensor in own)
        _attend(folded[some], (keys, values), (own_keys, own_values), mask, out[some])
    return out.view(heads, size, width, head).transpose(0, 1)


def _attend(query: torch.Tensor, shared: KeysValues, own: KeysValues, mask: torch.Tensor, out: torch.Tensor) -> None:
    """(k, g * b * q, e) queries over (k, p, e) and (k * g * b, l, e), into `out`."""
    width, border = mask.shape[2], shared[0].shape[1]
    scores = query.new_empty(*query.shape[:2], border + own[0].shape[1])
    torch.bmm(query, shared[0].transpose(1, 2), out=scores[..., :border])
    mine = scores.view(-1, width, scores.shape[2])[..., border:]
    torch.bmm(query.view(-1, width, query.shape[2]), own[0].transpose(1, 2), out=mine)
    mine.unflatten(0, (-1, len(mask))).add_(mask.transpose(0, 1))
    weights = torch.softmax(scores, dim=-1)
    torch.bmm(weights[..., :border], shared[1], out=out)
    out.view(-1, width, out.shape[2]).baddbmm_(weights.view(-1, width, scores.shape[2])[..., border:], own[1])


def _for_each_query_head(tensor: torch.Tensor, queries: int) -> torch.Tensor:
    """(b, k, l, e) to (k * g * b, l, e)."""
    return tensor.transpose(0, 1)[:, None].expand(-1, queries, -1, -1, -1).flatten(0, 2)
