"""List the benchmarks: each script's name and the first line of its docstring."""

from __future__ import annotations

import ast
from pathlib import Path

HELPERS = {"list.py", "report.py"}


def main() -> None:
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in HELPERS and not path.name.startswith("_"):
            summary = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
            print(f"{path.relative_to(Path(__file__).parent.parent)}\t{summary}")


if __name__ == "__main__":
    main()
