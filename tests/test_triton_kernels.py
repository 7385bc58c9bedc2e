"""What the Triton kernels have beside the contract of test_kernels.py: words, half2, slices, launches, and which are chosen.

They run on a GPU where there is one, else in Triton's interpreter (slow, so shapes are small).
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from support.backends import AMPERE, TURING, Triton, error, error_of_sum, exact, gaussian_weight, of_codes
from support.models import INT4, INT8, SMALL, tiny_model
from torch.nn import functional

from neox_lite.cache import Batch, PagePool
from neox_lite.formats import GroupInt
from neox_lite.kernels import dispatch, reference, triton
from neox_lite.kernels.triton import device_calls, tile_configs
from neox_lite.kernels.triton.batch_table import BatchTable
from neox_lite.kernels.triton.device import DeviceProperties
from neox_lite.kernels.triton.linear_method import Layout, PackedActivation

pytestmark = [pytest.mark.usefixtures("guarded_memory"), *([] if triton.interpreted() else [pytest.mark.gpu])]
DEVICE = AMPERE.device
HALF2 = Triton(kind="half2")
HALVES = 3e-3  # sums of four products rounded to halves, in the interpreter after every step
ROUNDED = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of weights or results, in a dtype


@pytest.fixture
def launched(monkeypatch):
    """The kernels that are launched."""
    kernels, launch = [], device_calls.launch
    monkeypatch.setattr(
        device_calls, "launch", lambda kernel, *a, **o: (kernels.append(kernel), launch(kernel, *a, **o))
    )
    return kernels


# Words and layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["gemv", "gemm", "torch"])
def test_every_code_in_every_place_of_a_word_is_read_exactly(bits, kind):
    columns, top = 64, 1 << (bits - 1)
    codes = (torch.arange(48 * columns).reshape(48, columns) * 37 + torch.arange(48)[:, None]) % (2 * top) - top
    weight = of_codes(GroupInt(bits, 32), codes.char(), torch.ones(48, 2, dtype=torch.float16))
    kernels = Triton(
        capability=(8, 0) if kind == "gemm" else (7, 5), kind="half2" if (kind, bits) == ("gemv", 4) else kind
    )
    x = torch.eye(columns).half()[: 32 if kind == "gemv" else columns]
    assert torch.equal(kernels.product(kernels.reads(x, weight)[0], weight), codes.float().T[: len(x)])


@pytest.mark.parametrize("layout", [Layout(8, 4, 5), Layout(8, 8), Layout(4, 2), Layout(4, 4)], ids=str)
def test_activations_are_moved_and_nothing_else(layout):
    x, norm = torch.randn(3, 96), (torch.rand(96) + 0.5, torch.randn(96), 1e-5)
    moved, straight = PackedActivation(layout, torch.empty(3, 96, device=DEVICE)), torch.empty(3, 96, device=DEVICE)
    for out in (moved, straight):
        AMPERE.call("_layer_norms", x, [norm], [out])
    assert torch.equal(AMPERE.natural(moved), AMPERE.natural(straight))


# Halves and slices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3000.0, 65504.0], ids=["outliers of thousands", "the largest halves"])
def test_gemv_in_half2_cannot_overflow(size):
    weight, x = gaussian_weight(GroupInt(4, 128), 40, 1024), torch.randn(2, 1024).half()
    x[:, ::7] = size
    found = HALF2.product(HALF2.reads(x, weight)[0], weight)
    assert torch.isfinite(found).all()
    assert error(found, x.double() @ exact(weight).T) < HALVES


@pytest.mark.parametrize("size", [1e-3, 1e-5])
def test_tiny_activations_in_half2_err_by_half_a_millionth_each(size):
    weight, x = gaussian_weight(GroupInt(4, 128), 40, 1024), (size * torch.randn(1, 1024)).half()
    found, truth = HALF2.product(HALF2.reads(x, weight)[0], weight).double(), x.double() @ exact(weight).T
    rounded = HALVES * truth.square().mean().sqrt() + 2.0**-20 * exact(weight).square().sum(1).sqrt() * 4
    assert bool(((found - truth).abs() < rounded).all())  # 2**-25 is half of the smallest half, times 32


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_is_dequantized_in_slices_as_it_decodes(bits, dtype, monkeypatch):
    weight, kernels, seen = gaussian_weight(GroupInt(bits, 32), 70, 1120, dtype), Triton(kind="torch"), []
    kernels.ops.linear.slice_bytes = 16 * 1120 * dtype.itemsize
    multiply = device_calls.mm
    monkeypatch.setattr(device_calls, "mm", lambda x, rows, out: (seen.append(rows.clone()), multiply(x, rows, out)))
    x, decoded = torch.randn(300, 1120).to(dtype), weight.decode(torch.float32)
    found = kernels.product(kernels.reads(x, weight)[0], weight)
    assert [len(rows) for rows in seen] == [16, 16, 16, 16, 6]
    one_off = float(decoded.abs().max()) * torch.finfo(dtype).eps  # the interpreter cuts bfloat16 off
    assert float((torch.cat(seen).float().cpu() - decoded).abs().max()) <= one_off
    assert error_of_sum(found, x.double(), exact(weight)) < 2 * ROUNDED[dtype]


# Launches and tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "launches"), [(4, 1), (8, 2)])
def test_two_weights_of_one_kind_take_one_launch_and_two_kinds_take_two(launched, bits, launches):
    weights = [gaussian_weight(INT4, 24, 64), gaussian_weight(GroupInt(bits, 32), 40, 64)]
    inputs = [AMPERE.reads(torch.randn(1, 64).half(), w)[0] for w in weights]
    AMPERE.call("grouped_linear", inputs, weights, [None, None], [None, None], [None, None])
    assert len(launched) == launches


@pytest.mark.parametrize("activation", [None, "erf"])
def test_a_long_product_that_needs_no_end_is_not_copied(launched, activation):
    weight, x = gaussian_weight(INT4, 40, 64), torch.randn(300, 64).half()
    (found,) = AMPERE.call("grouped_linear", [x], [weight], [None], [activation], [None])
    truth = x.double() @ exact(weight).T
    assert error(found, functional.gelu(truth) if activation else truth) < 2 * ROUNDED[torch.float16]
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
    ops, pool = Triton().ops, PagePool(2, 32, torch.float32, [DEVICE])
    batches = [Batch.reserve(pool, [pool.new()], [count]) for count in (3, 5)]
    table = ops._table(batches[0], DEVICE)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(ops._table, batches[1], DEVICE).result() is not table
    assert ops._table(batches[0], DEVICE) is table


# Models ---------------------------------------------------------------------------------------------------------------


def test_greedy_tokens_of_a_model_equal_the_reference_s():
    model, prompt = tiny_model(INT4, **{**SMALL, "num_hidden_layers": 1}), torch.tensor([[5, 6, 7]])
    model.ops = reference
    expected = model.generate(prompt, max_new_tokens=4)
    model.to(DEVICE).ops = AMPERE.ops
    assert torch.equal(model.generate(prompt.to(DEVICE), max_new_tokens=4).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_16_bits_computes_in_16_bits(dtype):
    model, ids = tiny_model(INT4, dtype=dtype, scales=dtype, **SMALL), torch.randint(0, 67, (1, 5))
    model.ops = reference
    truth = model(ids).logits.double()
    model.to(DEVICE).ops = AMPERE.ops
    assert model.compute_dtype == dtype
    assert error(model(ids.to(DEVICE)).logits, truth) < 5 * ROUNDED[dtype]


@torch.no_grad()
def test_a_padded_batch_of_a_model_equals_the_reference_s():
    model, ids, more = tiny_model(INT8, **SMALL), torch.randint(0, 67, (2, 9)), torch.randint(0, 67, (2, 1))
    mask, found = torch.ones(2, 9, dtype=torch.long), []
    mask[1, :6] = 0
    for ops, device in ((reference, "cpu"), (AMPERE.ops, DEVICE)):
        model.to(device).ops = ops
        first = model(ids.to(device), attention_mask=mask)
        second = model(more.to(device), past_key_values=first.past_key_values)
        found.append(torch.cat((first.logits, second.logits), dim=1).double())
    assert error(found[1], found[0].cpu()) < 2e-5


# Choices --------------------------------------------------------------------------------------------------------------


def test_a_card_without_bfloat16_computes_such_models_in_float32():
    with pytest.warns(UserWarning, match="no bfloat16"):
        assert TURING.ops.activation_dtype(torch.bfloat16, DEVICE) == torch.float32
    assert TURING.ops.activation_dtype(torch.float16, DEVICE) == torch.float16
    assert AMPERE.ops.activation_dtype(torch.bfloat16, DEVICE) == torch.bfloat16


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
    ampere = DeviceProperties((8, 0))
    for hidden in (512, 768, 1024, 2048, 2560, 4096, 5120, 6144):
        for columns in (hidden, 4 * hidden):
            for bits in (4, 8):
                words = columns * bits // 32
                candidates = tile_configs.gemv_tiles(ampere, 4 * hidden, (words,), bits, 4 * bits, 1, "half2")
                for tile in candidates.tiles:
                    assert words % (tile.groups * tile.group_words) == 0  # no masks in the loop
