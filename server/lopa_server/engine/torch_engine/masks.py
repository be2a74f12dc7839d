"""Attention masks for steps that have a past. Without one, transformers makes its own.

Legend: b rows, q new positions, l positions read. True (or 0 in an additive mask) means: may be attended to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lopa_server.engine.base import UnsupportedModel

FULL, SLIDING = "full_attention", "sliding_attention"


class MaskMaker:
    """Builds what a model wants as `attention_mask`: one tensor, or one for each kind of layer that it mixes."""

    def __init__(self, config: Any, *, additive: torch.dtype | None) -> None:
        """additive: the dtype of additive masks (eager attention), or None for boolean ones (SDPA).

        Raises:
            UnsupportedModel: a layer is neither full nor sliding-window attention.
        """
        self._additive = additive
        self._window: int = getattr(config, "sliding_window", None) or 0
        self._kinds = _layer_kinds(config, self._window)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, readable: torch.Tensor) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """The mask over positions read.

        Args:
            query: (b, q) int64, each new position's place in its own sequence.
            key: (b, l) int64, each read position's place in its own sequence.
            readable: (b, l) bool, False where a read position holds nothing.
        """
        causal = (key[:, None] <= query[:, :, None]) & readable[:, None]
        masks = {}
        for kind in self._kinds:
            allowed = causal
            if kind == SLIDING:
                allowed = causal & (key[:, None] > query[:, :, None] - self._window)
            masks[kind] = self._finish(allowed[:, None])
        return masks if len(masks) > 1 else masks[self._kinds[0]]

    def _finish(self, allowed: torch.Tensor) -> torch.Tensor:
        if self._additive is None:
            return allowed
        mask = torch.zeros(allowed.shape, dtype=self._additive, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(self._additive).min)


def _layer_kinds(config: Any, window: int) -> Sequence[str]:
    kinds = getattr(config, "layer_types", None) or [SLIDING if window else FULL]
    strange = sorted(set(kinds) - {FULL, SLIDING})
    if strange:
        raise UnsupportedModel(f"{config.model_type}: layers of kind {', '.join(strange)} are not supported by the torch engine")
    if SLIDING in kinds and not window:
        raise UnsupportedModel(f"{config.model_type}: sliding-window layers without a window")
    return tuple(dict.fromkeys(kinds))
