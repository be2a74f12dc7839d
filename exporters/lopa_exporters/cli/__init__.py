"""Make bundles for a foundation model, verify them, look into them, sign them.

Without a command of its own, `lopa export --fm ...` is `lopa export build --fm ...`. Nothing here imports torch until a command runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from lopa_exporters.cli.build import build
from lopa_exporters.cli.check import inspect, keygen, mobile, sign, verify
from lopa_exporters.cli.options import parse_corrections
from lopa_exporters.cli.output import TerminalReporter
from lopa_exporters.cli.priors import priors

__all__ = ["TerminalReporter", "export", "parse_corrections"]


class _BuildByDefault(TyperGroup):
    """A command line that begins with an option is `build`'s."""

    def parse_args(self, ctx: Any, args: Sequence[str]) -> list[str]:
        arguments = list(args)
        if arguments and arguments[0].startswith("-") and arguments[0] != "--help":
            arguments = ["build", *arguments]
        return list(super().parse_args(ctx, arguments))


export = typer.Typer(cls=_BuildByDefault, no_args_is_help=True, help=(__doc__ or "").partition("\n\n")[0])
for _command in (build, priors, verify, inspect, mobile, sign, keygen):
    export.command()(_command)
