"""Write a software bill of materials (CycloneDX 1.5) of the pinned dependencies that are installed, and check their licences.

    python scripts/sbom.py --out sbom.json

Fails when a dependency is under a licence that lopa (Apache-2.0) can't be distributed beside, or under none that it names.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REFUSED = re.compile(r"\b(AGPL|GPL|SSPL|BUSL|non-?commercial|proprietary)", re.IGNORECASE)
WEAK = re.compile(r"\bLGPL|Lesser General Public", re.IGNORECASE)
"""Fine for what is only imported and stays replaceable."""


def licence(package: importlib.metadata.PackageMetadata) -> str:
    """As the package says it: an SPDX expression, classifiers, or the first line of its licence field."""
    expression = package.get("License-Expression")
    if expression:
        return str(expression)
    classified = [entry.split("::")[-1].strip() for entry in package.get_all("Classifier") or () if entry.startswith("License ::")]
    named = [entry for entry in classified if entry != "OSI Approved"]
    return " AND ".join(named) or str(package.get("License") or "").strip().partition("\n")[0][:80]


def allowed(text: str) -> bool:
    """One of several alternatives is enough."""
    if not text:
        return False
    return any(WEAK.search(part) or not REFUSED.search(part) for part in re.split(r"\bOR\b", text))


def components() -> list[dict[str, Any]]:
    """Of constraints.txt, those that are installed here."""
    found = []
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        if not version:
            continue
        try:
            package = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        purl = f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{package['Version']}"
        entry = {"type": "library", "name": name, "version": package["Version"], "purl": purl, "bom-ref": purl}
        found.append({**entry, "licenses": [{"license": {"name": licence(package)}}]})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the bill here")
    out = parser.parse_args().out
    found = components()
    version = importlib.metadata.version("lopa")
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "library", "name": "lopa", "version": version, "purl": f"pkg:pypi/lopa@{version}"}},
        "components": found,
    }
    if out is not None:
        out.write_text(json.dumps(bill, indent=1) + "\n", encoding="utf-8")
    names = {entry["name"]: entry["licenses"][0]["license"]["name"] for entry in found}
    wrong = {name: text for name, text in names.items() if not allowed(text)}
    for name, text in wrong.items():
        print(f"{name}: {text or 'names no licence'}")
    print(f"{len(found)} dependencies, {len(wrong)} with a licence to look at")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
