"""A bundle's graphs in ORT format, for ONNX Runtime's smaller builds on phones, which read no ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from lopa.bundle import Bundle

from lopa_exporters.quantize import session_of
from lopa_exporters.structure import ExportError, check_structure

TOLERANCE = 1e-4
"""Largest difference from the ONNX graph, relative to the larger of 1 and its largest value: other fusions round otherwise."""
COSINE = 0.999
"""Least cosine where activations are quantized, which blows up the last bit's rounding."""


def convert(bundle: Bundle, out: Path) -> list[Path]:
    """Write encode.ort and the others to a new folder; each is run beside its ONNX graph.

    Raises:
        FileExistsError: the folder exists. ExportError: a converted graph computes something else.
    """
    out.mkdir(parents=True)
    made = []
    for name in bundle.manifest.graphs:
        source, target = bundle.path(f"{name}.onnx"), out / f"{name}.ort"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # nothing that is for one processor only
        options.optimized_model_filepath = str(target)
        options.add_session_config_entry("session.save_model_format", "ORT")
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        _compare(source, target)
        made.append(target)
    return made


def _compare(source: Path, target: Path) -> None:
    """Both graphs on the same inputs, two rows of five tokens."""
    rounds = check_structure(source).quantized
    first, second = session_of(source), session_of(target)
    rng = np.random.default_rng(0)
    feeds = {}
    for value in first.get_inputs():
        shape = [size if isinstance(size, int) else 5 if size == "tokens" else 2 for size in value.shape]
        ids = value.type == "tensor(int64)"
        feeds[value.name] = np.ones(shape, np.int64) if ids else np.asarray(np.abs(rng.standard_normal(shape)), np.float32)
    names = [value.name for value in first.get_outputs()]
    for name, expected, found in zip(names, first.run(names, feeds), second.run(names, feeds), strict=True):
        limit = TOLERANCE * max(1.0, float(np.abs(expected).max()))
        error = float(np.abs(found - expected).max())
        cosine = float((found * expected).sum() / max(float(np.linalg.norm(found) * np.linalg.norm(expected)), 1e-30))
        if found.shape != expected.shape or not (cosine >= COSINE if rounds else error <= limit):
            raise ExportError(f"{target.name}: {name} differs from {source.name} by {error:.3g} (cosine {cosine:.5f})")
