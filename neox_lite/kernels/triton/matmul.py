"""Products of many tokens: codes become floats in registers and meet the tokens on tensor cores; or a weight is written out.

The weight is the first operand of tl.dot: its words come through a pipeline of asynchronous copies into the registers of the
threads that need their codes, and codes never leave those. The order in which a product is summed is free, so long as both
sides have it: plane by plane, as words give it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import add_rest, gelu
from .packing import dot, place, planes_of


@triton.jit
def add_tile(
    total, x_ptr, w_ptr, s_ptr, row, token, tokens,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MATH: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """total (rows, tokens) += weight[row] @ x[token].T"""
    W: tl.constexpr = 32 // BITS
    KW: tl.constexpr = K // W
    INNER: tl.constexpr = GROUP // W  # words that share a scale
    x_row = x_ptr + token[None, :].to(tl.int64) * K
    there = (token < tokens)[None, :]
    for start in range(0, KW, WORDS):
        word = start + tl.arange(0, WORDS)
        at = w_ptr + row[:, None] * KW + word[None, :]
        w = tl.load(at) if KW % WORDS == 0 else tl.load(at, mask=(word < KW)[None, :], other=0)
        if INNER % WORDS == 0:
            scale = tl.load(s_ptr + row * (K // GROUP) + start // INNER)[:, None]
        else:
            at = s_ptr + row[:, None] * (K // GROUP) + (word // INNER)[None, :]
            scale = tl.load(at) if KW % WORDS == 0 else tl.load(at, mask=(word < KW)[None, :], other=0)
        planes = planes_of(w, tl.broadcast_to(scale, w.shape), BITS, MATH)
        inside = there if KW % WORDS == 0 else there & (word < KW)[:, None]
        for j in tl.static_range(W):
            x = tl.load(x_row + j * KW + word[:, None], mask=inside, other=0)
            total = dot(planes[j], x, total)
    return total


@triton.jit(do_not_specialize=["tokens"])
def multiply_tiles(
    x1_ptr, w1_ptr, s1_ptr, x2_ptr, w2_ptr, s2_ptr, a_ptr, a_step, b_ptr, b_step, x_ptr, y_ptr, tokens,
    K1: tl.constexpr, K2: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MATH: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr,
    N: tl.constexpr, ACTIVATION: tl.constexpr, W: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """y = activation(x1 @ w1.T + x2 @ w2.T + a + b + x) for TOKENS tokens a program; K2 0 leaves the second product out."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    stored = tl.minimum(row, N - 1)
    y = tl.zeros((ROWS, TOKENS), tl.float32)
    y = add_tile(y, x1_ptr, w1_ptr, s1_ptr, stored, token, tokens, K1, BITS, GROUP, MATH, WORDS)
    if K2 > 0:
        y = add_tile(y, x2_ptr, w2_ptr, s2_ptr, stored, token, tokens, K2, BITS, GROUP, MATH, WORDS)
    feature, token = row[:, None], token[None, :].to(tl.int64)
    inside = (feature < N) & (token < tokens)
    y = add_rest(y, token * N + feature, feature, token, a_ptr, a_step, b_ptr, b_step, x_ptr, inside)
    tl.store(y_ptr + token * N + place(feature, N, W, PLANES), gelu(y, ACTIVATION), mask=inside)


@triton.jit(do_not_specialize=["first", "rows"])
def decode(
    w_ptr, s_ptr, y_ptr, first, rows,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Rows first..first + rows of a weight, written out in natural order: y (rows, K)."""
    W: tl.constexpr = 32 // BITS
    KW: tl.constexpr = K // W
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = (row < rows)[:, None] & (word < KW)[None, :]
    at = (first + row)[:, None]
    w = tl.load(w_ptr + at * KW + word[None, :], mask=inside, other=0, eviction_policy="evict_first")
    scale = tl.load(s_ptr + at * (K // GROUP) + (word // (GROUP // W))[None, :], mask=inside, other=0)
    codes = planes_of(w, scale, BITS, y_ptr.dtype.element_ty)
    if BITS == 4:
        even = tl.join(tl.join(codes[0], codes[4]), tl.join(codes[2], codes[6]))
        odd = tl.join(tl.join(codes[1], codes[5]), tl.join(codes[3], codes[7]))
    else:
        even, odd = tl.join(codes[0], codes[2]), tl.join(codes[1], codes[3])
    y = tl.join(even, odd).reshape(ROWS, WORDS * W)
    column = tl.program_id(1) * WORDS * W + tl.arange(0, WORDS * W)
    tl.store(
        y_ptr + row[:, None].to(tl.int64) * K + column[None, :], y, mask=(row < rows)[:, None] & (column < K)[None, :]
    )
