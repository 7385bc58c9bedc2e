"""The padded batches of `generate`: its `input_ids` to prompts, sequences to what it returns. Knows no model and no pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from .options import Options
from .request import Sequence


def prompt_ids(ids: Any, mask: Any, options: Options) -> tuple[Tensor, Tensor]:
    """Ids (batch, tokens) int64 and which are real, (batch, tokens) bool; prompts without any token start with bos."""
    if ids is None:
        ids = torch.empty(1, 0, dtype=torch.long)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or (ids.is_floating_point() and ids.numel()) or not len(ids):
        found = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ArgumentError(f"input_ids is {found}, expected a tensor (batch, tokens) of ids: return_tensors='pt'")
    if ids.shape[1]:
        ids = ids.cpu().long()
        return ids, prompt_mask(ids, mask, options)
    if options.bos_token_id is None:
        raise ArgumentError("the prompt is empty and there is no bos_token_id to start from; give at least one token")
    ids = torch.full((len(ids), 1), options.bos_token_id)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def prompt_mask(ids: Tensor, mask: Any, options: Options) -> Tensor:
    """Which tokens of a padded batch are real: the mask, or, as transformers infers it, all but an unambiguous pad token."""
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise ArgumentError(f"attention_mask is a {type(mask).__name__}, expected a tensor (batch, tokens)")
        mask = mask.cpu()
        if mask.shape != ids.shape:
            raise ArgumentError(f"attention_mask is {tuple(mask.shape)}, expected {tuple(ids.shape)} as input_ids")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ArgumentError("attention_mask holds values other than 0 and 1")
        return mask.bool()
    if options.pad_token_id is not None and options.pad_token_id not in options.eos_token_id:
        return ids != options.pad_token_id
    return torch.ones_like(ids, dtype=torch.bool)


def pad(ids: Tensor, sequences: list[Sequence], options: Options) -> Tensor:
    """Prompts as given, each followed by its new tokens, then by padding up to the longest."""
    fill = options.pad_token_id
    if fill is None or fill < 0:
        fill = options.eos_token_id[0] if options.eos_token_id else 0
    width = max(len(sequence.tokens) for sequence in sequences)
    new = torch.full((len(sequences), width), fill, dtype=torch.long)
    for out, sequence in zip(new, sequences, strict=True):
        out[: len(sequence.tokens)] = torch.tensor(sequence.tokens, dtype=torch.long)
    repeated = ids.repeat_interleave(options.num_return_sequences, 0)
    return torch.cat((repeated, new), 1)


def stack_steps(sequences: list[list[Tensor]], padded: Tensor) -> tuple[Tensor, ...]:
    """(vocabulary,) of each new token of each sequence -> (batch, vocabulary) of each new token.

    Padding is certain: 0 at its own id, -inf at all others.
    """
    width = max(map(len, sequences))
    steps = []
    for i in range(width):
        found = torch.full((len(sequences), len(sequences[0][0])), float("-inf"))
        for n, tensors in enumerate(sequences):
            if i < len(tensors):
                found[n] = tensors[i]
            else:
                found[n, padded[n, padded.shape[1] - width + i]] = 0.0
        steps.append(found.to(padded.device))
    return tuple(steps)
