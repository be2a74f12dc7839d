"""Build the API reference of the device package from its docstrings, with pdoc.

    python scripts/build_api_reference.py [FOLDER]     default: docs/api

One page for everything that `import lopa` gives. The folder is not under version control.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import lopa
import pdoc

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "api"
    for name in lopa.__all__:
        getattr(lopa, name)  # names load on first use; pdoc documents what is there
    warnings.filterwarnings("ignore", "Found '__version__'")  # it is looked up in the installation, not a member
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"lopa {lopa.__version__}")
    pdoc.pdoc("lopa", "!lopa.v1", "!lopa.cli", "!lopa.demo", output_directory=folder)
    page = (folder / "lopa.html").read_text(encoding="utf-8")
    missing = [name for name in lopa.__all__ if f'id="{name}"' not in page and not name.startswith("_")]
    if missing:
        print(f"not documented: {', '.join(missing)}", file=sys.stderr)
        return 1
    print(f"{folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
