"""Our CPU kernels against torch: any shape, grouping of heads, block table, window and dtype; and what happens without them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from lopa_server.engine.torch_engine.attention import Score
from lopa_server.engine.torch_engine.engine import TorchEngine
from lopa_server.engine.torch_engine.fused import Fusions
from lopa_server.engine.torch_engine.kv_pool import KvPool
from lopa_server.engine.torch_engine.loader import load_foundation_model
from lopa_server.engine.torch_engine.native import build
from lopa_server.engine.torch_engine.native.kernels import NativeKernels, find_native_kernels
from lopa_server.engine.torch_engine.paging import HOST, PagedRows, Slots

from tests.server.decoding_cases import CASES, Case, check_decoding
from tests.server.engines import collect, load, run, stream
from tests.tiny import build_tiny_fm

KERNELS = find_native_kernels()
needs_kernels = pytest.mark.skipif(KERNELS is None, reason="no C compiler here, or one without OpenMP")


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(case=CASES)
def test_decoding_agrees_with_plain_attention(case: Case) -> None:
    check_decoding(KERNELS, case)


@needs_kernels
def test_a_row_gives_the_same_bits_in_any_batch() -> None:
    pool = KvPool(64, 8, KERNELS)
    keys, values = torch.randn(2, 2, 512, 64).unbind()
    pool.write(0, Slots(np.arange(8, 520), pool.slots), keys, values)
    tables = np.stack([np.arange(1, 65), np.arange(1, 65)[::-1], np.arange(1, 65)])
    ends, query = np.array([301, 77, 512]), torch.randn(4, 3, 64)
    together = KERNELS.decode(pool.layer(0), PagedRows(tables, ends, 8, pool.blocks), 0, query, Score(0.125, None, None))
    for row in range(3):
        alone = PagedRows(tables[row : row + 1].copy(), ends[row : row + 1], 8, pool.blocks)
        assert torch.equal(KERNELS.decode(pool.layer(0), alone, 0, query[:, row : row + 1], Score(0.125, None, None))[0], together[row])


@needs_kernels
def test_nothing_behind_a_row_is_read_and_its_own_faults_show() -> None:
    pool = KvPool(2, 8, KERNELS)
    keys = torch.full((1, 16, 8), math.nan)
    keys[:, :5] = 0.0
    pool.write(0, Slots(np.arange(8, 24), pool.slots), keys, keys)
    score = Score(1.0, None, None)
    clean, broken = (PagedRows(np.array([[1, 2]]), np.array([end]), 8, pool.blocks) for end in (5, 6))
    assert KERNELS.decode(pool.layer(0), clean, 0, torch.ones(1, 1, 8), score).eq(0).all()
    assert KERNELS.decode(pool.layer(0), broken, 0, torch.ones(1, 1, 8), score).isnan().all()


@pytest.mark.parametrize(
    ("table", "end"), [([[1, 3]], [16]), ([[-1, 2]], [16]), ([[1, 2]], [17]), ([[1, 2]], [0]), ([[1, 2]], [16, 16])], ids=str
)
def test_tables_that_lead_out_of_the_pool_never_reach_the_kernel(table: list[list[int]], end: list[int]) -> None:
    with pytest.raises(IndexError):
        PagedRows(np.array(table), np.array(end), 8, 3)


@pytest.mark.parametrize("numbers", [[-1], [24], [[3]]], ids=str)
def test_slots_outside_of_the_pool_never_reach_the_kernel(numbers: list[int]) -> None:
    with pytest.raises(IndexError):
        Slots(np.array(numbers), 24)


@needs_kernels
def test_shapes_that_do_not_fit_the_pool_are_refused() -> None:
    pool = KvPool(2, 8, KERNELS)
    pool.write(0, Slots(np.arange(3), pool.slots), torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))
    rows, score = PagedRows(np.array([[1]]), np.array([3]), 8, pool.blocks), Score(1.0, None, None)
    with pytest.raises(IndexError):
        KERNELS.write(pool.layer(0), Slots(np.arange(4), pool.slots), torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))
    with pytest.raises(IndexError):
        KERNELS.write(pool.layer(0), Slots(np.arange(3), pool.slots), torch.zeros(2, 3, 16), torch.zeros(2, 3, 16))
    for query in (torch.zeros(4, 2, 8), torch.zeros(3, 1, 8), torch.zeros(4, 1, 16), torch.zeros(4, 1, 8).bfloat16()):
        with pytest.raises(IndexError):
            KERNELS.decode(pool.layer(0), rows, 0, query, score)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    find_native_kernels.cache_clear()
    yield tmp_path / "lopa" / "kernels"
    find_native_kernels.cache_clear()


@needs_kernels
def test_compiled_once_and_into_a_folder_of_ones_own(fresh: Path) -> None:
    NativeKernels(build.load_library())
    (library,) = fresh.iterdir()
    made = library.stat()
    NativeKernels(build.load_library())
    assert (library.stat().st_ino, fresh.stat().st_mode & 0o777) == (made.st_ino, 0o700)
    library.unlink()
    fresh.chmod(0o777)
    NativeKernels(build.load_library())
    assert not list(fresh.iterdir()), "what others may write to must not be loaded"


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_torch_does_it_all(tiny_fm: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def answer(engine: TorchEngine) -> tuple[Sequence[int], int]:
        return (await collect(engine, stream("a", 1))).tokens, engine.stats().native_fallbacks

    usual, fallbacks = run(load(tiny_fm), answer)
    assert (fallbacks > 0) == (KERNELS is None)
    find_native_kernels.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert find_native_kernels() is None
    assert "no-such-compiler" in caplog.text
    plain, fallbacks = run(load(tiny_fm), answer)
    assert plain == usual
    assert fallbacks > 0


@needs_kernels
def test_a_compiler_that_fails_is_not_available(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-fno-such-flag"))
    with pytest.raises(build.NotAvailable, match="no-such-flag"):
        build.load_library()
    assert not list(fresh.iterdir())


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_modules_are_fused_where_they_compute_the_same(tmp_path: Path, family: str, dtype: str) -> None:
    fm = load_foundation_model(build_tiny_fm(tmp_path / family, family=family), dtype=dtype, device="cpu")
    kinds = ("RMSNorm", "MLP") if family == "llama" else ("RMSNorm",)
    modules = [module for module in fm.model.modules() if type(module).__name__.endswith(kinds)]
    rotating = [module for module in fm.model.modules() if type(module).__name__.endswith("Attention") and family != "gpt2"]
    assert fm.fusions is not None and len(fm.fusions) == len(modules) + len(rotating)
    tolerance = 2**-6 if dtype == "bfloat16" else 1e-5
    for module in modules:
        rows = torch.randn(1, 7, fm.spec.hidden_size).to(fm.dtype)
        fused, plain = module(rows), _differentiated(module, rows)
        fm.fusions.off()
        theirs = _differentiated(module, rows)
        fm.fusions.on()
        for ours, own in zip((fused, *plain), (theirs[0], *theirs), strict=True):
            torch.testing.assert_close(ours, own, rtol=0.0, atol=tolerance * float(own.abs().max()))


def _differentiated(module: torch.nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What it gives, and the gradient of its rows."""
    rows = rows.clone().requires_grad_()
    values = module(rows)
    flowing = torch.linspace(-1, 1, values.numel(), dtype=values.dtype).view_as(values) ** 3
    return values.detach(), torch.autograd.grad(values, rows, flowing)[0]


@needs_kernels
def test_arrays_that_do_not_go_together_never_reach_the_kernels() -> None:
    rows, elementwise = torch.zeros(3, 16), KERNELS.elementwise
    for other in (torch.zeros(3, 8), torch.zeros(2, 16), torch.zeros(3, 16).bfloat16(), torch.zeros(3, 16).double()):
        with pytest.raises(IndexError):
            elementwise.silu_mul(rows, other)
        with pytest.raises(IndexError):
            elementwise.silu_mul_backward(other, rows, rows)
        with pytest.raises(IndexError):
            elementwise.rms_norm_backward(other, rows, torch.ones(16), 1e-6, 0.0)
    for weight in (torch.ones(8), torch.ones(16).bfloat16(), torch.ones(32)[::2]):
        with pytest.raises(IndexError):
            elementwise.rms_norm(rows, weight, 1e-6, 0.0)


@needs_kernels
def test_a_norm_that_computes_something_else_keeps_its_own_forward() -> None:
    class OddRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(16))
            self.eps = 1e-6

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows * (self.weight + 2) / (rows.norm(dim=-1, keepdim=True) + self.eps)

    assert len(Fusions(torch.nn.Sequential(OddRMSNorm()), KERNELS.elementwise, HOST)) == 0


@needs_kernels
def test_a_norm_that_takes_more_than_rows_keeps_its_own_forward() -> None:
    class GatedRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(16))
            self.eps = 1e-6

        def forward(self, rows: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return rows * self.weight * gate

    assert len(Fusions(torch.nn.Sequential(GatedRMSNorm()), KERNELS.elementwise, HOST)) == 0
