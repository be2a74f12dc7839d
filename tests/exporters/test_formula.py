"""The method is LoPA: Z against the paper's formula, written out in numpy without our code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lopa_exporters.lopa import LoPAConfig, init_corrections, init_lopa, soft_prompt
from numpy.typing import NDArray

M, D, H, W, B = 5, 48, 24, 16, 3
Array = NDArray[np.float64]
Weights = dict[str, Array]


def paper(weights: Weights, x: Array, rank: int, composition: str) -> Array:
    """Z for one input x (h,): (m, d), or (2m, d) for concat, in double precision."""

    def head(side: str, count: int) -> Array:
        hidden = np.tanh(weights[f"W1{side}"] @ x + weights[f"b1{side}"])
        return (weights[f"W2{side}"] @ hidden + weights[f"b2{side}"]).reshape(count, rank)

    z = weights["Z"]
    instance = head("u", M) @ head("v", D).T
    return {
        "product": lambda: z * (1 / (1 + np.exp(-instance))),
        "add": lambda: z + instance,
        "max": lambda: np.maximum(z, instance),
        "concat": lambda: np.concatenate([z, instance]),
    }[composition]()


def config(profile: str, rank: int, composition: str = "product", **settings: object) -> LoPAConfig:
    return LoPAConfig(hidden=D, features=H, rows=M, rank=rank, head_width=W, profile=profile, composition=composition, **settings)  # type: ignore[arg-type]


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def check(found: torch.Tensor, weights: Weights, x: torch.Tensor, rank: int, composition: str) -> None:
    expected = np.stack([paper(weights, row, rank, composition) for row in x.double().numpy()])
    assert found.shape == expected.shape
    assert np.abs(found.numpy() - expected).max() <= 1e-6


@pytest.mark.parametrize("composition", ["product", "add", "max", "concat"])
@pytest.mark.parametrize("rank", [1, 4])
def test_heads_profile_is_the_paper(rank: int, composition: str) -> None:
    method = config("heads", rank, composition)
    personal = random_tensors(method.personal_shapes(), seed=rank)
    x = torch.randn(B, H, generator=torch.Generator().manual_seed(9))
    weights = {name: tensor.double().numpy() for name, tensor in personal.items()}
    check(soft_prompt(method, {}, personal, x), weights, x, rank, composition)


@pytest.mark.parametrize("rank", [1, 4])
def test_factors_profile_is_the_paper_with_corrected_weights(rank: int) -> None:
    """Low-rank factors multiplied out in numpy give the same Z as our code, which never multiplies them out."""
    corrections = {"W1u": 1, "W2u": 2, "W1v": 3, "W2v": 1}
    method = config("factors", rank, corrections=corrections, z_rank=2, bias_corrections=("b1u", "b2v"), z_gain=0.7, correction_gain=0.4)
    shared = random_tensors(method.full_shapes(), seed=1)
    personal = random_tensors(method.personal_shapes(), seed=2)
    weights = {name: tensor.double().numpy() for name, tensor in shared.items()}
    own = {name: tensor.double().numpy() for name, tensor in personal.items()}
    weights["Z"] = weights["Z"] + 0.7 * own["Z.A"] @ own["Z.B"].T
    for name in corrections:
        weights[name] = weights[name] + 0.4 * own[f"{name}.P"] @ own[f"{name}.Q"].T
    for name in ("b1u", "b2v"):
        weights[name] = weights[name] + 0.4 * own[f"{name}.delta"]
    x = torch.randn(B, H, generator=torch.Generator().manual_seed(9))
    check(soft_prompt(method, shared, personal, x), weights, x, rank, "product")


def test_prompt_profile_is_prompt_tuning() -> None:
    method = config("prompt", 1, "none")
    personal = random_tensors(method.personal_shapes(), seed=3)
    assert list(personal) == ["Z"]
    assert torch.equal(soft_prompt(method, {}, personal, torch.randn(B, H)), personal["Z"].expand(B, M, D))


@pytest.mark.parametrize(("z_start", "side"), [("direct", "Z.B"), ("product", "Z.A")])
def test_a_new_user_has_the_shared_prompt_and_moves_at_the_first_step(z_start: str, side: str) -> None:
    """Nothing is changed at the start, and of every product one factor has a gradient."""
    method = config("factors", 2, output_std=0.2, inner_std=0.2, bias_corrections=("b2u",), z_start=z_start)
    lopa = init_lopa(method, torch.randn(100, D), torch.Generator().manual_seed(0))
    x = torch.randn(B, H)
    assert torch.equal(lopa(x), soft_prompt(config("heads", 2), {}, lopa.shared, x))
    start = {name: tensor.clone().requires_grad_() for name, tensor in lopa.start.items()}
    soft_prompt(method, lopa.shared, start, x).square().sum().backward()
    moved = {name for name, tensor in start.items() if tensor.grad is not None and tensor.grad.abs().max() > 0}
    assert moved == {side, "W1u.P", "W2u.P", "W1v.P", "W2v.P", "b2u.delta"}


@pytest.mark.parametrize("rank", [1, 2, M, M + 2])
def test_a_direct_start_reaches_rows_evenly(rank: int) -> None:
    """A's columns are orthogonal and its rows of unit norm in the mean; at full rank each column is one row of Z."""
    start = init_corrections(config("factors", 1, z_rank=rank), torch.Generator().manual_seed(0))["Z.A"]
    gram = start.T @ start
    assert torch.allclose(gram, torch.diag(gram.diag()), atol=1e-5)
    assert start.square().sum(dim=1).mean().item() == pytest.approx(1.0, abs=1e-5)
    assert rank < M or torch.equal(start[:, :M], torch.eye(M))


def test_dropout_differs_between_the_heads_and_is_off_by_default() -> None:
    method = config("heads", 1)
    personal = random_tensors(method.personal_shapes(), seed=1)
    x = torch.randn(B, H)
    assert torch.equal(soft_prompt(method, {}, personal, x), soft_prompt(method, {}, personal, x))
    assert not torch.equal(soft_prompt(method, {}, personal, x, dropout=0.5), soft_prompt(method, {}, personal, x))


def test_rows_of_z_start_from_the_vocabulary() -> None:
    vocabulary = torch.randn(50, D)
    z = init_lopa(config("prompt", 1, "none"), vocabulary, torch.Generator().manual_seed(0)).start["Z"]
    assert all((vocabulary == row).all(dim=1).any() for row in z)
    assert len({tuple(row.tolist()) for row in z}) == M


def test_a_factors_user_owns_about_ten_thousand_numbers_at_llama_size() -> None:
    """Hidden size 4096, m 10, r 1, encoder width 384, k = s = 1: the size that the design names."""
    method = LoPAConfig(hidden=4096, features=384, rows=10, rank=1)
    assert method.personal_count() == (10 + 4096) + (384 + 384) + (10 + 384) + (384 + 384) + (4096 + 384) == 10_516
    heads = LoPAConfig(hidden=4096, features=384, rows=10, rank=1, profile="heads")
    assert heads.personal_count() == 10 * 4096 + 2 * (384 * 384 + 384) + 10 * 385 + 4096 * 385


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"profile": "lora"}, "profile"),
        ({"composition": "mean"}, "composition"),
        ({"profile": "prompt"}, "prompt"),
        ({"rows": 0}, "rows"),
        ({"corrections": {"W3": 1}}, "corrections"),
        ({"corrections": {"W1u": 0}}, "corrections"),
        ({"bias_corrections": ("W1u",)}, "bias_corrections"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        LoPAConfig(**{"hidden": D, "features": H, **settings})  # type: ignore[arg-type]
