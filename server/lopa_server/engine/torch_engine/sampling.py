"""Chooses tokens: every row by its own parameters and its own random numbers, so that a seed means the same in any batch.

Order: grammar, logit bias, penalties; then the best token, or temperature, min_p, top_k, top_p and a draw. What the rows ask for is
laid out in tensors when the batch's composition changes; a step is a few operations over all rows, whatever they ask.

Legend: b rows, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lopa_server.engine.base import EngineError, EngineFailed, Logprob, SamplingParams, TokenLogprobs, UnsupportedSchema
from lopa_server.engine.randomness import start_state, uniform
from lopa_server.engine.torch_engine.constraints import Constraint, allowed_tokens
from lopa_server.engine.torch_engine.penalties import Penalized, TokenTable, has_penalties
from lopa_server.engine.torch_engine.truncation import Truncation, draw


@dataclass(frozen=True)
class Choice:
    """A row's next token, or the `error` why there is none."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    complete: bool = False
    """The row's grammar allows nothing after this token."""
    error: EngineError | None = None


@dataclass
class _Request:
    """What the sampler knows about a request until it leaves."""

    params: SamplingParams
    constraint: Constraint | None
    state: np.uint64
    """Where its random numbers start."""
    table_row: int | None
    """Its row of the penalties' table."""
    drawn: int = 0
    """Random numbers used up, as of the last change of the batch."""


class Sampler:
    """The requests of a batch and how their tokens are chosen. One thread uses it."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._device = device
        self._vocabulary = vocabulary
        self._table = TokenTable(device)
        self._requests: dict[str, _Request] = {}
        self._plan: _Plan | None = None

    def __len__(self) -> int:
        """Requests that have entered and not left."""
        return len(self._requests)

    def add(self, name: str, params: SamplingParams, prompt: Sequence[int], constraint: Constraint | None = None) -> None:
        """A request enters. It stays until `remove`, whatever becomes of its place in the batch.

        prompt: the real tokens that it reads, those of a prefix included; soft rows are no tokens.
        """
        table_row = self._table.take(prompt) if has_penalties(params) else None
        self._requests[name] = _Request(params, constraint, start_state(params.seed), table_row)

    def remove(self, name: str) -> None:
        """A request leaves and everything known about it is forgotten; unknown names are ignored."""
        self._settle()
        request = self._requests.pop(name, None)
        if request is not None and request.table_row is not None:
            self._table.give_back(request.table_row)

    @torch.inference_mode()
    def choose(self, names: Sequence[str], logits: torch.Tensor) -> list[Choice]:
        """The next token of each of these requests from (b, v) float32 logits, which may be overwritten.

        Raises:
            KeyError: a request that has not entered.
        """
        plan = self._plan_for(tuple(names))
        reported = None if plan.reporting is None else torch.log_softmax(logits[plan.reporting], dim=1)
        masked = self._mask(plan, logits)
        plan.process(logits, self._table)
        best, tokens = logits.max(dim=1)
        if plan.truncation is not None:
            numbers = torch.from_numpy(plan.next_numbers()).to(self._device)
            tokens[plan.drawing] = draw(logits[plan.drawing], plan.truncation, numbers)
        if plan.penalized is not None:
            self._table.record(plan.penalized.table_rows[:, 0], tokens[plan.penalized.places[:, 0]])
        chosen = torch.where(torch.isfinite(best), tokens, -1).tolist()
        logprobs = {} if reported is None else plan.logprobs(chosen, reported)
        choices = [Choice(token, logprobs.get(row), error=None if token >= 0 else _no_numbers()) for row, token in enumerate(chosen)]
        for row, constraint in plan.constrained:
            choices[row] = _followed(choices[row], constraint, masked[row])
        return choices

    def _mask(self, plan: _Plan, logits: torch.Tensor) -> dict[int, UnsupportedSchema | None]:
        """Leave the tokens that grammars allow. By constrained row: why it can't go on, or None."""
        masks = []
        errors: dict[int, UnsupportedSchema | None] = {}
        for row, constraint in plan.constrained:
            try:
                masks.append(constraint.mask())
                errors[row] = None
            except UnsupportedSchema as error:
                masks.append(constraint.everything)
                errors[row] = error
        if masks:
            allowed = allowed_tokens(masks, logits.shape[1]).to(self._device)
            logits[plan.constraining] = logits[plan.constraining].masked_fill(~allowed, -torch.inf)
        return errors

    def _plan_for(self, names: tuple[str, ...]) -> _Plan:
        """The last step's plan when nothing has changed."""
        if self._plan is None or self._plan.names != names:
            self._settle()
            self._plan = _Plan(names, [self._requests[name] for name in names], self._vocabulary, self._device)
        return self._plan

    def _settle(self) -> None:
        if self._plan is not None:
            self._plan.settle()
        self._plan = None


class _Plan:
    """What a batch of this composition asks for, in tensors. Rows that are all greedy ask for nothing: one argmax is left."""

    def __init__(self, names: tuple[str, ...], requests: Sequence[_Request], vocabulary: int, device: torch.device) -> None:
        self.names = names
        self._device = device
        params = [request.params for request in requests]
        self.constrained = [(row, request.constraint) for row, request in enumerate(requests) if request.constraint is not None]
        self.constraining = self._indices([row for row, _ in self.constrained])
        self._lay_out_draws(requests, vocabulary)
        self._lay_out_bias(params)
        self._lay_out_penalties(requests)
        self._alternatives = [(row, one.logprobs) for row, one in enumerate(params) if one.logprobs is not None]
        self.reporting = self._indices([row for row, _ in self._alternatives]) if self._alternatives else None

    def process(self, logits: torch.Tensor, table: TokenTable) -> None:
        """Bias and penalties, in place."""
        if self._biased is not None:
            logits.index_put_(self._biased, self._bias, accumulate=True)
        if self.penalized is not None:
            table.penalize(logits, self.penalized)

    def next_numbers(self) -> np.ndarray:
        """A uniform number for each row that draws, float64."""
        numbers = uniform(self._states, self._counts)
        self._counts += np.uint64(1)
        return numbers

    def settle(self) -> None:
        """Before the plan is dropped: each request learns how many numbers it has used."""
        for request, count in zip(self._drawers, self._counts, strict=True):
            request.drawn = int(count)

    def logprobs(self, chosen: Sequence[int], values: torch.Tensor) -> dict[int, TokenLogprobs]:
        """By row, from the (rows, v) log-probabilities of the rows that report them, under the FM's own distribution."""
        tokens = self._indices([max(0, chosen[row]) for row, _ in self._alternatives])
        own = values.gather(1, tokens[:, None])[:, 0].tolist()
        top, ids = (part.tolist() for part in values.topk(max(count for _, count in self._alternatives), dim=1))
        result = {}
        for index, (row, count) in enumerate(self._alternatives):
            others = tuple(Logprob(token, value) for token, value in zip(ids[index][:count], top[index][:count], strict=True))
            result[row] = TokenLogprobs(Logprob(chosen[row], own[index]), others)
        return result

    def _lay_out_draws(self, requests: Sequence[_Request], vocabulary: int) -> None:
        rows = [row for row, request in enumerate(requests) if request.params.temperature > 0]
        self._drawers = [requests[row] for row in rows]
        self._states = np.array([request.state for request in self._drawers], dtype=np.uint64)
        self._counts = np.array([request.drawn for request in self._drawers], dtype=np.uint64)
        self.drawing = self._indices(rows)
        self.truncation: Truncation | None = None
        if rows:
            self.truncation = Truncation.of([request.params for request in self._drawers], vocabulary, self._device)

    def _lay_out_bias(self, params: Sequence[SamplingParams]) -> None:
        entries = [(row, token, value) for row, one in enumerate(params) for token, value in one.logit_bias]
        self._biased: tuple[torch.Tensor, torch.Tensor] | None = None
        if entries:
            rows, tokens, values = zip(*entries, strict=True)
            self._biased, self._bias = (self._indices(rows), self._indices(tokens)), torch.tensor(values, device=self._device)

    def _lay_out_penalties(self, requests: Sequence[_Request]) -> None:
        entries = [(row, request.table_row, request.params) for row, request in enumerate(requests) if request.table_row is not None]
        self.penalized: Penalized | None = None
        if entries:
            places, table_rows, params = zip(*entries, strict=True)
            values = [(one.repetition_penalty, one.presence_penalty, one.frequency_penalty) for one in params]
            columns = torch.tensor(values, device=self._device)[:, :, None].unbind(1)
            self.penalized = Penalized(self._indices(places)[:, None], self._indices(table_rows)[:, None], *columns)

    def _indices(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


def _no_numbers() -> EngineFailed:
    return EngineFailed("the model's logits are not finite")


def _followed(choice: Choice, constraint: Constraint, error: UnsupportedSchema | None) -> Choice:
    """The choice with its grammar one token further."""
    if choice.error is not None or error is not None:
        return replace(choice, error=error or choice.error)
    try:
        return replace(choice, complete=constraint.follow(choice.token_id))
    except UnsupportedSchema as reason:
        return replace(choice, error=reason)
