"""Quality on a text: perplexity of one model, and the distance of quantized folders from their source.

The text is tokenized once without special tokens and cut into consecutive windows of `context` tokens, a shorter last one
dropped; every token of a window but its first is scored, from float32 log-probabilities.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from neox_lite import GPTNeoXForCausalLM
from neox_lite.cache import PAGE
from neox_lite.errors import ArgumentError
from neox_lite.formats import Weight
from neox_lite.hub import resolve
from neox_lite.layers import Linear

from .running import bar, format_name, load, note, print_json, read_text

Progress = Callable[[int, int], None]
SCORED_LOGITS = 1 << 26  # logits held at a time: 256 MB as float32


def perplexity(args: argparse.Namespace) -> None:
    text = read_text(args.text)
    model = load(args.model, args, args.head)
    windows = cut(model, text, args.context)
    with bar("perplexity", "window") as progress:
        value = perplexity_of(model, windows, progress)
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
    return torch.tensor(ids[: len(ids) // context * context]).view(-1, context)


def log_probabilities(model: GPTNeoXForCausalLM, windows: Tensor, progress: Progress | None = None) -> Iterator[Tensor]:
    """For each window (context,), the log-probabilities of what follows: (context - 1, vocabulary) float32 on the CPU."""
    count, context = windows.shape
    step = SCORED_LOGITS // (context * model.config.vocab_size)
    if model.cache_pages is not None:
        step = min(step, model.cache_pages // -(-context // PAGE))
    step = max(1, step)
    for start in range(0, count, step):
        logits = model(windows[start : start + step], use_cache=False).logits
        for window in logits:
            yield window[:-1].float().log_softmax(-1).cpu()
        if progress is not None:
            progress(min(start + step, count), count)


def perplexity_of(model: GPTNeoXForCausalLM, windows: Tensor, progress: Progress | None = None) -> float:
    """exp of the mean negative log-likelihood of every token of a window but its first."""
    total, count = 0.0, 0
    for window, scores in zip(windows, log_probabilities(model, windows, progress), strict=True):
        total -= float(scores.gather(1, window[1:, None]).double().sum())
        count += len(window) - 1
    return math.exp(total / count)


@dataclass(frozen=True)
class Quality:
    """One model beside its source. kl: mean KL(source || model) in nats a token; top1: share of equal first choices."""

    path: str
    format: str
    bits_per_weight: float
    perplexity: float
    kl: float
    top1: float
    bytes: int


def quality_of(
    source: GPTNeoXForCausalLM, model: GPTNeoXForCausalLM, windows: Tensor, path: str, progress: Progress | None = None
) -> Quality:
    """Score a model and its distance from the source on the same windows."""
    loss, kl, same, count = 0.0, 0.0, 0, 0
    scores = log_probabilities(model, windows, progress)
    pairs: Iterator[tuple[Tensor, Tensor]]
    if model is source:
        pairs = ((found, found) for found in scores)
    else:
        pairs = zip(log_probabilities(source, windows), scores, strict=True)
    for window, (wanted, found) in zip(windows, pairs, strict=True):
        loss -= float(found.gather(1, window[1:, None]).double().sum())
        kl += float((wanted.exp().double() * (wanted.double() - found.double())).sum())
        same += int((wanted.argmax(1) == found.argmax(1)).sum())
        count += len(window) - 1
    linears = [m for m in model.gpt_neox.layers.modules() if isinstance(m, Linear)]
    stored = sum(_weight_bytes(m.handle) for m in linears)
    weights = sum(m.in_features * m.out_features for m in linears)
    return Quality(
        path,
        format_name(model),
        stored * 8 / weights,
        math.exp(loss / count),
        kl / count,
        same / count,
        model.get_memory_footprint(),
    )


def _weight_bytes(weight: Weight) -> int:
    """Without what follows from the shape or states it, such as weight_shape: that is bookkeeping."""
    beside = {*weight.format.constants(weight.shape), *weight.format.loose}
    return sum(tensor.nbytes for key, tensor in weight.tensors.items() if key not in beside)


def compare(args: argparse.Namespace) -> None:
    text = read_text(args.text)
    for path in args.folders:
        resolve(path)  # a wrong name is said now, not after an hour's scoring of the source
    source = load(args.source, args, kv="fp16")  # what a smaller cache costs is then part of the distance
    windows = cut(source, text, args.context)[: args.windows]
    rows: list[Quality] = []
    for i, path in enumerate([args.source, *args.folders]):
        model = source if i == 0 else load(path, args, args.head)
        if model.config.vocab_size != source.config.vocab_size:
            raise ArgumentError(
                f"{path}: vocab_size {model.config.vocab_size}, but {args.source} has {source.config.vocab_size}"
            )
        with bar(path, "window") as progress:
            rows.append(quality_of(source, model, windows, path, progress))
        del model
        gc.collect()
    if args.json:
        print_json({"rows": [asdict(row) for row in rows]})
        return
    note(f"{windows.shape[0]} windows of {windows.shape[1]} tokens; KL in nats a token")
    print(table([asdict(row) for row in rows]))


def table(rows: list[dict[str, Any]]) -> str:
    """Quality rows as aligned text."""
    head = f"{'format':<12}{'bits/weight':>12}{'MB':>10}{'perplexity':>12}{'KL':>11}{'top-1':>9}  model"
    lines = [
        f"{r['format']:<12}{r['bits_per_weight']:>12.3f}{r['bytes'] / 1e6:>10.1f}{r['perplexity']:>12.4f}"
        f"{r['kl']:>11.6f}{r['top1']:>9.2%}  {r['path']}"
        for r in rows
    ]
    return "\n".join([head, *lines])
