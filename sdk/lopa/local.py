"""What a persona does on this device, and what it says to a server: everything that both kinds of persona share, without I/O of its own.

Legend: b examples, m soft-prompt rows, d hidden size of the foundation model (FM).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lopa.archive import export_persona
from lopa.bundle import Bundle
from lopa.cache import cached_bundle, check_model, fetch_bundle
from lopa.control import TuneControl
from lopa.encoded import encode_examples, pairs_with
from lopa.encoder import PromptEncoder
from lopa.errors import BundleError, FingerprintMismatch, FolderError, Unavailable
from lopa.examples import Example, ExampleLike, as_examples, split, text_for_encoder
from lopa.factors import Factors
from lopa.folder import PersonaStore
from lopa.protocol.flow import Flow, work
from lopa.record import Record, Version
from lopa.session import GenerationFlow, WireOptions
from lopa.sources import MAX_FILE_BYTES, from_jsonl, to_jsonl
from lopa.tune_job import TuneJob
from lopa.tuner import Tuner
from lopa.tuning import TuneConfig, TuneOptions, TuneProgress, TuneReport
from lopa.values import Dtype, Float32, Model, Pair, PairScore, Placement, Prompt, Sampling
from lopa.vault import Secret

if TYPE_CHECKING:
    from lopa.session import Session


class LocalPersona:
    """One persona of a user's folder. What it reads from disk is always the latest completed state. Safe between threads."""

    def __init__(self, opened: Opened, session: Session | None) -> None:
        """Use `Client.personal` or `open_personal`. Without a session it works offline; without an encoder only the files can be read."""
        self._store, self._encoder, self._mismatch = opened.store, opened.encoder, opened.mismatch
        self._session = session

    @property
    def name(self) -> str:
        return self._store.name

    @property
    def path(self) -> Path:
        """The user's folder."""
        return self._store.root

    @property
    def record(self) -> Record:
        """What the persona belongs to, and its versions."""
        return self._store.record()

    @property
    def version(self) -> int:
        """The current version of the factors; 1 holds the bundle's starting values."""
        return self.record.current

    @property
    def bundle_id(self) -> str:
        """The bundle that the factors belong to."""
        return self.record.bundle_id

    @property
    def placement(self) -> Placement:
        """Where the current factors' soft prompt stands by default: as they were tuned."""
        return self.record.placement

    @property
    def factors(self) -> Factors:
        """The current factors.

        Raises:
            FactorsError: the file is damaged.
        """
        return self._store.factors(self.record)

    @property
    def factors_path(self) -> Path:
        """The current factors file."""
        return self._store.factors_path(self.version)

    @property
    def factor_bytes(self) -> int:
        """Size of the current factors file on disk."""
        return self.factors_path.stat().st_size

    @property
    def plain(self) -> bool:
        """Whether the plain model answers, because the factors belong to another model or bundle: until `migrate` has finished."""
        return self._mismatch is not None or self.record.pending

    @property
    def kept_examples(self) -> list[Example]:
        """The examples that `tune(..., keep_examples=True)` kept on this device, oldest first.

        Raises:
            FolderError: the file is damaged.
        """
        path = self._store.examples_path
        if not path.exists():
            return []
        try:
            return from_jsonl(self._store.read(path, MAX_FILE_BYTES), str(path))
        except (OSError, ValueError) as error:
            raise FolderError(f"{path} is damaged ({error}); remove it, and what it held is forgotten") from error

    def forget_examples(self) -> None:
        """Remove the kept examples from this device."""
        with self._store.lock():
            self._store.examples_path.unlink(missing_ok=True)

    def export(self, path: Path | str) -> None:
        """Write the whole persona to one file, for `import_persona` on another device.

        >>> me.export("me.lopa")
        >>> lopa.import_persona("me.lopa", "other-device", persona="mine")
        'mine'

        Raises:
            FolderError: it is being tuned, or damaged. StorageError: the file can't be written.
        """
        export_persona(self._store, Path(path).expanduser())

    @property
    def unfinished(self) -> bool:
        """Whether an interrupted tuning run waits to be resumed."""
        return self._store.tuning_path.exists()

    def discard_unfinished(self) -> None:
        """Forget an interrupted tuning run.

        Raises:
            FolderError: it is running now.
        """
        with self._store.lock():
            self._store.tuning_path.unlink(missing_ok=True)

    def history(self) -> tuple[Version, ...]:
        """Every version kept, oldest first."""
        return self.record.versions

    def rollback(self, version: int) -> Version:
        """Make another version the current one; nothing is lost.

        >>> report = me.tune(examples, steps=12, batch_size=4, learning_rate=0.02)
        >>> [(version.version, version.origin) for version in me.history()]
        [(1, 'start'), (2, 'tune')]
        >>> me.rollback(1).version
        1

        Raises:
            FolderError: no such version, or the persona is being tuned. FactorsError: its file is damaged.
        """
        return self._store.rollback(version)

    def soft_prompts(self, texts: Sequence[str], *, factors: Factors | None = None) -> Float32:
        """Soft prompts for texts, with the current factors or the ones given: (b, m, d). Works offline.

        Raises:
            BundleError: the bundle is not on this device. FingerprintMismatch: factors of another bundle.
        """
        encoder = self._need_encoder()
        return encoder.compose(encoder.encode(texts), self._tensors(factors).tensors)

    def _generating(
        self, prompt: Prompt, sampling: Sampling, *, encoder_text: str | None, prefix: str | Sequence[int] | None, wire: PersonalWire
    ) -> Flow[GenerationFlow]:
        session, soft = self._need_session(), None
        if not self.plain:
            soft = yield from work(lambda: self.soft_prompts([text_for_encoder(prompt, encoder_text, prefix)])[0])
        options = wire.resolved(self.placement)
        return (yield from session.open_generation(prompt, sampling, prefix=prefix, soft_prompt=soft, wire=options))

    def _scoring(self, examples: Iterable[ExampleLike], factors: Factors | None, wire: PersonalWire) -> Flow[list[PairScore]]:
        session, items = self._need_session(), as_examples(examples)
        if not items:
            return []
        if self.plain and factors is None:
            plain = [Pair(one.prompt, one.target, None, one.append_end, one.prefix) for one in items]
            return (yield from session.score(plain, wire.resolved("front")))
        encoder = self._need_encoder()
        tensors = self._tensors(factors).tensors
        encoded = yield from work(lambda: encode_examples(encoder, items))
        soft = yield from work(lambda: encoder.compose(encoded.instance, tensors))
        return (yield from session.score(pairs_with(encoded, soft), wire.resolved(self.placement)))

    def _tuning(
        self,
        examples: Iterable[ExampleLike],
        validation: float | Iterable[ExampleLike] | None,
        config: TuneConfig | None,
        watch: Watch,
        keep_examples: bool,
        options: TuneOptions,
    ) -> Flow[TuneReport]:
        if self._mismatch is not None:
            raise FingerprintMismatch(f"{self._mismatch}; `migrate` first")
        session, encoder = self._need_session(), self._need_encoder()
        if config is None:
            config = TuneConfig.for_bundle(encoder.bundle.manifest, **options)
        elif options:
            raise TypeError(f"give either config or keywords, not both: {', '.join(options)}")
        training, held = split(as_examples(examples), validation, config.seed)
        control = watch.control or TuneControl()
        with self._store.lock(), watch.following() as tell:
            self._store.unlock()
            if keep_examples:
                self._store.write(self._store.examples_path, to_jsonl([*self.kept_examples, *training, *held]))
            job = TuneJob(config, training, held, tell, control)
            report = yield from Tuner(session.metered(control.stop), encoder, self._store, job).run()
            if self.record.pending and not report.resumable:
                self._store.settle()
            return report

    def _migrating(
        self, watch: Watch, progress: Callable[[int, int], None] | None, config: TuneConfig | None, options: TuneOptions
    ) -> Flow[TuneReport]:
        session, kept = self._need_session(), self.kept_examples
        if not kept:
            raise FolderError(
                f"persona {self.name} kept no examples to learn from again: tune a new persona, with keep_examples=True for the next time"
            )
        bundle = yield from fetch_bundle(session, progress=progress)
        if self.bundle_id != bundle.manifest.id:
            with self._store.lock():
                self._store.unlock()
                yield from work(lambda: self._store.rebase(bundle))
        self._encoder, self._mismatch = session.encoder(bundle), None
        return (yield from self._tuning(kept, None, config, watch, False, options))

    def _tensors(self, factors: Factors | None) -> Factors:
        factors = factors or self.factors
        if factors.bundle_id != self._need_encoder().bundle.manifest.id:
            raise FingerprintMismatch(
                f"these factors belong to bundle {factors.bundle_id[:12]}, the persona to {self._need_encoder().bundle.manifest.id[:12]}"
            )
        return factors

    def _need_session(self) -> Session:
        if self._session is None:
            raise Unavailable("this persona was opened offline; open it with `lopa.connect(...).personal(...)` to reach a server")
        return self._session

    def _need_encoder(self) -> PromptEncoder:
        if self._encoder is None:
            raise BundleError(f"bundle {self.bundle_id[:12]} is not on this device; open the persona with a connection once to fetch it")
        return self._encoder


class PersonalWire:
    """Wire options whose placement may be left to the persona."""

    def __init__(self, dtype: Dtype, placement: Placement | None, timeout: float | None = None) -> None:
        self._options, self._placement = WireOptions(dtype=dtype, timeout=timeout), placement

    def resolved(self, default: Placement) -> WireOptions:
        return replace(self._options, placement=self._placement or default)


@dataclass(frozen=True)
class Watch:
    """Who follows a run, and who steers it."""

    on_step: Callable[[TuneProgress], None] | None = None
    control: TuneControl | None = None
    bar: bool = False
    """Show a progress bar."""

    @contextlib.contextmanager
    def following(self) -> Iterator[Callable[[TuneProgress], None]]:
        """Whom to tell of every step."""
        if not self.bar:
            yield self.on_step or (lambda _: None)
            return
        from lopa.progress_bar import tuning_bar

        with tuning_bar(self.on_step) as show:
            yield show


@dataclass(frozen=True)
class Opened:
    """A persona as it was found."""

    store: PersonaStore
    encoder: PromptEncoder | None
    mismatch: FingerprintMismatch | None = None
    """Why it doesn't fit the server."""


Mismatch = Literal["refuse", "plain"]
"""What to do with a persona of another model or bundle: refuse to open it, or let the plain model answer until `migrate`."""


@dataclass(frozen=True)
class OpenOptions:
    """How `Client.personal` opens."""

    bundle: Bundle | None = None
    secret: Secret | None = None
    mismatch: Mismatch = "refuse"
    progress: Callable[[int, int], None] | None = None


def opened(session: Session, path: Path | str, persona: str, options: OpenOptions) -> Flow[Opened]:
    """What `Client.personal` does: the persona's files and its encoder."""
    store, model = PersonaStore(path, persona, options.secret), (yield from session.model())
    if not store.exists:
        chosen = options.bundle or (yield from fetch_bundle(session, progress=options.progress))
        check_model(chosen, model)
        yield from work(lambda: store.create(chosen))
    record = store.record()
    yield from work(store.unlock)
    try:
        bundle = yield from _fitting_bundle(session, record, model, options)
    except FingerprintMismatch as error:
        if options.mismatch == "refuse":
            raise
        return Opened(store, None, error)
    return Opened(store, session.encoder(bundle))


def _fitting_bundle(session: Session, record: Record, model: Model, options: OpenOptions) -> Flow[Bundle]:
    """The bundle that the record names, if it fits the server.

    Raises:
        FingerprintMismatch: it does not.
    """
    way_out = "open it with mismatch='plain' and call `migrate`, or choose another persona name to start anew"
    if record.fm_fingerprint != model.fingerprint:
        raise FingerprintMismatch(
            f"persona {record.persona} was tuned for {record.fm_name} ({record.fm_fingerprint[:12]}); the server hosts {model.name} "
            f"({model.fingerprint[:12]}): {way_out}"
        )
    bundle = options.bundle
    if bundle is None:
        bundle = yield from work(lambda: cached_bundle(record.bundle_id, session.config.cache, session.config.trusted_keys))
    if bundle is None and model.bundle_id == record.bundle_id:
        bundle = yield from fetch_bundle(session, progress=options.progress)
    if bundle is None or bundle.manifest.id != record.bundle_id:
        other = model.bundle_id if bundle is None else bundle.manifest.id
        raise FingerprintMismatch(
            f"persona {record.persona} belongs to bundle {record.bundle_id[:12]}, which is not here; {other[:12] or 'no bundle'} is: "
            f"{way_out}"
        )
    check_model(bundle, model)
    return bundle
