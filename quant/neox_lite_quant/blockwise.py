"""Calibration windows through a model, one block in memory at a time; each block's linear layers are quantized on the way.

Two streams run side by side: the original model's, and that of the blocks quantized so far, which is what the next layers
will truly be fed. Knows layers and the operations they call; not how codes are found, and no folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neox_lite.cache import Batch, PagePool
from neox_lite.checkpoint.reader import Checkpoint
from neox_lite.config import GPTNeoXConfig
from neox_lite.errors import ArgumentError, FormatError
from neox_lite.files import free_bytes
from neox_lite.formats import DENSE, GroupInt
from neox_lite.kernels import reference
from neox_lite.layers import GPTNeoXLayer, Linear, Rotary

from . import gptq

BASE_BYTES = 200 << 20  # of Python and torch
BATCH_ELEMENTS = 1 << 24  # of the widest activation of a batch of windows: 64 MB
# What a block computes in one call of `grouped_linear` or `linear_residual`, in order: layers of one stage see finished inputs.
PARALLEL = (("attention.query_key_value", "mlp.dense_h_to_4h"), ("attention.dense", "mlp.dense_4h_to_h"))
SEQUENTIAL = tuple((name,) for name in (
    "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
))  # fmt: skip

Progress = Callable[[int, int], object]


def memory_bytes(config: GPTNeoXConfig, count: int, context: int) -> int:
    """What quantizing takes at most beyond mapped files: a block in float32 twice, one layer's matrices, activations."""
    shapes = _shapes(config)
    block = sum(out * columns for out, columns in shapes)
    moments = max(_held(shapes[0]) + _held(shapes[2]), _held(shapes[1]) + _held(shapes[3]))
    work = max(2 * columns * columns + 3 * out * columns for out, columns in shapes)
    work += torch.get_num_threads() * gptq.ROWS * 16 * max(columns for _, columns in shapes)
    batch = min(count, _windows_together(config, context)) * context * config.intermediate_size
    return 4 * (2 * block + moments + work + 8 * batch) + BASE_BYTES


def scratch_bytes(config: GPTNeoXConfig, count: int, context: int) -> int:
    """Of the file that holds both streams."""
    return 8 * count * context * config.hidden_size


def operations_of(config: GPTNeoXConfig, count: int, context: int) -> int:
    """Multiplications and additions: passes of both streams, moments, the original layers' share in them, and solving."""
    total = 0
    for out, columns in _shapes(config):
        total += count * context * (2 * len(stages_of(config)) + 1) * out * columns
        total += count * context * columns * (columns + out)
        total += (2 + gptq.SWEEPS) * out * columns * columns + columns**3
    return 2 * config.num_hidden_layers * total


def _shapes(config: GPTNeoXConfig) -> list[tuple[int, int]]:
    """(out, in) of query_key_value, dense, dense_h_to_4h and dense_4h_to_h."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return [(3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)]


def stages_of(config: GPTNeoXConfig) -> tuple[tuple[str, ...], ...]:
    return PARALLEL if config.use_parallel_residual else SEQUENTIAL


def steps_of(config: GPTNeoXConfig, count: int, context: int) -> int:
    """Reports of progress for so many windows: of each batch in each pass, and of each layer solved."""
    batches = -(-count // _windows_together(config, context))
    return config.num_hidden_layers * (4 + (len(stages_of(config)) + 1) * batches)


def _windows_together(config: GPTNeoXConfig, context: int) -> int:
    return max(1, BATCH_ELEMENTS // (context * config.intermediate_size))


def _held(shape: tuple[int, int]) -> int:
    out, columns = shape
    return columns * columns + out * columns


class Blockwise:
    """Quantized tensors of a model's linear layers, block after block, each computed when it is first asked for."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: GPTNeoXConfig,
        stored: Callable[[str], str],
        formats: Callable[[str], GroupInt],
        dtype: torch.dtype,
        windows: Tensor,
        scratch: Path,
        progress: Progress = lambda done, total: None,
    ) -> None:
        """stored: the checkpoint's name of a tensor. formats: of a linear layer, by full name.

        scratch: the folder for a file of `scratch_bytes`, without a name.
        """
        self._checkpoint, self._config, self._stored = checkpoint, config, stored
        self._formats, self._dtype, self._windows, self._progress = formats, dtype, windows, progress
        self._stages, self._steps_in_all = stages_of(config), steps_of(config, *windows.shape)
        self._rotary = Rotary(config).table
        self._next, self._steps = 0, 0  # block to be done, and batches and layers done
        self._done: dict[str, dict[str, Tensor]] = {}
        self._open(scratch)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """weight_packed, weight_scale and bias of the layer of this name. Blocks must be asked for in order."""
        index = int(name.split(".")[2])
        while self._next <= index:
            self._done = self._block(self._next)
            self._next += 1
        return self._done[name]

    def _open(self, scratch: Path) -> None:
        needed = scratch_bytes(self._config, *self._windows.shape)
        if (free := free_bytes(scratch)) < needed:
            raise ArgumentError(
                f"{scratch}: calibration needs {needed / 1e9:.1f} GB of disk for a while, {free / 1e9:.1f} GB are free; "
                "use fewer --calibration-windows"
            )
        import numpy as np

        file: Any = tempfile.TemporaryFile(dir=scratch, prefix="neox-lite-calibration-")  # noqa: SIM115
        shape = (2, *self._windows.shape, self._config.hidden_size)
        self._streams = torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))  # which keeps it open
        embedding = self._checkpoint.tensor(self._stored("gpt_neox.embed_in.weight"), sparse=True)
        for i, window in enumerate(self._windows):
            self._streams[:, i] = reference.embed(window, embedding, torch.float32)

    def _batches(self) -> Iterator[slice]:
        """Windows that go through a block together."""
        count, context = self._windows.shape
        step = _windows_together(self._config, context)
        return (slice(start, start + step) for start in range(0, count, step))

    @torch.no_grad()
    def _block(self, index: int) -> dict[str, dict[str, Tensor]]:
        prefix = f"gpt_neox.layers.{index}."
        original, ours = self._load(index), self._load(index)
        done: dict[str, dict[str, Tensor]] = {}
        for stage, names in enumerate(self._stages):
            for name, moments in zip(names, self._moments(original, ours, stage), strict=True):
                linear = original.get_submodule(name)
                assert isinstance(linear, Linear)
                format = self._formats(f"{prefix}{name}")
                try:
                    found = gptq.quantize(linear.handle.decode(), linear.bias, moments, format, self._dtype)
                except FormatError as error:
                    raise FormatError(f"{prefix}{name}: {error}") from error
                _replace(ours.get_submodule(name), found, format, self._dtype)
                done[f"{prefix}{name}"] = found
                self._step()
        for batch in self._batches():
            for stream, layer in zip(self._streams, (original, ours), strict=True):
                stream[batch] = self._run(layer, stream[batch])
            self._step()
        return done

    def _load(self, index: int) -> GPTNeoXLayer:
        """A block in float32, as the checkpoint has it."""
        with torch.device("meta"):
            layer = GPTNeoXLayer(self._config, index, lambda name: DENSE)
        for name, module in layer.named_modules():
            for key in list(module._parameters):
                if module._parameters[key] is not None:
                    value = self._checkpoint.tensor(self._stored(f"gpt_neox.layers.{index}.{name}.{key}")).float()
                    module._parameters[key] = nn.Parameter(value, requires_grad=False)
        return layer

    def _moments(self, original: GPTNeoXLayer, ours: GPTNeoXLayer, stage: int) -> list[gptq.Moments]:
        linears = [original.get_submodule(name) for name in self._stages[stage]]
        found = [gptq.Moments.empty(linear.shape) for linear in linears]  # type: ignore[arg-type]
        for batch in self._batches():
            wanted, wanted_sum = self._inputs(original, self._streams[0][batch], stage)
            fed, fed_sum = self._inputs(ours, self._streams[1][batch], stage)
            for i, (moments, linear) in enumerate(zip(found, linears, strict=True)):
                shift = (wanted[i] - fed[i]) @ linear.handle.decode().T  # type: ignore[union-attr, operator]
                if fed_sum is not None and i == len(found) - 1:  # the last one makes up for the residual stream, too
                    shift += wanted_sum - fed_sum  # type: ignore[operator]
                moments.add(fed[i], shift)
            self._step()
        return found

    def _inputs(self, layer: GPTNeoXLayer, x: Tensor, stage: int) -> tuple[Sequence[Tensor], Tensor | None]:
        """What the linear layers of a stage are fed, and the stream that their outputs are added to, if they are."""
        watch = _Watch(stage)
        try:
            self._run(layer, x, watch)
        except _Reached as reached:
            return reached.inputs, reached.x
        raise AssertionError(f"a block has no stage {stage}")

    def _run(self, layer: GPTNeoXLayer, x: Tensor, ops: Any = reference) -> Tensor:
        """x (windows, context, hidden) through a block, or until `ops` has seen enough."""
        count, context, hidden = x.shape
        config = self._config
        pool = PagePool(config.num_attention_heads, config.head_dim, torch.float32, [torch.device("cpu")])
        batch = Batch.reserve(pool, [pool.new() for _ in range(count)], [context] * count)
        layer.index = 0  # of the pool's only layer
        out: Tensor = layer(x.reshape(-1, hidden), ops, pool, batch, self._rotary)
        return out.view_as(x)

    def _step(self) -> None:
        self._steps += 1
        self._progress(self._steps, self._steps_in_all)


def _replace(module: nn.Module, found: dict[str, Tensor], format: GroupInt, dtype: torch.dtype) -> None:
    """Let a layer run with what was found for it."""
    assert isinstance(module, Linear)
    module.become(format, dtype)
    for key, value in (found | format.constants(module.shape)).items():
        if key == "bias":
            module.bias = nn.Parameter(value.float(), requires_grad=False)
        else:
            module.register_buffer(key, value)


class _Reached(Exception):
    """Ends a pass at the operation that was waited for, with what it was given."""

    def __init__(self, inputs: Sequence[Tensor], x: Tensor | None) -> None:
        self.inputs, self.x = inputs, x


class _Watch:
    """The reference operations up to the call of `grouped_linear` or `linear_residual` of this number."""

    def __init__(self, stage: int) -> None:
        self._left = stage
        self.layer_norms, self.attention = reference.layer_norms, reference.attention

    def grouped_linear(self, inputs: Sequence[Tensor], *rest: Any) -> Any:
        self._count(inputs, None)
        return reference.grouped_linear(inputs, *rest)

    def linear_residual(self, inputs: Sequence[Tensor], *rest: Any) -> Any:
        self._count(inputs, rest[-1])
        return reference.linear_residual(inputs, *rest)

    def _count(self, inputs: Sequence[Tensor], x: Tensor | None) -> None:
        if not self._left:
            raise _Reached(inputs, x)
        self._left -= 1
