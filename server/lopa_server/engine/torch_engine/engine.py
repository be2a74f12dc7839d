"""TorchEngine: the `Engine` protocol over an engine thread of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lopa_server.engine.base import EngineStats
from lopa_server.engine.front import EngineFront
from lopa_server.engine.mailbox import Event, Receiver
from lopa_server.engine.torch_engine.config import TorchEngineConfig
from lopa_server.engine.torch_engine.intake import Intake


class TorchEngine(EngineFront):
    """Serves one Hugging Face model. Load it, start it on a loop, and use it from that loop only."""

    def __init__(self, intake: Intake, config: TorchEngineConfig) -> None:
        super().__init__(intake.spec, intake, config)
        self.intake = intake

    @classmethod
    def load(cls, config: TorchEngineConfig) -> TorchEngine:
        """As `Intake.load`."""
        return cls(Intake.load(config), config)

    def start(self) -> None:
        """Start the engine thread; its events arrive on the running loop."""
        loop = asyncio.get_running_loop()

        def deliver(events: Sequence[tuple[Receiver, Event]], _: EngineStats) -> None:
            if events and not loop.is_closed():
                loop.call_soon_threadsafe(_put, events)

        self.intake.start(deliver)

    async def stop(self) -> None:
        """End the thread; whoever still waits for an answer gets EngineStopped."""
        if self._stopped:
            return
        self.ask_to_stop()
        await self.wait_ended()
        self.intake.close()

    def ask_to_stop(self) -> None:
        """The thread ends after its present step, if that ever ends."""
        self._stopped = True
        self.intake.ask_to_stop()

    def kill(self) -> bool:
        """Whether it could be ended at once: nothing can end a thread."""
        return False

    async def wait_ended(self) -> None:
        """Returns when the engine thread has ended, by `stop` or by dying."""
        await asyncio.to_thread(self.intake.worker.join)


def _put(events: Sequence[tuple[Receiver, Event]]) -> None:
    for receiver, event in events:
        receiver.put(event)
