"""The kernel that quantizes, beside the plain torch that it must equal bit for bit, on every instruction set there is here."""

import pytest
import torch

from neox_lite.errors import FormatError
from neox_lite.formats import GROUP_SIZES, GroupInt
from neox_lite.kernels.cpu import encode, target
from neox_lite.kernels.cpu.target import PATHS
from neox_lite.loading import quantize

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
METHODS = ["rtn", "mse"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    if reason := target.why_not(request.param):
        pytest.skip(reason)
    monkeypatch.setattr(encode, "host", lambda: target.for_path(request.param))


def rows(dtype):
    """Rows of every kind: of all sizes, with ties, halves of steps, both zeros, outliers, of one sign, of one value."""
    torch.manual_seed(0)
    values = torch.randn(24, 384) * 10.0 ** torch.linspace(-9, 3, 24)[:, None]
    values[1], values[2], values[3] = 0.0, -0.0, -0.5
    values[4] = torch.tensor([1.0, -1.0]).repeat(192)
    values[5] = torch.randint(-16, 17, (384,)) * 0.25
    values[6].abs_()
    values[7, ::100] *= 50.0
    return values.to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_codes_and_scales_are_those_of_plain_torch(path, bits, method, source):
    for size in GROUP_SIZES:
        for dtype in DTYPES:
            format, values = GroupInt(bits, size), rows(source)
            found, expected = encode.encode(format, values, dtype, method), format.encode(values, dtype, method)
            assert found.keys() == expected.keys()
            for key in expected:
                assert torch.equal(found[key].view(torch.uint8), expected[key].view(torch.uint8)), (size, dtype, key)


def test_no_rows_and_rows_that_are_not_contiguous_are_taken(path):
    format, values = GroupInt(4, 32), rows(torch.float16).repeat(1, 2)[:, ::2]
    for part in (values, values[:0], values[3:4]):
        found, expected = encode.encode(format, part, torch.float16, "mse"), format.encode(part, torch.float16, "mse")
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "not finite"), (float("-inf"), "not finite"), (1e30, "overflows float16")]
)
@pytest.mark.parametrize("place", [0, 127, 128, 24 * 384 - 1])
def test_what_cannot_be_stored_is_refused_wherever_it_stands(path, method, value, message, place):
    values = rows(torch.float32)
    values.view(-1)[place] = value
    with pytest.raises(FormatError, match=message):
        encode.encode(GroupInt(4, 128), values, torch.float16, method)


@pytest.mark.parametrize(
    ("format", "method", "message"),
    [(GroupInt(4, 128), "gptq", "method is 'gptq'"), (GroupInt(4, 64), "rtn", "in_features")],
)
def test_what_plain_torch_refuses_is_refused_in_its_words(format, method, message):
    with pytest.raises(FormatError, match=message):
        encode.encode(format, torch.ones(2, 96 if method == "rtn" else 128), torch.float16, method)


def test_rows_that_the_kernel_does_not_take_go_to_plain_torch(monkeypatch):
    monkeypatch.setattr(encode, "encode", lambda *given: pytest.fail("the kernel was called"))
    values = torch.randn(2, 128, dtype=torch.float64)
    assert "float64" in encode.why_not(values)
    expected = GroupInt(4, 128).encode(values, torch.float16, "mse")
    assert torch.equal(
        quantize.encode(GroupInt(4, 128), values, torch.float16, "mse")["weight_packed"], expected["weight_packed"]
    )
