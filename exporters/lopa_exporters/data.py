"""Examples of a population: JSON lines to token ids and features, person by person.

A line is {"user", "task", "prompt", "target", "append_end"}. Each (user, task) is one person with personal tensors of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lopa_exporters.encoder import Encoder, NoEncoder
from lopa_exporters.frozen import FrozenModel

Indices = NDArray[np.int64]


class DataError(ValueError):
    """A population file that cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Example:
    """One example. `append_end`: the target ends with the model's end token."""

    user: str
    task: str
    prompt: str
    target: str
    append_end: bool = False


def read_examples(path: Path) -> list[Example]:
    """Parse a JSONL file strictly.

    Raises:
        DataError: a line that is not such an object, an unknown field, a wrong type, an empty prompt or target; or no lines.
    """
    examples = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                example = Example(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}, line {number}: {error}") from error
            texts = (example.user, example.task, example.prompt, example.target)
            if not all(isinstance(text, str) and text for text in texts) or not isinstance(example.append_end, bool):
                raise DataError(
                    f"{path}, line {number}: user, task, prompt and target must be strings that are not empty, append_end a boolean"
                )
            examples.append(example)
    if not examples:
        raise DataError(f"{path} has no examples")
    return examples


@dataclass(frozen=True)
class Dataset:
    """Examples as the model reads them.

    features: (n, h) standardized encoder features of the prompts.
    persons: (user, task) of each person, and in `rows` each person's indices.
    """

    prompts: Sequence[Sequence[int]]
    targets: Sequence[Sequence[int]]
    features: Tensor
    persons: tuple[tuple[str, str], ...]
    rows: tuple[Indices, ...]

    def pairs(self, indices: Sequence[int] | Indices) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
        """Prompt ids and target ids of these examples."""
        return [self.prompts[i] for i in indices], [self.targets[i] for i in indices]

    def split(self, validation: int) -> tuple[tuple[Indices, ...], tuple[Indices, ...]]:
        """Each person's rows for training, and every so-many-th for validation (at most `validation` of them, half of the rows)."""
        train, held = [], []
        for rows in self.rows:
            count = min(validation, len(rows) // 2)
            places = np.linspace(0, len(rows) - 1, count).round().astype(np.int64) if count else np.zeros(0, np.int64)
            held.append(rows[places])
            train.append(np.delete(rows, places))
        return tuple(train), tuple(held)


def build_dataset(
    examples: Sequence[Example],
    fm: FrozenModel,
    encoder: Encoder | NoEncoder,
    *,
    soft_rows: int,
    standardize: bool,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Dataset:
    """Tokenize and encode, once.

    soft_rows: rows that the soft prompt takes of the context.
    standardize: set the encoder's constants from these examples first; otherwise they are taken as they are.

    Raises:
        DataError: an example does not fit the model's context.
    """
    prompts = fm.tokenize_prompts([example.prompt for example in examples])
    targets = fm.tokenize_targets([example.target for example in examples], [example.append_end for example in examples])
    for example, prompt, target in zip(examples, prompts, targets, strict=True):
        if soft_rows + len(prompt) + len(target) > fm.context:
            size = f"{soft_rows} + {len(prompt)} + {len(target)} positions"
            raise DataError(f"an example of {example.user}, {example.task} needs {size}; the model's context has {fm.context}")
    features = encoder.encode([example.prompt for example in examples], on_progress=on_progress)
    if standardize and isinstance(encoder, Encoder):
        features = encoder.restandardize(features)
    people = list(dict.fromkeys((example.user, example.task) for example in examples))
    number = {person: i for i, person in enumerate(people)}
    owners = np.array([number[example.user, example.task] for example in examples])
    return Dataset(prompts, targets, features, tuple(people), tuple(np.flatnonzero(owners == i) for i in range(len(people))))
