"""Measurements of gradients over gRPC: what batching across users gains, and what a flood of them does to streams."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import Any

import grpc
from lopa import event_loop
from lopa.bench.requests import RequestMaker
from lopa.bench.run import run_load
from lopa.bench.summary import gaps, summarize
from lopa.bench.workload import Workload
from lopa.v1 import catalog_pb2, catalog_pb2_grpc, common_pb2, tuning_pb2, tuning_pb2_grpc

from servebench.generation import PERSONAL, ROWS, LoadFailed, row
from servebench.gradient_floor import GradientFloor
from servebench.server import Server

PROMPT, TARGET, USERS = 32, 32, 32
"""A pair: 32 tokens of prompt, 32 of target, and a soft prompt of 10 rows."""
READ = ROWS + PROMPT + TARGET - 1
"""Positions that the FM reads of it: the last token is only predicted."""


class Pairs:
    """PromptGradients calls with pairs of many users."""

    def __init__(self, channel: grpc.aio.Channel, model: catalog_pb2.ModelInfo) -> None:
        self._stub: Any = tuning_pb2_grpc.TuningStub(channel)
        self._maker = RequestMaker(model, dataclasses.replace(PERSONAL, prompt_tokens=(PROMPT, PROMPT), new_tokens=(TARGET, TARGET)))
        self._numbers = itertools.count()

    async def call(self, pairs: int, user: int | None = None) -> None:
        """One call; its pairs belong to `user`, or to different ones."""
        request = tuning_pb2.PromptGradientsRequest(gradient_dtype=common_pb2.DTYPE_BF16)
        for _ in range(pairs):
            number = next(self._numbers)
            tokens = self._maker.tokens(PROMPT + TARGET, 3, number)
            request.pairs.add(
                prompt=common_pb2.Prompt(tokens=common_pb2.TokenIds(ids=tokens[:PROMPT])),
                target=common_pb2.Target(tokens=common_pb2.TokenIds(ids=tokens[PROMPT:])),
                soft_prompt=self._maker.soft_prompt(number % USERS if user is None else user),
            )
        reply = await self._stub.PromptGradients(request, timeout=300)
        if len(reply.gradients) != pairs:
            raise LoadFailed(f"{len(reply.gradients)} gradients for {pairs} pairs")


@contextlib.asynccontextmanager
async def _pairs(server: Server) -> AsyncIterator[Pairs]:
    async with grpc.aio.insecure_channel(server.address, server.endpoint.options()) as channel:
        catalog: Any = catalog_pb2_grpc.CatalogStub(channel)
        yield Pairs(channel, await catalog.GetModel(catalog_pb2.GetModelRequest(), timeout=60))


async def _one_at_a_time(pairs: Pairs, count: int) -> float:
    started = time.perf_counter()
    for user in range(count):
        await pairs.call(1, user % USERS)
    return count / (time.perf_counter() - started)


async def _mixed(pairs: Pairs, calls: int) -> float:
    """All users at once, a pair each."""
    started = time.perf_counter()
    for _ in range(calls):
        await asyncio.gather(*(pairs.call(1, user) for user in range(USERS)))
    return calls * USERS / (time.perf_counter() - started)


async def _batch_gain(server: Server, floor: GradientFloor, rounds: int) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {"one_at_a_time": [], "mixed": [], "floor_of_one": [], "floor_mixed": []}
    async with _pairs(server) as pairs:
        await pairs.call(USERS)
        for _ in range(rounds):
            speeds["one_at_a_time"].append(await _one_at_a_time(pairs, USERS // 2))
            speeds["mixed"].append(await _mixed(pairs, 2))
            speeds["floor_of_one"].append(floor.pairs_per_second(1, USERS // 2))
            speeds["floor_mixed"].append(floor.pairs_per_second(floor.together, max(1, 2 * USERS // floor.together)))
    medians = {name: median(values) for name, values in speeds.items()}
    return {
        "name": "gradients of 32 users, pairs/s",
        "gain": medians["mixed"] / medians["one_at_a_time"],
        "gain_ceiling": medians["floor_mixed"] / medians["floor_of_one"],
        "share_of_floor_mixed": medians["mixed"] / medians["floor_mixed"],
        "share_of_floor_of_one": medians["one_at_a_time"] / medians["floor_of_one"],
        **speeds,
    }


def batch_gain(server: Server, fm: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Pairs per second of 32 users at once, one pair each, over those of one user after the other, and the bare products' of both."""
    return event_loop.run(_batch_gain(server, GradientFloor(fm, READ, TARGET, threads), rounds))


async def _flooded(server: Server, workload: Workload, flood: int) -> tuple[float, dict[str, Any]]:
    """p99 in seconds of the streams' gaps beside so many callers that never stop asking for gradients of 32 pairs."""
    async with _pairs(server) as pairs:

        async def forever() -> None:
            while True:
                await pairs.call(USERS)

        floods = [asyncio.create_task(forever()) for _ in range(flood)]
        try:
            result = await run_load(server.endpoint, workload)
        finally:
            for task in floods:
                task.cancel()
            await asyncio.gather(*floods, return_exceptions=True)
    times = sorted(gap for trace in result.traces for gap in gaps(trace))
    if summarize(result).errors or not times:
        raise LoadFailed(f"{summarize(result).errors} beside {flood} floods")
    return times[int(0.99 * (len(times) - 1))], row(f"8 streams beside {flood} gradient floods", result)


def streams_under_gradients(server: Server) -> tuple[float, list[dict[str, Any]]]:
    """p99 gap of 8 streams beside 4 gradient floods, over the same without; and both rows."""
    workload = dataclasses.replace(PERSONAL, concurrency=8, requests=16, users=8, seed=50)
    alone, quiet = event_loop.run(_flooded(server, workload, 0))
    beside, loud = event_loop.run(_flooded(server, workload, 4))
    return beside / alone, [quiet, loud]
