"""Data and models for tests of `lopa eval`: made by hand in the data sets' own forms, and small enough to train in a moment."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lopa_exporters.eval.plan import EvalPlan
from lopa_exporters.eval.recipes import paper_recipe

from tests.tiny import build_tiny_fm

NAMES = ("add", "double", "head", "size")
BODIES = ("a + b", "a * 2", "a[0]", "len(a)")
ARGUMENTS = ("a, b", "a", "a", "a")
ASSERTS = ("candidate(1, 2) == 3", "candidate('x') == 'xx'", "candidate([7, 8]) == 7", "candidate('abc') == 3")
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
TEXTS = (("a great and moving film", "1"), ("a terrible and dull film", "0"))


class Quiet:
    """A reporter that remembers what was worked on: (title, units done)."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}

    def task(self, title: str, total: int | None) -> Any:
        import contextlib

        del total

        @contextlib.contextmanager
        def counting() -> Any:
            def add(count: int, _: str) -> None:
                self.done[title] = self.done.get(title, 0) + count

            yield add

        return counting()


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_mbpp(path: Path) -> Path:
    """Four problems in the MBXP form."""
    return write_lines(
        path,
        (
            {
                "task_id": f"MBPP/{i}",
                "prompt": f'\n\ndef {name}({arguments}):\n    """\n    Write {name}.\n    """\n',
                "canonical_solution": f"    return {body}\n",
                "entry_point": name,
                "test": f"\n\nMETADATA = {{}}\n\n\ndef check(candidate):\n    assert {asserted}\n",
            }
            for i, (name, arguments, body, asserted) in enumerate(zip(NAMES, ARGUMENTS, BODIES, ASSERTS, strict=True))
        ),
    )


def write_cruxeval(path: Path) -> Path:
    """Four functions in CruxEval's form."""
    rows = (
        ("return s + 'a'", "'x'", "'xa'"),
        ("return s * 2", "[1]", "[1, 1]"),
        ("return {s: 1}", "2", "{2: 1}"),
        ("return s[::-1]", "'ab'", "'ba'"),
    )
    return write_lines(
        path,
        (
            {"id": f"sample_{i}", "code": f"def f(s):\n    {body}", "input": given, "output": out}
            for i, (body, given, out) in enumerate(rows)
        ),
    )


def write_sst2(folder: Path) -> Path:
    """GLUE's own layout, eight sentences for training and two for the test."""
    folder.mkdir()
    for name, copies in (("train", 4), ("dev", 1)):
        rows = "".join(f"{text}\t{label}\n" for text, label in TEXTS * copies)
        (folder / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}", encoding="utf-8")
    return folder


def build_masked(folder: Path, positions: int = 64) -> Path:
    """A random RoBERTa of two layers, d 32, whose tokenizer has the label words as single tokens, with a space before."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(
        [f"a {word} film . It was {word} ." for word in ("great", "terrible", "Yes", "No", "Maybe")] * 20, trainer
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token=AddedToken("<mask>", lstrip=True, special=True), **names
    ).save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=positions + 2,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def build_causal(folder: Path) -> Path:
    """A random Llama, d 32, context 512."""
    return build_tiny_fm(folder)


def plan_of(task: str, method: str, fm: Path, data: Path, run: Path, **changes: Any) -> EvalPlan:
    """The paper's recipe with changes: those that the plan has go to it, the others to the recipe."""
    import dataclasses

    own = {name: changes.pop(name) for name in list(changes) if name in EvalPlan.__dataclass_fields__ and name != "batch"}
    recipe = dataclasses.replace(paper_recipe(task, method), **changes)
    return EvalPlan(task, method, fm, data, run, recipe, device="cpu", allow_code_execution=True, **own)
