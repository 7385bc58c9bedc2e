"""Symmetric int4 and int8, one scale per group of a row: packing, rtn, mse. Knows no file. Layout: docs/format.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError, ShapeError
from ..units import dtype_name
from .weight import ByRows, Specs

GROUP_SIZES = (32, 64, 128)
TILE = 1 << 17  # weights quantized at a time: small enough that every pass over them stays in the CPU's caches


def pack(codes: Tensor, bits: int) -> Tensor:
    """Store codes in words.

    codes (out, in) int8 in [-2**(bits-1), 2**(bits-1)) -> (out, in * bits // 32) int32, element 0 in the lowest bits.
    A stored code is code + 2**(bits-1). Raises ShapeError if bits is not 4 or 8, or rows do not fill whole words.
    """
    _check_bits(bits)
    if codes.dim() != 2 or codes.shape[1] * bits % 32:
        raise ShapeError(
            f"codes are {tuple(codes.shape)}; expected two dimensions and a multiple of {32 // bits} columns"
        )
    stored = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits == 4:
        stored = stored[:, 0::2] | (stored[:, 1::2] << 4)
    return stored.contiguous().view(torch.int32)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Read the codes out of words: the inverse of `pack`.

    packed (out, in * bits // 32) int32, element 0 in the lowest bits -> (out, in) int8 in [-2**(bits-1), 2**(bits-1)).
    Raises ShapeError if bits is not 4 or 8.
    """
    _check_bits(bits)
    stored = packed.contiguous().view(torch.uint8)
    if bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2)  # (out, in)
        return stored.view(torch.int8) - 8
    return (stored ^ 128).view(torch.int8)


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ShapeError(f"bits is {bits}, expected 4 or 8")


@dataclass(frozen=True)
class GroupInt(ByRows):
    """w[i, j] = code[i, j] * scale[i, j // group_size]; codes of `bits` bits, scales of any sign in `dtype`."""

    bits: int
    group_size: int
    methods = ("mse", "rtn")

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        if self.group_size not in GROUP_SIZES:
            raise FormatError(f"group_size is {self.group_size}, expected one of {', '.join(map(str, GROUP_SIZES))}")

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def why_not(self, shape: tuple[int, int]) -> str | None:
        if shape[1] % self.group_size == 0:
            return None
        fits = [str(g) for g in GROUP_SIZES if shape[1] % g == 0]
        advice = f"try {' or '.join(fits)}" if fits else "it must stay dense"
        return f"in_features {shape[1]} is not divisible by group_size {self.group_size}; {advice}"

    def specs(self, shape: tuple[int, int], dtype: torch.dtype) -> Specs:
        out, columns = shape
        return {
            "weight_packed": (torch.int32, (out, columns * self.bits // 32)),
            "weight_scale": (dtype, (out, columns // self.group_size)),
            "weight_shape": (torch.int64, (2,)),
        }

    def scheme(self, dense: list[str], dtype: torch.dtype) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group_size,
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": dense,
        }

    def constants(self, shape: tuple[int, int], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        return {"weight_shape": torch.tensor(shape, dtype=torch.int64)}

    def bits_per_weight(self, dtype: torch.dtype) -> float:
        return self.bits + 8.0 * dtype.itemsize / self.group_size

    def encode(self, rows: Tensor, dtype: torch.dtype, method: str = "mse") -> dict[str, Tensor]:
        """Quantize a row slice.

        rows (n, in) floating point -> weight_packed (n, in * bits // 32) int32 and weight_scale (n, in // group_size).
        Raises FormatError for values that are not finite and for scales that overflow `dtype`.
        """
        if (reason := self.why_not((rows.shape[0], rows.shape[1]))) is not None:
            raise FormatError(reason)
        if method not in self.methods:
            raise FormatError(f"method is {method!r}, expected one of {', '.join(self.methods)}")
        choose = _mse if method == "mse" else _rtn
        packed, scales = [], []
        for part in rows.split(max(1, TILE // rows.shape[1])):
            groups = part.float().unflatten(1, (-1, self.group_size))
            if not torch.isfinite(groups).all():
                raise FormatError("the weight holds values that are not finite")
            scale = choose(groups, self.bits, dtype)
            packed.append(pack(_codes(groups, scale.float(), self.bits).to(torch.int8).flatten(1), self.bits))
            scales.append(scale.squeeze(-1))
        return {"weight_packed": torch.cat(packed), "weight_scale": torch.cat(scales)}

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The rows that codes and scales stand for, (n, in) in `dtype`."""
        codes, scale = unpack(tensors["weight_packed"], self.bits), tensors["weight_scale"]
        groups = codes.view(codes.shape[0], -1, self.group_size).float()
        return groups.mul_(scale.float().unsqueeze(-1)).flatten(1).to(dtype)


def _codes(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Nearest codes for the scale as stored: groups (n, groups, size), scale (n, groups, 1) -> codes as float32."""
    top = 1 << (bits - 1)
    return torch.div(groups, scale).round_().clamp_(-top, top - 1)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it will be read back; zero (an all-zero group) becomes 1, so that nothing divides by zero."""
    stored = scale.to(dtype)
    if torch.isinf(stored).any():
        advice = "; --dtype bfloat16 holds it" if dtype == torch.float16 else ""
        raise FormatError(f"a scale of {scale.abs().max().item():.3g} overflows {dtype_name(dtype)}{advice}")
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def _rtn(groups: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Round to nearest: the element largest in magnitude takes the code -2**(bits-1), so that all levels are used.

    Of two that are largest, one of either sign, the positive one does.
    """
    size = groups.abs().amax(-1, keepdim=True)
    peak = torch.where(groups.amax(-1, keepdim=True) == size, size, -size)
    return _stored(peak / -(1 << (bits - 1)), dtype)


def search_factors(bits: int) -> Tensor:
    """By how much the scales that `mse` tries are larger than rtn's, as what to multiply with instead of dividing."""
    low, high, count = (0.70, 1.16, 14) if bits == 4 else (0.94, 1.01, 6)
    return torch.linspace(low, high, count, dtype=torch.float64).reciprocal().float()


def _mse(groups: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Signed scale search: the scale of least squared error over a grid of both signs, refined by least squares.

    For codes q the best scale is <w, q> / <q, q>, and the error it leaves is |w|^2 - <w, q>^2 / <q, q>; so each
    candidate is judged by <w, q>^2 / <q, q>, in units of rtn's scale. The result, judged as stored, is never worse than rtn.
    """
    top = 1 << (bits - 1)
    first = _rtn(groups, bits, dtype)
    units = groups / first.float()
    best_gain, best = torch.full_like(units[..., :1], -1.0), torch.ones_like(units[..., :1])
    for factor in search_factors(bits):
        nearest = (units * factor).round_()
        for sign, low, high in ((1.0, -top, top - 1), (-1.0, 1 - top, top)):
            q = nearest.clamp(low, high)
            dot, square = _sum(units * q), _sum(q * q)
            gain = dot * dot / square  # 0 / 0, all codes zero, is better than nothing
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best = torch.where(better, dot / square * sign, best)
    candidate = _stored(best * first.float(), dtype)
    q = _codes(groups, candidate.float(), bits)
    square = _sum(q * q)
    refined = _stored(torch.where(square > 0, _sum(groups * q) / square, square), dtype)
    chosen, least = first, _error(groups, first, bits)
    for scale in (candidate, refined):
        error = _error(groups, scale, bits)
        chosen, least = torch.where(error < least, scale, chosen), torch.where(error < least, error, least)
    return chosen


def _error(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The sum of squares of what rounding to codes of the stored scale leaves: (n, groups, 1)."""
    left = groups - _codes(groups, scale.float(), bits) * scale.float()
    return _sum(left * left)


def _sum(values: Tensor) -> Tensor:
    """Sums over the last dimension, a power of two, by halves: an order that every processor and kernel can keep to."""
    while values.shape[-1] > 1:
        low, high = values.chunk(2, -1)
        values = low + high
    return values
