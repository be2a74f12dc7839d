"""The hardware's floor for gradients: only the matrix products of a pair's forward pass and of the way back to its soft rows.

No attention, no norms, no activation. Weights are frozen and have no gradient. Query, key and value as one product, gate and up as one;
logits at the positions of the target alone. How much faster these are for many pairs than for one is what mixing can gain at most.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lopa_server.engine.torch_engine.config import PAIR_POSITIONS


class GradientFloor:
    """Products of the model's shapes, in bfloat16."""

    def __init__(self, fm: Path, positions: int, targets: int, threads: int) -> None:
        """positions: that a pair reads; targets: of them, those whose next token counts."""
        config = json.loads((fm / "config.json").read_text())
        hidden, wide, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        kv = hidden * config["num_key_value_heads"] // heads
        shapes = [(hidden + 2 * kv, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide)] * config["num_hidden_layers"]
        self._layers = [torch.randn(shape).bfloat16() for shape in shapes]
        self._head = torch.randn(config["vocab_size"], hidden).bfloat16()
        self._positions, self._targets, self._threads = positions, targets, threads

    @property
    def together(self) -> int:
        """Pairs of a micro-batch on a CPU."""
        return max(1, PAIR_POSITIONS["cpu"] // (self._positions + 1))

    def pairs_per_second(self, pairs: int, repeats: int) -> float:
        """Of micro-batches of so many pairs."""
        layers = [(weight, *_rows(weight, pairs * self._positions)) for weight in self._layers]
        layers.append((self._head, *_rows(self._head, pairs * self._targets)))
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return repeats * pairs / _seconds(lambda: _forward_and_back(layers), repeats)
        finally:
            torch.set_num_threads(before)


def _rows(weight: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into a product on the way forward, and on the way back."""
    outputs, inputs = weight.shape
    return torch.randn(count, inputs).bfloat16(), torch.randn(count, outputs).bfloat16()


@torch.inference_mode()
def _forward_and_back(layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    for weight, rows, _ in layers:
        torch.nn.functional.linear(rows, weight)
    for weight, _, flowing in reversed(layers):
        torch.matmul(flowing, weight)


def _seconds(action: Callable[[], None], repeats: int) -> float:
    """After one time to warm up."""
    action()
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    return time.perf_counter() - started
