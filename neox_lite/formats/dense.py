"""The plain format: one floating-point matrix, `weight`. Knows nothing of quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from .weight import ByRows, Specs


@dataclass(frozen=True)
class Dense(ByRows):
    """(out, in) in the checkpoint's floating-point dtype."""

    name = "dense"
    methods = ("cast",)

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return None

    def specs(self, shape: tuple[int, int], dtype: torch.dtype) -> Specs:
        return {"weight": (dtype, shape)}

    def encode(self, rows: Tensor, dtype: torch.dtype, method: str = "cast") -> dict[str, Tensor]:
        return {"weight": rows.to(dtype)}

    def scheme(self, dense: list[str], dtype: torch.dtype) -> dict[str, Any]:
        raise FormatError("plain weights need no quantization_config")

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return tensors["weight"].to(dtype)

    def bits_per_weight(self, dtype: torch.dtype) -> float:
        return 8.0 * dtype.itemsize
