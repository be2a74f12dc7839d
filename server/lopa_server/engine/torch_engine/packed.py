"""Linear layers whose weight is kept in the blocked layout that a CPU's bfloat16 units read fastest.

oneDNN repacks an ordinary weight in every call: half the time of a product with few rows, as in a decode step. Packed once,
products of 1 to 8 rows take half as long and those of 32 rows a third less; results are the same to the last bit. The
ordinary weight is dropped, so nothing is kept twice; only an output head that shares its weight with the embeddings has a
copy of its own. The backward pass unpacks a weight for the moment: a gradient's many rows pay for that easily.

Layers that read the same rows, such as an attention's queries, keys and values, are one product, whose result each takes its part of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

ROWS_HINT = 32
"""What the layout is chosen for; others are served as well."""
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read the same rows, in the order in which models ask them: in another order they are right too, but slow."""
Make = Callable[[nn.Linear], nn.Module]


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


class JointLinears:
    """One product in the place of several of a parent's layers. For one thread, as the whole model."""

    def __init__(self, linears: Sequence[nn.Linear], make: Make) -> None:
        """make: what computes their product."""
        biases = [linear.bias for linear in linears]
        joint = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears), bias=False, device="meta")
        joint.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]), requires_grad=False)
        joint.bias = None if biases[0] is None else nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=False)
        self._product: Any = make(joint)
        self._sizes = [linear.out_features for linear in linears]
        self._rows: torch.Tensor | None = None
        self._left: dict[int, torch.Tensor] = {}
        """What the first layer found, for the others."""

    def part(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        """What layer `index` makes of the rows. The first layer is asked first; the others are right in any case, and fast then."""
        if index and rows is self._rows and index in self._left:
            part = self._left.pop(index)
            self._rows = self._rows if self._left else None
            return part
        parts = self._product(rows).split(self._sizes, dim=-1)
        if not index:
            self._rows, self._left = rows, dict(enumerate(parts[1:], start=1))
        return parts[index]

    def weight(self, index: int) -> torch.Tensor:
        """(out, in) of a layer, unpacked: a fresh tensor."""
        return self._product.weight.split(self._sizes)[index]


class JointPart(nn.Module):
    """Takes the place of one of the layers that a JointLinears computes."""

    def __init__(self, joint: JointLinears, index: int, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self._joint, self._index = joint, index

    @property
    def weight(self) -> torch.Tensor:
        """(out, in), unpacked: a fresh tensor."""
        return self._joint.weight(self._index)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, out), a view."""
        return self._joint.part(rows, self._index)


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
    count = sum(type(module) is nn.Linear for module in model.modules())
    join_linears(model, PackedLinear)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
    return count


def join_linears(model: nn.Module, make: Make = lambda linear: linear) -> None:
    """Put one product in the place of layers that read the same rows. make: of the joint layer what computes it."""
    for parent in list(model.modules()):
        for names in SIBLINGS:
            _join(parent, names, make)


def _join(parent: nn.Module, names: Sequence[str], make: Make) -> None:
    linears = [getattr(parent, name, None) for name in names]
    found = [linear for linear in linears if type(linear) is nn.Linear]
    if len(found) < len(names) or len({(linear.in_features, linear.bias is None) for linear in found}) > 1:
        return
    joint = JointLinears(found, make)
    for index, (name, linear) in enumerate(zip(names, found, strict=True)):
        setattr(parent, name, JointPart(joint, index, linear))
