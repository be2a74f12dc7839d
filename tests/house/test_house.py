"""The house's rules: who imports whom, what an installation brings, what is generated."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"lopa": ROOT / "sdk/lopa", "lopa_server": ROOT / "server/lopa_server", "lopa_exporters": ROOT / "exporters/lopa_exporters"}
FORBIDDEN = {
    "lopa": {"lopa_server", "lopa_exporters", "torch", "transformers"},
    "lopa_server": {"lopa_exporters"},
    "lopa_exporters": {"lopa_server"},
}


def imported_packages(folder: Path) -> dict[str, set[str]]:
    """Top-level package of every import in every module, to the modules that have it."""
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("package", FOLDERS)
def test_packages_import_only_what_they_may(package: str) -> None:
    found = imported_packages(FOLDERS[package])
    wrong = {name: sorted(found[name]) for name in FORBIDDEN[package] & set(found)}
    assert not wrong


def test_every_constraint_is_pinned_once() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    names = [line.split("==")[0].lower().replace("_", "-") for line in lines]
    assert all("==" in line for line in lines)
    assert len(set(names)) == len(names)
    assert "torch==2.13.0" in lines


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()}
    names = {name.split(">")[0].split("[")[0].split("=")[0].lower() for name in wanted} - {"lopa"}
    assert names <= pinned


@pytest.mark.parametrize("script", ["generate_proto.py", "generate_error_table.py"])
def test_generated_files_are_up_to_date(script: str) -> None:
    result = subprocess.run([sys.executable, str(ROOT / "scripts" / script), "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_plain_installation_brings_no_torch(tmp_path: Path) -> None:
    """`pip install lopa` into a fresh environment: no torch, no transformers, and the client and the command still work."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(ROOT)]
    subprocess.run(install, check=True, cwd=tmp_path)
    listing = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout
    installed = {line.split("==")[0].lower() for line in listing.splitlines()}
    assert "lopa" in installed
    assert not installed & {"torch", "transformers", "onnx"}
    code = "import lopa; print(lopa.connect, lopa.Example, lopa.__version__)"
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path)
    helped = subprocess.run([str(environment / "bin" / "lopa"), "--help"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "generate" in helped.stdout
    served = subprocess.run([str(environment / "bin" / "lopa"), "serve"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert served.returncode != 0
    assert "lopa[server]" in served.stdout + served.stderr
