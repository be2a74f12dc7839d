"""The graphs are what torch computes, and a graph that is not stops the export."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from lopa_exporters import graphs, verify
from lopa_exporters.adamw import bias_correction
from lopa_exporters.encoder import Encoder
from lopa_exporters.lopa import LoPA, LoPAConfig, aligned, init_lopa, instance_factor, soft_prompt
from lopa_exporters.verify import ExportError, Graph
from onnx import numpy_helper
from torch import nn


def make_lopa(profile: str = "factors", composition: str = "product") -> LoPA:
    config = LoPAConfig(
        hidden=24, features=12, rows=3, rank=2, head_width=8, profile=profile, composition=composition, inner_std=0.3, output_std=0.5
    )
    return init_lopa(config, torch.randn(40, 24, generator=torch.Generator().manual_seed(5)), torch.Generator().manual_seed(6))


METHODS = [("factors", "product"), ("heads", "product"), ("factors", "concat"), ("heads", "max"), ("factors", "none"), ("prompt", "none")]


@pytest.mark.parametrize(("profile", "composition"), METHODS)
def test_compose_and_update_equal_torch(tmp_path: Path, profile: str, composition: str) -> None:
    """Twenty device steps beside twenty of autograd, clip_grad_norm_ and torch.optim.AdamW."""
    lopa = make_lopa(profile, composition)
    graphs.export_compose(lopa, tmp_path / "compose.onnx")
    graphs.export_update(lopa, tmp_path / "update.onnx")
    verify.verify_compose(tmp_path / "compose.onnx", lopa)
    verify.verify_update(tmp_path / "update.onnx", lopa)
    compose, update = Graph(tmp_path / "compose.onnx"), Graph(tmp_path / "update.onnx")

    parameters = {name: tensor.clone().requires_grad_() for name, tensor in lopa.start.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.05)
    state = {**lopa.start, **graphs.initial_moments(lopa)}
    generator = torch.Generator().manual_seed(0)
    goal = torch.randn(lopa.config.soft_prompt_rows, 24, generator=generator)
    for step in range(1, 21):
        x = torch.randn(1 + step % 8, 12, generator=generator)
        z = soft_prompt(lopa.config, lopa.shared, parameters, x)
        known = compose(x=x, **{name: state[name] for name in lopa.start})
        found = known.pop("soft_prompt")
        assert torch.allclose(found, z, atol=1e-5)
        optimizer.zero_grad()
        (z - goal).square().mean().backward()
        nn.utils.clip_grad_norm_(parameters.values(), 0.3)
        optimizer.step()
        scalars = {"learning_rate": 1e-2, "weight_decay": 0.05, "clip": 0.3, "step": step}
        outputs = update(
            x=x, gradient=2 * (found - goal) / found.numel(), **known, **state, **{k: torch.tensor(float(v)) for k, v in scalars.items()}
        )
        state = {name: outputs[f"new.{name}"] for name in state}
    for name, parameter in parameters.items():
        error = (state[name] - parameter.detach()).norm() / parameter.detach().norm()
        assert error <= 1e-5, name


def test_padding_never_changes_a_row(tmp_path: Path, encoder: Encoder) -> None:
    graphs.export_encode(encoder, encoder.config.max_tokens, tmp_path / "encode.onnx")
    verify.verify_encode(tmp_path / "encode.onnx", encoder, encoder.width, 300, 64)
    graph = Graph(tmp_path / "encode.onnx")
    row = torch.arange(2, 9)[None]
    alone = graph(input_ids=row, attention_mask=torch.ones_like(row))["x"]
    padded = torch.cat((row, torch.full((1, 50), 7)), dim=1)
    mask = (torch.arange(57) < 7).long()[None]
    assert torch.allclose(graph(input_ids=padded, attention_mask=mask)["x"], alone, atol=1e-5)


def plant(path: Path, change: float) -> None:
    """Change the largest constant of a graph a little."""
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(largest).copy()
    values += change
    largest.CopyFrom(numpy_helper.from_array(values, largest.name))
    onnx.save(model, path)


def test_a_planted_mismatch_fails_every_verification(tmp_path: Path, encoder: Encoder, lopa: LoPA) -> None:
    encode, compose, update = (tmp_path / f"{name}.onnx" for name in ("encode", "compose", "update"))
    graphs.export_encode(encoder, 64, encode)
    graphs.export_compose(lopa, compose)
    graphs.export_update(lopa, update)
    for path in (encode, compose, update):
        plant(path, 1e-3)
    with pytest.raises(ExportError, match=r"encode\.onnx.*differs from torch"):
        verify.verify_encode(encode, encoder, encoder.width, 300, 64)
    with pytest.raises(ExportError, match=r"compose\.onnx.*differs from torch"):
        verify.verify_compose(compose, lopa)
    with pytest.raises(ExportError, match=r"update\.onnx.*differs from torch"):
        verify.verify_update(update, lopa)


def test_a_wrong_name_or_axis_fails(tmp_path: Path, lopa: LoPA) -> None:
    path = tmp_path / "compose.onnx"
    graphs.export_compose(lopa, path)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    onnx.save(model, path)
    with pytest.raises(ExportError, match="the contract says"):
        verify.verify_compose(path, lopa)
    with pytest.raises(ExportError, match="the contract has"):
        verify.verify_update(path, lopa)


def test_a_value_that_is_not_finite_fails() -> None:
    with pytest.raises(ExportError, match="differs"):
        verify.check_close("x", torch.tensor([float("nan")]), torch.tensor([0.0]))


def test_bias_correction_is_exact_at_the_first_steps() -> None:
    """1 - beta^step in float32 against double precision, where the plain formula loses three digits."""
    for beta in (0.9, 0.999):
        for step in (1, 2, 3, 10, 1000, 100_000):
            found = bias_correction(beta, torch.tensor(float(step))).item()
            assert found == pytest.approx(1 - beta**step, rel=3e-7)


def test_graphs_use_ordinary_operators_only(tmp_path: Path, lopa: LoPA) -> None:
    graphs.export_update(lopa, tmp_path / "update.onnx")
    model = onnx.load(tmp_path / "update.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert [(opset.domain, opset.version) for opset in model.opset_import if opset.domain == ""] == [("", graphs.OPSET)]
    assert model.ir_version <= 10


def test_reads_are_what_compose_multiplies_q_with(tmp_path: Path) -> None:
    """By the definition: with P a column of ones and c one, each entry of W x + b rises by what Q reads, times Q."""
    lopa = make_lopa()
    graphs.export_reads(lopa, tmp_path / "reads.onnx")
    verify.verify_reads(tmp_path / "reads.onnx", lopa)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    found = Graph(tmp_path / "reads.onnx")(x=x)
    assert sorted(found) == ["reads.W1u.Q", "reads.W1v.Q", "reads.W2u.Q", "reads.W2v.Q"]
    plain = instance_factor(lopa.config, {**lopa.shared, **lopa.start}, "v", x)
    ones = torch.ones_like(lopa.start["W2v.P"])
    moved = instance_factor(lopa.config, {**lopa.shared, **lopa.start, "W2v.P": ones}, "v", x)
    rise = (found["reads.W2v.Q"] @ lopa.start["W2v.Q"]).sum(dim=1)
    assert torch.allclose(moved - plain, rise[:, None, None].expand_as(plain), atol=1e-5)
    assert torch.equal(found["reads.W1u.Q"], x)


def test_a_q_that_the_population_set_is_not_for_the_user_s_examples_to_set() -> None:
    lopa = make_lopa()
    start = {**lopa.start, "W1u.P": torch.ones_like(lopa.start["W1u.P"])}
    assert aligned(LoPA(lopa.config, lopa.shared, start)) == ["W2u.Q", "W1v.Q", "W2v.Q"]
