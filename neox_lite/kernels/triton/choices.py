"""What a card can do, and which size of tile each kernel takes there. Knows no tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from . import interpreted


@dataclass(frozen=True)
class Machine:
    """The properties of a device that decide between kernels."""

    capability: tuple[int, int]

    @property
    def bfloat16(self) -> bool:
        return self.capability >= (8, 0)

    @property
    def tensor_core_dtypes(self) -> tuple[torch.dtype, ...]:
        """Triton uses tensor cores from 8.0 on."""
        return (torch.float16, torch.bfloat16) if self.capability >= (8, 0) else ()

    @property
    def rows_up_to(self) -> int:
        """Most tokens for which each weight is read by the thread that multiplies it."""
        return 2 if self.tensor_core_dtypes else 32

    @property
    def tiles_up_to(self) -> int:
        """Most tokens for which codes meet them in registers; above, a weight is written out and multiplied by cuBLAS."""
        return 256


@cache
def machine(device: torch.device) -> Machine:
    return Machine((8, 0) if interpreted() else torch.cuda.get_device_capability(device))


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


def rows(words: tuple[int, ...], inner: int, tokens: int, element_bytes: int) -> Rows:
    """words: how many a row of each weight of a launch has, `inner` of which share a scale (plain matrices: 1, see below).

    A thread loads 16 bytes of a row at a time, so `at_once` words make a warp read a row each; fewer where rows are short.
    """
    at_once = 256 if inner == 1 else 128
    across = next((w for w in (at_once, at_once // 2, at_once // 4) if all(n % w == 0 for n in words)), at_once // 4)
    if inner == 1:  # no scale to share
        inner = across
    most = 8 if element_bytes == 2 else 4  # activations of a program's tokens are held in registers
    count = next(n for n in (1, 2, 4, 8) if tokens <= n or n == most)
    tile = Rows(count, 4 * at_once // across, 2 if count <= 2 else 1, across // inner, inner)
    return tile if count <= 2 else replace(tile, registers=200)


@dataclass(frozen=True)
class Tiles:
    """Of matmul.py: rows, tokens and words of a tile, warps, stages of loads ahead, most registers of a thread."""

    rows: int
    tokens: int
    words: int
    warps: int = 4
    stages: int = 3
    registers: int = 128


def tiles(size: int, tokens: int, bits: int, dtype: torch.dtype) -> Tiles:
    """For so many outputs: an iteration takes 128 columns of weights, a group of the usual size.

    Two warps of many rows share little work and take the fewest instructions a weight; where that leaves a card's
    processors without work, rows are cut finer.
    """
    words = 128 * bits // 32
    if tokens <= 32:
        return Tiles(64 if size >= 16384 else 32, 16 if tokens <= 16 else 32, words, warps=2, stages=4, registers=160)
    if tokens > 64 and dtype == torch.float16:
        return Tiles(128, 64, words, registers=255)
    return Tiles(64, 64, words, registers=128 if tokens <= 64 else 255)  # bfloat16 is made by way of float32


@dataclass(frozen=True)
class Blocks:
    """Of attention.attend_block: tokens that ask, tokens looked at, warps, stages of loads ahead."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


def blocks(machine: Machine, head_dim: int) -> Blocks:
    """Without tensor cores products of tiles take many registers, and so do long heads."""
    if not machine.tensor_core_dtypes:
        return Blocks(32, 16, warps=8)
    return Blocks(64, 32, warps=4 if head_dim <= 128 else 8)
