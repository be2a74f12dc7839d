"""The laboratory of quality: its methods are what they say they are, its items do not leak, its figures follow from its cells."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lopa
import numpy as np
import pytest
import torch
from lopa.demo.device import examples
from lopa.demo.users import TaskSizes
from lopa.tuning import TuneOptions
from lopa_exporters.frozen import FrozenModel, TokenPair
from lopa_server.models import nano_bundle_folder, nano_folder
from peft import PrefixTuningConfig, TaskType, get_peft_model

from benchmarks.quality.cell import Cell, score, tune
from benchmarks.quality.functions import build_function_task, functions
from benchmarks.quality.learners.dept import RANK, SLOWER, DecomposedLearner
from benchmarks.quality.learners.device import DeviceLearner
from benchmarks.quality.learners.learner import PlainLearner
from benchmarks.quality.learners.prefix import PrefixLearner
from benchmarks.quality.learners.prompts import from_lopa
from benchmarks.quality.learners.shared import rebuilt
from benchmarks.quality.learners.starts import at_answers, with_rows
from benchmarks.quality.learners.weights import full, lora
from benchmarks.quality.material import Material, prepare
from benchmarks.quality.methods import METHODS, UNTUNED, Bench
from benchmarks.quality.store import Store
from benchmarks.quality.tasks import ROOT, build, held_out_modules

FUNCTION = '''def work_{i}_{n}(value):
    """Do thing {n} of part {i}."""
    total = value + {n} * {i}
    print("calling {i} {n}", total)
    return work_{i}_{n}(total) if total else None

'''
MODULES = {f"part{i}": "".join(FUNCTION.format(i=i, n=n) for n in range(12)) for i in range(6)}


def test_device_steps_as_torch_does(bench: Bench, material: Material) -> None:
    """The bundle's graphs against autograd and torch's AdamW over the same shared part, read back from the bundle."""
    lopa = rebuilt(bench.encoder.bundle, bench.fm, 0, trained=True)
    device = DeviceLearner(bench.fm, bench.encoder, material)
    start = {name: torch.from_numpy(value.copy()) for name, value in device.state().items()}
    ordinary = from_lopa(bench.fm, material, replace(lopa, start=start))
    cell = Cell("default", "filing", "email", steps=4, rate=0.03)
    ours, theirs = tune(device, material, cell), tune(ordinary, material, cell)
    assert [nll for _, nll in ours.curve] == pytest.approx([nll for _, nll in theirs.curve], rel=1e-4)
    assert ours.best_nll != pytest.approx(device_start_nll(bench, material), rel=1e-3)
    assert device.footprint.numbers == ordinary.footprint.numbers
    assert device.footprint.wire == ordinary.footprint.wire


def device_start_nll(bench: Bench, material: Material) -> float:
    losses = DeviceLearner(bench.fm, bench.encoder, material).losses(material.validation, material.of(material.validation))
    return losses.mean().item()


def test_snippets_that_repeat_tuning_items_are_told_apart(bench: Bench) -> None:
    """Whatever module the test snippet is from; but for markers, which are nobody's code; of the items that the user has."""
    data = build("email", "filing", held_out_modules("email"), 0)
    new = replace(data.tuning[0], prefix=f"<|code|>{FUNCTION.format(i=1, n=2)}<|file|>")
    again = replace(data.tuning[10], target=data.tuning[0].target, prefix=f"<|code|>\n{data.tuning[10].prefix.removeprefix('<|code|>')}")
    data = replace(data, tuning=data.tuning[:20], test=(new, again))
    assert prepare(data, bench.fm, bench.encoder, None, 0).unrepeated == (20,)
    assert prepare(data, bench.fm, bench.encoder, 5, 0).unrepeated == (5, 6)


def test_lora_goes_on_from_what_a_population_learnt(bench: Bench) -> None:
    """An adapter of the task's own, of a user's size, that is worth something before the first step."""
    data = build("email", "docstring", held_out_modules("email"), 0)
    material = prepare(replace(data, test=data.test[:8]), bench.fm, bench.encoder, 5, 0)
    learner, fresh = (METHODS[name].make(bench, material, 0) for name in ("lora_r8_prior", "lora_r8"))
    assert learner.footprint == fresh.footprint
    assert score(learner, material, material.test).nll < 0.9 * score(fresh, material, material.test).nll


def test_prefix_tuning_is_pefts(bench: Bench) -> None:
    """At the front, where PEFT can put it too: the same logits, hence the same likelihood."""
    learner = PrefixLearner(bench.fm, 0, rows=4)
    pair = TokenPair([5, 70, 300, 41], [900, 17, 0])
    ours = learner.losses([0], [pair]).nll.item()
    base = FrozenModel.load(nano_folder())
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=4,
        token_dim=base.hidden,
        num_layers=base.model.config.num_hidden_layers,
        num_attention_heads=base.model.config.num_attention_heads,
        num_transformer_submodules=1,
    )
    peft = get_peft_model(base.model, config)
    peft.prompt_encoder["default"].load_state_dict(learner.encoder.state_dict())
    ids = torch.tensor([[*pair.prompt, *pair.target]])
    with torch.no_grad():
        logits = peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(pair.prompt) - 1 : -1]
    theirs = torch.nn.functional.cross_entropy(logits, torch.tensor(pair.target), reduction="sum").item()
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_learnt_prefix_stands_before_the_last_token_read(bench: Bench, material: Material) -> None:
    """With nothing learnt in its keys' direction and zero values it still takes attention; with the prefix alone it is the plain model."""
    learner, rows = PrefixLearner(bench.fm, 0, rows=2), material.test[:4]
    with torch.no_grad():
        learner.encoder.embedding.weight.zero_()
        near = learner.losses(rows, material.of(rows)).nll
    plain = PlainLearner(bench.fm).losses(rows, material.of(rows)).nll
    assert not torch.allclose(near, plain, rtol=1e-3)
    assert torch.allclose(near, plain, rtol=0.5)


def test_dept_changes_the_embeddings_of_what_is_read(bench: Bench, material: Material) -> None:
    """Against transformers' own forward pass over embeddings put together here; the target's are the model's own."""
    learner, rows = DecomposedLearner(bench.fm, material, 0, rows=10), material.training[:4]
    spread = torch.Generator().manual_seed(1)
    with torch.no_grad():
        learner.parameters["B"].copy_(torch.randn(learner.parameters["B"].shape, generator=spread) / SLOWER)
        ours = learner.losses(rows, material.of(rows))
        table = bench.fm.model.get_input_embeddings()
        for place, pair in enumerate(material.of(rows)):
            read = [*pair.prefix, *pair.prompt]
            change = SLOWER**2 * learner.parameters["A"][: len(read)] @ learner.parameters["B"]
            text = table(torch.tensor(read)) + change
            embeds = torch.cat((learner.parameters["prompt"], text, table(torch.tensor(pair.target))))
            logits = bench.fm.model(inputs_embeds=embeds[None]).logits[0, -len(pair.target) - 1 : -1]
            theirs = torch.nn.functional.cross_entropy(logits, torch.tensor(pair.target), reduction="sum")
            assert ours.nll[place].item() == pytest.approx(theirs.item(), rel=1e-4)
    assert 10 * bench.fm.hidden - bench.fm.hidden < learner.footprint.numbers <= 10 * bench.fm.hidden
    assert learner.parameters["A"].shape[1] == RANK


def test_what_is_learnt_goes_where_the_model_is(bench: Bench, material: Material) -> None:
    """On another device than the CPU, with and without a prefix: PyTorch's meta device, which computes nothing but mixes with no other."""
    far = replace(bench.fm, model=copy.deepcopy(bench.fm.model).to("meta"), device=torch.device("meta"))
    prefix, dept = PrefixLearner(bench.fm, 0, rows=4), DecomposedLearner(bench.fm, material, 0, rows=10)
    prefix.fm = dept.fm = far
    past = prefix._model()._past(0, [TokenPair([5, 6], [7])])
    assert past is not None
    assert past.cache.layers[0].keys.is_meta
    rows = [pair for pair in material.pairs if len(pair.prefix) == len(material.pairs[0].prefix)]
    assert dept._inputs(rows).is_meta


def test_reading_ahead_changes_nothing(bench: Bench, material: Material) -> None:
    rows = material.test[:6]
    ahead = PlainLearner(bench.fm).losses(rows, material.of(rows))
    at_once = bench.fm.losses(None, material.of(rows))
    assert torch.allclose(ahead.nll, at_once.nll, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_weights_start_as_the_model_and_leave_it_alone(bench: Bench, material: Material, kind: str) -> None:
    rows = material.training[:4]
    before = bench.fm.losses(None, material.of(rows)).nll
    learner = lora(bench.fm, 0, 8) if kind == "lora" else full(bench.fm)
    with torch.no_grad():
        assert torch.allclose(learner.losses(rows, material.of(rows)).nll, before, rtol=1e-4)
    for number in range(1, 3):
        learner.step(rows, material.of(rows), 1e-3, number)
    with torch.no_grad():
        assert (learner.losses(rows, material.of(rows)).nll < before - 0.01).all()
    assert torch.equal(bench.fm.losses(None, material.of(rows)).nll, before)
    assert learner.footprint.device == 0
    assert learner.footprint.server == 2 * learner.footprint.numbers


@pytest.mark.parametrize("name", [name for name in METHODS if name not in UNTUNED])
def test_every_method_can_be_tuned(bench: Bench, material: Material, name: str) -> None:
    """A step changes its state and what the model makes of the items; what rests in float16 comes back as that."""
    learner, rows = METHODS[name].make(bench, material, 0), material.training[:2]
    with torch.no_grad():
        before = learner.losses(rows, material.of(rows)).nll
    learner.step(rows, material.of(rows), 1e-3, 1)
    kept = learner.at_rest(learner.state())
    learner.restore(kept)
    with torch.no_grad():
        after = learner.losses(rows, material.of(rows)).nll
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)
    assert learner.footprint.numbers == sum(np.asarray(value).size for value in kept.values())
    assert learner.footprint.device + learner.footprint.server >= 2 * learner.footprint.numbers


@pytest.mark.parametrize("task", ["naming", "docstring"])
def test_function_items_hide_their_answer(task: str) -> None:
    data = build_function_task("somebody", task, MODULES, TaskSizes(), seed=0)
    assert len(data.tuning) + len(data.test) <= 72
    for item in (*data.tuning, *data.test):
        assert item.target
        assert item.target not in item.text
        assert '"""' not in item.text.removesuffix('"""')
    if task == "naming":
        files = [{item.target.split("_")[1] for item in items} for items in (data.tuning, data.test)]
        assert not files[0] & files[1]


def test_functions_without_a_body_of_their_own_are_left_out() -> None:
    found = list(functions('def a():\n    """Only words."""\n\n\ndef b(x):\n    """First.\n\n    Second."""\n    return x\n'))
    assert [(one.name, one.line, one.source) for one in found] == [("b", "First.", "def b(x):\n    return x")]
    assert not list(functions("print 'of another age'\n"))


def test_store_forgets_half_a_line_only(tmp_path: Path) -> None:
    path, cell = tmp_path / "cells.jsonl", Cell("none", "filing", "email")
    Store(path).add(
        {"method": "none", "task": "filing", "user": "email", "seed": 0, "size": None, "steps": 0, "rate": 0.0, "test_nll": 2.0}
    )
    with path.open("a") as file:
        file.write('{"method": "full", "ta')
    store = Store(path)
    assert cell in store
    store.add({**store.rows[cell.key()], "user": "xml"})
    assert sorted(row["user"] for row in Store(path).rows.values()) == ["email", "xml"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smoke_order(tmp_path: Path) -> None:
    """None, prompt tuning, the default: in this order of falling NLL on filing, from the command as it is published."""
    command = [sys.executable, "benchmarks/quality", "--smoke", "--cells", str(tmp_path / "cells.jsonl"), "--work", str(tmp_path)]
    result = subprocess.run([*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 6


@pytest.mark.parametrize("rows", [10, 25, 40])
def test_prompts_of_other_lengths_begin_with_the_bundles(bench: Bench, material: Material, rows: int) -> None:
    lopa = rebuilt(bench.encoder.bundle, bench.fm, 0, trained=True)
    x = torch.from_numpy(material.features["x"][:2])
    other, own = with_rows(lopa, bench.fm.vocabulary(), 0, rows)(x), lopa(x)
    assert other.shape == (2, rows, bench.fm.hidden)
    same = min(rows, lopa.config.rows)
    assert torch.allclose(other[:, :same], own[:, :same], atol=1e-6)


def test_corrections_begin_at_the_answers_as_a_device_s_do(bench: Bench, material: Material) -> None:
    """The device reads answers with its own tokenizer, the laboratory's variants with the model's."""
    lopa = rebuilt(bench.encoder.bundle, bench.fm, 0, trained=True)
    start, x, rows = at_answers(lopa, material), torch.from_numpy(material.features["x"]), list(material.training)
    assert torch.equal(start(x), lopa(x))
    device = DeviceLearner(bench.fm, bench.encoder, material, priors=False).state()
    targets = [material.pairs[row].target for row in rows]
    answers = torch.tensor([[float(token in target) for token in sorted(set().union(*targets))] for target in targets])
    random, ours = (explained(x[rows] @ one.start["W1v.Q"], answers) for one in (lopa, start))
    assert ours > 1.5 * random
    assert explained(x[rows] @ torch.from_numpy(device["W1v.Q"]), answers) > 1.5 * random


def explained(scores: torch.Tensor, answers: torch.Tensor) -> float:
    """Part of the answers' variance that a linear function of the scores gives."""
    scores, answers = scores - scores.mean(dim=0), answers - answers.mean(dim=0)
    return 1 - ((answers - scores @ torch.linalg.lstsq(scores, answers).solution).square().sum() / answers.square().sum()).item()


@pytest.mark.parametrize("kind", ["completion", "filing"])
def test_a_prior_is_on_trial_as_on_a_device(bench: Bench, kind: str, tmp_path: Path) -> None:
    """The laboratory's learner against a persona that tunes over the wire, before and after the trial: one takes a prior, one does not."""
    from lopa_server.app import ServerConfig, start_server

    material = prepare(build("email", kind, held_out_modules("email"), 0), bench.fm, bench.encoder, size=20, seed=0)
    learner = DeviceLearner(bench.fm, bench.encoder, material)
    ours = tune(learner, material, Cell("default", kind, "email", steps=12, rate=0.03))
    training, validation = (examples([material.items[row] for row in rows]) for rows in (material.training, material.validation))
    config = ServerConfig(fm=nano_folder(), bundle=nano_bundle_folder(), threads=1)
    options: TuneOptions = {
        "steps": 12,
        "batch_size": 8,
        "learning_rate": 0.03,
        "validate_every": 3,
        "dtype": "F32",
        "gradient_dtype": "F32",
    }
    options |= {"placement": "after_prefix" if material.items[0].prefix else "front"}
    with start_server(config) as server, lopa.connect(server.address, config=lopa.ClientConfig(cache=tmp_path / "cache")) as client:
        report = client.personal(tmp_path / "me").tune(training, validation=validation, **options)
    assert report.prior == learner.prior == ("completion" if kind == "completion" else "")
    theirs = dict(report.validation)
    for step, nll in ours.curve:
        assert nll == pytest.approx(theirs[step], rel=1e-3)
