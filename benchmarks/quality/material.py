"""What a method gets of one user and task: token pairs, encoder features, and which of them to learn from.

Legend: n items, h encoder width, m soft-prompt rows, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from lopa.demo.users import Item, TaskData, mostly_seen
from lopa.encoder import PromptEncoder
from lopa.examples import permutation
from lopa.values import Float32
from lopa_exporters.frozen import FrozenModel, TokenPair

MAX_VALIDATION = 24
VALIDATION_SHARE = 0.2
"""Of the items given, at most `MAX_VALIDATION` and at least one: the device's default share."""


@dataclass(frozen=True)
class Material:
    """pairs and features (name -> (n, ...)) of all items, tuning items first; the rest are indices into them."""

    data: TaskData
    items: tuple[Item, ...]
    pairs: tuple[TokenPair, ...]
    features: Mapping[str, Float32]
    training: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]
    """Filing: each label's tokens, the end token included."""
    unrepeated: tuple[int, ...] = ()
    """Filing: the test items but those that mostly repeat lines of the given tuning items."""
    full: tuple[int, ...] = ()
    """Completion: the test items again, behind as much of their files as the model's context holds."""
    near: tuple[int, ...] = ()
    """The same, with the soft prompt as far from the target as in a short prompt: what stands further away is a prefix."""

    def of(self, rows: Sequence[int]) -> list[TokenPair]:
        """Pairs of some items."""
        return [self.pairs[row] for row in rows]


def prepare(data: TaskData, fm: FrozenModel, encoder: PromptEncoder, size: int | None, seed: int, longer: Sequence[Item] = ()) -> Material:
    """Tokenize, encode and split. size: tuning items that the user has; None is all of them. longer: items for the full context."""
    count = len(data.tuning) if size is None else min(size, len(data.tuning))
    items = (*data.tuning[:count], *data.test, *longer)
    tests = count + len(data.test)
    order = permutation(count, "quality", seed)
    held = min(MAX_VALIDATION, max(1, round(VALIDATION_SHARE * count)))
    targets = fm.tokenize_targets([item.target for item in items], [item.append_end for item in items])
    prompts = fm.tokenize_targets([item.prompt for item in items], [False] * len(items))
    room = fm.context - encoder.bundle.manifest.rows
    prompts[tests:] = [_shortened(prompt, room - len(target)) for prompt, target in zip(prompts[tests:], targets[tests:], strict=True)]
    prefixes = fm.tokenize_prompts([item.prefix for item in items])
    labels = fm.tokenize_targets(data.labels, [True] * len(data.labels)) if data.labels else []
    pairs = tuple(map(TokenPair, prompts, targets, prefixes))
    near = tuple(_split(pair, len(prompt)) for pair, prompt in zip(pairs[tests:], prompts[count:tests], strict=bool(longer)))
    features = {name: np.asarray(value) for name, value in encoder.encode([item.text for item in items]).items()}
    seen = {line.strip() for item in items[:count] for line in _code(item).splitlines()}
    return Material(
        data,
        (*items, *longer),
        (*pairs, *near),
        {name: np.concatenate((values, values[tests:])) for name, values in features.items()},
        training=tuple(sorted(order[held:])),
        validation=tuple(sorted(order[:held])),
        test=tuple(range(count, tests)),
        labels=tuple(map(tuple, labels)),
        unrepeated=tuple(row for row in range(count, tests) if data.labels and not mostly_seen(_code(items[row]), seen)),
        full=tuple(range(tests, len(pairs))),
        near=tuple(range(len(pairs), len(pairs) + len(near))),
    )


def _code(item: Item) -> str:
    """What the user wrote of what is read."""
    return item.text.removeprefix("<|code|>").removesuffix("<|file|>")


def _shortened(prompt: Sequence[int], most: int) -> list[int]:
    """The first token and the last ones."""
    return [*prompt] if len(prompt) <= most else [prompt[0], *prompt[1 - most :]]


def _split(pair: TokenPair, own: int) -> TokenPair:
    """The same text with its last `own` tokens as the prompt, what stands before them as its prefix."""
    own = min(own, len(pair.prompt) - 1)
    return TokenPair(pair.prompt[-own:], pair.target, [*pair.prefix, *pair.prompt[:-own]])
