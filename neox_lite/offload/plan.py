"""Where the parts of a model go, and what that costs in bytes and in time: pure arithmetic. Knows no tensor and no device.

A pass walks the layers once. Layers are placed in order, disk, CPU, GPU, with the head on the GPU's side, so activations cross
from one memory to another once. A layer on a GPU is read by it; one in host memory is multiplied there or, from so many tokens
on that this is quicker, streamed to the GPU; one on disk is read into host memory while the layer before it is computed.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from ..config import GPTNeoXConfig
from ..errors import ArgumentError, FormatError
from ..units import PAGE, format_bytes

TIERS = ("gpu", "cpu", "disk")
KINDS = ("fp16", "int8")  # of the KV cache and of the head; fp16 stands for the model's own dtype
CHUNK = 512  # tokens of a prompt that go through the model at a time
WINDOW = 64 << 10  # bytes of a sparsely mapped file that come into memory with one row of the embedding
SLOTS = 2  # layers on their way at a time: one is computed while the next one arrives
CROSSING_S = 20e-6  # for activations to get from host to GPU or back
MAX_PASS = 4096  # longest pass, in tokens, for which streaming is considered

# Scratch memory of a pass, in numbers for each of its tokens: times the hidden and the inner size. The CPU's are measured.
SCRATCH = {"cpu": (4.0, 1.6), "gpu": (8.0, 2.5)}
ITEMSIZE = {"cpu": 4, "gpu": 2}  # of activations
DECODED_SLICE = 64 << 20  # bytes of a weight written out for cuBLAS, or as float32 for torch's product, at a time
TORCH_PRODUCT = 32 << 20  # what torch's product takes on the CPU beside two of those slices; measured
CUBLAS_WORKSPACE = 32 << 20
GRAPH_ROWS = 64  # sequences of a decode step that is a CUDA graph, at most
GRAPHS = 16 << 20  # what the driver keeps of the graphs themselves; assumed, not measured
STAGING_SHARE = 0.5  # of the speed at which memory is read, for copying into a pinned slot: it is read and written


GROUP_SIZES = (128, 64, 32)

# The model ------------------------------------------------------------------------------------------------------------

# (out, in) -> bytes of a stored weight that the CPU decodes to float32 in every pass.
Bytes = Callable[[int, int], int]
Packing = Callable[[str], "tuple[int, int] | Bytes | None"]  # module name -> (bits, group size), or bytes; None: plain


@dataclass(frozen=True)
class Sizes:
    """Bytes of the parts of a model, as they lie in a file and in memory.

    layers: the stored tensors of each layer. head, small_head: the head in the model's dtype and the int8 one, None where
    there is none. embedding: of a table of its own, even if `tied` says that the 16-bit head is the same tensor. rest: final
    norm and rotary tables. weights: numbers in the linear layers of one layer. decoded: numbers in the largest of those that
    the CPU writes out as float32 for many tokens, the plain ones; 0 where all are quantized. kv_fp16, kv_int8: KV cache of one
    token in one layer. written: numbers in a layer's linear layers that it writes out even for a single token. adapter: of
    `layers`, what an adapter adds to each, which no file holds as it runs.
    """

    layers: tuple[int, ...]
    embedding: int
    head: int
    small_head: int | None
    rest: int
    weights: int
    decoded: int
    kv_fp16: int
    kv_int8: int
    hidden: int
    inner: int
    vocabulary: int
    context: int
    tied: bool
    written: int = 0
    adapter: tuple[int, ...] = ()

    def with_adapter(self, numbers: Mapping[int, int], itemsize: int) -> Sizes:
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
    bits: int | Packing | None,
    group_size: int = 128,
    scale_bytes: int = 2,
    itemsize: int = 2,
    small_head: bool = False,
) -> Sizes:
    """The sizes of a model whose linear layers hold codes of `bits` bits in groups (None: plain, `itemsize` bytes a weight).

    bits may also be a function from a module's name to (bits, group size), a function of shapes, or None. scale_bytes and
    itemsize are those of a scale and of a plain number; small_head: an int8 head, in the largest groups that fit, lies beside
    the other one.
    Raises FormatError for rows that groups do not divide.
    """
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size

    def packing(name: str) -> tuple[int, int] | Bytes | None:
        return bits(name) if callable(bits) else None if bits is None else (bits, group_size)

    def layer(index: int) -> int:
        total = 2 * 2 * hidden * itemsize  # two norms, gain and bias
        for name, (out, columns, bias) in config.linear_shapes.items():
            full = _full(index, name)
            total += _weight_bytes(full, out, columns, packing(full), scale_bytes, itemsize) + bias * out * itemsize
        return total

    same = not callable(bits)
    every = [
        (n, packing(_full(i, n))) for i in range(1 if same else config.num_hidden_layers) for n in config.linear_shapes
    ]
    plain = {n for n, found in every if found is None}
    written = {n for n, found in every if callable(found)}
    first = layer(0)
    groups = next((g for g in GROUP_SIZES if hidden % g == 0), None) if small_head else None
    return Sizes(
        layers=(first, *(first if same else layer(i) for i in range(1, config.num_hidden_layers))),
        embedding=vocabulary * hidden * itemsize,
        head=vocabulary * hidden * itemsize,
        small_head=_weight_bytes("embed_out", vocabulary, hidden, (8, groups), scale_bytes, itemsize)
        if groups
        else None,
        rest=2 * hidden * itemsize + config.max_position_embeddings * config.rotary_dim * 4,
        weights=sum(out * columns for out, columns, _ in config.linear_shapes.values()),
        decoded=max(
            (out * columns for n, (out, columns, _) in config.linear_shapes.items() if n in plain | written), default=0
        ),
        kv_fp16=2 * hidden * itemsize,
        kv_int8=2 * hidden + 2 * 2 * config.num_attention_heads,  # a 16-bit scale for each head's key and value
        hidden=hidden,
        inner=inner,
        vocabulary=vocabulary,
        context=config.max_position_embeddings,
        tied=config.tie_word_embeddings,
        written=sum(out * columns for n, (out, columns, _) in config.linear_shapes.items() if n in written),
    )


def _full(layer: int, name: str) -> str:
    return f"gpt_neox.layers.{layer}.{name}"


def largest_group(config: GPTNeoXConfig) -> int | None:
    """The largest group size that divides the rows of every linear layer, None where none does."""
    return next((g for g in GROUP_SIZES if config.hidden_size % g == 0 == config.intermediate_size % g), None)


def _weight_bytes(
    name: str, out: int, columns: int, packing: tuple[int, int] | Bytes | None, scale: int, item: int
) -> int:
    if packing is None:
        return out * columns * item
    if callable(packing):
        return packing(out, columns)
    bits, group = packing
    if columns % group:
        fits = " or ".join(str(g) for g in reversed(GROUP_SIZES) if columns % g == 0)
        raise FormatError(
            f"{name}: in_features {columns} is not divisible by group_size {group}; "
            + (f"try {fits}" if fits else "it must stay dense")
        )
    return out * columns * bits // 8 + out * (columns // group) * scale + 2 * 8  # and weight_shape, two int64


# The machine ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What a processor does in a second, in this model's products.

    read_bytes_per_s: stored weights multiplied by one token; flops_per_s: operations (two for each weight and token) of
    hundreds of tokens; layer_s: seconds that a layer costs beside its bytes; feature_s: seconds that a token costs in a layer
    beside its products, for each hidden feature: norms, attention over some hundred tokens, and the like. plain_flops_per_s:
    operations with weights that are not quantized; None: as many.
    """

    read_bytes_per_s: float
    flops_per_s: float
    layer_s: float
    feature_s: float = 0.0
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
class Machine:
    """A computer. process_bytes: memory of a process before it has a model; disk_bytes_per_s: None where it is unknown."""

    cpu: Rates
    disk_bytes_per_s: float | None
    process_bytes: int
    card: Card | None


def _specified(name: str, gib: int, gb_per_s: float, tensor_tflops: float, bus_gb_per_s: float) -> Card:
    rates = Rates(0.92 * gb_per_s * 1e9, 0.6 * tensor_tflops * 1e12, 20e-6, 100 / (0.92 * gb_per_s * 1e9))
    return Card(name, gib << 30, rates, bus_gb_per_s * 1e9, 512 << 20)


# Specifications, not measurements: memory bandwidth, and dense fp16 tensor operations with float32 sums as NVIDIA's papers on
# GA102 and AD102 state them, or by cores and clock in the same proportion. 92 % of the one and 60 % of the other are assumed
# to be reached, 20 µs a layer to go into launches, 100 bytes of activations to be moved for each feature of a token, and PCIe
# 4.0 x16 (x8 on the 4060 Ti) to carry 25 (13) GB/s.
CARDS = {
    card.name: card
    for card in (
        _specified("RTX 3060", 12, 360, 25.5, 25),
        _specified("RTX 3090", 24, 936, 71, 25),
        _specified("RTX 4060 Ti", 16, 288, 44.1, 13),
        _specified("RTX 4090", 24, 1008, 165.2, 25),
    )
}


# The plan -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What a plan has to provide for, and the most that the process may take of each memory.

    context: tokens that each of `sequences` may hold. kv, head: "fp16" (the model's own dtype) or "int8"; None lets the plan
    choose. gpu_bytes counts the driver's context too, None: no GPU; cpu_bytes counts the process and mapped weights too.
    disk: whether layers may stay on the disk.
    """

    context: int
    cpu_bytes: int
    gpu_bytes: int | None = None
    sequences: int = 1
    kv: str | None = None
    head: str | None = None
    disk: bool = True

    def __post_init__(self) -> None:
        for name in ("context", "sequences"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("cpu_bytes", "gpu_bytes"):
            if (getattr(self, name) or 0) < 0:
                raise ArgumentError(f"{name} is {getattr(self, name)}, expected at least 0")
        for name in ("kv", "head"):
            if getattr(self, name) not in (None, *KINDS):
                raise ArgumentError(f"{name} is {getattr(self, name)!r}, expected 'fp16' or 'int8'")


SMALLER = {"kv": "int8 KV cache", "head": "int8 head"}  # what a plan may choose to save memory

# How good a plan is.
NO, DISK, CPU, MIXED, GPU = range(5)
GAINS = {
    GPU: "put the whole model on the GPU",
    MIXED: "keep every layer off the disk",
    CPU: "keep every layer off the disk",
    DISK: "make it run, with layers read from the disk",
    NO: "come nearest to running",
}


@dataclass(frozen=True)
class Plan:
    """A placement; everything else about it follows.

    The first disk_layers layers stay on disk, the last gpu_layers are on the GPU, and the head with them; those between, and
    the head where the GPU has no layer, are in host memory. embedding_on: "gpu" or "cpu".
    notes: what was chosen and why. advice: sentences, each naming one change that lifts the plan to a better level.
    """

    sizes: Sizes
    machine: Machine
    request: Request
    kv: str
    head: str
    disk_layers: int
    gpu_layers: int
    embedding_on: str
    notes: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    # Bytes ------------------------------------------------------------------------------------------------------------

    @property
    def context(self) -> int:
        return self.request.context

    @property
    def sequences(self) -> int:
        return self.request.sequences

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
        return -(-self.context // PAGE) * self.sequences

    @property
    def most_pages(self) -> int:
        """Pages of KV cache that each layer may have within the budgets; one layer's may be there twice while they grow."""
        count, page = len(self.sizes.layers), PAGE * self.sizes.kv_bytes(self.kv)
        more = []
        for tier, layers, budget in (
            ("gpu", self.gpu_layers, self.request.gpu_bytes or 0),
            ("cpu", count - self.gpu_layers, self.request.cpu_bytes),
        ):
            if layers:
                slots = SLOTS if self.mixed else 0
                more.append((budget - self.totals[tier]) // (page * (layers + slots + 1)))
        return self.pages + max(0, min(more))

    @cached_property
    def parts(self) -> dict[str, dict[str, int]]:
        """Bytes by tier and kind. ring: the slots of layers on their way; graphs: decode steps of a model that is on the GPU
        as a whole; process and context: there before any model."""
        sizes, stop = self.sizes, len(self.sizes.layers) - self.gpu_layers
        kv = self.pages * PAGE * sizes.kv_bytes(self.kv)
        head = sizes.head_bytes(self.head)
        slot = max(sizes.layers) + (kv if self.mixed else 0)
        ring = SLOTS * slot if self.mixed or self.disk_layers else 0
        adapter = sum(sizes.adapter[: self.disk_layers])
        cpu = {
            "weights": sum(sizes.layers[self.disk_layers : stop]) + adapter + self._embedding_bytes("cpu"),
            "cache": stop * kv,  # that of layers on disk too
            "ring": ring,
            "scratch": 0,
            "process": self.machine.process_bytes,
        }
        if stop:
            cpu["weights"] += sizes.rest + (0 if self.gpu_layers else head)
            cpu["scratch"] = self._scratch_bytes("cpu")
        gpu = {
            "weights": sum(sizes.layers[stop:]) + head + sizes.rest + self._embedding_bytes("gpu"),
            "cache": self.gpu_layers * kv,
            "ring": ring,
            "scratch": self._scratch_bytes("gpu") + DECODED_SLICE + CUBLAS_WORKSPACE,
            "graphs": 0 if stop else self._graph_bytes(),
            "context": self.machine.card.context_bytes if self.machine.card else 0,
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
        return max(0, self.totals["cpu"] - self.request.cpu_bytes)

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
        return self.sizes.embedding if tier == "gpu" else self._touched_bytes()

    def _touched_bytes(self) -> int:
        """What a mapped embedding has in memory once random tokens have filled the cache."""
        windows = -(-self.sizes.embedding // WINDOW)
        touched = windows * -math.expm1(self.context * self.sequences * math.log1p(-1 / windows)) if windows > 1 else 1
        return min(self.sizes.embedding, math.ceil(touched * WINDOW))

    def _graph_bytes(self) -> int:
        """What decode steps keep as CUDA graphs: float32 logits for each power of two of rows, and scratch for the most rows:
        lists of ids to choose from with their values, activations, and what plain or decoded weights need."""
        rows = 1 << (min(self.sequences, GRAPH_ROWS) - 1).bit_length()
        logits = (2 * rows - 1) * self.sizes.vocabulary * 4
        lists = rows * self.sizes.vocabulary * (4 + 4)
        products = DECODED_SLICE + CUBLAS_WORKSPACE if self.sizes.decoded else 0
        return GRAPHS + logits + lists + self._activation_bytes("gpu", rows) + products

    def _activation_bytes(self, tier: str, tokens: int) -> int:
        hidden, inner = SCRATCH[tier]
        return math.ceil((hidden * self.sizes.hidden + inner * self.sizes.inner) * tokens * ITEMSIZE[tier])

    def _scratch_bytes(self, tier: str) -> int:
        activations = self._activation_bytes(tier, min(CHUNK, self.context * self.sequences))
        logits = self.sequences * self.sizes.vocabulary * 4  # float32
        written_out = tier == "cpu" and self.sizes.decoded
        decoded = TORCH_PRODUCT + 2 * min(4 * self.sizes.decoded, DECODED_SLICE) if written_out else 0
        return activations + logits + decoded

    # Time -------------------------------------------------------------------------------------------------------------

    def pass_s(self, tokens: int = 1, cached: int | None = None) -> float:
        """Seconds of a pass that gives one sequence `tokens` more after `cached` ones (None: half the context).

        Layers in host memory take the quicker way, in place or streamed. Infinite where a disk of unknown speed is read.
        """
        kv = (self.context // 2 if cached is None else cached) * self.sizes.kv_bytes(self.kv)
        layers = sum(self._layer_s(i, where, tokens, kv) for i, where in enumerate(self.layers))
        rates = self._card.rates if self.gpu_layers else self.machine.cpu
        # For one row: only the last token's logits are computed.
        operations = 2 * self.sizes.hidden * self.sizes.vocabulary
        head = max(self.sizes.head_bytes(self.head) / rates.read_bytes_per_s, operations / rates.flops_per_s)
        return layers + head + (2 * CROSSING_S if self.mixed else 0)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Of one sequence at half its context; None where a disk of unknown speed is read."""
        return _per_s(1, self.pass_s())

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Of a prompt of 512 tokens, or of the context if that is shorter."""
        tokens = min(CHUNK, self.context)
        return _per_s(tokens, self.pass_s(tokens, 0))

    @cached_property
    def crossover_tokens(self) -> int | None:
        """Least tokens of a pass from which on a layer in host memory is faster streamed to the GPU than computed in place.

        None without layers on both sides, or where that needs more than 4096 tokens.
        """
        if not self.mixed:
            return None
        stored = self.sizes.layers[len(self.sizes.layers) - self.gpu_layers - 1]
        every = range(1, MAX_PASS + 1)
        return next((n for n in every if self.streamed_s(stored, n) < self.in_place_s(stored, n)), None)

    def in_place_s(self, stored: int, tokens: int) -> float:
        """Seconds that the CPU takes for a layer of `stored` bytes, weights and cache, in its own memory."""
        # Measured: writing them as float32 takes about as long as reading as many bytes from memory.
        through_caches = 4 * self.sizes.written
        return _layer_s(self.machine.cpu, max(stored, through_caches), self.sizes, tokens)

    def streamed_s(self, stored: int, tokens: int) -> float:
        """Seconds between two layers of `stored` bytes, weights and cache, that go through pinned slots to the GPU."""
        copied = stored / (STAGING_SHARE * self.machine.cpu.read_bytes_per_s)
        computed = _layer_s(self._card.rates, stored, self.sizes, tokens)
        return max(stored / self._card.bus_bytes_per_s, copied, computed)

    def _layer_s(self, index: int, where: str, tokens: int, kv: int) -> float:
        stored = self.sizes.layers[index]
        if where == "gpu":
            return _layer_s(self._card.rates, stored + kv, self.sizes, tokens)
        computed = self.in_place_s(stored + kv, tokens)
        if self.mixed:
            computed = min(computed, self.streamed_s(stored + kv, tokens))
        if where == "cpu":
            return computed
        disk = self.machine.disk_bytes_per_s
        return max(computed, stored / disk) if disk else math.inf

    @property
    def _card(self) -> Card:
        assert self.machine.card is not None
        return self.machine.card


def _layer_s(rates: Rates, stored: int, sizes: Sizes, tokens: int) -> float:
    beside = rates.feature_s * sizes.hidden * tokens + rates.layer_s
    flops_per_s = (sizes.decoded and rates.plain_flops_per_s) or rates.flops_per_s
    return max(stored / rates.read_bytes_per_s, 2 * sizes.weights * tokens / flops_per_s) + beside


def _per_s(tokens: int, seconds: float) -> float | None:
    return None if math.isinf(seconds) else tokens / seconds


# Planning -------------------------------------------------------------------------------------------------------------


def plan(sizes: Sizes, machine: Machine, request: Request) -> Plan:
    """The best placement within the request's budgets, or, where none fits, the one that is short by the least.

    The whole model on the GPU is best, then layers on the GPU and the CPU, then the CPU alone, then layers on disk. Where
    kv or head are open, the first of fp16, an int8 cache, an int8 head and both that reaches the best level is taken.
    Raises ArgumentError for a context beyond the model's, an int8 head that the model lacks, a GPU that the machine lacks.
    """
    if request.context > sizes.context:
        raise ArgumentError(f"context is {request.context}, but the model's own context is {sizes.context}")
    if request.head == "int8" and sizes.small_head is None:
        raise ArgumentError(
            "head is 'int8', but the model has no int8 head; folders that `neox-lite quantize` wrote do"
        )
    if request.gpu_bytes is not None and machine.card is None:
        raise ArgumentError("gpu_bytes is given, but the machine has no GPU; leave it out")
    best = _best(sizes, machine, request)
    return replace(best, notes=tuple(_notes(best)), advice=tuple(_advice(best)))


def _best(sizes: Sizes, machine: Machine, request: Request) -> Plan:
    plans = [max(_placements(sizes, machine, request, *kinds), key=_rank) for kinds in _choices(sizes, request)]
    return max(plans, key=lambda p: (p.level, -p.short_by))


def _choices(sizes: Sizes, request: Request) -> list[tuple[str, str]]:
    """The kinds of KV cache and head that the request leaves open, the least degraded first."""
    heads = KINDS if sizes.small_head is not None else KINDS[:1]
    kvs, heads = (request.kv,) if request.kv else KINDS, (request.head,) if request.head else heads
    return [(kv, head) for head, kv in product(heads, kvs)]


def _rank(found: Plan) -> tuple[float, ...]:
    """Placements with the same cache and head, better ones higher: more memory never leads to a slower one."""
    if not found.fits:
        return 0, -found.short_by
    return 1, found.level == GPU, -found.pass_s(), found.gpu_layers


def _placements(sizes: Sizes, machine: Machine, request: Request, kv: str, head: str) -> Iterator[Plan]:
    """Those worth comparing: all on the GPU, as many layers there as fit, none there; with few layers on disk."""
    count = len(sizes.layers)

    def place(gpu_layers: int, disk_layers: int = 0, embedding_on: str = "cpu") -> Plan:
        return Plan(sizes, machine, request, kv, head, disk_layers, gpu_layers, embedding_on)

    def with_disk(gpu_layers: int) -> Iterator[Plan]:
        yield (none := place(gpu_layers))
        if none.fits or gpu_layers == count or not request.disk:
            return
        some = range(1, count - gpu_layers + 1)  # from one layer on, each more takes less memory
        first = bisect_left(some, -request.cpu_bytes, key=lambda n: -place(gpu_layers, n).totals["cpu"])
        yield place(gpu_layers, some[min(first, len(some) - 1)])

    if request.gpu_bytes is not None:
        for embedding_on in ("gpu", "cpu"):
            if (whole := place(count, 0, embedding_on)).totals["gpu"] <= request.gpu_bytes:
                yield whole
        most = bisect_right(range(1, count), request.gpu_bytes, key=lambda n: place(n).totals["gpu"])
        yield from with_disk(most) if most else ()
    yield from with_disk(0)


# What to tell ---------------------------------------------------------------------------------------------------------


def _notes(best: Plan) -> Iterator[str]:
    """Why the plan chose less than 16 bits."""
    chosen = [
        name for option, name in SMALLER.items() if getattr(best, option) != (getattr(best.request, option) or "fp16")
    ]
    if chosen:
        yield f"{' and '.join(chosen)}, to {GAINS[best.level]}"


def _advice(best: Plan) -> Iterator[str]:
    """One sentence for each single change that lifts the plan to a better level."""
    sizes, machine, request = best.sizes, best.machine, best.request

    def gain(**changes: object) -> str | None:
        found = _best(sizes, machine, replace(request, **changes))  # type: ignore[arg-type]
        return f"would {GAINS[found.level]}" if found.level > best.level else None

    for option in SMALLER:
        possible = option == "kv" or sizes.small_head is not None
        if getattr(request, option) == "fp16" and possible and (text := gain(**{option: "int8"})):
            yield f"an {SMALLER[option]} ({option}) {text}"
    pages = range(-(-request.context // PAGE) - 1, request.context // (4 * PAGE), -1)  # less than a quarter is no help
    enough = bisect_left(pages, True, key=lambda n: gain(context=n * PAGE) is not None)
    if enough < len(pages):
        yield f"a context of {pages[enough] * PAGE} {gain(context=pages[enough] * PAGE)}"
    for tier, wanted in dict.fromkeys(_wanted(best)):
        more = wanted - getattr(request, f"{tier}_bytes")
        if more > 0 and (text := gain(**{f"{tier}_bytes": wanted})):
            yield f"{wanted / 2**30:.1f}GiB of {tier.upper()} memory, {format_bytes(more)} more than the budget, {text}"


def _wanted(best: Plan) -> Iterator[tuple[str, int]]:
    """Budgets, in tenths of a GiB, that would hold the model on the GPU, or all layers of it in memory."""
    sizes, machine, request = best.sizes, best.machine, best.request

    def smallest(tier: str, gpu_layers: int) -> int:
        every = [Plan(sizes, machine, request, *kinds, 0, gpu_layers, "cpu") for kinds in _choices(sizes, request)]
        return min(p.totals[tier] for p in every)

    if request.gpu_bytes is not None:
        yield "gpu", _tenths(smallest("gpu", len(sizes.layers)))
    if best.level == NO:
        yield "cpu", _tenths(request.cpu_bytes + best.short_by)
    yield "cpu", _tenths(smallest("cpu", best.gpu_layers))


def _tenths(count: int) -> int:
    """Rounded up, as far as a size is written."""
    return -(-count * 10 >> 30) * (1 << 30) // 10
