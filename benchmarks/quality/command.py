"""The command line of `python -m benchmarks.quality`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import fmean

from benchmarks import report as outputs
from benchmarks.quality import plots, report
from benchmarks.quality.figures import Results, figures
from benchmarks.quality.grid import load_rates, smoke, stages
from benchmarks.quality.laboratory import Laboratory
from benchmarks.quality.methods import MAIN, METHODS, SWEEP
from benchmarks.quality.rates import choose
from benchmarks.quality.store import Store
from benchmarks.quality.tasks import ROOT

STAGES = ("main", "others", "sizes", "tasks", "priors", "seeds", "sweeps")
CELLS = ROOT / "benchmarks" / "results" / "quality.jsonl"
RATE_CELLS = ROOT / "benchmarks" / "results" / "quality-rates.jsonl"
print = partial(print, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write machine, figures and rows here")
    parser.add_argument("--stage", action="append", choices=STAGES, help="measure these parts of the grid; default: all, in order")
    parser.add_argument("--method", action="append", choices=METHODS, help="these methods only; default: all")
    parser.add_argument("--report", action="store_true", help="measure nothing: figures, table and plots from finished cells")
    parser.add_argument(
        "--smoke", action="store_true", help="two users, one seed, three methods on filing; fails unless their order is right"
    )
    parser.add_argument("--cells", type=Path, default=CELLS, help="finished cells; a run goes on where it was")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder for quality.md and its pictures")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="tuned factors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--choose-rates", action="store_true", help="choose learning rates on development packages instead of measuring")
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"), help="made by training/corpus.py; for --choose-rates")
    args = parser.parse_args()
    if args.choose_rates:
        choose_rates(args)
    elif args.smoke:
        run_smoke(args)
    else:
        run_grid(args)


def choose_rates(args: argparse.Namespace) -> None:
    """Learning rates into rates.json, and the cells that they were chosen by beside the results."""
    laboratory = Laboratory(Store(RATE_CELLS), args.work, args.corpus, args.threads)
    choose(laboratory, ("filing", "completion"), args.method or (*MAIN, *SWEEP))


def run_grid(args: argparse.Namespace) -> None:
    """Measure what is missing, then report on all there is.

    Raises:
        SystemExit: there is nothing to report on.
    """
    store, rates = Store(args.cells), load_rates()
    grid = stages(rates)
    if not args.report:
        laboratory = Laboratory(store, args.work, threads=args.threads)
        for stage in args.stage or STAGES:
            laboratory.measure([cell for cell in grid[stage] if cell.method in (args.method or METHODS)], print)
    results = Results.of(store, [cell for stage in STAGES for cell in grid[stage]])
    if not results.rows:
        raise SystemExit(f"{args.cells} holds no finished cell of this grid: measure some first, without --report")
    args.docs.mkdir(parents=True, exist_ok=True)
    report.write(results, rates, args.docs / "quality.md", plots.draw(results, args.docs))
    print(report.printed(results))
    outputs.write(args.json, figures(results), list(results.rows.values()))


def run_smoke(args: argparse.Namespace) -> None:
    """Measure the small grid.

    Raises:
        SystemExit: the plain model, prompt tuning and the default do not come in this order of falling NLL.
    """
    store = Store(args.cells)
    laboratory, cells = Laboratory(store, args.work, threads=args.threads), smoke(load_rates())
    laboratory.measure(cells, print)
    results = Results.of(store, cells)
    means = {
        method: fmean(results.rows[cell]["test_nll"] for cell in results.select(method, ("filing",)))
        for method in ("none", "prompt_tuning", "default")
    }
    print(" > ".join(f"{method} {nll:.3f}" for method, nll in means.items()))
    outputs.write(args.json, {f"{method}_nll": nll for method, nll in means.items()}, list(results.rows.values()))
    if sorted(means, key=means.__getitem__, reverse=True) != list(means):
        raise SystemExit("this is not the order of falling NLL")


if __name__ == "__main__":
    main()
