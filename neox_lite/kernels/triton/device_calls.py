"""All that this backend has a device do: launches of kernels, products by cuBLAS, products by bitsandbytes.

Callers go through this module, so that a test or a benchmark can watch or replace every one of them here.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...formats import Weight
from .. import nf4


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """Run a kernel on the device of its first tensor; multiplications and additions may be fused (Triton 3.10 asks)."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*arguments, enable_fp_fusion=True, **options)


def mm(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x @ weight.T by cuBLAS; without a GPU summed in float32 and rounded once."""
    if x.is_cuda and out.dtype == x.dtype:
        torch.mm(x, weight.T, out=out)
    elif x.is_cuda:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
    else:
        out.copy_(x.float() @ weight.T.float())


def nf4_mm(x: Tensor, weight: Weight, out: Tensor) -> None:
    """out = x @ weight.T by bitsandbytes, in x's dtype; the weight is nf4."""
    out.copy_(nf4.matmul(x, weight))
