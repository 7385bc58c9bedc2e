"""What the CPU's kernels have beside the contract of test_kernels.py: layouts, functions of floats, assembly, paths.

Kernels run on every instruction set this machine has; of those it has not, the assembly is read.
"""

import ctypes
import math
import mmap
import os
import re
import warnings
from functools import cache

import pytest
import torch
from support.backends import IN_LAYOUTS, ON_PATHS, cases, dtype_of, pieces, random_weight
from support.commands import run_python

from neox_lite.errors import ArgumentError
from neox_lite.formats import DENSE, GroupInt, Weight
from neox_lite.kernels.cpu import activations, attention, gemm, gemv, linear, norm, target
from neox_lite.kernels.cpu.activations import BLOCK, NATURAL, UNIT, Layout
from neox_lite.kernels.cpu.code import F32, I16, Code, vector
from neox_lite.kernels.cpu.compile import assembly, compiled
from neox_lite.kernels.cpu.target import PATHS
from neox_lite.units import dtype_name

pytestmark = pytest.mark.usefixtures("guarded_memory")
here = cases("kernels", ON_PATHS)
in_layouts = cases("kernels", IN_LAYOUTS)
every_lane_count = pytest.mark.parametrize("lanes", [1, 16])  # the ends of rows, and all before them


# Layouts --------------------------------------------------------------------------------------------------------------


@cases("kernels", [k for k in IN_LAYOUTS if k.kind != "planar"])
@pytest.mark.parametrize("bits", [4, 8])
def test_int8_activations_are_the_nearest_codes_for_the_largest_of_32(kernels, bits):
    x = torch.randn(13, 160) * torch.logspace(-20, 20, 13)[:, None]
    x[2] = 0.0
    x[3, 32:64] = torch.linspace(-1e-31, 1e-31, 32)  # too small for 127 / x: counts as zero
    coded = kernels.ops.coded(x, random_weight(GroupInt(bits, 32), 1, 160))
    codes, scales, sums = (t[:13] for t in pieces(coded))
    blocks = x.double().view(13, -1, BLOCK)
    peak = blocks.abs().amax(-1)
    peak[peak < 1e-30] = 0.0
    assert torch.allclose(scales[:, :5].double(), peak / 127, rtol=2.5e-7, atol=0.0)  # two roundings
    steps = torch.where(peak > 0, 127 / peak, 0.0).unsqueeze(-1)
    distance = (codes[:, :160].view(13, -1, BLOCK).double() - blocks * steps).abs()
    assert float(distance.max()) <= 0.5 + 127 * 2.4e-7  # a tie, moved by the rounding of 127 / peak and of the product
    assert int(codes.abs().max()) == 127
    totals, offset = codes.view(13, -1, BLOCK).sum(-1).double(), kernels.ops.target.offset(bits)
    expected = totals * offset * scales.double() if kernels.kind == "gemv" else totals * -offset
    assert torch.allclose(sums.double(), expected, rtol=2e-7, atol=0.0)  # whole numbers, then one product


@cases("kernels", [k for k in IN_LAYOUTS if k.kind == "planar"])
@pytest.mark.parametrize("bits", [4, 8])
def test_planes_hold_the_activations_themselves(kernels, bits):
    x = torch.randn(3, 160)
    assert torch.equal(kernels.reads(x, random_weight(GroupInt(bits, 32), 1, 160))[1], x.double())


# Memory ---------------------------------------------------------------------------------------------------------------


@in_layouts
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_may_start_anywhere_in_a_file(kernels, bits):
    format, x = GroupInt(bits, UNIT), torch.randn(5, 256)
    weight = random_weight(format, 70, 256, dtype_of(format, kernels.kind))
    moved = Weight(weight.format, weight.shape, {name: shifted(t, 1) for name, t in weight.tensors.items()})
    assert moved.tensors["weight_packed"].data_ptr() % 8 == 4
    assert torch.equal(kernels.product(x, moved), kernels.product(x, weight))


def shifted(tensor, elements):
    """A copy whose data starts that many elements beyond a multiple of 64 bytes."""
    memory = torch.zeros(tensor.numel() + 64, dtype=tensor.dtype)
    first = -memory.data_ptr() % 64 // tensor.element_size() + elements
    memory[first : first + tensor.numel()] = tensor.flatten()
    return memory[first : first + tensor.numel()].view(tensor.shape)


@in_layouts
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_nothing_beyond_weights_and_activations_is_read(kernels):
    """Each tensor lies between pages that may not be touched, once at either end; a child process would die of it."""
    # One row of words ends within a unit, but for tiles.
    columns = {128: 256} if kernels.kind == "gemm" else {128: 256, 64: 192}
    formats = [GroupInt(bits, group) for group in columns for bits in (4, 8)]
    weights = [random_weight(f, 70, columns[f.group_size], dtype_of(f, kernels.kind)) for f in formats]
    weights.append(random_weight(DENSE, 70, 33))
    x, gain, ids = torch.randn(12, 256), torch.randn(256), torch.tensor([0, 69])

    def everything(place):
        results = [kernels.call("final_norm", place(x), (place(gain), place(gain), 1e-5))]
        for weight in weights:
            tensors = {name: place(t) for name, t in weight.tensors.items()}
            given = place(x[: 3 if weight.format == DENSE else 12, : weight.shape[1]].contiguous())
            results.append(kernels.product(given, Weight(weight.format, weight.shape, tensors)))
        return [*results, kernels.call("embed", ids, place(weights[-1].tensors["weight"]), torch.float32)]

    expected = everything(lambda t: t)
    for at_end in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of forking with threads: they have no part
            child = os.fork()
        if not child:
            try:
                found = everything(lambda t, at_end=at_end: fenced(t, at_end))
                os._exit(0 if all(map(torch.equal, found, expected)) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0  # -11 is a touched page


_fences = []


def fenced(tensor, at_end):
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


def elementwise(kernels, name, apply, lanes, x, kind=F32):
    """apply over x, compiled for a path: 4-byte elements from 2- or 4-byte ones, or 2-byte ones if the name says to_."""
    name, machine = f"{name}_{lanes}", target.for_path(kernels.path)

    def build(module):
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
    function = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)(compiled(name, build, machine))
    table = torch.tensor([x.data_ptr(), out.data_ptr()])
    function(table.data_ptr(), 0, x.numel(), 0)
    return out


def floats(low, high):
    """Evenly spread floats, and powers of two down to the smallest ones of both signs, in number a multiple of 16."""
    small = torch.logspace(-44, 0, 4096)
    return torch.cat((torch.linspace(low, high, 1 << 18), small, -small, torch.zeros(16)))


@here
@every_lane_count
def test_exp_is_within_2e_7(kernels, lanes):
    x = floats(-87.0, 88.0)
    found = elementwise(kernels, "exp", activations.exp, lanes, x)
    assert float((found.double() / x.double().exp() - 1).abs().max()) < 2e-7
    beyond = torch.tensor([-87.5, -1e5, -math.inf, 88.5, 1e5, math.inf, math.nan]).repeat(16)
    found = elementwise(kernels, "exp", activations.exp, lanes, beyond).view(16, 7)[0].double()
    ends = torch.tensor([-87.0, 88.0]).double().exp()
    assert torch.allclose(found[:6], ends.repeat_interleave(3), rtol=2e-7) and bool(found[6].isnan())


@here
@every_lane_count
@pytest.mark.parametrize("name", ["erf", "tanh"])
def test_gelu_is_within_its_rounding(kernels, name, lanes):
    x = floats(-30.0, 30.0)
    apply = {"erf": activations.gelu_erf, "tanh": activations.gelu_tanh}[name]
    found, exact = elementwise(kernels, f"gelu_{name}", apply, lanes, x).double(), x.double()
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
    found = elementwise(kernels, f"gelu_{name}", apply, lanes, ends).view(16, 5)[0]
    assert not bool(found[0] > 0) and found[1] == math.inf and bool(found[2].isnan())
    assert abs(float(found[3])) < 1e-30 and found[4] == 1e4


def same_bits(found, expected):
    """Equal bit by bit; of a NaN only that it is one, for its payload means nothing."""
    integer = torch.int16 if expected.element_size() == 2 else torch.int32
    bits = found.view(integer) == expected.view(integer)
    return bool((bits | (expected.isnan() & found.view(expected.dtype).isnan())).all())


@here
@every_lane_count
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_floats_of_16_bits_are_widened_exactly(kernels, dtype, lanes):
    name, machine = dtype_name(dtype), target.for_path(kernels.path)
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    found = elementwise(kernels, f"from_{name}", lambda _, v: target.to_float(machine, v, name), lanes, every, kind=I16)
    assert same_bits(found, every.view(dtype).float())


@cache
def rounding_cases():
    """Floats of every upper half, followed by every class of lower halves: at, around and between the ties of both types."""
    lower = [k << 13 | d for k in range(8) for d in (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF)]
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    return (upper[:, None] + torch.tensor(lower)).flatten().to(torch.int32).view(torch.float32)


@here
@every_lane_count
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_floats_are_narrowed_to_the_nearest_even(kernels, dtype, lanes):
    name, machine = dtype_name(dtype), target.for_path(kernels.path)
    x = rounding_cases()
    found = elementwise(kernels, f"to_{name}", lambda _, v: target.from_float(machine, v, name), lanes, x)
    assert same_bits(found, x.to(dtype))


# Assembly: also of instruction sets that this machine lacks -----------------------------------------------------------


def every_kernel(machine):
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
def listings(path, triple=None):
    """Assembly of every kernel."""
    machine = target.generic(path, triple)
    return {name: assembly(build, machine) for name, build in every_kernel(machine)}


def instructions(listing):
    """Lines that are instructions, without labels, directives and comments."""
    lines = (line.split("#")[0].split("//")[0].strip() for line in listing.splitlines())
    return [line for line in lines if line and not line.startswith(".") and not line.endswith(":")]


def loops(listing):
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


def calls(listing):
    return [line for line in instructions(listing) if re.match(r"(call\w*|bl|blr)\s", line)]


# What sums products of bytes; the portable path is left to LLVM.
MULTIPLIERS = {
    "avx512_vnni": r"vpdpbusd\s.*%zmm",
    "avx_vnni": r"\{vex\}\s*vpdpbusd\s.*%ymm",
    "avx2": r"vpmaddubsw\s.*%ymm",
    "neon_dot": r"sdot\s+v\d+\.4s",
}


@pytest.mark.parametrize("path", PATHS)
def test_products_of_bytes_use_the_instruction_of_their_path_and_no_other_s(path):
    of_bytes = {n: text for n, text in listings(path).items() if n.startswith(("gemv_int8", "gemm"))}
    assert len(of_bytes) == 4
    for name, listing in of_bytes.items():
        used = [p for p, wanted in MULTIPLIERS.items() if any(re.match(wanted, x) for x in instructions(listing))]
        assert used == ([] if path == "portable" else [path]), name


@pytest.mark.parametrize("path", PATHS)
def test_every_kernel_compiles_for_every_path_and_calls_no_function(path):
    """Of the C library such as fmaf, or of compilers such as __extendhfsf2: the code is linked with neither."""
    for name, listing in listings(path).items():
        assert calls(listing) == [], name


@pytest.mark.parametrize("triple", ["aarch64-unknown-linux-gnu", "riscv64-unknown-linux-gnu"])
def test_the_portable_path_compiles_for_other_processors(triple):
    for name, listing in listings("portable", triple).items():
        assert name in listing
        if not triple.startswith("riscv"):  # LLVM's plainest one has no floating point: there functions stand for it
            assert calls(listing) == [], name


@pytest.mark.parametrize("path", ["avx_vnni", "avx2"])
def test_paths_for_processors_without_avx512_use_none_of_it(path):
    for name, listing in listings(path).items():
        for line in instructions(listing):
            assert not re.search(r"%zmm|%k\d|%[xy]mm(1[6-9]|2\d|3[01])|\{evex\}", line), (name, line)
            assert not line.startswith("vpdpbusd"), (name, line)  # without {vex} it is AVX-512's


def test_the_portable_path_needs_no_more_than_sse2():
    beyond = r"v\w+\s|p(shufb|maddubsw|abs\w|mov[sz]x\w+|mulld|m(ax|in)s[bd])\s|(round|blend|dp|insert)p?\w+\s"
    for name, listing in listings("portable").items():
        for line in instructions(listing):
            assert "%ymm" not in line and not re.match(beyond, line), (name, line)


@cache
def decode_loops(path, bits, exact=False):
    """The loops over the units of a row, for two tokens and for one; LLVM may have made several of one."""
    machine = target.generic(path)
    _, build = gemv.write_gemv(machine, linear.PackedFormat(bits, 128, "float16"), exact, False)
    found = [body for body in loops(assembly(build, machine)) if any("prefetch" in x or "prfm" in x for x in body)]
    assert len(found) >= 2
    return found


@pytest.mark.parametrize("bits, loads", [(4, 1), (8, 2)])
def test_decoding_on_avx512_reads_a_unit_of_weights_with_full_width_loads(bits, loads):
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
def test_decoding_spills_no_vector(path, exact, bits):
    stack = r"(str|ldr|stp|ldp)\s+q.*\[sp" if path == "neon_dot" else r"v?mov\w+\s.*%[xyz]mm\d+, .*\(%r[sb]p\)"
    for body in decode_loops(path, bits, exact):
        assert not [x for x in body if re.match(stack, x)]


# Choosing a path ------------------------------------------------------------------------------------------------------


def test_the_fastest_path_is_taken():
    assert target.why_not(target.fastest()) is None
    assert all(target.why_not(p) for p in PATHS[: PATHS.index(target.fastest())])
    assert target.for_path(target.fastest()).path == target.fastest()


def test_neox_lite_cpu_forces_a_path():
    script = "from neox_lite.kernels import cpu; import torch; print(cpu.bind(False).target.path)"
    assert run_python(script, NEOX_LITE_CPU="portable").stdout == "portable\n"


@pytest.mark.parametrize("path", ["avx1024", *[p for p in PATHS if target.why_not(p)]])
def test_a_path_that_is_unknown_or_not_here_is_one_clear_line(path, monkeypatch):
    monkeypatch.setenv("NEOX_LITE_CPU", path)
    with pytest.raises(ArgumentError, match=f"^NEOX_LITE_CPU={path}: [^\n]+$") as error:
        target.host.__wrapped__()
    assert ("expected one of" in str(error.value)) == (path not in PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_a_processor_that_lacks_a_path_is_told_what_is_missing(path, monkeypatch):
    machine = {"neon_dot": "aarch64"}.get(path, "x86_64")
    monkeypatch.setattr(target.platform, "machine", lambda: machine)
    monkeypatch.setattr(target.llvm, "get_host_cpu_features", dict)
    reason = target.why_not(path)
    assert reason is None if path == "portable" else reason is not None and reason.startswith("the processor lacks ")
    monkeypatch.setattr(target.platform, "machine", lambda: "riscv64")
    reason = target.why_not(path)
    assert reason is None if path == "portable" else reason is not None and "this is riscv64" in reason
