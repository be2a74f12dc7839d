"""Likelihoods and soft-prompt gradients of pairs from many users, in one forward and backward pass.

What stands before the soft rows is computed without a gradient, into the pool, or is there already; everything behind it
is one batch, padded on the right: under causal attention nothing real reads what stands behind it. The FM's weights need
no gradient: the backward pass only carries it from the logits to the soft rows.
Legend: b pairs, t positions behind the prefix, n target tokens over the batch, d hidden size, v vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from lopa_server.engine.base import PairRequest, PairResult
from lopa_server.engine.content import Content
from lopa_server.engine.pair_queue import PairKind
from lopa_server.engine.torch_engine import checkpointing
from lopa_server.engine.torch_engine.attention import PairsStep
from lopa_server.engine.torch_engine.layout import Piece
from lopa_server.engine.torch_engine.loader import FoundationModel
from lopa_server.engine.torch_engine.runner import ModelRunner


@dataclass(frozen=True)
class PlacedPair:
    """A pair and where its prefix is. prefix 0: it is computed whole."""

    pair: PairRequest
    prefix: int = 0
    """Positions in the pool once the missing ones are computed; all of them before the soft rows."""
    cached: int = 0
    """Positions that are there already."""
    table: Sequence[int] = ()
    content: Content | None = None
    """What stands in the prefix."""

    @property
    def rest(self) -> int:
        """Positions read behind the prefix. The last target token is only predicted, never read."""
        return len(self.pair) - 1 - self.prefix


def run_pairs(
    fm: FoundationModel,
    runner: ModelRunner,
    kind: PairKind,
    pairs: Sequence[PlacedPair],
    pausing: contextlib.AbstractContextManager[object] | None = None,
) -> list[PairResult]:
    """Each pair's likelihood, and for GRADIENTS its gradient with respect to the pair's own soft rows, float32.

    pausing: entered once all prefixes are computed. Not before: others may find them in the pool as soon as their blocks are taken.
    """
    pieces = [
        Piece(placed.content, placed.table, placed.cached, placed.prefix - placed.cached)
        for placed in pairs
        if placed.content is not None and placed.cached < placed.prefix
    ]
    if pieces:
        runner.step(pieces, [])
    pausing = pausing or contextlib.nullcontext()
    if kind is PairKind.SCORE:
        with pausing, torch.inference_mode():
            losses = _losses(fm, runner, _embed(fm, pairs), pairs)
        return [PairResult(total, len(placed.pair.target)) for total, placed in zip(_sums(losses, pairs), pairs, strict=True)]
    with torch.no_grad():
        embeds = _embed(fm, pairs)
    embeds.requires_grad_()
    with pausing, _bounded(fm, embeds, max(placed.prefix for placed in pairs)):
        losses = _losses(fm, runner, embeds, pairs)
        (flowing,) = torch.autograd.grad(losses.sum(), embeds)
    gradient = flowing.float().cpu().numpy()
    results = []
    for row, (total, placed) in enumerate(zip(_sums(losses.detach(), pairs), pairs, strict=True)):
        start = len(placed.pair.input.before) - placed.prefix
        rows = gradient[row, start : start + placed.pair.input.rows].copy()
        results.append(PairResult(total, len(placed.pair.target), rows))
    return results


def _bounded(fm: FoundationModel, embeds: torch.Tensor, prefix: int) -> contextlib.AbstractContextManager[object]:
    """Checkpointing, if the backward pass would keep too much without it."""
    rows, width, _ = embeds.shape
    kept = checkpointing.activation_bytes(fm.model.config, rows=rows, width=width, prefix=prefix, item=embeds.element_size())
    if kept <= checkpointing.ACTIVATION_BYTES:
        return contextlib.nullcontext()
    return checkpointing.layers_computed_twice(fm.model)


def _embed(fm: FoundationModel, pairs: Sequence[PlacedPair]) -> torch.Tensor:
    """(b, t, d) of what stands behind the prefixes, padded with token 0."""
    ids = np.zeros((len(pairs), max(placed.rest for placed in pairs)), dtype=np.int64)
    for row, placed in enumerate(pairs):
        read = placed.pair.input
        whole = [*read.before, *[0] * read.rows, *read.after, *placed.pair.target[:-1]]
        ids[row, : placed.rest] = whole[placed.prefix :]
    embeds = fm.embed(torch.from_numpy(ids).to(fm.device))
    for row, placed in enumerate(pairs):
        if placed.pair.input.soft is not None:
            start = len(placed.pair.input.before) - placed.prefix
            embeds[row, start : start + placed.pair.input.rows] = torch.from_numpy(placed.pair.input.soft).to(fm.device, fm.dtype)
    return embeds


def _step(runner: ModelRunner, windows: Sequence[int], pairs: Sequence[PlacedPair], width: int) -> PairsStep:
    prefixes = np.array([placed.prefix for placed in pairs])
    longest = int(prefixes.max())
    if not longest:
        return PairsStep(runner.pool, windows, None, runner.layouts.causal(width))
    slots = runner.layouts.slots([placed.table or (0,) for placed in pairs], prefixes.tolist())
    new = prefixes[:, None] + np.arange(width)
    old = np.broadcast_to(np.arange(longest), (len(pairs), longest))
    key = np.concatenate([old, new], axis=1)
    readable = np.concatenate([old < prefixes[:, None], np.ones_like(new, dtype=bool)], axis=1)
    return PairsStep(runner.pool, windows, slots, runner.layouts.masks(new, key, readable))


def _losses(fm: FoundationModel, runner: ModelRunner, embeds: torch.Tensor, pairs: Sequence[PlacedPair]) -> torch.Tensor:
    """-ln p of every target token of every pair, in order: (n,) float32."""
    counts = [len(placed.pair.target) for placed in pairs]
    width = embeds.shape[1]
    ends = np.array([row * width + placed.rest for row, placed in enumerate(pairs)])
    places = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    targets = np.concatenate([np.array(placed.pair.target, dtype=np.int64) for placed in pairs])
    positions = np.array([placed.prefix for placed in pairs])[:, None] + np.arange(width)
    limit = fm.spec.context_length - 1
    logits = fm.logits_at(
        torch.from_numpy(places).to(fm.device),
        inputs_embeds=embeds,
        position_ids=torch.from_numpy(np.minimum(positions, limit)).to(fm.device),
        use_cache=False,
        paged_step=_step(runner, fm.windows, pairs, width),
    )
    return functional.cross_entropy(logits, torch.from_numpy(targets).to(fm.device), reduction="none")


def _sums(losses: torch.Tensor, pairs: Sequence[PlacedPair]) -> list[float]:
    """Sums by pair, added in double precision."""
    counts = np.array([len(placed.pair.target) for placed in pairs])
    starts = counts.cumsum() - counts
    return np.add.reduceat(losses.double().cpu().numpy(), starts).tolist()
