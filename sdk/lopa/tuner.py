"""Split fine-tuning, the device's half: compose soft prompts, ask for their gradients, step the user's own factors.

The server never sees factors, their gradients or the optimizer's state. Legend: b batch, m rows, d hidden size.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lopa import examples as data
from lopa.alignment import aligned, slowed
from lopa.control import Budget, Stopped, pair_bytes
from lopa.encoded import Encoded, encode_examples
from lopa.encoder import Composed, Moments, PromptEncoder, Tensors
from lopa.errors import Cancelled, FactorsError, LopaError, RemoteError, TuningError
from lopa.examples import Example
from lopa.factors import Factors
from lopa.folder import PersonaStore
from lopa.priors import CHOSEN_BY, read_priors, trial_steps
from lopa.protocol.flow import Flow, work
from lopa.protocol.requests import DTYPES
from lopa.tune_calls import TuningCalls
from lopa.tune_job import Diverged, Told, TuneJob
from lopa.tune_state import Progress, TuneState, load_state
from lopa.tuning import Outcome, TuneProgress, TuneReport

if TYPE_CHECKING:
    from lopa.session import Session


class Tuner:
    """One run over one persona, whose lock the caller holds."""

    def __init__(self, session: Session, encoder: PromptEncoder, store: PersonaStore, job: TuneJob) -> None:
        """session: with a meter of its own that job.control stops."""
        record = store.record()
        self._session, self._encoder, self._store, self._job = session, encoder, store, job
        self._config = replace(job.config, placement=job.config.placement or record.placement)
        self._current = store.factors(record)
        self._anew = self._config.fresh or record.version(record.current).origin == "start"
        self._rates = {prior.name: prior.rate for prior in encoder.bundle.manifest.priors}
        self._start = Factors.start(encoder.bundle) if self._config.fresh else self._current
        self._last = Progress()
        self._calls = TuningCalls(session, encoder, self._config, job.control.stop, lambda why: self._tell(self._last, why))
        self._budget = Budget(self._config, lambda: session.meter.traffic)
        self._clock = time.monotonic()
        self._counted = session.meter.traffic
        self._unsaved: TuneState | None = None

    def run(self) -> Flow[TuneReport]:
        """Tune to the end. A step is saved while the next one's gradients are under way, and told when it is on disk.

        Raises:
            Unavailable: no server for `patience` seconds; call again to go on. Cancelled: before anything was measured.
            Others: as the server or the folder says.
        """
        try:
            return (yield from self._run())
        except Told as told:
            raise told.error from told.error.__cause__
        finally:
            if self._unsaved is not None:  # the run was interrupted just now
                with contextlib.suppress(LopaError):
                    self._unsaved.save(self._store)

    def _run(self) -> Flow[TuneReport]:
        self._training, self._validation = yield from work(
            lambda: tuple(encode_examples(self._encoder, part) for part in (self._job.training, self._job.validation))
        )
        personal = self._encoder.bundle.manifest.personal
        state = yield from work(lambda: load_state(self._store, self._digest(), personal, self._config.steps))
        if state is None:
            state = yield from self._begin()
        resumed_from, stopped = state.progress.step, None
        self._last = state.progress
        while state.progress.outcome == "running":
            if self._job.control.paused:
                yield from self._settle()
            yield from self._job.control.hold(lambda why: self._tell(self._last, why))
            stopped = "cancelled" if self._job.control.cancelled else self._budget.reached(partial(self._step_bytes, state.progress))
            if stopped:
                break
            try:
                if self._on_trial(state.progress, state.progress.step):
                    state = yield from self._judged(state, state.progress.validation[-1][1])
                state = yield from self._advance(state)
            except Diverged:
                if state.progress.candidate:
                    state = yield from self._judged(state, math.inf)
                    continue
                state.progress.outcome = "diverged"
            except Cancelled:
                if not self._job.control.cancelled:
                    raise
                continue
            self._account(state.progress)
            self._last, self._unsaved = state.progress, state
        yield from self._settle()
        return self._finish(state, resumed_from, stopped)

    def _settle(self) -> Flow[None]:
        """Save the last step, if that is still to do, and tell of it."""
        state = self._unsaved
        if state is None:
            return
        yield from work(partial(state.save, self._store))
        self._unsaved = None
        try:
            self._tell(state.progress)
        except RemoteError as error:
            raise Told(error) from error

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

    def _begin(self) -> Flow[TuneState]:
        """Measure what there is: the plain model, the persona's factors, and the start if it is another."""
        plain = yield from self._measure(None)
        start = yield from self._measure(self._start)
        before = start if self._start is self._current else (yield from self._measure(self._current))
        if not math.isfinite(start):
            raise TuningError("the factors to start from give no finite loss; roll back to a sound version or tune with fresh=True")
        best = self._start if start < before else self._current  # as measured, not as aligned: what a bundle says of that is not relied on
        progress = Progress(plain_nll=plain, before_nll=before, best_nll=min(start, before), validation=[(0, start)])
        if self._anew:  # and so at the plain start, whose soft prompts aligning does not change
            some = self._training.take(self._batch(1, CHOSEN_BY))
            progress.candidate, prior = yield from self._calls.choose_prior(self._start, some)
            if prior is not None:
                progress.candidate_nll = yield from self._measure(prior)
            targets = [example.target for example in self._training.examples]
            self._start = yield from work(lambda: aligned(self._encoder, self._start, targets, self._training.instance))
        moments = Moments.zeros(self._encoder.bundle.manifest.personal)
        state = TuneState(self._digest(), self._start.tensors, moments, best.tensors, progress)
        self._account(progress)
        yield from work(partial(state.save, self._store))
        return state

    def _batch(self, step: int, size: int = 0) -> list[int]:
        count = len(self._training.examples)
        return data.batch(count, min(size or self._config.batch_size, count), step, self._config.seed)

    def _advance(self, state: TuneState) -> Flow[TuneState]:
        """The state after one optimizer step and, when due, a measurement; the one given stays as it is.

        Raises:
            Diverged: there is no such state.
        """
        self._budget.step_begins()
        config, step = self._config, state.progress.step + 1
        batch = self._training.take(self._batch(step))
        composed = yield from self._composed(batch, state.personal)
        gradients = yield from self._calls.gradients(batch, composed.soft_prompts, self._settle)
        tokens = sum(item.target_tokens for item in gradients)
        mean = np.stack([item.gradient for item in gradients])
        mean /= np.float32(tokens)
        update = yield from work(
            lambda: self._encoder.update(
                batch.instance,
                state.personal,
                state.moments,
                mean,
                learning_rate=config.rate(step) * self._rates.get(state.progress.prior, 1.0),
                weight_decay=config.weight_decay,
                clip=config.clip,
                step=state.progress.optimizer_step + 1,
                carried=composed.carried,
            )
        )
        if not all(np.isfinite(value).all() for value in update.personal.values()):
            raise Diverged("the update has values that are not finite")
        progress = state.progress.copy()
        progress.step = step
        progress.losses.append(sum(item.nll_sum for item in gradients) / tokens)
        progress.gradient_norms.append(update.gradient_norm)
        stepped = update.personal
        if not progress.prior:  # a prior's corrections were learnt from a population's many examples
            stepped = slowed(self._encoder, state.personal, stepped, len(self._training.examples))
        moved = replace(state, personal=stepped, moments=update.moments, progress=progress)
        measured = self._measured(progress, step)
        if measured:
            yield from self._validate(moved)
        if step == config.steps:
            progress.outcome = "finished"
        elif measured and not progress.candidate and 0 < config.early_stopping <= progress.stale():
            progress.outcome = "early_stopped"
        self._budget.step_done()
        return moved

    def _judged(self, state: TuneState, learnt: float) -> Flow[TuneState]:
        """The state with its candidate taken, unless the first steps have taught more than the candidate knows. learnt: their NLL."""
        progress = state.progress.copy()
        name, progress.candidate, progress.judged_step = progress.candidate, "", progress.step
        prior = (yield from work(lambda: read_priors(self._encoder.bundle))).get(name)
        if prior is None or learnt <= progress.candidate_nll:
            return replace(state, progress=progress)
        progress.prior = name
        taken = replace(state, personal=prior.tensors, moments=Moments.zeros(prior.specs), progress=progress)
        self._record(taken, prior, progress.candidate_nll)
        return taken

    def _on_trial(self, progress: Progress, step: int) -> bool:
        """Whether a candidate is judged after this step."""
        return bool(progress.candidate) and step == trial_steps(self._config.steps)

    def _measured(self, progress: Progress, step: int) -> bool:
        return step % self._config.validate_every == 0 or step == self._config.steps or self._on_trial(progress, step)

    def _step_bytes(self, progress: Progress) -> int:
        """What the next step brings over the wire at most, if nothing has to be repeated."""
        manifest = self._encoder.bundle.manifest
        numbers = manifest.rows * manifest.fm.hidden_size

        def total(examples: Sequence[Example], dtypes: list[int]) -> int:
            return sum(pair_bytes([one.prompt, one.target, one.prefix], numbers, manifest.rows, dtypes) for one in examples)

        soft, gradient = DTYPES[self._config.dtype], DTYPES[self._config.gradient_dtype]
        step = progress.step + 1
        needed = total([self._training.examples[i] for i in self._batch(step)], [soft, gradient])
        return needed + (total(self._validation.examples, [soft]) if self._measured(progress, step) else 0)

    def _composed(self, batch: Encoded, personal: Tensors) -> Flow[Composed]:
        try:
            return (yield from work(lambda: self._encoder.compose_to_update(batch.instance, personal)))
        except FactorsError as error:
            raise Diverged(str(error)) from error

    def _validate(self, state: TuneState) -> Flow[None]:
        """Measure the factors as they would rest on disk."""
        rounded = self._with(state.personal).at_rest()
        self._record(state, rounded, (yield from self._measure(rounded)))

    def _record(self, state: TuneState, factors: Factors, nll: float) -> None:
        """Keep what was measured, and the factors if they are the best so far."""
        state.progress.validation.append((state.progress.step, nll))
        if nll < state.progress.best_nll:
            state.progress.best_nll, state.progress.best_step, state.best = nll, state.progress.step, factors.tensors

    def _measure(self, factors: Factors | None) -> Flow[float]:
        return self._calls.measure(factors, self._validation)

    def _with(self, tensors: Tensors) -> Factors:
        return Factors(tensors, self._current.specs, self._current.bundle_id, self._current.fm_fingerprint)

    def _account(self, progress: Progress) -> None:
        """Add the time and the bytes since the last call."""
        now, traffic = time.monotonic(), self._session.meter.traffic
        used = traffic - self._counted
        progress.seconds += now - self._clock
        progress.sent_bytes += used.sent_bytes
        progress.received_bytes += used.received_bytes
        self._clock, self._counted = now, traffic

    def _tell(self, progress: Progress, waiting: str = "") -> None:
        loss = progress.losses[-1] if progress.losses else None
        nll = progress.validation[-1][1] if progress.validation else None
        self._job.notify(TuneProgress(progress.step, self._config.steps, loss, nll, progress.before_nll, waiting))

    def _finish(self, state: TuneState, resumed_from: int, stopped: Stopped | None) -> TuneReport:
        """Save the best factors if they beat what there was and the plain model, then forget the run; a stopped run is kept instead."""
        progress = state.progress
        kept = stopped is None and progress.best_nll < min(progress.before_nll, progress.plain_nll)
        if kept:
            placement = self._config.placement or "front"
            self._store.append(self._with(state.best), validation_nll=progress.best_nll, placement=placement)
        if stopped is None:
            self._store.tuning_path.unlink(missing_ok=True)
        record = self._store.record()
        ended: Outcome = "finished" if progress.outcome == "running" else progress.outcome
        return TuneReport(
            kept=kept,
            version=record.current,
            outcome=stopped or ended,
            plain_nll=progress.plain_nll,
            start_nll=progress.before_nll,
            prior=progress.prior,
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
