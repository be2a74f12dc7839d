"""What a load test says in numbers. Percentiles are over requests for the first token, over gaps between messages for the rest."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lopa.bench.run import LoadResult, Trace


@dataclass(frozen=True)
class Percentiles:
    """In milliseconds."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles | None:
        """None when nothing was measured."""
        return cls(*(1000 * np.percentile(np.asarray(seconds), (50, 95, 99))).tolist()) if seconds else None


@dataclass(frozen=True)
class Summary:
    """One line a field. Failed requests count in `errors` and nowhere else."""

    seconds: float
    requests: int
    """Answered in full."""
    errors: dict[str, int]
    """Failed ones, by reason or status."""
    requests_per_second: float
    tokens_per_second: float
    """Generated tokens of answered requests."""
    first_token_ms: Percentiles | None
    """From sending a request to its first token."""
    inter_token_ms: Percentiles | None
    """Gaps between a stream's messages; a message is one token unless the client falls behind."""
    end_to_end_ms: Percentiles | None


def summarize(result: LoadResult) -> Summary:
    """The figures of one run."""
    good = [trace for trace in result.traces if not trace.error]
    seconds = result.seconds or 1e-9
    return Summary(
        seconds=result.seconds,
        requests=len(good),
        errors=dict(Counter(trace.error for trace in result.traces if trace.error)),
        requests_per_second=len(good) / seconds,
        tokens_per_second=sum(trace.tokens for trace in good) / seconds,
        first_token_ms=Percentiles.of([trace.arrivals[0][0] - trace.sent for trace in good if trace.arrivals]),
        inter_token_ms=Percentiles.of([gap for trace in good for gap in gaps(trace)]),
        end_to_end_ms=Percentiles.of([trace.ended - trace.sent for trace in good]),
    )


def gaps(trace: Trace) -> list[float]:
    """Seconds between a stream's messages."""
    times = [at for at, _ in trace.arrivals]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def pure_decode_tokens_per_second(result: LoadResult) -> float | None:
    """Tokens per second between the last stream's first token and the first stream's last: everybody decodes, nobody prefills.

    None when the streams don't overlap.
    """
    streams = [trace.arrivals for trace in result.traces if trace.arrivals]
    if not streams:
        return None
    start, end = max(arrivals[0][0] for arrivals in streams), min(arrivals[-1][0] for arrivals in streams)
    tokens = sum(count for arrivals in streams for at, count in arrivals if start < at <= end)
    return tokens / (end - start) if end > start and tokens else None


def lines(summary: Summary) -> list[str]:
    """For people."""
    text = [
        f"{summary.requests} requests in {summary.seconds:.1f} s: {summary.requests_per_second:.2f} requests/s, "
        f"{summary.tokens_per_second:.0f} tokens/s",
        f"{'milliseconds':16}{'p50':>10}{'p95':>10}{'p99':>10}",
    ]
    for name, percentiles in (
        ("first token", summary.first_token_ms),
        ("between tokens", summary.inter_token_ms),
        ("whole request", summary.end_to_end_ms),
    ):
        if percentiles is not None:
            text.append(f"{name:16}" + "".join(f"{value:10.1f}" for value in asdict(percentiles).values()))
    text += [f"{count} failed with {name}" for name, count in sorted(summary.errors.items())]
    return text
