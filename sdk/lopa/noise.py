"""Clip and noise: bound what one array can say, then blur it. Shapes: any; the norm is over the whole array.

This is the step of the Gaussian mechanism (Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", 2014,
appendix A) and, for each gradient, of DP-SGD (Abadi et al., CCS 2016). It is **no** guarantee of differential privacy at the
levels at which soft prompts still work: two arrays of norm `clip` are up to 2 clip apart, so that one release at epsilon 1 and
delta 1e-5 needs noise = 2 sqrt(2 ln(1.25 / delta)) / epsilon = 9.7, every further one more, and a source of randomness made for
it. Below that it makes reconstruction harder, by how much nobody has proven.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lopa.values import Float32


@dataclass(frozen=True)
class ClipAndNoise:
    """Raises ValueError for values that aren't finite, a clip that isn't above 0, or negative noise.

    >>> ClipAndNoise(clip=1.0, noise=0.0)(np.array([[0.0, 4.0]], np.float32), np.random.default_rng(0)).tolist()
    [[0.0, 1.0]]
    """

    clip: float
    """L2 norm of the whole array at most: larger ones are scaled down."""
    noise: float
    """Standard deviation of the Gaussian noise on every value, as a multiple of `clip`; 0 only clips."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip is {self.clip}; it must be a number above 0")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"noise is {self.noise}; it must be a number, 0 or above")

    def __call__(self, values: Float32, rng: np.random.Generator) -> Float32:
        """A new array of the same shape."""
        norm = float(np.linalg.norm(values.astype(np.float64)))
        scaled = values * np.float32(min(1.0, self.clip / norm) if norm else 1.0)
        blurred: Float32 = scaled + np.float32(self.noise * self.clip) * rng.standard_normal(values.shape, dtype=np.float32)
        return blurred
