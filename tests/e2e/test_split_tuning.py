"""Split tuning is exact: device plus server reach the factors that ordinary torch training reaches."""

from __future__ import annotations

from pathlib import Path

import lopa
import numpy as np
import pytest
import torch
from lopa.bundle import Bundle
from lopa.tuning import TuneConfig
from lopa_exporters.data import Example, build_dataset
from lopa_exporters.frozen import FrozenModel
from lopa_exporters.simulate import aligned_start, tune_personal
from lopa_server.app import ServerConfig, start_server

from tests.tiny import build_tiny_fm
from tests.tiny_bundle import build_tiny_bundle, build_tiny_parts

STEPS = 20
TOLERANCE = 1e-4
NAMES = ("alpha", "beta", "gamma", "delta", "count", "total")
EXAMPLES = [Example("u", "t", f"def {name}({'x' * (1 + i % 7)}):\n    return ", name, bool(i % 2)) for i in range(3) for name in NAMES]


@pytest.mark.parametrize("profile", ["factors", "heads", "prompt"])
def test_device_and_server_reach_the_factors_of_ordinary_training(tmp_path: Path, profile: str) -> None:
    fm = build_tiny_fm(tmp_path / "fm")
    bundle = build_tiny_bundle(fm, tmp_path / "bundle", profile=profile, personal_dtype="F32")
    exact = {"dtype": "F32", "gradient_dtype": "F32"}
    config = TuneConfig(steps=STEPS, batch_size=8, learning_rate=1e-2, weight_decay=1e-2, clip=1.0, validate_every=STEPS, **exact)

    on_device, losses = _tune_split(fm, bundle, tmp_path, config)
    encoder, start = build_tiny_parts(fm, profile=profile)
    model = FrozenModel.load(fm, device="cpu")
    dataset = build_dataset(EXAMPLES, model, encoder, soft_rows=start.config.soft_prompt_rows, standardize=False)
    begun = aligned_start(start, dataset.features, [encoder.tokenizer.encode(example.target).ids for example in EXAMPLES])
    reference = tune_personal(model, dataset, begun, config, range(len(EXAMPLES)), at_rest=torch.float32)

    np.testing.assert_allclose(losses, reference.losses, rtol=TOLERANCE)
    assert losses[-1] < losses[0]
    for name, tensor in reference.last.items():
        expected, found = tensor.double().numpy(), on_device[name].astype(np.float64)
        moved = np.linalg.norm(expected - start.start[name].double().numpy())
        assert moved > 0.01, name
        assert np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected), name


def _tune_split(fm: Path, bundle: Path, folder: Path, config: TuneConfig) -> tuple[dict[str, np.ndarray], tuple[float, ...]]:
    """Factors after the last step and the losses, by the SDK against a real server."""
    examples = [lopa.Example(example.prompt, example.target, append_end=example.append_end) for example in EXAMPLES]
    settings = lopa.ClientConfig(cache=folder / "cache")
    with start_server(ServerConfig(fm=fm, bundle=bundle, device="cpu", dtype="float32")) as server:  # noqa: SIM117
        with lopa.connect(server.address, config=settings) as client:
            assert client.bundle().manifest.id == Bundle.open(bundle).manifest.id
            persona = client.personal(folder / "user")
            report = persona.tune(examples, validation=examples, config=config)
    assert report.best_step == STEPS
    return dict(persona.factors.tensors), report.losses
