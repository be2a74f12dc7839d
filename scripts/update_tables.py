"""Write the measured tables of README.md and docs/serving.md from benchmarks/results; with --check, fail when one is stale.

make demo ARGS="--json benchmarks/results/demo.json --plot docs/demo.png"
python benchmarks/serving.py --json benchmarks/results/serving.json --plot docs/serving.png
python scripts/update_tables.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = Mapping[str, Any]
SYSTEMS = {
    "gemm_floor": "bare matrix products of a decode step (the floor)",
    "ours": "**lopa over gRPC, 32 soft prompts**",
    "vllm_embeds": "vLLM, `prompt_embeds`",
    "hf_generate": "transformers, `inputs_embeds`",
    "vllm_lora": "vLLM, 32 adapters",
    "peft_lora": "PEFT, 32 adapters in a batch",
}
WANTED = {
    "ours_over_vllm_embeds": "1.3",
    "ours_over_vllm_lora": "3.5",
    "ours_over_peft_lora": "4",
    "decode_share_of_gemm_floor": "0.7",
    "users_10000_over_1": "0.98",
    "users_10000_over_1_uncached": "0.98",
    "personal_over_plain": "0.97",
    "shared_prefix_overhead": "0.10",
    "gradient_batch_gain": "3",
    "gradient_gain_gemm_ceiling": "",
    "gradient_share_of_gemm_floor": "",
    "gradient_alone_share_of_gemm_floor": "",
    "stream_p99_under_gradients": "2",
    "kv_waste": "0.04",
    "server_bytes_per_idle_user": "0",
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def completion(demo: Row) -> str:
    users = _of_task(demo, "completion")
    header = ("user", "plain model", "own factors", "gain", "others' factors")
    mean = ("**mean**", *_losses(users, bold="**"))
    return table(header, [*((user["name"], *_losses([user])) for user in users), mean])


def filing(demo: Row) -> str:
    users = _of_task(demo, "filing")
    header = ("user", "plain model", "own factors", "gain", "others' factors", "plain right", "own right", "chance")
    rows = [(user["name"], *_losses([user]), *_right([user], digits=0)) for user in users]
    return table(header, [*rows, ("**mean**", *_losses(users, bold="**"), *_right(users, digits=1, bold="**"))])


def batch(demo: Row) -> str:
    users, mixed = _of_task(demo, "completion"), demo["mixed_batch"]
    others = fmean(1 - user["other_nll"] / user["base_nll"] for user in users)
    own, size = fmean(map(_gain, users)), max(user["factor_bytes"] for user in demo["users"])
    return (
        f"On completion others' factors gain {100 * others:.1f} % in the mean, one's own {100 * own:.1f} %. "
        f"A user's factors take {size / 1024:.1f} KiB a task. {mixed['requests']} streams of all {mixed['users']} users in one mixed\n"
        f"batch ran at {mixed['tokens_per_second']:,.0f} tokens/s with soft prompts, {mixed['plain_tokens_per_second']:,.0f} without."
    )


def _of_task(demo: Row, task: str) -> list[Row]:
    return [user for user in demo["users"] if user["task"] == task]


def _gain(user: Row) -> float:
    return float(1 - user["personal_nll"] / user["base_nll"])


def _losses(users: Sequence[Row], bold: str = "") -> tuple[str, ...]:
    base, own, other = (f"{fmean(user[name] for user in users):.3f}" for name in ("base_nll", "personal_nll", "other_nll"))
    return base, own, f"{bold}{100 * fmean(map(_gain, users)):.1f} %{bold}", other


def _right(users: Sequence[Row], digits: int, bold: str = "") -> tuple[str, ...]:
    names = ("base_accuracy", "personal_accuracy", "chance_accuracy")
    plain, own, chance = (f"{100 * fmean(user[name] for user in users):.{digits}f} %" for name in names)
    return plain, f"{bold}{own}{bold}", chance


def systems(serving: Row) -> str:
    speeds = {row["name"]: row["tokens_per_second"] for row in serving["rows"] if row["name"] in SYSTEMS}
    rows = []
    for name, title in SYSTEMS.items():
        bold = "**" if name == "ours" else ""
        ratio = "" if name in ("ours", "gemm_floor") else f"{speeds['ours'] / speeds[name]:.2f}"
        rows.append((title, f"{bold}{speeds[name]:,.0f}{bold}", ratio))
    return table(("system", "tokens/s", "ours over it"), rows)


def figures(serving: Row) -> str:
    def told(name: str) -> str:
        value = serving["figures"][name]
        return "not measured" if value is None else f"{value:,.0f}" if name.endswith("_user") else f"{value:.3f}"

    return table(("figure", "measured", "wanted"), [(f"`{name}`", told(name), wanted) for name, wanted in WANTED.items()])


TABLES: Mapping[tuple[str, str], tuple[str, Callable[[Row], str]]] = {
    ("README.md", "completion"): ("demo.json", completion),
    ("README.md", "filing"): ("demo.json", filing),
    ("README.md", "batch"): ("demo.json", batch),
    ("docs/serving.md", "systems"): ("serving.json", systems),
    ("docs/serving.md", "figures"): ("serving.json", figures),
}
"""Document and name of a marked place, to the results and what makes its text of them."""


def filled(text: str, name: str, content: str) -> str:
    """The text with what stands between the two marks of this name replaced."""
    first, last = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    before, found, rest = text.partition(first)
    _, ended, after = rest.partition(last)
    if not found or not ended:
        raise ValueError(f"no marks {name}")
    return before + first + content + last + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, stale = parser.parse_args().check, []
    for (document, name), (results, make) in TABLES.items():
        path = ROOT / document
        text = path.read_text(encoding="utf-8")
        fresh = filled(text, name, make(json.loads((RESULTS / results).read_text(encoding="utf-8"))))
        if fresh != text and check:
            stale.append(f"{document}: {name} is not what {results} says; run python scripts/update_tables.py")
        elif fresh != text:
            path.write_text(fresh, encoding="utf-8")
    print("\n".join(stale) or "the measured tables are up to date")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
