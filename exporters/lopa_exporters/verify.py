"""Every exported graph is checked against torch: names, then axes and shapes, then values. A mismatch stops the export.

Values are compared at several batch sizes and lengths; `update` over several steps against torch's own autograd, clip_grad_norm_
and AdamW, none of which the graph was made from.

Legend: b batch, t tokens, m rows, d hidden size, h encoder width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lopa_exporters.adamw import BETA2, EPSILON
from lopa_exporters.encoder import pad_right
from lopa_exporters.graphs import INSTANCE, MOMENTS, SCALARS, carried, initial_moments
from lopa_exporters.lopa import LoPA, Tensors, aligned, instance_factor, reads, soft_prompt
from lopa_exporters.quantize import session_of
from lopa_exporters.structure import ExportError

TOLERANCE = 1e-5
"""Largest absolute difference allowed, relative to the larger of 1 and the largest value expected."""
BATCHES = (1, 2, 9)
UPDATE_STEPS = 5
Axes = Sequence[int | str]
Signature = Mapping[str, tuple[str, Axes]]


class Graph:
    """An ONNX graph on one core of ONNX Runtime's CPU provider, its values and names as torch has them."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.session = session_of(path)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        names = [output.name for output in self.session.get_outputs()]
        values = self.session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(np.asarray(value)) for name, value in zip(names, values, strict=True)}

    def check_signature(self, inputs: Signature, outputs: Signature) -> None:
        """Names, dtypes and axes.

        Raises:
            ExportError: they are not exactly these.
        """
        for kind, expected, found in (("inputs", inputs, self.session.get_inputs()), ("outputs", outputs, self.session.get_outputs())):
            if {value.name for value in found} != set(expected) or len(found) != len(expected):
                raise ExportError(f"{self.name} has {kind} {[value.name for value in found]}; the contract has {list(expected)}")
            for value in found:
                dtype, axes = expected[value.name]
                if value.type != f"tensor({dtype})" or list(value.shape) != list(axes):
                    raise ExportError(f"{self.name}: {value.name} is {value.type} {value.shape}; the contract says {dtype} {list(axes)}")


def check_close(what: str, found: Tensor, expected: Tensor, slack: Tensor | None = None) -> None:
    """Compare one output.

    slack: entrywise addition to the tolerance, for entries that are badly conditioned by nature.

    Raises:
        ExportError: shapes differ, a value is not finite, or the difference is beyond the tolerance.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ExportError(f"{what} is {found.dtype} {tuple(found.shape)}; torch gives {expected.dtype} {tuple(expected.shape)}")
    limit = TOLERANCE * max(1.0, expected.abs().max().item())
    error = ((found - expected).abs() - (0.0 if slack is None else slack)).max().item()
    if not error <= limit:
        raise ExportError(f"{what} differs from torch by {error:.3g}; the limit is {limit:.3g}")


def verify_encode(path: Path, encoder: nn.Module, width: int, vocab_size: int, max_tokens: int) -> None:
    """encode.onnx against the encoder, from one token to max_tokens, and padded rows against the same rows alone.

    Raises:
        ExportError: see `TOLERANCE`.
    """
    graph = Graph(path)
    token_axes = ("int64", ("batch", "tokens"))
    graph.check_signature({"input_ids": token_axes, "attention_mask": token_axes}, {INSTANCE: ("float", ("batch", width))})
    rng = np.random.default_rng(0)
    for batch in BATCHES:
        lengths = [max_tokens, 1, *rng.integers(1, max_tokens + 1, batch)][:batch] if batch > 1 else [int(rng.integers(1, max_tokens + 1))]
        rows: list[NDArray[np.int64]] = [rng.integers(0, vocab_size, length) for length in lengths]
        ids, mask = (torch.from_numpy(array) for array in pad_right([row.tolist() for row in rows]))
        found = graph(input_ids=ids, attention_mask=mask)[INSTANCE]
        with torch.inference_mode():
            check_close(f"{graph.name}: batch {batch}", found, encoder(ids, mask))
        for i, row in enumerate(rows):
            alone = torch.from_numpy(row[None])
            single = graph(input_ids=alone, attention_mask=torch.ones_like(alone))[INSTANCE]
            check_close(f"{graph.name}: row {i} of {batch}, padded", found[i : i + 1], single)


def verify_compose(path: Path, lopa: LoPA) -> None:
    """compose.onnx against `soft_prompt`, for the start values and for random ones.

    Raises:
        ExportError: see `TOLERANCE`.
    """
    graph, config = Graph(path), lopa.config
    shapes = {name: ("float", tuple(tensor.shape)) for name, tensor in lopa.start.items()}
    graph.check_signature(
        {INSTANCE: ("float", ("batch", config.features)), **shapes},
        {"soft_prompt": ("float", ("batch", config.soft_prompt_rows, config.hidden)), **_carried_axes(lopa)},
    )
    generator = torch.Generator().manual_seed(1)
    noisy = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in lopa.start.items()}
    for batch in BATCHES:
        x = torch.randn(batch, config.features, generator=generator)
        for kind, personal in (("start", lopa.start), ("random", noisy)):
            found, where = graph(x=x, **personal), f"{kind} values, batch {batch}"
            check_close(f"{graph.name}: {where}", found["soft_prompt"], soft_prompt(config, lopa.shared, personal, x))
            for name, value in carried_values(lopa, personal, x).items():
                check_close(f"{graph.name}: {name}, {where}", found[name], value)


def verify_reads(path: Path, lopa: LoPA) -> None:
    """reads.onnx against `reads`.

    Raises:
        ExportError: see `TOLERANCE`.
    """
    graph, config = Graph(path), lopa.config
    axes: dict[str, tuple[str, Axes]] = {f"reads.{name}": ("float", ("batch", lopa.start[name].shape[0])) for name in aligned(lopa)}
    graph.check_signature({INSTANCE: ("float", ("batch", config.features))}, axes)
    for batch in BATCHES:
        x = torch.randn(batch, config.features, generator=torch.Generator().manual_seed(batch))
        found, expected = graph(x=x), reads(config, lopa.shared, x)
        for name in aligned(lopa):
            check_close(f"{graph.name}: {name}, batch {batch}", found[f"reads.{name}"], expected[name])


def verify_update(path: Path, lopa: LoPA, steps: int = UPDATE_STEPS) -> None:
    """update.onnx against autograd, clip_grad_norm_ and torch.optim.AdamW over `steps` steps of changing batch size.

    Raises:
        ExportError: see `TOLERANCE`.
    """
    graph, config = Graph(path), lopa.config
    fixed = {name: ("float", tuple(tensor.shape)) for name, tensor in (lopa.start | initial_moments(lopa)).items()}
    graph.check_signature(
        {
            INSTANCE: ("float", ("batch", config.features)),
            **fixed,
            **_carried_axes(lopa),
            "gradient": ("float", ("batch", config.soft_prompt_rows, config.hidden)),
            **dict.fromkeys(SCALARS, ("float", ())),
        },
        {**{f"new.{name}": spec for name, spec in fixed.items()}, "gradient_norm": ("float", ())},
    )
    _compare_steps(graph, lopa, steps)


def carried_values(lopa: LoPA, personal: Mapping[str, Tensor], x: Tensor) -> Tensors:
    """What compose.onnx hands on to update.onnx, computed by torch."""
    return {name: instance_factor(lopa.config, {**lopa.shared, **personal}, "v", x) for name in carried(lopa.config)}


def _carried_axes(lopa: LoPA) -> Signature:
    return {name: ("float", ("batch", *shape)) for name, shape in carried(lopa.config).items()}


def _compare_steps(graph: Graph, lopa: LoPA, steps: int) -> None:
    config, generator = lopa.config, torch.Generator().manual_seed(2)
    state = {**lopa.start, **initial_moments(lopa)}
    for step in range(1, steps + 1):
        batch = BATCHES[step % len(BATCHES)]
        x = torch.randn(batch, config.features, generator=generator)
        gradient = torch.randn(batch, config.soft_prompt_rows, config.hidden, generator=generator) * 0.01 ** (step % 3)
        scalars = {name: torch.tensor(float(value)) for name, value in zip(SCALARS, (1e-2, 1e-1, 0.5, step), strict=True)}
        known = carried_values(lopa, {name: state[name] for name in lopa.start}, x)
        found = graph(x=x, gradient=gradient, **known, **state, **scalars)
        expected = torch_step(lopa, state, x, gradient, scalars)
        for name, value in expected.items():
            check_close(f"{graph.name}: {name}, step {step}", found[name], value, slack=_adam_noise(name, expected, scalars))
        state = {name: found[f"new.{name}"] for name in state}


def torch_step(lopa: LoPA, state: Mapping[str, Tensor], x: Tensor, gradient: Tensor, scalars: Mapping[str, Tensor]) -> Tensors:
    """One step from `state` with torch's own autograd, clip_grad_norm_ and AdamW, under the names of update.onnx's outputs."""
    rate, decay, clip, step = (scalars[name].item() for name in SCALARS)
    parameters = {name: state[name].clone().requires_grad_() for name in lopa.start}
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=decay)
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {"step": torch.tensor(step - 1), **{moment: state[f"{moment}.{name}"].clone() for moment in MOMENTS}}
    soft_prompt(lopa.config, lopa.shared, parameters, x).backward(gradient)
    gradients = [parameter.grad.double() for parameter in parameters.values() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients).float()  # torch's own float32 norm of a million numbers is further off than the tolerance
    nn.utils.clip_grad_norm_(parameters.values(), clip)
    optimizer.step()
    moments = {f"new.{moment}.{name}": optimizer.state[p][moment] for moment in MOMENTS for name, p in parameters.items()}
    return {**{f"new.{name}": p.detach() for name, p in parameters.items()}, **moments, "gradient_norm": norm}


def _adam_noise(name: str, expected: Tensors, scalars: Mapping[str, Tensor]) -> Tensor:
    """How far float32's rounding of the gradient may move each entry of output `name`; zero for all but parameters.

    Adam divides by the gradient's own size, so entries whose gradient is near zero (next to the tensor's largest) amplify its rounding.
    """
    second = expected.get(name.replace("new.", "new.exp_avg_sq.", 1))
    if second is None:
        return torch.zeros(())
    size = (second / (1 - BETA2 ** scalars["step"].item())).sqrt()
    return scalars["learning_rate"] * 1e-6 * size.max() / (size + EPSILON)
