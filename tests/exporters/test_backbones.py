"""Any text encoder: pooled as its authors do, exported for every length, and refused where something is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lopa_exporters.backbone import Pooling, author_pooling
from lopa_exporters.encoder import Encoder, EncoderConfig
from lopa_exporters.graphs import export_encode
from lopa_exporters.verify import verify_encode
from transformers import AutoModel, BertModel

from tests.exporters.backbones import FAMILIES, POSITIONS, build_backbone, minilm_folder, write_pipeline

TEXTS = ["import os", "def add(a, b):\n    return a + b\n", "x"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("backbones")
    return {family: build_backbone(root / family, family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_exports(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    encoder = Encoder.load(EncoderConfig(folder=str(folders[family]), pooling="auto", max_tokens=POSITIONS))
    assert (encoder.config.pooling, encoder.config.normalize) == (("mean", True) if family == "minilm" else ("cls", False))
    assert torch.allclose(encoder.encode(TEXTS), torch.cat([encoder.encode([text]) for text in TEXTS]), atol=1e-5)
    export_encode(encoder, POSITIONS, tmp_path / "encode.onnx")
    verify_encode(tmp_path / "encode.onnx", encoder, 24, 300, POSITIONS)


def test_positions_are_bounded(folders: dict[str, Path]) -> None:
    for family in ("bert", "roberta"):
        with pytest.raises(ValueError, match=f"has {POSITIONS} positions"):
            Encoder.load(EncoderConfig(folder=str(folders[family]), max_tokens=POSITIONS + 1))


def test_the_pooler_is_the_model_s_own(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = Encoder.load(EncoderConfig(folder=str(folders["bert"]), pooling="pooler", normalize=False, max_tokens=POSITIONS))
    ids = torch.tensor(encoder.tokenize(TEXTS[1:2]))
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folders["bert"])(input_ids=ids).pooler_output
    assert torch.allclose(encoder(ids, torch.ones_like(ids)), expected, atol=1e-6)
    export_encode(encoder, POSITIONS, tmp_path / "encode.onnx")
    verify_encode(tmp_path / "encode.onnx", encoder, 24, 300, POSITIONS)


def test_a_pooler_without_weights_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = build_backbone(tmp_path / "bare", "bert")
    BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    assert Encoder.load(EncoderConfig(folder=str(folder), pooling="cls", max_tokens=8)).width == 24
    with pytest.raises(ValueError, match="no weights for pooler"):
        Encoder.load(EncoderConfig(folder=str(folder), pooling="pooler", max_tokens=8))
    with pytest.raises(ValueError, match="DistilBertModel has none"):
        Encoder.load(EncoderConfig(folder=str(folders["distilbert"]), pooling="pooler", max_tokens=8))


@pytest.mark.parametrize(
    ("config", "normalize", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, False, Pooling("cls", False)),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, True, Pooling("last", True)),
        ({"pooling_mode": "mean"}, True, Pooling("mean", True)),
    ],
)
def test_sentence_transformers_say_how_they_pool(tmp_path: Path, config: dict[str, object], normalize: bool, expected: Pooling) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_pipeline(tmp_path, config, normalize=normalize)
    assert author_pooling(str(tmp_path)) == expected


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_pipeline(tmp_path, {"pooling_mode_max_tokens": True}, normalize=False)
    with pytest.raises(ValueError, match="pools by max_tokens"):
        author_pooling(str(tmp_path))
    modules = json.loads((tmp_path / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(json.dumps([*modules, {"type": "x.Dense", "path": "2_Dense"}]))
    with pytest.raises(ValueError, match="Transformer, Pooling, Dense"):
        author_pooling(str(tmp_path))


def test_the_real_minilm_is_pooled_as_sentence_transformers_do() -> None:
    from sentence_transformers import SentenceTransformer

    encoder = Encoder.load(EncoderConfig(folder=str(minilm_folder()), pooling="auto", max_tokens=64))
    assert (encoder.config.pooling, encoder.config.normalize) == ("mean", True)
    expected = torch.from_numpy(SentenceTransformer(str(minilm_folder()), device="cpu").encode(TEXTS))
    assert torch.allclose(encoder.encode(TEXTS), expected, atol=1e-5)
