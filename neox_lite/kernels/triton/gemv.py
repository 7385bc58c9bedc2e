"""Products of a few tokens with weights as stored: every weight is read once, by the thread that multiplies it.

A program makes LANES * ROWS outputs of TOKENS tokens: threads side by side sum a row, ROWS rows at a time, so that what they
read of x serves them all. In the loop nothing goes through shared memory, and nothing is added up across threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import add_rest, gelu
from .packing import code, dot_of_halves, halves_of, high, low, place


@triton.jit
def add_products(
    sums, x_ptr, w_ptr, s_ptr, first, last, token, tokens,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MATH: tl.constexpr,
    TOKENS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """sums[t * ROWS + r] (LANES, GROUPS, INNER) += products of rows first + r * LANES + lane with tokens token + t.

    Rows past `last` and tokens past the last one repeat that one. A tile is GROUPS groups of INNER words that share a scale.
    MATH: how codes meet activations, which lie as pairs. "halves": as halves, int4 with float16 x times 2**-SHIFT; else the
    name of x's dtype: as float32. BITS 0: no codes, the weight itself, with x in natural order.
    """
    W: tl.constexpr = 32 // BITS if BITS else 1
    KW: tl.constexpr = K // W
    H: tl.constexpr = W // 2 if BITS else 1
    WORDS: tl.constexpr = GROUPS * INNER
    lane, group, inner = tl.arange(0, LANES), tl.arange(0, GROUPS), tl.arange(0, INNER)
    # x is loaded in the layout of the weights it meets, by 3-D pointers that are the same in every row
    tile = lane[:, None, None] * 0 + group[None, :, None] * INNER + inner[None, None, :]
    for start in range(0, KW, WORDS):
        word = start + tile
        ws, scales = (), ()
        for r in tl.static_range(ROWS):
            row = tl.minimum(first + r * LANES + lane, last)
            at = w_ptr + row[:, None, None] * KW + word
            if KW % WORDS == 0:
                w = tl.load(at, eviction_policy="evict_first")
            else:
                w = tl.load(at, mask=word < KW, other=0, eviction_policy="evict_first")
            if MATH == "halves":
                ws = ws + halves_of(w)
            else:
                ws = ws + (w,)
            if BITS:
                which = (start // INNER + group)[None, :]
                at = s_ptr + row[:, None] * (K // GROUP) + which
                scale = tl.load(at) if KW % WORDS == 0 else tl.load(at, mask=which < K // GROUP, other=0)
                scales = scales + (scale.to(tl.float32)[:, :, None],)
        new = ()
        for t in tl.static_range(TOKENS):
            x_row = x_ptr + tl.minimum(token + t, tokens - 1) * (H * KW)
            x = ()
            for j in tl.static_range(H):
                at = x_row + j * KW + word
                x = x + ((tl.load(at) if KW % WORDS == 0 else tl.load(at, mask=word < KW, other=0)),)
            for r in tl.static_range(ROWS):
                if BITS == 0:
                    product = ws[r].to(tl.float32) * x[0].to(tl.float32)
                elif MATH == "halves":
                    a, b, c, d = ws[4 * r], ws[4 * r + 1], ws[4 * r + 2], ws[4 * r + 3]
                    product = dot_of_halves(a, b, c, d, x[0], x[1], x[2], x[3]) * scales[r]
                else:
                    product = code(ws[r], 0, BITS) * low(x[0], MATH)
                    for j in tl.static_range(1, H):
                        product += code(ws[r], j, BITS) * low(x[j], MATH)
                    for j in tl.static_range(H):
                        product += code(ws[r], j + H, BITS) * high(x[j], MATH)
                    product *= scales[r]
                new = new + (sums[t * ROWS + r] + product,)
        sums = new
    return sums


@triton.jit
def zeros(COUNT: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, INNER: tl.constexpr):
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((LANES, GROUPS, INNER), tl.float32),)
    return sums


@triton.jit
def write_sums(
    sums, factor, first, token, tokens, y_ptr, a_ptr, a_step, b_ptr, b_step, x_ptr,
    TOKENS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    ACTIVATION: tl.constexpr, W: tl.constexpr, PLANES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """y = SCALE * activation(sums * factor + a + b + x), placed for the weight that reads it; a, b and x may be None."""
    for r in tl.static_range(ROWS):
        row = first + r * LANES + tl.arange(0, LANES)
        for t in tl.static_range(TOKENS):
            inside = row < tl.where(token + t < tokens, N, 0)
            y = tl.sum(tl.sum(sums[t * ROWS + r], axis=2), axis=1) * factor
            start = (token + t) * N
            y = add_rest(y, start + row, row, token + t, a_ptr, a_step, b_ptr, b_step, x_ptr, inside)
            tl.store(y_ptr + start + place(row, N, W, PLANES), gelu(y, ACTIVATION) * SCALE, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def multiply_beside(
    x1_ptr, w1_ptr, s1_ptr, a1_ptr, a1_step, y1_ptr, x2_ptr, w2_ptr, s2_ptr, a2_ptr, a2_step, y2_ptr, tokens, factor,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MATH: tl.constexpr,
    TOKENS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, INNER: tl.constexpr,
    N1: tl.constexpr, ACTIVATION1: tl.constexpr, W1: tl.constexpr, PLANES1: tl.constexpr, SCALE1: tl.constexpr,
    N2: tl.constexpr, ACTIVATION2: tl.constexpr, W2: tl.constexpr, PLANES2: tl.constexpr, SCALE2: tl.constexpr,
):  # fmt: skip
    """y = activation(x @ w.T + a) of one weight, or of two of the same K and format in one launch (N2 > 0)."""
    program, token = tl.program_id(0), tl.program_id(1) * TOKENS
    BLOCKS: tl.constexpr = (N1 + LANES * ROWS - 1) // (LANES * ROWS)
    sums = zeros(ROWS * TOKENS, LANES, GROUPS, INNER)
    if program < BLOCKS:
        first = program * LANES * ROWS
        sums = add_products(
            sums, x1_ptr, w1_ptr, s1_ptr, first, N1 - 1, token, tokens,
            K, BITS, GROUP, MATH, TOKENS, LANES, ROWS, GROUPS, INNER,
        )  # fmt: skip
        write_sums(
            sums, factor, first, token, tokens, y1_ptr, a1_ptr, a1_step, None, 0, None,
            TOKENS, LANES, ROWS, N1, ACTIVATION1, W1, PLANES1, SCALE1,
        )  # fmt: skip
    elif N2 > 0:
        first = (program - BLOCKS) * LANES * ROWS
        sums = add_products(
            sums, x2_ptr, w2_ptr, s2_ptr, first, N2 - 1, token, tokens,
            K, BITS, GROUP, MATH, TOKENS, LANES, ROWS, GROUPS, INNER,
        )  # fmt: skip
        write_sums(
            sums, factor, first, token, tokens, y2_ptr, a2_ptr, a2_step, None, 0, None,
            TOKENS, LANES, ROWS, N2, ACTIVATION2, W2, PLANES2, SCALE2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def multiply_sum(
    x1_ptr, w1_ptr, s1_ptr, x2_ptr, w2_ptr, s2_ptr, a_ptr, a_step, b_ptr, b_step, x_ptr, y_ptr, tokens, factor,
    K1: tl.constexpr, K2: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MATH: tl.constexpr,
    TOKENS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, INNER: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """y = x1 @ w1.T + x2 @ w2.T + a + b + x: one product over concatenated inputs; K2 0 leaves the second out."""
    first, token = tl.program_id(0) * LANES * ROWS, tl.program_id(1) * TOKENS
    sums = zeros(ROWS * TOKENS, LANES, GROUPS, INNER)
    sums = add_products(
        sums, x1_ptr, w1_ptr, s1_ptr, first, N - 1, token, tokens,
        K1, BITS, GROUP, MATH, TOKENS, LANES, ROWS, GROUPS, INNER,
    )  # fmt: skip
    if K2 > 0:
        sums = add_products(
            sums, x2_ptr, w2_ptr, s2_ptr, first, N - 1, token, tokens,
            K2, BITS, GROUP, MATH, TOKENS, LANES, ROWS, GROUPS, INNER,
        )  # fmt: skip
    write_sums(
        sums, factor, first, token, tokens, y_ptr, a_ptr, a_step, b_ptr, b_step, x_ptr,
        TOKENS, LANES, ROWS, N, None, 1, 1, 1.0,
    )  # fmt: skip
