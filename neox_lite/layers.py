"""Linear, rotary tables and the transformer block as modules that hold tensors; the arithmetic is a backend's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cache import Batch, PagePool
from .config import GPTNeoXConfig
from .formats import DENSE, Format, Weight
from .kernels.backend import Activation, Backend, Norm

Formats = Callable[[str], Format]


class FixedDtype(nn.Module):
    """A module whose `fixed` buffers keep their dtype in `.half()`, `.float()` and `.to(dtype)`: they only move."""

    fixed: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        fixed = {name: self._buffers[name] for name in self.fixed}
        self._buffers.update(dict.fromkeys(self.fixed))
        try:
            super()._apply(fn, recurse)
        finally:  # a device that runs full must not cost the model its tensors
            self._buffers.update(fixed)
        for name, buffer in fixed.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer.new_empty(0)).device)
        return self


class LowRank(nn.Module):
    """What an adapter adds to the product of a weight: x -> B (A x), with A (rank, in) and, times the scale, B (out, rank)."""

    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.A, self.B = _parameter(a), _parameter(b)

    @property
    def handles(self) -> tuple[Weight, Weight]:
        """A and B as backends take them."""
        a, b = (Weight(DENSE, (t.shape[0], t.shape[1]), {"weight": t}) for t in (self.A, self.B))
        return a, b

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}"


class Linear(FixedDtype):
    """A (out, in) weight in some format, with an optional bias and what an adapter adds.

    A dense one holds the parameter `weight`, as torch does; others hold the tensors that their format names as buffers,
    so that `state_dict` has the checkpoint's names. An adapter's are `adapter.A` and `adapter.B`.
    """

    adapter: LowRank | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, format: Format = DENSE) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = _parameter(torch.empty(out_features)) if bias else None
        self.adapter = None
        self.become(format)

    def become(self, format: Format, dtype: torch.dtype | None = None) -> None:
        """Take on a format, with uninitialized tensors in place of those held so far."""
        for name in {"weight", *self._buffers} & {*self._parameters, *self._buffers}:
            delattr(self, name)
        self.format = format
        device = self.bias.device if self.bias is not None else None
        specs = format.specs(self.shape, dtype or torch.get_default_dtype())
        for suffix, (kind, shape) in specs.items():
            tensor = torch.empty(shape, dtype=kind, device=device)
            if format == DENSE:
                self.register_parameter(suffix, _parameter(tensor))
            else:
                self.register_buffer(suffix, tensor)
        self.fixed = () if format == DENSE else tuple(specs)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def handle(self) -> Weight:
        """The weight as backends take it."""
        if self.format == DENSE:
            return Weight(self.format, self.shape, {"weight": self._parameters["weight"]})  # type: ignore[dict-item]
        return Weight(self.format, self.shape, self._buffers)  # type: ignore[arg-type]

    @property
    def reader(self) -> Weight | None:
        """What its input is laid out for: the weight, or None for a plain tensor where an adapter reads that, too."""
        return self.handle if self.adapter is None else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) through a plain product, for use outside the operations."""
        out = x @ self.handle.decode(x.dtype).T
        if self.adapter is not None:
            out += x @ self.adapter.A.to(x.dtype).T @ self.adapter.B.to(x.dtype).T
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As usual, but that names may have dots, as a checkpoint's have."""
        if "." in name:
            self._buffers[name] = tensor
        else:
            super().register_buffer(name, tensor, persistent)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """As usual, but that names with a dot are no missing module's, and that tensors may tell more of the format."""
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing, unexpected = rest[2:4]
        unexpected[:] = [name for name in unexpected if name.removeprefix(prefix) not in self._buffers]
        if self.format != DENSE and not any(name.startswith(prefix) for name in missing):
            self.format = self.format.opened(self._buffers, self.shape)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, format={self.format}"


class Rotary(FixedDtype):
    """Cosines and sines of every position, (2, positions, rotary_dim / 2) float32 whatever the model's dtype."""

    fixed = ("table",)
    table: Tensor

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        with torch.device("cpu"):  # computed here even while a model is built without memory
            frequencies, scale = inverse_frequencies(config)
            angles = torch.arange(config.max_position_embeddings).float()[:, None] * frequencies
            table = torch.stack((angles.cos(), angles.sin())) * scale
        self.register_buffer("table", table, persistent=False)


def inverse_frequencies(config: GPTNeoXConfig) -> tuple[Tensor, float]:
    """Rotation per position of each pair, (rotary_dim / 2,) float32, and the factor on cosines and sines.

    default, and dynamic up to the trained length: Su et al. 2021, https://arxiv.org/abs/2104.09864;
    linear: positions divided by `factor`;
    llama3: low frequencies divided, high ones kept, a ramp between (Llama 3.1's published rule);
    yarn: Peng et al. 2023, https://arxiv.org/abs/2309.00071.
    """
    rope, dim = config.rope_parameters, config.rotary_dim
    wavelengths = rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    plain = 1.0 / wavelengths
    if rope["rope_type"] in ("default", "dynamic"):
        return plain, 1.0
    if rope["rope_type"] == "linear":
        return plain / rope["factor"], 1.0
    if rope["rope_type"] == "llama3":
        return _llama3(plain, rope), 1.0
    assert rope["rope_type"] == "yarn", rope
    return _yarn(wavelengths, rope, dim)


def _llama3(plain: Tensor, rope: dict[str, Any]) -> Tensor:
    trained, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / plain
    blend = (trained / wavelength - low) / (high - low)
    between = (1 - blend) * plain / rope["factor"] + blend * plain
    slow = torch.where(wavelength > trained / low, plain / rope["factor"], between)
    return torch.where(wavelength < trained / high, plain, slow)


def _yarn(wavelengths: Tensor, rope: dict[str, Any], dim: int) -> tuple[Tensor, float]:
    factor, trained = rope["factor"], rope["original_max_position_embeddings"]

    def pair_turning(rotations: float) -> float:
        """Index of the pair that turns this many times within the trained context."""
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = pair_turning(rope.get("beta_fast", 32)), pair_turning(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    frequencies = (1 / (factor * wavelengths)) * (1 - keep) + (1 / wavelengths) * keep
    return frequencies, rope.get("attention_factor") or _yarn_attention_factor(factor, rope)


def _yarn_attention_factor(factor: float, rope: dict[str, Any]) -> float:
    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return growth(rope["mscale"]) / growth(rope["mscale_all_dim"])
    return growth(1.0)


class GPTNeoXAttention(nn.Module):
    def __init__(self, config: GPTNeoXConfig, name: str, formats: Formats) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        self.query_key_value = Linear(hidden, 3 * hidden, bias, formats(f"{name}.query_key_value"))
        self.dense = Linear(hidden, hidden, bias, formats(f"{name}.dense"))


class GPTNeoXMLP(nn.Module):
    def __init__(self, config: GPTNeoXConfig, name: str, formats: Formats) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.dense_h_to_4h = Linear(hidden, inner, True, formats(f"{name}.dense_h_to_4h"))
        self.dense_4h_to_h = Linear(inner, hidden, True, formats(f"{name}.dense_4h_to_h"))


class GPTNeoXLayer(nn.Module):
    """One block: x -> x + attention(norm1 x) + mlp(norm2 x), or the two one after the other."""

    def __init__(self, config: GPTNeoXConfig, index: int, formats: Formats) -> None:
        super().__init__()
        name = f"gpt_neox.layers.{index}"
        self.index, self.parallel, self.activation = index, config.use_parallel_residual, config.activation
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = GPTNeoXAttention(config, f"{name}.attention", formats)
        self.mlp = GPTNeoXMLP(config, f"{name}.mlp", formats)

    @property
    def device(self) -> torch.device:
        return self.input_layernorm.weight.device

    def forward(self, x: Tensor, ops: Backend, cache: PagePool, batch: Batch, rotary: Tensor) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden), by the operations of one backend."""
        norm1, norm2 = norm_of(self.input_layernorm), norm_of(self.post_attention_layernorm)
        qkv, dense = self.attention.query_key_value, self.attention.dense
        up, down = self.mlp.dense_h_to_4h, self.mlp.dense_4h_to_h
        w_qkv, w_dense, w_up, w_down = qkv.handle, dense.handle, up.handle, down.handle
        if self.parallel:
            inputs = ops.layer_norms(x, [norm1, norm2], [qkv.reader, up.reader])
            added = _added(ops, [qkv, up], inputs)
            states, inner = ops.grouped_linear(
                inputs, [w_qkv, w_up], added, [None, self.activation], [None, down.reader]
            )
            attended = ops.attention(states, cache, self.index, batch, rotary, dense.reader)
            added = _added(ops, [dense, down], [attended, inner])
            return ops.linear_residual([attended, inner], [w_dense, w_down], added, x)
        inputs = ops.layer_norms(x, [norm1], [qkv.reader])
        (states,) = ops.grouped_linear(inputs, [w_qkv], _added(ops, [qkv], inputs), [None], [None])
        attended = ops.attention(states, cache, self.index, batch, rotary, dense.reader)
        x = ops.linear_residual([attended], [w_dense], _added(ops, [dense], [attended]), x)
        inputs = ops.layer_norms(x, [norm2], [up.reader])
        (inner,) = ops.grouped_linear(inputs, [w_up], _added(ops, [up], inputs), [self.activation], [down.reader])
        return ops.linear_residual([inner], [w_down], _added(ops, [down], [inner]), x)


def _added(ops: Backend, linears: Sequence[Linear], inputs: Sequence[Activation]) -> list[Tensor | None]:
    """What is added to the product of each: its bias (out,), or with an adapter B (A x) + bias (tokens, out)."""
    added: list[Tensor | None] = [linear.bias for linear in linears]
    adapted = {i: linear.adapter.handles for i, linear in enumerate(linears) if linear.adapter is not None}
    if adapted:
        none, (downs, ups) = [None] * len(adapted), zip(*adapted.values(), strict=True)
        low = ops.grouped_linear([inputs[i] for i in adapted], downs, none, none, ups)
        for i, delta in zip(
            adapted, ops.grouped_linear(low, ups, [added[i] for i in adapted], none, none), strict=True
        ):
            added[i] = delta
    return added


def norm_of(module: nn.LayerNorm) -> Norm:
    """A LayerNorm's (gain, bias, eps) as backends take them."""
    return module.weight, module.bias, module.eps


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
