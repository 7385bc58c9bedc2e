"""Products of a few tokens with weights as stored: every weight is read once, by the thread that multiplies it.

x is (M, K), a weight (N, K) of 32-bit words with PACK_FACTOR codes each, y (M, N). A program computes BLOCK_N * UNROLL_N
outputs of BLOCK_M tokens: BLOCK_N rows side by side, UNROLL_N of those blocks one after the other, so that what it reads of x
serves them all. In the loop over K nothing goes through shared memory, and nothing is summed across threads.

A step of that loop takes GROUPS groups of GROUP_WORDS words; a group shares a scale. COMPUTE says how codes meet activations,
which lie as pairs (packing.py): "half2", int4 with float16 x times 2**-HALF_SHIFT, or the name of x's dtype, in float32.
BITS 0 means a plain matrix, with x in natural order; a word is then one element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import add_bias_and_residual, gelu
from .packing import dequant_code, dequant_int4_half2, dot_half2, planar_offset, unpack_high, unpack_low


@triton.jit
def accumulate(
    acc, x_ptr, w_ptr, scale_ptr, start_n, last_n, start_m, M,
    K: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL_N: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_WORDS: tl.constexpr,
):  # fmt: skip
    """acc[m * UNROLL_N + r] (BLOCK_N, GROUPS, GROUP_WORDS) += products of rows start_n + r * BLOCK_N.. and token start_m + m.

    Rows past last_n and tokens past the last one repeat that one.
    """
    PACK_FACTOR: tl.constexpr = 32 // BITS if BITS else 1
    K_WORDS: tl.constexpr = K // PACK_FACTOR
    PAIRS: tl.constexpr = PACK_FACTOR // 2 if BITS else 1
    BLOCK_K: tl.constexpr = GROUPS * GROUP_WORDS
    offs_n, offs_g, offs_w = tl.arange(0, BLOCK_N), tl.arange(0, GROUPS), tl.arange(0, GROUP_WORDS)
    # Offsets have all three dimensions, equal in every row: x is then loaded in the layout of the weights that it meets.
    tile = offs_n[:, None, None] * 0 + offs_g[None, :, None] * GROUP_WORDS + offs_w[None, None, :]
    for start_k in range(0, K_WORDS, BLOCK_K):
        offs_k = start_k + tile

        # 1. UNROLL_N blocks of weights and their scales.
        weights, scales = (), ()
        for r in tl.static_range(UNROLL_N):
            rows = tl.minimum(start_n + r * BLOCK_N + offs_n, last_n)
            w_ptrs = w_ptr + rows[:, None, None] * K_WORDS + offs_k
            # (BLOCK_N, GROUPS, GROUP_WORDS) int32
            if K_WORDS % BLOCK_K == 0:
                w = tl.load(w_ptrs, eviction_policy="evict_first")
            else:
                w = tl.load(w_ptrs, mask=offs_k < K_WORDS, other=0, eviction_policy="evict_first")
            if COMPUTE == "half2":
                weights = weights + dequant_int4_half2(w)
            else:
                weights = weights + (w,)
            if BITS:
                groups = (start_k // GROUP_WORDS + offs_g)[None, :]
                scale_ptrs = scale_ptr + rows[:, None] * (K // GROUP_SIZE) + groups
                # (BLOCK_N, GROUPS) float16, bfloat16 or float32
                if K_WORDS % BLOCK_K == 0:
                    scale = tl.load(scale_ptrs)
                else:
                    scale = tl.load(scale_ptrs, mask=groups < K // GROUP_SIZE, other=0)
                scales = scales + (scale.to(tl.float32)[:, :, None],)

        # 2. Token by token: its activations, times every block of weights.
        new_acc = ()
        for m in tl.static_range(BLOCK_M):
            x_row_ptr = x_ptr + tl.minimum(start_m + m, M - 1) * (PAIRS * K_WORDS)
            x = ()
            for j in tl.static_range(PAIRS):
                x_ptrs = x_row_ptr + j * K_WORDS + offs_k
                # (BLOCK_N, GROUPS, GROUP_WORDS) pairs: int32, or int64 of float32 numbers
                x = x + (
                    (tl.load(x_ptrs) if K_WORDS % BLOCK_K == 0 else tl.load(x_ptrs, mask=offs_k < K_WORDS, other=0)),
                )
            for r in tl.static_range(UNROLL_N):
                if BITS == 0:
                    product = weights[r].to(tl.float32) * x[0].to(tl.float32)
                elif COMPUTE == "half2":
                    a, b, c, d = weights[4 * r], weights[4 * r + 1], weights[4 * r + 2], weights[4 * r + 3]
                    product = dot_half2(a, b, c, d, x[0], x[1], x[2], x[3]) * scales[r]
                else:
                    product = dequant_code(weights[r], 0, BITS) * unpack_low(x[0], COMPUTE)
                    for j in tl.static_range(1, PAIRS):
                        product += dequant_code(weights[r], j, BITS) * unpack_low(x[j], COMPUTE)
                    for j in tl.static_range(PAIRS):
                        product += dequant_code(weights[r], j + PAIRS, BITS) * unpack_high(x[j], COMPUTE)
                    product *= scales[r]
                new_acc = new_acc + (acc[m * UNROLL_N + r] + product,)
        acc = new_acc
    return acc


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, GROUP_WORDS: tl.constexpr):
    acc = ()
    for _ in tl.static_range(COUNT):
        acc = acc + (tl.zeros((BLOCK_N, GROUPS, GROUP_WORDS), tl.float32),)
    return acc


@triton.jit
def store(
    acc, factor, start_n, start_m, M, y_ptr,
    bias1_ptr, stride_bias1_m, bias2_ptr, stride_bias2_m, residual_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL_N: tl.constexpr, N: tl.constexpr,
    ACTIVATION: tl.constexpr, PACK_FACTOR: tl.constexpr, NUM_PLANES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """y = SCALE * activation(sum of acc * factor + biases + residual), in the order in which the next weight reads it."""
    for r in tl.static_range(UNROLL_N):
        offs_n = start_n + r * BLOCK_N + tl.arange(0, BLOCK_N)
        for m in tl.static_range(BLOCK_M):
            mask = offs_n < tl.where(start_m + m < M, N, 0)
            y = tl.sum(tl.sum(acc[m * UNROLL_N + r], axis=2), axis=1) * factor  # (BLOCK_N,) float32
            row_start = (start_m + m) * N
            y = add_bias_and_residual(
                y, row_start + offs_n, offs_n, start_m + m,
                bias1_ptr, stride_bias1_m, bias2_ptr, stride_bias2_m, residual_ptr, mask,
            )  # fmt: skip
            y_ptrs = y_ptr + row_start + planar_offset(offs_n, N, PACK_FACTOR, NUM_PLANES)
            tl.store(y_ptrs, gelu(y, ACTIVATION) * SCALE, mask=mask)


@triton.jit(do_not_specialize=["M"])
def grouped_gemv(
    x1_ptr, w1_ptr, scale1_ptr, bias1_ptr, stride_bias1_m, y1_ptr,
    x2_ptr, w2_ptr, scale2_ptr, bias2_ptr, stride_bias2_m, y2_ptr, M, factor,
    K: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL_N: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_WORDS: tl.constexpr,
    N1: tl.constexpr, ACTIVATION1: tl.constexpr, PACK_FACTOR1: tl.constexpr, NUM_PLANES1: tl.constexpr, SCALE1: tl.constexpr,
    N2: tl.constexpr, ACTIVATION2: tl.constexpr, PACK_FACTOR2: tl.constexpr, NUM_PLANES2: tl.constexpr, SCALE2: tl.constexpr,
):  # fmt: skip
    """y = activation(x @ w.T + bias) of one weight, or of two with the same K and format in one launch (N2 > 0)."""
    pid_n, start_m = tl.program_id(0), tl.program_id(1) * BLOCK_M
    NUM_BLOCKS1: tl.constexpr = (N1 + BLOCK_N * UNROLL_N - 1) // (BLOCK_N * UNROLL_N)
    acc = zeros(UNROLL_N * BLOCK_M, BLOCK_N, GROUPS, GROUP_WORDS)
    if pid_n < NUM_BLOCKS1:
        start_n = pid_n * BLOCK_N * UNROLL_N
        acc = accumulate(
            acc, x1_ptr, w1_ptr, scale1_ptr, start_n, N1 - 1, start_m, M,
            K, BITS, GROUP_SIZE, COMPUTE, BLOCK_M, BLOCK_N, UNROLL_N, GROUPS, GROUP_WORDS,
        )  # fmt: skip
        store(
            acc, factor, start_n, start_m, M, y1_ptr, bias1_ptr, stride_bias1_m, None, 0, None,
            BLOCK_M, BLOCK_N, UNROLL_N, N1, ACTIVATION1, PACK_FACTOR1, NUM_PLANES1, SCALE1,
        )  # fmt: skip
    elif N2 > 0:
        start_n = (pid_n - NUM_BLOCKS1) * BLOCK_N * UNROLL_N
        acc = accumulate(
            acc, x2_ptr, w2_ptr, scale2_ptr, start_n, N2 - 1, start_m, M,
            K, BITS, GROUP_SIZE, COMPUTE, BLOCK_M, BLOCK_N, UNROLL_N, GROUPS, GROUP_WORDS,
        )  # fmt: skip
        store(
            acc, factor, start_n, start_m, M, y2_ptr, bias2_ptr, stride_bias2_m, None, 0, None,
            BLOCK_M, BLOCK_N, UNROLL_N, N2, ACTIVATION2, PACK_FACTOR2, NUM_PLANES2, SCALE2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def gemv_residual(
    x1_ptr, w1_ptr, scale1_ptr, x2_ptr, w2_ptr, scale2_ptr,
    bias1_ptr, stride_bias1_m, bias2_ptr, stride_bias2_m, residual_ptr, y_ptr, M, factor,
    K1: tl.constexpr, K2: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL_N: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_WORDS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y = x1 @ w1.T + x2 @ w2.T + bias1 + bias2 + residual: one product over concatenated inputs; K2 0: without the second."""
    start_n, start_m = tl.program_id(0) * BLOCK_N * UNROLL_N, tl.program_id(1) * BLOCK_M
    acc = zeros(UNROLL_N * BLOCK_M, BLOCK_N, GROUPS, GROUP_WORDS)
    acc = accumulate(
        acc, x1_ptr, w1_ptr, scale1_ptr, start_n, N - 1, start_m, M,
        K1, BITS, GROUP_SIZE, COMPUTE, BLOCK_M, BLOCK_N, UNROLL_N, GROUPS, GROUP_WORDS,
    )  # fmt: skip
    if K2 > 0:
        acc = accumulate(
            acc, x2_ptr, w2_ptr, scale2_ptr, start_n, N - 1, start_m, M,
            K2, BITS, GROUP_SIZE, COMPUTE, BLOCK_M, BLOCK_N, UNROLL_N, GROUPS, GROUP_WORDS,
        )  # fmt: skip
    store(
        acc, factor, start_n, start_m, M, y_ptr, bias1_ptr, stride_bias1_m, bias2_ptr, stride_bias2_m, residual_ptr,
        BLOCK_M, BLOCK_N, UNROLL_N, N, None, 1, 1, 1.0,
    )  # fmt: skip
