"""Logits -> token: small processors, applied in transformers' order, and a counter-based random number. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import copied
from .errors import ArgumentError, NeoxLiteError

Processor = Callable[[Tensor, Tensor], Tensor]  # history (tokens,) int64, logits (vocabulary,) float32 -> logits
COLDEST = 1e-5  # a temperature below this counts as 0: logits divided by less could overflow float32
BOUNDS = {
    "temperature": (0.0, 1e6),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 1e6),
    "seed": (0, 2**64 - 1),
}


@dataclass(frozen=True)
class Sampling:
    """How one token is drawn. The defaults are transformers'; temperature 0 takes the best id, top_k 0 keeps all."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ArgumentError(f"{name} is {value}, expected {low} to {high}")

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature < COLDEST

    def processors(self, between: Sequence[Processor] = ()) -> list[Processor]:
        """The steps between logits and choice, in order; `between` come after the penalty and before the temperature."""
        steps: list[Processor] = []
        if self.repetition_penalty != 1.0:
            steps.append(lambda history, logits: penalize_repetition(history, logits, self.repetition_penalty))
        steps += between
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


def exclude(logits: Tensor, ids: Tensor) -> Tensor:
    """A copy of logits (vocabulary,) in which ids (n,) cannot be chosen."""
    copy = copied(logits)
    copy.numpy()[ids.numpy()] = -math.inf
    return copy


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


def choose(logits: Tensor, history: Tensor, stream: int, sampling: Sampling, steps: Sequence[Processor]) -> int:
    """The id that follows history (tokens,), by argmax of logits (vocabulary,) or a draw; both tensors on the CPU.

    The draw depends on the logits and (seed, tokens so far, stream) alone: every id runs a race against the same clock, and a
    likelier one runs faster (Gumbel-max). Two models that draw at the same place therefore mostly draw the same id: with a
    probability of at least (1 - d) / (1 + d), where d is the total variation distance of their distributions
    (Daliri et al. 2024, https://arxiv.org/abs/2408.07978). Raises NeoxLiteError where NaN or infinite logits, or processors
    that exclude every id, leave nothing to choose from.
    """
    import numpy as np

    for step in steps:
        logits = step(history, logits)
    values = logits.numpy()  # torch would share so few numbers out to threads, which then spin beside the kernels' own
    chosen = int(values.argmax())  # of a NaN, if there is one
    if not math.isfinite(values[chosen]):
        raise NeoxLiteError(
            "no id can be chosen: the logits hold NaN or infinity, or every id is excluded; run `neox-lite verify` on "
            "the model, and check logits_processor if you pass one"
        )
    if sampling.greedy:
        return chosen
    ids = np.flatnonzero(values > -np.inf)
    return int(ids[(values[ids] + gumbel(sampling.seed, len(history), stream, ids)).argmax()])


def gumbel(seed: int, position: int, stream: int, ids: Any) -> Any:
    """A random number for each of ids (n,), float64 with Gumbel's distribution.

    It depends on nothing that was drawn before: Philox with key `seed` and counter (position, stream, 0, 0) gives the place
    in SplitMix64's sequence (Steele et al., OOPSLA 2014) from which ids count, and 52 bits of each output are used.
    """
    import numpy as np

    high, low, _, _ = philox4x32((position, stream, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    x = np.uint64(high << 32 | low) + ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = (x ^ (x >> np.uint64(31))) >> np.uint64(12)
    return -np.log(-np.log((x.astype(np.float64) + 0.5) * 2.0**-52))  # strictly between 0 and 1: never infinite


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words from a counter and a key: ten rounds of Philox (Salmon et al., SC 2011)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3
