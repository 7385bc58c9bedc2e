"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter (slow, so shapes are small).

Memory that kernels write to is filled with NaN beforehand. Errors are max |error| over the exact result's root mean square.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="triton is not installed")

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.cache import Batch, PagePool
from neox_lite.formats import DENSE, Weight, make_format
from neox_lite.kernels import dispatch, reference, triton
from neox_lite.kernels.triton import device_calls, tile_configs
from neox_lite.kernels.triton.batch_table import BatchTable
from neox_lite.kernels.triton.device import DeviceProperties
from neox_lite.kernels.triton.linear import Call
from neox_lite.kernels.triton.linear_method import NATURAL, Layout, PackedActivation, layout_of
from neox_lite.kernels.triton.operations import Operations
from neox_lite.layers import Rotary

pytestmark = [] if triton.interpreted() else [pytest.mark.gpu]
DEVICE = torch.device("cpu" if triton.interpreted() else "cuda")
AMPERE, TURING = (
    DeviceProperties((8, 0)),
    DeviceProperties((7, 5)),
)  # with tensor cores and bfloat16, and without
HALF2_ROUNDING = 3e-3  # sums of four products rounded to halves, in the interpreter after every step
ROUNDED = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of weights or results, in a dtype


@pytest.fixture(autouse=True)
def nan_memory(monkeypatch):
    empty = torch.empty

    def nan_empty(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan_empty)


def ops_for(properties=AMPERE, exact=False):
    return Operations(exact, lambda device: properties)


def quantized(bits, group, size, columns, dtype=torch.float16):
    format = make_format(f"int{bits}", group)
    stored = format.encode(torch.randn(size, columns) / columns**0.5, dtype, "rtn")
    return Weight(format, (size, columns), {k: t.to(DEVICE) for k, t in stored.items()})


def plain(size, columns, dtype=torch.float32):
    return Weight(DENSE, (size, columns), {"weight": (torch.randn(size, columns) / columns**0.5).to(DEVICE, dtype)})


def exact_rows(weight):
    return weight.decode(torch.float32).double().cpu()


def order(features, layout):
    """The offset of each feature: the rule of packing.py, written once more."""
    feature, pack, planes = torch.arange(features), layout.pack_factor, layout.num_planes
    word, element = feature // pack, feature % pack
    return (element % planes * (features // pack) + word) * (pack // planes) + element // planes


def packed(x, layout):
    """x (tokens, features) as a kernel with that layout reads it."""
    if layout == NATURAL:
        return x.to(DEVICE)
    moved = torch.empty_like(x)
    moved[:, order(x.shape[1], layout)] = x * layout.scale
    return PackedActivation(layout, moved.to(DEVICE))


def natural(x):
    if not isinstance(x, PackedActivation):
        return x.double().cpu()
    return x.tensor.double().cpu()[:, order(x.tensor.shape[1], x.layout)] / x.layout.scale


def error(found, exact):
    return float((found.double().cpu() - exact).abs().max() / exact.square().mean().sqrt())


def product(ops, xs, weights, addends=(), x=None, activation=None, kind=None):
    """The result in float32 of one product or the sum of two, by the method that `ops` chooses, which is to be `kind`."""
    methods = [ops.linear.method(w, a.to(DEVICE)) for w, a in zip(weights, xs, strict=True)]
    assert kind is None or {method.kind for method in methods} == {kind}
    inputs = [packed(a, method.layout) for a, method in zip(xs, methods, strict=True)]
    on_device = [a.to(DEVICE) for a in addends]
    extra = None if x is None else x.to(DEVICE)
    (found,) = ops.linear([Call(inputs, weights, on_device, activation, residual=extra, dtype=torch.float32)])
    return found


# Words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["gemv", "gemm", "torch"])
def test_every_code_in_every_place_of_a_word_is_read_exactly(bits, kind):
    format, columns = make_format(f"int{bits}", 32), 64
    codes = (torch.arange(48 * columns).reshape(48, columns) * 37 + torch.arange(48)[:, None]) % (1 << bits)
    packed = torch.zeros(48, columns * bits // 32, dtype=torch.int64)
    for i in range(columns):
        packed[:, i * bits // 32] |= codes[:, i] << (i * bits % 32)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()
    stored = {"weight_packed": packed.to(DEVICE), "weight_scale": torch.ones(48, 2, dtype=torch.float16, device=DEVICE)}
    weight = Weight(format, (48, columns), stored)
    machine = {"gemv": TURING, "gemm": AMPERE, "torch": TURING}[kind]
    count = 32 if kind == "gemv" else columns
    found = product(ops_for(machine), [torch.eye(columns).half()[:count]], [weight], kind=kind)
    assert torch.equal(found.cpu(), (codes - (1 << (bits - 1))).float().T[:count])


@pytest.mark.parametrize("layout", [Layout(8, 4, 5), Layout(8, 8), Layout(4, 2), Layout(4, 4)], ids=str)
def test_activations_are_moved_and_nothing_else(layout):
    x, norm = torch.randn(3, 96), (torch.rand(96) + 0.5, torch.randn(96), 1e-5)
    moved = PackedActivation(layout, torch.empty(3, 96, device=DEVICE))
    ops = ops_for()
    on_device = tuple(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in norm)
    ops._layer_norms(x.to(DEVICE), [on_device], [moved])
    straight = torch.empty(3, 96, device=DEVICE)
    ops._layer_norms(x.to(DEVICE), [on_device], [straight])
    assert torch.equal(natural(moved), natural(straight))


# Products -------------------------------------------------------------------------------------------------------------

SHAPES = [
    (64, 128),
    (70, 1152),
    (9, 2560),
]  # one tile; tails of rows and 2^n + 2^m columns; few rows, a large odd multiple


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("size", "columns"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2])
def test_gemv_in_float32_equals_float64(bits, group, size, columns, tokens):
    weight, x = quantized(bits, group, size, columns), torch.randn(tokens, columns)
    found = product(ops_for(), [x], [weight], kind="gemv")
    assert error(found, x.double() @ exact_rows(weight).T) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_gemv_loses_nothing_in_exact_mode_whatever_the_activations_dtype(bits, dtype):
    weight, x = quantized(bits, 64, 40, 512, dtype), torch.randn(2, 512).to(dtype)
    found = product(ops_for(exact=True), [x], [weight], kind="gemv")
    assert error(found, x.double() @ exact_rows(weight).T) < 2e-6


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("size", "columns"), SHAPES)
def test_gemv_in_half2_errs_by_its_rounding(group, size, columns):
    weight, x = quantized(4, group, size, columns), torch.randn(1, columns).half()
    assert ops_for().linear.method(weight, x.to(DEVICE)).layout.shift
    found = product(ops_for(), [x], [weight], kind="gemv")
    assert error(found, x.double() @ exact_rows(weight).T) < HALF2_ROUNDING


@pytest.mark.parametrize("size", [3000.0, 65504.0], ids=["outliers of thousands", "the largest halves"])
def test_gemv_in_half2_cannot_overflow(size):
    weight, x = quantized(4, 128, 40, 1024), torch.randn(2, 1024).half()
    x[:, ::7] = size
    found = product(ops_for(), [x], [weight], kind="gemv")
    assert torch.isfinite(found).all()
    assert error(found, x.double() @ exact_rows(weight).T) < HALF2_ROUNDING


@pytest.mark.parametrize("size", [1e-3, 1e-5])
def test_tiny_activations_in_half2_err_by_half_a_millionth_each(size):
    weight, x = quantized(4, 128, 40, 1024), (size * torch.randn(1, 1024)).half()
    found = product(ops_for(), [x], [weight], kind="gemv").double().cpu()
    exact, codes = x.double() @ exact_rows(weight).T, exact_rows(weight).abs()
    rounded = HALF2_ROUNDING * exact.square().mean().sqrt() + 2.0**-20 * codes.square().sum(1).sqrt() * 4
    assert bool(((found - exact).abs() < rounded).all())  # 2**-25 is half of the smallest half, times 32


@pytest.mark.parametrize("tokens", [3, 4, 5, 8, 11, 32])
def test_without_tensor_cores_gemv_serves_more_tokens(tokens):
    weight, x = quantized(4, 32, 20, 96), torch.randn(tokens, 96).half()
    found = product(ops_for(TURING), [x], [weight], kind="gemv")
    assert error(found, x.double() @ exact_rows(weight).T) < HALF2_ROUNDING
    assert product(ops_for(TURING), [torch.randn(33, 96).half()], [weight], kind="torch").shape == (33, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [256, 1000])
def test_gemv_of_a_plain_matrix(dtype, columns):
    weight, x = plain(37, columns, dtype), torch.randn(2, columns).to(dtype)
    found = product(ops_for(), [x], [weight], kind="gemv")
    assert error(found, x.double() @ exact_rows(weight).T) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [3, 40])
def test_gemm_errs_by_the_rounding_of_weights(dtype, bits, group, tokens):
    weight, x = quantized(bits, group, 70, 1152, dtype), torch.randn(tokens, 1152).to(dtype)
    found = product(ops_for(), [x], [weight], kind="gemm")
    assert error(found, x.double() @ exact_rows(weight).T) < ROUNDED[dtype]


@pytest.mark.parametrize("tokens", [16, 17, 64, 65, 256])
def test_gemm_covers_every_token_once(tokens):
    weight, x = quantized(4, 32, 64, 96), torch.randn(tokens, 96).half()
    found = product(ops_for(), [x], [weight], kind="gemm")
    assert error(found, x.double() @ exact_rows(weight).T) < ROUNDED[torch.float16]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_is_dequantized_in_slices_as_it_decodes(bits, dtype, monkeypatch):
    weight, ops, seen = quantized(bits, 32, 70, 1120, dtype), ops_for(), []
    ops.linear.slice_bytes = 16 * 1120 * dtype.itemsize
    multiply = device_calls.mm
    monkeypatch.setattr(device_calls, "mm", lambda x, rows, out: (seen.append(rows.clone()), multiply(x, rows, out)))
    x = torch.randn(300, 1120).to(dtype)
    found = product(ops, [x], [weight], kind="torch")
    assert [len(rows) for rows in seen] == [16, 16, 16, 16, 6]
    one_off = (
        float(weight.decode(torch.float32).abs().max()) * torch.finfo(dtype).eps
    )  # the interpreter cuts bfloat16 off
    assert float((torch.cat(seen).float() - weight.decode(torch.float32)).abs().max()) <= one_off
    assert error(found, x.double() @ exact_rows(weight).T) < 2 * ROUNDED[dtype]


@pytest.mark.parametrize(("tokens", "kind"), [(1, "gemv"), (2, "gemv"), (20, "gemm"), (300, "torch")])
@pytest.mark.parametrize("bits", [4, 8])
def test_two_products_addends_and_residual_are_one_sum(tokens, kind, bits):
    first, second = quantized(bits, 32, 70, 96), quantized(bits, 32, 70, 160)
    x1, x2, residual = torch.randn(tokens, 96).half(), torch.randn(tokens, 160).half(), torch.randn(tokens, 70).half()
    bias, row = torch.randn(70), torch.randn(tokens, 70)
    exact = x1.double() @ exact_rows(first).T + x2.double() @ exact_rows(second).T + bias + row + residual
    found = product(ops_for(), [x1, x2], [first, second], [bias, row], residual, kind=kind)
    assert error(found, exact) < ROUNDED[torch.float16]


@pytest.mark.parametrize(("tokens", "kind"), [(1, "gemv"), (20, "gemm"), (300, "torch")])
@pytest.mark.parametrize("activation", ["erf", "tanh"])
def test_gelu_follows_the_bias(tokens, kind, activation):
    weight, x, bias = quantized(4, 32, 70, 96), 3 * torch.randn(tokens, 96).half(), torch.randn(70)
    approximate = "tanh" if activation == "tanh" else "none"
    exact = functional.gelu(x.double() @ exact_rows(weight).T + bias, approximate=approximate)
    found = product(ops_for(), [x], [weight], [bias], activation=activation, kind=kind)
    assert error(found, exact) < ROUNDED[torch.float16]


@pytest.mark.parametrize("tokens", [1, 20, 300])
def test_products_of_several_formats_are_summed_too(tokens):
    weights = [quantized(4, 32, 40, 96), quantized(8, 32, 40, 64)]
    xs = [torch.randn(tokens, 96).half(), torch.randn(tokens, 64).half()]
    exact = sum(x.double() @ exact_rows(w).T for x, w in zip(xs, weights, strict=True))
    assert error(product(ops_for(), xs, weights), exact) < ROUNDED[torch.float16]


@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_results_lie_as_the_next_weight_reads_them(tokens):
    ops, first, second = ops_for(), quantized(4, 32, 96, 64), quantized(8, 32, 160, 64)
    third, x = quantized(4, 32, 10, 160), torch.randn(tokens, 64).half()
    inputs = [packed(x, ops.linear.method(w, x.to(DEVICE)).layout) for w in (first, second)]
    one, two = ops.grouped_linear(inputs, [first, second], [None, None], [None, "erf"], [None, third])
    assert error(natural(one), x.double() @ exact_rows(first).T) < 2 * ROUNDED[torch.float16]
    assert error(natural(two), functional.gelu(x.double() @ exact_rows(second).T)) < 2 * ROUNDED[torch.float16]
    assert layout_of(two) == ops.linear.method(third, x.to(DEVICE)).layout


def test_two_weights_of_one_kind_take_one_launch_and_two_kinds_take_two(monkeypatch):
    launched, launch = [], device_calls.launch
    monkeypatch.setattr(
        device_calls, "launch", lambda kernel, *a, **o: (launched.append(kernel), launch(kernel, *a, **o))
    )
    x = torch.randn(1, 64).half().to(DEVICE)
    for other, expected in ((quantized(4, 32, 40, 64), 1), (quantized(8, 32, 40, 64), 2)):
        launched.clear()
        weights = [quantized(4, 32, 24, 64), other]
        inputs = [packed(x.cpu(), ops_for().linear.method(w, x).layout) for w in weights]
        ops_for().grouped_linear(inputs, weights, [None, None], [None, None], [None, None])
        assert len(launched) == expected


@pytest.mark.parametrize("activation", [None, "erf"])
def test_a_long_product_that_needs_no_end_is_not_copied(monkeypatch, activation):
    launched, launch = [], device_calls.launch
    monkeypatch.setattr(
        device_calls, "launch", lambda kernel, *a, **o: (launched.append(kernel), launch(kernel, *a, **o))
    )
    weight, x = quantized(4, 32, 40, 64), torch.randn(300, 64).half()
    (found,) = ops_for().grouped_linear([x.to(DEVICE)], [weight], [None], [activation], [None])
    exact = x.double() @ exact_rows(weight).T
    assert error(found, functional.gelu(exact) if activation else exact) < 2 * ROUNDED[torch.float16]
    assert len(launched) == (2 if activation else 1)


def test_tables_begin_where_no_kernel_has_to_be_compiled_anew():
    for starts, counts in (([0], [1]), ([300, 5, 0], [1, 1, 1]), ([1, 2], [3, 70])):
        pool = PagePool(1, 16, torch.float16, [DEVICE])
        block_tables = [pool.new() for _ in starts]
        Batch.reserve(pool, block_tables, starts).commit()
        table = BatchTable(Batch.reserve(pool, block_tables, counts), DEVICE, 64)
        for part in (table.sequences, table.pages, table.tokens, table.blocks):
            assert part.storage_offset() % 4 == 0


def test_a_thread_keeps_the_table_of_its_batch_while_another_works_on_its_own():
    ops, pool = ops_for(), PagePool(2, 32, torch.float32, [DEVICE])
    batches = [Batch.reserve(pool, [pool.new()], [count]) for count in (3, 5)]
    table = ops._table(batches[0], DEVICE)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(ops._table, batches[1], DEVICE).result() is not table
    assert ops._table(batches[0], DEVICE) is table


def test_no_tokens_are_no_work():
    ops, weight = ops_for(), quantized(4, 32, 24, 64)
    x, norm = (
        torch.randn(0, 64, device=DEVICE).half(),
        (torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE), 1e-5),
    )
    (normed,) = ops.layer_norms(x, [norm], [weight])
    (out,) = ops.grouped_linear([normed], [weight], [None], [None], [None])
    assert out.shape == (0, 24) and ops.head(x, None, norm, weight).shape == (0, 24)


def test_more_than_two_products_and_addends_are_summed():
    ops, weights = ops_for(), [plain(12, 16), plain(12, 16), plain(12, 16)]
    xs, addends = [torch.randn(2, 16) for _ in weights], [torch.randn(12) for _ in range(5)]
    residual = torch.randn(2, 12)
    exact = sum(
        (x.double() @ exact_rows(w).T for x, w in zip(xs, weights, strict=True)), sum(addends) + residual.double()
    )
    on_device = [x.to(DEVICE) for x in xs], weights, [a.to(DEVICE) for a in addends], residual.to(DEVICE)
    assert error(ops.linear_residual(*on_device), exact) < 2e-6


# Norms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [64, 96, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_equal_float64(features, dtype):
    x = (torch.randn(3, features) + 100 * torch.randn(3, 1)).to(dtype)  # a mean far from zero costs nothing
    gains = [((torch.rand(features) + 0.5).to(dtype), torch.randn(features).to(dtype), eps) for eps in (1e-5, 1e-2)]
    on_device = [(g.to(DEVICE), b.to(DEVICE), eps) for g, b, eps in gains]
    found = ops_for().layer_norms(x.to(DEVICE), on_device, [None, None])
    for y, (gain, bias, eps) in zip(found, gains, strict=True):
        exact = functional.layer_norm(x.double(), (features,), gain.double(), bias.double(), eps)
        assert error(y, exact) < (3e-5 if dtype == torch.float32 else 2e-3)  # float32 at 300 is 3e-5 apart


# Attention ------------------------------------------------------------------------------------------------------------

HELD = (
    126,
    0,
    150,
)  # tokens of three sequences that the cache holds, and new ones in turn: over a page's end, one alone
STEPS = ([3, 2, 0], [1, 1, 1], [0, 1, 1], [1, 20, 0])


@pytest.mark.parametrize("kv", ["same", "int8"])
@pytest.mark.parametrize(
    ("dim", "rotary_pct"), [(32, 0.5), (40, 0.25), (64, 0.25), (80, 1.0), (96, 0.25), (128, 1.0), (256, 0.25)]
)
def test_attention_in_steps_equals_the_reference(dim, rotary_pct, kv):
    found, expected = (steps(ops, dim, rotary_pct, torch.float32, kv) for ops in (ops_for(), reference))
    for y, exact in zip(found[0], expected[0], strict=True):
        assert error(y, exact.double()) < (1e-5 if kv == "same" else 2e-5)  # a code of int8 keys may fall the other way
    for stored, exact in zip(found[1], expected[1], strict=True):
        if kv == "same":
            assert torch.equal(stored.cpu().nan_to_num(7), exact.nan_to_num(7))
        else:
            assert float((stored.cpu().float() - exact.float()).abs().nan_to_num(0).max()) <= 1


@pytest.mark.parametrize("machine", [AMPERE, TURING], ids=["tensor cores", "without"])
def test_blocks_of_queries_cover_every_token_once(machine):
    found, exact = (
        steps(ops, 32, 1.0, torch.float32, "same", [[1, 67, 0]])[0] for ops in (ops_for(machine), reference)
    )
    assert error(found[0], exact[0].double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv", ["same", "int8"])
def test_attention_of_16_bits_errs_by_its_rounding(dtype, kv):
    found, exact = (steps(ops, 96, 0.25, dtype, kv)[0] for ops in (ops_for(), reference))
    bound = 6e-3 if dtype == torch.float16 else 0.12  # the interpreter cuts bfloat16 off, twice the error of rounding
    for y, expected in zip(found, exact, strict=True):
        assert error(y, expected.double()) < bound


def steps(ops, dim, rotary_pct, dtype, kv, given=None):
    """Three sequences through `given` or STEPS: the results, and what the cache holds."""
    torch.manual_seed(1)
    heads = 2
    here = DEVICE if isinstance(ops, Operations) else torch.device("cpu")
    config = GPTNeoXConfig(
        hidden_size=heads * dim, num_attention_heads=heads, rotary_pct=rotary_pct, intermediate_size=64, vocab_size=11,
        num_hidden_layers=1, max_position_embeddings=400,
    )  # fmt: skip
    table = Rotary(config).table.to(here)
    pool = PagePool(heads, dim, torch.int8 if kv == "int8" else dtype, [here])
    block_tables = [pool.new() for _ in range(3)]
    for block_table in block_tables:
        pool.reserve(block_table, 300)  # all the memory there will be
    batch = Batch.reserve(pool, block_tables, HELD)
    for tensor in (*pool.storage, *pool.scales):
        tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
    held = torch.randn(2, sum(HELD), heads, dim).to(here)
    pool.write(0, batch, *held)
    batch.commit()
    outs = []
    for counts in given or STEPS:
        qkv = torch.randn(sum(counts), heads * 3 * dim).to(dtype).to(here)
        batch = Batch.reserve(pool, block_tables, counts)
        outs.append(ops.attention(qkv if ops is not reference else qkv.float(), pool, 0, batch, table, None))
        batch.commit()
    return outs, [*pool.storage, *pool.scales]


def test_attention_writes_where_the_next_weight_reads():
    ops, dim = ops_for(), 80
    table = torch.randn(2, 400, 20, device=DEVICE)
    for counts, new in (([6, 3], True), ([1, 1], False)):
        next_weight = quantized(4, 32, 8, 2 * dim)
        results = []
        for weight in (next_weight, None):
            pool = PagePool(2, dim, torch.float32, [DEVICE])
            block_tables = [pool.new(), pool.new()]
            torch.manual_seed(2)
            if not new:
                batch = Batch.reserve(pool, block_tables, [150, 3])
                pool.write(0, batch, *torch.randn(2, 153, 2, dim, device=DEVICE))
                batch.commit()
            batch = Batch.reserve(pool, block_tables, counts)
            qkv = torch.randn(sum(counts), 6 * dim, device=DEVICE)
            results.append(natural(ops.attention(qkv, pool, 0, batch, table, weight)))
        assert torch.equal(*results)


# The model ------------------------------------------------------------------------------------------------------------


def tiny(parallel=True, formats=(), dtype=torch.float32, layers=2, hidden=64, positions=200, spread=0.1):
    config = GPTNeoXConfig(
        hidden_size=hidden, num_attention_heads=2, num_hidden_layers=layers, intermediate_size=128, vocab_size=67,
        max_position_embeddings=positions, use_parallel_residual=parallel, initializer_range=spread,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config).to(dtype)
    for i, block in enumerate(model.gpt_neox.blocks):
        linears = (
            block.attention.query_key_value,
            block.attention.dense,
            block.mlp.dense_h_to_4h,
            block.mlp.dense_4h_to_h,
        )
        for linear, format in zip(linears, formats[i % len(formats)] if formats else (), strict=bool(formats)):
            if format is not None:
                stored = format.encode(linear.weight.data, dtype, format.methods[0]) | format.constants(linear.shape)
                linear.become(format, dtype)
                for name, tensor in stored.items():
                    getattr(linear, name).copy_(tensor)
    return model


INT4, INT8, NF4 = make_format("int4", 32), make_format("int8", 64), make_format("nf4")
MODELS = {
    "dense": {},
    "int4": {"formats": [(INT4,) * 4]},
    "sequential int8": {"parallel": False, "formats": [(INT8,) * 4]},
    "mixed": {"formats": [(INT4, INT8, INT8, INT4), (INT8, None, None, INT4)]},
    "nf4": {"formats": [(NF4,) * 4]},
}


def by_triton(model, exact=False):
    model = model.to(DEVICE)
    model.ops = ops_for(exact=exact)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_model_s_logits_equal_the_reference_s(name):
    model = tiny(**MODELS[name])
    ids, more = torch.randint(0, 67, (2, 9)), torch.randint(0, 67, (2, 1))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :6] = 0
    model.ops = reference
    first = model(ids, attention_mask=mask)
    second = model(more, past_key_values=first.past_key_values)
    by_triton(model)
    found = model(ids.to(DEVICE), attention_mask=mask)
    after = model(more.to(DEVICE), past_key_values=found.past_key_values)
    assert error(found.logits, first.logits.double()) < 2e-5 and error(after.logits, second.logits.double()) < 2e-5


def test_greedy_tokens_equal_the_reference_s():
    model, prompt = tiny(**MODELS["int4"]), torch.tensor([[5, 6, 7]])
    model.ops = reference
    expected = model.generate(prompt, max_new_tokens=6)
    assert torch.equal(by_triton(model).generate(prompt.to(DEVICE), max_new_tokens=6).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_16_bits_computes_in_16_bits(dtype):
    model, ids = tiny(dtype=dtype, **MODELS["int4"]), torch.randint(0, 67, (1, 5))
    model.ops = reference
    exact = model(ids).logits.double()
    assert by_triton(model).compute_dtype == dtype
    assert error(model(ids.to(DEVICE)).logits, exact) < 5 * ROUNDED[dtype]


# Choices --------------------------------------------------------------------------------------------------------------


def test_a_card_without_bfloat16_computes_such_models_in_float32():
    with pytest.warns(UserWarning, match="no bfloat16"):
        assert ops_for(TURING).activation_dtype(torch.bfloat16, DEVICE) == torch.float32
    assert ops_for(TURING).activation_dtype(torch.float16, DEVICE) == torch.float16
    assert ops_for(AMPERE).activation_dtype(torch.bfloat16, DEVICE) == torch.bfloat16


def test_what_is_declined_has_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    assert "CUDA devices only" in triton.why_not(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.0", raising=False)
    assert "AMD" in triton.why_not(torch.device("cuda"))
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    assert "needs compute capability 7.5, Tesla V100 has 7.0" in triton.why_not(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(triton.shutil, "which", lambda name: None)
    assert "install gcc" in triton.why_not(torch.device("cuda"))
    monkeypatch.setattr(triton.shutil, "which", lambda name: "/usr/bin/cc")
    for variable in ("CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(triton.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert f"finds no {tmp_path / 'Python.h'}; install python3-dev" in triton.why_not(torch.device("cuda"))
    (tmp_path / "Python.h").write_text("")
    assert triton.why_not(torch.device("cuda")) is None
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed; pip install triton" in triton.why_not(torch.device("cuda"))


def test_cuda_devices_are_offered_triton_first_and_the_cpu_never():
    assert next(iter(dispatch.reasons(torch.device("cuda", 0)))) == "triton"
    assert "triton" not in dispatch.reasons(torch.device("cpu"))


def test_tiles_are_whole_for_every_shape_of_the_family():
    for hidden in (512, 768, 1024, 2048, 2560, 4096, 5120, 6144):
        for columns in (hidden, 4 * hidden):
            for bits in (4, 8):
                words = columns * bits // 32
                for tile in tile_configs.gemv_tiles(
                    AMPERE, 4 * hidden, (words,), bits, 128 * bits // 32, 1, "half2"
                ).tiles:
                    assert words % (tile.groups * tile.group_words) == 0  # no masks in the loop
