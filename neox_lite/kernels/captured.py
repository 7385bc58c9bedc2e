"""Passes that a backend has captured, by the pool they work on and by their shape, so that each is captured once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor

from ..cache import Batch, PagePool
from .backend import Backend, Captured

MOST_TOKENS = 16  # of a pass with several tokens of a sequence, at most, that is captured
MOST_PASSES = 32  # of a pool and a part of the model; the least recently used one goes first
NEW = object()  # a key that nothing was made for

Key = TypeVar("Key", bound=Hashable)
Thing = TypeVar("Thing")


class PerPool(Generic[Key, Thing]):
    """Things that hold while a pool lies where it lies, at most so many for each; the one used last is last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._by_pool: WeakKeyDictionary[PagePool, tuple[int, dict[Key, Thing]]] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._by_pool)

    def get(self, pool: PagePool, key: Key, make: Callable[[], Thing]) -> Thing:
        pages, things = self._by_pool.get(pool, (-1, {}))
        if pages != pool.pages:  # the pool has moved its pages
            things = {}
            self._by_pool[pool] = pool.pages, things
        thing: Any = things.pop(key, NEW)
        if thing is NEW:
            thing = make()
        things[key] = thing
        for oldest in list(things)[: -self._most]:
            things.pop(oldest, None)
        return thing

    def of(self, pool: PagePool) -> dict[Key, Thing]:
        return self._by_pool.get(pool, (-1, {}))[1]


class CapturedPasses:
    """Passes through one part of a model, whose tensors stay where they are for as long as this lives."""

    def __init__(self, ops: Backend, limit: int) -> None:
        """limit: most tokens that a sequence will hold."""
        self._ops, self._limit = ops, limit
        self._captured: PerPool[tuple[int, int], Captured | None] = PerPool(MOST_PASSES)

    def run(
        self, function: Callable[[Tensor, PagePool, Batch], Tensor], x: Tensor, pool: PagePool, batch: Batch
    ) -> Tensor | None:
        """function(x, pool, batch), x with a row for each token of a batch; None where the backend captures no such thing.

        The function is always the same but for what it is called with.
        """
        shape, step = (len(batch.block_tables), len(x)), lambda x: function(x, pool, batch)
        captured = self._captured.get(pool, shape, lambda: self._ops.capture(step, x, batch, self._limit))
        return None if captured is None else captured.replay(x, batch)

    @property
    def pools(self) -> int:
        """How many something is captured over."""
        return len(self._captured)

    def shapes(self, pool: PagePool) -> dict[tuple[int, int], Captured | None]:
        """What is captured over a pool, by (sequences, tokens); None for what cannot be."""
        return self._captured.of(pool)
