"""MBPP (Austin et al. 2021, arXiv:2108.07732) in the MBXP form of mxeval (Athiwaratkun et al. 2022, arXiv:2210.14868).

A prompt is a signature with a docstring and doctests; the model completes the body; three asserts judge it. Split, stop words and
timeout are those of the official LoPA repository (github.com/jabhinav/Prompt-Tuning-Strikes-Back-with-LOPA: utils/data.py,
postprocess_mbpp_preds.py stage 1, mxeval/evaluation.py).
"""

from __future__ import annotations

from pathlib import Path

from lopa_exporters.data import DataError
from lopa_exporters.eval.code import CodeTask, Problem
from lopa_exporters.eval.sandbox import Check
from lopa_exporters.eval.tables import read_rows, text_of

STOPS = ("\ndef", "\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```", "<\uff5cend\u2581of\u2581sentence\uff5c>")


def read(path: Path) -> list[Problem]:
    """Rows with task_id, prompt, canonical_solution, entry_point and test.

    Raises:
        DataError: a row without one of them, or an identifier that comes twice.
    """
    problems = []
    for number, row in enumerate(read_rows(path), 1):
        where = f"{path}, row {number}"
        name, prompt, solution, entry, test = (
            text_of(row, (column,), where) for column in ("task_id", "prompt", "canonical_solution", "entry_point", "test")
        )
        problems.append(Problem(name, prompt, solution, (entry, test)))
    check_ids(problems, path)
    return problems


def check(problem: Problem, written: str) -> Check:
    """The prompt with what the model wrote up to the first stop word."""
    ends = [place for stop in STOPS if (place := written.find(stop)) >= 0]
    return _check(problem, written[: min(ends)] if ends else written)


def reference(problem: Problem) -> Check:
    """The canonical solution whole: some have helper functions behind the first stop word."""
    return _check(problem, problem.target)


def _check(problem: Problem, body: str) -> Check:
    entry, test = problem.fields
    return Check(problem.prompt + body + "\n", test, entry)


def check_ids(problems: list[Problem], path: Path) -> None:
    """Raises DataError for an identifier that comes twice: results go by it."""
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise DataError(f"{path} has {problem.id} twice")
        seen.add(problem.id)


TASK = CodeTask("mbpp", "pass@1", read, check, reference, STOPS, cpu_seconds=10, starts_with_bos=False, ends_with_eos=True)
