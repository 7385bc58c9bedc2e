"""The operations as programs: which kernel, with which arguments. Knows tensors, formats and the cache, but no instruction.

Activations between operations are float32 tensors where the next weight reads those, else `PackedActivation`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ...cache import Batch, PagePool
from ...formats import NF4, Dense, GroupInt, Weight
from ...units import PAGE, dtype_name
from .. import nf4, reference
from ..backend import Forward, Norm, PassRunner
from ..graphs import ReplayRunner
from . import attention, gemm, gemv, linear, norm
from .activations import NATURAL, TILE, UNIT, Layout
from .compile import compiled
from .pool import Task, shared_pool, task_table
from .program import Activation, BatchTable, Captured, NotCapturable, PackedActivation, Program, allocate, layout_of
from .target import Target, host

# The number of tokens at which another kernel is faster; measured, see benchmarks/peers/cpu.py.
# int8 activations: from here on the GEMM kernel, whose transposed words serve all tokens.
MIN_GEMM_TOKENS = 5
# From here on the GEMM kernel takes two vectors of rows at a time.
MIN_WIDE_GEMM_TOKENS = 13
# float32 activations: up to here the GEMV kernel; above, decoded weights and torch's product.
MAX_EXACT_GEMV_TOKENS = 8
# Plain matrices: up to here our kernel; above, a float32 copy and torch's product.
MAX_DENSE_TOKENS = 64
# An adapter's matrices have at most so many rows or columns, and four times as many of the other. They never go to torch, whose
# threads would get in the way of ours.
MAX_LOW_RANK = 256


class _Local(threading.local):
    """What a thread is capturing, and the batch whose table it made last."""

    program: Program | None = None
    batch: tuple[Batch, BatchTable] | None = None


class Operations:
    """The backend of one precision."""

    name = "cpu"

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.target: Target = host()
        self.pool = shared_pool()
        self._local = _Local()

    def activation_dtype(self, weights: torch.dtype, device: torch.device) -> torch.dtype:
        """Always float32, rounded to integers where a kernel wants those."""
        return torch.float32

    # Operations -------------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """ids (tokens,) int64, weight (vocabulary, hidden) -> x (tokens, hidden) float32."""
        weight, program = _plain(weight), Program()
        x = self._empty(NATURAL, len(ids), weight.shape[1])
        assert isinstance(x, Tensor)
        arguments = program.table(program.keep(ids), program.keep(weight), weight.shape[1], program.keep(x))
        self._add_task(program, norm.write_embed(self.target, _name(weight)), arguments, len(ids))
        self._run(program)
        return x

    def layer_norms(self, x: Tensor, lns: Sequence[Norm], next_weights: Sequence[Weight | None]) -> list[Activation]:
        """x (tokens, hidden) -> one LayerNorm of x for each (gain, bias, eps), as its next weight reads it."""
        program = Program()
        outs = self._norms(program, x, lns, [self._layout(w, len(x)) for w in next_weights])
        self._run(program)
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
        program = Program()
        outs: list[Activation] = []
        for x, weight, addend, activation, next_weight in zip(
            inputs, weights, addends, activations, next_weights, strict=True
        ):
            present = [] if addend is None else [addend]
            independent = len(outs) > 0
            outs.append(self._linear(program, [x], [weight], present, activation, next_weight, independent))
        self._run(program)
        return outs

    def attention(
        self, qkv: Activation, cache: PagePool, layer: int, batch: Batch, rotary: Tensor, next_weight: Weight | None
    ) -> Activation:
        """Rotary, append to the cache, causal attention: qkv (tokens, heads * 3 * head_dim) -> (tokens, heads * head_dim)."""
        assert isinstance(qkv, Tensor)
        program, storage = Program(), cache.storage[layer]
        if _name(storage) not in attention.KINDS:
            states = self._eagerly(program, lambda: reference.attention(qkv, cache, layer, batch, rotary, next_weight))
            attended = self._as(program, states, self._layout(next_weight, len(qkv)))
            self._run(program)
            return attended
        heads, dim = storage.shape[2], storage.shape[4]
        out = self._empty(NATURAL, len(qkv), heads * dim)
        assert isinstance(out, Tensor)
        table = self._batch_table(batch)
        scales = program.keep(cache.scales[layer]) if cache.scales else 0
        rotary = rotary.contiguous()
        shape = attention.HeadShape(dim, 2 * rotary.shape[2], _name(storage))
        arguments = program.table(
            program.keep(qkv.contiguous()),
            program.keep(out),
            program.keep(storage),
            scales,
            table.table.ctypes.data,
            program.keep(rotary),
            rotary.shape[1],
            heads,
        )
        program.keep_alive.append(table)
        program.scratch_bytes = attention.scratch_bytes(dim, table.max_length)
        self._add_task(
            program, attention.write_attention(self.target, shape), arguments, len(batch.block_tables) * heads
        )
        attended = self._as(program, out, self._layout(next_weight, len(qkv)))
        self._run(program)
        return attended

    def linear_residual(
        self, inputs: Sequence[Activation], weights: Sequence[Weight], addends: Sequence[Tensor | None], x: Tensor
    ) -> Tensor:
        """x + sum of inputs[i] @ weights[i].T + sum of addends -> (tokens, hidden)."""
        program = Program()
        present = [*(a for a in addends if a is not None), x]
        out = self._linear(program, inputs, weights, present, None, None)
        self._run(program)
        assert isinstance(out, Tensor)
        return out

    def head(self, x: Tensor, rows: Tensor | None, norm: Norm, weight: Weight) -> Tensor:
        """Final norm and vocabulary projection of the chosen rows (None: all) -> (rows, vocabulary) float32 logits."""
        program = Program()
        chosen = x if rows is None else self._eagerly(program, lambda: x[rows])
        inputs = self._norms(program, chosen, [norm], [self._layout(weight, len(chosen))])
        out = self._linear(program, inputs, [weight], [], None, None)
        self._run(program)
        assert isinstance(out, Tensor)
        return out

    def final_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """x (tokens, hidden) -> the last hidden state, for models without a vocabulary projection."""
        (out,) = self.layer_norms(x, [norm], [None])
        assert isinstance(out, Tensor)
        return out

    # Capturing --------------------------------------------------------------------------------------------------------

    def pass_runner(
        self, forward: Forward, device: torch.device, limit: int, vocabulary: int | None = None
    ) -> PassRunner:
        """Passes as recorded programs."""
        return ReplayRunner(
            forward, partial(self.capture, limit), "the model is on the CPU, where a step is a recorded program"
        )

    def capture(self, limit: int, forward: Forward, x: Tensor, pool: PagePool, batch: Batch) -> Captured | None:
        """Record what forward(x, pool, batch) would run for batches of as many sequences and tokens, without running it.

        limit: most tokens of a sequence. None if the pass needs more than kernels.
        """
        own_ids, table = x.clone(), BatchTable(batch, -(-limit // PAGE))
        self._local.program, self._local.batch = Program(), (batch, table)
        self._local.program.keep_alive.append(own_ids)
        try:
            out = forward(own_ids, pool, batch)
            return Captured(self.pool, own_ids, table, self._local.program, out)
        except NotCapturable:
            return None
        finally:
            self._local.program = self._local.batch = None

    def _run(self, program: Program) -> None:
        """Run the tasks now, or append them to the program that is being captured."""
        if self._local.program is not None:
            self._local.program.add(program)
        elif program.tasks:
            self.pool.run(task_table(program.tasks), program.scratch_bytes)

    def _eagerly(self, program: Program, compute: Callable[[], Tensor]) -> Tensor:
        """What torch computes, after the tasks so far; a captured program cannot repeat it."""
        if self._local.program is not None:
            raise NotCapturable
        self._run(program)
        program.tasks = []
        return compute()

    def _batch_table(self, batch: Batch) -> BatchTable:
        last = self._local.batch
        if last is None or last[0] is not batch:
            max_pages = max((len(s.pages) for s in batch.block_tables), default=0)
            self._local.batch = last = batch, BatchTable(batch, max_pages)
        return last[1]

    # Pieces of programs -----------------------------------------------------------------------------------------------

    def _add_task(
        self, program: Program, kernel: tuple[str, linear.BuildKernel], arguments: int, items: int, barrier: bool = True
    ) -> None:
        grain = max(1, min(8, items // (8 * torch.get_num_threads())))
        program.tasks.append(Task(self._address(kernel), arguments, items, grain, barrier))

    def _address(self, kernel: tuple[str, linear.BuildKernel]) -> int:
        return compiled(*kernel, self.target)

    def _layout(self, next_weight: Weight | None, tokens: int) -> Layout:
        """How `next_weight` reads this many tokens."""
        if next_weight is None or not isinstance(next_weight.format, GroupInt) or _packed_format(next_weight) is None:
            return NATURAL
        bits = next_weight.format.bits
        if self.exact:
            return Layout("planar", bits) if tokens <= MAX_EXACT_GEMV_TOKENS else NATURAL
        return Layout("gemv" if tokens < MIN_GEMM_TOKENS else "gemm", bits, self.target.offset(bits))

    def _norms(self, program: Program, x: Tensor, lns: Sequence[Norm], layouts: Sequence[Layout]) -> list[Activation]:
        x = x.contiguous()
        tokens, features = x.shape
        outs = [self._empty(layout, tokens, features) for layout in layouts]
        arguments = [program.keep(x), features]
        for (gain, bias, eps), out in zip(lns, outs, strict=True):
            affine = _plain(gain), _plain(bias.to(gain.dtype))
            addresses = [program.keep(t) for t in (*affine, torch.tensor([eps]))]
            arguments += [*addresses, *_addresses(program, out)]
        kernel = norm.write_layer_norms(self.target, layouts, [_name(_plain(gain)) for gain, _, _ in lns])
        self._add_task(program, kernel, program.table(*arguments), tokens)
        return outs

    def _as(self, program: Program, x: Activation, layout: Layout) -> Activation:
        """Activations in another layout."""
        if layout_of(x) == layout:
            return x
        assert isinstance(x, Tensor)
        out = self._empty(layout, *x.shape)
        arguments = program.table(program.keep(x.contiguous()), x.shape[1], 0, 0, 0, *_addresses(program, out))
        self._add_task(program, norm.write_layer_norms(self.target, [layout], ["none"]), arguments, len(x))
        return out

    def _empty(self, layout: Layout, tokens: int, features: int) -> Activation:
        captured = self._local.program
        memory = (allocate if captured is None else captured.buffer)(layout, tokens, features)
        return memory if layout == NATURAL else PackedActivation(layout, tokens, features, memory)

    def _linear(
        self,
        program: Program,
        inputs: Sequence[Activation],
        weights: Sequence[Weight],
        addends: Sequence[Tensor],
        activation: str | None,
        next_weight: Weight | None,
        independent: bool = False,
    ) -> Activation:
        """activation(sum of inputs[i] @ weights[i].T + sum of addends), as `next_weight` reads it.

        independent: it need not wait for the task before it.
        """
        # 1. The products, and what brings their inputs into the layouts that the weights read.
        tokens, outputs = len(inputs[0]), weights[0].shape[0]
        out = self._empty(self._layout(next_weight, tokens), tokens, outputs)
        tasks_before = len(program.tasks)
        products: list[int] = []
        for x, weight in zip(inputs, weights, strict=True):
            products += self._product(program, self._as(program, x, self._layout(weight, tokens)), weight, tokens)

        # 2. The epilogue.
        addends = [_plain(a) for a in addends]
        epilogue = linear.write_epilogue(self.target, [_name(a) for a in addends], activation, layout_of(out))
        strides = [(program.keep(a), a.stride(0) * a.element_size() if a.dim() == 2 else 0) for a in addends]
        arguments = program.table(tokens, *_addresses(program, out), *(n for pair in strides for n in pair))

        # 3. One task that runs both over blocks of outputs.
        padded = -(-tokens // TILE) * TILE
        table = program.table(padded, outputs, self._address(epilogue), arguments, len(inputs), *products)
        scratch_bytes = padded * linear.BLOCK_N * 4 + max(map(_scratch_bytes, weights))
        program.scratch_bytes = max(program.scratch_bytes, scratch_bytes)
        barrier = not independent or len(program.tasks) > tasks_before
        self._add_task(program, ("linear", linear.write_driver), table, -(-outputs // linear.BLOCK_N), barrier)
        return out

    def _product(self, program: Program, x: Activation, weight: Weight, tokens: int) -> tuple[int, int]:
        """Address of the kernel that multiplies by `weight`, and of its arguments."""
        fmt = _packed_format(weight)
        if fmt is not None and isinstance(x, PackedActivation):
            packed, scale = _shared(weight.tensors["weight_packed"]), _shared(weight.tensors["weight_scale"])
            units, rest = divmod(weight.shape[1], UNIT)
            if x.layout.kind == "gemm":
                kernel = gemm.write_gemm(self.target, fmt, tokens >= MIN_WIDE_GEMM_TOKENS)
            else:
                kernel = gemv.write_gemv(self.target, fmt, x.layout.kind == "planar", rest > 0)
            row_words, groups = packed.shape[1], scale.shape[1]
            stored = program.keep(packed), program.keep(scale), row_words, units, rest // fmt.codes_per_word, groups
            values, scales, sums, _ = _addresses(program, x)
            return self._address(kernel), program.table(*stored, tokens, values, scales, sums)
        assert isinstance(x, Tensor)
        x = x.contiguous()
        if isinstance(weight.format, Dense) and (tokens <= MAX_DENSE_TOKENS or _is_low_rank(weight)):
            matrix = _plain(weight.tensors["weight"])
            narrow = _is_low_rank(weight) and weight.shape[0] > weight.shape[1]
            kernel = (gemv.write_narrow if narrow else gemv.write_dense)(self.target, _name(matrix))
            return self._address(kernel), program.table(program.keep(matrix), weight.shape[1], tokens, program.keep(x))
        matmul = nf4.matmul if isinstance(weight.format, NF4) else reference.matmul
        products = self._eagerly(program, lambda: matmul(x, weight))
        arguments = program.table(program.keep(products), tokens, weight.shape[0])
        return self._address(("precomputed", linear.write_precomputed)), arguments


def _addresses(program: Program, x: Activation) -> tuple[int, int, int, int]:
    """Addresses of values, scales and sums, and features, as `activations.Destination` has them."""
    if isinstance(x, PackedActivation):
        program.keep(x.memory)
        return x.addresses()
    return program.keep(x), 0, 0, x.shape[1]


def _scratch_bytes(weight: Weight) -> int:
    """What a product by this weight needs at most: all rows of a block, transposed."""
    fmt = _packed_format(weight)
    columns = weight.shape[1] // fmt.codes_per_word + weight.shape[1] // fmt.group_size if fmt else 0
    columns += weight.shape[1] if _is_low_rank(weight) else 0
    return columns * linear.BLOCK_N * 4 + 256


def _plain(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, as kernels read it: row by row, in a dtype they know."""
    return _shared((tensor if _name(tensor) in linear.STORAGE_TYPES else tensor.float()).contiguous())


def _shared(tensor: Tensor) -> Tensor:
    """The same memory under another tensor: `.data = ...` and `.half()` may take it from the first one, not from a program."""
    return tensor.detach()


def _name(tensor: Tensor) -> str:
    return dtype_name(tensor.dtype)


def _is_low_rank(weight: Weight) -> bool:
    """Whether it is one of an adapter's matrices, by its shape."""
    small, large = sorted(weight.shape)
    return isinstance(weight.format, Dense) and small <= MAX_LOW_RANK and 4 * small <= large


def _packed_format(weight: Weight) -> linear.PackedFormat | None:
    """A quantized weight as kernels see it; None for other formats and for tensors that are not laid out row by row."""
    if not isinstance(weight.format, GroupInt):
        return None
    packed, scale = weight.tensors["weight_packed"], weight.tensors["weight_scale"]
    if not (packed.is_contiguous() and scale.is_contiguous()) or _name(scale) not in linear.STORAGE_TYPES:
        return None
    return linear.PackedFormat(weight.format.bits, weight.format.group_size, _name(scale))
