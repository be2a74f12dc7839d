"""The model runner: forward passes for streams over the paged pool. It knows pieces of sequences, no requests.

Legend: t positions in a step, d hidden size, v vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lopa_server.engine.torch_engine.attention import PackedStep
from lopa_server.engine.torch_engine.kv_pool import KvPool
from lopa_server.engine.torch_engine.layout import Layout, LayoutMaker, Piece
from lopa_server.engine.torch_engine.loader import FoundationModel
from lopa_server.engine.torch_engine.paging import Slots

if TYPE_CHECKING:
    from lopa_server.engine.torch_engine.gpu.graphs import DecodeGraphs

log = logging.getLogger(__name__)


class ModelRunner:
    """Reads prompts and decodes, both in one forward pass."""

    def __init__(self, fm: FoundationModel, blocks: int, block_size: int) -> None:
        self._fm = fm
        self.pool = KvPool(blocks, block_size, fm.kernels)
        self.fallbacks = 0
        """Steps whose decoding rows torch computed, for want of kernels that fit."""
        self.graphs: DecodeGraphs | None = None
        self.layouts = LayoutMaker(self.pool, fm.windows, fm.device, fm.dtype)

    def capture(self, rows: int) -> None:
        """Capture decode steps of up to so many rows, where the device and the model can; allocates the pool."""
        if not self._fm.graphs:
            return
        from lopa_server.engine.torch_engine.gpu.graphs import Capture, DecodeGraphs

        began = time.perf_counter()
        try:
            self.graphs = DecodeGraphs(self._fm, self.pool, rows, Capture(self._fm.device))
        except Exception as error:  # CUDA and the model's code raise what they like
            log.warning("decoding without CUDA graphs, which is slower: %s", error)
            return
        log.info("captured %d decode steps in %.1f s", len(self.graphs), time.perf_counter() - began)

    @torch.inference_mode()
    def step(self, pieces: Sequence[Piece], wanted: Sequence[int]) -> torch.Tensor:
        """Compute all pieces. The logits after the last positions of the `wanted` ones, in that order: (n, v) float32."""
        if self.graphs is not None and self.graphs.hold(pieces):
            logits = self.graphs.step(pieces)
            return logits if list(wanted) == list(range(len(pieces))) else logits[list(wanted)]
        fm, layout = self._fm, self.layouts.pack(pieces)
        place = {piece: packed for packed, piece in enumerate(layout.order)}
        ends = [int(layout.first[place[index]]) + pieces[index].count - 1 for index in wanted]
        step = PackedStep(self.pool, fm.windows, Slots(layout.write, self.pool.slots, fm.device), layout.groups)
        logits = fm.logits_at(
            torch.tensor(ends, dtype=torch.int64, device=fm.device),
            inputs_embeds=self._embed(pieces, layout)[None],
            position_ids=torch.from_numpy(layout.positions).to(fm.device)[None],
            use_cache=False,
            paged_step=step,
        )
        decodes = any(piece.count == 1 for piece in pieces)
        self.fallbacks += decodes and not self.pool.native
        return logits

    def _embed(self, pieces: Sequence[Piece], layout: Layout) -> torch.Tensor:
        """(t, d) input embeddings, soft rows where they stand."""
        fm = self._fm
        embeds = fm.embed(torch.from_numpy(layout.ids).to(fm.device))
        for first, index in zip(layout.first, layout.order, strict=True):
            piece = pieces[index]
            content = piece.content
            low, high = content.soft_within(piece.start, piece.end)
            if low < high and content.soft is not None:
                rows = torch.from_numpy(content.soft[low - content.soft_start : high - content.soft_start])
                embeds[first + low - piece.start : first + high - piece.start] = rows.to(fm.device, fm.dtype)
        return embeds
