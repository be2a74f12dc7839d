"""Pauses within a micro-batch of pairs: streams have their turn in the middle of its forward and backward pass.

The model's code stays as it is. Hooks on its innermost modules stop before each of them on the way forward, and where the
gradient of its input is known on the way back; other work is done right there, further up the same stack. What a pause
finds and leaves is the same: such work has its own inference mode and writes to other slots of the pool.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

Between = Callable[[float, float], bool]
"""Called when a part is over: seconds since the last pause, and those of the last part. True: time was given to others."""


class Interruptions:
    """Of one micro-batch: when it may pause, and what its parts take."""

    def __init__(self, between: Between) -> None:
        self._between = between
        self._paused = False
        self._others = 0.0
        self._hooks: list[RemovableHandle] = []
        self._begin = self._turn = self._part = time.perf_counter()
        self.longest = 0.0
        """Seconds of the longest part that nothing could interrupt."""

    @property
    def turn_seconds(self) -> float:
        """Since the last pause."""
        return time.perf_counter() - self._turn

    @property
    def seconds(self) -> float:
        """In all, without what others took."""
        return time.perf_counter() - self._begin - self._others

    def part(self) -> None:
        """A part is over. Inside a pause nothing happens: what is computed there passes through the same modules."""
        if self._paused:
            return
        now = time.perf_counter()
        self.longest = max(self.longest, now - self._part)
        self._paused = True
        try:
            others = self._between(now - self._turn, now - self._part)
        finally:
            self._paused = False
        self._part = time.perf_counter()
        if others:
            self._others += self._part - now
            self._turn = self._part

    def end(self) -> None:
        """The last part is over."""
        self.longest = max(self.longest, time.perf_counter() - self._part)

    @contextlib.contextmanager
    def within(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside, the model's passes come in parts."""
        innermost = [module for module in model.modules() if next(module.children(), None) is None]
        self._hooks = [module.register_forward_pre_hook(self._before) for module in innermost]
        try:
            yield
        finally:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def _before(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        del module
        self.part()
        if not self._paused and inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].requires_grad:
            self._hooks.append(inputs[0].register_hook(self._backward))

    def _backward(self, gradient: torch.Tensor) -> None:
        del gradient
        self.part()
