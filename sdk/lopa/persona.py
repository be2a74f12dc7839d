"""A persona: one user's factors for one task, and what they do.

Legend: b examples, m soft-prompt rows, d hidden size of the foundation model (FM).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from lopa.cache import cached_bundle
from lopa.control import TuneControl
from lopa.encoder import PromptEncoder
from lopa.errors import Unavailable
from lopa.examples import ExampleLike
from lopa.factors import Factors
from lopa.folder import PersonaStore
from lopa.local import LocalPersona, Opened, PersonalWire, Watch
from lopa.session import whole
from lopa.stream import GenerationStream
from lopa.tuning import TuneConfig, TuneOptions, TuneProgress, TuneReport
from lopa.values import Dtype, Generation, PairScore, Placement, Prompt, Sampling, SamplingOptions
from lopa.vault import Secret

if TYPE_CHECKING:
    from lopa.link import Link
    from lopa.session import Session


class Persona(LocalPersona):
    """A persona with a connection, or without one (see `open_personal`): then only what needs no server works."""

    def __init__(self, opened: Opened, session: Session | None, link: Link | None) -> None:
        """Use `Client.personal` or `open_personal`."""
        super().__init__(opened, session)
        self._link = link

    def generate(
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
        """As `Client.generate`, with the personal soft prompt.

        encoder_text: what the encoder reads instead of the text of prefix and prompt. placement: by default the one that the
        persona was tuned with; after a prefix, the prompt may be empty.

        >>> me.generate("def add(a, b):", max_tokens=4).receipt.rows
        4

        Raises:
            Unavailable: offline. Others: as `Client.generate` and `soft_prompts`.
        """
        flow = self._generating(
            prompt, Sampling(**sampling), encoder_text=encoder_text, prefix=prefix, wire=PersonalWire(dtype, placement, timeout)
        )
        return self._need_link().run(whole(flow))

    def stream(
        self,
        prompt: Prompt,
        *,
        encoder_text: str | None = None,
        prefix: str | Sequence[int] | None = None,
        dtype: Dtype = "I8",
        placement: Placement | None = None,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> GenerationStream:
        """As `Client.stream`, with the personal soft prompt."""
        flow = self._generating(
            prompt, Sampling(**sampling), encoder_text=encoder_text, prefix=prefix, wire=PersonalWire(dtype, placement, timeout)
        )
        link = self._need_link()
        return GenerationStream(link, link.run(flow))

    def score(
        self,
        examples: Iterable[ExampleLike],
        *,
        factors: Factors | None = None,
        dtype: Dtype = "I8",
        placement: Placement | None = None,
    ) -> list[PairScore]:
        """Negative log-likelihood of each example's target, with the current factors or the ones given.

        placement: by default the one that the persona was tuned with.

        Raises:
            Unavailable: offline. FingerprintMismatch: factors of another bundle. Others: as `Client.score`.
        """
        return self._need_link().run(self._scoring(examples, factors, PersonalWire(dtype, placement)))

    def tune(
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
        """Learn from examples; keep the result only if it is better on the validation examples.

        examples: (prompt, target) tuples, `Example`s, conversations (the last turn is the target), or paths of files.
        validation: examples of your own to measure on, or the share of `examples` to hold back (default 20 %, at least one).
        config, or its fields as keywords: steps, batch_size, learning_rate, max_bytes, ...; by default the bundle's.
        on_step: told after every step, and while the run waits. control: pauses, resumes and cancels from another thread.
        progress: show a bar, if standard error is a terminal.
        keep_examples: keep them on this device, beside the factors, so that `migrate` can learn them again one day.

        A step is on disk when `on_step` is told of it; the next one's gradients are under way by then. Interrupted at any moment, a call
        with the same examples and settings goes on where it stopped and ends with the same factors, bit for bit, as if it had never
        stopped.

        >>> report = me.tune([("2 + 2 = ", "4"), ("3 + 5 = ", "8"), ("1 + 6 = ", "7")], steps=4, max_steps=3)
        >>> report.outcome, report.resumable, me.unfinished
        ('max_steps', True, True)

        Raises:
            TuningError: too few examples, or a setting out of range. Unavailable: no server for `patience` seconds; call again.
            FolderError: another process tunes this persona. Cancelled: before anything was measured. Others: as the server says.
        """
        return self._need_link().run(self._tuning(examples, validation, config, Watch(on_step, control, progress), keep_examples, options))

    def migrate(
        self,
        *,
        config: TuneConfig | None = None,
        on_step: Callable[[TuneProgress], None] | None = None,
        control: TuneControl | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[TuneOptions],
    ) -> TuneReport:
        """Learn the kept examples again, for the server's model and bundle of now; see `tune` for the keywords.

        Until it has finished the plain model answers; interrupted, it goes on with the next call. The record of before stays in the
        folder. progress: see `Client.bundle`.

        >>> me.migrate()
        Traceback (most recent call last):
        lopa.errors.FolderError: persona default kept no examples to learn from again: ...

        Raises:
            FolderError: no examples were kept (`tune(..., keep_examples=True)`). Others: as `tune` and `Client.bundle`.
        """
        return self._need_link().run(self._migrating(Watch(on_step, control), progress, config, options))

    def _need_link(self) -> Link:
        if self._link is None:
            self._need_session()
            raise Unavailable("this persona has no connection")
        return self._link


def open_personal(
    path: Path | str, persona: str = "default", *, secret: Secret | None = None, cache: Path | None = None, threads: int = 1
) -> Persona:
    """Open an existing persona without any server: factors, history and rollback work, soft prompts too if the bundle is in the cache.

    secret: see `Client.personal`.

    Raises:
        FolderError: no such persona, a damaged folder, or a wrong secret.
    """
    store = PersonaStore(path, persona, secret)
    bundle = cached_bundle(store.record().bundle_id, cache)
    if secret is not None:
        store.unlock()
    return Persona(Opened(store, None if bundle is None else PromptEncoder(bundle, threads=threads)), None, None)
