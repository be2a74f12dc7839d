"""The connection for an event loop: `Client` once more, over the same `Session`.

async with lopa.connect_async("localhost:50051") as client:
    print((await client.generate("def add(", max_tokens=20)).text)
    persona = await client.personal("~/me")
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from lopa.async_link import AsyncLink
from lopa.client import Connection, Security, endpoint
from lopa.config import ClientConfig
from lopa.errors import Unavailable
from lopa.session import Session, WireOptions, whole
from lopa.stream import AsyncGenerationStream
from lopa.transport import Token
from lopa.values import (
    Dtype,
    Float32,
    Generation,
    Model,
    Pair,
    PairGradient,
    PairScore,
    Placement,
    Prompt,
    Sampling,
    SamplingOptions,
)

if TYPE_CHECKING:
    from lopa.async_persona import AsyncPersona
    from lopa.bundle import Bundle
    from lopa.local import Mismatch
    from lopa.vault import Secret


@asynccontextmanager
async def connect_async(
    address: str, *, tls: Security = False, token: Token | None = None, config: ClientConfig | None = None
) -> AsyncIterator[AsyncClient]:
    """As `connect`, for an event loop.

    >>> import asyncio
    >>> async def main():
    ...     async with lopa.connect_async(address) as client:
    ...         prompts = ["import os", "class Point:", "def add("]
    ...         return await asyncio.gather(*(client.generate(prompt, max_tokens=3) for prompt in prompts))
    >>> len(asyncio.run(main()))
    3
    """
    client = AsyncClient(address, tls=tls, token=token, config=config)
    try:
        await client.refresh()
        yield client
    finally:
        await client.close()


class AsyncClient(Connection):
    """As `Client`, for the event loop that runs when it is made; close it, or use `connect_async`."""

    def __init__(self, address: str, *, tls: Security = False, token: Token | None = None, config: ClientConfig | None = None) -> None:
        self._session = Session(address, config or ClientConfig())
        self._link = AsyncLink(endpoint(self._session, tls, token))

    def metered(self) -> AsyncClient:
        """The same connection with a byte count of its own, which starts at zero. Closing either closes both."""
        twin = object.__new__(AsyncClient)
        twin._link, twin._session = self._link, self._session.metered()
        return twin

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Calls under way end as `Cancelled`."""
        await self._link.close()

    @property
    def model(self) -> Model:
        """What the server hosts, once it was asked.

        Raises:
            Unavailable: it was not asked yet: `await client.refresh()`.
        """
        if self._session.shared.model is None:
            raise Unavailable("the server was not asked yet what it hosts: `await client.refresh()`")
        return self._session.shared.model

    async def refresh(self) -> Model:
        """As `Client.refresh`."""
        return await self._link.run(self._session.refresh())

    async def generate(
        self,
        prompt: Prompt,
        *,
        prefix: str | Sequence[int] | None = None,
        soft_prompt: Float32 | None = None,
        dtype: Dtype = "F32",
        placement: Placement = "front",
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """As `Client.generate`."""
        wire = WireOptions(dtype=dtype, placement=placement, timeout=timeout)
        flow = self._session.open_generation(prompt, Sampling(**sampling), prefix=prefix, soft_prompt=soft_prompt, wire=wire)
        return await self._link.run(whole(flow))

    async def stream(
        self,
        prompt: Prompt,
        *,
        prefix: str | Sequence[int] | None = None,
        soft_prompt: Float32 | None = None,
        dtype: Dtype = "F32",
        placement: Placement = "front",
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncGenerationStream:
        """As `Client.stream`."""
        wire = WireOptions(dtype=dtype, placement=placement, timeout=timeout)
        flow = self._session.open_generation(prompt, Sampling(**sampling), prefix=prefix, soft_prompt=soft_prompt, wire=wire)
        return AsyncGenerationStream(self._link, await self._link.run(flow))

    async def score(
        self, pairs: Sequence[Pair], *, dtype: Dtype = "F32", placement: Placement = "front", timeout: float | None = None
    ) -> list[PairScore]:
        """As `Client.score`."""
        return await self._link.run(self._session.score(pairs, WireOptions(dtype=dtype, placement=placement, timeout=timeout)))

    async def prompt_gradients(
        self,
        pairs: Sequence[Pair],
        *,
        dtype: Dtype = "F32",
        gradient_dtype: Dtype = "F32",
        placement: Placement = "front",
        max_pairs: int | None = None,
        timeout: float | None = None,
    ) -> list[PairGradient]:
        """As `Client.prompt_gradients`."""
        return await self._link.run(
            self._session.prompt_gradients(pairs, WireOptions(dtype, gradient_dtype, placement, max_pairs, timeout))
        )

    async def bundle(self, *, progress: Callable[[int, int], None] | None = None) -> Bundle:
        """As `Client.bundle`."""
        from lopa.cache import fetch_bundle

        return await self._link.run(fetch_bundle(self._session, progress=progress))

    async def personal(
        self,
        path: Path | str,
        persona: str = "default",
        *,
        bundle: Bundle | None = None,
        secret: Secret | None = None,
        mismatch: Mismatch = "refuse",
        progress: Callable[[int, int], None] | None = None,
    ) -> AsyncPersona:
        """As `Client.personal`."""
        from lopa.async_persona import AsyncPersona
        from lopa.local import OpenOptions, opened

        found = await self._link.run(opened(self._session, path, persona, OpenOptions(bundle, secret, mismatch, progress)))
        return AsyncPersona(found, self._session, self._link)
