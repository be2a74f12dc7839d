"""What a graph may be made of, so that every device can run it: opset, operators, where its weights are. No torch.

"Every device" is the oldest ONNX Runtime that lopa declares (its requirement `onnxruntime>=...`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import Any

SUPPORT: Mapping[tuple[int, int], tuple[int, int]] = {
    (1, 17): (20, 9),
    (1, 18): (21, 10),
    (1, 19): (21, 10),
    (1, 20): (21, 10),
    (1, 21): (22, 10),
    (1, 22): (22, 10),
}
"""ONNX Runtime's version -> newest opset and IR version that it runs (its page on versioning)."""
ALLOWED: Mapping[str, frozenset[str]] = {"MatMulNBits": frozenset({"K", "N", "bits", "block_size", "accuracy_level"})}
"""Operators of ONNX Runtime's own domain com.microsoft, with attributes, that the oldest version has. Dynamic int8 needs none of them:
`DynamicQuantizeLinear` and `MatMulInteger` are standard."""
MICROSOFT = "com.microsoft"


class ExportError(RuntimeError):
    """An exported graph is not what torch computes, or not what the contract says. Nothing was published."""


@dataclass(frozen=True)
class Structure:
    """What a graph is made of. operators: "domain::name" (the standard domain is empty) -> count."""

    opset: int
    ir_version: int
    operators: Mapping[str, int]
    constants: int
    """Bytes of its weights."""

    @property
    def quantized(self) -> bool:
        """Whether its values depend on rounding that torch does not do."""
        return bool({"::DynamicQuantizeLinear", "::DequantizeLinear", f"{MICROSOFT}::MatMulNBits"} & set(self.operators))


def oldest_runtime() -> tuple[int, int]:
    """The least ONNX Runtime in lopa's own requirements: (major, minor)."""
    for requirement in requires("lopa") or ():
        found = re.match(r"onnxruntime\s*>=\s*(\d+)\.(\d+)", requirement)
        if found:
            return int(found[1]), int(found[2])
    raise ExportError("lopa declares no onnxruntime>=...: its oldest version is not known")


def check_structure(path: Path) -> Structure:
    """Read a graph and refuse what a device could not run or should not open.

    Raises:
        ExportError: not a valid ONNX graph, an opset or IR that is too new, an operator that is not allowed, a function, or external data.
    """
    import onnx

    name = path.name
    try:
        model = onnx.load(path, load_external_data=False)
        outside = [tensor.name for tensor in _tensors(model) if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL]
        if outside:
            raise ExportError(f"{name} keeps {outside[0]} in another file; everything must be inside the graph")
        onnx.checker.check_model(model)
    except ExportError:
        raise
    except Exception as error:  # protobuf's and the checker's errors share no base class
        raise ExportError(f"{name} is not a valid ONNX graph: {str(error)[:300]}") from error
    oldest = oldest_runtime()
    opset_limit, ir_limit = SUPPORT[oldest]
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if not 0 < opset <= opset_limit or model.ir_version > ir_limit:
        asked = f"opset {opset} and IR {model.ir_version}"
        raise ExportError(f"{name} needs {asked}; ONNX Runtime {oldest[0]}.{oldest[1]} has {opset_limit} and {ir_limit}")
    if model.functions:
        raise ExportError(f"{name} defines functions of its own: {model.functions[0].name}")
    counts: dict[str, int] = {}
    for node in _nodes(model.graph):
        _check_node(name, node)
        domain = "" if node.domain == "ai.onnx" else node.domain
        key = f"{domain}::{node.op_type}"
        counts[key] = counts.get(key, 0) + 1
    return Structure(opset, model.ir_version, counts, sum(len(tensor.raw_data) for tensor in _tensors(model)))


def _check_node(name: str, node: Any) -> None:
    if node.domain in ("", "ai.onnx"):
        return
    if node.domain != MICROSOFT or node.op_type not in ALLOWED:
        raise ExportError(f"{name} has the operator {node.domain}::{node.op_type}; allowed beyond ONNX's own: {', '.join(ALLOWED)}")
    unknown = {attribute.name for attribute in node.attribute} - ALLOWED[node.op_type]
    if unknown:
        raise ExportError(f"{name}: {node.op_type} has the attribute {min(unknown)}, which older runtimes don't know")


def _nodes(graph: Any) -> Iterator[Any]:
    """Every node, those of nested graphs included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _tensors(model: Any) -> Iterator[Any]:
    """Every constant: initializers, of nested graphs too, and tensors in attributes."""
    graphs = [model.graph, *(inner for node in _nodes(model.graph) for a in node.attribute for inner in (a.g, *a.graphs))]
    for graph in graphs:
        yield from graph.initializer
    for node in _nodes(model.graph):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
