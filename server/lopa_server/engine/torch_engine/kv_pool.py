"""The key-value pool: one slot a position, all layers alike, written and read by slot number.

Legend: s slots, n blocks, c positions of a block, t positions of a step, h key-value heads, e head width.

A block of all heads lies in one piece, so that a sequence whose blocks lie far apart is still read from few pages of memory. What torch
reads for a group of sequences is copied so that heads stand outermost: a batch of plain matrices, ready for products.

Slots of block 0 stay zero for ever. Whatever a step reads beyond a sequence's own positions is read from there: a value
that isn't finite times a weight of zero is still not finite, so what earlier requests left behind must never be read.
"""

from __future__ import annotations

import torch

from lopa_server.engine.torch_engine.paging import Kernels, KeysValues, Slots


class KvPool:
    """Keys and values of every layer, (n, h, c, e) each; allocated when a layer is first written, for h and e show then."""

    def __init__(self, blocks: int, block_size: int, kernels: Kernels | None = None) -> None:
        """blocks: as the block manager counts them, block 0 not included. kernels: None where torch does everything."""
        self.block_size = block_size
        self.blocks = blocks + 1
        """Block 0 included."""
        self.slots = self.blocks * block_size
        self.kernels = kernels
        self._layers: dict[int, KeysValues] = {}
        self._read: tuple[torch.Tensor, int, torch.Tensor] | None = None
        """The last slots that were read, of so many heads, and where their rows lie: the same for all layers of a step."""

    @property
    def bytes_per_position(self) -> int:
        """Bytes that one position takes over all layers; 0 before the first step."""
        return sum(tensor.nbytes for layer in self._layers.values() for tensor in layer) // self.slots

    @property
    def native(self) -> bool:
        """Whether our kernels read and write all layers that have been written."""
        return self.kernels is not None and all(self.kernels.fit(*held) for held in self._layers.values())

    def write(self, layer: int, slots: Slots, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put (h, t, e) keys and values into t slots."""
        held = self.hold(layer, keys, values)
        if self.kernels is not None and self.kernels.fit(*held):
            self.kernels.write(held, slots, keys, values)
            return
        rows = self._rows(slots.tensor, keys.shape[0])
        for whole, some in zip(held, (keys, values), strict=True):
            whole.view(-1, whole.shape[-1]).index_copy_(0, rows, some.reshape(-1, some.shape[-1]))

    def hold(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        """A layer's keys and values in place, allocated for such (h, t, e) ones if it hasn't been written."""
        held = self._layers.get(layer)
        if held is None:
            held = self._layers[layer] = (self._zeros(keys), self._zeros(values))
        return held

    def layer(self, layer: int) -> KeysValues:
        """Keys and values of a layer that has been written, in place."""
        return self._layers[layer]

    def read(self, layer: int, slots: torch.Tensor, rows: int) -> KeysValues:
        """Copies of the (rows * l,) slots' keys and values: (rows, h, l, e) each, views of (h, rows, l, e)."""
        places = self._rows(slots, self._layers[layer][0].shape[1])
        keys, values = (
            held.view(-1, held.shape[-1]).index_select(0, places).view(held.shape[1], rows, -1, held.shape[-1]).transpose(0, 1)
            for held in self._layers[layer]
        )
        return keys, values

    def read_blocks(self, layer: int, blocks: torch.Tensor) -> KeysValues:
        """Copies of all that (n,) blocks hold: (h, n * c, e) keys and values. For full blocks only."""
        heads, width = self._layers[layer][0].shape[1], self._layers[layer][0].shape[-1]
        places = (torch.arange(heads, device=blocks.device)[:, None] + blocks * heads).flatten()
        keys, values = (held.view(self.blocks * heads, -1).index_select(0, places).view(heads, -1, width) for held in self._layers[layer])
        return keys, values

    def _rows(self, slots: torch.Tensor, heads: int) -> torch.Tensor:
        """(h * t,) where the rows of (t,) slots lie, of each head in turn."""
        if self._read is None or self._read[0] is not slots or self._read[1] != heads:
            size = self.block_size
            first = slots + slots // size * (heads - 1) * size
            rows = (torch.arange(heads, device=slots.device)[:, None] * size + first).flatten()
            self._read = slots, heads, rows
        return self._read[2]

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.zeros(self.blocks, like.shape[0], self.block_size, like.shape[2], dtype=like.dtype, device=like.device)
