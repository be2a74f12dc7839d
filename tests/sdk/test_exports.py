"""What `import lopa` gives, and what it must never bring along."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import lopa

FOREIGN = ("torch", "transformers", "lopa_server", "lopa_exporters")
ROOT = Path(lopa.__file__).parent


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_module_of_the_device_imports_another_part() -> None:
    code = f"""
import importlib, pkgutil, sys, lopa
for module in pkgutil.walk_packages(lopa.__path__, "lopa."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(sorted(name for name in {FOREIGN!r} if name in sys.modules))
"""
    assert run(code).strip() == "[]"


def test_importing_lopa_and_listing_commands_is_light() -> None:
    assert run("import sys, lopa; print([m for m in ('grpc', 'onnxruntime', 'numpy') if m in sys.modules])").strip() == "[]"
    code = """
import sys
from lopa.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code in (0, None), end.code
print([m for m in ("torch", "transformers", "onnxruntime", "lopa_server", "lopa_exporters") if m in sys.modules])
"""
    output = run(code)
    assert output.splitlines()[-1] == "[]"
    assert all(name in output for name in ("serve", "info", "generate", "tune", "history", "rollback", "export"))


def test_every_name_is_there_and_said_once() -> None:
    assert len(set(lopa.__all__)) == len(lopa.__all__)
    assert set(lopa._WHERE) | {"__version__"} == set(lopa.__all__) == set(dir(lopa))
    for name in lopa.__all__:
        assert getattr(lopa, name) is not None
    assert lopa.__version__.count(".") >= 1


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {f"{node.module}.{alias.name}" for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == {f"{module}.{name}" for name, module in lopa._WHERE.items()}


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(lopa, "no_such_thing")
