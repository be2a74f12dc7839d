"""One step of AdamW in plain operators, which a graph can hold and torch.func can batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""torch.optim.AdamW's defaults."""
EXACT_SCALE = 2.0**14
SMALL = 1 << 16
"""Numbers of a tensor for which calling an operator costs more than copying."""


class AdamFactors(NamedTuple):
    """What a step of AdamW needs besides tensors and gradients: scalars, or tensors that broadcast against them."""

    stride: Tensor
    """Learning rate over the first moment's bias correction, times EXACT_SCALE."""
    keep: Tensor
    """What decoupled weight decay leaves of a parameter."""
    correction: Tensor
    """The second moment's bias correction."""


def adam_factors(learning_rate: Tensor, weight_decay: Tensor, step: Tensor) -> AdamFactors:
    """For a step counted from 1."""
    stride = EXACT_SCALE * learning_rate / bias_correction(BETA1, step)
    return AdamFactors(stride, 1 - learning_rate * weight_decay, bias_correction(BETA2, step))


def adamw(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, factors: AdamFactors) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW (Loshchilov and Hutter 2019; torch.optim.AdamW): new parameter, new exp_avg, new exp_avg_sq."""
    first = BETA1 * first + (1 - BETA1) * gradient
    second = BETA2 * second + (1 - BETA2) * gradient * gradient
    # The graph optimizer takes `+ 1e-8` for an addition of zero and drops it; so both sides of the fraction are scaled by a power of two.
    denominator = EXACT_SCALE * (second / factors.correction).sqrt() + EXACT_SCALE * EPSILON
    return factors.keep * parameter - factors.stride * first / denominator, first, second


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta^step in float32 without cancellation: with a = -step ln(beta), 1 - e^-a = 2 tanh(a/2) / (1 + tanh(a/2)).

    Taken literally, 1 - 0.999^1 has only four right digits in float32.
    """
    half = torch.tanh(step * (-0.5 * math.log(beta)))
    return 2 * half / (1 + half)


# AdamW is elementwise, and its cost is that of calling operators: small tensors go through them together, as one. In one axis, because
# ONNX Runtime takes thirty times as long for a scalar and a tensor whose last axis has size 1.


def groups(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the small tensors, all together, and of each other one."""
    small = [name for name, tensor in tensors.items() if tensor.numel() <= SMALL]
    return [*([small] if small else []), *([name] for name in tensors if name not in small)]


def joined(tensors: Mapping[str, Tensor], group: Sequence[str]) -> Tensor:
    """These tensors' numbers in one axis."""
    flat = [tensors[name].flatten() for name in group]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def parted(flat: Tensor, like: Mapping[str, Tensor], group: Sequence[str]) -> list[Tensor]:
    """The inverse of `joined`."""
    parts = flat.split([like[name].numel() for name in group])
    return [part.reshape(like[name].shape) for part, name in zip(parts, group, strict=True)]
