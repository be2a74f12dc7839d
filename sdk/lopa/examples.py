"""What a persona learns from: examples, their split and their order. Every choice is a pure function of the seed.

Orders come from SHA-256, not from a library's random generator, so that every version and every language gives the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopa.errors import InvalidRequest, TuningError
from lopa.values import Message, Prompt, Target, unicode_text

DEFAULT_VALIDATION = 0.2
"""Share of the examples that is held back to measure on."""


@dataclass(frozen=True)
class Example:
    """A prompt and what should follow it."""

    prompt: Prompt
    target: Target
    append_end: bool = False
    """Learn to stop after the target: the FM's end token is appended and counted."""
    prefix: str | Sequence[int] | None = None
    """What stands before the prompt, such as a system prompt; with `placement="after_prefix"` the soft prompt stands between
    the two, and then the prompt may be empty."""
    encoder_text: str | None = None
    """What the prompt encoder reads; None for the text of prefix and prompt. Needed with token ids."""


ExampleLike = Example | tuple[Prompt, Target]


def as_examples(items: Iterable[ExampleLike]) -> list[Example]:
    """Examples from Examples or (prompt, target) tuples.

    Raises:
        TuningError: an item is neither.
    """
    examples = []
    for i, item in enumerate(items):
        if isinstance(item, Example):
            examples.append(item)
        elif isinstance(item, tuple) and len(item) == 2:
            examples.append(Example(*item))
        else:
            raise TuningError(f"example {i} is {type(item).__name__}; an Example or a (prompt, target) tuple is needed")
    return examples


def text_for_encoder(prompt: Prompt, given: str | None, prefix: str | Sequence[int] | None = None) -> str:
    """What the prompt encoder reads: `given`, else the text of prefix and prompt; chat messages as lines "role: content".

    Raises:
        InvalidRequest: token ids without `given`, or text with a lone surrogate.
    """
    if given is not None:
        return unicode_text(given, "encoder_text")
    if prefix is not None and not isinstance(prefix, str):
        raise InvalidRequest("the prompt encoder reads text: with token ids, give encoder_text too", field="encoder_text")
    before = unicode_text(prefix or "", "prefix")
    if isinstance(prompt, str):
        return before + unicode_text(prompt, "prompt")
    lines = [before] if before else []
    for turn in prompt:
        if isinstance(turn, Message):
            lines.append(f"{turn.role}: {turn.content}")
        elif isinstance(turn, Mapping):
            lines.append(f"{turn.get('role')}: {turn.get('content')}")
        else:
            raise InvalidRequest("the prompt encoder reads text: with token ids, give encoder_text too", field="encoder_text")
    return unicode_text("\n".join(lines), "prompt")


def permutation(count: int, *key: object) -> list[int]:
    """0 .. count-1 in an order that depends on the key alone."""
    prefix = "/".join(map(str, key))
    return sorted(range(count), key=lambda i: hashlib.sha256(f"{prefix}/{i}".encode()).digest())


def split(examples: Sequence[Example], validation: float | Iterable[ExampleLike] | None, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, validation) examples. A share (default 20 %) takes at least one and leaves at least one; examples are taken as they are.

    Raises:
        TuningError: too few examples, or a share that is not between 0 and 1.
    """
    if validation is not None and not isinstance(validation, int | float):
        held = as_examples(validation)
        if not examples or not held:
            raise TuningError(f"{len(examples)} examples and {len(held)} validation examples were given; at least one of each is needed")
        return list(examples), held
    share = DEFAULT_VALIDATION if validation is None else float(validation)
    if not 0 < share < 1:
        raise TuningError(f"validation is {share}; a share must be between 0 and 1, both excluded")
    if len(examples) < 2:
        raise TuningError(f"{len(examples)} examples were given; at least 2 are needed, one to learn from and one to measure on")
    count = min(max(1, round(share * len(examples))), len(examples) - 1)
    order = permutation(len(examples), "split", seed)
    return [examples[i] for i in sorted(order[count:])], [examples[i] for i in sorted(order[:count])]


def batch(count: int, size: int, step: int, seed: int) -> list[int]:
    """Indices of the batch that step `step` (from 1) learns from: `size` of them, from one permutation an epoch, end to end."""
    first = (step - 1) * size
    epochs: dict[int, list[int]] = {}
    indices = []
    for position in range(first, first + size):
        epoch, place = divmod(position, count)
        if epoch not in epochs:
            epochs[epoch] = permutation(count, "epoch", seed, epoch)
        indices.append(epochs[epoch][place])
    return indices


def digest(examples: Iterable[Example]) -> str:
    """SHA-256 over the examples' contents, in order."""
    state = hashlib.sha256()
    for example in examples:
        fields = [_plain(example.prompt), _plain(example.target), example.append_end, _plain(example.prefix), example.encoder_text]
        state.update(json.dumps(fields).encode() + b"\n")
    return state.hexdigest()


def _plain(value: Any) -> Any:
    """JSON-able content of a prompt or target."""
    if value is None or isinstance(value, str):
        return value
    return [
        [item.role, item.content] if isinstance(item, Message) else dict(item) if isinstance(item, Mapping) else int(item) for item in value
    ]


_FIELDS = {"prompt", "target", "append_end", "prefix", "encoder_text"}


def read_jsonl(path: Path) -> list[Example]:
    """Examples from a file with one JSON object a line: prompt and target, optionally append_end, prefix, encoder_text.

    Raises:
        TuningError: a line that is not such an object; the message names file and line. Or the file can't be read.
    """
    examples = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON strings may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise TuningError(f"can't read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            examples.append(_parse_line(line, f"{path}:{number}"))
    return examples


def _parse_line(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TuningError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or not {"prompt", "target"} <= set(row) or set(row) - _FIELDS:
        raise TuningError(f'{where}: one object with "prompt" and "target" is needed; {", ".join(sorted(_FIELDS))} are the fields known')
    for name, kinds in (
        ("prompt", str | list),
        ("target", str | list),
        ("append_end", bool),
        ("prefix", str | list | None),
        ("encoder_text", str | None),
    ):
        if name in row and not isinstance(row[name], kinds):
            raise TuningError(f"{where}: {name} is of type {type(row[name]).__name__}")
    return Example(**row)
