"""Quantized folder or plain checkpoint -> one GGUF file that llama.cpp runs. Rounds nothing twice; reads no GGUF.

int4 becomes Q4_0 and int8 becomes Q8_0: both hold the same codes and float16 scales, one scale for
32 weights, so a scale of a larger group is repeated and every weight keeps its exact value.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox_lite.checkpoint.reader import Checkpoint
from neox_lite.config import GPTNeoXConfig
from neox_lite.errors import ArgumentError, CheckpointError, FormatError
from neox_lite.formats import DENSE, GROUP_SIZES, Format, GroupInt
from neox_lite.generation.options import GenerationConfig
from neox_lite.hub import HEAD, resolve
from neox_lite.layers import Linear
from neox_lite.loading.quantize import SLICE_ELEMENTS
from neox_lite.loading.skeleton import Skeleton
from neox_lite.modeling.causal_lm import GPTNeoXForCausalLM
from neox_lite.modeling.heads import class_of

from .convert import Meter, Progress, Report
from .gguf_file import F16, F32, Q4_0, Q8_0, GgufTensor, Value, write_gguf
from .gguf_tensors import Spans, blocks, by_part, gguf_name, kind_of
from .gguf_tokenizer import tokenizer_metadata

FILE_TYPES = {F16: 1, Q4_0: 2, Q8_0: 7}  # general.file_type: what most weights are


# -- a model's tensors ------------------------------------------------------------------------------------------------


def _tensors(skeleton: Skeleton, head: Checkpoint | None) -> Iterator[GgufTensor]:
    """Every tensor of the model in its order, under llama.cpp's names."""
    config, checkpoint = skeleton.model.config, skeleton.checkpoint
    for name, module in skeleton.model.named_modules():
        if (gguf := gguf_name(name)) is None:
            continue
        spans = by_part(config) if name.endswith("query_key_value") else None
        if name == "embed_out" and head is not None:
            small = _head_format(module, head)
            yield _matrix(f"{gguf}.weight", small, head, {k: f"embed_out.{k}" for k in _row_keys(small)})
        elif isinstance(module, Linear | torch.nn.Embedding):
            format: Format = module.format if isinstance(module, Linear) else DENSE
            source = "gpt_neox.embed_in" if name == "embed_out" and skeleton.tied else name
            stored = {k: skeleton.stored(f"{source}.{k}") for k in _row_keys(format)}
            yield _matrix(f"{gguf}.weight", format, checkpoint, stored, spans)
        else:
            yield _vector(f"{gguf}.weight", checkpoint, skeleton.stored(f"{name}.weight"))
        if isinstance(module, Linear) and module.bias is None and name != "embed_out":
            yield _zeros(f"{gguf}.bias", module.out_features)  # llama.cpp requires a bias; this one changes nothing
        elif getattr(module, "bias", None) is not None:
            yield _vector(f"{gguf}.bias", checkpoint, skeleton.stored(f"{name}.bias"), spans)


def _row_keys(format: Format) -> tuple[str, ...]:
    return ("weight_packed", "weight_scale") if isinstance(format, GroupInt) else ("weight",)


def _matrix(
    name: str, format: Format, checkpoint: Checkpoint, stored: Mapping[str, str], spans: Spans | None = None
) -> GgufTensor:
    """A weight in some format; stored: the checkpoint's name of each of its tensors that have rows."""
    infos = {key: checkpoint.info(source) for key, source in stored.items()}
    out, columns = next(iter(infos.values())).shape
    if isinstance(format, GroupInt):
        columns = columns * 32 // format.bits
    step = max(1, SLICE_ELEMENTS // columns)
    slices = spans or [(start, min(out, start + step)) for start in range(0, out, step)]

    def rows() -> Iterator[Tensor]:
        for start, stop in slices:
            try:
                yield blocks(format, {k: checkpoint.rows(s, start, stop) for k, s in stored.items()})
            except FormatError as error:
                source = next(iter(stored.values()))
                raise FormatError(f"{source}, rows {start} to {stop - 1}: {error}") from error

    return GgufTensor(name, kind_of(format), (out, columns), rows)


def _vector(name: str, checkpoint: Checkpoint, stored: str, spans: Spans | None = None) -> GgufTensor:
    """A bias or a norm's gain, in float32 as llama.cpp requires."""
    shape = checkpoint.info(stored).shape

    def rows() -> Iterator[Tensor]:
        values = checkpoint.tensor(stored).float()
        for start, stop in spans or [(0, shape[0])]:
            yield values[start:stop].contiguous().view(torch.uint8)

    return GgufTensor(name, F32, shape, rows)


def _zeros(name: str, count: int) -> GgufTensor:
    return GgufTensor(name, F32, (count,), lambda: [torch.zeros(count).view(torch.uint8)])


def _head_format(module: Any, head: Checkpoint) -> GroupInt:
    """The format of a quantized folder's small head. Raises CheckpointError unless it is whole and fits the model."""
    scale = head.info("embed_out.weight_scale")
    size = module.in_features // scale.shape[-1] if scale.shape and scale.shape[-1] else 0
    if size not in GROUP_SIZES:
        raise CheckpointError(
            f"{scale.file}: embed_out.weight_scale is {list(scale.shape)}, expected groups of "
            f"{', '.join(map(str, GROUP_SIZES))}"
        )
    format = GroupInt(8, size)
    specs = format.specs(module.shape, scale.dtype)
    head.check({f"embed_out.{k}": (shape, (kind,)) for k, (kind, shape) in specs.items()}, str(scale.file))
    return format


# -- metadata ---------------------------------------------------------------------------------------------------------


def _model_metadata(config: GPTNeoXConfig, name: str, kind: int) -> dict[str, Value]:
    """The architecture in llama.cpp's keys. Raises FormatError for what llama.cpp cannot run."""
    model: dict[str, Value] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "use_parallel_residual": config.use_parallel_residual,
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rotary_emb_base),
        "neox_lite.hidden_act": config.hidden_act,  # which llama.cpp ignores, as it has one GELU only
        **_rope_scaling(config),
    }
    general: dict[str, Value] = {
        "architecture": "gptneox",
        "name": name,
        "file_type": FILE_TYPES[kind],
        "quantization_version": 2,
    }
    return {f"general.{k}": v for k, v in general.items()} | {f"gptneox.{k}": v for k, v in model.items()}


def _rope_scaling(config: GPTNeoXConfig) -> dict[str, Value]:
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind in ("default", "dynamic"):
        return {}
    plain = {"rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"}
    fixed = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # llama.cpp's only values
    unsupported = [k for k, v in rope.items() if k not in plain and fixed.get(k) != v]
    if kind == "llama3" or unsupported:
        what = f" with {', '.join(unsupported)}" if kind == "yarn" else ""
        raise FormatError(f"rope_type {kind!r}{what}: llama.cpp's gptneox cannot compute it; run the model here")
    scaling: dict[str, Value] = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        scaling["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return scaling


def _end_of_turn(folder: Path, config: GPTNeoXConfig, metadata: Mapping[str, Value]) -> dict[str, Value]:
    """The first id that ends an answer beside the end of text, of which llama.cpp has one; a warning names others."""
    found = GenerationConfig.from_pretrained(folder).eos_token_id
    # A single id in config.json may be the class's default, which no tokenizer has chosen.
    if found is None and isinstance(config.eos_token_id, list):
        found = config.eos_token_id
    ids = [found] if isinstance(found, int) else list(found or ())
    further = [i for i in ids if i not in (-1, metadata.get("tokenizer.ggml.eos_token_id", ids[0]))]
    if len(further) > 1:
        warnings.warn(
            f"{folder}: llama.cpp will not stop at the ids {further[1:]}, which end an answer here", stacklevel=3
        )
    return {"tokenizer.ggml.eot_token_id": further[0]} if further else {}


# -- the file --------------------------------------------------------------------------------------------------------


def export_gguf(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    head: str = "f16",
    revision: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a model as one GGUF file: int4 as Q4_0 and int8 as Q8_0, both exactly; weights that are not quantized as float16.

    head: "f16", or "q8_0" for the int8 head of a quantized folder. Warns of what llama.cpp computes differently; raises
    FormatError for what it cannot compute.
    """
    began = time.perf_counter()
    if head not in ("f16", "q8_0"):
        raise ArgumentError(f"head is {head!r}, expected 'f16' or 'q8_0'")
    folder, destination = resolve(os.fspath(source), revision), Path(destination)
    config = GPTNeoXConfig.from_pretrained(folder)
    if head == "q8_0" and not (folder / HEAD).is_file():
        raise ArgumentError(f"{folder}: has no {HEAD}; head='q8_0' is for folders that `neox-lite quantize` wrote")
    if class_of(config) is not GPTNeoXForCausalLM:
        raise ArgumentError(
            f"{folder}: is a {class_of(config).__name__}; llama.cpp's gptneox is the language model only"
        )
    if config.activation != "tanh":
        warnings.warn(
            f"{folder}: hidden_act {config.hidden_act!r} is the exact GELU; llama.cpp computes the tanh approximation, "
            "so its logits differ slightly",
            stacklevel=2,
        )
    with Checkpoint.open(folder) as checkpoint:
        skeleton = Skeleton(GPTNeoXForCausalLM, config, checkpoint)
        small = Checkpoint.open_file(folder, HEAD) if head == "q8_0" else None
        tensors = list(_tensors(skeleton, small))
        kinds = [t.kind for t in tensors if t.name.startswith("blk.") and t.kind != F32]
        name = Path(os.fspath(source)).resolve().name if Path(source).is_dir() else os.fspath(source)
        metadata = _model_metadata(config, name, max(set(kinds), key=kinds.count))
        metadata |= tokenizer_metadata(folder, config.vocab_size)
        metadata |= _end_of_turn(folder, config, metadata)
        meter = Meter(progress, sum(tensor.nbytes for tensor in tensors))
        size = write_gguf(destination, metadata, tensors, meter)
        return Report(destination, checkpoint.total_bytes, size, time.perf_counter() - began, meter.peak_bytes)
