"""What a call of the backend becomes: tasks with their arguments, activations in memory, a batch as a table. Knows no weight.

A captured pass is one program, run again and again with nothing of Python between its tasks.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...cache import Batch
from ...units import PAGE
from . import attention
from .activations import BLOCK, NATURAL, Layout
from .pool import Task, ThreadPool, task_table


@dataclass(frozen=True)
class PackedActivation:
    """Activations (tokens, features) in a layout that is not natural: values, then scales and sums, in one piece of memory."""

    layout: Layout
    tokens: int
    features: int
    memory: Tensor

    def __len__(self) -> int:
        return self.tokens

    @property
    def padded(self) -> tuple[int, int]:
        return self.layout.padded(self.tokens, self.features)

    def addresses(self) -> tuple[int, int, int, int]:
        """Addresses of values, scales and sums, and features as padded."""
        tokens, features = self.padded
        start = self.memory.data_ptr()
        scales = start + tokens * features
        return start, scales, scales + tokens * features // BLOCK * 4, features


Activation = Tensor | PackedActivation


def layout_of(x: Activation) -> Layout:
    return x.layout if isinstance(x, PackedActivation) else NATURAL


def allocate(layout: Layout, tokens: int, features: int) -> Tensor:
    """Memory for activations (tokens, features): float32 in natural layout, else bytes."""
    if layout == NATURAL:
        return torch.empty(tokens, features)
    padded_tokens, padded_features = layout.padded(tokens, features)
    size = padded_tokens * padded_features
    count = size + size // BLOCK * 8 if layout.is_int8 else 4 * size
    # Kernels read whole units, so what lies beyond the end of a row must be zero.
    make = torch.empty if padded_features == features else torch.zeros
    return make(count, dtype=torch.uint8)


class NotCapturable(Exception):
    """A captured call needs more than kernels."""


@dataclass
class Program:
    """Tasks in order, what they need kept alive, and the scratch memory of a thread."""

    tasks: list[Task] = field(default_factory=list)
    keep_alive: list[object] = field(default_factory=list)
    scratch_bytes: int = 0
    buffers: dict[tuple[Layout, int, int], list[Tensor]] = field(default_factory=dict)

    def table(self, *values: int) -> int:
        """Address of int64 arguments."""
        self.keep_alive.append(table := np.array(values, np.int64))
        return table.ctypes.data

    def keep(self, tensor: Tensor) -> int:
        """Address of a tensor, which stays alive as long as the program."""
        self.keep_alive.append(tensor)
        return tensor.data_ptr()

    def add(self, part: Program) -> None:
        """Append a program."""
        buffers = {id(tensor) for tensors in self.buffers.values() for tensor in tensors}
        self.tasks += part.tasks
        self.keep_alive += [thing for thing in part.keep_alive if id(thing) not in buffers]
        self.scratch_bytes = max(self.scratch_bytes, part.scratch_bytes)

    def buffer(self, layout: Layout, tokens: int, features: int) -> Tensor:
        """Memory for a result: a buffer of this shape that nothing refers to any more, or a new one.

        Later tasks wait for those that read it, so they may write there: a step of 44 layers needs the memory of one.
        """
        tensors = self.buffers.setdefault((layout, tokens, features), [])
        idle = next((t for t, count in zip(tensors, _references(tensors), strict=True) if count == UNUSED), None)
        if idle is None:
            tensors.append(idle := allocate(layout, tokens, features))
        return idle


def _references(things: list[Tensor] | list[object]) -> list[int]:
    """How many references there are to each thing of a list, the list's own and this function's included."""
    return [sys.getrefcount(thing) for thing in things]


# The references to a thing in a list that nothing else refers to; the number differs between versions of Python.
UNUSED = _references([object()])[0]


class Captured:
    """A pass as one program: new ids, positions and pages go in, the same tasks run."""

    def __init__(self, pool: ThreadPool, ids: Tensor, table: BatchTable, program: Program, out: Tensor) -> None:
        self._pool, self._table, self._program, self._out = pool, table, program, out
        # As an array: torch refuses to write to a tensor that was made in inference mode.
        self._ids = ids.numpy()
        self._tasks = task_table(program.tasks)
        # Inputs and results lie in the same memory every time.
        self._lock = threading.Lock()

    def replay(self, ids: Tensor, batch: Batch) -> Tensor:
        """ids (tokens,), a batch of as many sequences and tokens -> what the captured function returned, in new memory."""
        with self._lock:
            self._ids[:] = ids.numpy()
            self._table.fill(batch)
            self._pool.run(self._tasks, self._program.scratch_bytes)
            # Not torch's copy: it wakes threads that then spin beside ours.
            return torch.from_numpy(self._out.numpy().copy())


class BatchTable:
    """A batch as attention.py reads it, at one address as long as it lives."""

    def __init__(self, batch: Batch, max_pages: int) -> None:
        """max_pages: most pages that a sequence of the batch will have."""
        sequences, tokens = len(batch.block_tables), batch.offsets[-1]
        self.table = np.zeros(attention.HEADER + sequences * attention.SEQUENCE + tokens * attention.TOKEN, np.int64)
        self.pages = np.zeros(max(1, sequences * max_pages), np.int64)
        self.table[:3] = sequences, tokens, self.pages.ctypes.data
        self._stride = max_pages
        self.max_length = max_pages * PAGE
        self.fill(batch)

    def fill(self, batch: Batch) -> None:
        """Take over a batch of as many sequences and tokens."""
        entry = attention.HEADER
        for i, block_table in enumerate(batch.block_tables):
            first, last = batch.offsets[i], batch.offsets[i + 1]
            self.table[entry : entry + 4] = batch.starts[i], first, last - first, i * self._stride
            entry += attention.SEQUENCE
            used = block_table.pages[: self._stride]
            self.pages[i * self._stride : i * self._stride + len(used)] = used
        tokens = self.table[entry:].reshape(-1, attention.TOKEN)
        for column, values in enumerate((batch.positions, batch.pages, batch.slots)):
            tokens[:, column] = values.numpy()
