"""What happens to activations between products: GELU, LayerNorm, and the epilogue of products that torch computed."""

from __future__ import annotations

import triton
import triton.language as tl

from .packing import planar_offset


@triton.jit
def gelu(x, ACTIVATION: tl.constexpr):
    """x (float32) -> GELU by the error function ("erf"), by tanh ("tanh"), or x itself (None)."""
    if ACTIVATION == "erf":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "tanh":
        # 0.5 (1 + tanh u) = 1 / (1 + exp -2u)
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        return x


@triton.jit
def layer_norms(
    x_ptr, gain1_ptr, bias1_ptr, eps1, y1_ptr, gain2_ptr, bias2_ptr, eps2, y2_ptr,
    N: tl.constexpr, BLOCK_N: tl.constexpr,
    PACK_FACTOR1: tl.constexpr, NUM_PLANES1: tl.constexpr, SCALE1: tl.constexpr,
    PACK_FACTOR2: tl.constexpr, NUM_PLANES2: tl.constexpr, SCALE2: tl.constexpr,
):  # fmt: skip
    """One or two LayerNorms of a token, each in the order in which its next weight reads it; gain2_ptr None: one."""
    row_start = tl.program_id(0).to(tl.int64) * N
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    x = tl.load(x_ptr + row_start + offs_n, mask=mask, other=0).to(tl.float32)  # (BLOCK_N,)
    mean = tl.sum(x, axis=0) / N
    centred = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / N
    _store_norm(
        centred, variance, gain1_ptr, bias1_ptr, eps1, y1_ptr + row_start, offs_n, N, PACK_FACTOR1, NUM_PLANES1, SCALE1
    )
    if gain2_ptr is not None:
        _store_norm(
            centred, variance, gain2_ptr, bias2_ptr, eps2, y2_ptr + row_start, offs_n, N, PACK_FACTOR2, NUM_PLANES2, SCALE2
        )  # fmt: skip


@triton.jit
def _store_norm(
    centred, variance, gain_ptr, bias_ptr, eps, y_ptr, offs_n,
    N: tl.constexpr, PACK_FACTOR: tl.constexpr, NUM_PLANES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    mask = offs_n < N
    gain = tl.load(gain_ptr + offs_n, mask=mask, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_n, mask=mask, other=0).to(tl.float32)
    y = (centred / tl.sqrt(variance + eps) * gain + bias) * SCALE
    tl.store(y_ptr + planar_offset(offs_n, N, PACK_FACTOR, NUM_PLANES), y, mask=mask)


@triton.jit
def epilogue(
    product1_ptr, product2_ptr, bias1_ptr, stride_bias1_m, bias2_ptr, stride_bias2_m, residual_ptr, y_ptr,
    N: tl.constexpr, BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr, PACK_FACTOR: tl.constexpr, NUM_PLANES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """y = activation(product1 + product2 + bias1 + bias2 + residual) of a token; all but product1 may be None.

    y is in the order in which the next weight reads it.
    """
    m = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    y = tl.load(product1_ptr + m * N + offs_n, mask=mask, other=0).to(tl.float32)  # (BLOCK_N,)
    if product2_ptr is not None:
        y += tl.load(product2_ptr + m * N + offs_n, mask=mask, other=0).to(tl.float32)
    y = add_bias_and_residual(
        y, m * N + offs_n, offs_n, m, bias1_ptr, stride_bias1_m, bias2_ptr, stride_bias2_m, residual_ptr, mask
    )  # fmt: skip
    tl.store(y_ptr + m * N + planar_offset(offs_n, N, PACK_FACTOR, NUM_PLANES), gelu(y, ACTIVATION) * SCALE, mask=mask)


@triton.jit
def add_bias_and_residual(
    y, offs, offs_n, offs_m, bias1_ptr, stride_bias1_m, bias2_ptr, stride_bias2_m, residual_ptr, mask
):  # fmt: skip
    """y + bias1 + bias2 + residual; each may be None. A bias is (N,) with a stride of 0, or (M, N); residual is at `offs`."""
    if bias1_ptr is not None:
        y += tl.load(bias1_ptr + offs_m * stride_bias1_m + offs_n, mask=mask, other=0).to(tl.float32)
    if bias2_ptr is not None:
        y += tl.load(bias2_ptr + offs_m * stride_bias2_m + offs_n, mask=mask, other=0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offs, mask=mask, other=0).to(tl.float32)
    return y
