"""Priors on the device: whoever was never tuned starts from the one that fits, at its rate, and is guarded as ever.

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


def test_the_prior_that_fits_is_where_a_new_persona_starts(client: lopa.Client, completion: list[lopa.Example], tmp_path: Path) -> None:
    persona = client.personal(tmp_path / "me")
    report = persona.tune(completion, **SETTINGS)
    assert report.prior == "completion" and report.kept
    assert report.best_nll <= report.validation[0][1] < min(report.start_nll, report.plain_nll)
    again = persona.tune(completion, **SETTINGS)
    assert again.prior == "" and again.start_nll == pytest.approx(report.end_nll, rel=1e-3)
    assert persona.tune(completion, **SETTINGS, fresh=True).prior == "completion"


def test_without_one_that_fits_it_starts_as_ever(client: lopa.Client, tmp_path: Path) -> None:
    """Filing: every user has labels of their own."""
    report = client.personal(tmp_path / "me").tune(examples(load_task("email", "filing").tuning[:24]), **SETTINGS, placement="after_prefix")
    assert report.prior == "" and report.validation[0] == (0, report.start_nll)


def test_a_prior_that_no_step_improves_is_kept_itself(client: lopa.Client, completion: list[lopa.Example], tmp_path: Path) -> None:
    persona = client.personal(tmp_path / "me")
    report = persona.tune(completion, steps=2, batch_size=4, learning_rate=1e3, validate_every=1)
    assert report.kept and report.prior == "completion" and report.best_step == 0
    assert report.end_nll == report.best_nll == report.validation[0][1] < report.start_nll
    assert persona.version == 2


def test_an_interrupted_run_goes_on_at_the_prior_s_rate(client: lopa.Client, completion: list[lopa.Example], tmp_path: Path) -> None:
    whole, parts = client.personal(tmp_path / "whole"), client.personal(tmp_path / "parts")
    unbroken = whole.tune(completion, **SETTINGS)
    stopped = parts.tune(completion, **SETTINGS, max_steps=2)
    assert stopped.resumable and stopped.prior == "completion"
    finished = parts.tune(completion, **SETTINGS)
    assert (finished.resumed_from, finished.prior) == (2, "completion")
    assert finished.losses == pytest.approx(unbroken.losses, abs=1e-4)
    assert finished.end_nll == pytest.approx(unbroken.end_nll, abs=1e-4)


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
