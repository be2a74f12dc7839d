"""Choosing tokens: the distribution is the one that the parameters describe, and each row has its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lopa_server.engine.base import Delta, SamplingParams
from lopa_server.engine.torch_engine.engine import TorchEngine
from lopa_server.engine.torch_engine.sampling import Randomness, choose

from tests.server.engines import load, run, stream

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -torch.inf])


def _frequencies(params: SamplingParams, draws: int = 4000) -> np.ndarray:
    """How often each token of LOGITS is drawn, by rows with seeds of their own."""
    rows = LOGITS.expand(draws, -1)
    chosen = [choice.token_id for choice in choose(rows, [params] * draws, [Randomness(seed) for seed in range(draws)])]
    return np.bincount(chosen, minlength=len(LOGITS)) / draws


def _expected(temperature: float, keep: list[int]) -> np.ndarray:
    """Softmax at a temperature over some tokens only, in plain numpy."""
    weights = np.zeros(len(LOGITS))
    weights[keep] = np.exp(LOGITS.numpy()[keep] / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("params", "temperature", "keep"),
    [
        (SamplingParams(1, temperature=1.0), 1.0, [0, 1, 2, 3, 4]),
        (SamplingParams(1, temperature=2.5), 2.5, [0, 1, 2, 3, 4]),
        (SamplingParams(1, temperature=1.0, top_k=2), 1.0, [0, 4]),
        (SamplingParams(1, temperature=1.0, top_p=0.47), 1.0, [0, 4]),
        (SamplingParams(1, temperature=1.0, top_p=0.46), 1.0, [0]),
        (SamplingParams(1, temperature=1.0, top_k=3, top_p=0.6), 1.0, [0, 4]),
        (SamplingParams(1, temperature=1e-30), 1.0, [0]),
    ],
)
def test_tokens_are_drawn_from_the_described_distribution(params: SamplingParams, temperature: float, keep: list[int]) -> None:
    np.testing.assert_allclose(_frequencies(params), _expected(temperature, keep), atol=0.03)


def test_greedy_takes_the_best_and_rows_keep_to_themselves() -> None:
    rows = torch.stack([LOGITS, torch.full_like(LOGITS, torch.nan), LOGITS.flip(0), LOGITS])
    params = [SamplingParams(1), SamplingParams(1), SamplingParams(1, logprobs=2), SamplingParams(1, temperature=1.0, seed=3)]
    greedy, broken, flipped, drawn = choose(rows, params, [Randomness(param.seed) for param in params])
    assert (greedy.token_id, greedy.broken, greedy.logprobs) == (0, False, None)
    assert broken.broken
    assert flipped.token_id == 5
    assert flipped.logprobs is not None
    assert [entry.token_id for entry in flipped.logprobs.alternatives] == [5, 1]
    assert flipped.logprobs.chosen.logprob == pytest.approx(float(torch.log_softmax(LOGITS, 0)[0]), abs=1e-6)
    alone = choose(LOGITS[None], [params[3]], [Randomness(3)])[0]
    assert drawn == alone


def test_a_seed_gives_one_sequence_of_numbers() -> None:
    first, second = Randomness(2**64 - 1), Randomness(2**64 - 1)
    assert [first.next() for _ in range(9)] == [second.next() for _ in range(9)]
    assert Randomness(0).next() != Randomness(1).next()


def test_logprobs_are_those_of_transformers(tiny_fm: Path) -> None:
    from transformers import AutoModelForCausalLM

    request = stream("r", 5, rows=3, tokens=9, max_tokens=12, logprobs=4, temperature=0.7, seed=11)

    async def deltas(engine: TorchEngine) -> list[Delta]:
        return [delta async for delta in engine.generate(request)]

    collected = run(load(tiny_fm), deltas)
    tokens = [token for delta in collected for token in delta.token_ids]
    entries = [entry for delta in collected for entry in delta.logprobs]
    model = AutoModelForCausalLM.from_pretrained(tiny_fm)
    embed = model.get_input_embeddings()
    inputs = torch.cat([torch.from_numpy(request.input.soft), embed(torch.tensor([*request.input.after, *tokens]))])
    with torch.no_grad():
        values = torch.log_softmax(model(inputs_embeds=inputs[None]).logits[0, len(request.input) - 1 : -1], dim=1)
    assert len(entries) == len(tokens) == 12
    for row, token, entry in zip(values, tokens, entries, strict=True):
        best, ids = row.topk(4)
        assert entry.chosen.token_id == token
        assert entry.chosen.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [other.token_id for other in entry.alternatives] == ids.tolist()
        assert [other.logprob for other in entry.alternatives] == pytest.approx(best.tolist(), abs=1e-4)
