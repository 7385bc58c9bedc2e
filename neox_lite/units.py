"""Sizes and names that every room shares: bytes as people write them, dtypes by name, the page of the KV cache."""

from __future__ import annotations

import re
from typing import Any

import torch

from .errors import ArgumentError

PAGE = 128  # tokens in a page of the KV cache

# The dtypes that a model can have, by their names in config.json.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT_DTYPES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}


def dtype_name(dtype: torch.dtype | str) -> str:
    """A dtype's name, as config.json and torch's attributes have it: "float16" of torch.float16 or "torch.float16"."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(value: Any) -> torch.dtype | None:
    """A torch dtype or its name as a dtype; None for None and "auto", the checkpoint's own. Raises ArgumentError."""
    if value is None or value == "auto":
        return None
    name = dtype_name(value)
    name = SHORT_DTYPES.get(name, name)
    if name not in DTYPES:
        raise ArgumentError(f"dtype is {value!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


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
