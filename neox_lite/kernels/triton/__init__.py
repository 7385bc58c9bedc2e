"""The operations on NVIDIA GPUs, in Triton, on weights as the checkpoint stores them.

linear_method.py chooses the kernel of a product, linear.py launches it: gemv.py for one or a few tokens, matmul.py for many.
packing.py holds what both share; attention.py, activations.py and embed_and_sample.py the other kernels; operations.py
launches those. TRITON_INTERPRET=1 runs all of it on the CPU, slowly.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch

from ..backend import Backend

OLDEST = (7, 5)  # compute capability of the oldest cards whose instructions are asked for


def why_not(device: torch.device) -> str | None:
    """None where it runs, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton (on Windows: triton-windows)"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"runs on CUDA devices only, this is {device.type}"
    if torch.version.hip is not None:
        return "written for NVIDIA GPUs, this torch is built for AMD's"
    if (found := torch.cuda.get_device_capability(device)) < OLDEST:
        name = torch.cuda.get_device_name(device)
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]}, {name} has {found[0]}.{found[1]}"
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    if os.name != "nt" and not any(map(shutil.which, compilers)):  # Windows' triton brings its own
        return "triton compiles its launcher and finds no C compiler; install gcc"
    elsewhere = os.name == "nt" or os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")
    if not elsewhere and not (header := _python_header()).is_file():
        return f"triton compiles its launcher and finds no {header}; install python3-dev, or python3-devel"
    return None


def _python_header() -> Path:
    """Where triton's runtime/build.py has the compiler look."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's has another folder
    return Path(sysconfig.get_paths(scheme)["include"], "Python.h")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: it reads the variable when they are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def bind(exact: bool) -> Backend:
    """The backend; a kernel is compiled by its first call."""
    from .operations import Operations

    return Operations(exact)
