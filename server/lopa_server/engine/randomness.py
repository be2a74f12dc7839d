"""Random numbers that depend on a request's seed and on how many it has drawn, and on nothing else.

SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014) is counter-based: its n-th
number is a function of seed and n. So a whole batch draws in one go, and a request's numbers are the same in any batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio: the step of the counter."""
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def split_mix(state: UInt64, count: UInt64) -> UInt64:
    """The `count`-th number, from 0 on, of the generator that starts at `state`; elementwise."""
    with np.errstate(over="ignore"):
        mixed = state + (count + np.uint64(1)) * GOLDEN
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    result: UInt64 = mixed ^ (mixed >> np.uint64(31))
    return result


def uniform(state: UInt64, count: UInt64) -> NDArray[np.float64]:
    """The same as a number in [0, 1), of 53 random bits."""
    return (split_mix(state, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def start_state(seed: int) -> np.uint64:
    """Where the generator of a seed (64 bits) starts. Scrambled: neighbouring seeds must not give shifted sequences."""
    return np.uint64(split_mix(np.array([seed], dtype=np.uint64), np.array([0], dtype=np.uint64))[0] ^ GOLDEN)


def continuation_seed(seed: int, index: int) -> int:
    """Seed of the `index`-th continuation of one prompt. The first has the request's own, so that it is what it would be alone."""
    if index == 0:
        return seed
    return int(split_mix(np.array([start_state(seed)]), np.array([index], dtype=np.uint64))[0])
