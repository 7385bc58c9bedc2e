"""Forecasts of a conversion: seconds, from a short probe of this machine, and memory. Knows no model."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from neox_lite.errors import ArgumentError
from neox_lite.formats import Format
from neox_lite.loading.quantize import encode
from neox_lite.offload.memory import free_memory

PROBE_ELEMENTS, PROBE_BYTES = 1 << 20, 64 << 20
PROCESS_BYTES, THREAD_BYTES = 64 << 20, 64 << 20  # beyond the memory of torch; generous


def check_memory(threads: int) -> int:
    """The bytes of memory that a conversion by row slices needs. Raises ArgumentError where less is free."""
    needed, free = PROCESS_BYTES + threads * THREAD_BYTES, free_memory()[1]
    if free is not None and free < needed:
        raise ArgumentError(
            f"quantizing with {threads} threads needs {needed} bytes of memory, {free} are free; close other programs"
        )
    return needed


def predict_seconds(
    weights: int, bytes_in: int, bytes_out: int, threads: int, format: Format, method: str, file: Path | None
) -> float:
    """Seconds to quantize so many weights: reading and computing overlap, so it is the longer of the two.

    file: one of the source's files, whose disk is measured; None for files from a network, whose time is not counted.
    """
    rows = torch.randn(PROBE_ELEMENTS // 1024, 1024, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    encode(format, rows, torch.float16, method)  # compiles
    each = _seconds(lambda: encode(format, rows, torch.float16, method)) / rows.numel()
    hashed = _seconds(lambda: hashlib.sha256(bytes(PROBE_BYTES))) / PROBE_BYTES
    computing = (weights * each + bytes_out * hashed) / threads
    return max(computing, bytes_in * _read_seconds(file) if file is not None else 0.0)


def _read_seconds(file: Path) -> float:
    """Seconds a byte from the disk of a file; its middle is dropped from the page cache first where the system allows it."""
    with file.open("rb", buffering=0) as raw:
        size = os.fstat(raw.fileno()).st_size
        start, count = max(0, size - PROBE_BYTES) // 2, max(1, min(PROBE_BYTES, size))
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(raw.fileno(), start, count, os.POSIX_FADV_DONTNEED)
        raw.seek(start)
        began = time.perf_counter()
        raw.read(count)
        return (time.perf_counter() - began) / count


def _seconds(call: Callable[[], object]) -> float:
    """The best of three."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
