"""nf4 weights times activations by bitsandbytes' kernels, for backends that have none of their own. Knows no model.

formats/nf4.py is the plain twin: what these are checked against, and what runs where bitsandbytes is not installed.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from threading import Lock
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..formats import NF4, Weight
from ..formats.nf4 import ABSMAX, BLOCK, MAP, NESTED_ABSMAX, NESTED_BLOCK, NESTED_MAP
from . import reference

IMPORTING = Lock()
SLICE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}  # weights written out at a time: 4 MB stay in a CPU's caches
FEW_TOKENS = 4  # up to so many, bitsandbytes multiplies on a GPU without writing weights out


def matmul(x: Tensor, weight: Weight) -> Tensor:
    """x (tokens, in) @ weight.T -> (tokens, out) in x's dtype; the weight is nf4."""
    library = bitsandbytes()
    if library is None or not len(x):
        return reference.matmul(x, weight)
    if x.device.type == "cpu" or len(x) > FEW_TOKENS:
        return _by_slices(library, x, weight)
    return library.matmul_4bit(x, _column(weight.tensors["weight"]).t(), _state(library, weight, x.dtype))


@cache
def bitsandbytes() -> ModuleType | None:
    """The library; where it cannot be imported None, announced with the reason.

    Its import would, beside a package named kernels, fetch and run code from the hub, or complain that it cannot.
    """
    try:
        with IMPORTING, _quietly("bitsandbytes"), _without("kernels"):
            import bitsandbytes
        return bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        warnings.warn(
            f"nf4 weights are multiplied by torch alone, which is slow: bitsandbytes cannot be imported ({reason}); "
            "pip install 'neox-lite[nf4]'",
            stacklevel=3,
        )
        return None


@contextmanager
def _quietly(name: str) -> Iterator[None]:
    """Of what a library logs, errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without(name: str) -> Iterator[None]:
    """As if a package were not installed."""
    found = sys.modules.get(name, ...)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if found is not ...:
            sys.modules[name] = found


def _by_slices(library: Any, x: Tensor, weight: Weight) -> Tensor:
    """Write out some rows, multiply, write out the next: the whole weight would go through memory twice."""
    assert isinstance(weight.format, NF4)
    (size, columns), packed, absmax = weight.shape, weight.tensors["weight"], weight.format.scales(weight.tensors)
    out = x.new_empty(len(x), size)
    step = max(1, SLICE_ELEMENTS[x.device.type] // columns)
    for first in range(0, size, step):
        last = min(size, first + step)
        state = library.functional.QuantState(
            absmax[first:last].flatten(), (last - first, columns), blocksize=BLOCK, quant_type="nf4", dtype=x.dtype
        )
        rows = library.functional.dequantize_4bit(_column(packed[first:last]), state)
        out[:, first:last] = x @ rows.T
    return out


def _state(library: Any, weight: Weight, dtype: torch.dtype) -> Any:
    """What bitsandbytes wants to know of a weight that it may write out in `dtype`; nothing is copied.

    But for scales that a file has in fewer bits: its kernels read float32 alone.
    """
    assert isinstance(weight.format, NF4)
    kind, nested = library.functional.QuantState, None
    tensors = {key: t.float() if t.is_floating_point() else t for key, t in weight.tensors.items()}
    if weight.format.double:
        nested = kind(tensors[NESTED_ABSMAX], code=tensors[NESTED_MAP], blocksize=NESTED_BLOCK, dtype=torch.float32)
    return kind(
        tensors[ABSMAX].flatten(),
        torch.Size(weight.shape),
        tensors[MAP],
        BLOCK,
        "nf4",
        dtype,
        _offset(weight.format.offset, weight.device) if nested is not None else None,
        nested,
    )


@lru_cache(maxsize=4096)
def _offset(value: float, device: torch.device) -> Tensor:
    """A number on a device, brought there once."""
    return torch.tensor(value, device=device)


def _column(packed: Tensor) -> Tensor:
    """Codes as bitsandbytes has them, (bytes, 1)."""
    return packed.reshape(-1, 1)
