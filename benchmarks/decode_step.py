"""One decode step of the embedded engine, without scheduler and gRPC: how long it takes and where the time goes.

    python benchmarks/decode_step.py                     # 32 sequences of 64 positions, 64 steps
    python benchmarks/decode_step.py --no-native         # without the native kernels

Printed beside what bounds it: the bare products of the model's shapes, and the time to read the keys and values at this
machine's memory bandwidth, both measured in the same run.
"""

from __future__ import annotations

import argparse
import collections
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from lopa_server.engine.base import InputSequence
from lopa_server.engine.content import Content, blocks_for
from lopa_server.engine.torch_engine.layout import Piece
from lopa_server.engine.torch_engine.loader import FoundationModel, load_foundation_model
from lopa_server.engine.torch_engine.runner import ModelRunner
from peers import gemm_floor
from peers.model import make_model
from peers.worker import Job
from torch.profiler import ProfilerActivity, profile

BLOCK = 8


class Batch:
    """Sequences that are read once and then decoded greedily."""

    def __init__(self, fm: FoundationModel, size: int, prompt: int, new: int) -> None:
        rng = np.random.default_rng(0)
        self.contents = [
            Content(b"", InputSequence(tuple(rng.integers(0, fm.spec.vocab_size, prompt).tolist()), None, ()), BLOCK) for _ in range(size)
        ]
        blocks = blocks_for(prompt + new, BLOCK)
        self._tables = [range(1 + row * blocks, 1 + (row + 1) * blocks) for row in range(size)]
        self._runner = ModelRunner(fm, size * blocks, BLOCK)
        self._done = 0

    def step(self) -> None:
        """Everything that is not computed yet, and one token for each sequence."""
        pieces = [
            Piece(content, table, self._done, len(content) - self._done) for content, table in zip(self.contents, self._tables, strict=True)
        ]
        self._done = len(self.contents[0])
        chosen = self._runner.step(pieces, range(len(pieces))).argmax(dim=1).tolist()
        for content, token in zip(self.contents, chosen, strict=True):
            content.append(token)


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def bandwidth() -> float:
    """Bytes a second that all threads read from memory."""
    big = torch.ones(1 << 27, dtype=torch.float32)
    return big.nbytes / min(seconds(big.sum) for _ in range(5))


def profiled(batch: Batch, steps: int) -> dict[str, float]:
    """Milliseconds of a step by torch operation."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            batch.step()
    times: collections.Counter[str] = collections.Counter()
    for event in recorded.key_averages():
        times[event.key] += event.self_cpu_time_total / 1e3 / steps
    return dict(times.most_common(16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--prompt", type=int, default=64, help="positions of each before it decodes")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--no-native", action="store_true", help="without our own kernels")
    parser.add_argument("--profile", action="store_true", help="show the time by torch operation, from 8 further steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="lopa-step-") as name:
        folder = make_model(Path(name) / "fm", adapters=0)
        fm = load_foundation_model(folder, dtype=args.dtype, device="cpu", native=not args.no_native)
        products = gemm_floor.build(Job(folder, args.batch, args.prompt, args.threads))
    products(0, 0)
    floor = seconds(lambda: products(1, 0)) / gemm_floor.STEPS
    Batch(fm, args.batch, args.prompt, 4).step()
    batch = Batch(fm, args.batch, args.prompt, args.steps + 8)
    prefill = seconds(batch.step)
    times = [seconds(batch.step) for _ in range(args.steps)]
    step = median(times)
    config = fm.model.config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    read = args.batch * (args.prompt + args.steps // 2) * config.num_hidden_layers * 2 * width * fm.dtype.itemsize
    speed = bandwidth()
    print(f"prefill      {prefill * 1e3:8.1f} ms, {args.batch * args.prompt / prefill:.0f} positions/s")
    print(f"decode step  {step * 1e3:8.1f} ms, {args.batch / step:.0f} tokens/s, {floor / step:.0%} of the products' floor")
    print(f"products     {floor * 1e3:8.1f} ms")
    print(f"keys, values {read / speed * 1e3:8.1f} ms to read {read / 1e6:.0f} MB at {speed / 1e9:.1f} GB/s")
    if args.profile:
        for name, spent in profiled(batch, 8).items():
            print(f"  {name:50s} {spent:8.2f} ms")


if __name__ == "__main__":
    main()
