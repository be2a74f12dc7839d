"""What stands between a model's products, one pass over memory each: the functions of `native.elementwise`, for CUDA.

Legend: n rows in all, d their width; b sequences, h heads, t positions, e head width.
"""

from __future__ import annotations

import torch
import triton

from lopa_server.engine.torch_engine.gpu import device_code
from lopa_server.engine.torch_engine.rows import check_alike, check_turns, check_weight, shape_of

WIDEST_NORM = 1 << 15
"""Numbers of a row that one program holds."""
TILE = 1024
"""Numbers that one program takes where any number will do."""


class GpuElementwise:
    """Functions of rows, (..., d) each, on CUDA, float32 or bfloat16. All raise IndexError where arrays don't go together."""

    def __init__(self, device: str = "cuda") -> None:
        """device: where all arrays must be; "cpu" for Triton's interpreter."""
        self._device = device

    def rms_norm(self, rows: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> torch.Tensor:
        """Rows over the root of their mean square, times offset + weight, (d,)."""
        check_weight(self._device, weight, rows)
        _check_width(rows)
        rows = rows.contiguous()
        out = torch.empty_like(rows)
        count, width = shape_of(rows)
        if count:
            device_code.rms_norm[(count,)](out, rows, weight, epsilon, offset, **_norm_shape(width, offset))
        return out

    def rms_norm_backward(
        self, flowing: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float
    ) -> torch.Tensor:
        """The gradient of the rows, from that of their norm."""
        check_alike(self._device, flowing, rows)
        check_weight(self._device, weight, rows)
        _check_width(rows)
        flowing, rows = flowing.contiguous(), rows.contiguous()
        out = torch.empty_like(rows)
        count, width = shape_of(rows)
        if count:
            device_code.rms_norm_backward[(count,)](out, flowing, rows, weight, epsilon, offset, **_norm_shape(width, offset))
        return out

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """SiLU of the gate, times up."""
        check_alike(self._device, gate, up)
        width = gate.shape[-1]
        gates, ups = gate.reshape(-1, width), up.reshape(-1, width)
        gates, ups = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (gates, ups))
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        if out.numel():
            grid = (len(gates), triton.cdiv(width, TILE))
            device_code.silu_mul[grid](out, gates, ups, gates.stride(0), ups.stride(0), width, LANES=TILE)
        return out

    def silu_mul_backward(self, flowing: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of gate and up, from that of `silu_mul`."""
        check_alike(self._device, flowing, gate, up)
        flowing, gate, up = flowing.contiguous(), gate.contiguous(), up.contiguous()
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(gate)
        count = gate.numel()
        if count:
            device_code.silu_mul_backward[(triton.cdiv(count, TILE),)](of_gate, of_up, flowing, gate, up, count, LANES=TILE)
        return of_gate, of_up

    def rotate(self, rows: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """Rotary positions of (b, h, t, e) rows, e even: the first half of a row goes with the second. back: of gradients.

        cosine, sine: (b or 1, t, e), one after the other. The result lies in memory as (b, t, h, e).
        """
        check_turns(self._device, rows, cosine, sine)
        batches, heads, places, width = rows.shape
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        out = torch.empty(batches, places, heads, width, dtype=rows.dtype, device=rows.device)
        lanes = triton.next_power_of_2(width // 2)
        tile = max(1, min(triton.next_power_of_2(heads), TILE // lanes))
        turn = 0 if len(cosine) == 1 else places * width
        if out.numel():
            grid = (batches * places, triton.cdiv(heads, tile))
            shape = {"HALF": width // 2, "LANES": lanes, "HEADS_TILE": tile, "BACK": back}
            device_code.rotate[grid](out, rows, cosine, sine, *rows.stride()[:3], turn, heads, places, **shape)
        return out.transpose(1, 2)


def _check_width(rows: torch.Tensor) -> None:
    if rows.shape[-1] > WIDEST_NORM:
        raise IndexError(f"norm of rows of {rows.shape[-1]} numbers; at most {WIDEST_NORM}")


def _norm_shape(width: int, offset: float) -> dict[str, int | bool]:
    lanes = triton.next_power_of_2(width)
    return {"WIDTH": width, "LANES": lanes, "EARLY": not offset, "num_warps": min(16, max(4, lanes // TILE))}
