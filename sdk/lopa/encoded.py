"""Examples with what the prompt encoder makes of them, encoded once and used in every step.

Legend: b batch, n examples, m rows, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lopa.encoder import PromptEncoder, Tensors
from lopa.examples import Example, text_for_encoder
from lopa.values import Float32, Pair


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
    texts = [text_for_encoder(example.prompt, example.encoder_text, example.prefix) for example in examples]
    return Encoded(examples, encoder.encode(texts))


def pairs_with(encoded: Encoded, soft_prompts: Float32 | None) -> list[Pair]:
    """Pairs for the wire; soft_prompts: (b, m, d), None for the plain model."""
    rows = [None] * len(encoded.examples) if soft_prompts is None else soft_prompts
    return [
        Pair(example.prompt, example.target, soft, example.append_end, example.prefix)
        for example, soft in zip(encoded.examples, rows, strict=True)
    ]
