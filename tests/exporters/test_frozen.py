"""Likelihoods against transformers' own loss and decoding, one pair at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lopa_exporters.cohort import Cohort, StepSettings, soft_prompts
from lopa_exporters.frozen import FrozenModel, PrefixStore, TokenPair
from lopa_exporters.lopa import LoPA, soft_prompt

PAIRS = [
    TokenPair([5, 6, 7], [8]),
    TokenPair([9] * 20, [10, 11, 12]),
    TokenPair([11, 12], [13] * 9),
    TokenPair([13, 14, 15, 16, 17], [18, 19]),
    TokenPair([4, 5], [6, 7], prefix=[21, 22, 23]),
    TokenPair([], [9, 3], prefix=[24] * 13),
]


@pytest.fixture(scope="module")
def fm(fm_folder: Path) -> FrozenModel:
    return FrozenModel.load(fm_folder, device="cpu")


@pytest.mark.parametrize("kept", [0, 3000, 1 << 20])
def test_losses_and_gradients_are_those_of_each_pair_alone(fm: FrozenModel, kept: int) -> None:
    """Whatever is kept of prefixes: nothing, too little for all of them, or everything."""
    fm = FrozenModel(fm.model, fm.tokenizer, fm.device, bf16=False, max_rows=3, prefixes=PrefixStore(kept))
    for _ in range(2):
        _check_losses(fm)
        assert fm.prefixes.nbytes <= kept


def _check_losses(fm: FrozenModel) -> None:
    soft = (0.3 * torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(0))).requires_grad_()
    losses = fm.losses(soft, PAIRS)
    losses.nll.sum().backward()
    assert losses.tokens.tolist() == [1, 3, 9, 2, 2, 2]
    embed = fm.model.get_input_embeddings()
    for i, pair in enumerate(PAIRS):
        alone = soft.detach()[i].clone().requires_grad_()
        before, behind = (embed(torch.tensor(ids, dtype=torch.long)) for ids in (pair.prefix, [*pair.prompt, *pair.target]))
        labels = torch.tensor([[-100] * (len(pair.prefix) + 5 + len(pair.prompt)) + list(pair.target)])
        mean = fm.model(inputs_embeds=torch.cat((before, alone, behind))[None], labels=labels).loss
        (len(pair.target) * mean).backward()
        assert losses.nll[i].item() == pytest.approx(len(pair.target) * mean.item(), rel=1e-5)
        assert soft.grad is not None
        assert alone.grad is not None
        assert torch.allclose(soft.grad[i], alone.grad, atol=1e-5)


def test_exact_means_that_greedy_decoding_gives_the_target(fm: FrozenModel) -> None:
    prompt = torch.tensor([PAIRS[0].prompt])
    greedy = fm.model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=1)[0, 3:].tolist()
    wrong = [*greedy[:3], (greedy[3] + 1) % 300]
    assert fm.losses(None, [TokenPair(PAIRS[0].prompt, target) for target in (greedy, wrong)]).exact.tolist() == [True, False]


def test_a_cohort_steps_each_person_as_if_alone(lopa: LoPA) -> None:
    """Soft prompts, clipping by the person's own norm and AdamW, against torch person by person; one of three rests."""
    generator = torch.Generator().manual_seed(1)
    cohort, who = Cohort.start(lopa.start, 3), torch.tensor([2, 0])
    x, goals = (
        torch.randn(2, 6, 32, generator=generator),
        torch.randn(2, 6, 4, 32, generator=generator) * torch.tensor([0.01, 3.0]).reshape(2, 1, 1, 1),
    )
    settings = StepSettings(learning_rate=1e-2, weight_decay=0.1, clip=0.4)
    for _ in range(5):
        personal = {name: tensor.requires_grad_() for name, tensor in cohort.personal(lopa.start, who).items()}
        (soft_prompts(lopa.config, lopa.shared, personal, x) * goals).sum().backward()
        cohort.step(who, {name: tensor.grad for name, tensor in personal.items() if tensor.grad is not None}, settings)
    assert cohort.ages.tolist() == [5, 0, 5]
    for i, slot in enumerate(who.tolist()):
        alone = {name: tensor.clone().requires_grad_() for name, tensor in lopa.start.items()}
        optimizer = torch.optim.AdamW(alone.values(), lr=1e-2, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (soft_prompt(lopa.config, lopa.shared, alone, x[i]) * goals[i]).sum().backward()
            torch.nn.utils.clip_grad_norm_(alone.values(), 0.4)
            optimizer.step()
        for name, tensor in alone.items():
            assert torch.allclose(cohort.tensors[name][slot], tensor.detach(), atol=1e-4), name
    assert all(torch.equal(cohort.tensors[name][1], tensor) for name, tensor in lopa.start.items())
