"""Examples of a population: JSON lines to token ids and features, person by person.

A line is {"user", "task", "prompt", "target", "append_end", "prefix"}; the last two may be left out. The soft prompt stands behind the
prefix, at the front when there is none. Each (user, task) is one person with personal tensors of its own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lopa_exporters.encoder import Encoder, NoEncoder
from lopa_exporters.frozen import FrozenModel, TokenPair

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
    prefix: str = ""
    """What stands before the soft prompt; then the prompt may be empty."""


def read_examples(path: Path) -> list[Example]:
    """Parse a JSONL file, or a Parquet file (by its ending) with the same names as columns, strictly.

    Raises:
        DataError: a line that is not such an object, an unknown field, a wrong type, an empty prompt or target; or no lines.
    """
    if path.suffix == ".parquet":
        examples = [_example(functools.partial(dict, row), f"{path}, row {number}") for number, row in enumerate(_parquet_rows(path), 1)]
    else:
        with path.open(encoding="utf-8") as file:
            examples = [_example(functools.partial(json.loads, line), f"{path}, line {number}") for number, line in enumerate(file, 1)]
    if not examples:
        raise DataError(f"{path} has no examples")
    return examples


def _example(read: Callable[[], dict[str, Any]], where: str) -> Example:
    """One example, or a DataError that names its place."""
    try:
        example = Example(**read())
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: {error}") from error
    texts = (example.user, example.task, example.prompt, example.prefix, example.target)
    if not all(isinstance(text, str) for text in texts) or not isinstance(example.append_end, bool):
        raise DataError(f"{where}: user, task, prompt, prefix and target must be strings, append_end a boolean")
    if not all((example.user, example.task, example.target, example.prefix + example.prompt)):
        raise DataError(f"{where}: user, task, target, and one of prefix and prompt must not be empty")
    return example


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows as mappings; a column's missing value stands for its default."""
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield {name: value for name, value in row.items() if value is not None}
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error


@dataclass(frozen=True)
class Dataset:
    """Examples as the model reads them.

    features: (n, h) standardized encoder features of prefix and prompt.
    persons: (user, task) of each person, and in `rows` each person's indices.
    """

    tokens: Sequence[TokenPair]
    features: Tensor
    persons: tuple[tuple[str, str], ...]
    rows: tuple[Indices, ...]

    def pairs(self, indices: Sequence[int] | Indices) -> list[TokenPair]:
        """What the model reads of these examples."""
        return [self.tokens[i] for i in indices]

    def split(self, validation: int) -> tuple[tuple[Indices, ...], tuple[Indices, ...]]:
        """Each person's rows for training, and those for validation: see `split_rows`."""
        return split_rows(self.rows, validation)


def split_rows(people: Sequence[Indices], validation: int) -> tuple[tuple[Indices, ...], tuple[Indices, ...]]:
    """Each person's rows for training, and every so-many-th for validation (at most `validation` of them, half of the rows)."""
    train, held = [], []
    for rows in people:
        count = min(validation, len(rows) // 2)
        places = np.linspace(0, len(rows) - 1, count).round().astype(np.int64) if count else np.zeros(0, np.int64)
        held.append(rows[places])
        train.append(np.delete(rows, places))
    return tuple(train), tuple(held)


def persons_of(examples: Sequence[Example]) -> tuple[tuple[tuple[str, str], ...], tuple[Indices, ...]]:
    """Every (user, task) in order of appearance, and each one's rows."""
    people = list(dict.fromkeys((example.user, example.task) for example in examples))
    number = {person: i for i, person in enumerate(people)}
    owners = np.array([number[example.user, example.task] for example in examples])
    return tuple(people), tuple(np.flatnonzero(owners == i) for i in range(len(people)))


def by_task(examples: Sequence[Example], tasks: Sequence[str] = ()) -> dict[str, list[Example]]:
    """Examples of each kind of task, of these or of all.

    Raises:
        DataError: a task that no example has.
    """
    found: dict[str, list[Example]] = {task: [] for task in tasks}
    for example in examples:
        if not tasks or example.task in found:
            found.setdefault(example.task, []).append(example)
    if missing := [task for task, own in found.items() if not own]:
        raise DataError(f"no example has the task {missing[0]!r}")
    return found


def tokenize(examples: Sequence[Example], fm: FrozenModel, soft_rows: int) -> list[TokenPair]:
    """What the model reads of each example.

    soft_rows: rows that the soft prompt takes of the context.

    Raises:
        DataError: an example does not fit the model's context.
    """
    texts = [example.prefix or example.prompt for example in examples]
    first = fm.tokenize_prompts(texts)
    behind = fm.tokenize_targets([example.prompt for example in examples], [False] * len(examples))
    targets = fm.tokenize_targets([example.target for example in examples], [example.append_end for example in examples])
    tokens = [
        TokenPair(prompt, target, read) if example.prefix else TokenPair(read, target)
        for example, read, prompt, target in zip(examples, first, behind, targets, strict=True)
    ]
    for example, pair in zip(examples, tokens, strict=True):
        if soft_rows + len(pair) > fm.context:
            size = f"{soft_rows} + {len(pair)} positions"
            raise DataError(f"an example of {example.user}, {example.task} needs {size}; the model's context has {fm.context}")
    return tokens


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
    tokens = tokenize(examples, fm, soft_rows)
    features = encoder.encode([example.prefix + example.prompt for example in examples], on_progress=on_progress)
    if standardize and isinstance(encoder, Encoder):
        features = encoder.restandardize(features)
    people, rows = persons_of(examples)
    return Dataset(tokens, features, people, rows)
