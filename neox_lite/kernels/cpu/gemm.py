"""Products of many tokens: the words of a few rows are transposed once, then serve all tokens. Knows addresses and no tensor.

The function writes a product for the driver of linear.py.
"""

from __future__ import annotations

from llvmlite import ir

from .activations import BLOCK, TILE
from .code import F32, I32, Code, Value, vector
from .linear import BLOCK_N, STORAGE_TYPES, BuildKernel, PackedFormat, transpose
from .target import Target, to_float


def write_gemm(target: Target, fmt: PackedFormat, many: bool) -> tuple[str, BuildKernel]:
    """Packed codes times int8 activations in `gemm` layout.

    The words of `width` rows are transposed so that lanes are rows; a step multiplies four codes of every row by four
    activation bytes of one token, broadcast; after the eight steps of a block, its scale applies. For `many` tokens, where the
    registers suffice, two vectors of rows share each broadcast; for few, their transposition would cost more than that saves.
    arguments: packed, scales, words a row, -, -, groups a row, tokens, values, value scales, value sums.
    """
    name, width = f"gemm_{fmt.name}{'_many' if many else ''}", target.width
    kind, scale_kind = vector(F32, width), STORAGE_TYPES[fmt.scale_dtype]
    blocks, block_words = fmt.group_size // BLOCK, BLOCK // fmt.codes_per_word
    scale_size = 4 if fmt.scale_dtype == "float32" else 2
    # Vectors of rows, and how many tokens there are at a time: their sums must fit the registers.
    stacks, sizes = (1, (4,)) if target.registers == 16 else (2, (4, 6)) if many else (1, (4, 8, 12))

    def build(module: ir.Module) -> None:
        code = Code(module, name, 5)
        table, n0, count, y, scratch = code.arguments
        packed, scale, row_words, _, _, groups, tokens, x, x_scale, x_sum = code.load_arguments(table, 10)
        group_words = fmt.group_size // fmt.codes_per_word
        transposed = [scratch + r * row_words * (width * 4) for r in range(stacks)]
        transposed_scales = [scratch + (stacks * row_words + r * groups) * (width * 4) for r in range(stacks)]

        def group(g: Value, base: Value, size: int, out: Value) -> None:
            """A group of every row times `size` tokens; base: index of the group's first block for the first of them."""
            totals = [[code.constant(0.0, kind)] * size for _ in range(stacks)]
            for b in range(blocks):
                index = base + b * TILE
                starts = [code.load(I32, x_sum + index * 4, 4 * i).splat(width) for i in range(size)]
                at = [t + (g * group_words + b * block_words) * (width * 4) for t in transposed]
                raw = [[code.load(vector(I32, width), a, j * width * 4) for j in range(block_words)] for a in at]
                values = [x + (index + i) * BLOCK for i in range(size)]
                sums = _block_sums(code, target, fmt, raw, values, starts)
                for i in range(size):
                    spread = code.load(F32, x_scale + index * 4, 4 * i).splat(width)
                    for r in range(stacks):
                        totals[r][i] = code.fma(sums[r][i].as_float(), spread, totals[r][i])
            for r in range(stacks):
                weight_scale = code.load(kind, transposed_scales[r] + g * (width * 4))
                for i in range(size):
                    to = out + (i * BLOCK_N + r * width) * 4
                    code.store(code.fma(totals[r][i], weight_scale, code.load(kind, to)), to)

        with code.for_range(0, BLOCK_N, width * stacks) as first, code.if_then(first < count):
            # 1. Transpose the words and the scales of these rows into scratch memory.
            last = n0 + count - 1
            for r in range(stacks):
                row = n0 + first + r * width
                transpose(code, width, I32, 4, packed, row_words, row, last, transposed[r], lambda v: v)
                to = lambda v: to_float(target, v, fmt.scale_dtype)  # noqa: E731
                transpose(code, width, scale_kind, scale_size, scale, groups, row, last, transposed_scales[r], to)
            # 2. Multiply them by all tokens, in passes of sizes as even as can be.
            next_rows = packed + (n0 + first + width * stacks) * row_words * 4
            done = code.variable(code.constant(0))
            with code.loop() as break_if:
                break_if(done.value >= tokens)
                lane = done.value % TILE
                rest = (tokens - done.value).min(TILE - lane)
                passes = (rest + (sizes[-1] - 1)) // sizes[-1]
                share = (rest + passes - 1) // passes
                base = (done.value - lane) * (groups * blocks) + lane
                out = y + (done.value * BLOCK_N + first) * 4
                taken = code.variable(code.constant(0))
                for below, size in zip((0, *sizes), sizes, strict=False):
                    with code.if_then((share > below) & (share < size + 1)), code.for_range(0, groups) as g:
                        # The first pass fetches the next rows while it multiplies these.
                        with code.if_then(done.value.equals(0)):
                            for i in range(width * stacks):
                                code.prefetch(next_rows + (i * row_words + g * group_words) * 4)
                        group(g, base + g * (blocks * TILE), size, out)
                        taken.value = code.constant(size)
                done.value = done.value + taken.value
        code.ret()

    return name, build


def _block_sums(
    code: Code, target: Target, fmt: PackedFormat, raw: list[list[Value]], values: list[Value], starts: list[Value]
) -> list[list[Value]]:
    """starts + the integer products of a block: raw[r] are its words in each row of a vector, values its tokens' bytes."""
    sums = [list(starts) for _ in raw]
    if target.registers > 16:  # step by step, so that vectors of rows share a broadcast while it is in a register
        for j in range(len(raw[0])):
            for i, at in enumerate(values):
                for r, row in enumerate(raw):
                    pairs = _broadcast_pairs(code, target, fmt, row[j], at, j)
                    sums[r][i] = target.dot(code, sums[r][i], pairs, fmt.bits)
        return sums
    for r, row in enumerate(raw):
        for i, at in enumerate(values):
            pairs = [pair for j, word in enumerate(row) for pair in _broadcast_pairs(code, target, fmt, word, at, j)]
            sums[r][i] = target.dot(code, starts[i], pairs, fmt.bits)
    return sums


def _broadcast_pairs(
    code: Code, target: Target, fmt: PackedFormat, word: Value, values: Value, j: int
) -> list[tuple[Value, Value]]:
    """Word j of a block in every row, and the bytes of one token that it meets."""
    spread = lambda offset: code.load(I32, values, offset).splat(target.width)  # noqa: E731
    if fmt.bits == 4:
        return [(word & 0x0F0F0F0F, spread(4 * j)), ((word >> 4) & 0x0F0F0F0F, spread(16 + 4 * j))]
    return [(word ^ -0x7F7F7F80 if target.signed_codes else word, spread(4 * j))]
