"""Hugging Face's arguments of a forward pass as packed tokens, and back: padding goes out, zeros come in. Pure functions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import KVCache
from ..config import GPTNeoXConfig
from ..errors import ArgumentError, ContextLengthError, UnsupportedError

REFUSED = {
    "output_attentions": "attention weights are never materialized",
    "head_mask": "heads cannot be masked",
    "encoder_hidden_states": "GPT-NeoX has no cross attention",
}
# Accepted and ignored: they repeat what attention_mask and the cache say already.
REDUNDANT = {"cache_position", "token_type_ids"}


@dataclass(frozen=True)
class PackedInputs:
    """A padded batch without its padding.

    tokens: ids (tokens,) int64 on the CPU, or embeddings (tokens, hidden). keep (batch, width) bool marks them in the padded
    batch. positions (tokens,) int64: for the rotary embedding. counts: tokens of each text, row by row; a row is one text
    unless its positions begin again.
    """

    tokens: Tensor
    keep: Tensor
    positions: Tensor
    counts: list[int]

    @property
    def are_ids(self) -> bool:
        return self.tokens.dim() == 1


def pack(
    config: GPTNeoXConfig,
    past: KVCache | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    use_cache: bool = True,
) -> PackedInputs:
    """Check the arguments and drop masked tokens. past: what is cached; it may be of any class yet.

    use_cache: whether the call returns a cache. Without one, and without a mask, position_ids that do not go on by one begin
    another text in the same row, as in transformers (`find_packed_sequence_indices`).

    Raises ArgumentError, ContextLengthError or UnsupportedError.
    """
    tensors = {"attention_mask": attention_mask, "position_ids": position_ids}
    for name, value in {**tensors, "input_ids": input_ids, "inputs_embeds": inputs_embeds}.items():
        if value is not None and not isinstance(value, Tensor):
            raise ArgumentError(f"{name} is a {type(value).__name__}, expected a tensor: return_tensors='pt'")
    given = _exactly_one(input_ids, inputs_embeds, config.hidden_size)
    rows, width = given.shape[:2]
    if past is not None:
        check_cache(config, past, rows)
    keep = _keep(attention_mask, rows, width, past)
    positions = _positions(config, position_ids, rows, width, past.width if past is not None else 0)
    counts = keep.sum(1).tolist()
    if not use_cache and past is None and attention_mask is None and position_ids is not None:
        counts = [count for row in positions for count in _text_lengths(row)]
    if input_ids is not None:
        tokens = check_ids(input_ids.cpu()[keep], config.vocab_size)
    else:
        tokens = given[keep.to(given.device)]
    return PackedInputs(tokens, keep, positions[keep], counts)


def _text_lengths(positions: Tensor) -> list[int]:
    """Lengths of the texts in a row: one ends where positions (width,) do not go on by one."""
    starts = (positions.diff() != 1).nonzero().flatten() + 1
    bounds = [0, *starts.tolist(), len(positions)]
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def pad(flat: Tensor, keep: Tensor) -> Tensor:
    """flat (tokens, n), keep (batch, width) bool marking that many places -> (batch, width, n), zeros elsewhere."""
    out = flat.new_zeros(*keep.shape, flat.shape[-1])
    out[keep.to(flat.device)] = flat
    return out


def check_options(other: dict[str, Any]) -> None:
    """Refuse arguments of a forward pass that would otherwise be ignored."""
    for name, value in other.items():
        if name in REFUSED and value is not None and value is not False:
            raise UnsupportedError(f"{name}: {REFUSED[name]}; leave it out")
        if name not in REFUSED and name not in REDUNDANT:
            raise ArgumentError(f"forward() knows no argument {name!r}")


def check_ids(ids: Tensor, vocabulary: int) -> Tensor:
    """ids (tokens,) as int64; one outside the vocabulary is named."""
    # Widened before comparing: a narrower type would wrap the vocabulary's size.
    ids = ids.long()
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if len(wrong):
        raise outside_vocabulary(int(wrong[0]), vocabulary)
    return ids


def outside_vocabulary(id: int, vocabulary: int) -> ArgumentError:
    return ArgumentError(f"input_ids: found {id}, expected 0 to {vocabulary - 1}")


def check_cache(config: GPTNeoXConfig, cache: Any, rows: int) -> None:
    """Refuse a cache of another kind, of another batch or of another model."""
    if not isinstance(cache, KVCache):
        raise UnsupportedError(
            f"past_key_values is a {type(cache).__name__}; pass back what forward() returned, a neox_lite KVCache"
        )
    if len(cache) != rows:
        raise ArgumentError(f"past_key_values holds {len(cache)} rows, but the call has {rows}")
    found = len(cache.pool.storage), cache.pool.storage[0].shape[2], cache.pool.storage[0].shape[4]
    own = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    if found != own:
        raise ArgumentError(
            f"past_key_values is of another model: (layers, heads, head size) are {found}, expected {own}"
        )


def check_labels(labels: Tensor, keep: Tensor, classes: int) -> None:
    """labels as keep (batch, width): integers, -100 or a class, and -100 wherever a token is masked."""
    if labels.is_floating_point():
        raise ArgumentError(f"labels are {labels.dtype}, expected integers")
    if labels.shape != keep.shape:
        raise ArgumentError(f"labels are {tuple(labels.shape)}, expected {tuple(keep.shape)}")
    if bool((labels[~keep] != -100).any()):
        raise ArgumentError("labels: a masked position has a label other than -100; set labels there to -100")
    wrong = labels[(labels != -100) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise ArgumentError(f"labels: found {wrong[0].item()}, expected -100 or 0 to {classes - 1}")


def _exactly_one(input_ids: Tensor | None, inputs_embeds: Tensor | None, hidden: int) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise ArgumentError("give exactly one of input_ids and inputs_embeds")
    if input_ids is not None:
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ArgumentError(
                f"input_ids are {tuple(input_ids.shape)} {input_ids.dtype}, expected (batch, tokens) int64"
            )
        return input_ids
    assert inputs_embeds is not None
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != hidden:
        raise ArgumentError(f"inputs_embeds are {tuple(inputs_embeds.shape)}, expected (batch, tokens, {hidden})")
    return inputs_embeds


def _keep(mask: Tensor | None, rows: int, width: int, cache: KVCache | None) -> Tensor:
    """Which of the new tokens (rows, width) are real; the mask may also cover the cached columns, and then must agree."""
    if mask is None:
        return torch.ones(rows, width, dtype=torch.bool)
    if mask.dim() != 2:
        raise UnsupportedError(f"attention_mask has {mask.dim()} dimensions; expected (batch, tokens) of 0 and 1")
    past = cache.width if cache is not None else 0
    if mask.shape[0] != rows or mask.shape[1] not in (width, past + width):
        raise ArgumentError(f"attention_mask is {tuple(mask.shape)}, expected {(rows, past + width)}")
    mask = mask.cpu()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ArgumentError("attention_mask holds values other than 0 and 1")
    keep = mask.bool()
    if cache is not None and past and keep.shape[1] == past + width:
        for row, columns in enumerate(cache.columns):
            if keep[row, :past].nonzero().flatten().tolist() != columns:
                raise ArgumentError(
                    f"attention_mask: row {row} masks cached tokens differently from when they were cached"
                )
    return keep[:, -width:] if width else keep[:, :0]


def _positions(config: GPTNeoXConfig, position_ids: Tensor | None, rows: int, width: int, past: int) -> Tensor:
    """Rotary positions (rows, width) on the CPU, refused beyond the context."""
    limit = config.max_position_embeddings
    if position_ids is None:
        positions = torch.arange(past, past + width).expand(rows, width)
    else:
        positions = position_ids.cpu()
        if positions.is_floating_point():
            raise ArgumentError(f"position_ids are {positions.dtype}, expected integers")
        positions = positions.long()
        if positions.dim() != 2 or positions.shape[1] != width or positions.shape[0] not in (1, rows):
            raise ArgumentError(f"position_ids are {tuple(positions.shape)}, expected {(rows, width)}")
        positions = positions.expand(rows, width)
    if positions.numel() and int(positions.min()) < 0:
        raise ArgumentError(f"position_ids: found {int(positions.min())}, expected 0 to {limit - 1}")
    if positions.numel() and int(positions.max()) >= limit:
        raise ContextLengthError(
            f"position {int(positions.max())} is outside the context: this model has {limit} positions "
            f"(max_position_embeddings), the call has {width} tokens after {past} cached ones"
        )
    return positions
