"""Starts and lengths over the shipped bundle's shared part."""

from __future__ import annotations

from dataclasses import replace

import torch
from lopa_exporters.frozen import FrozenModel
from lopa_exporters.lopa import LoPA, init_lopa
from lopa_exporters.simulate import aligned_start

from benchmarks.quality.material import Material


def longer(lopa: LoPA, fm: FrozenModel, seed: int, rows: int) -> LoPA:
    """The same method with more rows: the first are the bundle's, the others start in the vocabulary; U's head repeats itself for them."""
    config = replace(lopa.config, rows=rows)
    fresh = init_lopa(config, fm.vocabulary(), torch.Generator().manual_seed(seed))
    z = fresh.shared["Z"].clone()
    z[: lopa.config.rows] = lopa.shared["Z"]
    size, copies = rows * config.rank, -(-rows // lopa.config.rows)
    u = {"W2u": lopa.shared["W2u"].repeat(copies, 1)[:size], "b2u": lopa.shared["b2u"].repeat(copies)[:size]}
    return LoPA(config, {**lopa.shared, "Z": z, **u}, fresh.start)


def at_answers(lopa: LoPA, material: Material) -> LoPA:
    """As a device begins: what the corrections read tells the user's own answers apart."""
    (values,) = material.features.values()
    rows = list(material.training)
    return aligned_start(lopa, torch.from_numpy(values)[rows], [pair.target for pair in material.of(rows)])
