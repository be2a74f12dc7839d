"""Starts and lengths over the shipped bundle's shared part."""

from __future__ import annotations

from dataclasses import replace

import torch
from lopa_exporters.lopa import LoPA, init_lopa
from lopa_exporters.simulate import aligned_start
from torch import Tensor

from benchmarks.quality.material import Material


def with_rows(lopa: LoPA, vocabulary: Tensor, seed: int, rows: int) -> LoPA:
    """The same method with m = rows, and factors as for a new user.

    The first rows are the method's own; others start in the vocabulary, (tokens, d), and U's head repeats itself for them.
    """
    config = replace(lopa.config, rows=rows)
    fresh = init_lopa(config, vocabulary, torch.Generator().manual_seed(seed))
    kept = lopa.shared["Z"][:rows]
    z = torch.cat([kept, fresh.shared["Z"][len(kept) :]])
    size, copies = rows * config.rank, -(-rows // lopa.config.rows)
    u = {"W2u": lopa.shared["W2u"].repeat(copies, 1)[:size], "b2u": lopa.shared["b2u"].repeat(copies)[:size]}
    return LoPA(config, {**lopa.shared, "Z": z, **u}, fresh.start)


def at_answers(lopa: LoPA, material: Material) -> LoPA:
    """As a device begins: what the corrections read tells the user's own answers apart."""
    (values,) = material.features.values()
    rows = list(material.training)
    return aligned_start(lopa, torch.from_numpy(values)[rows], [pair.target for pair in material.of(rows)])
