"""Layers that pass through two buffers of memory, each fetched while the one before it computes.

A layer comes from its file or from memory into a buffer of the host and, to be computed on an accelerator, from there into one
of the device, with the pages of its KV cache that the batch uses. Knows no plan.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..cache import Batch, BlockTable, PagePool
from ..errors import CheckpointError
from ..layers import GPTNeoXLayer
from ..units import PAGE
from .accelerator import Accelerator, Event

BUFFERS = 2
ALIGNMENT = 256  # bytes at a multiple of which a tensor starts in a buffer
READ_BYTES = 16 << 20  # of a file at a time
READERS = 4  # requests that a disk is given at once


@dataclass(frozen=True)
class Origin:
    """The file that holds a tensor's bytes, and where; `written_ns` is the file's time as it was when the tensor was mapped."""

    path: Path
    start: int
    written_ns: int


Origins = Mapping[str, Origin]  # by a tensor's name in its layer


@dataclass(frozen=True)
class TensorSlot:
    """A tensor of a layer and its place in a buffer. It is copied from `tensor`, or read from a file where it has an origin."""

    name: str
    tensor: Tensor
    start: int
    origin: Origin | None

    def bytes_in(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.start + self.tensor.nbytes]

    def view(self, buffer: Tensor) -> Tensor:
        return self.bytes_in(buffer).view(self.tensor.dtype).view(self.tensor.shape)


class LayerLayout:
    """How the tensors of a layer lie in one piece of memory of `nbytes`."""

    def __init__(self, layer: nn.Module, origins: Origins | None = None) -> None:
        """origins: of the tensors that are to be read from their files, so that nothing of them stays in memory."""
        self.slots: list[TensorSlot] = []
        self.nbytes = 0
        for name, tensor in layer.state_dict().items():
            self.slots.append(TensorSlot(name, tensor, self.nbytes, (origins or {}).get(name)))
            self.nbytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._layer = layer

    def fetch(self, buffer: Tensor, files: FileReader) -> None:
        """Bring the layer into memory of the host, (at least nbytes,) uint8. Raises CheckpointError where a file fails."""
        for slot in self.slots:
            if slot.origin is None:
                slot.view(buffer).copy_(slot.tensor)
        files.read([(slot.origin, slot.bytes_in(buffer)) for slot in self.slots if slot.origin is not None])

    def layer(self, buffer: Tensor, index: int) -> GPTNeoXLayer:
        """The layer as it is now, with its tensors in a buffer and its cache under `index`."""
        twin = shallow_copy(self._layer)
        for slot in self.slots:
            set_tensor(twin, slot.name, slot.view(buffer))
        assert isinstance(twin, GPTNeoXLayer)
        twin.index = index
        return twin


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module that shares the tensors of another, and can be given others without touching that one."""
    twin = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = dict(module.__dict__[kind])
    twin._modules = {name: shallow_copy(child) for name, child in module._modules.items() if child is not None}
    return twin


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer, named as in state_dict."""
    owner, key = module, name
    while (child := owner._modules.get(key.partition(".")[0])) is not None:  # what is left may have dots of its own
        owner, key = child, key.partition(".")[2]
    setattr(owner, key, nn.Parameter(value, requires_grad=False) if key in owner._parameters else value)


class FileReader:
    """Weight files, read in large pieces, several at once, of which nothing stays in the system's page cache."""

    def __init__(self) -> None:
        self._readers = ThreadPoolExecutor(READERS, "neox-lite-read")

    def read(self, parts: Sequence[tuple[Origin, Tensor]]) -> None:
        """parts: where bytes are, and where they go, (bytes,) uint8. Raises CheckpointError."""
        pieces = [
            (origin, at, memoryview(to.numpy())[at : at + READ_BYTES])  # type: ignore[arg-type]
            for origin, to in parts
            for at in range(0, len(to), READ_BYTES)
        ]
        for done in [self._readers.submit(_read, *piece) for piece in pieces]:
            done.result()


def _read(origin: Origin, at: int, to: memoryview) -> None:
    """Fill `to` from the byte `at` of a tensor on."""
    path, start, done = origin.path, origin.start + at, 0
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_mtime_ns != origin.written_ns:
                raise CheckpointError(f"{path}: has changed since the model was loaded; load it again")
            file.seek(start)
            while done < len(to):
                if not (count := file.readinto(to[done:])):
                    raise CheckpointError(f"{path}: ends before its weights do; fetch or convert it again")
                done += count
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), start, len(to), os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


class PageMap:
    """The pages of the host's KV cache that a batch uses, numbered for copies of them on the device.

    pages: numbers in the host's pool, in the order of the copies: first the `written` ones that the batch writes to, and of
    these first the `fresh` ones that hold nothing yet. batch: the batch in the new numbers.
    """

    def __init__(self, pool: PagePool, batch: Batch) -> None:
        self.pool = pool
        past = [
            p for s, start in zip(batch.block_tables, batch.starts, strict=True) for p in s.pages[: -(-start // PAGE)]
        ]
        held = set(past)
        written = sorted(dict.fromkeys(batch.pages.tolist()), key=lambda page: page in held)
        self.fresh, self.written = sum(page not in held for page in written), len(written)
        self.pages = torch.tensor(list(dict.fromkeys([*written, *past])), dtype=torch.long)
        number = {page: i for i, page in enumerate(self.pages.tolist())}
        block_tables = [
            BlockTable([number[page] for page in block_table.pages if page in number], start)
            for block_table, start in zip(batch.block_tables, batch.starts, strict=True)
        ]
        pages = torch.tensor([number[page] for page in batch.pages.tolist()], dtype=torch.long)
        self.batch = Batch(tuple(block_tables), batch.starts, batch.offsets, batch.positions, pages, batch.slots)

    def storage(self, layer: int) -> list[Tensor]:
        """A layer's keys and values in the host's pool and, where those are codes, their scales."""
        return [of_layers[layer] for of_layers in (self.pool.storage, self.pool.scales) if of_layers]


class PageBuffer:
    """Room for `count` pages of one layer, in staging memory and on the device; `pool` is a KV cache over the latter."""

    def __init__(self, pool: PagePool, count: int, accelerator: Accelerator) -> None:
        """pool: the host's, whose pages are copied here."""
        self.count, self._accelerator = count, accelerator
        storage, heads, head_dim = pool.storage[0], pool.storage[0].shape[2], pool.storage[0].shape[4]
        own = [storage, *pool.scales[:1]]

        def room(make: Callable[[int], Tensor]) -> list[Tensor]:
            shapes = [(count, *t.shape[1:]) for t in own]
            return [make(math.prod(s) * t.itemsize).view(t.dtype).view(s) for t, s in zip(own, shapes, strict=True)]

        self._staged, self._device = room(accelerator.staging), room(accelerator.empty)
        self.pool = PagePool(heads, head_dim, pool.dtype, [])
        self.pool.storage, self.pool.scales = self._device[:1], self._device[1:]

    def fits(self, pages: PageMap) -> bool:
        return self.count >= len(pages.pages) and self.pool.dtype == pages.pool.dtype

    def fetch(self, pages: PageMap, layer: int) -> None:
        """Put the pages that hold something on the copy queue."""
        first, last = pages.fresh, len(pages.pages)
        for host, staged, device in zip(pages.storage(layer), self._staged, self._device, strict=True):
            torch.index_select(host, 0, pages.pages[first:], out=staged[first:last])
            self._accelerator.copy(device[first:last], staged[first:last])

    def write_back(self, pages: PageMap, layer: int) -> None:
        """Bring the written pages back to the host's pool; returns when they are there."""
        count = pages.written
        for staged, device in zip(self._staged, self._device, strict=True):
            self._accelerator.copy(staged[:count], device[:count])
        self._accelerator.synchronize(self._accelerator.record("copy"))
        for host, staged in zip(pages.storage(layer), self._staged, strict=True):
            host.index_copy_(0, pages.pages[:count], staged[:count])


@dataclass(eq=False)
class LayerBuffer:
    """Memory for a layer, what is in it, and until when."""

    host: Tensor
    device: Tensor | None = None
    pages: PageBuffer | None = None
    index: int = -1
    filled: Future[None] | None = None
    copied: Event = None  # copy queue: the layer is on the device, so the host's memory may be filled again
    computed: Event = None  # compute queue: the layer is computed, so the device's memory may be filled again
    unwritten: tuple[int, PageMap] | None = None  # a layer's new keys and values, which are on the device only


@dataclass(frozen=True)
class StreamedLayer:
    """A layer in a buffer, and the cache and batch to run it with."""

    layer: GPTNeoXLayer
    pool: PagePool
    batch: Batch


NextLayer = Callable[[], contextlib.AbstractContextManager[StreamedLayer]]


class LayerStreamer:
    """Two buffers and the thread that fills them. For one pass at a time."""

    def __init__(
        self, layouts: Mapping[int, LayerLayout], accelerator: Accelerator | None = None, pages: int = 0
    ) -> None:
        """layouts: of the layers that may pass through, by number. pages: of the KV cache that a batch will have, if known."""
        self.layouts, self.accelerator, self._pages = layouts, accelerator, pages
        size = max(layout.nbytes for layout in layouts.values())
        self._buffers = [self._buffer(size) for _ in range(BUFFERS)]
        self._files, self._fetcher = FileReader(), ThreadPoolExecutor(1, "neox-lite-fetch")
        self._idle, self._coming = deque(self._buffers), deque[LayerBuffer]()

    def _buffer(self, size: int) -> LayerBuffer:
        if self.accelerator is None:
            return LayerBuffer(torch.empty(size, dtype=torch.uint8))
        return LayerBuffer(self.accelerator.staging(size), self.accelerator.empty(size))

    @contextlib.contextmanager
    def stream(self, order: Sequence[int], pool: PagePool, batch: Batch, upload: bool) -> Iterator[NextLayer]:
        """Give layers one after the other in this order, on the device or in the host's memory; pool is the host's.

        What this gives is called for each layer, which must be computed within the context that the call returns. At the end
        all keys and values are in the host's cache, and buffers of the host fill for the next pass.
        """
        pages = PageMap(pool, batch) if upload else None
        ahead = [buffer.index for buffer in self._coming]
        if upload or ahead != list(order[: len(ahead)]):
            self._clear()
        waiting = deque(order[len(self._coming) :])
        self._fetch(waiting, pages)
        try:
            yield lambda: self._next(waiting, pool, batch, pages)
            for buffer in self._buffers:
                self._fetcher.submit(self._write_back, buffer).result()
        except BaseException:
            self._clear()
            raise
        if not upload:
            self._fetch(deque(order[:BUFFERS]), None)

    @contextlib.contextmanager
    def _next(
        self, waiting: deque[int], pool: PagePool, batch: Batch, pages: PageMap | None
    ) -> Iterator[StreamedLayer]:
        buffer = self._coming.popleft()
        assert buffer.filled is not None
        buffer.filled.result()
        layout = self.layouts[buffer.index]
        if pages is None:
            yield StreamedLayer(layout.layer(buffer.host, buffer.index), pool, batch)
        else:
            assert self.accelerator is not None and buffer.device is not None and buffer.pages is not None
            self.accelerator.wait_event("compute", buffer.copied)
            try:
                # The device's pool has one layer.
                yield StreamedLayer(layout.layer(buffer.device, 0), buffer.pages.pool, pages.batch)
            finally:
                buffer.computed = self.accelerator.record("compute")
            buffer.unwritten = buffer.index, pages
        self._idle.append(buffer)
        self._fetch(waiting, pages)

    def _clear(self) -> None:
        """Drop what is fetched and what is unwritten, once the fetching thread is done with all it was given."""
        self._fetcher.submit(lambda: None).result()
        for buffer in self._buffers:
            buffer.unwritten = None
        self._coming.clear()
        self._idle = deque(self._buffers)

    def _fetch(self, waiting: deque[int], pages: PageMap | None) -> None:
        """Set idle buffers to the layers that come next."""
        while self._idle and waiting:
            buffer = self._idle.popleft()
            buffer.index = waiting.popleft()
            buffer.filled = self._fetcher.submit(self._fill, buffer, buffer.index, pages)
            self._coming.append(buffer)

    # In the fetching thread -----------------------------------------------------------------------------------------------

    def _fill(self, buffer: LayerBuffer, index: int, pages: PageMap | None) -> None:
        """Bring a layer into a buffer; for the device, put it and its pages on the copy queue."""
        layout, accelerator = self.layouts[index], self.accelerator
        if buffer.copied is not None and accelerator is not None:
            accelerator.synchronize(buffer.copied)
        layout.fetch(buffer.host, self._files)
        self._write_back(buffer)
        if pages is None:
            return
        assert accelerator is not None and buffer.device is not None
        if buffer.pages is None or not buffer.pages.fits(pages):
            buffer.pages = PageBuffer(pages.pool, max(self._pages, len(pages.pages)), accelerator)
        if buffer.computed is not None:
            accelerator.wait_event("copy", buffer.computed)
        accelerator.copy(buffer.device[: layout.nbytes], buffer.host[: layout.nbytes])
        buffer.pages.fetch(pages, index)
        buffer.copied = accelerator.record("copy")

    def _write_back(self, buffer: LayerBuffer) -> None:
        """Bring a layer's new keys and values to the host's cache, where they are on the device only."""
        if buffer.unwritten is None:
            return
        assert self.accelerator is not None and buffer.pages is not None
        (index, pages), buffer.unwritten = buffer.unwritten, None
        self.accelerator.wait_event("copy", buffer.computed)
        buffer.pages.write_back(pages, index)
