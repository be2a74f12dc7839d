"""Penalties in the engine: they see real tokens only, whatever happens to a request's place in the batch."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from lopa_server.engine.base import GenerateRequest
from lopa_server.engine.torch_engine.engine import TorchEngine
from transformers import AutoModelForCausalLM
from transformers.generation import logits_process as hf

from tests.server.engines import Output, collect, load, run, stream

OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"repetition_penalty": 0.7, "frequency_penalty": -0.5, "logit_bias": ((40, 2.0), (41, -3.0))},
]


def _reference(folder: Path, request: GenerateRequest) -> list[int]:
    """Greedy, one whole forward pass a token, penalties over the token ids by transformers or by their definition."""
    model, params = AutoModelForCausalLM.from_pretrained(folder), request.sampling
    embed, read, text = model.get_input_embeddings(), request.input, list[int]()
    with torch.no_grad():
        for _ in range(params.max_tokens):
            after = embed(torch.tensor([*read.after, *text]))
            rows = torch.cat([embed(torch.tensor(read.before, dtype=torch.long)), torch.from_numpy(read.soft), after])
            scores = model(inputs_embeds=rows[None]).logits[:, -1].clone()
            for token, bias in params.logit_bias:
                scores[0, token] += bias
            seen = torch.tensor([[*read.before, *read.after, *text]])
            scores = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(seen, scores)
            for token in set(text):
                scores[0, token] -= params.presence_penalty + params.frequency_penalty * text.count(token)
            text.append(int(scores.argmax()))
    return text


def test_the_engine_agrees_with_a_reference_that_knows_no_batch(tiny_fm: Path) -> None:
    """Soft rows in front of and behind real tokens, all in one batch, prompts read in pieces."""
    requests = [
        stream(f"r{number}", number, rows=5, tokens=11 + number, before=3 * number, max_tokens=20, **options)
        for number, options in enumerate(OPTIONS)
    ]

    async def scenario(engine: TorchEngine) -> list[Output]:
        return await asyncio.gather(*(collect(engine, request) for request in requests))

    outputs = run(load(tiny_fm, step_positions=8), scenario)
    assert [output.tokens for output in outputs] == [_reference(tiny_fm, request) for request in requests]


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_successors_and_preempted_requests_keep_their_own_state(tiny_fm: Path, temperature: float) -> None:
    """A pool so small that requests lose their blocks and start over, in places where others with penalties have been."""
    requests = [
        stream(f"r{number}", number, tokens=24, max_tokens=110, temperature=temperature, seed=number, **OPTIONS[number % 3])
        for number in range(8)
    ]

    async def scenario(engine: TorchEngine) -> tuple[list[Output], list[Output], int]:
        alone = [await collect(engine, request) for request in requests]
        together = await asyncio.gather(*(collect(engine, request) for request in requests))
        return alone, together, engine.stats().preemptions

    engine = load(tiny_fm, max_batch=6, kv_positions=512)
    alone, together, preemptions = run(engine, scenario)
    assert [output.tokens for output in together] == [output.tokens for output in alone]
    assert preemptions and len(engine.intake.worker._sampler) == 0
