"""The engine thread as a `Backend`: takes requests in on a loop, and has their grammars ready before the thread sees them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Sequence

import torch

from lopa_server.engine.base import EngineError, EngineFailed, EngineStats, EngineStopped, GenerateRequest, PairRequest, UnsupportedSchema
from lopa_server.engine.content import blocks_for
from lopa_server.engine.mailbox import Receiver
from lopa_server.engine.pair_queue import PairKind
from lopa_server.engine.torch_engine.config import PAIR_POSITIONS, STEP_POSITIONS, TorchEngineConfig
from lopa_server.engine.torch_engine.constraints import Constraint, Grammars
from lopa_server.engine.torch_engine.inbox import Abort, Stop
from lopa_server.engine.torch_engine.live import LiveJob, LiveStream
from lopa_server.engine.torch_engine.loader import FoundationModel, load_foundation_model, text_decoder
from lopa_server.engine.torch_engine.selfcheck import check_model, positions_that_fit
from lopa_server.engine.torch_engine.worker import Deliver, Worker

log = logging.getLogger(__name__)


class Intake:
    """One model, its engine thread, and the way in. Load it anywhere; use it on one loop."""

    def __init__(self, fm: FoundationModel, config: TorchEngineConfig) -> None:
        self.fm = fm
        self._grammars = Grammars.of(fm.tokenizer, fm.spec)
        self.spec = dataclasses.replace(fm.spec, json_schemas=self._grammars is not None)
        self.worker = Worker(fm, config.limits, lambda: _set_threads(config.threads))
        self._decode_text = text_decoder(fm.tokenizer)
        self._compiling: dict[str, asyncio.Task[None]] = {}

    @classmethod
    def load(cls, config: TorchEngineConfig) -> Intake:
        """Load the model and check that it can be served exactly. Blocks; seconds to minutes.

        Raises:
            ConfigError, FileNotFoundError, UnsupportedModel: see `load_foundation_model` and `check_model`.
        """
        _set_threads(config.threads)
        return cls.of(
            load_foundation_model(config.fm, dtype=config.dtype, device=config.device, native=config.native, graphs=config.graphs), config
        )

    @classmethod
    def of(cls, fm: FoundationModel, config: TorchEngineConfig) -> Intake:
        """The same for a model that is loaded already."""
        size = config.limits.block_size
        fm, bytes_per_position = check_model(fm, size)
        fitting = positions_that_fit(fm, bytes_per_position, config.kv_memory)
        limits = dataclasses.replace(
            config.limits,
            kv_positions=max(blocks_for(fm.spec.context_length, size) * size, min(config.limits.kv_positions, fitting)),
            step_positions=config.step_positions or STEP_POSITIONS[fm.device.type],
            pair_positions=config.step_positions or PAIR_POSITIONS[fm.device.type],
        )
        return cls(fm, dataclasses.replace(config, limits=limits))

    def start(self, deliver: Deliver) -> None:
        """Start the engine thread; deliver: as in `Worker.start`."""
        self.worker.start(deliver)

    def stream(self, request: GenerateRequest, receiver: Receiver) -> None:
        if request.sampling.json_schema is None:
            self._send(request, receiver, None)
            return
        task = asyncio.create_task(self._compile(request, request.sampling.json_schema, receiver))
        self._compiling[request.id] = task
        task.add_done_callback(lambda _: self._compiling.pop(request.id, None))

    def pairs(self, name: str, kind: PairKind, pairs: Sequence[PairRequest], receiver: Receiver) -> None:
        self.worker.send(LiveJob(name, kind, pairs, receiver))

    def abort(self, name: str) -> None:
        if task := self._compiling.get(name):
            task.cancel()
        with contextlib.suppress(EngineStopped):
            self.worker.send(Abort(name))

    def nudge(self) -> None:
        """A name that nobody has."""
        self.abort("")

    def stats(self) -> EngineStats:
        return self.worker.stats()

    def ask_to_stop(self) -> None:
        """The thread ends after its present step, if that ever ends."""
        with contextlib.suppress(EngineStopped):
            self.worker.send(Stop())

    def close(self) -> None:
        """What serves the thread beside it; once it has ended."""
        if self._grammars is not None:
            self._grammars.close()

    async def _compile(self, request: GenerateRequest, schema: str, receiver: Receiver) -> None:
        try:
            if self._grammars is None:
                raise UnsupportedSchema("this model's tokenizer can't be held to a schema")
            self._send(request, receiver, await self._grammars.constraint(schema))
        except EngineError as error:
            receiver.put(error)
        except asyncio.CancelledError:  # by an abort, of which nobody waits to hear, or since the engine stops
            receiver.put(EngineStopped("the engine was stopped"))
            raise
        except Exception as error:
            log.exception("a schema could not be compiled")
            receiver.put(EngineFailed(f"{type(error).__name__}: {error}"))

    def _send(self, request: GenerateRequest, receiver: Receiver, constraint: Constraint | None) -> None:
        self.worker.send(LiveStream(request, receiver, self._decode_text, self.spec.end_ids, constraint))


def _set_threads(threads: int | None) -> None:
    """Torch keeps the number of CPU threads by calling thread, so each one that computes has to set it."""
    if threads is not None:
        torch.set_num_threads(threads)
