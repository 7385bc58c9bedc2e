"""What every backend answers: the operations of a block and of the model's two ends. Knows no backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..cache import Batch, PagePool
from ..formats import Weight

Norm = tuple[Tensor, Tensor, float]  # gain (features,), bias (features,), eps
Activation = Any  # (tokens, features), laid out as the backend likes for the weight that will read it


class Captured(Protocol):
    """A pass that runs again with new inputs, without Python between its operations."""

    def replay(self, ids: Tensor, batch: Batch) -> Tensor:
        """ids (tokens,), a batch of as many sequences and tokens as the captured one -> the pass's result, in new memory."""
        ...


class Choice(NamedTuple):
    """How a token is chosen where the logits are, as `sampling.choose` does. temperature 0: the best id; top_k 0: of all."""

    seed: int = 0
    stream: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Flight(Protocol):
    """A step that was given to a device, which may not have done it yet."""

    def tokens(self) -> list[int]:
        """What was chosen for each of its sequences, waited for; -1 where the logits leave nothing to choose from."""
        ...


class Decoder(Protocol):
    """Steps of one token a sequence, each one graph on a device that chooses the next tokens itself."""

    def why_not(self, batch: Batch) -> str | None:
        """Why a batch of one token a sequence cannot be such a step; None where it can."""
        ...

    def launch(
        self,
        pool: PagePool,
        batch: Batch,
        ids: Sequence[int],
        choices: Sequence[Choice],
        excluded: Tensor | None = None,
        previous: Flight | None = None,
    ) -> Flight:
        """Give a step to the device. ids: of -1 - i is what `previous` chose in its place i, wherever that is by now.

        excluded (n,) int64: ids that are never chosen. Raises GraphError where the step cannot be captured.
        """
        ...

    def logits(self, pool: PagePool, batch: Batch, ids: Sequence[int]) -> Tensor:
        """A step whose tokens the host chooses: logits (sequences, vocabulary) in new memory. Raises as `launch`."""
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

    def capture(self, step: Callable[[Tensor], Tensor], ids: Tensor, batch: Batch, limit: int) -> Captured | None:
        """step(ids) for batches of as many sequences and tokens as this one; None where calling it is all there is.

        limit: most tokens that a sequence will hold. Nothing is computed before the first replay.
        """
        ...

    def decoder(
        self, step: Callable[[Tensor, PagePool, Batch], Tensor], device: torch.device, vocabulary: int, limit: int
    ) -> Decoder | str:
        """Steps as graphs, or why there are none. step(ids, pool, batch) -> logits; limit as in `capture`."""
        ...
