"""A checkpoint with balanced columns: the same function, easier to quantize. Needs no data; knows no format.

A linear layer's columns may be scaled if the tensors that produce its inputs are scaled back: the gain and bias of a norm for
query_key_value and dense_h_to_4h, the value rows of query_key_value for attention.dense. A group shares one scale, so its
columns should have similar sizes, and those with large inputs should be a little larger: the balance of AWQ (Lin et al. 2023,
https://arxiv.org/abs/2306.00978), with the size of inputs computed from gains and weights, not measured on text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from neox_lite.checkpoint.reader import Checkpoint
from neox_lite.config import GPTNeoXConfig
from neox_lite.loading.quantize import SLICE_ELEMENTS

SHARE = 0.25  # column sizes become (size of the input * size of the column) ** SHARE; 0.25 measured best of 0.25 to 1
MAX_FACTOR = 1e4  # on a column


@dataclass(frozen=True)
class Factors:
    """The factors of a tensor: one for each row, and one for each column of a matrix; None stands for ones."""

    rows: Tensor | None = None
    columns: Tensor | None = None


class Balanced(Checkpoint):
    """The tensors of a checkpoint, as `rows` and `tensor` give them, balanced and float32 where a factor applies.

    dtype: of stored gains. They are rounded to it here, and the factors of the columns are those of the rounded gains.
    """

    def __init__(
        self, plain: Checkpoint, config: GPTNeoXConfig, stored: Callable[[str], str], dtype: torch.dtype
    ) -> None:
        super().__init__(plain.folder, plain._files)
        self._config, self._stored, self._dtype = config, stored, dtype
        names = ("input_layernorm", "post_attention_layernorm", "attention.query_key_value", "attention.dense")
        self._block_of = {
            stored(f"gpt_neox.layers.{i}.{name}.{key}"): i
            for i in range(config.num_hidden_layers)
            for name in (*names, "mlp.dense_h_to_4h")
            for key in ("weight", "bias")
        }
        self._factors = lru_cache(4)(self._factors_of)  # blocks are read in order, a few tensors at a time

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = super().rows(name, start, stop)
        if name not in self._block_of:
            return rows
        factors = self._factors(self._block_of[name]).get(name, Factors())
        if factors.rows is not None:
            own = factors.rows[start:stop]
            rows = rows.float() * (own if rows.dim() == 1 else own[:, None])
        return rows if factors.columns is None else rows.float() * factors.columns

    def tensor(self, name: str, sparse: bool = False) -> Tensor:
        return self.rows(name, 0, self.info(name).shape[0]) if name in self._block_of else super().tensor(name, sparse)

    def _factors_of(self, index: int) -> dict[str, Factors]:
        """Factors of every tensor of a block that has any, by the checkpoint's name."""
        prefix = f"gpt_neox.layers.{index}."
        qkv, dense = f"{prefix}attention.query_key_value", f"{prefix}attention.dense"
        found: dict[str, Factors] = {}
        pairs = ((f"{prefix}input_layernorm", qkv), (f"{prefix}post_attention_layernorm", f"{prefix}mlp.dense_h_to_4h"))
        for norm, linear in pairs:
            gain = self._plain(f"{norm}.weight")
            factor = _balanced(gain.abs(), self._column_norms(f"{linear}.weight"))
            stored = (gain / factor).to(self._dtype).float()
            factor = torch.where(stored.abs() >= torch.finfo(self._dtype).smallest_normal, gain / stored, 1.0)
            found[self._stored(f"{norm}.weight")] = found[self._stored(f"{norm}.bias")] = Factors(1 / factor)
            found[self._stored(f"{linear}.weight")] = Factors(None, factor)
        values = _balanced(self._value_sizes(index), self._column_norms(f"{dense}.weight"))
        heads = torch.ones(self._config.num_attention_heads, 3, self._config.head_dim)
        heads[:, 2] = 1 / values.view(-1, self._config.head_dim)
        found[self._stored(f"{qkv}.weight")] = Factors(heads.flatten(), found[self._stored(f"{qkv}.weight")].columns)
        found[self._stored(f"{qkv}.bias")] = Factors(heads.flatten())
        found[self._stored(f"{dense}.weight")] = Factors(None, values)
        return found

    def _plain(self, name: str) -> Tensor:
        return super().tensor(self._stored(name)).float()

    def _column_norms(self, name: str) -> Tensor:
        """The Euclidean length of each column of a weight."""
        stored = self._stored(name)
        out, columns = self.info(stored).shape
        step, total = max(1, SLICE_ELEMENTS // columns), torch.zeros(columns, dtype=torch.float64)
        for start in range(0, out, step):
            total += super().rows(stored, start, min(out, start + step)).float().square().sum(0)
        return total.sqrt().float()

    def _value_sizes(self, index: int) -> Tensor:
        """Root mean square of each value, (hidden,), for norm outputs of independent, standard channels before the gain."""
        config, prefix = self._config, f"gpt_neox.layers.{index}."
        gain, shift = (self._plain(f"{prefix}input_layernorm.{key}") for key in ("weight", "bias"))
        linear, size = f"{prefix}attention.query_key_value", config.head_dim
        stored, sizes = self._stored(f"{linear}.weight"), []
        bias = self._plain(f"{linear}.bias") if config.attention_bias else torch.zeros(3 * config.hidden_size)
        for head in range(config.num_attention_heads):
            start = (3 * head + 2) * size
            weight = super().rows(stored, start, start + size).float()
            mean = weight @ shift + bias[start : start + size]
            sizes.append(((weight * gain).square().sum(1) + mean.square()).sqrt())
        return torch.cat(sizes)


def _balanced(inputs: Tensor, columns: Tensor) -> Tensor:
    """Factors of columns, with a geometric mean of 1; 1 where the product of size and input is 0 or not finite."""
    factor = (inputs * columns) ** SHARE / columns
    usable = torch.isfinite(factor) & (factor > 0)
    factor = torch.where(usable, factor, 1.0)
    factor /= factor[usable].log().mean().exp() if usable.any() else 1.0
    return torch.where(usable, factor.clamp(1 / MAX_FACTOR, MAX_FACTOR), 1.0)
