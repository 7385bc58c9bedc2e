"""Decode steps as graphs: their buckets, the memory that they read and write, and what is in the air. Knows no kernel.

A graph runs the same launches over the same addresses. What differs between two steps is therefore data: pages, lengths,
positions, choices and ids lie in one piece of device memory, and a step begins by copying it there from the host's.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ...cache import Batch, PagePool
from ...errors import GraphError
from ...units import PAGE
from ..backend import Choice, Flight
from ..captured import PerPool
from . import attention, embed_and_sample

MOST_ROWS = 64  # of a step; a power of two, so that every table begins where kernels like it
MOST_GRAPHS = 32  # of a pool; the least recently used one goes first
IN_THE_AIR = 2  # steps that may be given to the device before the first of them is read


class Graphs(Protocol):
    """A device that runs work in the order it is given, later, and repeats what it captured."""

    def capture(self, step: Callable[[], object]) -> Callable[[], object]: ...

    def staging(self, nbytes: int) -> Tensor: ...

    def copy(self, to: Tensor, source: Tensor) -> None: ...

    def mark(self) -> Any: ...

    def wait(self, mark: Any) -> None: ...


class Tables(NamedTuple):
    """The data of a step, as its kernels read it; of tensors on the device, of arrays on the host."""

    choices: Any  # (rows, CHOICE) int64, see ends
    sequences: Any  # (rows, SEQUENCE) int32, see attention
    tokens: Any  # (rows, TOKEN) int32
    pages: Any  # (rows, pages) int32

    @classmethod
    def bytes_for(cls, pages: int) -> int:
        return sum(MOST_ROWS * size * columns for size, columns in cls._columns(pages))

    @classmethod
    def cut(cls, memory: Tensor, pages: int) -> Tables:
        """memory (bytes,) uint8 of the device or the host."""
        columns = cls._columns(pages)
        parts = memory.split([MOST_ROWS * size * n for size, n in columns])
        kinds = {8: torch.int64, 4: torch.int32}
        return cls(*(part.view(kinds[size]).view(MOST_ROWS, n) for part, (size, n) in zip(parts, columns, strict=True)))

    @staticmethod
    def _columns(pages: int) -> list[tuple[int, int]]:
        """Bytes of a number, and how many a row has."""
        return [
            (8, embed_and_sample.CHOICE.value),
            (4, attention.SEQUENCE.value),
            (4, attention.TOKEN.value),
            (4, pages),
        ]


@dataclass(frozen=True)
class Inputs:
    """What a step of a bucket is captured over; towards attention it is the table of a batch."""

    count: int  # rows
    splits: int  # pages that attention looks at
    most_pages: int  # that a row of the table has
    ids: Tensor  # (rows,) int64
    choices: Tensor
    sequences: Tensor
    tokens: Tensor
    pages: Tensor
    chosen: Tensor  # (MOST_ROWS,) int64, what the last step chose and this one is to choose
    excluded: Tensor  # (vocabulary,) int8
    logits: Tensor  # (rows, vocabulary)

    single: ClassVar = True  # no row has more than one new token
    batch: ClassVar = Batch((), (), (), torch.empty(0), torch.empty(0), torch.empty(0))  # what is in it, tables say


class Launched:
    """A step that was given to the device; its tokens come through memory of the host that later steps use again."""

    def __init__(self, graphs: Graphs, lock: threading.RLock, chosen: Tensor, count: int) -> None:
        self._graphs, self._lock, self._chosen, self._count = graphs, lock, chosen, count
        self._mark = graphs.mark()
        self._tokens: list[int] | None = None

    def tokens(self) -> list[int]:
        with self._lock:
            if self._tokens is None:
                self._graphs.wait(self._mark)
                self._tokens = self._chosen[: self._count].tolist()
            return self._tokens


class Seat:
    """Memory of the host for one step in the air: its data on the way there, its tokens on the way back."""

    def __init__(self, graphs: Graphs, pages: int) -> None:
        self.data = graphs.staging(Tables.bytes_for(pages))
        self.tables = Tables(*(table.numpy() for table in Tables.cut(self.data, pages)))
        self.numbers = self.tables.choices.view("float64")  # the same memory
        self.back = graphs.staging(8 * MOST_ROWS).view(torch.int64)
        self.flight: Launched | None = None

    def fill(self, batch: Batch, ids: Sequence[int], choices: Sequence[Choice], rows: int) -> None:
        """A batch of one token a sequence, and rows without any up to so many."""
        count, (tables, numbers) = len(ids), (self.tables, self.numbers)
        tables.sequences[:rows] = 0  # no token: such a row writes nothing
        tables.choices[:rows, embed_and_sample.GIVEN] = 0
        tables.sequences[:count] = [(start, i, 1) for i, start in enumerate(batch.starts)]
        tables.tokens[:count, attention.POSITION] = batch.positions.numpy()
        tables.tokens[:count, attention.PAGE_OF] = batch.pages.numpy()
        tables.tokens[:count, attention.SLOT] = batch.slots.numpy()
        for i, (block_table, id, choice) in enumerate(zip(batch.block_tables, ids, choices, strict=True)):
            tables.pages[i, : len(block_table.pages)] = block_table.pages
            seed = choice.seed - (1 << 64) if choice.seed >> 63 else choice.seed
            tables.choices[i, :4] = id, seed, choice.stream, choice.top_k
            least = math.log(choice.min_p) if choice.min_p > 0 else -math.inf
            numbers[i, 4:7] = choice.temperature, 1 - choice.top_p, least


class Steps:
    """The graphs of a model, made as they are needed: one for each pool, number of rows and number of pages, rounded up.

    Threads take turns; all of them give work to the device in one order, as on CUDA's default stream.
    """

    def __init__(
        self,
        step: Callable[[PagePool, Inputs], object],
        graphs: Graphs,
        device: torch.device,
        vocabulary: int,
        limit: int,
    ) -> None:
        """limit: most tokens of a sequence."""
        self._step, self._graphs, self._device, self._vocabulary = step, graphs, device, vocabulary
        self._pages = -(-limit // PAGE)
        with torch.inference_mode(False):  # it outlives the caller's inference mode, and is written to in place
            self._data = torch.zeros(Tables.bytes_for(self._pages), dtype=torch.uint8, device=device)
            self._chosen = torch.zeros(MOST_ROWS, dtype=torch.int64, device=device)
            self._excluded = torch.zeros(vocabulary, dtype=torch.int8, device=device)
            self._seats = [Seat(graphs, self._pages) for _ in range(IN_THE_AIR)]
        self._excluding: Tensor | None = None
        self._logits: dict[int, Tensor] = {}  # by number of rows
        self._captured: PerPool[tuple[int, int], Callable[[], object]] = PerPool(MOST_GRAPHS)
        self._last: Launched | None = None
        self._lock = threading.RLock()

    def why_not(self, batch: Batch) -> str | None:
        if (rows := len(batch.block_tables)) > MOST_ROWS:
            return f"{rows} sequences are more than the {MOST_ROWS} of a graph"
        return None

    def bucket(self, batch: Batch) -> tuple[int, int]:
        """Rows and pages of the graph for a batch: powers of two, but for the pages of the longest context."""
        pages = max(batch.starts) // PAGE + 1
        return _power(len(batch.block_tables)), min(_power(pages), self._pages)

    def graphs(self, pool: PagePool) -> list[tuple[int, int]]:
        """Buckets that are captured over a pool, the one used last at the end."""
        return list(self._captured.of(pool))

    def launch(
        self,
        pool: PagePool,
        batch: Batch,
        ids: Sequence[int],
        choices: Sequence[Choice],
        excluded: Tensor | None = None,
        previous: Flight | None = None,
    ) -> Launched:
        with self._lock:
            rows, pages = self.bucket(batch)
            self._exclude(excluded)
            if previous is not None and previous is not self._last:  # its tokens are not where this step looks for them
                found = previous.tokens()
                ids = [id if id >= 0 else max(0, found[-1 - id]) for id in ids]
            seat = self._seats[0]
            self._seats.append(self._seats.pop(0))
            if seat.flight is not None:
                seat.flight.tokens()  # read before they are written over
            seat.fill(batch, ids, choices, rows)
            self._graphs.copy(self._data, seat.data)
            self._captured.get(pool, (rows, pages), lambda: self._capture(pool, rows, pages))()
            self._graphs.copy(seat.back, self._chosen)
            seat.flight = self._last = Launched(self._graphs, self._lock, seat.back, len(ids))
            return self._last

    def logits(self, pool: PagePool, batch: Batch, ids: Sequence[int]) -> Tensor:
        with self._lock:
            self.launch(pool, batch, ids, [Choice()] * len(ids)).tokens()
            return self._logits[self.bucket(batch)[0]][: len(ids)].clone()

    def _exclude(self, ids: Tensor | None) -> None:
        if ids is self._excluding or (self._excluding is None and not len(ids if ids is not None else ())):
            return
        self._excluded.zero_()
        if ids is not None:
            self._excluded[ids.to(self._device)] = 1
        self._excluding = ids

    def _capture(self, pool: PagePool, rows: int, pages: int) -> Callable[[], object]:
        """The graph of a bucket, tried on the data that are there: all but what it chooses can be computed again."""
        chosen = self._chosen.clone()
        try:
            if rows not in self._logits:
                with torch.inference_mode(False):
                    self._logits[rows] = torch.empty(rows, self._vocabulary, dtype=torch.float32, device=self._device)
            tables = Tables.cut(self._data, self._pages)
            inputs = Inputs(
                rows, pages, self._pages, tables.choices[:rows, embed_and_sample.GIVEN.value], *tables,
                self._chosen, self._excluded, self._logits[rows],
            )  # fmt: skip
            return self._graphs.capture(lambda: self._step(pool, inputs))
        except Exception as error:  # whatever it is, launches one by one need none of this
            raise GraphError(f"a step of {rows} rows could not be captured: {error}") from error
        finally:
            self._chosen.copy_(chosen)


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
