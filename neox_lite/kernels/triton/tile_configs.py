"""The sizes of tile that each kernel may take on a card, the shipped one first. Knows no tensor and no time.

Shipped sizes come from what the compiler makes of them (benchmarks/gpu/sass.py) and from arithmetic; docs/gpu.md says which of
them a card has confirmed. tuning.py picks among the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ...units import dtype_name
from .device import DeviceProperties

MAX_CANDIDATES = 6  # of a choice: each is compiled where they are timed
LARGE = 16384  # outputs of a product that fill any card several times over

# Cards whose choices need no timing, by compute capability, and the rows that a program of a large product with one token takes
# one after the other. Four take the fewest instructions a weight, of which cards of several TB/s have few to spare, and keep
# most bytes on their way; with two, programs are shorter and fill a card more evenly.
SHIPPED = {
    (7, 5): ("RTX 20, T4", 2),
    (8, 0): ("A100, A30", 2),
    (8, 6): ("RTX 30, A10, A40", 2),
    (8, 9): ("RTX 40, L4, L40", 2),
    (9, 0): ("H100, H200", 4),
    (12, 0): ("RTX 50", 2),
}


@dataclass(frozen=True, eq=False)
class Candidates:
    """Sizes of tile that a kernel may take for a class of shapes, the shipped one first, at most MAX_CANDIDATES.

    key: the kernel, a colon, the class. All give the same results but for the order of sums, within docs/gpu.md's bounds.
    """

    key: str
    tiles: tuple[Any, ...]


def _candidates(key: str, tiles: list[Any]) -> Candidates:
    return Candidates(key, tuple(dict.fromkeys(tiles))[:MAX_CANDIDATES])


def magnitude(count: int) -> int:
    """The largest power of two up to a count: shapes of about one size share a choice."""
    return 1 << max(0, count.bit_length() - 1)


@dataclass(frozen=True)
class Rows:
    """Of gemv.py: tokens of a program, rows side by side, rows one after the other, groups at a time and their words."""

    tokens: int
    lanes: int
    rows: int
    groups: int
    inner: int
    warps: int = 4
    registers: int = 128  # most a thread may take; a bound keeps the compiler from spilling to fit more programs


@cache
def rows(
    device: DeviceProperties, size: int, words: tuple[int, ...], bits: int, inner: int, tokens: int, math: str
) -> Candidates:
    """For so many outputs over weights with `words` in a row each, `inner` of which share a scale (plain matrices: bits 0, 1).

    math: as gemv.accumulate has it (COMPUTE).
    """
    # A thread loads 16 bytes of a row at a time, so `at_once` words make a warp read a row each; fewer where rows are short.
    at_once = 128 if bits else 256
    across = next((w for w in (at_once, at_once // 2, at_once // 4) if all(n % w == 0 for n in words)), at_once // 4)
    inner = inner if bits else across  # a plain matrix has no scale to share
    most = 4 if math == "float32" else 8  # activations of a program's tokens are held in registers
    count = next(n for n in (1, 2, 4, 8) if tokens <= n or n == most)
    side_by_side, groups = 4 * at_once // across, across // inner
    if count > 2:
        tile = Rows(count, side_by_side, 1, groups, inner, registers=200)
    else:
        large = bits and count == 1 and size >= LARGE
        tile = Rows(count, side_by_side, SHIPPED.get(device.capability, ("", 2))[1] if large else 2, groups, inner)
    tiles = [tile, *(replace(tile, warps=w, lanes=max(1, tile.lanes * w // 4)) for w in (2, 8))]
    most_rows = 4 if bits or math != "float32" else 2  # four of a plain matrix in 32 bits do not fit registers
    tiles += [replace(tile, rows=r) for r in (1, 2, 4) if count <= 2 and r <= most_rows]
    if side_by_side > 1 and all(n % (2 * across) == 0 for n in words):  # two warps a row, where there are few rows
        wide = replace(tile, inner=2 * inner) if not bits else replace(tile, groups=2 * groups)
        tiles.append(replace(wide, lanes=side_by_side // 2))
    what = f"int{bits}, {inner} words a scale" if bits else "plain"
    shape = f"{what}, {math}, {count} tokens, {magnitude(size)} rows of {magnitude(sum(words))} words"
    return _candidates(f"rows: {shape}", tiles)


@dataclass(frozen=True)
class Tiles:
    """Of matmul.py: rows, tokens and words of a tile, warps, stages of loads ahead, most registers of a thread."""

    rows: int
    tokens: int
    words: int
    warps: int = 4
    stages: int = 3
    registers: int = 128


@cache
def tiles(size: int, columns: int, tokens: int, bits: int, dtype: torch.dtype) -> Candidates:
    """For so many outputs over so many columns: an iteration takes 128 columns of weights, a group of the usual size."""
    words, band = 128 * bits // 32, next((n for n in (16, 32, 64) if tokens <= n), 256)
    if band <= 32:
        # Two warps of many rows share little work and take the fewest instructions a weight; where that leaves a card's
        # processors without work, rows are cut finer.
        few = [Tiles(r, band, words, warps=2, stages=4, registers=160) for r in (64, 32)]
        found = few if size >= LARGE else few[::-1]
        found += [replace(found[0], stages=3), Tiles(64, band, words, 4, 3, 160), Tiles(128, band, words, 4, 3, 160)]
    elif band == 64:
        found = [Tiles(64, 64, words), Tiles(64, 64, words, stages=2), Tiles(128, 64, words, registers=255)]
        found += [Tiles(64, 32, words, warps=2, stages=4, registers=160), Tiles(128, 64, words, 8)]
    else:
        # bfloat16 is made by way of float32, which takes registers.
        first = [Tiles(128, 64, words, registers=255), Tiles(64, 64, words, registers=255)]
        found = first if dtype == torch.float16 else first[::-1]
        found += [replace(found[0], stages=2), Tiles(128, 64, words, 8), Tiles(128, 128, words, 8, 2, 255)]
    shape = f"up to {band} tokens, {magnitude(size)} rows of {magnitude(columns)} columns"
    return _candidates(f"tiles: int{bits}, {dtype_name(dtype)}, {shape}", found)


@dataclass(frozen=True)
class Blocks:
    """Of attention.paged_prefill: tokens looked at, warps, stages of loads ahead."""

    keys: int
    warps: int = 4
    stages: int = 2


@cache
def blocks(device: DeviceProperties, head_dim: int, int8: bool, dtype: torch.dtype) -> Candidates:
    """Without tensor cores products of tiles take many registers, and so do long heads."""
    if not device.tensor_core_dtypes:
        found = [Blocks(16, 8), Blocks(16, 4), Blocks(32, 8)]
    else:
        first = Blocks(32, 4 if head_dim <= 128 else 8)
        found = [first, replace(first, warps=8), replace(first, stages=3)]  # long heads do not fit 4 warps' registers
        found += [replace(first, keys=64, warps=8), replace(first, keys=64, warps=8, stages=1)]
    cache = "int8" if int8 else "plain"
    return _candidates(f"blocks: heads of {head_dim}, {cache} cache, {dtype_name(dtype)}", found)


@dataclass(frozen=True)
class Page:
    """Of attention.paged_decode: tokens that threads see side by side, warps."""

    lanes: int
    warps: int = 4


@cache
def page(piece: int, int8: bool, dtype: torch.dtype) -> Candidates:
    """For heads in pieces of so many: a thread of the first loads 16 bytes of 16-bit numbers at a time."""
    lanes = max(1, 1024 // piece)
    sizes = ((lanes, 4), (max(1, lanes // 2), 2), (2 * lanes, 8), (2 * lanes, 4), (max(1, lanes // 4), 1))
    cache = "int8" if int8 else "plain"
    return _candidates(f"page: pieces of {piece}, {cache} cache, {dtype_name(dtype)}", [Page(*s) for s in sizes])
