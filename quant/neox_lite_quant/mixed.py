"""Chooses a format for each linear layer, so that a folder fits a number of bytes and loses least. Needs no data.

The loss of a format in a layer is predicted from the weights alone. The channels of a norm's output are taken as independent
and standard; gains, biases, weights and the activation then give the sizes of all other activations. The error of a weight is
propagated to the residual stream and counts less the larger the stream is there. Measured layer by layer, KL adds up over
layers (docs/quantize.md), so one number for each layer and format is enough to choose by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_lite.config import GPTNeoXConfig
from neox_lite.errors import ArgumentError, FormatError
from neox_lite.formats import GroupInt
from neox_lite.kernels.reference import ACTIVATIONS
from neox_lite.loading.quantize import SLICE_ELEMENTS, encode
from neox_lite.loading.save import specs_of
from neox_lite.loading.skeleton import Skeleton

FORMATS = (GroupInt(4, 128), GroupInt(4, 64), GroupInt(4, 32), GroupInt(8, 128), GroupInt(8, 64), GroupInt(8, 32))
SAMPLED = 512  # rows of a weight that are quantized in every format, at even distances
STREAM_POWER = 0.5  # 0: an error in the stream stays the same in later layers; 1: it grows as the stream does

Mix = Mapping[str, GroupInt]  # full name of a linear layer -> its format
Losses = Mapping[str, Mapping[GroupInt, float]]
Progress = Callable[[int, int], object]


def smallest(config: GPTNeoXConfig) -> dict[str, GroupInt]:
    """The smallest format that the shape of each linear layer allows. Raises FormatError where there is none."""
    found = {}
    for name, shape in _shapes(config).items():
        fits = _fitting(shape)
        if not fits:
            raise FormatError(f"{name}: {FORMATS[0].why_not(shape)}")
        found[name] = fits[0]
    return found


def choose(losses: Losses, config: GPTNeoXConfig, dtype: torch.dtype, budget_bytes: int) -> dict[str, GroupInt]:
    """Formats of least predicted loss whose stored bytes fit the budget; those of `smallest` must fit it.

    Greedy: takes the step that saves most for its bytes among those that fit, until none does. Of equal steps the one of the
    first layer is taken, so that the same model gives the same mix.
    """
    shapes, mix = _shapes(config), smallest(config)
    left = budget_bytes - stored_bytes(mix, config, dtype)
    bytes_of = {n: {f: _bytes(f, shape, dtype) for f in _fitting(shape)} for n, shape in shapes.items()}
    while True:
        steps = [
            ((losses[name][now] - losses[name][format]) / more, -i, name, format, more)
            for i, (name, now) in enumerate(mix.items())
            for format, size in bytes_of[name].items()
            if 0 < (more := size - bytes_of[name][now]) <= left and losses[name][format] < losses[name][now]
        ]
        if not steps:
            return mix
        _, _, name, format, more = max(steps, key=lambda step: step[:2])
        mix[name], left = format, left - more


def stored_bytes(mix: Mix, config: GPTNeoXConfig, dtype: torch.dtype) -> int:
    """Bytes of all quantized weights together."""
    shapes = _shapes(config)
    return sum(_bytes(format, shapes[name], dtype) for name, format in mix.items())


def mix_for(
    skeleton: Skeleton,
    dtype: torch.dtype,
    method: str,
    target_bytes: int,
    other_bytes: int,
    progress: Progress | None,
) -> dict[str, GroupInt]:
    """The mix for a folder of at most target_bytes, of which other_bytes are for all but the quantized weights.

    method: how weights are rounded. Raises ArgumentError, naming the smallest possible size, where target_bytes is less.
    """
    config = skeleton.model.config
    min_bytes = stored_bytes(smallest(config), config, dtype) + other_bytes
    if min_bytes > target_bytes:
        raise ArgumentError(
            f"target size is {target_bytes} bytes, but the smallest folder of this model is {min_bytes}; give at least that"
        )
    losses = predict(skeleton, dtype, method, progress)
    return choose(losses, config, dtype, target_bytes - other_bytes)


def _shapes(config: GPTNeoXConfig) -> dict[str, tuple[int, int]]:
    return {
        f"gpt_neox.layers.{i}.{name}": (out, columns)
        for i in range(config.num_hidden_layers)
        for name, (out, columns, _) in config.linear_shapes.items()
    }


def _fitting(shape: tuple[int, int]) -> list[GroupInt]:
    return [format for format in FORMATS if format.why_not(shape) is None]


def _bytes(format: GroupInt, shape: tuple[int, int], dtype: torch.dtype) -> int:
    return sum(spec.nbytes for spec in specs_of("", format, shape, dtype))


# The predicted loss of a format in a layer -----------------------------------------------------------------------------


def predict(
    skeleton: Skeleton,
    dtype: torch.dtype,
    method: str,
    progress: Progress | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> dict[str, dict[GroupInt, float]]:
    """The predicted loss of each format in each linear layer; comparable with each other only.

    moments: mean squares (in,) of the inputs of linear layers, where they were measured, on a text for instance.
    """
    config, found = skeleton.model.config, {}
    weights = _Weights(skeleton)
    stream = float(weights.sample("gpt_neox.embed_in.weight").rows.square().sum(1).mean())
    for i in range(config.num_hidden_layers):
        inputs, importance, written = _sizes(weights, config, i)
        stream += written
        for name in config.linear_shapes:
            full = f"gpt_neox.layers.{i}.{name}"
            squares = (moments or {}).get(full, inputs[name])
            losses = _losses(weights.sample(f"{full}.weight"), squares, importance.get(name), dtype, method)
            found[full] = {format: loss / stream**STREAM_POWER for format, loss in losses.items()}
        if progress is not None:
            progress(i + 1, config.num_hidden_layers)
    return found


@dataclass(frozen=True)
class _Sample:
    """Rows of a weight at even distances, float32; one of these stands for `every` rows of the weight."""

    numbers: Tensor
    rows: Tensor
    every: float


def _losses(
    sample: _Sample, squares: Tensor, importance: Tensor | None, dtype: torch.dtype, method: str
) -> dict[GroupInt, float]:
    """The expected squared error in the residual stream. squares: mean squares of inputs; importance: weights of outputs."""
    rows = sample.rows
    found = {}
    for format in _fitting((rows.shape[0], rows.shape[1])):
        error = format.decode(encode(format, rows, dtype, method), torch.float32) - rows
        each = error.square().double() @ squares.double()
        found[format] = float((each if importance is None else each * importance[sample.numbers].double()).sum())
    return {format: loss * sample.every for format, loss in found.items()}


class _Weights:
    """A checkpoint's tensors under the model's names, in float32, some rows at a time."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._stored, self._checkpoint = skeleton.stored, skeleton.checkpoint

    def vector(self, name: str) -> Tensor:
        return self._checkpoint.tensor(self._stored(name)).float()

    def sample(self, name: str) -> _Sample:
        stored = self._stored(name)
        out, columns = self._checkpoint.info(stored).shape
        count = max(1, min(out, SAMPLED, SLICE_ELEMENTS // columns))
        numbers = torch.arange(count) * out // count
        rows = torch.cat([self._checkpoint.rows(stored, n, n + 1).float() for n in numbers.tolist()])
        if not torch.isfinite(rows).all():
            raise FormatError(f"{stored}: holds values that are not finite")
        return _Sample(numbers, rows, out / count)

    def outputs(self, name: str, gain: Tensor, shift: Tensor, bias: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean and variance (out,) of W (gain * x + shift) + bias for independent, standard x."""
        stored, means, variances = self._stored(name), [], []
        out, columns = self._checkpoint.info(stored).shape
        step = max(1, SLICE_ELEMENTS // columns)
        for start in range(0, out, step):
            rows = self._checkpoint.rows(stored, start, min(out, start + step)).float()
            means.append(rows @ shift)
            variances.append(rows.square_() @ gain.square())
        return torch.cat(means) + bias, torch.cat(variances)


def _sizes(weights: _Weights, config: GPTNeoXConfig, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Of one layer: the mean squares of each linear layer's inputs; the share of a squared error of its outputs that reaches
    the residual stream (1 where it is absent); and the squared size of what the layer adds to the stream.
    """
    prefix = f"gpt_neox.layers.{index}."
    names = ("input_layernorm", "post_attention_layernorm")
    (gain1, shift1), (gain2, shift2) = (
        (weights.vector(f"{prefix}{name}.weight"), weights.vector(f"{prefix}{name}.bias")) for name in names
    )
    qkv, dense = f"{prefix}attention.query_key_value", f"{prefix}attention.dense"
    up, down = f"{prefix}mlp.dense_h_to_4h", f"{prefix}mlp.dense_4h_to_h"
    bias = weights.vector(f"{qkv}.bias") if config.attention_bias else 0.0
    mean, variance = weights.outputs(f"{qkv}.weight", gain1, shift1, bias)
    heads = (config.num_attention_heads, 3, config.head_dim)
    squares, varying = (mean.square() + variance).view(heads), variance.view(heads)[:, 2]
    read = _column_squares(weights.sample(f"{dense}.weight")).view(-1, config.head_dim)
    spread = (read * varying).sum(1, keepdim=True)  # variance of a head's output over the tokens that it attends to
    # A query's error is multiplied with keys, a key's error with queries.
    scores = torch.stack((squares[:, 1], squares[:, 0]), 1) / config.head_dim
    attended = torch.cat((scores * spread[:, None], read[:, None]), 1).flatten()
    mean, variance = weights.outputs(f"{up}.weight", gain2, shift2, weights.vector(f"{up}.bias"))
    inner, inner_mean, slope = _activated(mean, variance.sqrt(), config.activation)
    used = _column_squares(weights.sample(f"{down}.weight"))
    inputs = {
        "attention.query_key_value": gain1.square() + shift1.square(),
        "attention.dense": squares[:, 2].flatten(),
        "mlp.dense_h_to_4h": gain2.square() + shift2.square(),
        "mlp.dense_4h_to_h": inner,
    }
    written = float(spread.sum() + (used * (inner - inner_mean.square())).sum())
    return inputs, {"attention.query_key_value": attended, "mlp.dense_h_to_4h": used * slope}, written


def _column_squares(sample: _Sample) -> Tensor:
    """The sum of squares of each column of the weight, estimated from the sample."""
    return sample.rows.square().sum(0) * sample.every


def _activated(mean: Tensor, deviation: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """For normally distributed u (n,): the means of f(u)**2, of f(u), and of f'(u)**2."""
    points = torch.linspace(-5, 5, 41)
    share = torch.exp(-points.square() / 2)
    share /= share.sum()
    act, step = ACTIVATIONS[activation], 1e-2
    square, first, slope = (torch.zeros_like(mean) for _ in range(3))
    for point, weight in zip(points.tolist(), share.tolist(), strict=True):
        u = mean + deviation * point
        value = act(u)
        square += weight * value.square()
        first += weight * value
        slope += weight * ((act(u + step) - act(u - step)) / (2 * step)).square()
    return square, first, slope
