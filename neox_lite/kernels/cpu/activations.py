"""How activations lie in memory between operations, and the code that writes them. Knows no weight and no kernel.

natural      float32 (tokens, features).
planar       float32 for the exact product. In each unit of 128 elements, plane j holds element j of every 32-bit word of the
             weight's codes.
gemv         int8 codes with a scale per 32 elements, for a few tokens. In each unit of 128, for 4-bit weights the elements of
             even index and then those of odd index (the low and the high nibbles), for 8-bit weights natural order.
gemm         The same codes for many tokens: the 32 bytes of a block for TILE tokens side by side, even before odd.

A code is the nearest integer to x / scale, scale = max |x| / 127 over its block of 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .code import I8, I32, Code, Value, vector

UNIT = 128  # elements that a GEMV kernel takes at a time
BLOCK = 32  # elements that share a scale
TILE = 12  # tokens that lie side by side in the gemm layout
# 1.5 * 2**23: added to a float of small magnitude, it leaves the nearest integer in the low bits.
ROUNDER = 12582912.0
ROUNDER_BITS = 0x4B400000


@dataclass(frozen=True)
class Layout:
    """One of the four layouts, for weights of `bits` bits. offset: stored code - value of the weight's codes."""

    kind: Literal["natural", "planar", "gemv", "gemm"] = "natural"
    bits: int = 0
    offset: int = 0

    @property
    def is_int8(self) -> bool:
        return self.kind in ("gemv", "gemm")

    @property
    def name(self) -> str:
        return f"{self.kind}{self.bits or ''}{f'o{self.offset}' if self.offset else ''}"

    def padded(self, tokens: int, features: int) -> tuple[int, int]:
        """Tokens and features that the memory must have room for."""
        if self.kind == "natural":
            return tokens, features
        if self.kind == "gemm":
            return -(-tokens // TILE) * TILE, features
        return tokens, -(-features // UNIT) * UNIT


NATURAL = Layout()


@dataclass(frozen=True)
class Destination:
    """Where a kernel writes: addresses of values, scales and sums, and features as `Layout.padded` says."""

    values: Value
    scales: Value
    sums: Value
    features: Value


def write_block(code: Code, layout: Layout, out: Destination, token: Value, block: Value, x: Value) -> None:
    """Write elements 32 * block.. of a token, float32 in 32 lanes."""
    if layout.kind == "natural":
        code.store(x, out.values + (token * out.features + block * BLOCK) * 4)
    elif layout.kind == "planar":
        words = 4 if layout.bits == 4 else 8  # of a block
        unit = out.values + (token * out.features + (block >> 2) * UNIT + (block & 3) * words) * 4
        for j in range(BLOCK // words):
            lanes = [BLOCK // words * w + j for w in range(words)]
            code.store(x.shuffle(lanes), unit, j * (UNIT // BLOCK) * words * 4)
    else:
        _write_codes(code, layout, out, token, block, x)


def _write_codes(code: Code, layout: Layout, out: Destination, token: Value, block: Value, x: Value) -> None:
    peak = code.abs(x).reduce_max()
    is_zero = peak < 1e-30
    inverse = is_zero.select(0.0, 127.0 / peak)
    rounded = code.fma(x, inverse.splat(BLOCK), code.constant(ROUNDER, x.type)).bitcast(vector(I32, BLOCK))
    codes, total = rounded.trunc(I8), (rounded - ROUNDER_BITS).reduce_add()
    scale = is_zero.select(0.0, peak * (1 / 127.0))
    if layout.bits == 4:
        even, odd = codes.shuffle(range(0, BLOCK, 2)), codes.shuffle(range(1, BLOCK, 2))
    else:
        even, odd = codes.halves()
    if layout.kind == "gemv":
        unit = out.values + token * out.features + (block >> 2) * UNIT
        step, gap = (16, 64) if layout.bits == 4 else (32, 16)
        first = unit + (block & 3) * step
        index = token * (out.features // BLOCK) + block
    else:
        tile, lane = token // TILE, token % TILE
        index = (tile * (out.features // BLOCK) + block) * TILE + lane
        first, gap = out.values + index * BLOCK, 16
    code.store(even, first)
    code.store(odd, first, gap)
    code.store(scale, out.scales + index * 4)
    if layout.kind == "gemv":
        code.store(total.as_float() * float(layout.offset) * scale, out.sums + index * 4)
    else:
        code.store(total * -layout.offset, out.sums + index * 4)


# Functions of floats, in any number of lanes ----------------------------------------------------------------------------


def exp(code: Code, x: Value) -> Value:
    """e**x for x in [-87, 88] (clamped to it), NaN for NaN; relative error below 2e-7.

    x = n ln 2 + r with |r| <= ln 2 / 2; the polynomial is Cephes' expf's (Moshier).
    """
    x = (x < -87.0).select(-87.0, (x > 88.0).select(88.0, x))
    shifted = code.fma(x, code.constant(1.44269504088896341, x.type), code.constant(ROUNDER, x.type))
    n = shifted - ROUNDER
    r = code.fma(n, code.constant(-0.693359375, x.type), x)
    r = code.fma(n, code.constant(2.12194440e-4, x.type), r)
    p = code.constant(1.9875691500e-4, x.type)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = code.fma(p, r, code.constant(c, x.type))
    p = code.fma(p * r, r, r) + 1.0
    power = (shifted.bitcast(vector(I32, x.lanes)) << 23) + 0x3F800000
    return p * power.bitcast(x.type)


def gelu_erf(code: Code, x: Value) -> Value:
    """x * Phi(x); erfc by Chebyshev fitting (Numerical Recipes, 6.2), relative error below 1.2e-7 before rounding."""
    z = code.abs(x) * 0.70710678118654752
    t = 1.0 / code.fma(z, code.constant(0.5, x.type), code.constant(1.0, x.type))
    p = code.constant(0.17087277, x.type)
    for c in (-0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368):
        p = code.fma(p, t, code.constant(c, x.type))
    power = code.fma(p, t, code.constant(-1.26551223, x.type))
    tail = 0.5 * t * exp(code, code.fma(z * -1.0, z, power))  # Phi(-|x|)
    return x * (x < 0.0).select(tail, 1.0 - tail)


def gelu_tanh(code: Code, x: Value) -> Value:
    """x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x**3): the tanh form of GELU, rewritten."""
    u = 1.5957691216057308 * (x * code.fma(x * x, code.constant(0.044715, x.type), code.constant(1.0, x.type)))
    return x / (exp(code, -1.0 * u) + 1.0)


ACTIVATIONS = {None: lambda code, x: x, "erf": gelu_erf, "tanh": gelu_tanh}
