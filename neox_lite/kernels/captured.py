"""Passes that a backend has captured, by the pool they work on and by their shape, so that each is captured once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from ..cache import Batch, PagePool
from .backend import Backend, Captured

MOST_TOKENS = 16  # of a pass with several tokens of a sequence, at most, that is captured
MOST_PASSES = 32  # of a pool and a part of the model; the least recently used one goes first
NEW = object()  # a shape that nobody has tried to capture


@dataclass
class _Shapes:
    """Captured passes over a pool of so many pages, by (sequences, tokens), the last one used last."""

    pages: int
    by_shape: dict[tuple[int, int], Captured | None] = field(default_factory=dict)


class CapturedPasses:
    """Passes through one part of a model, whose tensors stay where they are for as long as this lives."""

    def __init__(self, ops: Backend, limit: int) -> None:
        """limit: most tokens that a sequence will hold."""
        self._ops, self._limit = ops, limit
        self._by_pool: WeakKeyDictionary[PagePool, _Shapes] = WeakKeyDictionary()

    def run(
        self, function: Callable[[Tensor, PagePool, Batch], Tensor], x: Tensor, pool: PagePool, batch: Batch
    ) -> Tensor | None:
        """function(x, pool, batch), x with a row for each token of a batch; None where the backend captures no such thing.

        The function is always the same but for what it is called with.
        """
        captured = self._captured(function, x, pool, batch)
        return None if captured is None else captured.replay(x, batch)

    @property
    def pools(self) -> int:
        """How many something is captured over."""
        return len(self._by_pool)

    def shapes(self, pool: PagePool) -> dict[tuple[int, int], Captured | None]:
        """What is captured over a pool, by (sequences, tokens); None for what cannot be."""
        known = self._by_pool.get(pool)
        return {} if known is None else known.by_shape

    def _captured(
        self, function: Callable[[Tensor, PagePool, Batch], Tensor], x: Tensor, pool: PagePool, batch: Batch
    ) -> Captured | None:
        known = self._by_pool.get(pool)
        if known is None or known.pages != pool.pages:  # the pool has moved its pages
            self._by_pool[pool] = known = _Shapes(pool.pages)
        shape = len(batch.sequences), len(x)
        captured: Any = known.by_shape.pop(shape, NEW)
        if captured is NEW:
            captured = self._ops.capture(lambda x: function(x, pool, batch), x, batch, self._limit)
        known.by_shape[shape] = captured
        for oldest in list(known.by_shape)[:-MOST_PASSES]:
            known.by_shape.pop(oldest, None)
        return captured
