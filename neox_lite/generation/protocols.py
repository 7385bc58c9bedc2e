"""What generation and drafting ask of a model, and how long prompts go through it in pieces. Knows no model class."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..cache import PagePool, Sequence
from ..kernels.backend import Choice, Flight

PREFILL_TOKENS = 512  # tokens of a prompt that go through the model at a time


class Stepper(Protocol):
    """A pool for a model's cache, and logits after appending tokens to sequences.

    every=True is asked of `step` only where drafts are verified: float32 logits (tokens in all, vocabulary), sequence after
    sequence; without it, logits (sequences, vocabulary) after the last token of each.
    """

    def new_pool(self, pages: int = 0, limit: int | None = None) -> PagePool: ...

    def step(
        self, pool: PagePool, sequences: List[Sequence], tokens: List[List[int]], every: bool = False
    ) -> Tensor: ...


@runtime_checkable
class Ahead(Stepper, Protocol):
    """A stepper on a device that may choose the next tokens itself, so that steps are given to it before the last is read."""

    @property
    def graph_reason(self) -> str | None:
        """Why it does not; None where it does."""
        ...

    def launch(
        self,
        pool: PagePool,
        sequences: List[Sequence],
        ids: List[int],
        choices: List[Choice],
        excluded: Tensor | None = None,
        previous: Flight | None = None,
    ) -> Flight | None:
        """Append an id to each sequence and have the next ones chosen; see `Decoder.launch`. None where it cannot be."""
        ...


def advance(stepper: Stepper, pool: PagePool, sequences: List[Sequence], tokens: List[List[int]]) -> list[Tensor]:
    """Append tokens[i], at least one, to sequences[i] -> logits (vocabulary,) on the CPU after the last of each.

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
        scores = stepper.step(pool, [sequences[i] for i in pieces], list(pieces.values())).cpu()
        logits |= zip(pieces, scores, strict=True)
        for i, piece in pieces.items():
            done[i] += len(piece)
    return [logits[i] for i in range(len(tokens))]
