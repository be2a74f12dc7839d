"""The prompt encoder: order, padding and truncation don't change what a text means; graphs are held to their contract."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import lopa
import numpy as np
import onnx
import pytest
from lopa.bundle import Bundle, digest_file
from lopa.encoder import Moments, PromptEncoder
from lopa.manifest import AlignedSpec, TensorSpec

from tests.sdk.conftest import variant

TEXTS = ["import os", "def add(a, b):\n    return a + b\n", "x", "", "class Point:\n    pass\n"]


@pytest.fixture(scope="module")
def encoder(bundle: Bundle) -> PromptEncoder:
    return PromptEncoder(bundle)


def test_batches_give_what_each_text_gives_alone(encoder: PromptEncoder) -> None:
    together = encoder.encode(TEXTS, batch_size=2)
    for i, text in enumerate(TEXTS):
        for name, value in encoder.encode([text]).items():
            np.testing.assert_allclose(together[name][i], value[0], rtol=1e-4, atol=1e-5)
    assert {name: value.shape[1:] for name, value in together.items()} == {
        spec.name: spec.shape for spec in encoder.bundle.manifest.instance
    }
    assert all(len(value) == 0 for value in encoder.encode([]).values())


@pytest.mark.parametrize(("side", "same"), [("left", "tail"), ("right", "head")])
def test_long_texts_lose_the_side_that_the_manifest_names(bundle: Bundle, tmp_path: Path, side: str, same: str) -> None:
    spec = dataclasses.replace(bundle.manifest.encoder, truncation_side=side)
    encoder = PromptEncoder(variant(bundle, tmp_path / "b", encoder=spec))
    long = " ".join(str(i) for i in range(400))
    texts = {"tail": ["zzz " + long, "qqq " + long], "head": [long + " zzz", long + " qqq"]}
    name = bundle.manifest.instance[0].name
    kept, lost = (encoder.encode(texts[key])[name] for key in (same, "head" if same == "tail" else "tail"))
    assert np.array_equal(kept[0], kept[1]) and not np.array_equal(lost[0], lost[1])


def test_compose_and_update(encoder: PromptEncoder) -> None:
    """A step along the gradient moves the soft prompt against it; a zero gradient moves nothing."""
    manifest = encoder.bundle.manifest
    instance, start = encoder.encode(TEXTS[:3]), lopa.Factors.start(encoder.bundle).tensors
    soft = encoder.compose(instance, start)
    assert soft.shape == (3, manifest.rows, manifest.fm.hidden_size) and soft.dtype == np.float32
    moments = Moments.zeros(manifest.personal)
    gradient = np.ones_like(soft)
    settings = {"learning_rate": 1e-3, "weight_decay": 0.0, "clip": 1.0}
    update = encoder.update(instance, start, moments, gradient, step=1, **settings)
    assert update.gradient_norm > 0
    assert encoder.compose(instance, update.personal).sum() < soft.sum()
    still = encoder.update(instance, start, moments, np.zeros_like(soft), step=1, **settings)
    assert still.gradient_norm == 0 and all(np.array_equal(still.personal[name], start[name]) for name in start)


def test_what_compose_carries_changes_nothing_but_the_work(encoder: PromptEncoder, bundle: Bundle) -> None:
    """To the last bit, or a resumed run would not end as an unbroken one. It is used: another composition's gives another step."""
    instance, start = encoder.encode(TEXTS), lopa.Factors.start(bundle).tensors
    composed = encoder.compose_to_update(instance, start)
    assert np.array_equal(composed.soft_prompts, encoder.compose(instance, start))
    assert {name: value.shape[1:] for name, value in composed.carried.items()} == {
        spec.name: spec.shape for spec in bundle.manifest.carried
    }
    arguments = (instance, start, Moments.zeros(bundle.manifest.personal), np.ones_like(composed.soft_prompts))
    settings = {"learning_rate": 1e-3, "weight_decay": 0.0, "clip": 1.0, "step": 1}
    alone, carried = (encoder.update(*arguments, **settings, carried=given) for given in (None, composed.carried))
    assert carried.gradient_norm == alone.gradient_norm > 0
    assert all(np.array_equal(value, alone.personal[name]) for name, value in carried.personal.items())
    others = {name: value + 1 for name, value in composed.carried.items()}
    assert encoder.update(*arguments, **settings, carried=others).gradient_norm != alone.gradient_norm


def test_sessions_are_made_on_first_use(bundle: Bundle) -> None:
    encoder = PromptEncoder(bundle)
    encoder.compose(encoder.encode(["x"]), lopa.Factors.start(bundle).tensors)
    assert sorted(encoder._sessions) == ["compose.onnx", "encode.onnx"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"instance": (TensorSpec("y", (32,)),)}, "other outputs"),
        ({"instance": (TensorSpec("x", (31,)),)}, "output x"),
        ({"rows": 5}, "output soft_prompt"),
        ({"personal": (TensorSpec("other", (2, 1)),), "aligned": (AlignedSpec("other"),)}, "other inputs"),
        ({"carried": ()}, "other outputs"),
        ({"carried": (TensorSpec("carried.v", (32, 3)),)}, "output carried.v"),
    ],
)
def test_graphs_that_break_the_contract_are_refused(bundle: Bundle, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    encoder = PromptEncoder(variant(bundle, tmp_path / "b", **changes))
    with pytest.raises(lopa.BundleError, match=words):
        encoder.compose(encoder.encode(["x"]), lopa.Factors.start(bundle).tensors)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aligned": (AlignedSpec("W1u.Q"),)}, "other outputs"),
        ({"aligned": tuple(map(AlignedSpec, ("W1u.P", "W1v.Q", "W2u.Q", "W2v.Q")))}, "other outputs"),
        ({"instance": (TensorSpec("y", (32,)),)}, "other inputs"),
    ],
)
def test_a_graph_of_what_is_read_that_breaks_the_contract_is_refused(
    bundle: Bundle, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    encoder = PromptEncoder(variant(bundle, tmp_path / "b", **changes))
    with pytest.raises(lopa.BundleError, match=f"reads.onnx has {words}"):
        encoder.reads({"x": np.zeros((2, 32), np.float32)})


def with_graph(bundle: Bundle, folder: Path, graph: str, model: onnx.ModelProto) -> Bundle:
    """The bundle with another graph in one's place."""
    copy = variant(bundle, folder / "first")
    copy.path(graph).write_bytes(model.SerializeToString())
    return variant(copy, folder / "second", files={**copy.manifest.files, graph: digest_file(copy.path(graph))})


def cut_as_it_runs(bundle: Bundle, folder: Path, graph: str, output: str, axis: int) -> Bundle:
    """A bundle one of whose graphs gives a single element along an axis, which nothing shows before it runs."""
    model = onnx.load(bundle.path(graph))
    for node in model.graph.node:
        node.output[:] = ["whole" if name == output else name for name in node.output]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([True]), "first"))
    model.graph.node.append(onnx.helper.make_node("Compress", ["whole", "first"], [output], axis=axis))
    return with_graph(bundle, folder, graph, model)


@pytest.mark.parametrize(
    ("graph", "output", "axis"),
    [
        ("encode.onnx", "x", 1),
        ("reads.onnx", "reads.W2u.Q", 0),
        ("reads.onnx", "reads.W2u.Q", 1),
        ("compose.onnx", "soft_prompt", 0),
        ("compose.onnx", "soft_prompt", 1),
        ("update.onnx", "new.W1v.Q", 0),
    ],
)
def test_shapes_are_held_to_the_contract_as_they_come(bundle: Bundle, tmp_path: Path, graph: str, output: str, axis: int) -> None:
    encoder = PromptEncoder(cut_as_it_runs(bundle, tmp_path, graph, output, axis))
    start, moments = lopa.Factors.start(bundle).tensors, Moments.zeros(bundle.manifest.personal)
    settings = {"learning_rate": 1e-3, "weight_decay": 0.0, "clip": 1.0, "step": 1}
    with pytest.raises(lopa.BundleError, match=rf"{graph}: output {output} came as \["):
        instance = encoder.encode(TEXTS)
        encoder.reads(instance)
        encoder.update(instance, start, moments, np.ones_like(encoder.compose(instance, start)), **settings)


def test_a_graph_reads_no_file_but_its_own(bundle: Bundle, tmp_path: Path) -> None:
    """Weights elsewhere would be a way from any file of the user's to the server; ONNX Runtime 1.20 follows it."""
    model = onnx.load(bundle.path("reads.onnx"))
    secret = tmp_path / "secret"
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    secret.write_bytes(weight.raw_data)
    onnx.external_data_helper.set_external_data(weight, str(secret))
    weight.ClearField("raw_data")
    encoder = PromptEncoder(with_graph(bundle, tmp_path, "reads.onnx", model))
    with pytest.raises(lopa.BundleError, match=r"reads\.onnx of bundle .* weights in another file"):
        encoder.reads(encoder.encode(TEXTS))


@pytest.mark.parametrize("name", ["encode.onnx", "tokenizer.json"])
def test_files_that_are_no_graph_are_refused(bundle: Bundle, tmp_path: Path, name: str) -> None:
    broken = variant(bundle, tmp_path / "first")
    broken.path(name).write_bytes(b"{}")
    specs = {**broken.manifest.files, name: digest_file(broken.path(name))}
    encoder = PromptEncoder(variant(broken, tmp_path / "second", files=specs))
    with pytest.raises(lopa.BundleError, match=name):
        encoder.encode(["x"])
