"""The process that holds the tests. Untrusted code never runs in it: `candidate` here sends its arguments to the worker.

So nothing that the code does (ending the process, replacing builtins, objects that are equal to everything, reading frames
and memory) reaches the asserts or what they expect; all that it can do is to return a value.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
from typing import Any

from . import channel, values
from .confine import confine

LONGEST_MESSAGE = 16 << 20


class Failed(Exception):
    """The candidate did not come to an answer."""


def main() -> None:
    """Arguments: folder of this package, pipe of requests to the worker, pipe of its replies, limits as JSON.

    The test comes on standard input; the verdict goes to standard output, which nothing else can write to.
    """
    sys.path.pop(0)
    verdicts = os.dup(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    requests, replies, limits = int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    longest = limits.pop("reply_bytes")
    test = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    confine(**limits)
    try:
        _judge(test, requests, replies, longest)
        verdict = {"passed": True, "reason": "passed"}
    except Failed as error:
        verdict = {"passed": False, "reason": str(error)}
    except AssertionError:
        verdict = {"passed": False, "reason": "a test failed"}
    except BaseException as error:
        verdict = {"passed": False, "reason": f"the test raised {type(error).__name__}: {error}"[:300]}
    channel.send(verdicts, verdict, longest)


def _judge(test: str, requests: int, replies: int, longest: int) -> None:
    """Run the test's `check(candidate)`. Names that it has from nowhere are the candidate's."""

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        call = {
            "arguments": [values.encode(value) for value in arguments],
            "keywords": {name: values.encode(value) for name, value in keywords.items()},
        }
        try:
            channel.send(requests, call, LONGEST_MESSAGE)
        except BrokenPipeError as error:
            raise Failed("the program ended before the tests did") from error
        return values.decode(_heard(replies, longest)["value"])

    _heard(replies, longest)
    tree = ast.parse(test)
    namespace: dict[str, Any] = {name: values.Reference(name) for name in _unknown_names(tree)}
    exec(compile(tree, "<test>", "exec"), namespace)
    namespace["check"](candidate)


def _heard(replies: int, longest: int) -> dict[str, Any]:
    """The worker's next reply. Raises Failed for an error or none."""
    try:
        reply = channel.receive(replies, longest)
    except channel.ChannelError as error:
        raise Failed(str(error)) from error
    if reply is None:
        raise Failed("the program ended before the tests did")
    if not isinstance(reply, dict) or "value" not in reply:
        told = reply.get("error") if isinstance(reply, dict) else "no reply"
        raise Failed(f"the program raised {str(told)[:300]}")
    return reply


def _unknown_names(tree: ast.Module) -> set[str]:
    """Names that are read, and neither builtins nor bound anywhere in the test."""
    read: set[str] = set()
    bound = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
    return read - bound
