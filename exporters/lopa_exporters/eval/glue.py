"""Six tasks of GLUE (Wang et al. 2019, arXiv:1804.07461) as cloze questions to a masked language model.

Templates and label words are those of the official LoPA repository (…-LOPA-NLU: utils/data_processors.py), which has them from
LM-BFF (Gao et al. 2021) and IDPG (Wu et al. 2022): the model fills one mask, and the most likely of the label words is its answer.
Data: GLUE's own folders (train.tsv, dev.tsv, dev_matched.tsv), or rows with the columns that Hugging Face gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopa_exporters.data import DataError
from lopa_exporters.eval.tables import ENDINGS, read_rows, text_of

MASK = "<mask>"


@dataclass(frozen=True)
class GlueTask:
    """columns: names of each text's column, GLUE's own and Hugging Face's. labels: label to (its number in Hugging Face's data, word);
    their order is that of class numbers here. metrics: the first one is the paper's figure.
    """

    name: str
    template: str
    columns: tuple[tuple[str, ...], ...]
    label_columns: tuple[str, ...]
    labels: Mapping[str, tuple[int, str]]
    metrics: tuple[str, ...] = ("accuracy",)

    @property
    def words(self) -> tuple[str, ...]:
        """Label words by class."""
        return tuple(word for _, word in self.labels.values())


@dataclass(frozen=True)
class Cloze:
    """A text with one MASK, and the class that is right."""

    text: str
    label: int


_PAIR = "{} ? <mask> , {}"
_YES_NO = {"0": (0, "No"), "1": (1, "Yes")}
_ENTAILED = {"entailment": (0, "Yes"), "not_entailment": (1, "No")}
_SENTENCES = (("sentence1", "#1 String"), ("sentence2", "#2 String"))
_THREE = {"contradiction": (2, "No"), "entailment": (0, "Yes"), "neutral": (1, "Maybe")}
_BOTH = ("mean", "accuracy", "f1")
TASKS = {
    task.name: task
    for task in (
        GlueTask("glue-sst2", "{} . It was <mask> .", (("sentence",),), ("label",), {"0": (0, "terrible"), "1": (1, "great")}),
        GlueTask("glue-mnli", _PAIR, (("sentence1", "premise"), ("sentence2", "hypothesis")), ("gold_label", "label"), _THREE),
        GlueTask("glue-mrpc", _PAIR, _SENTENCES, ("Quality", "label"), _YES_NO, _BOTH),
        GlueTask("glue-qnli", _PAIR, (("question",), ("sentence",)), ("label",), _ENTAILED),
        GlueTask("glue-qqp", "{} <mask> , {}", (("question1",), ("question2",)), ("is_duplicate", "label"), _YES_NO, _BOTH),
        GlueTask("glue-rte", _PAIR, _SENTENCES, ("label",), _ENTAILED),
    )
}


def read_clozes(task: GlueTask, path: Path) -> tuple[list[Cloze], int]:
    """Examples of a file, and how many rows were left out: QQP's own TSV has some without all fields, which the official code skips.

    Raises:
        DataError: a row without the texts or with another label; a test file, which has none.
    """
    clozes, skipped = [], 0
    for number, row in enumerate(read_rows(path), 1):
        where = f"{path}, row {number}"
        label = next((row[name] for name in task.label_columns if name in row), None)
        if label is None and path.suffix == ".tsv" and task.name == "glue-qqp":
            skipped += 1
            continue
        texts = [text_of(row, names, where) for names in task.columns]
        clozes.append(Cloze(task.template.format(*(text.replace(MASK, " ") for text in texts)), _label(task, label, where)))
    if not clozes:
        raise DataError(f"{path} has no whole row")
    return clozes, skipped


def _label(task: GlueTask, label: Any, where: str) -> int:
    """Class number of a label by name or by Hugging Face's number."""
    for number, (name, (theirs, _)) in enumerate(task.labels.items()):
        if label == name or (isinstance(label, int) and label == theirs) or str(label) == str(theirs):
            return number
    known = ", ".join(f"{name} ({theirs})" for name, (theirs, _) in task.labels.items())
    raise DataError(f"{where}: the label is {label!r}; known are {known}")


def find_files(data: Path, test: Path | None) -> tuple[Path | None, Path]:
    """Training and test file: of a folder in GLUE's or Hugging Face's layout, or as given; one file alone is the test.

    Raises:
        DataError: a folder without a development file.
    """
    if not data.is_dir():
        return (data, test) if test else (None, data)
    train = _first(data, "train")
    held = test or _first(data, "dev_matched", "validation_matched", "dev", "validation")
    if held is None:
        raise DataError(f"{data} has no dev, dev_matched or validation file ending in {', '.join(ENDINGS)}")
    return train, held


def _first(folder: Path, *stems: str) -> Path | None:
    """A file called STEM.ENDING or STEM-00000-of-00001.ENDING."""
    for stem in stems:
        found = [
            path for ending in ENDINGS for pattern in (f"{stem}{ending}", f"{stem}-*{ending}") for path in sorted(folder.glob(pattern))
        ]
        if len(found) > 1:
            raise DataError(f"{folder} has {', '.join(path.name for path in found)}; give one of them as file")
        if found:
            return found[0]
    return None
