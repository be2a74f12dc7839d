"""Methods over a masked model: parity with the model alone, what each trains, and runs that were interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lopa_exporters.eval.classification import evaluate_glue
from lopa_exporters.eval.masked import MaskedModel
from lopa_exporters.eval.methods import build_method
from lopa_exporters.eval.recipes import METHODS, paper_recipe
from lopa_exporters.eval.training import Trainer, TrainingError

from tests.exporters.backbones import build_backbone
from tests.exporters.eval.samples import Quiet, build_masked, plan_of, write_sst2

TEXTS = ["a great film <mask> .", "<mask> , yes", "a film that is a great deal longer than that one ? <mask> , it is"]
SMALL = {"epochs": 2, "batch": 4, "head_width": 8, "encoder_tokens": 32, "rows": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_masked(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_backbone(tmp_path_factory.mktemp("encoder"), "roberta"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sst2(tmp_path_factory.mktemp("data") / "SST-2")


def test_logits_in_a_batch_are_those_of_each_text_alone(folder: Path) -> None:
    model = MaskedModel.load(folder, device="cpu")
    clozes = model.tokenize(TEXTS, 30)
    for i, logits in enumerate(model.logits(None, clozes)):
        alone = model.model(torch.tensor([clozes[i].ids])).logits[0, clozes[i].mask]
        assert clozes[i].ids[clozes[i].mask] == model.tokenizer.mask_token_id
        assert torch.allclose(logits, alone, atol=1e-5)


def test_a_soft_prompt_of_embeddings_is_those_tokens(folder: Path) -> None:
    model = MaskedModel.load(folder, device="cpu")
    clozes = model.tokenize(TEXTS, 30)
    before = torch.tensor([40, 41, 42])
    soft = model.model.get_input_embeddings()(before).expand(3, -1, -1)
    for i, logits in enumerate(model.logits(soft, clozes)):
        ids = torch.cat((before, torch.tensor(clozes[i].ids)))[None]
        assert torch.allclose(logits, model.model(ids).logits[0, 3 + clozes[i].mask], atol=1e-5)


def test_a_mask_that_is_cut_off_moves_to_the_end(folder: Path) -> None:
    model = MaskedModel.load(folder, device="cpu")
    cloze = model.tokenize(["a film " * 20 + "<mask>"], 12)[0]
    assert (len(cloze.ids), cloze.mask) == (12, 10)


def test_label_words_must_be_tokens(folder: Path) -> None:
    model = MaskedModel.load(folder, device="cpu")
    assert len(set(model.word_ids(["Yes", "No", "Maybe"]))) == 3
    with pytest.raises(ValueError, match=r"'unheard' is .* tokens"):
        model.word_ids(["unheard"])
    with pytest.raises(ValueError, match="the same token"):
        model.word_ids(["Yes", "Yes"])


def test_each_method_trains_what_it_says(folder: Path, encoder: str) -> None:
    """Counts, and that a step changes exactly the trainable tensors."""
    import dataclasses

    counts = {}
    for name in METHODS:
        base = MaskedModel.load(folder, device="cpu")
        recipe = dataclasses.replace(paper_recipe("glue-sst2", name), encoder=encoder, head_width=8, encoder_tokens=32)
        method = build_method(name, recipe, base, 0)
        counts[name] = method.count()
        frozen = [tensor for tensor in method.model.parameters() if not any(tensor is own for own in method.trainable.values())]
        assert not any(tensor.requires_grad for tensor in frozen)
        assert all(tensor.requires_grad for tensor in method.trainable.values())
    whole = sum(tensor.numel() for tensor in MaskedModel.load(folder, device="cpu").model.parameters())
    heads = 2 * (24 * 8 + 8) + (10 * 4 * 8 + 10 * 4) + (32 * 4 * 8 + 32 * 4)
    lora = 2 * 3 * (16 * 32 + 32 * 16)
    idpg = (24 * 8 + 8) + (10 * 32 * 8 + 10 * 32)
    assert counts == {"none": 0, "prompt-tuning": 10 * 32, "idpg": idpg, "lopa": 10 * 32 + heads, "lora": lora, "full": whole}


def test_idpg_makes_every_item_its_own_prompt(folder: Path, encoder: str) -> None:
    """W2 tanh(W1 x + b1) + b2, shaped as the prompt; dropout in training only."""
    import dataclasses

    recipe = dataclasses.replace(paper_recipe("glue-sst2", "idpg"), encoder=encoder, encoder_tokens=32, rows=3, dropout=0.5)
    soft = build_method("idpg", recipe, MaskedModel.load(folder, device="cpu"), 0).soft
    assert soft is not None
    features = soft.features(TEXTS)
    assert features.fixed is not None
    made = soft(features, [0, 1, 2], train=False)
    weights = soft.tensors
    whole = torch.tanh(features.fixed @ weights["W1v"].T + weights["b1v"]) @ weights["W2v"].T + weights["b2v"]
    assert made.shape == (3, 3, 32)
    assert torch.equal(made, whole.view(3, 32, 3).mT)
    assert not torch.allclose(made[0], made[1])
    assert torch.equal(made, soft(features, [0, 1, 2], train=False))
    assert not torch.equal(made, soft(features, [0, 1, 2], train=True))


def test_full_fine_tuning_learns_the_task_and_the_report_tells(folder: Path, data: Path, tmp_path: Path) -> None:
    plan = plan_of("glue-sst2", "full", folder, data, tmp_path / "run", epochs=12, batch=4, learning_rate=3e-3, each_epoch=True)
    reporter = Quiet()
    report = evaluate_glue(plan, reporter)
    assert report["metric"]["value"] == 1.0
    assert (report["n"], report["n_train"], report["steps"], reporter.done["Training"]) == (2, 8, 24, 24)
    assert len(report["epochs"]) == 12
    assert "selected on the test" in report["best_epoch"]["note"]
    assert {"torch", "transformers", "python"} <= set(report["versions"])
    assert report["hyperparameters"]["learning_rate"] == 3e-3
    again = evaluate_glue(plan, Quiet())
    assert again["metrics"] == report["metrics"]


class Stopped(Exception):
    """An interruption."""


@pytest.mark.parametrize("name", ["prompt-tuning", "idpg", "lopa", "lora", "full", "encoder"])
def test_an_interrupted_run_ends_as_an_unbroken_one(name: str, folder: Path, encoder: str, data: Path, tmp_path: Path) -> None:
    """Dropout, order and optimizer included: the same numbers, bit by bit."""
    method = "lopa" if name == "encoder" else name
    changes = {**SMALL, "encoder": encoder, "learning_rate": 1e-2, "train_encoder": name == "encoder"}

    def trainer(run: Path) -> Trainer:
        plan = plan_of("glue-sst2", method, folder, data, run, **changes)
        base = MaskedModel.load(folder, device="cpu")
        built = build_method(method, plan.recipe, base, plan.seed)
        model = MaskedModel(built.model, base.tokenizer, base.device, bf16=False)
        clozes = model.tokenize(TEXTS * 2, 30)
        features = built.soft.features(TEXTS * 2) if built.soft else None

        def loss(rows: object) -> torch.Tensor:
            soft = built.soft(features, rows, train=True) if built.soft and features else None  # type: ignore[arg-type]
            logits = model.logits(soft, [clozes[row] for row in rows])  # type: ignore[attr-defined]
            return torch.nn.functional.cross_entropy(logits, torch.tensor([int(row) % 2 + 7 for row in rows]))  # type: ignore[attr-defined]

        return Trainer(built, plan.recipe, loss, 6, run, {"seed": plan.seed, "method": method})

    def stop(step: int, _: float) -> None:
        if step == 3:
            raise Stopped

    whole = trainer(tmp_path / "whole")
    whole.run(lambda *_: None)
    broken = trainer(tmp_path / "broken")
    with pytest.raises(Stopped):
        broken.run(stop)
    resumed = trainer(tmp_path / "broken")
    assert resumed.step == 2
    resumed.run(lambda *_: None)
    for key, tensor in whole.method.trainable.items():
        assert torch.equal(tensor, resumed.method.trainable[key]), key
    with pytest.raises(ValueError, match="another method"):
        Trainer(resumed.method, resumed.recipe, resumed.loss, 6, tmp_path / "broken", {"seed": 9876, "method": "other"})


def test_a_loss_that_is_no_number_ends_the_run(folder: Path, tmp_path: Path) -> None:
    base = MaskedModel.load(folder, device="cpu")
    method = build_method("prompt-tuning", paper_recipe("glue-sst2", "prompt-tuning"), base, 0)
    assert method.soft is not None
    z = method.soft.tensors["Z"]
    trainer = Trainer(method, paper_recipe("glue-sst2", "prompt-tuning"), lambda _: z.sum() * float("nan"), 4, tmp_path, {"seed": 0})
    with pytest.raises(TrainingError, match="the loss is nan at step 0"):
        trainer.run(lambda *_: None)


def test_training_without_training_data_is_an_error(folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a folder with training data"):
        evaluate_glue(plan_of("glue-sst2", "full", folder, data / "dev.tsv", tmp_path), Quiet())
    report = evaluate_glue(plan_of("glue-sst2", "none", folder, data / "dev.tsv", tmp_path), Quiet())
    assert (report["n"], report["trained_numbers"]) == (2, 0)
