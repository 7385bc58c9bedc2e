"""What every weight format answers, and Weight: tensors read through their format. Knows no particular format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Format(Protocol):
    """How one (out, in) weight is stored. Instances are frozen and hashable; their tensors live elsewhere."""

    @property
    def name(self) -> str: ...

    @property
    def methods(self) -> tuple[str, ...]:
        """Algorithms that `encode` knows, the default first."""
        ...

    def why_not(self, shape: tuple[int, int]) -> str | None:
        """None when a weight of this (out, in) shape can be stored, else the reason and what to try."""
        ...

    def specs(self, shape: tuple[int, int], dtype: torch.dtype) -> Specs:
        """Suffix -> (dtype, shape) of the stored tensors; all but the last-listed constants have `out` rows."""
        ...

    def encode(self, rows: Tensor, dtype: torch.dtype, method: str) -> dict[str, Tensor]:
        """Row slice (n, in) of a weight -> the same rows of each stored tensor."""
        ...

    def constants(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        """Stored tensors that are not cut by rows."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Stored rows -> (n, in) in `dtype`; products are formed in float32 and rounded once."""
        ...

    def bits_per_weight(self, dtype: torch.dtype) -> float: ...


@dataclass(frozen=True)
class Weight:
    """A stored (out, in) matrix: its format and the tensors that the format names by suffix."""

    format: Format
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    def decode(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop as a plain (n, in) matrix."""
        constants = self.format.constants(self.shape)
        cut = {k: t if k in constants else t[start:stop] for k, t in self.tensors.items()}
        return self.format.decode(cut, dtype)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())
