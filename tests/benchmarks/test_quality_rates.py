"""Learning rates are chosen by validation items of development packages, as far out as the best one lies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
from lopa.demo.users import HELD_OUT

from benchmarks.quality.cell import Cell
from benchmarks.quality.methods import METHODS
from benchmarks.quality.rates import MOST, choose
from benchmarks.quality.tasks import DEVELOPERS


class Measured:
    """A laboratory where validation is best at one rate, and test items would say the opposite."""

    def __init__(self, best: float) -> None:
        self.best = best
        self.tried: list[Cell] = []
        self.store = SimpleNamespace(rows={})

    def measure(self, cells: Iterable[Cell]) -> None:
        for cell in cells:
            far = abs(math.log(cell.rate / self.best)) if cell.rate else 10.0
            self.tried += [cell] * (cell.method != "none")
            self.store.rows[cell.key()] = {"validation_nll": far + 1, "test_nll": 20 - far}


@pytest.mark.parametrize(("best", "chosen"), [(0.003, 0.003), (0.009, 0.009), (0.0001, 0.0001), (100.0, 0.3)])
def test_the_best_by_validation_is_chosen(best: float, chosen: float, tmp_path: Path) -> None:
    """From the first guess outwards, until the best has neighbours on both sides or enough was tried."""
    laboratory, path = Measured(best), tmp_path / "rates.json"
    path.write_text(json.dumps({"filing": {"other": 1.0}}))
    choose(laboratory, ("filing",), ("heads", "heads_r1"), path)  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == {"filing": {"other": 1.0, "heads": pytest.approx(chosen)}}
    assert len(laboratory.tried) <= MOST


def test_nobody_held_out_has_a_say(tmp_path: Path) -> None:
    laboratory = Measured(0.1)
    choose(laboratory, ("filing", "completion"), list(METHODS), tmp_path / "rates.json")  # type: ignore[arg-type]
    users = {cell.user for cell in laboratory.tried}
    assert users == set(DEVELOPERS)
    assert not users & set(HELD_OUT)
