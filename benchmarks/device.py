"""The device's work on one core: encode, compose and update of the shipped bundle, beside the same step in torch.

    python benchmarks/device.py --json benchmarks/results/device.json

Medians in milliseconds. The peer is ordinary torch (autograd, clip_grad_norm_, AdamW) over a LoPA of the same shapes, one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from lopa.bundle import Bundle
from lopa_exporters.lopa import LoPAConfig, init_lopa, soft_prompt
from lopa_server.models import nano_bundle_folder
from report import write

BATCH = 8
METHOD = LoPAConfig(
    hidden=256, features=256, rows=10, rank=4, head_width=64, z_rank=8, corrections={"W1u": 2, "W2u": 4, "W1v": 2, "W2v": 8}
)


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """Median wall time of one call, after three to warm up."""
    times = []
    for _ in range(rounds + 3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1000 * median(times[3:])


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds(graph: onnxruntime.InferenceSession, tokens: int) -> dict[str, np.ndarray]:
    """Random inputs of the graph's own names, ranks and types; open axes are the batch and the tokens."""
    rng = np.random.default_rng(0)
    values = {}
    for spec in graph.get_inputs():
        shape = [size if isinstance(size, int) else tokens if size == "tokens" else BATCH for size in spec.shape]
        if spec.type == "tensor(int64)":
            shape[0] = 1
            values[spec.name] = np.ones(shape, np.int64)
        elif not shape:
            values[spec.name] = np.array({"learning_rate": 1e-2, "clip": 1.0, "step": 1.0}.get(spec.name, 0.0), np.float32)
        else:
            values[spec.name] = np.abs(rng.standard_normal(shape, dtype=np.float32))
    return values


def torch_step() -> Callable[[], object]:
    """Compose, backward with a given gradient, clip and one AdamW step, in torch."""
    generator = torch.Generator().manual_seed(0)
    lopa = init_lopa(METHOD, torch.randn(64, METHOD.hidden, generator=generator), generator)
    personal = {name: tensor.clone().requires_grad_() for name, tensor in lopa.start.items()}
    optimizer = torch.optim.AdamW(personal.values(), lr=1e-2)
    x, gradient = torch.randn(BATCH, METHOD.features), torch.randn(BATCH, METHOD.rows, METHOD.hidden)

    def step() -> None:
        optimizer.zero_grad()
        soft_prompt(METHOD, lopa.shared, personal, x).backward(gradient)
        torch.nn.utils.clip_grad_norm_(personal.values(), 1.0)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write machine, figures and rows here")
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bundle = Bundle.open(nano_bundle_folder())
    encode, compose, update = (session(bundle.path(f"{name}.onnx")) for name in ("encode", "compose", "update"))
    figures = {}
    for tokens in (32, 64, 128):
        inputs = feeds(encode, tokens)
        figures[f"encode_{tokens}_tokens_ms"] = milliseconds(lambda inputs=inputs: encode.run(None, inputs), args.rounds)
    composed, updated = feeds(compose, 1), feeds(update, 1)
    figures["compose_batch_8_ms"] = milliseconds(lambda: compose.run(None, composed), args.rounds)
    figures["update_batch_8_ms"] = milliseconds(lambda: update.run(None, updated), args.rounds)
    figures["torch_update_batch_8_ms"] = milliseconds(torch_step(), args.rounds)
    figures["update_speedup_over_torch"] = figures["torch_update_batch_8_ms"] / figures["update_batch_8_ms"]
    for name, value in figures.items():
        print(f"{name:28s} {value:8.3f}")
    write(args.json, figures, [{"name": name, "value": value} for name, value in figures.items()])


if __name__ == "__main__":
    main()
