"""Matrix products with weights as they lie on disk, in blocks of 32 output features. Knows addresses and no tensor.

A block of outputs goes through one driver: it clears y, adds each product (a weight times its activations), then runs the
epilogue (addends, activation, and the layout that the next operation reads). Products and epilogue are functions passed by
address, so weights of any formats combine. y is float32 (tokens, 32), output feature n0 + j of token t at t * 32 + j.

    product(arguments, n0, count, y, scratch)      epilogue(arguments, n0, count, y)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir

from .activations import ACTIVATIONS, NATURAL, UNIT, Destination, Layout, write_block
from .code import F32, I16, Code, Value, vector
from .target import Target, to_float

BLOCK_N = 32  # output features of a block
STORAGE_TYPES = {"float16": I16, "bfloat16": I16, "float32": F32}
BuildKernel = Callable[[ir.Module], None]


@dataclass(frozen=True)
class PackedFormat:
    """Integer codes in 32-bit words: `bits` a code, one scale of `scale_dtype` (a name) per `group_size` codes."""

    bits: int
    group_size: int
    scale_dtype: str

    @property
    def name(self) -> str:
        return f"int{self.bits}_g{self.group_size}_{self.scale_dtype}"

    @property
    def codes_per_word(self) -> int:
        return 32 // self.bits

    @property
    def unit_words(self) -> int:
        return UNIT // self.codes_per_word


# The driver -----------------------------------------------------------------------------------------------------------


def write_driver(module: ir.Module) -> None:
    """kernel(arguments, start, stop, scratch) over blocks of 32 output features.

    arguments: tokens, outputs, epilogue, its arguments, number of products, then (product, its arguments) for each.
    """
    code = Code(module, "linear", 4)
    table, start, stop, scratch = code.arguments
    tokens, outputs, epilogue, epilogue_arguments, products = code.load_arguments(table, 5)
    free = scratch + tokens * (BLOCK_N * 4)
    with code.for_range(start, stop) as block:
        n0 = block * BLOCK_N
        count = (outputs - n0).min(BLOCK_N)
        with code.for_range(0, tokens) as t:
            code.store(code.constant(0.0, vector(F32, BLOCK_N)), scratch + t * (BLOCK_N * 4))
        with code.for_range(0, products) as p:
            product, arguments = code.load_arguments(table + 40 + p * 16, 2)
            code.call(product, [arguments, n0, count, scratch, free])
        code.call(epilogue, [epilogue_arguments, n0, count, scratch])
    code.ret()


def write_precomputed(module: ir.Module) -> None:
    """A product that torch has computed. arguments: products float32 (tokens, outputs), tokens, outputs."""
    code = Code(module, "precomputed", 5)
    table, n0, count, y, _ = code.arguments
    products, tokens, outputs = code.load_arguments(table, 3)
    with code.for_range(0, tokens) as t:
        source, target = products + (t * outputs + n0) * 4, y + t * (BLOCK_N * 4)
        with code.for_range(0, count) as n:
            code.store(code.load(F32, target, n * 4) + code.load(F32, source, n * 4), target, n * 4)
    code.ret()


def write_epilogue(
    target: Target, addends: Sequence[str], activation: str | None, layout: Layout
) -> tuple[str, BuildKernel]:
    """activation(y + the addends) into `layout`. addends: their dtypes; float32 ones may differ from token to token.

    arguments: tokens, values, scales, sums, features (as `Destination`), then for each addend its address and the bytes from
    one token to the next.
    """
    name = f"epilogue_{'_'.join(addends) or 'none'}_{activation}_{layout.name}"

    def build(module: ir.Module) -> None:
        code = Code(module, name, 4)
        table, n0, count, y = code.arguments
        tokens, values, scales, sums, features = code.load_arguments(table, 5)
        out = Destination(values, scales, sums, features)
        given = [code.load_arguments(table + 40 + 16 * i, 2) for i in range(len(addends))]

        def value(t: Value, n: Value, lanes: int) -> Value:
            x = code.load(vector(F32, lanes), y + (t * BLOCK_N + n) * 4)
            for (address, step), dtype in zip(given, addends, strict=True):
                size = 4 if dtype == "float32" else 2
                x = x + to_float(
                    target, code.load(vector(STORAGE_TYPES[dtype], lanes), address + t * step + (n0 + n) * size), dtype
                )
            return ACTIVATIONS[activation](code, x)

        with code.for_range(0, tokens) as t:
            with code.if_then(count.equals(BLOCK_N)):
                write_block(code, layout, out, t, n0 >> 5, value(t, code.constant(0), BLOCK_N))
            if layout == NATURAL:  # only a natural layout has a last block of fewer features
                with code.if_then(count < BLOCK_N), code.for_range(0, count) as n:
                    code.store(value(t, n, 1), values + (t * features + n0 + n) * 4)
        code.ret()

    return name, build


def transpose(
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
