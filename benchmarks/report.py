"""What every benchmark writes with --json: the machine, the figures, the rows they come from, and the command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "onnxruntime", "grpcio", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB, Python and package versions; the GPU, where there is one."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        entries = dict(line.replace("\t", "").split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        cpu = entries.get("model name", cpu).strip()
        if "cpu family" in entries:  # a cloud's processor may have no more of a name than its maker's
            cpu += f" (family{entries['cpu family']}, model{entries.get('model', ' ?')})"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory, 1), "python": platform.python_version(), **versions}
    return {**found, "accelerator": accelerator} if (accelerator := _accelerator()) else found


def _accelerator() -> str | None:
    """Not asked of torch, which benchmarks of the device don't have."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def write(path: Path | None, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write {"command", "machine", "figures", "rows"} to `path`, if one was given. Folders of this machine stay out of it."""
    if path is not None:
        command = " ".join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.orig_argv[1:])])
        document = {"command": command, "machine": machine(), "figures": dict(figures), "rows": list(rows)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
