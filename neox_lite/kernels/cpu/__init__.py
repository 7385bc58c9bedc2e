"""The operations on the CPU, compiled for this processor by LLVM: weights are read where the file is mapped.

Products with int4 and int8 weights take activations as int8 codes with a scale per 32 elements, or, `exact`, as float32. What
each kernel does stands in gemv.py, gemm.py, linear.py, norm.py and attention.py; operations.py turns tensors into their calls.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from ..backend import Backend


def why_not(device: torch.device) -> str | None:
    """None where it runs, else the reason."""
    if device.type != "cpu":
        return f"runs on the CPU only, this is {device.type}"
    if importlib.util.find_spec("llvmlite") is None:
        return "llvmlite is not installed; pip install llvmlite"
    return None


def paths() -> dict[str, str | None]:
    """For each instruction set that has kernels, fastest first, None if this processor runs them, else what it lacks."""
    from . import target

    forced = target.forced()
    other = f"{target.VARIABLE} names another"
    return {path: target.why_not(path) or (other if forced not in (None, path) else None) for path in target.PATHS}


@cache
def bind(exact: bool) -> Backend:
    """The backend; compiling starts with its first call."""
    from .operations import Operations

    return Operations(exact)
