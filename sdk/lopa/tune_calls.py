"""What a tuning run asks of the server, patiently: likelihoods and gradients under soft prompts that it composes.

Legend: b examples, m rows, d hidden size.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from lopa.encoded import Encoded, pairs_with
from lopa.encoder import PromptEncoder
from lopa.errors import FactorsError, InvalidRequest, TuningError
from lopa.factors import Factors
from lopa.priors import choose, read_priors
from lopa.protocol.flow import Flow, Signal, work
from lopa.retry import Patience
from lopa.session import WireOptions
from lopa.tune_job import Diverged
from lopa.tuning import TuneConfig
from lopa.values import Float32, Pair, PairGradient, PairScore
from lopa.wire.errors import Reason

if TYPE_CHECKING:
    from lopa.session import Session

log = logging.getLogger(__name__)
Result = TypeVar("Result")
_OUT_OF_RANGE = (Reason.SOFT_PROMPT_NORM, Reason.SOFT_PROMPT_NOT_FINITE)


class TuningCalls:
    """The server's half of one run."""

    def __init__(self, session: Session, encoder: PromptEncoder, config: TuneConfig, stop: Signal, waits: Callable[[str], None]) -> None:
        """waits: told why, whenever a call has to be repeated."""
        self._session, self._encoder, self._waits = session, encoder, waits
        self._wire = WireOptions(
            dtype=config.dtype,
            gradient_dtype=config.gradient_dtype,
            placement=config.placement or "front",
            max_pairs=config.microbatch or None,
        )
        self._low_priority = config.low_priority
        self._patience = Patience(config.patience, random.Random(), stop=stop)

    def gradients(self, batch: Encoded, soft: Float32, meanwhile: Callable[[], Flow[None]]) -> Flow[list[PairGradient]]:
        """Of each example's NLL sum with respect to its soft prompt. soft: (b, m, d). meanwhile: done while the server works.

        Raises:
            Diverged: soft prompts that the server finds out of range.
        """
        pairs, low = pairs_with(batch, soft), self._low_priority
        return (
            yield from self._ask(lambda: self._session.prompt_gradients(pairs, self._wire, low_priority=low, meanwhile=meanwhile), pairs)
        )

    def measure(self, factors: Factors | None, over: Encoded) -> Flow[float]:
        """NLL per target token, None: of the plain model; infinite for factors that can't be used."""
        scores = yield from self._scores(factors, over)
        return sum(score.nll_sum for score in scores) / sum(score.target_tokens for score in scores) if scores else math.inf

    def choose_prior(self, start: Factors, examples: Encoded) -> Flow[tuple[str, Factors | None]]:
        """The bundle's prior that fits these examples, by name, and its factors; an empty name and None if none does."""
        priors = yield from work(lambda: read_priors(self._encoder.bundle))
        if not priors:
            return "", None
        plain, begun = (yield from self._each(None, examples)), (yield from self._each(start, examples))
        measured = {}
        for name, prior in priors.items():
            measured[name] = yield from self._each(prior, examples)
            if math.inf in measured[name]:
                log.warning("the bundle's prior of %s can't be used with this server: its soft prompts are out of range", name)
        chosen = choose(plain, begun, measured)
        return chosen, priors.get(chosen)

    def _each(self, factors: Factors | None, over: Encoded) -> Flow[list[float]]:
        """NLL sums, example by example; infinite for factors that can't be used."""
        scores = yield from self._scores(factors, over)
        return [score.nll_sum for score in scores] or [math.inf] * len(over.examples)

    def _scores(self, factors: Factors | None, over: Encoded) -> Flow[list[PairScore]]:
        """What the server says of these examples; nothing for factors that can't be used."""
        if factors is not None and not factors.finite:
            return []
        try:
            soft = None
            if factors is not None:
                soft = yield from work(partial(self._encoder.compose, over.instance, factors.tensors))
            pairs, low = pairs_with(over, soft), self._low_priority
            return (yield from self._ask(lambda: self._session.score(pairs, self._wire, low_priority=low), pairs))
        except (Diverged, FactorsError):
            return []

    def _ask(self, call: Callable[[], Flow[Result]], pairs: Sequence[Pair]) -> Flow[Result]:
        """Call the server. A soft prompt that it finds too large is the run's own doing: Diverged.

        Raises:
            TuningError: an example that it refuses; the message shows which.
        """
        try:
            return (yield from self._patience.keep_trying(call, lambda error: self._waits(str(error))))
        except InvalidRequest as error:
            if error.reason in _OUT_OF_RANGE:
                raise Diverged(str(error)) from error
            if match := re.match(r"pairs\[(\d+)\]", error.field):
                pair = pairs[int(match.group(1))]
                text = next((str(part) for part in (pair.prompt, pair.prefix) if part is not None and len(part)), "")[:60]
                raise TuningError(f"the server refuses the example {text!r}: {error}; shorten it or leave it out") from error
            raise
