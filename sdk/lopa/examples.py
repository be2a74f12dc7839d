"""What a persona learns from: examples, their split and their order. Every choice is a pure function of the seed.

Orders come from SHA-256, not from a library's random generator, so that every version and every language gives the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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


Turns = Sequence[Message] | Sequence[Mapping[str, str]]
"""A conversation: `Message`s, or mappings with role and content."""
ExampleLike = Example | tuple[Prompt, Target] | Turns | Path
"""What `tune` and `score` take: an Example, a (prompt, target) tuple, a conversation whose last turn is what should be said, or a
file (see `lopa.sources.read_examples`)."""


def as_examples(items: Iterable[ExampleLike]) -> list[Example]:
    """Examples from everything that `ExampleLike` names.

    Raises:
        TuningError: no such items, an item that is none of it or has a field of another type, or a file that can't be read as examples.
    """
    if not isinstance(items, Iterable):
        raise TuningError(f"the examples are {reprlib.repr(items)}; a list of them is needed, a file's path in it too")
    examples: list[Example] = []
    for i, item in enumerate(items):
        if isinstance(item, Example):
            examples.append(item)
        elif isinstance(item, Path):
            from lopa.sources import read_examples

            examples += read_examples(item)
        elif isinstance(item, tuple) and len(item) == 2 and not isinstance(item[0], Message):
            examples.append(Example(*item))
        elif isinstance(item, Sequence) and not isinstance(item, str | bytes):
            examples.append(from_conversation(item, f"example {i}"))
        else:
            raise TuningError(
                f"example {i} is {type(item).__name__}; an Example, a (prompt, target) tuple, a conversation or a Path is needed"
            )
    for i, example in enumerate(examples):
        _check(example, f"example {i}")
    return examples


def _check(example: Example, where: str) -> None:
    """Types only, before anything looks at them: what they may hold, the server says.

    Raises:
        TuningError: a field of another type.
    """
    ids = (int, np.integer)
    for name, value, items, words in (
        ("prompt", example.prompt, (*ids, Message, Mapping), "text, a conversation or token ids"),
        ("target", example.target, ids, "text or token ids"),
        ("prefix", "" if example.prefix is None else example.prefix, ids, "text or token ids"),
        ("encoder_text", "" if example.encoder_text is None else example.encoder_text, (), "text"),
    ):
        listed = items and isinstance(value, Collection) and not isinstance(value, bytes | Mapping)
        if not isinstance(value, str) and not (listed and all(isinstance(item, items) for item in value)):
            raise TuningError(f"{where}: its {name} is {reprlib.repr(value)}; it must be {words}")


def from_conversation(turns: Sequence[Any], where: str = "the conversation") -> Example:
    """The last turn, which must be the assistant's, as the target of what was said before; its end is learnt too.

    Raises:
        TuningError: fewer than two turns, a turn without role and content, or another last turn.
    """
    plain = [turn if isinstance(turn, Message) else Message(turn["role"], turn["content"]) for turn in turns if _is_turn(turn)]
    if len(plain) != len(turns) or len(plain) < 2 or plain[-1].role != "assistant":
        raise TuningError(
            f"{where} is not a conversation to learn from: two turns or more with role and content are needed, the last the assistant's"
        )
    return Example(plain[:-1], plain[-1].content, append_end=True)


def _is_turn(turn: object) -> bool:
    if isinstance(turn, Message):
        return isinstance(turn.role, str) and isinstance(turn.content, str)
    return isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


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


@functools.lru_cache(maxsize=16)
def permutation(count: int, *key: object) -> tuple[int, ...]:
    """0 .. count-1 in an order that depends on the key alone."""
    prefix = "/".join(map(str, key))
    return tuple(sorted(range(count), key=lambda i: hashlib.sha256(f"{prefix}/{i}".encode()).digest()))


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
    places = (divmod(position, count) for position in range(first, first + size))
    return [permutation(count, "epoch", seed, epoch)[place] for epoch, place in places]


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
