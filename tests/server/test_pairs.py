"""Scores and gradients: equal to plain torch and transformers, whoever shares the micro-batch."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from lopa_server.engine.base import InputSequence, PairRequest, PairResult
from lopa_server.engine.pair_queue import PairKind
from lopa_server.engine.torch_engine import attention, checkpointing, live
from lopa_server.engine.torch_engine import pairs as micro_batches
from lopa_server.engine.torch_engine.engine import TorchEngine
from lopa_server.engine.torch_engine.packed import PackedLinear, can_pack, pack_linears
from lopa_server.engine.torch_engine.pairs import PlacedPair, run_pairs
from transformers import AutoModelForCausalLM

from tests.server.engines import collect, load, pair, run, stream
from tests.tiny import build_tiny_fm

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "gpt_neox", "gpt2", "opt")


def _autograd(model: torch.nn.Module, request: PairRequest) -> tuple[float, np.ndarray | None]:
    """Sum of NLL and its gradient, by the model's own loss over labels: no batching, no tricks."""
    embed, sequence = model.get_input_embeddings(), request.input
    soft = None if sequence.soft is None else torch.from_numpy(sequence.soft).requires_grad_()
    after = embed(torch.tensor([*sequence.after, *request.target]))
    parts = [embed(torch.tensor(sequence.before, dtype=torch.long)), *([] if soft is None else [soft]), after]
    labels = torch.full((1, len(request)), -100)
    labels[0, -len(request.target) :] = torch.tensor(request.target)
    loss = model(inputs_embeds=torch.cat(parts)[None], labels=labels).loss * len(request.target)
    if soft is None:
        return float(loss.detach()), None
    loss.backward()
    return float(loss.detach()), soft.grad.numpy()


def _mixed_pairs() -> list[PairRequest]:
    random = np.random.default_rng(1)
    pairs = []
    for seed in range(24):
        tokens = int(random.integers(1, 70))
        before = int(random.integers(0, tokens + 1)) if seed % 3 == 0 else 0
        pairs.append(pair(seed, rows=int(random.integers(1, 12)), tokens=tokens, targets=int(random.integers(1, 20)), before=before))
    return pairs


def _close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_torch(family: str, tmp_path: Path) -> None:
    fm = build_tiny_fm(tmp_path, family=family)
    model = AutoModelForCausalLM.from_pretrained(fm)
    pairs = _mixed_pairs()
    results = run(load(fm), lambda engine: engine.prompt_gradients(pairs))
    for request, result in zip(pairs, results, strict=True):
        nll, gradient = _autograd(model, request)
        assert result.nll_sum == pytest.approx(nll, rel=1e-5)
        assert result.target_tokens == len(request.target)
        _close(result.gradient, gradient)


@pytest.mark.parametrize("prefix", [True, False], ids=["apart", "whole"])
def test_few_scores_at_a_time_and_prefixes_without_a_mask_give_the_same(
    prefix: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gemma2 caps its scores and has windows, so that its attention is plain products, with masks and without."""
    fm = build_tiny_fm(tmp_path, family="gemma2")
    model = AutoModelForCausalLM.from_pretrained(fm)
    sizes: list[int] = []
    softmax = torch.softmax

    def watched(scores: torch.Tensor, *arguments: object, **named: object) -> torch.Tensor:
        sizes.append(scores.numel())
        return softmax(scores, *arguments, **named)

    engine = load(fm)
    monkeypatch.setattr(torch, "softmax", watched)
    monkeypatch.setattr(attention, "MOST_SCORES", 5000)
    if not prefix:
        monkeypatch.setattr(live, "MOST_MASKED", 0)
    pairs = [*_mixed_pairs(), pair(99, tokens=60, targets=8, before=40)]

    async def scenario(engine: TorchEngine) -> tuple[list[PairResult], list[PairResult]]:
        return await engine.prompt_gradients(pairs), await engine.score(pairs)

    results, scores = run(engine, scenario)
    assert max(sizes) <= 5000
    assert (engine.stats().pair_prefix_tokens > 0) == prefix
    monkeypatch.setattr(torch, "softmax", softmax)
    for request, result, score in zip(pairs, results, scores, strict=True):
        nll, gradient = _autograd(model, request)
        assert result.nll_sum == pytest.approx(nll, rel=1e-5) == score.nll_sum
        _close(result.gradient, gradient)


@pytest.mark.parametrize("family", ("llama", "gemma3", "gpt2", "opt", "gpt_neox", "phi"))
def test_layers_computed_twice_give_the_same_gradients_and_keep_less(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(build_tiny_fm(tmp_path, family=family, layers=6))
    placed = [PlacedPair(request) for request in _mixed_pairs()]
    runner = engine.intake.worker._runner

    def measured() -> tuple[list[PairResult], int]:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return run_pairs(engine.intake.fm, runner, PairKind.GRADIENTS, placed), sum(kept.values())

    (once, whole), _ = measured(), monkeypatch.setattr(checkpointing, "ACTIVATION_BYTES", 0)
    twice, part = measured()
    assert part < whole / 2
    for one, two in zip(once, twice, strict=True):
        assert two.nll_sum == one.nll_sum
        np.testing.assert_array_equal(two.gradient, one.gradient)


@pytest.mark.parametrize("kind", PairKind)
@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2", "opt"))
def test_logits_of_a_few_targets_at_a_time_give_the_same(
    family: str, kind: PairKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gemma2 caps its logits behind the output head."""
    engine = load(build_tiny_fm(tmp_path, family=family))
    placed = [PlacedPair(request) for request in _mixed_pairs()]
    rows: list[int] = []
    engine.intake.fm.model.get_output_embeddings().register_forward_hook(lambda *call: rows.append(call[2].shape[:-1].numel()))

    def measured() -> list[PairResult]:
        rows.clear()
        return run_pairs(engine.intake.fm, engine.intake.worker._runner, kind, placed)

    whole = measured()
    targets = sum(result.target_tokens for result in whole)
    assert rows == [targets]
    monkeypatch.setattr(micro_batches, "LOGIT_BYTES", {"cpu": 7 * micro_batches.BYTES_A_LOGIT * engine.spec.vocab_size})
    by_part = measured()
    assert max(rows) == 7 and sum(rows) == targets + 1
    for one, two in zip(whole, by_part, strict=True):
        assert two.nll_sum == pytest.approx(one.nll_sum, rel=1e-5)
        if one.gradient is not None and two.gradient is not None:
            _close(two.gradient, one.gradient)
    assert all((result.gradient is None) == (kind is PairKind.SCORE) for result in by_part)


@pytest.mark.parametrize("most_scores", [attention.MOST_SCORES, 5000], ids=["whole", "parts"])
def test_bfloat16_gradients_point_where_float32_ones_do(tiny_fm: Path, most_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_SCORES", most_scores)
    pairs = _mixed_pairs()
    exact = run(load(tiny_fm), lambda engine: engine.prompt_gradients(pairs))
    engine = load(tiny_fm, dtype="bfloat16")
    packed = any(isinstance(module, PackedLinear) for module in engine.intake.fm.model.modules())
    assert packed == can_pack(torch.device("cpu"), torch.bfloat16)
    rounded = run(engine, lambda engine: engine.prompt_gradients(pairs))
    for one, two in zip(exact, rounded, strict=True):
        assert two.nll_sum == pytest.approx(one.nll_sum, rel=0.02)
        cosine = np.vdot(one.gradient, two.gradient) / (np.linalg.norm(one.gradient) * np.linalg.norm(two.gradient))
        assert cosine > 0.99


def test_packed_layers_give_the_same_bits_forward_and_backward() -> None:
    if not can_pack(torch.device("cpu"), torch.bfloat16):
        pytest.skip("this processor has no bfloat16 units")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 160), torch.nn.Linear(160, 64, bias=False)).to(torch.bfloat16).requires_grad_(False)
    first, second = model
    for rows in (1, 7, 200):
        given = torch.randn(rows, 3, 96).to(torch.bfloat16)
        one, two = given.clone().requires_grad_(), given.clone().requires_grad_()
        expected = second(first(one))
        copy = torch.nn.Sequential(first, second)
        assert pack_linears(copy) == 2
        found = copy(two)
        assert torch.equal(found, expected) and torch.equal(copy(given), expected)
        found.float().pow(2).sum().backward()
        expected.float().pow(2).sum().backward()
        torch.testing.assert_close(two.grad, one.grad, rtol=0.02, atol=0.02 * float(one.grad.abs().max()))
        assert torch.equal(copy[0].weight, first.weight)


def test_many_users_share_micro_batches_and_get_their_own(tiny_fm: Path) -> None:
    users = [[pair(100 * user + index, tokens=20 + user, targets=8) for index in range(6)] for user in range(8)]

    async def scenario(engine: TorchEngine) -> None:
        alone = [[(await engine.prompt_gradients([one]))[0] for one in pairs] for pairs in users]
        before = engine.stats().pair_batches
        together = await asyncio.gather(*(engine.prompt_gradients(pairs) for pairs in users))
        assert engine.stats().pair_batches - before < 8, "eight users' calls did not share micro-batches"
        for mine, mixed in zip(alone, together, strict=True):
            for one, two in zip(mine, mixed, strict=True):
                assert two.nll_sum == pytest.approx(one.nll_sum, rel=1e-6)
                _close(two.gradient, one.gradient)

    run(load(tiny_fm), scenario)


def test_scores_are_the_loss_of_transformers(tiny_fm: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_fm)
    pairs = [*_mixed_pairs(), *(pair(seed, rows=0, tokens=9) for seed in range(4))]
    results = run(load(tiny_fm), lambda engine: engine.score(pairs))
    for request, result in zip(pairs, results, strict=True):
        assert result.gradient is None
        assert result.nll_sum == pytest.approx(_autograd(model, request)[0], rel=1e-5)


@pytest.mark.parametrize("family", ("llama", "gemma3", "gpt2"))
def test_a_prefix_that_was_seen_before_changes_nothing_and_is_not_computed_again(family: str, tmp_path: Path) -> None:
    fm = build_tiny_fm(tmp_path, family=family)
    model = AutoModelForCausalLM.from_pretrained(fm)
    texts = [pair(seed, rows=0, tokens=40 + seed, targets=4) for seed in range(8)]

    def with_soft(text: PairRequest, seed: int) -> PairRequest:
        ids, soft = text.input.after, pair(seed, rows=5).input.soft
        return PairRequest(InputSequence(ids[:-2], soft, ids[-2:]), text.target, cache_salt=b"one tenant")

    async def scenario(engine: TorchEngine) -> None:
        for epoch in range(3):
            pairs = [with_soft(text, 100 * epoch + seed) for seed, text in enumerate(texts)]
            results, scores = await engine.prompt_gradients(pairs), await engine.score(pairs)
            for request, result, score in zip(pairs, results, scores, strict=True):
                nll, gradient = _autograd(model, request)
                assert result.nll_sum == pytest.approx(nll, rel=1e-5) == score.nll_sum
                _close(result.gradient, gradient)
        stats = engine.stats()
        assert stats.pair_prefix_tokens == sum(len(text.input.after) - 2 for text in texts), "a prefix was computed twice"
        assert stats.pair_prefix_hit_tokens == 5 * stats.pair_prefix_tokens and stats.blocks_used == 0 == stats.pairs_whole
        await engine.score([dataclasses.replace(pairs[0], cache_salt=b"another tenant")])
        assert engine.stats().pair_prefix_tokens == stats.pair_prefix_tokens + len(texts[0].input.after) - 2

    run(load(fm), scenario)


@pytest.mark.parametrize("family", ("llama", "gemma3"))
def test_prefixes_computed_in_slices_give_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One takes half of its own over from another, which is still being computed."""
    monkeypatch.setattr(micro_batches, "SLICE", {"cpu": 10})
    fm = build_tiny_fm(tmp_path, family=family)
    model = AutoModelForCausalLM.from_pretrained(fm)
    first, second = pair(1, tokens=50, before=44), pair(2, tokens=50, before=45)
    half = InputSequence(first.input.before[:26] + second.input.before[26:], second.input.soft, second.input.after)
    pairs = [first, dataclasses.replace(second, input=half)]

    async def scenario(engine: TorchEngine) -> list[PairResult]:
        results = await engine.prompt_gradients(pairs)
        stats = engine.stats()
        assert (stats.pair_batches, stats.pair_prefix_tokens, stats.pair_prefix_hit_tokens) == (1, 44 + 45 - 24, 24)
        return results

    for request, result in zip(pairs, run(load(fm), scenario), strict=True):
        nll, gradient = _autograd(model, request)
        assert result.nll_sum == pytest.approx(nll, rel=1e-5)
        _close(result.gradient, gradient)


def test_decoding_goes_on_beside_gradients(tiny_fm: Path) -> None:
    request = stream("r", 1, max_tokens=60, logprobs=0)
    pairs = [pair(seed, tokens=60, targets=20) for seed in range(1500)]

    async def scenario(engine: TorchEngine) -> None:
        alone = await collect(engine, request)
        tuning = asyncio.create_task(engine.prompt_gradients(pairs))
        beside = await collect(engine, request)
        assert beside.tokens == alone.tokens
        assert not tuning.done(), "the stream had to wait for all gradients"
        assert engine.stats().pairs_done, "gradients had to wait for the stream"
        tuning.cancel()

    run(load(tiny_fm), scenario)


def test_a_cancelled_call_is_dropped_and_others_are_not(tiny_fm: Path) -> None:
    pairs = [pair(seed, tokens=60, targets=20) for seed in range(200)]

    async def scenario(engine: TorchEngine) -> list[PairResult]:
        leaving = asyncio.create_task(engine.prompt_gradients(pairs))
        staying = asyncio.create_task(engine.prompt_gradients(pairs[:3]))
        await asyncio.sleep(0)
        leaving.cancel()
        results = await staying
        assert leaving.cancelled()
        assert engine.stats().pairs_done < len(pairs)
        assert engine.stats().pairs_waiting == 0
        return results

    assert len(run(load(tiny_fm), scenario)) == 3
