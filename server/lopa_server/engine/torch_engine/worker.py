"""The engine thread: takes requests in between steps, asks the scheduler what to compute, computes it, reports.

All torch work happens here. The asyncio side talks to it through `send`; it answers each request's receiver.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import torch

from lopa_server.engine.base import EngineError, EngineFailed, EngineStats, EngineStopped, Finish
from lopa_server.engine.content import CacheScope
from lopa_server.engine.mailbox import Event, Receiver
from lopa_server.engine.pair_queue import PairRow, PairStep
from lopa_server.engine.scheduler import Scheduler, SchedulerLimits, Step, TokenStep
from lopa_server.engine.sequences import SequenceState
from lopa_server.engine.torch_engine.inbox import Abort, Command, Inbox, Incoming, Stop
from lopa_server.engine.torch_engine.interruption import Interruptions
from lopa_server.engine.torch_engine.layout import Piece
from lopa_server.engine.torch_engine.live import LiveJob, LiveStream, Untold
from lopa_server.engine.torch_engine.loader import FoundationModel
from lopa_server.engine.torch_engine.pairs import PlacedPair, run_pairs
from lopa_server.engine.torch_engine.runner import ModelRunner
from lopa_server.engine.torch_engine.sampling import Sampler

log = logging.getLogger(__name__)


S = TypeVar("S", TokenStep, PairStep)
Deliver: TypeAlias = Callable[[Sequence[tuple[Receiver, Event]], EngineStats], None]
"""Gets a step's events, often none, and the stats after it. Called on the engine thread, and should take no time."""


class Worker:
    """Owns the model, the cache, the batch and the thread."""

    def __init__(self, fm: FoundationModel, limits: SchedulerLimits, threads: Callable[[], None]) -> None:
        """threads: called first on the engine thread, to set up torch's own threads for it."""
        self._fm = fm
        self._limits = limits
        self._runner = ModelRunner(fm, limits.blocks, limits.block_size)
        self._scope = CacheScope(fm.spec.fingerprint, fm.spec.compute_dtype)
        self._scheduler = Scheduler(limits)
        self._sampler = Sampler(fm.spec.vocab_size, fm.device)
        self._streams: dict[str, LiveStream] = {}
        self._jobs: dict[str, LiveJob] = {}
        self._inbox = Inbox()
        self._aborted = 0
        """After they had been taken in."""
        self._outbox: list[tuple[Receiver, Event]] = []
        self._counts: collections.Counter[str] = collections.Counter()
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._stats = EngineStats()
        self._set_up_threads = threads
        self._asynchronous = fm.device.type != "cpu"
        """There a part is over when it is queued, not when it is computed."""
        self._untold: list[Untold] = []
        """Of the last step. Told while the next one is computed, where that is not this thread's work."""
        self._stopping = False
        self._deliver: Deliver = _to_nobody
        self._thread = threading.Thread(target=self._run, name="lopa-engine", daemon=True)

    def start(self, deliver: Deliver) -> None:
        """deliver: gets everything from now on; again before the thread waits for something to do."""
        self._deliver = deliver
        self._thread.start()

    def send(self, command: Command) -> None:
        """Hand something to the engine thread; it is taken in before the next step. Raises EngineStopped once the thread has ended."""
        self._inbox.put(command)

    def join(self) -> None:
        """Wait for the thread to end, after Stop."""
        self._thread.join()

    def stats(self) -> EngineStats:
        """As of the last step. An immutable value, since this is called from other threads."""
        return self._stats

    @property
    def captured(self) -> int:
        """Decode steps that were captured as CUDA graphs."""
        return len(self._runner.graphs or ())

    def _publish(self) -> None:
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        self._stats = EngineStats(
            waiting=scheduler.waiting,
            running=scheduler.running,
            pairs_waiting=scheduler.pairs_waiting,
            block_size=blocks.block_size,
            blocks_total=blocks.total,
            blocks_used=blocks.used,
            blocks_cached=blocks.cached,
            kv_positions=scheduler.kv_positions,
            prefix_hit_tokens=scheduler.hit_tokens,
            preemptions=scheduler.preemptions,
            pairs_whole=scheduler.pairs_whole,
            seconds=dict(self._seconds),
            aborted=self._aborted + self._inbox.aborted,
            **self._counts,
        )

    def _run(self) -> None:
        try:
            self._set_up()
            self._work()
        except Exception:
            log.critical("the engine thread died", exc_info=True)
        finally:
            self._give_up()

    def _set_up(self) -> None:
        self._set_up_threads()
        if self._fm.device.type == "cuda":
            torch.cuda.set_device(self._fm.device)  # each thread has its own present device, and kernels start there
        self._runner.capture(self._limits.max_batch)

    def _give_up(self) -> None:
        """Tell everybody who still waits that there will be no answer."""
        self._tell()
        owners: list[Incoming] = [*self._inbox.close(), *self._streams.values(), *self._jobs.values()]
        for owner in owners:
            self._outbox.append((owner.receiver, EngineStopped("the engine was stopped")))
        self._flush()

    def _work(self) -> None:
        while self._take_in(wait=not self._streams and not self._jobs):
            step = self._scheduler.next_step()
            if isinstance(step, TokenStep):
                self._stream_step(step)
            elif step is not None:
                self._pair_step(step)

    def _stream_step(self, step: TokenStep) -> None:
        started = time.perf_counter()
        self._compute(step, self._tokens)
        elapsed = time.perf_counter() - started
        self._scheduler.record(step, elapsed)
        self._report(step, elapsed)

    def _pair_step(self, step: PairStep) -> None:
        """A micro-batch, with steps of streams in between where it can pause."""
        self._tell_the_rest()
        parts = Interruptions(self._let_streams_go)
        self._compute(step, lambda step: self._pairs(step, parts))
        parts.end()
        self._scheduler.record(step, parts.turn_seconds, parts.longest)
        self._report(step, parts.seconds)

    def _report(self, step: Step, seconds: float) -> None:
        self._seconds[type(step).__name__] += seconds
        self._publish()
        self._flush()

    def _let_streams_go(self, turn: float, part: float) -> bool:
        """Steps of streams in the middle of a micro-batch, if it is their turn before another part like the last one is over."""
        if not self._inbox.empty:
            self._stopping = not self._take_in(wait=False)
        if self._stopping or not self._scheduler.pauses_pairs(turn + part):
            return False
        self._scheduler.pause_pairs(turn)
        self._counts["pair_pauses"] += 1
        while not self._stopping and (step := self._scheduler.next_in_pause()) is not None:
            self._stream_step(step)
            self._stopping = not self._take_in(wait=False)
        return True

    def _take_in(self, *, wait: bool) -> bool:
        """Handle all commands that have arrived; wait: for one at least. False: stop."""
        self._publish()
        if wait:
            self._tell()
            self._flush()
        while not self._stopping:
            command = self._inbox.get(wait=wait)
            if command is None:
                return True
            wait = False
            if isinstance(command, Stop):
                return False
            self._handle(command)
        return False

    def _handle(self, command: Incoming | Abort) -> None:
        if not isinstance(command, Abort):
            self._add(command)
        elif command.id in self._streams or command.id in self._jobs:
            self._untold = [token for token in self._untold if token.stream.id != command.id]
            self._forget(command.id)
            self._aborted += 1

    def _add(self, arrival: Incoming) -> None:
        if isinstance(arrival, LiveStream):
            self._streams[arrival.id] = arrival
            self._scheduler.add(arrival.sequence(self._scope, self._limits.block_size))
        else:
            self._jobs[arrival.id] = arrival
            costs, first = arrival.measure(self._scope, self._limits.block_size), arrival.pairs[0]
            self._scheduler.add_pairs(arrival.id, arrival.kind, costs, tenant=first.tenant, low_priority=first.low_priority)

    def _forget(self, name: str, *, reliable: bool = True) -> None:
        """Take a request or call out, wherever it is; its blocks are free at once. reliable: as in `Scheduler.remove`."""
        self._scheduler.remove(name, reliable=reliable)
        self._sampler.remove(name)
        self._streams.pop(name, None)
        self._jobs.pop(name, None)

    def _compute(self, step: S, compute: Callable[[S], None]) -> None:
        """One step. When it fails, the requests it was for are lost, and nobody else's."""
        try:
            compute(step)
        except Exception as error:
            self._tell()
            concerned = _concerned(step)
            log.exception("%s failed for %d requests", type(step).__name__, len(concerned))
            if out_of_memory(error):
                self._shrink(step)
            for name in concerned:
                self._fail(name, error)

    def _shrink(self, step: Step) -> None:
        """Go on with smaller steps, rather than run out of memory again and again."""
        self._scheduler.shrink(step)
        self._counts["out_of_memory"] += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _fail(self, name: str, error: Exception) -> None:
        owner = self._streams.get(name) or self._jobs.get(name)
        if owner is not None:
            self._lose(owner, error)

    def _lose(self, owner: Incoming, error: Exception) -> None:
        """An error is the last that its client is told."""
        failure = error
        if not isinstance(error, EngineError):
            failure = EngineFailed(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
        self._outbox.append((owner.receiver, failure))
        self._counts["failed"] += 1
        self._forget(owner.id, reliable=False)

    def _tokens(self, step: TokenStep) -> None:
        pieces = [Piece(row.sequence.content, row.sequence.table, row.start, row.count) for row in step.rows]
        wanted = [index for index, row in enumerate(step.rows) if row.samples]
        logits = self._runner.step(pieces, wanted)
        self._tell_the_rest()
        decoding = sum(row.start > 0 and row.count == 1 for row in step.rows)
        counts = self._counts
        counts["steps"] += 1
        counts["native_fallbacks"] = self._runner.fallbacks
        counts["decode_steps"] += bool(decoding)
        counts["step_rows"] += len(step.rows)
        counts["step_positions"] += sum(row.count for row in step.rows)
        counts["prefill_tokens"] += sum(row.count for row in step.rows) - decoding
        if wanted:
            self._choose([step.rows[index].sequence for index in wanted], logits)

    def _choose(self, sequences: Sequence[SequenceState], logits: torch.Tensor) -> None:
        """The next token of each of these requests, from their rows of logits."""
        here = [row for row, sequence in enumerate(sequences) if sequence.id in self._streams]
        if len(here) < len(sequences):  # one was lost while the step was computed
            sequences, logits = [sequences[row] for row in here], logits[here]
            if not here:
                return
        streams = [self._streams[sequence.id] for sequence in sequences]
        for stream in streams:
            if not stream.sampled:
                request, stream.sampled = stream.request, True
                self._sampler.add(request.id, request.sampling, request.input.before + request.input.after, stream.constraint)
        choices = self._sampler.choose([sequence.id for sequence in sequences], logits)
        for sequence, stream, choice in zip(sequences, streams, choices, strict=True):
            try:
                finish = stream.take(choice)
            except EngineError as error:
                self._lose(stream, error)
                continue
            self._counts["generated_tokens"] += 1
            self._untold.append(Untold(stream, choice, finish))
            if finish is None:
                sequence.content.append(choice.token_id)
            if stream.ends_by_text or not self._asynchronous:
                finish = self._tell()
            if finish is not None:
                self._forget(sequence.id)

    def _tell(self) -> Finish | None:
        """Make of tokens what clients are told about them. How the last of them ends its stream."""
        untold, self._untold, finish = self._untold, [], None
        for token in untold:
            try:
                delta = token.stream.tell(token.choice, token.finish)
            except Exception as error:
                log.exception("a token of %s could not be used", token.stream.id)
                self._lose(token.stream, error)
                continue
            finish = delta.finish
            self._outbox.append((token.stream.receiver, delta))
        return finish

    def _tell_the_rest(self) -> None:
        if self._untold:
            self._tell()
            self._flush()

    def _pairs(self, step: PairStep, parts: Interruptions) -> None:
        try:
            pausing = parts.within(self._fm.model) if not self._asynchronous else contextlib.nullcontext()
            results = run_pairs(self._fm, self._runner, step.kind, [self._placed(row) for row in step.rows], pausing)
        except BaseException:
            self._scheduler.end_pairs(step, reliable=False)
            raise
        self._scheduler.end_pairs(step)
        self._counts["pair_batches"] += 1
        self._counts["pairs_done"] += len(results)
        self._counts["pair_prefix_hit_tokens"] += sum(row.cached for row in step.rows)
        self._counts["pair_prefix_tokens"] += sum(row.prefix - row.cached for row in step.rows)
        for row, result in zip(step.rows, results, strict=True):
            job = self._jobs.get(row.job)
            if job is None:
                continue
            try:
                complete = job.accept(row.index, result)
            except EngineFailed as error:
                self._fail(job.id, error)
                continue
            if complete is not None:
                self._outbox.append((job.receiver, complete))
                self._forget(job.id)

    def _placed(self, row: PairRow) -> PlacedPair:
        job = self._jobs[row.job]
        return PlacedPair(job.pairs[row.index], row.prefix, row.cached, row.table, job.costs[row.index].content)

    def _flush(self) -> None:
        """Send a step's events on in one go."""
        events, self._outbox = self._outbox, []
        self._deliver(events, self._stats)


def _to_nobody(*_: object) -> None:
    """Before the start nothing is said."""


def out_of_memory(error: Exception) -> bool:
    """On a CPU torch has no exception of its own for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def _concerned(step: Step) -> list[str]:
    """Whose requests a step is for."""
    names = [row.sequence.id for row in step.rows] if isinstance(step, TokenStep) else [row.job for row in step.rows]
    return list(dict.fromkeys(names))
