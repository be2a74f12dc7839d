"""The protocol that every method follows, and its torch half: AdamW on named tensors with the device's clipping and rounding.

Legend: b pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lopa_exporters.frozen import FrozenModel, PairLosses, TokenPair
from lopa_exporters.simulate import paced_adamw, set_rate
from torch import Tensor, nn

CLIP = 1.0
AT_REST = torch.float16
State = Mapping[str, Any]


@dataclass(frozen=True)
class Footprint:
    """What one user costs.

    numbers: trainable ones. device, server: bytes kept there for this user, at rest. wire: numbers that a pair's soft prompt has, each
    way the same; None if the user's text goes to the server once and is tuned on there.
    """

    numbers: int
    device: int = 0
    server: int = 0
    wire: int | None = None


class Learner(Protocol):
    """One user's personal part, tuned step by step."""

    footprint: Footprint

    def losses(self, rows: Sequence[int], pairs: Sequence[TokenPair]) -> PairLosses:
        """Likelihoods under the present state; rows: the items whose features belong to the pairs."""
        ...

    def step(self, rows: Sequence[int], pairs: Sequence[TokenPair], rate: float, number: int) -> None:
        """One optimizer step on the mean over the pairs' target tokens; number counts from 1."""
        ...

    def state(self) -> State:
        """A copy, exact."""
        ...

    def at_rest(self, state: State) -> State:
        """The same, rounded to what is kept."""
        ...

    def restore(self, state: State) -> None:
        """Go back to a state."""
        ...


class TorchLearner(ABC):
    """A method whose parameters are torch tensors; `losses` is the subclass's."""

    footprint: Footprint

    def __init__(self, parameters: Mapping[str, Tensor], paces: Mapping[str, float] | None = None) -> None:
        """paces: as `paced_adamw` has them."""
        self.parameters = dict(parameters)
        self.optimizer = paced_adamw(self.parameters, paces or {})

    @abstractmethod
    def losses(self, rows: Sequence[int], pairs: Sequence[TokenPair]) -> PairLosses: ...

    def step(self, rows: Sequence[int], pairs: Sequence[TokenPair], rate: float, number: int) -> None:
        del number
        set_rate(self.optimizer, rate)
        losses = self.losses(rows, pairs)
        self.optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        self.optimizer.step()

    def state(self) -> State:
        return {name: tensor.detach().clone() for name, tensor in self.parameters.items()}

    def at_rest(self, state: State) -> State:
        return {name: tensor.to(AT_REST) for name, tensor in state.items()}

    @torch.no_grad()
    def restore(self, state: State) -> None:
        for name, tensor in self.parameters.items():
            tensor.copy_(state[name])


def count(parameters: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in parameters.values())


def bytes_at_rest(numbers: int) -> int:
    """Bytes in float16."""
    return numbers * AT_REST.itemsize


class PlainLearner:
    """The model alone: nothing to learn."""

    footprint = Footprint(0)

    def __init__(self, fm: FrozenModel) -> None:
        self.fm = fm

    def losses(self, rows: Sequence[int], pairs: Sequence[TokenPair]) -> PairLosses:
        del rows
        return losses_without_soft_prompt(self.fm, pairs)

    def step(self, rows: Sequence[int], pairs: Sequence[TokenPair], rate: float, number: int) -> None:
        del rows, pairs, rate, number
        raise TypeError("the plain model has nothing to tune")

    def state(self) -> State:
        return {}

    def at_rest(self, state: State) -> State:
        return state

    def restore(self, state: State) -> None:
        del state


def losses_without_soft_prompt(fm: FrozenModel, pairs: Sequence[TokenPair]) -> PairLosses:
    """As `fm.losses(None, pairs)`, but what the model read of prefixes is kept: a prefix's last token is given as a soft row.

    Only without gradients: what was read has none.
    """
    if not all(pair.prefix for pair in pairs):
        return fm.losses(None, pairs)
    last = torch.tensor([[pair.prefix[-1]] for pair in pairs], device=fm.device)
    shorter = [TokenPair(pair.prompt, pair.target, pair.prefix[:-1]) for pair in pairs]
    return fm.losses(fm.model.get_input_embeddings()(last), shorter)
