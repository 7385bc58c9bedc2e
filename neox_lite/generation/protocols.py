"""What generation and drafting need of a model, and the chunked prefill of prompts. Knows no model class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..cache import BlockTable, PagePool
from ..kernels.backend import DeviceSampling, PendingStep

PREFILL_TOKENS = 512  # of one pass


class ModelRunner(Protocol):
    """Makes pools for a model's KV cache, and appends tokens to sequences.

    `step` returns float32 logits (sequences, vocabulary) after the last token of each sequence; with every=True (drafts to
    verify, log-probabilities of prompts) those after every token (tokens in all, vocabulary), sequence after sequence.
    """

    def new_pool(self, pages: int = 0, limit: int | None = None) -> PagePool: ...

    def step(
        self, pool: PagePool, block_tables: Sequence[BlockTable], tokens: Sequence[Sequence[int]], every: bool = False
    ) -> Tensor: ...


@runtime_checkable
class AsyncRunner(ModelRunner, Protocol):
    """A model on a device that may sample the next tokens itself, so that a step is launched before the last one is read."""

    @property
    def graph_reason(self) -> str | None:
        """Why steps run on the host instead; None where the device samples."""
        ...

    def launch(
        self,
        pool: PagePool,
        block_tables: Sequence[BlockTable],
        ids: Sequence[int],
        sampling: Sequence[DeviceSampling],
        excluded: Tensor | None = None,
        previous: PendingStep | None = None,
    ) -> PendingStep | None:
        """Append an id to each sequence and sample the next ones; see `PassRunner.launch`. None where the device cannot."""
        ...


def advance(
    model_runner: ModelRunner, pool: PagePool, block_tables: Sequence[BlockTable], tokens: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Append tokens[i], at least one, to block_tables[i] -> logits (vocabulary,) on the CPU after the last of each.

    They go through the model together, PREFILL_TOKENS at a time.
    """
    done = [0] * len(tokens)
    logits: dict[int, Tensor] = {}
    while waiting := [i for i, ids in enumerate(tokens) if done[i] < len(ids)]:
        pieces, room = {}, PREFILL_TOKENS
        for i in waiting:
            if room:
                pieces[i] = tokens[i][done[i] :][:room]
                room -= len(pieces[i])
        scores = model_runner.step(pool, [block_tables[i] for i in pieces], list(pieces.values())).cpu()
        logits |= zip(pieces, scores, strict=True)
        for i, piece in pieces.items():
            done[i] += len(piece)
    return [logits[i] for i in range(len(tokens))]
