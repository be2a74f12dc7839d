"""The embedded engine on a GPU: decoding beside the memory's bandwidth, many users beside one, and gradients.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --shape tiny --device cpu --requests 64      # does the script itself run?

The model has Llama-3.1-8B's shape and random weights from a seed, in bfloat16: 16 GB, made on the device, so that nothing is fetched or
written. A decode step must read every weight and every key and value once; that, at the bandwidth that a plain copy reaches in the
same run, is the limit that it is compared with. Streams go through the whole engine (scheduler, sampling, texts), without gRPC.

Figures: decode_share_1, _32, _128 (of that limit, by batch), step_share_… (the same of the bare step), users_10000_over_1 (tokens a second
with as many users as requests over those with one), gradient_pairs_per_second, gradient_batch_gain (over one pair at a time).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from lopa_server.engine.base import GenerateRequest, InputSequence, PairRequest, SamplingParams
from lopa_server.engine.content import Content, blocks_for
from lopa_server.engine.scheduler import SchedulerLimits
from lopa_server.engine.torch_engine.config import TorchEngineConfig
from lopa_server.engine.torch_engine.engine import TorchEngine
from lopa_server.engine.torch_engine.intake import Intake
from lopa_server.engine.torch_engine.layout import Piece
from lopa_server.engine.torch_engine.loader import FoundationModel, prepare_model
from lopa_server.engine.torch_engine.runner import ModelRunner
from lopa_server.models import nano_folder
from report import machine, write

SHAPES = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
}
CONTEXT = 8192
BATCHES = (1, 32, 128)
BLOCK = 8
PROMPT, NEW = 64, 192
"""Tokens of a stream: to read, and to write."""
ROWS = 10
"""Of a soft prompt."""
USERS = 10000
PAIRS, PAIR_TOKENS = 32, 64
"""Pairs of different users in flight, and the tokens of each, half of them its target."""


@dataclass
class Report:
    """What was found so far."""

    figures: dict[str, float]
    rows: list[dict[str, Any]]

    def set(self, name: str, value: float) -> None:
        self.figures[name] = round(value, 4)
        print(f"{name} = {value:.4g}", flush=True)


def make_model(shape: str, device: torch.device) -> FoundationModel:
    """Random weights, as large as a trained model's, on the device."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    tokenizer = AutoTokenizer.from_pretrained(nano_folder(), local_files_only=True)
    return prepare_model(model, tokenizer, name=shape, fingerprint=f"random-{shape}")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, with all that it queued."""
    synchronize(device)
    began = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - began


def bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a plain copy."""
    source = torch.ones(1 << (30 if device.type == "cuda" else 26), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


def bytes_of_a_step(fm: FoundationModel, batch: int, positions: float) -> float:
    """All weights but the embeddings, of which a step reads a few rows, and the keys and values of so many positions of each row."""
    config = fm.model.config
    width = config.hidden_size // config.num_attention_heads
    layer = config.hidden_size * width * 2 * (config.num_attention_heads + config.num_key_value_heads)
    layer += 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    kept = config.num_hidden_layers * 2 * config.num_key_value_heads * width
    return float(fm.dtype.itemsize * (weights + batch * positions * kept))


def bare_steps(fm: FoundationModel, batch: int, steps: int) -> float:
    """Median seconds of a decode step and the choice of the best token, without scheduler, texts and streams."""
    rng = np.random.default_rng(0)
    blocks = blocks_for(PROMPT + steps + 1, BLOCK)
    contents = [Content(b"", InputSequence(tuple(_tokens(rng, fm, PROMPT)), None, ()), BLOCK) for _ in range(batch)]
    tables = [range(1 + row * blocks, 1 + (row + 1) * blocks) for row in range(batch)]
    runner = ModelRunner(fm, batch * blocks, BLOCK)
    runner.capture(batch)
    done, times = 0, []
    for _ in range(steps):
        pieces = [Piece(content, table, done, len(content) - done) for content, table in zip(contents, tables, strict=True)]
        done = len(contents[0])
        began = time.perf_counter()
        chosen = runner.step(pieces, range(batch)).argmax(dim=1).tolist()
        times.append(time.perf_counter() - began)
        for content, token in zip(contents, chosen, strict=True):
            content.append(token)
    return median(times[len(times) // 2 :])


async def streams(engine: TorchEngine, requests: Sequence[GenerateRequest], at_once: int) -> tuple[float, float]:
    """Tokens a second over all of it; and of decoding alone: between the moment when all of the first `at_once` had a token and the first
    end."""
    waiting, began = iter(requests), time.perf_counter()
    first: list[float] = []
    ends: list[float] = []

    async def client() -> int:
        count = 0
        for request in waiting:
            told = 0
            async for delta in engine.generate(request):
                if not told and len(first) < at_once:
                    first.append(time.perf_counter())
                told += len(delta.token_ids)
            ends.append(time.perf_counter())
            count += told
        return count

    counts = await asyncio.gather(*(client() for _ in range(at_once)))
    elapsed = time.perf_counter() - began
    decoding = min(ends) - max(first)
    return sum(counts) / elapsed, (requests[0].sampling.max_tokens - 1) * at_once / decoding if decoding > 0 else float("nan")


def _tokens(rng: np.random.Generator, fm: FoundationModel, count: int) -> list[int]:
    return rng.integers(2, fm.spec.vocab_size, count).tolist()


def _soft(fm: FoundationModel, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((ROWS, fm.spec.hidden_size)) * 0.02).astype(np.float32)


def make_requests(fm: FoundationModel, count: int, users: int, prompt: int, new: int) -> list[GenerateRequest]:
    """Each with its user's soft prompt; users have a cache of their own each, so that nothing is found there."""
    rng = np.random.default_rng(1)
    soft = [_soft(fm, user) for user in range(users)]
    sampling = SamplingParams(new, ignore_end=True)
    numbers = itertools.count()
    return [
        GenerateRequest(
            f"r{users}-{index}",
            InputSequence((), soft[index % users], tuple(_tokens(rng, fm, prompt))),
            sampling,
            cache_salt=next(numbers).to_bytes(4, "little"),
        )
        for index in range(count)
    ]


async def gradients(engine: TorchEngine, fm: FoundationModel, count: int) -> tuple[float, float]:
    """Pairs a second: of PAIRS users at once, and one after the other."""
    rng = np.random.default_rng(2)

    def pairs() -> list[PairRequest]:
        half = PAIR_TOKENS // 2
        ids = [_tokens(rng, fm, PAIR_TOKENS) for _ in range(PAIRS)]
        return [PairRequest(InputSequence((), _soft(fm, user), tuple(row[:half])), tuple(row[half:])) for user, row in enumerate(ids)]

    await engine.prompt_gradients(pairs())
    began = time.perf_counter()
    for _ in range(count):
        await asyncio.gather(*(engine.prompt_gradients([pair]) for pair in pairs()))
    together = PAIRS * count / (time.perf_counter() - began)
    alone = pairs()
    began = time.perf_counter()
    for pair in alone:
        await engine.prompt_gradients([pair])
    return together, len(alone) / (time.perf_counter() - began)


async def through_the_engine(fm: FoundationModel, args: argparse.Namespace, speed: float, report: Report) -> None:
    limits = SchedulerLimits(max_batch=max(BATCHES), block_size=BLOCK)
    config = TorchEngineConfig(fm=fm.spec.name, limits=limits, max_waiting=args.requests, max_waiting_tokens=1 << 30)
    engine = TorchEngine(Intake.of(fm, config), config)
    engine.start()
    try:
        await streams(engine, make_requests(fm, max(BATCHES), max(BATCHES), 16, 8), max(BATCHES))
        for batch in BATCHES:
            found = [await streams(engine, make_requests(fm, batch, batch, PROMPT, NEW), batch) for _ in range(args.rounds)]
            whole, decoding = (median(values) for values in zip(*found, strict=True))
            limit = batch / (bytes_of_a_step(fm, batch, PROMPT + ROWS + NEW / 2) / speed)
            report.rows.append({"streams": batch, "tokens_per_second": whole, "decoding": decoding, "limit": limit})
            report.set(f"tokens_per_second_{batch}", whole)
            report.set(f"decode_share_{batch}", decoding / limit)
        ratios = []
        for _ in range(args.rounds):
            pair = [await streams(engine, make_requests(fm, args.requests, users, 16, 16), max(BATCHES)) for users in (1, args.requests)]
            ratios.append(pair[1][0] / pair[0][0])
            report.rows.append({"requests": args.requests, "one_user": pair[0][0], "as_many_users": pair[1][0]})
        report.set("users_10000_over_1" if args.requests == USERS else f"users_{args.requests}_over_1", median(ratios))
        together, alone = await gradients(engine, fm, args.rounds * 4)
        report.set("gradient_pairs_per_second", together)
        report.set("gradient_batch_gain", together / alone)
        report.rows.append({"stats": str(engine.stats())})
    finally:
        await engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=tuple(SHAPES))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; cpu to try the script")
    parser.add_argument("--requests", type=int, default=USERS, help="of the comparison of many users with one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write machine, figures and rows here")
    args = parser.parse_args()
    device, report = torch.device(args.device), Report({}, [])
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA on this machine; --device cpu --shape tiny tries the script")
    fm = make_model(args.shape, device)
    speed = bandwidth(device)
    report.rows.append({"shape": args.shape, "accelerator": machine().get("accelerator"), "bytes_per_second": speed})
    print(f"{machine().get('accelerator', 'no GPU')}: {speed / 1e9:.0f} GB/s; captured steps: {'yes' if fm.graphs else 'no'}", flush=True)
    for batch in BATCHES:
        step = bare_steps(fm, batch, 64)
        limit = bytes_of_a_step(fm, batch, PROMPT + 48) / speed
        report.rows.append({"bare_step": batch, "seconds": step, "limit": limit})
        report.set(f"step_share_{batch}", limit / step)
    asyncio.run(through_the_engine(fm, args, speed, report))
    write(args.json, report.figures, report.rows)


if __name__ == "__main__":
    main()
