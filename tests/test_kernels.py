"""The contract of a backend: every operation beside float64, over backends, formats and the shapes that matter.

A row of a table is a backend with the kernel that it is made to use, a format, dtypes and shapes. What a backend has to itself
(generated code, threads, launches, captured passes) is tested in test_cpu_*.py and test_triton_*.py. Inputs are judged as they
were laid out, codes too, so that only an operation's own rounding counts; what int8 activations cost a model is in
test_cpu_backend.py. Without a GPU, Triton's kernels run in its interpreter, slowly: their shapes are small.
"""

import math

import pytest
import torch
from support.backends import (
    ACTIVATIONS,
    AMPERE,
    DTYPES,
    EVERY,
    IN_GROUPS,
    IN_LAYOUTS,
    ON_PATHS,
    OTHERS,
    PLAIN,
    TURING,
    Cpu,
    Triton,
    attended,
    cached,
    cases,
    dtype_of,
    error,
    error_of_sum,
    exact,
    fresh_pool,
    gaussian_weight,
    largest,
    layer_norm,
    of_codes,
    random_weight,
    rotary_table,
)
from support.models import INT4, MODELS, prefill_and_decode, tiny_model

from neox_lite.cache import Batch
from neox_lite.formats import DENSE, FORMATS, GroupInt, make_format
from neox_lite.kernels import nf4, reference, triton
from neox_lite.kernels.cpu.activations import UNIT
from neox_lite.kernels.cpu.operations import MIN_WIDE_GEMM_TOKENS
from neox_lite.kernels.cpu.target import PATHS
from neox_lite_app.commands import QUANTIZED

pytestmark = pytest.mark.usefixtures("guarded_memory")
FLOAT16, BFLOAT16, FLOAT32 = DTYPES
# A sum of up to some 100 float32 products on each lane, then across lanes: every addition is off by at most 6e-8 of the
# partial sum, at random. The worst of a few thousand outputs stays below 25 such steps, relative to the rms of a sum.
ROUNDING = 3e-6
# Triton's programs add up in trees.
TREES = 2e-6
# Sums of four products rounded to halves, in the interpreter after every step.
HALVES = 3e-3
# Of weights or results, in a dtype; the interpreter cuts bfloat16 off, twice the error of rounding.
ROUNDED = {FLOAT32: TREES, FLOAT16: 2e-3, BFLOAT16: 1.5e-2}
# Sums of float32 in another order, through a layer or some, relative to the root mean square.
EQUAL = 1.5e-5


@pytest.fixture(autouse=True)
def in_small_pieces(monkeypatch):
    """What is done a part at a time needs several parts."""
    monkeypatch.setattr(reference, "DECODED_ELEMENTS", 50 * 128)
    monkeypatch.setattr(reference, "SCORE_ELEMENTS", 1000)
    monkeypatch.setitem(nf4.SLICE_ELEMENTS, "cpu", 50 * 128)


# Products -------------------------------------------------------------------------------------------------------------

OUTPUTS = 70  # to the CPU's kernels two blocks of 32 and a part of one
# One and two at a time; a tile less than half full, more, and full; a second tile, a third. The last ones are many, for which
# tiles have a kernel of their own.
TOKENS = (1, 2, 3, 5, 12, 13, 25, 31, 36)
FEW = tuple(n for n in TOKENS if n < MIN_WIDE_GEMM_TOKENS)
# One tile; tails of rows and 2**n + 2**m columns; few rows, a large odd multiple.
TILES = [(64, 128), (70, 1152), (9, 2560)]


def columns_of(kind, group):
    """Sizes that exercise a layout: for rows and planes whole units of 128, only a tail, and both; for tiles, more words
    and more groups than a transposed square, and fewer."""
    if kind == "gemm":
        return [17 * group, group]
    return [3 * UNIT] if group == UNIT else [3 * UNIT, group, 3 * UNIT + (UNIT - group)]


def products():
    """Backends, formats, dtypes of weights and of inputs, numbers of tokens, shapes, and the largest error."""
    for kernels in PLAIN:
        for format, dtypes in [*((f, DTYPES[:1]) for f in IN_GROUPS + OTHERS), (DENSE, DTYPES)]:
            for dtype in dtypes:
                yield kernels, format, (dtype, FLOAT32), (1, 5, 70), [(OUTPUTS, 256), (1, 128)], ROUNDING
    for kernels in IN_LAYOUTS:
        for format in IN_GROUPS:
            # With float32 activations avx_vnni has avx2's code; groups of 64 are to tiles what 32 and 128 are.
            same = (kernels.path, kernels.kind) == ("avx_vnni", "planar")
            same |= (kernels.kind, format.group_size) == ("gemm", 64) and kernels.path != "avx512_vnni"
            shapes = [(rows, n) for n in columns_of(kernels.kind, format.group_size) for rows in (OUTPUTS, 1)]
            given = kernels, format, (dtype_of(format, kernels.kind), FLOAT32)
            if not same:
                yield *given, FEW, shapes, ROUNDING
            if kernels.kind == "gemm" and format in (GroupInt(4, 128), GroupInt(8, 32)):
                yield *given, tuple(n for n in TOKENS if n not in FEW), shapes, ROUNDING
    for kernels in ON_PATHS:
        for dtype in DTYPES:
            shapes = [(rows, columns) for columns in (1, 7, 33, 100, 160) for rows in (OUTPUTS, 1)]
            yield kernels, DENSE, (dtype, FLOAT32), (1, 2, 3, 4, 7), shapes, ROUNDING
    halves, gemv, gemm = (Triton(kind=kind) for kind in ("half2", "gemv", "gemm"))
    for format in IN_GROUPS:
        yield gemv, format, (FLOAT16, FLOAT32), (1, 2), TILES, TREES
        if format.bits == 4:
            yield halves, format, (FLOAT16,), (1,), TILES, HALVES
        for dtype in (FLOAT16, BFLOAT16):
            yield gemm, format, (dtype,), (3, 40), [(OUTPUTS, 1152)], ROUNDED[dtype]
        for dtype in DTYPES if format.group_size == 64 else ():  # exact: nothing is lost whatever the dtype of inputs
            yield Triton(exact=True, kind="gemv"), format, (dtype,), (2,), [(40, 512)], TREES
    yield gemm, INT4, (FLOAT16,), (16, 17, 64, 65, 256), [(64, 96)], ROUNDED[FLOAT16]
    # Without tensor cores the first kernel serves more tokens.
    yield Triton(capability=(7, 5), kind="half2"), INT4, (FLOAT16,), (3, 4, 5, 8, 11, 32), [(20, 96)], HALVES
    yield Triton(capability=(7, 5), kind="torch"), INT4, (FLOAT16,), (33,), [(20, 96)], ROUNDED[FLOAT16]
    for dtype in DTYPES:
        yield gemv, DENSE, (dtype,), (2,), [(37, 256), (37, 1000)], TREES
    for kernels in (Cpu(path="portable"), Triton(kind="torch")):
        for format in OTHERS:
            yield kernels, format, (FLOAT16, FLOAT32), (1, 2, 70), [(192, 128)], ROUNDING


@cases("kernels, format, dtypes, tokens, shapes, bound", products())
def test_products_equal_float64(kernels, format, dtypes, tokens, shapes, bound):
    for rows, columns in shapes:
        weight, x = random_weight(format, rows, columns, dtypes[0]), torch.randn(max(tokens), columns).to(dtypes[-1])
        if len(x) > 1:
            x[0, :32] = 0.0  # a block of scale 0
        for count in tokens if rows > 1 else (tokens[0], tokens[-1]):
            given, value = kernels.reads(x[-count:], weight)
            assert error_of_sum(kernels.product(given, weight), value, exact(weight)) < bound


SMALL = [*IN_LAYOUTS, TURING, *PLAIN]


@cases("kernels", SMALL)
@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_extreme_codes_and_activations_do_not_saturate(kernels, bits):
    top, columns, kind = 1 << (bits - 1), 256, getattr(kernels, "kind", None)
    turns = torch.tensor([1, -1]).repeat(columns // 2)
    lowest, highest = torch.full((columns,), -top), torch.full((columns,), top - 1)
    codes = torch.stack([lowest, highest, torch.where(turns > 0, lowest, highest), torch.zeros(columns)])
    format = GroupInt(bits, UNIT)
    scale = torch.tensor([0.5, -0.25]).repeat(4, 1)  # powers of two: exact in any dtype
    weight = of_codes(format, codes.to(torch.int8), scale.to(dtype_of(format, kind)))
    signs = torch.stack([turns.abs(), -turns.abs(), turns, turns.view(-1, 2).flip(1).flatten()])
    x = (signs * 127.0).repeat(2, 1)
    given, value = kernels.reads(x, weight)
    assert torch.equal(value, x.double())  # codes are 127 and -127, scales 1
    assert torch.equal(kernels.product(given, weight).double(), x.double() @ exact(weight).T)  # whole, below 2**24


@cases("kernels", SMALL)
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_finite_spoils_its_own_token_alone_and_zeros_give_zero(kernels, bits):
    format = GroupInt(bits, UNIT)
    weight = random_weight(format, OUTPUTS, 256, dtype_of(format, getattr(kernels, "kind", None)))
    x = torch.randn(5, 256)
    expected = kernels.product(x, weight)
    for bad in (math.nan, math.inf, -math.inf):
        spoiled = x.clone()
        spoiled[1, 0] = spoiled[3, 201] = bad
        found = kernels.product(spoiled, weight)
        assert not bool(found[[1, 3]].isfinite().any())
        assert torch.equal(found[[0, 2, 4]], expected[[0, 2, 4]])
    zeros = torch.zeros(3, 256)
    zeros[1] = -0.0
    assert not bool(kernels.product(zeros, weight).any())


def sums():
    """Backends, formats and columns of the products, the dtype, numbers of tokens, how many addends, and the largest error."""
    mixed = [(GroupInt(4, 128), 384), (GroupInt(8, 128), 256), (DENSE, 33)]
    for kernels in (*ON_PATHS, *PLAIN):
        yield kernels, mixed, FLOAT32, (1, 2, 3), 1, ROUNDING
    for number, kind in enumerate(("gemv", "gemm", "torch")):
        tokens, bound = [(1, 2), (20,), (300,)][number], 1.5 * ROUNDED[FLOAT16]  # of two products
        yield Triton(kind="half2" if kind == "gemv" else kind), [(INT4, 96), (INT4, 160)], FLOAT16, tokens, 2, bound
        eight = GroupInt(8, 32)
        yield Triton(kind=kind), [(eight, 96), (eight, 160)], FLOAT16, tokens, 2, bound
    yield AMPERE, [(INT4, 96), (GroupInt(8, 32), 64)], FLOAT16, (1, 20, 300), 2, 1.5 * ROUNDED[FLOAT16]
    yield AMPERE, [(DENSE, 16)] * 3, FLOAT32, (2,), 5, TREES


@cases("kernels, products, dtype, tokens, addends, bound", sums())
def test_products_addends_and_the_residual_are_one_sum_as_in_float64(kernels, products, dtype, tokens, addends, bound):
    weights = [gaussian_weight(format, OUTPUTS, columns) for format, columns in products]
    for count in tokens:
        read = [kernels.reads(torch.randn(count, w.shape[1]).to(dtype), w) for w in weights]
        more = [torch.randn(OUTPUTS).half() if i % 2 == 0 else torch.randn(count, OUTPUTS) for i in range(addends)]
        residual = torch.randn(count, OUTPUTS).to(dtype)
        found = kernels.sum([given for given, _ in read], weights, [*more, None], residual)
        others = sum((a.double() for a in more), residual.double())
        given, matrix = torch.cat([value for _, value in read], dim=1), torch.cat([exact(w) for w in weights], dim=1)
        assert error_of_sum(found, given, matrix, others) < bound


FINISHED = [
    *((kernels, DENSE, dtype, (3,), ROUNDING) for kernels in (*ON_PATHS, *PLAIN) for dtype in DTYPES),
    *(
        (Triton(kind=kind), INT4, FLOAT16, (n,), ROUNDED[FLOAT16])
        for kind, n in {"half2": 1, "gemm": 20, "torch": 300}.items()
    ),
]


@cases("kernels, format, dtype, tokens, bound", FINISHED)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_an_addend_and_then_an_activation_end_a_product_as_in_float64(
    kernels, format, dtype, tokens, bound, activation
):
    columns, inputs = (33, FLOAT32) if format == DENSE else (96, FLOAT16)
    weight, x = gaussian_weight(format, OUTPUTS, columns), 3 * torch.randn(*tokens, columns).to(inputs)
    for shape in ((OUTPUTS,), (*tokens, OUTPUTS)):
        addend, (given, value) = torch.randn(shape).to(dtype), kernels.reads(x, weight)
        truth = ACTIVATIONS[activation](value @ exact(weight).T + addend.double())
        assert error(kernels.product(given, weight, [addend], activation), truth) < bound


# Layouts --------------------------------------------------------------------------------------------------------------


def near(kernels, found, truth, bound):
    """Whether a laid out activation is as near as a step of its codes and the rounding of what was laid out allow."""
    return error(kernels.natural(found), truth, 1.0) < kernels.step * largest(truth) / 2 * 1.001 + bound


LAID_OUT = [
    *((kernels, FLOAT32, (1, 5, 7), ROUNDING) for kernels in (*IN_LAYOUTS, *PLAIN)),
    (AMPERE, FLOAT16, (1, 3, 300), 2 * ROUNDED[FLOAT16]),
]


@cases("kernels, dtype, tokens, bound", LAID_OUT)
@pytest.mark.parametrize("bits", [4, 8])
def test_results_lie_as_the_next_weight_reads_them(kernels, dtype, tokens, bound, bits):
    first, second = random_weight(INT4, 96, 64), random_weight(GroupInt(8, 32), 160, 64)
    third, activation, bias = random_weight(GroupInt(bits, 32), 10, 160), {4: "erf", 8: "tanh"}[bits], torch.randn(160)
    for count in tokens:
        x = torch.randn(count, 64).to(dtype)
        (one, x_one), (two, x_two) = (kernels.reads(x, w) for w in (first, second))
        given = [one, two], [first, second], [None, bias], [None, activation], [None, third]
        plain, laid = kernels.call("grouped_linear", *given)
        assert error_of_sum(kernels.natural(plain), x_one, exact(first)) < bound
        truth = ACTIVATIONS[activation](x_two @ exact(second).T + bias.double())
        assert near(kernels, laid, truth, bound)
        after = kernels.reads(kernels.natural(laid).to(dtype), third)[0]
        assert getattr(laid, "layout", None) == getattr(after, "layout", None)


@cases("kernels", SMALL)
def test_norms_of_one_pass_go_into_several_layouts(kernels):
    weights = [random_weight(INT4, 8, 96), random_weight(GroupInt(8, 32), 8, 96), None]
    norms = [(torch.randn(96), torch.randn(96), eps) for eps in (1e-5, 0.5, 1e-2)]
    x = torch.randn(5, 96)
    found = kernels.call("layer_norms", x, norms, weights)
    assert all(near(kernels, y, layer_norm(x, norm), 4e-6) for y, norm in zip(found, norms, strict=True))
    assert error(found[2], layer_norm(x, norms[2]), 1.0) < 4e-6  # in no layout, so no code


@cases("kernels", SMALL)
def test_attention_writes_where_the_next_weight_reads(kernels):
    dim, rotary, weight = 80, rotary_table(20), random_weight(INT4, 8, 160)
    for held, counts in (([0, 0], [6, 3]), ([150, 3], [1, 1])):
        results = []
        for next_weight in (weight, None):
            torch.manual_seed(2)
            pool, block_tables = started(kernels, 2, dim, FLOAT32, held)
            batch = Batch.reserve(pool, block_tables, counts)
            qkv = torch.randn(sum(counts), 6 * dim)
            results.append(kernels.call("attention", qkv, pool, 0, batch, rotary, next_weight))
        assert near(kernels, results[0], kernels.natural(results[1]), 1e-30)


# Embedding, norms, head -----------------------------------------------------------------------------------------------


@cases("kernels", [*ON_PATHS, AMPERE, *PLAIN])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_rows_are_copied_exactly(kernels, dtype):
    for hidden in (1, 16, 50):
        weight, ids = torch.randn(11, hidden).to(dtype), torch.tensor([10, 0, 3, 3])
        assert torch.equal(kernels.call("embed", ids, weight, torch.float32).cpu(), weight.float()[ids])


# Relative to a row's spread, the mean is off by a few roundings of the largest element: float32 at 100 is 1e-5 apart.
NEAR_ZERO, FAR = [(0.0, 1e-5, 2e-6), (30.0, 1e-12, 6e-5)], [(100.0, 1e-5, 3e-5), (100.0, 1e-2, 3e-5)]
NORMS = [
    *((kernels, (dtype, FLOAT32), (1, 32, 50, 96), NEAR_ZERO) for kernels in (*ON_PATHS, *PLAIN) for dtype in DTYPES),
    (AMPERE, (FLOAT32,), (64, 96, 1000), FAR),
    (AMPERE, (FLOAT16,), (64, 96, 1000), [(*row[:2], 2.8e-3) for row in FAR]),  # results of up to 8, rounded
]


@cases("kernels, dtypes, sizes, shifts", NORMS)
def test_norms_equal_float64(kernels, dtypes, sizes, shifts):
    for hidden in sizes:
        for shift, eps, bound in shifts:
            x = (torch.randn(3, hidden) + shift * torch.tensor([[1.0], [-1.0], [0.3]])).to(dtypes[-1])
            norms = [(torch.randn(hidden).to(dtypes[0]), torch.randn(hidden).to(dtypes[0]), e) for e in (eps, 1e-3)]
            found = [*kernels.call("layer_norms", x, norms, [None, None]), kernels.call("final_norm", x, norms[0])]
            for y, norm in zip(found, [*norms, norms[0]], strict=True):
                assert error(y, layer_norm(x, norm), 1.0) < bound


@cases("kernels", [*(k for k in IN_LAYOUTS if k.kind == "planar"), AMPERE, TURING, *PLAIN])
@pytest.mark.parametrize("format", [DENSE, INT4, GroupInt(8, 32)], ids=["dense", "int4", "int8"])
def test_the_head_equals_float64_in_all_rows_and_in_chosen_ones(kernels, format):
    weight, norm, x = random_weight(format, OUTPUTS, 96), (torch.randn(96), torch.randn(96), 1e-5), torch.randn(5, 96)
    for rows in (None, torch.tensor([4, 0]), torch.tensor([2])):
        chosen = layer_norm(x if rows is None else x[rows], norm)
        found = kernels.call("head", x, rows, norm, weight)
        assert found.dtype == FLOAT32 and error_of_sum(found, chosen, exact(weight)) < 2 * ROUNDING


@cases("kernels", [AMPERE, TURING, *PLAIN])
def test_no_tokens_are_no_work(kernels):
    weight, x = random_weight(INT4, 24, 64), torch.randn(0, 64).half()
    norm = torch.ones(64), torch.zeros(64), 1e-5
    (normed,) = kernels.call("layer_norms", x, [norm], [weight])
    (out,) = kernels.call("grouped_linear", [normed], [weight], [None], [None], [None])
    assert out.shape == (0, 24) and kernels.call("head", x, None, norm, weight).shape == (0, 24)


# Attention ------------------------------------------------------------------------------------------------------------

# New tokens of each sequence, pass by pass: single tokens, none at all, 127, 128 and 129 in sum, more than two pages. In the
# last pass, the last sequence goes on as a fork of the first, on pages that both share.
PASSES = [(5, 127, 1, 0), (1, 1, 0, 3), (122, 1, 130, 9), (0, 0, 1, 1), (1, 6, 2, 260)]
# The same for an interpreter: over a page's end, one token alone, none.
HELD, STEPS = (126, 0, 150), [(3, 2, 0), (1, 1, 1), (0, 1, 1), (1, 20, 2)]
# Head size -> rotated part.
DIMS = {8: 1.0, 20: 0.3, 32: 0.25, 64: 0.25, 80: 0.25, 96: 0.25, 128: 0.5, 256: 1.0}
# The CPU's attention has no products of bytes, so paths of one vector width have the same code: avx_vnni and avx2 share the
# sizes. To smaller vectors, large heads are nothing new.
SIZES = {
    "avx512_vnni": [8, 20, 64, 96, 256],
    "avx_vnni": [32, 128],
    "avx2": [20, 96],
    "neon_dot": [8, 20, 64, 80, 96],
    "portable": [8, 20, 64, 80],
}
# Scores of order 5 are rounded to 24 bits, so their exp is off by up to 5e-7 of itself; a mean of values by no more.
OF_SCORES = 1e-6


def cached_as(path, dim):
    """A dtype for each size: every one with vectors of every width, and each size with another on another path."""
    dtypes = [FLOAT32, FLOAT16, BFLOAT16, torch.int8]
    return dtypes[(SIZES[path].index(dim) + PATHS.index(path) + (path == "avx2")) % 4]


def attentions():
    """Backends, head sizes and their rotated parts, dtypes of the cache and of inputs, tokens held and new, largest error."""
    for kernels in ON_PATHS:
        for dim in SIZES[kernels.path]:
            yield kernels, dim, DIMS[dim], (cached_as(kernels.path, dim), FLOAT32), (0,) * 4, PASSES, OF_SCORES
    for kernels in PLAIN:
        yield kernels, 20, DIMS[20], (FLOAT32,), (0,) * 4, PASSES, OF_SCORES
    for dim, part in ((32, 0.5), (40, 0.25), (64, 0.25), (80, 1.0), (96, 0.25), (128, 1.0), (256, 0.25)):
        for cache in (FLOAT32, torch.int8):
            yield AMPERE, dim, part, (cache, FLOAT32), HELD, STEPS, OF_SCORES
    for dtype, bound in ((FLOAT16, 5e-4), (BFLOAT16, 1e-2)):
        for cache in (dtype, torch.int8):
            yield AMPERE, 96, 0.25, (cache, dtype), HELD, STEPS, bound
    for kernels in (AMPERE, TURING):  # blocks of queries cover every token once
        yield kernels, 32, 1.0, (FLOAT32,), HELD, [(1, 67, 0)], OF_SCORES


def started(kernels, heads, dim, dtype, held, device=None):
    """A pool, and sequences that hold so many random tokens each."""
    pool = fresh_pool(heads, dim, dtype, device or kernels.device)
    block_tables = [pool.new() for _ in held]
    batch = Batch.reserve(pool, block_tables, held)
    pool.write(0, batch, *torch.randn(2, sum(held), heads, dim).to(pool.storage[0].device))
    batch.commit()
    return pool, block_tables


@cases("kernels, dim, part, dtypes, held, passes, bound", attentions())
def test_attention_equals_float64_over_pages_and_forks(kernels, dim, part, dtypes, held, passes, bound):
    """The reference runs beside it, and stores the same keys and values. Errors are relative to the largest value."""
    heads, rotary = 2 if held[0] else 3, rotary_table(int(dim * part) // 2)
    pools, rows = [], []
    for device in (None, "cpu"):
        torch.manual_seed(1)
        pool, block_tables = started(kernels, heads, dim, dtypes[0], held, device)
        pools.append(pool)
        rows.append(block_tables)
    for counts in passes:
        if counts is passes[-1]:
            for pool, block_tables in zip(pools, rows, strict=True):
                block_tables[-1] = pool.fork(block_tables[0])
        ours, theirs = (Batch.reserve(pool, s, counts) for pool, s in zip(pools, rows, strict=True))
        qkv = torch.randn(sum(counts), heads * 3 * dim).to(dtypes[-1])
        found = kernels.call("attention", qkv, pools[0], 0, ours, rotary, None)
        reference.attention(qkv.float(), pools[1], 0, theirs, rotary, None)
        ours.commit()
        theirs.commit()
        largest_value = max(largest(cached(pools[0], s, s.length)[1]) for s in rows[0] if s.length)
        assert error(found, attended(pools[0], ours, qkv, rotary), largest_value) < bound
        assert_stored_alike(kernels, pools, rows, dtypes)


def assert_stored_alike(kernels, pools, rows, dtypes):
    """What the two pools hold differs by the rounding of the rotation: at most a step of the dtype, and seldom."""
    interpreted = kernels.name == "triton" and triton.interpreted()
    for mine, theirs in zip(*((*pool.storage, *pool.scales) for pool in pools), strict=True):
        assert torch.equal(mine.isnan().cpu(), theirs.isnan())  # nothing is written elsewhere
        if not mine.is_floating_point():
            assert int((mine.cpu().short() - theirs.short()).abs().max()) <= 1
        elif interpreted and dtypes == (FLOAT32,):
            assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))
    for a, b in zip(*rows, strict=True):
        if not a.length:
            continue
        mine, theirs = (cached(pool, s, s.length) for pool, s in zip(pools, (a, b), strict=True))
        if dtypes[0] == torch.int8:
            step = theirs.abs().amax(-1, keepdim=True) / 127 * 1.002  # a code; its scale is rounded to float16
        else:
            step = theirs.abs().clamp(min=0.1) * torch.finfo(dtypes[0]).eps * (4 if dtypes[0] == FLOAT32 else 1)
        assert bool(((mine - theirs).abs() <= step).all())
        if dtypes[0] != FLOAT32 and not (interpreted and dtypes[0] == BFLOAT16):  # the interpreter cuts it off
            assert float((mine != theirs).double().mean()) < 0.01


# For the CPU a size that is compiled for the test above.
LARGE = [(k, SIZES[k.path][-1], cached_as(k.path, SIZES[k.path][-1])) for k in ON_PATHS]


@cases("kernels, dim, dtype", [*LARGE, *((kernels, 32, FLOAT32) for kernels in (AMPERE, *PLAIN))])
def test_attention_survives_large_scores_and_many_equal_ones(kernels, dim, dtype):
    pool, rotary = fresh_pool(3, dim, dtype, kernels.device), rotary_table(8)
    batch = Batch.reserve(pool, [pool.new(), pool.new()], (40, 3))
    qkv = torch.randn(43, 3, 3, dim)
    qkv[:40, :, :2] *= 60.0  # scores of some 10,000s
    qkv[40:, :, 1] = 0.0  # all scores zero
    qkv = qkv.view(43, -1)
    found = kernels.call("attention", qkv, pool, 0, batch, rotary, None)
    batch.commit()
    truth = attended(pool, batch, qkv, rotary)
    # Scores are rounded to 24 bits: at 30,000 by some 0.002, and exp of them by as much, where two keys are that close.
    assert error(found[:40], truth[:40], 1.0) < 0.02
    assert error(found[40:], truth[40:], 1.0) < 3e-6


# Models ---------------------------------------------------------------------------------------------------------------

OTHER_BACKENDS = [plain for plain in EVERY if plain.name != "reference"]
PARTS = {
    f"{name or 'dense'}-{'parallel' if parallel else 'sequential'}": {
        "format": make_format(name) if name else DENSE, "num_hidden_layers": 1, "intermediate_size": 128,
        "num_attention_heads": 2, "use_parallel_residual": parallel,
    }
    for name in (None, *FORMATS) for parallel in (True, False)
}  # fmt: skip


def models():
    """Every model by every backend, but of those with several layers an interpreter has one."""
    for backend in OTHER_BACKENDS:
        for name in (*PARTS, *MODELS) if backend.name != "triton" else (*PARTS, "mixed"):
            yield backend, name


@cases("backend, name", models())
def test_a_model_s_logits_equal_the_reference_s(backend, name):
    """A new entry of the table of formats or of backends is tested by being there."""
    model = tiny_model(**(PARTS | MODELS)[name])
    # Up to 8 tokens the CPU's exact kernels multiply themselves, more are torch's work.
    for lengths, steps in [((9, 3, 1), 3), ((1,), 3), ((2, 4), 3)] if backend.name != "triton" else [((5, 1), 1)]:
        found = []
        for ops, device in ((reference, "cpu"), (backend.ops, backend.device)):
            model.to(device).ops = ops
            assert model.ops.name == ops.name
            found.append(prefill_and_decode(model, lengths, steps).double())
        assert error(found[1], found[0]) < EQUAL


@cases("backend, format", [(b, f) for b in OTHER_BACKENDS for f in (DENSE, *map(make_format, FORMATS))])
def test_a_plain_tensor_may_stand_wherever_an_activation_may(backend, format):
    """Beside a weight, an adapter reads the same input, which is then laid out for neither."""
    weights = [random_weight(format, rows, 128) for rows in (384, 128)]
    matrices = [exact(weight) for weight in weights]
    for tokens in (1, 3, 20):
        x, addend = torch.randn(tokens, 128), torch.randn(tokens, 384)
        given = [x, x], weights, [addend, None], [None, "erf"], [None, None]
        states, inner = backend.call("grouped_linear", *given)
        last = backend.call("linear_residual", [x, inner], [weights[1]] * 2, [None, None], x)
        assert error(states, x.double() @ matrices[0].T + addend.double()) < EQUAL
        truth = ACTIVATIONS["erf"](x.double() @ matrices[1].T)
        assert error(inner, truth) < EQUAL
        assert error(last, (x.double() + truth) @ matrices[1].T + x.double()) < EQUAL


def test_the_command_line_offers_every_format():
    assert set(QUANTIZED) == set(FORMATS)
