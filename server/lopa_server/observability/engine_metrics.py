"""The engine's own counters as Prometheus metrics, read when somebody looks: nothing is added to a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lopa_server.engine.base import Engine, EngineStopped

GAUGES = {
    "streams_waiting": ("waiting", "Generate requests without a place in the batch."),
    "streams_running": ("running", "Requests in the batch."),
    "pairs_waiting": ("pairs_waiting", "Pairs waiting to be scored or differentiated."),
    "kv_block_size": ("block_size", "Positions in one block of the key-value cache."),
    "kv_blocks": ("blocks_total", "Blocks in the pool."),
    "kv_blocks_used": ("blocks_used", "Blocks that live requests read or write."),
    "kv_blocks_cached": ("blocks_cached", "Free blocks whose content may still serve as somebody's prefix."),
    "kv_positions": ("kv_positions", "Positions that hold something in the blocks used."),
}
COUNTERS = {
    "generated_tokens": ("generated_tokens", "Tokens generated."),
    "prefill_tokens": ("prefill_tokens", "Prompt positions computed."),
    "prefix_hit_tokens": ("prefix_hit_tokens", "Prompt positions taken from the prefix cache."),
    "pair_prefix_hit_tokens": ("pair_prefix_hit_tokens", "The same for pairs."),
    "pair_prefix_tokens": ("pair_prefix_tokens", "Prefix positions of pairs that were computed, without a gradient."),
    "pairs_whole": ("pairs_whole", "Pairs computed whole, prefix and all, since the pool had no room for it."),
    "pairs": ("pairs_done", "Pairs scored or differentiated."),
    "pair_batches": ("pair_batches", "Micro-batches of pairs."),
    "pair_pauses": ("pair_pauses", "Pauses within these, for steps of streams."),
    "steps": ("steps", "Forward passes for streams."),
    "decode_steps": ("decode_steps", "Those of them in which somebody decoded."),
    "step_rows": ("step_rows", "Requests in all those passes together."),
    "step_positions": ("step_positions", "Positions in all those passes together."),
    "native_fallbacks": ("native_fallbacks", "Steps on a CPU whose decoding rows torch computed, not our kernels."),
    "preemptions": ("preemptions", "Requests that lost their blocks and were computed again."),
    "out_of_memory": ("out_of_memory", "Steps that the device had no memory for; each made later ones smaller."),
    "requests_aborted": ("aborted", "Requests forgotten: cancelled, past their deadline, or their client left."),
    "requests_failed": ("failed", "Requests whose computation failed."),
}
"""Metric to the field of EngineStats and its help; `lopa_` goes before the names, `_total` after the counters'."""


def engine_pid(engine: Engine | None) -> int:
    """Of the engine's own process; 0, which no process has, when there is none."""
    return engine.stats().pid if engine is not None else 0


class EngineCollector(Collector):
    """Reads `Engine.stats` once per scrape; says nothing while there is no engine."""

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        """Registering must not need an engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        engine = self._engine()
        if engine is None:
            return
        try:
            stats, spec = engine.stats(), engine.spec
        except EngineStopped:
            return
        for name, (field, text) in GAUGES.items():
            yield GaugeMetricFamily(f"lopa_{name}", text, value=getattr(stats, field))
        for name, (field, text) in COUNTERS.items():
            yield CounterMetricFamily(f"lopa_{name}", text, value=getattr(stats, field))
        seconds = CounterMetricFamily("lopa_engine_seconds", "Time spent computing, by kind of step.", labels=["step"])
        for step, value in stats.seconds.items():
            seconds.add_metric([step], value)
        yield seconds
        about = {"name": spec.name, "fingerprint": spec.fingerprint, "dtype": spec.compute_dtype}
        yield InfoMetricFamily("lopa_model", "The foundation model that is served.", value=about)
