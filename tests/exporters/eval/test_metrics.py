"""Figures against numbers from elsewhere: the literature, transformers, the published counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lopa_exporters.eval.metrics import accuracy, bootstrap, f1, mean_of_both, proportion
from lopa_exporters.eval.recipes import METHODS, Recipe, paper_recipe
from lopa_exporters.eval.training import rate
from lopa_exporters.lopa import LoPAConfig, of_head


@pytest.mark.parametrize(("hits", "trials", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)])
def test_wilson_intervals_are_the_known_ones(hits: int, trials: int, low: float, high: float) -> None:
    """The last: Newcombe 1998, table I, method 3."""
    figure = proportion("x", [True] * hits + [False] * (trials - hits))
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=1e-4)


def test_f1_counts_the_positive_class() -> None:
    expected, predicted = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0])
    assert accuracy(predicted, expected) == pytest.approx(4 / 6)
    assert f1(predicted, expected) == pytest.approx(2 / 3)
    assert f1(np.zeros(6, np.int64), expected) == 0
    assert mean_of_both(predicted, expected) == pytest.approx(2 / 3)


def test_a_bootstrap_interval_of_a_share_is_near_wilsons() -> None:
    expected = np.ones(400, np.int64)
    predicted = np.array([1] * 300 + [0] * 100)
    figure, exact = bootstrap("x", accuracy, predicted, expected), proportion("x", [True] * 300 + [False] * 100)
    assert (figure.value, figure.low, figure.high) == pytest.approx((exact.value, exact.low, exact.high), abs=0.01)


@pytest.mark.parametrize(
    ("task", "rank", "features", "hidden", "published"),
    [
        ("glue-mrpc", 1, 1024, 1024, 0.80),
        ("glue-mrpc", 2, 1024, 1024, 1.07),
        ("glue-mrpc", 4, 1024, 1024, 1.60),
        ("cruxeval-o", 1, 1024, 2048, 4.23),
        ("mbpp", 1, 1024, 2560, 4.76),
        ("mbpp", 1, 1024, 4096, 6.35),
    ],
)
def test_shapes_give_the_published_counts(task: str, rank: int, features: int, hidden: int, published: float) -> None:
    """Millions of parameters in the official repository's plots/plot_data.py, and of the 8B models in the paper."""
    recipe = paper_recipe(task, "lopa")
    config = LoPAConfig(hidden, features, recipe.rows, rank, recipe.head_width, profile="heads")
    assert config.personal_count() / 1e6 == pytest.approx(published, abs=0.006)


@pytest.mark.parametrize(
    ("task", "rows", "features", "hidden", "published"),
    [("glue-mrpc", 5, 1024, 1024, 1.58), ("glue-mrpc", 10, 1024, 1024, 2.89), ("cruxeval-o", 10, 768, 2048, 16.34)],
)
def test_idpgs_shapes_give_the_published_counts(task: str, rows: int, features: int, hidden: int, published: float) -> None:
    """As above, from the same file: the head that makes V, at r = m."""
    recipe = paper_recipe(task, "idpg")
    shapes = LoPAConfig(hidden, features, rows, rows, recipe.head_width, profile="heads").head_shapes()
    assert sum(math.prod(shape) for name, shape in shapes.items() if of_head(name, "v")) / 1e6 == pytest.approx(published, abs=0.006)


def test_schedules_are_transformers_own() -> None:
    import torch
    from transformers import get_scheduler

    names = {"constant": "constant_with_warmup", "linear": "linear"}
    for schedule, theirs in names.items():
        recipe = Recipe(schedule=schedule, warmup=0.06, learning_rate=1.0)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=int(0.06 * 100), num_training_steps=100)
        for step in range(100):
            assert rate(recipe, step, 100) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["mbpp", "cruxeval-i", "cruxeval-o", "glue-sst2"])
def test_every_task_and_method_has_a_recipe(task: str, method: str) -> None:
    assert paper_recipe(task, method).rows == 10


def test_a_recipe_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="schedule is 'cosine'"):
        Recipe(schedule="cosine")
    with pytest.raises(ValueError, match="epochs"):
        Recipe(epochs=0)
