"""Codes out of words, and where activations lie for them: what every kernel with quantized weights shares.

A word of 32 bits holds 8 (int4) or 4 (int8) codes of one row. Weights and scales are read where the checkpoint has them; only
activations are moved, by whatever kernel makes them. They lie in planes: with P planes for words of W codes, plane j holds, for
every word, its elements j, j + P, ... below W. One plane of one is natural order; W planes feed tensor cores, which take a code
of several words at a time; W / 2 planes hold *pairs*, two elements whose codes come out of a word together, 16 bits apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import interpreted

INTERPRETED = tl.constexpr(interpreted())  # without inline assembly, by twins that round alike
SHIFT = 5  # activations as halves lie times 2**-SHIFT, so that no sum of four codes (at most 8) times them can overflow


@triton.jit
def place(feature, features: tl.constexpr, W: tl.constexpr, PLANES: tl.constexpr):
    """Where a feature of a token lies among its `features`."""
    if W == 1:
        return feature
    else:
        word, element = feature // W, feature % W
        return ((element % PLANES) * (features // W) + word) * (W // PLANES) + element // PLANES


@triton.jit
def low(pair, DTYPE: tl.constexpr):
    """The first of a pair, float32."""
    if DTYPE == "float32":
        return (pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    elif DTYPE == "bfloat16":
        return (pair << 16).to(tl.float32, bitcast=True)
    else:
        return (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high(pair, DTYPE: tl.constexpr):
    """The second of a pair, float32."""
    if DTYPE == "float32":
        return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    elif DTYPE == "bfloat16":
        return (pair & -65536).to(tl.float32, bitcast=True)
    else:
        return (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def code(word, E: tl.constexpr, BITS: tl.constexpr):
    """Code E of each word as float32, exact: its bits in the mantissa of 2**23, which is then taken off.

    A mantissa has 23 bits, so codes in a word's upper half are read after a shift that several of them share.
    """
    HALF: tl.constexpr = 12 if BITS == 4 else 16
    UPPER: tl.constexpr = (E + 1) * BITS > 23
    AT: tl.constexpr = E * BITS - (HALF if UPPER else 0)
    MASK: tl.constexpr = ((1 << BITS) - 1) << AT
    STEP: tl.constexpr = 1.0 / (1 << AT)
    OFFSET: tl.constexpr = (1 << 23) / (1 << AT) + (1 << (BITS - 1))
    bits = (word >> HALF) if UPPER else word
    if not INTERPRETED:  # one instruction, where the compiler makes two of two immediates
        big = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=f,r,r,r",
            [bits, MASK, 0x4B000000],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        big = ((bits & MASK) | 0x4B000000).to(tl.float32, bitcast=True)
    return big * STEP - OFFSET


# Pairs of halves, for one or a few tokens -----------------------------------------------------------------------------


@triton.jit
def halves_of(word):
    """The codes of int4 words as pairs of halves (0, 4), (1, 5), (2, 6), (3, 7): or-ed into the mantissa of 1024 or 64."""
    if not INTERPRETED:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 above;
            shr.u32 above, $4, 8;
            lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xEA;
            lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xEA;
            lop3.b32 $2, above, 0x000f000f, 0x64006400, 0xEA;
            lop3.b32 $3, above, 0x00f000f0, 0x64006400, 0xEA;
            sub.f16x2 $0, $0, $5;
            fma.rn.f16x2 $1, $1, $6, $7;
            sub.f16x2 $2, $2, $5;
            fma.rn.f16x2 $3, $3, $6, $7;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r,r",
            [word, 0x64086408, 0x2C002C00, -0x2B7F2B80],  # 1032, 1/16 and -72, twice each
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return (
            _pair(code(word, 0, 4), code(word, 4, 4)),
            _pair(code(word, 1, 4), code(word, 5, 4)),
            _pair(code(word, 2, 4), code(word, 6, 4)),
            _pair(code(word, 3, 4), code(word, 7, 4)),
        )


@triton.jit
def dot_of_halves(a, b, c, d, x0, x1, x2, x3):
    """The sum of eight products of pairs of halves, formed in halves but for the last addition: float32."""
    if not INTERPRETED:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 sum;
            .reg .b16 first, second;
            .reg .f32 one, two;
            mul.rn.f16x2 sum, $1, $5;
            fma.rn.f16x2 sum, $2, $6, sum;
            fma.rn.f16x2 sum, $3, $7, sum;
            fma.rn.f16x2 sum, $4, $8, sum;
            mov.b32 {first, second}, sum;
            cvt.f32.f16 one, first;
            cvt.f32.f16 two, second;
            add.f32 $0, one, two;
            }
            """,
            "=f,r,r,r,r,r,r,r,r",
            [a, b, c, d, x0, x1, x2, x3],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        first = low(a, "float16").to(tl.float16) * low(x0, "float16").to(tl.float16)
        first += low(b, "float16").to(tl.float16) * low(x1, "float16").to(tl.float16)
        first += low(c, "float16").to(tl.float16) * low(x2, "float16").to(tl.float16)
        first += low(d, "float16").to(tl.float16) * low(x3, "float16").to(tl.float16)
        second = high(a, "float16").to(tl.float16) * high(x0, "float16").to(tl.float16)
        second += high(b, "float16").to(tl.float16) * high(x1, "float16").to(tl.float16)
        second += high(c, "float16").to(tl.float16) * high(x2, "float16").to(tl.float16)
        second += high(d, "float16").to(tl.float16) * high(x3, "float16").to(tl.float16)
        return first.to(tl.float32) + second.to(tl.float32)


@triton.jit
def _pair(first, second):
    """Two numbers as halves in one word."""
    one = first.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return one | (second.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


# Planes, for tensor cores ---------------------------------------------------------------------------------------------


@triton.jit
def planes_of(word, scale, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """code * scale for every code of the words, in DTYPE, rounded once: a tuple, as many as a word has codes."""
    if not INTERPRETED and DTYPE == tl.float16 and scale.dtype == tl.float16:
        if BITS == 4:
            return _int4_planes(word, scale)
        else:
            return _int8_planes(word, scale)
    else:
        scale = scale.to(tl.float32)
        planes = ()
        for j in tl.static_range(32 // BITS):
            planes = planes + ((code(word, j, BITS) * scale).to(DTYPE),)
        return planes


@triton.jit
def _int4_planes(word, scale):
    """Codes of two words at a time, as in halves_of: their lower and upper halves side by side, then scaled."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 lower, upper, above, one, sixteenth, sixteen;
        mov.b32 one, 0x64086408;
        mov.b32 sixteenth, 0x2C002C00;
        mov.b32 sixteen, 0xD480D480;
        prmt.b32 lower, $8, $9, 0x5410;
        prmt.b32 upper, $8, $9, 0x7632;
        shr.u32 above, lower, 8;
        lop3.b32 $0, lower, 0x000f000f, 0x64006400, 0xEA;
        lop3.b32 $1, lower, 0x00f000f0, 0x64006400, 0xEA;
        lop3.b32 $2, above, 0x000f000f, 0x64006400, 0xEA;
        lop3.b32 $3, above, 0x00f000f0, 0x64006400, 0xEA;
        shr.u32 above, upper, 8;
        lop3.b32 $4, upper, 0x000f000f, 0x64006400, 0xEA;
        lop3.b32 $5, upper, 0x00f000f0, 0x64006400, 0xEA;
        lop3.b32 $6, above, 0x000f000f, 0x64006400, 0xEA;
        lop3.b32 $7, above, 0x00f000f0, 0x64006400, 0xEA;
        sub.f16x2 $0, $0, one;
        fma.rn.f16x2 $1, $1, sixteenth, sixteen;
        sub.f16x2 $2, $2, one;
        fma.rn.f16x2 $3, $3, sixteenth, sixteen;
        sub.f16x2 $4, $4, one;
        fma.rn.f16x2 $5, $5, sixteenth, sixteen;
        sub.f16x2 $6, $6, one;
        fma.rn.f16x2 $7, $7, sixteenth, sixteen;
        mul.rn.f16x2 $0, $0, $10;
        mul.rn.f16x2 $1, $1, $10;
        mul.rn.f16x2 $2, $2, $10;
        mul.rn.f16x2 $3, $3, $10;
        mul.rn.f16x2 $4, $4, $10;
        mul.rn.f16x2 $5, $5, $10;
        mul.rn.f16x2 $6, $6, $10;
        mul.rn.f16x2 $7, $7, $10;
        }
        """,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
        [word, scale],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _int8_planes(word, scale):
    """The same for bytes: or-ed into the mantissa of 1024, and 1024 + 128 taken off."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 lower, upper, offset;
        mov.b32 offset, 0x64806480;
        prmt.b32 lower, $4, $5, 0x5410;
        prmt.b32 upper, $4, $5, 0x7632;
        lop3.b32 $0, lower, 0x00ff00ff, 0x64006400, 0xEA;
        lop3.b32 $2, upper, 0x00ff00ff, 0x64006400, 0xEA;
        shr.u32 lower, lower, 8;
        shr.u32 upper, upper, 8;
        lop3.b32 $1, lower, 0x00ff00ff, 0x64006400, 0xEA;
        lop3.b32 $3, upper, 0x00ff00ff, 0x64006400, 0xEA;
        sub.f16x2 $0, $0, offset;
        sub.f16x2 $1, $1, offset;
        sub.f16x2 $2, $2, offset;
        sub.f16x2 $3, $3, offset;
        mul.rn.f16x2 $0, $0, $6;
        mul.rn.f16x2 $1, $1, $6;
        mul.rn.f16x2 $2, $2, $6;
        mul.rn.f16x2 $3, $3, $6;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r",
        [word, scale],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def dot(a, b, total):
    """total + a @ b, summed in float32. The interpreter has no products of bfloat16; as float32 they are the same numbers."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")
