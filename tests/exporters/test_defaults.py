"""What `lopa export` makes without options: small enough for a device, and able to learn."""

from __future__ import annotations

from pathlib import Path

import lopa
import pytest
from lopa.bundle import Bundle
from lopa.cli import main
from lopa_exporters import defaults
from lopa_exporters.lopa import LoPAConfig
from lopa_server.app import ServerConfig, start_server
from lopa_server.models import nano_folder

from tests.tiny import build_tiny_fm

HEADER = 1024
"""Bytes of a factors file besides its values, at most."""


def test_a_user_of_a_large_model_has_less_than_64_kib() -> None:
    assert 2 * LoPAConfig(hidden=4096, features=defaults.FEATURES, **defaults.factors()).personal_count() + HEADER < 64 << 10


@pytest.mark.parametrize(("options", "features"), [((), defaults.FEATURES), (("--features", "0"), 640), (("--profile", "heads"), 640)])
def test_a_wide_encoder_is_projected(tmp_path: Path, options: tuple[str, ...], features: int) -> None:
    fm = build_tiny_fm(tmp_path / "wide", hidden=640)
    with pytest.raises(SystemExit) as ended:
        main(["export", "--fm", str(fm), "--out", str(tmp_path / "bundle"), *options])
    assert not ended.value.code
    assert Bundle.open(tmp_path / "bundle").manifest.instance[0].shape == (features,)


def test_an_export_without_options_learns_a_users_own_labels(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", "--fm", str(nano_folder()), "--out", str(tmp_path / "bundle")])
    assert not ended.value.code
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.tuning.learning_rate == 0.03
    assert {spec.name: spec.spread for spec in manifest.aligned} == {f"{name}.Q": 10.0 for name in defaults.CORRECTIONS}
    things = ("my lamp", "order 1182", "the tablet", "a pair of shoes", "the kettle", "invoice 77")
    asks = {" billing": ("I was charged twice for {}", "please refund {}"), " shipping": ("{} is late", "the courier lost {}")}
    tickets = [
        lopa.Example(ask.format(thing) + "\nteam:", team, append_end=True)
        for team, texts in asks.items()
        for ask in texts
        for thing in things
    ]
    config = ServerConfig(fm=nano_folder(), bundle=tmp_path / "bundle", threads=1)
    with start_server(config) as server, lopa.connect(server.address, config=lopa.ClientConfig(cache=tmp_path / "cache")) as client:
        me = client.personal(tmp_path / "me")
        report = me.tune(tickets, steps=30, batch_size=8)
        assert report.kept and report.end_nll < 0.2 * report.plain_nll
        assert me.generate("please refund the oven\nteam:", max_tokens=4, temperature=0).text == " billing"
