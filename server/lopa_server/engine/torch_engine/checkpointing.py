"""Bounded activation memory for gradients: when a micro-batch would keep too much, its layers are computed twice instead.

A micro-batch is bounded in positions, but one long pair alone may exceed that, and attention scores grow with the square
of its length. With checkpointing only one layer's activations are alive at a time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

ACTIVATION_BYTES = 1 << 30
"""Kept for one backward pass without checkpointing."""
WIDTHS = 24
"""Numbers of the hidden size that a layer keeps for each position, roughly: norms, projections, the activation's inputs."""


def activation_bytes(config: Any, *, rows: int, width: int, prefix: int, item: int) -> int:
    """What a backward pass keeps, estimated: rows sequences of `width` positions behind `prefix` others, `item` bytes a number."""
    heads = getattr(config, "num_attention_heads", 1)
    scores = 2 * heads * width * (prefix + width)
    return int(config.num_hidden_layers * rows * item * (WIDTHS * width * config.hidden_size + scores))


@contextlib.contextmanager
def layers_computed_twice(model: Any) -> Iterator[int]:
    """Within it, the model's layers keep only their inputs. How many there are. For the one thread that uses the model."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = functools.partial(_twice, layer.forward)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward


def _twice(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """A layer whose inputs alone are kept; as it is for streams that have their turn in between."""
    if torch.is_inference_mode_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named)
