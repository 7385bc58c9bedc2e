"""Products with weights as they lie on disk, in blocks of 32 output features. Knows no tensor: addresses come and go.

A block of outputs goes through one driver: clear y, add each part (a weight times its activations), then finish (addends,
activation, and the layout that the next operation reads). Parts and finish are functions passed by address, so weights of
any formats combine. y is float32 (tokens, 32), output feature n0 + j of token t at t * 32 + j.

    part(arguments, n0, count, y, scratch)      finish(arguments, n0, count, y)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir

from .activations import ACTIVATIONS, BLOCK, NATURAL, TILE, UNIT, Layout, Place, write_block
from .code import F32, I16, I32, I64, Code, Value, Variable, vector
from .target import Target, to_float

ROWS = 32  # output features of a block
AHEAD = 6144  # bytes by which weights are fetched early, across the pages that the processor's own prefetching stops at
STORED = {"float16": I16, "bfloat16": I16, "float32": F32}
Build = Callable[[ir.Module], None]


@dataclass(frozen=True)
class Words:
    """A weight in 32-bit words: `bits` a code, one scale in `scales` (a dtype's name) per `group` codes."""

    bits: int
    group: int
    scales: str

    @property
    def name(self) -> str:
        return f"int{self.bits}_g{self.group}_{self.scales}"

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @property
    def unit_words(self) -> int:
        return UNIT // self.per_word


# The driver -----------------------------------------------------------------------------------------------------------


def write_driver(module: ir.Module) -> None:
    """kernel(arguments, start, stop, scratch) over blocks of 32 output features.

    arguments: tokens, outputs, finish, its arguments, number of parts, then (part, its arguments) for each.
    """
    code = Code(module, "linear", 4)
    table, start, stop, scratch = code.arguments
    tokens, outputs, finish, finish_arguments, parts = code.load_arguments(table, 5)
    free = scratch + tokens * (ROWS * 4)
    with code.for_range(start, stop) as block:
        n0 = block * ROWS
        count = (outputs - n0).min(ROWS)
        with code.for_range(0, tokens) as t:
            code.store(code.constant(0.0, vector(F32, ROWS)), scratch + t * (ROWS * 4))
        with code.for_range(0, parts) as p:
            part, arguments = code.load_arguments(table + 40 + p * 16, 2)
            code.call(part, [arguments, n0, count, scratch, free])
        code.call(finish, [finish_arguments, n0, count, scratch])
    code.ret()


def write_given(module: ir.Module) -> None:
    """A part whose products were made elsewhere: arguments: products float32 (tokens, outputs), tokens, outputs."""
    code = Code(module, "given", 5)
    table, n0, count, y, _ = code.arguments
    products, tokens, outputs = code.load_arguments(table, 3)
    with code.for_range(0, tokens) as t:
        source, target = products + (t * outputs + n0) * 4, y + t * (ROWS * 4)
        with code.for_range(0, count) as n:
            code.store(code.load(F32, target, n * 4) + code.load(F32, source, n * 4), target, n * 4)
    code.ret()


def write_finish(target: Target, addends: Sequence[str], activation: str | None, layout: Layout) -> tuple[str, Build]:
    """activation(y + the addends) into `layout`. addends: their dtypes; float32 ones may differ from token to token.

    arguments: tokens, values, scales, sums, features (as `Place`), then (address, bytes from token to token) of each addend.
    """
    name = f"finish_{'_'.join(addends) or 'none'}_{activation}_{layout.name}"

    def build(module: ir.Module) -> None:
        code = Code(module, name, 4)
        table, n0, count, y = code.arguments
        tokens, values, scales, sums, features = code.load_arguments(table, 5)
        place = Place(values, scales, sums, features)
        given = [code.load_arguments(table + 40 + 16 * i, 2) for i in range(len(addends))]

        def value(t: Value, n: Value, lanes: int) -> Value:
            x = code.load(vector(F32, lanes), y + (t * ROWS + n) * 4)
            for (address, step), dtype in zip(given, addends, strict=True):
                size = 4 if dtype == "float32" else 2
                x = x + to_float(
                    target, code.load(vector(STORED[dtype], lanes), address + t * step + (n0 + n) * size), dtype
                )
            return ACTIVATIONS[activation](code, x)

        with code.for_range(0, tokens) as t:
            with code.if_then(count.equals(ROWS)):
                write_block(code, layout, place, t, n0 >> 5, value(t, code.constant(0), ROWS))
            if layout == NATURAL:  # only a natural layout has a last block of fewer features
                with code.if_then(count < ROWS), code.for_range(0, count) as n:
                    code.store(value(t, n, 1), values + (t * features + n0 + n) * 4)
        code.ret()

    return name, build


# One token or a few: each row of the weight streams once ----------------------------------------------------------------


def token_tiles(code: Code, tokens: Value, sizes: Sequence[int], body: Callable[[Value, int], None]) -> None:
    """body(first token, number of tokens) until all are covered, in the given descending sizes, the last of which is 1."""
    done = code.variable(code.constant(0))
    for size in sizes:
        with code.loop() as break_if:
            break_if(done.value + size > tokens)
            body(done.value, size)
            done.value = done.value + size


def write_rows(target: Target, words: Words, exact: bool, tailed: bool) -> tuple[str, Build]:
    """A part: words times int8 activations in `rows` layout, or, `exact`, float32 ones in `planes`.

    For each unit of 128 the products of a word's codes land in that word's lane; a lane never mixes two blocks or groups, so
    scales apply lane by lane and rows are summed across lanes once, at their end. Stored codes are `offset` too large: the
    sums that the int8 layout carries take it off. tailed: rows may end within a unit.
    arguments: packed, scales, words a row, whole units, tail words, groups a row, tokens, values, value scales, value sums.
    """
    name = f"rows_{'exact' if exact else 'int8'}_{words.name}{'_tail' if tailed else ''}"
    width, vectors, groups = target.width, words.unit_words // target.width, UNIT // words.group
    lanes = [[v * width + lane for lane in range(width)] for v in range(vectors)]  # of words in the unit
    block_of = [[word * words.per_word // BLOCK for word in row] for row in lanes]
    group_of = [[word * words.per_word // words.group for word in row] for row in lanes]
    kind = vector(STORED[words.scales], groups)
    scale_size = 4 if words.scales == "float32" else 2

    def build(module: ir.Module) -> None:
        code = Code(module, name, 5)
        table, n0, count, y, scratch = code.arguments
        packed, scale, row_words, units, tail, row_groups, tokens, x, x_scale, x_sum = code.load_arguments(table, 10)
        all_units = units + (tail > 0).zero_extend(I64) if tailed else units

        def exact_unit(raw: list[Value], weight_scale: Value, index: Value, total: Variable, _: Variable) -> None:
            values = x + index * (UNIT * 4)
            for v, word in enumerate(raw):
                inner = code.constant(0.0, vector(F32, width))
                for j in range(words.per_word):
                    magic = ((word >> words.bits * j) & (1 << words.bits) - 1) | 0x4B000000  # 2**23 + code
                    stored = magic.bitcast(vector(F32, width)) - float(2**23 + (1 << words.bits - 1))
                    plane = code.load(vector(F32, width), values, (j * words.unit_words + v * width) * 4)
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
                pairs = _pairs(code, target, words, word, values + v * width * 4, 64)
                product = target.dot(code, code.constant(0, word.type), pairs, words.bits).as_float()
                spread = both.shuffle(block_of[v])
                inner = code.fma(product, spread, inner)
            if groups == 1:
                total.value = code.fma(inner, weight_scale.splat(width), total.value)
            else:
                total.value = total.value + inner
            if target.offset(words.bits):
                correction.value = code.fma(code.load(vector(F32, 4), x_sum + block), quads, correction.value)

        unit = exact_unit if exact else int8_unit

        with code.for_range(0, count) as n:
            row, row_scale = packed + (n0 + n) * row_words * 4, scale + (n0 + n) * row_groups * scale_size
            if tailed:  # a copy, with zeros after it, of what is left of the row
                _copy_tail(code, words, row, row_scale, units, tail, row_groups, scratch)

            def few_tokens(
                first: Value, size: int, row: Value = row, row_scale: Value = row_scale, n: Value = n
            ) -> None:
                totals = [code.variable(code.constant(0.0, vector(F32, width))) for _ in range(size)]
                corrections = [code.variable(code.constant(0.0, vector(F32, 4))) for _ in range(size)]
                with code.for_range(0, all_units) as u:
                    at, at_scale = row + u * (words.unit_words * 4), row_scale + u * (groups * scale_size)
                    if tailed:
                        whole = u < units
                        at, at_scale = whole.select(at, scratch), whole.select(at_scale, scratch + TAIL_SCALES)
                    for line in range(0, words.unit_words * 4, 64):
                        code.prefetch(at + AHEAD + line)
                    raw = [code.load(vector(I32, width), at, v * width * 4) for v in range(vectors)]
                    weight_scale = to_float(target, code.load(kind, at_scale), words.scales)
                    for i, (total, correction) in enumerate(zip(totals, corrections, strict=True)):
                        unit(raw, weight_scale, (first + i) * all_units + u, total, correction)
                for i, (total, correction) in enumerate(zip(totals, corrections, strict=True)):
                    place = y + ((first + i) * ROWS + n) * 4
                    code.store(
                        code.load(F32, place) + (total.value.reduce_add() - correction.value.reduce_add()), place
                    )

            token_tiles(code, tokens, (2, 1), few_tokens)
        code.ret()

    return name, build


TAIL_SCALES = 128  # bytes after the tail's words: where its scales are copied to
TAIL_BYTES = 192


def _copy_tail(
    code: Code, words: Words, row: Value, row_scale: Value, units: Value, tail: Value, groups: Value, scratch: Value
) -> None:
    for offset in range(0, TAIL_BYTES, 8):
        code.store(code.constant(0), scratch, offset)
    source = row + units * (words.unit_words * 4)
    with code.for_range(0, tail) as i:
        code.store(code.load(I32, source, i * 4), scratch, i * 4)
    first = units * (UNIT // words.group)
    kind, size = STORED[words.scales], 4 if words.scales == "float32" else 2
    with code.for_range(first, groups) as g:
        code.store(code.load(kind, row_scale, g * size), scratch + TAIL_SCALES, (g - first) * size)


def _pairs(code: Code, target: Target, words: Words, word: Value, x: Value, odd: int) -> list[tuple[Value, Value]]:
    """A vector of words and the activations it meets, as `Target.dot` takes them; odd: bytes from even to odd elements."""
    if words.bits == 4:
        even, high = word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F
        return [(even, code.load(word.type, x)), (high, code.load(word.type, x + odd))]
    codes = word ^ -0x7F7F7F80 if target.signed_codes else word
    return [(codes, code.load(word.type, x))]


def write_dense(target: Target, dtype: str) -> tuple[str, Build]:
    """A part: a plain matrix times float32 activations in natural layout. arguments: weight, inputs, tokens, values."""
    name, width = f"dense_{dtype}", target.width
    size = 4 if dtype == "float32" else 2

    def build(module: ir.Module) -> None:
        code = Code(module, name, 5)
        table, n0, count, y, _ = code.arguments
        weight, inputs, tokens, x = code.load_arguments(table, 4)
        whole = inputs & -(2 * width)

        def stored(address: Value, lanes: int) -> Value:
            return to_float(target, code.load(vector(STORED[dtype], lanes), address), dtype)

        with code.for_range(0, count) as n:
            row = weight + (n0 + n) * inputs * size

            def few_tokens(first: Value, tile: int, row: Value = row, n: Value = n) -> None:
                sums = [[code.variable(code.constant(0.0, vector(F32, width))) for _ in range(2)] for _ in range(tile)]
                with code.for_range(0, whole, 2 * width) as k:
                    code.prefetch(row + k * size + AHEAD)
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
                    place = y + ((first + i) * ROWS + n) * 4
                    code.store(code.load(F32, place) + total.value, place)

            token_tiles(code, tokens, (4, 2, 1), few_tokens)
        code.ret()

    return name, build


def write_narrow(target: Target, dtype: str) -> tuple[str, Build]:
    """A part as write_dense makes it, for a matrix of few columns: rows are turned into lanes, so that no vector is summed.

    scratch: `width` float32 for each column. arguments: weight, inputs, tokens, values.
    """
    name, width = f"narrow_{dtype}", target.width
    size, kind = 4 if dtype == "float32" else 2, vector(F32, width)

    def build(module: ir.Module) -> None:
        code = Code(module, name, 5)
        table, n0, count, y, turned = code.arguments
        weight, inputs, tokens, x = code.load_arguments(table, 4)

        with code.for_range(0, ROWS, width) as first, code.if_then(first < count):
            _transpose(
                code, width, STORED[dtype], size, weight, inputs, n0 + first, n0 + count - 1, turned,
                lambda v: to_float(target, v, dtype),
            )  # fmt: skip

            def few_tokens(token: Value, tile: int, first: Value = first) -> None:
                places = [y + ((token + i) * ROWS + first) * 4 for i in range(tile)]
                sums = [code.variable(code.load(kind, place)) for place in places]
                with code.for_range(0, inputs) as k:
                    column = code.load(kind, turned + k * (width * 4))
                    for i in range(tile):
                        value = code.load(F32, x + ((token + i) * inputs + k) * 4)
                        sums[i].value = code.fma(column, value.splat(width), sums[i].value)
                for place, total in zip(places, sums, strict=True):
                    code.store(total.value, place)

            token_tiles(code, tokens, (8, 2, 1), few_tokens)
        code.ret()

    return name, build


# Many tokens: the words of a few rows are transposed once, then serve all tokens ------------------------------------------


def write_tiles(target: Target, words: Words, many: bool) -> tuple[str, Build]:
    """A part: words times int8 activations in `tiles` layout.

    The words of `width` rows are transposed so that lanes are rows; a step multiplies four codes of every row by four
    activation bytes of one token, broadcast; after the eight steps of a block, its scale applies. For `many` tokens, where the
    registers suffice, two vectors of rows share each broadcast; for few, their transposition would cost more than that saves.
    arguments: packed, scales, words a row, -, -, groups a row, tokens, values, value scales, value sums.
    """
    name, width = f"tiles_{words.name}{'_many' if many else ''}", target.width
    kind, scale_kind = vector(F32, width), STORED[words.scales]
    blocks, block_words = words.group // BLOCK, BLOCK // words.per_word
    scale_size = 4 if words.scales == "float32" else 2
    # Vectors of rows, and how many tokens there are at a time: their sums must fit the registers.
    stacks, sizes = (1, (4,)) if target.registers == 16 else (2, (4, 6)) if many else (1, (4, 8, 12))

    def build(module: ir.Module) -> None:
        code = Code(module, name, 5)
        table, n0, count, y, scratch = code.arguments
        packed, scale, row_words, _, _, groups, tokens, x, x_scale, x_sum = code.load_arguments(table, 10)
        group_words = words.group // words.per_word
        turned = [scratch + r * row_words * (width * 4) for r in range(stacks)]
        turned_scales = [scratch + (stacks * row_words + r * groups) * (width * 4) for r in range(stacks)]

        def group(g: Value, base: Value, size: int, place: Value) -> None:
            """A group of every row times `size` tokens; base: index of the group's first block for the first of them."""
            totals = [[code.constant(0.0, kind)] * size for _ in range(stacks)]
            for b in range(blocks):
                index = base + b * TILE
                starts = [code.load(I32, x_sum + index * 4, 4 * i).splat(width) for i in range(size)]
                at = [t + (g * group_words + b * block_words) * (width * 4) for t in turned]
                raw = [[code.load(vector(I32, width), a, j * width * 4) for j in range(block_words)] for a in at]
                values = [x + (index + i) * BLOCK for i in range(size)]
                sums = _block_sums(code, target, words, raw, values, starts)
                for i in range(size):
                    spread = code.load(F32, x_scale + index * 4, 4 * i).splat(width)
                    for r in range(stacks):
                        totals[r][i] = code.fma(sums[r][i].as_float(), spread, totals[r][i])
            for r in range(stacks):
                weight_scale = code.load(kind, turned_scales[r] + g * (width * 4))
                for i in range(size):
                    to = place + (i * ROWS + r * width) * 4
                    code.store(code.fma(totals[r][i], weight_scale, code.load(kind, to)), to)

        with code.for_range(0, ROWS, width * stacks) as first, code.if_then(first < count):
            last = n0 + count - 1
            for r in range(stacks):
                row = n0 + first + r * width
                _transpose(code, width, I32, 4, packed, row_words, row, last, turned[r], lambda v: v)
                to = lambda v: to_float(target, v, words.scales)  # noqa: E731
                _transpose(code, width, scale_kind, scale_size, scale, groups, row, last, turned_scales[r], to)
            coming = packed + (n0 + first + width * stacks) * row_words * 4
            done = code.variable(code.constant(0))
            with code.loop() as break_if:
                break_if(done.value >= tokens)
                lane = done.value % TILE
                rest = (tokens - done.value).min(TILE - lane)
                passes = (rest + (sizes[-1] - 1)) // sizes[-1]
                share = (rest + passes - 1) // passes  # as even as can be
                base = (done.value - lane) * (groups * blocks) + lane
                place = y + (done.value * ROWS + first) * 4
                taken = code.variable(code.constant(0))
                for below, size in zip((0, *sizes), sizes, strict=False):
                    with code.if_then((share > below) & (share < size + 1)), code.for_range(0, groups) as g:
                        with code.if_then(done.value.equals(0)):  # while these rows are at work, fetch the next ones
                            for i in range(width * stacks):
                                code.prefetch(coming + (i * row_words + g * group_words) * 4)
                        group(g, base + g * (blocks * TILE), size, place)
                        taken.value = code.constant(size)
                done.value = done.value + taken.value
        code.ret()

    return name, build


def _block_sums(
    code: Code, target: Target, words: Words, raw: list[list[Value]], values: list[Value], starts: list[Value]
) -> list[list[Value]]:
    """starts + the integer products of a block: raw[r] are its words in each row of a vector, values its tokens' bytes."""
    sums = [list(starts) for _ in raw]
    if target.registers > 16:  # step by step, so that vectors of rows share a broadcast while it is in a register
        for j in range(len(raw[0])):
            for i, at in enumerate(values):
                for r, row in enumerate(raw):
                    pairs = _broadcast_pairs(code, target, words, row[j], at, j)
                    sums[r][i] = target.dot(code, sums[r][i], pairs, words.bits)
        return sums
    for r, row in enumerate(raw):
        for i, at in enumerate(values):
            pairs = [pair for j, word in enumerate(row) for pair in _broadcast_pairs(code, target, words, word, at, j)]
            sums[r][i] = target.dot(code, starts[i], pairs, words.bits)
    return sums


def _broadcast_pairs(
    code: Code, target: Target, words: Words, word: Value, values: Value, j: int
) -> list[tuple[Value, Value]]:
    """Word j of a block in every row, and the bytes of one token that it meets."""
    spread = lambda offset: code.load(I32, values, offset).splat(target.width)  # noqa: E731
    if words.bits == 4:
        return [(word & 0x0F0F0F0F, spread(4 * j)), ((word >> 4) & 0x0F0F0F0F, spread(16 + 4 * j))]
    return [(word ^ -0x7F7F7F80 if target.signed_codes else word, spread(4 * j))]


def _transpose(
    code: Code,
    width: int,
    kind: ir.Type,
    size: int,
    source: Value,
    row_items: Value,
    first: Value,
    last: Value,
    target: Value,
    convert: Callable[[Value], Value],
) -> None:
    """Items of `width` rows from `first` on (row `last` again beyond it) -> [item][row], 4 bytes each, at `target`."""
    rows = [source + (first + i).min(last) * row_items * size for i in range(width)]
    whole = row_items & -width
    with code.for_range(0, whole, width) as k:
        values = [convert(code.load(vector(kind, width), row + k * size)) for row in rows]
        stride = width // 2
        while stride:
            values = _exchange(values, stride)
            stride //= 2
        for i, value in enumerate(values):
            code.store(value, target + (k + i) * (width * 4))
    with code.for_range(whole, row_items) as k:
        for i, row in enumerate(rows):
            code.store(convert(code.load(kind, row + k * size)), target + k * (width * 4), i * 4)


def _exchange(values: list[Value], stride: int) -> list[Value]:
    """One step of a transposition: blocks of `stride` lanes change places between vectors `stride` apart."""
    count, out = len(values), list(values)
    for i in range(count):
        if not i & stride:
            a, b = values[i], values[i + stride]
            out[i] = a.shuffle([lane if not lane & stride else count + lane - stride for lane in range(count)], b)
            out[i + stride] = a.shuffle(
                [lane + stride if not lane & stride else count + lane for lane in range(count)], b
            )
    return out
