"""Decode steps as CUDA graphs: their buckets, the memory that they read and write, and the steps not read yet. Knows no kernel.

A graph runs the same launches over the same addresses. What differs between two steps is therefore data: pages, lengths,
positions, sampling parameters and ids lie in one piece of device memory, and a step begins by copying them there.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ...cache import Batch, PagePool
from ...errors import GraphError
from ...units import PAGE
from ..backend import DeviceSampling, Forward, PendingStep
from ..graphs import EagerRunner, GraphCache
from . import attention, embed_and_sample

MAX_ROWS = 64  # of a step; a power of two, so that every table begins where kernels like it
MAX_PENDING = 2  # steps that the device may have been given before the first of them is read


class GraphDevice(Protocol):
    """A device that runs work in the order it is given, later, and repeats what it captured."""

    def capture(self, step: Callable[[], object]) -> Callable[[], object]: ...

    def staging(self, nbytes: int) -> Tensor: ...

    def copy(self, to: Tensor, source: Tensor) -> None: ...

    def mark(self) -> Any: ...

    def wait(self, mark: Any) -> None: ...


class Tables(NamedTuple):
    """The data of a step, as its kernels read it; of tensors on the device, of arrays on the host."""

    sampling: Any  # (rows, SAMPLING) int64, see embed_and_sample
    sequences: Any  # (rows, SEQUENCE) int32, see attention
    tokens: Any  # (rows, TOKEN) int32
    pages: Any  # (rows, pages) int32

    @classmethod
    def bytes_for(cls, pages: int) -> int:
        return sum(MAX_ROWS * size * columns for size, columns in cls._columns(pages))

    @classmethod
    def cut(cls, memory: Tensor, pages: int) -> Tables:
        """memory (bytes,) uint8 of the device or the host."""
        columns = cls._columns(pages)
        parts = memory.split([MAX_ROWS * size * n for size, n in columns])
        kinds = {8: torch.int64, 4: torch.int32}
        return cls(*(part.view(kinds[size]).view(MAX_ROWS, n) for part, (size, n) in zip(parts, columns, strict=True)))

    @staticmethod
    def _columns(pages: int) -> list[tuple[int, int]]:
        """Bytes of a number, and how many a row has."""
        return [
            (8, embed_and_sample.SAMPLING.value),
            (4, attention.SEQUENCE.value),
            (4, attention.TOKEN.value),
            (4, pages),
        ]


@dataclass(frozen=True)
class Inputs:
    """What a step of a bucket is captured over; towards attention it is the table of a batch."""

    count: int  # rows
    splits: int  # pages that attention looks at
    max_pages: int  # of a row of the table
    ids: Tensor  # (rows,) int64
    sampling: Tensor
    sequences: Tensor
    tokens: Tensor
    pages: Tensor
    sampled: Tensor  # (MAX_ROWS,) int64: holds what the last step sampled, and then what this one does
    excluded: Tensor  # (vocabulary,) int8
    logits: Tensor  # (rows, vocabulary)

    single: ClassVar = True  # no row has more than one new token
    batch: ClassVar = Batch((), (), (), torch.empty(0), torch.empty(0), torch.empty(0))  # what is in it, tables say


class PendingGraph:
    """A step that the device was given; its tokens come through memory of the host that later steps use again."""

    def __init__(self, device: GraphDevice, lock: threading.RLock, sampled: Tensor, count: int) -> None:
        self._device, self._lock, self._sampled, self._count = device, lock, sampled, count
        self._mark = device.mark()
        self._tokens: list[int] | None = None

    def tokens(self) -> list[int]:
        with self._lock:
            if self._tokens is None:
                self._device.wait(self._mark)
                self._tokens = self._sampled[: self._count].tolist()
            return self._tokens


class StagingBuffer:
    """Memory of the host for one pending step: its data on the way to the device, its tokens on the way back."""

    def __init__(self, device: GraphDevice, pages: int) -> None:
        self.data = device.staging(Tables.bytes_for(pages))
        self.tables = Tables(*(table.numpy() for table in Tables.cut(self.data, pages)))
        # The same memory as floating-point numbers.
        self.numbers = self.tables.sampling.view("float64")
        self.back = device.staging(8 * MAX_ROWS).view(torch.int64)
        self.pending: PendingGraph | None = None

    def fill(self, batch: Batch, ids: Sequence[int], sampling: Sequence[DeviceSampling], rows: int) -> None:
        """A batch of one token a sequence, and up to `rows` rows without a token, which write nothing."""
        count, (tables, numbers) = len(ids), (self.tables, self.numbers)
        tables.sequences[:rows] = 0
        tables.sampling[:rows, embed_and_sample.GIVEN] = 0
        tables.sequences[:count] = [(start, i, 1) for i, start in enumerate(batch.starts)]
        tables.tokens[:count, attention.POSITION] = batch.positions.numpy()
        tables.tokens[:count, attention.PAGE_OF] = batch.pages.numpy()
        tables.tokens[:count, attention.SLOT] = batch.slots.numpy()
        for i, (block_table, id, one) in enumerate(zip(batch.block_tables, ids, sampling, strict=True)):
            tables.pages[i, : len(block_table.pages)] = block_table.pages
            seed = one.seed - (1 << 64) if one.seed >> 63 else one.seed
            tables.sampling[i, :4] = id, seed, one.stream, one.top_k
            least = math.log(one.min_p) if one.min_p > 0 else -math.inf
            numbers[i, 4:7] = one.temperature, 1 - one.top_p, least


class GraphRunner(EagerRunner):
    """Captures a step for each number of rows and of pages, rounded up, and gives it to the device, which samples.

    Threads take turns; all of them give work to the device in one order, as on CUDA's default stream. After the first capture
    that fails, every pass runs operation by operation, with a warning that says why.
    """

    def __init__(
        self,
        forward: Forward,
        step: Callable[[PagePool, Inputs], object],
        graphs: GraphDevice,
        device: torch.device,
        vocabulary: int,
        limit: int,
    ) -> None:
        """step: forward and sampling, over tables. limit: most tokens of a sequence."""
        super().__init__(forward, None)
        self._step, self._graphs, self._device, self._vocabulary = step, graphs, device, vocabulary
        self._pages = -(-limit // PAGE)
        # The memory outlives the caller's inference mode, and is written to in place.
        with torch.inference_mode(False):
            self._data = torch.zeros(Tables.bytes_for(self._pages), dtype=torch.uint8, device=device)
            self._sampled = torch.zeros(MAX_ROWS, dtype=torch.int64, device=device)
            self._excluded = torch.zeros(vocabulary, dtype=torch.int8, device=device)
            self._buffers = [StagingBuffer(graphs, self._pages) for _ in range(MAX_PENDING)]
        self._excluding: Tensor | None = None
        self._logits: dict[int, Tensor] = {}  # by number of rows
        self._cache: GraphCache[tuple[int, int], Callable[[], object]] = GraphCache()
        self._last: PendingGraph | None = None
        self._lock = threading.RLock()

    def run(self, x: Tensor, pool: PagePool, batch: Batch) -> Tensor:
        """x (rows,) ids -> logits (rows, vocabulary) in new memory."""
        if len(x) == len(batch.block_tables):
            with self._lock:
                pending = self.launch(pool, batch, x.tolist(), [DeviceSampling()] * len(x))
                if pending is not None:
                    pending.tokens()
                    return self._logits[self.bucket(batch)[0]][: len(x)].clone()
        return self._forward(x, pool, batch)

    def launch(
        self,
        pool: PagePool,
        batch: Batch,
        ids: Sequence[int],
        sampling: Sequence[DeviceSampling],
        excluded: Tensor | None = None,
        previous: PendingStep | None = None,
    ) -> PendingGraph | None:
        if self.unsupported_reason is not None or len(batch.block_tables) > MAX_ROWS:
            return None
        with self._lock:
            # 1. The step's data, with what an earlier step sampled where the device cannot look it up.
            rows, pages = self.bucket(batch)
            self._exclude(excluded)
            if previous is not None and previous is not self._last:
                found = previous.tokens()
                ids = [id if id >= 0 else max(0, found[-1 - id]) for id in ids]
            buffer = self._buffers[0]
            self._buffers.append(self._buffers.pop(0))
            # Tokens of the step before are read before the memory is written over.
            if buffer.pending is not None:
                buffer.pending.tokens()
            buffer.fill(batch, ids, sampling, rows)
            self._graphs.copy(self._data, buffer.data)
            # 2. The graph of the bucket, captured if need be.
            try:
                replay = self._cache.get(pool, (rows, pages), lambda: self._capture(pool, rows, pages))
            except GraphError as error:
                self.unsupported_reason = str(error)
                warnings.warn(f"decode steps run without CUDA graphs, which is slower: {error}", stacklevel=4)
                return None
            # 3. Its run, and the way back of its tokens.
            replay()
            self._graphs.copy(buffer.back, self._sampled)
            buffer.pending = self._last = PendingGraph(self._graphs, self._lock, buffer.back, len(ids))
            return self._last

    def bucket(self, batch: Batch) -> tuple[int, int]:
        """Rows and pages of the graph for a batch: powers of two, but for the pages of the longest context."""
        pages = max(batch.starts) // PAGE + 1
        return _power(len(batch.block_tables)), min(_power(pages), self._pages)

    def graphs(self, pool: PagePool) -> dict[tuple[int, int], Callable[[], object]]:
        """By (rows, pages)."""
        return self._cache.of(pool)

    def _exclude(self, ids: Tensor | None) -> None:
        if ids is self._excluding or (self._excluding is None and not len(ids if ids is not None else ())):
            return
        self._excluded.zero_()
        if ids is not None:
            self._excluded[ids.to(self._device)] = 1
        self._excluding = ids

    def _capture(self, pool: PagePool, rows: int, pages: int) -> Callable[[], object]:
        """The graph of a bucket, tried on the data that are there: all but what it samples can be computed again."""
        sampled = self._sampled.clone()
        try:
            if rows not in self._logits:
                with torch.inference_mode(False):
                    self._logits[rows] = torch.empty(rows, self._vocabulary, dtype=torch.float32, device=self._device)
            tables = Tables.cut(self._data, self._pages)
            inputs = Inputs(
                rows, pages, self._pages, tables.sampling[:rows, embed_and_sample.GIVEN.value], *tables,
                self._sampled, self._excluded, self._logits[rows],
            )  # fmt: skip
            return self._graphs.capture(lambda: self._step(pool, inputs))
        # Whatever it is, launches one by one need none of this.
        except Exception as error:
            raise GraphError(f"a step of {rows} rows could not be captured: {error}") from error
        finally:
            self._sampled.copy_(sampled)


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
