"""Look for keys, tokens and passwords in the files that git knows (detect-secrets); what was looked at and is none is in .secrets.baseline.

python scripts/check_secrets.py             # fails when there is something new
python scripts/check_secrets.py --accept    # after looking: write the baseline anew
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from detect_secrets import SecretsCollection
from detect_secrets.core import baseline
from detect_secrets.settings import default_settings

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / ".secrets.baseline"
BINARY = {".safetensors", ".onnx", ".png", ".ort"}
HASHES = (
    ".secrets.baseline",
    "tests/server/fuzz_corpus.txt",
    "server/lopa_server/models/",
    "training/corpus",
    "benchmarks/results/",
    "examples/node/package-lock.json",
)
"""Files of digests and of a fuzzer, which look like keys to a search for random text. Nobody writes in them by hand."""


def files() -> list[str]:
    """Relative to the repository, as the baseline names them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in listed if name and Path(name).suffix not in BINARY and not name.startswith(HASHES)]


def found() -> SecretsCollection:
    """Everything that looks like a secret, known or not. By relative names: the baseline holds for every clone."""
    os.chdir(ROOT)
    secrets = SecretsCollection()
    secrets.scan_files(*files())
    return secrets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", action="store_true", help="write the baseline anew")
    if parser.parse_args().accept:
        with default_settings():
            baseline.save_to_file(found(), str(BASELINE))
        return 0
    known = baseline.load(baseline.load_from_file(str(BASELINE)), str(BASELINE))
    with default_settings():
        new = found() - known
    for name, secret in new:
        print(f"{name}:{secret.line_number}: {secret.type}")
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
