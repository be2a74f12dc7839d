"""Which tokens a request has read and written, for the penalties on repeating them. Soft rows are no tokens and never count.

Only the logits of these tokens are touched, so the cost grows with the texts, not with the vocabulary.
Legend: p requests with penalties, k of them in a step, n tokens of the longest, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lopa_server.engine.base import SamplingParams


def has_penalties(params: SamplingParams) -> bool:
    """Whether a request needs a row in the table at all."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


@dataclass(frozen=True)
class Penalized:
    """The rows of a step that have penalties, (k, 1) each."""

    places: torch.Tensor
    """In the batch."""
    table_rows: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


class TokenTable:
    """One row for each request with penalties: its prompt's token ids and then its text's, repetitions included.

    A row's length is set anew when it is given out, and nothing behind it is ever read, so nothing of the request that had
    the row before can show.
    """

    def __init__(self, device: torch.device) -> None:
        self._tokens = torch.zeros((0, 0), dtype=torch.long, device=device)
        self._prompt = torch.zeros((0, 1), dtype=torch.long, device=device)
        self._length = torch.zeros((0, 1), dtype=torch.long, device=device)
        self._free: list[int] = []
        self._longest = 0
        """At least the largest length."""

    @torch.inference_mode()
    def take(self, prompt: Sequence[int]) -> int:
        """A row for a request whose prompt has these token ids."""
        rows, width = self._tokens.shape
        self._longest = max(len(prompt), int(self._length.max()) if rows else 0)
        self._grow(rows if self._free else max(8, 2 * rows), max(width, self._longest))
        row = self._free.pop()
        self._tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long, device=self._tokens.device)
        self._prompt[row] = self._length[row] = len(prompt)
        return row

    @torch.inference_mode()
    def give_back(self, row: int) -> None:
        """The request has left."""
        self._length[row] = 0
        self._free.append(row)

    @torch.inference_mode()
    def record(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Each of these rows has written one token: (k,) rows, (k,) ids."""
        if self._longest == self._tokens.shape[1]:
            self._grow(self._tokens.shape[0], 2 * self._longest + 64)
        self._longest += 1
        self._tokens[rows, self._length[rows, 0]] = tokens
        self._length[rows] += 1

    @torch.inference_mode()
    def penalize(self, logits: torch.Tensor, rows: Penalized) -> None:
        """Change the (b, v) logits of tokens that these rows have read or written.

        Repetition (Keskar et al., "CTRL", 2019, section 4.1): logits of tokens in prompt or text are divided by it where positive,
        multiplied where negative. Presence and frequency (OpenAI's definition, over the text): both are subtracted, the latter
        once for each time.
        """
        table_rows = rows.table_rows[:, 0]
        prompt, length = self._prompt[table_rows], self._length[table_rows]
        tokens, _ = self._between(table_rows, torch.zeros_like(prompt), length)
        values = logits[rows.places, tokens]
        changed = torch.where(values > 0, values / rows.repetition, values * rows.repetition)
        logits[rows.places, tokens] = torch.where(length > 0, changed, values)
        tokens, inside = self._between(table_rows, prompt, length)
        values = logits[rows.places, tokens]
        logits[rows.places, tokens] = torch.where(length > prompt, values - rows.presence, values)
        logits.index_put_((rows.places.expand_as(tokens), tokens), torch.where(inside, -rows.frequency, 0.0), accumulate=True)

    def _between(self, rows: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(k, n) tokens at start..end, elsewhere the first of them again, and (k, n) where they are real.

        Writing the same value twice does no harm; where there are none at all, it is some token that must be left as it is.
        """
        width = max(1, self._longest)
        tokens = self._tokens[rows, :width]
        places = torch.arange(width, device=tokens.device)
        inside = (places >= start) & (places < end)
        return torch.where(inside, tokens, tokens.gather(1, start.clamp(max=width - 1))), inside

    def _grow(self, rows: int, width: int) -> None:
        """At least so many rows and tokens in each."""
        old_rows, old_width = self._tokens.shape
        if (rows, width) == (old_rows, old_width):
            return
        tokens = self._tokens.new_zeros((rows, max(1, width)))
        tokens[:old_rows, :old_width] = self._tokens
        self._tokens = tokens
        more = self._prompt.new_zeros((rows - old_rows, 1))
        self._prompt, self._length = torch.cat([self._prompt, more]), torch.cat([self._length, more])
        self._free += range(old_rows, rows)
