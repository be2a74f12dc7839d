"""Examples from files: JSON lines, and plain text that is cut into pieces to go on from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lopa.errors import TuningError
from lopa.examples import Example, from_conversation
from lopa.files import read_limited
from lopa.values import Message, Prompt, Target

MAX_FILE_BYTES = 256 << 20
PROMPT_CHARACTERS, TARGET_CHARACTERS = 300, 150
"""How plain text is cut, unless told otherwise: about 75 and 40 tokens of English."""
_JSON_LINES = (".jsonl", ".ndjson")
_FIELDS = {"prompt", "target", "append_end", "prefix", "encoder_text"}


def read_examples(path: Path) -> list[Example]:
    """Examples from a file: .jsonl and .ndjson by `read_jsonl`, everything else as plain text by `text_examples`.

    Raises:
        TuningError: it can't be read, or holds no examples; the message says why.
    """
    if path.suffix.lower() in _JSON_LINES:
        return read_jsonl(path)
    return text_examples(_read(path), where=str(path))


def text_examples(
    text: str, *, prompt_characters: int = PROMPT_CHARACTERS, target_characters: int = TARGET_CHARACTERS, where: str = "the text"
) -> list[Example]:
    """A text as examples: each piece of whole lines is the target of the lines before it.

    Raises:
        TuningError: a text of fewer than two pieces, or pieces of no size.
    """
    if prompt_characters < 1 or target_characters < 1:
        raise TuningError(f"prompts of {prompt_characters} and targets of {target_characters} characters: both must be at least 1")
    examples, before = [], ""
    for piece in _pieces(text, target_characters):
        if before and piece.strip():
            examples.append(Example(before, piece))
        before = (before + piece)[-prompt_characters:]
    if not examples:
        raise TuningError(f"{where} is too short to learn from: more than {target_characters} characters are needed")
    return examples


def _pieces(text: str, size: int) -> Iterator[str]:
    """Whole lines together up to `size` characters; a longer line is cut."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > size:
            yield piece
            piece = ""
        piece += line
        while len(piece) > size:
            yield piece[:size]
            piece = piece[size:]
    if piece:
        yield piece


def to_jsonl(examples: Iterable[Example]) -> bytes:
    """Examples as `read_jsonl` reads them, each once."""
    lines: dict[str, None] = {}
    for example in examples:
        row = {"prompt": _row(example.prompt), "target": _row(example.target), "append_end": example.append_end}
        row |= {"prefix": _row(example.prefix), "encoder_text": example.encoder_text}
        lines[json.dumps(row)] = None
    return "".join(f"{line}\n" for line in lines).encode()


def from_jsonl(data: bytes, where: str) -> list[Example]:
    """What `to_jsonl` wrote.

    Raises:
        TuningError, UnicodeDecodeError: another content.
    """
    lines = data.decode("utf-8").split("\n")  # not splitlines: JSON strings may hold U+2028
    return [_parse_line(line, f"{where}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _row(value: Prompt | Target | None) -> Any:
    if value is None or isinstance(value, str):
        return value
    return [asdict(item) if isinstance(item, Message) else dict(item) if isinstance(item, Mapping) else int(item) for item in value]


def _read(path: Path) -> str:
    try:
        return read_limited(path, MAX_FILE_BYTES).decode("utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise TuningError(f"can't read {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except (OSError, ValueError) as error:
        raise TuningError(f"can't read {path}: {error}") from error


def read_jsonl(path: Path) -> list[Example]:
    """Examples from a file with one JSON object a line: prompt and target, optionally append_end, prefix, encoder_text; or messages,
    a conversation whose last turn is the target.

    Raises:
        TuningError: a line that is not such an object; the message names file and line. Or the file can't be read.
    """
    return from_jsonl(_read(path).encode(), str(path))


def _parse_line(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TuningError(f"{where}: not JSON: {error}") from error
    if isinstance(row, dict) and isinstance(row.get("messages"), list) and set(row) == {"messages"}:
        return from_conversation(row["messages"], where)
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
