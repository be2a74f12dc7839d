"""List the benchmarks: each script's name and the first line of its docstring."""

from __future__ import annotations

import ast
from pathlib import Path

HELPERS = {"list.py", "report.py"}


def main() -> None:
    here = Path(__file__).parent
    scripts = {path: path for path in here.glob("*.py") if path.name not in HELPERS and not path.name.startswith("_")}
    scripts |= {path.parent: path for path in here.glob("*/__main__.py")}
    for name, path in sorted(scripts.items()):
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        print(f"{name.relative_to(here.parent)}\t{summary}")


if __name__ == "__main__":
    main()
