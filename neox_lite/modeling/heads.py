"""The task heads over GPTNeoXModel, and which class a config names. Knows no file and no kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..cache import KVCache
from ..config import GPTNeoXConfig
from ..core.inputs import check_labels
from ..errors import ArgumentError, ConfigError
from ..formats import Format
from ..layers import Linear
from .causal_lm import GPTNeoXForCausalLM
from .pretrained import GPTNeoXModel, GPTNeoXPreTrainedModel, Headed


class GPTNeoXForSequenceClassification(Headed):
    """A score for each class from the last real token of each row."""

    head_name = "score"
    score: Linear

    def __init__(self, config: GPTNeoXConfig, formats: Callable[[str], Format] | None = None) -> None:
        super().__init__(config, config.num_labels, False, formats)
        self.num_labels = config.num_labels

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
        return_dict: bool | None = None,
        **other: Any,
    ) -> Any:
        """-> loss, logits (batch, labels) float32, past_key_values, hidden_states.

        The last token is the rightmost that attention_mask keeps and, given ids, that is not pad_token_id, as transformers
        takes it. Without a mask and a pad_token_id, a batch must be a single row. The loss follows config.problem_type.
        """
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
        last = self._last_tokens(input_ids, packed.keep, attention_mask is not None)
        first_of_row = packed.keep.sum(1).cumsum(0) - packed.keep.sum(1)
        place = packed.keep.cumsum(1)[torch.arange(len(last)), last] - 1
        logits = self.runner.head(packed.x, first_of_row + place)
        return self._output(
            return_dict,
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            past_key_values=packed.cache,
            hidden_states=packed.hidden_states,
        )

    def _last_tokens(self, ids: Tensor | None, keep: Tensor, masked: bool) -> Tensor:
        """Column (rows,) of the token to score."""
        rows, width = keep.shape
        pad = self.config.pad_token_id
        real = keep
        if ids is not None and pad is not None:
            real = keep & (ids.cpu() != pad)
            # A text of padding alone is scored at its beginning, as transformers does.
            alone = ~real.any(1)
            real[alone] = keep[alone] & (keep[alone].cumsum(1) == 1)
        elif not masked and rows > 1:
            raise ArgumentError(
                f"a batch of {rows} rows without attention_mask needs config.pad_token_id to find each row's last token"
            )
        if not bool(real.any(1).all()):
            raise ArgumentError(
                f"row {int((~real.any(1)).nonzero()[0])} is masked as a whole; it has no token to score"
            )
        return width - 1 - real.flip(1).int().argmax(1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        labels = labels.to(logits.device)
        kind = self.config.problem_type
        if kind is None:
            single = labels.dtype in (torch.long, torch.int)
            kind = "regression" if self.num_labels == 1 else "single_label" if single else "multi_label"
        if kind == "regression":
            return functional.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
        if kind.startswith("single_label"):
            check_labels(labels.view(-1), torch.ones(len(logits), dtype=torch.bool), self.num_labels)
            return functional.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1))
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class GPTNeoXForTokenClassification(Headed):
    """Scores for each class at every token."""

    head_name = "classifier"
    classifier: Linear

    def __init__(self, config: GPTNeoXConfig, formats: Callable[[str], Format] | None = None) -> None:
        super().__init__(config, config.num_labels, True, formats)
        self.num_labels = config.num_labels

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **other: Any,
    ) -> Any:
        """-> loss (mean cross entropy where labels are not -100), logits (batch, tokens, labels) float32, hidden_states."""
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
        logits = packed.unpack(self.runner.head(packed.x))
        loss = None
        if labels is not None:
            labels, keep = labels.to(logits.device), packed.keep.to(logits.device)
            check_labels(labels, keep, self.num_labels)
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return self._output(return_dict, loss=loss, logits=logits, hidden_states=packed.hidden_states)


class GPTNeoXForQuestionAnswering(Headed):
    """Scores of every token for being the first and the last of the answer."""

    head_name = "qa_outputs"
    qa_outputs: Linear

    def __init__(self, config: GPTNeoXConfig, formats: Callable[[str], Format] | None = None) -> None:
        super().__init__(config, 2, True, formats)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **other: Any,
    ) -> Any:
        """-> loss, start_logits and end_logits (batch, tokens) float32, hidden_states.

        start_positions and end_positions (batch,) are columns; one outside the row is left out of the loss, one that
        is masked is an error. Masked columns take no part in the loss.
        """
        packed = self._packed(
            input_ids, attention_mask, position_ids, inputs_embeds, None, output_hidden_states, **other
        )
        start, end = packed.unpack(self.runner.head(packed.x)).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            keep = packed.keep.to(start.device)
            loss = (_span_loss(start, start_positions, keep) + _span_loss(end, end_positions, keep)) / 2
        return self._output(
            return_dict, loss=loss, start_logits=start, end_logits=end, hidden_states=packed.hidden_states
        )


def _span_loss(logits: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
    rows, width = logits.shape
    targets = positions.to(logits.device).view(-1).clamp(0, width)
    if len(targets) != rows:
        raise ArgumentError(f"start_positions and end_positions have {len(targets)} entries, expected {rows}")
    real = functional.pad(keep, (0, 1), value=True)  # one more column for "outside the row"
    if not bool(real[torch.arange(rows, device=real.device), targets].all()):
        raise ArgumentError("start_positions or end_positions: names a masked column")
    return functional.cross_entropy(logits.masked_fill(~keep, float("-inf")), targets, ignore_index=width)


CLASSES: dict[str, type[Headed] | type[GPTNeoXModel]] = {
    cls.__name__: cls
    for cls in (
        GPTNeoXForCausalLM,
        GPTNeoXModel,
        GPTNeoXForSequenceClassification,
        GPTNeoXForTokenClassification,
        GPTNeoXForQuestionAnswering,
    )
}


def class_of(config: GPTNeoXConfig) -> type[GPTNeoXPreTrainedModel]:
    """The class that config.json's `architectures` names; the language model where it names none."""
    names = config.extra.get("architectures") or ["GPTNeoXForCausalLM"]
    if not isinstance(names, list) or names[0] not in CLASSES:
        raise ConfigError(f"architectures is {names!r}, expected one of {', '.join(CLASSES)}")
    return CLASSES[names[0]]
