"""The operations in plain torch, on any device: the truth that other backends are tested against. Not made for speed.

Activations here are plain tensors in natural order, so `next_weights` (the weights that will read them) are not looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..cache import Batch, PagePool
from ..formats import Weight
from .backend import Backend, Forward, Norm, PassRunner
from .graphs import EagerRunner

Activation = Tensor  # (tokens, features): what travels between operations of this backend

name = "reference"
DECODED_ELEMENTS = 1 << 24  # weights decoded at a time: 64 MB of float32 scratch
SCORE_ELEMENTS = 1 << 25  # attention scores held at a time: 128 MB
ACTIVATIONS = {
    None: lambda x: x,
    "erf": functional.gelu,
    "tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def why_not(device: torch.device) -> str | None:
    """Runs wherever torch does."""
    return None


def bind(exact: bool) -> Backend:
    """The backend: this module, always exact."""
    return sys.modules[__name__]


def activation_dtype(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """Float32 on the CPU, else the model's own."""
    return torch.float32 if device.type == "cpu" else weights


def pass_runner(forward: Forward, device: torch.device, limit: int, vocabulary: int | None = None) -> PassRunner:
    return EagerRunner(forward, "the reference backend runs operation by operation")


def embed(ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """ids (tokens,) int64, weight (vocabulary, hidden) -> x (tokens, hidden) in `dtype`."""
    return functional.embedding(ids.to(weight.device), weight).to(dtype)


def layer_norms(x: Tensor, lns: Sequence[Norm], next_weights: Sequence[Weight | None]) -> list[Activation]:
    """x (tokens, hidden) -> one LayerNorm of x for each (gain, bias, eps)."""
    return [_layer_norm(x, ln) for ln in lns]


def grouped_linear(
    inputs: Sequence[Activation],
    weights: Sequence[Weight],
    addends: Sequence[Tensor | None],
    activations: Sequence[str | None],
    next_weights: Sequence[Weight | None],
) -> list[Activation]:
    """out[i] = activation[i](inputs[i] @ weights[i].T + addends[i]); addends (out,) or (tokens, out), or None."""
    outs = []
    for x, weight, addend, activation in zip(inputs, weights, addends, activations, strict=True):
        out = matmul(x, weight)
        if addend is not None:
            out += addend
        outs.append(ACTIVATIONS[activation](out))
    return outs


def attention(
    qkv: Activation, cache: PagePool, layer: int, batch: Batch, rotary: Tensor, next_weight: Weight | None
) -> Activation:
    """Rotary, append to the cache, causal attention: qkv (tokens, heads * 3 * head_dim) -> (tokens, heads * head_dim)."""
    heads, head_dim = cache.storage[layer].shape[2], cache.storage[layer].shape[4]
    q, k, v = qkv.view(-1, heads, 3, head_dim).unbind(2)  # (tokens, heads, head_dim)
    cos, sin = rotary[:, batch.positions.to(rotary.device)].unsqueeze(2)  # (tokens, 1, rotary_dim / 2)
    q, k = _rotate(q.float(), cos, sin), _rotate(k.float(), cos, sin)
    cache.write(layer, batch, k, v)
    out = torch.empty_like(q)
    for i, block_table in enumerate(batch.block_tables):
        first, last = batch.offsets[i], batch.offsets[i + 1]
        if last > first:
            keys, values = cache.read(layer, block_table, batch.starts[i] + last - first)
            out[first:last] = _attention(q[first:last], keys.float(), values.float(), batch.starts[i])
    return out.flatten(1).to(qkv.dtype)


def linear_residual(
    inputs: Sequence[Activation], weights: Sequence[Weight], addends: Sequence[Tensor | None], x: Tensor
) -> Tensor:
    """x + sum of inputs[i] @ weights[i].T + sum of addends -> (tokens, hidden)."""
    total = sum(matmul(each, weight) for each, weight in zip(inputs, weights, strict=True))
    for addend in addends:
        if addend is not None:
            total = total + addend
    return total + x


def head(x: Tensor, rows: Tensor | None, norm: Norm, weight: Weight) -> Tensor:
    """Final norm and vocabulary projection of the chosen rows (None: all) -> (rows, vocabulary) float32 logits."""
    chosen = x if rows is None else x[rows.to(x.device)]
    return matmul(_layer_norm(chosen, norm), weight).float()


def final_norm(x: Tensor, norm: Norm) -> Tensor:
    """x (tokens, hidden) -> the last hidden state, for models without a vocabulary projection."""
    return _layer_norm(x, norm)


def _layer_norm(x: Tensor, ln: Norm) -> Tensor:
    gain, bias, eps = ln
    return functional.layer_norm(x, (x.shape[-1],), gain.to(x.dtype), bias.to(x.dtype), eps)


def matmul(x: Tensor, weight: Weight) -> Tensor:
    """x (tokens, in) @ weight.T -> (tokens, out) in x's dtype, decoding a bounded number of rows at a time."""
    step = max(1, DECODED_ELEMENTS // weight.shape[1])
    if step >= weight.shape[0]:
        return x @ weight.decode(x.dtype).T
    out = x.new_empty(x.shape[0], weight.shape[0])
    for row in range(0, weight.shape[0], step):
        out[:, row : row + step] = x @ weight.decode(x.dtype, row, row + step).T
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] elements of each head, paired half against half (GPT-NeoX's order)."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _attention(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """q (tokens, heads, head_dim), keys and values (heads, start + tokens, head_dim) -> (tokens, heads, head_dim)."""
    tokens, heads, head_dim = q.shape
    length = keys.shape[1]
    q = q.transpose(0, 1) * head_dim**-0.5  # (heads, tokens, head_dim)
    step = max(1, SCORE_ELEMENTS // (heads * length))
    out = torch.empty_like(q)
    for row in range(0, tokens, step):
        scores = q[:, row : row + step] @ keys.transpose(1, 2)  # (heads, rows, length)
        places = torch.arange(start + row, start + min(row + step, tokens), device=q.device)
        hidden = torch.arange(length, device=q.device)[None, :] > places[:, None]
        out[:, row : row + step] = scores.masked_fill_(hidden, float("-inf")).softmax(-1) @ values
    return out.transpose(0, 1)
