"""Priors on the device: whoever was never tuned goes on from the one that fits, at its rate, and is guarded as ever.

lopa-nano with the bundle that ships with it, and held-out users' own code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lopa
import pytest
from lopa.demo.device import examples
from lopa.demo.users import load_task
from lopa.priors import choose
from lopa.tuning import TuneOptions

SETTINGS: TuneOptions = {"steps": 4, "batch_size": 4, "validate_every": 2}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from lopa_server.app import ServerConfig, start_server
    from lopa_server.models import nano_bundle_folder, nano_folder

    with start_server(ServerConfig(fm=nano_folder(), bundle=nano_bundle_folder(), threads=1)) as server:
        yield server.address


@pytest.fixture(scope="module")
def completion() -> list[lopa.Example]:
    return examples(load_task("email", "completion").tuning[:24])


def test_the_prior_that_fits_is_where_a_new_persona_goes_on(client: lopa.Client, completion: list[lopa.Example], tmp_path: Path) -> None:
    persona = client.personal(tmp_path / "me")
    report = persona.tune(completion, **SETTINGS)
    assert report.prior == "completion" and report.kept
    (zero, start), (before, own), (after, prior), (last, _) = report.validation
    assert (zero, before, after, last) == (0, 2, 2, 4)
    assert report.best_nll <= prior < min(own, start, report.plain_nll)
    again = persona.tune(completion, **SETTINGS)
    assert again.prior == "" and again.start_nll == pytest.approx(report.end_nll, rel=1e-3)
    assert persona.tune(completion, **SETTINGS, fresh=True).prior == "completion"


def test_a_prior_that_knows_less_than_the_first_steps_teach_is_left(client: lopa.Client, tmp_path: Path) -> None:
    """Answers that anybody's answers look like, and that are the user's own: a prior is better than nothing on every one of them."""
    report = client.personal(tmp_path / "me").tune(tickets(), steps=20, batch_size=8, validate_every=10)
    assert report.prior == "" and report.kept
    assert [step for step, _ in report.validation] == [0, 5, 10, 20]
    assert report.end_nll < 0.3 * min(report.start_nll, report.plain_nll)


def tickets() -> list[lopa.Example]:
    """Three teams' tickets, as no package of a population has them."""
    asks = {
        " billing": ("I was charged twice for {}", "the invoice for {} is wrong", "please refund {}"),
        " shipping": ("the parcel with {} is late", "the courier lost {}", "the box with {} was damaged"),
        " login": ("I can't sign in on {}", "the password for {} is rejected", "my account is locked on {}"),
    }
    things = ("my lamp", "order 1182", "the tablet", "a pair of shoes")
    return [
        lopa.Example(ask.format(thing) + "\nteam:", team, append_end=True)
        for team, texts in asks.items()
        for ask in texts
        for thing in things
    ]


def test_without_one_that_fits_it_starts_as_ever(client: lopa.Client, tmp_path: Path) -> None:
    """Filing: every user has labels of their own."""
    report = client.personal(tmp_path / "me").tune(examples(load_task("email", "filing").tuning[:24]), **SETTINGS, placement="after_prefix")
    assert report.prior == "" and report.validation[0] == (0, report.start_nll)


def test_a_prior_that_no_step_improves_is_kept_itself(client: lopa.Client, completion: list[lopa.Example], tmp_path: Path) -> None:
    persona = client.personal(tmp_path / "me")
    report = persona.tune(completion, steps=2, batch_size=4, learning_rate=1e3, validate_every=1)
    assert report.kept and report.prior == "completion" and report.best_step == 1
    assert report.end_nll == report.best_nll == report.validation[2][1] < report.start_nll
    assert persona.version == 2


def test_first_steps_that_diverge_have_taught_nothing(client: lopa.Client, completion: list[lopa.Example], tmp_path: Path) -> None:
    """At this rate soft prompts are out of range after a step or two; at the prior's, a tenth of it, they are not."""
    report = client.personal(tmp_path / "me").tune(completion, steps=20, batch_size=4, learning_rate=2.0, validate_every=20)
    assert report.prior == "completion" and report.kept
    assert report.validation[1][0] < 5 and report.best_nll <= report.validation[1][1]


def test_stopping_early_waits_for_the_trial_and_counts_from_it(client: lopa.Client, completion: list[lopa.Example], tmp_path: Path) -> None:
    """A start that is as good as it gets: no measurement after the trial is better."""
    persona = client.personal(tmp_path / "me")
    persona.tune(completion, steps=4, batch_size=4)
    options: TuneOptions = {"steps": 20, "batch_size": 4, "learning_rate": 1e-9, "validate_every": 2, "fresh": True}
    report = persona.tune(completion, **options, early_stopping=1)
    assert (report.outcome, report.prior, report.kept) == ("early_stopped", "completion", False)
    assert [step for step, _ in report.validation] == [0, 2, 4, 5, 5, 6]


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(client: lopa.Client, completion: list[lopa.Example], tmp_path: Path) -> None:
    """Before its prior is taken, after which of its steps it would be, and at the prior's rate."""
    unbroken = client.personal(tmp_path / "whole").tune(completion, **SETTINGS)
    persona = client.personal(tmp_path / "parts")
    parts = [persona.tune(completion, **SETTINGS, max_steps=1) for _ in range(4)]
    assert [part.prior for part in parts] == ["", "", "completion", "completion"]
    assert [part.resumed_from for part in parts] == [0, 1, 2, 3]
    assert parts[-1].losses == pytest.approx(unbroken.losses, abs=1e-4)
    for (step, nll), (other_step, other_nll) in zip(parts[-1].validation, unbroken.validation, strict=True):
        assert step == other_step and nll == pytest.approx(other_nll, abs=1e-4)


@pytest.mark.parametrize(
    ("plain", "start", "priors", "chosen"),
    [
        ([4.0] * 16, [5.0] * 16, {}, ""),
        ([4.0] * 16, [5.0] * 16, {"a": [3.0] * 16, "b": [2.0] * 16}, "b"),
        ([4.0] * 16, [1.5] * 16, {"a": [3.0] * 16, "b": [2.0] * 16}, ""),
        ([4.0] * 16, [5.0] * 16, {"few": [3.9] * 12 + [4.1] * 4, "many": [3.9] * 13 + [4.1] * 3}, "many"),
        ([4.0] * 16, [5.0] * 16, {"hardly": [3.9] * 14 + [5.0] * 2}, ""),
        ([4.0] * 16, [5.0] * 16, {"broken": [float("inf")] * 16}, ""),
        ([4.0] * 4, [5.0] * 4, {"a": [3.9, 3.9, 3.9, 4.1], "b": [3.9] * 4}, "b"),
    ],
)
def test_a_prior_is_chosen_when_it_is_better_on_nearly_every_example(
    plain: list[float], start: list[float], priors: dict[str, list[float]], chosen: str
) -> None:
    assert choose(plain, start, priors) == chosen


def test_a_prior_that_the_server_refuses_is_told(completion: list[lopa.Example], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from lopa_server.app import ServerConfig, start_server
    from lopa_server.limits import ServiceLimits
    from lopa_server.models import nano_bundle_folder, nano_folder

    config = ServerConfig(fm=nano_folder(), bundle=nano_bundle_folder(), threads=1, limits=ServiceLimits(row_norm_multiple=4.0))
    with start_server(config) as server, lopa.connect(server.address, config=lopa.ClientConfig(cache=tmp_path / "cache")) as client:
        report = client.personal(tmp_path / "me").tune(completion, steps=1, batch_size=4)
    assert report.prior == "" and "prior of completion can't be used" in caplog.text
