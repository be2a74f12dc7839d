"""Continuations of many prompts by transformers' `generate`, behind soft prompts or without.

Legend: b prompts, m soft-prompt rows, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lopa_exporters.frozen import FrozenModel


@dataclass(frozen=True)
class Writing:
    """How a model writes. temperature: 0 is greedy."""

    stops: Sequence[str]
    """A continuation ends behind the first of these."""
    temperature: float = 0.0
    top_p: float = 1.0


def continue_prompts(
    fm: FrozenModel, soft: Tensor | None, prompts: Sequence[Sequence[int]], room: Sequence[int], how: Writing
) -> list[str]:
    """What the model writes after each [soft ; prompt], at most `room` tokens of it; soft (b, m, d).

    Prompts are padded on the left, so that what follows has its true distance to every token. Sampling draws from torch's generator.
    """
    embed = fm.model.get_input_embeddings()
    rows = [embed(torch.tensor(prompt, device=fm.device)) for prompt in prompts]
    if soft is not None:
        rows = [torch.cat((soft[i].to(row), row)) for i, row in enumerate(rows)]
    longest = max(len(row) for row in rows)
    embeds = torch.stack([torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=fm.device)
    from transformers import StoppingCriteriaList

    end = fm.tokenizer.eos_token_id
    sampling = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p} if how.temperature else {"do_sample": False}
    with torch.inference_mode(), torch.autocast(fm.device.type, torch.bfloat16, enabled=fm.bf16):
        written = fm.model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=max(room),
            eos_token_id=end,
            pad_token_id=fm.tokenizer.pad_token_id if fm.tokenizer.pad_token_id is not None else end,
            stopping_criteria=StoppingCriteriaList([_Stop(fm.tokenizer, how.stops)]),
            **sampling,
        )
    return [_text(fm.tokenizer, ids[:most].tolist()) for ids, most in zip(written, room, strict=True)]


def _text(tokenizer: Any, ids: list[int]) -> str:
    """Up to the end token."""
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Stop:
    """Rows that have written a stop text. Only a row's last tokens are read: enough for the longest stop and one token more."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.window = 1 + max((len(stop.encode()) for stop in stops), default=0)
        self.done: list[bool] = []

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(b, t) ids written so far -> (b,) bool."""
        del scores
        self.done = self.done or [False] * len(ids)
        for i, row in enumerate(ids):
            if not self.done[i]:
                text = self.tokenizer.decode(row[-self.window :], clean_up_tokenization_spaces=False)
                self.done[i] = any(stop in text for stop in self.stops)
        return torch.tensor(self.done, device=ids.device)
