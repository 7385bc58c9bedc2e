"""What every backend answers: the operations of a block and of the model's two ends. Knows no backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..cache import Batch, PagePool
from ..formats import Weight

Norm = tuple[Tensor, Tensor, float]  # gain (features,), bias (features,), eps
Forward = Callable[[Tensor, PagePool, Batch], Tensor]
Activation = Any  # (tokens, features), laid out as the backend likes for the weight that will read it


class Captured(Protocol):
    """A pass that runs again with new inputs, without Python between its operations."""

    def replay(self, x: Tensor, batch: Batch) -> Tensor:
        """x with a row a token, a batch of the captured one's shape -> the pass's result, in new memory."""
        ...


class DeviceSampling(NamedTuple):
    """How a device samples a token, as `sampling.sample_token` does. temperature 0: the best id; top_k 0: of all."""

    seed: int = 0
    stream: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class PendingStep(Protocol):
    """A step that a device was given and may not have finished."""

    def tokens(self) -> list[int]:
        """Waits -> the sampled id of each sequence; -1 where the logits leave nothing to sample from."""
        ...


class PassRunner(Protocol):
    """Runs a pass that comes again, in whichever way the backend does it best."""

    @property
    def unsupported_reason(self) -> str | None:
        """Why passes do not sample on the device; None where `launch` may succeed."""
        ...

    def run(self, x: Tensor, pool: PagePool, batch: Batch) -> Tensor:
        """What forward(x, pool, batch) gives, in new memory."""
        ...

    def launch(
        self,
        pool: PagePool,
        batch: Batch,
        ids: Sequence[int],
        sampling: Sequence[DeviceSampling],
        excluded: Tensor | None = None,
        previous: PendingStep | None = None,
    ) -> PendingStep | None:
        """Give a step of one token a sequence to the device, which samples the next; None where it must be run instead.

        ids: -1 - i stands for what `previous` sampled for its sequence i, known or not. excluded (n,) int64: ids that are
        never sampled.
        """
        ...

    def graphs(self, pool: PagePool) -> dict[Any, Any]:
        """What is captured over a pool, by key, the one used last at the end."""
        ...


class Backend(Protocol):
    """The operations. `next_weights` are the weights that will read a result; None: it must be a plain float tensor.

    A plain tensor may stand wherever an act may, whatever the weight that reads it.
    """

    @property
    def name(self) -> str: ...

    def activation_dtype(self, weights: torch.dtype, device: torch.device) -> torch.dtype:
        """Of activations between operations, for a model whose plain tensors are in `weights`."""
        ...

    def embed(self, ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """ids (tokens,) int64, weight (vocabulary, hidden) -> x (tokens, hidden) in `dtype`."""
        ...

    def layer_norms(self, x: Tensor, lns: Sequence[Norm], next_weights: Sequence[Weight | None]) -> list[Activation]:
        """x (tokens, hidden) -> one LayerNorm of x for each (gain, bias, eps)."""
        ...

    def grouped_linear(
        self,
        inputs: Sequence[Activation],
        weights: Sequence[Weight],
        addends: Sequence[Tensor | None],
        activations: Sequence[str | None],
        next_weights: Sequence[Weight | None],
    ) -> list[Activation]:
        """out[i] = activation[i](inputs[i] @ weights[i].T + addends[i]); addends (out,) or (tokens, out), or None."""
        ...

    def attention(
        self, qkv: Activation, cache: PagePool, layer: int, batch: Batch, rotary: Tensor, next_weight: Weight | None
    ) -> Activation:
        """Rotary, append to the cache, causal attention.

        qkv (tokens, heads * 3 * head_dim), rows ordered [head, (q, k, v), head_dim]; rotary (2, positions, rotary_dim / 2)
        float32 holds cosines and sines -> (tokens, heads * head_dim). Scores and softmax are float32; q is scaled before
        the product, which keeps fp16 checkpoints from overflowing.
        """
        ...

    def linear_residual(
        self, inputs: Sequence[Activation], weights: Sequence[Weight], addends: Sequence[Tensor | None], x: Tensor
    ) -> Tensor:
        """x + sum of inputs[i] @ weights[i].T + sum of addends -> (tokens, hidden)."""
        ...

    def head(self, x: Tensor, rows: Tensor | None, norm: Norm, weight: Weight) -> Tensor:
        """Final norm and vocabulary projection of the chosen rows (None: all) -> (rows, vocabulary) float32 logits."""
        ...

    def final_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """x (tokens, hidden) -> the last hidden state, for models without a vocabulary projection."""
        ...

    def pass_runner(
        self, forward: Forward, device: torch.device, limit: int, vocabulary: int | None = None
    ) -> PassRunner:
        """What runs forward(x, pool, batch) again and again, over tensors that stay where they are.

        limit: most tokens of a sequence. vocabulary: forward makes logits (tokens, vocabulary) from ids and may sample on the
        device; None: it is a part of a model.
        """
        ...
