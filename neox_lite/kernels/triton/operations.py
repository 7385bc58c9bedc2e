"""The operations as launches of kernels: which kernel, over which grid, with what memory. Knows tensors, no instruction.

Activations between operations are plain tensors, or `Laid` as words.py says where a kernel with a quantized weight reads them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ...cache import Batch, PagePool
from ...formats import NF4, Dense, GroupInt, Weight
from ...units import PAGE, dtype_name
from .. import nf4
from ..backend import Forward, Norm, PassRunner
from ..graphs import EagerRunner
from . import activations, attention, embed_and_sample, gemv, interpreted, matmul, tile_configs, tuning
from .cuda_graph import CudaGraphs
from .device import DeviceProperties, properties_of
from .packing import SHIFT
from .steps import GraphDevice, GraphRunner, Inputs


@dataclass(frozen=True)
class Layout:
    """How activations lie: in `planes` planes for words of so many codes (words.py), times 2**-shift."""

    codes: int = 1
    planes: int = 1
    shift: int = 0

    @property
    def scale(self) -> float:
        return 2.0**-self.shift


NATURAL = Layout()


@dataclass(frozen=True)
class Laid:
    """Activations (tokens, features) that do not lie in natural order."""

    layout: Layout
    memory: Tensor


Activation = Tensor | Laid


def memory(x: Activation) -> Tensor:
    return x.memory if isinstance(x, Laid) else x


def layout_of(x: Activation) -> Layout:
    return x.layout if isinstance(x, Laid) else NATURAL


@dataclass(frozen=True)
class Way:
    """How a weight is multiplied: by which kernel, of which format, with activations in which layout."""

    kind: Literal["rows", "tiles", "torch"]
    bits: int = 0  # of a code; 0: a plain matrix
    group: int = 1
    layout: Layout = NATURAL
    stored: torch.dtype | None = None  # of scales, or of a plain matrix

    def words(self, columns: int) -> int:
        """In a row of a weight."""
        return columns * self.bits // 32 if self.bits else columns

    @property
    def inner(self) -> int:
        """Words that share a scale; 1 for a plain matrix."""
        return self.group * self.bits // 32 if self.bits else 1


TORCH = Way("torch")


@cache
def _coded(kind: Literal["rows", "tiles"], bits: int, group: int, planes: int, shift: int, stored: torch.dtype) -> Way:
    """Of a quantized weight: one object for each, so that telling two apart costs nothing."""
    return Way(kind, bits, group, Layout(32 // bits, planes, shift), stored)


PLAIN_ROWS = 2  # most tokens for which a plain matrix is multiplied by gemv.py, above by cuBLAS
SLICE_BYTES = 64 << 20  # of a weight written out for cuBLAS at a time
DECODED = (4, 128)  # rows and words that a program writes out
PAGES_TO_TIME, TOKENS_TO_TIME = 4, 256  # of a context, and of prompts: with less, attention is all start and end
FINISHED = 1024  # features that a program of activations.finish or embed_and_sample.embed takes
LISTED = 4096  # ids that a program of embed_and_sample.draw looks at together
MATH = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Output:
    """activation(sum of inputs[i] @ weights[i].T + sum of addends + x), as `next_weight` reads it.

    dtype: of the result; None: the inputs'. At most two products and two addends: what a kernel takes.
    """

    inputs: Sequence[Activation]
    weights: Sequence[Weight]
    addends: Sequence[Tensor] = ()
    activation: str | None = None
    next_weight: Weight | None = None
    x: Tensor | None = None
    dtype: torch.dtype | None = None
    memory: Tensor | None = None  # for the result; None: new

    @property
    def tokens(self) -> int:
        return len(memory(self.inputs[0]))

    @property
    def size(self) -> int:
        return self.weights[0].shape[0]


class BatchTable:
    """A batch as attention.py reads it: one int32 tensor on the device, cut into tables."""

    def __init__(self, batch: Batch, device: torch.device, queries: int) -> None:
        """queries: most tokens of a sequence that one program takes."""
        counts = [last - first for first, last in zip(batch.offsets, batch.offsets[1:], strict=False)]
        self.single = all(count <= 1 for count in counts)
        self.max_pages = max([1, *(-(-(s + n) // PAGE) for s, n in zip(batch.starts, counts, strict=True) if n)])
        sequences = torch.tensor([*zip(batch.starts, batch.offsets, counts, strict=False)], dtype=torch.int32)
        pages = torch.zeros(len(counts), self.max_pages, dtype=torch.int32)
        for row, block_table in zip(pages, batch.block_tables, strict=True):
            used = block_table.pages[: self.max_pages]
            row[: len(used)] = torch.tensor(used, dtype=torch.int32)
        tokens = torch.stack((batch.positions, batch.pages, batch.slots), 1).int()
        starts = [(i, q) for i, count in enumerate(counts) for q in range(0, count, queries)]
        blocks = torch.tensor(starts, dtype=torch.int32)
        # Each at a multiple of 16 bytes, whatever the batch: where a table begins would otherwise choose the compiled kernel.
        parts = [functional.pad(t.flatten(), (0, -t.numel() % 4)) for t in (sequences, pages, tokens, blocks)]
        on_device = torch.cat(parts).to(device, non_blocking=True)
        self.sequences, self.pages, self.tokens, self.blocks = on_device.split([len(p) for p in parts])
        self.count, self.block_count, self.queries = len(counts), len(starts), queries
        self.splits = self.max_pages


@dataclass
class _Local(threading.local):
    """A thread's own, for another may run another model: the last batch's table, scratch by device, a step being captured."""

    batch: tuple[Batch, torch.device, BatchTable] | None = None
    scratch: dict[torch.device, Tensor] = field(default_factory=dict)
    step: Inputs | None = None


class Operations:
    """The backend of one precision; exact: no product is summed in halves."""

    name = "triton"

    def __init__(
        self,
        exact: bool,
        properties: Callable[[torch.device], DeviceProperties] = properties_of,
        tuner: Callable[[torch.device], tuning.Tuner] = tuning.tuner,
        graphs: Callable[[torch.device], GraphDevice] | None = None,
    ) -> None:
        """properties: of a device. tuner: picks the sizes of kernels there. graphs: what captures steps there; None: CUDA,
        where kernels are compiled."""
        self.exact, self.properties, self.tuner, self.slice_bytes = exact, properties, tuner, SLICE_BYTES
        self._graphs = graphs or (None if interpreted() else CudaGraphs)
        self._local = _Local()

    def activation_dtype(self, weights: torch.dtype, device: torch.device) -> torch.dtype:
        """The weights' own; float32 where the card has no bfloat16, announced."""
        if weights != torch.bfloat16 or self.properties(device).bfloat16:
            return weights
        warnings.warn("this card has no bfloat16, float32 is used instead; .half() is faster", stacklevel=3)
        return torch.float32

    # Operations -------------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """ids (tokens,) int64, weight (vocabulary, hidden) -> x (tokens, hidden) in `dtype`."""
        ids, step, features = ids.to(weight.device), self._local.step, weight.shape[1]
        x = torch.empty(len(ids), features, dtype=dtype, device=weight.device)
        if len(ids):
            _launch(
                embed_and_sample.embed, (len(ids), triton.cdiv(features, FINISHED)), ids, ids.stride(0),
                None if step is None else step.sampled, weight.contiguous(), x, features, FINISHED, num_warps=4,
            )  # fmt: skip
        return x

    def layer_norms(self, x: Tensor, lns: Sequence[Norm], next_weights: Sequence[Weight | None]) -> list[Activation]:
        """x (tokens, hidden) -> one LayerNorm of x for each (gain, bias, eps), as its next weight reads it."""
        outs = [self._empty(w, x, x.shape[1]) for w in next_weights]
        for i in range(0, len(lns), 2):
            self._norms(x.contiguous(), lns[i : i + 2], outs[i : i + 2])
        return outs

    def grouped_linear(
        self,
        inputs: Sequence[Activation],
        weights: Sequence[Weight],
        addends: Sequence[Tensor | None],
        activations: Sequence[str | None],
        next_weights: Sequence[Weight | None],
    ) -> list[Activation]:
        """out[i] = activation[i](inputs[i] @ weights[i].T + addends[i]); addends (out,) or (tokens, out), or None."""
        given = [[] if a is None else [a] for a in addends]
        outputs = map(Output, ([a] for a in inputs), ([w] for w in weights), given, activations, next_weights)
        return self._products(list(outputs))

    def attention(
        self, qkv: Activation, cache: PagePool, layer: int, batch: Batch, rotary: Tensor, next_weight: Weight | None
    ) -> Activation:
        """Rotary, append to the cache, causal attention: qkv (tokens, heads * 3 * head_dim) -> (tokens, heads * head_dim)."""
        assert isinstance(qkv, Tensor)
        storage = cache.storage[layer]
        heads, dim = storage.shape[2], storage.shape[4]
        out = self._empty(next_weight, qkv, heads * dim)
        if not len(qkv):
            return out
        qkv, rotary = qkv.contiguous(), rotary.to(qkv.device).contiguous()
        table = self._table(batch, qkv.device)
        pool = storage, cache.scales[layer] if cache.scales else None
        piece = max(16, dim & -dim)  # the largest power of two that divides it; tl.dot takes no less than 16
        shape = heads, dim, rotary.shape[2], piece, triton.cdiv(dim, piece)
        int8, scaling = bool(cache.scales), dim**-0.5
        pages = table.sequences, table.pages, table.max_pages
        if table.single:
            splits = table.splits
            alone = splits == 1
            many = (0,) if alone else (len(qkv), heads, splits)
            parts, stats = torch.empty(*many, dim, device=qkv.device), torch.empty(*many, 2, device=qkv.device)

            def page(tile: tile_configs.Page) -> None:
                _launch(
                    attention.attend_page, (table.count, heads, splits),
                    qkv, rotary, rotary.shape[1], *pool, *pages, table.tokens, scaling, parts, stats, memory(out),
                    *shape, tile.lanes, int8, alone, *_placed(out), num_warps=tile.warps,
                )  # fmt: skip

            typical = splits >= PAGES_TO_TIME
            page(self.tuner(qkv.device).pick(tile_configs.page(piece, int8, qkv.dtype), page if typical else None))
            if not alone:
                _launch(
                    attention.combine, (len(qkv), heads), parts, stats, splits, memory(out),
                    heads, dim, triton.next_power_of_2(dim), 16, *_placed(out), num_warps=4,
                )  # fmt: skip
            return out
        assert isinstance(table, BatchTable)
        q = torch.empty(len(qkv), heads, dim, device=qkv.device)
        _launch(
            attention.append, (len(qkv), heads), qkv, rotary, rotary.shape[1], *pool, table.tokens, scaling, q,
            *shape, int8, num_warps=1,
        )  # fmt: skip
        heads, dim, _, *pieces = shape

        def block(tile: tile_configs.Blocks) -> None:
            _launch(
                attention.attend_block, (table.block_count, heads), q, *pool, *pages, table.blocks, memory(out),
                heads, dim, *pieces, table.queries, tile.keys, int8, MATH[qkv.dtype], *_placed(out),
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip

        typical = len(qkv) >= TOKENS_TO_TIME
        candidates = tile_configs.blocks(self.properties(qkv.device), dim, int8, qkv.dtype)
        block(self.tuner(qkv.device).pick(candidates, block if typical else None))
        return out

    def linear_residual(
        self, inputs: Sequence[Activation], weights: Sequence[Weight], addends: Sequence[Tensor | None], x: Tensor
    ) -> Tensor:
        """x + sum of inputs[i] @ weights[i].T + sum of addends -> (tokens, hidden)."""
        given = [a for a in addends if a is not None]
        if len(inputs) > 2 or len(given) > 2:  # the rest first
            x = self.linear_residual(inputs[2:], weights[2:], given[2:], x)
        if not inputs:
            return x + sum(given[:2])
        (out,) = self._products([Output(inputs[:2], weights[:2], given[:2], x=x.contiguous())])
        assert isinstance(out, Tensor)
        return out

    def head(self, x: Tensor, rows: Tensor | None, norm: Norm, weight: Weight) -> Tensor:
        """Final norm and vocabulary projection of the chosen rows (None: all) -> (rows, vocabulary) float32 logits."""
        chosen = x if rows is None else x[rows.to(x.device, non_blocking=True)]
        inputs, step = self.layer_norms(chosen, [norm], [weight]), self._local.step
        memory = None if step is None else step.logits
        (out,) = self._products([Output(inputs, [weight], dtype=torch.float32, memory=memory)])
        assert isinstance(out, Tensor)
        return out

    def final_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """x (tokens, hidden) -> the last hidden state, for models without a vocabulary projection."""
        (out,) = self.layer_norms(x, [norm], [None])
        assert isinstance(out, Tensor)
        return out

    def pass_runner(
        self, forward: Forward, device: torch.device, limit: int, vocabulary: int | None = None
    ) -> PassRunner:
        """Steps as CUDA graphs, which have to end in logits."""
        if self._graphs is None:
            return EagerRunner(forward, "kernels run in Triton's interpreter, which knows no CUDA graphs")
        if vocabulary is None:
            return EagerRunner(forward, "a part of a model is not a step")
        return GraphRunner(forward, self._step(forward), self._graphs(device), device, vocabulary, limit)

    def _step(self, forward: Callable[[Tensor, PagePool, Batch], Tensor]) -> Callable[[PagePool, Inputs], None]:
        """All of a step, launches and nothing else: from ids to the ids that follow."""

        def run(pool: PagePool, inputs: Inputs) -> None:
            with self._reading(inputs):
                logits = forward(inputs.ids, pool, inputs.batch)
            self._draw(logits, inputs)

        return run

    def _draw(self, logits: Tensor, inputs: Inputs) -> None:
        """Choose the ids that follow, from logits (rows, vocabulary)."""
        rows, vocabulary = logits.shape
        values, ids = torch.empty_like(logits), torch.empty_like(logits, dtype=torch.int32)
        _launch(
            embed_and_sample.draw, (rows,), logits, inputs.excluded, inputs.sequences, attention.SEQUENCE.value,
            inputs.sampling, values, ids, inputs.sampled, vocabulary, min(LISTED, triton.next_power_of_2(vocabulary)),
            num_warps=16,
        )  # fmt: skip

    @contextmanager
    def _reading(self, inputs: Inputs) -> Iterator[None]:
        """Take the batch, the tokens before it and the memory of logits from there."""
        self._local.step = inputs
        try:
            yield
        finally:
            self._local.step = None

    # Products ---------------------------------------------------------------------------------------------------------

    def _way(self, weight: Weight, like: Tensor) -> Way:
        """How a weight meets activations such as `like` (tokens, ...): all that a kernel must know of the two."""
        properties, format, tokens = self.properties(like.device), weight.format, len(like)
        if isinstance(format, Dense):
            rows = tokens <= PLAIN_ROWS and weight.tensors["weight"].numel() < 1 << 31
            return Way("rows", stored=weight.tensors["weight"].dtype) if rows else TORCH
        if not isinstance(format, GroupInt):
            return TORCH
        bits, scale = format.bits, weight.tensors["weight_scale"].dtype
        if tokens <= properties.rows_up_to:
            halves = bits == 4 and like.dtype == torch.float16 and not self.exact
            return _coded("rows", bits, format.group_size, 16 // bits, SHIFT if halves else 0, scale)
        if tokens <= properties.tiles_up_to and like.dtype in properties.tensor_core_dtypes:
            return _coded("tiles", bits, format.group_size, 32 // bits, 0, scale)
        return TORCH

    def _empty(self, next_weight: Weight | None, like: Tensor, features: int) -> Activation:
        """Memory for so many features of the tokens of `like`, laid out for the weight that will read it."""
        memory = torch.empty(len(like), features, dtype=like.dtype, device=like.device)
        layout = NATURAL if next_weight is None else self._way(next_weight, like).layout
        return memory if layout == NATURAL else Laid(layout, memory)

    def _out(self, output: Output) -> Activation:
        if output.memory is not None:
            return output.memory
        like = memory(output.inputs[0])
        if output.dtype is not None:
            return torch.empty(output.tokens, output.size, dtype=output.dtype, device=like.device)
        return self._empty(output.next_weight, like, output.size)

    def _products(self, outputs: Sequence[Output]) -> list[Activation]:
        """Every output; two that agree in all that a kernel must know in one launch."""
        ways = [[self._way(w, memory(o.inputs[0])) for w in o.weights] for o in outputs]
        outputs = [self._laid(o, w) for o, w in zip(outputs, ways, strict=True)]
        single = all(len(o.inputs) == 1 and o.x is None and o.tokens for o in outputs)
        if len(outputs) == 2 and single and ways[0][0].kind == "rows":
            columns = [o.weights[0].shape[1] for o in outputs]
            if ways[0] == ways[1] and columns[0] == columns[1]:
                return self._beside(ways[0][0], outputs)
        return [self._product(o, w) for o, w in zip(outputs, ways, strict=True)]

    def _laid(self, output: Output, ways: Sequence[Way]) -> Output:
        """The output with inputs that are plain tensors laid out for the weights that read them."""
        if all(layout_of(a) == w.layout for a, w in zip(output.inputs, ways, strict=True)) or not output.tokens:
            return output
        inputs = [self._as(a, w.layout) for a, w in zip(output.inputs, ways, strict=True)]
        return replace(output, inputs=inputs)

    def _as(self, x: Activation, layout: Layout) -> Activation:
        if layout_of(x) == layout:
            return x
        assert isinstance(x, Tensor)
        out = Laid(layout, torch.empty(x.shape, dtype=x.dtype, device=x.device))
        _launch(
            activations.finish, (len(x), triton.cdiv(x.shape[1], FINISHED)),
            x.contiguous(), None, None, 0, None, 0, None, out.memory,
            x.shape[1], FINISHED, None, *_placed(out), num_warps=4,
        )  # fmt: skip
        return out

    def _product(self, output: Output, ways: Sequence[Way]) -> Activation:
        if not output.tokens:
            return self._out(output)
        if len(ways) == 2 and ways[0] is not ways[1] and ways[0] != ways[1]:  # each part its own way
            parts = [Output([a], [w], dtype=torch.float32) for a, w in zip(output.inputs, output.weights, strict=True)]
            return self._finished(output, [memory(self._product(o, [w])) for o, w in zip(parts, ways, strict=True)])
        if ways[0].kind == "torch":
            dtype = torch.float32 if len(ways) > 1 else output.dtype or memory(output.inputs[0]).dtype
            into = output.memory if len(ways) == 1 else None
            products = [self._by_torch(a, w, dtype, into) for a, w in zip(output.inputs, output.weights, strict=True)]
            return self._finished(output, products)
        if ways[0].kind == "tiles":
            return self._tiles(ways[0], output)
        if output.x is None and len(output.inputs) == 1:
            return self._beside(ways[0], [output])[0]
        return self._sum(ways[0], output)

    def _beside(self, way: Way, outputs: Sequence[Output]) -> list[Activation]:
        """One or two products of the same kind over as many columns, in one launch of gemv.py."""
        inputs = [memory(o.inputs[0]) for o in outputs]
        outs = [self._out(o) for o in outputs]
        tokens, columns = inputs[0].shape
        pointers: list[object] = []
        shapes: list[object] = []
        for output, x, out in zip(outputs, inputs, outs, strict=True):
            addend = _addend(output, 0)
            pointers += [_pairs(x, way), *_stored(output.weights[0], way), *addend, memory(out)]
            shapes += [output.size, output.activation, *_placed(out)]
        if len(outputs) == 1:
            pointers += [None, None, None, None, 0, None]
            shapes += [0, None, 1, 1, 1.0]
        math = _math(way, inputs[0])

        def launch(tile: tile_configs.Rows) -> None:
            blocks = sum(triton.cdiv(o.size, tile.lanes * tile.rows) for o in outputs)
            _launch(
                gemv.multiply_beside, (blocks, triton.cdiv(tokens, tile.tokens)),
                *pointers, tokens, 1.0 / way.layout.scale, columns, way.bits, way.group, math,
                tile.tokens, tile.lanes, tile.rows, tile.groups, tile.inner, *shapes,
                num_warps=tile.warps, maxnreg=tile.registers,
            )  # fmt: skip

        size, device = sum(o.size for o in outputs), inputs[0].device
        words = (way.words(columns),)
        candidates = tile_configs.rows(self.properties(device), size, words, way.bits, way.inner, tokens, math)
        launch(self.tuner(device).pick(candidates, launch))
        return outs

    def _sum(self, way: Way, output: Output) -> Tensor:
        """The sum of one or two products and x, in one launch of gemv.py."""
        inputs, out = [memory(a) for a in output.inputs], memory(self._out(output))
        columns = [a.shape[1] for a in inputs]
        math = _math(way, inputs[0])

        def launch(tile: tile_configs.Rows) -> None:
            grid = triton.cdiv(output.size, tile.lanes * tile.rows), triton.cdiv(output.tokens, tile.tokens)
            _launch(
                gemv.multiply_sum, grid,
                *_sources(way, output), out, output.tokens, 1.0 / way.layout.scale, *[*columns, 0][:2], way.bits, way.group,
                math, tile.tokens, tile.lanes, tile.rows, tile.groups, tile.inner, output.size,
                num_warps=tile.warps, maxnreg=tile.registers,
            )  # fmt: skip

        words = tuple(map(way.words, columns))
        candidates = tile_configs.rows(
            self.properties(out.device), output.size, words, way.bits, way.inner, output.tokens, math
        )
        launch(self.tuner(out.device).pick(candidates, launch))
        return out

    def _tiles(self, way: Way, output: Output) -> Activation:
        """One or two products by tensor cores, matmul.py."""
        inputs, out = [memory(a) for a in output.inputs], self._out(output)
        columns = [a.shape[1] for a in inputs]

        def launch(tile: tile_configs.Tiles) -> None:
            grid = triton.cdiv(output.tokens, tile.tokens), triton.cdiv(output.size, tile.rows)
            _launch(
                matmul.multiply_tiles, grid,
                *_sources(way, output), memory(out), output.tokens, *[*columns, 0][:2],
                way.bits, way.group, MATH[inputs[0].dtype], tile.rows, tile.tokens, tile.words,
                output.size, output.activation, *_placed(out)[:2], num_warps=tile.warps, num_stages=tile.stages,
                maxnreg=tile.registers,
            )  # fmt: skip

        candidates = tile_configs.tiles(output.size, sum(columns), output.tokens, way.bits, inputs[0].dtype)
        launch(self.tuner(inputs[0].device).pick(candidates, launch))
        return out

    def _by_torch(self, x: Activation, weight: Weight, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        """x @ weight.T by cuBLAS, integer codes written out in slices, in memory used again; nf4 by bitsandbytes."""
        assert isinstance(x, Tensor)
        format, (size, columns) = weight.format, weight.shape
        out = torch.empty(len(x), size, dtype=dtype, device=x.device) if into is None else into
        if isinstance(format, NF4):
            _nf4(x, weight, out)
            return out
        if not isinstance(format, GroupInt):
            _mm(x, weight.decode(x.dtype), out)
            return out
        packed, scale = _stored(weight, Way("torch", format.bits))
        step = min(size, max(1, self.slice_bytes // (columns * x.element_size())))
        scratch = self._scratch_of(x, step * columns)
        for first in range(0, size, step):
            count = min(step, size - first)
            rows = scratch[: count * columns].view(count, columns)
            grid = triton.cdiv(count, DECODED[0]), triton.cdiv(packed.shape[1], DECODED[1])
            _launch(
                matmul.decode, grid, packed, scale, rows, first, count, columns, format.bits, format.group_size, *DECODED,
                num_warps=4,
            )  # fmt: skip
            _mm(x, rows, out[:, first : first + count])
        return out

    def _scratch_of(self, like: Tensor, count: int) -> Tensor:
        """Memory for so many elements, the same again and again; a graph has its own, which nothing may replace."""
        if self._local.step is not None:
            return torch.empty(count, dtype=like.dtype, device=like.device)
        mine, nbytes = self._local.scratch, count * like.element_size()
        if (held := mine.get(like.device)) is None or held.nbytes < nbytes:
            mine[like.device] = held = torch.empty(nbytes, dtype=torch.uint8, device=like.device)
        return held.view(like.dtype)

    def _finished(self, output: Output, parts: Sequence[Tensor]) -> Activation:
        """What is left to do to one or two products."""
        out = self._out(output)
        rest = output.addends or output.activation or output.x is not None
        if isinstance(out, Tensor) and out.dtype == parts[0].dtype and len(parts) == 1 and not rest:
            return parts[0]
        _launch(
            activations.finish, (output.tokens, triton.cdiv(output.size, FINISHED)),
            *[*parts, None][:2], *_addend(output, 0), *_addend(output, 1), output.x, memory(out),
            output.size, FINISHED, output.activation, *_placed(out), num_warps=4,
        )  # fmt: skip
        return out

    # Small things -----------------------------------------------------------------------------------------------------

    def _norms(self, x: Tensor, lns: Sequence[Norm], outs: Sequence[Activation]) -> None:
        if not len(x):
            return
        pointers: list[object] = []
        shapes: list[object] = []
        for (gain, bias, eps), out in zip(lns, outs, strict=True):
            pointers += [gain.contiguous(), bias.contiguous(), eps, memory(out)]
            shapes += _placed(out)
        if len(lns) == 1:
            pointers += [None, None, 0.0, None]
            shapes += [1, 1, 1.0]
        block = triton.next_power_of_2(x.shape[1])
        warps = min(16, max(1, block // 512))
        _launch(activations.write_norms, (len(x),), x, *pointers, x.shape[1], block, *shapes, num_warps=warps)

    def _table(self, batch: Batch, device: torch.device) -> BatchTable | Inputs:
        if self._local.step is not None:
            return self._local.step
        held = self._local.batch
        if held is None or held[0] is not batch or held[1] != device:
            self._local.batch = held = (
                batch,
                device,
                BatchTable(batch, device, self.properties(device).query_block),
            )
        return held[2]


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """Run a kernel on the device of its first tensor; multiplications and additions may be fused (Triton 3.10 asks)."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*arguments, enable_fp_fusion=True, **options)


def _placed(x: Activation) -> tuple[int, int, float]:
    """Where a kernel writes features, and times what: W, PLANES, SCALE."""
    layout = layout_of(x)
    return layout.codes, layout.planes, layout.scale


def _math(way: Way, x: Tensor) -> str:
    return "halves" if way.layout.shift else dtype_name(x.dtype)


def _pairs(x: Tensor, way: Way) -> Tensor:
    """Activations as gemv.py loads them: two at a time where they lie as pairs."""
    if way.kind != "rows" or not way.bits:
        return x
    return x.view(torch.int32 if x.element_size() == 2 else torch.int64)


def _stored(weight: Weight, way: Way) -> tuple[Tensor, Tensor | None]:
    tensors = weight.tensors
    if not way.bits:
        return tensors["weight"].contiguous(), None
    return tensors["weight_packed"].contiguous(), tensors["weight_scale"].contiguous()


def _sources(way: Way, output: Output) -> list[object]:
    """What one or two summed products are made of: inputs and weights, addends, x."""
    sources: list[object] = []
    for x, weight in zip(output.inputs, output.weights, strict=True):
        sources += [_pairs(memory(x), way), *_stored(weight, way)]
    sources += [None] * (6 - len(sources))
    return [*sources, *_addend(output, 0), *_addend(output, 1), output.x]


def _addend(output: Output, i: int) -> tuple[Tensor | None, int]:
    """An addend and how far apart its rows are: 0 where every token has the same."""
    if i >= len(output.addends):
        return None, 0
    addend = output.addends[i].contiguous()
    return addend, addend.shape[1] if addend.dim() == 2 else 0


def _nf4(x: Tensor, weight: Weight, out: Tensor) -> None:
    """out = x @ weight.T by bitsandbytes, in x's dtype."""
    out.copy_(nf4.matmul(x, weight))


def _mm(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x @ weight.T by cuBLAS; without a GPU summed in float32 and rounded once."""
    if x.is_cuda and out.dtype == x.dtype:
        torch.mm(x, weight.T, out=out)
    elif x.is_cuda:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
    else:
        out.copy_(x.float() @ weight.T.float())
