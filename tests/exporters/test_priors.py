"""Population priors: tuned as a device tunes, written into a copy of the bundle, and audited with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lopa.bundle import Bundle, BundleError, extract_archive
from lopa.encoder import PromptEncoder
from lopa.factors import Factors
from lopa.manifest import PRIORS
from lopa.priors import read_priors
from lopa_exporters.audit import Audit
from lopa_exporters.cli import export
from lopa_exporters.data import DataError, Example, by_task
from lopa_exporters.frozen import FrozenModel
from lopa_exporters.priors import PriorConfig, add_priors, train_prior
from typer.testing import CliRunner

from tests.tiny_bundle import build_tiny_bundle

PEOPLE = [
    Example(f"user{number % 3}", task, f"def function_{number}(a, b):\n    return ", target)
    for task, target in (("sum", "a + b\n"), ("product", "a * b\n"))
    for number in range(9)
]


@pytest.fixture(scope="module")
def bundle(fm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build_tiny_bundle(fm_folder, tmp_path_factory.mktemp("priors") / "bundle"))


def likelihood(fm: FrozenModel, encoder: PromptEncoder, factors: Factors, examples: list[Example]) -> float:
    """NLL per token by the way that `train_prior` does not take: through a fresh data set and compose alone."""
    import torch
    from lopa_exporters.data import tokenize

    instance = encoder.encode([example.prompt for example in examples])
    soft = torch.from_numpy(encoder.compose(instance, factors.tensors))
    with torch.no_grad():
        return fm.losses(soft, tokenize(examples, fm, soft.shape[1])).mean().item()


def test_a_prior_fits_its_own_kind_and_the_same_settings_give_the_same(fm_folder: Path, bundle: Bundle) -> None:
    fm, encoder = FrozenModel.load(fm_folder), PromptEncoder(bundle)
    config, groups = PriorConfig(steps=25, persons=3, learning_rate=0.05, warmup=2), by_task(PEOPLE)
    told: list[float] = []
    prior = train_prior(fm, encoder, groups["sum"], config, lambda _step, loss: told.append(loss))
    start = Factors.start(bundle)
    (before, own), (_, other) = ([likelihood(fm, encoder, factors, group) for factors in (start, prior)] for group in groups.values())
    assert len(told) == 25 and own < before and own < told[0]
    assert own < other
    again = train_prior(fm, encoder, groups["sum"], config)
    assert all(np.array_equal(prior.tensors[name], again.tensors[name]) for name in prior.tensors)


def test_a_bundle_with_priors_travels_and_is_another(bundle: Bundle, tmp_path: Path) -> None:
    start = Factors.start(bundle)
    moved = {name: start.tensors[name] + np.float32(0.25) for name in start.tensors}
    priors = {"first": start, "second-2": Factors(moved, start.specs, start.bundle_id, start.fm_fingerprint)}
    made = add_priors(bundle, priors, 0.5, tmp_path / "made")
    assert made.manifest.id != bundle.manifest.id and [prior.rate for prior in made.manifest.priors] == [0.5, 0.5]
    assert "second-2" in next(check.found for check in Audit(made).run() if check.name == "priors")
    archive = tmp_path / "archive"
    made.write_archive(archive)
    read = read_priors(extract_archive(archive, tmp_path / "copy"))
    assert list(read) == ["first", "second-2"]
    for name, factors in read.items():
        assert factors.bundle_id == made.manifest.id
        rounded = priors[name].at_rest().tensors
        assert all(np.array_equal(factors.tensors[tensor], rounded[tensor]) for tensor in rounded)
    bare = add_priors(made, {"only": start}, 1.0, tmp_path / "made")
    assert list(read_priors(bare)) == ["only"]
    (bare.folder / PRIORS).write_bytes(b"other")
    with pytest.raises(BundleError, match=PRIORS):
        Bundle.open(bare.folder)
    assert read_priors(bundle) == {}


def test_the_shipped_priors_are_within_the_server_s_limit() -> None:
    """Otherwise no device could start from them."""
    from lopa_server.limits import ServiceLimits
    from lopa_server.models import nano_bundle_folder, nano_folder

    shipped = Bundle.open(nano_bundle_folder())
    encoder, priors = PromptEncoder(shipped), read_priors(shipped)
    features = encoder.encode(["def read_json(path):\n    return ", "class Point:\n", "\n# name: ", "x = 1"])
    largest = FrozenModel.load(nano_folder()).vocabulary().norm(dim=1).max().item()
    norms = {name: float(np.linalg.norm(encoder.compose(features, prior.tensors), axis=-1).max()) for name, prior in priors.items()}
    assert set(norms) == {"completion", "naming", "docstring"}
    assert max(norms.values()) < 0.75 * ServiceLimits().row_norm_multiple * largest


def test_what_cannot_be_a_prior_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    start = Factors.start(bundle)
    with pytest.raises(BundleError, match=r"manifest\.priors"):
        add_priors(bundle, {"a.b": start}, 1.0, tmp_path / "made")
    huge = Factors({name: value + np.float32(1e6) for name, value in start.tensors.items()}, start.specs, "", "")
    with pytest.raises(ValueError, match="not finite"):
        add_priors(bundle, {"huge": huge}, 1.0, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    with pytest.raises(DataError, match="naming"):
        by_task(PEOPLE, ["sum", "naming"])
    with pytest.raises(ValueError, match="steps"):
        PriorConfig(steps=0)


def test_the_command_makes_a_bundle_that_verifies(fm_folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    population, out = tmp_path / "people.jsonl", tmp_path / "made"
    population.write_text("".join(json.dumps(vars(example)) + "\n" for example in PEOPLE))
    command = ["priors", str(bundle.folder), "--fm", str(fm_folder), "--population", str(population), "--out", str(out), "--steps", "2"]
    result = CliRunner().invoke(export, command)
    assert result.exit_code == 0, result.output
    assert "sum (rate 0.1), product (rate 0.1)" in " ".join(result.output.split())
    assert list(read_priors(Bundle.open(out))) == ["sum", "product"]
    other = CliRunner().invoke(export, [*command, "--tasks", "naming"])
    assert other.exit_code == 1 and "naming" in other.output
    taken = CliRunner().invoke(export, [*command, "--out", str(tmp_path)])
    assert taken.exit_code == 1 and "is not a bundle" in taken.output and "Prior of" not in taken.output, "told before the work"
