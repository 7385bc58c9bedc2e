"""units.py: sizes as people write them, and dtypes by name."""

import pytest
import torch
from support.refusals import refused

from neox_lite.errors import ArgumentError
from neox_lite.units import dtype_name, format_bytes, parse_bytes, parse_dtype

WRITTEN = {0: "0 GiB", 7: "7 bytes", 3 << 10: "3 KiB", 5 << 20: "5 MiB", 3 << 29: "1.5 GiB", 319 << 20: "319 MiB"}
READ = {8: 8, "8": 8, "500MB": 500_000_000, "1.5 GiB": 3 << 29, "2k": 2000, "2Ki": 2048, " 1 tb ": 10**12}


def test_sizes_are_written_as_memory_is_sold_and_read_with_decimal_and_binary_prefixes():
    assert {count: format_bytes(count) for count in WRITTEN} == WRITTEN
    assert [parse_bytes(text.replace("bytes", "")) for text in WRITTEN.values()] == list(WRITTEN)
    assert {text: parse_bytes(text) for text in READ} == READ


@pytest.mark.parametrize("value", ["", "GiB", "-1", -1, True, "1.GB", "1 GiB free", "1e3"])
def test_what_is_no_size_is_refused(value):
    refused(ArgumentError, "is not a size; write for instance '8GiB'", parse_bytes, value)


DTYPES = {"torch.bfloat16": torch.bfloat16, "float32": torch.float32, "half": torch.float16, "bf16": torch.bfloat16}
DTYPES |= {torch.float16: torch.float16, "auto": None, None: None}


def test_a_dtype_is_read_from_its_names():
    assert {name: parse_dtype(name) for name in DTYPES} == DTYPES
    for dtype in {*DTYPES.values()} - {None}:
        assert parse_dtype(dtype_name(dtype)) == dtype


@pytest.mark.parametrize("value", ["float64", torch.int8, "", 16])
def test_a_dtype_that_no_model_can_have_is_refused(value):
    refused(ArgumentError, "expected one of float32, float16, bfloat16", parse_dtype, value)
