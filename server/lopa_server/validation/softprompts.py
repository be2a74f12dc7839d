"""Checks soft prompts: shape, dtype, exact bytes, finite in the compute dtype, norms. Legend: m rows, d hidden size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from lopa.v1 import common_pb2 as pb
from lopa.wire.errors import Reason, WireError
from lopa.wire.tensors import Float32, decode_rows, encode_rows, soft_prompt_digest

from lopa_server.engine.base import EngineSpec
from lopa_server.limits import ServiceLimits

DTYPES = (pb.DTYPE_F32, pb.DTYPE_F16, pb.DTYPE_BF16, pb.DTYPE_I8)
COMPUTE_DTYPES = {"float32": pb.DTYPE_F32, "bfloat16": pb.DTYPE_BF16, "float16": pb.DTYPE_F16}


@dataclass(frozen=True)
class SoftPrompt:
    """A checked soft prompt. values: (m, d) float32, already rounded to the compute dtype."""

    values: Float32
    after_prefix: bool
    digest: bytes
    """Of the message as received: what a receipt repeats."""


class SoftPromptChecker:
    """Knows what one FM accepts."""

    def __init__(self, spec: EngineSpec, limits: ServiceLimits) -> None:
        self._spec = spec
        self._max_rows = limits.max_virtual_tokens
        self.max_norm = limits.row_norm_multiple * spec.embedding_norm
        """L2 norm of a row at most."""

    def check(self, message: pb.SoftPrompt) -> SoftPrompt:
        """The soft prompt's values and placement.

        Raises:
            WireError: with a field path below the soft prompt (`data`, `rows`, ...).
        """
        after_prefix = _after_prefix(message)
        if not 1 <= message.rows <= self._max_rows:
            raise WireError(Reason.SOFT_PROMPT_ROWS, "rows", limit=f"from 1 to {self._max_rows}", found=message.rows)
        if message.hidden != self._spec.hidden_size:
            raise WireError(Reason.SOFT_PROMPT_HIDDEN, "hidden", limit=self._spec.hidden_size, found=message.hidden)
        with np.errstate(over="ignore", invalid="ignore"):
            values = decode_rows(message.data, message.scales, rows=message.rows, hidden=message.hidden, dtype=message.dtype)
            values = self._cast(values)
        if not np.isfinite(values).all():
            raise WireError(Reason.SOFT_PROMPT_NOT_FINITE, "data", limit=self._spec.compute_dtype)
        norm = float(np.sqrt(np.square(values, dtype=np.float64).sum(axis=1).max()))
        if norm > self.max_norm:
            raise WireError(Reason.SOFT_PROMPT_NORM, "data", limit=f"{self.max_norm:.6g}", found=f"{norm:.6g}")
        return SoftPrompt(values, after_prefix, soft_prompt_digest(message))

    def _cast(self, values: Float32) -> Float32:
        """As the compute dtype will hold them; what it can't hold becomes infinite."""
        dtype = COMPUTE_DTYPES[self._spec.compute_dtype]
        if dtype == pb.DTYPE_F32:
            return values
        data, scales = encode_rows(values, dtype)
        return decode_rows(data, scales, rows=values.shape[0], hidden=values.shape[1], dtype=dtype)


def _after_prefix(message: pb.SoftPrompt) -> bool:
    if message.placement not in (pb.PLACEMENT_UNSPECIFIED, pb.PLACEMENT_FRONT, pb.PLACEMENT_AFTER_PREFIX):
        raise WireError(Reason.OUT_OF_RANGE, "placement", limit="PLACEMENT_FRONT or PLACEMENT_AFTER_PREFIX", found=message.placement)
    return message.placement == pb.PLACEMENT_AFTER_PREFIX
