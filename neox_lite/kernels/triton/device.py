"""What a GPU can do, as far as it decides between kernels. Knows no kernel and no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from . import interpreted


@dataclass(frozen=True)
class DeviceProperties:
    """capability: compute capability, (major, minor)."""

    capability: tuple[int, int]

    @property
    def bfloat16(self) -> bool:
        return self.capability >= (8, 0)

    @property
    def tensor_core_dtypes(self) -> tuple[torch.dtype, ...]:
        """Triton uses tensor cores from 8.0 on."""
        return (torch.float16, torch.bfloat16) if self.capability >= (8, 0) else ()

    @property
    def max_gemv_tokens(self) -> int:
        """Most tokens that gemv.py multiplies, where each weight is read by the thread that multiplies it."""
        return 2 if self.tensor_core_dtypes else 32

    @property
    def max_gemm_tokens(self) -> int:
        """Most tokens that matmul.gemm multiplies; above, a weight is dequantized and multiplied by cuBLAS."""
        return 256

    @property
    def prefill_block_m(self) -> int:
        """BLOCK_M of attention.paged_prefill: tokens of a sequence that a program takes."""
        return 64 if self.tensor_core_dtypes else 32


@cache
def properties_of(device: torch.device) -> DeviceProperties:
    """Those of the oldest card with tensor cores where kernels are interpreted."""
    return DeviceProperties((8, 0) if interpreted() else torch.cuda.get_device_capability(device))
