"""Write docs/errors.md from the error catalogue; with --check, fail when it is stale."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lopa.wire.errors import CATALOGUE, DOMAIN

TARGET = Path(__file__).resolve().parent.parent / "docs" / "errors.md"
HEAD = f"""# Errors on the wire

Every failure has one reason, one gRPC status and one message. The reason travels as `google.rpc.ErrorInfo` of domain
`{DOMAIN}`, with the field, the limit and what was found in its metadata; INVALID_ARGUMENT also has a `google.rpc.BadRequest`,
and what is worth trying again a `google.rpc.RetryInfo`.
In Python, `lopa.errors` has an exception for each. Made by `python scripts/generate_error_table.py`.

| reason | gRPC status | message |
| --- | --- | --- |
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    rows = (f"| `{reason.value}` | {entry.status.name} | {entry.message} |\n" for reason, entry in CATALOGUE.items())
    text = HEAD + "".join(rows)
    if check:
        fresh = TARGET.exists() and TARGET.read_text() == text
        print("docs/errors.md is up to date" if fresh else "docs/errors.md is stale; run python scripts/generate_error_table.py")
        return 0 if fresh else 1
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
