"""Backends as their contract sees them: weights and inputs to give them, what float64 says of both. Knows no test.

A backend under test says in which layout it reads inputs and what a laid out activation stands for, so that float64 judges
the rounding of an operation alone. Its `call` takes tensors of the CPU and brings them to where the backend runs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from neox_lite.cache import PagePool
from neox_lite.formats import FORMATS, GROUP_SIZES, GROUPED, GroupInt, Weight, label, make_format, pack, unpack
from neox_lite.kernels import dispatch
from neox_lite.kernels.cpu import target
from neox_lite.kernels.cpu.activations import BLOCK, NATURAL, TILE, UNIT, Layout
from neox_lite.kernels.cpu.operations import Operations
from neox_lite.kernels.cpu.program import PackedActivation, Program
from neox_lite.kernels.cpu.target import PATHS
from neox_lite.units import PAGE

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
IN_GROUPS = [GroupInt(bits, size) for bits in (4, 8) for size in GROUP_SIZES]
OTHERS = [make_format(name) for name in FORMATS if name not in GROUPED]
CPU = torch.device("cpu")
KINDS = ("gemv", "planar", "gemm")  # of layouts of the CPU's kernels
ACTIVATIONS = {
    None: lambda x: x,
    "erf": functional.gelu,
    "tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


# Weights --------------------------------------------------------------------------------------------------------------


def stored(format, matrix, dtype=torch.float16, method=None):
    """A matrix (out, in) as a weight that was written to a folder and read again."""
    shape, tensors = tuple(matrix.shape), format.encode(matrix, dtype, method or format.methods[0])
    late = {key: tensors.pop(key) for key in format.late}
    tensors |= format.constants(shape, dtype) | format.finish(late, shape, dtype)
    return Weight(format.opened(tensors, shape), shape, tensors)


def of_codes(format, codes, scale):
    tensors = {"weight_packed": pack(codes, format.bits), "weight_scale": scale}
    return Weight(format, tuple(codes.shape), {**tensors, **format.constants(tuple(codes.shape))})


def gaussian_weight(format, rows, columns, dtype=torch.float16):
    """As models have them; products of order one."""
    return stored(format, torch.randn(rows, columns) / columns**0.5, dtype)


def random_weight(format, rows, columns, dtype=torch.float16):
    """Products of order one. In integer groups all codes are equally frequent and scales have both signs."""
    if not isinstance(format, GroupInt):
        return gaussian_weight(format, rows, columns, dtype)
    top = 1 << (format.bits - 1)
    codes = torch.randint(-top, top, (rows, columns), dtype=torch.int8)
    scale = (torch.rand(rows, columns // format.group_size) - 0.5) * 6 / (top * columns**0.5)
    return of_codes(format, codes, scale.to(dtype))


def exact(weight):
    """What a weight stands for, (out, in) float64; of integer groups without any rounding."""
    if not isinstance(weight.format, GroupInt):
        return weight.decode(torch.float32).double()
    codes = unpack(weight.tensors["weight_packed"], weight.format.bits).double()
    scale = weight.tensors["weight_scale"].double()
    return (codes.unflatten(1, (-1, weight.format.group_size)) * scale.unsqueeze(-1)).flatten(1)


# What float64 says ----------------------------------------------------------------------------------------------------


def largest(errors):
    """Largest magnitude; infinite if one is NaN, which Python's max would pass over."""
    return float(errors.abs().max().nan_to_num(nan=math.inf))


def error(found, truth, size=None):
    """Largest error, relative to the root mean square of the truth where no size is given."""
    return largest(found.double().cpu() - truth) / float(truth.square().mean().sqrt() if size is None else size)


def error_of_sum(found, x, matrix, others=0.0):
    """Largest error of x @ matrix.T + others, relative to the size that a sum of such products has."""
    return error(found, x @ matrix.T + others, (x.square() @ matrix.square().T).mean().sqrt())


def layer_norm(x, norm):
    gain, bias, eps = norm
    return functional.layer_norm(x.double(), gain.shape, gain.double(), bias.double(), eps)


def rotary_table(half, positions=700):
    angles = torch.rand(positions, half) * 6.3
    return torch.stack((angles.cos(), angles.sin()))


def attended(pool, batch, qkv, rotary):
    """Causal attention over the keys and values that the pool holds now."""
    heads, dim, half = pool.storage[0].shape[2], pool.storage[0].shape[4], rotary.shape[2]
    q = qkv.double().view(-1, heads, 3, dim)[:, :, 0] * dim**-0.5
    cos, sin = rotary.double()[:, batch.positions].unsqueeze(2)
    a, b, rest = q[..., :half], q[..., half : 2 * half], q[..., 2 * half :]
    q = torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
    out = torch.zeros(len(qkv), heads, dim, dtype=torch.float64)
    for i, block_table in enumerate(batch.block_tables):
        first, last = batch.offsets[i], batch.offsets[i + 1]
        keys, values = cached(pool, block_table, batch.starts[i] + last - first)
        places = batch.starts[i] + torch.arange(last - first)
        later = torch.arange(keys.shape[1]) > places[:, None]
        scores = torch.einsum("thd,hkd->htk", q[first:last], keys).masked_fill(later, -math.inf)
        out[first:last] = torch.einsum("htk,hkd->thd", scores.softmax(-1), values)
    return out.flatten(1)


def cached(pool, block_table, length):
    """Keys and values of a sequence, (2, heads, length, dim)."""
    numbers = block_table.pages[: -(-length // PAGE)]
    found = pool.storage[0][numbers].cpu().double()
    if pool.scales:
        found = found * pool.scales[0][numbers].cpu().double().unsqueeze(-1)
    return found.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]


def fresh_pool(heads, dim, dtype, device=CPU, pages=16):
    """Pages full of NaN, or of codes whose scale is NaN."""
    pool = PagePool(heads, dim, dtype, [device], pages=pages)
    for tensor in (*pool.storage, *pool.scales):
        tensor.fill_(math.nan if tensor.is_floating_point() else 77)
    return pool


# Backends -------------------------------------------------------------------------------------------------------------


def on(device, thing):
    """Tensors, weights, and lists of them, on a device."""
    if isinstance(thing, Tensor):
        return thing.to(device)
    if isinstance(thing, Weight):
        return replace(thing, tensors=on(device, thing.tensors))
    if isinstance(thing, Mapping):
        return {key: on(device, value) for key, value in thing.items()}
    return type(thing)(on(device, t) for t in thing) if isinstance(thing, (list, tuple)) else thing


@dataclass(frozen=True)
class Plain:
    """A backend of the table as models get it, exact, and given plain tensors."""

    name: str
    step = 0.0  # of activations that are codes, relative to the largest one of 32

    def __str__(self):
        return self.name

    @property
    def device(self):
        return torch.device(
            "cuda" if dispatch.BACKENDS[self.name][1] == "cuda" and torch.cuda.is_available() else "cpu"
        )

    @property
    def marks(self):
        reason = dispatch.load(self.name).why_not(self.device)
        skip = pytest.mark.skipif(reason is not None, reason=f"{self.name}: {reason}")
        return [skip, pytest.mark.gpu] if self.device.type == "cuda" else [skip]

    @cached_property
    def ops(self):
        return dispatch.load(self.name).bind(True)

    def call(self, operation, *given):
        return getattr(self.ops, operation)(*on(self.device, given))

    def reads(self, x, weight):
        """x as the product with a weight reads it, and what that stands for."""
        return x.to(self.device), x.double()

    def natural(self, activation):
        return activation.double().cpu()

    def product(self, x, weight, addends=(), activation=None):
        """One product in float32, and at most one addend."""
        (addend,) = addends or [None]
        return self.call("grouped_linear", [x], [weight], [addend], [activation], [None])[0].cpu()

    def sum(self, inputs, weights, addends, residual):
        """Products, addends and the residual in float32."""
        return self.call("linear_residual", inputs, weights, addends, residual).cpu()


class ForcedOperations(Operations):
    """The CPU's operations on one path, activations of quantized weights in one layout whatever the number of tokens."""

    def __init__(self, path, kind):
        super().__init__(exact=kind == "planar")
        self.target, self.kind = target.for_path(path), kind

    def _layout(self, next_weight, tokens):
        if next_weight is None or not isinstance(next_weight.format, GroupInt):
            return NATURAL
        bits = next_weight.format.bits
        return Layout(self.kind, bits, 0 if self.kind == "planar" else self.target.offset(bits))

    def coded(self, x, weight):
        """x as `weight` reads it."""
        program = Program()
        coded = self._as(program, x, self._layout(weight, len(x)))
        self._run(program)
        return coded


@dataclass(frozen=True)
class Cpu(Plain):
    """kind: how products take activations. gemv: int8, for few tokens; gemm: int8, for many; planar: float32."""

    name: str = "cpu"
    path: str = "portable"
    kind: str = "gemv"

    def __str__(self):
        return f"cpu-{self.path}-{self.kind}"

    @property
    def marks(self):
        reason = target.why_not(self.path)
        return [pytest.mark.skipif(reason is not None, reason=f"{self.path}: {reason}")]

    @property
    def step(self):
        return 0.0 if self.kind == "planar" else 1 / 127

    @cached_property
    def ops(self):
        return ForcedOperations(self.path, self.kind)

    def reads(self, x, weight):
        coded = self.ops.coded(x, weight)
        return coded, self.natural(coded)

    def natural(self, activation):
        """By the words of activations.py; padding is zero."""
        if isinstance(activation, Tensor):
            return activation.double()
        tokens, features = activation.padded
        if activation.layout.kind == "planar":
            per_word = 32 // activation.layout.bits
            planes = activation.memory.view(torch.float32).view(tokens, -1, per_word, UNIT // per_word)
            values = planes.transpose(2, 3).reshape(tokens, features).double()
        else:
            codes, scales, _ = pieces(activation)
            values = codes.double().view(tokens, -1, BLOCK) * scales.double().unsqueeze(-1)
            values = values.flatten(1)[: activation.tokens]
        assert not bool(values[:, activation.features :].any())
        return values[:, : activation.features]


def pieces(coded: PackedActivation):
    """Codes (tokens, features) int8 in natural order, and of each block the scale and the sum as stored."""
    tokens, features = coded.padded
    size, few = tokens * features, coded.layout.kind == "gemv"
    codes, numbers = coded.memory[:size].view(torch.int8), coded.memory[size:]
    scales = numbers[: size // BLOCK * 4].view(torch.float32)
    sums = numbers[size // BLOCK * 4 :].view(torch.float32 if few else torch.int32)
    if few:
        half = UNIT // 2 if coded.layout.bits == 4 else 1
        codes = codes.view(tokens, -1, UNIT // half if half == 1 else 2, half).transpose(2, 3).reshape(tokens, features)
        return codes, scales.view(tokens, -1), sums.view(tokens, -1)
    blocks = codes.view(tokens // TILE, -1, TILE, 2, BLOCK // 2)  # tile, block, token, half, bytes
    if coded.layout.bits == 4:
        blocks = blocks.transpose(3, 4)  # the halves are the even elements and the odd ones
    codes = blocks.permute(0, 2, 1, 3, 4).reshape(tokens, features)
    scales, sums = (t.view(tokens // TILE, -1, TILE).transpose(1, 2).reshape(tokens, -1) for t in (scales, sums))
    return codes, scales, sums


@dataclass(frozen=True)
class Triton(Plain):
    """On a card of a compute capability; exact: no product is summed in float16. kind: of the method it is to choose."""

    name: str = "triton"
    capability: tuple[int, int] = (8, 0)  # with tensor cores and bfloat16; (7, 5) has neither
    exact: bool = False
    kind: str | None = None

    def __str__(self):
        return (
            f"triton-{''.join(map(str, self.capability))}{'-exact' * self.exact}{f'-{self.kind}' if self.kind else ''}"
        )

    @cached_property
    def ops(self):
        from neox_lite.kernels.triton.device import DeviceProperties
        from neox_lite.kernels.triton.operations import Operations

        return Operations(self.exact, lambda device: DeviceProperties(self.capability))

    def layout(self, x, weight):
        """How the kernel that is chosen for a weight reads x; half2 is the one that sums in float16."""
        method = self.ops.linear.method(on(self.device, weight), x.to(self.device))
        assert self.kind in (None, "half2" if method.layout.shift else method.kind), method
        return method.layout

    def reads(self, x, weight):
        from neox_lite.kernels.triton.linear_method import NATURAL, PackedActivation

        layout = self.layout(x, weight)
        if layout == NATURAL:
            return super().reads(x, weight)
        moved = torch.empty_like(x)
        moved[:, order(x.shape[1], layout)] = x * layout.scale
        return PackedActivation(layout, moved.to(self.device)), x.double()

    def natural(self, activation):
        if isinstance(activation, Tensor):
            return activation.double().cpu()
        features = activation.tensor.double().cpu()
        return features[:, order(features.shape[1], activation.layout)] / activation.layout.scale

    def product(self, x, weight, addends=(), activation=None):
        return self._sum([x], [weight], addends, activation=activation)

    def sum(self, inputs, weights, addends, residual):
        if len(inputs) > 2 or len(addends) > 2:
            return super().sum(inputs, weights, addends, residual)
        return self._sum(inputs, weights, [a for a in addends if a is not None], residual=residual)

    def _sum(self, inputs, weights, addends, **more):
        """In float32 whatever the inputs' dtype."""
        from neox_lite.kernels.triton.linear import Call

        call = Call(*on(self.device, (inputs, weights, list(addends))), **on(self.device, more), dtype=torch.float32)
        return self.ops.linear([call])[0].cpu()


def order(features, layout):
    """The place of each feature in a layout of the Triton kernels: the rule of packing.py, written once more."""
    feature, per_word, planes = torch.arange(features), layout.pack_factor, layout.num_planes
    word, element = feature // per_word, feature % per_word
    return (element % planes * (features // per_word) + word) * (per_word // planes) + element // planes


AMPERE, TURING = Triton(), Triton(capability=(7, 5))
EVERY = [Plain(name) for name in dispatch.BACKENDS]
PLAIN = [plain for plain in EVERY if plain.name not in ("cpu", "triton")]
ON_PATHS = [Cpu(path=path) for path in PATHS]
IN_LAYOUTS = [Cpu(path=path, kind=kind) for path in PATHS for kind in KINDS]


def dtype_of(format, kind):
    """One dtype of scales for each format and layout: every two of the three meet, at a third of the kernels."""
    return DTYPES[(format.bits // 4 + format.group_size // 32 // 2 + KINDS.index(kind or KINDS[0])) % 3]


def cases(names, rows):
    """Parameters of a test: rows that begin with a backend, skipped with the reason where this machine lacks it."""
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    ids = ["-".join(word for part in row if (word := _named(part))) for row in rows]
    params = [pytest.param(*row, marks=row[0].marks, id=id) for row, id in zip(rows, ids, strict=True)]
    return pytest.mark.parametrize(names, params)


def _named(part):
    """A word for an id; none for shapes and bounds."""
    if isinstance(part, torch.dtype):
        return str(part).removeprefix("torch.")
    if isinstance(part, tuple) and isinstance(part[0], torch.dtype):
        return "-".join(dict.fromkeys(map(_named, part)))
    if hasattr(part, "bits_per_weight"):
        return label(part, "dense").replace(" ", "-")
    return "" if isinstance(part, (tuple, list, float, dict)) else str(part)
