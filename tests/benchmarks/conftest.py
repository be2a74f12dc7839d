"""What the laboratory's tests share: the shipped model and bundle, and a user with few examples."""

from __future__ import annotations

import pytest
from lopa.bundle import Bundle
from lopa.encoder import PromptEncoder
from lopa_exporters.frozen import FrozenModel
from lopa_server.models import nano_bundle_folder, nano_folder

from benchmarks.quality.material import Material, prepare
from benchmarks.quality.methods import Bench
from benchmarks.quality.tasks import build, held_out_modules


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(FrozenModel.load(nano_folder()), PromptEncoder(Bundle.open(nano_bundle_folder())))


@pytest.fixture(scope="module")
def material(bench: Bench) -> Material:
    return prepare(build("email", "filing", held_out_modules("email"), 0), bench.fm, bench.encoder, size=20, seed=0)
