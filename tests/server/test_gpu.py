"""What runs on a GPU, where there is none: Triton's interpreter runs the same code, Triton's compiler makes real binaries of it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lopa_server.engine.torch_engine import gpu

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

SHARED_MEMORY = 99 << 10
"""Bytes that a block of threads has on the smallest GPUs with bfloat16 units (compute capability 8.6)."""
HERE = Path(__file__).parent


@pytest.mark.timeout(900)
@pytest.mark.parametrize("subject", ["kernels", "graphs"])
def test_in_the_interpreter(subject: str) -> None:
    """See the files of `interpreted`."""
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted" / f"{subject}.py")]
    ended = subprocess.run(tests, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=HERE.parents[1])
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compiled_for_gpus_that_there_are(capability: int, dtype: str) -> None:
    """The widest heads and most of them in a program, the longest norm: to binaries, within what a small GPU's blocks have."""
    import triton
    from lopa_server.engine.torch_engine.gpu import device_code as code
    from lopa_server.engine.torch_engine.gpu import kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    width, item = kernels.MAX_WIDTH, 2 if dtype == "bf16" else 4
    heads = {"HEADS": 128, "BLOCK_SIZE": 8, "SHARING": 128, "HEADS_TILE": kernels.MOST_HEADS, "WIDTH": width, "LANES": width}
    read = {"PLACES": max(kernels.SMALLEST_DOT, kernels.TILE_BYTES // (width * item)), "CAPPED": True, "SINKS": True}
    norm = {"WIDTH": 1 << 15, "LANES": 1 << 15, "EARLY": True}
    shapes = [
        (code.decode, {**heads, **read, "PARTS": 1}, 4),
        (code.decode, {**heads, **read, "PARTS": 16}, 4),
        (code.join, {"WIDTH": width, "LANES": width, "PARTS": 16, "SINKS": True}, 4),
        (code.write_slots, {"BLOCK_SIZE": 8, "WIDTH": width, "LANES": width}, 4),
        (code.rms_norm, norm, 16),
        (code.rms_norm_backward, norm, 16),
        (code.silu_mul, {"LANES": 1024}, 4),
        (code.silu_mul_backward, {"LANES": 1024}, 4),
        (code.rotate, {"HALF": 128, "LANES": 128, "HEADS_TILE": 8, "BACK": False}, 4),
        (code.rotate, {"HALF": 128, "LANES": 128, "HEADS_TILE": 8, "BACK": True}, 4),
    ]
    for function, constants, warps in shapes:
        signature = {name: "constexpr" if name in constants else _kind(name, dtype) for name in function.arg_names}
        source = ASTSource(function, signature, {(function.arg_names.index(name),): value for name, value in constants.items()})
        made = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_stages": 2, "num_warps": warps, "enable_fp_fusion": True})
        assert made.asm["cubin"] and made.metadata.shared <= SHARED_MEMORY, function.__name__


def _kind(name: str, dtype: str) -> str:
    """Of an argument, by its name in the device's code."""
    kinds = {"partial": "*fp32", "sinks": "*fp32", "tables": "*i32", "ends": "*i32", "slots": "*i64"}
    numbers = {"scaling": "fp32", "softcap": "fp32", "epsilon": "fp32", "offset": "fp32"}
    whole = name.endswith("stride") or name in ("window", "heads", "places", "width", "count")
    return kinds.get(name) or numbers.get(name) or ("i32" if whole else f"*{dtype}")


def test_where_there_are_no_kernels_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert gpu.find_gpu_kernels(torch.device("cuda", 99)) is None, "there is no such GPU on any machine"
    assert "without GPU kernels" in caplog.text
