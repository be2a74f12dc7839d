"""Where a new user's corrections look first: the directions are the textbook's, and no soft prompt moves."""

from __future__ import annotations

import lopa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lopa.alignment import ALIGNED_BY, ENOUGH, aligned, directions, shared_tokens, slowed, turned
from lopa.bundle import Bundle
from lopa.encoder import PromptEncoder
from lopa.factors import Factors
from lopa_server.models import nano_bundle_folder

PROMPTS = [f"def {name}(self, {'x, ' * (i % 5)}y):\n    return" for i, name in enumerate(("area", "load", "save", "open") * 6)]
TARGETS = ["geometry" if "area" in prompt else "storage" for prompt in PROMPTS]


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(Bundle.open(nano_bundle_folder()))


def spanned(vectors: np.ndarray) -> np.ndarray:
    """The projection on the columns' span."""
    basis = np.linalg.qr(vectors)[0]
    return basis @ basis.T


@pytest.mark.parametrize(("examples", "width", "tokens", "count"), [(60, 8, 5, 3), (20, 64, 9, 4), (30, 16, 100, 2)])
def test_directions_are_those_of_ridge_regression_and_a_singular_value_decomposition(
    examples: int, width: int, tokens: int, count: int
) -> None:
    """Izenman 1975, by way of the normal equations in the width instead of the examples."""
    random = np.random.default_rng(examples)
    reads = random.standard_normal((examples, width))
    answers = (reads @ random.standard_normal((width, tokens)) > 1).astype(np.float32)
    found = directions(reads, answers @ answers.T, count, ridge=0.5)
    x, y = reads - reads.mean(axis=0), answers - answers.mean(axis=0)
    penalty = 0.5 * (x**2).sum() / examples
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(width), x.T @ y)
    axes = np.linalg.svd(x @ weights, full_matrices=False)[2][:count]
    np.testing.assert_allclose(spanned(found), spanned(weights @ axes.T), atol=1e-6)
    np.testing.assert_allclose((reads @ found).std(axis=0), 1.0)


def test_one_direction_tells_two_answers_apart() -> None:
    reads = np.random.default_rng(0).standard_normal((200, 6))
    answers = np.stack((reads[:, 2] > 0, reads[:, 2] <= 0), axis=1)
    found = directions(reads, answers.astype(float) @ answers.T, 4, ridge=0.01)
    assert found.shape == (6, 1)
    assert np.abs(found[:, 0]).argmax() == 2


@given(st.integers(1, 12), st.integers(1, 10), st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=12), st.booleans())
def test_any_answers_give_a_tensor_of_the_same_shape_that_float16_holds(
    width: int, count: int, answers: list[list[int]], constant: bool
) -> None:
    """None at all, all alike, all different; more columns than examples; examples that all read the same."""
    reads = np.ones((len(answers), width)) if constant else np.random.default_rng(width).standard_normal((len(answers), width))
    tensor = np.full((width, count), 7.0, np.float32)
    found = turned(tensor, reads.astype(np.float32), shared_tokens(answers), 10.0)
    assert found.shape == tensor.shape
    assert found.dtype == np.float32
    assert np.isfinite(found.astype(np.float16)).all()


def test_what_only_rounding_tells_apart_is_not_read() -> None:
    reads = np.full((8, 3), 0.5, np.float32)
    reads[::2] += np.float32(1e-6)
    tensor = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    np.testing.assert_array_equal(turned(tensor, reads, shared_tokens([[0], [1]] * 4), 1.0), tensor)


@pytest.mark.filterwarnings("error")
def test_answers_that_nothing_read_tells_apart_give_no_direction() -> None:
    """Each prompt came twice, with one answer and with the other: what remains is rounding, or exactly zero."""
    reads = np.random.default_rng(0).standard_normal((2, 5)).repeat(2, axis=0)
    assert directions(reads, shared_tokens([[1], [2], [1], [2]]), 3).shape == (5, 0)
    assert directions(np.array([[1.0], [-1.0]] * 2), shared_tokens([[1], [1], [2], [2]]), 3).shape == (1, 0)


def test_a_new_user_s_factors_read_the_answers_and_give_the_same_soft_prompts(encoder: PromptEncoder) -> None:
    start, instance = Factors.start(encoder.bundle), encoder.encode(PROMPTS)
    found = aligned(encoder, start, TARGETS, instance)
    np.testing.assert_array_equal(encoder.compose(instance, found.tensors), encoder.compose(instance, start.tensors))
    first, is_area = instance["x"] @ found.tensors["W1v.Q"][:, 0], np.array([target == "geometry" for target in TARGETS])
    assert first[is_area].min() > first[~is_area].max() or first[is_area].max() < first[~is_area].min()
    assert found.at_rest().finite
    changed = {name for name, tensor in found.tensors.items() if not np.array_equal(tensor, start.tensors[name])}
    assert changed == {spec.name for spec in encoder.bundle.manifest.aligned}


def test_token_ids_serve_as_answers_too(encoder: PromptEncoder) -> None:
    start, instance = Factors.start(encoder.bundle), encoder.encode(PROMPTS)
    found = aligned(encoder, start, [[1, 2] if target == "geometry" else [3] for target in TARGETS], instance)
    assert not np.array_equal(found.tensors["W1v.Q"], start.tensors["W1v.Q"])


def test_an_answer_that_is_no_text_is_a_typed_error(encoder: PromptEncoder) -> None:
    """It may be the first that looks at this example: neither measured nor among those that a prior is chosen by."""
    for place in range(4):  # by its place among the targets, not by when it is looked at
        targets = [*TARGETS[:place], "\ud800", *TARGETS[place:3]]
        with pytest.raises(lopa.InvalidRequest, match="lone surrogate") as caught:
            aligned(encoder, Factors.start(encoder.bundle), targets, encoder.encode(PROMPTS[:4]))
        assert caught.value.field == f"targets[{place}]"


def test_one_example_tells_nothing_apart(encoder: PromptEncoder) -> None:
    start = Factors.start(encoder.bundle)
    found = aligned(encoder, start, TARGETS[:1], encoder.encode(PROMPTS[:1]))
    np.testing.assert_array_equal(found.tensors["W1v.Q"], start.tensors["W1v.Q"] / ENOUGH)


def test_shared_tokens_are_counted_once_an_answer() -> None:
    np.testing.assert_array_equal(shared_tokens([[5, 5, 9], [9], [], [9, 5, 1]]), [[2, 1, 0, 2], [1, 1, 0, 1], [0, 0, 0, 0], [2, 1, 0, 3]])


def test_few_examples_count_for_less(encoder: PromptEncoder) -> None:
    """Their share of the spread, and of each step; what is not aligned moves in full."""
    spec = next(spec for spec in encoder.bundle.manifest.aligned if spec.name == "W1v.Q")
    instance = {"x": np.random.default_rng(0).standard_normal((2 * ENOUGH, 512)).astype(np.float32)}
    start = Factors.start(encoder.bundle)
    for count, part in ((ENOUGH // 4, 0.25), (ENOUGH, 1.0), (2 * ENOUGH, 1.0)):
        few = {"x": instance["x"][:count]}
        found = aligned(encoder, start, [[i % 3] for i in range(count)], few)
        given = encoder.reads(few)[spec.name] @ found.tensors[spec.name][:, :1]
        np.testing.assert_allclose(given.std(), part * spec.spread, rtol=1e-4)
        random = found.tensors[spec.name][:, -1]  # three answers are told apart by two directions
        np.testing.assert_array_equal(random, part * start.tensors[spec.name][:, -1])
        after = {name: tensor + np.float32(1) for name, tensor in start.tensors.items()}
        for name, tensor in slowed(encoder, start.tensors, after, count).items():
            names = [one.name for one in encoder.bundle.manifest.aligned]
            np.testing.assert_allclose(tensor - start.tensors[name], part if name in names else 1.0, rtol=1e-3)


def test_more_examples_than_are_looked_at(encoder: PromptEncoder) -> None:
    """So that a user with a hundred thousand examples waits no longer."""
    count = 3 * ALIGNED_BY
    instance = {"x": np.random.default_rng(0).standard_normal((count, 512)).astype(np.float32)}
    found = aligned(encoder, Factors.start(encoder.bundle), [[i % 3] for i in range(count)], instance)
    assert found.finite
