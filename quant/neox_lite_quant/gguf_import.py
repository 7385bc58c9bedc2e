"""A GGUF model -> a folder: Q4_0 and Q8_0 keep codes and scales, everything else becomes plain. Writes no GGUF.

The file is presented as a checkpoint whose tensors are transcoded when they are read, a slice of rows at a time, so the names
and shapes pass the same checks as those of any checkpoint.
"""

from __future__ import annotations

import math
import os
import re
import struct
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox_lite.checkpoint.reader import Checkpoint
from neox_lite.checkpoint.safetensors_file import Spec, TensorInfo
from neox_lite.config import GPTNeoXConfig
from neox_lite.errors import ArgumentError, ConfigError, FormatError, first_few, shown
from neox_lite.formats import DENSE, Format, GroupInt
from neox_lite.loading.options import parse_dtype
from neox_lite.loading.quantize import SLICE_ELEMENTS
from neox_lite.loading.save import Part, specs_of, write_model
from neox_lite.loading.skeleton import Skeleton
from neox_lite.modeling.causal_lm import GPTNeoXForCausalLM
from neox_lite.units import dtype_name

from .convert import Meter, Progress, Report
from .gguf_file import BF16, DECODED, F32, Q8_0, TYPE_NAMES, GgufFile
from .gguf_tensors import GROUPS, PLAIN, from_blocks, own_name, places
from .gguf_tokenizer import tokenizer_files

LIKE_LLAMA_CPP = "gelu_fast"  # the one GELU that llama.cpp computes
KNOWN_KEYS = {  # under gptneox.; the others only describe how llama.cpp stores or runs the model
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "attention.head_count"),
    *("attention.layer_norm_epsilon", "use_parallel_residual", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "neox_lite.hidden_act"),
}
HEAD_WEIGHT = "embed_out.weight"
LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def import_gguf(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: Any = None,
    hidden_act: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a GGUF file of this architecture as a model folder.

    dtype: of all that is not quantized, None for the file's own. hidden_act: the GELU; None for the one that the file names,
    or else the one that llama.cpp computes. Warns of tensors that are rounded; raises FormatError for what no format holds.
    """
    began = time.perf_counter()
    path, destination = Path(source), Path(destination)
    file = GgufFile(path)
    config = config_of(file, hidden_act)
    named = _named(file, config)
    chosen = parse_dtype(dtype) or _dtype_of(file)
    config.dtype = dtype_name(chosen)
    formats = {name.removesuffix(".weight"): _format(file, gguf) for name, gguf in named.items()}
    if chosen == torch.bfloat16 and any(format != DENSE for format in formats.values()):
        raise ArgumentError("dtype is bfloat16, which cannot hold the file's scales; choose float16 or float32")
    config.quantization_config = _scheme(formats, chosen)
    weights = GgufWeights(file, config, named)
    checkpoint = Checkpoint(path, {path: weights})
    skeleton = Skeleton(GPTNeoXForCausalLM, config, checkpoint)
    _warn_of_decoding(file, chosen, path)
    _warn_of_rounding(weights, chosen, path)
    parts = _parts(skeleton, chosen)
    head = _small_head(file, named, config, chosen)
    meter = Meter(progress, sum(spec.nbytes for part in [*parts, *([head] if head else [])] for spec in part.specs))
    companions = tokenizer_files(file.metadata, config.vocab_size, str(path))
    write_model(destination, config, parts, companions, head, progress=meter, method="gguf", source_name=path.name)
    bytes_in = sum(tensor.nbytes for tensor in file.tensors.values())
    return Report(destination, bytes_in, meter.total, time.perf_counter() - began, meter.peak_bytes)


# -- what the model is ------------------------------------------------------------------------------------------------


def config_of(file: GgufFile, hidden_act: str | None = None) -> GPTNeoXConfig:
    """The architecture as a config. Raises FormatError for another one, ConfigError for numbers that make no sense."""
    architecture = file.metadata.get("general.architecture")
    if architecture != "gptneox":
        raise FormatError(
            f"{file.path}: general.architecture is {shown(architecture)}, expected gptneox, the one that runs here"
        )
    prefix = "gptneox."
    found = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    sizes = {
        "max_position_embeddings": "context_length",
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
    }
    if missing := [gguf for gguf in sizes.values() if gguf not in found]:
        raise FormatError(f"{file.path}: has no gptneox.{missing[0]}; convert the checkpoint again")
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if found["block_count"] != len(blocks):  # checked before a module is built for each of thousands of blocks
        raise FormatError(
            f"{file.path}: gptneox.block_count is {shown(found['block_count'])}, but there are tensors of {len(blocks)} blocks"
        )
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    ids = {own: file.metadata.get(f"tokenizer.ggml.{gguf}") for own, gguf in names.items()}
    if (turn := file.metadata.get("tokenizer.ggml.eot_token_id")) not in (None, ids["eos_token_id"]):
        ids["eos_token_id"] = [*([] if ids["eos_token_id"] is None else [ids["eos_token_id"]]), turn]
    config = GPTNeoXConfig(
        _where=str(file.path),
        architectures=[GPTNeoXForCausalLM.__name__],
        **{own: found[gguf] for own, gguf in sizes.items()},
        **ids,
        vocab_size=_vocabulary(file, found),
        hidden_act=hidden_act or _activation(found, file.path),
        layer_norm_eps=_shortest(found.get("attention.layer_norm_epsilon", 1e-5)),
        use_parallel_residual=found.get("use_parallel_residual", True),
        attention_bias=any(name.endswith(("attn_qkv.bias", "attn_output.bias")) for name in file.tensors),
        tie_word_embeddings=_is_tied(file),
        rotary_emb_base=_shortest(found.get("rope.freq_base", 10000.0)),
        rope_scaling=_rope_scaling(found),
    )
    _refuse_unknown(found, config, file.path)
    # Without a number, llama.cpp rotates whole heads.
    return _with_rotary_dim(config, found.get("rope.dimension_count", config.head_dim), file.path)


def _activation(found: Mapping[str, Any], path: Path) -> Any:
    """The GELU that the file names, as our exports do; else, with a warning, the one that llama.cpp computes."""
    if (named := found.get("neox_lite.hidden_act")) is not None:
        return named
    warnings.warn(
        f"{path}: does not say which GELU the model was trained with; config.json gets {LIKE_LLAMA_CPP}, as llama.cpp computes "
        "it; --hidden-act gelu is the other one, which Pythia has",
        stacklevel=4,
    )
    return LIKE_LLAMA_CPP


def _refuse_unknown(found: Mapping[str, Any], config: GPTNeoXConfig, path: Path) -> None:
    """Raises FormatError for an unknown key that may change the computation, unless its value is GPT-NeoX's own."""
    usual: dict[str, Any] = {"attention.head_count_kv": config.num_attention_heads}
    usual |= dict.fromkeys(("attention.key_length", "attention.value_length"), config.head_dim)
    usual |= {"attention.causal": True, "rope.scaling.finetuned": found.get("rope.scaling.finetuned")}
    unknown = [key for key in found if key not in KNOWN_KEYS and key.startswith(("rope.", "attention."))]
    unsupported = [key for key in unknown if key not in usual or found[key] != usual[key]]
    if unsupported:
        raise FormatError(f"{path}: gptneox.{first_few(unsupported)} is not part of GPT-NeoX as it runs here")


def _vocabulary(file: GgufFile, found: Mapping[str, Any]) -> Any:
    embedding = file.tensors.get("token_embd.weight")
    return found.get("vocab_size", embedding.shape[0] if embedding is not None else None)


def _shortest(value: Any) -> Any:
    """A float32 as the shortest decimal number that stands for it: 1e-05, not 9.99999974737875e-06."""
    if not isinstance(value, float) or not math.isfinite(value) or abs(value) > 3e38:
        return value
    single = struct.pack("<f", value)
    return next(float(text) for n in range(1, 18) if struct.pack("<f", float(text := f"{value:.{n}g}")) == single)


def _rope_scaling(found: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = found.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": _shortest(found.get("rope.scaling.factor"))}
    if (trained := found.get("rope.scaling.original_context_length")) is not None and kind == "yarn":
        scaling["original_max_position_embeddings"] = trained
    return scaling


def _with_rotary_dim(config: GPTNeoXConfig, count: Any, path: Path) -> GPTNeoXConfig:
    """The config with the share of each head that gives `count` rotated elements."""
    if type(count) is not int or not 2 <= count <= config.head_dim:
        raise ConfigError(f"{path}: gptneox.rope.dimension_count is {count!r}, expected 2 to {config.head_dim}")
    share = count / config.head_dim
    if int(config.head_dim * share) != count:
        share = math.nextafter(share, 2.0)
    return config.copy(rotary_pct=share)


def _is_tied(file: GgufFile) -> bool:
    """Whether there is no head, or one that equals the embedding, as in exports of tied checkpoints."""
    head, embedding = file.tensors.get("output.weight"), file.tensors.get("token_embd.weight")
    if head is None or embedding is None:
        return head is None
    same = head.kind == embedding.kind and head.shape == embedding.shape
    return same and torch.equal(file.rows(head.name), file.rows(embedding.name))


def _dtype_of(file: GgufFile) -> torch.dtype:
    """float32 if a matrix is in it, bfloat16 if all are in it, else float16."""
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return torch.float32 if F32 in kinds else torch.bfloat16 if kinds == {BF16} else torch.float16


# -- its tensors ------------------------------------------------------------------------------------------------------


def _named(file: GgufFile, config: GPTNeoXConfig) -> dict[str, str]:
    """The checkpoint's name -> GGUF's name of every tensor. Raises FormatError for those of another architecture."""
    named = {own_name(name): name for name in file.tensors}
    if None in named:
        unknown = [shown(name) for name in file.tensors if own_name(name) is None]
        raise FormatError(f"{file.path}: GPT-NeoX has no tensor {first_few(unknown)}")
    if config.tie_word_embeddings:
        named.pop(HEAD_WEIGHT, None)
    return {own: gguf for own, gguf in named.items() if own is not None}


def _format(file: GgufFile, name: str) -> Format:
    """The format that a tensor's type becomes; embedding and head are always plain."""
    return DENSE if name in ("token_embd.weight", "output.weight") else GROUPS.get(file.tensors[name].kind, DENSE)


def _scheme(formats: Mapping[str, Format], dtype: torch.dtype) -> dict[str, Any] | None:
    """config.json's quantization_config for modules of these formats; None where all are plain."""
    linears = {name: format for name, format in formats.items() if name.rpartition(".")[2] in LINEARS}
    kinds = Counter(format for format in linears.values() if isinstance(format, GroupInt))
    if not kinds:
        return None
    dense = [name for name, format in linears.items() if format == DENSE]
    scheme = next(iter(kinds)).scheme(["lm_head", "embed_out", *dense], dtype)
    if len(kinds) > 1:  # each module is a target by its name, because the first group that matches is used
        groups = {}
        for i, kind in enumerate(kinds):
            (group,) = kind.scheme([], dtype)["config_groups"].values()
            names = [name.removeprefix("gpt_neox.") for name, format in linears.items() if format == kind]
            groups[f"group_{i}"] = {**group, "targets": [f"re:.*{re.escape(name)}$" for name in names]}
        scheme["config_groups"] = groups
    return scheme


@dataclass(frozen=True)
class _Entry:
    """One stored tensor of the checkpoint: the GGUF tensor it is read from, and its key in the result of `from_blocks`."""

    gguf_name: str
    key: str


class GgufWeights:
    """A GGUF file's tensors as a checkpoint's, in its names, order of rows and formats. A `WeightFile`."""

    def __init__(self, file: GgufFile, config: GPTNeoXConfig, named: Mapping[str, str], quantized_head: bool = False):
        self.file, self.config = file, config
        self.infos: dict[str, TensorInfo] = {}
        self._entries: dict[str, _Entry] = {}
        for own, gguf in named.items():
            stem, _, last = own.rpartition(".")
            tensor = file.tensors[gguf]
            format = GROUPS[tensor.kind] if quantized_head else _format(file, gguf)
            if format == DENSE or last == "bias" or len(tensor.shape) != 2:
                dtype = PLAIN.get(tensor.kind, torch.float32)
                self._add(own, gguf, "weight", dtype, tensor.shape)
                continue
            for key, (kind, shape) in format.specs((tensor.shape[0], tensor.shape[1]), torch.float16).items():
                self._add(f"{stem}.{key}", gguf, key, kind, shape)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """The tensor, or its rows start..stop, transcoded."""
        entry, info = self._entries[name], self.infos[name]
        tensor = self.file.tensors[entry.gguf_name]
        if entry.key == "weight_shape":
            return torch.tensor(tensor.shape)[slice(start, stop)]
        first, last = (0, info.shape[0]) if start is None or stop is None else (start, stop)
        raw = self.file.rows(entry.gguf_name)
        permuted = "attn_qkv" in entry.gguf_name
        raw = raw[places(self.config, first, last)] if permuted else raw[first:last]
        made = from_blocks(tensor.kind, raw)
        if entry.key in made:
            values = made[entry.key]()
        else:  # blocks to be decoded to plain numbers
            values = GROUPS[tensor.kind].decode({key: make() for key, make in made.items()}, torch.float32)
        return values.view(last - first, *info.shape[1:])

    def _add(self, name: str, gguf: str, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        nbytes = math.prod(shape) * dtype.itemsize
        self.infos[name] = TensorInfo(name, tuple(shape), dtype, self.file.path, nbytes)
        self._entries[name] = _Entry(gguf, key)


def _warn_of_decoding(file: GgufFile, dtype: torch.dtype, path: Path) -> None:
    """Warn of quantized types that become plain numbers."""
    found = Counter(TYPE_NAMES[tensor.kind] for tensor in file.tensors.values() if tensor.kind in DECODED)
    if found:
        listed = " and ".join(f"{count} tensors of {name}" for name, count in sorted(found.items()))
        warnings.warn(
            f"{path}: {listed} are decoded to {dtype_name(dtype)}, because no format here holds them; for int4 or int8 again: "
            "neox-lite quantize the new folder",
            stacklevel=3,
        )


def _warn_of_rounding(weights: GgufWeights, dtype: torch.dtype, path: Path) -> None:
    """Warn of plain tensors whose numbers the folder's dtype rounds, the vocabulary's blocks included."""
    rounded = []
    for name, info in weights.infos.items():
        if not info.dtype.is_floating_point or info.dtype == dtype or dtype == torch.float32:
            continue
        for start in range(0, info.shape[0], step := _step(info.shape)):
            values = weights.read(name, start, min(info.shape[0], start + step))
            if not torch.equal(values.to(dtype).to(values.dtype), values):
                rounded.append(name)
                break
    if rounded:
        warnings.warn(
            f"{path}: {len(rounded)} tensors are rounded to {dtype_name(dtype)} ({first_few(rounded, 2)}); "
            "--dtype float32 keeps their numbers",
            stacklevel=3,
        )


# -- the folder -------------------------------------------------------------------------------------------------------


def _parts(skeleton: Skeleton, dtype: torch.dtype) -> list[Part]:
    """The tensors of every module, as they are written."""
    groups: dict[str, list[Spec]] = {}
    for name, tensor in skeleton.model.state_dict().items():
        if name != HEAD_WEIGHT or not skeleton.tied:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            groups.setdefault(name.rpartition(".")[0], []).append(Spec(name, kind, tuple(tensor.shape)))
    return [Part(specs, lambda specs=specs: _rows(skeleton.checkpoint, specs)) for specs in groups.values()]  # type: ignore[misc]


def _small_head(file: GgufFile, named: Mapping[str, str], config: GPTNeoXConfig, dtype: torch.dtype) -> Part | None:
    """The folder's int8 head, where the file's head is Q8_0."""
    gguf = named.get(HEAD_WEIGHT)
    if gguf is None or file.tensors[gguf].kind != Q8_0:
        return None
    shape = file.tensors[gguf].shape
    weights = GgufWeights(file, config, {HEAD_WEIGHT: gguf}, quantized_head=True)
    specs = specs_of("embed_out.", GROUPS[Q8_0], (shape[0], shape[1]), dtype)
    return Part(specs, lambda: _rows(Checkpoint(file.path, {file.path: weights}), specs))


def _rows(checkpoint: Checkpoint, specs: list[Spec]) -> Iterator[tuple[str, Tensor, int]]:
    """Tensors by row slices, in their stored dtypes. Raises FormatError for numbers that are not finite in them."""
    for spec in specs:
        step = _step(spec.shape)
        for start in range(0, spec.shape[0], step):
            rows = checkpoint.rows(spec.name, start, min(spec.shape[0], start + step)).to(spec.dtype)
            if spec.dtype.is_floating_point and not torch.isfinite(rows).all():
                kind = dtype_name(spec.dtype)
                raise FormatError(f"{checkpoint.folder}: {spec.name}: holds values that are not finite as {kind}")
            yield spec.name, rows, start


def _step(shape: tuple[int, ...]) -> int:
    return max(1, SLICE_ELEMENTS // math.prod(shape[1:]))
