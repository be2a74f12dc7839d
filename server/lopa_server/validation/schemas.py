"""Bounds on a JSON schema, found without compiling it: bytes, nesting, and the size of its regular expressions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lopa.wire.errors import Reason, WireError

from lopa_server.limits import ServiceLimits

PATTERN_SIZE = 2000
"""Characters of a regular expression once its counted repetitions are written out."""
EXTENSION = "x-guidance"
"""A schema's way to set the compiler's own options; those are ours to set."""


def check_schema(text: str, limits: ServiceLimits) -> str:
    """The schema in compact JSON, each key once.

    Raises:
        WireError: with the field `json_schema`.
    """
    size = len(text.encode())
    if size > limits.max_schema_bytes:
        raise _refused(f"at most {limits.max_schema_bytes} bytes long", f"{size} bytes long")
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise _refused(f"nested at most {limits.max_schema_depth} deep", "nested deeper") from error
    except ValueError as error:
        raise _refused("a JSON object", f"not JSON ({error})") from error
    if not isinstance(schema, dict):
        raise _refused("a JSON object", f"a JSON {type(schema).__name__}")
    if EXTENSION in schema:
        raise _refused(f"without {EXTENSION}", "with it")
    for value, depth in _values(schema):
        if depth > limits.max_schema_depth:
            raise _refused(f"nested at most {limits.max_schema_depth} deep", "nested deeper")
        for pattern in _patterns(value):
            if expanded_size(pattern) > PATTERN_SIZE:
                raise _refused(f"of regular expressions of at most {PATTERN_SIZE} characters, repetitions written out", "larger")
    return json.dumps(schema, separators=(",", ":"))


def expanded_size(pattern: str) -> int:
    """Characters of a regular expression when every counted repetition is written out.

    An approximation from above: what it can't read counts as ordinary characters.
    """
    sizes, last, position = [0], 0, 0
    while position < len(pattern):
        character = pattern[position]
        if character == "(":
            sizes.append(0)
            last = 0
        elif character == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif character == "{":
            end = pattern.find("}", position)
            counts = [int(part) for part in pattern[position + 1 : end].split(",") if part.strip().isdecimal()] if end > 0 else []
            sizes[-1] += last * (max(counts, default=1) - 1)
            last *= max(counts, default=1)
            position = max(position, end)
        else:
            position = _atom_end(pattern, position)
            last = 1
            sizes[-1] += 1
        position += 1
    return sum(sizes)


def _atom_end(pattern: str, position: int) -> int:
    """The last position of the escape, class or character that starts here."""
    if pattern[position] == "\\":
        return position + 1
    if pattern[position] != "[":
        return position
    end = first = position + (2 if pattern.startswith("[^", position) else 1)
    while end < len(pattern) and (pattern[end] != "]" or end == first):
        end += 2 if pattern[end] == "\\" else 1
    return end


def _values(schema: Any) -> Iterator[tuple[Any, int]]:
    """Every value in a document and how deep it stands."""
    pending = [(schema, 1)]
    while pending:
        value, depth = pending.pop()
        yield value, depth
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        pending.extend((child, depth + 1) for child in children)


def _patterns(value: Any) -> list[str]:
    """Regular expressions that a value may hold, whether or not it is read as a schema."""
    if not isinstance(value, dict):
        return []
    keys = value.get("patternProperties")
    own = value.get("pattern")
    return [*(keys if isinstance(keys, dict) else ()), *([own] if isinstance(own, str) else ())]


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _refused(limit: str, found: str) -> WireError:
    return WireError(Reason.OUT_OF_RANGE, "json_schema", limit=limit, found=found)
