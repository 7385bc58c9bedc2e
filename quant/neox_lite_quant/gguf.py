"""Quantized folder or plain checkpoint -> one GGUF file that llama.cpp runs. Rounds nothing twice; reads no GGUF.

A file is a header, metadata, one line about each tensor, then the tensors' data, all little-endian, each tensor at a
multiple of 32 bytes. int4 becomes Q4_0 and int8 becomes Q8_0: both hold the same codes and float16 scales, one scale for
32 weights, so a scale of a larger group is repeated and every weight keeps its exact value.
"""

from __future__ import annotations

import json
import math
import os
import struct
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox_lite.checkpoint import Checkpoint
from neox_lite.config import GPTNeoXConfig
from neox_lite.errors import ArgumentError, CheckpointError, FormatError, ShapeError, TokenizerError
from neox_lite.folder_writer import PARTIAL, disk_errors, free_bytes, sync_folder
from neox_lite.formats import DENSE, GROUP_SIZES, Format, GroupInt
from neox_lite.hub import HEAD, resolve
from neox_lite.layers import Linear
from neox_lite.loading import SLICE_ELEMENTS, Blueprint
from neox_lite.model import GPTNeoXForCausalLM, class_of
from neox_lite.tokenizer import GPTNeoXTokenizerFast

from .convert import Progress, Report, _Meter

VERSION, ALIGNMENT, BLOCK = 3, 32, 32
F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8  # ggml's numbers
BYTES_OF = {F32: (1, 4), F16: (1, 2), Q4_0: (BLOCK, 18), Q8_0: (BLOCK, 34)}  # weights in a block, bytes of a block
FILE_TYPES = {F16: 1, Q4_0: 2, Q8_0: 7}  # general.file_type: what most weights are
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens

NAMES = {"gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}

Value = str | int | float | Sequence[str] | Sequence[int]
Spans = list[tuple[int, int]]  # rows of a stored tensor, in the order in which they are written


# -- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgufTensor:
    """One tensor on its way into the file: shape as torch says it, and its bytes, uint8, in order."""

    name: str
    kind: int
    shape: tuple[int, ...]
    rows: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        weights, size = BYTES_OF[self.kind]
        if self.shape[-1] % weights:
            raise ShapeError(f"{self.name}: rows of {self.shape[-1]} weights, expected a multiple of {weights}")
        return math.prod(self.shape) // weights * size


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[GgufTensor],
    progress: Callable[[int], object] = lambda count: None,
) -> int:
    """Write one file, which gets its name when it is whole and on the disk; returns its size in bytes.

    Raises CheckpointError if something has that name or the disk is too full, ShapeError for data of another size.
    """
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path}: exists already; delete it or choose another name")
    prefix = _header(metadata, tensors)
    size = len(prefix) + sum(_padded(tensor.nbytes) for tensor in tensors)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # another process may write the same name
    with disk_errors(path, size):
        if (free := free_bytes(path)) < size:
            raise CheckpointError(f"{path}: needs {size} bytes, {free} are free; choose another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(prefix)
                for tensor in tensors:
                    written = 0
                    for rows in tensor.rows():
                        file.write(rows.contiguous().numpy().data)
                        written += rows.nbytes
                        progress(rows.nbytes)
                    if written != tensor.nbytes:
                        raise ShapeError(f"{path}: {tensor.name}: {written} bytes, expected {tensor.nbytes}")
                    file.write(bytes(_padded(written) - written))
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                raise CheckpointError(f"{path}: was written by another process meanwhile; choose another name")
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return size


def _header(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> bytes:
    """All that stands before the data, padded so that the data starts aligned. ggml counts dimensions from the row's."""
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, raw = _value(key, value)
        parts += [_string(key), struct.pack("<I", kind), raw]
    offset = 0
    for tensor in tensors:
        dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        parts += [_string(tensor.name), dimensions, struct.pack("<IQ", tensor.kind, offset)]
        offset += _padded(tensor.nbytes)
    raw = b"".join(parts)
    return raw + bytes(_padded(len(raw)) - len(raw))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _value(key: str, value: Value) -> tuple[int, bytes]:
    """A metadata value as (its type, its bytes). Raises FormatError for what these types cannot hold."""
    try:
        if isinstance(value, bool):  # before int, which it is too
            return BOOL, struct.pack("<?", value)
        if isinstance(value, int):
            return UINT32, struct.pack("<I", value)
        if isinstance(value, float):
            return FLOAT32, struct.pack("<f", value)
        if isinstance(value, str):
            return STRING, _string(value)
        kind = STRING if value and isinstance(value[0], str) else INT32
        raw = b"".join(_string(v) if isinstance(v, str) else struct.pack("<i", v) for v in value)
        return ARRAY, struct.pack("<IQ", kind, len(value)) + raw
    except (struct.error, OverflowError, UnicodeEncodeError) as error:
        raise FormatError(f"{key}: {str(value)[:60]!r} cannot be written to a GGUF file: {error}") from error


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


# -- blocks -----------------------------------------------------------------------------------------------------------


def kind_of(format: Format) -> int:
    """The ggml type that holds a format's weights exactly (for plain ones: to float16); raises FormatError without one."""
    if isinstance(format, GroupInt):
        return Q4_0 if format.bits == 4 else Q8_0
    if format != DENSE:
        raise FormatError(
            f"GGUF has no type that holds {format.name}; export the checkpoint itself, or an int4 folder of it"
        )
    return F16


def blocks(format: Format, rows: Mapping[str, Tensor]) -> Tensor:
    """Stored rows, n of them -> (n, bytes) uint8 as ggml lays them out.

    Raises FormatError for values that float16 cannot hold: scales must be exact, plain weights may be rounded.
    """
    if not isinstance(format, GroupInt):
        return _half(rows["weight"]).view(torch.uint8)
    packed, scale = rows["weight_packed"], rows["weight_scale"]
    half = scale.to(torch.float16)
    if not torch.equal(half.to(scale.dtype), scale):
        worst = scale[half.to(scale.dtype) != scale][0].item()
        raise FormatError(f"a scale of {worst:.9g} is not a float16 number; quantize from a float16 checkpoint")
    half = half.repeat_interleave(format.group_size // BLOCK, dim=1).unsqueeze(-1).view(torch.uint8)  # (n, blocks, 2)
    stored = packed.contiguous().view(torch.uint8)  # int4: elements 2i and 2i + 1 in byte i; int8: one each, + 128
    if format.bits == 8:
        codes = (stored ^ 128).view(len(stored), -1, BLOCK)
    else:  # Q4_0's byte i holds elements i and i + 16 of its block, in the same + 8 form
        codes = torch.stack((stored & 15, stored >> 4), dim=-1).view(len(stored), -1, 2, BLOCK // 2)
        codes = codes[:, :, 0] | (codes[:, :, 1] << 4)
    return torch.cat((half, codes), dim=-1).flatten(1)


def _half(values: Tensor) -> Tensor:
    half = values.to(torch.float16)
    if not torch.isfinite(half).all():
        raise FormatError("holds values that are not finite as float16")
    return half


# -- a model's tensors ------------------------------------------------------------------------------------------------


def _tensors(blueprint: Blueprint, head: Checkpoint | None) -> Iterator[GgufTensor]:
    """Every tensor of the model in its order, under llama.cpp's names."""
    config, checkpoint = blueprint.model.config, blueprint.checkpoint
    for name, module in blueprint.model.named_modules():
        if (ours := _name(name)) is None:
            continue
        spans = _by_part(config) if name.endswith("query_key_value") else None
        if name == "embed_out" and head is not None:
            small = _head_format(module, head)
            yield _matrix(f"{ours}.weight", small, head, {k: f"embed_out.{k}" for k in _row_keys(small)})
        elif isinstance(module, Linear | torch.nn.Embedding):
            format: Format = module.format if isinstance(module, Linear) else DENSE
            source = "gpt_neox.embed_in" if name == "embed_out" and blueprint.tied else name
            stored = {k: blueprint.stored(f"{source}.{k}") for k in _row_keys(format)}
            yield _matrix(f"{ours}.weight", format, checkpoint, stored, spans)
        else:
            yield _vector(f"{ours}.weight", checkpoint, blueprint.stored(f"{name}.weight"))
        if isinstance(module, Linear) and module.bias is None and name != "embed_out":
            yield _zeros(f"{ours}.bias", module.out_features)  # llama.cpp wants a bias; this one changes nothing
        elif getattr(module, "bias", None) is not None:
            yield _vector(f"{ours}.bias", checkpoint, blueprint.stored(f"{name}.bias"), spans)


def _name(name: str) -> str | None:
    """llama.cpp's name of a module, or None for one without tensors of its own."""
    if name in NAMES:
        return NAMES[name]
    head, _, rest = name.removeprefix("gpt_neox.layers.").partition(".")
    return f"blk.{head}.{LAYER_NAMES[rest]}" if rest in LAYER_NAMES else None


def _by_part(config: GPTNeoXConfig) -> Spans:
    """Rows of query_key_value, stored as (heads, q k v, head_dim), in the order (q k v, heads, head_dim)."""
    size = config.head_dim
    starts = [(3 * head + part) * size for part in range(3) for head in range(config.num_attention_heads)]
    return [(start, start + size) for start in starts]


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
    """A bias or a norm's gain, float32 as llama.cpp wants it."""
    shape = checkpoint.info(stored).shape

    def rows() -> Iterator[Tensor]:
        values = checkpoint.tensor(stored).float()
        for start, stop in spans or [(0, shape[0])]:
            yield values[start:stop].contiguous().view(torch.uint8)

    return GgufTensor(name, F32, shape, rows)


def _zeros(name: str, count: int) -> GgufTensor:
    return GgufTensor(name, F32, (count,), lambda: [torch.zeros(count).view(torch.uint8)])


def _head_format(module: Any, head: Checkpoint) -> GroupInt:
    """The format of the small head that a quantized folder carries, which must be whole and fit the model."""
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
    """What llama.cpp needs to know of the architecture. Raises FormatError for what it cannot run."""
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
    if kind == "default":
        return {}
    plain = {"rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"}
    same = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # what llama.cpp always computes with
    beyond = [k for k, v in rope.items() if k not in plain and same.get(k) != v]
    if kind == "llama3" or beyond:
        what = f" with {', '.join(beyond)}" if kind == "yarn" else ""
        raise FormatError(f"rope_type {kind!r}{what}: llama.cpp's gptneox cannot compute it; run the model here")
    scaling: dict[str, Value] = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        scaling["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return scaling


def _tokenizer_metadata(folder: Path, vocab_size: int) -> dict[str, Value]:
    """The vocabulary and merges of tokenizer.json, or a vocabulary without texts where the folder has none."""
    if not (folder / "tokenizer.json").is_file():
        warnings.warn(f"{folder}: has no tokenizer.json; llama.cpp will know ids but no text", stacklevel=3)
        return {"tokenizer.ggml.model": "no_vocab"}
    tokenizer = GPTNeoXTokenizerFast.from_pretrained(folder)
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model, split = backend["model"], backend.get("pre_tokenizer") or {}
    if model["type"] != "BPE" or split.get("type") != "ByteLevel" or split.get("add_prefix_space"):
        raise FormatError(
            f"{folder / 'tokenizer.json'}: a {model['type']} model after {split.get('type')} splitting; llama.cpp's "
            "gptneox needs byte-level BPE without a prefix space; without tokenizer.json the weights alone are written"
        )
    if backend.get("normalizer"):
        warnings.warn(
            f"{folder}: llama.cpp does not apply the tokenizer's {backend['normalizer']['type']} normalizer; text that "
            "it would change gets other ids there",
            stacklevel=3,
        )
    names, kinds = _tokens(tokenizer, vocab_size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id}
    ids |= {"padding": tokenizer.pad_token_id}
    around: list[int] = tokenizer.encode("")
    found: dict[str, Value] = {
        "model": "gpt2",
        "pre": "olmo",  # llama.cpp's name for GPT-NeoX-20B's tokenizer: GPT-2's way of splitting text
        "tokens": names,
        "token_type": kinds,
        "merges": merges,
        **{f"{name}_token_id": index for name, index in ids.items() if index is not None},
        "add_bos_token": tokenizer.bos_token_id in around[:1],
        "add_eos_token": tokenizer.eos_token_id in around[-1:] and len(around) == 2,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in found.items()} | (
        {"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    )


def _tokens(tokenizer: GPTNeoXTokenizerFast, vocab_size: int) -> tuple[list[str], list[int]]:
    """The text and kind of every id of the model; ids that the tokenizer leaves out become unused ones."""
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for text, index in tokenizer.get_vocab().items():
        if index >= vocab_size:
            raise TokenizerError(f"tokenizer.json: {text!r} has id {index}, but the model has {vocab_size} ids")
        texts[index], kinds[index] = text, NORMAL
    for index, token in tokenizer.added_tokens_decoder.items():
        kinds[index] = CONTROL if token.special else USER_DEFINED
    return texts, kinds


# -- the whole --------------------------------------------------------------------------------------------------------


def export_gguf(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    head: str = "f16",
    revision: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a model as one GGUF file: int4 as Q4_0 and int8 as Q8_0, both exactly; what is not quantized as float16.

    head: "f16", or "q8_0" for the int8 head that a quantized folder carries. What llama.cpp computes differently is a
    warning; what it cannot compute raises FormatError.
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
        blueprint = Blueprint(GPTNeoXForCausalLM, config, checkpoint)
        small = Checkpoint.open_file(folder, HEAD) if head == "q8_0" else None
        tensors = list(_tensors(blueprint, small))
        kinds = [t.kind for t in tensors if t.name.startswith("blk.") and t.kind != F32]
        name = Path(os.fspath(source)).resolve().name if Path(source).is_dir() else os.fspath(source)
        metadata = _model_metadata(config, name, max(set(kinds), key=kinds.count))
        metadata |= _tokenizer_metadata(folder, config.vocab_size)
        meter = _Meter(progress, sum(tensor.nbytes for tensor in tensors))
        size = write_gguf(destination, metadata, tensors, meter)
        return Report(destination, checkpoint.total_bytes, size, time.perf_counter() - began, meter.peak_bytes)
