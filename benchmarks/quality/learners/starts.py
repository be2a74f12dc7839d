"""Other starts and lengths over the shipped bundle's shared part: what a larger prompt, or a start from the user's own examples, is worth.

Legend: n items, h width of a matrix's input, s rank of a correction, t distinct target tokens, m rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from lopa_exporters.frozen import FrozenModel
from lopa_exporters.lopa import LoPA, Tensors, init_lopa
from torch import Tensor

from benchmarks.quality.material import Material

RIDGE = 10.0
"""In units of an item's mean squared length; chosen on development packages, where 1 tells labels apart better and costs NLL."""


def longer(lopa: LoPA, fm: FrozenModel, seed: int, rows: int) -> LoPA:
    """The same method with more rows: the first are the bundle's, the others start in the vocabulary; U's head repeats itself for them."""
    config = replace(lopa.config, rows=rows)
    fresh = init_lopa(config, fm.vocabulary(), torch.Generator().manual_seed(seed))
    z = fresh.shared["Z"].clone()
    z[: lopa.config.rows] = lopa.shared["Z"]
    size, copies = rows * config.rank, -(-rows // lopa.config.rows)
    u = {"W2u": lopa.shared["W2u"].repeat(copies, 1)[:size], "b2u": lopa.shared["b2u"].repeat(copies)[:size]}
    return LoPA(config, {**lopa.shared, "Z": z, **u}, fresh.start)


def aligned(lopa: LoPA, material: Material) -> LoPA:
    """Every correction's Q reads, instead of random directions, those that tell the user's own answers apart; P is zero as ever."""
    (values,) = material.features.values()
    features = torch.from_numpy(values)[list(material.training)]
    answers = bags(material)
    start: Tensors = dict(lopa.start)
    for name in lopa.config.corrections:
        inputs = features if name.startswith("W1") else torch.tanh(features @ lopa.shared[f"W1{name[-1]}"].T + lopa.shared[f"b1{name[-1]}"])
        found = directions(inputs, answers, start[f"{name}.Q"].shape[1])
        start[f"{name}.Q"] = torch.cat((found, start[f"{name}.Q"][:, found.shape[1] :]), dim=1)
    return replace(lopa, start=start)


def bags(material: Material) -> Tensor:
    """(n, t): which target tokens each training item has."""
    targets = [set(material.pairs[row].target) for row in material.training]
    places = {token: place for place, token in enumerate(sorted(set[int]().union(*targets)))}
    found = torch.zeros(len(targets), len(places))
    for row, tokens in enumerate(targets):
        found[row, [places[token] for token in tokens]] = 1.0
    return found


def directions(inputs: Tensor, answers: Tensor, count: int, ridge: float = RIDGE) -> Tensor:
    """Reduced-rank ridge regression (Izenman 1975) of answers (n, t) on inputs (n, h): (h, up to count), scores of unit variance.

    Fewer where the answers differ in fewer ways.
    """
    x = (inputs - inputs.mean(dim=0)).double()
    y = (answers - answers.mean(dim=0)).double()
    gram = x @ x.T
    weights = x.T @ torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(x), dtype=torch.float64), y)
    _, strengths, axes = torch.linalg.svd(x @ weights, full_matrices=False)
    real = int((strengths[:count] > 1e-6 * strengths[0]).sum())
    found = weights @ axes[:real].T
    return (found / (x @ found).std(dim=0)).float()
