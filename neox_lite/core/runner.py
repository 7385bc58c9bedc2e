"""A network bound to kernels: forward passes over packed tokens, steps of generation. Knows no padding and no text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..cache import Batch, BlockTable, PagePool
from ..errors import ContextLengthError
from ..kernels.backend import Backend, DeviceSampling, PassRunner, PendingStep
from ..kernels.graphs import MAX_TOKENS, EagerRunner
from ..offload.run import LayerRunner, Placement
from .inputs import outside_vocabulary
from .network import Network
from .source import TensorWatch


class Runner:
    """The kernels for a network as it is now; another version of the network needs another runner."""

    def __init__(self, network: Network, ops: Backend | None = None) -> None:
        """ops: used everywhere rather than the fastest ones that run where the parts are."""
        self.version, self.watch = network.version, TensorWatch(network)
        self._network, self._config = network, network.config
        base = network.base_model
        tier = "cpu" if network.device.type == "cpu" else "gpu"
        placement = network.placement or Placement.alone(tier, len(base.layers))
        origins = [network.source.origins_in(layer, f"layers.{i}.") for i, layer in enumerate(base.blocks)]
        self.layers = LayerRunner(
            base.blocks, base.rotary.table, network.dtype, placement, network.exact, network.accelerator, origins, ops
        )
        self.passes = self._pass_runner()

    def _pass_runner(self) -> PassRunner:
        """How steps of generation run."""
        config, layers = self._config, self.layers
        if "embed_out" not in self._network.heads:
            return EagerRunner(self._forward, "the model has no vocabulary head")
        if not layers.alone:
            reason = "layers are outside the GPU, and between it and the CPU a step is the host's work"
            return EagerRunner(self._forward_in_segments, reason)
        return layers.last.pass_runner(
            self._forward, self._network.device, config.max_position_embeddings, config.vocab_size
        )

    @property
    def ops(self) -> Backend:
        """The operations where the head is."""
        return self.layers.last

    # Parts of a pass --------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """ids (tokens,), all in the vocabulary -> x (tokens, hidden)."""
        layers = self.layers
        return layers.first.embed(ids, self._network.base_model.embed_in.weight, layers.first_dtype)

    def hidden_states(
        self, x: Tensor, pool: PagePool, batch: Batch, each: Callable[[Tensor], object] | None = None
    ) -> Tensor:
        """x (tokens, hidden) through all layers -> before the final norm; the batch is committed. each: see `LayerRunner`."""
        x = self.layers(x, pool, batch, each)
        batch.commit()
        return x

    def final_norm(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) -> last hidden states (tokens, hidden)."""
        return self.ops.final_norm(x, self._network.final_norm)

    def head(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Final norm and output layer of some tokens (None: all) of x (tokens, hidden) -> (rows, features) float32."""
        (linear,) = self._network.heads.values()
        out = self.ops.head(x, rows, self._network.final_norm, linear.handle)
        return out if linear.bias is None else out + linear.bias.float()

    # Steps of generation (protocols.ModelRunner) ------------------------------------------------------------------------

    def step(
        self,
        pool: PagePool,
        block_tables: Sequence[BlockTable],
        tokens: Sequence[Sequence[int]],
        every: bool = False,
    ) -> Tensor:
        """Append tokens[i] to block_tables[i] -> float32 logits (sequences, vocabulary) after the last token of each.

        every: logits (tokens in all, vocabulary) after every token, sequence after sequence. Raises ContextLengthError, with
        nothing appended, for tokens beyond the model's positions.
        """
        # 1. Checks.
        counts, limit = [len(t) for t in tokens], self._config.max_position_embeddings
        for block_table, count in zip(block_tables, counts, strict=True):
            if block_table.length + count > limit:
                raise ContextLengthError(
                    f"{count} tokens after {block_table.length} cached ones do not fit: this model has {limit} positions "
                    "(max_position_embeddings)"
                )
        ids = torch.tensor(self._checked([i for t in tokens for i in t]))
        # 2. The pass: one that comes again, or one over a prompt, whose last tokens alone need logits.
        batch = Batch.reserve(pool, block_tables, counts)
        if all(count == 1 for count in counts) or (every and len(ids) <= MAX_TOKENS):
            run = self._forward if self._graphs_are_off else self.passes.run
            logits = run(ids, pool, batch)
        elif every:
            logits = self._forward(ids, pool, batch)
        else:
            x = self.layers(self.embed(ids), pool, batch)
            logits = self.head(x, torch.tensor(batch.offsets[1:]) - 1)
        batch.commit()
        return logits

    def _checked(self, ids: list[int]) -> list[int]:
        """ids, all in the vocabulary; a comparison of numbers takes less time than one of a small tensor."""
        vocabulary = self._config.vocab_size
        if ids and (min(ids) < 0 or max(ids) >= vocabulary):
            raise outside_vocabulary(next(i for i in ids if not 0 <= i < vocabulary), vocabulary)
        return ids

    def _forward(self, ids: Tensor, pool: PagePool, batch: Batch) -> Tensor:
        """ids (tokens,) of a batch, all in the vocabulary -> logits (tokens, vocabulary)."""
        return self.head(self.layers(self.embed(ids), pool, batch))

    def _forward_in_segments(self, ids: Tensor, pool: PagePool, batch: Batch) -> Tensor:
        """The same, where neighbouring layers are captured together."""
        return self.head(self.layers(self.embed(ids), pool, batch, small=True))

    @property
    def graph_reason(self) -> str | None:
        """Why decode steps are not CUDA graphs that sample the next tokens themselves; None where they are."""
        return self.passes.unsupported_reason if self._network.graph else "model.graph is off"

    @property
    def _graphs_are_off(self) -> bool:
        """Whether passes are CUDA graphs and the user wants none."""
        return not self._network.graph and self.passes.unsupported_reason is None

    def launch(
        self,
        pool: PagePool,
        block_tables: Sequence[BlockTable],
        ids: Sequence[int],
        sampling: Sequence[DeviceSampling],
        excluded: Tensor | None = None,
        previous: PendingStep | None = None,
    ) -> PendingStep | None:
        """Append an id to each sequence and have the next ones sampled, without waiting; see `PassRunner.launch`.

        None, with nothing appended, where such a step has to be run.
        """
        if self.graph_reason is not None:
            return None
        limit = self._config.max_position_embeddings
        if any(block_table.length >= limit for block_table in block_tables):
            raise ContextLengthError(f"a sequence has {limit} tokens, all positions of this model")
        self._checked([id for id in ids if id >= 0])
        batch = Batch.reserve(pool, block_tables, [1] * len(ids))
        pending = self.passes.launch(pool, batch, ids, sampling, excluded, previous)
        if pending is not None:
            batch.commit()
        return pending
