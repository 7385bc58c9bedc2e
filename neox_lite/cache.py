"""The paged KV cache: a pool of pages, sequences that share them, and the batch that one forward pass works on.

Knows no model: keys and values come and go as tensors; a page number means the same page in every layer's storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from weakref import WeakMethod

import torch
from torch import Tensor

from .errors import ArgumentError, CacheError
from .units import PAGE

KEPT = 64  # sequences that a PrefixCache holds at most
TOP = 127  # largest int8 code; -128 is left out, so that the codes of x and -x are each other's negatives


@dataclass(eq=False)
class Sequence:
    """A list of pages and how many tokens of them are filled. Made, shared, cut and freed by its pool only."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    freed: bool = False


class PagePool:
    """Keys and values of all layers in pages of 128 tokens, handed out to sequences and counted by reference.

    storage[layer] is (pages, 2, heads, 128, head_dim) in `dtype` on that layer's device; index 0 holds keys, 1 values.
    Where dtype is int8, storage holds codes and scales[layer], (pages, 2, heads, 128) float16, what one code of a token's
    head stands for; else scales is []. The pool doubles as it fills, up to `limit` pages; then CacheError. Before it grows or
    fails, `reclaim` is told how many free pages are wanted and may free sequences that nobody waits for.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        devices: List[torch.device],
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

    def new(self) -> Sequence:
        return Sequence()

    def reserve(self, sequence: Sequence, count: int) -> None:
        """Make room for `count` more tokens, so that the pages they land in belong to this sequence alone."""
        self._alive(sequence)
        self._trim(sequence)
        used = sequence.length % PAGE
        new = -(-(sequence.length + count) // PAGE) - len(sequence.pages)
        if self.wanted(sequence, count) > len(self._free) and self.reclaim is not None:
            self.reclaim(self.wanted(sequence, count))
        if (lacking := self.wanted(sequence, count) - len(self._free)) > 0:
            self._grow(self.pages + lacking)
        if self.wanted(sequence, count) > new:  # copy on write
            old, copy = sequence.pages[-1], self._take()
            for s in (*self.storage, *self.scales):
                s[copy, :, :, :used] = s[old, :, :, :used]
            self._drop(old)
            sequence.pages[-1] = copy
        sequence.pages += [self._take() for _ in range(new)]

    def wanted(self, sequence: Sequence, count: int) -> int:
        """Pages that `reserve` would take, with the one for a copy where others hold the page that is written to."""
        filled, used = divmod(sequence.length, PAGE)
        new = -(-(sequence.length + count) // PAGE) - filled - (used > 0)
        return new + (count > 0 and used > 0 and self._users[sequence.pages[filled]] > 1)

    @property
    def room(self) -> float:
        """Pages that are free, or that the pool may grow by; without a limit, infinitely many."""
        return self.free_pages + (float("inf") if self.limit is None else self.limit - self.pages)

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens; the pages are shared until one of the two writes to them."""
        self._alive(sequence)
        self._trim(sequence)
        for page in sequence.pages:
            self._users[page] += 1
        return Sequence(list(sequence.pages), sequence.length)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget all tokens from `length` on."""
        self._alive(sequence)
        if not 0 <= length <= sequence.length:
            raise ArgumentError(f"length is {length}, expected 0 to {sequence.length}, the tokens the sequence holds")
        sequence.length = length
        self._trim(sequence)

    def free(self, sequence: Sequence) -> None:
        """Give all pages back; the sequence cannot be used again."""
        self._alive(sequence)
        sequence.length = 0
        self._trim(sequence)
        sequence.freed = True

    def write(self, layer: int, batch: Batch, keys: Tensor, values: Tensor) -> None:
        """Store keys and values (tokens, heads, head_dim) of the batch's tokens where its sequences reserved room."""
        storage = self.storage[layer]
        pages, slots = batch.pages.to(storage.device), batch.slots.to(storage.device)
        for i, vectors in enumerate((keys, values)):
            if self.scales:
                vectors, self.scales[layer][pages, i, :, slots] = quantize(vectors)
            storage[pages, i, :, slots] = vectors.to(storage.dtype)

    def read(self, layer: int, sequence: Sequence, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values (heads, length, head_dim) of the sequence's first tokens: in the pool's dtype, int8 as float32."""
        self._alive(sequence)
        storage = self.storage[layer]
        numbers = torch.tensor(sequence.pages[: -(-length // PAGE)], dtype=torch.long, device=storage.device)
        pages = storage[numbers]
        if self.scales:
            pages = pages * self.scales[layer][numbers].float().unsqueeze(-1)
        both = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]  # (2, heads, length, head_dim)
        return both[0], both[1]

    def _alive(self, sequence: Sequence) -> None:
        if sequence.freed:
            raise CacheError("the sequence was freed; make a new one")

    def _trim(self, sequence: Sequence) -> None:
        keep = -(-sequence.length // PAGE)
        for page in sequence.pages[keep:]:
            self._drop(page)
        del sequence.pages[keep:]

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
class Kept:
    """A sequence to begin others with: its ids (tokens,) int64, and the logits that followed the first `prompt` of them."""

    ids: Tensor
    sequence: Sequence
    prompt: int
    logits: Tensor | None


class PrefixCache:
    """Sequences that outlive the call that made them, so that a prompt which begins like one is not computed again.

    Kept sequences hold at most `budget` pages of the pool, those they share counted once; the least recently used goes first,
    also where live sequences need more pages than the budget, or the pool, has left. With a budget of 0 nothing is kept.
    """

    def __init__(self, pool: PagePool, budget: int) -> None:
        self.pool, self.budget = pool, budget
        self._kept: list[Kept] = []  # the one used last is last
        # A strong reference would keep pool and cache alive until the garbage collector runs.
        give_up = WeakMethod(self.give_up)
        pool.reclaim = lambda wanted: (call := give_up()) and call(wanted)

    def take(self, ids: List[int] | Tensor, live: Iterable[Kept] = ()) -> tuple[Sequence, Tensor | None]:
        """A sequence with the longest known beginning of ids, and the logits after the last of ids where those are known.

        Without known logits, at least one id is left to compute. live: sequences at work, which count as known too.
        """
        wanted = torch.as_tensor(ids)
        known = [*self._kept, *live]
        lengths = [common_length(wanted, one.ids) for one in known]
        for one, length in zip(known, lengths, strict=True):
            if one.logits is not None and length == len(ids) == one.prompt:
                return self._fork(one, length), copied(one.logits)  # a caller's processor may write to them
        best = max(range(len(known)), key=lambda i: lengths[i], default=None)
        if best is None or (length := min(lengths[best], len(ids) - 1)) == 0:
            return self.pool.new(), None
        return self._fork(known[best], length), None

    def keep(self, ids: Tensor, sequence: Sequence, prompt: int = 0, logits: Tensor | None = None) -> None:
        """Take over a sequence and its ids (tokens,); logits (vocabulary,), if given, followed the first `prompt` of them."""
        if not self.budget or not sequence.length:
            self.pool.free(sequence)
            return
        for i in reversed(range(len(self._kept))):
            if torch.equal(self._kept[i].ids, ids):
                self._drop(i)
        self._kept.append(Kept(ids.clone(), sequence, prompt, logits))
        while len(self._kept) > KEPT or self.pages > self.budget:
            self._drop(0)

    @property
    def pages(self) -> int:
        """Pages that kept sequences hold."""
        return len({page for kept in self._kept for page in kept.sequence.pages})

    def tokens(self, live: Iterable[Sequence] = ()) -> int:
        """Tokens in the cache, of kept sequences and of those at work, counted once where they share pages."""
        filled: dict[int, int] = {}
        for sequence in [*(kept.sequence for kept in self._kept), *live]:
            for i, page in enumerate(sequence.pages):
                filled[page] = max(filled.get(page, 0), min(PAGE, sequence.length - i * PAGE))
        return sum(filled.values())

    def give_up(self, wanted: int) -> None:
        """Free kept sequences, until `wanted` pages are free or the pool may grow by what is lacking."""
        while self._kept and self.pool.pages + max(0, wanted - self.pool.free_pages) > self.budget:
            self._drop(0)

    def clear(self) -> None:
        """Free all kept sequences."""
        while self._kept:
            self._drop(0)

    def _fork(self, known: Kept, length: int) -> Sequence:
        """The first tokens of a sequence; if it is a kept one, it is now the one used last."""
        if known in self._kept:
            self._kept.remove(known)
            self._kept.append(known)
        fork = self.pool.fork(known.sequence)
        self.pool.truncate(fork, length)
        return fork

    def _drop(self, i: int) -> None:
        self.pool.free(self._kept.pop(i).sequence)


def copied(x: Tensor) -> Tensor:
    """A copy of a tensor on the CPU, by numpy: torch would share it out to threads, which then spin beside the kernels' own."""
    return torch.from_numpy(x.numpy().copy())


def common_length(a: Tensor, b: Tensor) -> int:
    """How many ids two sequences (tokens,) begin with in common."""
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

    Tokens offsets[i]:offsets[i + 1] belong to sequences[i] and follow its starts[i] cached tokens. For each token:
    positions (tokens,) int64 is its rotary position, pages and slots (tokens,) int64 where its key and value go.
    """

    sequences: tuple[Sequence, ...]
    starts: tuple[int, ...]
    offsets: tuple[int, ...]
    positions: Tensor
    pages: Tensor
    slots: Tensor

    @classmethod
    def reserve(
        cls, pool: PagePool, sequences: List[Sequence], counts: List[int], positions: Tensor | None = None
    ) -> Batch:
        """Reserve room for counts[i] more tokens of each sequence, or on CacheError for none.

        positions default to the places in the sequence.
        """
        offsets, pages, slots = [0], [], []
        try:
            for sequence, count in zip(sequences, counts, strict=True):
                pool.reserve(sequence, count)
        except CacheError:
            for sequence in sequences:
                pool._trim(sequence)
            raise
        for sequence, count in zip(sequences, counts, strict=True):
            places = range(sequence.length, sequence.length + count)
            pages += [sequence.pages[p // PAGE] for p in places]
            slots += [p % PAGE for p in places]
            offsets.append(offsets[-1] + count)
        starts = tuple(s.length for s in sequences)
        if positions is None:
            positions = torch.tensor([s + i for s, n in zip(starts, counts, strict=True) for i in range(n)])
        where = torch.tensor([pages, slots], dtype=torch.long)  # (2, tokens)
        return cls(tuple(sequences), starts, tuple(offsets), positions.long(), where[0], where[1])

    def commit(self) -> None:
        """Count the tokens as cached: called once every layer has written them."""
        for i, sequence in enumerate(self.sequences):
            sequence.length = self.starts[i] + self.offsets[i + 1] - self.offsets[i]


class KVCache:
    """`past_key_values`: the rows of a padded batch, each a sequence in one pool; every forward changes it in place.

    Masked tokens are not stored, so each row remembers the column of every token it holds.
    """

    def __init__(self, pool: PagePool, rows: int) -> None:
        self.pool = pool
        self.sequences = [pool.new() for _ in range(rows)]
        self.columns: list[list[int]] = [[] for _ in range(rows)]
        self.width = 0

    def __len__(self) -> int:
        return len(self.sequences)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded batch seen so far, as transformers counts them."""
        return self.width

    def append(self, keep: Tensor) -> None:
        """Note the columns of a forward pass; keep (rows, width) bool marks the tokens that were stored."""
        for row, columns in zip(keep.tolist(), self.columns, strict=True):
            columns += [self.width + i for i, kept in enumerate(row) if kept]
        self.width += keep.shape[1]

    def crop(self, max_length: int) -> None:
        """Forget columns from `max_length` on; a negative number cuts that many off the end."""
        width = self.width + max_length if max_length < 0 else min(max_length, self.width)
        if width < 0:
            raise ArgumentError(f"max_length is {max_length}, but the cache holds {self.width} columns")
        for sequence, columns in zip(self.sequences, self.columns, strict=True):
            while columns and columns[-1] >= width:
                columns.pop()
            self.pool.truncate(sequence, len(columns))
        self.width = width

    def fork(self) -> KVCache:
        """An independent cache with the same contents; pages are shared until written."""
        twin = KVCache(self.pool, 0)
        twin.sequences = [self.pool.fork(s) for s in self.sequences]
        twin.columns, twin.width = [list(c) for c in self.columns], self.width
        return twin

    def free(self) -> None:
        for sequence in self.sequences:
            self.pool.free(sequence)
