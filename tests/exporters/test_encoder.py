"""Features: what a text gives never depends on its neighbours, and the causal encoder is the model's own first layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from lopa_exporters.encoder import Encoder, EncoderConfig, pool
from lopa_exporters.graphs import export_encode
from lopa_exporters.projection import random_signs
from lopa_exporters.quality import graph_features
from lopa_exporters.quantize import session_of
from lopa_exporters.static import save_static
from lopa_exporters.verify import verify_encode
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, BertConfig, BertModel, PreTrainedTokenizerFast

from tests.tiny import build_tiny_fm, train_tokenizer

TEXTS = ["import os", "def add(a, b):\n    return a + b\n", "x", "class Point:\n" * 20]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with absolute positions."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40}
    BertModel(BertConfig(vocab_size=300, **sizes), add_pooling_layer=False).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(300), pad_token="<|pad|>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_texts_do_not_depend_on_their_batch(fm_folder: Path, pooling: str) -> None:
    encoder = Encoder.load(EncoderConfig(folder=str(fm_folder), layers=1, pooling=pooling, max_tokens=24))
    together = encoder.encode(TEXTS)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    assert torch.allclose(together, alone, atol=1e-6)


def test_the_model_s_first_layers_are_its_own_hidden_states(fm_folder: Path) -> None:
    encoder = Encoder.load(EncoderConfig(folder=str(fm_folder), layers=1, normalize=False))
    model = AutoModelForCausalLM.from_pretrained(fm_folder)
    ids = torch.tensor(encoder.tokenize([TEXTS[1]]))
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        expected = model.model.norm(states).mean(dim=1)
    assert torch.allclose(encoder(ids, torch.ones_like(ids)), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_text_encoder_exports_for_every_length(bert_folder: Path, tmp_path: Path, pooling: str) -> None:
    encoder = Encoder.load(EncoderConfig(folder=str(bert_folder), pooling=pooling, max_tokens=40))
    encoder.standardize(encoder.encode(TEXTS))
    export_encode(encoder, encoder.config.max_tokens, tmp_path / "encode.onnx")
    verify_encode(tmp_path / "encode.onnx", encoder, 24, 300, 40)
    texts = [*TEXTS, "", "y = 1\n" * 100]  # from no token to more than are read
    found = graph_features(session_of(tmp_path / "encode.onnx"), encoder, texts)
    assert torch.allclose(found, encoder.encode(texts), atol=1e-4)


def test_standardized_features_have_unit_variance(fm_folder: Path) -> None:
    encoder = Encoder.load(EncoderConfig(folder=str(fm_folder), layers=1))
    texts = [f"value_{i} = {i * i}\nfor x in range({i}):" for i in range(50)]
    first = encoder.restandardize(encoder.encode(texts))
    assert first.mean(dim=0).abs().max() < 1e-5
    assert (first.std(dim=0, correction=0) - 1).abs().max() < 1e-2
    assert torch.allclose(encoder.encode(texts), first, atol=1e-4)
    again = encoder.restandardize(encoder.encode(texts))
    assert torch.allclose(again, first, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_without_layers_the_model_s_token_embeddings_are_averaged(tmp_path: Path, family: str) -> None:
    folder = build_tiny_fm(tmp_path / "fm", family=family)
    table = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach()
    encoder = Encoder.load(EncoderConfig(folder=str(folder), layers=0, pooling="auto", max_tokens=40))
    narrow = Encoder.load(EncoderConfig(folder=str(folder), layers=0, pooling="auto", max_tokens=40, features=8))
    assert encoder.config.label == "fm token embeddings"
    for text, features, fewer in zip(TEXTS, encoder.encode(TEXTS), narrow.encode(TEXTS), strict=True):
        mean = table[encoder.tokenize([text])[0]].mean(dim=0)
        assert torch.allclose(features, functional.normalize(mean, dim=0), atol=1e-5)
        assert torch.allclose(fewer, functional.normalize(mean @ random_signs(len(mean), 8), dim=0), atol=1e-5)
    export_encode(narrow, 40, tmp_path / "encode.onnx")
    verify_encode(tmp_path / "encode.onnx", narrow, 8, 300, 40)


def test_token_embeddings_that_are_missing_or_too_few_are_an_error(bert_folder: Path, fm_folder: Path, tmp_path: Path) -> None:
    for name, source, table in (("missing", bert_folder, "embeddings.word_embeddings.weight"), ("short", fm_folder, "")):
        shutil.copytree(source, tmp_path / name)
        weights = load_file(source / "model.safetensors")
        if table:
            del weights[table]
        else:
            config = json.loads((source / "config.json").read_text())
            (tmp_path / name / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
            weights = {key: value[:200] if len(value) == 300 else value for key, value in weights.items()}
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="would be random" if table else "200 token embeddings; its tokenizer has 300 tokens"):
            Encoder.load(EncoderConfig(folder=str(tmp_path / name), layers=0))


def test_an_encoder_larger_than_a_file_may_be_is_an_error(fm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopa_exporters.encoder.ONNX_BYTES", 4096)
    with pytest.raises(ValueError, match="GiB of weights"):
        Encoder.load(EncoderConfig(folder=str(fm_folder), layers=1))


def test_wide_vectors_are_projected_and_keep_their_distances(fm_folder: Path, tmp_path: Path) -> None:
    plain = Encoder.load(EncoderConfig(folder=str(fm_folder), layers=1, max_tokens=24))
    narrow = Encoder.load(EncoderConfig(folder=str(fm_folder), layers=1, max_tokens=24, features=8))
    assert narrow.width == 8
    assert narrow.projection is not None
    assert torch.allclose(narrow.encode(TEXTS), functional.normalize(plain.encode(TEXTS) @ narrow.projection, dim=-1), atol=1e-5)
    export_encode(narrow, 24, tmp_path / "encode.onnx")
    verify_encode(tmp_path / "encode.onnx", narrow, 8, 300, 24)
    assert Encoder.load(EncoderConfig(folder=str(fm_folder), features=plain.width)).projection is None
    points = torch.randn(100, 4096, generator=torch.Generator().manual_seed(0))
    ratios = torch.pdist(points @ random_signs(4096, 512)) / torch.pdist(points)
    assert 0.8 < ratios.min() < ratios.max() < 1.2


@pytest.mark.parametrize(("side", "kept"), [("left", slice(-5, None)), ("right", slice(0, 5))])
def test_long_texts_lose_the_configured_side(fm_folder: Path, side: str, kept: slice) -> None:
    short = Encoder.load(EncoderConfig(folder=str(fm_folder), layers=1, max_tokens=5, truncation_side=side))
    whole = Encoder.load(EncoderConfig(folder=str(fm_folder), layers=1, max_tokens=500))
    assert short.tokenize(TEXTS[3:]) == [whole.tokenize(TEXTS[3:])[0][kept]]


def test_pooling_reads_real_tokens_only() -> None:
    states = torch.arange(12.0).reshape(1, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0]])
    assert pool("mean", states, mask).tolist() == [[3.0, 4.0, 5.0]]
    assert pool("cls", states, mask).tolist() == [[0.0, 1.0, 2.0]]
    assert pool("last", states, mask).tolist() == [[6.0, 7.0, 8.0]]


@pytest.mark.parametrize(
    "settings", [{"pooling": "max"}, {"truncation_side": "middle"}, {"max_tokens": 0}, {"features": -1}, {"pooling": "cls", "layers": 0}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        EncoderConfig(folder="x", **settings)  # type: ignore[arg-type]


def test_more_layers_than_there_are_is_an_error(fm_folder: Path) -> None:
    with pytest.raises(ValueError, match="layers is 3; the backbone has 2"):
        Encoder.load(EncoderConfig(folder=str(fm_folder), layers=3))


def test_static_token_embeddings_are_averaged_and_export(tmp_path: Path) -> None:
    """A sentence-transformers StaticEmbedding folder: the mean of the tokens' vectors, normalized; the table must cover the tokenizer."""
    tokenizer = train_tokenizer(300)
    table = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    save_static(tmp_path / "model" / "0_StaticEmbedding", table, tokenizer)
    encoder = Encoder.load(EncoderConfig(folder=str(tmp_path / "model"), pooling="auto", max_tokens=40))
    for text, features in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        mean = table[tokenizer.encode(text).ids[-40:]].mean(dim=0)
        assert torch.allclose(features, mean / mean.norm(), atol=1e-5)
    export_encode(encoder, encoder.config.max_tokens, tmp_path / "encode.onnx")
    verify_encode(tmp_path / "encode.onnx", encoder, 16, 300, 40)
    with pytest.raises(ValueError, match="layers is 2"):
        Encoder.load(EncoderConfig(folder=str(tmp_path / "model"), layers=2))
    save_static(tmp_path / "short", table[:200], tokenizer)
    with pytest.raises(ValueError, match="200 rows"):
        Encoder.load(EncoderConfig(folder=str(tmp_path / "short")))
