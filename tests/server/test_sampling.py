"""Choosing tokens: the distribution is the one that the parameters describe, and each row has its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from lopa_server.engine.base import Delta, EngineFailed, SamplingParams
from lopa_server.engine.randomness import continuation_seed, split_mix, start_state, uniform
from lopa_server.engine.torch_engine.engine import TorchEngine
from lopa_server.engine.torch_engine.sampling import Choice, Sampler
from lopa_server.engine.torch_engine.truncation import HEAD, Truncation, kept_weights
from transformers.generation import logits_process as hf

from tests.server.engines import load, run, stream

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -torch.inf])
VOCABULARY = 3 * HEAD


def _sampler(*params: SamplingParams, vocabulary: int = len(LOGITS), prompt: Sequence[int] = ()) -> tuple[Sampler, list[str]]:
    """A sampler with these requests, and their names."""
    sampler = Sampler(vocabulary, torch.device("cpu"))
    names = [f"r{index}" for index in range(len(params))]
    for name, one in zip(names, params, strict=True):
        sampler.add(name, one, prompt)
    return sampler, names


def _choose(rows: torch.Tensor, *params: SamplingParams, prompt: Sequence[int] = ()) -> list[Choice]:
    """One step of fresh requests."""
    sampler, names = _sampler(*params, vocabulary=rows.shape[1], prompt=prompt)
    return sampler.choose(names, rows.clone())


def _frequencies(params: SamplingParams, draws: int = 4000) -> np.ndarray:
    """How often each token of LOGITS is drawn, by rows with seeds of their own."""
    rows = LOGITS.expand(draws, -1)
    chosen = [choice.token_id for choice in _choose(rows, *(dataclasses.replace(params, seed=seed) for seed in range(draws)))]
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
        (SamplingParams(1, temperature=1.0, min_p=0.3), 1.0, [0, 1, 4]),
        (SamplingParams(1, temperature=2.0, min_p=0.7), 2.0, [0, 4]),
        (SamplingParams(1, temperature=1.0, min_p=0.1, top_k=3, top_p=0.9), 1.0, [0, 1, 4]),
        (SamplingParams(1, temperature=1e-30), 1.0, [0]),
        (SamplingParams(1, temperature=1e-45), 1.0, [0]),
    ],
)
def test_tokens_are_drawn_from_the_described_distribution(params: SamplingParams, temperature: float, keep: list[int]) -> None:
    np.testing.assert_allclose(_frequencies(params), _expected(temperature, keep), atol=0.03)


TRUNCATIONS = [
    SamplingParams(1, temperature=0.7),
    SamplingParams(1, temperature=1.3, top_k=7),
    SamplingParams(1, temperature=1.0, top_k=HEAD + 9),
    SamplingParams(1, temperature=1.0, top_p=0.9),
    SamplingParams(1, temperature=0.2, top_p=0.5),
    SamplingParams(1, temperature=1.0, top_p=1e-6),
    SamplingParams(1, temperature=1.0, top_k=50, top_p=0.8),
    SamplingParams(1, temperature=1.0, min_p=0.05),
    SamplingParams(1, temperature=5.0, min_p=0.9, top_k=20),
    SamplingParams(1, temperature=1.0, min_p=0.02, top_k=300, top_p=0.7),
]


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0], ids=["flat", "natural", "peaked"])
def test_truncation_is_that_of_transformers(scale: float) -> None:
    """Flat rows keep more than the likeliest HEAD tokens, so they take the slow way; all rows are cut in one go."""
    logits = torch.randn((len(TRUNCATIONS), VOCABULARY), generator=torch.Generator().manual_seed(0)) * scale
    kept = kept_weights(logits, Truncation.of(TRUNCATIONS, VOCABULARY, logits.device))
    for row, params in enumerate(TRUNCATIONS):
        scores = logits[row : row + 1] / params.temperature
        if params.min_p:
            scores = hf.MinPLogitsWarper(params.min_p)(None, scores)
        if params.top_k:
            scores = hf.TopKLogitsWarper(params.top_k)(None, scores)
        if params.top_p < 1:
            scores = hf.TopPLogitsWarper(params.top_p)(None, scores)
        torch.testing.assert_close((kept[row] / kept[row].sum())[None], scores.softmax(dim=1), atol=1e-6, rtol=1e-4)


def test_equals_of_the_last_token_kept_are_kept() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    kept = kept_weights(logits, Truncation.of([SamplingParams(1, temperature=1.0, top_k=2)], 6, logits.device))
    assert kept.nonzero()[:, 1].tolist() == [0, 2, 3, 4]


PENALTIES = [
    SamplingParams(1, repetition_penalty=1.7),
    SamplingParams(1, repetition_penalty=0.5),
    SamplingParams(1, presence_penalty=1.1),
    SamplingParams(1, frequency_penalty=0.6),
    SamplingParams(1, repetition_penalty=1.2, presence_penalty=-0.7, frequency_penalty=2.0),
]


def _penalized(logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], text: Sequence[int]) -> np.ndarray:
    """One row after penalties: repetition by transformers, the others token by token."""
    scores = torch.tensor(logits[None])
    if params.repetition_penalty != 1:
        seen = torch.tensor([[*prompt, *text]])
        scores = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(seen, scores)
    result = scores[0].numpy().copy()
    for token in set(text):
        result[token] -= params.presence_penalty + params.frequency_penalty * list(text).count(token)
    return result


def test_penalties_follow_the_text_step_by_step() -> None:
    """Greedy rows with different penalties in one batch, against a reference that looks at the whole text each time."""
    prompt, steps, generator = [3, 5, 5], 24, np.random.default_rng(1)
    sampler, names = _sampler(*PENALTIES, SamplingParams(1), vocabulary=12, prompt=prompt)
    texts: list[list[int]] = [[] for _ in names]
    for _ in range(steps):
        logits = generator.normal(size=(len(names), 12)).astype(np.float32)
        choices = sampler.choose(names, torch.tensor(logits))
        for row, (choice, params) in enumerate(zip(choices, [*PENALTIES, SamplingParams(1)], strict=True)):
            assert choice.token_id == _penalized(logits[row], params, prompt, texts[row]).argmax()
            texts[row].append(choice.token_id)


def test_nothing_of_a_request_that_left_reaches_its_successor() -> None:
    strong = SamplingParams(1, presence_penalty=2.0, repetition_penalty=2.0)
    logits = torch.tensor([[1.0, 0.9, 0.0]])
    sampler = Sampler(3, torch.device("cpu"))
    for prompt in ([0], [1], []):
        sampler.add("r", strong, prompt)
        chosen = [sampler.choose(["r"], logits.clone())[0].token_id for _ in range(2)]
        fresh, names = _sampler(strong, vocabulary=3, prompt=prompt)
        assert chosen == [fresh.choose(names, logits.clone())[0].token_id for _ in range(2)]
        sampler.remove("r")
    assert len(sampler) == 0


def test_logit_bias_is_added() -> None:
    bias = SamplingParams(1, logit_bias=((3, 5.0), (0, -100.0), (5, 100.0)))
    plain, biased = _choose(LOGITS.expand(2, -1), SamplingParams(1), bias)
    assert (plain.token_id, biased.token_id) == (0, 3)
    drawn = _frequencies(SamplingParams(1, temperature=1.0, logit_bias=((0, -100.0), (3, 1.0)), top_k=3))
    expected = np.exp([-np.inf, 1.0, 0.0, 0.0, 1.5, -np.inf])
    np.testing.assert_allclose(drawn, expected / expected.sum(), atol=0.03)


def test_greedy_takes_the_best_and_rows_keep_to_themselves() -> None:
    rows = torch.stack([LOGITS, torch.full_like(LOGITS, torch.nan), LOGITS.flip(0), LOGITS])
    params = [SamplingParams(1), SamplingParams(1), SamplingParams(1, logprobs=2), SamplingParams(1, temperature=1.0, seed=3)]
    greedy, broken, flipped, drawn = _choose(rows, *params)
    assert (greedy.token_id, greedy.error, greedy.logprobs) == (0, None, None)
    assert isinstance(broken.error, EngineFailed)
    assert flipped.token_id == 5
    assert flipped.logprobs is not None
    assert [entry.token_id for entry in flipped.logprobs.alternatives] == [5, 1]
    assert flipped.logprobs.chosen.logprob == pytest.approx(float(torch.log_softmax(LOGITS, 0)[0]), abs=1e-6)
    assert drawn == _choose(LOGITS[None], params[3])[0]


MIXTURE = [*TRUNCATIONS, *PENALTIES, SamplingParams(1), SamplingParams(1, temperature=0.9, logit_bias=((7, 9.0),), presence_penalty=1.0)]


def test_a_row_is_the_same_in_any_batch() -> None:
    """Requests come and go in between; each gets the tokens that it gets alone."""
    generator, vocabulary, steps = np.random.default_rng(2), HEAD + 100, 12
    params = [dataclasses.replace(one, seed=seed) for seed, one in enumerate(MIXTURE)]
    logits = generator.normal(size=(steps, len(params), vocabulary)).astype(np.float32)
    alone = []
    for row, one in enumerate(params):
        sampler, names = _sampler(one, vocabulary=vocabulary, prompt=[1, 2])
        alone.append([sampler.choose(names, torch.tensor(logits[step, row : row + 1]))[0].token_id for step in range(steps)])
    sampler, names = _sampler(*params, vocabulary=vocabulary, prompt=[1, 2])
    together: list[list[int]] = [[] for _ in params]
    while any(len(text) < steps for text in together):
        open_rows = [row for row, text in enumerate(together) if len(text) < steps]
        rows = generator.permutation(open_rows)[: 1 + generator.integers(len(open_rows))].tolist()
        values = torch.tensor(np.stack([logits[len(together[row]), row] for row in rows]))
        for row, choice in zip(rows, sampler.choose([names[row] for row in rows], values), strict=True):
            together[row].append(choice.token_id)
            if len(together[row]) == steps:
                sampler.remove(names[row])
    assert together == alone


def test_random_numbers_are_those_of_split_mix() -> None:
    """The published sequence of seed 1234567, and numbers in [0, 1) that look uniform."""
    state, counts = np.array([1234567], dtype=np.uint64), np.arange(5, dtype=np.uint64)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert split_mix(state, counts).tolist() == published
    numbers = uniform(np.array([start_state(seed) for seed in (0, 1, 2**64 - 1)])[:, None], np.arange(4000, dtype=np.uint64))
    assert numbers.min() >= 0 and numbers.max() < 1
    np.testing.assert_allclose(np.quantile(numbers, [0.25, 0.5, 0.75], axis=1).T, [[0.25, 0.5, 0.75]] * 3, atol=0.03)
    assert np.abs(np.corrcoef(numbers) - np.eye(3)).max() < 0.05


def test_continuations_have_seeds_of_their_own() -> None:
    seeds = [continuation_seed(seed, index) for seed in (0, 1, 2) for index in range(16)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**64
    assert continuation_seed(7, 0) == 7


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
