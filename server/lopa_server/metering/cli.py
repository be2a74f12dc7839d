"""`lopa usage`: what tenants have used."""

from __future__ import annotations

from typing import Annotated

import typer
from lopa.cli.output import fail, print_json, usage_error

DEFAULT_PLACE = "lopa-usage.sqlite"


def usage(
    place: Annotated[str, typer.Argument(metavar="FILE_OR_URL", help="What `lopa serve --usage` writes to.")] = DEFAULT_PLACE,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.", show_default=False)] = None,
    first: Annotated[str, typer.Option("--from", help="First day, YYYY-MM-DD (UTC).", show_default=False)] = "",
    last: Annotated[str, typer.Option("--to", help="Last day, included.", show_default=False)] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what tenants have used: calls, tokens, pairs and bytes by day, tenant and kind of call."""
    from pathlib import Path

    from lopa_server.metering.usage import COUNTERS, UsageError, UsageStore, parse_day, rows

    try:
        first, last = (parse_day(day) if day else "" for day in (first, last))
    except ValueError as error:
        usage_error(str(error))
    if "://" not in place and not Path(place).is_file():
        fail(f"there is no usage file {place}: `lopa serve --usage` makes one")
    try:
        entries = rows(UsageStore(place).read(first, last, tenant))
    except UsageError as error:
        fail(str(error))
    if as_json:
        print_json(entries)
        return
    names = ("day", "tenant", "kind", *COUNTERS)
    widths = [max(len(name), *(len(str(entry[name])) for entry in entries), 0) if entries else len(name) for name in names]
    for line in ({name: name for name in names}, *entries):
        cells = [str(line[name]) for name in names]
        print("  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))).rstrip())
