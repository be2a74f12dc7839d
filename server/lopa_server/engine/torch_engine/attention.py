"""Attention over the paged pool, plugged into transformers' attention interface: the models' own code stays as it is.

A step is one packed row of positions, (1, t), of many sequences. Sequences of like shape form a group, and a group is one
call of torch's fused attention. Legend: b sequences of a group, q new positions of each (padded), l positions read,
h heads, e head width.

Torch's fused attention on CPUs takes two to three times as long in bfloat16 as plain products with a softmax of ours between
them, so prompts are read that way where there are kernels. Its backward pass for bfloat16 is many times slower, so plain products
are used where a gradient is wanted; and wherever a model caps its scores or has attention sinks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from lopa_server.engine.torch_engine.kv_pool import KvPool
from lopa_server.engine.torch_engine.native.elementwise import Elementwise
from lopa_server.engine.torch_engine.paging import Kernels, KeysValues, PagedRows, Slots
from lopa_server.engine.torch_engine.products import attend, spans

NAME = "lopa_paged"
_kept_inputs = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""Calls a function of which only the inputs are kept for the way back."""
MOST_SCORES = 1 << 27
"""Of plain products, some ten bytes each, that exist at a time: more are computed in parts, and twice where a gradient is wanted."""


@dataclass(frozen=True)
class Group:
    """Positions start..stop of the packed row: b sequences with up to q new positions each."""

    start: int
    stop: int
    size: int
    """b."""
    padded: torch.Tensor | None
    """(b * q,) int64 places within the group for a rectangle, each sequence's first place where it has fewer; None: it is one."""
    real: torch.Tensor | None
    """Places of that rectangle which are real, in packed order; None with padded."""
    shared: torch.Tensor | None
    """Blocks, int64, that stand in front of all sequences alike and are read whole; None: there are none."""
    slots: torch.Tensor | None
    """(b * l,) int64 slots to read behind `shared`, everything before and the new positions; None: nothing stands before these."""
    masks: Mapping[int, torch.Tensor | None]
    """By window (0: full attention): additive (b or 1, 1, q, l), or None where causal order alone is right; with `shared` never None."""


@dataclass(frozen=True)
class DecodingRows:
    """One new position each, from `start` of the packed row on: the kernels read the pool in place, without slots and masks."""

    start: int
    rows: PagedRows
    kernels: Kernels
    make_groups: Callable[[], Sequence[Group]]
    """The same rows for torch, if the kernels don't fit the model."""

    @property
    def stop(self) -> int:
        return self.start + len(self.rows.ends)

    @functools.cached_property
    def groups(self) -> Sequence[Group]:
        """For torch; made when first asked for."""
        return self.make_groups()


@dataclass(frozen=True)
class PackedStep:
    """How one forward pass for streams reads and writes the pool."""

    pool: KvPool
    windows: Sequence[int]
    """Of each layer; 0: full attention."""
    write: Slots
    """Of the t new positions."""
    groups: Sequence[Group | DecodingRows]

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score: Score) -> torch.Tensor:
        """(1, h, t, e) queries, keys and values of the new positions to (1, t, h, e)."""
        query, key, value = query[0], key[0], value[0]
        self.pool.write(layer, self.write, key, value)
        parts = [part for group in self.groups for part in self._parts(group, layer, query, key, value, score)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def _parts(
        self, group: Group | DecodingRows, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score: Score
    ) -> list[torch.Tensor]:
        if isinstance(group, Group):
            return [self._attend_group(group, layer, query, key, value, score)]
        held = self.pool.layer(layer)
        if group.kernels.fit(*held):
            return [group.kernels.decode(held, group.rows, self.windows[layer], query[:, group.start : group.stop], score)]
        return [self._attend_group(one, layer, query, key, value, score) for one in group.groups]

    def _attend_group(
        self, group: Group, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score: Score
    ) -> torch.Tensor:
        if group.slots is None:
            keys, values = _rectangle(key, group), _rectangle(value, group)
        else:
            keys, values = self.pool.read(layer, group.slots, group.size)
        mask, queries = group.masks[self.windows[layer]], _rectangle(query, group)
        if group.shared is None or mask is None:
            out = score(queries, keys, values, mask)
        else:
            out = score.behind(queries, self.pool.read_blocks(layer, group.shared), (keys, values), mask)
        out = out.transpose(1, 2).flatten(0, 1)
        return out if group.real is None else out.index_select(0, group.real)


@dataclass(frozen=True)
class PairsStep:
    """How a micro-batch of pairs, (b, q) padded on the right, attends to itself and to prefixes in the pool."""

    pool: KvPool
    windows: Sequence[int]
    slots: torch.Tensor | None
    """(b * p,) int64 slots of the prefixes, padded on the right; None: there are none."""
    masks: Mapping[int, torch.Tensor | None]
    """By window: additive (b, 1, q, p + q), or None where causal order alone is right."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score: Score) -> torch.Tensor:
        """(b, h, q, e) queries, keys and values of the new positions to (b, q, h, e)."""
        if self.slots is not None:
            before = self.pool.read(layer, self.slots, len(key))
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        return score(query, key, value, self.masks[self.windows[layer]]).transpose(1, 2)


@dataclass(frozen=True)
class Score:
    """What a model does to its scores, beyond softmax."""

    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None
    """(h,) logits that take weight from every row and give nothing."""
    kernels: Elementwise | None = None
    """Ours, where no gradient is wanted."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(b, h, q, e) queries over (b, key-value heads, l, e) keys and values: (b, h, q, e). mask: None for causal order."""
        on_cpu = query.device.type == "cpu"
        if self.softcap is not None or self.sinks is not None or (on_cpu and query.requires_grad and query.dtype == torch.bfloat16):
            return self._products(query, key, value, mask)
        if mask is not None and query.shape[2] == 1 and on_cpu:
            return self._decode(query, key, value, mask)
        if self.kernels is not None and spans(key.shape[2]):
            return attend(query, None, (key, value), mask, self.scaling, self.kernels)
        groups = query.shape[1] // key.shape[1]
        key, value = _repeat(key, groups), _repeat(value, groups)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scaling)

    def behind(self, query: torch.Tensor, shared: KeysValues, own: KeysValues, mask: torch.Tensor) -> torch.Tensor:
        """As `attend`: (b, h, q, e) queries over what all sequences read, and over what each reads alone."""
        if self.softcap is None and self.sinks is None:
            return attend(query, shared, own, mask, self.scaling, self.kernels)
        keys, values = (
            torch.cat([first[None].expand(len(query), -1, -1, -1), then], dim=2) for first, then in zip(shared, own, strict=True)
        )
        return self._products(query, keys, values, functional.pad(mask, (shared[0].shape[1], 0)))

    def _decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """One query a sequence: fused attention is ten times slower here than two products over the pool's own layout."""
        heads = key.shape[1]
        folded = query.transpose(0, 1).unflatten(0, (heads, -1))[:, :, :, 0].transpose(1, 2)
        scores = torch.matmul(folded, key.permute(1, 0, 3, 2)).mul_(self.scaling).add_(mask.transpose(0, 1))
        out = torch.matmul(torch.softmax(scores, dim=-1), value.transpose(0, 1))
        return out.transpose(1, 2).flatten(0, 1)[:, :, None].transpose(0, 1)

    def _products(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = _repeat(key, groups), _repeat(value, groups)
        width = query.shape[2]
        at_once = max(1, MOST_SCORES // (query.shape[:2].numel() * key.shape[2]))
        if width <= at_once:
            return self._weighted(query, key, value, mask)
        parts = []
        for low in range(0, width, at_once):
            stop = min(low + at_once, width)
            some = query[:, :, low:stop]
            inputs = (some, key[:, :, :stop], value[:, :, :stop], None) if mask is None else (some, key, value, mask[:, :, low:stop])
            parts.append(_kept_inputs(self._weighted, *inputs) if torch.is_grad_enabled() else self._weighted(*inputs))
        return torch.cat(parts, dim=2)

    def _weighted(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """As a call, with keys and values repeated for every query head. Without a mask the queries are the last positions."""
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is None:
            before = key.shape[2] - query.shape[2]
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_(before)
            scores = scores.masked_fill(~causal, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        return torch.matmul(weights[..., : key.shape[2]], value)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 (the step knows)
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (b, h, q, e) to (b, q, h, e). The step says who may read what, in `paged_step`.

    Raises:
        KeyError: the model doesn't hand the step through to its attention.
    """
    step: PackedStep | PairsStep = others["paged_step"]
    kernels = None if query.requires_grad or step.pool.kernels is None else step.pool.kernels.prompts
    score = Score(query.shape[-1] ** -0.5 if scaling is None else scaling, others.get("softcap"), others.get("s_aux"), kernels)
    return step.attend(cast(int, module.layer_idx), query, key, value, score), None


def register() -> None:
    """Make the attention known to transformers under NAME; harmless when it is. No mask is registered: models make none then."""
    AttentionInterface.register(NAME, attention)


def _rectangle(packed: torch.Tensor, group: Group) -> torch.Tensor:
    """A group's part of (h, t, e) as (b, h, q, e)."""
    mine = packed[:, group.start : group.stop]
    mine = mine.contiguous() if group.padded is None else mine.index_select(1, group.padded)
    return mine.unflatten(1, (group.size, -1)).transpose(0, 1)


def _repeat(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """(b, h, l, e) to (b, h * groups, l, e): every key-value head for the queries that share it."""
    if groups == 1:
        return tensor
    return tensor[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
