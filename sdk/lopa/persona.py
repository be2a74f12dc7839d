"""A persona: one user's factors for one task, and what they do.

Legend: b examples, m soft-prompt rows, d hidden size of the foundation model (FM).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from lopa.bundle import Bundle
from lopa.cache import cached_bundle, check_model
from lopa.encoder import PromptEncoder
from lopa.errors import BundleError, FingerprintMismatch, Unavailable
from lopa.examples import ExampleLike, as_examples, split, text_for_encoder
from lopa.factors import Factors
from lopa.folder import PersonaStore, Record, Version
from lopa.stream import GenerationStream
from lopa.tuner import Tuner, encode_examples, pairs_with
from lopa.tuning import TuneConfig, TuneOptions, TuneProgress, TuneReport
from lopa.values import Dtype, Float32, Generation, PairScore, Placement, Prompt, SamplingOptions

if TYPE_CHECKING:
    from lopa.client import Client


class Persona:
    """One persona of a user's folder. What it reads from disk is always the latest completed state. Safe between threads."""

    def __init__(self, store: PersonaStore, encoder: PromptEncoder | None, client: Client | None) -> None:
        """Use `Client.personal` or `open_personal`. Without a client it works offline; without an encoder only the files can be read."""
        self._store = store
        self._encoder = encoder
        self._client = client

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
    def unfinished(self) -> bool:
        """Whether an interrupted tuning run waits to be resumed."""
        return self._store.tuning_path.exists()

    def history(self) -> tuple[Version, ...]:
        """Every version kept, oldest first."""
        return self.record.versions

    def rollback(self, version: int) -> Version:
        """Make another version the current one; nothing is lost.

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

    def generate(
        self,
        prompt: Prompt,
        *,
        encoder_text: str | None = None,
        prefix: str | Sequence[int] | None = None,
        dtype: Dtype = "F32",
        placement: Placement | None = None,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """As `Client.generate`, with the personal soft prompt.

        encoder_text: what the encoder reads instead of the text of prefix and prompt. placement: by default the one that the
        persona was tuned with; after a prefix, the prompt may be empty.

        Raises:
            Unavailable: offline. Others: as `Client.generate` and `soft_prompts`.
        """
        soft = self._soft_prompt(prompt, encoder_text, prefix)
        placement = placement or self.placement
        return self._need_client().generate(
            prompt, prefix=prefix, soft_prompt=soft, dtype=dtype, placement=placement, timeout=timeout, **sampling
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        encoder_text: str | None = None,
        prefix: str | Sequence[int] | None = None,
        dtype: Dtype = "F32",
        placement: Placement | None = None,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> GenerationStream:
        """As `Client.stream`, with the personal soft prompt."""
        soft = self._soft_prompt(prompt, encoder_text, prefix)
        placement = placement or self.placement
        return self._need_client().stream(
            prompt, prefix=prefix, soft_prompt=soft, dtype=dtype, placement=placement, timeout=timeout, **sampling
        )

    def score(
        self,
        examples: Iterable[ExampleLike],
        *,
        factors: Factors | None = None,
        dtype: Dtype = "F32",
        placement: Placement | None = None,
    ) -> list[PairScore]:
        """Negative log-likelihood of each example's target, with the current factors or the ones given.

        placement: by default the one that the persona was tuned with.

        Raises:
            Unavailable: offline. FingerprintMismatch: factors of another bundle. Others: as `Client.score`.
        """
        client, encoder = self._need_client(), self._need_encoder()
        encoded = encode_examples(encoder, as_examples(examples))
        if not encoded.examples:
            return []
        pairs = pairs_with(encoded, encoder.compose(encoded.instance, self._tensors(factors).tensors))
        return client.score(pairs, dtype=dtype, placement=placement or self.placement)

    def tune(
        self,
        examples: Iterable[ExampleLike],
        *,
        validation: float | Iterable[ExampleLike] | None = None,
        config: TuneConfig | None = None,
        on_step: Callable[[TuneProgress], None] | None = None,
        **options: Unpack[TuneOptions],
    ) -> TuneReport:
        """Learn from examples; keep the result only if it is better on the validation examples.

        validation: examples of your own to measure on, or the share of `examples` to hold back (default 20 %, at least one).
        config, or its fields as keywords: steps, batch_size, learning_rate, ...; by default the bundle's.
        on_step: told after every step, and while the run waits for the server.

        Every completed step is on disk. Interrupted at any moment, a call with the same examples and settings goes on where
        it stopped and ends with the same factors, bit for bit, as if it had never stopped.

        Raises:
            TuningError: too few examples, or a setting out of range. Unavailable: no server for `patience` seconds; call again.
            FolderError: another process tunes this persona. Others: as the server says.
        """
        client, encoder = self._need_client(), self._need_encoder()
        if config is None:
            config = TuneConfig.for_bundle(encoder.bundle.manifest, **options)
        elif options:
            raise TypeError(f"give either config or keywords, not both: {', '.join(options)}")
        parts = split(as_examples(examples), validation, config.seed)
        with self._store.lock():
            return Tuner(client.metered(), encoder, self._store, config, parts, on_step or (lambda _: None)).run()

    def _soft_prompt(self, prompt: Prompt, encoder_text: str | None, prefix: str | Sequence[int] | None) -> Float32:
        row: Float32 = self.soft_prompts([text_for_encoder(prompt, encoder_text, prefix)])[0]
        return row

    def _tensors(self, factors: Factors | None) -> Factors:
        factors = factors or self.factors
        if factors.bundle_id != self._need_encoder().bundle.manifest.id:
            raise FingerprintMismatch(
                f"these factors belong to bundle {factors.bundle_id[:12]}, the persona to {self._need_encoder().bundle.manifest.id[:12]}"
            )
        return factors

    def _need_client(self) -> Client:
        if self._client is None:
            raise Unavailable("this persona was opened offline; open it with `lopa.connect(...).personal(...)` to reach a server")
        return self._client

    def _need_encoder(self) -> PromptEncoder:
        if self._encoder is None:
            raise BundleError(f"bundle {self.bundle_id[:12]} is not on this device; open the persona with a connection once to fetch it")
        return self._encoder


def open_personal(path: Path | str, persona: str = "default", *, cache: Path | None = None, threads: int = 1) -> Persona:
    """Open an existing persona without any server: factors, history and rollback work, soft prompts too if the bundle is in the cache.

    Raises:
        FolderError: no such persona, or a damaged folder.
    """
    store = PersonaStore(path, persona)
    bundle = cached_bundle(store.record().bundle_id, cache)
    return Persona(store, None if bundle is None else PromptEncoder(bundle, threads=threads), None)


def open_with_client(
    client: Client, path: Path | str, persona: str, *, bundle: Bundle | None, progress: Callable[[int, int], None] | None
) -> Persona:
    """What `Client.personal` does."""
    store, model = PersonaStore(path, persona), client.model
    if not store.exists:
        chosen = bundle or client.bundle(progress=progress)
        check_model(chosen, model)
        store.create(chosen)
    record = store.record()
    if record.fm_fingerprint != model.fingerprint:
        raise FingerprintMismatch(
            f"persona {persona} was tuned for {record.fm_name} ({record.fm_fingerprint[:12]}); the server hosts {model.name} "
            f"({model.fingerprint[:12]}): choose another persona name to start one for this model"
        )
    if bundle is None:
        bundle = cached_bundle(record.bundle_id, client.config.cache)
    if bundle is None and model.bundle_id == record.bundle_id:
        bundle = client.bundle(progress=progress)
    if bundle is None or bundle.manifest.id != record.bundle_id:
        other = model.bundle_id if bundle is None else bundle.manifest.id
        raise FingerprintMismatch(
            f"persona {persona} belongs to bundle {record.bundle_id[:12]}, which is not here; {other[:12] or 'no bundle'} is: "
            "choose another persona name to start one for that bundle"
        )
    check_model(bundle, model)
    return Persona(store, client.encoder(bundle), client)
