"""Every method by name: how its learner is made, and which method's learning rate it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from lopa.encoder import PromptEncoder
from lopa_exporters.frozen import FrozenModel
from lopa_exporters.lopa import LoPAConfig, init_lopa

from benchmarks.quality.learners import prompts, shared, starts
from benchmarks.quality.learners.dept import DecomposedLearner
from benchmarks.quality.learners.device import DeviceLearner
from benchmarks.quality.learners.learner import Learner, PlainLearner
from benchmarks.quality.learners.prefix import PrefixLearner
from benchmarks.quality.learners.weights import RANK, adapter, full, lora
from benchmarks.quality.material import Material

ROWS = 25
"""m of every prompt, as in the shipped bundle."""
OTHER_ROWS = (10, 40)
"""m of shorter and of longer ones."""


@dataclass(frozen=True)
class Bench:
    """What all methods share: the model, and the shipped bundle's encoder."""

    fm: FrozenModel
    encoder: PromptEncoder


Make = Callable[[Bench, Material, int], Learner]
"""(bench, material, seed) -> a learner at its start."""


@dataclass(frozen=True)
class Method:
    """title: for people. rate: where the search for its learning rate begins. like: the method whose rate it takes, instead of a search."""

    title: str
    make: Make
    rate: float = 0.0
    like: str = ""


def _heads(bench: Bench, material: Material, seed: int, *, z_rate: float = 1.0, **changes: object) -> Learner:
    config = LoPAConfig(hidden=bench.fm.hidden, features=next(iter(material.features.values())).shape[1], rows=ROWS, profile="heads")
    return prompts.heads(bench.fm, material, seed, replace(config, **changes), z_rate)  # type: ignore[arg-type]


def _factors(bench: Bench, material: Material, seed: int, *, trained: bool = True, aligned: bool = True, **changes: object) -> Learner:
    """aligned: whether corrections begin at the user's own answers, as a device's do."""
    lopa = shared.rebuilt(bench.encoder.bundle, bench.fm, seed, trained=trained, **changes)
    return (prompts.from_answers if aligned else prompts.from_lopa)(bench.fm, material, lopa)


def _exported(bench: Bench, material: Material, seed: int) -> Learner:
    config = shared.exported(bench.fm, next(iter(material.features.values())).shape[1])
    lopa = init_lopa(config, bench.fm.vocabulary(), torch.Generator().manual_seed(seed))
    return prompts.from_answers(bench.fm, material, lopa)


def _factors_of_rows(bench: Bench, material: Material, seed: int, *, rows: int) -> Learner:
    lopa = starts.with_rows(shared.rebuilt(bench.encoder.bundle, bench.fm, seed, trained=True), bench.fm.vocabulary(), seed, rows)
    return prompts.from_answers(bench.fm, material, lopa)


def _prompt(start: str, rows: int = ROWS) -> Make:
    return lambda bench, material, seed: prompts.prompt_tuning(bench.fm, material, seed, rows=rows, start=start)


def prompts_from_prior(bench: Bench, material: Material, _seed: int) -> Learner:
    """SPoT (Vu et al. 2022): plain prompt tuning from the mean soft prompt that the default would start with on the user's items."""
    start = DeviceLearner(bench.fm, bench.encoder, material, trial=0)
    return prompts.from_prompt(bench.fm, material, start.soft(material.training).mean(dim=0), start.rate)


def _lora_from_prior(bench: Bench, material: Material, seed: int) -> Learner:
    """At the part of the learning rate that the bundle's priors have; from nothing where it has none for the task."""
    rates = {prior.name: prior.rate for prior in bench.encoder.bundle.manifest.priors}
    task = material.data.task
    return lora(bench.fm, seed, RANK, adapter(task), rates[task]) if task in rates else lora(bench.fm, seed, RANK)


METHODS: dict[str, Method] = {
    "none": Method("plain model", lambda bench, _material, _seed: PlainLearner(bench.fm)),
    "prompt_tuning": Method("prompt tuning, vocabulary start", _prompt("SAMPLE_VOCAB"), rate=0.1),
    "default": Method("LoPA, the shipped default", lambda bench, material, _: DeviceLearner(bench.fm, bench.encoder, material), rate=0.03),
    "heads": Method("LoPA heads, as in the paper", _heads, rate=0.003),
    "lora_r8": Method("LoRA r = 8", lambda bench, _material, seed: lora(bench.fm, seed, 8), rate=0.003),
    "full": Method("full fine-tuning", lambda bench, _material, _seed: full(bench.fm), rate=0.0003),
    "default_no_priors": Method(
        "the shipped default without priors",
        lambda bench, material, _: DeviceLearner(bench.fm, bench.encoder, material, priors=False),
        like="default",
    ),
    "prior_alone": Method(
        "the prior alone, never tuned", lambda bench, material, _: DeviceLearner(bench.fm, bench.encoder, material, trial=0)
    ),
    "prompt_tuning_prior": Method("prompt tuning from the default's prior", prompts_from_prior, like="prompt_tuning"),
    "lora_r8_prior": Method("LoRA r = 8 from a population's adapter", _lora_from_prior, like="lora_r8"),
    "prompt_tuning_random": Method("prompt tuning, random start", _prompt("RANDOM"), rate=0.1),
    **{
        f"prompt_tuning_m{rows}": Method(f"prompt tuning, {rows} rows", _prompt("SAMPLE_VOCAB", rows), like="prompt_tuning")
        for rows in OTHER_ROWS
    },
    "prefix_tuning": Method("prefix tuning", lambda bench, _material, seed: PrefixLearner(bench.fm, seed, ROWS), rate=0.03),
    "idpg": Method("IDPG", lambda bench, material, seed: prompts.idpg(bench.fm, material, seed, rows=ROWS), rate=0.003),
    "dept": Method("DePT", lambda bench, material, seed: DecomposedLearner(bench.fm, material, seed, rows=ROWS), rate=0.1),
    **{
        f"lora_r{rank}": Method(f"LoRA r = {rank}", lambda bench, _, seed, rank=rank: lora(bench.fm, seed, rank), like="lora_r8")
        for rank in (1, 16)
    },
    **{f"heads_r{rank}": Method(f"LoPA heads, rank {rank}", partial(_heads, rank=rank), like="heads") for rank in (1, 2, 8)},
    **{f"heads_m{rows}": Method(f"LoPA heads, {rows} rows", partial(_heads, rows=rows), like="heads") for rows in (5, 10)},
    "heads_far": Method("LoPA heads, Z at 30 times the rate", partial(_heads, z_rate=30.0), like="heads"),
    "heads_open": Method("LoPA heads, N(0, 0.2) start", partial(_heads, output_std=0.2), like="heads"),
    **{
        f"heads_{name}": Method(f"LoPA heads, {name} for product", partial(_heads, composition=name), like="heads")
        for name in ("add", "concat", "max")
    },
    "factors_exported": Method("factors as `lopa export` makes them, over random heads", _exported, like="default"),
    "factors_untrained": Method("factors over random heads", partial(_factors, trained=False), like="default"),
    "factors_no_instance": Method("factors of Z alone", partial(_factors, corrections={}), like="default"),
    "factors_constant": Method("factors without an instance part", partial(_factors, corrections={}, composition="none"), like="default"),
    **{f"factors_k{rank}": Method(f"factors, k = {rank}", partial(_factors, z_rank=rank), like="default") for rank in (1, 2, 4, 8)},
    "factors_before": Method(
        "factors that start at A = 0, gains 0.3 and 1, k = 8",
        partial(_factors, aligned=False, z_start="product", z_gain=0.3, correction_gain=1.0, spread=1.0, z_rank=8),
        like="default",
    ),
    **{
        f"factors_s{rank}": Method(
            f"factors, s = {rank} for all", partial(_factors, corrections=dict.fromkeys(shared.MATRICES, rank)), like="default"
        )
        for rank in (1, 2, 4)
    },
    "factors_outer": Method("factors of the outer matrices alone", partial(_factors, corrections={"W2u": 8, "W2v": 4}), like="default"),
    **{f"factors_m{rows}": Method(f"factors, {rows} rows", partial(_factors_of_rows, rows=rows), like="default") for rows in OTHER_ROWS},
    "factors_random": Method(
        "factors, Q starts at random and moves at P's rate",
        partial(_factors, aligned=False, correction_gain=0.3, spread=1.0),
        like="default",
    ),
    "factors_random_slow": Method("factors, Q starts at random", partial(_factors, aligned=False), like="default"),
    "factors_fast": Method(
        "factors, Q starts at the user's own answers and moves at P's rate",
        partial(_factors, correction_gain=0.3, spread=1.0),
        like="default",
    ),
    "factors_last": Method(
        "factors with more of their numbers in V's last matrix",
        partial(_factors, corrections={"W1u": 2, "W2u": 4, "W1v": 2, "W2v": 8}),
        like="default",
    ),
    "factors_inner": Method("factors of the inner matrices alone", partial(_factors, corrections={"W1u": 2, "W1v": 8}), like="default"),
}
MAIN = ("none", "prompt_tuning", "default", "heads", "lora_r8", "full")
"""The methods that matter: all users, tasks and seeds."""
COMPARED = MAIN[:-1]
"""Those that are compared on exactly the same cells; full fine-tuning, the costliest, on as many of them as it was measured on."""
UNTUNED = ("none", "prior_alone")
PRIORS = ("prompt_tuning_prior", "default_no_priors", "prior_alone", "lora_r8_prior")
"""What tells the prior's part of the default's gain from the method's, where the bundle has a prior; and what one is worth to LoRA."""
SWEEP = tuple(name for name in METHODS if name not in (*MAIN, *PRIORS))


def rate_of(method: str) -> str:
    """The method whose learning rate this one takes."""
    return METHODS[method].like or method
