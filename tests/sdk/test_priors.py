"""Priors on the device: whoever was never tuned starts from the one that fits, at its rate, and is guarded as ever."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lopa
import pytest
from lopa.bundle import Bundle
from lopa.priors import choose

from tests.sdk.conftest import EXAMPLES, SETTINGS

OTHERS = [lopa.Example(f"class Thing{number}:\n    name = ", "None  # nothing\n") for number in range(8)]


@dataclass(frozen=True)
class Served:
    address: str
    bundle: Bundle


@pytest.fixture(scope="module")
def served(fm_folder: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose bundle has two priors, tuned on examples that no test tunes on."""
    from lopa.encoder import PromptEncoder
    from lopa_exporters import data
    from lopa_exporters.frozen import FrozenModel
    from lopa_exporters.priors import PriorConfig, add_priors, train_prior
    from lopa_server.app import ServerConfig, start_server

    people = {
        "sums": [data.Example(f"user{i % 4}", "sums", f"def other_{i}(a, b):\n    return ", "a + b\n") for i in range(12)],
        "things": [data.Example(f"user{i % 4}", "things", f"class Other{i}:\n    name = ", "None  # nothing\n") for i in range(12)],
    }
    fm, encoder = FrozenModel.load(fm_folder), PromptEncoder(bundle)
    config = PriorConfig(steps=40, persons=4, learning_rate=0.05, warmup=2)
    priors = {name: train_prior(fm, encoder, own, config) for name, own in people.items()}
    made = add_priors(bundle, priors, 0.25, tmp_path_factory.mktemp("priors") / "bundle")
    with start_server(ServerConfig(fm=fm_folder, bundle=made.folder, threads=1)) as server:
        yield Served(server.address, made)


@pytest.fixture
def client(served: Served, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[lopa.Client]:
    monkeypatch.setattr("lopa.priors.FITS", 0.75)  # of a tiny random model a prior makes little
    with lopa.connect(served.address, config=lopa.ClientConfig(cache=cache)) as client:
        yield client


def test_the_prior_that_fits_is_where_a_new_persona_starts(client: lopa.Client, address: str, cache: Path, tmp_path: Path) -> None:
    persona = client.personal(tmp_path / "me")
    report = persona.tune(EXAMPLES, **SETTINGS)
    assert report.prior == "sums" and report.kept
    assert report.validation[0][1] < report.start_nll
    assert client.personal(tmp_path / "other").tune(OTHERS, **SETTINGS).prior == "things"
    again = persona.tune(EXAMPLES, **SETTINGS)
    assert again.prior == "" and again.start_nll == pytest.approx(report.end_nll, rel=0.05)
    assert persona.tune(EXAMPLES, **SETTINGS, fresh=True).prior == "sums"
    with lopa.connect(address, config=lopa.ClientConfig(cache=cache)) as plain:
        without = plain.personal(tmp_path / "without").tune(EXAMPLES, **SETTINGS)
    assert without.prior == "" and without.start_nll == pytest.approx(report.start_nll, rel=0.05)
    assert report.end_nll < without.start_nll


def test_a_prior_that_no_step_improves_is_kept_itself(client: lopa.Client, tmp_path: Path) -> None:
    persona = client.personal(tmp_path / "me")
    report = persona.tune(EXAMPLES, steps=2, batch_size=4, learning_rate=1e3, validate_every=1)
    assert report.kept and report.prior == "sums" and report.best_step == 0
    assert report.end_nll == report.best_nll == report.validation[0][1] < report.start_nll
    assert persona.version == 2


def test_an_interrupted_run_goes_on_at_the_prior_s_rate(client: lopa.Client, tmp_path: Path) -> None:
    whole, parts = client.personal(tmp_path / "whole"), client.personal(tmp_path / "parts")
    unbroken = whole.tune(EXAMPLES, **SETTINGS)
    stopped = parts.tune(EXAMPLES, **SETTINGS, max_steps=5)
    assert stopped.resumable and stopped.prior == "sums"
    finished = parts.tune(EXAMPLES, **SETTINGS)
    assert (finished.resumed_from, finished.prior) == (5, "sums")
    assert finished.losses == pytest.approx(unbroken.losses, abs=1e-6)
    assert finished.end_nll == pytest.approx(unbroken.end_nll, abs=1e-6)


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
