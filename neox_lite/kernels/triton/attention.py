"""Rotary, append and causal attention over pages of keys and values, where the pages lie.

A head is cut into blocks of BLOCK_D, a power of two: 96 is 3 times 32 and 80 is 5 times 16, and nothing is padded to 128. A
sequence's only new token is split over its context, one page a program, and the splits are combined by their maxima and sums
(Flash-Decoding, https://pytorch.org/blog/flash-decoding/); several tokens go block by block through tl.dot (Dao 2023,
arXiv 2307.08691). m_i, l_i and acc are the running maximum, sum of exponentials and weighted sum of values.

A layer's pool is (pages, 2, heads, PAGE, HEAD_DIM), keys before values; int8 pools have a float16 scale for each vector.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import units
from .packing import dot, planar_offset

PAGE = tl.constexpr(units.PAGE)
# Below every score, and finite, so that its difference to itself is a number.
MIN_SCORE = tl.constexpr(-1e30)
# Columns of the tables that describe a batch, int32; see batch_table.BatchTable.
START, FIRST, COUNT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SEQUENCE = tl.constexpr(3)
POSITION, PAGE_OF, SLOT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
TOKEN = tl.constexpr(3)


@triton.jit
def _load_block(x_ptr, i: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Block i of a vector (HEAD_DIM,) -> (BLOCK_D,) float32."""
    offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
    return tl.load(x_ptr + offs_d, mask=offs_d < HEAD_DIM, other=0).to(tl.float32)


@triton.jit
def _load_rotated(
    x_ptr, i: tl.constexpr, rotary_ptr, position, num_positions,
    HEAD_DIM: tl.constexpr, HALF_ROTARY: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Block i of x (HEAD_DIM,) after rotary embedding of its first 2 * HALF_ROTARY elements, half against half, float32.

    rotary (2, num_positions, HALF_ROTARY) float32: cosines, then sines.
    """
    x = _load_block(x_ptr, i, HEAD_DIM, BLOCK_D)
    if i * BLOCK_D < 2 * HALF_ROTARY:
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        rotated = offs_d < 2 * HALF_ROTARY
        pair = tl.where(offs_d < HALF_ROTARY, offs_d, offs_d - HALF_ROTARY)
        cos = tl.load(rotary_ptr + position * HALF_ROTARY + pair, mask=rotated, other=1)
        sin = tl.load(rotary_ptr + (num_positions + position) * HALF_ROTARY + pair, mask=rotated, other=0)
        other_ptrs = x_ptr + tl.where(offs_d < HALF_ROTARY, offs_d + HALF_ROTARY, offs_d - HALF_ROTARY)
        other = tl.load(other_ptrs, mask=rotated, other=0).to(tl.float32)
        x = tl.where(rotated, x * cos + tl.where(offs_d < HALF_ROTARY, -other, other) * sin, x)
    return x


@triton.jit
def _append_vector(
    blocks, pool_ptr, scale_ptr, vector,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, NUM_BLOCKS_D: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Store a token's key or value of one head, int8 as cache.quantize does; -> its blocks as they will be read back.

    vector: its number among all vectors of the pool.
    """
    if INT8:
        amax, num_nan = 0.0, 0
        for i in tl.static_range(NUM_BLOCKS_D):
            amax = tl.maximum(amax, tl.max(tl.abs(blocks[i]), axis=0))
            num_nan += tl.sum((blocks[i] != blocks[i]).to(tl.int32), axis=0)
        scale = tl.where(num_nan > 0, float("nan"), tl.minimum(tl.div_rn(amax, 127.0), 65504.0)).to(tl.float16)
        tl.store(scale_ptr + vector, scale)
        step = scale.to(tl.float32)
    stored_blocks = ()
    for i in tl.static_range(NUM_BLOCKS_D):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        x = blocks[i]
        if INT8:
            x = tl.where(step > 0, tl.div_rn(x, tl.where(step > 0, step, 1.0)), 0.0)
            x = tl.minimum(tl.maximum(x, -127.0), 127.0)
            # To the nearest even: 1.5 * 2**23 leaves no bit for a fraction.
            x = (x + 12582912.0) - 12582912.0
        stored = x.to(pool_ptr.dtype.element_ty)
        tl.store(pool_ptr + vector * HEAD_DIM + offs_d, stored, mask=offs_d < HEAD_DIM)
        if INT8:
            stored_blocks = stored_blocks + (stored.to(tl.float32) * step,)
        else:
            stored_blocks = stored_blocks + (stored.to(tl.float32),)
    return stored_blocks


@triton.jit(do_not_specialize=["max_pages"])
def paged_decode(
    qkv_ptr, rotary_ptr, num_positions, pool_ptr, scale_ptr, sequences_ptr, pages_ptr, max_pages, tokens_ptr, sm_scale,
    partial_ptr, stats_ptr, y_ptr,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_ROTARY: tl.constexpr,
    BLOCK_D: tl.constexpr, NUM_BLOCKS_D: tl.constexpr, BLOCK_N: tl.constexpr, INT8: tl.constexpr, SINGLE_SPLIT: tl.constexpr,
    PACK_FACTOR: tl.constexpr, NUM_PLANES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One head of a sequence's only new token against one page of its context, a split.

    qkv (tokens, heads, 3, HEAD_DIM); the program whose page the token belongs to appends it. -> partial (tokens, heads, splits,
    HEAD_DIM) and stats (tokens, heads, splits, 2), m_i and l_i. SINGLE_SPLIT: there is no other, so it writes y (tokens,
    heads * HEAD_DIM). Each of BLOCK_N lanes keeps m_i, l_i and acc of the keys that it sees: threads meet only at the end.
    """
    sequence, head, split, num_splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)

    # 1. Find the sequence, its page of this split, and how many of the page's tokens it held before this step.
    sequence_ptr = sequences_ptr + sequence * SEQUENCE
    start, token = tl.load(sequence_ptr + START), tl.load(sequence_ptr + FIRST).to(tl.int64)
    count = tl.load(sequence_ptr + COUNT)
    if count == 0:
        # Nothing of this sequence is in the batch.
        return
    out = (token * NUM_HEADS + head) * num_splits + split
    num_cached = tl.minimum(start - split * PAGE, PAGE)
    if num_cached < 0:
        tl.store(stats_ptr + out * 2, MIN_SCORE)
        tl.store(stats_ptr + out * 2 + 1, 0.0)
        return
    token_ptr = tokens_ptr + token * TOKEN
    position, slot = tl.load(token_ptr + POSITION), tl.load(token_ptr + SLOT)
    q_ptr = qkv_ptr + (token * NUM_HEADS + head) * 3 * HEAD_DIM
    page = tl.load(pages_ptr + sequence * max_pages + split).to(tl.int64)
    keys, values = (page * 2 * NUM_HEADS + head) * PAGE, ((page * 2 + 1) * NUM_HEADS + head) * PAGE
    q = ()
    for i in tl.static_range(NUM_BLOCKS_D):
        rotated = _load_rotated(q_ptr, i, rotary_ptr, position, num_positions, HEAD_DIM, HALF_ROTARY, BLOCK_D)
        q = q + (rotated * sm_scale,)
    lane = tl.arange(0, BLOCK_N)
    m_i, l_i = tl.full((BLOCK_N,), MIN_SCORE, tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    acc = ()
    for _ in tl.static_range(NUM_BLOCKS_D):
        acc = acc + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)

    # 2. The new token, where it belongs to this page: append it, and let lane 0 begin with it.
    if num_cached < PAGE:
        k, v = (), ()
        for i in tl.static_range(NUM_BLOCKS_D):
            k = k + (
                _load_rotated(q_ptr + HEAD_DIM, i, rotary_ptr, position, num_positions, HEAD_DIM, HALF_ROTARY, BLOCK_D),
            )
            v = v + (_load_block(q_ptr + 2 * HEAD_DIM, i, HEAD_DIM, BLOCK_D),)
        k = _append_vector(k, pool_ptr, scale_ptr, keys + slot, HEAD_DIM, BLOCK_D, NUM_BLOCKS_D, INT8)
        v = _append_vector(v, pool_ptr, scale_ptr, values + slot, HEAD_DIM, BLOCK_D, NUM_BLOCKS_D, INT8)
        qk, new_acc = 0.0, ()
        for i in tl.static_range(NUM_BLOCKS_D):
            qk += tl.sum(k[i] * q[i], axis=0)
            new_acc = new_acc + (tl.where(lane[:, None] == 0, v[i][None, :], 0.0),)
        m_i, l_i, acc = tl.where(lane == 0, qk, MIN_SCORE), tl.where(lane == 0, 1.0, 0.0), new_acc

    # 3. The tokens that the page held before, BLOCK_N at a time.
    for start_n in range(0, num_cached, BLOCK_N):
        offs_n = start_n + lane
        mask_n = offs_n < num_cached
        k_ptrs = pool_ptr + keys * HEAD_DIM + offs_n[:, None] * HEAD_DIM
        v_ptrs = pool_ptr + values * HEAD_DIM + offs_n[:, None] * HEAD_DIM
        qk = tl.zeros((BLOCK_N,), tl.float32)
        for i in tl.static_range(NUM_BLOCKS_D):
            offs_d = (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
            # (BLOCK_N, BLOCK_D)
            k = tl.load(k_ptrs + offs_d, mask=mask_n[:, None] & (offs_d < HEAD_DIM), other=0).to(tl.float32)
            qk += tl.sum(k * q[i][None, :], axis=1)
        if INT8:
            qk *= tl.load(scale_ptr + keys + offs_n, mask=mask_n, other=0).to(tl.float32)
        qk = tl.where(mask_n, qk, m_i)
        m_new = tl.maximum(m_i, qk)
        alpha, p = tl.exp(m_i - m_new), tl.where(mask_n, tl.exp(qk - m_new), 0.0)
        m_i, l_i = m_new, l_i * alpha + p
        if INT8:
            p *= tl.load(scale_ptr + values + offs_n, mask=mask_n, other=0).to(tl.float32)
        new_acc = ()
        for i in tl.static_range(NUM_BLOCKS_D):
            offs_d = (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
            # (BLOCK_N, BLOCK_D)
            v = tl.load(v_ptrs + offs_d, mask=mask_n[:, None] & (offs_d < HEAD_DIM), other=0).to(tl.float32)
            new_acc = new_acc + (acc[i] * alpha[:, None] + p[:, None] * v,)
        acc = new_acc

    # 4. Combine the lanes.
    m_max = tl.max(m_i, axis=0)
    alpha = tl.exp(m_i - m_max)
    l_sum = tl.sum(l_i * alpha, axis=0)
    N: tl.constexpr = NUM_HEADS * HEAD_DIM
    for i in tl.static_range(NUM_BLOCKS_D):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        y = tl.sum(acc[i] * alpha[:, None], axis=0)  # (BLOCK_D,)
        if SINGLE_SPLIT:
            y_ptrs = y_ptr + token * N + planar_offset(head * HEAD_DIM + offs_d, N, PACK_FACTOR, NUM_PLANES)
            tl.store(y_ptrs, y / l_sum * SCALE, mask=offs_d < HEAD_DIM)
        else:
            tl.store(partial_ptr + out * HEAD_DIM + offs_d, y, mask=offs_d < HEAD_DIM)
    if not SINGLE_SPLIT:
        tl.store(stats_ptr + out * 2, m_max)
        tl.store(stats_ptr + out * 2 + 1, l_sum)


@triton.jit(do_not_specialize=["num_splits"])
def combine_splits(
    partial_ptr, stats_ptr, num_splits, y_ptr,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    PACK_FACTOR: tl.constexpr, NUM_PLANES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one head of a token, BLOCK_S at a time -> y (tokens, heads * HEAD_DIM)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = (token * NUM_HEADS + head) * num_splits
    offs_d = tl.arange(0, BLOCK_D)
    m_i, l_i, acc = tl.full((), MIN_SCORE, tl.float32), 0.0, tl.zeros((BLOCK_D,), tl.float32)
    for start_s in range(0, num_splits, BLOCK_S):
        offs_s = start_s + tl.arange(0, BLOCK_S)
        mask_s = offs_s < num_splits
        m_s = tl.load(stats_ptr + (first + offs_s) * 2, mask=mask_s, other=MIN_SCORE)  # (BLOCK_S,)
        l_s = tl.load(stats_ptr + (first + offs_s) * 2 + 1, mask=mask_s, other=0)
        m_new = tl.maximum(m_i, tl.max(m_s, axis=0))
        alpha, weight = tl.exp(m_i - m_new), tl.exp(m_s - m_new)
        # A split of no tokens has not written its part; one that is NaN has.
        written = mask_s & (l_s != 0)
        partial_ptrs = partial_ptr + (first + offs_s)[:, None] * HEAD_DIM + offs_d[None, :]
        # (BLOCK_S, BLOCK_D) float32
        partial = tl.load(partial_ptrs, mask=written[:, None] & (offs_d < HEAD_DIM)[None, :], other=0)
        l_i = l_i * alpha + tl.sum(l_s * weight, axis=0)
        acc = acc * alpha + tl.sum(partial * weight[:, None], axis=0)
        m_i = m_new
    N: tl.constexpr = NUM_HEADS * HEAD_DIM
    y_ptrs = y_ptr + token * N + planar_offset(head * HEAD_DIM + offs_d, N, PACK_FACTOR, NUM_PLANES)
    tl.store(y_ptrs, acc / l_i * SCALE, mask=offs_d < HEAD_DIM)


@triton.jit
def append_kv(
    qkv_ptr, rotary_ptr, num_positions, pool_ptr, scale_ptr, tokens_ptr, sm_scale, q_out_ptr,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_ROTARY: tl.constexpr,
    BLOCK_D: tl.constexpr, NUM_BLOCKS_D: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """One head of a token: q, rotated and scaled, to q_out (tokens, heads, HEAD_DIM) float32; k and v into their page."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token_ptr = tokens_ptr + token * TOKEN
    position, page = tl.load(token_ptr + POSITION), tl.load(token_ptr + PAGE_OF).to(tl.int64)
    slot = tl.load(token_ptr + SLOT)
    q_ptr = qkv_ptr + (token * NUM_HEADS + head) * 3 * HEAD_DIM
    out_ptr = q_out_ptr + (token * NUM_HEADS + head) * HEAD_DIM
    k, v = (), ()
    for i in tl.static_range(NUM_BLOCKS_D):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        q = _load_rotated(q_ptr, i, rotary_ptr, position, num_positions, HEAD_DIM, HALF_ROTARY, BLOCK_D) * sm_scale
        tl.store(out_ptr + offs_d, q, mask=offs_d < HEAD_DIM)
        k = k + (
            _load_rotated(q_ptr + HEAD_DIM, i, rotary_ptr, position, num_positions, HEAD_DIM, HALF_ROTARY, BLOCK_D),
        )
        v = v + (_load_block(q_ptr + 2 * HEAD_DIM, i, HEAD_DIM, BLOCK_D),)
    keys = (page * 2 * NUM_HEADS + head) * PAGE
    _append_vector(k, pool_ptr, scale_ptr, keys + slot, HEAD_DIM, BLOCK_D, NUM_BLOCKS_D, INT8)
    values = ((page * 2 + 1) * NUM_HEADS + head) * PAGE
    _append_vector(v, pool_ptr, scale_ptr, values + slot, HEAD_DIM, BLOCK_D, NUM_BLOCKS_D, INT8)


@triton.jit(do_not_specialize=["max_pages"])
def paged_prefill(
    q_ptr, pool_ptr, scale_ptr, sequences_ptr, pages_ptr, max_pages, blocks_ptr, y_ptr,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, NUM_BLOCKS_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INT8: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    PACK_FACTOR: tl.constexpr, NUM_PLANES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One head of up to BLOCK_M tokens of a sequence against all tokens up to each, BLOCK_N keys at a time.

    q (tokens, heads, HEAD_DIM) float32, as append_kv writes it; products in COMPUTE_DTYPE, sums in float32.
    blocks (programs, 2) int32: the sequence, and the first of its new tokens that the program takes.
    """
    # 1. Find the sequence and load its queries.
    block_ptr, head = blocks_ptr + tl.program_id(0) * 2, tl.program_id(1)
    sequence, start_m = tl.load(block_ptr), tl.load(block_ptr + 1)
    sequence_ptr = sequences_ptr + sequence * SEQUENCE
    start, first = tl.load(sequence_ptr + START), tl.load(sequence_ptr + FIRST)
    count = tl.load(sequence_ptr + COUNT)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < count)[:, None]
    token = (first + offs_m).to(tl.int64)[:, None]
    q, acc = (), ()
    for i in tl.static_range(NUM_BLOCKS_D):
        offs_d = (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        q_ptrs = q_ptr + (token * NUM_HEADS + head) * HEAD_DIM + offs_d
        q = q + (tl.load(q_ptrs, mask=mask_m & (offs_d < HEAD_DIM), other=0).to(COMPUTE_DTYPE),)  # (BLOCK_M, BLOCK_D)
        acc = acc + (tl.zeros((BLOCK_M, BLOCK_D), tl.float32),)

    # 2. Block by block of keys, up to the last one that any of the queries sees.
    num_keys = start + tl.minimum(start_m + BLOCK_M, count)
    m_i = tl.full((BLOCK_M,), MIN_SCORE, tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    for start_n in range(0, num_keys, BLOCK_N):
        page = tl.load(pages_ptr + sequence * max_pages + start_n // PAGE).to(tl.int64)
        keys, values = (page * 2 * NUM_HEADS + head) * PAGE, ((page * 2 + 1) * NUM_HEADS + head) * PAGE
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n, slot = offs_n < num_keys, offs_n % PAGE
        qk = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(NUM_BLOCKS_D):
            offs_d = (i * BLOCK_D + tl.arange(0, BLOCK_D))[:, None]
            k_ptrs = pool_ptr + (keys + slot)[None, :] * HEAD_DIM + offs_d
            k = tl.load(k_ptrs, mask=mask_n[None, :] & (offs_d < HEAD_DIM), other=0)  # (BLOCK_D, BLOCK_N)
            qk = dot(q[i], k.to(tl.float32).to(COMPUTE_DTYPE), qk)
        if INT8:
            qk *= tl.load(scale_ptr + keys + slot, mask=mask_n, other=0).to(tl.float32)[None, :]
            v_scale = tl.load(scale_ptr + values + slot, mask=mask_n, other=0).to(tl.float32)[:, None]
        is_seen = (offs_n[None, :] <= (start + offs_m)[:, None]) & mask_n[None, :]
        qk = tl.where(is_seen, qk, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(qk, axis=1))
        alpha, p = tl.exp(m_i - m_new), tl.exp(qk - m_new[:, None])
        m_i, l_i = m_new, l_i * alpha + tl.sum(p, axis=1)
        new_acc = ()
        for i in tl.static_range(NUM_BLOCKS_D):
            offs_d = (i * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
            v_ptrs = pool_ptr + (values + slot)[:, None] * HEAD_DIM + offs_d
            v = tl.load(v_ptrs, mask=mask_n[:, None] & (offs_d < HEAD_DIM), other=0)  # (BLOCK_N, BLOCK_D)
            if INT8:
                v = v.to(tl.float32) * v_scale
            new_acc = new_acc + (dot(p.to(COMPUTE_DTYPE), v.to(COMPUTE_DTYPE), acc[i] * alpha[:, None]),)
        acc = new_acc

    # 3. Normalize and store, in the order in which the next weight reads it.
    N: tl.constexpr = NUM_HEADS * HEAD_DIM
    for i in tl.static_range(NUM_BLOCKS_D):
        offs_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        y_ptrs = y_ptr + token * N + planar_offset(head * HEAD_DIM + offs_d, N, PACK_FACTOR, NUM_PLANES)[None, :]
        tl.store(y_ptrs, acc[i] / l_i[:, None] * SCALE, mask=mask_m & (offs_d < HEAD_DIM)[None, :])
