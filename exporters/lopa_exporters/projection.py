"""Fewer numbers for wide vectors, by random signs: distances are kept within a few percent, and nothing is learnt (Achlioptas 2003)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def random_signs(width: int, features: int) -> Tensor:
    """(width, features) float32 of +-1/sqrt(features), the same in every run: what is multiplied by it keeps its length on average."""
    signs = torch.from_numpy(np.random.default_rng(0).choice(np.array([-1.0, 1.0], np.float32), (width, features)))
    return signs / features**0.5
