"""Splits, orders, schedules and settings: pure functions of what they are given."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import lopa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lopa.bundle import Bundle
from lopa.examples import as_examples, batch, digest, permutation, split, text_for_encoder
from lopa.sources import read_examples, read_jsonl, text_examples
from lopa.tuning import TuneConfig, TuneOptions
from lopa.values import SamplingOptions

BASE = TuneConfig(steps=10, batch_size=4, learning_rate=0.1, weight_decay=0.0, clip=1.0)
MANY = [lopa.Example(f"p{i}", f"t{i}") for i in range(25)]


def test_orders_are_fixed_for_ever() -> None:
    """A run that one version began must go on in the next: these orders may never change."""
    assert permutation(6, "epoch", 0, 0) == (0, 5, 1, 2, 3, 4)
    assert permutation(6, "epoch", 0, 1) == (4, 2, 0, 1, 5, 3)
    assert permutation(6, "split", 7) == (3, 5, 2, 0, 1, 4)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5))
def test_every_example_comes_once_an_epoch(count: int, size: int, seed: int) -> None:
    size = min(size, count)
    steps = -(-2 * count // size)
    seen = [index for step in range(1, steps + 1) for index in batch(count, size, step, seed)]
    assert sorted(seen[:count]) == sorted(seen[count : 2 * count]) == list(range(count))


@given(st.integers(2, 40), st.floats(0.01, 0.99), st.integers(0, 9))
def test_a_split_loses_nothing_and_leaves_both_sides_something(count: int, share: float, seed: int) -> None:
    items = [lopa.Example(str(i), "t") for i in range(count)]
    training, validation = split(items, share, seed)
    assert training and validation and (training, validation) == split(items, share, seed)
    assert sorted(example.prompt for example in training + validation) == sorted(example.prompt for example in items)


def test_a_fifth_is_held_back_by_default() -> None:
    training, validation = split(MANY, None, 0)
    assert (len(training), len(validation)) == (20, 5)
    assert split(MANY, None, 1) != (training, validation)
    assert split(MANY[:3], [("a", "b")], 0) == (MANY[:3], [lopa.Example("a", "b")])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in ("prompt", "target") for value in (None, 5, b"text", [1.5], [[1]], ["1"], {"role": "user"})),
        ("target", [lopa.Message("user", "a")]),
        *(("prefix", value) for value in (5, b"text", [None])),
        *(("encoder_text", value) for value in (5, [1])),
    ],
    ids=str,
)
def test_an_example_of_another_type_is_named(field: str, value: Any) -> None:
    """Before anything is done with it: one among many may be looked at first when its turn comes."""
    with pytest.raises(lopa.TuningError, match=f"example 25: its {field} is "):
        as_examples([*MANY, lopa.Example(**{"prompt": "p", "target": "t", field: value})])


@pytest.mark.parametrize("items", [5, None, Path("examples.jsonl"), 0.5], ids=str)
def test_what_holds_no_examples_is_named(items: Any) -> None:
    with pytest.raises(lopa.TuningError, match="a list of them is needed"):
        as_examples(items)


def test_token_ids_are_examples_in_any_list() -> None:
    items = [lopa.Example(ids, ids, prefix=ids, encoder_text="x") for ids in ([1, 2], (1, 2), np.array([1, 2]), range(1, 3))]
    assert as_examples(items) == items


def test_schedules() -> None:
    linear = [BASE.rate(step) for step in range(1, 11)]
    assert linear == pytest.approx([0.1 * (1 - i / 10) for i in range(10)])
    cosine = [dataclasses.replace(BASE, schedule="cosine").rate(step) for step in (1, 6)]
    assert cosine == pytest.approx([0.1, 0.05])
    assert {dataclasses.replace(BASE, schedule="constant").rate(step) for step in range(1, 11)} == {0.1}


def test_settings_come_from_the_bundle_unless_given(bundle: Bundle) -> None:
    config = TuneConfig.for_bundle(bundle.manifest, steps=3)
    assert config.steps == 3 and config.batch_size == bundle.manifest.tuning.batch_size
    assert set(TuneOptions.__annotations__) == {field.name for field in dataclasses.fields(TuneConfig)}
    assert set(SamplingOptions.__annotations__) == {field.name for field in dataclasses.fields(lopa.Sampling)}


def test_what_a_run_is_depends_on_everything_but_patience() -> None:
    assert dataclasses.replace(BASE, patience=1.0).identity() == BASE.identity()
    for name, value in {"steps": 11, "seed": 1, "dtype": "F16", "microbatch": 2, "fresh": True, "clip": 2.0}.items():
        assert dataclasses.replace(BASE, **{name: value}).identity() != BASE.identity()  # type: ignore[arg-type]
    variants = [
        lopa.Example("p", "t"),
        lopa.Example("p", "t", append_end=True),
        lopa.Example("p", "t", prefix="x"),
        lopa.Example("p", "t", encoder_text="x"),
        lopa.Example([1, 2], "t", encoder_text="x"),
        lopa.Example([lopa.Message("user", "p")], "t"),
        lopa.Example("pt", ""),
    ]
    assert len({digest([one]) for one in variants}) == len(variants)
    assert digest(variants) != digest(variants[::-1])


@pytest.mark.parametrize(
    "name", ["steps", "batch_size", "learning_rate", "weight_decay", "clip", "schedule", "validate_every", "microbatch", "patience"]
)
def test_settings_out_of_range_are_named(name: str) -> None:
    with pytest.raises(lopa.TuningError, match=name):
        dataclasses.replace(BASE, **{name: "never" if name == "schedule" else -1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 1.5), ("seed", 0.5), ("batch_size", "4"), ("validate_every", True), ("max_steps", 2.0)]
)
def test_settings_that_count_are_whole_numbers(bundle: Bundle, name: str, value: object) -> None:
    with pytest.raises(lopa.TuningError, match=f"{name} is .* not a whole number"):
        lopa.TuneConfig.for_bundle(bundle.manifest, **{name: value})  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", "x"), ("clip", None), ("max_seconds", "1"), ("patience", True), ("steps", None)]
)
def test_settings_that_measure_are_numbers(bundle: Bundle, name: str, value: object) -> None:
    with pytest.raises(lopa.TuningError, match=f"{name} is .* not a"):
        lopa.TuneConfig.for_bundle(bundle.manifest, **{name: value})  # type: ignore[misc]


def test_what_the_encoder_reads() -> None:
    assert text_for_encoder("text", None) == "text" and text_for_encoder([1], "given") == "given"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert text_for_encoder(turns, None) == "user: a\nassistant: b"
    assert text_for_encoder([lopa.Message(**turn) for turn in turns], None) == "user: a\nassistant: b"


def test_examples_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    rows = [{"prompt": "a\u2028b", "target": "c"}, {"prompt": [1, 2], "target": [3], "append_end": True, "encoder_text": "x"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert read_jsonl(path) == [lopa.Example("a\u2028b", "c"), lopa.Example([1, 2], [3], append_end=True, encoder_text="x")]


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "target": "b"}\n')
    assert read_examples(path) == [lopa.Example("a", "b")]


def test_conversations(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    wanted = lopa.Example([lopa.Message("user", "hi")], "hello", append_end=True)
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    assert as_examples([turns, [lopa.Message(**turn) for turn in turns], path]) == [wanted] * 3
    for bad in ([], turns[:1], turns[::-1], [{"role": "user"}, turns[1]], [*turns, 5]):
        with pytest.raises(lopa.TuningError, match="not a conversation"):
            as_examples([bad])  # type: ignore[list-item]


@given(st.text(st.characters(codec="utf-8"), max_size=400), st.integers(1, 60), st.integers(1, 60))
def test_plain_text_is_cut_without_loss(text: str, prompt: int, target: int) -> None:
    try:
        examples = text_examples(text, prompt_characters=prompt, target_characters=target)
    except lopa.TuningError:
        assert len(text) <= target or len(text.strip()) <= target
        return
    for example in examples:
        assert 0 < len(str(example.prompt)) <= prompt and 0 < len(str(example.target)) <= target
        assert f"{example.prompt}{example.target}" in text


def test_what_no_file_can_teach(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 200)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "short.md").write_text("hello\n")
    assert read_examples(tmp_path / "empty.jsonl") == []
    for name, words in {"latin.txt": "not UTF-8", "short.md": "too short", "nothing.txt": "No such file"}.items():
        with pytest.raises(lopa.TuningError, match=words) as caught:
            read_examples(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[]", "one object"),
        ('{"prompt": "a"}', "one object"),
        ('{"prompt": "a", "target": "b", "weight": 2}', "are the fields known"),
        ('{"prompt": 5, "target": "b"}', "prompt is of type int"),
        ('{"prompt": "a", "target": "b", "append_end": "yes"}', "append_end is of type str"),
    ],
)
def test_a_bad_line_is_told_with_its_place(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"prompt": "a", "target": "b"}\n' + line + "\n")
    with pytest.raises(lopa.TuningError, match=words) as caught:
        read_jsonl(path)
    assert f"{path}:2:" in str(caught.value)
