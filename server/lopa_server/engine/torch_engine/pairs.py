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
from lopa_server.engine.torch_engine.config import STEP_POSITIONS
from lopa_server.engine.torch_engine.layout import Piece
from lopa_server.engine.torch_engine.loader import FoundationModel
from lopa_server.engine.torch_engine.runner import ModelRunner

LOGIT_BYTES = {"cpu": 1 << 30, "cuda": 1 << 32}
"""For the logits of a micro-batch's targets at a time: with a large vocabulary a row takes megabytes, and a long target all memory."""
BYTES_A_LOGIT = 16
"""In the compute dtype and in float32, as log-probability, and on the way back."""

SLICE = STEP_POSITIONS
"""Positions of a prefix that are computed at a time, by device, as of streams: attention's memory grows with them times all before."""


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
    _compute_prefixes(runner, pairs, SLICE[fm.device.type])
    pausing = pausing or contextlib.nullcontext()
    if kind is PairKind.SCORE:
        with pausing, torch.inference_mode():
            losses, _ = _losses(fm, runner, _embed(fm, pairs), pairs)
        return [PairResult(total, len(placed.pair.target)) for total, placed in zip(_sums(losses, pairs), pairs, strict=True)]
    with torch.no_grad():
        embeds = _embed(fm, pairs)
    embeds.requires_grad_()
    with pausing, _bounded(fm, embeds, max(placed.prefix for placed in pairs)):
        losses, sources = _losses(fm, runner, embeds, pairs)
        (flowing,) = torch.autograd.grad(sources.outputs, embeds, sources.gradients)
    gradient = flowing.float().cpu().numpy()
    results = []
    for row, (total, placed) in enumerate(zip(_sums(losses, pairs), pairs, strict=True)):
        start = len(placed.pair.input.before) - placed.prefix
        rows = gradient[row, start : start + placed.pair.input.rows].copy()
        results.append(PairResult(total, len(placed.pair.target), rows))
    return results


def _compute_prefixes(runner: ModelRunner, pairs: Sequence[PlacedPair], size: int) -> None:
    """What of the prefixes isn't in the pool yet.

    In slices of `size` places, the same for all pairs: what one of them finds in another's blocks is there by then.
    """
    missing = [placed for placed in pairs if placed.cached < placed.prefix]
    for low in range(0, max((placed.prefix for placed in missing), default=0), size):
        pieces = [_piece(placed, max(placed.cached, low), min(placed.prefix, low + size)) for placed in missing]
        pieces = [piece for piece in pieces if piece.count > 0]
        if pieces:
            runner.step(pieces, [])


def _piece(placed: PlacedPair, start: int, stop: int) -> Piece:
    if placed.content is None:
        raise ValueError("a prefix without content")
    return Piece(placed.content, placed.table, start, stop - start)


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


@dataclass(frozen=True)
class Sources:
    """Where the way back to the soft rows begins."""

    outputs: torch.Tensor
    gradients: torch.Tensor | None
    """Of the losses' sum, with respect to `outputs`; None where these are that sum."""


def _losses(fm: FoundationModel, runner: ModelRunner, embeds: torch.Tensor, pairs: Sequence[PlacedPair]) -> tuple[torch.Tensor, Sources]:
    """-ln p of every target token of every pair, in order: (n,) float32, without a gradient; and where their gradient begins."""
    counts = [len(placed.pair.target) for placed in pairs]
    width = embeds.shape[1]
    ends = np.array([row * width + placed.rest for row, placed in enumerate(pairs)])
    places = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    targets = torch.from_numpy(np.concatenate([np.array(placed.pair.target, dtype=np.int64) for placed in pairs])).to(fm.device)
    positions = np.minimum(np.array([placed.prefix for placed in pairs])[:, None] + np.arange(width), fm.spec.context_length - 1)
    inputs = {
        "inputs_embeds": embeds,
        "position_ids": torch.from_numpy(positions).to(fm.device),
        "use_cache": False,
        "paged_step": _step(runner, fm.windows, pairs, width),
    }
    at_once = max(1, LOGIT_BYTES[fm.device.type] // (BYTES_A_LOGIT * fm.spec.vocab_size))
    wanted = torch.from_numpy(places).to(fm.device)
    if len(places) > at_once:
        return _losses_by_part(fm, runner, fm.states_at(wanted, **inputs), targets, at_once)
    losses = functional.cross_entropy(fm.logits_at(wanted, **inputs), targets, reduction="none")
    return losses.detach(), Sources(losses.sum(), None)


def _losses_by_part(
    fm: FoundationModel, runner: ModelRunner, states: torch.Tensor, targets: torch.Tensor, at_once: int
) -> tuple[torch.Tensor, Sources]:
    """As `_losses`, from (n, d) states: logits of `at_once` targets exist at a time, forward and back."""
    with torch.no_grad():
        smallest = {
            "inputs_embeds": fm.embed(torch.zeros((1, 1), dtype=torch.int64, device=fm.device)),
            "position_ids": torch.zeros((1, 1), dtype=torch.int64, device=fm.device),
            "use_cache": False,
            "paged_step": PairsStep(runner.pool, fm.windows, None, runner.layouts.causal(1)),
        }
    losses, flowing = torch.empty(len(targets), device=fm.device), torch.zeros_like(states)
    for low in range(0, len(targets), at_once):
        part = slice(low, low + at_once)
        rows = states[part].detach().requires_grad_(states.requires_grad)
        found = functional.cross_entropy(fm.logits_of(rows, **smallest), targets[part], reduction="none")
        losses[part] = found.detach()
        if states.requires_grad:
            (flowing[part],) = torch.autograd.grad(found.sum(), rows)
    return losses, Sources(states, flowing)


def _sums(losses: torch.Tensor, pairs: Sequence[PlacedPair]) -> list[float]:
    """Sums by pair, added in double precision."""
    counts = np.array([len(placed.pair.target) for placed in pairs])
    starts = counts.cumsum() - counts
    return np.add.reduceat(losses.double().cpu().numpy(), starts).tolist()
