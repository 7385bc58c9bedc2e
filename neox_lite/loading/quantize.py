"""A plain weight of a checkpoint on its way into a format, a bounded number of rows at a time. Knows no model."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..errors import FormatError
from ..formats import Format, GroupInt
from ..kernels import cpu
from ..layers import Linear

SLICE_ELEMENTS = 1 << 22  # weights read and quantized at a time: 16 MB as float32
READ_AHEAD_BYTES = 128 << 10  # Linux cuts a longer request to the disk's read-ahead, which is at least this


def quantize_module(module: Linear, checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> None:
    """Fill a module's quantized tensors from the checkpoint's dense weight `name`."""
    specs = module.format.specs(module.shape, dtype)
    tensors = {key: torch.empty(shape, dtype=kind) for key, (kind, shape) in specs.items()}
    encoding = Encoding(checkpoint, name, module.format, dtype, module.format.methods[0])
    for slice in encoding.slices():
        start, part = slice()
        for key, rows in part.items():
            tensors[key][start : start + len(rows)] = rows
    tensors |= encoding.rest()
    for key, tensor in tensors.items():
        setattr(module, key, tensor)


class Encoding:
    """A checkpoint's weight on its way into a format, a bounded number of rows at a time."""

    def __init__(self, checkpoint: Checkpoint, name: str, format: Format, dtype: torch.dtype, method: str) -> None:
        self.checkpoint, self.name, self.format, self.dtype, self.method = checkpoint, name, format, dtype, method
        self.shape: tuple[int, int] = checkpoint.info(name).shape  # type: ignore[assignment]
        self._collected: dict[str, dict[int, Tensor]] = {key: {} for key in format.late}  # suffix -> first row -> rows

    def slices(self) -> Iterator[Callable[[], tuple[int, dict[str, Tensor]]]]:
        """Calls that give (first row, suffix -> rows), to be run in any order; each is read ahead when it is yielded."""
        step = max(1, SLICE_ELEMENTS // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = self.checkpoint.rows(self.name, start, min(self.shape[0], start + step))
            read_ahead(rows)
            yield partial(self._encode, start, rows)

    def _encode(self, start: int, rows: Tensor) -> tuple[int, dict[str, Tensor]]:
        try:
            part = encode(self.format, rows, self.dtype, self.method)
        except FormatError as error:
            raise FormatError(f"{self.name}, rows {start} to {start + len(rows) - 1}: {error}") from error
        for key, parts in self._collected.items():
            parts[start] = part.pop(key)
        return start, part

    def rest(self) -> dict[str, Tensor]:
        """After all slices: the tensors that are not made of rows."""
        collected = {
            key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in self._collected.items()
        }
        self._collected = {key: {} for key in self._collected}
        constants = self.format.constants(self.shape, self.dtype)
        return constants | self.format.finish(collected, self.shape, self.dtype)


def encode(format: Format, rows: Tensor, dtype: torch.dtype, method: str) -> dict[str, Tensor]:
    """What format.encode gives, from the CPU's kernel where there is one: the same bits, many times as fast."""
    if isinstance(format, GroupInt) and cpu.why_not(rows.device) is None:
        from ..kernels.cpu import encode as kernel

        if kernel.why_not(rows) is None:
            return kernel.encode(format, rows, dtype, method)
    return format.encode(rows, dtype, method)


def read_ahead(chunk: Tensor) -> None:
    """Let Linux fetch a mapped range while we do something else; without it every page fault waits for the disk."""
    if not hasattr(mmap, "MADV_WILLNEED"):
        return
    advise, first = ctypes.CDLL(None).madvise, chunk.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    for start in range(first, chunk.data_ptr() + chunk.nbytes, READ_AHEAD_BYTES):
        length = min(READ_AHEAD_BYTES, chunk.data_ptr() + chunk.nbytes - start)
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_WILLNEED)  # advice: refused, it costs nothing
