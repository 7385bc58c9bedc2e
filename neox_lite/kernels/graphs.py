"""How a pass that comes again runs: operation by operation, or captured once for each shape and replayed. Knows no kernel.

A pass is a function of a part of a model whose tensors stay where they are: forward(x, pool, batch), x with a row a token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor

from ..cache import Batch, PagePool
from .backend import Captured, DeviceSampling, Forward, PendingStep

MAX_TOKENS = 16  # of a pass with several tokens of a sequence, at most, that is captured
MAX_GRAPHS = 32  # of a pool and a part of the model; the least recently used one goes first
MISSING = object()

Key = TypeVar("Key", bound=Hashable)
Graph = TypeVar("Graph")


class GraphCache(Generic[Key, Graph]):
    """Captured passes by pool and key, valid while the pool does not move its pages; the one used last is last."""

    def __init__(self, max_graphs: int = MAX_GRAPHS) -> None:
        self._max_graphs = max_graphs
        self._by_pool: WeakKeyDictionary[PagePool, tuple[int, dict[Key, Graph]]] = WeakKeyDictionary()

    def __len__(self) -> int:
        """How many pools something is captured over."""
        return len(self._by_pool)

    def get(self, pool: PagePool, key: Key, capture: Callable[[], Graph]) -> Graph:
        pages, graphs = self._by_pool.get(pool, (-1, {}))
        if pages != pool.pages:
            graphs = {}
            self._by_pool[pool] = pool.pages, graphs
        graph: Any = graphs.pop(key, MISSING)
        if graph is MISSING:
            graph = capture()
        graphs[key] = graph
        for oldest in list(graphs)[: -self._max_graphs]:
            graphs.pop(oldest, None)
        return graph

    def of(self, pool: PagePool) -> dict[Key, Graph]:
        return self._by_pool.get(pool, (-1, {}))[1]


class EagerRunner:
    """Runs every pass operation by operation. The base of the others, which fall back to it for what they cannot capture."""

    def __init__(self, forward: Forward, unsupported_reason: str | None) -> None:
        """unsupported_reason: why passes do not sample on the device; None where they do."""
        self._forward, self.unsupported_reason = forward, unsupported_reason

    def run(self, x: Tensor, pool: PagePool, batch: Batch) -> Tensor:
        """forward(x, pool, batch)."""
        return self._forward(x, pool, batch)

    def launch(
        self,
        pool: PagePool,
        batch: Batch,
        ids: Sequence[int],
        sampling: Sequence[DeviceSampling],
        excluded: Tensor | None = None,
        previous: PendingStep | None = None,
    ) -> PendingStep | None:
        """Give a step to the device without waiting for it; None where it has to be run instead. See `PassRunner`."""
        return None

    def graphs(self, pool: PagePool) -> dict[Any, Any]:
        """What is captured over a pool, by key."""
        return {}


class ReplayRunner(EagerRunner):
    """Captures a pass for each number of sequences and tokens, and replays it."""

    def __init__(
        self, forward: Forward, capture: Callable[[Forward, Tensor, PagePool, Batch], Captured | None], reason: str
    ) -> None:
        """capture: makes a pass that runs again for batches of the same shape; None where this one cannot."""
        super().__init__(forward, reason)
        self.capture = capture
        self._cache: GraphCache[tuple[int, int], Captured | None] = GraphCache()

    def run(self, x: Tensor, pool: PagePool, batch: Batch) -> Tensor:
        shape = (len(batch.block_tables), len(x))
        captured = self._cache.get(pool, shape, lambda: self.capture(self._forward, x, pool, batch))
        return self._forward(x, pool, batch) if captured is None else captured.replay(x, batch)

    def graphs(self, pool: PagePool) -> dict[tuple[int, int], Captured | None]:
        """By (sequences, tokens); None for what cannot be captured."""
        return self._cache.of(pool)

    @property
    def pools(self) -> int:
        """How many pools something is captured over."""
        return len(self._cache)
