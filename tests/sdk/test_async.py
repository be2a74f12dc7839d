"""The asynchronous client: the same surface, the same results, the same errors, on an event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import lopa
import numpy as np
import pytest

from tests.sdk.conftest import EXAMPLES, SETTINGS, TOO_LATE

SOFT = np.random.default_rng(0).normal(0, 0.3, (4, 32)).astype(np.float32)
PAIRS = [lopa.Pair("def f(", f"a, b{i})", SOFT * (1 + i / 4)) for i in range(3)]
Result = TypeVar("Result")


def run(address: str, cache: Path, work: Callable[[lopa.AsyncClient], Awaitable[Result]]) -> Result:
    """Do something with a connected client on a loop of its own."""

    async def main() -> Result:
        async with lopa.connect_async(address, config=lopa.ClientConfig(cache=cache)) as client:
            return await work(client)

    return asyncio.run(main())


def methods(kind: type) -> dict[str, inspect.Signature]:
    """Public methods and their parameters."""
    return {name: inspect.signature(value) for name, value in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}


@pytest.mark.parametrize(("plain", "other"), [(lopa.Client, lopa.AsyncClient), (lopa.Persona, lopa.AsyncPersona)])
def test_both_surfaces_are_the_same(plain: type, other: type) -> None:
    expected, found = methods(plain), methods(other)
    assert set(expected) == set(found)
    for name, signature in expected.items():
        assert list(signature.parameters.values()) == list(found[name].parameters.values()), name
        returned = str(found[name].return_annotation).replace("Async", "")
        assert returned == str(signature.return_annotation), name
    properties = {name for name, value in inspect.getmembers(plain) if isinstance(value, property)}
    assert properties == {name for name, value in inspect.getmembers(other) if isinstance(value, property)}


def test_results_are_those_of_the_synchronous_client(client: lopa.Client, address: str, cache: Path) -> None:
    async def ask(other: lopa.AsyncClient) -> tuple[object, ...]:
        stream = await other.stream("class Point:", max_tokens=12, ignore_end=True, soft_prompt=SOFT)
        text = "".join([delta.text async for delta in stream])
        return (
            other.model,
            await other.generate("def add(", max_tokens=8, ignore_end=True, soft_prompt=SOFT),
            await other.score(PAIRS),
            [item.gradient.tobytes() for item in await other.prompt_gradients(PAIRS)],
            (await other.bundle()).manifest.id,
            text == stream.generation.text,
            other.traffic.requests > 4,
        )

    expected = (
        client.model,
        client.generate("def add(", max_tokens=8, ignore_end=True, soft_prompt=SOFT),
        client.score(PAIRS),
        [item.gradient.tobytes() for item in client.prompt_gradients(PAIRS)],
        client.bundle().manifest.id,
        True,
        True,
    )
    assert run(address, cache, ask) == expected


def test_many_streams_at_once_on_one_loop(client: lopa.Client, address: str, cache: Path) -> None:
    alone = [client.generate(f"x{i} = ", max_tokens=8, ignore_end=True, soft_prompt=SOFT * (i + 1) / 4).token_ids for i in range(6)]

    async def ask(other: lopa.AsyncClient) -> list[lopa.Generation]:
        calls = [other.generate(f"x{i} = ", max_tokens=8, ignore_end=True, soft_prompt=SOFT * (i + 1) / 4) for i in range(6)]
        return list(await asyncio.gather(*calls))

    assert [item.token_ids for item in run(address, cache, ask)] == alone


def test_tuning_ends_with_the_same_factors_bit_for_bit(client: lopa.Client, address: str, cache: Path, tmp_path: Path) -> None:
    """Cancelled at three steps on the way: another driver, another process, the same run."""
    plain = client.personal(tmp_path / "plain")
    report = plain.tune(EXAMPLES, **SETTINGS)

    async def tune(other: lopa.AsyncClient, stop_at: int | None) -> lopa.TuneReport | None:
        persona = await other.personal(tmp_path / "async")
        task: asyncio.Task[lopa.TuneReport] | None = None

        def watch(now: lopa.TuneProgress) -> None:
            if task is not None and now.step == stop_at:
                task.cancel()

        task = asyncio.create_task(persona.tune(EXAMPLES, on_step=watch, **SETTINGS))
        try:
            return await task
        except asyncio.CancelledError:
            return None

    for stop_at in (1, 4, 9):
        assert run(address, cache, lambda other, at=stop_at: tune(other, at)) is None
    resumed = run(address, cache, lambda other: tune(other, None))
    assert resumed is not None and resumed.resumed_from >= 9
    assert (resumed.losses, resumed.validation) == (report.losses, report.validation)
    mine = lopa.open_personal(tmp_path / "async", cache=cache)
    assert mine.factors_path.read_bytes() == plain.factors_path.read_bytes()


def test_a_persona_generates_scores_and_streams(client: lopa.Client, address: str, cache: Path, tmp_path: Path) -> None:
    persona = client.personal(tmp_path)
    expected = (persona.generate("def f(", max_tokens=6).token_ids, persona.score(EXAMPLES[:3]))

    async def ask(other: lopa.AsyncClient) -> tuple[object, ...]:
        mine = await other.personal(tmp_path)
        async with await mine.stream("def f(", max_tokens=6) as stream:
            tokens = [token async for delta in stream for token in delta.token_ids]
        assert tuple(tokens) == (await mine.generate("def f(", max_tokens=6)).token_ids
        return (tuple(tokens), await mine.score(EXAMPLES[:3]))

    assert run(address, cache, ask) == expected


def test_a_cold_cache_is_filled_once_by_many(address: str, tmp_path: Path) -> None:
    async def ask(other: lopa.AsyncClient) -> int:
        bundles = await asyncio.gather(*(other.bundle() for _ in range(3)))
        assert len({bundle.manifest.id for bundle in bundles}) == 1
        return other.traffic.received_bytes

    assert run(address, tmp_path, ask) < 1.5 * sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())


def test_errors_are_ours(address: str, cache: Path) -> None:
    async def ask(other: lopa.AsyncClient) -> None:
        with pytest.raises(lopa.InvalidRequest) as caught:
            await other.generate("x", temperature=-1.0)
        assert caught.value.field == "sampling.temperature" and caught.value.reason is not None
        with pytest.raises(TOO_LATE):
            await other.generate("x", max_tokens=480, ignore_end=True, timeout=0.02)
        stream = await other.stream("x = ", max_tokens=400, ignore_end=True)
        await anext(stream)
        stream.close()
        with pytest.raises(lopa.Cancelled):
            _ = [delta async for delta in stream]
        await other.close()
        with pytest.raises(lopa.Cancelled, match="closed"):
            await other.generate("x")

    run(address, cache, ask)
    config = lopa.ClientConfig(connect_timeout=60.0, retry=lopa.RetryPolicy(attempts=2, initial=0.01))

    async def nobody() -> None:
        fresh = lopa.AsyncClient(address)
        with pytest.raises(lopa.Unavailable, match="refresh"):
            _ = fresh.model
        await fresh.close()
        async with lopa.connect_async("127.0.0.1:1", config=config):
            pass

    with pytest.raises(lopa.Unavailable, match="is the server running there"):
        asyncio.run(nobody())


def test_cancelling_a_task_cancels_its_call(address: str, cache: Path) -> None:
    async def ask(other: lopa.AsyncClient) -> None:
        task = asyncio.create_task(other.generate("x", max_tokens=480, ignore_end=True))
        stream = await other.stream("y", max_tokens=480, ignore_end=True)
        await anext(stream)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream.close()
        assert (await other.generate("z", max_tokens=1)).token_ids

    run(address, cache, ask)
