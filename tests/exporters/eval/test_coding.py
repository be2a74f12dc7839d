"""From a file of problems to a figure: reference answers, clean-up, writing, and a model that learns to pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lopa_exporters.cli.evaluate import evaluate
from lopa_exporters.eval import cruxeval, mbpp
from lopa_exporters.eval.coding import TASKS, Reader, evaluate_code, score_references
from lopa_exporters.eval.generation import Writing, continue_prompts
from lopa_exporters.eval.sandbox import CodeExecutionRefused, Limits, Sandbox, SandboxError
from lopa_exporters.frozen import FrozenModel
from typer import Typer
from typer.testing import CliRunner

from tests.exporters.backbones import build_backbone
from tests.exporters.eval.samples import Quiet, build_causal, plan_of, write_cruxeval, write_lines, write_mbpp

WRITERS = {"mbpp": write_mbpp, "cruxeval-i": write_cruxeval, "cruxeval-o": write_cruxeval}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_causal(tmp_path_factory.mktemp("fm") / "llama")


@pytest.fixture(scope="module")
def fm(folder: Path) -> FrozenModel:
    return FrozenModel.load(folder, device="cpu")


@pytest.mark.parametrize("task", TASKS)
def test_the_data_sets_own_answers_all_pass(task: str, tmp_path: Path) -> None:
    """As references, and as text that a model might write, with chatter behind it."""
    data = WRITERS[task](tmp_path / "data.jsonl")
    report = score_references(task, data, allow_code_execution=True, limit=0, processes=2, reporter=Quiet())
    assert (report["metric"]["value"], report["n"], report["failed"]) == (1.0, 4, {})
    own = TASKS[task]
    sandbox = Sandbox(Limits(), allow_code_execution=True)
    chatter = "\ndef other(): pass\nassert False\n" if task == "mbpp" else "\nand more == 3"
    for problem in own.read(data):
        check = own.check(problem, problem.target + chatter)
        assert check is not None
        assert sandbox.check(check).passed, problem.id


def test_answers_that_only_look_right_fail(tmp_path: Path) -> None:
    problem = cruxeval.OUTPUT.read(write_cruxeval(tmp_path / "c.jsonl"))[0]
    sandbox = Sandbox(Limits(), allow_code_execution=True)
    for written in (" 'xb' or True\n[/ANSWER]", "", "'xb', 'a message'", "(lambda: 'xb')()", "'xa'; f = 1"):
        check = cruxeval.check_output(problem, f"assert f('x') =={written}")
        assert check is not None
        assert not sandbox.check(check).passed, written
    assert cruxeval.check_output(problem, "assert f('x') == f('x')") is None
    assert cruxeval.check_input(problem, "assert g('x') == 'xa'") is None
    other = cruxeval.check_input(problem, "\nassert f('' + 'x') == 'xa'\n[/ANSWER]")
    assert other is not None
    assert sandbox.check(other).passed


def test_prompts_are_the_official_ones(tmp_path: Path) -> None:
    """Ends and few-shot examples; the whole text is a constant of the module."""
    for task, question, answer in (
        (cruxeval.INPUT, "assert f(??) == 'xa'", "\nassert f('x') == 'xa'\n[/ANSWER]\n"),
        (cruxeval.OUTPUT, "assert f('x') == ??", "\nassert f('x') == 'xa'\n[/ANSWER]\n"),
    ):
        problem = task.read(write_cruxeval(tmp_path / "c.jsonl"))[0]
        assert problem.prompt.endswith(f"[PYTHON]\ndef f(s):\n    return s + 'a'\n{question}\n[/PYTHON]\n[ANSWER]")
        assert problem.prompt.count("[ANSWER]\n") >= 2
        assert problem.target == answer


def test_writing_in_a_batch_is_writing_alone(fm: FrozenModel) -> None:
    """Against transformers' generate over token ids; with a soft prompt that is some token's embeddings."""
    prompts = [[5, 6, 7, 8, 9, 10], [20, 21], [30, 31, 32]]
    before = [40, 41]
    soft = fm.model.get_input_embeddings()(torch.tensor(before)).detach().expand(3, -1, -1)
    for given, lead in ((None, []), (soft, before)):
        written = continue_prompts(fm, given, prompts, [12, 5, 12], Writing(()))
        for prompt, room, text in zip(prompts, (12, 5, 12), written, strict=True):
            ids = torch.tensor([lead + prompt])
            alone = fm.model.generate(ids, max_new_tokens=room, do_sample=False, eos_token_id=0, pad_token_id=1)[0, ids.shape[1] :]
            assert text == fm.tokenizer.decode([i for i in alone.tolist() if i], clean_up_tokenization_spaces=False)


def test_writing_ends_behind_a_stop(fm: FrozenModel) -> None:
    whole = continue_prompts(fm, None, [[5, 6]], [30], Writing(()))[0]
    stop = whole[4:6]
    text = continue_prompts(fm, None, [[5, 6]], [30], Writing((stop,)))[0]
    assert whole.startswith(text)
    assert stop in text
    assert len(text) < len(whole)


def test_lengths_are_kept(fm: FrozenModel, folder: Path, tmp_path: Path) -> None:
    """A prompt loses its beginning, a target its end, and what leaves no room is not answered."""
    problems = mbpp.read(write_mbpp(tmp_path / "m.jsonl"))
    plan = plan_of("mbpp", "none", folder, tmp_path / "m.jsonl", tmp_path, max_tokens=20, max_prompt=12, max_new=400)
    reader = Reader(fm, mbpp.TASK, plan, soft_rows=10)
    whole = fm.tokenize_prompts([problems[0].prompt])[0]
    pair = reader.pairs(problems)[0]
    assert list(pair.prompt) == whole[-12:]
    assert len(pair) <= 20
    assert reader.room(pair.prompt) == 400
    assert reader.room([5] * 200) == 512 - 10 - 200
    crux = Reader(fm, cruxeval.OUTPUT, plan_of("cruxeval-o", "none", folder, tmp_path, tmp_path, max_tokens=100), soft_rows=0)
    assert crux.room([5] * 100) == 0
    assert crux.prompts(cruxeval.OUTPUT.read(write_cruxeval(tmp_path / "c.jsonl")))[0][0] == fm.tokenizer.bos_token_id


def test_a_model_that_learnt_the_answers_passes(folder: Path, tmp_path: Path) -> None:
    """Full fine-tuning on the test's own problems: training, writing, execution and report in one; then again from what is kept."""
    data = write_mbpp(tmp_path / "m.jsonl")
    changes = {"epochs": 60, "batch": 4, "learning_rate": 2e-2, "warmup": 5.0, "max_new": 24, "test": data}
    plan = plan_of("mbpp", "full", folder, data, tmp_path / "run", **changes)
    report = evaluate_code(plan, Quiet())
    assert report["metric"]["value"] == 1.0, (tmp_path / "run/predictions.jsonl").read_text()
    assert (report["n"], report["n_train"], report["unanswered"]) == (4, 4, 0)
    assert report["nll_per_token"] < 0.2
    assert set(report["sandbox"]) == {"measures", "possible", "limits"}
    lines = (tmp_path / "run/predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/predictions.jsonl").write_text("".join(lines[:2]) + lines[2][:10])
    again = evaluate_code(plan, Quiet())
    assert {key: again[key] for key in ("metrics", "nll_per_token")} == {key: report[key] for key in ("metrics", "nll_per_token")}
    assert (tmp_path / "run/predictions.jsonl").read_text().splitlines(keepends=True) == lines
    with pytest.raises(ValueError, match="another limit"):
        evaluate_code(plan_of("mbpp", "full", folder, data, tmp_path / "run", limit=2, **changes), Quiet())


@pytest.mark.parametrize("method", ["prompt-tuning", "idpg", "lopa", "lora"])
def test_each_method_trains_on_code(method: str, folder: Path, tmp_path: Path) -> None:
    """Ten epochs of two examples: the references become likelier than under the plain model."""
    data = write_mbpp(tmp_path / "m.jsonl")
    encoder = str(build_backbone(tmp_path / "encoder", "codebert"))
    shared = {"max_new": 2, "test": data, "encoder": encoder, "encoder_tokens": 32}
    plain = evaluate_code(plan_of("mbpp", "none", folder, data, tmp_path / "none", **shared), Quiet())
    tuned = evaluate_code(plan_of("mbpp", method, folder, data, tmp_path / method, learning_rate=2e-2, **shared), Quiet())
    assert tuned["nll_per_token"] < plain["nll_per_token"]
    assert tuned["trained_numbers"] > 0


def test_the_command_runs_and_refuses(folder: Path, tmp_path: Path) -> None:
    app = Typer()
    app.command()(evaluate)
    data = write_cruxeval(tmp_path / "c.jsonl")
    arguments = ["--task", "cruxeval-o", "--data", str(data), "--fm", str(folder), "--device", "cpu", "--run", str(tmp_path / "run")]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert "--allow-code-execution" in refused.stderr
    out = tmp_path / "out.json"
    done = CliRunner().invoke(app, [*arguments, "--allow-code-execution", "--limit", "1", "--max-tokens", "500", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "pass@1" in done.output
    report = json.loads(out.read_text())
    assert report == json.loads((tmp_path / "run/report.json").read_text())
    assert (report["task"], report["n"], report["hyperparameters"]["max_tokens"]) == ("cruxeval-o", 1, 500)
    reference = CliRunner().invoke(app, ["--task", "cruxeval-i", "--data", str(data), "--reference", "--allow-code-execution"])
    assert reference.exit_code == 0, reference.output
    assert "100.00%" in reference.output
    for wrong, told in ((["--reference", "--task", "glue-rte"], "reference answers"), (["--task", "mbpp"], "--fm")):
        failed = CliRunner().invoke(app, ["--data", str(data), "--allow-code-execution", *wrong])
        assert failed.exit_code == 1
        assert told in failed.stderr


def test_what_is_not_prevented_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    possible = {"processes": False, "network": True, "writing": False, "reading": True}
    monkeypatch.setattr(Sandbox, "measure", lambda _: {"measures": [], "possible": possible})

    def executed(*_: object) -> None:
        assert "code that a model wrote: network, reading" in caplog.text
        raise KeyboardInterrupt

    monkeypatch.setattr(Sandbox, "check_all", executed)
    with pytest.raises(KeyboardInterrupt):
        score_references("mbpp", write_mbpp(tmp_path / "m.jsonl"), allow_code_execution=True, limit=0, processes=1, reporter=Quiet())


def test_a_machine_without_a_sandbox_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_: Sandbox) -> None:
        raise SandboxError("no confined process could be started: it ended at once")

    monkeypatch.setattr(Sandbox, "measure", measure)
    app = Typer()
    app.command()(evaluate)
    data = write_mbpp(tmp_path / "m.jsonl")
    failed = CliRunner().invoke(app, ["--task", "mbpp", "--data", str(data), "--reference", "--allow-code-execution"])
    assert failed.exit_code == 1
    assert failed.stderr.splitlines() == ["lopa: no confined process could be started: it ended at once"]


def test_reasons_are_printed_as_they_are(tmp_path: Path) -> None:
    """Whatever a program puts into its exception: markup of the terminal's tables, line ends, escape codes."""
    app = Typer()
    app.command()(evaluate)
    rows = [json.loads(line) for line in write_mbpp(tmp_path / "m.jsonl").read_text().splitlines()]
    rows[0]["canonical_solution"] = "    raise ValueError('[/bold] \\x1b[2J\\nnext')\n"
    data = write_lines(tmp_path / "n.jsonl", rows)
    done = CliRunner().invoke(app, ["--task", "mbpp", "--data", str(data), "--reference", "--allow-code-execution"])
    assert done.exit_code == 0, done.output
    assert "[/bold]" in done.output
    assert "\x1b[2J" not in done.output


def test_no_sandbox_no_model(folder: Path, tmp_path: Path) -> None:
    """Refused before anything is loaded or written."""
    import dataclasses

    plan = plan_of("mbpp", "none", folder, write_mbpp(tmp_path / "m.jsonl"), tmp_path / "run")
    with pytest.raises(CodeExecutionRefused):
        evaluate_code(dataclasses.replace(plan, allow_code_execution=False), Quiet())
    assert not (tmp_path / "run").exists()
