"""GLUE: train a method on the training split, answer the development split, score."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lopa_exporters.data import Indices
from lopa_exporters.eval.glue import TASKS, Cloze, find_files, read_clozes
from lopa_exporters.eval.masked import MaskedModel, TokenCloze
from lopa_exporters.eval.methods import Features, Method, build_method
from lopa_exporters.eval.metrics import Labels, score_labels
from lopa_exporters.eval.plan import PREDICTIONS, EvalPlan, claim, write_report
from lopa_exporters.eval.training import Trainer
from lopa_exporters.pipeline import Reporter


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples as model and encoder read them. labels: (n,) int64 class numbers."""

    tokens: Sequence[TokenCloze]
    features: Features | None
    labels: Labels


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A method over a masked model that answers with one of `words`, token ids by class."""

    base: MaskedModel
    method: Method
    words: Tensor
    batch: int
    max_tokens: int

    def split(self, clozes: Sequence[Cloze]) -> Split:
        """Tokenize and encode, once. The encoder reads the question as the model does, mask included."""
        texts = [cloze.text for cloze in clozes]
        features = self.method.soft.features(texts) if self.method.soft else None
        return Split(self.base.tokenize(texts, self.max_tokens), features, np.array([cloze.label for cloze in clozes], np.int64))

    def logits(self, split: Split, rows: Sequence[int] | Indices, *, train: bool = False) -> Tensor:
        """(b, v) at the masks of these examples."""
        soft = self.method.soft(split.features, rows, train=train) if self.method.soft and split.features else None
        return self.base.logits(soft, [split.tokens[row] for row in rows])

    def loss(self, split: Split, rows: Indices) -> Tensor:
        """Mean cross-entropy of the label words over the whole vocabulary."""
        wanted = self.words[torch.from_numpy(split.labels[rows]).to(self.words.device)]
        return functional.cross_entropy(self.logits(split, rows, train=True), wanted)

    @torch.no_grad()
    def predict(self, split: Split) -> Labels:
        """The class whose word is most likely, (n,); what other words are likely does not matter."""
        self.method.train(False)
        found = []
        for start in range(0, len(split.labels), self.batch):
            logits = self.logits(split, range(start, min(start + self.batch, len(split.labels))))
            found.append(logits[:, self.words].argmax(dim=-1).cpu().numpy())
        return np.concatenate(found).astype(np.int64)


def evaluate_glue(plan: EvalPlan, reporter: Reporter) -> dict[str, Any]:
    """Run a plan to its report.

    Raises:
        ValueError: data, model, recipe or run folder that do not fit. OSError: a file cannot be read.
    """
    task = TASKS[plan.task]
    train_file, test_file = find_files(plan.data, plan.test)
    if plan.method != "none" and train_file is None:
        raise ValueError(f"method {plan.method} is trained: give a folder with training data, or two files with --data and --test")
    files = [path for path in (train_file if plan.method != "none" else None, test_file) if path is not None]
    read = {path: read_clozes(task, path) for path in files}
    identity = plan.identity(files)
    claim(plan.run, identity)

    base = MaskedModel.load(plan.fm, device=plan.device)
    method = build_method(plan.method, plan.recipe, base, plan.seed)
    base = dataclasses.replace(base, model=method.model, bf16=plan.bf16)
    rows = method.soft.config.soft_prompt_rows if method.soft else 0
    words = torch.tensor(base.word_ids(task.words), device=base.device)
    classifier = Classifier(base, method, words, plan.batch, min(plan.recipe.max_tokens, base.context - rows))
    test = classifier.split(plan.limited(read[test_file][0]))
    trained = {}
    if train_file is not None and method.trainable:
        trained = _train(plan, classifier, plan.limited(read[train_file][0]), test, identity, reporter)
    predicted = classifier.predict(test)
    with (plan.run / PREDICTIONS).open("w", encoding="utf-8") as file:
        for i, (label, given) in enumerate(zip(test.labels.tolist(), predicted.tolist(), strict=True)):
            file.write(json.dumps({"row": i, "label": task.words[label], "predicted": task.words[given]}) + "\n")
    found = {
        "n": len(test.labels),
        "skipped_rows": sum(skipped for _, skipped in read.values()),
        "trained_numbers": method.count(),
        **trained,
    }
    return write_report(plan, identity, score_labels(task.metrics, predicted, test.labels), found)


def _train(
    plan: EvalPlan, classifier: Classifier, clozes: Sequence[Cloze], test: Split, identity: dict[str, Any], reporter: Reporter
) -> dict[str, Any]:
    """Train to the end; what the report says about it."""
    split = classifier.split(clozes)
    metrics = TASKS[plan.task].metrics

    def score(_: int) -> Mapping[str, float]:
        return {figure.name: figure.value for figure in score_labels(metrics, classifier.predict(test), test.labels)}

    trainer = Trainer(classifier.method, plan.recipe, lambda rows: classifier.loss(split, rows), len(clozes), plan.run, identity)
    with reporter.task("Training", trainer.steps) as done:
        done(trainer.step, "")
        trainer.run(lambda _, value: done(1, f"loss {value:.3f}"), score if plan.each_epoch else None)
    found: dict[str, Any] = {"n_train": len(clozes), "steps": trainer.steps, "training_seconds": round(trainer.seconds, 1)}
    if plan.each_epoch:
        epochs = trainer.epochs()
        found["epochs"] = epochs
        found["best_epoch"] = {
            **max(epochs, key=lambda row: row[metrics[0]]),
            "note": "selected on the test examples, as the official code does",
        }
    return found
