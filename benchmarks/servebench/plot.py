"""The picture of a run of benchmarks/serving.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LABELS = {
    "gemm_floor": "bare matrix products\n(decode only)",
    "ours": "lopa over gRPC\n32 soft prompts",
    "hf_generate": "transformers\ninputs_embeds",
    "peft_lora": "PEFT\n32 adapters",
    "vllm_embeds": "vLLM\nprompt_embeds",
    "vllm_lora": "vLLM\n32 adapters",
}


def draw(path: Path, systems: Mapping[str, float], by_users: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> None:
    """Write a PNG: systems side by side on the left, throughput by number of users on the right."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = sorted(systems, key=lambda name: systems[name])
    colors = ["tab:orange" if name == "ours" else "lightgray" if name == "gemm_floor" else "tab:blue" for name in names]
    bars = left.barh([LABELS[name] for name in names], [systems[name] for name in names], color=colors)
    left.bar_label(bars, fmt="%.0f", padding=3)
    left.margins(x=0.12)
    left.set(xlabel="generated tokens/s", title="32 requests at once, 64 + 64 positions")
    users = [entry["name"].replace(" users", "").replace("plain model", "plain") for entry in by_users]
    bars = right.bar(users, [entry["tokens_per_second"] for entry in by_users], color=["lightgray"] + ["tab:orange"] * (len(users) - 1))
    right.bar_label(bars, fmt="%.0f", padding=3)
    right.margins(y=0.15)
    right.set(xlabel="distinct users", ylabel="generated tokens/s", title="lopa by number of users")
    figure.suptitle(f"88M-parameter Llama, bfloat16, {machine['cores']} cores of {machine['cpu']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
