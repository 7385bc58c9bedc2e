"""A model's layers over its tiers: which operations compute each, and how activations get from one to the next.

Knows where everything is, but not why: that is the plan's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from ..cache import Batch, PagePool
from ..errors import ArgumentError
from ..kernels import dispatch
from ..kernels.backend import Backend, PassRunner
from ..layers import GPTNeoXLayer
from .accelerator import Accelerator
from .stream import LayerLayout, LayerStreamer, NextLayer, Origins

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """The tier of each part: "gpu", "cpu" or "disk" for a layer, "gpu" or "cpu" for the ends (the final norm is the head's).

    stream_from: from so many tokens on, layers outside the GPU are brought there rather than computed on the CPU; None: never.
    pages: of the KV cache that the memory was planned for, 0 where it was not.
    """

    layers: tuple[str, ...]
    embedding: str
    head: str
    stream_from: int | None = None
    pages: int = 0

    @classmethod
    def alone(cls, tier: str, layers: int) -> Placement:
        return cls((tier,) * layers, tier, tier)

    @property
    def tiers(self) -> set[str]:
        return {*self.layers, self.embedding, self.head}


class LayerRunner:
    """Runs layers where they are. `ops` are the operations of "cpu" and "gpu", as far as they are used."""

    def __init__(
        self,
        layers: Sequence[GPTNeoXLayer],
        rotary: Tensor,
        dtype: torch.dtype,
        placement: Placement,
        exact: bool = False,
        accelerator: Accelerator | None = None,
        origins: Sequence[Origins] = (),
        ops: Backend | None = None,
    ) -> None:
        """rotary: the table, where the embedding is. dtype: of the model's plain tensors. accelerator: what "gpu" is, where
        there is anything beside it. origins: of each layer, for those on the disk; see `LayerLayout`. ops: used on every tier
        rather than the fastest ones.

        Raises ArgumentError for a layer on the disk that no file holds as it is.
        """
        self.layers, self.placement, self.accelerator = layers, placement, accelerator
        self._lock = threading.Lock()  # buffers hold one pass at a time
        sides = {side_of(tier) for tier in placement.tiers}
        device = {"cpu": CPU, "gpu": rotary.device if accelerator is None else accelerator.device}
        choices: dict[str, Callable[[bool], Backend]] = {side: partial(dispatch.choose, device[side]) for side in sides}
        if accelerator is not None:
            choices["gpu"] = accelerator.operations
        self.ops = {side: ops or choices[side](exact) for side in sides}
        self.dtypes = {side: ops.activation_dtype(dtype, device[side]) for side, ops in self.ops.items()}
        self.tables = {side_of(placement.embedding): rotary}
        if accelerator is not None:
            self.tables = {"cpu": rotary.cpu(), "gpu": accelerator.upload(rotary.cpu(), torch.float32)}
        self._streamer = self._make_streamer(origins)
        self._segments: dict[tuple[int, int], PassRunner] = {}

    @property
    def alone(self) -> bool:
        """Whether one backend computes all of them where they are, so that a whole pass may be captured."""
        return self._streamer is None and len(self.ops) == 1

    def _make_streamer(self, origins: Sequence[Origins]) -> LayerStreamer | None:
        placement = self.placement
        uploads = placement.stream_from is not None and self.accelerator is not None
        layouts = {}
        for i, tier in enumerate(placement.layers):
            if tier == "disk":
                layouts[i] = LayerLayout(self.layers[i], origins[i] if origins else {})
                unstored = [s.tensor for s in layouts[i].slots if s.origin is None and ".adapter." not in s.name]
                if sum(tensor.nbytes for tensor in unstored) > layouts[i].nbytes / 10:
                    raise ArgumentError(
                        f"layer {i} is on the disk, but its weights differ from what its file holds; those there cannot be "
                        "changed: load the model with more memory for that"
                    )
            elif tier == "cpu" and uploads:
                layouts[i] = LayerLayout(self.layers[i])
        return LayerStreamer(layouts, self.accelerator if uploads else None, placement.pages) if layouts else None

    @property
    def first(self) -> Backend:
        """Operations where the embedding is."""
        return self.ops[side_of(self.placement.embedding)]

    @property
    def last(self) -> Backend:
        """Operations where the head is, and where the layers leave their result."""
        return self.ops[side_of(self.placement.head)]

    @property
    def first_dtype(self) -> torch.dtype:
        """Of activations where the embedding is."""
        return self.dtypes[side_of(self.placement.embedding)]

    def to_first(self, x: Tensor) -> Tensor:
        """Activations (tokens, hidden) of any device and dtype, as the layers take them."""
        return x.to(self.tables[side_of(self.placement.embedding)].device, self.first_dtype)

    def __call__(
        self,
        x: Tensor,
        pool: PagePool,
        batch: Batch,
        each: Callable[[Tensor], object] | None = None,
        small: bool = False,
    ) -> Tensor:
        """x (tokens, hidden) through all layers, from where the embedding is to where the head is.

        each: sees the input of every layer. small: the pass is of a kind that comes again. Keys and values are in the cache
        afterwards; the batch is not committed.
        """
        placement, tokens = self.placement, len(x)
        upload = placement.stream_from is not None and tokens >= placement.stream_from
        streamed = [i for i, tier in enumerate(placement.layers) if tier == "disk" or (upload and tier == "cpu")]
        at = side_of(placement.embedding)
        with ExitStack() as stack:
            next_layer = stack.enter_context(self._streaming(streamed, pool, batch, upload)) if streamed else None
            for first, last, tier in segments(placement.layers):
                to = "gpu" if upload else side_of(tier)
                x, at = self._moved(x, at, to), to
                if next_layer is not None and first in streamed:
                    for _ in range(first, last):
                        with next_layer() as there:
                            x = self._through([there.layer], at, x, there.pool, there.batch, each)
                elif small and each is None:
                    x = self._segment(first, last, at).run(x, pool, batch)
                else:
                    x = self._through(self.layers[first:last], at, x, pool, batch, each)
        return self._moved(x, at, side_of(placement.head))

    def _through(
        self,
        layers: Sequence[GPTNeoXLayer],
        at: str,
        x: Tensor,
        pool: PagePool,
        batch: Batch,
        each: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        for layer in layers:
            if each is not None:
                each(x)
            x = layer(x, self.ops[at], pool, batch, self.tables[at])
        return x

    def _segment(self, first: int, last: int, at: str) -> PassRunner:
        """Neighbours that stay where they are, as a pass that comes again."""
        if (first, last) not in self._segments:
            table, through = self.tables[at], partial(self._through, self.layers[first:last], at)
            self._segments[first, last] = self.ops[at].pass_runner(through, table.device, table.shape[1])
        return self._segments[first, last]

    @contextmanager
    def _streaming(self, order: Sequence[int], pool: PagePool, batch: Batch, upload: bool) -> Iterator[NextLayer]:
        assert self._streamer is not None
        with self._lock, self._streamer.stream(order, pool, batch, upload) as next_layer:
            yield next_layer

    def _moved(self, x: Tensor, at: str, to: str) -> Tensor:
        if at == to:
            return x
        assert self.accelerator is not None
        return (
            self.accelerator.upload(x, self.dtypes[to])
            if to == "gpu"
            else self.accelerator.download(x, self.dtypes[to])
        )


def segments(tiers: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Neighbours on the same tier: first, past the last, tier."""
    first = 0
    for tier, group in groupby(tiers):
        last = first + len(list(group))
        yield first, last, tier
        first = last


def side_of(tier: str) -> str:
    """Where a part of that tier is computed: what is on the disk, on the CPU."""
    return "gpu" if tier == "gpu" else "cpu"
