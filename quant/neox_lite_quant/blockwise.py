"""Runs calibration windows through a model, one block in memory at a time, and quantizes the linear layers of each block.

Two streams of activations go through the blocks: that of the original model, and that of the blocks quantized so far, which
gives the inputs that the next layers have in the quantized model. Knows layers and operations; neither how codes are found nor
folders.
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
# What a block computes in one call of `grouped_linear` or `linear_residual`, in order. The inputs of a stage are final when the
# stages before it are quantized.
PARALLEL = (("attention.query_key_value", "mlp.dense_h_to_4h"), ("attention.dense", "mlp.dense_4h_to_h"))
SEQUENTIAL = tuple((name,) for name in (
    "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
))  # fmt: skip

Progress = Callable[[int, int], object]


def memory_bytes(config: GPTNeoXConfig, count: int, context: int) -> int:
    """Peak memory beyond mapped files: a block in float32 twice, the matrices of one layer, activations."""
    shapes = _shapes(config)
    block = sum(out * columns for out, columns in shapes)
    moments = max(_moment_size(shapes[0]) + _moment_size(shapes[2]), _moment_size(shapes[1]) + _moment_size(shapes[3]))
    work = max(2 * columns * columns + 3 * out * columns for out, columns in shapes)
    work += torch.get_num_threads() * gptq.ROWS * 16 * max(columns for _, columns in shapes)
    batch = min(count, _windows_together(config, context)) * context * config.intermediate_size
    return 4 * (2 * block + moments + work + 8 * batch) + BASE_BYTES


def scratch_bytes(config: GPTNeoXConfig, count: int, context: int) -> int:
    """The size of the file that holds both streams."""
    return 8 * count * context * config.hidden_size


def operations_of(config: GPTNeoXConfig, count: int, context: int) -> int:
    """Multiplications and additions of all passes of both streams, of the moments and of the solver."""
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
    """The number of progress reports for so many windows: one for each batch in each pass, and one for each solved layer."""
    batches = -(-count // _windows_together(config, context))
    return config.num_hidden_layers * (4 + (len(stages_of(config)) + 1) * batches)


def _windows_together(config: GPTNeoXConfig, context: int) -> int:
    return max(1, BATCH_ELEMENTS // (context * config.intermediate_size))


def _moment_size(shape: tuple[int, int]) -> int:
    """Numbers in the moments of a layer of this shape."""
    out, columns = shape
    return columns * columns + out * columns


class Blockwise:
    """Quantized tensors of a model's linear layers; a block is computed when one of its layers is requested."""

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
        """stored: the checkpoint's name of a tensor. formats: the format of a linear layer, by its full name.

        scratch: the folder for a temporary file of `scratch_bytes`.
        """
        self._checkpoint, self._config, self._stored = checkpoint, config, stored
        self._formats, self._dtype, self._windows, self._progress = formats, dtype, windows, progress
        self._stages, self._steps_in_all = stages_of(config), steps_of(config, *windows.shape)
        self._rotary = Rotary(config).table
        self._next, self._steps = 0, 0  # the next block, and the progress reports so far
        self._done: dict[str, dict[str, Tensor]] = {}
        self._open(scratch)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """weight_packed, weight_scale and bias of the layer of this name. Call it in the order of the blocks."""
        index = int(name.split(".")[2])
        while self._next <= index:
            self._done = self._block(self._next)
            self._next += 1
        return self._done[name]

    def _open(self, scratch: Path) -> None:
        needed = scratch_bytes(self._config, *self._windows.shape)
        if (free := free_bytes(scratch)) < needed:
            raise ArgumentError(
                f"{scratch}: calibration needs {needed / 1e9:.1f} GB of disk while it runs, {free / 1e9:.1f} GB are free; "
                "use fewer --calibration-windows"
            )
        import numpy as np

        file: Any = tempfile.TemporaryFile(dir=scratch, prefix="neox-lite-calibration-")  # noqa: SIM115
        shape = (2, *self._windows.shape, self._config.hidden_size)
        self._streams = torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))  # the map keeps the file open
        embedding = self._checkpoint.tensor(self._stored("gpt_neox.embed_in.weight"), sparse=True)
        for i, window in enumerate(self._windows):
            self._streams[:, i] = reference.embed(window, embedding, torch.float32)

    def _batches(self) -> Iterator[slice]:
        """Slices of the windows that go through a block together."""
        count, context = self._windows.shape
        step = _windows_together(self._config, context)
        return (slice(start, start + step) for start in range(0, count, step))

    @torch.no_grad()
    def _block(self, index: int) -> dict[str, dict[str, Tensor]]:
        """Quantize a block's linear layers, stage by stage, and move both streams through it."""
        prefix = f"gpt_neox.layers.{index}."
        original, quantized = self._load(index), self._load(index)
        done: dict[str, dict[str, Tensor]] = {}
        for stage, names in enumerate(self._stages):
            for name, moments in zip(names, self._moments(original, quantized, stage), strict=True):
                linear = original.get_submodule(name)
                assert isinstance(linear, Linear)
                format = self._formats(f"{prefix}{name}")
                try:
                    found = gptq.quantize(linear.handle.decode(), linear.bias, moments, format, self._dtype)
                except FormatError as error:
                    raise FormatError(f"{prefix}{name}: {error}") from error
                _replace(quantized.get_submodule(name), found, format, self._dtype)
                done[f"{prefix}{name}"] = found
                self._step()
        for batch in self._batches():
            for stream, layer in zip(self._streams, (original, quantized), strict=True):
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

    def _moments(self, original: GPTNeoXLayer, quantized: GPTNeoXLayer, stage: int) -> list[gptq.Moments]:
        """Of each linear layer of a stage, over all windows."""
        linears = [original.get_submodule(name) for name in self._stages[stage]]
        found = [gptq.Moments.empty(linear.shape) for linear in linears]  # type: ignore[arg-type]
        for batch in self._batches():
            exact, exact_residual = self._inputs(original, self._streams[0][batch], stage)
            inputs, residual = self._inputs(quantized, self._streams[1][batch], stage)
            for i, (moments, linear) in enumerate(zip(found, linears, strict=True)):
                shift = (exact[i] - inputs[i]) @ linear.handle.decode().T  # type: ignore[union-attr, operator]
                # The last layer of the stage also compensates the error of the residual stream.
                if residual is not None and i == len(found) - 1:
                    shift += exact_residual - residual  # type: ignore[operator]
                moments.add(inputs[i], shift)
            self._step()
        return found

    def _inputs(self, layer: GPTNeoXLayer, x: Tensor, stage: int) -> tuple[Sequence[Tensor], Tensor | None]:
        """The inputs of the linear layers of a stage, and the residual stream that their outputs are added to, or None."""
        try:
            self._run(layer, x, _InputCapture(stage))
        except _InputsCaptured as captured:
            return captured.inputs, captured.x
        raise AssertionError(f"a block has no stage {stage}")

    def _run(self, layer: GPTNeoXLayer, x: Tensor, ops: Any = reference) -> Tensor:
        """x (windows, context, hidden) through a block; `ops` may end the pass by an exception."""
        count, context, hidden = x.shape
        config = self._config
        pool = PagePool(config.num_attention_heads, config.head_dim, torch.float32, [torch.device("cpu")])
        batch = Batch.reserve(pool, [pool.new() for _ in range(count)], [context] * count)
        layer.index = 0  # the pool has one layer
        out: Tensor = layer(x.reshape(-1, hidden), ops, pool, batch, self._rotary)
        return out.view_as(x)

    def _step(self) -> None:
        self._steps += 1
        self._progress(self._steps, self._steps_in_all)


def _replace(module: nn.Module, found: dict[str, Tensor], format: GroupInt, dtype: torch.dtype) -> None:
    """Put a layer's quantized tensors in place of its own."""
    assert isinstance(module, Linear)
    module.become(format, dtype)
    for key, value in (found | format.constants(module.shape)).items():
        if key == "bias":
            module.bias = nn.Parameter(value.float(), requires_grad=False)
        else:
            module.register_buffer(key, value)


class _InputsCaptured(Exception):
    """Ends a pass at the operation whose inputs it carries."""

    def __init__(self, inputs: Sequence[Tensor], x: Tensor | None) -> None:
        self.inputs, self.x = inputs, x


class _InputCapture:
    """The reference operations; call number `stage` of `grouped_linear` or `linear_residual` raises _InputsCaptured."""

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
            raise _InputsCaptured(inputs, x)
        self._left -= 1
