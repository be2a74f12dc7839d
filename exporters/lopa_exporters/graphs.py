"""The three graphs of a bundle, traced from the torch code; `lopa.bundle` states their contract.

update.onnx is the vector-Jacobian product of compose and one AdamW step as one ordinary inference graph: torch.func.vjp is
flattened to plain operators by make_fx first, since torch.onnx.export cannot see through it.

Legend: b batch, t tokens, m rows, d hidden size, h encoder width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lopa_exporters.lopa import LoPA, Tensors, soft_prompt

OPSET = 18
"""Known to every ONNX Runtime from 1.14 on, in browsers and on phones too."""
INSTANCE = "x"
"""The instance tensor: the encoder's features (b, h). The heads are applied in compose, since a user's corrections act inside them."""
SCALARS = ("learning_rate", "weight_decay", "clip", "step")
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""torch.optim.AdamW's defaults."""
EXACT_SCALE = 2.0**14
MOMENTS = ("exp_avg", "exp_avg_sq")
Flat = Callable[..., tuple[Tensor, ...]]


def update_input_names(lopa: LoPA) -> list[str]:
    """Inputs of update.onnx in order."""
    names = list(lopa.start)
    return [INSTANCE, *names, *(f"{moment}.{name}" for moment in MOMENTS for name in names), "gradient", *SCALARS]


def update_output_names(lopa: LoPA) -> list[str]:
    """Outputs of update.onnx in order."""
    names = list(lopa.start)
    return [*(f"new.{name}" for name in names), *(f"new.{moment}.{name}" for moment in MOMENTS for name in names), "gradient_norm"]


def compose_function(lopa: LoPA) -> Flat:
    """(x, *personal, *shared) -> (soft_prompt,)."""

    def flat(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip([INSTANCE, *lopa.start, *lopa.shared], inputs, strict=True))
        return (soft_prompt(lopa.config, {}, values, values[INSTANCE]),)

    return flat


def update_function(lopa: LoPA) -> Flat:
    """(inputs of `update_input_names`, *shared) -> the outputs of `update_output_names`, through torch.func.vjp."""
    names = list(lopa.start)

    def flat(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip([*update_input_names(lopa), *lopa.shared], inputs, strict=True))
        shared = {name: values[name] for name in lopa.shared}
        personal = {name: values[name] for name in names}
        _, vjp = torch.func.vjp(lambda tensors: soft_prompt(lopa.config, shared, tensors, values[INSTANCE]), personal)
        (gradients,) = vjp(values["gradient"])
        norm = torch.stack([gradients[name].square().sum() for name in names]).sum().sqrt()
        factor = (values["clip"] / (norm + 1e-6)).clamp(max=1.0)
        stepped = {name: adamw(personal[name], factor * gradients[name], values, name) for name in names}
        return (*(stepped[name][i] for i in range(3) for name in names), norm)

    return flat


def adamw(parameter: Tensor, gradient: Tensor, values: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW (Loshchilov and Hutter 2019; torch.optim.AdamW): new parameter, new exp_avg, new exp_avg_sq."""
    rate, step = values["learning_rate"], values["step"]
    first = BETA1 * values[f"exp_avg.{name}"] + (1 - BETA1) * gradient
    second = BETA2 * values[f"exp_avg_sq.{name}"] + (1 - BETA2) * gradient * gradient
    # The graph optimizer takes `+ 1e-8` for an addition of zero and drops it; so both sides of the fraction are scaled by a power of two.
    denominator = EXACT_SCALE * (second / bias_correction(BETA2, step)).sqrt() + EXACT_SCALE * EPSILON
    decayed = parameter * (1 - rate * values["weight_decay"])
    return decayed - rate * (EXACT_SCALE * first / bias_correction(BETA1, step)) / denominator, first, second


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta^step in float32 without cancellation: with a = -step ln(beta), 1 - e^-a = 2 tanh(a/2) / (1 + tanh(a/2)).

    Taken literally, 1 - 0.999^1 has only four right digits in float32.
    """
    half = torch.tanh(step * (-0.5 * math.log(beta)))
    return 2 * half / (1 + half)


class _Bound(nn.Module):
    """A function over tensors whose last arguments, the shared tensors, become the graph's constants."""

    def __init__(self, function: Flat, shared: Tensors) -> None:
        super().__init__()
        self.function = function
        for index, tensor in enumerate(shared.values()):
            self.register_buffer(f"shared{index}", tensor)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.function(*inputs, *self.buffers())


def export_encode(encoder: nn.Module, path: Path) -> None:
    """input_ids, attention_mask (b, t) int64 -> x (b, h)."""
    ids = torch.ones((2, 7), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    axes = {0: "batch", 1: "tokens"}
    _export(encoder, (ids, mask), {"input_ids": axes, "attention_mask": axes}, [INSTANCE], path)


def export_compose(lopa: LoPA, path: Path) -> None:
    """x, personal tensors -> soft_prompt (b, m, d)."""
    inputs = (torch.randn(3, lopa.config.features), *lopa.start.values())
    axes = {INSTANCE: {0: "batch"}, **{name: {} for name in lopa.start}}
    _export(_Bound(compose_function(lopa), lopa.shared), inputs, axes, ["soft_prompt"], path)


def export_update(lopa: LoPA, path: Path) -> None:
    """See `lopa.bundle`."""
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = update_example(lopa, batch=3, generator=torch.Generator().manual_seed(0))
    flat = make_fx(update_function(lopa), tracing_mode="symbolic")(*inputs, *lopa.shared.values())
    axes = {name: {0: "batch"} if name in (INSTANCE, "gradient") else {} for name in update_input_names(lopa)}
    _export(_Bound(flat, lopa.shared), inputs, axes, update_output_names(lopa), path)


def update_example(lopa: LoPA, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random inputs of update.onnx in order: second moments not negative, scalars plausible."""
    config = lopa.config
    shapes = [
        (batch, config.features),
        *([tuple(t.shape) for t in lopa.start.values()] * 3),
        (batch, config.soft_prompt_rows, config.hidden),
    ]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    first = 1 + 2 * len(lopa.start)
    tensors[first:-1] = [tensor.square() for tensor in tensors[first:-1]]
    return (*tensors, *(torch.tensor(value) for value in (1e-2, 1e-2, 1.0, 3.0)))


def _export(
    module: nn.Module, inputs: tuple[Tensor, ...], axes: Mapping[str, Mapping[int, str]], outputs: Sequence[str], path: Path
) -> None:
    """Trace, convert, strip, write.

    axes: for every input, in order, its dynamic axes by name.
    """
    import onnx

    free = {name: torch.export.Dim(name, min=1) for dynamic in axes.values() for name in dynamic.values()}
    shapes: Any = tuple({axis: free[name] for axis, name in dynamic.items()} for dynamic in axes.values())
    shapes = (shapes,) if isinstance(module, _Bound) else shapes
    with torch.no_grad():
        exported = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
        program = torch.onnx.export(
            exported,
            input_names=list(axes),
            output_names=list(outputs),
            opset_version=OPSET,
            external_data=False,
            optimize=True,
            verbose=False,
            dynamo=True,
        )
    model = strip(program.model_proto)
    _name_axes(model.graph, axes)
    onnx.save(model, path)


def _name_axes(graph: Any, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Give inputs' and outputs' dynamic axes the contract's names in place of the tracer's symbols."""
    names = {}
    for value in graph.input:
        for axis, name in axes[value.name].items():
            names[value.type.tensor_type.shape.dim[axis].dim_param] = name
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = names.get(dim.dim_param, dim.dim_param)


def strip(model: Any) -> Any:
    """Remove what says where and by what a graph was made: doc strings, stack traces, producer. Its values stay."""
    model.producer_name, model.producer_version = "lopa", ""
    for message in _messages(model):
        for name in ("doc_string", "metadata_props", "value_info"):
            if name in message.DESCRIPTOR.fields_by_name:
                message.ClearField(name)
    return model


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and every message inside it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in value if isinstance(value, Sequence) or hasattr(value, "add") else (value,):
                yield from _messages(child)


def initial_moments(lopa: LoPA) -> Tensors:
    """The optimizer state before step 1: zeros."""
    return {f"{moment}.{name}": torch.zeros_like(tensor) for moment in MOMENTS for name, tensor in lopa.start.items()}
