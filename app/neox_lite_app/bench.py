"""neox-lite bench: how fast a model reads prompts and decodes, beside how fast this machine could read its weights.

Times the model's own steps; knows no kernel and no text: prompts are random ids.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.cache import Batch, BlockTable, PagePool
from neox_lite.errors import ArgumentError
from neox_lite.formats import DENSE, NF4, Dense, GroupInt, Weight, make_format
from neox_lite.generation.protocols import PREFILL_TOKENS
from neox_lite.hub import resolve
from neox_lite.kernels.graphs import ReplayRunner
from neox_lite.layers import Linear
from neox_lite.loading.apply import apply
from neox_lite.loading.options import LoadOptions
from neox_lite.offload.memory import free_gpu, free_memory
from neox_lite.offload.placement import check, decide
from neox_lite.offload.plan import PlacementRequest
from neox_lite.offload.profile import context_bytes
from neox_lite.units import PAGE, dtype_name

from .load_for_command import default_threads, describe, load, placing, warn_if_busy
from .memory_probe import anonymous_peak, copy_gb_per_s, fastest_read, peak_bytes, seconds
from .models.random_model import RandomModel, config_of
from .terminal import amount, bar, note, print_json

WARM_UP = 4  # decode steps that are not counted
PREFILL_RUNS = 3
OUTSIDE_STEPS = 8
BUFFER_BYTES = 2 << 30  # read to measure the machine: many times any cache
READ_PASSES = 5
PAIRS, PAIR_STEPS = 5, 4  # readings of memory, and the decode steps before each
COPY_BYTES = 1 << 30  # on a GPU


def bench(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads or default_threads())
    check_options(args)
    shaped = args.shape is not None
    config = config_of(args.shape) if shaped else GPTNeoXConfig.from_pretrained(resolve(args.model, args.revision))
    args.context = contexts_of(config, args)
    check(placement_request(args))  # before gigabytes are written
    plan = plan_of(config, args) if shaped else None
    load_average = warn_if_busy()
    if plan is not None and args.scratch is not None:
        write(plan, Path(args.scratch))
        plan = None  # what making it took is not the model's
    with anonymous_peak() as peak:
        model, load_s = load_model(args) if plan is None else (build(plan, args), None)
        result = {**identity(model, args), "load_s": load_s, **measure(model, args)}
    result |= {"peak_bytes": peak_bytes(model.device), "anonymous_peak_bytes": peak()}
    result |= bandwidth(model, args.context[0], min(PAIR_STEPS, args.decode)) | card(model, result)
    result["load_average"] = load_average
    if args.json:
        print_json(result)
    else:
        print(table(result))
    if args.shape:
        note("measured with random weights, which say nothing of quality")


# The model ------------------------------------------------------------------------------------------------------------


def check_options(args: argparse.Namespace) -> None:
    """Refuse what has no meaning beside MODEL, or beside --shape."""
    shaped = args.shape is not None
    for name in ("revision", "adapter") if shaped else ("group_size", "scratch"):
        if getattr(args, name) is not None:
            raise ArgumentError(f"--{name.replace('_', '-')} goes with {'MODEL' if shaped else '--shape'} only")
    if args.scratch == "":
        raise ArgumentError("--scratch is empty, expected a new folder's name")
    if args.warm and shaped and args.scratch is None:
        raise ArgumentError("--warm reads weights from the disk, and --shape makes them in memory; add --scratch DIR")


def placement_request(args: argparse.Namespace, **changes: Any) -> PlacementRequest:
    """What the placement flags ask for, with room for the longest sequence that is measured."""
    longest = max(*args.prefill, max(args.context) + WARM_UP + args.decode)
    return replace(LoadOptions.parse({**placing(args), "context": longest}).placement_request, **changes)


def load_model(args: argparse.Namespace) -> tuple[GPTNeoXForCausalLM, float]:
    """MODEL or the folder just written, and the seconds that loading it took, with --warm the reading too."""
    quantization = args.format if args.model and args.format != "fp16" else None
    name = args.model or args.scratch
    began = time.perf_counter()
    model = load(name, args, args.head, quantization=quantization, context=placement_request(args).context)
    load_s = time.perf_counter() - began
    if args.format == "fp16" and linears(model)[0].format != DENSE:
        raise ArgumentError(f"{args.model}: is quantized; --format fp16 needs the checkpoint that it was made from")
    return model, load_s


def plan_of(config: GPTNeoXConfig, args: argparse.Namespace) -> RandomModel:
    """The random model that --shape, --format, --group-size and --head ask for."""
    format = Dense() if args.format == "fp16" else make_format(args.format or "int4", args.group_size)
    assert isinstance(format, Dense | GroupInt | NF4)
    return RandomModel(config, format, args.head == "int8")


def write(plan: RandomModel, folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError(f"--scratch {folder}: is there already; give a new folder, or run neox-lite bench {folder}")
    with bar("write random weights") as progress:
        plan.write(folder, progress)
    note(f"{folder} stays, for neox-lite bench {folder}")


def build(plan: RandomModel, args: argparse.Namespace) -> GPTNeoXForCausalLM:
    """The plan's model in memory, where the placement flags say."""
    decision = decide(placement_request(args, head="fp16"), plan.sizes, ["embed_out"])
    there = decision.device if decision.everything_there else torch.device("cpu")
    free = free_memory()[1]
    if there.type == "cpu" and free is not None and plan.nbytes > free:
        raise ArgumentError(
            f"--shape {args.shape}: the weights take {amount(plan.nbytes, 'B')}, but {amount(free, 'B')} of memory is free; "
            "use --format int4, or --scratch DIR to run them mapped from there"
        )
    with bar("make random weights") as progress:
        model = plan.build(progress, there)
    model.exact = args.exact
    # On a GPU the random weights are already in place.
    apply(model, replace(decision, placement=None) if there.type == "cuda" else decision)
    note(f"{args.shape}: {describe(model)}")
    return model


def linears(model: GPTNeoXForCausalLM) -> list[Linear]:
    """The linear layers of all blocks."""
    return [m for m in model.gpt_neox.layers.modules() if isinstance(m, Linear)]


def read_linears(model: GPTNeoXForCausalLM) -> list[Linear]:
    """What every decoded token reads: the linear layers and the head, not the embedding."""
    return [*linears(model), model.embed_out]


def contexts_of(config: GPTNeoXConfig, args: argparse.Namespace) -> list[int]:
    """The numbers of cached tokens to decode after: as given, else 128; on a GPU 0, 1024 and 2048, as far as there is room.

    Raises ArgumentError for prompts and sequences that are longer than the model's context.
    """
    limit = config.max_position_embeddings
    if max(args.prefill) > limit:
        raise ArgumentError(f"--prefill is {max(args.prefill)}, but the model's context is {limit}")
    room = limit - WARM_UP - args.decode
    if args.context is None:
        on_gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
        contexts = [min(n, room) for n in ((0, 1024, 2048) if on_gpu else (128,))]
    else:
        contexts = args.context
    if max(contexts) > room or room < 0:
        raise ArgumentError(
            f"--context {max(contexts)} and --decode {args.decode} need {max(contexts) + WARM_UP + args.decode} tokens with "
            f"{WARM_UP} to warm up, but the model's context is {limit}"
        )
    return list(dict.fromkeys(contexts))


def identity(model: GPTNeoXForCausalLM, args: argparse.Namespace) -> dict[str, Any]:
    """What is measured, and on what."""
    config, weight = model.config, linears(model)[0].handle
    return {
        "model": args.model,
        "shape": args.shape or f"{config.num_hidden_layers}x{config.hidden_size}x{config.num_attention_heads}",
        "format": label(weight),
        "group_size": getattr(weight.format, "group_size", None),
        "head": label(model.embed_out.handle),
        "kv": model.kv,
        "device": str(model.device),
        "backend": model.ops.name,
        "threads": torch.get_num_threads(),
        "context": args.context[0],
    }


def label(weight: Weight) -> str:
    """int4, int8, fp16, bfloat16 or float32."""
    if weight.format != DENSE:
        return weight.format.name
    name = dtype_name(weight.tensors["weight"].dtype)
    return "fp16" if name == "float16" else name


def weight_bytes(model: GPTNeoXForCausalLM) -> int:
    """Bytes that every decoded token reads."""
    return sum(linear.handle.nbytes for linear in read_linears(model))


# Speed ----------------------------------------------------------------------------------------------------------------


def measure(model: GPTNeoXForCausalLM, args: argparse.Namespace) -> dict[str, Any]:
    """All figures that come from running the model; speeds are medians."""
    batches, left_out = batches_of(model, args)
    first, outside_steps = args.context[0], min(OUTSIDE_STEPS, args.decode)
    kinds = [*((n, first) for n in batches), *((1, context) for context in args.context[1:])]
    total = len(args.prefill) * PREFILL_RUNS + len(kinds) * (WARM_UP + args.decode) + WARM_UP + outside_steps
    with bar("measure", "step") as progress:
        steps = itertools.count(1)

        def tick() -> None:
            progress(next(steps), total)

        # The first pass binds the kernels and reads the weights into memory; it is not timed.
        prefill_s(model, min(16, *args.prefill), 1, lambda: None)
        decodes: dict[tuple[int, int], list[float]] = {kind: [] for kind in kinds}
        for (n, context), times in decodes.items():
            for step_s in decode_s(model, n, context, WARM_UP + args.decode):
                times.append(step_s)
                tick()
            del times[:WARM_UP]
        prefills = {n: statistics.median(prefill_s(model, n, PREFILL_RUNS, tick)) for n in args.prefill}
        outside = outside_share(model, first, outside_steps, tick)
    median = {kind: statistics.median(times) for kind, times in decodes.items()}
    fast, slow = quartiles(decodes[1, first])
    return {
        "prefill_tokens_per_s": {str(n): n / prefill for n, prefill in prefills.items()},
        "first_token_s": {str(n): prefill for n, prefill in prefills.items()},
        "decode_tokens_per_s": 1 / median[1, first],
        "decode_quartiles_tokens_per_s": [1 / slow, 1 / fast],
        "context_decode_tokens_per_s": {str(context): 1 / median[1, context] for context in args.context},
        "batch_decode_tokens_per_s": {str(n): n / median[n, first] for n in batches if n > 1},
        "batches_left_out": left_out,
        "weight_bytes_per_token": weight_bytes(model),
        "weight_gb_per_s": weight_bytes(model) / median[1, first] / 1e9,
        "outside_share": outside,
    }


def batches_of(model: GPTNeoXForCausalLM, args: argparse.Namespace) -> tuple[list[int], list[int]]:
    """The batch sizes to decode with, and those for whose KV cache the memory budget has no room; a warning names them."""
    sizes, pages = sorted({1, *args.batch}), pages_for(args.context[0] + WARM_UP + args.decode)
    if model.cache_pages is None or sizes[-1] * pages <= model.cache_pages:
        return sizes, []
    most = max(1, model.cache_pages // pages)
    left_out = [n for n in sizes if n > most]
    note(
        f"neox-lite: warning: no batch of {' or '.join(map(str, left_out))} is measured: the memory budget has room for "
        f"{model.cache_pages * PAGE} tokens of KV cache, {most} sequence{'s' if most > 1 else ''} of "
        f"{pages * PAGE}; give it more memory or fewer tokens"
    )
    return [n for n in sizes if n <= most], left_out


def pages_for(tokens: int) -> int:
    """Pages of KV cache that a sequence takes."""
    return -(-tokens // PAGE)


def quartiles(times: Sequence[float]) -> tuple[float, float]:
    """The times that a quarter and three quarters of all stay below."""
    if len(times) == 1:
        return times[0], times[0]
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return first, third


def prefill_s(model: GPTNeoXForCausalLM, tokens: int, runs: int, tick: Callable[[], None]) -> list[float]:
    """Seconds that a prompt of random ids takes, each run into a fresh sequence."""
    pool, times = model.new_pool(pages=pages_for(tokens)), []
    for _ in range(runs):
        ids = torch.randint(model.config.vocab_size, (tokens,)).tolist()
        block_table = pool.new()
        began = time.perf_counter()
        for start in range(0, tokens, PREFILL_TOKENS):
            logits = model.step(pool, [block_table], [ids[start : start + PREFILL_TOKENS]])
        logits.argmax().item()  # waits for a GPU
        times.append(time.perf_counter() - began)
        pool.free(block_table)
        tick()
    return times


def decode_s(model: GPTNeoXForCausalLM, batch: int, context: int, steps: int) -> Iterator[float]:
    """Seconds of each greedy step of a batch whose sequences already hold `context` tokens, as the steps are made."""
    pool = model.new_pool(pages=batch * pages_for(context + steps))
    block_tables = [filled(pool, context) for _ in range(batch)]
    chosen = [[(1 + i) % model.config.vocab_size] for i in range(batch)]
    for _ in range(steps):
        began = time.perf_counter()
        chosen = model.step(pool, block_tables, chosen).argmax(-1, keepdim=True).tolist()
        yield time.perf_counter() - began


def filled(pool: PagePool, context: int) -> BlockTable:
    """A block table of random keys and values, as large as those of a prompt, without the time of a prefill."""
    block_table = pool.new()
    batch = Batch.reserve(pool, [block_table], [context])
    for layer, storage in enumerate(pool.storage):
        keys, values = torch.randn(2, context, storage.shape[2], storage.shape[4], device=storage.device)
        pool.write(layer, batch, keys, values)
    batch.commit()
    return block_table


@dataclass
class Stopwatch:
    """Adds up the time inside calls; a call within a call counts once."""

    seconds: float = 0.0
    depth: int = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        began = time.perf_counter()
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                self.seconds += time.perf_counter() - began


class Timed:
    """Stands in front of a backend, or of a pass that it captured, and times every call."""

    def __init__(self, inner: Any, watch: Stopwatch) -> None:
        self._inner, self._watch = inner, watch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            with self._watch.running():
                result = found(*args, **options)
            if isinstance(result, ReplayRunner):
                capture = result.capture
                result.capture = lambda *pass_: (found := capture(*pass_)) and Timed(found, self._watch)
            return result

        return call


def outside_share(model: GPTNeoXForCausalLM, context: int, steps: int, tick: Callable[[], None]) -> float | None:
    """Share of decode time outside the backend's operations and captured steps; None where that is not known.

    That is a GPU, where calls return before the work is done, and a backend that does not work through model.ops.
    """
    if model.device.type != "cpu":
        return None
    operations, watch = model.ops, Stopwatch()
    total_s = inside_s = 0.0
    model.ops = Timed(operations, watch)
    try:
        for i, step_s in enumerate(decode_s(model, 1, context, WARM_UP + steps)):
            if i >= WARM_UP:
                total_s += step_s
                inside_s += watch.seconds
            watch.seconds = 0.0
            tick()
    finally:
        model.ops = operations
    return 1 - inside_s / total_s if inside_s else None


# The machine ----------------------------------------------------------------------------------------------------------


def bandwidth(model: GPTNeoXForCausalLM, context: int, steps: int) -> dict[str, Any]:
    """On the CPU, how fast plain code reads a fresh buffer and the model's weights, and decode's share of the former.

    None where a part of the model is elsewhere. Machines that others use too change their speed within seconds, so the share
    is the median of several, each of so many decode steps and the reading right after them.
    """
    keys = ("read_gb_per_s", "read_method", "bandwidth_share", "weights_read_gb_per_s")
    if model.placement is not None or model.device.type != "cpu":
        return dict.fromkeys(keys)
    threads = torch.get_num_threads()
    weights = [max(linear.handle.tensors.values(), key=lambda t: t.nbytes) for linear in read_linears(model)]
    buffer_bytes = min(BUFFER_BYTES, (free_memory()[1] or BUFFER_BYTES) // 4) // 8 * 8
    with fastest_read([torch.ones(buffer_bytes, dtype=torch.uint8, device=model.device)], threads) as (read, method):
        rounds = []
        for _ in range(PAIRS):
            times = list(decode_s(model, 1, context, WARM_UP + steps))[WARM_UP:]
            rounds.append((statistics.mean(times), seconds(read)))
    per_read = weight_bytes(model) / buffer_bytes
    with fastest_read(weights, threads) as (read_weights, _):
        weights_s = min(seconds(read_weights) for _ in range(READ_PASSES))
    read_gb_per_s = buffer_bytes / min(read_s for _, read_s in rounds) / 1e9
    share = statistics.median(per_read * read_s / step_s for step_s, read_s in rounds)
    return dict(
        zip(keys, (read_gb_per_s, method, share, sum(t.nbytes for t in weights) / weights_s / 1e9), strict=True)
    )


def card(model: GPTNeoXForCausalLM, result: dict[str, Any]) -> dict[str, Any]:
    """On a GPU: most of its memory by the driver's count, whether steps were graphs, a copy's speed, decode's share of it.

    A step reads the weights and its sequence's keys and values; the share is None where it reads some of them elsewhere.
    """
    gpu = gpu_of(model)
    if gpu is None:
        return dict.fromkeys(("gpu_peak_bytes", "graph", "why_no_graph", "copy_gb_per_s", "copy_share"))
    peak = torch.cuda.max_memory_reserved(gpu) + context_bytes()
    rate = statistics.median(copy_gb_per_s(gpu, min(COPY_BYTES, free_gpu(gpu.index or 0)[1] // 4)))
    share = None
    if model.placement is None or model.placement.tiers == {"gpu"}:
        steps = {int(n): 1 / speed for n, speed in result["context_decode_tokens_per_s"].items()}
        nbytes = {n: weight_bytes(model) + n * cache_bytes(model) for n in steps}
        share = {str(n): nbytes[n] / step_s / 1e9 / rate for n, step_s in steps.items()}
    reason = model.graph_reason
    return {
        "gpu_peak_bytes": peak,
        "graph": reason is None,
        "why_no_graph": reason,
        "copy_gb_per_s": rate,
        "copy_share": share,
    }


def gpu_of(model: GPTNeoXForCausalLM) -> torch.device | None:
    """The GPU that runs the model or a part of it."""
    if model.accelerator is not None:
        return model.accelerator.device
    return model.device if model.device.type == "cuda" else None


def cache_bytes(model: GPTNeoXForCausalLM) -> int:
    """Of keys and values of a token, in all layers."""
    pool = model.new_pool(pages=1, limit=1)
    return sum(t.nbytes for t in (*pool.storage, *pool.scales)) // PAGE


# Output ---------------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The figures as aligned text."""
    group = f" g{result['group_size']}" if result["group_size"] else ""
    low, high = result["decode_quartiles_tokens_per_s"]
    outside, anonymous = result["outside_share"], result["anonymous_peak_bytes"]
    _, *longer_contexts = result["context_decode_tokens_per_s"].items()
    peak = "unknown" if result["peak_bytes"] is None else f"{amount(result['peak_bytes'], 'B')} at most"
    rows = [
        ("model", f"{result['model'] or 'random weights'}, {result['shape']}"),
        ("format", f"{result['format']}{group}, head {result['head']}, KV cache {result['kv']}"),
        ("runs on", f"{result['device']}, {result['backend']} backend, {result['threads']} threads"),
        *((f"prefill {n}", f"{speed:.1f} tokens/s") for n, speed in result["prefill_tokens_per_s"].items()),
        ("decode", f"{result['decode_tokens_per_s']:.2f} tokens/s ({low:.2f} to {high:.2f} in the middle half)"),
        *((f"decode x{n}", f"{speed:.2f} tokens/s in all") for n, speed in result["batch_decode_tokens_per_s"].items()),
        ("", f"after {result['context']} cached tokens a sequence"),
        *((f"decode at {n}", f"{speed:.2f} tokens/s") for n, speed in longer_contexts),
        *([] if result["graph"] is None else [("graphs", graphs(result))]),
        ("weights", f"{result['weight_gb_per_s']:.2f} GB/s read in decode" + beside(result)),
        ("outside", "unknown" if outside is None else f"{outside:.2%} of decode time is outside the operations"),
        ("memory", peak + ("" if anonymous is None else f", {amount(anonymous, 'B')} of it not backed by files")),
    ]
    if result["gpu_peak_bytes"] is not None:
        rows.append(("on the GPU", f"{amount(result['gpu_peak_bytes'], 'B')} at most by the driver's count"))
    if result["load_s"] is not None:
        rows.append(("load", f"{result['load_s']:.2f} s"))
    return "\n".join(f"{name:<13}{text}" for name, text in rows)


def graphs(result: dict[str, Any]) -> str:
    """Whether decode steps were CUDA graphs."""
    return "each decode step one CUDA graph" if result["graph"] else f"none: {result['why_no_graph']}"


def beside(result: dict[str, Any]) -> str:
    """What the memory could do, as the end of a sentence."""
    if result["read_gb_per_s"] is not None:
        return (
            f"; plain code reads them at {result['weights_read_gb_per_s']:.1f}, and a fresh buffer at "
            f"{result['read_gb_per_s']:.1f} ({result['read_method']}; decode has {result['bandwidth_share']:.0%} of that)"
        )
    if result["copy_gb_per_s"] is None:
        return ""
    shares = [f"{share:.0%} at {n}" for n, share in (result["copy_share"] or {}).items()]
    of_that = f", of which decode has {', '.join(shares)}, keys and values counted" if shares else ""
    return f"; the GPU copies {result['copy_gb_per_s']:.0f} GB/s{of_that}"
