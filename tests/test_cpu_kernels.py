"""The CPU's kernels against float64 on every instruction set this machine has, and the assembly of those it has not.

Kernels run through the operations, with the path and the layout of activations forced. What int8 activations cost is the
business of test_cpu_backend.py: here the truth is computed from the codes that the layout's writer left, so that only the
product's own rounding is judged.
"""

import ctypes
import math
import mmap
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from neox_lite.cache import Batch, PagePool
from neox_lite.errors import ArgumentError
from neox_lite.formats import DENSE, GroupInt, Weight, pack, unpack
from neox_lite.kernels import reference
from neox_lite.kernels.cpu import activations, attention, gemm, gemv, linear, norm, operations, target
from neox_lite.kernels.cpu.activations import BLOCK, NATURAL, TILE, UNIT, Layout
from neox_lite.kernels.cpu.code import F32, I16, Code, Value, vector
from neox_lite.kernels.cpu.compile import assembly, compiled
from neox_lite.kernels.cpu.operations import Operations
from neox_lite.kernels.cpu.program import PackedActivation, Program
from neox_lite.kernels.cpu.target import PATHS
from neox_lite.units import PAGE, dtype_name

ROOT = Path(__file__).parents[1]
KINDS = ["gemv", "planar", "gemm"]  # how products take activations: int8 for few tokens, float32, int8 for many
FORMATS = [(bits, group) for bits in (4, 8) for group in (32, 64, 128)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# One and two at a time; a tile less than half full, more, and full; a second tile, a third. The last ones are many, for which
# tiles have a kernel of their own.
TOKENS = (1, 2, 3, 5, 12, 13, 25, 31, 36)
OUTPUTS = 70  # two blocks of 32 and a part of one
# A sum of up to some 100 float32 products on each lane, then across lanes: every addition is off by at most 6e-8 of the
# partial sum, at random. The worst of a few thousand outputs stays below 25 such steps, relative to the rms of a sum.
ROUNDING = 3e-6


def on(path: str, *more: Any) -> Any:
    """Parameters of a test that runs on a path: skipped, with the reason, where this machine lacks it."""
    reason = target.why_not(path)
    return pytest.param(path, *more, marks=pytest.mark.skipif(reason is not None, reason=f"{path}: {reason}"))


here = pytest.mark.parametrize("path", [on(path) for path in PATHS])


# Tools ----------------------------------------------------------------------------------------------------------------


class Forced(Operations):
    """The operations on one path, with the activations of quantized weights in one layout whatever the number of tokens."""

    def __init__(self, path: str, kind: Any = "gemv") -> None:
        super().__init__(exact=kind == "planar")
        self.target, self.kind = target.for_path(path), kind

    def _layout(self, next_weight: Weight | None, tokens: int) -> Layout:
        if next_weight is None or not isinstance(next_weight.format, GroupInt):
            return NATURAL
        bits = next_weight.format.bits
        return Layout(self.kind, bits, 0 if self.kind == "planar" else self.target.offset(bits))

    def coded(self, x: Tensor, weight: Weight) -> PackedActivation:
        """x as `weight` reads it."""
        program = Program()
        coded = self._as(program, x, self._layout(weight, len(x)))
        self._run(program)
        assert isinstance(coded, PackedActivation)
        return coded

    def product(self, x: Any, weight: Weight) -> Tensor:
        return plain(self.grouped_linear([x], [weight], [None], [None], [None])[0])


def plain(coded: Any) -> Tensor:
    """A result in no layout of its own."""
    assert isinstance(coded, Tensor)
    return coded


@pytest.fixture(autouse=True)
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors hold NaN and lie between canaries: an output left out, or written beyond its end, is seen."""
    empty, made, edge = torch.empty, [], 64

    def guarded(*shape: Any, **options: Any) -> Tensor:
        wanted = empty(*shape, **options)
        memory = torch.full((wanted.nbytes + 2 * edge,), 0xA5, dtype=torch.uint8)
        made.append(memory)
        memory[edge : edge + wanted.nbytes] = 0xFF  # NaN in every float, -1 in integers
        return memory[edge : edge + wanted.nbytes].view(wanted.dtype).view(wanted.shape)

    monkeypatch.setattr(torch, "empty", guarded)
    for scratch in Forced("portable").pool._scratch:
        scratch.fill(0xFF)
    yield
    for memory in made:
        assert bool((memory[:edge] == 0xA5).all()) and bool((memory[-edge:] == 0xA5).all()), "written beyond the end"


def random_weight(
    bits: int, group: int, columns: int, dtype: torch.dtype = torch.float16, rows: int = OUTPUTS
) -> Weight:
    """All codes equally frequent, scales of both signs."""
    top = 1 << (bits - 1)
    codes = torch.randint(-top, top, (rows, columns), dtype=torch.int8)
    return weight_of(codes, ((torch.rand(rows, columns // group) - 0.5) * 0.01).to(dtype), bits, group)


def weight_of(codes: Tensor, scale: Tensor, bits: int, group: int) -> Weight:
    tensors = {"weight_packed": pack(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor(codes.shape)}
    return Weight(GroupInt(bits, group), (codes.shape[0], codes.shape[1]), tensors)


def dense(matrix: Tensor) -> Weight:
    return Weight(DENSE, (matrix.shape[0], matrix.shape[1]), {"weight": matrix})


def wide(weight: Weight) -> Tensor:
    """What a weight stands for, (out, in) float64, without any rounding."""
    if not isinstance(weight.format, GroupInt):
        return weight.tensors["weight"].double()
    codes = unpack(weight.tensors["weight_packed"], weight.format.bits).double()
    scale = weight.tensors["weight_scale"].double()
    return (codes.view(len(codes), -1, weight.format.group_size) * scale.unsqueeze(-1)).flatten(1)


def decoded(coded: PackedActivation) -> Tensor:
    """What activations in a layout stand for, (tokens, features) float64, by the words of activations.py; padding is zero."""
    tokens, features = coded.padded
    if coded.layout.kind == "planar":
        codes_per_word = 32 // coded.layout.bits
        planes = coded.memory.view(torch.float32).view(tokens, -1, codes_per_word, UNIT // codes_per_word)
        values = planes.transpose(2, 3).reshape(tokens, features).double()
    else:
        codes, scales, _ = pieces(coded)
        values = (codes.double().view(tokens, -1, BLOCK) * scales.double().unsqueeze(-1)).flatten(1)[: coded.tokens]
    assert not bool(values[:, coded.features :].any())
    return values[:, : coded.features]


def pieces(coded: PackedActivation) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (tokens, features) int8 in natural order, and of each block the scale and the sum as stored."""
    tokens, features = coded.padded
    size = tokens * features
    codes, numbers = coded.memory[:size].view(torch.int8), coded.memory[size:]
    scales = numbers[: size // BLOCK * 4].view(torch.float32)
    sums = numbers[size // BLOCK * 4 :].view(torch.float32 if coded.layout.kind == "gemv" else torch.int32)
    if coded.layout.kind == "gemv":
        half = UNIT // 2 if coded.layout.bits == 4 else 1
        codes = codes.view(tokens, -1, UNIT // half if half == 1 else 2, half).transpose(2, 3).reshape(tokens, features)
        return codes, scales.view(tokens, -1), sums.view(tokens, -1)
    blocks = codes.view(tokens // TILE, -1, TILE, 2, BLOCK // 2)  # tile, block, token, half, bytes
    if coded.layout.bits == 4:
        blocks = blocks.transpose(3, 4)  # the halves are the even elements and the odd ones
    codes = blocks.permute(0, 2, 1, 3, 4).reshape(tokens, features)
    scales, sums = (t.view(tokens // TILE, -1, TILE).transpose(1, 2).reshape(tokens, -1) for t in (scales, sums))
    return codes, scales, sums


def off(found: Tensor, x: Tensor, weight: Tensor, others: Tensor | float = 0.0) -> float:
    """Largest error of x @ weight.T + others, relative to the size that a sum of such products has."""
    size = (x.square() @ weight.square().T).mean().sqrt()
    return largest((found.double() - (x @ weight.T + others)) / size)


def largest(errors: Tensor) -> float:
    """Largest magnitude; infinite if one is NaN, which Python's max would pass over."""
    return float(errors.abs().max().nan_to_num(nan=math.inf))


def scales_of(bits: int, group: int, kind: str) -> torch.dtype:
    """One dtype of scales for each format and layout: every two of the three meet, at a third of the kernels."""
    return DTYPES[(bits // 4 + group // 32 // 2 + KINDS.index(kind)) % 3]


def columns_of(kind: str, group: int) -> list[int]:
    """Sizes that exercise a layout: for rows and planes whole units of 128, only a tail, and both; for tiles, more words
    and more groups than a transposed square, and fewer."""
    if kind == "gemm":
        return [17 * group, group]
    return [3 * UNIT] if group == UNIT else [3 * UNIT, group, 3 * UNIT + (UNIT - group)]


# Products with quantized weights --------------------------------------------------------------------------------------


def worst_product(path: str, kind: str, bits: int, group: int, many: bool) -> float:
    """The worst error of any number of tokens, columns and outputs."""
    ops, worst = Forced(path, kind), 0.0
    counts = [n for n in TOKENS if (n >= operations.MIN_WIDE_GEMM_TOKENS) == many]
    for columns in columns_of(kind, group):
        for rows in (OUTPUTS, 1):
            weight = random_weight(bits, group, columns, scales_of(bits, group, kind), rows)
            x = torch.randn(max(counts), columns)
            x[0, :BLOCK] = 0.0  # a block of scale 0
            for tokens in counts if rows > 1 else (counts[0], counts[-1]):
                coded = ops.coded(x[-tokens:], weight)
                worst = max(worst, off(ops.product(coded, weight), decoded(coded), wide(weight)))
    return worst


# With float32 activations avx_vnni has avx2's code; groups of 64 are to tiles what 32 and 128 are: whole blocks, unrolled.
PRODUCTS = [
    on(path, kind, bits, group)
    for path in PATHS
    for kind in KINDS
    for bits, group in FORMATS
    if (path, kind) != ("avx_vnni", "planar") and (path == "avx512_vnni" or (kind, group) != ("gemm", 64))
]


@pytest.mark.parametrize("path, kind, bits, group", PRODUCTS)
def test_products_equal_float64(path: str, kind: str, bits: int, group: int) -> None:
    assert worst_product(path, kind, bits, group, many=False) < ROUNDING


@here
@pytest.mark.parametrize("bits, group", [(4, 128), (8, 32)])
def test_products_of_many_tokens_equal_float64(path: str, bits: int, group: int) -> None:
    assert worst_product(path, "gemm", bits, group, many=True) < ROUNDING


@here
@pytest.mark.parametrize("kind", ["gemv", "gemm"])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_extreme_codes_and_activations_do_not_saturate(path: str, kind: str, bits: int) -> None:
    ops, top, columns = Forced(path, kind), 1 << (bits - 1), 256
    turns = torch.tensor([1, -1]).repeat(columns // 2)
    lowest, highest = torch.full((columns,), -top), torch.full((columns,), top - 1)
    rows = [lowest, highest, torch.where(turns > 0, lowest, highest), torch.zeros(columns)]
    scale = torch.tensor([0.5, -0.25]).repeat(4, 1).to(scales_of(bits, UNIT, kind))  # powers of two: exact in any dtype
    weight = weight_of(torch.stack(rows).to(torch.int8), scale, bits, UNIT)
    signs = torch.stack([turns.abs(), -turns.abs(), turns, turns.view(-1, 2).flip(1).flatten()])
    x = (signs * 127.0).repeat(2, 1)
    coded = ops.coded(x, weight)
    assert torch.equal(decoded(coded), x.double())  # codes are 127 and -127, scales 1
    assert torch.equal(ops.product(coded, weight).double(), x.double() @ wide(weight).T)  # whole numbers below 2**24


@here
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_activations_that_are_not_finite_give_outputs_that_are_not(path: str, kind: str, bits: int, bad: float) -> None:
    """And only those of their own token."""
    ops, weight = Forced(path, kind), random_weight(bits, UNIT, 256, scales_of(bits, UNIT, kind))
    x = torch.randn(5, 256)
    expected = ops.product(x, weight)
    spoiled = x.clone()
    spoiled[1, 0] = spoiled[3, 201] = bad
    found = ops.product(spoiled, weight)
    assert not bool(found[[1, 3]].isfinite().any())
    assert torch.equal(found[[0, 2, 4]], expected[[0, 2, 4]])


@here
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_activations_give_zero(path: str, kind: str, bits: int) -> None:
    ops, weight = Forced(path, kind), random_weight(bits, UNIT, 256, scales_of(bits, UNIT, kind))
    x = torch.zeros(3, 256)
    x[1] = -0.0
    assert not bool(ops.product(x, weight).any())


@here
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_may_start_anywhere_in_a_file(path: str, kind: str, bits: int) -> None:
    ops, weight = Forced(path, kind), random_weight(bits, UNIT, 256, scales_of(bits, UNIT, kind))
    x = torch.randn(5, 256)
    moved = Weight(weight.format, weight.shape, {name: shifted(t, 1) for name, t in weight.tensors.items()})
    assert moved.tensors["weight_packed"].data_ptr() % 8 == 4
    assert torch.equal(ops.product(x, moved), ops.product(x, weight))


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """A copy whose data starts that many elements beyond a multiple of 64 bytes."""
    memory = torch.zeros(tensor.numel() + 64, dtype=tensor.dtype)
    first = -memory.data_ptr() % 64 // tensor.element_size() + elements
    memory[first : first + tensor.numel()] = tensor.flatten()
    return memory[first : first + tensor.numel()].view(tensor.shape)


@here
def test_products_are_summed_with_each_other_the_addends_and_x(path: str) -> None:
    ops = Forced(path, "gemv")
    weights = [
        random_weight(4, 128, 384, scales_of(4, 128, "gemv")),
        random_weight(8, 128, 256, scales_of(8, 128, "gemv")),
    ]
    weights.append(dense((torch.randn(OUTPUTS, 33) * 0.1).half()))
    for tokens in (1, 2, 3):
        xs = [torch.randn(tokens, w.shape[1]) for w in weights]
        inputs = [ops.coded(x, w) for x, w in zip(xs[:2], weights[:2], strict=True)]
        x, bias = torch.randn(tokens, OUTPUTS), torch.randn(OUTPUTS).half()
        found = ops.linear_residual([*inputs, xs[2]], weights, [bias, None], x)
        given = torch.cat([*(decoded(a) for a in inputs), xs[2].double()], dim=1)
        assert off(found, given, torch.cat([wide(w) for w in weights], dim=1), x.double() + bias.double()) < ROUNDING


# Layouts --------------------------------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("kind", ["gemv", "gemm"])
@pytest.mark.parametrize("bits", [4, 8])
def test_int8_activations_are_the_nearest_codes_for_the_largest_of_32(path: str, kind: str, bits: int) -> None:
    ops, weight = Forced(path, kind), random_weight(bits, 32, 160, rows=1)
    x = torch.randn(13, 160) * torch.logspace(-20, 20, 13)[:, None]
    x[2] = 0.0
    x[3, 32:64] = torch.linspace(-1e-31, 1e-31, 32)  # too small for 127 / x: counts as zero
    coded = ops.coded(x, weight)
    codes, scales, sums = (t[:13] for t in pieces(coded))
    blocks = x.double().view(13, -1, BLOCK)
    peak = blocks.abs().amax(-1)
    peak[peak < 1e-30] = 0.0
    assert torch.allclose(scales[:, :5].double(), peak / 127, rtol=2.5e-7, atol=0.0)  # two roundings
    steps = torch.where(peak > 0, 127 / peak, 0.0).unsqueeze(-1)
    distance = (codes[:, :160].view(13, -1, BLOCK).double() - blocks * steps).abs()
    assert float(distance.max()) <= 0.5 + 127 * 2.4e-7  # a tie, moved by the rounding of 127 / peak and of the product
    assert int(codes.abs().max()) == 127
    totals = codes.view(13, -1, BLOCK).sum(-1).double()
    offset = ops.target.offset(bits)
    expected = totals * offset * scales.double() if kind == "gemv" else totals * -offset
    assert torch.allclose(sums.double(), expected, rtol=2e-7, atol=0.0)  # whole numbers, then one product


@here
@pytest.mark.parametrize("bits", [4, 8])
def test_planes_hold_the_activations_themselves(path: str, bits: int) -> None:
    ops, weight, x = Forced(path, "planar"), random_weight(bits, 32, 160, rows=1), torch.randn(3, 160)
    assert torch.equal(decoded(ops.coded(x, weight)), x.double())


# Plain matrices, embeddings, norms ------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_with_plain_matrices_equal_float64(path: str, dtype: torch.dtype) -> None:
    ops = Forced(path)
    for columns in (1, 7, 33, 100, 160):
        for rows in (OUTPUTS, 1):
            weight = dense(torch.randn(rows, columns).to(dtype))
            for tokens in (1, 2, 3, 4, 7):
                x = torch.randn(tokens, columns)
                assert off(ops.product(x, weight), x.double(), wide(weight)) < ROUNDING


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 16, 50])
def test_embedding_rows_are_copied_exactly(path: str, dtype: torch.dtype, hidden: int) -> None:
    weight, ids = torch.randn(11, hidden).to(dtype), torch.tensor([10, 0, 3, 3])
    assert torch.equal(Forced(path).embed(ids, weight, torch.float32), weight.float()[ids])


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 32, 50, 96])
def test_layer_norm_equals_float64(path: str, dtype: torch.dtype, hidden: int) -> None:
    gain, bias = torch.randn(hidden).to(dtype), torch.randn(hidden).to(dtype)
    for offset, eps in ((0.0, 1e-5), (30.0, 1e-12)):
        x = torch.randn(3, hidden) + offset
        expected = functional.layer_norm(x.double(), (hidden,), gain.double(), bias.double(), eps)
        found = Forced(path).final_norm(x, (gain, bias, eps))
        # Relative to the row's spread, the mean is off by a few roundings of the largest element.
        assert float((found.double() - expected).abs().max()) < 2e-6 * (1 + offset)


@here
def test_two_norms_of_one_pass_go_into_two_layouts(path: str) -> None:
    hidden, weights = 96, [random_weight(4, 32, 96), random_weight(8, 32, 96), None]
    lns = [(torch.randn(hidden), torch.randn(hidden), eps) for eps in (1e-5, 0.5, 1e-2)]
    x = torch.randn(5, hidden)
    for kind in KINDS:
        found = Forced(path, kind).layer_norms(x, lns, weights)
        for coded, (gain, bias, eps) in zip(found, lns, strict=True):
            expected = functional.layer_norm(x.double(), (hidden,), gain.double(), bias.double(), eps)
            values = decoded(coded) if isinstance(coded, PackedActivation) else coded.double()
            # int8: half a step of the row's largest element at most; float32: a few roundings
            step = (
                float(expected.abs().max()) / 127 if isinstance(coded, PackedActivation) and kind != "planar" else 0.0
            )
            assert float((values - expected).abs().max()) < step / 2 * 1.001 + 4e-6


GELU: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "erf": functional.gelu,
    "tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@here
@pytest.mark.parametrize("activation", GELU, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finishing_adds_one_row_or_one_for_each_token(path: str, activation: str | None, dtype: torch.dtype) -> None:
    ops, matrix, x = Forced(path), torch.randn(OUTPUTS, 33).half() * 0.2, torch.randn(3, 33)
    for shape in ((OUTPUTS,), (3, OUTPUTS)):
        addend = torch.randn(shape).to(dtype)
        found = plain(ops.grouped_linear([x], [dense(matrix)], [addend], [activation], [None])[0])
        expected = GELU[activation](x.double() @ matrix.double().T + addend.double())
        assert float((found.double() - expected).abs().max()) < ROUNDING  # values of order one


@here
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_finishing_writes_every_layout(path: str, kind: str, bits: int) -> None:
    ops, matrix, bias = Forced(path, kind), torch.randn(96, 33) * 0.2, torch.randn(96)
    activation = {4: "erf", 8: "tanh"}[bits]
    for tokens in (1, 5, 7):
        x = torch.randn(tokens, 33)
        (coded,) = ops.grouped_linear([x], [dense(matrix)], [bias], [activation], [random_weight(bits, 32, 96)])
        expected = GELU[activation](x.double() @ matrix.double().T + bias.double())
        step = float(expected.abs().max()) / 127 if kind != "planar" else 0.0
        assert isinstance(coded, PackedActivation)
        assert float((decoded(coded) - expected).abs().max()) < step / 2 * 1.001 + ROUNDING


@here
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_beyond_weights_and_activations_is_read(path: str, kind: str) -> None:
    """Each tensor lies between pages that may not be touched, once at either end; a child process would die of it."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    quantized = [random_weight(bits, 128, 256, scales_of(bits, 128, kind)) for bits in (4, 8)]
    if kind != "gemm":  # one row of words ends within a unit
        quantized += [random_weight(bits, 64, 192, scales_of(bits, 64, kind)) for bits in (4, 8)]
    matrix = torch.randn(OUTPUTS, 33).half()
    x, gain, ids = torch.randn(12, 256), torch.randn(256), torch.tensor([0, OUTPUTS - 1])

    def everything(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
        ops, results = Forced(path, kind), []
        for weight in quantized:
            tensors = {name: place(t) for name, t in weight.tensors.items()}
            given = place(x[:, : weight.shape[1]].contiguous())
            results.append(ops.product(given, Weight(weight.format, weight.shape, tensors)))
        results.append(ops.product(place(x[:3, :33].contiguous()), dense(place(matrix))))
        results.append(ops.embed(ids, place(matrix), torch.float32))
        results.append(ops.final_norm(place(x), (place(gain), place(gain), 1e-5)))
        return results

    expected = everything(lambda t: t)
    for at_end in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of forking with threads: they have no part
            child = os.fork()
        if not child:
            try:
                found = everything(lambda t, at_end=at_end: fenced(t, at_end))  # type: ignore[misc]
                os._exit(0 if all(map(torch.equal, found, expected)) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0  # -11 is a touched page


_fences: list[mmap.mmap] = []


def fenced(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy that begins or ends at a page which may not be touched."""
    size = -(-max(1, tensor.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + 2 * mmap.PAGESIZE)
    _fences.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (address, address + mmap.PAGESIZE + size):
        assert protect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    start = mmap.PAGESIZE + (size - tensor.nbytes if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copy.copy_(tensor)


# Functions of floats --------------------------------------------------------------------------------------------------


def elementwise(
    path: str, name: str, apply: Callable[[Code, Value], Value], lanes: int, x: Tensor, kind: Any = F32
) -> Tensor:
    """apply over x, compiled for the path: 4-byte elements from 2- or 4-byte ones, or 2-byte ones if x is a float `kind`."""

    def build(module: Any) -> None:
        code = Code(module, name, 4)
        table, start, stop, _ = code.arguments
        given, out = code.load_arguments(table, 2)
        with code.for_range(start, stop, lanes) as i:
            value = apply(code, code.load(vector(kind, lanes), given, i * (4 if kind == F32 else 2)))
            size = 2 if value.type == vector(I16, lanes) else 4
            code.store(value, out, i * size)
        code.ret()

    assert x.numel() % lanes == 0
    narrow = name.startswith("to_")
    out = torch.empty(x.numel(), dtype=torch.int16 if narrow else torch.float32)
    function = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)(compiled(name, build, target.for_path(path)))
    table = torch.tensor([x.data_ptr(), out.data_ptr()])
    function(table.data_ptr(), 0, x.numel(), 0)
    return out


def floats(low: float, high: float) -> Tensor:
    """Evenly spread floats, and powers of two down to the smallest ones of both signs, in number a multiple of 16."""
    small = torch.logspace(-44, 0, 4096)
    return torch.cat((torch.linspace(low, high, 1 << 18), small, -small, torch.zeros(16)))


LANES = [1, 16]  # the ends of rows, and all before them


@here
@pytest.mark.parametrize("lanes", LANES)
def test_exp_is_within_2e_7(path: str, lanes: int) -> None:
    x = floats(-87.0, 88.0)
    found = elementwise(path, f"exp_{lanes}", activations.exp, lanes, x)
    assert float((found.double() / x.double().exp() - 1).abs().max()) < 2e-7
    beyond = torch.tensor([-87.5, -1e5, -math.inf, 88.5, 1e5, math.inf, math.nan]).repeat(16)
    found = elementwise(path, f"exp_{lanes}", activations.exp, lanes, beyond).view(16, 7)[0].double()
    ends = torch.tensor([-87.0, 88.0]).double().exp()
    assert torch.allclose(found[:6], ends.repeat_interleave(3), rtol=2e-7) and bool(found[6].isnan())


@here
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("name", ["erf", "tanh"])
def test_gelu_is_within_its_rounding(path: str, name: str, lanes: int) -> None:
    x = floats(-30.0, 30.0)
    apply = {"erf": activations.gelu_erf, "tanh": activations.gelu_tanh}[name]
    found, exact = elementwise(path, f"gelu_{name}_{lanes}", apply, lanes, x).double(), x.double()
    if name == "erf":
        expected = exact * torch.special.erfc(-exact / math.sqrt(2)) / 2
    else:
        expected = exact * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3))
    error = (found - expected).abs()
    assert float((error / exact.abs().clamp(min=1e-30)).max()) < 3e-7  # of x, whose multiple it is
    # Where results are small they are multiples of exp(u), whose relative error is u's absolute one: u is rounded 4 or 5
    # times on its way, a constant's rounding counted too, and 8 more roundings follow.
    tail = (exact < 0) & (expected.abs() > 1e-30)
    steps = 8 + (4 * exact**2 / 2 if name == "erf" else 5 * 1.6 * (exact + 0.044715 * exact**3).abs())
    assert float((error / expected.abs() / steps)[tail].max()) < 2**-24
    ends = torch.tensor([-math.inf, math.inf, math.nan, -1e4, 1e4]).repeat(16)
    found = elementwise(path, f"gelu_{name}_{lanes}", apply, lanes, ends).view(16, 5)[0]
    assert not bool(found[0] > 0) and found[1] == math.inf and bool(found[2].isnan())
    assert abs(float(found[3])) < 1e-30 and found[4] == 1e4


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Equal bit by bit; of a NaN only that it is one, for its payload means nothing."""
    integer = torch.int16 if expected.element_size() == 2 else torch.int32
    bits = found.view(integer) == expected.view(integer)
    return bool((bits | (expected.isnan() & found.view(expected.dtype).isnan())).all())


@here
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_floats_of_16_bits_are_widened_exactly(path: str, dtype: torch.dtype, lanes: int) -> None:
    name, machine = dtype_name(dtype), target.for_path(path)
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    found = elementwise(
        path, f"from_{name}_{lanes}", lambda _, v: target.to_float(machine, v, name), lanes, every, kind=I16
    )
    assert same_bits(found, every.view(dtype).float())


@cache
def rounding_cases() -> Tensor:
    """Floats of every upper half, followed by every class of lower halves: at, around and between the ties of both types."""
    lower = [k << 13 | d for k in range(8) for d in (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF)]
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    return (upper[:, None] + torch.tensor(lower)).flatten().to(torch.int32).view(torch.float32)


@here
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_floats_are_narrowed_to_the_nearest_even(path: str, dtype: torch.dtype, lanes: int) -> None:
    name, machine = dtype_name(dtype), target.for_path(path)
    x = rounding_cases()
    found = elementwise(path, f"to_{name}_{lanes}", lambda _, v: target.from_float(machine, v, name), lanes, x)
    assert same_bits(found, x.to(dtype))


# Attention ------------------------------------------------------------------------------------------------------------

HEADS = 3
DIMS = {8: 1.0, 20: 0.3, 32: 0.25, 64: 0.25, 80: 0.25, 96: 0.25, 128: 0.5, 256: 1.0}  # head size -> rotated part
CACHED = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
# New tokens of each sequence, pass by pass: single tokens, none at all, 127, 128 and 129 in sum, more than two pages.
PASSES = [(5, 127, 1, 0), (1, 1, 0, 3), (122, 1, 130, 9), (0, 0, 1, 1), (1, 6, 2, 260)]


# Attention has no products of bytes, so paths of one vector width have the same code: avx_vnni and avx2 share the sizes. To
# smaller vectors, large heads are nothing new.
SIZES = {
    "avx512_vnni": [8, 20, 64, 96, 256],
    "avx_vnni": [32, 128],
    "avx2": [20, 96],
    "neon_dot": [8, 20, 64, 80, 96],
    "portable": [8, 20, 64, 80],
}


def cached_as(path: str, dim: int) -> torch.dtype:
    """A dtype for each size: every one with vectors of every width, and each size with another on another path."""
    return CACHED[(SIZES[path].index(dim) + PATHS.index(path) + (path == "avx2")) % 4]


def rotary_table(half: int, positions: int = 700) -> Tensor:
    angles = torch.rand(positions, half) * 6.3
    return torch.stack((angles.cos(), angles.sin()))


def rotated(x: Tensor, rotary: Tensor, positions: Tensor) -> Tensor:
    """x (tokens, heads, dim) float64 by the table's angles."""
    return reference._rotate(x.double(), *rotary.double()[:, positions].unsqueeze(2))


def attention_of(pool: PagePool, batch: Batch, qkv: Tensor, rotary: Tensor, dim: int) -> Tensor:
    """Causal attention in float64 over the keys and values that the pool holds now."""
    q = rotated(qkv.view(-1, HEADS, 3, dim)[:, :, 0], rotary, batch.positions) * dim**-0.5
    out = torch.zeros(len(qkv), HEADS, dim, dtype=torch.float64)
    for i, block_table in enumerate(batch.block_tables):
        first, last = batch.offsets[i], batch.offsets[i + 1]
        keys, values = stored(pool, block_table.pages, batch.starts[i] + last - first)
        places = batch.starts[i] + torch.arange(last - first)
        later = torch.arange(keys.shape[1]) > places[:, None]
        scores = torch.einsum("thd,hkd->htk", q[first:last], keys).masked_fill(later, -math.inf)
        out[first:last] = torch.einsum("htk,hkd->thd", scores.softmax(-1), values)
    return out.flatten(1)


def stored(pool: PagePool, pages: Sequence[int], length: int) -> Tensor:
    """Keys and values (2, heads, length, dim) float64."""
    numbers = list(pages[: -(-length // PAGE)])
    found = pool.storage[0][numbers].double()
    if pool.scales:
        found = found * pool.scales[0][numbers].double().unsqueeze(-1)
    return found.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]


def fresh_pool(dim: int, dtype: torch.dtype) -> PagePool:
    """Pages full of NaN, or of codes whose scale is NaN."""
    pool = PagePool(HEADS, dim, dtype, [torch.device("cpu")], pages=16)
    for tensor in (*pool.storage, *pool.scales):
        tensor.fill_(math.nan if tensor.is_floating_point() else 127)
    return pool


def worst_attention(path: str, dim: int, dtype: torch.dtype) -> float:
    """Runs PASSES beside the reference; asserts what is stored, and returns the worst error of a result.

    Errors are relative to the largest value: a result is a mean of values, weighted by exp(score).
    """
    ops, rotary, worst = Forced(path), rotary_table(int(dim * DIMS[dim]) // 2), 0.0
    pools = fresh_pool(dim, dtype), fresh_pool(dim, dtype)
    rows = [[pool.new() for _ in PASSES[0]] for pool in pools]
    for counts in PASSES:
        if counts is PASSES[-1]:  # the last sequence goes on as a fork of the first, on pages that both share
            for pool, block_tables in zip(pools, rows, strict=True):
                block_tables[3] = pool.fork(block_tables[0])
        ours, theirs = (Batch.reserve(pool, s, counts) for pool, s in zip(pools, rows, strict=True))
        qkv = torch.randn(sum(counts), HEADS * 3 * dim)
        found = plain(ops.attention(qkv, pools[0], 0, ours, rotary, None))
        reference.attention(qkv.clone(), pools[1], 0, theirs, rotary, None)
        ours.commit()
        theirs.commit()
        values = max(float(stored(pools[0], s.pages, s.length)[1].abs().max()) for s in rows[0] if s.length)
        expected = attention_of(pools[0], ours, qkv, rotary, dim)
        worst = max(worst, largest((found.double() - expected) / values))
        assert_stored_alike(pools, rows)
    return worst


def assert_stored_alike(pools: tuple[PagePool, PagePool], rows: list[list[Any]]) -> None:
    """What the two pools hold differs by the rounding of the rotation: at most a step of the dtype, and seldom."""
    for a, b in zip(*rows, strict=True):
        if not a.length:
            continue
        mine, theirs = (stored(pool, s.pages, s.length) for pool, s in zip(pools, (a, b), strict=True))
        if pools[0].dtype == torch.int8:
            step = theirs.abs().amax(-1, keepdim=True) / 127 * 1.002  # a code; its scale is rounded to float16
        else:
            step = (
                theirs.abs().clamp(min=0.1)
                * torch.finfo(pools[0].dtype).eps
                * (4 if pools[0].dtype == torch.float32 else 1)
            )
        assert bool(((mine - theirs).abs() <= step).all())
        if pools[0].dtype != torch.float32:
            assert float((mine != theirs).double().mean()) < 0.01


@pytest.mark.parametrize("path, dim", [on(path, dim) for path, dims in SIZES.items() for dim in dims])
def test_attention_equals_float64_over_pages_and_forks(path: str, dim: int) -> None:
    # Scores of order 5 are rounded to 24 bits, so their exp is off by up to 5e-7 of itself; a mean of values by no more.
    assert worst_attention(path, dim, cached_as(path, dim)) < 1e-6


@here
def test_attention_survives_large_scores_and_many_equal_ones(path: str) -> None:
    dim = SIZES[path][-1]  # compiled for the test above
    ops, pool, rotary = Forced(path), fresh_pool(dim, cached_as(path, dim)), rotary_table(8)
    block_tables = [pool.new(), pool.new()]
    batch = Batch.reserve(pool, block_tables, (40, 3))
    qkv = torch.randn(43, HEADS, 3, dim)
    qkv[:40, :, :2] *= 60.0  # scores of some 10,000s
    qkv[40:, :, 1] = 0.0  # all scores zero
    qkv = qkv.view(43, -1)
    found = plain(ops.attention(qkv, pool, 0, batch, rotary, None))
    batch.commit()
    expected = attention_of(pool, batch, qkv, rotary, dim)
    # Scores are rounded to 24 bits: at 30,000 by some 0.002, and exp of them by as much, where two keys are that close.
    assert float((found[:40].double() - expected[:40]).abs().max()) < 0.02
    assert float((found[40:].double() - expected[40:]).abs().max()) < 3e-6


# Assembly: also of instruction sets that this machine lacks -----------------------------------------------------------


def kernels(machine: target.Target) -> list[tuple[str, linear.BuildKernel]]:
    """A kernel of every kind, but those that call others by address."""
    formats = [linear.PackedFormat(4, 128, "float16"), linear.PackedFormat(8, 32, "bfloat16")]
    return [
        *(gemv.write_gemv(machine, w, exact, True) for w in formats for exact in (False, True)),
        *(
            gemm.write_gemm(machine, linear.PackedFormat(bits, 32, "float16"), many)
            for bits, many in ((4, True), (8, False))
        ),
        gemv.write_dense(machine, "float16"),
        linear.write_epilogue(machine, ["float16", "float32"], "erf", Layout("gemv", 4, 8)),
        linear.write_epilogue(machine, ["bfloat16"], "tanh", NATURAL),
        norm.write_layer_norms(machine, [Layout("gemm", 8), Layout("planar", 4)], ["float16", "float32"]),
        norm.write_embed(machine, "float16"),
        attention.write_attention(machine, attention.HeadShape(20, 6, "int8")),
        ("precomputed", linear.write_precomputed),
    ]


@cache
def listings(path: str, triple: str | None = None) -> dict[str, str]:
    """Assembly of every kernel."""
    machine = target.generic(path, triple)
    return {name: assembly(build, machine) for name, build in kernels(machine)}


def instructions(listing: str) -> list[str]:
    """Lines that are instructions, without labels, directives and comments."""
    lines = (line.split("#")[0].split("//")[0].strip() for line in listing.splitlines())
    return [line for line in lines if line and not line.startswith(".") and not line.endswith(":")]


def loops(listing: str) -> list[list[str]]:
    """The innermost loops: what lies between a label and a jump back to it, with no label in between."""
    found: list[list[str]] = []
    label = ""
    body: list[str] = []
    for line in listing.splitlines():
        if match := re.match(r"(\.?L\w+):", line):
            label, body = match[1], []
        elif line.startswith("\t") and not line.startswith("\t."):
            body = [*body, line.strip()]
            if re.match(rf"\s+(j\w+|b\.\w+|cbn?z\s.*,|tbn?z\s.*,)\s*{re.escape(label)}\s*$", line):
                found.append(body)
    return found


def calls(listing: str) -> list[str]:
    return [line for line in instructions(listing) if re.match(r"(call\w*|bl|blr)\s", line)]


# What sums products of bytes; the portable path is left to LLVM.
MULTIPLIERS = {
    "avx512_vnni": r"vpdpbusd\s.*%zmm",
    "avx_vnni": r"\{vex\}\s*vpdpbusd\s.*%ymm",
    "avx2": r"vpmaddubsw\s.*%ymm",
    "neon_dot": r"sdot\s+v\d+\.4s",
}


@pytest.mark.parametrize("path", PATHS)
def test_products_of_bytes_use_the_instruction_of_their_path_and_no_other_s(path: str) -> None:
    of_bytes = {n: text for n, text in listings(path).items() if n.startswith(("gemv_int8", "gemm"))}
    assert len(of_bytes) == 4
    for name, listing in of_bytes.items():
        used = [p for p, wanted in MULTIPLIERS.items() if any(re.match(wanted, x) for x in instructions(listing))]
        assert used == ([] if path == "portable" else [path]), name


@pytest.mark.parametrize("path", PATHS)
def test_every_kernel_compiles_for_every_path_and_calls_no_function(path: str) -> None:
    """Of the C library such as fmaf, or of compilers such as __extendhfsf2: the code is linked with neither."""
    for name, listing in listings(path).items():
        assert calls(listing) == [], name


@pytest.mark.parametrize("triple", ["aarch64-unknown-linux-gnu", "riscv64-unknown-linux-gnu"])
def test_the_portable_path_compiles_for_other_processors(triple: str) -> None:
    for name, listing in listings("portable", triple).items():
        assert name in listing
        if not triple.startswith("riscv"):  # LLVM's plainest one has no floating point: there functions stand for it
            assert calls(listing) == [], name


@pytest.mark.parametrize("path", ["avx_vnni", "avx2"])
def test_paths_for_processors_without_avx512_use_none_of_it(path: str) -> None:
    for name, listing in listings(path).items():
        for line in instructions(listing):
            assert not re.search(r"%zmm|%k\d|%[xy]mm(1[6-9]|2\d|3[01])|\{evex\}", line), (name, line)
            assert not line.startswith("vpdpbusd"), (name, line)  # without {vex} it is AVX-512's


def test_the_portable_path_needs_no_more_than_sse2() -> None:
    beyond = r"v\w+\s|p(shufb|maddubsw|abs\w|mov[sz]x\w+|mulld|m(ax|in)s[bd])\s|(round|blend|dp|insert)p?\w+\s"
    for name, listing in listings("portable").items():
        for line in instructions(listing):
            assert "%ymm" not in line and not re.match(beyond, line), (name, line)


@cache
def decode_loops(path: str, bits: int, exact: bool = False) -> list[list[str]]:
    """The loops over the units of a row, for two tokens and for one; LLVM may have made several of one."""
    machine = target.generic(path)
    _, build = gemv.write_gemv(machine, linear.PackedFormat(bits, 128, "float16"), exact, False)
    found = [body for body in loops(assembly(build, machine)) if any("prefetch" in x or "prfm" in x for x in body)]
    assert len(found) >= 2
    return found


@pytest.mark.parametrize("bits, loads", [(4, 1), (8, 2)])
def test_decoding_on_avx512_reads_a_unit_of_weights_with_full_width_loads(bits: int, loads: int) -> None:
    for body in decode_loops("avx512_vnni", bits):
        products = [x for x in body if x.startswith("vpdpbusd")]
        tokens = len(products) // 2
        assert len(products) == 2 * tokens and tokens in (1, 2)
        full = [x for x in body if re.match(r"v\w+\s.*\(.*\).*%zmm", x) and "vbroadcast" not in x]
        assert len(full) == loads + 2 * tokens  # the weights once, and two vectors of each token's activations
        assert sum("prefetch" in x for x in body) == loads


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "path, exact",
    [*((p, False) for p in PATHS if p != "portable"), ("avx512_vnni", True)],  # others have too few registers
    ids=str,
)
def test_decoding_spills_no_vector(path: str, exact: bool, bits: int) -> None:
    stack = r"(str|ldr|stp|ldp)\s+q.*\[sp" if path == "neon_dot" else r"v?mov\w+\s.*%[xyz]mm\d+, .*\(%r[sb]p\)"
    for body in decode_loops(path, bits, exact):
        assert not [x for x in body if re.match(stack, x)]


# Choosing a path ------------------------------------------------------------------------------------------------------


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script]
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "quant", ROOT / "app")))}
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**known, **environment})


def test_the_fastest_path_is_taken() -> None:
    assert target.why_not(target.fastest()) is None
    assert all(target.why_not(p) for p in PATHS[: PATHS.index(target.fastest())])
    assert target.for_path(target.fastest()).path == target.fastest()


def test_neox_lite_cpu_forces_a_path() -> None:
    script = "from neox_lite.kernels import cpu; import torch; print(cpu.bind(False).target.path)"
    assert run_python(script, NEOX_LITE_CPU="portable").stdout == "portable\n"


@pytest.mark.parametrize("path", ["avx1024", *[p for p in PATHS if target.why_not(p)]])
def test_a_path_that_is_unknown_or_not_here_is_one_clear_line(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEOX_LITE_CPU", path)
    with pytest.raises(ArgumentError, match=f"^NEOX_LITE_CPU={path}: [^\n]+$") as error:
        target.host.__wrapped__()
    assert ("expected one of" in str(error.value)) == (path not in PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_a_processor_that_lacks_a_path_is_told_what_is_missing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"neon_dot": "aarch64"}.get(path, "x86_64")
    monkeypatch.setattr(target.platform, "machine", lambda: machine)
    monkeypatch.setattr(target.llvm, "get_host_cpu_features", dict)
    reason = target.why_not(path)
    assert reason is None if path == "portable" else reason is not None and reason.startswith("the processor lacks ")
    monkeypatch.setattr(target.platform, "machine", lambda: "riscv64")
    reason = target.why_not(path)
    assert reason is None if path == "portable" else reason is not None and "this is riscv64" in reason
