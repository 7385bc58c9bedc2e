"""EleutherAI's own layer_XX-model_YY-model_states.pt files -> a checkpoint's tensors. Opens no file itself.

A model was trained on several GPUs that each held a part of every layer; model_YY is the part. Layer 00 is the embedding, the
blocks begin at 02, and the last two files are the final norm and the head: 47 and 48 of GPT-NeoX-20B's 44 blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError, shown
from .safetensors_file import TensorInfo

FILE_NAME = re.compile(r"layer_([0-9]{2,4})-model_([0-9]{2,4})-model_states\.pt")
# How the parts of a tensor make the whole.
BY_ROWS = ("word_embeddings", "attention.query_key_value", "mlp.dense_h_to_4h", "final_linear")
# Their biases are summed. In models with sequential residual, each part has the whole bias.
BY_COLUMNS = ("attention.dense", "mlp.dense_4h_to_h")
AVERAGED = ("input_layernorm", "post_attention_layernorm", "norm")
SKIPPED = ("attention.rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")  # buffers, which are computed
# Names since September 2024.
NEWER = {"mlp.linear1": "mlp.dense_h_to_4h", "mlp.linear2": "mlp.dense_4h_to_h"}
ENDS = {"word_embeddings": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "final_linear": "embed_out"}


class PartFile(Protocol):
    infos: dict[str, TensorInfo]

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor: ...


def layer_files(names: Iterable[str], where: Path) -> dict[int, list[str]]:
    """Layer number -> file names of its parts in order; {} where a folder has no such files.

    Raises CheckpointError if a layer or a part is missing.
    """
    found = {(int(m[1]), int(m[2])): m[0] for m in map(FILE_NAME.fullmatch, names) if m}
    if not found:
        return {}
    last, parts = max(found)[0], max(part for _, part in found) + 1
    numbers = [0, *range(2, last - 2), last - 1, last]
    absent = (
        f"layer_{n:02}-model_{p:02}-model_states.pt" for n in numbers for p in range(parts) if (n, p) not in found
    )
    missing, expected = next(absent, None), len(numbers) * parts
    if missing is not None or len(found) != expected:
        raise CheckpointError(
            f"{where}: {len(found)} layer files, expected {expected}; missing: {missing or 'none'}; expected layer_00, the "
            "blocks from layer_02 on without a gap, and two more after a gap of one, each in all its parts"
        )
    return {number: [found[number, part] for part in range(parts)] for number in numbers}


def open_layers(
    folder: Path, layers: dict[int, list[str]], open_part: Callable[[str], PartFile], parallel_residual: bool = True
) -> dict[Path, MergedLayer]:
    """Every file's path -> the layer that it is a part of. Raises CheckpointError for tensors that are not of this kind.

    parallel_residual: as in the config; decides how biases of row-parallel layers were added while training.
    """
    merged: dict[Path, MergedLayer] = {}
    for number, names in layers.items():
        layer = MergedLayer(number, folder / names[0], [open_part(name) for name in names], parallel_residual)
        merged |= {folder / name: layer for name in names}
    return merged


class MergedLayer:
    """A layer's tensors under the names that checkpoints give them, put together when they are read. A `WeightFile`."""

    def __init__(self, number: int, path: Path, parts: list[PartFile], parallel_residual: bool) -> None:
        self._parts = parts
        self._averaged = AVERAGED if parallel_residual else (*AVERAGED, *BY_COLUMNS)
        self._names: dict[str, str] = {}
        self.infos: dict[str, TensorInfo] = {}
        for name in parts[0].infos:
            if name not in SKIPPED:
                own = _own_name(number, name, path)
                self._names[own] = name
                self.infos[own] = self._merged_info(own, name)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """The tensor, or its rows start..stop: mapped where it lies in one part, else a copy."""
        stored, info = self._names[name], self.infos[name]
        if len(self._parts) == 1:
            return self._parts[0].read(stored, start, stop)
        first, last = (0, info.shape[0]) if start is None or stop is None else (start, stop)
        if _is_by_rows(stored):
            return self._rows(stored, first, last)
        found = [part.read(stored, first, last) for part in self._parts]
        if len(info.shape) == 2:
            return torch.cat(found, dim=1)
        total = torch.stack([values.float() for values in found]).sum(0)
        return (total / len(found) if _module(stored) in self._averaged else total).to(info.dtype)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        found: list[Tensor] = []
        offset = 0
        for part in self._parts:
            count = part.infos[name].shape[0]
            low, high = max(start - offset, 0), min(stop - offset, count)
            if low < high:
                found.append(part.read(name, low, high))
            offset += count
        found = found or [self._parts[0].read(name, 0, 0)]
        return torch.cat(found) if len(found) > 1 else found[0]

    def _merged_info(self, own: str, name: str) -> TensorInfo:
        """Shape of the whole. Raises CheckpointError if the parts do not go together."""
        first = self._parts[0].infos[name]
        dimensions = 2 if name.endswith("weight") and _module(name) not in AVERAGED else 1
        if len(first.shape) != dimensions:
            raise CheckpointError(
                f"{first.file}: {shown(name)} is {list(first.shape)}, expected {dimensions} dimensions"
            )
        infos = [part.infos.get(name) for part in self._parts]
        along = 0 if _is_by_rows(name) else 1 if len(first.shape) == 2 else None
        shape = list(first.shape)
        for info in infos[1:]:
            if info is None or not _go_together(first, info, along):
                found = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
                raise CheckpointError(
                    f"{first.file}: {shown(name)} is {first.dtype} {list(first.shape)}, {found} in another part"
                )
            if along is not None:
                shape[along] += info.shape[along]
        nbytes = sum(info.nbytes for info in infos if info is not None) if along is not None else first.nbytes
        return replace(first, name=own, shape=tuple(shape), nbytes=nbytes)


def _go_together(one: TensorInfo, other: TensorInfo, along: int | None) -> bool:
    """Whether two parts can be joined along a dimension, or, for None, added."""
    sizes = [[size for i, size in enumerate(info.shape) if i != along] for info in (one, other)]
    return one.dtype == other.dtype and len(one.shape) == len(other.shape) and sizes[0] == sizes[1]


def _own_name(number: int, name: str, path: Path) -> str:
    module, last = _module(name), name.rpartition(".")[2]
    known = module in (*BY_ROWS, *BY_COLUMNS, *AVERAGED) and last in ("weight", "bias")
    if not known or (number == 0) != (module == "word_embeddings"):
        raise CheckpointError(f"{path}: {shown(name)} is not part of GPT-NeoX's layer {number:02}")
    return f"{ENDS[module]}.{last}" if module in ENDS else f"gpt_neox.layers.{number - 2}.{module}.{last}"


def _module(name: str) -> str:
    module = name.rpartition(".")[0]
    return NEWER.get(module, module)


def _is_by_rows(name: str) -> bool:
    return _module(name) in BY_ROWS
