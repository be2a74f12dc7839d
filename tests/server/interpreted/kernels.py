"""The GPU's kernels against torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from lopa_server.engine.torch_engine.attention import Score
from lopa_server.engine.torch_engine.fused import Fusions
from lopa_server.engine.torch_engine.gpu import trial
from lopa_server.engine.torch_engine.gpu.kernels import GpuKernels
from lopa_server.engine.torch_engine.kv_pool import KvPool
from lopa_server.engine.torch_engine.loader import load_foundation_model
from lopa_server.engine.torch_engine.paging import HOST, PagedRows, Slots

from tests.server.decoding_cases import CASES, Case, check_decoding
from tests.tiny import build_tiny_fm


@pytest.fixture(scope="module")
def kernels() -> GpuKernels:
    """As for a GPU with so many processors that rows are divided."""
    return GpuKernels(HOST, 40)


@settings(max_examples=25, deadline=None)
@given(case=CASES)
def test_decoding_agrees_with_plain_attention(kernels: GpuKernels, case: Case) -> None:
    check_decoding(kernels, case)


@pytest.mark.parametrize("processors", [1, 132])
def test_many_heads_that_share_keys_and_rows_in_parts(processors: int) -> None:
    """More query heads on one key-value head than a program answers; one program a row, and many."""
    case = Case([1, 700, 64, 65], 1, 71, 16, 8, torch.float32, 0, None, True, 0)
    check_decoding(GpuKernels(HOST, processors), case)


def test_rows_that_are_left_over_write_nothing_and_get_zeros(kernels: GpuKernels) -> None:
    pool = KvPool(2, 8, kernels)
    keys = torch.randn(1, 3, 8)
    pool.write(0, Slots(np.array([8, 9, 10]), pool.slots), keys, keys)
    before = pool.layer(0)[0].clone()
    kernels.write_at(pool.layer(0), torch.tensor([-1, -1]), torch.ones(1, 2, 8), torch.ones(1, 2, 8))
    assert torch.equal(pool.layer(0)[0], before)
    tables, ends = torch.tensor([[1], [0]], dtype=torch.int32), torch.tensor([3, 0], dtype=torch.int32)
    for longest in (8, 4096):
        found = kernels.decode_at(pool.layer(0), tables, ends, longest, 0, torch.ones(2, 2, 8), Score(1.0, None, None))
        assert found[0].abs().sum() > 0 and found[1].eq(0).all()


def test_nothing_behind_a_row_is_read_and_its_own_faults_show(kernels: GpuKernels) -> None:
    pool = KvPool(2, 8, kernels)
    keys = torch.full((1, 16, 8), torch.nan)
    keys[:, :5] = 0.0
    pool.write(0, Slots(np.arange(8, 24), pool.slots), keys, keys)
    clean, broken = (PagedRows(np.array([[1, 2]]), np.array([end]), 8, pool.blocks) for end in (5, 6))
    assert kernels.decode(pool.layer(0), clean, 0, torch.ones(1, 1, 8), Score(1.0, None, None)).eq(0).all()
    assert kernels.decode(pool.layer(0), broken, 0, torch.ones(1, 1, 8), Score(1.0, None, None)).isnan().all()


def test_arrays_that_do_not_go_together_never_reach_the_kernels(kernels: GpuKernels) -> None:
    pool = KvPool(2, 8, kernels)
    pool.write(0, Slots(np.arange(3), pool.slots), torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))
    rows, score = PagedRows(np.array([[1]]), np.array([3]), 8, pool.blocks), Score(1.0, None, None)
    for shape, slots in (((2, 3, 8), np.arange(4)), ((2, 3, 16), np.arange(3)), ((1, 3, 8), np.arange(3))):
        with pytest.raises(IndexError):
            kernels.write(pool.layer(0), Slots(slots, pool.slots), torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(IndexError):
        kernels.write(pool.layer(0), Slots(np.arange(3), 1000), torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))
    for query in (torch.zeros(4, 2, 8), torch.zeros(3, 1, 8), torch.zeros(4, 1, 16), torch.zeros(4, 1, 8).bfloat16()):
        with pytest.raises(IndexError):
            kernels.decode(pool.layer(0), rows, 0, query, score)
    numbers = torch.zeros(3, 16)
    for other in (torch.zeros(3, 8), torch.zeros(3, 16).bfloat16(), torch.zeros(3, 16).double()):
        with pytest.raises(IndexError):
            kernels.elementwise.silu_mul(numbers, other)
    for weight in (torch.ones(8), torch.ones(16).bfloat16(), torch.ones(32)[::2]):
        with pytest.raises(IndexError):
            kernels.elementwise.rms_norm(numbers, weight, 1e-6, 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_modules_are_fused_where_they_compute_the_same(kernels: GpuKernels, tmp_path: Path, family: str, dtype: str) -> None:
    """The trial that each module has to pass: values and gradients of norms, gates and rotary positions."""
    fm = load_foundation_model(build_tiny_fm(tmp_path / family, family=family), dtype=dtype, device="cpu", native=False)
    kinds = ("RMSNorm", "MLP", "Attention") if family == "llama" else ("RMSNorm", "Attention")
    wanted = [module for module in fm.model.modules() if type(module).__name__.endswith(kinds)]
    assert len(Fusions(fm.model, kernels.elementwise, HOST)) == len(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_width_and_layout(kernels: GpuKernels, dtype: torch.dtype) -> None:
    functions, tolerance = kernels.elementwise, 1e-5 if dtype == torch.float32 else 2**-7
    joint = torch.randn(2, 5, 2 * 1100).to(dtype)
    gate, up = joint.split(1100, dim=-1)
    expected = torch.nn.functional.silu(gate.float()) * up.float()
    torch.testing.assert_close(functions.silu_mul(gate, up).float(), expected, rtol=tolerance, atol=tolerance)
    rows, weight = torch.randn(3, 48).to(dtype).t().contiguous().t(), torch.randn(48).to(dtype)
    plain = torch.nn.functional.rms_norm(rows.float(), (48,), weight.float() + 1, 1e-6)
    torch.testing.assert_close(functions.rms_norm(rows, weight, 1e-6, 1.0).float(), plain, rtol=tolerance, atol=tolerance)


def test_kernels_that_compute_something_else_are_refused(kernels: GpuKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.try_kernels(kernels, HOST)
    right = kernels.decode_at
    monkeypatch.setattr(kernels, "decode_at", lambda *arguments: right(*arguments) * 1.1)
    with pytest.raises(ValueError, match="differs from torch's"):
        trial.try_kernels(kernels, HOST)
