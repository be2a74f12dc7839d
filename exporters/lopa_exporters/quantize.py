"""Smaller encoders: fp16, int8 and int4 forms of encode.onnx, made from the float32 graph.

| scheme | weights | arithmetic | operators |
| --- | --- | --- | --- |
| fp16 | half precision | float32: ONNX Runtime unfolds the weights once, on loading | standard |
| int8 | int8 per output channel, embeddings int8 | 8-bit, activations quantized as they come | standard |
| int4 | int4 in blocks of 32, embeddings int8 | 8-bit inside `MatMulNBits` | com.microsoft::MatMulNBits |

int8 quantizes activations with one range a tensor, which outlier channels spoil. So the graph is smoothed first (SmoothQuant: Xiao et al.
2023, equation 4): a channel's large values are divided out of the activation and multiplied into the weight. What still hurts is left in
float32: each node is quantized alone, and the worst go back until the features' cosine to float32 reaches the scheme's target.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Scheme = Literal["none", "fp16", "int8", "int4"]
TARGETS: Mapping[str, float] = {"fp16": 0.9999, "int8": 0.99, "int4": 0.95}
"""Mean cosine of features to float32 that leaving out products aims at."""
SMOOTHING = 0.75
"""Share of a channel's range that moves into the weights: 0.75 was best of 0.3 to 1 on all-MiniLM-L6-v2."""
BLOCK = 32
SMALL = 1024
"""Constants of fewer elements stay as they are."""
Float32 = NDArray[np.float32]
Measure = Callable[[Path], float]
"""Path of a graph -> mean cosine of its features to float32's."""
Inputs = Sequence[Mapping[str, NDArray[np.int64]]]
"""Feeds of encode.onnx."""


@dataclass(frozen=True)
class Quantized:
    """A finished graph. left_out: names of the nodes that stayed in float32. cosine: of features to float32, mean."""

    left_out: tuple[str, ...]
    cosine: float


def quantize(source: Path, target: Path, scheme: str, calibration: Inputs, cosine: Measure) -> Quantized:
    """Write `target`, a smaller form of the float32 graph `source`.

    calibration: inputs to take activation ranges from (int8 only).

    Raises:
        ValueError: an unknown scheme.
    """
    import onnx

    if scheme not in TARGETS:
        raise ValueError(f"scheme is {scheme!r}; known are {', '.join(TARGETS)}")
    model = onnx.load(source)
    if scheme == "fp16":
        onnx.save(halve(model), target)
        return Quantized((), cosine(target))
    if scheme == "int8":
        smooth(model, activation_ranges(model, calibration))
    parts = [*(node.name for group in weight_products(model).values() for node in group), *embedding_lookups(model)]

    def write(chosen: Sequence[str], path: Path) -> float:
        onnx.save(_dynamic(model, chosen) if scheme == "int8" else _to_int4(model, chosen), path)
        return cosine(path)

    return _leave_out(parts, write, target, TARGETS[scheme])


def _leave_out(parts: Sequence[str], write: Callable[[Sequence[str], Path], float], target: Path, goal: float) -> Quantized:
    """Quantize all parts, then all but the worst, and so on, until the cosine reaches the goal or none is left."""
    reached = write(parts, target)
    if reached >= goal or not parts:
        return Quantized((), reached)
    with tempfile.TemporaryDirectory() as folder:
        alone = {name: write([name], Path(folder) / "alone.onnx") for name in parts}
    order = sorted(parts, key=lambda name: (alone[name], name))
    for count in range(1, len(order) + 1):
        reached = write([name for name in parts if name not in order[:count]], target)
        if reached >= goal:
            return Quantized(tuple(order[:count]), reached)
    return Quantized(tuple(order), reached)


def weight_products(model: Any) -> dict[str, list[Any]]:
    """Input activation -> the matrix products of it with constant matrices."""
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    groups: dict[str, list[Any]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in matrices and node.input[0] not in matrices:
            groups.setdefault(node.input[0], []).append(node)
    return groups


def activation_ranges(model: Any, calibration: Inputs) -> dict[str, Float32]:
    """Largest absolute value in each channel of every activation that meets a constant matrix, over the calibration inputs."""
    import onnx

    groups = weight_products(model)
    if not groups:
        return {}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in groups)
    session = session_of(watched.SerializeToString())
    ranges: dict[str, Float32] = {}
    for feeds in calibration:
        for name, value in zip(groups, session.run(list(groups), dict(feeds)), strict=True):
            largest = np.abs(value).reshape(-1, value.shape[-1]).max(axis=0)
            ranges[name] = np.maximum(ranges.get(name, largest), largest)
    return ranges


def smooth(model: Any, ranges: Mapping[str, Float32], strength: float = SMOOTHING) -> None:
    """Divide activations by s and multiply their weights' rows by s, in place: s_j = max|X_j|^a / max|W_j|^(1 - a), geometric mean 1."""
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    shared = [node.input[1] for nodes in weight_products(model).values() for node in nodes]
    for name, nodes in weight_products(model).items():
        weights = {node.input[1]: numpy_helper.to_array(constants[node.input[1]]) for node in nodes}
        if name not in ranges or any(shared.count(weight) > 1 for weight in weights):
            continue
        rows = np.max([np.abs(weight).max(axis=1) for weight in weights.values()], axis=0)
        scale = np.maximum(ranges[name], 1e-5) ** strength / np.maximum(rows, 1e-5) ** (1 - strength)
        scale = (scale / np.exp(np.log(scale).mean())).astype(np.float32)
        for key, weight in weights.items():
            constants[key].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weight * scale[:, None]), key))
        model.graph.initializer.append(numpy_helper.from_array(1 / scale, f"{name}_smoothing"))
        first = next(i for i, node in enumerate(model.graph.node) if node.name == nodes[0].name)
        inputs = [name, f"{name}_smoothing"]
        model.graph.node.insert(first, helper.make_node("Mul", inputs, [f"{name}_smooth"], name=f"{name}_smooth"))
        chosen = {node.name for node in nodes}
        for node in model.graph.node:
            if node.name in chosen:
                node.input[0] = f"{name}_smooth"


def halve(model: Any) -> Any:
    """Large float32 constants in half precision, each with a Cast back."""
    import onnx
    from onnx import helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < SMALL:
            continue
        name, half = tensor.name, f"{tensor.name}_half"
        limit = float(np.finfo(np.float16).max)
        tensor.CopyFrom(numpy_helper.from_array(np.clip(numpy_helper.to_array(tensor), -limit, limit).astype(np.float16), half))
        casts.append(helper.make_node("Cast", [half], [name], name=f"{name}_cast", to=onnx.TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    return model


def _to_int4(model: Any, parts: Sequence[str]) -> Any:
    """These products in blocks; and these embedding tables in int8, where four bits would cost most of the accuracy."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    chosen = set(parts)
    others = [node.name for nodes in weight_products(model).values() for node in nodes if node.name not in chosen]
    small = _dynamic(model, [name for name in embedding_lookups(model) if name in chosen])
    with _silent():
        quantizer = MatMulNBitsQuantizer(
            small, bits=4, block_size=BLOCK, is_symmetric=True, accuracy_level=4, nodes_to_exclude=others, op_types_to_quantize=("MatMul",)
        )
        quantizer.process()
    return quantizer.model.model


def embedding_lookups(model: Any) -> list[str]:
    """Names of the nodes that read rows of a large constant table."""
    tables = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2 and np.prod(tensor.dims) >= SMALL}
    return [node.name for node in model.graph.node if node.op_type == "Gather" and node.input[0] in tables]


def _dynamic(model: Any, nodes: Sequence[str]) -> Any:
    """ONNX Runtime's dynamic quantization of exactly these nodes: products per output channel, embedding tables as a whole."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if not nodes:
        return copy
    with tempfile.TemporaryDirectory() as folder, _silent():
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(
            copy,
            path,
            op_types_to_quantize=["MatMul", "Gather"],
            nodes_to_quantize=list(nodes),
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        return onnx.load(path)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The quantizer tells on the root logger that models might have been preprocessed; ours are."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def session_of(graph: Path | bytes) -> Any:
    """An ONNX Runtime session as the device has it: one core of the CPU provider."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Its fused kernel is slower than the two that it replaces: 11.6 ms against 12.8 ms for all-MiniLM-L6-v2 in int8 at 128 tokens.
    options.add_session_config_entry("optimization.disable_specified_optimizers", "SkipLayerNormFusion")
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
