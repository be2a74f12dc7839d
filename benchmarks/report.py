"""What every benchmark writes with --json: the machine, the figures, the rows they come from, and the command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "onnxruntime", "grpcio", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB, Python and package versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = dict(line.replace("\t", "").split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        cpu = found.get("model name", cpu).strip()
        if "cpu family" in found:  # a cloud's processor may have no more of a name than its maker's
            cpu += f" (family{found['cpu family']}, model{found.get('model', ' ?')})"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory, 1), "python": platform.python_version(), **versions}


def write(path: Path | None, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write {"command", "machine", "figures", "rows"} to `path`, if one was given. Folders of this machine stay out of it."""
    if path is not None:
        command = " ".join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.orig_argv[1:])])
        document = {"command": command, "machine": machine(), "figures": dict(figures), "rows": list(rows)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
