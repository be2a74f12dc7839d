"""The process that executes untrusted code. It gets arguments and gives values; whether they are right is decided elsewhere."""

from __future__ import annotations

import json
import sys
from typing import Any

from . import channel, values
from .confine import ConfinementError, attempts, confine

LONGEST_MESSAGE = 16 << 20
"""What it reads: programs and arguments, from trusted processes."""


def main() -> None:
    """Arguments: folder of this package, pipe of requests, pipe of replies, limits as JSON.

    First comes the program, then calls, until the pipe ends.
    """
    sys.path.pop(0)
    requests, replies, limits = int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    longest = limits.pop("reply_bytes")
    try:
        measures = confine(**limits)
    except (ConfinementError, OSError) as error:
        channel.send(replies, {"unusable": str(error)}, longest)
        return
    job = channel.receive(requests, LONGEST_MESSAGE)
    if job.get("attempts"):
        channel.send(replies, {"measures": measures, "possible": attempts()}, longest)
        return
    namespace: dict[str, Any] = {"__name__": "candidate"}
    started: dict[str, Any]
    try:
        exec(compile(job["program"], "<candidate>", "exec"), namespace)
        started = {"value": None}
    except BaseException as error:
        started = {"error": _told(error)}
    channel.send(replies, started, longest)
    while (call := channel.receive(requests, LONGEST_MESSAGE)) is not None:
        _reply(replies, _answer(namespace, job, call), longest)


def _answer(namespace: dict[str, Any], job: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    """The value of the entry point, or what was raised."""
    try:
        if job["expression"] is not None:
            return {"value": values.encode(eval(compile(job["expression"], "<answer>", "eval"), namespace))}
        arguments = [_resolved(namespace, values.decode(value)) for value in call["arguments"]]
        keywords = {name: _resolved(namespace, values.decode(value)) for name, value in call["keywords"].items()}
        return {"value": values.encode(namespace[job["entry"]](*arguments, **keywords))}
    except BaseException as error:
        return {"error": _told(error)}


def _resolved(namespace: dict[str, Any], value: Any) -> Any:
    """References replaced by what they name, in lists and tuples too."""
    if isinstance(value, values.Reference):
        named = namespace[value.name]
        return named if value.arguments is None else named(*(_resolved(namespace, item) for item in value.arguments))
    if isinstance(value, list | tuple):
        return type(value)(_resolved(namespace, item) for item in value)
    return value


def _reply(replies: int, answer: dict[str, Any], longest: int) -> None:
    try:
        channel.send(replies, answer, longest)
    except (ValueError, MemoryError) as error:
        channel.send(replies, {"error": f"the value is too large: {_told(error)}"}, longest)


def _told(error: BaseException) -> str:
    """One line; untrusted code may have made it."""
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return "an exception that can't be shown"
