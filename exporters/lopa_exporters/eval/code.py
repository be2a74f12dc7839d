"""Tasks whose answers are executed: what the model reads, what it should write, and how that is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lopa_exporters.eval.sandbox import Check


@dataclass(frozen=True)
class Problem:
    """prompt, target: what a model reads and, in training, should write. fields: what the check is made of."""

    id: str
    prompt: str
    target: str
    fields: tuple[str, ...]


@dataclass(frozen=True)
class CodeTask:
    """One task.

    read: problems of a file. check: a problem and what the model wrote (the task's own clean-up done by it) to a check, or None for
    text that the official scorer refuses unseen. reference: the data set's own answer, to a check.
    """

    name: str
    metric: str
    read: Callable[[Path], list[Problem]]
    check: Callable[[Problem, str], Check | None]
    reference: Callable[[Problem], Check]
    stops: Sequence[str]
    """Writing ends at the first of these; clean-up is the check's."""
    cpu_seconds: int
    """The official scorer's timeout."""
    starts_with_bos: bool
    """The model's first token stands before the prompt, even when its tokenizer adds none."""
    ends_with_eos: bool
    """Training targets end with the model's end token."""


def halves(problems: Sequence[Problem]) -> tuple[list[Problem], list[Problem]]:
    """Training and test problems: first and second half of the file, as the official repository has it."""
    middle = len(problems) // 2
    return list(problems[:middle]), list(problems[middle:])
