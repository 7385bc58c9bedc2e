"""Sizes and names that every room shares: bytes as people write them, dtypes by name, the page of the KV cache."""

from __future__ import annotations

import re

import torch

from .errors import ArgumentError

PAGE = 128  # tokens in a page of the KV cache


def dtype_name(dtype: torch.dtype | str) -> str:
    """A dtype's name, as config.json and torch's attributes have it: "float16" of torch.float16 or "torch.float16"."""
    return str(dtype).removeprefix("torch.")


def parse_bytes(value: int | str) -> int:
    """A number of bytes, or text such as "8GiB" or "500MB". Raises ArgumentError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(value), re.IGNORECASE)
    if match is None:
        raise ArgumentError(f"{value!r} is not a size; write for instance '8GiB' or '500MB'")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def format_bytes(count: float) -> str:
    """Bytes as memory is sold: "22.3 GiB", "319 MiB"."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.{1 if power == 3 else 0}f} {unit}"
    return f"{count:.0f} bytes" if count else "0 GiB"
