"""Mixing is exact: what a request gets never depends on who else is in the batch."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from lopa_server.engine.base import GenerateRequest
from lopa_server.engine.torch_engine.engine import TorchEngine

from tests.server.engines import Output, collect, load, run, stream
from tests.tiny import build_tiny_fm

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "gpt_neox", "gpt2", "opt")


def _requests(count: int, **sampling: object) -> list[GenerateRequest]:
    """Different soft prompts, lengths, placements and numbers of tokens."""
    random = np.random.default_rng(0)
    requests = []
    for index in range(count):
        tokens = int(random.integers(1, 60))
        before = int(random.integers(0, tokens + 1)) if index % 2 else 0
        length = int(random.integers(2, 40))
        rows = int(random.integers(0, 9)) if index % 5 else 0
        requests.append(stream(f"r{index}", index, rows=rows, tokens=tokens, before=before, max_tokens=length, logprobs=0, **sampling))
    return requests


async def _one_by_one(engine: TorchEngine, requests: list[GenerateRequest]) -> list[Output]:
    return [await collect(engine, request) for request in requests]


async def _joining(engine: TorchEngine, requests: list[GenerateRequest]) -> list[Output]:
    """Each request joins when the one before it has got its first tokens: no clock, but a spread of join times."""
    started = [asyncio.Event() for _ in requests]

    async def follow(index: int) -> Output:
        if index:
            await started[index - 1].wait()
        output = Output()
        async for delta in engine.generate(requests[index]):
            output.tokens += delta.token_ids
            output.text += delta.text
            output.logprobs += [entry.chosen.logprob for entry in delta.logprobs]
            started[index].set()
        return output

    return list(await asyncio.gather(*(follow(index) for index in range(len(requests)))))


def _check(alone: list[Output], mixed: list[Output]) -> None:
    assert [output.tokens for output in mixed] == [output.tokens for output in alone]
    assert [output.text for output in mixed] == [output.text for output in alone]
    difference = max(abs(a - b) for one, two in zip(alone, mixed, strict=True) for a, b in zip(one.logprobs, two.logprobs, strict=True))
    assert difference < 1e-4


def test_32_requests_get_what_each_gets_alone(tiny_fm: Path) -> None:
    requests = _requests(32)

    async def scenario(engine: TorchEngine) -> None:
        alone = await _one_by_one(engine, requests)
        assert len({tuple(output.tokens) for output in alone}) > 28
        steps = engine.stats().decode_steps
        together = await asyncio.gather(*(collect(engine, request) for request in requests))
        shared = engine.stats().decode_steps - steps
        assert shared < steps / 4, "the requests did not share their steps"
        _check(alone, list(together))
        _check(alone, await _joining(engine, requests))
        assert engine.stats().blocks_used == 0

    run(load(tiny_fm), scenario)


def test_prompts_read_in_pieces_and_a_small_batch_change_nothing(tiny_fm: Path) -> None:
    requests = _requests(16)
    whole = run(load(tiny_fm), lambda engine: _one_by_one(engine, requests))
    engine = load(tiny_fm, step_positions=14, max_batch=5)
    pieces = run(engine, lambda engine: _joining(engine, requests))
    _check(whole, pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_mixes_exactly(family: str, tmp_path: Path) -> None:
    fm = build_tiny_fm(tmp_path, family=family)
    requests = _requests(8)

    async def scenario(engine: TorchEngine) -> None:
        alone = await _one_by_one(engine, requests)
        _check(alone, list(await asyncio.gather(*(collect(engine, request) for request in requests))))

    run(load(fm, step_positions=24), scenario)


def test_positions_that_change_with_the_longest_in_the_batch_are_not_served() -> None:
    from lopa_server.engine.torch_engine.loader import _context_length
    from transformers import Phi3Config

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
    config = Phi3Config(rope_parameters=rope, original_max_position_embeddings=64, **sizes)
    assert _context_length(config) == 64
    assert _context_length(Phi3Config(**sizes)) == 512


def test_a_seed_means_the_same_in_any_batch(tiny_fm: Path) -> None:
    free = [stream(f"free{index}", index, temperature=1.3, seed=2**64 - 1 - index, logprobs=0) for index in range(6)]
    requests = [*_requests(12, temperature=0.9, top_p=0.9, top_k=40, seed=5), *free]

    async def scenario(engine: TorchEngine) -> None:
        alone = await _one_by_one(engine, requests)
        _check(alone, await _joining(engine, requests))
        other = await collect(engine, stream("other", 0, temperature=1.3, seed=1, logprobs=0))
        assert other.tokens != alone[12].tokens

    run(load(tiny_fm), scenario)


@pytest.mark.parametrize("seed", range(3))
def test_arrivals_pieces_preemptions_and_prefix_hits_change_nothing(tiny_fm: Path, seed: int) -> None:
    """Requests that share prefixes, in any order, over a pool that holds a few of them only."""
    random = np.random.default_rng(seed)
    requests = []
    for index in range(24):
        family, before = int(random.integers(3)), int(random.choice([0, 8, 21, 40]))
        request = stream(f"r{index}", family, tokens=44, rows=6, before=before, max_tokens=int(random.integers(30, 100)), logprobs=0)
        after = request.input.after[: int(random.integers(1, 5))]
        requests.append(dataclasses.replace(request, input=dataclasses.replace(request.input, after=after)))
    fresh = load(tiny_fm, kv_positions=512)
    alone = run(fresh, lambda engine: _one_by_one(engine, [dataclasses.replace(one, cache_salt=one.id.encode()) for one in requests]))
    assert fresh.stats().prefix_hit_tokens == 0 == fresh.stats().preemptions
    order = random.permutation(len(requests)).tolist()

    async def scenario(engine: TorchEngine) -> None:
        shuffled = [requests[index] for index in order]
        together = await asyncio.gather(*(collect(engine, request) for request in shuffled))
        _check([alone[index] for index in order], list(together))
        joining = await _joining(engine, shuffled)
        _check([alone[index] for index in order], joining)
        stats = engine.stats()
        assert stats.prefix_hit_tokens > 100 and stats.preemptions > 0 and stats.blocks_used == 0

    run(load(tiny_fm, kv_positions=512, step_positions=int(random.integers(10, 60)), max_batch=12), scenario)


def test_greedy_text_is_what_transformers_generates(tiny_fm: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_fm)
    request = stream("r", 3, rows=5, tokens=20, before=6, max_tokens=24)
    sequence = request.input
    embed = model.get_input_embeddings()
    parts = [embed(torch.tensor(sequence.before)), torch.from_numpy(sequence.soft), embed(torch.tensor(sequence.after))]
    ours = run(load(tiny_fm), lambda engine: collect(engine, request))
    theirs = model.generate(inputs_embeds=torch.cat(parts)[None], max_new_tokens=24, do_sample=False, eos_token_id=-1)
    assert ours.tokens == theirs[0].tolist()
