"""What a tuning run is asked to do, and the two errors that never leave it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lopa.control import TuneControl
from lopa.errors import RemoteError
from lopa.examples import Example
from lopa.tuning import TuneConfig, TuneProgress


class Diverged(Exception):
    """Never leaves a run: the soft prompt or the factors left the range of usable numbers."""


class Told(Exception):
    """Never leaves a run: an error of the app's own callback, on its way past those who handle the server's errors."""

    def __init__(self, error: RemoteError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class TuneJob:
    """What to learn, and who watches."""

    config: TuneConfig
    training: Sequence[Example]
    validation: Sequence[Example]
    notify: Callable[[TuneProgress], None] = field(default=lambda _: None)
    control: TuneControl = field(default_factory=TuneControl)
