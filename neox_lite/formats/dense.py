"""The plain format: one floating-point matrix, `weight`. Knows nothing of quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .weight import Specs


@dataclass(frozen=True)
class Dense:
    """(out, in) in the checkpoint's floating-point dtype."""

    name = "dense"
    methods = ("cast",)

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return None

    def specs(self, shape: tuple[int, int], dtype: torch.dtype) -> Specs:
        return {"weight": (dtype, shape)}

    def encode(self, rows: Tensor, dtype: torch.dtype, method: str = "cast") -> dict[str, Tensor]:
        return {"weight": rows.to(dtype)}

    def constants(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {}

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return tensors["weight"].to(dtype)

    def bits_per_weight(self, dtype: torch.dtype) -> float:
        return 8.0 * dtype.itemsize
