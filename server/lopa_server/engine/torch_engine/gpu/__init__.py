"""Kernels for CUDA, written in Triton, which comes with torch there, and graphs of whole decode steps."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lopa_server.engine.torch_engine.gpu.kernels import GpuKernels

log = logging.getLogger(__name__)


def find_gpu_kernels(device: torch.device) -> GpuKernels | None:
    """The kernels, once they gave torch's results on this device; None where they can't be had: the log says why."""
    try:
        from lopa_server.engine.torch_engine.gpu.kernels import GpuKernels
        from lopa_server.engine.torch_engine.gpu.trial import try_kernels

        kernels = GpuKernels(device, torch.cuda.get_device_properties(device).multi_processor_count)
        try_kernels(kernels, device)
    except Exception as error:  # Triton raises what its compiler, the driver or a C compiler raise
        log.warning("decoding without GPU kernels, which is slower: %s", error)
        return None
    return kernels
