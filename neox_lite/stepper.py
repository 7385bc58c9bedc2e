"""What generation and drafting ask of a model, and how long prompts go through it in pieces. Knows no model class."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Protocol

from torch import Tensor

from .cache import PagePool, Sequence

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
