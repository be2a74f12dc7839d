"""A persona for an event loop: `Persona` once more, over the same flows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Unpack

from lopa.control import TuneControl
from lopa.examples import ExampleLike
from lopa.factors import Factors
from lopa.local import LocalPersona, Opened, PersonalWire, Watch
from lopa.session import whole
from lopa.stream import AsyncGenerationStream
from lopa.tuning import TuneConfig, TuneOptions, TuneProgress, TuneReport
from lopa.values import Dtype, Generation, PairScore, Placement, Prompt, Sampling, SamplingOptions

if TYPE_CHECKING:
    from lopa.async_link import AsyncLink
    from lopa.session import Session


class AsyncPersona(LocalPersona):
    """As `Persona`, for an event loop."""

    def __init__(self, opened: Opened, session: Session, link: AsyncLink) -> None:
        """Use `AsyncClient.personal`."""
        super().__init__(opened, session)
        self._link = link

    async def generate(
        self,
        prompt: Prompt,
        *,
        encoder_text: str | None = None,
        prefix: str | Sequence[int] | None = None,
        dtype: Dtype = "I8",
        placement: Placement | None = None,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """As `Persona.generate`."""
        flow = self._generating(
            prompt, Sampling(**sampling), encoder_text=encoder_text, prefix=prefix, wire=PersonalWire(dtype, placement, timeout)
        )
        return await self._link.run(whole(flow))

    async def stream(
        self,
        prompt: Prompt,
        *,
        encoder_text: str | None = None,
        prefix: str | Sequence[int] | None = None,
        dtype: Dtype = "I8",
        placement: Placement | None = None,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncGenerationStream:
        """As `Persona.stream`; `async for` over what it gives."""
        flow = self._generating(
            prompt, Sampling(**sampling), encoder_text=encoder_text, prefix=prefix, wire=PersonalWire(dtype, placement, timeout)
        )
        return AsyncGenerationStream(self._link, await self._link.run(flow))

    async def score(
        self,
        examples: Iterable[ExampleLike],
        *,
        factors: Factors | None = None,
        dtype: Dtype = "I8",
        placement: Placement | None = None,
    ) -> list[PairScore]:
        """As `Persona.score`."""
        return await self._link.run(self._scoring(examples, factors, PersonalWire(dtype, placement)))

    async def tune(
        self,
        examples: Iterable[ExampleLike],
        *,
        validation: float | Iterable[ExampleLike] | None = None,
        config: TuneConfig | None = None,
        on_step: Callable[[TuneProgress], None] | None = None,
        control: TuneControl | None = None,
        progress: bool = False,
        keep_examples: bool = False,
        **options: Unpack[TuneOptions],
    ) -> TuneReport:
        """As `Persona.tune`. Cancelling the task stops the run after what is on disk; the same call goes on."""
        return await self._link.run(self._tuning(examples, validation, config, Watch(on_step, control, progress), keep_examples, options))

    async def migrate(
        self,
        *,
        config: TuneConfig | None = None,
        on_step: Callable[[TuneProgress], None] | None = None,
        control: TuneControl | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[TuneOptions],
    ) -> TuneReport:
        """As `Persona.migrate`."""
        return await self._link.run(self._migrating(Watch(on_step, control), progress, config, options))
