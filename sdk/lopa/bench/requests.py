"""From a planned request to its message: random tokens, and a soft prompt that is the same whenever its user comes back."""

from __future__ import annotations

import numpy as np

from lopa.bench.workload import Planned, Workload
from lopa.v1 import catalog_pb2, common_pb2, inference_pb2
from lopa.wire.tensors import soft_prompt_message

ROW_NORM = 1 / 16
"""Part of the longest row that the server takes. By default it takes 16 times its longest token embedding."""


class RequestMaker:
    """Makes messages that fit one server's model."""

    def __init__(self, model: catalog_pb2.ModelInfo, workload: Workload) -> None:
        """Raises ValueError when the workload doesn't fit the model's limits."""
        self._model, self._workload = model, workload
        rows = workload.rows if workload.users else 0
        if rows > model.limits.max_virtual_tokens:
            raise ValueError(f"soft prompts of {rows} rows; this server takes {model.limits.max_virtual_tokens}")
        longest = workload.prefix_tokens + rows + workload.prompt_tokens[1] + workload.new_tokens[1]
        if longest > model.context_length:
            raise ValueError(f"requests of up to {longest} positions; this model's context is {model.context_length}")
        placement = common_pb2.PLACEMENT_AFTER_PREFIX if workload.prefix_tokens else common_pb2.PLACEMENT_FRONT
        self._placement = placement
        self._prefix = self.tokens(workload.prefix_tokens, workload.seed, 0)

    def soft_prompt(self, user: int) -> common_pb2.SoftPrompt:
        """(m, d) Gaussian rows, about as long as a default server's longest token embedding."""
        model, rows = self._model, self._workload.rows
        values = np.random.default_rng((self._workload.seed, 1, user)).standard_normal((rows, model.hidden_size), dtype=np.float32)
        values *= ROW_NORM * model.limits.max_row_norm / np.sqrt(model.hidden_size)
        return soft_prompt_message(values, common_pb2.DTYPE_BF16, self._placement)

    def generate(self, planned: Planned) -> inference_pb2.GenerateRequest:
        """Greedy, and on past the end token: every request has exactly the planned lengths."""
        tokens = self.tokens(planned.prompt_tokens, self._workload.seed, 2, planned.number)
        request = inference_pb2.GenerateRequest(
            prompt=common_pb2.Prompt(tokens=common_pb2.TokenIds(ids=tokens)),
            sampling=inference_pb2.Sampling(max_tokens=planned.new_tokens, ignore_end=True),
        )
        if self._prefix:
            request.prefix.tokens.ids.extend(self._prefix)
        if planned.user is not None:
            request.soft_prompt.CopyFrom(self.soft_prompt(planned.user))
        return request

    def tokens(self, count: int, *seed: int) -> list[int]:
        """So many random token ids, always the same for a seed."""
        drawn: list[int] = np.random.default_rng(seed).integers(0, self._model.vocab_size, count).tolist()
        return drawn
