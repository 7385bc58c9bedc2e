"""Kernels one by one: the launches of a decode step, tokens, prompts, attention, sizes of tile. Knows no model.

Times are medians of replays of a CUDA graph over copies of the weights that together exceed four times the L2 cache. GB/s count
the bytes of weights and scales alone, or of keys and values.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.peers import PEERS, once_for_each, torch_fp16
from neox_lite.cache import Batch, PagePool
from neox_lite.formats import DENSE, Weight, make_format
from neox_lite.kernels.triton.device import DeviceProperties
from neox_lite_app.memory_probe import copy_gb_per_s


@dataclass(frozen=True)
class Sizes:
    """What is timed."""

    shapes: dict[str, tuple[int, int]]  # name -> hidden size, heads
    sweep: tuple[int, ...]
    prefill: tuple[int, ...]
    contexts: tuple[int, ...]
    copy_bytes: int = 1 << 30
    vocabulary: int = 50432


FULL = Sizes(
    {"gpt-neox-20b": (6144, 64), "pythia-6.9b": (4096, 32), "pythia-1.4b": (2048, 16), "pythia-160m": (768, 12)},
    (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64),
    (128, 256, 384, 512, 1024, 2048),
    (128, 1024, 2048),
)
REHEARSAL = Sizes({"small": (128, 2)}, (1, 3), (260,), (10, 130), 1 << 16, 200)


MOST_COPIES = 1024  # of what is timed: enough for the keys and values of a small model's 128 tokens

# Timing ---------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of a call, by CUDA graphs and events on a GPU, by the wall in a rehearsal."""

    def __init__(self, device: torch.device, deadline: float) -> None:
        self.device, self.deadline = device, deadline

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Of one call: `calls` do the same work on different memory, one after the other in a graph."""
        for call in calls:
            call()
        if self.device.type != "cuda":
            return self.elapsed(calls[0])
        torch.cuda.synchronize()
        once = self.elapsed(lambda: [call() for call in calls])
        repeats = max(1, min(32, round(3e-4 / once)))  # a graph takes so long that launching it does not show
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                for call in calls:
                    call()
        runs = 20 if once * repeats < 5e-3 else 8
        taken = [self.elapsed(graph.replay) for _ in range(runs + 3)][3:]
        return statistics.median(taken) / (repeats * len(calls))

    def elapsed(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def copies_for(device: torch.device, nbytes: int) -> int:
    """How many copies of so many bytes exceed four times the L2 cache, that none is found there when its turn comes again."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_COPIES, -(-4 * cache // nbytes)))


# What is timed --------------------------------------------------------------------------------------------------------


def weight_of(format: str, rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float16) -> Weight:
    """Random codes and scales, made on the device."""
    if format == "dense":
        return Weight(DENSE, (rows, columns), {"weight": torch.randn(rows, columns, device=device, dtype=dtype)})
    kind = make_format(format, 128)
    specs = kind.specs((rows, columns), dtype)
    packed = torch.randint(-(2**31), 2**31 - 1, specs["weight_packed"][1], dtype=torch.int32, device=device)
    unit = columns**0.5 * 2 ** (kind.bits - 1)
    scale = (torch.rand(specs["weight_scale"][1], device=device) + 0.5).div_(unit).to(dtype)
    return Weight(kind, (rows, columns), {"weight_packed": packed, "weight_scale": scale})


def read_bytes(*weights: Weight) -> int:
    return sum(t.nbytes for w in weights for t in w.tensors.values())


class Bench:
    """The measurements of one device, by the triton backend."""

    def __init__(self, clock: Clock, sizes: Sizes, ops: Any) -> None:
        self.clock, self.sizes, self.ops, self.device = clock, sizes, ops, clock.device

    def rate(self, calls: Sequence[Callable[[], object]], nbytes: int) -> dict[str, float]:
        seconds = self.clock.seconds(calls)
        return {"us": seconds * 1e6, "gb_per_s": nbytes / seconds / 1e9}

    def x(self, tokens: int, features: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.randn(tokens, features, device=self.device, dtype=dtype)

    def moved(self, x: Tensor, weight: Weight) -> Any:
        """x as the weight reads it; what moving costs belongs to the operation before, and is measured there."""
        return lay(x, self.ops.linear.method(weight, x).layout)

    def copy(self) -> Iterator[dict[str, float]]:
        """GB/s of a device-to-device copy, read and write counted: the roof that every kernel is compared with."""
        rates = copy_gb_per_s(self.device, self.sizes.copy_bytes)
        yield {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}

    def pairs(self) -> Iterator[dict[str, Any]]:
        """The two launches of a decode step that read weights: qkv beside h to 4h, dense plus 4h to h; then the head."""
        for shape, (hidden, _) in self.sizes.shapes.items():
            x, residual = self.x(1, hidden), self.x(1, hidden)
            for format in ("int4", "int8"):
                # The smaller launch reads 5 weights of hidden x hidden.
                one = weight_of(format, hidden, hidden, self.device)
                sets = [self.block(format, hidden) for _ in range(copies_for(self.device, 5 * read_bytes(one)))]
                given, wide = self.moved(x, one), self.moved(self.x(1, 4 * hidden), sets[0][3])
                kinds = [None, "erf"]
                beside = [
                    partial(self.ops.grouped_linear, [given] * 2, w[:2], [None] * 2, kinds, [None, w[3]]) for w in sets
                ]
                sums = [partial(self.ops.linear_residual, [given, wide], w[2:], [None] * 2, residual) for w in sets]
                row = {"shape": shape, "format": format}
                yield {**row, "launch": "qkv beside h to 4h", **self.rate(beside, read_bytes(*sets[0][:2]))}
                yield {**row, "launch": "dense plus 4h to h", **self.rate(sums, read_bytes(*sets[0][2:]))}
            for format in ("dense", "int8"):
                weights = self.copies(format, self.sizes.vocabulary, hidden)
                ones = torch.ones(hidden, device=self.device).half()
                heads = [partial(self.ops.head, x, None, (ones, ones, 1e-5), w) for w in weights]
                row = {"shape": shape, "format": format, "launch": "norm and head"}
                yield {**row, **self.rate(heads, read_bytes(weights[0]))}

    def block(self, format: str, hidden: int) -> list[Weight]:
        """qkv, h to 4h, dense, 4h to h."""
        rows_and_columns = ((3 * hidden, hidden), (4 * hidden, hidden), (hidden, hidden), (hidden, 4 * hidden))
        return [weight_of(format, *size, self.device) for size in rows_and_columns]

    def tokens(self) -> Iterator[dict[str, Any]]:
        """One weight, h to 4h of the largest shape, for more and more tokens, beside torch's product of plain matrices."""
        for format in ("int4", "int8"):
            weights = self.copies(format, 4 * self.hidden, self.hidden)
            for count in (*self.sizes.sweep, *self.sizes.prefill):
                x = self.x(count, self.hidden)
                for name, make in (("neox-lite", self.ours), ("torch fp16", torch_fp16)):
                    figures = self.against([make(w) for w in weights], x, weights[0])
                    yield {"format": format, "tokens": count, "engine": name, **figures}

    def peers(self) -> Iterator[dict[str, Any]]:
        """The same int4 weight by others, those that take longest to tune last."""
        weights = self.copies("int4", 4 * self.hidden, self.hidden)
        for name, peer in PEERS.items():
            try:
                calls = [peer.make(w) for w in weights]
                for count in peer.tokens or (*self.sizes.sweep, *self.sizes.prefill):
                    if self.clock.late():
                        return
                    x = self.x(count, self.hidden, peer.dtype)
                    yield {"format": "int4", "tokens": count, "engine": name, **self.against(calls, x, weights[0])}
            except Exception as error:  # not installed, or cannot run here: named with its reason
                yield {"engine": name, "left_out": f"{type(error).__name__}: {error}".splitlines()[0][:300]}

    @property
    def hidden(self) -> int:
        """Of the largest shape."""
        return next(iter(self.sizes.shapes.values()))[0]

    def copies(self, format: str, rows: int, columns: int) -> list[Weight]:
        """Weights that together exceed the cache."""
        first = weight_of(format, rows, columns, self.device)
        more = copies_for(self.device, read_bytes(first)) - 1
        return [first, *(weight_of(format, rows, columns, self.device) for _ in range(more))]

    def against(self, calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor, weight: Weight) -> dict[str, float]:
        """Microseconds of calls that take turns, and the error of the first, which has this weight."""
        row = {"us": self.clock.seconds([partial(call, x) for call in calls]) * 1e6}
        if len(x) <= 64:
            exact = x.double() @ weight.decode(torch.float32).double().T
            wrong = calls[0](x).double() - exact
            row["error_rms"] = float(wrong.square().mean().sqrt() / exact.square().mean().sqrt())
        return row

    def ours(self, weight: Weight) -> Callable[[Tensor], Tensor]:
        moved = once_for_each(lambda x: self.moved(x, weight))
        return lambda x: self.ops.grouped_linear([moved(x)], [weight], [None], [None], [None])[0]

    def slices(self) -> Iterator[dict[str, Any]]:
        """How large a piece of a weight should be written out for cuBLAS at a time, and from how many tokens on."""
        weight = weight_of("int4", 4 * self.hidden, self.hidden, self.device)
        plain, ours = weight.decode(torch.float16), self.ops.linear.slice_bytes
        properties = self.ops.properties(self.device)
        tiles = type(self.ops)(False, lambda device: TilesAlways(properties.capability))
        for count in self.sizes.prefill:
            x = self.x(count, self.hidden)
            row = {"tokens": count, "cublas fp16": 1e6 * self.clock.seconds([partial(torch.mm, x, plain.T)])}
            for name, size in {**{f"{n} MB": n << 20 for n in (8, 16, 32, 64)}, "whole": plain.nbytes}.items():
                self.ops.linear.slice_bytes = size
                call = partial(self.ops.linear.by_torch, x, weight, x.dtype)
                row[f"written out, {name}"] = 1e6 * self.clock.seconds([call])
            self.ops.linear.slice_bytes = ours
            if properties.tensor_core_dtypes:
                placed = lay(x, tiles.linear.method(weight, x).layout)
                call = partial(tiles.grouped_linear, [placed], [weight], [None], [None], [None])
                row["tiles"] = 1e6 * self.clock.seconds([call])
            yield row

    def attention(self) -> Iterator[dict[str, Any]]:
        """Decode over a context and a prompt, at each shape's heads; bytes are those of keys and values."""
        for shape, (hidden, heads) in self.sizes.shapes.items():
            dim = hidden // heads
            rotary = torch.randn(2, 4096, max(1, dim // 8), device=self.device)
            for kv, size in ((torch.float16, 2), (torch.int8, 1)):
                for context in self.sizes.contexts:
                    nbytes = 2 * context * hidden * size
                    layers = copies_for(self.device, nbytes)
                    pool = PagePool(heads, dim, kv, [self.device] * layers)
                    block_table = pool.new()
                    Batch.reserve(pool, [block_table], [context]).commit()
                    for tensor in (*pool.storage, *pool.scales):
                        tensor.fill_(1)
                    batch, qkv = Batch.reserve(pool, [block_table], [1]), self.x(1, 3 * hidden)
                    calls = [partial(self.ops.attention, qkv, pool, i, batch, rotary, None) for i in range(layers)]
                    row = {"shape": shape, "cache": str(kv)[6:], "context": context, "new": 1}
                    yield {**row, **self.rate(calls, nbytes)}
            count = self.sizes.contexts[-1]
            pool = PagePool(heads, dim, torch.float16, [self.device])
            batch, qkv = Batch.reserve(pool, [pool.new()], [count]), self.x(count, 3 * hidden)
            q, k, v = qkv.view(1, count, heads, 3, dim).permute(3, 0, 2, 1, 4)
            row = {"shape": shape, "cache": "float16", "context": 0, "new": count}
            ours = self.clock.seconds([partial(self.ops.attention, qkv, pool, 0, batch, rotary, None)])
            sdpa = self.clock.seconds([partial(functional.scaled_dot_product_attention, q, k, v, is_causal=True)])
            yield {**row, "us": 1e6 * ours, "torch_sdpa_us": 1e6 * sdpa}


class TilesAlways(DeviceProperties):
    """A card for which no number of tokens is too large for tiles."""

    max_gemm_tokens = 1 << 30


def lay(x: Tensor, layout: Any) -> Any:
    """x (tokens, features) in the order in which a kernel reads it; packing.py has the rule."""
    # Imports triton, which a machine may lack.
    from neox_lite.kernels.triton.linear_method import NATURAL, PackedActivation

    if layout == NATURAL:
        return x
    features = x.shape[1]
    pack, planes = layout.pack_factor, layout.num_planes
    split = x.view(len(x), features // pack, pack // planes, planes)
    return PackedActivation(layout, (split.permute(0, 3, 1, 2).reshape(len(x), features) * layout.scale).contiguous())
