"""Every example in a docstring of the device package runs against a real server and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import lopa
import pytest

from tests.sdk.conftest import EXAMPLES

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples() -> list[doctest.DocTest]:
    """Of every module but generated code."""
    finder, found = doctest.DocTestFinder(exclude_empty=True), []
    for module in pkgutil.walk_packages(lopa.__path__, "lopa."):
        if not module.name.startswith(("lopa.v1", "lopa.cli.__main__")):
            found += [test for test in finder.find(importlib.import_module(module.name)) if test.examples]
    return found


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name)
def test_example(test: doctest.DocTest, address: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOPA_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    with lopa.connect(address) as client:
        test.globs.update(lopa=lopa, address=address, client=client, me=client.personal(tmp_path / "me"), examples=EXAMPLES)
        result = doctest.DocTestRunner(optionflags=FLAGS).run(test)
    assert result.attempted and not result.failed


def test_what_an_app_calls_first_has_an_example() -> None:
    named = {test.name.removeprefix("lopa.") for test in examples()}
    wanted = {"client.connect", "client.Client.generate", "client.Client.stream", "client.Client.score", "client.Client.personal"}
    wanted |= {"persona.Persona.tune", "persona.Persona.generate", "persona.Persona.migrate", "async_client.connect_async"}
    wanted |= {"local.LocalPersona.rollback", "local.LocalPersona.export", "control.TuneControl", "tuning.TuneReport"}
    assert wanted <= named
