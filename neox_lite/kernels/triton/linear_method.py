"""How a weight is multiplied: by which kernel, with activations in which layout. Launches nothing.

Activations between operations are plain tensors, or `PackedActivation` where a kernel with a quantized weight reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ...formats import Dense, GroupInt, Weight
from ...units import dtype_name
from .device import DeviceProperties
from .packing import HALF_SHIFT

# A plain matrix is multiplied by gemv.py for so many tokens at most; above, by cuBLAS.
MAX_DENSE_GEMV_TOKENS = 2


@dataclass(frozen=True)
class Layout:
    """Order of activations: `num_planes` planes for words of `pack_factor` codes (packing.py), stored times 2**-shift."""

    pack_factor: int = 1
    num_planes: int = 1
    shift: int = 0

    @property
    def scale(self) -> float:
        return 2.0**-self.shift


NATURAL = Layout()


@dataclass(frozen=True)
class PackedActivation:
    """Activations (tokens, features) that are not in natural order."""

    layout: Layout
    tensor: Tensor


Activation = Tensor | PackedActivation


def tensor_of(x: Activation) -> Tensor:
    return x.tensor if isinstance(x, PackedActivation) else x


def layout_of(x: Activation) -> Layout:
    return x.layout if isinstance(x, PackedActivation) else NATURAL


@dataclass(frozen=True)
class LinearMethod:
    """All that a kernel must know of a weight and the activations that meet it, but for shapes and addresses."""

    kind: Literal["gemv", "gemm", "torch"]
    bits: int = 0  # of a code; 0: a plain matrix
    group_size: int = 1
    layout: Layout = NATURAL
    dtype: torch.dtype | None = None  # of scales, or of a plain matrix

    def words(self, columns: int) -> int:
        """Words in a row of a weight: 32 bits of codes, or an element of a plain matrix."""
        return columns * self.bits // 32 if self.bits else columns

    @property
    def group_words(self) -> int:
        """Words that share a scale; 1 for a plain matrix."""
        return self.group_size * self.bits // 32 if self.bits else 1

    def compute(self, x: Tensor) -> str:
        """How gemv.py multiplies: "half2", or in float32 from activations of a dtype."""
        return "half2" if self.layout.shift else dtype_name(x.dtype)


TORCH = LinearMethod("torch")


@cache
def _quantized(
    kind: Literal["gemv", "gemm"], bits: int, group_size: int, num_planes: int, shift: int, dtype: torch.dtype
) -> LinearMethod:
    """One object for each, so that it costs nothing to compare two."""
    return LinearMethod(kind, bits, group_size, Layout(32 // bits, num_planes, shift), dtype)


def choose(weight: Weight, like: Tensor, device: DeviceProperties, exact: bool) -> LinearMethod:
    """How `weight` meets activations such as `like` (tokens, ...); exact: no product is summed in float16."""
    format, tokens = weight.format, len(like)
    if isinstance(format, Dense):
        few = tokens <= MAX_DENSE_GEMV_TOKENS and weight.tensors["weight"].numel() < 1 << 31
        return LinearMethod("gemv", dtype=weight.tensors["weight"].dtype) if few else TORCH
    if not isinstance(format, GroupInt):
        return TORCH
    bits, dtype = format.bits, weight.tensors["weight_scale"].dtype
    if tokens <= device.max_gemv_tokens:
        half2 = bits == 4 and like.dtype == torch.float16 and not exact
        return _quantized("gemv", bits, format.group_size, 16 // bits, HALF_SHIFT if half2 else 0, dtype)
    if tokens <= device.max_gemm_tokens and like.dtype in device.tensor_core_dtypes:
        return _quantized("gemm", bits, format.group_size, 32 // bits, 0, dtype)
    return TORCH
