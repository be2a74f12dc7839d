"""The curves of a tuning run as a picture. Needs matplotlib, which the extra `plot` installs."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopa.errors import MissingDependency
from lopa.files import write_atomic

if TYPE_CHECKING:
    from lopa.tuning import TuneReport


def plot_report(report: TuneReport, path: Path) -> None:
    """Write a PNG: losses and validation above, gradient norms below.

    Raises:
        MissingDependency: matplotlib is not installed. StorageError: the file can't be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency('drawing curves needs matplotlib: pip install "lopa[plot]"') from error
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without any display
    loss, norm = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_losses(loss, report)
    norm.semilogy(range(1, len(report.gradient_norms) + 1), report.gradient_norms, color="tab:gray", linewidth=1)
    norm.set(ylabel="gradient norm", xlabel="step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(path, buffer.getvalue())


def _draw_losses(axes: Any, report: TuneReport) -> None:
    measured = [(step, nll) for step, nll in report.validation if math.isfinite(nll)]
    axes.plot(range(1, len(report.losses) + 1), report.losses, color="tab:blue", alpha=0.4, linewidth=1, label="training batch")
    axes.plot(*zip(*measured, strict=True), color="tab:orange", marker="o", markersize=3, label="validation")
    axes.axhline(report.start_nll, color="black", linestyle=":", linewidth=1, label="before tuning")
    by_way_of = f", by way of the prior of {report.prior}" if report.prior else ""
    axes.set(ylabel="nats per target token", title=f"{report.outcome}: {report.start_nll:.3f} to {report.end_nll:.3f}{by_way_of}")
    axes.legend()
