"""The graphs of a bundle, traced from the torch code; `lopa.bundle` states their contract.

update.onnx is the vector-Jacobian product of compose and one AdamW step as one ordinary inference graph: torch.func.vjp is
flattened to plain operators by make_fx first, since torch.onnx.export cannot see through it. compose.onnx hands V on to it: computing
V again would be a third of its work at a large model's width.

Legend: b batch, t tokens, m rows, d hidden size, h encoder width.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lopa_exporters.adamw import SMALL, adam_factors, adamw, groups, joined, parted
from lopa_exporters.lopa import LoPA, LoPAConfig, Tensors, aligned, instance_factor, of_head, reads, soft_prompt
from lopa_exporters.structure import ExportError

OPSET = 18
"""Known to every ONNX Runtime from 1.14 on, in browsers and on phones too."""
INSTANCE = "x"
"""The instance tensor: the encoder's features (b, h). The heads are applied in compose, since a user's corrections act inside them."""
SCALARS = ("learning_rate", "weight_decay", "clip", "step")
MOMENTS = ("exp_avg", "exp_avg_sq")
CARRIED_V = "carried.v"
Flat = Callable[..., tuple[Tensor, ...]]


def carried(config: LoPAConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes, without the batch axis, of what compose.onnx hands on to update.onnx: V."""
    return {CARRIED_V: (config.hidden, config.rank)} if config.has_instance_part else {}


def update_input_names(lopa: LoPA) -> list[str]:
    """Inputs of update.onnx in order."""
    names = list(lopa.start)
    moments = [f"{moment}.{name}" for moment in MOMENTS for name in names]
    return [INSTANCE, *names, *moments, *carried(lopa.config), "gradient", *SCALARS]


def update_output_names(lopa: LoPA) -> list[str]:
    """Outputs of update.onnx in order."""
    names = list(lopa.start)
    return [*(f"new.{name}" for name in names), *(f"new.{moment}.{name}" for moment in MOMENTS for name in names), "gradient_norm"]


def compose_function(lopa: LoPA) -> Flat:
    """(x, *personal, *shared) -> (soft_prompt, *carried)."""

    def flat(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip([INSTANCE, *lopa.start, *lopa.shared], inputs, strict=True))
        if not carried(lopa.config):
            return (soft_prompt(lopa.config, {}, values, values[INSTANCE]),)
        v = instance_factor(lopa.config, values, "v", values[INSTANCE])
        return soft_prompt(lopa.config, {}, values, values[INSTANCE], v=v), v

    return flat


def update_function(lopa: LoPA) -> Flat:
    """(inputs of `update_input_names`, *shared) -> the outputs of `update_output_names`, through torch.func.vjp."""
    names = list(lopa.start)

    def flat(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip([*update_input_names(lopa), *lopa.shared], inputs, strict=True))
        shared = {name: values[name] for name in lopa.shared}
        personal = {name: values[name] for name in names}
        gradients = _personal_gradients(lopa.config, shared, personal, values)
        squares = [_square_sum(gradients, group) for group in groups(personal)]
        norm = torch.stack(squares).sum().sqrt()
        scale = (values["clip"] / (norm + 1e-6)).clamp(max=1.0)
        factors = adam_factors(values["learning_rate"], values["weight_decay"], values["step"])
        stepped: dict[str, tuple[Tensor, ...]] = {}
        for group in groups(personal):
            first, second = (joined({name: values[f"{moment}.{name}"] for name in group}, group) for moment in MOMENTS)
            new = adamw(joined(personal, group), scale * joined(gradients, group), first, second, factors)
            stepped |= dict(zip(group, zip(*(parted(part, personal, group) for part in new), strict=True), strict=True))
        return (*(stepped[name][i] for i in range(3) for name in names), norm)

    return flat


def _square_sum(gradients: Tensors, group: Sequence[str]) -> Tensor:
    """Of all numbers of a group. ONNX Runtime adds up an axis one number after the other, in float32: many of them go row by row."""
    if sum(gradients[name].numel() for name in group) <= SMALL:
        return joined(gradients, group).square().sum()
    return torch.stack([gradients[name].square().sum(dim=-1).sum() for name in group]).sum()


def _personal_gradients(config: LoPAConfig, shared: Tensors, personal: Tensors, values: Tensors) -> Tensors:
    """Of <gradient, soft prompts> in every personal tensor. V is known: of its head only the way back is computed."""
    x = values[INSTANCE]
    if not carried(config):
        _, back, *_ = torch.func.vjp(lambda tensors: soft_prompt(config, shared, tensors, x), personal)
        return dict(back(values["gradient"])[0])
    of_v = {name: tensor for name, tensor in personal.items() if of_head(name, "v")}
    others = {name: tensor for name, tensor in personal.items() if name not in of_v}
    _, back, *_ = torch.func.vjp(lambda tensors, v: soft_prompt(config, shared, tensors, x, v=v), others, values[CARRIED_V])
    gradients, gradient_v = back(values["gradient"])
    if not of_v:
        return dict(gradients)
    _, back_v, *_ = torch.func.vjp(lambda tensors: instance_factor(config, {**shared, **tensors}, "v", x), of_v)
    return {**gradients, **back_v(gradient_v)[0]}


class _Bound(nn.Module):
    """A function over tensors whose last arguments, the shared tensors, become the graph's constants."""

    def __init__(self, function: Flat, shared: Tensors) -> None:
        super().__init__()
        self.function = function
        for index, tensor in enumerate(shared.values()):
            self.register_buffer(f"shared{index}", tensor)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.function(*inputs, *self.buffers())


def export_encode(encoder: nn.Module, max_tokens: int, path: Path) -> None:
    """input_ids, attention_mask (b, t) int64 -> x (b, h), t up to max_tokens."""
    length = max(2, min(7, max_tokens - 1))
    ids = torch.ones((5, length), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    # Backbones with absolute positions are bounded; the lower bound 2 is the tracer's wish, and one token is verified all the same.
    tokens = torch.export.Dim("tokens", min=2, max=max(max_tokens, 3))
    axes = {0: torch.export.Dim("batch", min=1), 1: tokens}
    _export(encoder, (ids, mask), {"input_ids": axes, "attention_mask": axes}, [INSTANCE], path)


def export_compose(lopa: LoPA, path: Path) -> None:
    """x, personal tensors -> soft_prompt (b, m, d), and what update.onnx takes over."""
    inputs = (torch.randn(3, lopa.config.features), *lopa.start.values())
    axes = {INSTANCE: {0: torch.export.Dim("batch", min=1)}, **{name: {} for name in lopa.start}}
    _export(_Bound(compose_function(lopa), lopa.shared), inputs, axes, ["soft_prompt", *carried(lopa.config)], path)


def export_reads(lopa: LoPA, path: Path) -> None:
    """x -> `reads.NAME` for every aligned tensor."""
    names = aligned(lopa)

    def flat(x: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        found = reads(lopa.config, dict(zip(lopa.shared, shared, strict=True)), x)
        return tuple(found[name].clone() for name in names)  # an output may not be an input

    axes = {INSTANCE: {0: torch.export.Dim("batch", min=1)}}
    _export(_Bound(flat, lopa.shared), (torch.randn(3, lopa.config.features),), axes, [f"reads.{name}" for name in names], path)


def export_update(lopa: LoPA, path: Path) -> None:
    """See `lopa.bundle`."""
    from torch.fx.experimental.proxy_tensor import make_fx

    # The tracer takes sizes that are equal in the example for equal for ever, so the batch must be a size that occurs nowhere else.
    sizes = {size for shape in (*lopa.config.full_shapes().values(), *lopa.config.personal_shapes().values()) for size in shape}
    unlike = next(size for size in itertools.count(5) if size not in sizes | {lopa.config.soft_prompt_rows, lopa.config.features})
    inputs = update_example(lopa, batch=unlike, generator=torch.Generator().manual_seed(0))
    flat = make_fx(update_function(lopa), tracing_mode="symbolic")(*inputs, *lopa.shared.values())
    batch = {0: torch.export.Dim("batch", min=1)}
    batched = {INSTANCE, "gradient", *carried(lopa.config)}
    axes = {name: batch if name in batched else {} for name in update_input_names(lopa)}
    _export(_Bound(flat, lopa.shared), inputs, axes, update_output_names(lopa), path)


def update_example(lopa: LoPA, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random inputs of update.onnx in order: second moments not negative, scalars plausible."""
    config = lopa.config
    shapes = [
        (batch, config.features),
        *([tuple(t.shape) for t in lopa.start.values()] * 3),
        *((batch, *shape) for shape in carried(config).values()),
        (batch, config.soft_prompt_rows, config.hidden),
    ]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    first = 1 + 2 * len(lopa.start)
    last = first + len(lopa.start)
    tensors[first:last] = [tensor.square() for tensor in tensors[first:last]]
    return (*tensors, *(torch.tensor(value) for value in (1e-2, 1e-2, 1.0, 3.0)))


def _export(
    module: nn.Module, inputs: tuple[Tensor, ...], axes: Mapping[str, Mapping[int, Any]], outputs: Sequence[str], path: Path
) -> None:
    """Trace, convert, strip, write.

    axes: for every input, in order, its dynamic axes as torch.export.Dim.
    """
    import onnx

    shapes: Any = tuple(axes.values())
    shapes = (shapes,) if isinstance(module, _Bound) else shapes
    with torch.no_grad(), _quiet():
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
    if program is None:
        raise ExportError("torch.onnx.export gave no program")
    model = strip(program.model_proto)
    order_gelu(model)
    _name_axes(model.graph, axes)
    onnx.save(model, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The tracer tells of operators of packages that are not installed, and warns of its own deprecated calls: nothing for our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _name_axes(graph: Any, axes: Mapping[str, Mapping[int, Any]]) -> None:
    """Give inputs' and outputs' dynamic axes the contract's names in place of the tracer's symbols."""
    names = {}
    for value in graph.input:
        for axis, dim in axes[value.name].items():
            names[value.type.tensor_type.shape.dim[axis].dim_param] = dim.__name__
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = names.get(dim.dim_param, dim.dim_param)


def order_gelu(model: Any) -> None:
    """Rewrite x * (0.5 * (1 + erf)) as (x * (1 + erf)) * 0.5, in place: the same values, in the form that ONNX Runtime fuses."""
    users: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for erf in (node for node in model.graph.node if node.op_type == "Erf"):
        chain = [erf]
        while len(chain) < 4 and len(users.get(chain[-1].output[0], [])) == 1:
            chain.append(users[chain[-1].output[0]][0])
        if [node.op_type for node in chain] != ["Erf", "Add", "Mul", "Mul"]:
            continue
        _, one_plus, half, last = chain
        factor, x = (next(name for name in node.input if name != before.output[0]) for before, node in ((one_plus, half), (half, last)))
        if any(tensor.name == factor for tensor in model.graph.initializer):
            half.input[:], last.input[:] = [x, one_plus.output[0]], [half.output[0], factor]


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
