"""Linear layers whose weight is kept in the blocked layout that a CPU's bfloat16 units read fastest.

oneDNN repacks an ordinary weight in every call: half the time of a product with few rows, as in a decode step. Packed once,
products of 1 to 8 rows take half as long and those of 32 rows a third less; results are the same to the last bit. The
ordinary weight is dropped, so nothing is kept twice; only an output head that shares its weight with the embeddings has a
copy of its own. The backward pass unpacks a weight for the moment: a gradient's many rows pay for that easily.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

ROWS_HINT = 32
"""What the layout is chosen for; others are served as well."""


class PackedLinear(nn.Module):
    """Takes the place of a frozen bfloat16 nn.Linear on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_HINT)

    @property
    def weight(self) -> torch.Tensor:
        """(out, in), unpacked: a fresh tensor."""
        return self._packed.to_dense()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, out)."""
        if rows.requires_grad and torch.is_grad_enabled():
            return _Product.apply(rows, self._packed, self.bias)  # type: ignore[no-untyped-call]
        return _product(rows, self._packed, self.bias)


class _Product(torch.autograd.Function):
    """The product with a gradient for its rows only: the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.packed = packed
        return _product(rows, packed, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.matmul(gradients[0], ctx.packed.to_dense()), None, None


def _product(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing exists and pays off: bfloat16 on a CPU with units for it."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack_linears(model: nn.Module) -> int:
    """Put a packed layer in the place of every nn.Linear, the output head included. How many there were."""
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children() if type(child) is nn.Linear]
    for parent, name, linear in found:
        setattr(parent, name, PackedLinear(linear))
    return len(found)
