"""Logits -> token: small processors, applied in transformers' order, and a counter-based random number. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ArgumentError

Processor = Callable[[Tensor, Tensor], Tensor]  # history (tokens,) int64, logits (vocabulary,) float32 -> logits


@dataclass(frozen=True)
class Sampling:
    """How one token is drawn. The defaults are transformers'."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (0.0, float("inf")),
            "top_k": (0, float("inf")),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "seed": (0, 2**64 - 1),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ArgumentError(f"{name} is {value}, expected {low} to {high}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ArgumentError(f"repetition_penalty is {self.repetition_penalty}, expected a number above 0")

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    def processors(self) -> list[Processor]:
        """The steps between logits and choice, in order."""
        steps: list[Processor] = []
        if self.repetition_penalty != 1.0:
            steps.append(lambda history, logits: penalize_repetition(history, logits, self.repetition_penalty))
        if self.greedy:
            return steps
        if self.temperature != 1.0:
            steps.append(lambda history, logits: logits / self.temperature)
        if self.top_k:
            steps.append(lambda history, logits: keep_top_k(logits, self.top_k))
        if self.top_p < 1.0:
            steps.append(lambda history, logits: keep_top_p(logits, self.top_p))
        if self.min_p:
            steps.append(lambda history, logits: keep_min_p(logits, self.min_p))
        return steps


def penalize_repetition(history: Tensor, logits: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of ids seen so far (CTRL, https://arxiv.org/abs/1909.05858)."""
    seen = logits[history]
    return logits.index_put((history,), torch.where(seen < 0, seen * penalty, seen / penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Exclude all logits below the k-th largest."""
    return logits.masked_fill(logits < logits.topk(min(k, len(logits))).values[-1], float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of ids whose probability reaches p, at least one (https://arxiv.org/abs/1904.09751)."""
    ordered, ids = logits.sort()
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - p
    drop[-1] = False
    return logits.index_fill(0, ids[drop], float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Exclude ids less probable than p times the most probable one (https://arxiv.org/abs/2407.01082)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.max(), float("-inf"))


def choose(
    logits: Tensor, history: Sequence[int], position: int, stream: int, sampling: Sampling, steps: list[Processor]
) -> int:
    """The next id for logits (vocabulary,), by argmax or a draw that depends on (seed, position, stream) alone."""
    logits = logits.float().cpu()
    past = torch.tensor(history, dtype=torch.long) if steps else torch.empty(0, dtype=torch.long)
    for step in steps:
        logits = step(past, logits)
    if sampling.greedy:
        return int(logits.argmax())
    cumulative = logits.double().softmax(-1).cumsum(-1)
    target = uniform(sampling.seed, position, stream) * cumulative[-1]
    drawn = int(torch.searchsorted(cumulative, target, right=True))
    if drawn < len(logits) and logits[drawn] > float("-inf"):
        return drawn
    return int(logits.isfinite().nonzero()[-1])  # rounding put the target at the very end


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """A number in [0, 1) from a counter, so that it depends on nothing that was drawn before.

    Philox4x32-10 (Salmon et al., SC 2011) with key seed and counter (position, stream, 0, 0); 53 bits of the first two
    words.
    """
    c0, c1, c2, c3 = position & 0xFFFFFFFF, stream & 0xFFFFFFFF, 0, 0
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return ((c0 >> 5) * 67108864 + (c1 >> 6)) / 9007199254740992
