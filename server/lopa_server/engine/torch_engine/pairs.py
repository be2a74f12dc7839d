"""Likelihoods and soft-prompt gradients of pairs from many users, in one forward and backward pass.

Sequences are padded on the right: under causal attention nothing real reads what stands behind it, so no mask is needed
and attention runs in its fastest form. The FM's weights need no gradient: the backward pass only carries it from the
logits to the input rows. Legend: b pairs, t positions, n target tokens over the batch, d hidden size, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from lopa_server.engine.base import PairRequest, PairResult
from lopa_server.engine.torch_engine.loader import FoundationModel
from lopa_server.engine.torch_engine.runner import embed_pieces, prepare


def score_pairs(fm: FoundationModel, pairs: Sequence[PairRequest]) -> list[PairResult]:
    """Each pair's likelihood."""
    with torch.inference_mode():
        losses = _losses(fm, _embed(fm, pairs), pairs)
    return [PairResult(total, len(pair.target)) for total, pair in zip(_sums(losses, pairs), pairs, strict=True)]


def pair_gradients(fm: FoundationModel, pairs: Sequence[PairRequest]) -> list[PairResult]:
    """Each pair's likelihood and its gradient with respect to the pair's own soft rows, float32."""
    with torch.no_grad():
        embeds = _embed(fm, pairs)
    embeds.requires_grad_()
    losses = _losses(fm, embeds, pairs)
    (flowing,) = torch.autograd.grad(losses.sum(), embeds)
    gradient = flowing.float().cpu().numpy()
    results = []
    for row, (total, pair) in enumerate(zip(_sums(losses.detach(), pairs), pairs, strict=True)):
        start = len(pair.input.before)
        results.append(PairResult(total, len(pair.target), gradient[row, start : start + pair.input.rows].copy()))
    return results


def _embed(fm: FoundationModel, pairs: Sequence[PairRequest]) -> torch.Tensor:
    """(b, t, d). The last target token is only predicted, never read."""
    pieces = [(prepare(fm, pair.input, pair.target[:-1]), 0, len(pair) - 1) for pair in pairs]
    return embed_pieces(fm, pieces, max(count for _, _, count in pieces))


def _losses(fm: FoundationModel, embeds: torch.Tensor, pairs: Sequence[PairRequest]) -> torch.Tensor:
    """-ln p of every target token of every pair, in order: (n,) float32."""
    counts = [len(pair.target) for pair in pairs]
    rows = np.repeat(np.arange(len(pairs)), counts)
    places = np.concatenate([np.arange(len(pair.input) - 1, len(pair) - 1) for pair in pairs])
    targets = np.concatenate([np.array(pair.target, dtype=np.int64) for pair in pairs])
    logits = fm.logits_at(
        torch.from_numpy(rows).to(fm.device),
        torch.from_numpy(places).to(fm.device),
        inputs_embeds=embeds,
        position_ids=torch.arange(embeds.shape[1], device=fm.device)[None],
        use_cache=False,
    )
    return functional.cross_entropy(logits, torch.from_numpy(targets).to(fm.device), reduction="none")


def _sums(losses: torch.Tensor, pairs: Sequence[PairRequest]) -> list[float]:
    """Sums by pair, added in double precision."""
    counts = np.array([len(pair.target) for pair in pairs])
    starts = counts.cumsum() - counts
    return np.add.reduceat(losses.double().cpu().numpy(), starts).tolist()
