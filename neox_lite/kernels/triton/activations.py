"""What happens to activations between products: GELU, LayerNorm, and the end of products that torch made."""

from __future__ import annotations

import triton
import triton.language as tl

from .packing import place


@triton.jit
def gelu(x, KIND: tl.constexpr):
    """x (float32) -> GELU by the error function ("erf"), by tanh ("tanh"), or x itself (None)."""
    if KIND == "erf":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif KIND == "tanh":  # 0.5 (1 + tanh u) = 1 / (1 + exp -2u)
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        return x


@triton.jit
def write_norms(
    x_ptr, gain1_ptr, bias1_ptr, eps1, y1_ptr, gain2_ptr, bias2_ptr, eps2, y2_ptr,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr,
    W1: tl.constexpr, PLANES1: tl.constexpr, SCALE1: tl.constexpr,
    W2: tl.constexpr, PLANES2: tl.constexpr, SCALE2: tl.constexpr,
):  # fmt: skip
    """One or two LayerNorms of a token, each placed for the weight that reads it; gain2_ptr None: only one."""
    start = tl.program_id(0).to(tl.int64) * FEATURES
    feature = tl.arange(0, BLOCK)
    inside = feature < FEATURES
    x = tl.load(x_ptr + start + feature, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(x, axis=0) / FEATURES
    away = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(away * away, axis=0) / FEATURES
    _write_norm(away, variance, gain1_ptr, bias1_ptr, eps1, y1_ptr + start, feature, FEATURES, W1, PLANES1, SCALE1)
    if gain2_ptr is not None:
        _write_norm(away, variance, gain2_ptr, bias2_ptr, eps2, y2_ptr + start, feature, FEATURES, W2, PLANES2, SCALE2)


@triton.jit
def _write_norm(
    away, variance, gain_ptr, bias_ptr, eps, y_ptr, feature,
    FEATURES: tl.constexpr, W: tl.constexpr, PLANES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    inside = feature < FEATURES
    gain = tl.load(gain_ptr + feature, mask=inside, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + feature, mask=inside, other=0).to(tl.float32)
    y = (away / tl.sqrt(variance + eps) * gain + bias) * SCALE
    tl.store(y_ptr + place(feature, FEATURES, W, PLANES), y, mask=inside)


@triton.jit
def finish(
    p1_ptr, p2_ptr, a_ptr, a_step, b_ptr, b_step, x_ptr, y_ptr,
    N: tl.constexpr, BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr, W: tl.constexpr, PLANES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """y = activation(p1 + p2 + a + b + x) of a token, placed for the weight that reads it; all but p1 may be None."""
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < N
    y = tl.load(p1_ptr + token * N + feature, mask=inside, other=0).to(tl.float32)
    if p2_ptr is not None:
        y += tl.load(p2_ptr + token * N + feature, mask=inside, other=0).to(tl.float32)
    y = add_rest(y, token * N + feature, feature, token, a_ptr, a_step, b_ptr, b_step, x_ptr, inside)
    tl.store(y_ptr + token * N + place(feature, N, W, PLANES), gelu(y, ACTIVATION) * SCALE, mask=inside)


@triton.jit
def add_rest(y, at, feature, token, a_ptr, a_step, b_ptr, b_step, x_ptr, inside):
    """y + a + b + x, as far as they are there: x at `at`, addends at token * step + feature."""
    if a_ptr is not None:
        y += tl.load(a_ptr + token * a_step + feature, mask=inside, other=0).to(tl.float32)
    if b_ptr is not None:
        y += tl.load(b_ptr + token * b_step + feature, mask=inside, other=0).to(tl.float32)
    if x_ptr is not None:
        y += tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
    return y
