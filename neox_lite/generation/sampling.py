"""Logits -> token: processors in transformers' order, a counter-based random number, log-probabilities. Knows no model.

All of it is numpy's work: torch would share out so few numbers to threads, which then spin beside the kernels' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..cache import copied
from ..errors import NeoxLiteError
from .parameters import BY_NAME, SamplingParameters

if TYPE_CHECKING:
    import numpy as np

Processor = Callable[[Tensor, Tensor], Tensor]  # history (tokens,) int64, logits (vocabulary,) float32 -> logits
Filter = Callable[["np.ndarray", Any], "np.ndarray"]  # logits (n,), a parameter -> indices of the kept ones, ascending

# By their parameters, in the order in which they apply; a parameter with its neutral value leaves its own out.
PROCESSORS: dict[tuple[str, ...], tuple[Callable[..., Tensor], bool]] = {}
FILTERS: dict[str, Filter] = {}
Function = TypeVar("Function", bound=Callable[..., Any])


def processor_of(*names: str, new_tokens: bool = False) -> Callable[[Function], Function]:
    """Register the processor of parameters: history (new_tokens: without the prompt), logits and their values -> logits."""
    return lambda function: PROCESSORS.setdefault(names, (function, new_tokens))[0]  # type: ignore[return-value]


def filter_of(name: str) -> Callable[[Function], Function]:
    """Register the filter of a parameter."""
    return lambda function: FILTERS.setdefault(name, function)  # type: ignore[return-value]


@dataclass(frozen=True)
class Sampling(SamplingParameters):
    """How one token is sampled. The defaults are transformers'."""

    def _is_neutral(self, name: str) -> bool:
        return bool(getattr(self, name) == BY_NAME[name].neutral)

    def processors(self, between: Sequence[Processor] = (), prompt: int = 0) -> list[Processor]:
        """The steps between logits and sample, in order, for a sequence whose first `prompt` tokens are not new.

        `between` come last.
        """
        active = [names for names in PROCESSORS if not all(map(self._is_neutral, names))]
        return [*(self._processor(names, prompt) for names in active), *between]

    def _processor(self, names: tuple[str, ...], prompt: int) -> Processor:
        (process, new_tokens), values = PROCESSORS[names], [getattr(self, name) for name in names]
        start = prompt if new_tokens else 0
        return lambda history, logits: process(history[start:], logits, *values)

    @cached_property
    def filters(self) -> list[Callable[[np.ndarray], np.ndarray]]:
        """What leaves ids out of a sample, in order, each from what the one before it kept."""
        return [_bound(keep, getattr(self, name)) for name, keep in FILTERS.items() if not self._is_neutral(name)]


def _bound(keep: Filter, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: keep(values, value)


# Processors -----------------------------------------------------------------------------------------------------------


def exclude(logits: Tensor, ids: Tensor) -> Tensor:
    """A copy of logits (vocabulary,) without ids (n,): theirs are -inf."""
    copy = copied(logits)
    copy.numpy()[ids.numpy()] = -math.inf
    return copy


@processor_of("logit_bias")
def add_bias(history: Tensor, logits: Tensor, biases: Mapping[int, float]) -> Tensor:
    """Add each bias to the logit of its id."""
    import numpy as np

    copy = copied(logits)
    copy.numpy()[np.fromiter(biases, np.int64)] += np.fromiter(biases.values(), np.float32)
    return copy


@processor_of("sequence_bias")
def bias_sequences(history: Tensor, logits: Tensor, biases: Mapping[tuple[int, ...], float]) -> Tensor:
    """Add each bias to the logit of its sequence's last id, where the history ends with the ids before it."""
    import numpy as np

    copy, longest = copied(logits), max(map(len, biases))
    values, recent = copy.numpy(), tuple(history[max(0, len(history) - longest) :].tolist())
    for (*before, last), bias in biases.items():
        if len(before) <= len(recent) and tuple(before) == recent[len(recent) - len(before) :]:
            values[last] += np.float32(bias)
    return copy


@processor_of("repetition_penalty")
def penalize_repetition(history: Tensor, logits: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of ids seen so far (CTRL, https://arxiv.org/abs/1909.05858)."""
    import numpy as np

    ids, copy = history.numpy(), copied(logits)
    seen = logits.numpy()[ids]
    copy.numpy()[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
    return copy


@processor_of("frequency_penalty", "presence_penalty", new_tokens=True)
def penalize_frequency(new: Tensor, logits: Tensor, frequency: float, presence: float) -> Tensor:
    """Lower the logits of ids among the new tokens: by `frequency` for each time, and by `presence` once."""
    import numpy as np

    ids, counts = np.unique(new.numpy(), return_counts=True)
    copy = copied(logits)
    copy.numpy()[ids] -= (counts * frequency + presence).astype(np.float32)
    return copy


@processor_of("no_repeat_ngram_size")
def forbid_repeats(history: Tensor, logits: Tensor, n: int) -> Tensor:
    """Exclude every id that would end n tokens which the history has already."""
    import numpy as np

    ids = history.numpy()
    starts = len(ids) - n + 1  # where n tokens begin
    if starts < 1:
        return logits
    match = np.ones(starts, dtype=bool)
    for i in range(n - 1):
        match &= ids[i : i + starts] == ids[starts + i]
    return exclude(logits, torch.from_numpy(ids[n - 1 :][match]))


# Filters --------------------------------------------------------------------------------------------------------------


@filter_of("top_k")
def top_k(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest, and of all that equal the k-th."""
    import numpy as np

    n, columns = len(values), 16 * k
    if k >= n:
        return np.arange(n)
    indices = None
    if n >= 4 * columns:  # of so many columns' largest, the k-th largest is at most the k-th largest of all
        tops = values[: n // columns * columns].reshape(-1, columns).max(0)
        indices = np.flatnonzero(values >= np.partition(tops, -k)[-k])
        values = values[indices]
    keep = np.flatnonzero(values >= np.partition(values, -k)[-k])
    return keep if indices is None else indices[keep]


@filter_of("top_p")
def top_p(values: np.ndarray, p: float) -> np.ndarray:
    """Indices of the smallest set whose probability reaches p, at least one (https://arxiv.org/abs/1904.09751)."""
    import numpy as np

    indices, weights = np.arange(len(values)), np.exp(values - values.max())
    total = weights.sum(dtype=np.float64)
    left_out = (1 - p) * total  # what the others may weigh together
    rest, lost = left_out, 0.0
    for _ in range(3):  # those so light that all of them together could be left out need no place in the order
        heavy = np.flatnonzero(weights > rest / len(weights))
        if not len(heavy):
            break
        indices, weights = indices[heavy], weights[heavy]
        lost = total - weights.sum(dtype=np.float64)
        rest = left_out - lost
    ordered = np.sort(weights)  # much faster than their order is found
    last = min(int(np.count_nonzero(lost + ordered.cumsum(dtype=np.float64) <= left_out)), len(ordered) - 1)
    heavier, equal = np.flatnonzero(weights > ordered[last]), np.flatnonzero(weights == ordered[last])
    return np.sort(indices[np.append(heavier, equal[len(heavier) + last - len(ordered) :])])


@filter_of("min_p")
def min_p(values: np.ndarray, p: float) -> np.ndarray:
    """Indices of those at least p times as probable as the most probable one (https://arxiv.org/abs/2407.01082)."""
    import numpy as np

    return np.flatnonzero(values >= values.max() + np.float32(math.log(p)))


@filter_of("typical_p")
def typical_p(values: np.ndarray, p: float) -> np.ndarray:
    """Indices of the smallest set that reaches probability p, from those whose information is nearest to the expected one on
    (https://arxiv.org/abs/2202.00666)."""
    import numpy as np

    finite = np.flatnonzero(values > -np.inf)
    logs = log_softmax(values[finite])
    probabilities = np.exp(logs)
    distance = np.abs(-logs + (probabilities * logs).sum())
    order = distance.argsort()
    last = min(int((probabilities[order].cumsum() < p).sum()), len(order) - 1)
    keep = distance <= distance[order[last]]
    return finite[keep]


# Samples --------------------------------------------------------------------------------------------------------------


def sample_token(logits: Tensor, history: Tensor, stream: int, sampling: Sampling, steps: Sequence[Processor]) -> int:
    """The id after history (tokens,): argmax of logits (vocabulary,), or a sample. Both tensors are on the CPU.

    A sample depends on the logits and (seed, tokens so far, stream) alone: the argmax of the logits plus a Gumbel number for
    each id (Gumbel-max). Two models at the same position use the same numbers, so they sample the same id with a probability
    of at least (1 - d) / (1 + d), where d is the total variation distance of their distributions (Daliri et al. 2024,
    https://arxiv.org/abs/2408.07978). Raises NeoxLiteError for NaN or infinite logits, and where no id is left.
    """
    for step in steps:
        logits = step(history, logits)
    values = logits.numpy()
    # The argmax is the place of a NaN, if there is one.
    best = int(values.argmax())
    if not math.isfinite(values[best]):
        raise no_token_left()
    if sampling.greedy:
        return best
    ids, values = candidates(values, sampling)
    return int(ids[(values + gumbel(sampling.seed, len(history), stream, ids)).argmax()])


def sampled_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (vocabulary,) after all steps, as `sample_token` samples: divided by the temperature, -inf for filtered ids."""
    if sampling.greedy:
        return copied(logits)
    ids, values = candidates(logits.numpy(), sampling)
    found = torch.full_like(logits, -math.inf)
    found.numpy()[ids] = values
    return found


def no_token_left() -> NeoxLiteError:
    return NeoxLiteError(
        "no id can be chosen: the logits hold NaN or infinity, or every id is excluded; run `neox-lite verify` on "
        "the model, and check logits_processor if you pass one"
    )


def candidates(values: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Ids that the filters keep, ascending, and their logits after the temperature. values: logits (vocabulary,)."""
    import numpy as np

    if sampling.temperature != 1.0:
        values = values / np.float32(sampling.temperature)
    ids = None
    for keep in sampling.filters:
        indices = keep(values)
        ids, values = indices if ids is None else ids[indices], values[indices]
    finite = np.flatnonzero(values > -np.inf)
    return finite if ids is None else ids[finite], values[finite]


def gumbel(seed: int, position: int, stream: int, ids: Any) -> Any:
    """A random number for each of ids (n,), float64 with Gumbel's distribution.

    It depends on no earlier number: Philox with key `seed` and counter (position, stream, 0, 0) gives the place
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


# Log-probabilities ----------------------------------------------------------------------------------------------------


class TokenLogprob(NamedTuple):
    """Log-probability of a token before sampling's own steps (None for the first of a text), and the likeliest ids there."""

    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits: Tensor, token: int, likeliest: int, padding_ids: Tensor | None = None) -> TokenLogprob:
    """How likely logits (vocabulary,) made a token among ids that exist, and the likeliest of those, the best one first."""
    import numpy as np

    if padding_ids is not None and len(padding_ids):
        logits = exclude(logits, padding_ids)
    logs = log_softmax(logits.numpy())
    indices = top_k(logs, likeliest) if likeliest else np.arange(0)
    best = indices[np.argsort(-logs[indices], kind="stable")][:likeliest]
    return TokenLogprob(float(logs[token]), tuple((int(i), float(logs[i])) for i in best if logs[i] > -np.inf))


def log_softmax(values: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities that logits (n,) stand for."""
    import numpy as np

    shifted = values - values.max()
    return shifted - np.float32(math.log(np.exp(shifted).sum(dtype=np.float64)))
