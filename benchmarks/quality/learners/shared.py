"""The shipped bundle's population-trained part as torch tensors, read back from compose.onnx, for other ranks and corrections over it."""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx
import torch
from lopa.bundle import Bundle
from lopa_exporters import defaults
from lopa_exporters.frozen import FrozenModel
from lopa_exporters.lopa import MATRICES, LoPA, LoPAConfig, Tensors, init_lopa
from onnx import numpy_helper
from torch import Tensor

INNER_STD, OUTPUT_STD = 0.045, 0.07
"""Start of the heads that the bundle's were trained from (training/bundle.py)."""


def rebuilt(bundle: Bundle, fm: FrozenModel, seed: int, *, trained: bool, **changes: Any) -> LoPA:
    """The bundle's method with some settings changed; factors start as for a new user.

    trained: whether Z and the heads are the bundle's, or random.

    Raises:
        ValueError: the bundle is not of the factors profile with all four matrices corrected.
    """
    config, trained_part = read_method(bundle)
    config = dataclasses.replace(config, **changes)
    fresh = init_lopa(config, fm.vocabulary(), torch.Generator().manual_seed(seed))
    return LoPA(config, {name: trained_part[name] for name in fresh.shared}, fresh.start) if trained else fresh


def exported(fm: FrozenModel, features: int) -> LoPAConfig:
    """What `lopa export` makes for this model unless told otherwise, with an encoder of so many features."""
    rms = fm.vocabulary().square().mean().sqrt().item()
    return LoPAConfig(hidden=fm.hidden, features=features, **defaults.factors(), z_gain=defaults.Z_GAIN * rms)


def read_method(bundle: Bundle) -> tuple[LoPAConfig, Tensors]:
    """Settings, and the shared tensors by the names of `lopa_exporters.lopa`.

    Tensors are found by what they do in compose.onnx: Z is added to the gained product of Z.A and Z.B; a matrix and its bias made what
    the product of the input with NAME.Q and NAME.P, gained unless the gain is 1, is added to.
    """
    graph = _Graph(onnx.load(bundle.path("compose.onnx")).graph)
    product = graph.reader("Z.A", "MatMul")
    gained = graph.reader(product.output[0], "Mul")
    found = {"Z": graph.constant(graph.reader(gained.output[0], "Add"))}
    gain = 1.0
    for name in MATRICES:
        correction = graph.reader(graph.reader(f"{name}.Q", "MatMul").output[0], "MatMul").output[0]
        if graph.reads(correction, "Mul"):
            gain, correction = graph.constant(scaled := graph.reader(correction, "Mul")).item(), scaled.output[0]
        corrected = graph.reader(correction, "Add")
        biased = graph.writer(next(other for other in corrected.input if other != correction))
        weighted = graph.writer(next(other for other in biased.input if other not in graph.constants))
        found |= {name: graph.constant(weighted).T.contiguous(), name.replace("W", "b"): graph.constant(biased)}
    manifest = bundle.manifest
    shapes = {spec.name: spec.shape for spec in manifest.personal}
    config = LoPAConfig(
        hidden=manifest.fm.hidden_size,
        features=found["W1u"].shape[1],
        rows=manifest.rows,
        rank=manifest.rank,
        head_width=found["W1u"].shape[0],
        composition=manifest.composition,
        z_rank=shapes["Z.A"][1],
        corrections={name: shapes[f"{name}.P"][1] for name in MATRICES},
        z_gain=graph.constant(gained).item(),
        correction_gain=gain,
        spread=manifest.aligned[0].spread if manifest.aligned else 1.0,
        inner_std=INNER_STD,
        output_std=OUTPUT_STD,
        dropout=0.0,
    )
    return config, found


class _Graph:
    """Who reads what, and what is constant."""

    def __init__(self, graph: Any) -> None:
        self.nodes = graph.node
        self.constants = {tensor.name: tensor for tensor in graph.initializer}

    def reads(self, name: str, kind: str) -> list[Any]:
        """Nodes of a kind that read a tensor."""
        return [node for node in self.nodes if name in node.input and node.op_type == kind]

    def reader(self, name: str, kind: str) -> Any:
        """The one node of a kind that reads a tensor."""
        found = self.reads(name, kind)
        if len(found) != 1:
            raise ValueError(f"compose.onnx has {len(found)} {kind} nodes that read {name}, not one: not a bundle of all four corrections")
        return found[0]

    def writer(self, name: str) -> Any:
        """The node that made a tensor."""
        return next(node for node in self.nodes if name in node.output)

    def constant(self, node: Any) -> Tensor:
        """A node's one constant."""
        (name,) = set(node.input) & set(self.constants)
        return torch.tensor(numpy_helper.to_array(self.constants[name]))
