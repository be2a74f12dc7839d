"""Captured decode steps without a GPU: a "graph" is then the same pass over the same places, run again."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from lopa_server.engine.base import InputSequence, UnsupportedModel
from lopa_server.engine.content import Content
from lopa_server.engine.torch_engine import packed, selfcheck
from lopa_server.engine.torch_engine.fused import Fusions
from lopa_server.engine.torch_engine.gpu import graphs
from lopa_server.engine.torch_engine.gpu.graphs import DecodeGraphs, Forward, NoGraphs, sizes_up_to
from lopa_server.engine.torch_engine.gpu.kernels import GpuKernels
from lopa_server.engine.torch_engine.layout import Piece
from lopa_server.engine.torch_engine.loader import FoundationModel, load_foundation_model
from lopa_server.engine.torch_engine.packed import JointPart
from lopa_server.engine.torch_engine.paging import HOST
from lopa_server.engine.torch_engine.runner import ModelRunner
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from tests.tiny import build_tiny_fm

FAMILIES = ("llama", "mistral", "qwen3", "gemma3", "phi", "gpt2", "opt")
BLOCK = 8


def load(folder: Path, family: str) -> tuple[FoundationModel, FoundationModel]:
    """A tiny model as torch computes it, and with the GPU's kernels and joint layers."""
    plain = load_foundation_model(build_tiny_fm(folder / family, family=family), dtype="float32", device="cpu", native=False)
    model, kernels = copy.deepcopy(plain.model), GpuKernels(HOST, 8)
    packed.join_linears(model)
    fused = Fusions(model, kernels.elementwise, HOST)
    return plain, dataclasses.replace(plain, model=model, kernels=kernels, fusions=fused, graphs=True)


def again(forward: Forward) -> Forward:
    """In the place of a capture."""
    return forward


class Twins:
    """The same sequences decoded by captured steps and by torch."""

    def __init__(self, plain: FoundationModel, ours: FoundationModel, lengths: list[int], largest: int) -> None:
        rng = np.random.default_rng(0)
        self.tables = rng.permutation(np.arange(1, 1 + 8 * len(lengths))).reshape(len(lengths), 8).tolist()
        self.runners = [ModelRunner(fm, 8 * len(lengths), BLOCK) for fm in (plain, ours)]
        self.runners[1].graphs = DecodeGraphs(ours, self.runners[1].pool, largest, again)
        soft = (rng.standard_normal((2, plain.spec.hidden_size)) * 0.4).astype(np.float32)
        self.contents = [
            Content(b"", InputSequence((), soft if row % 2 else None, tuple(rng.integers(2, 300, length).tolist())), BLOCK)
            for row, length in enumerate(lengths)
        ]
        self.done = [0] * len(lengths)

    def step(self, rows: list[int]) -> list[torch.Tensor]:
        """All that is not computed yet of these sequences, by both; then the same token for both."""
        pieces = [Piece(self.contents[row], self.tables[row], self.done[row], len(self.contents[row]) - self.done[row]) for row in rows]
        found = [runner.step(pieces, range(len(rows))).clone() for runner in self.runners]
        for row, token in zip(rows, found[0].argmax(dim=1).tolist(), strict=True):
            self.done[row] = len(self.contents[row])
            self.contents[row].append(token)
        return found


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_give_what_torch_gives(tmp_path: Path, family: str) -> None:
    """Batches that come and go, fewer rows than the captured sizes, sliding windows that rows outgrow."""
    twins = Twins(*load(tmp_path, family), [3, 17, 30, 9], largest=3)
    twins.step([0, 1, 2, 3])
    counted = []
    made = twins.runners[1].graphs
    assert made is not None
    own = made.step
    made.step = lambda pieces: (counted.append(len(pieces)), own(pieces))[1]  # type: ignore[method-assign]
    for rows in ([0, 1, 2], [2], [3, 0], [0, 1, 2, 3], [1, 3]):
        theirs, ours = twins.step(rows)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert counted == [3, 1, 2, 2], "four rows are more than the largest captured step"
    assert all(held[0].eq(0).all() for layer in range(2) for held in twins.runners[1].pool.layer(layer))


def test_a_step_with_a_soft_row_is_not_one_of_them(tmp_path: Path) -> None:
    twins = Twins(*load(tmp_path, "llama"), [3, 3], largest=2)
    made = twins.runners[1].graphs
    assert made is not None
    first = [Piece(content, table, 0, 1) for content, table in zip(twins.contents, twins.tables, strict=True)]
    assert made.hold(first[:1]) and not made.hold(first)
    assert not made.hold([first[0], first[0], first[0]]) and not made.hold([Piece(twins.contents[0], twins.tables[0], 0, 2)])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_check_before_serving_goes_through_captured_steps(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "Capture", lambda _: again)
    _, ours = load(tmp_path, family)
    served, _ = selfcheck.check_model(ours, BLOCK)
    assert served.graphs
    wrong = DecodeGraphs.step
    monkeypatch.setattr(DecodeGraphs, "step", lambda self, pieces: wrong(self, pieces).flip(1))
    served, _ = selfcheck.check_model(ours, BLOCK)
    assert not served.graphs, "captured steps that compute something else are left out"
    with pytest.raises(UnsupportedModel):
        selfcheck.check_runner(ours, BLOCK)


def test_a_model_that_can_not_be_captured_is_served_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Forward) -> Forward:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "Capture", lambda _: fail)
    plain, ours = load(tmp_path, "llama")
    assert not selfcheck.check_model(ours, BLOCK)[0].graphs
    assert "without CUDA graphs" in caplog.text and "not permitted" in caplog.text
    on_gpu = dataclasses.replace(ours, graphs=False, device=torch.device("cuda"))
    simplest = selfcheck._simpler(on_gpu)
    assert simplest is not None and simplest.kernels is None and selfcheck._simpler(simplest) is None
    assert selfcheck._simpler(plain) is None, "on a CPU there is one way only"
    with pytest.raises(NoGraphs):
        DecodeGraphs(plain, ModelRunner(plain, 8, BLOCK).pool, 2, again)


class Watch(TorchDispatchMode):
    """Notes what a capture would not allow: numbers read on the CPU, and arrays of the CPU beside those of the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.faults: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        self.seen += 1
        arrays = [one for one in torch.utils._pytree.tree_leaves((arguments, options)) if isinstance(one, torch.Tensor)]
        if str(function) in ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.item.default"):
            self.faults.append(str(function))
        if any(array.device.type == "cpu" and (array.dim() or "copy" in str(function)) for array in arrays):
            self.faults.append(f"{function} of an array on the CPU")
        return function(*arguments, **(options or {}))


def _pretend(model: torch.nn.Module, place: torch.device) -> None:
    """Every array of the model, joint layers' too, is on that device now, in bfloat16."""
    joint = [module._joint._product for module in model.modules() if isinstance(module, JointPart)]
    for module in (*model.modules(), *joint):
        for arrays in (module._parameters, module._buffers):
            for name, array in arrays.items():
                if array is not None:
                    dtype = torch.bfloat16 if array.is_floating_point() else array.dtype
                    arrays[name] = torch.empty(array.shape, dtype=dtype, device=place)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_in_a_captured_step_waits_for_the_gpu(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass on a device without numbers: what asks for one fails, and arrays of the CPU show."""
    _, ours = load(tmp_path, family)
    watch = Watch()

    def watched(forward: Forward) -> Forward:
        with watch:
            assert forward().device.type == "meta"
        return forward

    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)
    monkeypatch.setattr(DecodeGraphs, "_fill", lambda *_: None)  # before the pass
    place = torch.device("meta")
    with torch.inference_mode():
        _pretend(ours.model, place)
        ours.kernels.elementwise._device = place.type
        fm = dataclasses.replace(ours, device=place, dtype=torch.bfloat16, kernels=GpuKernels(place, 132))
        made = DecodeGraphs(fm, ModelRunner(fm, 8, BLOCK).pool, 9, watched)
    assert len(made) == 5 and watch.seen > 100
    assert not watch.faults, sorted(set(watch.faults))


def test_sizes_are_few_and_close_together() -> None:
    assert sizes_up_to(1) == [1] and sizes_up_to(5) == [1, 2, 4, 5] and sizes_up_to(8) == [1, 2, 4, 8]
    for largest in (3, 32, 100, 256, 1000):
        sizes = sizes_up_to(largest)
        assert sizes == sorted(set(sizes)) and sizes[-1] == largest
        assert all(above <= 2 * below for below, above in itertools.pairwise(sizes))
