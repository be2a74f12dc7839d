"""Before a model is served: does our batched, cached path give what transformers' own forward pass gives?

"Any Hugging Face model" is a promise that no list of architectures can keep. An architecture that ignores a mask, counts
positions by itself or mixes rows would answer plausibly and wrongly; here it is refused instead.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lopa_server.engine.base import InputSequence, UnsupportedModel
from lopa_server.engine.content import Content, blocks_for
from lopa_server.engine.torch_engine.layout import Piece
from lopa_server.engine.torch_engine.loader import FoundationModel
from lopa_server.engine.torch_engine.runner import ModelRunner

log = logging.getLogger(__name__)

ROWS = 2
DECODED = 3
LONGEST_WINDOW = 512
"""Sliding windows up to this are crossed in the check; longer ones would cost too much at every start."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference between logits, relative to their own spread."""
FREE_PART = 0.4
"""Of the free memory, for the pool, unless it is set."""
CPU_BYTES = 4 << 30
"""And at most so much on a CPU, whose memory others need too."""


def check_model(fm: FoundationModel, block_size: int) -> tuple[FoundationModel, int]:
    """The model as it is to be served, and the bytes of the pool per position: on CUDA without graphs where these spoil it or can't be
    had, and without kernels of ours where they do.

    Raises:
        UnsupportedModel: the logits differ, so this architecture can't be batched by this engine.
    """
    while True:
        try:
            runner = check_runner(fm, block_size)
        except Exception as error:  # Triton and CUDA raise what they like
            simpler = _simpler(fm)
            if simpler is None:
                raise
            log.warning("decoding without %s, which is slower: %s", "CUDA graphs" if fm.graphs else "GPU kernels", error)
            fm = simpler
        else:
            return dataclasses.replace(fm, graphs=runner.graphs is not None), runner.pool.bytes_per_position


def _simpler(fm: FoundationModel) -> FoundationModel | None:
    """On a GPU: with less of what is ours. None: it is plain already, or on a CPU."""
    if fm.graphs:
        return dataclasses.replace(fm, graphs=False)
    if fm.kernels is None or fm.device.type == "cpu":
        return None
    if fm.fusions is not None:
        fm.fusions.off()
    return dataclasses.replace(fm, kernels=None, fusions=None)


def check_runner(fm: FoundationModel, block_size: int) -> ModelRunner:
    """Compare three rows: pieces of prompts beside rows that decode, of different length. The runner that computed them.

    Raises:
        UnsupportedModel: the logits differ, so this architecture can't be batched by this engine.
    """
    kind = fm.model.config.model_type
    inputs = _inputs(fm)
    with fm.as_transformers() as model:
        theirs = [_plain(fm, model, sequence) for sequence in inputs]
    try:
        ours, runner = _paged(fm, inputs, block_size)
    except (KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModel(f"{kind}: it doesn't use transformers' attention interface: {error!r}") from error
    for row, (mine, plain) in enumerate(zip(ours, theirs, strict=True)):
        spread = float(plain.std()) or 1.0
        difference = float((mine - plain).abs().max()) / spread
        if not difference <= TOLERANCE[fm.dtype]:
            raise UnsupportedModel(
                f"{kind}: in a batch, logits differ from transformers' own by {difference:.2g} of their spread (row {row})"
            )
    return runner


def positions_that_fit(fm: FoundationModel, bytes_per_position: int, kv_memory: int | None) -> int:
    """Positions of the pool that so many bytes hold; at least one full context. None: a part of the free memory."""
    if kv_memory is None:
        kv_memory = int(_free_memory(fm.device) * FREE_PART)
        if fm.device.type == "cpu":
            kv_memory = min(kv_memory, CPU_BYTES)
    return max(fm.spec.context_length, kv_memory // max(1, bytes_per_position))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES")


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


def _paged(fm: FoundationModel, inputs: Sequence[InputSequence], block_size: int) -> tuple[list[torch.Tensor], ModelRunner]:
    """Last logits of each sequence through the runner, in pieces: each row starts to decode while others still read."""
    contents = [Content(b"", sequence, block_size) for sequence in inputs]
    size = blocks_for(max(map(len, contents)), block_size)
    tables = [range(1 + row * size, 1 + (row + 1) * size) for row in range(len(contents))]
    runner = ModelRunner(fm, len(contents) * size, block_size)
    runner.capture(len(contents))
    last: dict[int, torch.Tensor] = {}
    done = [0] * len(contents)
    while len(last) < len(contents):
        rows = [row for row, content in enumerate(contents) if done[row] < len(content)]
        counts = [_count(done[row], len(contents[row]), row) for row in rows]
        pieces = [Piece(contents[row], tables[row], done[row], count) for row, count in zip(rows, counts, strict=True)]
        logits = runner.step(pieces, range(len(pieces)))
        for row, count, values in zip(rows, counts, logits, strict=True):
            done[row] += count
            if done[row] == len(contents[row]):
                last[row] = values.clone()  # a captured step overwrites it
    return [last[row] for row in range(len(contents))], runner


def _count(done: int, length: int, row: int) -> int:
    """Two pieces of unequal size, then one position at a time; a shorter row is done with its pieces earlier."""
    first, whole = 3 + 2 * row, length - DECODED
    if done < whole:
        return first if done == 0 else min(whole - done, max(first, whole // 2 + row))
    return 1


@torch.inference_mode()
def _plain(fm: FoundationModel, model: Any, sequence: InputSequence) -> torch.Tensor:
    """Last logits of a sequence alone, by the model's own forward pass without any cache."""
    ids = torch.tensor([*sequence.before, *[0] * sequence.rows, *sequence.after], device=fm.device)
    embeds = fm.embed(ids)
    if sequence.soft is not None:
        start = len(sequence.before)
        embeds[start : start + sequence.rows] = torch.from_numpy(sequence.soft).to(fm.device, fm.dtype)
    return model(inputs_embeds=embeds[None], use_cache=False).logits[0, -1].float()
