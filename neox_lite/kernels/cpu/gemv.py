"""Products of one token or a few: each row of the weight streams once. Knows addresses and no tensor.

Each function writes a product for the driver of linear.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from .activations import BLOCK, UNIT
from .code import F32, I32, I64, Code, Value, Variable, vector
from .linear import BLOCK_N, STORAGE_TYPES, BuildKernel, PackedFormat, transpose
from .target import Target, to_float

# Weights are fetched this far ahead, across the pages that the processor's own prefetching stops at.
PREFETCH_BYTES = 6144
# A row that ends within a unit is copied to scratch memory: its words, then its scales; both with zeros after them.
TAIL_SCALES = 128
TAIL_BYTES = 192


def token_tiles(code: Code, tokens: Value, sizes: Sequence[int], body: Callable[[Value, int], None]) -> None:
    """body(first token, number of tokens) until all are covered, in the given descending sizes, the last of which is 1."""
    done = code.variable(code.constant(0))
    for size in sizes:
        with code.loop() as break_if:
            break_if(done.value + size > tokens)
            body(done.value, size)
            done.value = done.value + size


def write_gemv(target: Target, fmt: PackedFormat, exact: bool, tailed: bool) -> tuple[str, BuildKernel]:
    """Packed codes times int8 activations in `gemv` layout, or, `exact`, float32 ones in `planar`.

    For each unit of 128 the products of a word's codes land in that word's lane; a lane never mixes two blocks or groups, so
    scales apply lane by lane and rows are summed across lanes once, at their end. Stored codes are `offset` too large: the
    sums that the int8 layout carries take it off. tailed: rows may end within a unit.
    arguments: packed, scales, words a row, whole units, tail words, groups a row, tokens, values, value scales, value sums.
    """
    name = f"gemv_{'exact' if exact else 'int8'}_{fmt.name}{'_tail' if tailed else ''}"
    width, vectors, groups = target.width, fmt.unit_words // target.width, UNIT // fmt.group_size
    lanes = [[v * width + lane for lane in range(width)] for v in range(vectors)]  # of words in the unit
    block_of = [[word * fmt.codes_per_word // BLOCK for word in row] for row in lanes]
    group_of = [[word * fmt.codes_per_word // fmt.group_size for word in row] for row in lanes]
    kind = vector(STORAGE_TYPES[fmt.scale_dtype], groups)
    scale_size = 4 if fmt.scale_dtype == "float32" else 2

    def build(module: ir.Module) -> None:
        code = Code(module, name, 5)
        table, n0, count, y, scratch = code.arguments
        packed, scale, row_words, units, tail, row_groups, tokens, x, x_scale, x_sum = code.load_arguments(table, 10)
        all_units = units + (tail > 0).zero_extend(I64) if tailed else units

        # 1. The product of one unit: 128 elements of a row and of one token.
        def exact_unit(raw: list[Value], weight_scale: Value, index: Value, total: Variable, _: Variable) -> None:
            values = x + index * (UNIT * 4)
            for v, word in enumerate(raw):
                inner = code.constant(0.0, vector(F32, width))
                for j in range(fmt.codes_per_word):
                    magic = ((word >> fmt.bits * j) & (1 << fmt.bits) - 1) | 0x4B000000  # 2**23 + code
                    stored = magic.bitcast(vector(F32, width)) - float(2**23 + (1 << fmt.bits - 1))
                    plane = code.load(vector(F32, width), values, (j * fmt.unit_words + v * width) * 4)
                    inner = code.fma(stored, plane, inner)
                spread = weight_scale.splat(width) if groups == 1 else weight_scale.shuffle(group_of[v])
                total.value = code.fma(inner, spread, total.value)

        def int8_unit(
            raw: list[Value], weight_scale: Value, index: Value, total: Variable, correction: Variable
        ) -> None:
            values, block = x + index * UNIT, index * (4 * UNIT // BLOCK)
            quads = weight_scale.splat(4) if groups == 1 else weight_scale.shuffle([i * groups // 4 for i in range(4)])
            scales = code.load(vector(F32, 4), x_scale + block)
            both = scales if groups == 1 else scales * quads
            inner = code.constant(0.0, vector(F32, width))
            for v, word in enumerate(raw):
                pairs = _pairs(code, target, fmt, word, values + v * width * 4, 64)
                product = target.dot(code, code.constant(0, word.type), pairs, fmt.bits).as_float()
                spread = both.shuffle(block_of[v])
                inner = code.fma(product, spread, inner)
            if groups == 1:
                total.value = code.fma(inner, weight_scale.splat(width), total.value)
            else:
                total.value = total.value + inner
            if target.offset(fmt.bits):
                correction.value = code.fma(code.load(vector(F32, 4), x_sum + block), quads, correction.value)

        unit = exact_unit if exact else int8_unit

        # 2. Row by row; what is left of a row after its last whole unit is read from a copy with zeros after it.
        with code.for_range(0, count) as n:
            row, row_scale = packed + (n0 + n) * row_words * 4, scale + (n0 + n) * row_groups * scale_size
            if tailed:
                _copy_tail(code, fmt, row, row_scale, units, tail, row_groups, scratch)

            def few_tokens(
                first: Value, size: int, row: Value = row, row_scale: Value = row_scale, n: Value = n
            ) -> None:
                totals = [code.variable(code.constant(0.0, vector(F32, width))) for _ in range(size)]
                corrections = [code.variable(code.constant(0.0, vector(F32, 4))) for _ in range(size)]
                with code.for_range(0, all_units) as u:
                    at, at_scale = row + u * (fmt.unit_words * 4), row_scale + u * (groups * scale_size)
                    if tailed:
                        whole = u < units
                        at, at_scale = whole.select(at, scratch), whole.select(at_scale, scratch + TAIL_SCALES)
                    for line in range(0, fmt.unit_words * 4, 64):
                        code.prefetch(at + PREFETCH_BYTES + line)
                    raw = [code.load(vector(I32, width), at, v * width * 4) for v in range(vectors)]
                    weight_scale = to_float(target, code.load(kind, at_scale), fmt.scale_dtype)
                    for i, (total, correction) in enumerate(zip(totals, corrections, strict=True)):
                        unit(raw, weight_scale, (first + i) * all_units + u, total, correction)
                # 3. One sum across lanes for each row and token.
                for i, (total, correction) in enumerate(zip(totals, corrections, strict=True)):
                    out = y + ((first + i) * BLOCK_N + n) * 4
                    code.store(code.load(F32, out) + (total.value.reduce_add() - correction.value.reduce_add()), out)

            token_tiles(code, tokens, (2, 1), few_tokens)
        code.ret()

    return name, build


def _copy_tail(
    code: Code,
    fmt: PackedFormat,
    row: Value,
    row_scale: Value,
    units: Value,
    tail: Value,
    groups: Value,
    scratch: Value,
) -> None:
    for offset in range(0, TAIL_BYTES, 8):
        code.store(code.constant(0), scratch, offset)
    source = row + units * (fmt.unit_words * 4)
    with code.for_range(0, tail) as i:
        code.store(code.load(I32, source, i * 4), scratch, i * 4)
    first = units * (UNIT // fmt.group_size)
    kind, size = STORAGE_TYPES[fmt.scale_dtype], 4 if fmt.scale_dtype == "float32" else 2
    with code.for_range(first, groups) as g:
        code.store(code.load(kind, row_scale, g * size), scratch + TAIL_SCALES, (g - first) * size)


def _pairs(code: Code, target: Target, fmt: PackedFormat, word: Value, x: Value, odd: int) -> list[tuple[Value, Value]]:
    """A vector of words and the activations it meets, as `Target.dot` takes them; odd: bytes from even to odd elements."""
    if fmt.bits == 4:
        even, high = word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F
        return [(even, code.load(word.type, x)), (high, code.load(word.type, x + odd))]
    codes = word ^ -0x7F7F7F80 if target.signed_codes else word
    return [(codes, code.load(word.type, x))]


def write_dense(target: Target, dtype: str) -> tuple[str, BuildKernel]:
    """A plain matrix times float32 activations in natural layout. arguments: weight, inputs, tokens, values."""
    name, width = f"dense_{dtype}", target.width
    size = 4 if dtype == "float32" else 2

    def build(module: ir.Module) -> None:
        code = Code(module, name, 5)
        table, n0, count, y, _ = code.arguments
        weight, inputs, tokens, x = code.load_arguments(table, 4)
        whole = inputs & -(2 * width)

        def stored(address: Value, lanes: int) -> Value:
            return to_float(target, code.load(vector(STORAGE_TYPES[dtype], lanes), address), dtype)

        with code.for_range(0, count) as n:
            row = weight + (n0 + n) * inputs * size

            def few_tokens(first: Value, tile: int, row: Value = row, n: Value = n) -> None:
                sums = [[code.variable(code.constant(0.0, vector(F32, width))) for _ in range(2)] for _ in range(tile)]
                with code.for_range(0, whole, 2 * width) as k:
                    code.prefetch(row + k * size + PREFETCH_BYTES)
                    for half in range(2):
                        w = stored(row + (k + half * width) * size, width)
                        for i in range(tile):
                            at = x + ((first + i) * inputs + k + half * width) * 4
                            sums[i][half].value = code.fma(w, code.load(vector(F32, width), at), sums[i][half].value)
                for i in range(tile):
                    total = code.variable((sums[i][0].value + sums[i][1].value).reduce_add())
                    with code.for_range(whole, inputs) as k:
                        value = code.load(F32, x + ((first + i) * inputs + k) * 4)
                        total.value = code.fma(stored(row + k * size, 1), value, total.value)
                    out = y + ((first + i) * BLOCK_N + n) * 4
                    code.store(code.load(F32, out) + total.value, out)

            token_tiles(code, tokens, (4, 2, 1), few_tokens)
        code.ret()

    return name, build


def write_narrow(target: Target, dtype: str) -> tuple[str, BuildKernel]:
    """As write_dense, for a matrix of few columns: rows are turned into lanes, so that no vector is summed.

    scratch: `width` float32 for each column. arguments: weight, inputs, tokens, values.
    """
    name, width = f"narrow_{dtype}", target.width
    size, kind = 4 if dtype == "float32" else 2, vector(F32, width)

    def build(module: ir.Module) -> None:
        code = Code(module, name, 5)
        table, n0, count, y, transposed = code.arguments
        weight, inputs, tokens, x = code.load_arguments(table, 4)

        with code.for_range(0, BLOCK_N, width) as first, code.if_then(first < count):
            transpose(
                code, width, STORAGE_TYPES[dtype], size, weight, inputs, n0 + first, n0 + count - 1, transposed,
                lambda v: to_float(target, v, dtype),
            )  # fmt: skip

            def few_tokens(token: Value, tile: int, first: Value = first) -> None:
                outs = [y + ((token + i) * BLOCK_N + first) * 4 for i in range(tile)]
                sums = [code.variable(code.load(kind, out)) for out in outs]
                with code.for_range(0, inputs) as k:
                    column = code.load(kind, transposed + k * (width * 4))
                    for i in range(tile):
                        value = code.load(F32, x + ((token + i) * inputs + k) * 4)
                        sums[i].value = code.fma(column, value.splat(width), sums[i].value)
                for out, total in zip(outs, sums, strict=True):
                    code.store(total.value, out)

            token_tiles(code, tokens, (8, 2, 1), few_tokens)
        code.ret()

    return name, build
