"""The paged KV cache: a pool of pages, block tables that share them, and the batch that one forward pass works on.

Knows no model: keys and values come and go as tensors; a page number means the same page in every layer's storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from weakref import WeakMethod

import torch
from torch import Tensor

from .errors import ArgumentError, CacheError
from .units import PAGE

MAX_ENTRIES = 64  # of a PrefixCache
TOP = 127  # largest int8 code; -128 is left out, so that the codes of x and -x are each other's negatives


@dataclass(eq=False)
class BlockTable:
    """The pages of one sequence, and how many tokens of them are filled. Its pool alone makes, shares, cuts and frees it."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    freed: bool = False


class PagePool:
    """Keys and values of all layers in pages of 128 tokens, handed out to block tables and counted by reference.

    storage[layer] is (pages, 2, heads, 128, head_dim) in `dtype` on that layer's device; index 0 holds keys, 1 values.
    Where dtype is int8, storage holds codes and scales[layer], (pages, 2, heads, 128) float16, what one code of a token's
    head stands for; else scales is []. The pool doubles as it fills, up to `limit` pages; then CacheError. Before it grows or
    fails, it calls `reclaim` with the number of free pages it needs; that may free block tables which nobody waits for.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        devices: Sequence[torch.device],
        pages: int = 0,
        limit: int | None = None,
    ) -> None:
        if not dtype.is_floating_point and dtype != torch.int8:
            raise ArgumentError(f"the KV cache's dtype is {dtype}, expected a floating-point one or torch.int8")
        self.dtype, self.limit = dtype, limit
        self.reclaim: Callable[[int], object] | None = None
        self.storage = [torch.empty(0, 2, heads, PAGE, head_dim, dtype=dtype, device=d) for d in devices]
        scaled = devices if dtype == torch.int8 else ()
        self.scales = [torch.empty(0, 2, heads, PAGE, dtype=torch.float16, device=d) for d in scaled]
        self._users: list[int] = []  # reference count of each page
        self._free: list[int] = []
        if pages:
            self._grow(pages)

    @property
    def pages(self) -> int:
        return len(self._users)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        """Of one page in all layers."""
        return sum(s.shape[1:].numel() * s.element_size() for s in (*self.storage, *self.scales))

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in (*self.storage, *self.scales))

    def new(self) -> BlockTable:
        return BlockTable()

    def reserve(self, block_table: BlockTable, count: int) -> None:
        """Make room for `count` more tokens, so that the pages they land in belong to this block table alone."""
        self._alive(block_table)
        self._trim(block_table)
        used = block_table.length % PAGE
        new = -(-(block_table.length + count) // PAGE) - len(block_table.pages)
        if self.pages_needed(block_table, count) > len(self._free) and self.reclaim is not None:
            self.reclaim(self.pages_needed(block_table, count))
        if (lacking := self.pages_needed(block_table, count) - len(self._free)) > 0:
            self._grow(self.pages + lacking)
        if self.pages_needed(block_table, count) > new:  # copy on write
            old, copy = block_table.pages[-1], self._take()
            for s in (*self.storage, *self.scales):
                s[copy, :, :, :used] = s[old, :, :, :used]
            self._drop(old)
            block_table.pages[-1] = copy
        block_table.pages += [self._take() for _ in range(new)]

    def pages_needed(self, block_table: BlockTable, count: int) -> int:
        """Pages that `reserve` would take, with the one for a copy where others hold the page that is written to."""
        filled, used = divmod(block_table.length, PAGE)
        new = -(-(block_table.length + count) // PAGE) - filled - (used > 0)
        return new + (count > 0 and used > 0 and self._users[block_table.pages[filled]] > 1)

    @property
    def room(self) -> float:
        """Pages that are free, or that the pool may grow by; without a limit, infinitely many."""
        return self.free_pages + (float("inf") if self.limit is None else self.limit - self.pages)

    def fork(self, block_table: BlockTable) -> BlockTable:
        """A second block table with the same tokens; both share the pages until one of them writes."""
        self._alive(block_table)
        self._trim(block_table)
        for page in block_table.pages:
            self._users[page] += 1
        return BlockTable(list(block_table.pages), block_table.length)

    def truncate(self, block_table: BlockTable, length: int) -> None:
        """Drop all tokens from `length` on."""
        self._alive(block_table)
        if not 0 <= length <= block_table.length:
            raise ArgumentError(
                f"length is {length}, expected 0 to {block_table.length}, the tokens the sequence holds"
            )
        block_table.length = length
        self._trim(block_table)

    def free(self, block_table: BlockTable) -> None:
        """Give all pages back; the block table cannot be used again."""
        self._alive(block_table)
        block_table.length = 0
        self._trim(block_table)
        block_table.freed = True

    def write(self, layer: int, batch: Batch, keys: Tensor, values: Tensor) -> None:
        """Store keys and values (tokens, heads, head_dim) of the batch's tokens where its block tables reserved room."""
        storage = self.storage[layer]
        pages, slots = batch.pages.to(storage.device), batch.slots.to(storage.device)
        for i, vectors in enumerate((keys, values)):
            if self.scales:
                vectors, self.scales[layer][pages, i, :, slots] = quantize(vectors)
            storage[pages, i, :, slots] = vectors.to(storage.dtype)

    def read(self, layer: int, block_table: BlockTable, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values (heads, length, head_dim) of the first tokens: in the pool's dtype, int8 as float32."""
        self._alive(block_table)
        storage = self.storage[layer]
        numbers = torch.tensor(block_table.pages[: -(-length // PAGE)], dtype=torch.long, device=storage.device)
        pages = storage[numbers]
        if self.scales:
            pages = pages * self.scales[layer][numbers].float().unsqueeze(-1)
        both = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]  # (2, heads, length, head_dim)
        return both[0], both[1]

    def _alive(self, block_table: BlockTable) -> None:
        if block_table.freed:
            raise CacheError("the sequence was freed; make a new one")

    def _trim(self, block_table: BlockTable) -> None:
        keep = -(-block_table.length // PAGE)
        for page in block_table.pages[keep:]:
            self._drop(page)
        del block_table.pages[keep:]

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page] == 0:
            self._free.append(page)

    def _grow(self, at_least: int) -> None:
        pages = max(at_least, 2 * self.pages)
        if self.limit is not None:
            pages = min(pages, self.limit)
        if pages < at_least:
            used = self.pages - self.free_pages
            raise CacheError(
                f"the KV cache is full: {self.limit} pages of {PAGE} tokens, {pages - used} free, "
                f"{at_least - used} needed; use fewer or shorter sequences, or a larger memory budget"
            )
        with torch.inference_mode(False):  # a pool may outlive the caller's inference mode, and is written to in place
            for tensors in (self.storage, self.scales):
                for i, old in enumerate(tensors):
                    new = old.new_empty(pages, *old.shape[1:])
                    new[: self.pages] = old
                    tensors[i] = new
                    if old.is_cuda and self.limit is not None:  # torch would keep the old memory beside all of the new
                        del old
                        torch.cuda.empty_cache()
        self._free += reversed(range(self.pages, pages))  # popped from the end: low numbers first
        self._users += [0] * (pages - self.pages)


@dataclass(eq=False)
class PrefixEntry:
    """A cached prefix: its ids (tokens,) int64, and the logits (vocabulary,) that followed the first `prompt` of them."""

    ids: Tensor
    block_table: BlockTable
    prompt: int
    logits: Tensor | None


class PrefixCache:
    """Block tables of finished sequences, so that a prompt with the same prefix computes only what follows it.

    Entries hold at most `budget` pages of the pool; a page that several share counts once. The least recently used entry is
    evicted first, also where running sequences need more pages than the pool has left. With a budget of 0 it stays empty.
    """

    def __init__(self, pool: PagePool, budget: int) -> None:
        self.pool, self.budget = pool, budget
        self._entries: list[PrefixEntry] = []  # least recently used first
        # A strong reference would make a cycle, and only the garbage collector would free the pool's memory.
        evict = WeakMethod(self.evict)
        pool.reclaim = lambda needed: (call := evict()) and call(needed)

    def match_prefix(
        self, ids: Sequence[int] | Tensor, live: Iterable[PrefixEntry] = ()
    ) -> tuple[BlockTable, Tensor | None]:
        """Fork the longest cached prefix of ids -> its block table, and the logits after the last of ids or None.

        Without logits the prefix is at least one id shorter than ids. live: running sequences, searched like entries.
        """
        prompt = torch.as_tensor(ids)
        known = [*self._entries, *live]
        lengths = [common_length(prompt, one.ids) for one in known]
        for one, length in zip(known, lengths, strict=True):
            if one.logits is not None and length == len(ids) == one.prompt:
                # A copy, because a caller's processor may write to it.
                return self._fork(one, length), copied(one.logits)
        best = max(range(len(known)), key=lambda i: lengths[i], default=None)
        if best is None or (length := min(lengths[best], len(ids) - 1)) == 0:
            return self.pool.new(), None
        return self._fork(known[best], length), None

    def insert(self, ids: Tensor, block_table: BlockTable, prompt: int = 0, logits: Tensor | None = None) -> None:
        """Take over the block table of ids (tokens,); logits (vocabulary,), if given, followed the first `prompt` of them."""
        if not self.budget or not block_table.length:
            self.pool.free(block_table)
            return
        for i in reversed(range(len(self._entries))):
            if torch.equal(self._entries[i].ids, ids):
                self._drop(i)
        self._entries.append(PrefixEntry(ids.clone(), block_table, prompt, logits))
        while len(self._entries) > MAX_ENTRIES or self.pages > self.budget:
            self._drop(0)

    @property
    def pages(self) -> int:
        """Pages that entries hold."""
        return len({page for entry in self._entries for page in entry.block_table.pages})

    def tokens(self, live: Iterable[BlockTable] = ()) -> int:
        """Tokens in the pages of all entries and of `live`; those of a shared page count once."""
        filled: dict[int, int] = {}
        for block_table in [*(entry.block_table for entry in self._entries), *live]:
            for i, page in enumerate(block_table.pages):
                filled[page] = max(filled.get(page, 0), min(PAGE, block_table.length - i * PAGE))
        return sum(filled.values())

    def evict(self, needed: int) -> None:
        """Drop entries until `needed` pages are free, or the pool may grow by what is missing."""
        while self._entries and self.pool.pages + max(0, needed - self.pool.free_pages) > self.budget:
            self._drop(0)

    def clear(self) -> None:
        """Drop all entries."""
        while self._entries:
            self._drop(0)

    def _fork(self, known: PrefixEntry, length: int) -> BlockTable:
        """A block table of the first `length` tokens; an entry becomes the most recently used."""
        if known in self._entries:
            self._entries.remove(known)
            self._entries.append(known)
        fork = self.pool.fork(known.block_table)
        self.pool.truncate(fork, length)
        return fork

    def _drop(self, i: int) -> None:
        self.pool.free(self._entries.pop(i).block_table)


def copied(x: Tensor) -> Tensor:
    """A copy of a tensor on the CPU, by numpy: torch would share it out to threads, which then spin beside the kernels' own."""
    return torch.from_numpy(x.numpy().copy())


def common_length(a: Tensor, b: Tensor) -> int:
    """Length of the common prefix of two lists of ids (tokens,)."""
    length = min(len(a), len(b))
    different = a[:length].numpy() != b[:length].numpy()
    return int(different.argmax()) if different.any() else length


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes and one scale for each vector: x (..., n) -> (..., n) int8 and (...) float16.

    The scale is the largest magnitude / 127, at most float16's largest number, and codes are nearest for it as stored. A
    vector of zeros has scale and codes 0; one with NaN has a scale of NaN, so that it reads back as NaN.
    """
    x = x.float()
    scale = (x.abs().amax(-1) / TOP).clamp(max=torch.finfo(torch.float16).max).half()
    steps = scale.float().unsqueeze(-1)
    codes = torch.where(steps > 0, x / steps, 0.0).clamp_(-TOP, TOP).round_()
    return codes.to(torch.int8), scale


@dataclass(frozen=True)
class Batch:
    """The tokens of one forward pass, sequence after sequence, without padding.

    Tokens offsets[i]:offsets[i + 1] belong to block_tables[i] and follow its starts[i] cached tokens. For each token:
    positions (tokens,) int64 is its rotary position, pages and slots (tokens,) int64 where its key and value go.
    """

    block_tables: tuple[BlockTable, ...]
    starts: tuple[int, ...]
    offsets: tuple[int, ...]
    positions: Tensor
    pages: Tensor
    slots: Tensor

    @classmethod
    def reserve(
        cls, pool: PagePool, block_tables: Sequence[BlockTable], counts: Sequence[int], positions: Tensor | None = None
    ) -> Batch:
        """Reserve room for counts[i] more tokens in each block table, or on CacheError for none.

        positions default to those in the block table.
        """
        offsets, pages, slots = [0], [], []
        try:
            for block_table, count in zip(block_tables, counts, strict=True):
                pool.reserve(block_table, count)
        except CacheError:
            for block_table in block_tables:
                pool._trim(block_table)
            raise
        for block_table, count in zip(block_tables, counts, strict=True):
            span = range(block_table.length, block_table.length + count)
            pages += [block_table.pages[p // PAGE] for p in span]
            slots += [p % PAGE for p in span]
            offsets.append(offsets[-1] + count)
        starts = tuple(s.length for s in block_tables)
        own = [s + i for s, n in zip(starts, counts, strict=True) for i in range(n)]
        columns = torch.tensor([pages, slots, own], dtype=torch.long)  # (3, tokens)
        positions = columns[2] if positions is None else positions.long()
        return cls(tuple(block_tables), starts, tuple(offsets), positions, columns[0], columns[1])

    def commit(self) -> None:
        """Count the tokens as cached: called once every layer has written them."""
        for i, block_table in enumerate(self.block_tables):
            block_table.length = self.starts[i] + self.offsets[i + 1] - self.offsets[i]


class KVCache:
    """`past_key_values`: the rows of a padded batch, each a block table of one pool; every forward changes it in place.

    Masked tokens are not stored, so each row remembers the column of every token it holds.
    """

    def __init__(self, pool: PagePool, rows: int) -> None:
        self.pool = pool
        self.block_tables = [pool.new() for _ in range(rows)]
        self.columns: list[list[int]] = [[] for _ in range(rows)]
        self.width = 0

    def __len__(self) -> int:
        return len(self.block_tables)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded batch seen so far, as transformers counts them."""
        return self.width

    def append(self, keep: Tensor) -> None:
        """Note the columns of a forward pass; keep (rows, width) bool marks the tokens that were stored."""
        for row, columns in zip(keep.tolist(), self.columns, strict=True):
            columns += [self.width + i for i, stored in enumerate(row) if stored]
        self.width += keep.shape[1]

    def crop(self, max_length: int) -> None:
        """Forget columns from `max_length` on; a negative number cuts that many off the end."""
        width = self.width + max_length if max_length < 0 else min(max_length, self.width)
        if width < 0:
            raise ArgumentError(f"max_length is {max_length}, but the cache holds {self.width} columns")
        for block_table, columns in zip(self.block_tables, self.columns, strict=True):
            while columns and columns[-1] >= width:
                columns.pop()
            self.pool.truncate(block_table, len(columns))
        self.width = width

    def fork(self) -> KVCache:
        """An independent cache with the same contents; pages are shared until written."""
        twin = KVCache(self.pool, 0)
        twin.block_tables = [self.pool.fork(s) for s in self.block_tables]
        twin.columns, twin.width = [list(c) for c in self.columns], self.width
        return twin

    def free(self) -> None:
        for block_table in self.block_tables:
            self.pool.free(block_table)
