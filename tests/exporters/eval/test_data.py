"""Files in every form that the data sets come in, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lopa_exporters.data import DataError
from lopa_exporters.eval import cruxeval, mbpp
from lopa_exporters.eval.glue import TASKS, find_files, read_clozes

from tests.exporters.eval.samples import write_cruxeval, write_lines, write_mbpp

OWN_ROWS = {
    "glue-sst2": "sentence\tlabel\nit is fun\t1\n",
    "glue-mnli": "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n0\tx\tOne.\tTwo.\tneutral\tentailment\n",
    "glue-mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tOne.\tTwo.\n",
    "glue-qnli": 'index\tquestion\tsentence\tlabel\n0\tOne "quoted.\tTwo.\tentailment\n',
    "glue-qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tOne\tTwo\t1\n3\t4\t5\tcut off\n",
    "glue-rte": "index\tsentence1\tsentence2\tlabel\n0\tOne.\tTwo.\tentailment\n",
}
THEIR_ROWS: dict[str, dict[str, Any]] = {
    "glue-sst2": {"sentence": "it is fun", "label": 1},
    "glue-mnli": {"premise": "One.", "hypothesis": "Two.", "label": 0},
    "glue-mrpc": {"sentence1": "One.", "sentence2": "Two.", "label": 1},
    "glue-qnli": {"question": 'One "quoted.', "sentence": "Two.", "label": 0},
    "glue-qqp": {"question1": "One", "question2": "Two", "label": 1},
    "glue-rte": {"sentence1": "One.", "sentence2": "Two.", "label": 0},
}


@pytest.mark.parametrize("name", TASKS)
def test_glues_own_rows_and_hugging_faces_are_the_same_question(name: str, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    task = TASKS[name]
    (tmp_path / "dev.tsv").write_text(OWN_ROWS[name], encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist([{**THEIR_ROWS[name], "idx": 0}]), tmp_path / "x.parquet")
    write_lines(tmp_path / "x.jsonl", [THEIR_ROWS[name]])
    own, skipped = read_clozes(task, tmp_path / "dev.tsv")
    assert read_clozes(task, tmp_path / "x.parquet") == (own, 0)
    assert read_clozes(task, tmp_path / "x.jsonl") == (own, 0)
    assert skipped == (name == "glue-qqp")
    assert task.words[own[0].label] == ("great" if name == "glue-sst2" else "Yes")
    assert own[0].text.count("<mask>") == 1


def test_questions_read_as_the_official_ones() -> None:
    """Texts of the official repository's processors, filled by hand."""
    texts = {name: TASKS[name].template.format("One.", "Two.") for name in TASKS}
    assert texts["glue-sst2"] == "One. . It was <mask> ."
    assert texts["glue-qqp"] == "One. <mask> , Two."
    assert {texts[name] for name in ("glue-mnli", "glue-mrpc", "glue-qnli", "glue-rte")} == {"One. ? <mask> , Two."}


def test_a_mask_in_a_text_is_no_question(tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", [{"sentence": "say <mask> twice", "label": 0}])
    assert read_clozes(TASKS["glue-sst2"], tmp_path / "x.jsonl")[0][0].text == "say   twice . It was <mask> ."


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"sentence": "x", "label": -1}, "the label is -1"),
        ({"sentence": "x"}, "the label is None"),
        ({"label": 1}, "has no sentence"),
        ({"sentence": 3, "label": 1}, "sentence is int, not text"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(row: dict[str, Any], told: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", [{"sentence": "x", "label": 0}, row])
    with pytest.raises(DataError, match=f"row 2.*{told}"):
        read_clozes(TASKS["glue-sst2"], tmp_path / "x.jsonl")


def test_folders_of_both_layouts_are_found(tmp_path: Path) -> None:
    own, theirs = tmp_path / "MNLI", tmp_path / "mnli"
    for folder, names in (
        (own, ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv")),
        (theirs, ("train-00000-of-00001.parquet", "validation_matched-00000-of-00001.parquet")),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    assert find_files(own, None) == (own / "train.tsv", own / "dev_matched.tsv")
    assert find_files(theirs, None)[1].name.startswith("validation_matched")
    assert find_files(own / "train.tsv", None) == (None, own / "train.tsv")
    assert find_files(own / "train.tsv", own / "x.tsv") == (own / "train.tsv", own / "x.tsv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no dev"):
        find_files(tmp_path / "empty", None)


def test_code_files_are_read_strictly(tmp_path: Path) -> None:
    problems = mbpp.read(write_mbpp(tmp_path / "m.jsonl"))
    assert [problem.id for problem in problems] == [f"MBPP/{i}" for i in range(4)]
    assert len(cruxeval.INPUT.read(write_cruxeval(tmp_path / "c.jsonl"))) == 4
    line = (tmp_path / "m.jsonl").read_text().splitlines()[0]
    for text, told in (
        ("{", "line 1"),
        ("[]", "no object"),
        (f"{line}\n{line}", "MBPP/0 twice"),
        ("", "no rows"),
        ("{}", "row 1 has no task_id"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(DataError, match=told):
            mbpp.read(tmp_path / "bad.jsonl")
    (tmp_path / "m.txt").touch()
    with pytest.raises(DataError, match=r"ends in \.txt"):
        mbpp.read(tmp_path / "m.txt")
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(DataError, match="not a Parquet file"):
        mbpp.read(tmp_path / "x.parquet")
