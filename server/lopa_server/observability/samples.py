"""Reads a metrics page, and takes what `lopa top` shows out of two readings of it."""

from __future__ import annotations

import math
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]
MAX_PAGE_BYTES = 4 << 20


class NoMetrics(OSError):
    """There is no metrics page at that address. The message is for people."""


@dataclass(frozen=True)
class Reading:
    """A metrics page at one moment."""

    at: float
    """Seconds of a monotonic clock."""
    samples: Mapping[str, Mapping[Labels, float]]
    """Sample name, then sorted labels, to value."""

    def total(self, name: str, **labels: str) -> float:
        """Sum over all series of a name that have these labels; 0 when there is none."""
        wanted = labels.items()
        return sum(value for key, value in self.samples.get(name, {}).items() if wanted <= dict(key).items())


def fetch(address: str, at: float, timeout: float = 3.0) -> Reading:
    """Read HOST:PORT's page. Raises NoMetrics."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=timeout) as page:
            text = page.read(MAX_PAGE_BYTES).decode("utf-8", errors="replace")
        return parse(text, at)
    except (urllib.error.URLError, TimeoutError, ValueError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise NoMetrics(f"no metrics page at {address} ({reason}); is `lopa serve --metrics-port` running there?") from error


def parse(text: str, at: float) -> Reading:
    """From Prometheus' text format. Raises ValueError."""
    samples: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return Reading(at, samples)


def rate(before: Reading, now: Reading, name: str, **labels: str) -> float:
    """Growth of a counter per second; 0 over no time, or when the server was started anew in between."""
    seconds = now.at - before.at
    return max(0.0, now.total(name, **labels) - before.total(name, **labels)) / seconds if seconds > 0 else 0.0


def quantile(before: Reading, now: Reading, histogram: str, q: float) -> float | None:
    """A histogram's quantile over the time between two readings, as PromQL's histogram_quantile; None without observations."""
    name = f"{histogram}_bucket"
    bounds = sorted({float(dict(key)["le"]) for key in now.samples.get(name, {})})
    counts = [_at(now, name, bound) - _at(before, name, bound) for bound in bounds]
    if not counts or counts[-1] <= 0:
        return None
    rank = q * counts[-1]
    index = next(index for index, count in enumerate(counts) if count >= rank)
    if math.isinf(bounds[index]):
        return bounds[index - 1]
    low, below = (bounds[index - 1], counts[index - 1]) if index else (0.0, 0.0)
    return low + (bounds[index] - low) * (rank - below) / max(counts[index] - below, 1e-9)


def _at(reading: Reading, name: str, bound: float) -> float:
    return sum(value for key, value in reading.samples.get(name, {}).items() if float(dict(key)["le"]) == bound)
