"""Instruction sets: which this machine has, and for each the vector width and how products of bytes are summed.

avx512_vnni and avx_vnni sum four products of an unsigned and a signed byte into each 32-bit lane (`vpdpbusd`); avx2 does it in
two steps (`vpmaddubsw`, `vpmaddwd`); neon_dot has signed bytes on both sides (`sdot`); portable is LLVM IR without any of them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm
from llvmlite import ir

from ...errors import ArgumentError
from .code import F16, F32, I8, I16, I32, Code, Value, vector

Pair = tuple[Value, Value]  # codes and activations, int32 lanes of four bytes each


@dataclass(frozen=True)
class Target:
    """A processor to compile for and the path of `PATHS` it takes."""

    path: str
    triple: str
    cpu: str
    features: str

    @property
    def width(self) -> int:
        """32-bit lanes of a vector."""
        return {"avx512_vnni": 16, "avx_vnni": 8, "avx2": 8}.get(self.path, 4)

    @property
    def registers(self) -> int:
        return 32 if self.path in ("avx512_vnni", "neon_dot") else 16

    @property
    def has_half(self) -> bool:
        """Whether the processor converts between float16 and float32; without, LLVM would call a missing routine."""
        return self.path != "portable"

    def offset(self, bits: int) -> int:
        """What stored codes are above the values they mean, as `dot` takes them."""
        return 0 if bits == 8 and self.signed_codes else 1 << (bits - 1)

    @property
    def signed_codes(self) -> bool:
        """Whether `dot` wants 8-bit codes as signed bytes."""
        return self.path in ("avx2", "neon_dot", "portable")

    def dot(self, code: Code, start: Value, pairs: Sequence[Pair], bits: int) -> Value:
        """start + the sum over at most 8 pairs of their products, four bytes into each int32 lane.

        4-bit codes are bytes 0 to 15. 8-bit ones are unsigned bytes, or signed ones if `signed_codes`.
        """
        if self.path in ("avx512_vnni", "avx_vnni"):
            name = f"llvm.x86.avx512.vpdpbusd.{32 * self.width}"
            bytes_ = vector(I8, 4 * self.width)
            sums = [start] if self.registers > 16 or len(pairs) < 4 else [start, code.constant(0, start.type)]
            for i, (codes, x) in enumerate(pairs):  # with few tokens at a time, two chains keep the unit busy
                held = sums[i % len(sums)]
                sums[i % len(sums)] = code.intrinsic(name, held.type, [held, codes.bitcast(bytes_), x.bitcast(bytes_)])
            return sums[0] if len(sums) == 1 else sums[0] + sums[1]
        if self.path == "avx2":
            return start + (_avx2_int4(code, pairs) if bits == 4 else _avx2_int8(code, pairs))
        if self.path == "neon_dot":
            bytes_ = vector(I8, 16)
            for codes, x in pairs:
                start = code.intrinsic(
                    "llvm.aarch64.neon.sdot.v4i32.v16i8", start.type, [start, codes.bitcast(bytes_), x.bitcast(bytes_)]
                )
            return start
        for codes, x in pairs:
            start = start + _portable(codes, x)
        return start


def _avx2_int4(code: Code, pairs: Sequence[Pair]) -> Value:
    """Codes of 15 times activations of 127, two a lane, eight vectors: 30,480 at most, so 16-bit sums are safe."""
    assert len(pairs) <= 8
    sums = None
    for codes, x in pairs:
        products = code.intrinsic("llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), [_bytes(codes), _bytes(x)])
        sums = products if sums is None else sums + products
    assert sums is not None
    return _pair_sums(code, sums)


def _avx2_int8(code: Code, pairs: Sequence[Pair]) -> Value:
    """|code| times (activation with the code's sign): 128 * 127 twice is 32,512, so nothing saturates."""
    total = None
    for codes, x in pairs:
        signed = _bytes(codes)
        size = code.intrinsic("llvm.abs.v32i8", signed.type, [signed, code.constant(0, ir.IntType(1))])
        turned = code.intrinsic("llvm.x86.avx2.psign.b", signed.type, [_bytes(x), signed])
        products = code.intrinsic("llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), [size, turned])
        sums = _pair_sums(code, products)
        total = sums if total is None else total + sums
    assert total is not None
    return total


def _bytes(words: Value) -> Value:
    return words.bitcast(vector(I8, 4 * words.lanes))


def _pair_sums(code: Code, halves: Value) -> Value:
    ones = code.constant(1, halves.type)
    return code.intrinsic("llvm.x86.avx2.pmadd.wd", vector(I32, halves.lanes // 2), [halves, ones])


def _portable(codes: Value, x: Value) -> Value:
    """Written the way in which LLVM knows `pmaddwd` and its like."""
    a, b = (_bytes(v).extend(I16) for v in (codes, x))
    even, odd = (
        a.shuffle(range(start, a.lanes, 2)).extend(I32) * b.shuffle(range(start, a.lanes, 2)).extend(I32)
        for start in (0, 1)
    )
    pairs = even + odd
    return pairs.shuffle(range(0, pairs.lanes, 2)) + pairs.shuffle(range(1, pairs.lanes, 2))


# Floats of 16 bits ----------------------------------------------------------------------------------------------------


def to_float(target: Target, value: Value, dtype: str) -> Value:
    """float32 of a loaded value of a dtype: integers of the same size hold its bits."""
    if dtype == "float32":
        return value
    if dtype == "float16" and target.has_half:
        return value.bitcast(vector(F16, value.lanes)).extend(F32)
    wide = value.zero_extend(I32)
    floats = vector(F32, value.lanes)
    if dtype == "bfloat16":
        return (wide << 16).bitcast(floats)
    size, sign = (wide & 0x7FFF) << 13, (wide & 0x8000) << 16
    finite = (size.bitcast(floats) * 2.0**112).bitcast(wide.type)  # the exponent's bias is 112 less in float16
    return ((size < 0x0F800000).select(finite, size | 0x7F800000) | sign).bitcast(floats)


def from_float(target: Target, value: Value, dtype: str) -> Value:
    """The bits of float32 values in a dtype, rounded to nearest even."""
    if dtype == "float32":
        return value
    if dtype == "float16" and target.has_half:
        return value.trunc(F16).bitcast(vector(I16, value.lanes))
    raw = value.bitcast(vector(I32, value.lanes))
    if dtype == "bfloat16":
        rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
        is_nan = (raw & 0x7FFFFFFF) > 0x7F800000
        return is_nan.select((raw >> 16) | 0x40, rounded).trunc(I16)
    # Adding a power of two that puts float16's last bit at float32's last place lets the hardware round.
    bias = (raw & 0x7F800000).max(0x38800000) + 0x07800000
    scaled = value.code.abs(value) * 2.0**112 * 2.0**-110  # too large a value becomes infinite on the way
    base = (bias.bitcast(value.type) + scaled).bitcast(raw.type)
    finite = ((base >> 13) & 0x7C00) + (base & 0xFFF)
    is_nan = (raw & 0x7FFFFFFF) > 0x7F800000
    return (is_nan.select(0x7E00, finite) | ((raw >> 16) & 0x8000)).trunc(I16)


# Choosing -------------------------------------------------------------------------------------------------------------

# Path -> the features it needs, as LLVM calls them, and the processor that stands for it when it is forced.
X86 = {
    "avx512_vnni": ("avx512f avx512bw avx512vl avx512vnni avx2 fma f16c", "icelake-server"),
    "avx_vnni": ("avxvnni avx2 fma f16c", "alderlake"),
    "avx2": ("avx2 fma f16c", "haswell"),
}
PATHS = (*X86, "neon_dot", "portable")
VARIABLE = "NEOX_LITE_CPU"  # forces a path


@cache
def host() -> Target:
    """This machine's processor and its fastest path, or the one that NEOX_LITE_CPU names."""
    return for_path(forced() or fastest())


def forced() -> str | None:
    """The path that NEOX_LITE_CPU names."""
    return os.environ.get(VARIABLE) or None


def for_path(path: str) -> Target:
    """A path on this machine. Raises ArgumentError if the machine lacks its instructions."""
    if (reason := why_not(path)) is not None:
        raise ArgumentError(f"{VARIABLE}={path}: {reason}")
    if path == fastest():
        return Target(path, llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
    return generic(path, llvm.get_process_triple())


def generic(path: str, triple: str | None = None) -> Target:
    """A path on the plainest processor that has it, whatever this machine is."""
    if path == "neon_dot":
        return Target(path, triple or "aarch64-unknown-linux-gnu", "generic", "+neon,+dotprod,+fullfp16")
    if path in X86:
        features, cpu = X86[path]
        return Target(path, triple or "x86_64-unknown-linux-gnu", cpu, ",".join(f"+{f}" for f in features.split()))
    return Target(
        path, triple or "x86_64-unknown-linux-gnu", "x86-64" if triple is None or "86" in triple else "generic", ""
    )


def why_not(path: str) -> str | None:
    """None if this machine runs the path, else what it lacks."""
    if path not in PATHS:
        return f"expected one of {', '.join(PATHS)}"
    if path == "portable":
        return None
    machine, features = platform.machine().lower(), llvm.get_host_cpu_features()
    if path == "neon_dot":
        if machine not in ("aarch64", "arm64"):
            return f"needs an Arm processor, this is {machine}"
        return None if features.get("dotprod") else "the processor lacks dotprod"
    if machine not in ("x86_64", "amd64"):
        return f"needs an x86 processor, this is {machine}"
    missing = [name for name in X86[path][0].split() if not features.get(name)]
    return f"the processor lacks {', '.join(missing)}" if missing else None


@cache
def fastest() -> str:
    return next(path for path in PATHS if why_not(path) is None)
