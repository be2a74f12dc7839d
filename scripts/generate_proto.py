"""Generate sdk/lopa/v1 from proto/; with --check, fail when what is committed differs from what would be generated."""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "sdk" / "lopa" / "v1"
PACKAGE = '"""Generated from proto/lopa/v1 by `make proto`. Do not edit."""\n'


def generate(out: Path) -> Path:
    """Run protoc into `out`; returns the folder of generated modules."""
    sources = sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto"))
    plugins = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    scripts = Path(sys.executable).parent
    found = [f"--plugin=protoc-gen-{name}={scripts / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "proto"), *plugins, *found, *sources]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL if out != TARGET else None)
    folder = out / "lopa" / "v1"
    (folder / "__init__.py").write_text(PACKAGE)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
        names = sorted({path.name for path in [*fresh.iterdir(), *TARGET.iterdir()] if path.is_file()})
        stale = [name for name in names if not same(fresh / name, TARGET / name)]
        if check:
            print("generated code is up to date" if not stale else f"stale: {', '.join(stale)}; run `make proto`")
            return 1 if stale else 0
        for name in stale:
            if (fresh / name).exists():
                shutil.copy(fresh / name, TARGET / name)
            else:
                (TARGET / name).unlink()
        print(f"{len(stale)} files written to {TARGET.relative_to(ROOT)}")
    return 0


def same(left: Path, right: Path) -> bool:
    return left.exists() and right.exists() and filecmp.cmp(left, right, shallow=False)


if __name__ == "__main__":
    sys.exit(main())
