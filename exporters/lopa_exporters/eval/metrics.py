"""Figures with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
_Z = 1.959963984540054
_RESAMPLES = 2000


@dataclass(frozen=True)
class Figure:
    """value and the ends of its 95 % interval, as fractions of 1."""

    name: str
    value: float
    low: float
    high: float


def proportion(name: str, correct: Sequence[bool]) -> Figure:
    """A share of successes with Wilson's score interval (Wilson 1927): holds at 0 and 1, and for small n.

    Raises:
        ValueError: no trials.
    """
    n = len(correct)
    if not n:
        raise ValueError(f"{name} of nothing")
    p = sum(correct) / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Figure(name, p, max(0.0, centre - half), min(1.0, centre + half))


def accuracy(predicted: Labels, expected: Labels) -> float:
    """Share of equal labels."""
    return float((predicted == expected).mean())


def f1(predicted: Labels, expected: Labels) -> float:
    """Of label 1, as GLUE has it: 2 tp / (2 tp + fp + fn), 0 where nothing is positive."""
    hits = int(((predicted == 1) & (expected == 1)).sum())
    errors = int((predicted != expected)[(predicted == 1) | (expected == 1)].sum())
    return 2 * hits / (2 * hits + errors) if hits else 0.0


def mean_of_both(predicted: Labels, expected: Labels) -> float:
    """Of accuracy and F1: one figure for MRPC and QQP, as GLUE's own leaderboard and the official code form it."""
    return (accuracy(predicted, expected) + f1(predicted, expected)) / 2


def bootstrap(name: str, statistic: Callable[[Labels, Labels], float], predicted: Labels, expected: Labels, seed: int = 0) -> Figure:
    """Any statistic with the percentile interval over resampled examples (Efron 1979)."""
    generator = np.random.default_rng(seed)
    draws = (generator.integers(len(expected), size=len(expected)) for _ in range(_RESAMPLES))
    low, high = np.percentile([statistic(predicted[rows], expected[rows]) for rows in draws], [2.5, 97.5])
    return Figure(name, statistic(predicted, expected), float(low), float(high))


def score_labels(metrics: Sequence[str], predicted: Labels, expected: Labels) -> list[Figure]:
    """The named metrics of one task, in order: accuracy, f1, mean."""
    figures = []
    for name in metrics:
        if name == "accuracy":
            figures.append(proportion(name, (predicted == expected).tolist()))
        else:
            figures.append(bootstrap(name, {"f1": f1, "mean": mean_of_both}[name], predicted, expected))
    return figures
