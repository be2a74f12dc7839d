"""Where a new user's corrections look first: at what tells the user's own answers apart, instead of in random directions.

A low-rank correction P Q^T has P zero at the start, so Q may be anything without changing a soft prompt. Whatever Q reads there, P can act
on from the first step. Which directions those should be is a regression of the answers on what Q reads: the reduced-rank regression of
Izenman 1975, with a ridge. It needs no server.

Few examples are learnt by heart sooner than they teach what tells answers apart, so corrections count for less the fewer there are: a
Q that is smaller, and moves as much less, makes everything that P does as much smaller.

Legend: n examples, h width of what a tensor reads, s columns of the tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopa.encoder import PromptEncoder, Tensors
from lopa.examples import batch
from lopa.factors import Factors
from lopa.values import Float32, Target, unicode_text

Float64 = NDArray[np.float64]
ALIGNED_BY = 512
"""Training examples that are looked at, at most: the regression costs n^3 in time and n^2 in memory, however long the answers are."""
ENOUGH = 128
"""Training examples with which corrections count in full. On development packages 256 and 512 brought filing's NLL further down, and
fewer labels were right with 160 examples."""
RIDGE = 3.0
"""In units of an example's mean squared length; chosen on development packages among 1, 3 and 10."""
LARGEST = 1e3
"""Of an entry: what needs larger ones is told apart by rounding alone, and float16 holds 65,504."""


def aligned(encoder: PromptEncoder, start: Factors, targets: Sequence[Target], instance: Tensors) -> Factors:
    """The same factors, with the tensors that the bundle names (`Manifest.aligned`) at the user's own answers, as large as `share` says.

    start: factors that give the same soft prompts whatever these tensors hold, as the bundle's plain start does.
    targets: of the training examples, fewer than two of which tell nothing apart. instance: their instance tensors, name -> (n, ...).

    Raises:
        InvalidRequest: a target with a lone surrogate. BundleError: a graph that breaks the contract, or values that are not finite.
    """
    specs = encoder.bundle.manifest.aligned
    count = len(targets)
    if not specs:
        return start
    tensors = {spec.name: start.tensors[spec.name] for spec in specs}
    if count > 1:
        some = batch(count, min(count, ALIGNED_BY), 1, 0)
        chosen = [unicode_text(text, f"targets[{i}]") if isinstance(text := targets[i], str) else text for i in some]
        answers = shared_tokens(tokens_of(encoder, chosen))
        reads = encoder.reads({name: value[some] for name, value in instance.items()})
        tensors = {spec.name: turned(tensors[spec.name], reads[spec.name], answers, spec.spread) for spec in specs}
    part = np.float32(share(count))
    return replace(start, tensors={**start.tensors, **{name: part * tensor for name, tensor in tensors.items()}})


def share(examples: int) -> float:
    """Part of their full spread and of the learning rate that aligned tensors have, with so many training examples."""
    return min(1.0, examples / ENOUGH)


def slowed(encoder: PromptEncoder, before: Tensors, after: Tensors, examples: int) -> Tensors:
    """Personal tensors after a step of which aligned ones take their `share` only, as at that part of the learning rate."""
    part = np.float32(share(examples))
    if part == 1:
        return after
    names = [spec.name for spec in encoder.bundle.manifest.aligned]
    return {**after, **{name: before[name] + part * (after[name] - before[name]) for name in names}}


def tokens_of(encoder: PromptEncoder, targets: Sequence[Target]) -> list[Sequence[int]]:
    """Each answer's tokens: the encoder's own of a text, or the token ids that were given."""
    texts = encoder.tokenize([target if isinstance(target, str) else "" for target in targets])
    return [text if isinstance(target, str) else target for target, text in zip(targets, texts, strict=True)]


def shared_tokens(answers: Sequence[Sequence[int]]) -> Float64:
    """(n, n): how many distinct tokens two answers have in common, Y Y^T of the bags of tokens Y that are regressed."""
    having: dict[int, list[int]] = defaultdict(list)
    for row, tokens in enumerate(answers):
        for token in set(tokens):
            having[token].append(row)
    found = np.zeros((len(answers), len(answers)))
    for rows in having.values():
        found[np.ix_(rows, rows)] += 1.0
    return found


def turned(tensor: Float32, reads: Float32, answers: Float64, spread: float) -> Float32:
    """A tensor (h, s) whose columns are those of `directions`; columns for which there are none stay.

    spread: standard deviation of what a column gives over the examples.
    """
    found = spread * directions(reads, answers, tensor.shape[1])
    kept = found[:, np.abs(found).max(axis=0, initial=0.0) <= LARGEST].astype(np.float32)
    return np.concatenate((kept, tensor[:, kept.shape[1] :]), axis=1)


def directions(reads: NDArray[Any], answers: NDArray[Any], count: int, ridge: float = RIDGE) -> Float64:
    """Reduced-rank ridge regression of answers on reads (n, h): (h, up to `count`), scores of unit variance, strongest first.

    answers: (n, n), the answers' products with one another. Fewer directions come where the answers differ in fewer ways.
    """
    x = reads - reads.mean(axis=0, dtype=np.float64)
    gram = x @ x.T
    size = gram.trace() / len(x)
    if not size > 0:
        return np.zeros((reads.shape[1], 0))
    centred = answers - answers.mean(axis=0) - answers.mean(axis=1, keepdims=True) + answers.mean()
    # With K = x x^T and R = (K + ridge)^-1, the fit is K R y; its left singular vectors are eigenvectors of K R (y y^T) R K.
    inverse = np.linalg.inv(gram + ridge * size * np.eye(len(x)))
    pulled = inverse @ centred @ inverse
    squares, left = np.linalg.eigh(gram @ pulled @ gram)
    least = 1e-10 * centred.trace()  # of their sum if all could be told: where nothing read tells any apart, the largest is rounding too
    real = [place for place in range(len(x) - 1, max(-1, len(x) - 1 - count), -1) if squares[place] > least]
    found: Float64 = x.T @ (pulled @ (gram @ left[:, real]))
    found /= (x @ found).std(axis=0)
    return found
