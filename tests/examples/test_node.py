"""A second language: the Node.js device gets the numbers that Python gets, from the same bundle and the same server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lopa
import numpy as np
import pytest
from filelock import FileLock
from lopa.bundle import Bundle
from lopa.encoder import Moments, PromptEncoder
from lopa.values import Pair
from lopa_server.app import ServerConfig, start_server
from lopa_server.models import nano_bundle_folder
from safetensors.numpy import load_file

from tests.tiny import build_tiny_fm
from tests.tiny_bundle import build_tiny_bundle

FOLDER = Path(__file__).parents[2] / "examples" / "node"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("node") is None or shutil.which("npm") is None, reason="node and npm are not on this machine"),
]
EXAMPLES = [{"prompt": f"def f{i}(x):\n    return ", "target": f"x + {i}\n"} for i in range(4)]
JOB = {
    "prompt": "class Point:\n    def __init__(self, café):\n" * 6,  # longer than the encoder's 64 tokens, and not only ASCII
    "max_tokens": 8,
    "examples": EXAMPLES,
    "steps": 3,
    "learning_rate": 0.01,
    "weight_decay": 0.01,
    "clip": 0.5,
}


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    """The example's npm packages: only what package-lock.json names, no install scripts."""
    with FileLock(FOLDER / "node_modules.lock"):
        installed, wanted = FOLDER / "node_modules" / ".package-lock.json", FOLDER / "package-lock.json"
        if installed.exists() and installed.stat().st_mtime >= wanted.stat().st_mtime:
            return
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(command, cwd=FOLDER, check=True, env={**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"}, capture_output=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of a server of a tiny model, and the bundle that it publishes."""
    folder = tmp_path_factory.mktemp("node")
    fm = build_tiny_fm(folder / "fm")
    bundle = build_tiny_bundle(fm, folder / "bundle")
    with start_server(ServerConfig(fm=fm, bundle=bundle, device="cpu", dtype="float32")) as running:
        yield running.address, bundle


def node(*arguments: object, script: str = "device.mjs") -> subprocess.CompletedProcess[str]:
    command = ["node", str(FOLDER / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def run_job(folder: Path, *arguments: object) -> dict[str, Any]:
    job = folder / "job.json"
    job.write_text(json.dumps(JOB))
    done = node(arguments[0], job, *arguments[1:])
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_device_in_javascript_gets_what_python_gets(server: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = server
    found = run_job(tmp_path, address)
    bundle = Bundle.open(folder)
    encoder = PromptEncoder(bundle)
    start = {name: value.astype(np.float32) for name, value in load_file(bundle.path("factors.safetensors")).items()}
    assert found["bundle_id"] == bundle.manifest.id
    assert len(found["tokens"]) == bundle.manifest.encoder.max_tokens
    soft = encoder.compose(encoder.encode([str(JOB["prompt"])]), start)
    np.testing.assert_allclose(np.array(found["soft_prompt"]).reshape(soft.shape), soft, atol=1e-5, rtol=0)
    with lopa.connect(address) as client:
        generation = client.generate(str(JOB["prompt"]), soft_prompt=soft[0], max_tokens=JOB["max_tokens"])  # type: ignore[arg-type]
        assert (found["text"], tuple(found["token_ids"])) == (generation.text, generation.token_ids)
        losses, personal = tune(client, encoder, start)
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
    assert losses[-1] < losses[0]
    for name, value in personal.items():
        np.testing.assert_allclose(np.array(found["personal"][name]).reshape(value.shape), value, atol=1e-5, rtol=0, err_msg=name)


def tune(client: lopa.Client, encoder: PromptEncoder, personal: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
    """The job's steps in Python."""
    instance = encoder.encode([example["prompt"] for example in EXAMPLES])
    moments, losses = Moments.zeros(encoder.bundle.manifest.personal), []
    for step in range(1, 4):
        soft = encoder.compose(instance, personal)
        pairs = [Pair(example["prompt"], example["target"], row) for example, row in zip(EXAMPLES, soft, strict=True)]
        gradients = client.prompt_gradients(pairs, dtype="F32", gradient_dtype="F32")
        tokens = sum(gradient.target_tokens for gradient in gradients)
        losses.append(sum(gradient.nll_sum for gradient in gradients) / tokens)
        mean = np.stack([gradient.gradient for gradient in gradients]) / np.float32(tokens)
        step_result = encoder.update(instance, personal, moments, mean, learning_rate=0.01, weight_decay=0.01, clip=0.5, step=step)
        personal, moments = dict(step_result.personal), step_result.moments
    return losses, personal


def test_a_bundle_s_folder_is_verified(server: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = server
    copy = tmp_path / "bundle"
    shutil.copytree(folder, copy)
    assert run_job(tmp_path, address, copy)["bundle_id"] == Bundle.open(folder).manifest.id
    for name, damage in (("compose.onnx", b"x"), ("manifest.json", b"")):
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        path = copy / name
        path.write_bytes(path.read_bytes() + damage if damage else path.read_bytes().replace(b'"rows": 4', b'"rows": 5'))
        done = node(address, tmp_path / "job.json", copy)
        assert done.returncode == 1
        assert name in done.stderr


def test_the_shipped_bundle_has_its_id_in_javascript_too() -> None:
    """Floats and non-ASCII text of a manifest that was written by Python."""
    code = "const { Bundle } = await import(process.argv[1]); console.log((await Bundle.open(process.argv[2])).id)"
    command = ["node", "--input-type=module", "-e", code, str(FOLDER / "bundle.mjs"), str(nano_bundle_folder())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == Bundle.open(nano_bundle_folder()).manifest.id


def test_the_lock_file_names_no_private_registry() -> None:
    lock = json.loads((FOLDER / "package-lock.json").read_text())
    resolved = [package["resolved"] for package in lock["packages"].values() if "resolved" in package]
    assert all(url.startswith("https://registry.npmjs.org/") for url in resolved)
    assert all("integrity" in package for name, package in lock["packages"].items() if name)
