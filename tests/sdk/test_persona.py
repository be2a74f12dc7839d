"""A user's folder against a real server: tuning improves, is guarded, is versioned, and belongs to one model and one bundle."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import lopa
import numpy as np
import pytest
from lopa.bundle import Bundle
from lopa.folder import PersonaStore
from lopa.manifest import FMSpec
from lopa.tensorfile import read_metadata
from lopa.tune_state import load_state
from lopa.tuning import TuneOptions

from tests.sdk.conftest import EXAMPLES, SETTINGS, variant

HELD_OUT = [lopa.Example(f"def other_{i}(a, b):\n    return ", "a + b\n") for i in range(3)]


def total_nll(scores: list[lopa.PairScore]) -> float:
    return sum(score.nll_sum for score in scores) / sum(score.target_tokens for score in scores)


@pytest.fixture(scope="module")
def tuned(address: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, lopa.TuneReport]:
    """A folder whose persona was tuned once."""
    folder = tmp_path_factory.mktemp("user") / "me"
    with lopa.connect(address, config=lopa.ClientConfig(cache=cache)) as client:
        report = client.personal(folder).tune(EXAMPLES, steps=30, batch_size=4, learning_rate=0.05, validation=HELD_OUT)
    return folder, report


def test_a_new_persona_has_the_bundles_starting_values(client: lopa.Client, bundle: Bundle, tmp_path: Path) -> None:
    persona = client.personal(tmp_path / "me")
    start = lopa.Factors.start(bundle)
    assert persona.version == 1 and persona.bundle_id == client.model.bundle_id
    assert persona.factors.tensors.keys() == start.tensors.keys()
    assert all(np.array_equal(persona.factors.tensors[name], start.tensors[name]) for name in start.tensors)
    assert persona.factor_bytes == persona.factors_path.stat().st_size < 32 << 10


def test_generate_sends_the_personal_soft_prompt(client: lopa.Client, tuned: tuple[Path, lopa.TuneReport]) -> None:
    persona = client.personal(tuned[0])
    prompt = "def f(a, b):\n"
    soft = persona.soft_prompts([prompt])[0]
    assert soft.shape == (4, 32)
    personal = persona.generate(prompt, max_tokens=8, ignore_end=True)
    assert personal.receipt is not None
    assert personal == client.generate(prompt, soft_prompt=soft, dtype="I8", max_tokens=8, ignore_end=True)
    exact = persona.generate(prompt, dtype="F32", max_tokens=8, ignore_end=True)
    assert exact == client.generate(prompt, soft_prompt=soft, max_tokens=8, ignore_end=True) and exact.receipt != personal.receipt
    stream = persona.stream(prompt, max_tokens=8, ignore_end=True)
    assert "".join(delta.text for delta in stream) == personal.text
    chat = persona.generate([lopa.Message("user", "hello")], max_tokens=2)
    assert chat.receipt is not None
    with pytest.raises(lopa.InvalidRequest, match="encoder_text"):
        persona.generate([5, 6, 7])
    assert persona.generate([5, 6, 7], encoder_text="abc", max_tokens=2).receipt is not None


def test_tuning_improves_and_reports(client: lopa.Client, tuned: tuple[Path, lopa.TuneReport], tmp_path: Path) -> None:
    folder, report = tuned
    assert report.kept and report.version == 2 and report.outcome == "finished"
    assert report.end_nll == report.best_nll < report.start_nll
    assert report.losses[-1] < report.losses[0] and len(report.losses) == len(report.gradient_norms) == report.steps == 30
    assert report.validation[0] == (0, report.start_nll) and report.validation[-1][0] == 30
    assert report.sent_bytes > 0 and report.received_bytes > 0 and report.seconds > 0 and report.resumed_from == 0
    persona, fresh = client.personal(folder), client.personal(tmp_path / "new")
    assert total_nll(persona.score(HELD_OUT)) == pytest.approx(report.end_nll, rel=1e-5)
    assert total_nll(fresh.score(HELD_OUT)) == pytest.approx(report.start_nll, rel=1e-5)
    assert total_nll(fresh.score(HELD_OUT, factors=persona.factors)) == pytest.approx(report.end_nll, rel=1e-5)
    assert report.factor_bytes == persona.factor_bytes and not persona.unfinished
    assert '"kept": true' in report.to_json()


def test_tuning_goes_on_from_the_current_version(client: lopa.Client, tmp_path: Path) -> None:
    persona = client.personal(tmp_path / "me")
    first = persona.tune(EXAMPLES, steps=6, batch_size=4, learning_rate=0.03, validation=HELD_OUT)
    second = persona.tune(EXAMPLES, steps=6, batch_size=4, learning_rate=0.03, validation=HELD_OUT)
    assert second.start_nll == pytest.approx(first.end_nll, rel=1e-5)
    again = persona.tune(EXAMPLES, steps=2, batch_size=4, learning_rate=1e-6, validation=HELD_OUT, fresh=True)
    assert not again.kept and again.validation[0][1] == pytest.approx(first.start_nll, rel=1e-5)


def test_the_guard_keeps_what_was_better(client: lopa.Client, tmp_path: Path) -> None:
    """Validation examples that contradict the training: no step can be better on them."""
    persona = client.personal(tmp_path / "me")
    before = persona.factors_path.read_bytes()
    prompt = "def f(a, b):\n    return "
    good = [lopa.Example(prompt, "a + b\n")] * 2
    persona.tune(good, validation=good, steps=20, learning_rate=0.05)
    best = persona.factors_path.read_bytes()
    assert best != before
    report = persona.tune([lopa.Example(prompt, "zz zz\n")] * 2, validation=good, steps=8, validate_every=2, learning_rate=0.05)
    assert not report.kept and report.best_step == 0 and report.end_nll == report.start_nll
    assert persona.factors_path.read_bytes() == best and persona.version == 2


def test_divergence_ends_the_run_and_keeps_the_best(client: lopa.Client, tmp_path: Path) -> None:
    persona = client.personal(tmp_path / "me")
    report = persona.tune(EXAMPLES, steps=20, learning_rate=1e4, clip=1e9, validate_every=1, schedule="constant")
    assert report.outcome == "diverged" and report.steps < 20
    assert report.end_nll <= report.start_nll and persona.factors.finite and not persona.unfinished


@pytest.mark.parametrize("wire", [("F16", "F16"), ("BF16", "BF16"), ("I8", "I8")])
def test_smaller_dtypes_on_the_wire_tune_too(client: lopa.Client, tmp_path: Path, wire: tuple[str, str]) -> None:
    persona = client.personal(tmp_path / "me")
    options: TuneOptions = {"steps": 10, "batch_size": 5, "learning_rate": 0.02, "validate_every": 2}
    exact: TuneOptions = {"dtype": "F32", "gradient_dtype": "F32"}
    full = client.personal(tmp_path / "me", "full").tune(EXAMPLES, validation=EXAMPLES, **exact, **options)
    small = persona.tune(EXAMPLES, validation=EXAMPLES, dtype=wire[0], gradient_dtype=wire[1], **options)  # type: ignore[arg-type]
    assert small.sent_bytes < full.sent_bytes and small.received_bytes < full.received_bytes
    assert small.end_nll < small.start_nll


def test_history_and_rollback(client: lopa.Client, tuned: tuple[Path, lopa.TuneReport]) -> None:
    persona = client.personal(tuned[0])
    assert [version.origin for version in persona.history()] == ["start", "tune"]
    newest = persona.factors
    persona.rollback(1)
    assert persona.version == 1 and total_nll(persona.score(HELD_OUT)) == pytest.approx(tuned[1].start_nll, rel=1e-5)
    with pytest.raises(lopa.FolderError, match="no version 9; it has 1, 2"):
        persona.rollback(9)
    persona.rollback(2)
    assert all(np.array_equal(persona.factors.tensors[name], newest.tensors[name]) for name in newest.tensors)


def test_offline(tuned: tuple[Path, lopa.TuneReport], cache: Path, tmp_path: Path) -> None:
    persona = lopa.open_personal(tuned[0], cache=cache)
    assert persona.version == 2 and persona.factors.count > 0
    assert persona.soft_prompts(["def f("]).shape == (1, 4, 32)
    with pytest.raises(lopa.Unavailable, match="offline"):
        persona.generate("x")
    elsewhere = lopa.open_personal(tuned[0], cache=tmp_path)
    assert elsewhere.factors.tensors.keys() == persona.factors.tensors.keys()
    with pytest.raises(lopa.BundleError, match="not on this device"):
        elsewhere.soft_prompts(["def f("])


def test_personas_are_apart(client: lopa.Client, tuned: tuple[Path, lopa.TuneReport]) -> None:
    client.personal(tuned[0], "filing")
    assert lopa.personas(tuned[0]) == ["default", "filing"]
    assert client.personal(tuned[0], "filing").version == 1 and client.personal(tuned[0]).version == 2
    for name in ("", "../x", "a/b", "x" * 65):
        with pytest.raises(lopa.FolderError, match="persona name"):
            client.personal(tuned[0], name)


def test_foreign_bundle_and_foreign_model_are_refused(
    client: lopa.Client, bundle: Bundle, tuned: tuple[Path, lopa.TuneReport], tmp_path: Path
) -> None:
    other = variant(bundle, tmp_path / "other", tuning=dataclasses.replace(bundle.manifest.tuning, steps=7))
    with pytest.raises(lopa.FingerprintMismatch, match="belongs to bundle"):
        client.personal(tuned[0], bundle=other)
    mine = client.personal(tmp_path / "mine", bundle=other)
    with pytest.raises(lopa.FingerprintMismatch, match="these factors belong to bundle"):
        mine.score(HELD_OUT, factors=client.personal(tuned[0]).factors)
    with pytest.raises(lopa.FingerprintMismatch, match="which is not here"):
        client.personal(tmp_path / "mine")
    foreign = variant(bundle, tmp_path / "foreign", fm=FMSpec("another", "ab" * 32, 32))
    with pytest.raises(lopa.FingerprintMismatch, match="was made for another"):
        client.personal(tmp_path / "nobody", bundle=foreign)
    assert not (tmp_path / "nobody").exists()
    PersonaStore(tmp_path / "moved", "default").create(foreign)
    with pytest.raises(lopa.FingerprintMismatch, match="was tuned for another"):
        client.personal(tmp_path / "moved")


@pytest.mark.parametrize(
    ("examples", "options", "words"),
    [
        (EXAMPLES[:1], {}, "at least 2"),
        (EXAMPLES, {"validation": 1.5}, "share"),
        (EXAMPLES, {"validation": []}, "at least one of each"),
        (EXAMPLES, {"steps": 0}, "steps"),
        (EXAMPLES, {"learning_rate": float("nan")}, "learning_rate"),
        (["text"], {}, "example 0"),
        ([], {}, "0 examples"),
        ([("x", "y" * 3000)] * 3, {}, "shorten it or leave it out"),
    ],
)
def test_what_cannot_be_tuned_on_is_said(
    client: lopa.Client, tmp_path: Path, examples: object, options: dict[str, object], words: str
) -> None:
    persona = client.personal(tmp_path / "me")
    with pytest.raises(lopa.TuningError, match=words):
        persona.tune(examples, **options)  # type: ignore[arg-type]
    assert persona.version == 1 and not persona.unfinished


def test_what_was_measured_is_what_is_kept(client: lopa.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle may call tensors aligned that change soft prompts: the guard keeps the start that it measured, not what became of it."""
    start, store = client.personal(tmp_path / "me").factors, PersonaStore(tmp_path / "me", "default")
    worse = dataclasses.replace(start, tensors={name: value + np.float32(0.5) for name, value in start.tensors.items()})
    with store.lock():
        store.append(worse, validation_nll=9.0)
    monkeypatch.setattr("lopa.tuner.aligned", lambda *_: worse)
    report = client.personal(tmp_path / "me").tune(EXAMPLES, **{**SETTINGS, "validate_every": 2}, fresh=True, max_steps=1)
    assert report.best_step == 0 and report.best_nll < report.start_nll
    digest = read_metadata(store.tuning_path.read_bytes())["digest"]
    state = load_state(store, digest, start.specs, SETTINGS["steps"])
    assert state is not None
    assert all(np.array_equal(state.best[name], value) for name, value in start.tensors.items())
    assert all(np.abs(state.personal[name] - value).max() < 0.1 for name, value in worse.tensors.items())


@pytest.mark.parametrize(
    ("prompt", "shown"), [(np.array([10**9, 5]), "[1000000000          5]"), ("", ""), ([], "")], ids=["array", "text", "list"]
)
def test_a_refused_example_is_shown_whatever_its_prompt_is(client: lopa.Client, tmp_path: Path, prompt: Any, shown: str) -> None:
    with pytest.raises(lopa.TuningError, match=re.escape(f"refuses the example {shown!r}: pairs[0].prompt")):
        client.personal(tmp_path / "me").tune([lopa.Example(prompt, "t", encoder_text="x")] * 2, steps=1)
