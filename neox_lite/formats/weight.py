"""What every weight format answers, and Weight: tensors read through their format. Knows no particular format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import FormatError

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Format(Protocol):
    """How one (out, in) weight is stored. Instances are frozen and hashable; their tensors live elsewhere."""

    @property
    def name(self) -> str: ...

    @property
    def methods(self) -> tuple[str, ...]:
        """Algorithms of `encode`, the default first."""
        ...

    @property
    def late(self) -> tuple[str, ...]:
        """Results of `encode` that are not stored; they are collected for `finish`."""
        ...

    @property
    def loose(self) -> tuple[str, ...]:
        """One-dimensional stored tensors that may be shorter in a file than in `specs`."""
        ...

    def why_not(self, shape: tuple[int, int]) -> str | None:
        """None when a weight of this (out, in) shape can be stored, else the reason and what to try."""
        ...

    def specs(self, shape: tuple[int, int], dtype: torch.dtype) -> Specs:
        """Suffix -> (dtype, shape) of the stored tensors as they lie in memory."""
        ...

    def file_shape(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in a file of a stored tensor of this shape: it has as many numbers, in the same order."""
        ...

    def laid(self, key: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A stored tensor in the layout of a file -> in its layout in memory, with the shape of `specs`."""
        ...

    def scheme(self, dense: list[str], dtype: torch.dtype) -> dict[str, Any]:
        """config.json's `quantization_config` of a folder in this format, but for the modules named in `dense`."""
        ...

    def encode(self, rows: Tensor, dtype: torch.dtype, method: str) -> dict[str, Tensor]:
        """Row slice (n, in) of a weight -> the same rows of each stored tensor."""
        ...

    def constants(self, shape: tuple[int, int], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """Stored tensors that follow from the shape and the dtype of the plain weight."""
        ...

    def finish(self, collected: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        """The results of `encode` for all rows under the names in `late` -> the stored tensors that need all rows."""
        ...

    def opened(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Format:
        """The format of a weight that was read, with the parameters that only its tensors hold.

        Raises FormatError, beginning with a suffix, where they contradict the format or the shape.
        """
        ...

    def rows(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], start: int, stop: int) -> dict[str, Tensor]:
        """The parts of a weight's tensors that `decode` needs for rows start..stop."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Stored rows -> (n, in) in `dtype`; products are formed in float32 and rounded once."""
        ...

    def bits_per_weight(self, dtype: torch.dtype) -> float: ...


class ByRows:
    """Common methods of formats whose rows are independent and whose layout is the same in a file and in memory."""

    late: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()

    def file_shape(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def laid(self, key: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        return tensor.view(shape)

    def constants(self, shape: tuple[int, int], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        return {}

    def finish(self, collected: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def opened(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Any:
        for key, expected in self.constants(shape).items():
            if not torch.equal(tensors[key].cpu(), expected):
                raise FormatError(f"{key}: is {tensors[key].tolist()}, expected {expected.tolist()}")
        return self

    def rows(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], start: int, stop: int) -> dict[str, Tensor]:
        constants = self.constants(shape)
        return {key: tensor if key in constants else tensor[start:stop] for key, tensor in tensors.items()}


@dataclass(frozen=True)
class Weight:
    """A stored (out, in) matrix: its format and the tensors that the format names by suffix."""

    format: Format
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    def decode(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop as a plain (n, in) matrix."""
        rows = self.format.rows(self.tensors, self.shape, start, self.shape[0] if stop is None else stop)
        return self.format.decode(rows, dtype)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())
