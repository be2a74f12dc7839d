"""Smaller encoders: close to float32, measured on the frozen model's loss, and refused when they cost too much."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from lopa.bundle import Bundle
from lopa_exporters import graphs, quantize
from lopa_exporters.bundle import export_bundle, read_fm_spec
from lopa_exporters.data import build_dataset
from lopa_exporters.encoder import Encoder, EncoderConfig
from lopa_exporters.frozen import FrozenModel
from lopa_exporters.lopa import LoPA, LoPAConfig, init_lopa
from lopa_exporters.probes import PROBES
from lopa_exporters.quality import Gate, Shrinker, assess, graph_features, token_feeds
from lopa_exporters.quantize import session_of
from lopa_exporters.verify import ExportError
from lopa_server.models import nano_folder

from tests.exporters.backbones import minilm_folder
from tests.tiny import build_tiny_fm

EXAMPLES = PROBES[:8]
TEXTS = [example.prompt for example in EXAMPLES]


@pytest.fixture(scope="module")
def fm(fm_folder: Path) -> FrozenModel:
    return FrozenModel.load(fm_folder, device="cpu")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Path]:
    """An encoder with tables and matrices worth quantizing, and its float32 graph."""
    folder = tmp_path_factory.mktemp("wide")
    encoder = Encoder.load(EncoderConfig(folder=str(build_tiny_fm(folder / "fm", hidden=64)), layers=1, max_tokens=64, name="wide"))
    encoder.standardize(encoder.encode(TEXTS))
    graphs.export_encode(encoder, 64, folder / "encode.onnx")
    return encoder, folder / "encode.onnx"


def method(encoder: Encoder, fm: FrozenModel) -> LoPA:
    config = LoPAConfig(hidden=fm.hidden, features=encoder.width, rows=4, rank=2, inner_std=0.1, output_std=0.5)
    return init_lopa(config, fm.vocabulary(), torch.Generator().manual_seed(0))


def shrinker(scheme: str, encoder: Encoder, fm: FrozenModel, lopa: LoPA, gate: Gate | None = None) -> Shrinker:
    dataset = build_dataset(EXAMPLES, fm, encoder, soft_rows=lopa.config.soft_prompt_rows, standardize=False)
    return Shrinker(scheme, encoder, lopa, fm, EXAMPLES, dataset, gate or Gate(loss=1.0))


@pytest.mark.parametrize(("scheme", "ratio"), [("fp16", 0.6), ("int8", 0.5), ("int4", 0.5)])
def test_smaller_and_close(wide: tuple[Encoder, Path], fm: FrozenModel, tmp_path: Path, scheme: str, ratio: float) -> None:
    encoder, source = wide
    path = tmp_path / "encode.onnx"
    path.write_bytes(source.read_bytes())
    shrink = shrinker(scheme, encoder, fm, method(encoder, fm))
    shrink(path)
    quality = shrink.quality
    assert quality is not None
    assert quality.size == path.stat().st_size < ratio * quality.float32_size
    assert quality.cosine_x >= quantize.TARGETS[scheme]
    assert min(quality.cosine_u, quality.cosine_v) > 0.9
    assert [entry.tokens for entry in quality.latency] == [32]
    assert json.loads(quality.to_json())["loss_change"] == quality.loss / quality.float32_loss - 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("scheme", quantize.TARGETS)
def test_token_embeddings_are_quantized(tmp_path: Path, scheme: str) -> None:
    """A graph without a single product."""
    encoder = Encoder.load(EncoderConfig(folder=str(build_tiny_fm(tmp_path / "fm", hidden=64)), layers=0, max_tokens=64))
    encoder.standardize(encoder.encode(TEXTS))
    source, target = tmp_path / "encode.onnx", tmp_path / "small.onnx"
    graphs.export_encode(encoder, 64, source)
    feeds = token_feeds(encoder, TEXTS)
    quantize.quantize(source, target, scheme, feeds, lambda _: 1.0)
    assert target.stat().st_size < 0.6 * source.stat().st_size
    found = graph_features(session_of(target), encoder, TEXTS)
    assert torch.nn.functional.cosine_similarity(found, encoder.encode(TEXTS)).min() > 0.99


def test_nodes_that_hurt_are_left_out(wide: tuple[Encoder, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, source = wide
    expected = encoder.encode(TEXTS)

    def cosine(path: Path) -> float:
        return torch.nn.functional.cosine_similarity(graph_features(session_of(path), encoder, TEXTS), expected).mean().item()

    feeds = token_feeds(encoder, TEXTS)
    everything = quantize.quantize(source, tmp_path / "all.onnx", "int8", feeds, cosine)
    assert everything.left_out == ()
    goal = (1 + everything.cosine) / 2
    monkeypatch.setattr(quantize, "TARGETS", {"int8": goal})
    better = quantize.quantize(source, tmp_path / "some.onnx", "int8", feeds, cosine)
    assert better.cosine >= goal > everything.cosine
    parts = sum(map(len, quantize.weight_products(onnx.load(source)).values())) + 1
    assert 0 < len(better.left_out) < parts
    assert cosine(tmp_path / "some.onnx") == better.cosine


def test_a_missed_gate_leaves_the_old_bundle(fm_folder: Path, fm: FrozenModel, parts: tuple[Encoder, LoPA], tmp_path: Path) -> None:
    encoder, lopa = parts
    out = tmp_path / "bundle"
    before = export_bundle(out, fm=read_fm_spec(fm_folder), encoder=encoder, lopa=lopa).manifest
    for gate, words in ((Gate(loss=-1.0), "loss rises"), (Gate(loss=1.0, cosine=1.1), "cosine")):
        with pytest.raises(ExportError, match=words):
            export_bundle(out, fm=read_fm_spec(fm_folder), encoder=encoder, lopa=lopa, shrink=shrinker("int8", encoder, fm, lopa, gate))
    assert Bundle.open(out).manifest == before


def test_the_same_input_gives_the_same_bytes(wide: tuple[Encoder, Path], tmp_path: Path) -> None:
    encoder, source = wide
    for scheme in quantize.TARGETS:
        for name in "ab":
            quantize.quantize(source, tmp_path / name, scheme, token_feeds(encoder, TEXTS), lambda _: 1.0)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes(), scheme


def test_smoothing_changes_no_value(wide: tuple[Encoder, Path], tmp_path: Path) -> None:
    encoder, source = wide
    model = onnx.load(source)
    quantize.smooth(model, quantize.activation_ranges(model, token_feeds(encoder, TEXTS)))
    onnx.save(model, tmp_path / "smooth.onnx")
    assert sum(node.name.endswith("_smooth") for node in model.graph.node) == len(quantize.weight_products(onnx.load(source)))
    found = graph_features(session_of(tmp_path / "smooth.onnx"), encoder, TEXTS)
    assert torch.allclose(found, encoder.encode(TEXTS), atol=1e-4)


def test_an_unknown_scheme_is_refused(wide: tuple[Encoder, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known are fp16, int8, int4"):
        quantize.quantize(wide[1], tmp_path / "x.onnx", "int3", [], lambda _: 1.0)


@pytest.mark.slow
def test_minilm_in_int8() -> None:
    """The real all-MiniLM-L6-v2 for lopa-nano: what `benchmarks/device.py` publishes, without the clock."""
    quality = assess(nano_folder(), minilm_folder(), "int8")
    assert quality.size < 24_000_000
    assert quality.cosine_x >= 0.99
    assert abs(quality.loss_change) <= 0.005
