"""Rotary, append to the pages, and causal attention, one kernel over (sequence, head). Knows no tensor.

A head's new keys and values are written first, then its queries run over the pages a few at a time: scores of all keys, softmax
in float32, and the sum of values. Keys are converted as they stream; nothing is copied or transposed.

The batch's table, int64: sequences, tokens, address of the page numbers, 0, then for each sequence start (tokens cached
before), offset (its first token), count, and index of its first page number, then for each token position, page and slot.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from .acts import ROUNDER, exp
from .code import F32, I8, I16, I32, I64, Code, Value, Variable, vector
from .linear import Build
from .target import Target, from_float, to_float

PAGE = 128  # tokens of a page: cache.PAGE
KINDS = {"float32": (F32, 4), "float16": (I16, 2), "bfloat16": (I16, 2), "int8": (I8, 1)}
HEADER, SEQUENCE, TOKEN = 4, 4, 3  # int64 slots of the batch's table


@dataclass(frozen=True)
class Heads:
    """dim elements a head, the first `rotary` of them rotated; cached in `dtype`, int8 with a scale per token and head."""

    dim: int
    rotary: int
    dtype: str


def scratch_bytes(dim: int, length: int) -> int:
    """What one thread needs for sequences of up to `length` tokens."""
    return 4 * (MOST_QUERIES * (-(-length // PAGE) * PAGE) + 8 * (dim + 64))


MOST_QUERIES = 4


def write_attention(target: Target, heads: Heads) -> tuple[str, Build]:
    """kernel over sequence * head.

    arguments: qkv float32 (tokens, heads * 3 * dim), out float32 (tokens, heads * dim), pages of the layer, their scales, the
    batch's table, rotary table float32 (2, positions, rotary / 2), positions, heads.
    """
    name = f"attention_{heads.dim}_{heads.rotary}_{heads.dtype}"

    def build(module: ir.Module) -> None:
        code = Code(module, name, 4)
        table, start, stop, scratch = code.arguments
        work = _Attention(code, target, heads, table, scratch)
        with code.loop(start, stop) as item:
            work.item(item)
        code.give()

    return name, build


class _Attention:
    def __init__(self, code: Code, target: Target, heads: Heads, table: Value, scratch: Value) -> None:
        self.code, self.target, self.dim, self.rotary, self.dtype = code, target, heads.dim, heads.rotary, heads.dtype
        self.width = target.width
        self.kind, self.size = KINDS[heads.dtype]
        self.qkv, self.out, self.pages, self.scales, self.batch, self.table, self.positions, self.heads = code.slots(
            table, 8
        )
        self.sequences, self.tokens, self.page_numbers = code.slots(self.batch, 3)
        # A head is full vectors and, where its size is no multiple, narrower ones: (first element, lanes).
        self.chunks, at, lanes = [], 0, self.width
        while at < self.dim:
            while at + lanes > self.dim:
                lanes //= 2
            self.chunks.append((at, lanes))
            at += lanes
        registers = target.registers * 3 // 4
        self.queries = next(n for n in (MOST_QUERIES, 2, 1) if n == 1 or n * len(self.chunks) <= registers)
        self.head_floats = -(-self.dim // 16) * 16 * 4  # bytes of a head as float32
        self.rotated = scratch  # one key, then up to MOST_QUERIES queries, then their scores
        self.query = scratch + self.head_floats
        self.scores = scratch + self.head_floats * (1 + MOST_QUERIES)

    def item(self, item: Value) -> None:
        code = self.code
        sequence, self.head = item // self.heads, item % self.heads
        entry = self.batch + (sequence * SEQUENCE + HEADER) * 8
        self.start, self.first, count, pages = code.slots(entry, 4)
        self.numbers = self.page_numbers + pages * 8
        self.token_table = self.batch + (self.sequences * SEQUENCE + HEADER) * 8
        self.row_bytes = ((self.start + count + (PAGE - 1)) & -PAGE) * 4  # scores of one query
        with code.loop(0, count) as i:
            self.append(self.first + i)
        done = code.variable(code.number(0))
        for size in dict.fromkeys((self.queries, 1)):
            with code.forever() as leave:
                leave(done.value + size > count)
                self.attend(done.value, size)
                done.value = done.value + size

    # Keys and values in ---------------------------------------------------------------------------------------------

    def source(self, token: Value, which: int) -> Value:
        """Address of a token's query (0), key (1) or value (2) of this head."""
        return self.qkv + ((token * self.heads + self.head) * 3 + which) * (self.dim * 4)

    def slot(self, page: Value, which: int, slot: Value | int) -> tuple[Value, Value]:
        """Addresses of a cached key (0) or value (1) and of its scale."""
        index = ((page * 2 + which) * self.heads + self.head) * PAGE + slot
        return self.pages + index * (self.dim * self.size), self.scales + index * 2

    def append(self, token: Value) -> None:
        entry = self.token_table + token * (TOKEN * 8)
        position, page, slot = self.code.slots(entry, TOKEN)
        self.rotate(self.source(token, 1), position, self.rotated, 1.0)
        self.keep(self.rotated, *self.slot(page, 0, slot))
        self.keep(self.source(token, 2), *self.slot(page, 1, slot))

    def rotate(self, source: Value, position: Value, to: Value, factor: float) -> None:
        """Rotate the first elements, paired half against half (GPT-NeoX's order), and multiply all by factor."""
        code, half = self.code, self.rotary // 2
        cos = self.table + position * (half * 4)
        sin = cos + self.positions * (half * 4)
        at, lanes = 0, self.width
        while at < half:
            while at + lanes > half:
                lanes //= 2
            kind = vector(F32, lanes)
            a, b = code.load(kind, source, at * 4), code.load(kind, source, (half + at) * 4)
            c, s = code.load(kind, cos, at * 4), code.load(kind, sin, at * 4)
            code.store((a * c - b * s) * factor, to, at * 4)
            code.store((b * c + a * s) * factor, to, (half + at) * 4)
            at += lanes
        with code.loop(2 * half, self.dim) as k:
            code.store(code.load(F32, source, k * 4) * factor, to, k * 4)

    def keep(self, source: Value, place: Value, scale_place: Value) -> None:
        """Write a float32 head into a page."""
        code = self.code
        loads = [code.load(vector(F32, lanes), source, at * 4) for at, lanes in self.chunks]
        if self.dtype != "int8":
            for (at, _), value in zip(self.chunks, loads, strict=True):
                code.store(from_float(self.target, value, self.dtype), place, at * self.size)
            return
        peak = code.number(0.0, F32)
        for value in loads:
            peak = code.maximum(peak, code.magnitude(value).peak())
        half = from_float(self.target, (peak * (1 / 127.0)).splat(1), "float16")
        largest = code.number(0x7BFF, I16)  # 65504: a larger scale must not become infinite
        half = half.equals(0x7C00).choose(largest, half)
        code.store(half, scale_place)
        scale = to_float(self.target, half, "float16")
        inverse = scale.equals(0.0).choose(0.0, 1.0 / scale)
        for (at, lanes), value in zip(self.chunks, loads, strict=True):
            near = value * inverse.splat(lanes)
            near = (near < -127.0).choose(-127.0, (near > 127.0).choose(127.0, near)) + ROUNDER
            code.store(near.bits(vector(I32, lanes)).cut(I8), place, at)

    # Attention ------------------------------------------------------------------------------------------------------

    def cached(self, place: Value, chunk: tuple[int, int]) -> Value:
        """Part of a cached head as float32, int8 codes unscaled."""
        at, lanes = chunk
        raw = self.code.load(vector(self.kind, lanes), place, at * self.size)
        return raw.widened(I32).as_float() if self.dtype == "int8" else to_float(self.target, raw, self.dtype)

    def attend(self, first: Value, queries: int) -> None:
        """Queries first.. of the sequence's new tokens, against everything cached up to the last of them."""
        code = self.code
        for i in range(queries):
            token = self.first + first + i
            position = code.load(I64, self.token_table + token * (TOKEN * 8))
            self.rotate(self.source(token, 0), position, self.query + i * self.head_floats, self.dim**-0.5)
        length = self.start + first + queries
        self.score(length, queries)
        sums = [self.softmax(length - (queries - 1 - i), length, i) for i in range(queries)]
        self.mix(length, queries, first, sums)

    def score(self, length: Value, queries: int) -> None:
        """Scores of every key, a page at a time; those after a query's own place are computed and not used."""
        code, keys = self.code, max(1, self.width // queries)
        query = [
            [code.load(vector(F32, lanes), self.query + i * self.head_floats, at * 4) for at, lanes in self.chunks]
            for i in range(queries)
        ]
        with code.loop(0, length, PAGE) as place:
            page = code.load(I64, self.numbers, (place >> 7) * 8)
            count = (length - place).least(PAGE)
            with code.loop(0, count, keys) as slot:
                dots: list[Value] = []
                for k in range(keys):
                    at, _ = self.slot(page, 0, slot + k)
                    parts = [self.cached(at, chunk) for chunk in self.chunks]
                    dots += [self.dot(query[i], parts) for i in range(queries)]
                for i in range(queries):
                    values = self.sums([dots[k * queries + i] for k in range(keys)])
                    if self.dtype == "int8":
                        scale = code.load(vector(I16, keys), self.slot(page, 0, slot)[1])
                        values = values * to_float(self.target, scale, "float16")
                    code.store(values, self.scores + i * self.row_bytes + (place + slot) * 4)

    def dot(self, query: list[Value], parts: list[Value]) -> Value:
        """Products of a query and a key, summed to one full vector."""
        total, rest = self.code.number(0.0, vector(F32, self.width)), None
        for q, k in zip(query, parts, strict=True):
            if q.lanes == self.width:
                total = self.code.fma(q, k, total)
            else:
                product = (q * k).total()
                rest = product if rest is None else rest + product
        if rest is None:
            return total
        return self.code.fma(
            rest.splat(self.width), self.code.number([1.0] + [0.0] * (self.width - 1), total.type), total
        )

    def sums(self, vectors: list[Value]) -> Value:
        """The total of each vector, side by side: vectors are folded in pairs, so that every addition has full width."""
        span = self.width  # lanes that belong to one of the totals
        while len(vectors) > 1:
            vectors = [self.folded(a, b, span) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
            span //= 2
        value = vectors[0]
        while span > 1:
            value, span = self.folded(value, None, span), span // 2
        return value if value.lanes > 1 else value.lane(0) if isinstance(value.type, ir.VectorType) else value

    def folded(self, a: Value, b: Value | None, span: int) -> Value:
        """Add the second half of every span to the first: of two vectors into one, or of one into half of it."""
        lanes = [lane for lane in range(a.lanes * (1 if b is None else 2)) if lane % span < span // 2]
        return a.shuffled(lanes, b) + a.shuffled([lane + span // 2 for lane in lanes], b)

    def softmax(self, length: Value, padded: Value, i: int) -> Value:
        """Replace a query's scores by exp(score - largest), zero from `length` on; the sum of them."""
        code, row, wide = self.code, self.scores + i * self.row_bytes, vector(F32, 16)
        whole = length & -16
        largest = code.variable(code.number(float("-inf"), wide))
        with code.loop(0, whole, 16) as k:
            largest.value = code.maximum(largest.value, code.load(wide, row + k * 4))
        peak = code.variable(largest.value.peak())
        with code.loop(whole, length) as k:
            peak.value = code.maximum(peak.value, code.load(F32, row + k * 4))
        total = code.variable(code.number(0.0, wide))
        with code.loop(0, whole, 16) as k:
            power = exp(code, code.load(wide, row + k * 4) - peak.value.splat(16))
            code.store(power, row + k * 4)
            total.value = total.value + power
        rest = code.variable(total.value.total())
        with code.loop(whole, length) as k:
            power = exp(code, code.load(F32, row + k * 4) - peak.value)
            code.store(power, row + k * 4)
            rest.value = rest.value + power
        with code.loop(length, padded) as k:
            code.store(code.number(0.0, F32), row + k * 4)
        return rest.value

    def mix(self, length: Value, queries: int, first: Value, sums: list[Value]) -> None:
        """The values, weighted by the scores, into the output."""
        code = self.code
        totals: list[list[Variable]] = [
            [code.variable(code.number(0.0, vector(F32, lanes))) for _, lanes in self.chunks] for _ in range(queries)
        ]
        with code.loop(0, length, PAGE) as place:
            page = code.load(I64, self.numbers, (place >> 7) * 8)
            with code.loop(0, (length - place).least(PAGE)) as slot:
                at, at_scale = self.slot(page, 1, slot)
                shares = [code.load(F32, self.scores + i * self.row_bytes + (place + slot) * 4) for i in range(queries)]
                if self.dtype == "int8":
                    scale = to_float(self.target, code.load(I16, at_scale), "float16")
                    shares = [share * scale for share in shares]
                for c, chunk in enumerate(self.chunks):
                    value = self.cached(at, chunk)
                    for i in range(queries):
                        totals[i][c].value = code.fma(value, shares[i].splat(chunk[1]), totals[i][c].value)
        for i in range(queries):
            inverse, token = 1.0 / sums[i], self.first + first + i
            to = self.out + (token * self.heads + self.head) * (self.dim * 4)
            for (offset, lanes), total in zip(self.chunks, totals[i], strict=True):
                code.store(total.value * inverse.splat(lanes), to, offset * 4)
