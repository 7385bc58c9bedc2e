"""The inline assembly of packing.py, executed line by line as PTX defines it: what the interpreter leaves to twins.

The text is taken from the functions themselves. Semantics: https://docs.nvidia.com/cuda/parallel-thread-execution/
"""

import inspect
import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from neox_lite.formats.group_int import pack
from neox_lite.kernels.triton import packing

SUM_OF_FOUR_CODES = 8 * 4


def assembly(function):
    """-> the text, the number of outputs, and the constants among its inputs, in order after the tensors."""
    source = inspect.getsource(function.fn)
    call = source[source.index("inline_asm_elementwise(") :]
    text = (re.search(r'"""(.*?)"""', call, re.S) or re.search(r'"(lop3.*?)"', call))[1]
    constraints = re.search(r'^\s*"([=&rf,]+)",|"([=&rf,]+)", \[', call, re.M)
    outputs = (constraints[1] or constraints[2]).count("=")
    return text, outputs, [int(c, 16) for c in re.findall(r"-?0x[0-9A-Fa-f]+", re.search(r"\[(.*?)\]", call)[1])]


def run(function, *inputs, constants=None):
    """The outputs of the assembly for arrays of 32-bit registers."""
    text, outputs, own = assembly(function)
    values = [*inputs, *(np.full_like(inputs[0], c & 0xFFFFFFFF) for c in (own if constants is None else constants))]
    registers = {f"${outputs + i}": value.astype(np.uint32) for i, value in enumerate(values)}

    def read(name):
        return (
            registers[name]
            if name in registers
            else np.full(inputs[0].shape, int(name, 16 if "x" in name else 10), np.uint32)
        )

    for line in re.split(r";", text):
        line = line.strip().strip("{}").strip() if ".reg" not in line else ""
        if not line:
            continue
        name, _, rest = line.partition(" ")
        target, *sources = (part.strip() for part in re.findall(r"\{[^}]*\}|[^,]+", rest))
        if name == "mov.b32" and target.startswith("{"):
            low, high = (part.strip() for part in target.strip("{}").split(","))
            registers[low], registers[high] = read(sources[0]) & 0xFFFF, read(sources[0]) >> 16
            continue
        registers[target] = INSTRUCTIONS[name](*map(read, sources))
    return [registers[f"${i}"] for i in range(outputs)]


def halves(operation):
    """Of both halves of registers, rounded once."""

    def both(*sources):
        pairs = [np.stack((s & 0xFFFF, s >> 16)).astype(np.uint16).view(np.float16).astype(np.float64) for s in sources]
        found = operation(*pairs).astype(np.float16).view(np.uint16).astype(np.uint32)
        return found[0] | found[1] << 16

    return both


def permute(a, b, selector):
    data = np.stack([(r >> 8 * i) & 0xFF for r in (a, b) for i in range(4)])
    return sum(data[(int(selector.flat[0]) >> 4 * i) & 7].astype(np.uint32) << 8 * i for i in range(4))


def logic(a, b, c, table):
    assert int(table.flat[0]) == 0xEA  # (a and b) or c
    return a & b | c


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, count: a >> count,
    "lop3.b32": logic,
    "prmt.b32": permute,
    "sub.f16x2": halves(lambda a, b: a - b),
    "mul.rn.f16x2": halves(lambda a, b: a * b),
    "fma.rn.f16x2": halves(lambda a, b, c: a * b + c),
    "cvt.f32.f16": lambda a: a.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32),
    "add.f32": lambda a, b: (a.view(np.float32) + b.view(np.float32)).view(np.uint32),
}


def some_words(bits, count=512):
    """codes (count, codes of a word) and the words, every code in every place."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(
        -(1 << (bits - 1)), 1 << (bits - 1), (count, 32 // bits), generator=generator, dtype=torch.int8
    )
    codes[: 1 << bits] = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=torch.int8)[:, None]
    return codes.numpy().astype(np.float64), pack(codes, bits).numpy().view(np.uint32)[:, 0]


def as_halves(register):
    return np.stack((register & 0xFFFF, register >> 16), -1).astype(np.uint16).view(np.float16).astype(np.float64)


def register_of(pairs):
    bits = pairs.astype(np.float16).view(np.uint16).astype(np.uint32)
    return bits[..., 0] | bits[..., 1] << 16


def test_dequant_int4_half2_gives_every_code_exactly():
    codes, word = some_words(4)
    for j, register in enumerate(run(packing.dequant_int4_half2, word)):
        assert (as_halves(register) == codes[:, [j, j + 4]]).all()


def test_dot_half2_is_the_sum_of_eight_products_and_cannot_overflow():
    codes, word = some_words(4)
    pairs = run(packing.dequant_int4_half2, word)
    x = np.random.default_rng(0).normal(size=(len(word), 8))
    for scale in (1.0, 3000.0, 65504 / np.abs(x).max()):
        stored = (x * scale).astype(np.float16).astype(np.float64) * 2.0**-packing.HALF_SHIFT
        planes = [register_of(stored[:, [j, j + 4]]) for j in range(4)]
        (found,) = run(packing.dot_half2, *pairs, *planes)
        exact = (codes * stored).sum(1)
        rounding = 4 * 2.0**-11 * np.abs(codes * stored).sum(1) + 2.0**-23
        assert (np.abs(found.view(np.float32) - exact) <= rounding).all()
    worst = np.full((len(word), 2), 65504 * 2.0**-packing.HALF_SHIFT)
    lowest = [register_of(np.full((len(word), 2), -8.0))] * 4
    (found,) = run(packing.dot_half2, *lowest, *[register_of(worst)] * 4)
    assert np.isfinite(found.view(np.float32)).all() and 2**packing.HALF_SHIFT >= SUM_OF_FOUR_CODES


@pytest.mark.parametrize(("bits", "function"), [(4, packing._dequant_int4_float16), (8, packing._dequant_int8_float16)])
def test_planes_are_scaled_codes_of_two_words(bits, function):
    codes, word = some_words(bits)
    scale = np.random.default_rng(0).normal(size=(len(word) // 2, 2)).astype(np.float16)
    found = run(function, word[::2], word[1::2], register_of(scale.astype(np.float64)), constants=())
    for j, register in enumerate(found):
        exact = np.stack((codes[::2, j], codes[1::2, j]), -1) * scale.astype(np.float64)
        assert (as_halves(register) == exact.astype(np.float16)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_code_reads_every_place_with_the_mask_and_mantissa_it_names(bits):
    codes, word = some_words(bits)
    for element in range(32 // bits):
        upper = (element + 1) * bits > 23
        shift = (12 if bits == 4 else 16) if upper else 0
        at = element * bits - shift
        signed = (word.view(np.int32) >> shift).view(np.uint32)
        (big,) = run(packing.dequant_code, signed, constants=(((1 << bits) - 1) << at, 0x4B000000))
        value = big.view(np.float32).astype(np.float64) / (1 << at) - ((1 << 23) / (1 << at) + (1 << (bits - 1)))
        assert (value == codes[:, element]).all()
