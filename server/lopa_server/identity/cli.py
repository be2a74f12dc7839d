"""Create, list and revoke API keys."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from lopa.cli.output import fail, print_json, usage_error

from lopa_server.identity.caller import DEVICE_SCOPES, parse_scopes
from lopa_server.identity.keys import ApiKey, KeyFile, KeyFileError

keys = typer.Typer(help=__doc__, no_args_is_help=True)

File = Annotated[Path, typer.Option("--file", help="The key file that `lopa serve --keys` reads.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_FILE = Path("lopa-keys.json")


@keys.command()
def create(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Whose key it is.", show_default=False)],
    scope: Annotated[
        list[str] | None, typer.Option(help="generate, score, tune, fetch, admin; may be repeated. Default: all but admin.")
    ] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Valid for so long. Default: until revoked.")] = None,
    file: File = DEFAULT_FILE,
    as_json: Json = False,
) -> None:
    """Make a key and print it. It is shown this once: only its hash is kept. Servers take it at once, without a restart."""
    try:
        scopes = parse_scopes(scope) if scope else DEVICE_SCOPES
        expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days) if days is not None else None
        made, text = KeyFile(file).create(tenant, scopes, expires)
    except KeyFileError as error:
        fail(str(error))
    except (ValueError, OverflowError) as error:
        usage_error(str(error))
    print_json({**_shown(made), "key": text}) if as_json else print(text)


@keys.command("list")
def list_keys(file: File = DEFAULT_FILE, as_json: Json = False) -> None:
    """List the keys: id, tenant, scopes, dates. The keys themselves are nowhere."""
    try:
        entries = [_shown(key) for key in KeyFile(file).entries()]
    except KeyFileError as error:
        fail(str(error))
    if as_json:
        print_json(entries)
        return
    for entry in entries:
        expires = entry["expires"] or "never"
        mark = "  EXPIRED" if entry["expired"] else ""
        print(f"{entry['id']}  {entry['tenant']:20}  {entry['scopes']:30}  created {entry['created']}  expires {expires}{mark}")


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `lopa keys list` shows it.", show_default=False)],
    file: File = DEFAULT_FILE,
) -> None:
    """Take a key out. Servers refuse it from the next call on; calls that are running finish."""
    try:
        key = KeyFile(file).revoke(key_id)
    except KeyFileError as error:
        fail(str(error))
    print(f"key {key.id} of {key.tenant} is revoked")


def _shown(key: ApiKey) -> dict[str, str | bool | None]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "scopes": ",".join(sorted(scope.value for scope in key.scopes)),
        "created": key.created.isoformat(),
        "expires": key.expires.isoformat() if key.expires else None,
        "expired": key.expired(datetime.now(UTC)),
    }
