"""Which parts of a model go to which memory, in bytes, and how fast they run there, predicted. Knows no tensor and no device.

A pass walks the layers once. Layers are placed in order, disk, CPU, GPU, with the head on the GPU's side, so activations cross
from one memory to another once. A layer on a GPU is read by it; one in host memory is multiplied there or, from so many tokens
on that this is quicker, streamed to the GPU; one on disk is read into host memory while the layer before it is computed.
Memory alone decides where a layer goes: measured rates only predict seconds and say from how many tokens on to stream.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch

from ..config import GPTNeoXConfig
from ..errors import ArgumentError, FormatError
from ..formats import DENSE, GROUP_SIZES, Format, GroupInt
from ..units import PAGE
from .stream import BUFFERS

TIERS = ("gpu", "cpu", "disk")
KINDS = ("fp16", "int8")  # of the KV cache and of the head; fp16 stands for the model's own dtype
PREFILL_TOKENS = 512  # of a prompt that go through the model at a time, as in generation/protocols.py
WINDOW = 64 << 10  # bytes of a sparsely mapped file that come into memory with one row of the embedding
MAX_STREAM_FROM = 4096  # tokens of the longest pass for which streaming is considered

# Scratch memory of a pass, in numbers for each of its tokens: times the hidden and the inner size. The CPU's are measured.
SCRATCH = {"cpu": (4.0, 1.6), "gpu": (8.0, 2.5)}
ITEMSIZE = {"cpu": 4, "gpu": 2}  # of activations
DECODED_SLICE = 64 << 20  # bytes of a weight written out for cuBLAS, or as float32 for torch's product, at a time
TORCH_PRODUCT = 32 << 20  # what torch's product takes on the CPU beside two of those slices; measured
CUBLAS_WORKSPACE = 32 << 20
GRAPHS = 16 << 20  # what the driver keeps of captured CUDA graphs; assumed, not measured

# Time beside the products, the same for every processor of a kind.
LAYER_S = 20e-6  # seconds of a layer that no size changes
# Moved in a layer for each hidden feature of a token: norms, attention, and the like.
ACTIVATION_BYTES = {"cpu": 400, "gpu": 100}
STAGING_SHARE = 0.5  # of the speed at which memory is read, for copying into pinned memory: it is read and written


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of the parts of a model, as they lie in a file and in memory.

    layers: the stored tensors of each layer. head, small_head: the head in the model's dtype and the int8 one, None where
    there is none. embedding: of a table of its own, even if `tied` says that the 16-bit head is the same tensor. rest: final
    norm and rotary tables. weights: numbers in the linear layers of one layer. decoded: numbers in the largest of those that
    the CPU writes out as float32 for many tokens, all but integer codes; 0 where there are only these. written: numbers in a
    layer's linear layers that it writes out even for a single token. kv_fp16, kv_int8: KV cache of one token in one layer.
    adapter: of `layers`, what an adapter adds to each, which no file holds as it runs.
    """

    layers: tuple[int, ...]
    embedding: int
    head: int
    small_head: int | None
    rest: int
    weights: int
    decoded: int
    written: int
    kv_fp16: int
    kv_int8: int
    hidden: int
    inner: int
    vocabulary: int
    context: int
    tied: bool
    adapter: tuple[int, ...] = ()

    def with_adapter(self, numbers: Mapping[int, int], itemsize: int) -> ModelSizes:
        """numbers: that an adapter adds to each layer that it changes, of so many bytes each."""
        adapter = tuple(numbers.get(i, 0) * itemsize for i in range(len(self.layers)))
        layers = tuple(map(sum, zip(self.layers, adapter, strict=True)))
        return replace(self, layers=layers, adapter=adapter)

    def kv_bytes(self, kv: str) -> int:
        """Bytes a token takes in one layer's KV cache."""
        return self.kv_int8 if kv == "int8" else self.kv_fp16

    def head_bytes(self, head: str) -> int:
        return self.head if head == "fp16" or self.small_head is None else self.small_head

    @property
    def total(self) -> int:
        """Bytes of all tensors, with the head in the model's dtype."""
        return sum(self.layers) + self.head + (0 if self.tied else self.embedding) + self.rest


def sizes_of(
    config: GPTNeoXConfig,
    format: Format | Callable[[str], Format] = DENSE,
    dtype: torch.dtype = torch.float16,
    scales: torch.dtype | None = None,
    small_head: bool = False,
) -> ModelSizes:
    """The sizes of a model whose linear layers have this format, or each the one that a function gives for its full name.

    dtype: of plain tensors. scales: of scales, None: the same. small_head: an int8 head, in the largest groups that fit, lies
    beside the other one. Raises FormatError for a shape that its format cannot store.
    """
    hidden, vocabulary, shapes = config.hidden_size, config.vocab_size, config.linear_shapes
    unpacked: dict[str, int] = {}  # numbers in linear layers whose weights are no integer codes, by name in a layer
    written: dict[str, int] = {}

    def stored(name: str, format: Format, out: int, columns: int) -> int:
        if (reason := format.why_not((out, columns))) is not None:
            raise FormatError(f"{name}: {reason}")
        tensors = format.specs((out, columns), dtype if format == DENSE else scales or dtype)
        return sum(math.prod(shape) * kind.itemsize for kind, shape in tensors.values())

    def layer(index: int) -> int:
        total = 2 * 2 * hidden * dtype.itemsize  # two norms, gain and bias
        for name, (out, columns, bias) in shapes.items():
            full = f"gpt_neox.layers.{index}.{name}"
            own = format(full) if callable(format) else format
            total += stored(full, own, out, columns) + bias * out * dtype.itemsize
            if not isinstance(own, GroupInt):
                unpacked[name] = out * columns
                written.update({} if own == DENSE else {name: out * columns})
        return total

    count = config.num_hidden_layers
    layers = tuple(map(layer, range(count))) if callable(format) else (layer(0),) * count
    group = largest_group(hidden) if small_head else None
    return ModelSizes(
        layers=layers,
        embedding=vocabulary * hidden * dtype.itemsize,
        head=vocabulary * hidden * dtype.itemsize,
        small_head=None if group is None else stored("embed_out", GroupInt(8, group), vocabulary, hidden),
        rest=2 * hidden * dtype.itemsize + config.max_position_embeddings * config.rotary_dim * 4,
        weights=sum(out * columns for out, columns, _ in shapes.values()),
        decoded=max(unpacked.values(), default=0),
        written=sum(written.values()),
        kv_fp16=2 * hidden * dtype.itemsize,
        kv_int8=2 * hidden + 2 * 2 * config.num_attention_heads,  # a 16-bit scale for each head's key and value
        hidden=hidden,
        inner=config.intermediate_size,
        vocabulary=vocabulary,
        context=config.max_position_embeddings,
        tied=config.tie_word_embeddings,
    )


@dataclass(frozen=True)
class Rates:
    """What a processor does in a second: bytes of stored weights read by one token, operations (two for each weight and token)
    of hundreds of tokens. plain_flops_per_s: of weights that are not quantized; None: as many."""

    read_bytes_per_s: float
    flops_per_s: float
    plain_flops_per_s: float | None = None


@dataclass(frozen=True)
class Card:
    """A GPU: its memory, its rates, pinned host memory to GPU in bytes a second, and what the driver's context takes."""

    name: str
    bytes: int
    rates: Rates
    bus_bytes_per_s: float
    context_bytes: int


@dataclass(frozen=True)
class HardwareProfile:
    """A computer. process_bytes: memory of a process before it has a model; disk_bytes_per_s: None where it is unknown."""

    cpu: Rates
    disk_bytes_per_s: float | None
    process_bytes: int
    card: Card | None

    def rates(self, side: str) -> Rates:
        """Of "cpu", or of "gpu" where there is one."""
        if side == "cpu":
            return self.cpu
        assert self.card is not None
        return self.card.rates


@dataclass(frozen=True)
class PlacementRequest:
    """What a caller asks of memory, see `loading.options.LoadOptions`: max_memory in bytes; context None: the model's own.

    kv, head: "fp16" (the model's own dtype) or "int8"; None lets a plan choose.
    """

    device_map: Any = None
    max_memory: Mapping[Any, int] | None = None
    context: int | None = None
    kv: str | None = None
    head: str | None = None


@dataclass(frozen=True)
class Budgets:
    """Bytes that the process may take of each memory: of the CPU's with the process itself and mapped weights, of the GPU's
    with the driver's context (None: no GPU). disk: whether layers may stay on the disk."""

    cpu: int
    gpu: int | None = None
    disk: bool = True


# How good a plan is.
NO, DISK, CPU, MIXED, GPU = range(5)


@dataclass(frozen=True)
class Plan:
    """A placement; everything else about it follows.

    The first disk_layers layers stay on disk, the last gpu_layers are on the GPU, and the head with them; those between, and
    the head where the GPU has no layer, are in host memory. embedding_on: "gpu" or "cpu".
    """

    sizes: ModelSizes
    hardware: HardwareProfile
    request: PlacementRequest
    budgets: Budgets
    kv: str
    head: str
    disk_layers: int
    gpu_layers: int
    embedding_on: str

    @property
    def context(self) -> int:
        return self.sizes.context if self.request.context is None else self.request.context

    @property
    def layers(self) -> tuple[str, ...]:
        """The tier of each layer."""
        host = len(self.sizes.layers) - self.disk_layers - self.gpu_layers
        return ("disk",) * self.disk_layers + ("cpu",) * host + ("gpu",) * self.gpu_layers

    @property
    def head_on(self) -> str:
        return "gpu" if self.gpu_layers else "cpu"

    @property
    def mixed(self) -> bool:
        """Whether some layers are on the GPU and some are not."""
        return 0 < self.gpu_layers < len(self.sizes.layers)

    @property
    def pages(self) -> int:
        """Pages of KV cache, of 128 tokens, in each layer."""
        return -(-self.context // PAGE)

    @property
    def max_pages(self) -> int:
        """Pages of KV cache that each layer may have within the budgets; one layer's may be there twice while they grow."""
        page, buffers = PAGE * self.sizes.kv_bytes(self.kv), BUFFERS if self.mixed else 0
        host = len(self.sizes.layers) - self.gpu_layers
        sides = (("gpu", self.gpu_layers, self.budgets.gpu or 0), ("cpu", host, self.budgets.cpu))
        free = [(budget - self.totals[tier]) // (page * (n + buffers + 1)) for tier, n, budget in sides if n]
        return self.pages + max(0, min(free))

    @cached_property
    def parts(self) -> dict[str, dict[str, int]]:
        """Bytes by tier and kind. layer_buffers: of LayerStreamer; graphs: decode steps of a model that is on the GPU as a
        whole; process and context: there before any model."""
        sizes, stop = self.sizes, len(self.sizes.layers) - self.gpu_layers
        kv = self.pages * PAGE * sizes.kv_bytes(self.kv)
        head = sizes.head_bytes(self.head)
        streams = self.mixed or self.disk_layers > 0
        layer_buffers = BUFFERS * (max(sizes.layers) + (kv if self.mixed else 0)) if streams else 0
        adapter = sum(sizes.adapter[: self.disk_layers])
        in_memory = sum(sizes.layers[self.disk_layers : stop]) + adapter + self._embedding_bytes("cpu")
        cpu = {
            "weights": in_memory + (sizes.rest if stop else 0) + (0 if self.gpu_layers else head),
            "cache": stop * kv,  # that of layers on disk too
            "layer_buffers": layer_buffers,
            "scratch": self._scratch_bytes("cpu") if stop else 0,
            "process": self.hardware.process_bytes,
        }
        gpu = {
            "weights": sum(sizes.layers[stop:]) + head + sizes.rest + self._embedding_bytes("gpu"),
            "cache": self.gpu_layers * kv,
            "layer_buffers": layer_buffers,
            "scratch": self._scratch_bytes("gpu") + DECODED_SLICE + CUBLAS_WORKSPACE,
            "graphs": 0 if stop else self._graph_bytes(),
            "context": self.hardware.card.context_bytes if self.hardware.card else 0,
        }
        disk = {"weights": sum(sizes.layers[: self.disk_layers]) - adapter}
        return {"gpu": gpu if self.gpu_layers else {}, "cpu": cpu, "disk": disk}

    @property
    def totals(self) -> dict[str, int]:
        """Bytes by tier."""
        return {tier: sum(parts.values()) for tier, parts in self.parts.items()}

    @property
    def short_by(self) -> int:
        """Bytes that the CPU's budget lacks; the GPU's is never exceeded."""
        return max(0, self.totals["cpu"] - self.budgets.cpu)

    @property
    def fits(self) -> bool:
        return self.short_by == 0

    @property
    def level(self) -> int:
        """How good it is: NO < DISK < CPU < MIXED < GPU."""
        if not self.fits:
            return NO
        if self.disk_layers:
            return DISK
        return MIXED if self.mixed else GPU if self.gpu_layers else CPU

    def _embedding_bytes(self, tier: str) -> int:
        if self.embedding_on != tier or (self.sizes.tied and self.head == "fp16" and self.head_on == tier):
            return 0  # elsewhere, or the head's own tensor
        if tier == "gpu":
            return self.sizes.embedding
        # What a mapped table has in memory once random tokens have filled the cache.
        windows = -(-self.sizes.embedding // WINDOW)
        touched = windows * -math.expm1(self.context * math.log1p(-1 / windows)) if windows > 1 else 1
        return min(self.sizes.embedding, math.ceil(touched * WINDOW))

    def _graph_bytes(self) -> int:
        """What the decode step of one sequence keeps as a CUDA graph: float32 logits, ids to choose from with their values,
        activations, and what plain or decoded weights need."""
        products = DECODED_SLICE + CUBLAS_WORKSPACE if self.sizes.decoded else 0
        return GRAPHS + self.sizes.vocabulary * (4 + 4 + 4) + self._activation_bytes("gpu", 1) + products

    def _activation_bytes(self, tier: str, tokens: int) -> int:
        hidden, inner = SCRATCH[tier]
        return math.ceil((hidden * self.sizes.hidden + inner * self.sizes.inner) * tokens * ITEMSIZE[tier])

    def _scratch_bytes(self, tier: str) -> int:
        activations = self._activation_bytes(tier, min(PREFILL_TOKENS, self.context))
        written_out = tier == "cpu" and self.sizes.decoded
        decoded = TORCH_PRODUCT + 2 * min(4 * self.sizes.decoded, DECODED_SLICE) if written_out else 0
        return activations + self.sizes.vocabulary * 4 + decoded  # logits in float32

    def pass_s(self, tokens: int = 1, cached: int | None = None) -> float:
        """Seconds of a pass that gives one sequence `tokens` more after `cached` ones (None: half the context).

        Layers in host memory take the quicker way, in place or streamed. Infinite where a disk of unknown speed is read.
        """
        kv = (self.context // 2 if cached is None else cached) * self.sizes.kv_bytes(self.kv)
        seconds = self.sizes.head_bytes(self.head) / self.hardware.rates(self.head_on).read_bytes_per_s
        for stored, tier in zip(self.sizes.layers, self.layers, strict=True):
            if tier == "gpu":
                seconds += self._layer_s("gpu", stored + kv, tokens)
                continue
            computed = self.in_place_s(stored + kv, tokens)
            if self.mixed:
                computed = min(computed, self.streamed_s(stored + kv, tokens))
            disk = self.hardware.disk_bytes_per_s
            seconds += computed if tier == "cpu" else max(computed, stored / disk) if disk else math.inf
        return seconds

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Of one sequence at half its context; None where a disk of unknown speed is read."""
        return self._tokens_per_s(1)

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Of a prompt of 512 tokens, or of the context if that is shorter."""
        return self._tokens_per_s(min(PREFILL_TOKENS, self.context), 0)

    def _tokens_per_s(self, tokens: int, cached: int | None = None) -> float | None:
        seconds = self.pass_s(tokens, cached)
        return None if math.isinf(seconds) else tokens / seconds

    @cached_property
    def crossover_tokens(self) -> int | None:
        """Least tokens of a pass from which on a layer in host memory is faster streamed to the GPU than computed in place.

        None without layers on both sides, or where that needs more than 4096 tokens.
        """
        if not self.mixed:
            return None
        stored = self.sizes.layers[len(self.sizes.layers) - self.gpu_layers - 1]
        every = range(1, MAX_STREAM_FROM + 1)
        return next((n for n in every if self.streamed_s(stored, n) < self.in_place_s(stored, n)), None)

    def in_place_s(self, stored: int, tokens: int) -> float:
        """Seconds that the CPU takes for a layer of `stored` bytes, weights and cache, in its own memory."""
        # Weights that are written out as float32 for every token pass at about the speed at which memory is read; measured.
        return self._layer_s("cpu", max(stored, 4 * self.sizes.written), tokens)

    def streamed_s(self, stored: int, tokens: int) -> float:
        """Seconds between two layers of `stored` bytes, weights and cache, that go through pinned buffers to the GPU."""
        copied = stored / (STAGING_SHARE * self.hardware.cpu.read_bytes_per_s)
        assert self.hardware.card is not None
        return max(stored / self.hardware.card.bus_bytes_per_s, copied, self._layer_s("gpu", stored, tokens))

    def _layer_s(self, side: str, stored: int, tokens: int) -> float:
        """Seconds of a layer: reading its bytes or multiplying, whichever takes longer, and what comes beside."""
        sizes, rates = self.sizes, self.hardware.rates(side)
        beside = ACTIVATION_BYTES[side] * sizes.hidden * tokens / rates.read_bytes_per_s + LAYER_S
        flops_per_s = (sizes.decoded and rates.plain_flops_per_s) or rates.flops_per_s
        return max(stored / rates.read_bytes_per_s, 2 * sizes.weights * tokens / flops_per_s) + beside


def make_plan(sizes: ModelSizes, hardware: HardwareProfile, request: PlacementRequest, budgets: Budgets) -> Plan:
    """The best placement within the budgets, or, where none fits, the one that is short by the least.

    The whole model on the GPU is best, then layers on the GPU and the CPU, then the CPU alone, then layers on disk. Where
    kv or head are open, the first of fp16, an int8 cache, an int8 head and both that reaches the best level is taken.
    Raises ArgumentError for a context beyond the model's, an int8 head that the model lacks, a GPU that the machine lacks.
    """
    if request.context is not None and not 1 <= request.context <= sizes.context:
        raise ArgumentError(f"context is {request.context}, but the model's own context is {sizes.context}")
    if request.head == "int8" and sizes.small_head is None:
        raise ArgumentError(
            "head is 'int8', but the model has no int8 head; folders that `neox-lite quantize` wrote do"
        )
    if budgets.gpu is not None and hardware.card is None:
        raise ArgumentError("a GPU's budget is given, but the machine has no GPU; leave it out")
    on_the_cpu = (Plan(sizes, hardware, request, budgets, kv, head, 0, 0, "cpu") for kv, head in kinds(sizes, request))
    best = [max(_placements(plan), key=_rank) for plan in on_the_cpu]
    return max(best, key=lambda plan: (plan.level, -plan.short_by))


def kinds(sizes: ModelSizes, request: PlacementRequest) -> list[tuple[str, str]]:
    """The kinds of KV cache and head that the request leaves open, the least degraded first."""
    heads = KINDS if sizes.small_head is not None else KINDS[:1]
    kvs, heads = (request.kv,) if request.kv else KINDS, (request.head,) if request.head else heads
    return [(kv, head) for head, kv in product(heads, kvs)]


def _rank(plan: Plan) -> tuple[int, ...]:
    """Placements with the same cache and head, better ones higher: what fits, with the fewest layers on the disk and then the
    most on the GPU."""
    return (1, -plan.disk_layers, plan.gpu_layers) if plan.fits else (0, -plan.short_by)


def _placements(on_the_cpu: Plan) -> Iterator[Plan]:
    """Those worth comparing: all on the GPU, as many layers there as fit, none there; with as few layers on disk as fit."""
    count, gpu_bytes = len(on_the_cpu.sizes.layers), on_the_cpu.budgets.gpu

    def place(gpu_layers: int, embedding_on: str = "cpu") -> Plan:
        return replace(on_the_cpu, gpu_layers=gpu_layers, embedding_on=embedding_on)

    mixed_or_none = [on_the_cpu]
    if gpu_bytes is not None:
        yield from (plan for plan in (place(count, "gpu"), place(count)) if plan.totals["gpu"] <= gpu_bytes)
        most = bisect_right(range(1, count), gpu_bytes, key=lambda n: place(n).totals["gpu"])
        mixed_or_none.insert(0, place(most))
    for plan in mixed_or_none:
        yield plan
        if plan.budgets.disk:
            yield _with_disk(plan)


def _with_disk(plan: Plan) -> Plan:
    """The same with as few layers on the disk as make it fit, at least one: from there on each more takes less memory."""
    numbers = range(1, len(plan.sizes.layers) - plan.gpu_layers)
    fewer = bisect_left(numbers, True, key=lambda n: replace(plan, disk_layers=n).fits)
    return replace(plan, disk_layers=1 + fewer)


def largest_group(*features: int) -> int | None:
    """The largest group size that divides rows of so many features each, None where none does."""
    return next((g for g in sorted(GROUP_SIZES, reverse=True) if all(n % g == 0 for n in features)), None)
