"""The command: what it prints, and how it fails."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import lopa
import pytest
import typer
from lopa.cli import EXTRAS, GROUP, main, summary

from tests.sdk.conftest import EXAMPLES

Capture = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    """Exit code of a command line."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code if isinstance(end.value.code, int) else 0


@pytest.fixture(autouse=True)
def _cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOPA_CACHE", str(cache))


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps({"prompt": one.prompt, "target": one.target}) + "\n" for one in EXAMPLES))
    return path


def test_help_and_version(capsys: Capture) -> None:
    assert run("--help") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("serve", "info", "generate", "tune", "export", "history", "rollback"))
    assert "Not installed" not in listed
    assert run("tune", "--help") == 0
    assert "--learning-rate" in capsys.readouterr().out
    assert run("--version") == 0
    assert capsys.readouterr().out == f"lopa {lopa.__version__}\n"


def test_info(address: str, capsys: Capture) -> None:
    assert run("info", address) == 0
    assert "hidden size   32" in capsys.readouterr().out
    assert run("info", address, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["hidden_size"] == 32 and document["limits"]["max_pairs"] > 0


def test_a_users_life(address: str, jsonl: Path, tmp_path: Path, capsys: Capture) -> None:
    """generate plain, tune, generate personally, history, rollback."""
    folder = tmp_path / "me"
    assert run("generate", address, "def f(a, b):", "--max-tokens", 5) == 0
    plain = capsys.readouterr().out
    assert run("tune", address, folder, jsonl, "--steps", 8, "--batch-size", 4, "--learning-rate", 0.03, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kept"] and report["version"] == 2 and len(report["losses"]) == 8
    assert run("generate", address, "def f(a, b):", "--personal", folder, "--max-tokens", 5, "--json") == 0
    generation = json.loads(capsys.readouterr().out)
    assert generation["receipt"]["rows"] == 4 and generation["text"] + "\n" != plain
    assert run("history", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("    1  ") and lines[1].startswith("*   2  ") and "validation" in lines[1]
    assert run("rollback", folder, 1) == 0
    capsys.readouterr()
    assert run("history", folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["current"] == 1
    assert run("tune", address, folder, jsonl, "--steps", 1, "--learning-rate", 1e-9) == 0
    assert "nothing changed" in capsys.readouterr().out or lopa.open_personal(folder).version == 3


def test_the_soft_prompt_stands_where_it_is_told_to(address: str, jsonl: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "me"
    assert run("tune", address, folder, jsonl, "--steps", 2) == 0
    offsets = []
    for more in ((), ("--after-prefix",)):
        capsys.readouterr()
        assert run("generate", address, "x", "--personal", folder, "--prefix", "def f():", "--max-tokens", 2, "--json", *more) == 0
        offsets.append(json.loads(capsys.readouterr().out)["receipt"]["offset"])
    assert 0 == offsets[0] < offsets[1]
    assert run("generate", address, "x", "--prefix", "def f():", "--max-tokens", 2) == 0
    assert run("generate", address, "x", "--personal", folder, "--after-prefix") == 2
    assert run("generate", address, "x", "--prefix", "def f():", "--after-prefix") == 2


def test_generate_with_every_option(address: str, tmp_path: Path, capsys: Capture) -> None:
    options = "--temperature 1 --top-p 0.9 --top-k 50 --min-p 0.01 --repetition-penalty 1.1 --presence-penalty 0.5 --frequency-penalty 0.5"
    more = "--logit-bias 7=-5 --logit-bias 9=1 --seed 3 --stop XYZ --ignore-end --max-tokens 6 -n 2"
    arguments = ["generate", address, "def f(", *options.split(), *more.split()]
    assert run(*arguments, "--logprobs", 2, "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert len(first["token_ids"]) == 6 and len(first["logprobs"][0]["alternatives"]) == 2 and len(first["others"]) == 1
    assert run(*arguments) == 0
    assert capsys.readouterr().out == f"[1] {first['text']}\n[2] {first['others'][0]['text']}\n"
    assert run("generate", address, "x", "--logit-bias", "seven") == 2
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    assert run("generate", address, "x", "--json-schema", schema) == 0
    assert json.loads(capsys.readouterr().out) in ("yes", "no")


def test_budgets_scores_and_curves(address: str, jsonl: Path, tmp_path: Path, capsys: Capture) -> None:
    folder, text = tmp_path / "me", tmp_path / "code.py"
    text.write_text("".join(f"def function_{i}(a, b):\n    return a + b\n" for i in range(40)))
    assert run("tune", address, folder, text, "--steps", 6, "--max-steps", 2, "--low-priority") == 0
    assert "stopped at step 2 (max_steps)" in capsys.readouterr().out
    assert run("tune", address, folder, text, "--steps", 6, "--plot", tmp_path / "curves.png", "--json") == 0
    assert json.loads(capsys.readouterr().out)["resumed_from"] == 2 and (tmp_path / "curves.png").stat().st_size > 1000
    assert run("score", address, jsonl, "--personal", folder, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == len(EXAMPLES)
    assert run("score", address, jsonl) == 0
    assert "nats per token over 10 examples" in capsys.readouterr().out
    assert run("score", address, jsonl, "--personal", tmp_path / "nobody") == 0
    assert "is not tuned" in capsys.readouterr().err
    text.write_text("")
    assert run("score", address, text) == 2
    assert run("tune", address, folder, jsonl, "--plot", tmp_path / "nowhere" / "curves.png") == 2
    jsonl.write_bytes(b"\xff\xfe")
    assert run("generate", address, "x", "--json-schema", jsonl) == 2


def test_chat_streams_answers_and_remembers_turns(address: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    lines = iter(["hello", "", "and then?", "/reset", "hello", "x " * 490, "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert run("chat", address, "--max-tokens", "6", "--system", "be kind") == 1, "the last line alone is longer than the context"
    captured = capsys.readouterr()
    with lopa.connect(address) as client:
        turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
        first = client.generate(turns, max_tokens=6).text
        turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "and then?"}]
        second = client.generate(turns, max_tokens=6).text
    assert captured.out.startswith(f"{first}\n{second}\n{first}\n")
    assert "A conversation." in captured.err and "context" in captured.err


def test_a_persona_moves_and_the_cache_is_kept_clean(
    address: str, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("LOPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOPA_PASSPHRASE", "correct horse")
    assert run("tune", address, tmp_path / "me", jsonl, "--steps", 2, "--keep-examples") == 0
    assert run("move", "export", tmp_path / "me", tmp_path / "me.lopa") == 0
    assert run("move", "import", tmp_path / "me.lopa", tmp_path / "phone", "--persona", "work") == 0
    assert run("migrate", address, tmp_path / "phone", "--persona", "work") == 0
    assert run("generate", address, "x", "--personal", tmp_path / "phone", "--persona", "work", "--max-tokens", 2) == 0
    assert run("rollback", tmp_path / "me", 1) == 0
    monkeypatch.setenv("LOPA_PASSPHRASE", "wrong")
    assert run("generate", address, "x", "--personal", tmp_path / "phone", "--persona", "work") == 1
    assert "wrong passphrase" in capsys.readouterr().err
    assert run("bundle", "fetch", address) == 0
    capsys.readouterr()
    assert run("bundle", "list", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["made_for"] and entry["size"] > 1000
    assert run("bundle", "clean") == 0 and run("bundle", "list") == 0
    assert entry["bundle_id"] in capsys.readouterr().out
    assert run("bundle", "clean", "--days", 0) == 0 and run("bundle", "list", "--json") == 0
    assert "[]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "127.0.0.1:1"], "is the server running there"),
        (["history", "/no/such/folder"], "has no persona default"),
        (["history", "/tmp", "--persona", "../x"], "persona name"),
    ],
)
def test_failures_are_one_line_and_exit_1(arguments: list[str], words: str, capsys: Capture) -> None:
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert words in error and error.startswith("lopa: ") and error.count("\n") == 1 and "Traceback" not in error


def test_refusals_of_the_server_are_one_line(address: str, capsys: Capture) -> None:
    assert run("generate", address, "x", "--temperature", 99) == 1
    error = capsys.readouterr().err
    assert "temperature" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["info"], ["nonsense"], ["rollback", "folder", "x"], ["info", "a:1", "--nonsense"], ["tune", "a:1", "folder", "/no/such/file"]],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert run(*arguments) == 2


def test_a_bad_examples_file_is_wrong_usage(address: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("{}\n")
    assert run("tune", address, tmp_path / "me", path) == 2
    assert "bad.jsonl:1" in capsys.readouterr().err.replace("\n", "").replace("│", "").replace(" ", "")


def test_a_missing_part_says_what_to_install() -> None:
    """A real process in which torch can't be imported."""
    code = "import sys; sys.modules['torch'] = None\nfrom lopa.cli import main\nmain(['serve', '--fm', 'x', '--port', '0'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and "pip install" in result.stderr and f"lopa[{EXTRAS['serve']}]" in result.stderr


@pytest.mark.parametrize("entry", entry_points(group=GROUP), ids=lambda entry: entry.name)
def test_the_list_of_commands_says_of_each_what_its_own_help_says(entry) -> None:
    command = entry.load()
    own = command.info.help if isinstance(command, typer.Typer) else inspect.getdoc(command)
    assert summary(entry) == own.partition("\n\n")[0]
