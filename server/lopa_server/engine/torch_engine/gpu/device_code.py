"""What runs on the GPU. Every bound is checked by the callers in `kernels` and `elementwise`: this code trusts what it gets.

Sums and exponentials are float32 whatever the arrays are; what stands between products is rounded where models round it.
Legend: n rows, d their width; h heads, k key-value heads, g query heads that share one, s slots, e head width.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rounded(numbers, kind: tl.constexpr):
    return numbers.to(kind).to(tl.float32)


@triton.jit
def write_slots(
    pool_keys,
    pool_values,
    keys,
    values,
    slots,
    key_head_stride,
    key_row_stride,
    value_head_stride,
    value_row_stride,
    pool_block_stride,
    pool_head_stride,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """(k, t, e) keys and values to their slots. A slot below zero: this one goes nowhere. Grid (t, k)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < WIDTH
    if slot >= 0:
        block, inside_block = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        place = block * pool_block_stride + head.to(tl.int64) * pool_head_stride + inside_block * WIDTH + lane
        tl.store(pool_keys + place, tl.load(keys + head * key_head_stride + row * key_row_stride + lane, mask=inside), mask=inside)
        tl.store(pool_values + place, tl.load(values + head * value_head_stride + row * value_row_stride + lane, mask=inside), mask=inside)


@triton.jit
def decode(
    out,
    partial,
    query,
    pool_keys,
    pool_values,
    tables,
    ends,
    sinks,
    query_head_stride,
    query_row_stride,
    pool_block_stride,
    pool_head_stride,
    table_stride,
    scaling,
    softcap,
    window,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SHARING: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    LANES: tl.constexpr,
    PLACES: tl.constexpr,
    PARTS: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """One query a row over its blocks, each of PARTS programs over a part of the positions, as flash-decoding has it.

    Grid (n, k * tiles of the heads that share one, PARTS). With one part `out`, (n, h, e), is written; otherwise `partial`,
    (n, h, PARTS, e + 2) float32: the weighted values before division, the largest score and the weights' sum, for `join`.
    """
    tiles: tl.constexpr = (SHARING + HEADS_TILE - 1) // HEADS_TILE
    row, kv_head, part = tl.program_id(0), tl.program_id(1) // tiles, tl.program_id(2)
    end = tl.load(ends + row).to(tl.int32)
    begin = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    span = tl.cdiv(tl.cdiv(end - begin, PARTS), PLACES) * PLACES
    low = begin + part * span
    high = tl.minimum(low + span, end)
    tile, lane = (tl.program_id(1) % tiles) * HEADS_TILE + tl.arange(0, HEADS_TILE), tl.arange(0, LANES)
    head = kv_head * SHARING + tile
    real = (tile < SHARING)[:, None] & (lane < WIDTH)[None, :]
    asked = tl.load(query + head[:, None] * query_head_stride + row * query_row_stride + lane[None, :], mask=real, other=0.0)
    held = kv_head.to(tl.int64) * pool_head_stride
    most = tl.full([HEADS_TILE], float("-inf"), tl.float32)
    total = tl.zeros([HEADS_TILE], tl.float32)
    mixed = tl.zeros([HEADS_TILE, LANES], tl.float32)
    for start in range(low, high, PLACES):
        place = start + tl.arange(0, PLACES)
        there = place < high
        block = tl.load(tables + row * table_stride + place // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        where = held + (block * pool_block_stride + place % BLOCK_SIZE * WIDTH)[:, None] + lane[None, :]
        inside = there[:, None] & (lane < WIDTH)[None, :]
        keys = tl.load(pool_keys + where, mask=inside, other=0.0)
        scores = tl.dot(asked, tl.trans(keys), input_precision="ieee") * scaling
        if CAPPED:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrunk = tl.exp(most - higher)
        total = total * shrunk + tl.sum(weights, 1)
        values = tl.load(pool_values + where, mask=inside, other=0.0)
        mixed = mixed * shrunk[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        most = higher
    if PARTS == 1:
        if SINKS:
            sink = tl.load(sinks + head, mask=tile < SHARING, other=0.0)
            higher = tl.maximum(most, sink)
            shrunk = tl.exp(most - higher)
            total = total * shrunk + tl.exp(sink - higher)
            mixed = mixed * shrunk[:, None]
        found = mixed / tl.where(total > 0, total, 1.0)[:, None]
        place = (row * HEADS + head).to(tl.int64)[:, None] * WIDTH + lane[None, :]
        tl.store(out + place, found.to(out.dtype.element_ty), mask=real)
    else:
        place = ((row * HEADS + head) * PARTS + part).to(tl.int64) * (WIDTH + 2)
        tl.store(partial + place[:, None] + lane[None, :], mixed, mask=real)
        tl.store(partial + place + WIDTH, most, mask=tile < SHARING)
        tl.store(partial + place + WIDTH + 1, total, mask=tile < SHARING)


@triton.jit
def join(out, partial, sinks, WIDTH: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr, SINKS: tl.constexpr):
    """The parts of `decode` to `out`, (n, h, e). Grid (n, h)."""
    row, head = tl.program_id(0), tl.program_id(1)
    part, lane = tl.arange(0, PARTS), tl.arange(0, LANES)
    whole = (row * tl.num_programs(1) + head).to(tl.int64)
    place = (whole * PARTS + part) * (WIDTH + 2)
    most = tl.load(partial + place + WIDTH)
    highest = tl.max(most, 0)
    if SINKS:
        sink = tl.load(sinks + head)
        highest = tl.maximum(highest, sink)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    share = tl.exp(most - highest)
    total = tl.sum(share * tl.load(partial + place + WIDTH + 1), 0)
    if SINKS:
        total += tl.exp(sink - highest)
    mixed = tl.load(partial + place[:, None] + lane[None, :], mask=(lane < WIDTH)[None, :], other=0.0)
    found = tl.sum(share[:, None] * mixed, 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + whole * WIDTH + lane, found.to(out.dtype.element_ty), mask=lane < WIDTH)


@triton.jit
def rms_norm(out, rows, weight, epsilon, offset, WIDTH: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr):
    """Grid (n,). EARLY: rounded before the weight, as Llama's kind; Gemma's is rounded at the end."""
    lane = tl.arange(0, LANES)
    inside = lane < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + lane
    values = tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 0) / WIDTH + epsilon)
    if EARLY:
        values = _rounded(values, out.dtype.element_ty)
    by = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(out + place, (values * by).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(out, flowing, rows, weight, epsilon, offset, WIDTH: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr):
    """Grid (n,)."""
    lane = tl.arange(0, LANES)
    inside = lane < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + lane
    values = tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32) + offset
    weighted = tl.load(flowing + place, mask=inside, other=0.0).to(tl.float32) * by
    if EARLY:
        weighted = _rounded(weighted, out.dtype.element_ty)
    scale = tl.rsqrt(tl.sum(values * values, 0) / WIDTH + epsilon)
    along = tl.sum(weighted * values, 0) * scale * scale / WIDTH
    tl.store(out + place, (scale * (weighted - values * along)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul(out, gate, up, gate_stride, up_stride, width, LANES: tl.constexpr):
    """Grid (n, parts of d)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = lane < width
    kind = out.dtype.element_ty
    opened = tl.load(gate + row * gate_stride + lane, mask=inside, other=0.0).to(tl.float32)
    passed = tl.load(up + row * up_stride + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + lane, (_rounded(opened * tl.sigmoid(opened), kind) * passed).to(kind), mask=inside)


@triton.jit(do_not_specialize=["count"])
def silu_mul_backward(of_gate, of_up, flowing, gate, up, count, LANES: tl.constexpr):
    """All (n * d) numbers one after the other. Grid (parts of them,)."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = lane < count
    kind = of_gate.dtype.element_ty
    coming = tl.load(flowing + lane, mask=inside, other=0.0).to(tl.float32)
    opened = tl.load(gate + lane, mask=inside, other=0.0).to(tl.float32)
    passed = tl.load(up + lane, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(opened)
    slope = share * (1.0 + opened * (1.0 - share))
    tl.store(of_gate + lane, (_rounded(coming * passed, kind) * slope).to(kind), mask=inside)
    tl.store(of_up + lane, (coming * _rounded(opened * share, kind)).to(kind), mask=inside)


@triton.jit(do_not_specialize=["places"])
def rotate(
    out,
    rows,
    cosine,
    sine,
    batch_stride,
    head_stride,
    place_stride,
    turn_stride,
    heads,
    places,
    HALF: tl.constexpr,
    LANES: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    BACK: tl.constexpr,
):
    """(b, h, t, e) rows to `out`, which lies as (b, t, h, e). The first half of a row goes with the second. Grid (b * t, parts of h).

    Products are rounded before they are added, as models round them: to the last bit.
    """
    batch, place = tl.program_id(0) // places, tl.program_id(0) % places
    head = (tl.program_id(1) * HEADS_TILE + tl.arange(0, HEADS_TILE))[:, None]
    lane = tl.arange(0, LANES)[None, :]
    inside, turned = (head < heads) & (lane < HALF), lane < HALF
    read = rows + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride + place.to(tl.int64) * place_stride + lane
    low = tl.load(read, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(read + HALF, mask=inside, other=0.0).to(tl.float32)
    turn = batch.to(tl.int64) * turn_stride + place.to(tl.int64) * 2 * HALF + lane
    low_cosine = tl.load(cosine + turn, mask=turned, other=0.0).to(tl.float32)
    high_cosine = tl.load(cosine + turn + HALF, mask=turned, other=0.0).to(tl.float32)
    low_sine = tl.load(sine + turn, mask=turned, other=0.0).to(tl.float32)
    high_sine = tl.load(sine + turn + HALF, mask=turned, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    along_low, along_high = _rounded(low * low_cosine, kind), _rounded(high * high_cosine, kind)
    if BACK:
        first, second = along_low + _rounded(high * high_sine, kind), along_high - _rounded(low * low_sine, kind)
    else:
        first, second = along_low - _rounded(high * low_sine, kind), along_high + _rounded(low * high_sine, kind)
    written = out + (tl.program_id(0).to(tl.int64) * heads + head) * 2 * HALF + lane
    tl.store(written, first.to(kind), mask=inside)
    tl.store(written + HALF, second.to(kind), mask=inside)
