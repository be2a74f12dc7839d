"""What the plain package costs a device: its size on disk, the time of its import, its memory while generating."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
DEVICE = """
import json, sys, lopa
from pathlib import Path
address, folder, cache = sys.argv[1:]
with lopa.connect(address, config=lopa.ClientConfig(cache=Path(cache))) as client:
    persona = client.personal(folder)
    for number in range(20):
        assert persona.generate(f"def f_{number}(a, b):\\n" * 16, max_tokens=8, ignore_end=True).receipt.rows > 0
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
files = [Path(module.__file__) for module in sys.modules.values() if getattr(module, "__file__", None)]
parts = [file.parts[file.parts.index("site-packages") + 1] for file in files if "site-packages" in file.parts]
print(json.dumps([int(peak.split()[1]) / 1024, sorted(set(parts))]))
"""


def install(folder: Path) -> Path:
    """`pip install lopa` with the repository's pins into a fresh environment at `folder`. Its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(ROOT)]
    subprocess.run(pip, check=True, cwd=folder)
    return python


def site_packages_mb(python: Path) -> dict[str, float]:
    """What lies under site-packages except pip itself, by top-level name, largest first, in 10^6 bytes on disk."""
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    sizes: Counter[str] = Counter()
    for path in site.rglob("*"):
        name = path.relative_to(site).parts[0]
        if path.is_file() and not name.startswith(("pip", "setuptools", "pkg_resources")):
            sizes[name] += path.stat().st_size
    return {name: size / 1e6 for name, size in sizes.most_common()}


def import_seconds(python: Path, statement: str) -> float:
    """Median wall time that a statement adds to starting Python."""

    def run(code: str) -> float:
        code = f"import time; began = time.perf_counter()\n{code}\nprint(time.perf_counter() - began)"
        return float(subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout)

    run(statement)  # writes the bytecode
    return median(run(statement) for _ in range(7))


def device_process(python: Path, address: str, folder: Path) -> tuple[float, list[str]]:
    """Of a process that opens a new persona and generates: its peak resident memory in MiB, and what it imported from site-packages, by
    top-level name.

    Linux's VmHWM: getrusage would count the memory of the process that started it.
    """
    command = [str(python), "-c", DEVICE, address, str(folder / "me"), str(folder / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    peak, names = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=environment).stdout)
    return peak, names
