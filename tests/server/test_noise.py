"""Clip and noise: the step itself, on soft prompts before they leave, on gradients before they are returned."""

from __future__ import annotations

from pathlib import Path

import lopa
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from lopa_server.app import ServerConfig, start_server

from tests.server.client import rows

CLIP = 0.05


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(np.float32, (3, 7), elements=st.floats(-1e3, 1e3, width=32)), st.floats(0.01, 100.0))
def test_a_clip_bounds_the_norm_and_keeps_the_direction(values: np.ndarray, clip: float) -> None:
    clipped = lopa.ClipAndNoise(clip, 0.0)(values, np.random.default_rng(0))
    norm = float(np.linalg.norm(values.astype(np.float64)))
    assert np.linalg.norm(clipped) <= clip * (1 + 1e-5)
    np.testing.assert_allclose(clipped, values * min(1.0, clip / norm) if norm else values, rtol=1e-5, atol=1e-30)


def test_noise_has_the_standard_deviation_that_was_asked_for() -> None:
    noise, zeros = lopa.ClipAndNoise(2.0, 0.1), np.zeros((100, 1000), np.float32)
    found = noise(zeros, np.random.default_rng(0))
    assert found.std() == pytest.approx(0.2, rel=0.02) and abs(found.mean()) < 0.002
    assert not np.array_equal(found, noise(zeros, np.random.default_rng(1)))


@pytest.mark.parametrize(("clip", "noise"), [(0.0, 0.1), (-1.0, 0.1), (float("nan"), 0.1), (1.0, -0.1), (1.0, float("inf"))])
def test_impossible_values_are_refused(clip: float, noise: float) -> None:
    with pytest.raises(ValueError, match="must be a number"):
        lopa.ClipAndNoise(clip, noise)


def test_what_leaves_the_device_and_what_comes_back(tiny_fm: Path) -> None:
    """Soft prompts are clipped by the client, gradients by the server; losses of what was sent stay exact."""
    soft, clip = rows(1), lopa.ClipAndNoise(0.5, 0.0)
    sent = clip(soft, np.random.default_rng(0))
    pairs, as_sent = ([lopa.Pair("def", " add(a, b)", soft_prompt=one)] for one in (soft, sent))
    with start_server(ServerConfig(fm=tiny_fm, threads=1)) as plain, lopa.connect(plain.address) as client:
        (expected,), (score,) = client.prompt_gradients(as_sent), client.score(as_sent)
        with lopa.connect(plain.address, config=lopa.ClientConfig(soft_prompt_noise=clip)) as noisy:
            assert noisy.score(pairs)[0].nll_sum == pytest.approx(score.nll_sum, abs=1e-5)
            np.testing.assert_allclose(noisy.prompt_gradients(pairs)[0].gradient, expected.gradient, atol=1e-6)
    noise = lopa.ClipAndNoise(CLIP, 0.0)
    with start_server(ServerConfig(fm=tiny_fm, threads=1, gradient_noise=noise)) as server, lopa.connect(server.address) as client:
        (found,) = client.prompt_gradients(as_sent)
    assert found.nll_sum == pytest.approx(expected.nll_sum, abs=1e-5) and np.linalg.norm(expected.gradient) > 2 * CLIP
    np.testing.assert_allclose(found.gradient, expected.gradient * (CLIP / np.linalg.norm(expected.gradient)), rtol=1e-4, atol=1e-7)
