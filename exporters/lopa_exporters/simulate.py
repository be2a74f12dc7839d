"""One user's tuning in ordinary torch, with the device's settings, split, order and rounding, without a device or a server.

It is what split tuning is measured against, and the quick way to try hyper-parameters.
Legend: n rows, h encoder width, m soft-prompt rows, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from lopa.alignment import share, shared_tokens, turned
from lopa.examples import batch
from lopa.tuning import TuneConfig
from torch import Tensor, nn

from lopa_exporters.data import Dataset, Indices
from lopa_exporters.frozen import FrozenModel
from lopa_exporters.lopa import LoPA, Tensors, aligned, reads, soft_prompt


@dataclass(frozen=True)
class Scores:
    """Over some rows: mean NLL in nats per target token, and the part of targets that greedy decoding gives exactly."""

    nll: float
    accuracy: float


@dataclass(frozen=True)
class Tuned:
    """The result of one run."""

    last: Tensors
    """Personal tensors after the last step, float32."""
    best: Tensors
    """Those with the lowest validation NLL, rounded as at rest; the start values if nothing was better."""
    best_step: int
    losses: tuple[float, ...]
    """A step each: NLL per target token of its batch, before the step."""
    validation: tuple[tuple[int, float], ...]
    """(steps done, NLL per target token)."""


def aligned_start(lopa: LoPA, x: Tensor, answers: Sequence[Sequence[int]]) -> LoPA:
    """The aligned tensors at what tells a user's own answers apart, as a device begins (`lopa.alignment`); soft prompts stay as they are.

    x: (n, h) features of the training examples; all are looked at, by a device `ALIGNED_BY` at most. answers: their tokens, n lists.
    """
    found, common = reads(lopa.config, lopa.shared, x), shared_tokens(answers)
    part, spread = share(len(answers)), lopa.config.spread
    new = {name: part * torch.from_numpy(turned(lopa.start[name].numpy(), found[name].numpy(), common, spread)) for name in aligned(lopa)}
    return replace(lopa, start={**lopa.start, **new})


def evaluate(
    fm: FrozenModel, dataset: Dataset, rows: Sequence[int] | Indices, lopa: LoPA | None, personal: Mapping[str, Tensor] | None = None
) -> Scores:
    """Score rows with personal tensors, with the start values when there are none, or with the plain model when `lopa` is None."""
    with torch.inference_mode():
        soft = None if lopa is None else lopa(dataset.features[list(rows)], personal)
        losses = fm.losses(soft, dataset.pairs(rows))
    return Scores(losses.mean().item(), losses.exact.float().mean().item())


def paced_adamw(parameters: Mapping[str, Tensor], paces: Mapping[str, float], weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW for `set_rate`. paces: part of the learning rate, of the parameters that have less than all of it."""
    groups = [{"params": [parameter], "pace": paces.get(name, 1.0)} for name, parameter in parameters.items()]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step, each parameter at its own pace."""
    for group in optimizer.param_groups:
        group["lr"] = group["pace"] * rate


def tune_personal(
    fm: FrozenModel,
    dataset: Dataset,
    lopa: LoPA,
    config: TuneConfig,
    training: Sequence[int] | Indices,
    validation: Sequence[int] | Indices = (),
    at_rest: torch.dtype = torch.float16,
) -> Tuned:
    """Tune from the start values on rows `training`, as `lopa.tuner` does it; without validation rows, `best` is `last`, rounded.

    at_rest: dtype of the personal tensors on disk; the start is rounded to it too.
    """
    rows = np.asarray(training)
    parameters = {name: tensor.to(at_rest).float().clone().requires_grad_() for name, tensor in lopa.start.items()}
    optimizer = paced_adamw(parameters, dict.fromkeys(aligned(lopa), share(len(rows))), config.weight_decay)
    losses: list[float] = []
    curve: list[tuple[int, float]] = []
    best, best_step, lowest = _rounded(parameters, at_rest), 0, float("inf")
    if len(validation):
        lowest = evaluate(fm, dataset, validation, lopa, best).nll
        curve.append((0, lowest))
    for step in range(1, config.steps + 1):
        set_rate(optimizer, config.rate(step))
        picked = rows[batch(len(rows), min(config.batch_size, len(rows)), step, config.seed)]
        losses.append(_step(fm, dataset, lopa, parameters, optimizer, picked, config.clip))
        if len(validation) and (step % config.validate_every == 0 or step == config.steps):
            rounded = _rounded(parameters, at_rest)
            curve.append((step, evaluate(fm, dataset, validation, lopa, rounded).nll))
            if curve[-1][1] < lowest:
                best, best_step, lowest = rounded, *curve[-1]
    if not len(validation):
        best, best_step = _rounded(parameters, at_rest), config.steps
    last = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return Tuned(last, best, best_step, tuple(losses), tuple(curve))


def _step(
    fm: FrozenModel, dataset: Dataset, lopa: LoPA, parameters: Tensors, optimizer: torch.optim.Optimizer, rows: Indices, clip: float
) -> float:
    """One step on the mean over the batch's target tokens; returns that mean before it."""
    soft = soft_prompt(lopa.config, lopa.shared, parameters, dataset.features[rows])
    losses = fm.losses(soft, dataset.pairs(rows))
    mean = losses.mean()
    optimizer.zero_grad()
    mean.backward()
    nn.utils.clip_grad_norm_(parameters.values(), clip)
    optimizer.step()
    return mean.item()


def _rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
    return {name: tensor.detach().to(dtype).float().clone() for name, tensor in tensors.items()}
