"""Before a model is served: does our batched, cached path give what transformers' own forward pass gives?

"Any Hugging Face model" is a promise that no list of architectures can keep. An architecture that ignores a mask, counts
positions by itself or mixes rows would answer plausibly and wrongly; here it is refused instead.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from lopa_server.engine.base import InputSequence, UnsupportedModel
from lopa_server.engine.torch_engine.loader import FoundationModel
from lopa_server.engine.torch_engine.runner import ModelRunner, Piece, embed_pieces, prepare

ROWS = 2
DECODED = 3
LONGEST_WINDOW = 512
"""Sliding windows up to this are crossed in the check; longer ones would cost too much at every start."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference between logits, relative to their own spread."""


def check_runner(fm: FoundationModel) -> int:
    """Compare three rows: pieces of a prompt, several steps, rows of different length. Bytes of cache per position.

    Raises:
        UnsupportedModel: the logits differ, so this architecture can't be batched by this engine.
    """
    inputs = _inputs(fm)
    ours, bytes_per_position = _cached(fm, inputs)
    theirs = [_plain(fm, sequence) for sequence in inputs]
    for row, (mine, plain) in enumerate(zip(ours, theirs, strict=True)):
        spread = float(plain.std()) or 1.0
        difference = float((mine - plain).abs().max()) / spread
        if not difference <= TOLERANCE[fm.dtype]:
            kind = fm.model.config.model_type
            raise UnsupportedModel(
                f"{kind}: in a batch, logits differ from transformers' own by {difference:.2g} of their spread (row {row})"
            )
    return bytes_per_position


def positions_that_fit(fm: FoundationModel, bytes_per_position: int, part: float) -> int:
    """Cache positions that `part` of the free memory holds; at least one full context."""
    if fm.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(fm.device)
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES")
    return max(fm.spec.context_length, int(free * part) // max(1, bytes_per_position))


def _inputs(fm: FoundationModel) -> list[InputSequence]:
    """Three sequences of different length, two of them with soft rows: real embeddings, so their size is natural."""
    window = getattr(fm.model.config, "sliding_window", None) or 0
    length = min(fm.spec.context_length, (window if window <= LONGEST_WINDOW else 0) + 24)
    generator = np.random.default_rng(0)
    sequences = []
    for row in range(ROWS + 1):
        ids = generator.integers(0, fm.spec.vocab_size, max(DECODED + 4, length - 5 * row)).tolist()
        soft = None
        if row < ROWS:
            soft = fm.embed(torch.tensor(ids[:2], device=fm.device)).float().cpu().numpy()
        sequences.append(InputSequence(tuple(ids[2:4] if row else ()), soft, tuple(ids[2 if row == 0 else 4 :])))
    return sequences


def _cached(fm: FoundationModel, inputs: Sequence[InputSequence]) -> tuple[list[torch.Tensor], int]:
    """Last logits of each sequence through the runner: two prefill steps of unequal pieces, then decode steps."""
    runner = ModelRunner(fm)
    prepared = [runner.prepare(sequence) for sequence in inputs]
    ends = [len(sequence) - DECODED for sequence in inputs]
    first = [min(end - 1, 2 + row) for row, end in enumerate(ends)]
    runner.prefill([Piece(row, source, 0, first[row]) for row, source in enumerate(prepared)])
    runner.prefill([Piece(row, source, first[row], ends[row] - first[row]) for row, source in enumerate(prepared)])
    logits = None
    for step in range(DECODED):
        places = [end + step for end in ends]
        logits = runner.decode([int(source.ids[place]) for source, place in zip(prepared, places, strict=True)], places)
    return list(logits), runner.cache.bytes_per_position


@torch.inference_mode()
def _plain(fm: FoundationModel, sequence: InputSequence) -> torch.Tensor:
    """Last logits of a sequence alone, by the model's own forward pass without any cache."""
    embeds = embed_pieces(fm, [(prepare(fm, sequence), 0, len(sequence))], len(sequence))
    return fm.model(inputs_embeds=embeds, use_cache=False).logits[0, -1].float()
