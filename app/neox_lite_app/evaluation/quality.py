"""Quality on a text: perplexity of one model, and its distance from another. Knows no folder; compare.py does.

The text is tokenized once without special tokens and cut into consecutive windows of `context` tokens, a shorter last one
dropped; every token of a window but its first is scored, from float32 log-probabilities.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neox_lite import GPTNeoXForCausalLM
from neox_lite.cache import Batch, BlockTable, PagePool
from neox_lite.errors import ArgumentError, NeoxLiteError
from neox_lite.formats import Weight, label
from neox_lite.kernels.backend import Backend, Norm
from neox_lite.layers import Linear
from neox_lite.units import PAGE, dtype_name

from ..load_for_command import format_name, load
from ..terminal import bar, print_json, read_text

Progress = Callable[[int, int], None]
Each = Callable[[int, int, Tensor], object]
SCORED_LOGITS = 1 << 26  # logits held at a time: 256 MB as float32
KL_ROWS = 64  # tokens whose distance is summed at a time: 26 MB of float64 for a vocabulary of 50,000


def perplexity(args: argparse.Namespace) -> None:
    text = read_text(args.text)
    model = load(args.model, args, args.head)
    windows = cut(model, text, args.context)
    with bar("perplexity", "window") as progress:
        value = perplexity_of(model, windows, progress)
    if not math.isfinite(value):
        raise NeoxLiteError(f"{args.model}: the perplexity is {value}: see neox-lite verify, which names the reason")
    result = {"perplexity": value, "tokens": windows.shape[0] * (windows.shape[1] - 1), "context": args.context}
    if args.json:
        print_json(result)
    else:
        print(f"perplexity {value:.4f} over {result['tokens']:,} tokens in windows of {args.context}")


def cut(model: GPTNeoXForCausalLM, text: str, context: int) -> Tensor:
    """The text's windows (n, context) int64. Raises ArgumentError if there is not even one, or the context is too long."""
    limit = model.config.max_position_embeddings
    if not 2 <= context <= limit:
        raise ArgumentError(f"--context is {context}, expected 2 to {limit}, the model's own")
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) < context:
        raise ArgumentError(
            f"the text has {len(ids)} tokens, fewer than one window of {context}; use a smaller --context"
        )
    if max(ids) >= model.config.vocab_size:
        raise ArgumentError(f"the tokenizer gives id {max(ids)}, but the model has {model.config.vocab_size} ids")
    return torch.tensor(ids[: len(ids) // context * context]).view(-1, context)


@dataclass(frozen=True)
class Head:
    """What turns last states into log-probabilities: all of a model that is needed once its states are known."""

    ops: Backend
    norm: Norm
    weight: Weight

    @classmethod
    def of(cls, model: GPTNeoXForCausalLM) -> Head:
        return cls(model.ops, model.final_norm, model.embed_out.handle)

    @torch.no_grad()
    def logits(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """x (tokens, hidden) -> float32 logits (rows, vocabulary) of what follows the chosen rows; None: all."""
        return self.ops.head(x, rows, self.norm, self.weight)

    def log_probabilities(self, x: Tensor) -> Tensor:
        """x (context, hidden) of a window -> (context - 1, vocabulary) float32 on the CPU, of what follows its tokens."""
        return self.logits(x)[:-1].float().log_softmax(-1).cpu()


def last_states(
    model: GPTNeoXForCausalLM, windows: Tensor, progress: Progress | None = None, each: Each | None = None
) -> Iterator[Tensor]:
    """For each window its states before the final norm, x (context, hidden). each: sees (window, layer, x after it)."""
    count, context = windows.shape
    step = SCORED_LOGITS // (context * model.config.vocab_size)
    if model.cache_pages is not None:
        step = min(step, model.cache_pages // -(-context // PAGE))
    step = max(1, step)
    for start in range(0, count, step):
        shown = None if each is None else partial(_split, each, start, context)
        states = _through(model, windows[start : start + step], shown).view(-1, context, model.config.hidden_size)
        for i, x in enumerate(states, start + 1):
            yield x
            if progress is not None:
                progress(i, count)


def _split(each: Each, first: int, context: int, layer: int, x: Tensor) -> None:
    """Show each window of x (windows * context, hidden), the first of which has the number `first`."""
    for i, state in enumerate(x.split(context), first):
        each(i, layer, state)


def _through(model: GPTNeoXForCausalLM, windows: Tensor, each: Callable[[int, Tensor], None] | None) -> Tensor:
    """windows (n, context) through all layers -> x (n * context, hidden). each: sees (layer, x after it)."""
    pool, layer = model.new_pool(), -1

    def before(x: Tensor) -> None:
        nonlocal layer
        if each is not None and layer >= 0:
            each(layer, x)
        layer += 1

    counts = [windows.shape[1]] * len(windows)
    x = append(model, pool, [pool.new() for _ in windows], counts, windows.flatten(), None if each is None else before)
    before(x)
    return x


@torch.no_grad()
def append(
    model: GPTNeoXForCausalLM,
    pool: PagePool,
    block_tables: Sequence[BlockTable],
    counts: Sequence[int],
    ids: Tensor,
    each: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Append counts[i] of ids (tokens,), all in the vocabulary, to block_tables[i] -> x (tokens, hidden) before the final norm.

    each: sees the input of every layer. Raises CacheError, with nothing appended, where the pool has too few pages.
    """
    batch = Batch.reserve(pool, block_tables, counts)
    runner = model.runner
    return runner.hidden_states(runner.embed(ids), pool, batch, each)


def log_probabilities(model: GPTNeoXForCausalLM, windows: Tensor, progress: Progress | None = None) -> Iterator[Tensor]:
    """For each window (context,), the log-probabilities of what follows: (context - 1, vocabulary) float32 on the CPU."""
    head = Head.of(model)
    return map(head.log_probabilities, last_states(model, windows, progress))


def perplexity_of(model: GPTNeoXForCausalLM, windows: Tensor, progress: Progress | None = None) -> float:
    """exp of the mean negative log-likelihood of every token of a window but its first."""
    total, count = 0.0, 0
    for window, scores in zip(windows, log_probabilities(model, windows, progress), strict=True):
        total -= float(scores.gather(1, window[1:, None]).double().sum())
        count += len(window) - 1
    return math.exp(total / count)


@dataclass(frozen=True)
class Quality:
    """One model beside its source. kl: mean KL(source || model) in nats a token; top1: share of equal first choices.

    kl_error: the standard error of that mean, from windows, since tokens of one are not independent; None for one window.
    bits_per_weight: of the layers' linear weights, scales included. bytes: of all tensors as they run.
    """

    path: str
    format: str
    bits_per_weight: float
    head: str
    bytes: int
    perplexity: float
    kl: float
    kl_error: float | None
    top1: float


def quality_of(
    source: GPTNeoXForCausalLM, model: GPTNeoXForCausalLM, windows: Tensor, path: str, progress: Progress | None = None
) -> Quality:
    """Score a model and its distance from the source on the same windows."""
    found = log_probabilities(model, windows, progress)
    reference = None if model is source else log_probabilities(source, windows)
    return measure(model, windows, found, reference, path)


def measure(
    model: GPTNeoXForCausalLM, windows: Tensor, found: Iterator[Tensor], reference: Iterator[Tensor] | None, path: str
) -> Quality:
    """found, reference: the model's and the source's log-probabilities, window after window; None where it is the source."""
    loss, same, distances = 0.0, 0, []
    for window, scores in zip(windows, found, strict=True):
        truth = scores if reference is None else next(reference)
        loss -= float(scores.gather(1, window[1:, None]).double().sum())
        same += int((truth.argmax(1) == scores.argmax(1)).sum())
        distances.append(0.0 if reference is None else _mean_kl(truth, scores))
    tokens, kl = len(windows) * (windows.shape[1] - 1), torch.tensor(distances, dtype=torch.double)
    linears = [m for m in model.gpt_neox.layers.modules() if isinstance(m, Linear)]
    stored = sum(_weight_bytes(m.handle) for m in linears)
    weights = sum(m.in_features * m.out_features for m in linears)
    return Quality(
        path,
        format_name(model),
        stored * 8 / weights,
        label(model.embed_out.format, dtype_name(model.dtype)),
        model.get_memory_footprint(),
        math.exp(loss / tokens),
        float(kl.mean()),
        float(kl.std() / math.sqrt(len(kl))) if len(kl) > 1 else None,
        same / tokens,
    )


def _mean_kl(reference: Tensor, found: Tensor) -> float:
    """KL(reference || found) of log-probabilities (tokens, vocabulary), summed in float64, some rows at a time."""
    rows = zip(reference.split(KL_ROWS), found.split(KL_ROWS), strict=True)
    return sum(float((w.exp().double() * (w.double() - f.double())).sum()) for w, f in rows) / len(reference)


def _weight_bytes(weight: Weight) -> int:
    """Without what follows from the shape or states it, such as weight_shape: that is bookkeeping."""
    beside = {*weight.format.constants(weight.shape), *weight.format.loose}
    return sum(tensor.nbytes for key, tensor in weight.tensors.items() if key not in beside)


def table(rows: list[dict[str, Any]]) -> str:
    """Quality rows as aligned text."""
    head = f"{'format':<11}{'bits/weight':>12}  {'head':<10}{'MB':>9}{'perplexity':>12}{'KL':>11}  {'± error':<9}{'top-1':>8}"
    lines = [
        f"{r['format']:<11}{r['bits_per_weight']:>12.3f}  {r['head']:<10}{r['bytes'] / 1e6:>9.1f}{r['perplexity']:>12.4f}"
        f"{r['kl']:>11.6f}  {'' if r['kl_error'] is None else format(r['kl_error'], '.6f'):<9}{r['top1']:>8.2%}  {r['path']}"
        for r in rows
    ]
    return "\n".join([f"{head}  model", *lines])
