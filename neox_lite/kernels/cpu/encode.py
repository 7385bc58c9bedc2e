"""Quantizing on the CPU: rows of weights to int4 or int8 codes and scales in one pass. Knows no checkpoint and no thread.

formats/group_int.py is the truth that it equals bit for bit: the same operations in the same order, no fused products.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from llvmlite import ir
from torch import Tensor

from ...formats.group_int import GroupInt, search_factors
from ...units import dtype_name
from .activations import ROUNDER
from .code import F32, I8, I32, I64, Code, Value, Variable, vector
from .compile import compiled
from .linear import STORAGE_TYPES, BuildKernel
from .target import Target, from_float, host, to_float

INFINITE = 0x7F800000  # the least bits of a float32 that is not finite


def why_not(rows: Tensor) -> str | None:
    """None where `encode` takes these rows, else the reason."""
    if rows.device.type != "cpu":
        return f"runs on the CPU only, the rows are on {rows.device.type}"
    if dtype_name(rows.dtype) not in STORAGE_TYPES:
        return f"reads {', '.join(STORAGE_TYPES)}, the rows are {dtype_name(rows.dtype)}"
    return None


def encode(format: GroupInt, rows: Tensor, dtype: torch.dtype, method: str) -> dict[str, Tensor]:
    """What format.encode gives, errors too; rows (n, in) that `why_not` has nothing against. Lets other threads run."""
    if format.why_not((rows.shape[0], rows.shape[1])) is None and method in format.methods:
        specs = format.specs((rows.shape[0], rows.shape[1]), dtype)
        packed, scales = (torch.empty(specs[key][1], dtype=specs[key][0]) for key in ("weight_packed", "weight_scale"))
        kernel = _kernel(format, dtype_name(rows.dtype), dtype_name(dtype), method, host())
        factors = _factors(format.bits)
        rows = rows.contiguous()
        tensors = (rows, packed, scales, factors)
        if kernel(*(tensor.data_ptr() for tensor in tensors), scales.numel(), len(factors)) == 0:
            return {"weight_packed": packed, "weight_scale": scales}
    return format.encode(rows, dtype, method)  # to say what is wrong


@cache
def _factors(bits: int) -> Tensor:
    return search_factors(bits)


@cache
def _kernel(format: GroupInt, source: str, stored: str, method: str, target: Target) -> Callable[..., int]:
    address = compiled(*write_encode(target, format, source, stored, method), target)
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 6)(address)


def write_encode(target: Target, format: GroupInt, source: str, stored: str, method: str) -> tuple[str, BuildKernel]:
    """kernel(rows, packed, scales, factors, groups, number of factors) -> 0, or not if a value or a scale is not finite.

    source, stored: dtypes of rows and scales.
    """
    name = f"encode_{format.name}_g{format.group_size}_{source}_{stored}_{method}"

    def build(module: ir.Module) -> None:
        code = Code(module, name, 6)
        rows, packed, scales, factors, groups, count = code.arguments
        size = format.group_size
        bad = code.variable(code.constant(0))
        with code.for_range(0, groups) as i:
            raw = code.load(vector(STORAGE_TYPES[source], size), rows + i * (size * (4 if source == "float32" else 2)))
            group = _Group(code, target, format.bits, stored, to_float(target, raw, source), bad)
            scale = group.mse(factors, count) if method == "mse" else group.rtn()
            codes = group.codes(scale) + (ROUNDER + (1 << (format.bits - 1)))
            held = codes.bitcast(vector(I32, size)).trunc(I8)
            if format.bits == 4:
                held = held.shuffle(range(0, size, 2)) | (held.shuffle(range(1, size, 2)) << 4)
            code.store(held, packed + i * (size * format.bits // 8))
            code.store(from_float(target, scale, stored), scales + i * (4 if stored == "float32" else 2))
        code.ret(bad.value)

    return name, build


class _Group:
    """The arithmetic of one group. Scales are float32 values that the stored dtype holds."""

    def __init__(self, code: Code, target: Target, bits: int, stored: str, values: Value, bad: Variable) -> None:
        """bad: becomes other than 0 where a value or a scale is not finite."""
        self.code, self.target, self.top, self.dtype = code, target, 1 << (bits - 1), stored
        self.values, self.bad = values, bad

    def rtn(self) -> Value:
        largest = _reduced(self._size(self.values), Value.max)  # as integers, sizes have the order of the floats
        self._note(largest)
        size = largest.bitcast(F32)
        peak = _reduced(self.values, Value.max).equals(size).select(size, size * -1.0)
        return self._stored(peak / float(-self.top))

    def mse(self, factors: Value, count: Value) -> Value:
        code, first = self.code, self.rtn()
        units = self.values / first.splat(self.values.lanes)
        best_gain, best = code.variable(code.constant(-1.0, F32)), code.variable(code.constant(1.0, F32))
        with code.for_range(0, count) as k:
            factor = code.load(F32, factors + k * 4).splat(units.lanes)
            nearest = _rounded(units * factor, -self.top, self.top)
            signed = ((1.0, nearest.min(self.top - 1.0)), (-1.0, nearest.max(1.0 - self.top)))
            sums = _totals([each for _, q in signed for each in (units * q, q * q)])
            for (sign, _), dot, square in zip(signed, sums[0::2], sums[1::2], strict=True):
                gain = dot * dot / square
                better = gain > best_gain.value
                best.value = better.select(dot / square * sign, best.value)
                best_gain.value = better.select(gain, best_gain.value)
        candidate = self._stored(best.value * first)
        q = self.codes(candidate)
        square = (q * q).reduce_add()
        refined = self._stored((square > 0.0).select((self.values * q).reduce_add() / square, square))
        chosen, least = first, self._error(first)
        for scale in (candidate, refined):
            error = self._error(scale)
            better = error < least
            chosen, least = better.select(scale, chosen), better.select(error, least)
        return chosen

    def codes(self, scale: Value) -> Value:
        """Nearest codes, as float32."""
        return _rounded(self.values / scale.splat(self.values.lanes), -self.top, self.top - 1)

    def _error(self, scale: Value) -> Value:
        left = self.values - self.codes(scale) * scale.splat(self.values.lanes)
        return (left * left).reduce_add()

    def _stored(self, scale: Value) -> Value:
        """The scale as it will be read back; zero becomes 1."""
        stored = to_float(self.target, from_float(self.target, scale, self.dtype), self.dtype)
        self._note(self._size(stored))
        return stored.equals(0.0).select(1.0, stored)

    def _size(self, values: Value) -> Value:
        return values.bitcast(vector(I32, values.lanes)) & 0x7FFFFFFF

    def _note(self, size: Value) -> None:
        self.bad.value = self.bad.value | (size >= INFINITE).zero_extend(I64)


def _rounded(values: Value, low: int, high: int) -> Value:
    """The nearest integers, of halves the even ones, within bounds."""
    return values.max(float(low)).min(float(high)) + ROUNDER - ROUNDER


def _reduced(values: Value, pick: Callable[[Value, Value], Value]) -> Value:
    """One lane out of all, by halves."""
    while values.lanes > 2:
        values = pick(*values.halves())
    return pick(values.lane(0), values.lane(1))


def _totals(values: list[Value]) -> list[Value]:
    """What `reduce_add` gives of four vectors, with half of the additions: once they are short they share one."""
    while values[0].lanes > 4:
        values = [low + high for low, high in (value.halves() for value in values)]
    ab, cd = (a.shuffle(range(8), b) for a, b in (values[:2], values[2:]))
    twos = ab.shuffle((0, 1, 4, 5, 8, 9, 12, 13), cd) + ab.shuffle((2, 3, 6, 7, 10, 11, 14, 15), cd)
    ones = twos.shuffle((0, 2, 4, 6)) + twos.shuffle((1, 3, 5, 7))
    return [ones.lane(i) for i in range(4)]
