"""Compiles a JSON schema in a process of its own, so that one that never ends can be ended.

A thread that compiles can't be stopped; a process can, and its memory is bounded too. What compiles there in time compiles
here in the same time. Run as a module it reads a schema from standard input and prints why it can't be used, or nothing.
"""

from __future__ import annotations

import resource
import subprocess
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

SECONDS = 2.0
"""For the whole process; its start takes a fifth of a second."""
MEMORY = 2 << 30
"""Bytes of address space."""
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=10_000,
    max_grammar_size=50_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
"""llguidance's bounds, a fraction of its defaults: a step of the worst schema stays within some milliseconds."""


def grammar_of(schema: str) -> str:
    """llguidance's grammar: JSON without whitespace between its parts. Raises ValueError for what is no schema."""
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


def problem_with(schema: str) -> str:
    """Why a schema can't be used, or an empty string. Blocks for SECONDS at most."""
    command = [sys.executable, "-P", "-m", __name__]
    try:
        done = subprocess.run(command, input=schema.encode(), capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "it takes too long to compile"
    if done.returncode:
        return "it takes too much memory to compile"
    return done.stdout.decode(errors="replace")


def main() -> None:
    """The other process: one byte a token is as good as any tokenizer for finding out."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        matcher = LLMatcher(LLTokenizer("byte"), grammar_of(sys.stdin.read()), log_level=0, limits=LIMITS)
    except ValueError as error:
        print(error, end="")
        return
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        print(matcher.get_error().splitlines()[0], end="")


if __name__ == "__main__":
    main()
