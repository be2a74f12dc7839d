"""The engine thread: takes requests in between steps, asks the scheduler what to compute, computes it, reports.

All torch work happens here. The asyncio side talks to it through `send`; it answers through each request's mailbox.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from lopa_server.engine.base import EngineFailed, EngineStats, EngineStopped
from lopa_server.engine.scheduler import DecodeStep, PairCost, PairKind, PairStep, PrefillStep, Scheduler, SchedulerLimits, Step
from lopa_server.engine.slots import SlotTable
from lopa_server.engine.torch_engine.live import Event, LiveJob, LiveStream, Mailbox
from lopa_server.engine.torch_engine.loader import FoundationModel
from lopa_server.engine.torch_engine.pairs import pair_gradients, score_pairs
from lopa_server.engine.torch_engine.runner import ModelRunner, Piece
from lopa_server.engine.torch_engine.sampling import Sampler

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Abort:
    """Forget a request or a call's pairs."""

    id: str


@dataclass(frozen=True)
class Stop:
    """Give up everything and end the thread."""


Command: TypeAlias = LiveStream | LiveJob | Abort | Stop


class Worker:
    """Owns the model, the cache, the batch and the thread."""

    def __init__(self, fm: FoundationModel, limits: SchedulerLimits, threads: Callable[[], None]) -> None:
        """threads: called first on the engine thread, to set up torch's own threads for it."""
        self._fm = fm
        self._runner = ModelRunner(fm)
        self._scheduler = Scheduler(limits)
        self._slots = SlotTable()
        self._sampler = Sampler(fm.spec.vocab_size, fm.device)
        self._streams: dict[str, LiveStream] = {}
        self._jobs: dict[str, LiveJob] = {}
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._outbox: list[tuple[Mailbox, Event]] = []
        self._counts: collections.Counter[str] = collections.Counter()
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._stats = EngineStats()
        self._set_up_threads = threads
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="lopa-engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Events arrive on this loop."""
        self._loop = loop
        self._thread.start()

    def send(self, command: Command) -> None:
        """Hand something to the engine thread; it is taken in before the next step.

        Raises:
            EngineStopped: the thread has ended, or ends before it takes this in.
        """
        with self._ending:
            if self._ended:
                raise EngineStopped("the engine has ended")
            self._inbox.put(command)

    def join(self) -> None:
        """Wait for the thread to end, after Stop."""
        self._thread.join()

    def stats(self) -> EngineStats:
        """As of the last step. An immutable value, since this is called from other threads."""
        return self._stats

    def _publish(self) -> None:
        scheduler = self._scheduler
        self._stats = EngineStats(
            waiting=scheduler.waiting,
            running=scheduler.running,
            pairs_waiting=scheduler.pairs_waiting,
            slots_used=len(self._slots),
            seconds=dict(self._seconds),
            **self._counts,
        )

    def _run(self) -> None:
        try:
            self._set_up_threads()
            self._work()
        except Exception:
            log.critical("the engine thread died", exc_info=True)
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """Tell everybody who still waits that there will be no answer."""
        with self._ending:
            self._ended = True
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, LiveStream | LiveJob):
                self._outbox.append((command.mailbox, EngineStopped("the engine was stopped")))
        for owner in [*self._streams.values(), *self._jobs.values()]:
            self._outbox.append((owner.mailbox, EngineStopped("the engine was stopped")))
        self._flush()

    def _work(self) -> None:
        while self._take_in():
            step = self._scheduler.next_step()
            if step is None:
                continue
            started = time.perf_counter()
            self._compute(step)
            elapsed = time.perf_counter() - started
            self._scheduler.record(step, elapsed)
            self._seconds[type(step).__name__] += elapsed
            self._publish()
            self._flush()

    def _take_in(self) -> bool:
        """Handle all commands that have arrived; wait for one when there is nothing else to do. False: stop."""
        self._publish()
        idle = not self._streams and not self._jobs
        while True:
            try:
                command = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            if isinstance(command, Stop):
                return False
            self._handle(command)

    def _handle(self, command: Command) -> None:
        if isinstance(command, LiveStream):
            request = command.request
            self._streams[request.id] = command
            self._scheduler.add(request.id, len(request.input), len(request.input) + request.sampling.max_tokens)
        elif isinstance(command, LiveJob):
            self._jobs[command.id] = command
            costs = [PairCost(len(pair), len(pair.target)) for pair in command.pairs]
            self._scheduler.add_pairs(command.id, command.kind, costs)
        elif isinstance(command, Abort) and (command.id in self._streams or command.id in self._jobs):
            self._forget(command.id)
            self._counts["aborted"] += 1

    def _forget(self, name: str) -> None:
        """Take a request or call out, wherever it is; its row is zeroed and free at once."""
        self._scheduler.remove(name)
        self._sampler.remove(name)
        self._jobs.pop(name, None)
        stream = self._streams.pop(name, None)
        if stream is None or stream.prepared is None:
            return
        moves, free = self._slots.leave(name)
        for move in moves:
            self._runner.apply(move)
        self._runner.clear(free)

    def _compute(self, step: Step) -> None:
        """One step. When it fails, the requests it was for are lost, and nobody else's."""
        concerned = self._concerned(step)
        try:
            if isinstance(step, PrefillStep):
                self._prefill(step)
            elif isinstance(step, DecodeStep):
                self._decode()
            else:
                self._pairs(step)
        except Exception as error:
            log.exception("%s failed for %d requests", type(step).__name__, len(concerned))
            for name in concerned:
                self._fail(name, error)

    def _concerned(self, step: Step) -> list[str]:
        if isinstance(step, PrefillStep):
            return list(dict.fromkeys([*step.admitted, *(chunk.id for chunk in step.chunks)]))
        if isinstance(step, DecodeStep):
            return list(self._slots.decoding)
        return list(dict.fromkeys(name for name, _ in step.pairs))

    def _fail(self, name: str, error: Exception) -> None:
        owner = self._streams.get(name) or self._jobs.get(name)
        if owner is None:
            return
        failure = EngineFailed(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
        self._outbox.append((owner.mailbox, failure))
        self._counts["failed"] += 1
        self._forget(name)

    def _prefill(self, step: PrefillStep) -> None:
        for name in step.admitted:
            self._slots.enter(name)
            request = self._streams[name].request
            self._streams[name].prepared = self._runner.prepare(request.input)
            self._sampler.add(name, request.sampling, request.input.before + request.input.after)
        self._runner.cache.reserve(len(self._slots), 0)
        pieces = [Piece(self._slots.row(chunk.id), self._streams[chunk.id].prepared, chunk.start, chunk.count) for chunk in step.chunks]
        logits = self._runner.prefill(pieces)
        self._counts["prefill_tokens"] += sum(piece.count for piece in pieces)
        ready = [index for index, chunk in enumerate(step.chunks) if chunk.last]
        names = [step.chunks[index].id for index in ready]
        for name in names:
            swap = self._slots.start_decoding(name)
            if swap is not None:
                self._runner.apply(swap)
        if names:
            self._choose(names, logits[ready])

    def _decode(self) -> None:
        names = self._slots.decoding
        streams = [self._streams[name] for name in names]
        logits = self._runner.decode([stream.last_token for stream in streams], [stream.position for stream in streams])
        self._counts["decode_steps"] += 1
        self._choose(names, logits)

    def _choose(self, names: Sequence[str], logits: torch.Tensor) -> None:
        """The next token of each of these requests, from their rows of logits."""
        streams = [self._streams[name] for name in names]
        choices = self._sampler.choose(names, logits)
        for name, stream, choice in zip(names, streams, choices, strict=True):
            try:
                delta = stream.accept(choice)
            except Exception as error:
                log.exception("a token of %s could not be used", name)
                self._fail(name, error)
                continue
            self._counts["generated_tokens"] += 1
            self._outbox.append((stream.mailbox, delta))
            if delta.finish is not None:
                self._forget(name)

    def _pairs(self, step: PairStep) -> None:
        jobs = [(self._jobs[name], index) for name, index in step.pairs]
        compute = pair_gradients if step.kind is PairKind.GRADIENTS else score_pairs
        results = compute(self._fm, [job.pairs[index] for job, index in jobs])
        self._counts["pair_batches"] += 1
        self._counts["pairs_done"] += len(results)
        for (job, index), result in zip(jobs, results, strict=True):
            if job.id not in self._jobs:
                continue
            try:
                complete = job.accept(index, result)
            except EngineFailed as error:
                self._fail(job.id, error)
                continue
            if complete is not None:
                self._outbox.append((job.mailbox, complete))
                self._forget(job.id)

    def _flush(self) -> None:
        """Send a step's events to the asyncio side in one go."""
        events, self._outbox = self._outbox, []
        if events and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, events)


def _deliver(events: list[tuple[Mailbox, Event]]) -> None:
    for mailbox, event in events:
        mailbox.put(event)
