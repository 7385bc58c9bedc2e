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

MAX_CANDIDATES = 6  # for a class of shapes: each is compiled where they are timed
LARGE_N = 16384  # outputs of a product that fill any card several times over

# Cards whose sizes need no timing, by compute capability, and UNROLL_N of a large product with one token. Four take the fewest
# instructions a weight, of which cards of several TB/s have few to spare, and keep most bytes in flight; with two, programs are
# shorter and fill a card more evenly.
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
    """The largest power of two up to a count: shapes of about one size share a class."""
    return 1 << max(0, count.bit_length() - 1)


@dataclass(frozen=True)
class GemvTile:
    """Of gemv.py. A step of its loop takes `groups` groups of `group_words` words.

    maxnreg: registers of a thread; the bound keeps the compiler from spilling to fit more programs.
    """

    block_m: int
    block_n: int
    unroll_n: int
    groups: int
    group_words: int
    num_warps: int = 4
    maxnreg: int = 128


@cache
def gemv_tiles(
    device: DeviceProperties, n: int, k_words: tuple[int, ...], bits: int, group_words: int, m: int, compute: str
) -> Candidates:
    """For n outputs of m tokens over weights with `k_words` in a row each, `group_words` of which share a scale.

    A plain matrix has bits 0. compute: as gemv.accumulate has it (COMPUTE).
    """
    # A thread loads 16 bytes of a row at a time, so a row of a step is a warp's load; fewer words where rows are short.
    warp_words = 128 if bits else 256
    block_k = next((w for w in (warp_words, warp_words // 2) if all(k % w == 0 for k in k_words)), warp_words // 4)
    group_words = group_words if bits else block_k  # a plain matrix has no scale to share
    max_m = 4 if compute == "float32" else 8  # activations of a program's tokens are held in registers
    block_m = next(size for size in (1, 2, 4, 8) if m <= size or size == max_m)
    block_n, groups = 4 * warp_words // block_k, block_k // group_words
    if block_m > 2:
        tile = GemvTile(block_m, block_n, 1, groups, group_words, maxnreg=200)
    else:
        large = bits and block_m == 1 and n >= LARGE_N
        unroll_n = SHIPPED.get(device.capability, ("", 2))[1] if large else 2
        tile = GemvTile(block_m, block_n, unroll_n, groups, group_words)
    tiles = [tile, *(replace(tile, num_warps=w, block_n=max(1, block_n * w // 4)) for w in (2, 8))]
    max_unroll_n = 4 if bits or compute != "float32" else 2  # four of a plain matrix in 32 bits do not fit registers
    tiles += [replace(tile, unroll_n=u) for u in (1, 2, 4) if block_m <= 2 and u <= max_unroll_n]
    if block_n > 1 and all(k % (2 * block_k) == 0 for k in k_words):  # two warps a row, where there are few rows
        wide = replace(tile, group_words=2 * group_words) if not bits else replace(tile, groups=2 * groups)
        tiles.append(replace(wide, block_n=block_n // 2))
    what = f"int{bits}, {group_words} words a scale" if bits else "plain"
    shape = f"{what}, {compute}, {block_m} tokens, {magnitude(n)} rows of {magnitude(sum(k_words))} words"
    return _candidates(f"gemv: {shape}", tiles)


@dataclass(frozen=True)
class GemmTile:
    """Of matmul.gemm; block_k counts words."""

    block_n: int
    block_m: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int = 128


@cache
def gemm_tiles(n: int, k: int, m: int, bits: int, dtype: torch.dtype) -> Candidates:
    """For n outputs of m tokens over k columns: a step takes 128 columns of weights, a group of the usual size."""
    words, max_m = 128 * bits // 32, next((size for size in (16, 32, 64) if m <= size), 256)
    if max_m <= 32:
        # Two warps of many rows share little work and take the fewest instructions a weight; where that leaves a card's
        # processors without work, rows are cut finer.
        few = [GemmTile(r, max_m, words, num_warps=2, num_stages=4, maxnreg=160) for r in (64, 32)]
        found = few if n >= LARGE_N else few[::-1]
        found += [replace(found[0], num_stages=3)]
        found += [GemmTile(64, max_m, words, 4, 3, 160), GemmTile(128, max_m, words, 4, 3, 160)]
    elif max_m == 64:
        found = [GemmTile(64, 64, words), GemmTile(64, 64, words, num_stages=2), GemmTile(128, 64, words, maxnreg=255)]
        found += [GemmTile(64, 32, words, num_warps=2, num_stages=4, maxnreg=160), GemmTile(128, 64, words, 8)]
    else:
        # bfloat16 is made by way of float32, which takes registers.
        first = [GemmTile(128, 64, words, maxnreg=255), GemmTile(64, 64, words, maxnreg=255)]
        found = first if dtype == torch.float16 else first[::-1]
        found += [replace(found[0], num_stages=2), GemmTile(128, 64, words, 8), GemmTile(128, 128, words, 8, 2, 255)]
    shape = f"up to {max_m} tokens, {magnitude(n)} rows of {magnitude(k)} columns"
    return _candidates(f"gemm: int{bits}, {dtype_name(dtype)}, {shape}", found)


@dataclass(frozen=True)
class PrefillTile:
    """Of attention.paged_prefill; block_n counts keys."""

    block_n: int
    num_warps: int = 4
    num_stages: int = 2


@cache
def prefill_tiles(device: DeviceProperties, head_dim: int, int8: bool, dtype: torch.dtype) -> Candidates:
    """Without tensor cores products of tiles take many registers, and so do long heads."""
    if not device.tensor_core_dtypes:
        found = [PrefillTile(16, 8), PrefillTile(16, 4), PrefillTile(32, 8)]
    else:
        first = PrefillTile(32, 4 if head_dim <= 128 else 8)
        # Long heads do not fit 4 warps' registers.
        found = [first, replace(first, num_warps=8), replace(first, num_stages=3)]
        found += [PrefillTile(64, 8), PrefillTile(64, 8, num_stages=1)]
    return _candidates(f"prefill: heads of {head_dim}, {_cache_name(int8)}, {dtype_name(dtype)}", found)


@dataclass(frozen=True)
class DecodeTile:
    """Of attention.paged_decode; block_n counts keys."""

    block_n: int
    num_warps: int = 4


@cache
def decode_tiles(block_d: int, int8: bool, dtype: torch.dtype) -> Candidates:
    """For heads in pieces of block_d: a thread of the first loads 16 bytes of 16-bit numbers at a time."""
    n = max(1, 1024 // block_d)
    sizes = ((n, 4), (max(1, n // 2), 2), (2 * n, 8), (2 * n, 4), (max(1, n // 4), 1))
    found = [DecodeTile(*size) for size in sizes]
    return _candidates(f"decode: pieces of {block_d}, {_cache_name(int8)}, {dtype_name(dtype)}", found)


def _cache_name(int8: bool) -> str:
    return "int8 cache" if int8 else "plain cache"
