"""A tuning run in the app's hands: paused, cancelled, bounded in steps, time and bytes, ended early, and reported."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from pathlib import Path

import lopa
import pytest
from lopa.tuning import TuneOptions

from tests.sdk.conftest import EXAMPLES, SETTINGS


@pytest.fixture(scope="module")
def unbroken(address: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, lopa.TuneReport]:
    """Factors and report of a run that nothing happened to."""
    with lopa.connect(address, config=lopa.ClientConfig(cache=cache)) as client:
        persona = client.personal(tmp_path_factory.mktemp("unbroken"))
        report = persona.tune(EXAMPLES, **SETTINGS)
        return persona.factors_path.read_bytes(), report


def test_cancelled_ten_times_it_ends_as_if_never_stopped(
    client: lopa.Client, tmp_path: Path, unbroken: tuple[bytes, lopa.TuneReport]
) -> None:
    persona = client.personal(tmp_path)
    for step in range(1, 11):
        control = lopa.TuneControl()
        report = persona.tune(EXAMPLES, control=control, on_step=lambda _, c=control: c.cancel(), **SETTINGS)
        assert (report.outcome, report.steps, report.kept, report.resumable) == ("cancelled", step, False, True)
        assert persona.version == 1 and persona.unfinished
    report = persona.tune(EXAMPLES, **SETTINGS)
    assert report.outcome == "finished" and not report.resumable and report.losses == unbroken[1].losses
    assert report.end_nll == pytest.approx(unbroken[1].end_nll, abs=1e-6)
    assert persona.factors_path.read_bytes() == unbroken[0]


def test_pause_and_resume_from_another_thread(client: lopa.Client, tmp_path: Path, unbroken: tuple[bytes, lopa.TuneReport]) -> None:
    control, paused = lopa.TuneControl(), threading.Event()
    seen: list[tuple[int, str]] = []

    def watch(now: lopa.TuneProgress) -> None:
        seen.append((now.step, now.waiting))
        if now.step == 3 and not now.waiting:
            control.pause()
        if now.waiting:
            paused.set()

    def resume() -> None:
        assert paused.wait(240) and control.paused
        control.resume()

    helper = threading.Thread(target=resume)
    helper.start()
    persona = client.personal(tmp_path)
    persona.tune(EXAMPLES, control=control, on_step=watch, **SETTINGS)
    helper.join()
    assert (4, "paused") in seen and not control.paused, "a step is told while the next one is under way, which is finished"
    assert persona.factors_path.read_bytes() == unbroken[0]


def test_cancel_ends_a_pause_and_a_call_under_way(client: lopa.Client, tmp_path: Path) -> None:
    """Cancelled before anything was measured there is no report; a cancelled control refuses the next run too."""
    persona, control = client.personal(tmp_path), lopa.TuneControl()
    control.cancel()
    with pytest.raises(lopa.Cancelled):
        persona.tune(EXAMPLES, control=control, **SETTINGS)
    paused = lopa.TuneControl()

    def watch(now: lopa.TuneProgress) -> None:
        paused.pause()
        if now.waiting:
            threading.Thread(target=paused.cancel).start()

    assert persona.tune(EXAMPLES, control=paused, on_step=watch, **SETTINGS).outcome == "cancelled"
    assert persona.unfinished
    persona.discard_unfinished()
    assert not persona.unfinished and persona.tune(EXAMPLES, **SETTINGS).resumed_from == 0


@pytest.mark.parametrize("budget", [{"max_steps": 5}, {"max_bytes": 8_000}, {"max_seconds": 1e-6}])
def test_a_budget_ends_the_call_and_the_next_one_goes_on(
    client: lopa.Client, tmp_path: Path, unbroken: tuple[bytes, lopa.TuneReport], budget: TuneOptions
) -> None:
    persona, (name, limit) = client.personal(tmp_path), next(iter(budget.items()))
    before = client.traffic
    report = persona.tune(EXAMPLES, **{**SETTINGS, **budget})
    used = client.traffic - before
    assert report.outcome == name and report.resumable and report.steps < SETTINGS["steps"] and persona.version == 1
    if name == "max_steps":
        assert report.steps == limit
    if name == "max_bytes":
        assert report.steps > 0 and used.sent_bytes + used.received_bytes <= 8_000
    report = persona.tune(EXAMPLES, **SETTINGS)
    assert report.outcome == "finished" and persona.factors_path.read_bytes() == unbroken[0]


def test_a_budget_that_no_step_fits_in_is_told(client: lopa.Client, tmp_path: Path) -> None:
    with pytest.raises(lopa.TuningError, match="max_bytes is 1000, and the next step alone may bring"):
        client.personal(tmp_path).tune(EXAMPLES, **SETTINGS, max_bytes=1000)


def test_early_stopping_keeps_the_best(client: lopa.Client, tmp_path: Path) -> None:
    """Validation that contradicts the training: no measurement is better, and the third in a row ends it."""
    prompt = "def f(a, b):\n    return "
    persona = client.personal(tmp_path)
    report = persona.tune(
        [lopa.Example(prompt, "zz zz\n")] * 2,
        validation=[lopa.Example(prompt, "a + b\n")],
        steps=40,
        validate_every=2,
        learning_rate=0.05,
        early_stopping=3,
    )
    assert (report.outcome, report.steps, report.kept) == ("early_stopped", 6, False)
    assert not persona.unfinished and persona.version == 1


def test_better_than_before_is_not_enough_if_the_plain_model_is_better(client: lopa.Client, tmp_path: Path) -> None:
    """Factors of another job are a bad start here: a small step improves them, but no soft prompt at all would be better still."""
    persona = client.personal(tmp_path)
    prompt = "def f(a, b):\n    return "
    other, own = ([lopa.Example(prompt, target)] * 2 for target in ("zz zz\n", "a + b\n"))
    assert persona.tune(other, validation=other, steps=80, batch_size=2, learning_rate=0.1).kept
    report = persona.tune(own, validation=own, steps=1, batch_size=2, learning_rate=1e-3)
    assert report.plain_nll < report.best_nll < report.start_nll
    assert (report.kept, report.version, report.end_nll) == (False, 2, report.start_nll)


def test_warmup_rises_and_then_follows_the_schedule() -> None:
    config = lopa.TuneConfig(steps=10, batch_size=1, learning_rate=1.0, weight_decay=0, clip=1, warmup=3)
    rates = [config.rate(step) for step in range(1, 11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:] == pytest.approx([1 - i / 7 for i in range(1, 7)])
    with pytest.raises(lopa.TuningError, match="warmup"):
        dataclasses.replace(config, warmup=10)


def test_a_report_as_json_and_as_a_picture(
    tmp_path: Path, unbroken: tuple[bytes, lopa.TuneReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = unbroken[1]
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    report.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(lopa.StorageError):
        report.plot(tmp_path / "no" / "such" / "folder.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(lopa.MissingDependency, match=r"lopa\[plot\]"):
        report.plot(tmp_path / "other.png")
