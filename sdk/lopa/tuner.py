"""Split fine-tuning, the device's half: compose soft prompts, ask for their gradients, step the user's own factors.

The server never sees factors, their gradients or the optimizer's state. Legend: b batch, m rows, d hidden size.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np

from lopa import examples as data
from lopa.encoder import Moments, PromptEncoder, Tensors
from lopa.errors import FactorsError, InvalidRequest, RemoteError, TuningError
from lopa.examples import Example
from lopa.factors import Factors
from lopa.folder import PersonaStore
from lopa.retry import Patience
from lopa.tune_state import Progress, TuneState, load_state
from lopa.tuning import TuneConfig, TuneProgress, TuneReport
from lopa.values import Dtype, Float32, Pair, PairGradient, PairScore, Placement, Traffic
from lopa.wire.errors import Reason

Result = TypeVar("Result")
_OUT_OF_RANGE = (Reason.SOFT_PROMPT_NORM, Reason.SOFT_PROMPT_NOT_FINITE)


class GradientSource(Protocol):
    """The server, as tuning needs it: a `Client`."""

    @property
    def traffic(self) -> Traffic: ...

    def score(self, pairs: Sequence[Pair], *, dtype: Dtype = ..., placement: Placement = ...) -> list[PairScore]: ...

    def prompt_gradients(
        self,
        pairs: Sequence[Pair],
        *,
        dtype: Dtype = ...,
        gradient_dtype: Dtype = ...,
        placement: Placement = ...,
        max_pairs: int | None = ...,
    ) -> list[PairGradient]: ...


@dataclass(frozen=True)
class Encoded:
    """Examples with the instance tensors of their prompts: name -> (n, ...)."""

    examples: Sequence[Example]
    instance: Tensors

    def take(self, rows: Sequence[int]) -> Encoded:
        """Some of them, in this order."""
        return Encoded([self.examples[i] for i in rows], {name: value[list(rows)] for name, value in self.instance.items()})


def encode_examples(encoder: PromptEncoder, examples: Sequence[Example]) -> Encoded:
    """Run the encoder once over every example's text."""
    texts = [data.text_for_encoder(example.prompt, example.encoder_text, example.prefix) for example in examples]
    return Encoded(examples, encoder.encode(texts))


def pairs_with(encoded: Encoded, soft_prompts: Float32) -> list[Pair]:
    """Pairs for the wire; soft_prompts: (b, m, d)."""
    return [
        Pair(example.prompt, example.target, soft, example.append_end, example.prefix)
        for example, soft in zip(encoded.examples, soft_prompts, strict=True)
    ]


class Diverged(Exception):
    """Never leaves a run: the soft prompt or the factors left the range of usable numbers."""


class Tuner:
    """One run over one persona, whose lock the caller holds."""

    def __init__(
        self,
        source: GradientSource,
        encoder: PromptEncoder,
        store: PersonaStore,
        config: TuneConfig,
        split: tuple[Sequence[Example], Sequence[Example]],
        notify: Callable[[TuneProgress], None],
    ) -> None:
        record = store.record()
        self._source, self._encoder, self._store, self._notify = source, encoder, store, notify
        self._placement = config.placement or record.placement
        self._config = replace(config, placement=self._placement)
        self._training, self._validation = (encode_examples(encoder, part) for part in split)
        self._current = store.factors(record)
        self._start = Factors.start(encoder.bundle) if config.fresh else self._current
        self._patience = Patience(config.patience, random.Random())
        self._clock = time.monotonic()
        self._counted = source.traffic
        self._last = Progress()

    def run(self) -> TuneReport:
        """Tune to the end; every completed step is on disk before the next begins.

        Raises:
            Unavailable: no server for `patience` seconds; call again to go on. Others: as the server or the folder says.
        """
        state = load_state(self._store.tuning_path, self._digest(), self._encoder.bundle.manifest.personal, self._config.steps)
        if state is None:
            state = self._begin()
        resumed_from = state.progress.step
        self._last = state.progress
        while state.progress.outcome == "running":
            try:
                self._advance(state)
            except Diverged:
                state.progress.outcome = "diverged"
            self._save(state)
            self._tell(state.progress)
        return self._finish(state, resumed_from)

    def _digest(self) -> str:
        """What this run is: a run with the same digest goes on where the other stopped."""
        parts = [
            self._encoder.bundle.manifest.id,
            hashlib.sha256(self._current.to_bytes()).hexdigest(),
            self._config.identity(),
            data.digest(self._training.examples),
            data.digest(self._validation.examples),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _begin(self) -> TuneState:
        """Measure what there is: the persona's factors, and the start if it is another."""
        start = self._measure(self._start)
        before = self._measure(self._current) if self._config.fresh else start
        if not math.isfinite(start):
            raise TuningError("the factors to start from give no finite loss; roll back to a sound version or tune with fresh=True")
        progress = Progress(before_nll=before, best_nll=min(start, before), validation=[(0, start)])
        moments = Moments.zeros(self._encoder.bundle.manifest.personal)
        state = TuneState(self._digest(), self._start.tensors, moments, self._current.tensors, progress)
        self._save(state)
        return state

    def _advance(self, state: TuneState) -> None:
        """One optimizer step and, when due, a measurement.

        Raises:
            Diverged: the state is unchanged.
        """
        config, progress = self._config, state.progress
        step = progress.step + 1
        size = min(config.batch_size, len(self._training.examples))
        batch = self._training.take(data.batch(len(self._training.examples), size, step, config.seed))
        gradients = self._gradients(batch, state.personal)
        tokens = sum(item.target_tokens for item in gradients)
        update = self._encoder.update(
            batch.instance,
            state.personal,
            state.moments,
            np.stack([item.gradient for item in gradients]) / np.float32(tokens),
            learning_rate=config.rate(step),
            weight_decay=config.weight_decay,
            clip=config.clip,
            step=step,
        )
        if not all(np.isfinite(value).all() for value in update.personal.values()):
            raise Diverged("the update has values that are not finite")
        state.personal, state.moments, progress.step = update.personal, update.moments, step
        progress.losses.append(sum(item.nll_sum for item in gradients) / tokens)
        progress.gradient_norms.append(update.gradient_norm)
        if step % config.validate_every == 0 or step == config.steps:
            self._validate(state)
        if step == config.steps:
            progress.outcome = "finished"

    def _gradients(self, batch: Encoded, personal: Tensors) -> list[PairGradient]:
        config = self._config
        try:
            pairs = pairs_with(batch, self._encoder.compose(batch.instance, personal))
        except FactorsError as error:
            raise Diverged(str(error)) from error

        def ask() -> list[PairGradient]:
            return self._source.prompt_gradients(
                pairs,
                dtype=config.dtype,
                gradient_dtype=config.gradient_dtype,
                placement=self._placement,
                max_pairs=config.microbatch or None,
            )

        return self._ask(ask)

    def _validate(self, state: TuneState) -> None:
        """Measure the factors as they would rest on disk, and keep them if they are the best so far."""
        rounded = self._with(state.personal).at_rest()
        nll = self._measure(rounded)
        state.progress.validation.append((state.progress.step, nll))
        if nll < state.progress.best_nll:
            state.progress.best_nll, state.progress.best_step, state.best = nll, state.progress.step, rounded.tensors

    def _measure(self, factors: Factors) -> float:
        """NLL per target token over the validation examples; infinite for factors that can't be used."""
        if not factors.finite:
            return math.inf
        try:
            pairs = pairs_with(self._validation, self._encoder.compose(self._validation.instance, factors.tensors))
            scores = self._ask(lambda: self._source.score(pairs, dtype=self._config.dtype, placement=self._placement))
        except (Diverged, FactorsError):
            return math.inf
        return sum(score.nll_sum for score in scores) / sum(score.target_tokens for score in scores)

    def _ask(self, call: Callable[[], Result]) -> Result:
        """Call the server, patiently. A soft prompt that it finds too large is the run's own doing: Diverged."""
        try:
            return self._patience.keep_trying(call, self._waiting)
        except InvalidRequest as error:
            if error.reason in _OUT_OF_RANGE:
                raise Diverged(str(error)) from error
            raise

    def _with(self, tensors: Tensors) -> Factors:
        return Factors(tensors, self._current.specs, self._current.bundle_id, self._current.fm_fingerprint)

    def _save(self, state: TuneState) -> None:
        now, traffic = time.monotonic(), self._source.traffic
        used = traffic - self._counted
        state.progress.seconds += now - self._clock
        state.progress.sent_bytes += used.sent_bytes
        state.progress.received_bytes += used.received_bytes
        self._clock, self._counted = now, traffic
        state.save(self._store.tuning_path)

    def _tell(self, progress: Progress, waiting: str = "") -> None:
        loss = progress.losses[-1] if progress.losses else None
        nll = progress.validation[-1][1] if progress.validation else None
        self._notify(TuneProgress(progress.step, self._config.steps, loss, nll, progress.before_nll, waiting))

    def _waiting(self, error: RemoteError) -> None:
        self._tell(self._last, str(error))

    def _finish(self, state: TuneState, resumed_from: int) -> TuneReport:
        """Save the best factors if they are better than what there was, then forget the run."""
        progress = state.progress
        kept = progress.best_step > 0
        if kept:
            self._store.append(self._with(state.best), validation_nll=progress.best_nll, placement=self._placement)
        self._store.tuning_path.unlink(missing_ok=True)
        record = self._store.record()
        return TuneReport(
            kept=kept,
            version=record.current,
            outcome="diverged" if progress.outcome == "diverged" else "finished",
            start_nll=progress.before_nll,
            best_nll=progress.best_nll,
            end_nll=progress.best_nll if kept else progress.before_nll,
            best_step=progress.best_step,
            steps=progress.step,
            resumed_from=resumed_from,
            losses=tuple(progress.losses),
            gradient_norms=tuple(progress.gradient_norms),
            validation=tuple(progress.validation),
            training_examples=len(self._training.examples),
            validation_examples=len(self._validation.examples),
            seconds=progress.seconds,
            sent_bytes=progress.sent_bytes,
            received_bytes=progress.received_bytes,
            factor_bytes=record.version(record.current).size,
        )
