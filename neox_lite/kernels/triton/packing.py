"""Dequantization of packed codes, and the planar order of the activations that they meet.

A 32-bit word packs PACK_FACTOR codes of one row: 8 of int4, 4 of int8. Weights and scales are read where the checkpoint has
them. Only activations are reordered, by the kernel that computes them, into planes: with NUM_PLANES planes, plane j holds, for
every word, its elements j, j + NUM_PLANES, ... below PACK_FACTOR.

    PACK_FACTOR 1, NUM_PLANES 1     natural order
    NUM_PLANES = PACK_FACTOR        for tensor cores, which take the same element of several words at a time
    NUM_PLANES = PACK_FACTOR / 2    pairs: two elements side by side whose codes come out of a word together, 16 bits apart
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import interpreted

# Triton's interpreter has no inline assembly: there, plain code rounds as the instructions do.
INTERPRETED = tl.constexpr(interpreted())
# float16 activations for half2 products are stored times 2**-HALF_SHIFT, so that no sum of four products with codes (of at most
# 8 in size) overflows.
HALF_SHIFT = 5


@triton.jit
def planar_offset(offs_n, N: tl.constexpr, PACK_FACTOR: tl.constexpr, NUM_PLANES: tl.constexpr):
    """Offsets at which features offs_n of a token lie among its N."""
    if PACK_FACTOR == 1:
        return offs_n
    else:
        word, element = offs_n // PACK_FACTOR, offs_n % PACK_FACTOR
        together: tl.constexpr = PACK_FACTOR // NUM_PLANES
        return ((element % NUM_PLANES) * (N // PACK_FACTOR) + word) * together + element // NUM_PLANES


@triton.jit
def unpack_low(pair, DTYPE: tl.constexpr):
    """The first number of each pair, float32. pair: int32 of 16-bit numbers, int64 of float32 ones."""
    if DTYPE == "float32":
        return (pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    elif DTYPE == "bfloat16":
        return (pair << 16).to(tl.float32, bitcast=True)
    else:
        return (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def unpack_high(pair, DTYPE: tl.constexpr):
    """The second number of each pair, float32."""
    if DTYPE == "float32":
        return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    elif DTYPE == "bfloat16":
        return (pair & -65536).to(tl.float32, bitcast=True)
    else:
        return (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def dequant_code(word, E: tl.constexpr, BITS: tl.constexpr):
    """word int32 -> its code E as float32, exact: the code's bits go into the mantissa of 2**23, which is then subtracted.

    A mantissa has 23 bits, so codes in a word's upper half are read after a shift that several of them share.
    """
    HALF: tl.constexpr = 12 if BITS == 4 else 16
    UPPER: tl.constexpr = (E + 1) * BITS > 23
    AT: tl.constexpr = E * BITS - (HALF if UPPER else 0)
    MASK: tl.constexpr = ((1 << BITS) - 1) << AT
    STEP: tl.constexpr = 1.0 / (1 << AT)
    OFFSET: tl.constexpr = (1 << 23) / (1 << AT) + (1 << (BITS - 1))
    bits = (word >> HALF) if UPPER else word
    if not INTERPRETED:
        # One instruction; from two immediates, the compiler makes two.
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


# half2: two float16 numbers in 32 bits, for one or a few tokens -------------------------------------------------------


@triton.jit
def dequant_int4_half2(word):
    """word int32 -> codes (0, 4), (1, 5), (2, 6), (3, 7) as half2 in int32: or-ed into the mantissa of 1024 or 64."""
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
            _pack_half2(dequant_code(word, 0, 4), dequant_code(word, 4, 4)),
            _pack_half2(dequant_code(word, 1, 4), dequant_code(word, 5, 4)),
            _pack_half2(dequant_code(word, 2, 4), dequant_code(word, 6, 4)),
            _pack_half2(dequant_code(word, 3, 4), dequant_code(word, 7, 4)),
        )


@triton.jit
def dot_half2(a, b, c, d, x0, x1, x2, x3):
    """a * x0 + b * x1 + c * x2 + d * x3 of half2, then the sum of both halves in float32."""
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
        first = unpack_low(a, "float16").to(tl.float16) * unpack_low(x0, "float16").to(tl.float16)
        first += unpack_low(b, "float16").to(tl.float16) * unpack_low(x1, "float16").to(tl.float16)
        first += unpack_low(c, "float16").to(tl.float16) * unpack_low(x2, "float16").to(tl.float16)
        first += unpack_low(d, "float16").to(tl.float16) * unpack_low(x3, "float16").to(tl.float16)
        second = unpack_high(a, "float16").to(tl.float16) * unpack_high(x0, "float16").to(tl.float16)
        second += unpack_high(b, "float16").to(tl.float16) * unpack_high(x1, "float16").to(tl.float16)
        second += unpack_high(c, "float16").to(tl.float16) * unpack_high(x2, "float16").to(tl.float16)
        second += unpack_high(d, "float16").to(tl.float16) * unpack_high(x3, "float16").to(tl.float16)
        return first.to(tl.float32) + second.to(tl.float32)


@triton.jit
def _pack_half2(first, second):
    """Two numbers as one half2, int32."""
    one = first.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return one | (second.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


# Planes, for tensor cores ---------------------------------------------------------------------------------------------


@triton.jit
def dequant_planes(word, scale, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """word int32 -> code * scale for each of its codes, rounded once to DTYPE: a tuple of PACK_FACTOR tensors."""
    if not INTERPRETED and DTYPE == tl.float16 and scale.dtype == tl.float16:
        if BITS == 4:
            return _dequant_int4_float16(word, scale)
        else:
            return _dequant_int8_float16(word, scale)
    else:
        scale = scale.to(tl.float32)
        planes = ()
        for j in tl.static_range(32 // BITS):
            planes = planes + ((dequant_code(word, j, BITS) * scale).to(DTYPE),)
        return planes


@triton.jit
def _dequant_int4_float16(word, scale):
    """Codes of two words at a time, as in dequant_int4_half2: their lower and upper halves side by side, then scaled."""
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
def _dequant_int8_float16(word, scale):
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
def dot(a, b, acc):
    """acc + a @ b, summed in float32."""
    if INTERPRETED:
        # The interpreter has no products of bfloat16; as float32 they are the same numbers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")
