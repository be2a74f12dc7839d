"""CruxEval-I and CruxEval-O (Gu et al. 2024, arXiv:2401.03065): find an input for an output, or the output of an input.

Prompts, clean-up and scoring are the official ones (github.com/facebookresearch/cruxeval: prompts.py, inference/tasks,
evaluation/utils_general.py), split and training targets the official LoPA repository's (utils/data.py, utils/cruxeval_tasks).
One difference: the official scorer runs the text `assert OUTPUT == ANSWER`, where "4 or True" passes. Here the answer must be an
expression by itself, and its value is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lopa_exporters.eval.code import CodeTask, Problem
from lopa_exporters.eval.mbpp import check_ids
from lopa_exporters.eval.sandbox import Check
from lopa_exporters.eval.tables import read_rows, text_of

END = "[/ANSWER]"
_INPUT_PROMPT = """\
You will be given a function f and an output in the form f(??) == output. Find any input such that executing f on the input leads \
to the given output. There may be multiple answers, but you should only output one. In [ANSWER] and [/ANSWER] tags, complete the \
assertion with one such input that will produce the output when executing the function.

[PYTHON]
def f(my_list):
    count = 0
    for i in my_list:
        if len(i) % 2 == 0:
            count += 1
    return count
assert f(??) == 3
[/PYTHON]
[ANSWER]
assert f(["mq", "px", "zy"]) == 3
[/ANSWER]

[PYTHON]
def f(s1, s2):
    return s1 + s2
assert f(??) == "banana"
[/PYTHON]
[ANSWER]
assert f("ba", "nana") == "banana"
[/ANSWER]

[PYTHON]
{code}
assert f(??) == {output}
[/PYTHON]
[ANSWER]"""
_OUTPUT_PROMPT = """\
You are given a Python function and an assertion containing an input to the function. Complete the assertion with a literal (no \
unsimplified expressions, no function calls) containing the output when executing the provided code on the given input, even if \
the function is incorrect or incomplete. Do NOT output any extra information. Provide the full assertion with the correct output in \
[ANSWER] and [/ANSWER] tags, following the examples.

[PYTHON]
def f(n):
    return n
assert f(17) == ??
[/PYTHON]
[ANSWER]
assert f(17) == 17
[/ANSWER]

[PYTHON]
def f(s):
    return s + "a"
assert f("x9j") == ??
[/PYTHON]
[ANSWER]
assert f("x9j") == "x9ja"
[/ANSWER]

[PYTHON]
{code}
assert f({input}) == ??
[/PYTHON]
[ANSWER]"""
_TARGET = "\nassert f({input}) == {output}\n[/ANSWER]\n"


def _reader(template: str) -> Callable[[Path], list[Problem]]:
    def read(path: Path) -> list[Problem]:
        problems = []
        for number, row in enumerate(read_rows(path), 1):
            where = f"{path}, row {number}"
            name, code, given, output = (text_of(row, (column,), where) for column in ("id", "code", "input", "output"))
            fields = {"code": code, "input": given, "output": output}
            problems.append(Problem(name, template.format(**fields), _TARGET.format(**fields), (code, given, output)))
        check_ids(problems, path)
        return problems

    return read


def check_input(problem: Problem, written: str) -> Check | None:
    """The call before "==" must give the output."""
    answer = written.split(END)[0].split("==")[0].strip()
    if "assert f" in answer:
        answer = "f" + answer.split("assert f")[1].strip()
    return _check(problem, answer) if "f(" in answer else None


def check_output(problem: Problem, written: str) -> Check | None:
    """The value behind "==" must be the output; the call itself is no answer."""
    answer = (written.split("==")[1] if "==" in written else written).split(END)[0].strip()
    return None if f"f({problem.fields[1]})" in answer else _check(problem, answer)


def _reference(problem: Problem, call: bool) -> Check:
    return _check(problem, f"f({problem.fields[1]})" if call else problem.fields[2])


def _check(problem: Problem, answer: str) -> Check:
    code, _, output = problem.fields
    return Check(code, f"def check(candidate):\n    assert {output} == candidate()\n", expression=answer)


def _task(letter: str, template: str, check: Callable[[Problem, str], Check | None], *, call: bool) -> CodeTask:
    """call: the answer is a call of f, not its value."""
    return CodeTask(
        f"cruxeval-{letter}",
        "pass@1",
        _reader(template),
        check,
        lambda problem: _reference(problem, call),
        (END,),
        cpu_seconds=3,
        starts_with_bos=True,
        ends_with_eos=False,
    )


INPUT = _task("i", _INPUT_PROMPT, check_input, call=True)
OUTPUT = _task("o", _OUTPUT_PROMPT, check_output, call=False)
