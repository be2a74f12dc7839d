"""A finished bundle is checked without torch, and what is wrong in it is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from lopa.bundle import Bundle, digest_file
from lopa.errors import BundleError
from lopa.manifest import MANIFEST, Manifest
from lopa.signing import check_signature
from lopa_exporters.audit import Audit
from lopa_exporters.signing import create_key, sign_bundle
from lopa_exporters.structure import ALLOWED, SUPPORT, ExportError, check_structure, oldest_runtime
from onnx import TensorProto, helper, numpy_helper

from tests.exporters.test_cli import run
from tests.tiny_bundle import build_tiny_bundle


@pytest.fixture(scope="module")
def good(fm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build_tiny_bundle(fm_folder, tmp_path_factory.mktemp("audit") / "bundle"))


def changed(bundle: Bundle, folder: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> Bundle:
    """A copy with one graph changed and a manifest that agrees with it."""
    shutil.copytree(bundle.folder, folder)
    model = onnx.load(folder / name)
    change(model)
    onnx.save(model, folder / name)
    text = Manifest.from_json((folder / MANIFEST).read_text())
    files = {file: digest_file(folder / file) for file in text.file_names}
    (folder / MANIFEST).write_text(type(text)(**{**vars(text), "files": files}).to_json())
    return Bundle.open(folder)


def scaled(factor: float, largest: bool = True) -> Callable[[onnx.ModelProto], None]:
    """Multiply one constant."""

    def change(model: onnx.ModelProto) -> None:
        matrices = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2]
        tensor = sorted(matrices, key=lambda tensor: len(tensor.raw_data))[-1 if largest else 0]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * factor, tensor.name))

    return change


def newer(model: onnx.ModelProto) -> None:
    model.ir_version = 11


def foreign(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    value = model.graph.output[0].name
    node = next(node for node in model.graph.node if value in node.output)
    node.output[list(node.output).index(value)] = "before"
    model.graph.node.append(helper.make_node("Gelu", ["before"], [value], domain="com.microsoft"))


def outside(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def test_a_good_bundle_passes(good: Bundle) -> None:
    assert [check.name for check in Audit(good).run()] == [
        "structure",
        "starting factors",
        "priors",
        "aligned tensors",
        "encode: lengths and batches",
        "compose: batches",
        "update: gradient of compose",
        "update: clipping and AdamW",
    ]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("compose.onnx", scaled(1.2), "finite difference"),
        ("update.onnx", scaled(0.8), "finite difference"),
        ("encode.onnx", newer, "IR 11"),
        ("reads.onnx", newer, "IR 11"),
        ("compose.onnx", foreign, "com.microsoft::Gelu"),
        ("update.onnx", outside, "in another file"),
    ],
)
def test_what_is_wrong_is_found(good: Bundle, tmp_path: Path, name: str, change: Callable[[onnx.ModelProto], None], words: str) -> None:
    bundle = changed(good, tmp_path / "bundle", name, change)
    with pytest.raises(ExportError, match=words) as failure:
        list(Audit(bundle).run())
    assert name in str(failure.value) or name.removesuffix(".onnx") in str(failure.value)


def test_aligned_tensors_must_leave_the_starting_soft_prompts_alone(good: Bundle, tmp_path: Path) -> None:
    """Z's factors start with B zero, not A: a new user's own answers may not set B."""
    folder = tmp_path / "bundle"
    shutil.copytree(good.folder, folder)
    model = onnx.load(folder / "reads.onnx")
    output = next(value for value in model.graph.output if value.name == "reads.W1v.Q")
    for node in model.graph.node:
        node.output[:] = ["reads.Z.B" if name == output.name else name for name in node.output]
    output.name, output.type.tensor_type.shape.dim[1].dim_value = "reads.Z.B", good.manifest.fm.hidden_size
    onnx.save(model, folder / "reads.onnx")
    aligned = tuple(replace(spec, name="Z.B") if spec.name == "W1v.Q" else spec for spec in good.manifest.aligned)
    files = {**good.manifest.files, "reads.onnx": digest_file(folder / "reads.onnx")}
    (folder / MANIFEST).write_text(replace(good.manifest, aligned=aligned, files=files).to_json())
    with pytest.raises(ExportError, match=r"depend on .*Z\.B"):
        list(Audit(Bundle.open(folder)).run())


def test_graphs_in_ort_format(good: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "mobile", good.folder, "--out", tmp_path / "ort") == 0
    assert sorted(path.name for path in (tmp_path / "ort").iterdir()) == ["compose.ort", "encode.ort", "reads.ort", "update.ort"]
    assert (tmp_path / "ort" / "encode.ort").read_bytes()[4:8] == b"ORTM"
    assert run("export", "mobile", good.folder, "--out", tmp_path / "ort") == 1
    assert "exists" in capsys.readouterr().err


def test_the_oldest_runtime_is_the_declared_one(good: Bundle) -> None:
    assert oldest_runtime() in SUPPORT
    structure = check_structure(good.path("update.onnx"))
    assert all(operator.startswith("::") for operator in structure.operators)
    assert not structure.quantized
    assert set(ALLOWED) == {"MatMulNBits"}


def test_a_signature_covers_everything_and_changes_no_id(good: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(good.folder, folder)
    key = create_key(tmp_path / "key.pem")
    other = create_key(tmp_path / "other.pem")
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        create_key(tmp_path / "key.pem")
    with pytest.raises(BundleError, match="not signed"):
        check_signature(good.manifest, [key])
    signed = sign_bundle(folder, tmp_path / "key.pem")
    assert signed.manifest.id == good.manifest.id
    check_signature(signed.manifest, [other, key])
    with pytest.raises(BundleError, match="none of the 1 trusted keys"):
        check_signature(signed.manifest, [other])
    with pytest.raises(BundleError, match="64 hex digits"):
        check_signature(signed.manifest, ["xyz"])
    assert run("export", "verify", folder, "--key", key) == 0
    assert "signature: by a trusted key" in capsys.readouterr().out
    assert run("export", "verify", folder, "--key", other) == 1
    assert "trusted keys" in capsys.readouterr().err
    assert run("export", "inspect", folder) == 0
    assert "LayerNorm" in (printed := capsys.readouterr().out) or "MatMul" in printed
