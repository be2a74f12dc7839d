"""The command `lopa`. Commands of other parts join through the entry-point group "lopa.commands": plain functions with typer annotations,
or a typer application where a command has commands of its own.

Listing the commands imports none of them; a command's parts are imported when it runs.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated

import typer

from lopa.cli import commands, keeping
from lopa.cli.chat import chat
from lopa.cli.generation import generate
from lopa.cli.output import fail
from lopa.errors import LopaError

GROUP = "lopa.commands"
EXTRAS = {
    "serve": "server",
    "keys": "server",
    "usage": "server",
    "top": "server",
    "export": "export",
    "train-encoder": "export",
    "eval": "eval",
    "demo": "demo",
}
"""What to install for commands whose parts are not in the plain package."""
OWN: Sequence[Callable[..., None]] = (
    commands.info,
    generate,
    chat,
    commands.score,
    commands.tune,
    commands.migrate,
    commands.history,
    commands.rollback,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line. Exits with 0; 1 when something failed, told in one line; 2 for wrong usage; 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    selected = next((argument for argument in arguments if not argument.startswith("-")), "")
    try:
        build_app(selected)(arguments, prog_name="lopa")
    except LopaError as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        if selected not in EXTRAS or (error.name or "").partition(".")[0] == "lopa":
            raise
        fail(f'`lopa {selected}` needs the Python package {error.name}: pip install "lopa[{EXTRAS[selected]}]"')


def build_app(selected: str) -> typer.Typer:
    """The typer application; of the other parts' commands only `selected` is loaded."""
    app = typer.Typer(
        name="lopa",
        help="A personal version of one frozen language model for every user, with nothing personal on the server.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback()(_root)
    for own in OWN:
        app.command()(own)
    app.add_typer(keeping.move, name="move")
    app.add_typer(keeping.bundle, name="bundle")
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        if entry.name == selected:
            loaded = entry.load()
            app.add_typer(loaded, name=entry.name) if isinstance(loaded, typer.Typer) else app.command(entry.name)(loaded)
        else:
            app.command(entry.name, help=summary(entry))(_placeholder)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"lopa {version('lopa')}")
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    del version


def _placeholder() -> None:
    """Stands for a command that is only listed."""


def summary(entry: EntryPoint) -> str:
    """First paragraph of a command's docstring, read from its source without importing it."""
    top, _, rest = entry.module.partition(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        return f"Not installed: {entry.module}."
    path = Path(spec.origin).parent.joinpath(*rest.split(".")) if rest else Path(spec.origin)
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return _docstring(candidate, entry.attr)
    return f"Not installed: {entry.module}."


def _docstring(path: Path, function: str) -> str:
    """A function's; a module's where the command is a group of its functions."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return (ast.get_docstring(node) or "").partition("\n\n")[0]
    return (ast.get_docstring(module) or "").partition("\n\n")[0]


if __name__ == "__main__":
    main()
