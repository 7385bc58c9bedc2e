"""Products as launches of kernels: over which grid, with what memory. Knows tensors and formats, no instruction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import NF4, GroupInt, Weight
from . import activations, device_calls, gemv, linear_method, matmul, tile_configs, tuning
from .device import DeviceProperties
from .linear_method import NATURAL, Activation, Layout, LinearMethod, PackedActivation, layout_of, tensor_of

# Bytes of a weight that are dequantized for cuBLAS at a time.
SLICE_BYTES = 64 << 20
# Rows and words that a program of matmul.dequantize takes.
DEQUANTIZE_BLOCK = (4, 128)
# Features that a program of activations.epilogue takes.
EPILOGUE_BLOCK = 1024
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Call:
    """activation(sum of inputs[i] @ weights[i].T + sum of addends + residual), as `next_weight` reads it.

    dtype: of the result; None: the inputs'. out: its memory; None: new. At most two products and two addends: what a kernel
    takes.
    """

    inputs: Sequence[Activation]
    weights: Sequence[Weight]
    addends: Sequence[Tensor] = ()
    activation: str | None = None
    next_weight: Weight | None = None
    residual: Tensor | None = None
    dtype: torch.dtype | None = None
    out: Tensor | None = None

    @property
    def tokens(self) -> int:
        return len(tensor_of(self.inputs[0]))

    @property
    def size(self) -> int:
        return self.weights[0].shape[0]


class LinearKernels:
    """Products on the devices that `properties` and `tuner` know; exact: none is summed in float16."""

    def __init__(
        self,
        exact: bool,
        properties: Callable[[torch.device], DeviceProperties],
        tuner: Callable[[torch.device], tuning.Tuner],
        scratch: Callable[[Tensor, int], Tensor],
    ) -> None:
        """scratch: memory for so many elements like those of a tensor."""
        self.exact, self.properties, self.tuner, self._scratch = exact, properties, tuner, scratch
        self.slice_bytes = SLICE_BYTES

    def method(self, weight: Weight, like: Tensor) -> LinearMethod:
        """How a weight meets activations such as `like`."""
        return linear_method.choose(weight, like, self.properties(like.device), self.exact)

    def empty(self, next_weight: Weight | None, like: Tensor, features: int) -> Activation:
        """Memory for so many features of the tokens of `like`, in the layout that `next_weight` reads."""
        memory = torch.empty(len(like), features, dtype=like.dtype, device=like.device)
        layout = NATURAL if next_weight is None else self.method(next_weight, like).layout
        return memory if layout == NATURAL else PackedActivation(layout, memory)

    def __call__(self, calls: Sequence[Call]) -> list[Activation]:
        """The result of every call; two of one method and one number of columns in one launch."""
        methods = [[self.method(w, tensor_of(x)) for x, w in zip(c.inputs, c.weights, strict=True)] for c in calls]
        calls = [self._in_layout(c, m) for c, m in zip(calls, methods, strict=True)]
        single = all(len(c.inputs) == 1 and c.residual is None and c.tokens for c in calls)
        if len(calls) == 2 and single and methods[0][0].kind == "gemv":
            columns = [c.weights[0].shape[1] for c in calls]
            if methods[0] == methods[1] and columns[0] == columns[1]:
                return self._grouped_gemv(methods[0][0], calls)
        return [self._product(c, m) for c, m in zip(calls, methods, strict=True)]

    def _product(self, call: Call, methods: Sequence[LinearMethod]) -> Activation:
        if not call.tokens:
            return self._out(call)
        if len(methods) == 2 and methods[0] is not methods[1] and methods[0] != methods[1]:
            # Each product by its own method, then the sum.
            parts = [Call([x], [w], dtype=torch.float32) for x, w in zip(call.inputs, call.weights, strict=True)]
            products = [tensor_of(self._product(c, [m])) for c, m in zip(parts, methods, strict=True)]
            return self._epilogue(call, products)
        if methods[0].kind == "torch":
            dtype = torch.float32 if len(methods) > 1 else call.dtype or tensor_of(call.inputs[0]).dtype
            out = call.out if len(methods) == 1 else None
            products = [self.by_torch(x, w, dtype, out) for x, w in zip(call.inputs, call.weights, strict=True)]
            return self._epilogue(call, products)
        if methods[0].kind == "gemm":
            return self._gemm(methods[0], call)
        if call.residual is None and len(call.inputs) == 1:
            return self._grouped_gemv(methods[0], [call])[0]
        return self._gemv_residual(methods[0], call)

    # Layouts ----------------------------------------------------------------------------------------------------------

    def _out(self, call: Call) -> Activation:
        if call.out is not None:
            return call.out
        like = tensor_of(call.inputs[0])
        if call.dtype is not None:
            return torch.empty(call.tokens, call.size, dtype=call.dtype, device=like.device)
        return self.empty(call.next_weight, like, call.size)

    def _in_layout(self, call: Call, methods: Sequence[LinearMethod]) -> Call:
        """The call with inputs that are plain tensors brought into the layouts that its weights read."""
        if not call.tokens or all(layout_of(x) == m.layout for x, m in zip(call.inputs, methods, strict=True)):
            return call
        return replace(call, inputs=[self._as(x, m.layout) for x, m in zip(call.inputs, methods, strict=True)])

    def _as(self, x: Activation, layout: Layout) -> Activation:
        if layout_of(x) == layout:
            return x
        assert isinstance(x, Tensor)
        out = PackedActivation(layout, torch.empty(x.shape, dtype=x.dtype, device=x.device))
        device_calls.launch(
            activations.epilogue, (len(x), triton.cdiv(x.shape[1], EPILOGUE_BLOCK)),
            x.contiguous(), None, None, 0, None, 0, None, out.tensor,
            x.shape[1], EPILOGUE_BLOCK, None, *layout_arguments(out), num_warps=4,
        )  # fmt: skip
        return out

    # Kernels ----------------------------------------------------------------------------------------------------------

    def _grouped_gemv(self, method: LinearMethod, calls: Sequence[Call]) -> list[Activation]:
        """One or two products of one method over as many columns, in one launch of gemv.py."""
        # 1. The arguments of each product; where there is one, the second's are empty.
        inputs, outs = [tensor_of(c.inputs[0]) for c in calls], [self._out(c) for c in calls]
        tokens, columns = inputs[0].shape
        pointers: list[object] = []
        shapes: list[object] = []
        for call, x, out in zip(calls, inputs, outs, strict=True):
            pointers += [_as_pairs(x, method), *_stored(call.weights[0], method), *_addend(call, 0), tensor_of(out)]
            shapes += [call.size, call.activation, *layout_arguments(out)]
        if len(calls) == 1:
            pointers += [None, None, None, None, 0, None]
            shapes += [0, None, 1, 1, 1.0]
        compute = method.compute(inputs[0])

        # 2. Launch with the size of tile that the card takes.
        def launch(tile: tile_configs.GemvTile) -> None:
            blocks = sum(triton.cdiv(c.size, tile.block_n * tile.unroll_n) for c in calls)
            device_calls.launch(
                gemv.grouped_gemv, (blocks, triton.cdiv(tokens, tile.block_m)),
                *pointers, tokens, 1.0 / method.layout.scale, columns, method.bits, method.group_size, compute,
                tile.block_m, tile.block_n, tile.unroll_n, tile.groups, tile.group_words, *shapes,
                num_warps=tile.num_warps, maxnreg=tile.maxnreg,
            )  # fmt: skip

        size, device, words = sum(c.size for c in calls), inputs[0].device, (method.words(columns),)
        candidates = tile_configs.gemv_tiles(
            self.properties(device), size, words, method.bits, method.group_words, tokens, compute
        )
        launch(self.tuner(device).pick(candidates, launch))
        return outs

    def _gemv_residual(self, method: LinearMethod, call: Call) -> Tensor:
        """The sum of one or two products and a residual, in one launch of gemv.py."""
        inputs, out = [tensor_of(x) for x in call.inputs], tensor_of(self._out(call))
        columns = [x.shape[1] for x in inputs]
        compute = method.compute(inputs[0])

        def launch(tile: tile_configs.GemvTile) -> None:
            grid = triton.cdiv(call.size, tile.block_n * tile.unroll_n), triton.cdiv(call.tokens, tile.block_m)
            device_calls.launch(
                gemv.gemv_residual, grid,
                *_operands(method, call), out, call.tokens, 1.0 / method.layout.scale, *[*columns, 0][:2],
                method.bits, method.group_size, compute,
                tile.block_m, tile.block_n, tile.unroll_n, tile.groups, tile.group_words, call.size,
                num_warps=tile.num_warps, maxnreg=tile.maxnreg,
            )  # fmt: skip

        words = tuple(map(method.words, columns))
        candidates = tile_configs.gemv_tiles(
            self.properties(out.device), call.size, words, method.bits, method.group_words, call.tokens, compute
        )
        launch(self.tuner(out.device).pick(candidates, launch))
        return out

    def _gemm(self, method: LinearMethod, call: Call) -> Activation:
        """One or two products by tensor cores, matmul.py."""
        inputs, out = [tensor_of(x) for x in call.inputs], self._out(call)
        columns, dtype = [x.shape[1] for x in inputs], inputs[0].dtype

        def launch(tile: tile_configs.GemmTile) -> None:
            grid = triton.cdiv(call.tokens, tile.block_m), triton.cdiv(call.size, tile.block_n)
            device_calls.launch(
                matmul.gemm, grid,
                *_operands(method, call), tensor_of(out), call.tokens, *[*columns, 0][:2],
                method.bits, method.group_size, DTYPES[dtype], tile.block_n, tile.block_m, tile.block_k,
                call.size, call.activation, *layout_arguments(out)[:2],
                num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.maxnreg,
            )  # fmt: skip

        candidates = tile_configs.gemm_tiles(call.size, sum(columns), call.tokens, method.bits, dtype)
        launch(self.tuner(inputs[0].device).pick(candidates, launch))
        return out

    def by_torch(self, x: Activation, weight: Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """x @ weight.T by cuBLAS, nf4 by bitsandbytes. Integer codes are dequantized slice by slice, into the same memory."""
        assert isinstance(x, Tensor)
        format, (size, columns) = weight.format, weight.shape
        if out is None:
            out = torch.empty(len(x), size, dtype=dtype, device=x.device)
        if isinstance(format, NF4):
            device_calls.nf4_mm(x, weight, out)
            return out
        if not isinstance(format, GroupInt):
            device_calls.mm(x, weight.decode(x.dtype), out)
            return out
        packed, scale = _stored(weight, LinearMethod("torch", format.bits))
        step = min(size, max(1, self.slice_bytes // (columns * x.element_size())))
        scratch = self._scratch(x, step * columns)
        for first in range(0, size, step):
            count = min(step, size - first)
            rows = scratch[: count * columns].view(count, columns)
            grid = triton.cdiv(count, DEQUANTIZE_BLOCK[0]), triton.cdiv(packed.shape[1], DEQUANTIZE_BLOCK[1])
            device_calls.launch(
                matmul.dequantize, grid, packed, scale, rows, first, count, columns, format.bits, format.group_size,
                *DEQUANTIZE_BLOCK, num_warps=4,
            )  # fmt: skip
            device_calls.mm(x, rows, out[:, first : first + count])
        return out

    def _epilogue(self, call: Call, products: Sequence[Tensor]) -> Activation:
        """What is left to do after one or two products."""
        out = self._out(call)
        rest = call.addends or call.activation or call.residual is not None
        if isinstance(out, Tensor) and out.dtype == products[0].dtype and len(products) == 1 and not rest:
            return products[0]
        device_calls.launch(
            activations.epilogue, (call.tokens, triton.cdiv(call.size, EPILOGUE_BLOCK)),
            *[*products, None][:2], *_addend(call, 0), *_addend(call, 1), call.residual, tensor_of(out),
            call.size, EPILOGUE_BLOCK, call.activation, *layout_arguments(out), num_warps=4,
        )  # fmt: skip
        return out


def layout_arguments(x: Activation) -> tuple[int, int, float]:
    """PACK_FACTOR, NUM_PLANES and SCALE of a kernel that writes x."""
    layout = layout_of(x)
    return layout.pack_factor, layout.num_planes, layout.scale


def _as_pairs(x: Tensor, method: LinearMethod) -> Tensor:
    """Activations as gemv.py loads them: two at a time where they lie as pairs."""
    if method.kind != "gemv" or not method.bits:
        return x
    return x.view(torch.int32 if x.element_size() == 2 else torch.int64)


def _stored(weight: Weight, method: LinearMethod) -> tuple[Tensor, Tensor | None]:
    """A weight's words and scales, or a plain matrix."""
    tensors = weight.tensors
    if not method.bits:
        return tensors["weight"].contiguous(), None
    return tensors["weight_packed"].contiguous(), tensors["weight_scale"].contiguous()


def _operands(method: LinearMethod, call: Call) -> list[object]:
    """The arguments of one or two summed products: inputs and weights, addends, residual."""
    operands: list[object] = []
    for x, weight in zip(call.inputs, call.weights, strict=True):
        operands += [_as_pairs(tensor_of(x), method), *_stored(weight, method)]
    operands += [None] * (6 - len(operands))
    return [*operands, *_addend(call, 0), *_addend(call, 1), call.residual]


def _addend(call: Call, i: int) -> tuple[Tensor | None, int]:
    """An addend and its stride from token to token: 0 where every token has the same."""
    if i >= len(call.addends):
        return None, 0
    addend = call.addends[i].contiguous()
    return addend, addend.shape[1] if addend.dim() == 2 else 0
