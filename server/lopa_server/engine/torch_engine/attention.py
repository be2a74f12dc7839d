"""Attention for bfloat16 on a CPU: fused forward, plain matrix products where a gradient is wanted.

Torch's fused attention has a backward pass for bfloat16 on CPUs that is many times slower than the products it fuses
(measured here, 8 heads of 32, 140 positions: over half of a whole gradient step). Plain products use the CPU's bfloat16
units; scores of a micro-batch's short sequences fit the memory easily.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lopa_products_for_gradients"


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (b, heads, q, e) queries and (b, key-value heads, l, e) keys and values to (b, q, heads, e).

    attention_mask: boolean, True where a position may be read; None: causal over the whole length.
    """
    if not query.requires_grad:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def use_products_for_gradients(model: Any) -> None:
    """Make a model that uses torch's fused attention use this one instead."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
