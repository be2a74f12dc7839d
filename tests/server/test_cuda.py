"""On a real GPU, where there is one: what it computes is what the CPU computes, and decode steps are captured."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from lopa_server.engine.base import PairResult
from lopa_server.engine.torch_engine.engine import TorchEngine
from lopa_server.engine.torch_engine.gpu import find_gpu_kernels

from tests.server.engines import Output, collect, load, pair, run, stream
from tests.tiny import build_tiny_fm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "phi", "gpt_neox", "gpt2", "opt")


def test_the_kernels_give_torchs_results() -> None:
    assert find_gpu_kernels(torch.device("cuda")) is not None


async def _answers(engine: TorchEngine) -> tuple[list[Output], list[PairResult]]:
    """Streams that come and go, with soft prompts and without, greedy and drawn; then gradients."""
    requests = [
        stream(str(row), row, rows=row % 3, tokens=5 + 3 * row, temperature=0.8 * (row % 2), seed=row, logprobs=0) for row in range(6)
    ]
    outputs = await asyncio.gather(*(collect(engine, request) for request in requests))
    return list(outputs), list(await engine.prompt_gradients([pair(row) for row in range(5)]))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_on_the_cpu(tmp_path: Path, family: str) -> None:
    folder = build_tiny_fm(tmp_path / family, family=family)
    expected, gradients = run(load(folder, device="cpu", dtype="float32"), _answers)
    engine = load(folder, device="cuda", dtype="float32")
    found, on_gpu = run(engine, _answers)
    assert engine.intake.fm.graphs and engine.intake.worker.captured
    assert [output.tokens for output in found] == [output.tokens for output in expected]
    for theirs, ours in zip(gradients, on_gpu, strict=True):
        assert theirs.gradient is not None and ours.gradient is not None
        np.testing.assert_allclose(ours.gradient, theirs.gradient, rtol=1e-3, atol=1e-5 + 1e-3 * np.abs(theirs.gradient).max())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bfloat16_with_and_without_graphs(tmp_path: Path, family: str) -> None:
    """Close enough that the first tokens are the same; without our kernels at all as well."""
    folder = build_tiny_fm(tmp_path / family, family=family)
    answers = []
    for options in ({}, {"graphs": False}, {"native": False}):
        outputs, _ = run(load(folder, device="cuda", dtype="bfloat16", **options), _answers)
        answers.append([output.logprobs[:1] for output in outputs])
    for other in answers[1:]:
        np.testing.assert_allclose(other, answers[0], atol=0.1)
