"""Chooses tokens: every row by its own parameters and its own random numbers, so that a seed means the same in any batch.

Legend: b rows, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lopa_server.engine.base import Logprob, SamplingParams, TokenLogprobs


class Randomness:
    """One uniform number in [0, 1) per token, from the request's seed and nothing else (Philox, counter-based)."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(key=seed))

    def next(self) -> float:
        return float(self._generator.random())


@dataclass(frozen=True)
class Choice:
    """A row's next token. `broken`: the FM gave values that aren't numbers, so there is none."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    broken: bool = False


@torch.inference_mode()
def choose(logits: torch.Tensor, params: Sequence[SamplingParams], randomness: Sequence[Randomness]) -> list[Choice]:
    """The next token of each row from (b, v) float32 logits."""
    best, tokens = logits.max(dim=1)
    finite = torch.isfinite(best).tolist()
    chosen = tokens.tolist()
    drawn = [row for row, param in enumerate(params) if param.temperature > 0 and finite[row]]
    plain = [row for row in drawn if params[row].top_p >= 1 and params[row].top_k == 0]
    cut = [row for row in drawn if row not in plain]
    for rows, draw in ((plain, _draw), (cut, _draw_truncated)):
        if rows:
            drawn_tokens = draw(logits[rows], [params[row] for row in rows], [randomness[row].next() for row in rows])
            for row, token in zip(rows, drawn_tokens, strict=True):
                chosen[row] = token
    logprobs = _logprobs(logits, chosen, params)
    return [Choice(chosen[row], logprobs.get(row), broken=not finite[row]) for row in range(len(params))]


def _weights(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Probabilities after temperature: (b, v) float64, so that a sum over a large vocabulary stays exact."""
    temperature = torch.tensor([param.temperature for param in params], dtype=torch.float64, device=logits.device)
    shifted = logits.double() - logits.amax(dim=1, keepdim=True).double()
    return torch.softmax(shifted / temperature[:, None], dim=1)


def _inverse(weights: torch.Tensor, uniform: Sequence[float]) -> torch.Tensor:
    """Index at which each row's cumulated weight passes its uniform number: (b, 1)."""
    total = weights.cumsum(dim=1)
    wanted = torch.tensor(uniform, dtype=torch.float64, device=weights.device)[:, None] * total[:, -1:]
    index = torch.searchsorted(total, wanted, right=True)
    last = weights.shape[1] - 1 - (weights.flip(1) > 0).int().argmax(dim=1, keepdim=True)
    return torch.minimum(index, last)


def _draw(logits: torch.Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> list[int]:
    """Tokens from the whole distribution."""
    return _inverse(_weights(logits, params), uniform)[:, 0].tolist()


def _draw_truncated(logits: torch.Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> list[int]:
    """Tokens from the top_k likeliest, and of those from the fewest that hold top_p of their probability."""
    weights, order = _weights(logits, params).sort(dim=1, descending=True, stable=True)
    device, size = logits.device, logits.shape[1]
    top_k = torch.tensor([param.top_k or size for param in params], device=device)[:, None]
    top_p = torch.tensor([param.top_p for param in params], dtype=torch.float64, device=device)[:, None]
    weights = weights.masked_fill(torch.arange(size, device=device) >= top_k, 0)
    before = weights.cumsum(dim=1) - weights
    weights = weights.masked_fill(before >= top_p * weights.sum(dim=1, keepdim=True), 0)
    return order.gather(1, _inverse(weights, uniform))[:, 0].tolist()


def _logprobs(logits: torch.Tensor, chosen: Sequence[int], params: Sequence[SamplingParams]) -> dict[int, TokenLogprobs]:
    """Of the rows that asked for them, under the FM's own distribution."""
    rows = [row for row, param in enumerate(params) if param.logprobs is not None]
    if not rows:
        return {}
    values = torch.log_softmax(logits[rows], dim=1)
    most = min(max(params[row].logprobs or 0 for row in rows), values.shape[1])
    top, ids = values.topk(most, dim=1)
    result = {}
    for index, row in enumerate(rows):
        count = params[row].logprobs or 0
        pairs = zip(ids[index, :count].tolist(), top[index, :count].tolist(), strict=True)
        alternatives = tuple(Logprob(token, value) for token, value in pairs)
        result[row] = TokenLogprobs(Logprob(chosen[row], float(values[index, chosen[row]])), alternatives)
    return result
