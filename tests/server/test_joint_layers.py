"""Layers that read the same rows as one product: the same bits, whoever asks in whatever order."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lopa_server.engine.torch_engine.engine import TorchEngine
from lopa_server.engine.torch_engine.packed import JointPart, PackedLinear, can_pack, pack_linears

from tests.server.engines import collect, load, run, stream
from tests.tiny import build_tiny_fm

pytestmark = pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.bfloat16), reason="this processor has no bfloat16 units")


class Attention(torch.nn.Module):
    def __init__(self, *biases: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            torch.nn.Linear(96, width, bias=bias) for width, bias in zip((96, 32, 32), biases, strict=True)
        )

    def forward(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(rows), self.k_proj(rows), self.v_proj(rows)]


def made(*biases: bool) -> tuple[Attention, Attention]:
    """As torch has it, and packed."""
    torch.manual_seed(0)
    plain = Attention(*biases).to(torch.bfloat16).requires_grad_(False)
    packed = copy.deepcopy(plain)
    assert pack_linears(packed) == 3
    return plain, packed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 32, 77])
def test_values_have_the_same_bits_and_gradients_agree(bias: bool, count: int) -> None:
    plain, packed = made(bias, bias, bias)
    assert all(isinstance(layer, JointPart) for layer in packed.children())
    rows = torch.randn(2, count, 96).to(torch.bfloat16)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(packed(rows), plain(rows), strict=True))
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(getattr(packed, name).weight, getattr(plain, name).weight)
    gradients = []
    for module in (plain, packed):
        leaf = rows.clone().requires_grad_()
        torch.stack([part.float().square().sum() for part in module(leaf)]).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.02, atol=0.02 * float(gradients[0].abs().max()))


def test_another_pass_in_the_middle_changes_nothing_and_nothing_is_kept() -> None:
    plain, packed = made(False, False, False)
    paused, other = torch.randn(2, 1, 5, 96).to(torch.bfloat16).unbind()
    query = packed.q_proj(paused)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(packed(other), plain(other), strict=True))
    found = [query, packed.k_proj(paused), packed.v_proj(paused), packed.v_proj(paused)]
    wanted = plain(paused)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, [*wanted, wanted[2]], strict=True))
    joint = packed.q_proj._joint
    assert joint._rows is None and not joint._left


def test_layers_that_differ_in_what_they_have_stay_apart() -> None:
    _, packed = made(True, False, True)
    assert all(isinstance(layer, PackedLinear) for layer in packed.children())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi", "opt"])
def test_families_are_served_with_joint_layers(tmp_path: Path, family: str) -> None:
    async def answer(engine: TorchEngine) -> int:
        return len((await collect(engine, stream("a", 1))).tokens)

    engine = load(build_tiny_fm(tmp_path / family, family=family), dtype="bfloat16")
    assert any(isinstance(module, JointPart) for module in engine.intake.fm.model.modules())
    assert run(engine, answer)
