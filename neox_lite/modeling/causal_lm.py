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
    # By which transformers' Trainer knows how labels are counted.
    loss_type = "ForCausalLM"

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
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **other: Any,
    ) -> Any:
        """-> loss, logits (batch, tokens, vocabulary) float32, past_key_values, hidden_states.

        labels (batch, tokens), -100 for "do not score": the loss is the mean cross entropy of each label given the
        tokens before it, leaving out labels whose preceding position is masked. shift_labels: the same, moved by one column
        already. num_items_in_batch: what the sum is divided by in place of the number of labels. logits_to_keep n > 0
        computes the last n columns only, a tensor of indices those columns.
        """
        # Named arguments with "label" in them would be labels to transformers' Trainer, all of which it then expects.
        shift_labels, num_items_in_batch = other.pop("shift_labels", None), other.pop("num_items_in_batch", None)
        scored = labels is not None or shift_labels is not None
        if scored and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
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
        columns = _columns(logits_to_keep, packed.keep.shape[1])
        shown = packed.keep.clone()
        if columns is not None:
            shown[:] = False
            shown[:, columns] = packed.keep[:, columns]
        rows = shown[packed.keep].nonzero().flatten() if columns is not None else None
        flat = self.runner.head(packed.x, rows)
        logits = inputs.pad(flat, shown)
        if columns is not None:
            logits = logits[:, columns]
        return self._output(
            return_dict,
            loss=_language_loss(logits, labels, shift_labels, packed.keep, num_items_in_batch) if scored else None,
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

    def generate(
        self,
        input_ids: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        **options: Any,
    ) -> Any:
        """Continue prompts (batch, tokens) -> ids with what follows, or return_dict_in_generate's. Options: those of `Options`
        and `Sampling`."""
        options |= {"generation_config": generation_config} if generation_config is not None else {}
        options |= {"logits_processor": logits_processor} if logits_processor is not None else {}
        options |= {"stopping_criteria": stopping_criteria} if stopping_criteria is not None else {}
        return self._generate(input_ids, options)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Arguments of the forward pass that continues input_ids (batch, tokens), of which past_key_values holds the first."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        known = {name: more[name] for name in ("use_cache", "position_ids") if more.get(name) is not None}
        return {
            "input_ids": input_ids[:, past:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            **known,
        }

    def stream(self, prompt: str | Tensor | Sequence[int], **options: Any) -> Iterator[Event]:
        """Continue one prompt, yielding an `Event` for each token as it is chosen. Options: as of `generate`."""
        return self._stream(prompt, options)


def _columns(logits_to_keep: int | Tensor, width: int) -> Tensor | None:
    """Indices of the columns that need logits; None for all."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() != 1 or logits_to_keep.dtype not in (torch.int64, torch.int32):
            raise ArgumentError(f"logits_to_keep is {logits_to_keep!r}, expected indices of columns")
        if bool((logits_to_keep < -width).any() or (logits_to_keep >= width).any()):
            raise ArgumentError(f"logits_to_keep is {logits_to_keep.tolist()}, but there are {width} columns")
        return logits_to_keep.long().cpu() % max(width, 1)
    if type(logits_to_keep) is not int or logits_to_keep < 0:
        raise ArgumentError(f"logits_to_keep is {logits_to_keep!r}, expected a number of columns")
    return torch.arange(max(0, width - logits_to_keep), width) if logits_to_keep else None


def _language_loss(
    logits: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    keep: Tensor,
    num_items_in_batch: int | Tensor | None,
) -> Tensor:
    keep = keep.to(logits.device)
    if shift_labels is None:
        assert labels is not None
        labels = labels.to(logits.device)
        inputs.check_labels(labels, keep, logits.shape[-1])
        shift_labels = functional.pad(labels[:, 1:], (0, 1), value=-100)
    elif not isinstance(shift_labels, Tensor):
        raise ArgumentError(f"shift_labels is a {type(shift_labels).__name__}, expected a tensor as labels")
    else:
        inputs.check_labels(shift_labels.to(logits.device), torch.ones_like(keep), logits.shape[-1])
    if not isinstance(num_items_in_batch, int | Tensor | None):
        raise ArgumentError(f"num_items_in_batch is {num_items_in_batch!r}, expected a number")
    targets = torch.where(keep, shift_labels.to(logits.device), -100).flatten()
    if num_items_in_batch is None:
        return functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100)
    total = functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    return total / num_items_in_batch
