"""The language model: ids -> logits, a loss, and `generate`. Knows no file and no kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..cache import BlockTable, KVCache, PagePool
from ..config import GPTNeoXConfig
from ..core import inputs
from ..core.runner import Runner
from ..errors import ArgumentError
from ..formats import Format
from ..generation.mixin import Event, GenerationMixin
from ..kernels.backend import DeviceSampling, PendingStep
from ..layers import Linear
from .pretrained import Headed


class GPTNeoXForCausalLM(Headed, GenerationMixin):
    """The language model: ids -> float32 logits over the vocabulary, and `generate`."""

    head_name = "embed_out"
    embed_out: Linear

    def __init__(self, config: GPTNeoXConfig, formats: Callable[[str], Format] | None = None) -> None:
        super().__init__(config, config.vocab_size, False, formats)
        self.tie_weights()

    @property
    def lm_head(self) -> Linear:
        return self.embed_out

    def get_output_embeddings(self) -> Linear:
        return self.embed_out

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **other: Any,
    ) -> Any:
        """-> loss, logits (batch, tokens, vocabulary) float32, past_key_values, hidden_states.

        labels (batch, tokens), -100 for "do not score": the loss is the mean cross entropy of each label given the
        tokens before it, leaving out labels whose preceding position is masked. logits_to_keep n > 0 computes the last
        n columns only.
        """
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ArgumentError(f"logits_to_keep is {logits_to_keep!r}, expected a number of columns")
        if logits_to_keep and labels is not None:
            raise ArgumentError("logits_to_keep and labels exclude each other: the loss needs all logits")
        packed = self._packed(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            past_key_values,
            output_hidden_states,
            use_cache,
            **other,
        )
        shown = packed.keep.clone()
        if logits_to_keep:
            shown[:, : max(0, shown.shape[1] - logits_to_keep)] = False
        rows = shown[packed.keep].nonzero().flatten() if logits_to_keep else None
        flat = self.runner.head(packed.x, rows)
        logits = inputs.pad(flat, shown)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return self._output(
            return_dict,
            loss=None if labels is None else _language_loss(logits, labels, packed.keep),
            logits=logits,
            past_key_values=packed.cache,
            hidden_states=packed.hidden_states,
        )

    # What generation asks of a model (protocols.AsyncRunner) --------------------------------------------------------------

    @property
    def graph_reason(self) -> str | None:
        """Why decode steps are not CUDA graphs that sample the next tokens themselves; None where they are."""
        return self.runner.graph_reason

    def _unmoved_runner(self) -> Runner:
        """The kernels, bound anew where a tensor lies elsewhere than what was captured reads it."""
        runner = self.runner
        if runner.watch.moved():
            self.version += 1
            runner = self.runner
        return runner

    @torch.no_grad()
    def step(
        self,
        pool: PagePool,
        block_tables: Sequence[BlockTable],
        tokens: Sequence[Sequence[int]],
        every: bool = False,
    ) -> Tensor:
        """See `Runner.step`."""
        return self._unmoved_runner().step(pool, block_tables, tokens, every)

    @torch.no_grad()
    def launch(
        self,
        pool: PagePool,
        block_tables: Sequence[BlockTable],
        ids: Sequence[int],
        sampling: Sequence[DeviceSampling],
        excluded: Tensor | None = None,
        previous: PendingStep | None = None,
    ) -> PendingStep | None:
        """See `Runner.launch`."""
        return self._unmoved_runner().launch(pool, block_tables, ids, sampling, excluded, previous)

    def generate(self, input_ids: Tensor | None = None, **options: Any) -> Any:
        """Continue prompts (batch, tokens) -> ids with what follows, or return_dict_in_generate's. Options: those of `Options`
        and `Sampling`."""
        return self._generate(input_ids, options)

    def stream(self, prompt: str | Tensor | Sequence[int], **options: Any) -> Iterator[Event]:
        """Continue one prompt, yielding an `Event` for each token as it is chosen. Options: as of `generate`."""
        return self._stream(prompt, options)


def _language_loss(logits: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
    labels, keep = labels.to(logits.device), keep.to(logits.device)
    inputs.check_labels(labels, keep, logits.shape[-1])
    targets = torch.where(keep[:, :-1], labels[:, 1:], -100)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
