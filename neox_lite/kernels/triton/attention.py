"""Rotary, append and causal attention over pages of keys and values, where the pages lie.

A head is cut into pieces, powers of two: 96 is 3 times 32 and 80 is 5 times 16, and nothing is padded to 128. A sequence's only
new token is split over its context, one page a program, and the parts are combined by their maxima and sums (Flash-Decoding,
https://pytorch.org/blog/flash-decoding/); several tokens go block by block through tl.dot (Dao 2023, arXiv 2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import units
from .packing import dot, place

PAGE = tl.constexpr(units.PAGE)
LEAST = tl.constexpr(-1e30)  # below every score, and finite, so that its difference to itself is a number
# Columns of the tables that describe a batch, int32; see operations.BatchTable.
START, FIRST, COUNT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SEQUENCE = tl.constexpr(3)
POSITION, PAGE_OF, SLOT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
TOKEN = tl.constexpr(3)


@triton.jit
def _load(x_ptr, piece: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr):
    """A piece of a vector (DIM,) as float32."""
    d = piece * PIECE + tl.arange(0, PIECE)
    return tl.load(x_ptr + d, mask=d < DIM, other=0).to(tl.float32)


@triton.jit
def _rotated(
    x_ptr, piece: tl.constexpr, table_ptr, position, positions, DIM: tl.constexpr, HALF: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """A piece of x (DIM,), the first 2 * HALF elements of which are rotated, half against half; float32."""
    x = _load(x_ptr, piece, DIM, PIECE)
    if piece * PIECE < 2 * HALF:
        d = piece * PIECE + tl.arange(0, PIECE)
        turned = d < 2 * HALF
        pair = tl.where(d < HALF, d, d - HALF)
        c = tl.load(table_ptr + position * HALF + pair, mask=turned, other=1)
        s = tl.load(table_ptr + (positions + position) * HALF + pair, mask=turned, other=0)
        other = tl.load(x_ptr + tl.where(d < HALF, d + HALF, d - HALF), mask=turned, other=0).to(tl.float32)
        x = tl.where(turned, x * c + tl.where(d < HALF, -other, other) * s, x)
    return x


@triton.jit
def _append(
    pieces, pool_ptr, scale_ptr, vector, DIM: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, INT8: tl.constexpr
):  # fmt: skip
    """Store a token's key or value of one head, int8 as cache.quantize has it; -> its pieces as they will be read back."""
    if INT8:
        peak, odd = 0.0, 0
        for i in tl.static_range(PIECES):
            peak = tl.maximum(peak, tl.max(tl.abs(pieces[i]), axis=0))
            odd += tl.sum((pieces[i] != pieces[i]).to(tl.int32), axis=0)
        scale = tl.where(odd > 0, float("nan"), tl.minimum(tl.div_rn(peak, 127.0), 65504.0)).to(tl.float16)
        tl.store(scale_ptr + vector, scale)
        step = scale.to(tl.float32)
    kept = ()
    for i in tl.static_range(PIECES):
        d = i * PIECE + tl.arange(0, PIECE)
        x = pieces[i]
        if INT8:
            x = tl.where(step > 0, tl.div_rn(x, tl.where(step > 0, step, 1.0)), 0.0)
            x = tl.minimum(tl.maximum(x, -127.0), 127.0)
            x = (x + 12582912.0) - 12582912.0  # to the nearest even: 1.5 * 2**23 leaves no bit for a fraction
        stored = x.to(pool_ptr.dtype.element_ty)
        tl.store(pool_ptr + vector * DIM + d, stored, mask=d < DIM)
        if INT8:
            kept = kept + (stored.to(tl.float32) * step,)
        else:
            kept = kept + (stored.to(tl.float32),)
    return kept


@triton.jit(do_not_specialize=["most_pages"])
def attend_page(
    qkv_ptr, rotary_ptr, positions, pool_ptr, scale_ptr, sequences_ptr, pages_ptr, most_pages, tokens_ptr, scaling,
    part_ptr, stat_ptr, y_ptr,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    BLOCK: tl.constexpr, INT8: tl.constexpr, ALONE: tl.constexpr,
    W: tl.constexpr, PLANES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One head of a sequence's only new token against one page of its context.

    qkv (tokens, heads, 3, DIM); the program whose page the token lands in appends it. -> part (tokens, heads, pages, DIM) and
    stat (tokens, heads, pages, 2), maximum and sum; ALONE: the only page, so that y (tokens, heads * DIM) is done. Every lane
    keeps maximum and sums of the tokens that it sees, so that threads meet only at the end.
    """
    sequence, head, nth, splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    row = sequences_ptr + sequence * SEQUENCE
    start, token, count = tl.load(row + START), tl.load(row + FIRST).to(tl.int64), tl.load(row + COUNT)
    if count == 0:  # nothing of this sequence is in the batch
        return
    out = (token * HEADS + head) * splits + nth
    old = tl.minimum(start - nth * PAGE, PAGE)  # tokens of this page that were there before
    if old < 0:
        tl.store(stat_ptr + out * 2, LEAST)
        tl.store(stat_ptr + out * 2 + 1, 0.0)
        return
    info = tokens_ptr + token * TOKEN
    position, slot = tl.load(info + POSITION), tl.load(info + SLOT)
    q_ptr = qkv_ptr + (token * HEADS + head) * 3 * DIM
    page = tl.load(pages_ptr + sequence * most_pages + nth).to(tl.int64)
    keys, values = (page * 2 * HEADS + head) * PAGE, ((page * 2 + 1) * HEADS + head) * PAGE
    q = ()
    for i in tl.static_range(PIECES):
        q = q + (_rotated(q_ptr, i, rotary_ptr, position, positions, DIM, HALF, PIECE) * scaling,)
    lane = tl.arange(0, BLOCK)
    top, total = tl.full((BLOCK,), LEAST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    sums = ()
    for _ in tl.static_range(PIECES):
        sums = sums + (tl.zeros((BLOCK, PIECE), tl.float32),)
    if old < PAGE:  # the new token's own page: the first lane's first token
        k, v = (), ()
        for i in tl.static_range(PIECES):
            k = k + (_rotated(q_ptr + DIM, i, rotary_ptr, position, positions, DIM, HALF, PIECE),)
            v = v + (_load(q_ptr + 2 * DIM, i, DIM, PIECE),)
        k = _append(k, pool_ptr, scale_ptr, keys + slot, DIM, PIECE, PIECES, INT8)
        v = _append(v, pool_ptr, scale_ptr, values + slot, DIM, PIECE, PIECES, INT8)
        score, new = 0.0, ()
        for i in tl.static_range(PIECES):
            score += tl.sum(k[i] * q[i], axis=0)
            new = new + (tl.where(lane[:, None] == 0, v[i][None, :], 0.0),)
        top, total, sums = tl.where(lane == 0, score, LEAST), tl.where(lane == 0, 1.0, 0.0), new
    for t in range(0, old, BLOCK):
        slots = t + lane
        there = slots < old
        k_row, v_row = pool_ptr + keys * DIM + slots[:, None] * DIM, pool_ptr + values * DIM + slots[:, None] * DIM
        score = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(PIECES):
            d = (i * PIECE + tl.arange(0, PIECE))[None, :]
            k = tl.load(k_row + d, mask=there[:, None] & (d < DIM), other=0).to(tl.float32)
            score += tl.sum(k * q[i][None, :], axis=1)
        if INT8:
            score *= tl.load(scale_ptr + keys + slots, mask=there, other=0).to(tl.float32)
        score = tl.where(there, score, top)
        highest = tl.maximum(top, score)
        shrink, p = tl.exp(top - highest), tl.where(there, tl.exp(score - highest), 0.0)
        top, total = highest, total * shrink + p
        if INT8:
            p *= tl.load(scale_ptr + values + slots, mask=there, other=0).to(tl.float32)
        new = ()
        for i in tl.static_range(PIECES):
            d = (i * PIECE + tl.arange(0, PIECE))[None, :]
            v = tl.load(v_row + d, mask=there[:, None] & (d < DIM), other=0).to(tl.float32)
            new = new + (sums[i] * shrink[:, None] + p[:, None] * v,)
        sums = new
    highest = tl.max(top, axis=0)
    weight = tl.exp(top - highest)
    total = tl.sum(total * weight, axis=0)
    features: tl.constexpr = HEADS * DIM
    for i in tl.static_range(PIECES):
        d = i * PIECE + tl.arange(0, PIECE)
        y = tl.sum(sums[i] * weight[:, None], axis=0)
        if ALONE:
            at = y_ptr + token * features + place(head * DIM + d, features, W, PLANES)
            tl.store(at, y / total * SCALE, mask=d < DIM)
        else:
            tl.store(part_ptr + out * DIM + d, y, mask=d < DIM)
    if not ALONE:
        tl.store(stat_ptr + out * 2, highest)
        tl.store(stat_ptr + out * 2 + 1, total)


@triton.jit(do_not_specialize=["splits"])
def combine(
    part_ptr, stat_ptr, splits, y_ptr,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    W: tl.constexpr, PLANES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The parts of one head of a token together, SPLITS at a time, placed for the weight that reads them."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = (token * HEADS + head) * splits
    d = tl.arange(0, BLOCK)
    top, total, y = tl.full((), LEAST, tl.float32), 0.0, tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        there = split < splits
        tops = tl.load(stat_ptr + (first + split) * 2, mask=there, other=LEAST)
        totals = tl.load(stat_ptr + (first + split) * 2 + 1, mask=there, other=0)
        highest = tl.maximum(top, tl.max(tops, axis=0))
        shrink, weight = tl.exp(top - highest), tl.exp(tops - highest)
        used = there & (totals != 0)  # a part of no tokens was never written; NaN is a part
        at = part_ptr + (first + split)[:, None] * DIM + d[None, :]
        part = tl.load(at, mask=used[:, None] & (d < DIM)[None, :], other=0)
        total = total * shrink + tl.sum(totals * weight, axis=0)
        y = y * shrink + tl.sum(part * weight[:, None], axis=0)
        top = highest
    features: tl.constexpr = HEADS * DIM
    tl.store(y_ptr + token * features + place(head * DIM + d, features, W, PLANES), y / total * SCALE, mask=d < DIM)


@triton.jit
def append(
    qkv_ptr, rotary_ptr, positions, pool_ptr, scale_ptr, tokens_ptr, scaling, q_out_ptr,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """One head of a token: q rotated and scaled to q_out (tokens, heads, DIM) float32, k and v into their page."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    info = tokens_ptr + token * TOKEN
    position, page, slot = tl.load(info + POSITION), tl.load(info + PAGE_OF).to(tl.int64), tl.load(info + SLOT)
    q_ptr, out_ptr = qkv_ptr + (token * HEADS + head) * 3 * DIM, q_out_ptr + (token * HEADS + head) * DIM
    k, v = (), ()
    for i in tl.static_range(PIECES):
        d = i * PIECE + tl.arange(0, PIECE)
        q = _rotated(q_ptr, i, rotary_ptr, position, positions, DIM, HALF, PIECE) * scaling
        tl.store(out_ptr + d, q, mask=d < DIM)
        k = k + (_rotated(q_ptr + DIM, i, rotary_ptr, position, positions, DIM, HALF, PIECE),)
        v = v + (_load(q_ptr + 2 * DIM, i, DIM, PIECE),)
    _append(k, pool_ptr, scale_ptr, (page * 2 * HEADS + head) * PAGE + slot, DIM, PIECE, PIECES, INT8)
    _append(v, pool_ptr, scale_ptr, ((page * 2 + 1) * HEADS + head) * PAGE + slot, DIM, PIECE, PIECES, INT8)


@triton.jit(do_not_specialize=["most_pages"])
def attend_block(
    q_ptr, pool_ptr, scale_ptr, sequences_ptr, pages_ptr, most_pages, blocks_ptr, y_ptr,
    HEADS: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr, INT8: tl.constexpr, MATH: tl.constexpr,
    W: tl.constexpr, PLANES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One head of up to QUERIES tokens of a sequence against all tokens up to each; products in MATH, sums in float32."""
    block, head = blocks_ptr + tl.program_id(0) * 2, tl.program_id(1)
    sequence, query = tl.load(block), tl.load(block + 1)
    row = sequences_ptr + sequence * SEQUENCE
    start, first, count = tl.load(row + START), tl.load(row + FIRST), tl.load(row + COUNT)
    queries = query + tl.arange(0, QUERIES)
    asked = (queries < count)[:, None]
    token = (first + queries).to(tl.int64)[:, None]
    q, sums = (), ()
    for i in tl.static_range(PIECES):
        d = (i * PIECE + tl.arange(0, PIECE))[None, :]
        q = q + (tl.load(q_ptr + (token * HEADS + head) * DIM + d, mask=asked & (d < DIM), other=0).to(MATH),)
        sums = sums + (tl.zeros((QUERIES, PIECE), tl.float32),)
    last = start + tl.minimum(query + QUERIES, count)  # tokens that the last query of the block sees
    top = tl.full((QUERIES,), LEAST, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for t in range(0, last, BLOCK):
        page = tl.load(pages_ptr + sequence * most_pages + t // PAGE).to(tl.int64)
        keys, values = (page * 2 * HEADS + head) * PAGE, ((page * 2 + 1) * HEADS + head) * PAGE
        at_token = t + tl.arange(0, BLOCK)
        there, slot = at_token < last, at_token % PAGE
        score = tl.zeros((QUERIES, BLOCK), tl.float32)
        for i in tl.static_range(PIECES):
            d = (i * PIECE + tl.arange(0, PIECE))[:, None]
            k = tl.load(pool_ptr + (keys + slot)[None, :] * DIM + d, mask=there[None, :] & (d < DIM), other=0)
            score = dot(q[i], k.to(tl.float32).to(MATH), score)
        if INT8:
            score *= tl.load(scale_ptr + keys + slot, mask=there, other=0).to(tl.float32)[None, :]
            step = tl.load(scale_ptr + values + slot, mask=there, other=0).to(tl.float32)[:, None]
        seen = (at_token[None, :] <= (start + queries)[:, None]) & there[None, :]
        score = tl.where(seen, score, -float("inf"))
        highest = tl.maximum(top, tl.max(score, axis=1))
        shrink, p = tl.exp(top - highest), tl.exp(score - highest[:, None])
        top, total = highest, total * shrink + tl.sum(p, axis=1)
        new = ()
        for i in tl.static_range(PIECES):
            d = (i * PIECE + tl.arange(0, PIECE))[None, :]
            v = tl.load(pool_ptr + (values + slot)[:, None] * DIM + d, mask=there[:, None] & (d < DIM), other=0)
            if INT8:
                v = v.to(tl.float32) * step
            new = new + (dot(p.to(MATH), v.to(MATH), sums[i] * shrink[:, None]),)
        sums = new
    features: tl.constexpr = HEADS * DIM
    for i in tl.static_range(PIECES):
        d = i * PIECE + tl.arange(0, PIECE)
        at = y_ptr + token * features + place(head * DIM + d, features, W, PLANES)[None, :]
        tl.store(at, sums[i] / total[:, None] * SCALE, mask=asked & (d < DIM)[None, :])
