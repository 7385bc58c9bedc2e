"""Products of many tokens: codes become floats in registers and meet the tokens on tensor cores; or a weight is dequantized.

x is (M, K), a weight (N, K) of 32-bit words with PACK_FACTOR codes each, y (M, N). The weight is the first operand of tl.dot:
its words come through a pipeline of asynchronous copies into the registers of the threads that need their codes, and codes
never leave those. A product may be summed in any order that both operands share: here plane by plane (packing.py).
BLOCK_K counts words.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import add_bias_and_residual, gelu
from .packing import dequant_planes, dot, planar_offset


@triton.jit
def accumulate(
    acc, x_ptr, w_ptr, scale_ptr, offs_n, offs_m, M,
    K: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, COMPUTE_DTYPE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc (BLOCK_N, BLOCK_M) += w[offs_n] @ x[offs_m].T"""
    PACK_FACTOR: tl.constexpr = 32 // BITS
    K_WORDS: tl.constexpr = K // PACK_FACTOR
    GROUP_WORDS: tl.constexpr = GROUP_SIZE // PACK_FACTOR
    x_row_ptrs = x_ptr + offs_m[None, :].to(tl.int64) * K
    mask_m = (offs_m < M)[None, :]
    for start_k in range(0, K_WORDS, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        w_ptrs = w_ptr + offs_n[:, None] * K_WORDS + offs_k[None, :]
        # (BLOCK_N, BLOCK_K) int32
        w = tl.load(w_ptrs) if K_WORDS % BLOCK_K == 0 else tl.load(w_ptrs, mask=(offs_k < K_WORDS)[None, :], other=0)
        if GROUP_WORDS % BLOCK_K == 0:
            # (BLOCK_N, 1): all words of this step share a scale
            scale = tl.load(scale_ptr + offs_n * (K // GROUP_SIZE) + start_k // GROUP_WORDS)[:, None]
        else:
            scale_ptrs = scale_ptr + offs_n[:, None] * (K // GROUP_SIZE) + (offs_k // GROUP_WORDS)[None, :]
            # (BLOCK_N, BLOCK_K)
            if K_WORDS % BLOCK_K == 0:
                scale = tl.load(scale_ptrs)
            else:
                scale = tl.load(scale_ptrs, mask=(offs_k < K_WORDS)[None, :], other=0)
        planes = dequant_planes(w, tl.broadcast_to(scale, w.shape), BITS, COMPUTE_DTYPE)
        mask = mask_m if K_WORDS % BLOCK_K == 0 else mask_m & (offs_k < K_WORDS)[:, None]
        for j in tl.static_range(PACK_FACTOR):
            x = tl.load(x_row_ptrs + j * K_WORDS + offs_k[:, None], mask=mask, other=0)  # (BLOCK_K, BLOCK_M)
            acc = dot(planes[j], x, acc)
    return acc


@triton.jit(do_not_specialize=["M"])
def gemm(
    x1_ptr, w1_ptr, scale1_ptr, x2_ptr, w2_ptr, scale2_ptr,
    bias1_ptr, stride_bias1_m, bias2_ptr, stride_bias2_m, residual_ptr, y_ptr, M,
    K1: tl.constexpr, K2: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    N: tl.constexpr, ACTIVATION: tl.constexpr, PACK_FACTOR: tl.constexpr, NUM_PLANES: tl.constexpr,
):  # fmt: skip
    """y = activation(x1 @ w1.T + x2 @ w2.T + bias1 + bias2 + residual); K2 0: without the second product."""
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_n, N - 1)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc = accumulate(acc, x1_ptr, w1_ptr, scale1_ptr, rows, offs_m, M, K1, BITS, GROUP_SIZE, COMPUTE_DTYPE, BLOCK_K)
    if K2 > 0:
        acc = accumulate(acc, x2_ptr, w2_ptr, scale2_ptr, rows, offs_m, M, K2, BITS, GROUP_SIZE, COMPUTE_DTYPE, BLOCK_K)
    offs_n, offs_m = offs_n[:, None], offs_m[None, :].to(tl.int64)
    mask = (offs_n < N) & (offs_m < M)
    y = add_bias_and_residual(
        acc, offs_m * N + offs_n, offs_n, offs_m,
        bias1_ptr, stride_bias1_m, bias2_ptr, stride_bias2_m, residual_ptr, mask,
    )  # fmt: skip
    y_ptrs = y_ptr + offs_m * N + planar_offset(offs_n, N, PACK_FACTOR, NUM_PLANES)
    tl.store(y_ptrs, gelu(y, ACTIVATION), mask=mask)  # (BLOCK_N, BLOCK_M)


@triton.jit(do_not_specialize=["start_n", "N"])
def dequantize(
    w_ptr, scale_ptr, y_ptr, start_n, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (N, K) in natural order = N rows of a weight from row start_n on."""
    PACK_FACTOR: tl.constexpr = 32 // BITS
    K_WORDS: tl.constexpr = K // PACK_FACTOR
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_w = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (offs_n < N)[:, None] & (offs_w < K_WORDS)[None, :]
    rows = (start_n + offs_n)[:, None]
    # (BLOCK_N, BLOCK_K) int32, and a scale for each word
    w = tl.load(w_ptr + rows * K_WORDS + offs_w[None, :], mask=mask, other=0, eviction_policy="evict_first")
    scale_ptrs = scale_ptr + rows * (K // GROUP_SIZE) + (offs_w // (GROUP_SIZE // PACK_FACTOR))[None, :]
    scale = tl.load(scale_ptrs, mask=mask, other=0)
    planes = dequant_planes(w, scale, BITS, y_ptr.dtype.element_ty)
    if BITS == 4:
        even = tl.join(tl.join(planes[0], planes[4]), tl.join(planes[2], planes[6]))
        odd = tl.join(tl.join(planes[1], planes[5]), tl.join(planes[3], planes[7]))
    else:
        even, odd = tl.join(planes[0], planes[2]), tl.join(planes[1], planes[3])
    y = tl.join(even, odd).reshape(BLOCK_N, BLOCK_K * PACK_FACTOR)
    offs_k = tl.program_id(1) * BLOCK_K * PACK_FACTOR + tl.arange(0, BLOCK_K * PACK_FACTOR)
    y_ptrs = y_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
    tl.store(y_ptrs, y, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])
