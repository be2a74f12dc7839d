"""Which tokens a request has read and written, for the penalties on repeating them. Soft rows are no tokens and never count.

Legend: p requests with penalties, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lopa_server.engine.base import SamplingParams


def has_penalties(params: SamplingParams) -> bool:
    """Whether a request needs a row in the table at all."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


class TokenTable:
    """One row for each request with penalties: tokens seen in its prompt and text, and how often each is in its text.

    A row is zeroed when it is given out, so nothing of the request that had it before can show.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._seen = torch.zeros((0, vocabulary), dtype=torch.bool, device=device)
        self._written = torch.zeros((0, vocabulary), dtype=torch.int32, device=device)
        self._free: list[int] = []

    def take(self, prompt: Sequence[int]) -> int:
        """A row for a request whose prompt has these token ids."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._seen[row] = False
        self._written[row] = 0
        self._seen[row, torch.tensor(prompt, dtype=torch.long, device=self._seen.device)] = True
        return row

    def give_back(self, row: int) -> None:
        """The request has left."""
        self._free.append(row)

    def record(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Each of these rows has written one token: (k,) rows, (k,) ids."""
        self._written[rows, tokens] += 1
        self._seen[rows, tokens] = True

    def penalized(self, logits: torch.Tensor, rows: torch.Tensor, penalties: torch.Tensor) -> torch.Tensor:
        """(k, v) logits after penalties; `penalties` (3, k): repetition, presence, frequency.

        Repetition (Keskar et al., "CTRL", 2019, section 4.1): logits of tokens in prompt or text are divided by it where positive,
        multiplied where negative. Presence and frequency (OpenAI's definition, over the text): both are subtracted, the latter
        once for each time.
        """
        repetition, presence, frequency = penalties[:, :, None]
        logits = torch.where(self._seen[rows], torch.where(logits > 0, logits / repetition, logits * repetition), logits)
        written = self._written[rows]
        return logits - presence * (written > 0) - frequency * written

    def _grow(self) -> None:
        """Twice as many rows, at least eight."""
        old = self._seen.shape[0]
        more = max(8, old)
        self._seen = torch.cat([self._seen, self._seen.new_zeros((more, self._seen.shape[1]))])
        self._written = torch.cat([self._written, self._written.new_zeros((more, self._written.shape[1]))])
        self._free = list(range(old, old + more))
