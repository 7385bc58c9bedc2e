"""The operations as programs of kernel calls. Knows tensors, formats and the cache, but no instruction.

Activations between operations are float32 tensors where the next weight reads those, else `Coded`. What only runs kernels can
be captured: a small pass is then one program, run again and again with nothing of Python in between.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...cache import Batch, PagePool
from ...formats import NF4, Dense, GroupInt, Weight
from ...units import PAGE, dtype_name
from .. import nf4, reference
from ..backend import Norm
from . import attention, linear, norm
from .activations import BLOCK, NATURAL, TILE, Layout
from .compile import compiled
from .pool import Task, ThreadPool, shared_pool, task_table
from .target import Target, host

# Where the way to multiply changes, in tokens; measured, see benchmarks/peers/cpu.py.
TILES_FROM = 5  # int8 activations: from here on, transposed words serve all tokens
MANY = 13  # from here on, two vectors of rows at a time
EXACT_ROWS = 8  # float32 activations: up to here, from the words; above, decoded weights and torch's product
DENSE_ROWS = 64  # plain matrices: above, what it takes to make them float32 for torch pays off
# Plain matrices of so many rows or columns at most, and four times as many of the other: no torch, whose threads would get in
# the way of ours.
LOW_RANK = 256


@dataclass(frozen=True)
class Coded:
    """Activations (tokens, features) in a layout that is not natural: values, then scales and sums, in one piece of memory."""

    layout: Layout
    tokens: int
    features: int
    memory: Tensor

    @property
    def padded(self) -> tuple[int, int]:
        return self.layout.padded(self.tokens, self.features)

    def place(self) -> tuple[int, int, int, int]:
        """Addresses of values, scales and sums, and features as padded."""
        tokens, features = self.padded
        start = self.memory.data_ptr()
        scales = start + tokens * features
        return start, scales, scales + tokens * features // BLOCK * 4, features


Activation = Tensor | Coded


class NotCapturable(Exception):
    """A captured call needs more than kernels."""


@dataclass
class Program:
    """Kernel calls in order, what they need kept alive, and the scratch memory of a thread."""

    tasks: list[Task] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)
    scratch_bytes: int = 0
    lent: dict[object, list[Tensor]] = field(default_factory=dict)

    def table(self, *values: int) -> int:
        """Address of int64 arguments."""
        self.kept.append(table := np.array(values, np.int64))
        return table.ctypes.data

    def keep(self, tensor: Tensor) -> int:
        """Address of a tensor, which stays alive as long as the program."""
        self.kept.append(tensor)
        return tensor.data_ptr()

    def add(self, part: Program) -> None:
        """Append a program."""
        lent = {id(tensor) for tensors in self.lent.values() for tensor in tensors}
        self.tasks += part.tasks
        self.kept += [thing for thing in part.kept if id(thing) not in lent]
        self.scratch_bytes = max(self.scratch_bytes, part.scratch_bytes)

    def lend(self, kind: object, make: Callable[[], Tensor]) -> Tensor:
        """Memory for a result: of the same kind and in nobody's hands any more, or new.

        Later calls wait for those that read it, so they may write there: a step of 44 layers needs the memory of one.
        """
        tensors = self.lent.setdefault(kind, [])
        idle = next((t for t, count in zip(tensors, _references(tensors), strict=True) if count == IDLE), None)
        if idle is None:
            tensors.append(idle := make())
        return idle


class Captured:
    """A pass as one program: new ids, positions and pages go in, the same calls run."""

    def __init__(self, pool: ThreadPool, ids: Tensor, table: BatchTable, program: Program, out: Tensor) -> None:
        self._pool, self._table, self._program, self._out = pool, table, program, out
        self._ids = ids.numpy()  # torch would refuse to write to what was made in inference mode
        self._tasks = task_table(program.tasks)
        self._lock = threading.Lock()  # inputs and results lie in the same memory every time

    def replay(self, ids: Tensor, batch: Batch) -> Tensor:
        """ids (tokens,), a batch of as many sequences and tokens -> what the captured function returned, in new memory."""
        with self._lock:
            self._ids[:] = ids.numpy()
            self._table.fill(batch)
            self._pool.run(self._tasks, self._program.scratch_bytes)
            # A copy by torch would wake its threads, which then spin beside ours.
            return torch.from_numpy(self._out.numpy().copy())


class BatchTable:
    """A batch as attention.py reads it, at one address as long as it lives."""

    def __init__(self, batch: Batch, pages: int) -> None:
        """pages: most pages that a sequence of the batch will have."""
        sequences, tokens = len(batch.sequences), batch.offsets[-1]
        self.table = np.zeros(attention.HEADER + sequences * attention.SEQUENCE + tokens * attention.TOKEN, np.int64)
        self.pages = np.zeros(max(1, sequences * pages), np.int64)
        self.table[:3] = sequences, tokens, self.pages.ctypes.data
        self._stride = pages
        self.longest = pages * PAGE
        self.fill(batch)

    def fill(self, batch: Batch) -> None:
        """Take over a batch of as many sequences and tokens."""
        place = attention.HEADER
        for i, sequence in enumerate(batch.sequences):
            first, last = batch.offsets[i], batch.offsets[i + 1]
            self.table[place : place + 4] = batch.starts[i], first, last - first, i * self._stride
            place += attention.SEQUENCE
            used = sequence.pages[: self._stride]
            self.pages[i * self._stride : i * self._stride + len(used)] = used
        tokens = self.table[place:].reshape(-1, attention.TOKEN)
        for column, values in enumerate((batch.positions, batch.pages, batch.slots)):
            tokens[:, column] = values.numpy()


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
            given = [] if addend is None else [addend]
            outs.append(self._linear(program, [x], [weight], given, activation, next_weight, beside=len(outs) > 0))
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
        kind = attention.Heads(dim, 2 * rotary.shape[2], _name(storage))
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
        program.kept.append(table)
        program.scratch_bytes = attention.scratch_bytes(dim, table.longest)
        self._add_task(program, attention.write_attention(self.target, kind), arguments, len(batch.sequences) * heads)
        attended = self._as(program, out, self._layout(next_weight, len(qkv)))
        self._run(program)
        return attended

    def linear_residual(
        self, inputs: Sequence[Activation], weights: Sequence[Weight], addends: Sequence[Tensor | None], x: Tensor
    ) -> Tensor:
        """x + sum of inputs[i] @ weights[i].T + sum of addends -> (tokens, hidden)."""
        program = Program()
        given = [*(a for a in addends if a is not None), x]
        out = self._linear(program, inputs, weights, given, None, None)
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

    def capture(self, step: Callable[[Tensor], Tensor], ids: Tensor, batch: Batch, limit: int) -> Captured | None:
        """Record what step(ids) would run for batches of as many sequences and tokens as this one, without running it.

        limit: most tokens a sequence will hold. None if the step needs more than kernels.
        """
        held, table = ids.clone(), BatchTable(batch, -(-limit // PAGE))
        self._local.program, self._local.batch = Program(), (batch, table)
        self._local.program.kept.append(held)
        try:
            out = step(held)
            return Captured(self.pool, held, table, self._local.program, out)
        except NotCapturable:
            return None
        finally:
            self._local.program = self._local.batch = None

    def decoder(
        self, step: Callable[[Tensor, PagePool, Batch], Tensor], device: torch.device, vocabulary: int, limit: int
    ) -> str:
        """Logits are on the host already, and captured programs run there."""
        return "the model is on the CPU, where a step is a recorded program"

    def _run(self, program: Program) -> None:
        captured = self._local.program
        if captured is None:
            if program.tasks:
                self.pool.run(task_table(program.tasks), program.scratch_bytes)
            return
        captured.add(program)

    def _eagerly(self, program: Program, compute: Callable[[], Tensor]) -> Tensor:
        """What torch computes, once the calls so far are done; a captured program cannot repeat it."""
        if self._local.program is not None:
            raise NotCapturable
        self._run(program)
        program.tasks = []
        return compute()

    def _batch_table(self, batch: Batch) -> BatchTable:
        last = self._local.batch
        if last is None or last[0] is not batch:
            longest = max((len(s.pages) for s in batch.sequences), default=0)
            self._local.batch = last = batch, BatchTable(batch, longest)
        return last[1]

    # Pieces of programs -----------------------------------------------------------------------------------------------

    def _add_task(
        self, program: Program, kernel: tuple[str, linear.Build], arguments: int, items: int, barrier: bool = True
    ) -> None:
        grain = max(1, min(8, items // (8 * torch.get_num_threads())))
        program.tasks.append(Task(self._address(kernel), arguments, items, grain, barrier))

    def _address(self, kernel: tuple[str, linear.Build]) -> int:
        return compiled(*kernel, self.target)

    def _layout(self, next_weight: Weight | None, tokens: int) -> Layout:
        """How `next_weight` reads this many tokens."""
        if next_weight is None or not isinstance(next_weight.format, GroupInt) or _words(next_weight) is None:
            return NATURAL
        bits = next_weight.format.bits
        if self.exact:
            return Layout("planes", bits) if tokens <= EXACT_ROWS else NATURAL
        return Layout("rows" if tokens < TILES_FROM else "tiles", bits, self.target.offset(bits))

    def _norms(self, program: Program, x: Tensor, lns: Sequence[Norm], layouts: Sequence[Layout]) -> list[Activation]:
        x = x.contiguous()
        tokens, features = x.shape
        outs = [self._empty(layout, tokens, features) for layout in layouts]
        arguments = [program.keep(x), features]
        for (gain, bias, eps), out in zip(lns, outs, strict=True):
            affine = _plain(gain), _plain(bias.to(gain.dtype))
            addresses = [program.keep(t) for t in (*affine, torch.tensor([eps]))]
            arguments += [*addresses, *self._place(program, out)]
        kernel = norm.write_norms(self.target, layouts, [_name(_plain(gain)) for gain, _, _ in lns])
        self._add_task(program, kernel, program.table(*arguments), tokens)
        return outs

    def _as(self, program: Program, x: Activation, layout: Layout) -> Activation:
        """Activations in another layout."""
        if isinstance(x, Coded) or layout == NATURAL:
            assert (x.layout if isinstance(x, Coded) else NATURAL) == layout
            return x
        out = self._empty(layout, *x.shape)
        arguments = program.table(program.keep(x.contiguous()), x.shape[1], 0, 0, 0, *self._place(program, out))
        self._add_task(program, norm.write_norms(self.target, [layout], ["none"]), arguments, len(x))
        return out

    def _empty(self, layout: Layout, tokens: int, features: int) -> Activation:
        captured, kind = self._local.program, (layout, tokens, features)
        make = lambda: _memory(layout, tokens, features)  # noqa: E731
        memory = make() if captured is None else captured.lend(kind, make)
        return memory if layout == NATURAL else Coded(layout, tokens, features, memory)

    def _place(self, program: Program, x: Activation) -> tuple[int, int, int, int]:
        if isinstance(x, Coded):
            program.keep(x.memory)
            return x.place()
        return program.keep(x), 0, 0, x.shape[1]

    def _linear(
        self,
        program: Program,
        inputs: Sequence[Activation],
        weights: Sequence[Weight],
        addends: Sequence[Tensor],
        activation: str | None,
        next_weight: Weight | None,
        beside: bool = False,
    ) -> Activation:
        """activation(sum of inputs[i] @ weights[i].T + sum of addends), as `next_weight` reads it.

        beside: it need not wait for the call before it.
        """
        tokens, outputs = inputs[0].tokens if isinstance(inputs[0], Coded) else len(inputs[0]), weights[0].shape[0]
        out = self._empty(self._layout(next_weight, tokens), tokens, outputs)
        tasks_before = len(program.tasks)
        parts: list[int] = []
        for x, weight in zip(inputs, weights, strict=True):
            parts += self._part(program, self._as(program, x, self._layout(weight, tokens)), weight, tokens)
        given = [_plain(a) for a in addends]
        finish = linear.write_finish(
            self.target, [_name(a) for a in given], activation, out.layout if isinstance(out, Coded) else NATURAL
        )
        steps = [(program.keep(a), a.stride(0) * a.element_size() if a.dim() == 2 else 0) for a in given]
        finishing = program.table(tokens, *self._place(program, out), *(n for step in steps for n in step))
        padded = -(-tokens // TILE) * TILE
        table = program.table(padded, outputs, self._address(finish), finishing, len(inputs), *parts)
        program.scratch_bytes = max(
            program.scratch_bytes, padded * linear.ROWS * 4 + max(map(self._part_bytes, weights))
        )
        barrier = not beside or len(program.tasks) > tasks_before
        self._add_task(program, ("linear", linear.write_driver), table, -(-outputs // linear.ROWS), barrier)
        return out

    def _part(self, program: Program, x: Activation, weight: Weight, tokens: int) -> tuple[int, int]:
        """Address of the kernel that multiplies by `weight`, and of its arguments."""
        words = _words(weight)
        if words is not None and isinstance(x, Coded):
            packed, scale = _held(weight.tensors["weight_packed"]), _held(weight.tensors["weight_scale"])
            units, rest = divmod(weight.shape[1], 128)
            if x.layout.kind == "tiles":
                kernel = linear.write_tiles(self.target, words, tokens >= MANY)
            else:
                kernel = linear.write_rows(self.target, words, x.layout.kind == "planes", rest > 0)
            row_words, groups = packed.shape[1], scale.shape[1]
            stored = program.keep(packed), program.keep(scale), row_words, units, rest // words.per_word, groups
            values, scales, sums, _ = self._place(program, x)
            return self._address(kernel), program.table(*stored, tokens, values, scales, sums)
        assert isinstance(x, Tensor)
        x = x.contiguous()
        if isinstance(weight.format, Dense) and (tokens <= DENSE_ROWS or _is_low_rank(weight)):
            matrix = _plain(weight.tensors["weight"])
            narrow = _is_low_rank(weight) and weight.shape[0] > weight.shape[1]
            kernel = (linear.write_narrow if narrow else linear.write_dense)(self.target, _name(matrix))
            return self._address(kernel), program.table(program.keep(matrix), weight.shape[1], tokens, program.keep(x))
        matmul = nf4.matmul if isinstance(weight.format, NF4) else reference.matmul
        products = self._eagerly(program, lambda: matmul(x, weight))
        arguments = program.table(program.keep(products), tokens, weight.shape[0])
        return self._address(("given", linear.write_given)), arguments

    def _part_bytes(self, weight: Weight) -> int:
        words = _words(weight)
        columns = weight.shape[1] // words.per_word + weight.shape[1] // words.group if words else 0
        columns += weight.shape[1] if _is_low_rank(weight) else 0
        return columns * linear.ROWS * 4 + 256  # at most all rows of a block, transposed


def _references(things: list[Tensor] | list[object]) -> list[int]:
    """How many references there are to each thing of a list, the list's own and this function's included."""
    return [sys.getrefcount(thing) for thing in things]


IDLE = _references([object()])[0]  # of a thing that nothing but a list refers to; it differs between versions of Python


def _memory(layout: Layout, tokens: int, features: int) -> Tensor:
    if layout == NATURAL:
        return torch.empty(tokens, features)
    all_tokens, all_features = layout.padded(tokens, features)
    size = all_tokens * all_features
    count = size + size // BLOCK * 8 if layout.is_int8 else 4 * size
    make = torch.empty if all_features == features else torch.zeros  # beyond a row's end nothing may count
    return make(count, dtype=torch.uint8)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, as kernels read it: row by row, in a dtype they know."""
    return _held((tensor if _name(tensor) in linear.STORED else tensor.float()).contiguous())


def _held(tensor: Tensor) -> Tensor:
    """The same memory under another tensor: `.data = ...` and `.half()` may take it from the first one, not from a program."""
    return tensor.detach()


def _name(tensor: Tensor) -> str:
    return dtype_name(tensor.dtype)


def _is_low_rank(weight: Weight) -> bool:
    """Whether it is one of an adapter's matrices, by its shape."""
    small, large = sorted(weight.shape)
    return isinstance(weight.format, Dense) and small <= LOW_RANK and 4 * small <= large


def _words(weight: Weight) -> linear.Words | None:
    """A quantized weight as kernels see it; None for other formats and for tensors that are not laid out row by row."""
    if not isinstance(weight.format, GroupInt):
        return None
    packed, scale = weight.tensors["weight_packed"], weight.tensors["weight_scale"]
    if not (packed.is_contiguous() and scale.is_contiguous()) or _name(scale) not in linear.STORED:
        return None
    return linear.Words(weight.format.bits, weight.format.group_size, _name(scale))
