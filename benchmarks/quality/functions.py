"""Two tasks about a user's own functions, cut from its modules with `ast`.

- **naming**: a function's body, without its name and docstring, to the name that its author gave it.
- **docstring**: a function without its docstring to that docstring's first line.

Tuning and test functions come from different files, as in the completion task, and a test function that mostly stands in the
tuning functions word for word is left out. As in the filing task, the soft prompt stands between what is read and the answer.
"""

from __future__ import annotations

import ast
import random
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from lopa.demo.users import Item, NoSuchUser, TaskData, TaskSizes, mostly_seen

FUNCTION_TASKS = ("naming", "docstring")
MIN_BODY, MAX_NAME, MIN_LINE, MAX_LINE = 80, 40, 12, 120
"""Characters: of a body that says enough, of a name, and of a docstring's first line."""


@dataclass(frozen=True)
class Function:
    """source: dedented and without docstring. line: the docstring's first line, empty if there is none."""

    name: str
    source: str
    line: str


def functions(text: str) -> Iterator[Function]:
    """Every function and method of a module, in order; none of a file that this Python cannot parse."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.splitlines()
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in sorted(nodes, key=lambda node: node.lineno):
        own = range(node.lineno - 1, node.end_lineno or node.lineno)
        document = ast.get_docstring(node) or ""
        if document and len(node.body) > 1:
            described = range(node.body[0].lineno - 1, node.body[0].end_lineno or 0)
            own = [number for number in own if number not in described]
        elif document:
            continue
        yield Function(node.name, textwrap.dedent("\n".join(lines[number] for number in own)), document.split("\n")[0].strip())


def build_function_task(user: str, task: str, modules: dict[str, str], sizes: TaskSizes, seed: int) -> TaskData:
    """Cut a package's modules (name to source) into items of "naming" or "docstring".

    Raises:
        NoSuchUser: too few functions.
    """
    rng = random.Random(f"{seed}/{user}/{task}")
    make = naming_item if task == "naming" else docstring_item
    names = sorted(modules)
    rng.shuffle(names)
    cut = {name: [item for function in functions(modules[name]) if (item := make(function, sizes))] for name in names}
    wanted = sum(map(len, cut.values())) * sizes.test_files_part
    tuning: list[Item] = []
    test: list[Item] = []
    for name in names:
        (test if len(test) < wanted else tuning).extend(cut[name])
    seen = {line.strip() for item in tuning for line in item.text.splitlines()}
    test = [item for item in test if not mostly_seen(item.text, seen)]
    if len(tuning) < 16 or len(test) < 8:
        raise NoSuchUser(f"package {user!r} has too few functions for {task}: {len(tuning)} tuning and {len(test)} test items")
    chosen = (tuple(rng.sample(items, min(most, len(items)))) for items, most in ((tuning, sizes.max_tuning), (test, sizes.max_test)))
    return TaskData(user, task, *chosen)


def naming_item(function: Function, sizes: TaskSizes) -> Item | None:
    """The function with "_" wherever its name stood, also where it calls itself or its parent's method; None where that is no task."""
    if function.name.startswith("__") or len(function.name) > MAX_NAME or len(function.source) < MIN_BODY:
        return None
    hidden = re.sub(rf"\b{re.escape(function.name)}\b", "_", function.source)
    return Item("", function.name, append_end=True, prefix=f"<|code|>{_shortened(hidden, sizes.snippet_chars)}\n# name: ")


def docstring_item(function: Function, sizes: TaskSizes) -> Item | None:
    """The function up to where its docstring would be repeated; None where that is no task."""
    if not MIN_LINE <= len(function.line) <= MAX_LINE:
        return None
    return Item("", function.line, append_end=True, prefix=f'<|code|>{_shortened(function.source, sizes.snippet_chars)}\n"""')


def _shortened(source: str, chars: int) -> str:
    """Whole lines from the beginning, about `chars` characters at most."""
    lines, size = [], 0
    for line in source.splitlines():
        if lines and size + len(line) > chars:
            break
        lines.append(line[:chars])
        size += len(line)
    return "\n".join(lines)
