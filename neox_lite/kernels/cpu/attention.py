"""Rotary, append to the pages, and causal attention, one kernel over (sequence, head). Knows no tensor.

A head's new keys and values are written first, then its queries run over the pages a few at a time: scores of all keys, softmax
in float32, and the sum of values. Keys are converted as they stream; nothing is copied or transposed.

The batch's table, int64: sequences, tokens, address of the page numbers, 0, then for each sequence start (tokens cached
before), offset (its first token), count, and index of its first page number, then for each token position, page and slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from ...units import PAGE
from .activations import ROUNDER, exp
from .code import F32, I8, I16, I32, I64, Code, Value, vector
from .linear import BuildKernel
from .target import Target, from_float, to_float

KINDS = {"float32": (F32, 4), "float16": (I16, 2), "bfloat16": (I16, 2), "int8": (I8, 1)}
HEADER, SEQUENCE, TOKEN = 4, 4, 3  # int64 slots of the batch's table


@dataclass(frozen=True)
class HeadShape:
    """dim elements a head, the first `rotary` of them rotated; cached in `dtype`, int8 with a scale per token and head."""

    dim: int
    rotary: int
    dtype: str


def scratch_bytes(dim: int, length: int) -> int:
    """What one thread needs for sequences of up to `length` tokens."""
    return 4 * (MAX_QUERIES * (-(-length // PAGE) * PAGE) + (1 + MAX_QUERIES) * (dim + 16))


MAX_QUERIES = 8


def write_attention(target: Target, shape: HeadShape) -> tuple[str, BuildKernel]:
    """kernel over sequence * head.

    arguments: qkv float32 (tokens, heads * 3 * dim), out float32 (tokens, heads * dim), pages of the layer, their scales, the
    batch's table, rotary table float32 (2, positions, rotary / 2), positions, heads.
    """
    name = f"attention_{shape.dim}_{shape.rotary}_{shape.dtype}"

    def build(module: ir.Module) -> None:
        code = Code(module, name, 4)
        table, start, stop, scratch = code.arguments
        work = _Attention(code, target, shape, table, scratch)
        with code.for_range(start, stop) as item:
            work.item(item)
        code.ret()

    return name, build


class _Attention:
    def __init__(self, code: Code, target: Target, shape: HeadShape, table: Value, scratch: Value) -> None:
        self.code, self.target, self.dim, self.rotary, self.dtype = code, target, shape.dim, shape.rotary, shape.dtype
        self.width = target.width
        self.kind, self.size = KINDS[shape.dtype]
        self.qkv, self.out, self.pages, self.scales, self.batch, self.table, self.positions, self.heads = (
            code.load_arguments(table, 8)
        )
        self.sequences, self.tokens, self.page_numbers = code.load_arguments(self.batch, 3)
        self.chunks = _chunks(0, self.dim, self.width)
        self.queries = min(MAX_QUERIES, self.width)
        self.head_bytes = -(-self.dim // 16) * 16 * 4  # of a head as float32
        self.rotated = scratch  # one key, then up to MAX_QUERIES queries, then their scores
        self.query = scratch + self.head_bytes
        self.scores = scratch + self.head_bytes * (1 + MAX_QUERIES)

    def item(self, item: Value) -> None:
        code = self.code
        sequence, self.head = item // self.heads, item % self.heads
        entry = self.batch + (sequence * SEQUENCE + HEADER) * 8
        self.start, self.first, count, pages = code.load_arguments(entry, 4)
        self.numbers = self.page_numbers + pages * 8
        self.token_table = self.batch + (self.sequences * SEQUENCE + HEADER) * 8
        with code.for_range(0, count) as i:
            self.append_kv(self.first + i)
        done = code.variable(code.constant(0))
        for size in (self.queries, 1):
            with code.loop() as break_if:
                break_if(done.value + size > count)
                self.attend_block(done.value, size)
                done.value = done.value + size

    # Keys and values in ---------------------------------------------------------------------------------------------

    def head_address(self, token: Value, which: int) -> Value:
        """Address of a token's query (0), key (1) or value (2) of this head."""
        return self.qkv + ((token * self.heads + self.head) * 3 + which) * (self.dim * 4)

    def cache_address(self, page: Value, which: int, slot: Value | int) -> tuple[Value, Value]:
        """Addresses of a cached key (0) or value (1) and of its scale."""
        index = ((page * 2 + which) * self.heads + self.head) * PAGE + slot
        return self.pages + index * (self.dim * self.size), self.scales + index * 2

    def append_kv(self, token: Value) -> None:
        entry = self.token_table + token * (TOKEN * 8)
        position, page, slot = self.code.load_arguments(entry, TOKEN)
        self.rotate(self.head_address(token, 1), position, self.rotated, 1.0)
        self.write_head(self.rotated, *self.cache_address(page, 0, slot))
        self.write_head(self.head_address(token, 2), *self.cache_address(page, 1, slot))

    def rotate(self, source: Value, position: Value, to: Value, factor: float) -> None:
        """Rotate the first elements, paired half against half (GPT-NeoX's order), and multiply all by factor."""
        code, half = self.code, self.rotary // 2
        cos = self.table + position * (half * 4)
        sin = cos + self.positions * (half * 4)
        for at, lanes in _chunks(0, half, self.width):
            kind = vector(F32, lanes)
            a, b = code.load(kind, source, at * 4), code.load(kind, source, (half + at) * 4)
            c, s = code.load(kind, cos, at * 4), code.load(kind, sin, at * 4)
            code.store((a * c - b * s) * factor, to, at * 4)
            code.store((b * c + a * s) * factor, to, (half + at) * 4)
        for at, lanes in _chunks(2 * half, self.dim, self.width):
            code.store(code.load(vector(F32, lanes), source, at * 4) * factor, to, at * 4)

    def write_head(self, source: Value, address: Value, scale_address: Value) -> None:
        """Write a float32 head into a page."""
        code = self.code
        loads = [code.load(vector(F32, lanes), source, at * 4) for at, lanes in self.chunks]
        if self.dtype != "int8":
            for (at, _), value in zip(self.chunks, loads, strict=True):
                code.store(from_float(self.target, value, self.dtype), address, at * self.size)
            return
        peak = code.constant(0.0, F32)
        for value in loads:
            peak = code.maximum(peak, code.abs(value).reduce_max())
        half = from_float(self.target, (peak * (1 / 127.0)).splat(1), "float16")
        largest = code.constant(0x7BFF, I16)  # 65504: a larger scale must not become infinite
        half = half.equals(0x7C00).select(largest, half)
        code.store(half, scale_address)
        scale = to_float(self.target, half, "float16")
        inverse = scale.equals(0.0).select(0.0, 1.0 / scale)
        for (at, lanes), value in zip(self.chunks, loads, strict=True):
            near = value * inverse.splat(lanes)
            near = (near < -127.0).select(-127.0, (near > 127.0).select(127.0, near)) + ROUNDER
            code.store(near.bitcast(vector(I32, lanes)).trunc(I8), address, at)

    # Attention ------------------------------------------------------------------------------------------------------

    def load_cached(self, address: Value, chunk: tuple[int, int]) -> Value:
        """Part of a cached head as float32, int8 codes unscaled."""
        at, lanes = chunk
        raw = self.code.load(vector(self.kind, lanes), address, at * self.size)
        return raw.extend(I32).as_float() if self.dtype == "int8" else to_float(self.target, raw, self.dtype)

    def attend_block(self, first: Value, queries: int) -> None:
        """Queries first.. of the sequence's new tokens, against everything cached up to the last of them."""
        code = self.code
        for i in range(queries):
            token = self.first + first + i
            position = code.load(I64, self.token_table + token * (TOKEN * 8))
            self.rotate(self.head_address(token, 0), position, self.query + i * self.head_bytes, self.dim**-0.5)
        length = self.start + first + queries
        self.compute_scores(length, queries)
        totals = self.softmax(length, queries)
        self.weighted_values(length, queries, first, totals)

    def compute_scores(self, length: Value, queries: int) -> None:
        """Scores [key][query] of every key, a page at a time; those after a query's own position are computed and not used."""
        code, keys = self.code, self.width // queries
        query = [
            [code.load(vector(F32, lanes), self.query + i * self.head_bytes, at * 4) for at, lanes in self.chunks]
            for i in range(queries)
        ]
        with code.for_range(0, length, PAGE) as first_key:
            page = code.load(I64, self.numbers, (first_key >> 7) * 8)
            with code.for_range(0, (length - first_key).min(PAGE), keys) as slot:
                dots: list[Value] = []
                for k in range(keys):
                    at, _ = self.cache_address(page, 0, slot + k)
                    parts = [self.load_cached(at, chunk) for chunk in self.chunks]
                    dots += [self.dot(q, parts) for q in query]
                values = self.reduce_vectors(dots)
                if self.dtype == "int8":
                    scale = to_float(
                        self.target, code.load(vector(I16, keys), self.cache_address(page, 0, slot)[1]), "float16"
                    )
                    values = values * (scale.splat(queries) if keys == 1 else self.repeat_per_query(scale, queries))
                code.store(values, self.scores + (first_key + slot) * (queries * 4))

    def repeat_per_query(self, scales: Value, queries: int) -> Value:
        """One value a key -> [key][query]."""
        return scales.shuffle([lane // queries for lane in range(scales.lanes * queries)])

    def dot(self, query: list[Value], parts: list[Value]) -> Value:
        """Products of a query and a key, summed to one full vector."""
        total, rest = self.code.constant(0.0, vector(F32, self.width)), None
        for q, k in zip(query, parts, strict=True):
            if q.lanes == self.width:
                total = self.code.fma(q, k, total)
            else:
                product = (q * k).reduce_add()
                rest = product if rest is None else rest + product
        if rest is None:
            return total
        one = self.code.constant([1.0] + [0.0] * (self.width - 1), total.type)
        return self.code.fma(rest.splat(self.width), one, total)

    def reduce_vectors(self, vectors: list[Value]) -> Value:
        """The total of each of `width` vectors, side by side: folded in pairs, so that every addition has full width."""
        span = self.width  # lanes that belong to one of the totals
        while len(vectors) > 1:
            vectors = [self.fold(a, b, span) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
            span //= 2
        return vectors[0]

    def fold(self, a: Value, b: Value, span: int) -> Value:
        """Add the second half of every span to the first, two vectors into one."""
        lanes = [lane for lane in range(2 * a.lanes) if lane % span < span // 2]
        return a.shuffle(lanes, b) + a.shuffle([lane + span // 2 for lane in lanes], b)

    def softmax(self, length: Value, queries: int) -> Value:
        """Replace scores by exp(score - the query's largest), zero for keys after its position; each query's sum of them."""
        code, width, keys = self.code, self.width, self.width // queries
        floats, ints = vector(F32, width), vector(I32, width)
        key = code.constant([lane // queries for lane in range(width)], ints)
        # How many keys the query of each lane sees.
        seen = (length - (queries - 1)).trunc(I32).splat(width) + code.constant(
            [i % queries for i in range(width)], ints
        )

        def over_keys(value: Value, combine: Callable[[Value, Value], Value]) -> Value:
            """Combine the lanes of each query; all of them then hold the result."""
            for step in _steps(queries, width):
                value = combine(value, value.shuffle([lane ^ step for lane in range(width)]))
            return value

        peak = code.variable(code.constant(float("-inf"), floats))
        with code.for_range(0, length, keys) as first:
            is_seen = (key + first.trunc(I32).splat(width)) < seen
            score = code.load(floats, self.scores + first * (queries * 4))
            peak.value = code.maximum(peak.value, is_seen.select(score, code.constant(float("-inf"), floats)))
        largest = over_keys(peak.value, code.maximum)
        total = code.variable(code.constant(0.0, floats))
        with code.for_range(0, length, keys) as first:
            at = self.scores + first * (queries * 4)
            is_seen = (key + first.trunc(I32).splat(width)) < seen
            power = is_seen.select(exp(code, code.load(floats, at) - largest), code.constant(0.0, floats))
            code.store(power, at)
            total.value = total.value + power
        return over_keys(total.value, lambda a, b: a + b)

    def weighted_values(self, length: Value, queries: int, first: Value, totals: Value) -> None:
        """The values, weighted by the scores, into the output; as many elements at a time as the registers hold sums of."""
        code, inverse = self.code, 1.0 / totals
        at_once = max(1, self.target.registers * 3 // 4 // queries)
        for begin in range(0, len(self.chunks), at_once):
            chunks = self.chunks[begin : begin + at_once]
            sums = [[code.variable(code.constant(0.0, vector(F32, n))) for _, n in chunks] for _ in range(queries)]
            with code.for_range(0, length, PAGE) as first_key:
                page = code.load(I64, self.numbers, (first_key >> 7) * 8)
                with code.for_range(0, (length - first_key).min(PAGE)) as slot:
                    at, at_scale = self.cache_address(page, 1, slot)
                    share = self.scores + (first_key + slot) * (queries * 4)
                    shares = [code.load(F32, share, 4 * i) for i in range(queries)]
                    values = [self.load_cached(at, chunk) for chunk in chunks]
                    if self.dtype == "int8":
                        scale = to_float(self.target, code.load(I16, at_scale), "float16")
                        values = [value * scale.splat(value.lanes) for value in values]
                    for i in range(queries):
                        for total, value in zip(sums[i], values, strict=True):
                            total.value = code.fma(value, shares[i].splat(value.lanes), total.value)
            for i in range(queries):
                to = self.out + ((self.first + first + i) * self.heads + self.head) * (self.dim * 4)
                for (offset, lanes), total in zip(chunks, sums[i], strict=True):
                    code.store(total.value * inverse.lane(i).splat(lanes), to, offset * 4)


def _chunks(start: int, stop: int, width: int) -> list[tuple[int, int]]:
    """A range cut into vectors, full ones and then narrower ones: (first element, lanes)."""
    chunks = []
    while start < stop:
        lanes = min(width, 1 << ((stop - start).bit_length() - 1))
        chunks.append((start, lanes))
        start += lanes
    return chunks


def _steps(queries: int, width: int) -> list[int]:
    """Distances between lanes of one query in a vector [key][query], each twice the one before."""
    return [queries << i for i in range((width // queries).bit_length() - 1)]
