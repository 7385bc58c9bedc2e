"""Layers that pass through two slots of memory, each fetched while the one before it computes.

A layer comes from its file or from memory into a slot of the host and, to be computed on an accelerator, from there into a slot
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
from .accelerator import Accelerator, Mark

SLOTS = 2
ALIGNMENT = 256  # bytes at a multiple of which a tensor starts in a slot
READ_BYTES = 16 << 20  # of a file at a time
READERS = 4  # requests that a disk is given at once


@dataclass(frozen=True)
class Origin:
    """The file that holds a tensor's bytes, and where; `written_ns` is the file's time as it was when the tensor was mapped."""

    path: Path
    start: int
    written_ns: int


Origins = Mapping[str, Origin]  # by a tensor's name in its layer


# What a layer is made of ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A tensor of a layer and its place in a slot. It is copied from `tensor`, or read from a file where it has an origin."""

    name: str
    tensor: Tensor
    start: int
    origin: Origin | None

    def bytes_in(self, slot: Tensor) -> Tensor:
        return slot[self.start : self.start + self.tensor.nbytes]

    def view(self, slot: Tensor) -> Tensor:
        return self.bytes_in(slot).view(self.tensor.dtype).view(self.tensor.shape)


class Image:
    """How the tensors of a layer lie in one piece of memory of `nbytes`."""

    def __init__(self, layer: nn.Module, origins: Origins | None = None) -> None:
        """origins: of the tensors that are to be read from their files, so that nothing of them stays in memory."""
        self.pieces: list[Piece] = []
        self.nbytes = 0
        for name, tensor in layer.state_dict().items():
            self.pieces.append(Piece(name, tensor, self.nbytes, (origins or {}).get(name)))
            self.nbytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._layer = layer

    def put(self, slot: Tensor, files: Files) -> None:
        """Bring the layer into memory of the host, (at least nbytes,) uint8. Raises CheckpointError where a file fails."""
        for piece in self.pieces:
            if piece.origin is None:
                piece.view(slot).copy_(piece.tensor)
        files.read([(piece.origin, piece.bytes_in(slot)) for piece in self.pieces if piece.origin is not None])

    def layer(self, slot: Tensor, index: int) -> GPTNeoXLayer:
        """The layer as it is now, with its tensors in a slot and its cache under `index`."""
        twin = hollow(self._layer)
        for piece in self.pieces:
            install(twin, piece.name, piece.view(slot))
        assert isinstance(twin, GPTNeoXLayer)
        twin.index = index
        return twin


def hollow(module: nn.Module) -> nn.Module:
    """A module that shares the tensors of another, and can be given others without touching that one."""
    twin = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = dict(module.__dict__[kind])
    twin._modules = {name: hollow(child) for name, child in module._modules.items() if child is not None}
    return twin


def install(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer, named as in state_dict."""
    owner, key = module, name
    while (child := owner._modules.get(key.partition(".")[0])) is not None:  # what is left may have dots of its own
        owner, key = child, key.partition(".")[2]
    setattr(owner, key, nn.Parameter(value, requires_grad=False) if key in owner._parameters else value)


class Files:
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


# The KV cache of a layer that visits the device -------------------------------------------------------------------------


class Loan:
    """The pages of the host's KV cache that a batch uses, numbered anew for copies of them on the device.

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


class Copies:
    """Room for `count` pages of one layer, in staging memory and on the device; `pool` is a KV cache over the latter."""

    def __init__(self, pool: PagePool, count: int, accelerator: Accelerator) -> None:
        """pool: the host's, whose pages these are copies of."""
        self.count, self._accelerator = count, accelerator
        storage, heads, head_dim = pool.storage[0], pool.storage[0].shape[2], pool.storage[0].shape[4]
        own = [storage, *pool.scales[:1]]

        def room(make: Callable[[int], Tensor]) -> list[Tensor]:
            shapes = [(count, *t.shape[1:]) for t in own]
            return [make(math.prod(s) * t.itemsize).view(t.dtype).view(s) for t, s in zip(own, shapes, strict=True)]

        self._staged, self._device = room(accelerator.staging), room(accelerator.empty)
        self.pool = PagePool(heads, head_dim, pool.dtype, [])
        self.pool.storage, self.pool.scales = self._device[:1], self._device[1:]

    def fit(self, loan: Loan) -> bool:
        return self.count >= len(loan.pages) and self.pool.dtype == loan.pool.dtype

    def fetch(self, loan: Loan, layer: int) -> None:
        """Put the pages that hold something on the copy queue."""
        first, last = loan.fresh, len(loan.pages)
        for host, staged, device in zip(loan.storage(layer), self._staged, self._device, strict=True):
            torch.index_select(host, 0, loan.pages[first:], out=staged[first:last])
            self._accelerator.copy(device[first:last], staged[first:last])

    def store(self, loan: Loan, layer: int) -> None:
        """Bring the written pages back to the host's pool; returns when they are there."""
        count = loan.written
        for staged, device in zip(self._staged, self._device, strict=True):
            self._accelerator.copy(staged[:count], device[:count])
        self._accelerator.wait(self._accelerator.mark("copy"))
        for host, staged in zip(loan.storage(layer), self._staged, strict=True):
            host.index_copy_(0, loan.pages[:count], staged[:count])


# The slots --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Slot:
    """Memory for a layer, what is in it, and until when."""

    host: Tensor
    device: Tensor | None = None
    copies: Copies | None = None
    index: int = -1
    filled: Future[None] | None = None
    arrived: Mark = None  # copy queue: the layer is on the device, so the host's memory may be filled again
    used: Mark = None  # compute queue: the layer is computed, so the device's memory may be filled again
    owes: tuple[int, Loan] | None = None  # a layer's new keys and values, which are on the device only


@dataclass(frozen=True)
class Lent:
    """A layer in a slot, and the cache and batch to run it with."""

    layer: GPTNeoXLayer
    pool: PagePool
    batch: Batch


class Ring:
    """Two slots and the thread that fills them. For one pass at a time."""

    def __init__(self, images: Mapping[int, Image], accelerator: Accelerator | None = None, pages: int = 0) -> None:
        """images: the layers that may pass through, by number. pages: of the KV cache that a batch will have, if known."""
        self.images, self.accelerator, self._pages = images, accelerator, pages
        size = max(image.nbytes for image in images.values())
        self._slots = [self._slot(size) for _ in range(SLOTS)]
        self._files, self._fetcher = Files(), ThreadPoolExecutor(1, "neox-lite-fetch")
        self._idle, self._coming = deque(self._slots), deque[Slot]()

    def _slot(self, size: int) -> Slot:
        if self.accelerator is None:
            return Slot(torch.empty(size, dtype=torch.uint8))
        return Slot(self.accelerator.staging(size), self.accelerator.empty(size))

    @contextlib.contextmanager
    def passing(
        self, order: Sequence[int], pool: PagePool, batch: Batch, upload: bool
    ) -> Iterator[Callable[[], contextlib.AbstractContextManager[Lent]]]:
        """Lend layers one after the other in this order, on the device or in the host's memory; pool is the host's.

        What this gives is called for each layer, which must be computed within the context that the call returns. At the end
        all keys and values are in the host's cache, and slots of the host fill for the next pass.
        """
        loan = Loan(pool, batch) if upload else None
        ahead = [slot.index for slot in self._coming]
        if upload or ahead != list(order[: len(ahead)]):
            self._clear()
        waiting = deque(order[len(self._coming) :])
        self._fetch(waiting, loan)
        try:
            yield lambda: self._lend(waiting, pool, batch, loan)
            for slot in self._slots:
                self._fetcher.submit(self._settle, slot).result()
        except BaseException:
            self._clear()
            raise
        if not upload:
            self._fetch(deque(order[:SLOTS]), None)

    @contextlib.contextmanager
    def _lend(self, waiting: deque[int], pool: PagePool, batch: Batch, loan: Loan | None) -> Iterator[Lent]:
        slot = self._coming.popleft()
        assert slot.filled is not None
        slot.filled.result()
        image = self.images[slot.index]
        if loan is None:
            yield Lent(image.layer(slot.host, slot.index), pool, batch)
        else:
            assert self.accelerator is not None and slot.device is not None and slot.copies is not None
            self.accelerator.follow("compute", slot.arrived)
            try:
                yield Lent(image.layer(slot.device, 0), slot.copies.pool, loan.batch)  # a pool of one layer
            finally:
                slot.used = self.accelerator.mark("compute")
            slot.owes = slot.index, loan
        self._idle.append(slot)
        self._fetch(waiting, loan)

    def _clear(self) -> None:
        """Forget what is fetched and what is owed, once the fetching thread is done with all it was given."""
        self._fetcher.submit(lambda: None).result()
        for slot in self._slots:
            slot.owes = None
        self._coming.clear()
        self._idle = deque(self._slots)

    def _fetch(self, waiting: deque[int], loan: Loan | None) -> None:
        """Set idle slots to the layers that come next."""
        while self._idle and waiting:
            slot = self._idle.popleft()
            slot.index = waiting.popleft()
            slot.filled = self._fetcher.submit(self._fill, slot, slot.index, loan)
            self._coming.append(slot)

    # In the fetching thread -----------------------------------------------------------------------------------------------

    def _fill(self, slot: Slot, index: int, loan: Loan | None) -> None:
        """Bring a layer into a slot; with a loan, put it and its pages on the copy queue."""
        image, accelerator = self.images[index], self.accelerator
        if slot.arrived is not None and accelerator is not None:
            accelerator.wait(slot.arrived)
        image.put(slot.host, self._files)
        self._settle(slot)
        if loan is None:
            return
        assert accelerator is not None and slot.device is not None
        if slot.copies is None or not slot.copies.fit(loan):
            slot.copies = Copies(loan.pool, max(self._pages, len(loan.pages)), accelerator)
        if slot.used is not None:
            accelerator.follow("copy", slot.used)
        accelerator.copy(slot.device[: image.nbytes], slot.host[: image.nbytes])
        slot.copies.fetch(loan, index)
        slot.arrived = accelerator.mark("copy")

    def _settle(self, slot: Slot) -> None:
        """Pay what a slot owes to the host's cache."""
        if slot.owes is None:
            return
        assert self.accelerator is not None and slot.copies is not None
        (index, loan), slot.owes = slot.owes, None
        self.accelerator.follow("copy", slot.used)
        slot.copies.store(loan, index)
