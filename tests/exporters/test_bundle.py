"""Bundles: complete, reproducible, free of this machine's traces, and replaced as a whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
from lopa.bundle import Bundle
from lopa_exporters import verify
from lopa_exporters.bundle import export_bundle, read_fm_spec, replace_method
from lopa_exporters.encoder import Encoder
from lopa_exporters.lopa import LoPA
from lopa_exporters.verify import ExportError
from safetensors.numpy import load_file

from tests.tiny_bundle import build_tiny_bundle, build_tiny_parts


@pytest.fixture(scope="module")
def bundle(fm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build_tiny_bundle(fm_folder, tmp_path_factory.mktemp("bundles") / "first"))


def test_the_same_input_gives_the_same_id(fm_folder: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    again = Bundle.open(build_tiny_bundle(fm_folder, Path("elsewhere") / "second"))
    assert again.manifest.id == bundle.manifest.id


def test_no_file_holds_a_path_of_this_machine(bundle: Bundle, fm_folder: Path) -> None:
    traces = [str(Path(__file__).parents[2]), str(fm_folder), str(Path.home()), "site-packages", ".py", "/tmp/"]
    for name in ("encode.onnx", "compose.onnx", "update.onnx", "reads.onnx", "manifest.json", "factors.safetensors"):
        content = bundle.path(name).read_bytes()
        assert not [trace for trace in traces if trace.encode() in content], name


def test_the_manifest_says_what_is_in_the_files(bundle: Bundle, fm_folder: Path, lopa: LoPA) -> None:
    manifest = bundle.manifest
    assert manifest.fm == read_fm_spec(fm_folder)
    assert (manifest.rows, manifest.rank, manifest.composition, manifest.profile) == (4, 2, "product", "factors")
    assert [(spec.name, spec.shape) for spec in manifest.instance] == [("x", (32,))]
    start = load_file(bundle.path("factors.safetensors"))
    assert {name: (array.shape, array.dtype.name) for name, array in start.items()} == {
        spec.name: (spec.shape, "float16") for spec in manifest.personal
    }
    assert {spec.name for spec in manifest.aligned} == {spec.name for spec in manifest.personal if spec.name.endswith(".Q")}
    assert sum(math.prod(spec.shape) for spec in manifest.personal) == lopa.config.personal_count()
    tokenizer = json.loads(bundle.path("tokenizer.json").read_text())
    assert tokenizer["padding"] is None
    assert tokenizer["truncation"] is None


def test_a_graph_that_is_wrong_leaves_the_old_bundle(
    fm_folder: Path, bundle: Bundle, encoder: Encoder, lopa: LoPA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(bundle.folder, out)
    monkeypatch.setattr(verify, "TOLERANCE", 0.0)
    with pytest.raises(ExportError):
        export_bundle(out, fm=read_fm_spec(fm_folder), encoder=encoder, lopa=lopa)
    assert Bundle.open(out).manifest == bundle.manifest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_the_same_method_over_the_same_encoder_gives_the_same_bundle(bundle: Bundle, fm_folder: Path, tmp_path: Path) -> None:
    """What `training/bundle.py --shared` does with the shipped bundle."""
    _, lopa = build_tiny_parts(fm_folder)
    assert replace_method(bundle, lopa, tmp_path / "same").manifest.id == bundle.manifest.id
    other = dataclasses.replace(lopa, config=dataclasses.replace(lopa.config, spread=3.0))
    assert {spec.spread for spec in replace_method(bundle, other, tmp_path / "other").manifest.aligned} == {3.0}
    with pytest.raises(ValueError, match="not those of bundle"):
        replace_method(bundle, dataclasses.replace(lopa, config=dataclasses.replace(lopa.config, features=31)), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_folder_that_is_no_bundle_is_not_touched(fm_folder: Path, encoder: Encoder, lopa: LoPA, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not a bundle"):
        export_bundle(tmp_path, fm=read_fm_spec(fm_folder), encoder=encoder, lopa=lopa)
    assert (tmp_path / "precious.txt").read_text() == "keep me"
