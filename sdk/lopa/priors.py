"""Priors: sets of personal tensors in the bundle that somebody who was never tuned may start from, and which of them to take.

Each was tuned on a population's examples of one kind (`lopa_exporters.priors`). Which one fits a user is seen from the user's own
examples, in two turns: `choose` picks a candidate by training examples before the first step; the run begins at the plain start all the
same, and takes the candidate after its first steps (`trial_steps`) unless they have taught more than it knows of the validation examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lopa.bundle import Bundle
from lopa.errors import BundleError
from lopa.factors import Factors
from lopa.manifest import PRIORS
from lopa.tensorfile import read_tensors

CHOSEN_BY = 16
"""Training examples that a prior is chosen by."""
FITS = 0.8
"""A prior of another kind of task may take a little off the mean NLL, and would first have to be unlearnt. One of the right kind is better
on nearly every example: at least on this part of them (13 of 16; a sign test's p is 0.01). Three quarters were too few: a user whose
modules are called like functions started filing from the prior of naming, and ended far behind."""
TRIAL_STEPS = 5
"""A prior of another kind knows what answers look like, which is better than nothing on every example, and less than a few steps teach. Who
goes on from it has to unlearn the rest, at a prior's small rate (`benchmarks/choosing.py` measures both). With 10 steps instead of 5 the
same priors were taken on development packages and invented tasks, and fewer steps were left."""


def trial_steps(steps: int) -> int:
    """How many of a run's steps go before its candidate is judged: half of them in a short run."""
    return min(TRIAL_STEPS, steps // 2)


def read_priors(bundle: Bundle) -> dict[str, Factors]:
    """A bundle's priors by name; most bundles have none.

    Raises:
        FactorsError: the bundle's file does not fit its manifest. BundleError: it can't be read.
    """
    manifest = bundle.manifest
    if not manifest.priors:
        return {}
    specs = [replace(spec, name=f"{prior.name}.{spec.name}") for prior in manifest.priors for spec in manifest.personal]
    try:
        tensors = read_tensors(bundle.path(PRIORS).read_bytes(), specs)
    except OSError as error:
        raise BundleError(f"the bundle's {PRIORS} can't be read: {error}") from error
    return {
        prior.name: Factors(
            {spec.name: tensors[f"{prior.name}.{spec.name}"] for spec in manifest.personal},
            manifest.personal,
            manifest.id,
            manifest.fm.fingerprint,
        )
        for prior in manifest.priors
    }


def choose(plain: Sequence[float], start: Sequence[float], priors: Mapping[str, Sequence[float]]) -> str:
    """The prior that may be worth starting from, empty for none.

    All are NLL sums over the same examples, one by one: of the plain model, of the plain start and of each prior.
    """
    lowest = [min(pair) for pair in zip(plain, start, strict=True)]
    fitting = {name: sum(nll) for name, nll in priors.items() if _wins(nll, lowest) >= FITS * len(lowest)}
    best = min(fitting, key=lambda name: fitting[name], default="")
    return best if best and fitting[best] < min(sum(plain), sum(start)) else ""


def _wins(nll: Sequence[float], others: Sequence[float]) -> int:
    return sum(own < other for own, other in zip(nll, others, strict=True))
