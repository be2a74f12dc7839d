"""Collect lopa-nano's corpus: Python source from the standard library and from pinned, permissively licensed wheels.

    python training/corpus.py --out build/corpus

Writes `train.jsonl` (the foundation model), `population.jsonl` (the shared heads, and what their settings are chosen on) and
`corpus.json` (packages, versions, licences, sizes, digests). The packages of `split.json`'s "heldout" are the
users of the demo and of every published figure: no file of theirs, and no file that shares more than
`MAX_SHARED_SHINGLES` of its lines with one of theirs, reaches either output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

HERE = Path(__file__).parent
MIN_BYTES, MAX_BYTES = 800, 120_000
"""A file outside these sizes is skipped: stubs teach little, giants are mostly tables."""
MAX_PACKAGE_BYTES = 2_500_000
"""No package gives more than this, so that no one style dominates."""
SHINGLE_LINES = 4
MAX_SHARED_SHINGLES = 0.10
SKIPPED_PARTS = re.compile(r"(^|/)(tests?|testing|_?vendor(ed)?|third_party|extern(al)?s?|locale|node_modules)(/|$)|_pb2")
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|HPND|Zlib|Unlicense|0BSD)\b", re.I)
COPYLEFT = re.compile(r"\b(A?GPL|LGPL|GNU|MPL|Mozilla|EUPL)", re.I)


@dataclass(frozen=True)
class SourceFile:
    """One Python file. `repo` is the import package, `path` is relative to the package's parent."""

    repo: str
    path: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def shingles(text: str) -> set[int]:
    """Hashes of every run of `SHINGLE_LINES` non-blank, stripped lines."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 3]
    runs = ("\n".join(lines[i : i + SHINGLE_LINES]) for i in range(len(lines) - SHINGLE_LINES + 1))
    return {int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big") for run in runs}


def is_source(path: str, raw: bytes) -> bool:
    """Whether a file is human-written code of a useful size, judged by name, size, encoding and line lengths."""
    if not path.endswith(".py") or SKIPPED_PARTS.search(path) or not MIN_BYTES <= len(raw) <= MAX_BYTES:
        return False
    if sum(byte > 127 for byte in raw) > len(raw) // 100:
        return False
    return len(raw) / (raw.count(b"\n") + 1) < 80


def read_folder(root: Path) -> Iterator[SourceFile]:
    """Every source file below `root`; the repo is the top-level package or module."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if "site-packages" in relative.parts:
            continue
        repo = relative.parts[0].removesuffix(".py")
        yield from decode(repo, relative.as_posix(), path.read_bytes())


def read_wheel(wheel: Path) -> Iterator[SourceFile]:
    """Every source file of a wheel; the repo is the top-level import package that holds it."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and "/" in name and ".data/" not in name:
                yield from decode(name.split("/")[0], name, archive.read(name))


def decode(repo: str, path: str, raw: bytes) -> Iterator[SourceFile]:
    if is_source(path, raw):
        try:
            yield SourceFile(repo, path, raw.decode("utf-8").replace("\r\n", "\n").expandtabs(4))
        except UnicodeDecodeError:
            return


def licence(wheel: Path) -> str:
    """The wheel's declared licence: the SPDX expression, the classifiers, or the free-text field."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        meta = Parser().parsestr(archive.read(name).decode("utf-8", "replace"), headersonly=True)
    classifiers = [c.split("::")[-1].strip() for c in meta.get_all("Classifier", []) if c.startswith("License ::")]
    declared = meta.get("License-Expression") or "; ".join(classifiers) or meta.get("License") or "unknown"
    return " ".join(declared.split())[:120]


def download(requirements: Path, wheels: Path) -> None:
    """Fetch the pinned wheels without their dependencies; those at hand are kept."""
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", "3.11"]
    subprocess.run([*command, "-d", str(wheels), "-r", str(requirements)], check=True)


def capped(files: list[SourceFile], seed: int) -> list[SourceFile]:
    """A seeded choice of files that together stay under `MAX_PACKAGE_BYTES`, in path order."""
    chosen, total = [], 0
    for file in random.Random(seed).sample(files, len(files)):
        if total + len(file.text) <= MAX_PACKAGE_BYTES:
            chosen.append(file)
            total += len(file.text)
    return sorted(chosen, key=lambda file: file.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/corpus"))
    parser.add_argument("--wheels", type=Path, help="folder of wheels (default: OUT/wheels, filled by pip download)")
    parser.add_argument("--requirements", type=Path, default=HERE / "corpus.txt")
    parser.add_argument("--seed", type=int, default=20)
    args = parser.parse_args()
    wheels = args.wheels or args.out / "wheels"
    if args.wheels is None:
        download(args.requirements, wheels)
    split = json.loads((HERE / "split.json").read_text())
    heldout, population = set(split["heldout"]), {*split["population"], *split["development"]}

    stdlib = Path(sysconfig.get_path("stdlib"))
    packages: dict[str, list[SourceFile]] = defaultdict(list)
    licences: dict[str, str] = {}
    for file in read_folder(stdlib):
        if file.repo not in {"test", "idle_test", "pydoc_data", "encodings"}:
            packages[file.repo].append(file)
            licences[file.repo] = "PSF-2.0 (standard library)"
    for wheel in sorted(wheels.glob("*.whl")):
        declared = licence(wheel)
        if COPYLEFT.search(declared) or not PERMISSIVE.search(declared):
            print(f"skipped {wheel.name}: licence {declared!r}")
            continue
        for file in read_wheel(wheel):
            packages[file.repo].append(file)
            licences[file.repo] = f"{declared} ({wheel.name.split('-py')[0].split('-cp')[0]})"

    private: set[int] = set()
    for repo in sorted(heldout):
        for file in packages.get(repo, []):
            private |= shingles(file.text)
    seen: set[str] = set()
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, dict[str, object]] = {}
    with (args.out / "train.jsonl").open("w") as train, (args.out / "population.jsonl").open("w") as people:
        for repo in sorted(packages):
            if repo in heldout:
                report[repo] = {"role": "heldout", "licence": licences[repo], "files": len(packages[repo])}
                continue
            kept, near = [], 0
            for file in packages[repo]:
                own = shingles(file.text)
                if own and len(own & private) / len(own) > MAX_SHARED_SHINGLES:
                    near += 1
                elif file.digest not in seen:
                    seen.add(file.digest)
                    kept.append(file)
            kept = capped(kept, args.seed)
            role = "population" if repo in population else "train"
            sink = people if role == "population" else train
            for file in kept:
                sink.write(json.dumps({"repo": file.repo, "path": file.path, "text": file.text}) + "\n")
            size = sum(len(file.text) for file in kept)
            if kept or near:
                report[repo] = {"role": role, "licence": licences[repo], "files": len(kept), "bytes": size, "near_heldout": near}
    totals = {role: sum(int(str(r.get("bytes", 0))) for r in report.values() if r["role"] == role) for role in ("train", "population")}
    digests = {name: hashlib.sha256((args.out / name).read_bytes()).hexdigest() for name in ("train.jsonl", "population.jsonl")}
    document = {"bytes": totals, "sha256": digests, "packages": report}
    (args.out / "corpus.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    print(json.dumps(totals), f"{len(report)} packages")


if __name__ == "__main__":
    main()
