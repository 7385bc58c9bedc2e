"""from_pretrained and save_pretrained: config + checkpoint -> tensors in their place, and back. Takes the class to build."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .config import GPTNeoXConfig
from .errors import ArgumentError, CheckpointError, FormatError, NeoxLiteError, UnsupportedError
from .folder_writer import FolderWriter, Spec, split_into_shards
from .formats import DENSE, Format, GroupInt, Weight, formats_of, make_format, quantization_config
from .hub import resolve
from .layers import Linear

if TYPE_CHECKING:
    from .model import GPTNeoXPreTrainedModel

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HEAD = "neox_lite_head.safetensors"  # the small head, outside of the index so that other readers ignore it
SLICE_ELEMENTS = 1 << 23  # weights read and quantized at a time: 32 MB as float32
# Small files that travel with a model.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Options of transformers that scripts pass, and what stands for them here.
EXPLAINED = {
    "trust_remote_code": "code from checkpoints is never run",
    "cache_dir": "set the environment variable HF_HOME",
    "token": "set the environment variable HF_TOKEN",
    "use_auth_token": "set the environment variable HF_TOKEN",
    "local_files_only": "set the environment variable HF_HUB_OFFLINE=1",
    "force_download": "delete the cached copy to fetch it again",
    "proxies": "set the environment variable HTTPS_PROXY",
    "subfolder": "give the folder itself",
    "variant": "variants are not supported; give a folder with the weights under their usual names",
    "attn_implementation": "the kernels are chosen for the device",
    "offload_folder": "weights are mapped from their own files",
    "state_dict": "call load_state_dict on a model built from a config",
    "from_tf": "convert the weights to safetensors first",
    "from_flax": "convert the weights to safetensors first",
    "ignore_mismatched_sizes": "a weight of another shape is always an error",
    "output_loading_info": "every mismatch is an error that names it",
    "max_position_embeddings": "pass it through config=",
}


@dataclass
class Source:
    """Where a model came from; empty for one built from a config."""

    folder: Path | None = None
    name: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class LoadOptions:
    """What `from_pretrained` takes.

    revision: branch, tag or commit of a hub id. quantization: "int4" or "int8" to quantize a plain checkpoint while loading
    (groups of 128, method "mse"; kept beside the hub cache for the next time). device_map: None or "cpu", "cuda", "cuda:1",
    or "auto": the GPU if the model fits what is free there, else the CPU. max_memory: {"cuda": "8GiB", "cpu": "16GiB"},
    limits for "auto". dtype: of dense tensors, None for the checkpoint's. head: "fp16" for the head as the checkpoint has
    it, "int8" for the small one of a quantized folder. config: used in place of config.json.
    """

    revision: str | None = None
    quantization: str | None = None
    device_map: Any = None
    max_memory: Mapping[Any, int | str] | None = None
    dtype: torch.dtype | None = None
    head: str = "fp16"
    config: GPTNeoXConfig | None = None

    @classmethod
    def parse(cls, given: dict[str, Any]) -> LoadOptions:
        """Map transformers' arguments, explain those that have no meaning here, refuse the rest."""
        given = dict(given)
        known = {f.name for f in fields(cls)}
        for harmless in ("low_cpu_mem_usage", "use_safetensors", "_fast_init", "torch_dtype"):
            if harmless != "torch_dtype":
                given.pop(harmless, None)
        if (old := given.pop("torch_dtype", None)) is not None:
            given.setdefault("dtype", old)
        _take_bits(given)
        for name in list(given):
            if name in EXPLAINED:
                if given.pop(name) not in (None, False):
                    raise UnsupportedError(f"from_pretrained({name}=...): {EXPLAINED[name]}; leave it out")
            elif name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ArgumentError(
                    f"from_pretrained knows no option {name!r}" + (f"; nearest is {near[0]!r}" if near else "")
                )
        given["dtype"] = parse_dtype(given.get("dtype"))
        if given.get("quantization") is not None:
            make_format(given["quantization"])
        if given.setdefault("head", "fp16") not in ("fp16", "int8"):
            raise ArgumentError(f"head is {given['head']!r}, expected 'fp16' or 'int8'")
        if (config := given.get("config")) is not None and not isinstance(config, GPTNeoXConfig):
            if not hasattr(config, "to_dict"):
                raise ArgumentError(f"config is a {type(config).__name__}, expected a GPTNeoXConfig")
            given["config"] = GPTNeoXConfig(**config.to_dict())
        return cls(**given)


def _take_bits(given: dict[str, Any]) -> None:
    """Map load_in_4bit, load_in_8bit and bitsandbytes' config object to `quantization`."""
    asked = given.pop("quantization_config", None)
    bits = {
        name: given.pop(f"load_in_{name}", False) or getattr(asked, f"load_in_{name}", False)
        for name in ("4bit", "8bit")
    }
    if asked is not None and not any(bits.values()):
        raise UnsupportedError(f"quantization_config of type {type(asked).__name__}: use quantization='int4' or 'int8'")
    chosen = "int4" if bits["4bit"] else "int8" if bits["8bit"] else None
    if chosen is None:
        return
    if given.setdefault("quantization", chosen) != chosen:
        raise ArgumentError(f"load_in_{chosen[3:]}bit and quantization={given['quantization']!r} contradict each other")
    warnings.warn(f"load_in_{chosen[3:]}bit means quantization={chosen!r} here (int groups of 128)", stacklevel=4)


def parse_dtype(value: Any) -> torch.dtype | None:
    """A torch dtype, its name, or None and "auto" for the checkpoint's own."""
    if value is None or value == "auto":
        return None
    name = str(value).removeprefix("torch.")
    name = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}.get(
        name, name
    )
    if name not in DTYPES:
        raise ArgumentError(f"dtype is {value!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


# Reading --------------------------------------------------------------------------------------------------------------


def from_pretrained(cls: type[GPTNeoXPreTrainedModel], name: str | os.PathLike[str], options: LoadOptions) -> Any:
    """Build `cls` from a folder or hub id. Raises a NeoxLiteError that names the first thing that does not fit."""
    folder = resolve(os.fspath(name), options.revision)
    config = options.config.copy() if options.config else GPTNeoXConfig.from_pretrained(folder)
    with Checkpoint.open(folder) as checkpoint:
        dtype = options.dtype or DTYPES.get(config.dtype or "") or _stored_dtype(checkpoint)
        target = _target(options.quantization, config, folder)
        if target is not None:
            cached = _cached_folder(cls, name, options, folder, checkpoint, dtype)
            if (cached / "config.json").is_file():
                again = LoadOptions(device_map=options.device_map, max_memory=options.max_memory, dtype=dtype)
                return from_pretrained(cls, cached, again)
        config.dtype = str(dtype).removeprefix("torch.")
        model = _empty(cls, config, target)
        _fill(model, checkpoint, target, dtype, folder)
    if target is not None:
        _keep_quantized(model, cached)
    model.source = Source(folder, os.fspath(name), options.revision)
    if options.head == "int8":
        _use_small_head(model, folder)
    return model.to(_device(model, options))


def _target(quantization: str | None, config: GPTNeoXConfig, folder: Path) -> GroupInt | None:
    """The format to quantize to while loading, or None."""
    if quantization is None:
        return None
    wanted = make_format(quantization)
    assert isinstance(wanted, GroupInt)
    if config.quantization_config is None:
        return wanted
    found = {g["weights"].get("num_bits") for g in config.quantization_config.get("config_groups", {}).values()}
    if found == {wanted.bits}:
        return None  # the folder is what was asked for
    raise FormatError(f"{folder}: is quantized already (int{found.pop() if found else '?'}); leave quantization out")


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    name = next((n for n in checkpoint.names() if n.endswith("embed_in.weight")), None)
    return checkpoint.info(name).dtype if name else torch.float32


def _empty(cls: type[GPTNeoXPreTrainedModel], config: GPTNeoXConfig, target: GroupInt | None) -> GPTNeoXPreTrainedModel:
    """The model without memory: every tensor has its shape and name, on the meta device."""
    stored = formats_of(config.quantization_config)
    if target is None:
        formats: Callable[[str], Format] = stored
    else:
        formats = lambda name: target  # noqa: E731
        config.quantization_config = quantization_config(target)
    with torch.device("meta"):
        model = cls(config, formats=formats)  # type: ignore[call-arg]
    for name, module in model.named_modules():
        if isinstance(module, Linear) and (reason := module.format.why_not(module.shape)) is not None:
            raise FormatError(f"{name}: {reason}")
    return model


def _names(model: GPTNeoXPreTrainedModel, checkpoint: Checkpoint) -> Callable[[str], str]:
    """From this model's tensor names to the checkpoint's, which may have or lack the base model's prefix."""
    prefix = model.base_model_prefix + "."
    stored = checkpoint.names()
    has_prefix = any(n.startswith(prefix) for n in stored)
    wants_prefix = model.base_model is not model

    def rename(name: str) -> str:
        if name.startswith("embed_out.") and "embed_out.weight" not in checkpoint and "lm_head.weight" in checkpoint:
            return name.replace("embed_out.", "lm_head.")
        if wants_prefix and not has_prefix:
            return name.removeprefix(prefix)
        return prefix + name if has_prefix and not wants_prefix else name

    return rename


def _fill(
    model: GPTNeoXPreTrainedModel, checkpoint: Checkpoint, target: GroupInt | None, dtype: torch.dtype, folder: Path
) -> None:
    """Put every tensor in its place: mapped from the file where dtype and format are the file's, else converted."""
    rename = _names(model, checkpoint)
    heads = {n for n, m in model.named_children() if isinstance(m, Linear)}
    expected: dict[str, tuple[Sequence[int], tuple[torch.dtype, ...] | None]] = {}
    floating = tuple(DTYPES.values())
    fresh = []
    tied = model.config.tie_word_embeddings and hasattr(model, "embed_out")
    for name, tensor in model.state_dict().items():
        if tied and name == "embed_out.weight":
            continue
        stored = rename(name)
        module = name.rpartition(".")[0]
        if stored not in checkpoint and module in heads and not name.startswith("embed_out"):
            fresh.append(name)
        elif target is None or not name.endswith(tuple(target.specs((1, target.group_size), dtype))):
            expected[stored] = tuple(tensor.shape), floating if tensor.is_floating_point() else (tensor.dtype,)
    for name, module in model.named_modules():
        if target is not None and isinstance(module, Linear) and module.format != DENSE:
            expected[rename(f"{name}.weight")] = module.shape, floating
    _check(model, checkpoint, expected, tied)
    for name, module in model.named_modules():
        _fill_module(model, name, module, checkpoint, rename, target, dtype)
    if fresh:
        _initialize_heads(model, fresh, dtype, folder)
    if tied:
        model.tie_weights()  # type: ignore[operator]


def _check(model: GPTNeoXPreTrainedModel, checkpoint: Checkpoint, expected: dict[str, Any], tied: bool) -> None:
    """Compare with the checkpoint, allowing a head that this class does not have, and a second copy of a tied one."""
    spare = {"embed_out.weight", "lm_head.weight"} & set(checkpoint.names()) - expected.keys()
    if tied:
        for name in spare:
            embedding = next(n for n in expected if n.endswith("embed_in.weight"))
            if not torch.equal(checkpoint.tensor(name), checkpoint.tensor(embedding)):
                raise CheckpointError(
                    f"{checkpoint.folder}: the config ties the head to the embedding, but {name} differs from {embedding}; "
                    "set tie_word_embeddings to false to use it"
                )
    elif hasattr(model, "embed_out"):
        spare = set()
    checkpoint.check({**expected, **{n: (checkpoint.info(n).shape, None) for n in spare}})


def _fill_module(
    model: GPTNeoXPreTrainedModel,
    name: str,
    module: nn.Module,
    checkpoint: Checkpoint,
    rename: Callable[[str], str],
    target: GroupInt | None,
    dtype: torch.dtype,
) -> None:
    prefix = f"{name}." if name else ""
    for key, parameter in list(module._parameters.items()):
        stored = rename(prefix + key)
        if parameter is not None and stored in checkpoint:
            setattr(module, key, nn.Parameter(checkpoint.tensor(stored).to(dtype), requires_grad=False))
    if not isinstance(module, Linear) or module.format == DENSE:
        return
    if target is not None:
        quantize_module(module, checkpoint, rename(f"{prefix}weight"), dtype)
        return
    for key in module._buffers:
        setattr(module, key, checkpoint.tensor(rename(prefix + key)))


def quantize_module(module: Linear, checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> None:
    """Fill a module's quantized tensors from the checkpoint's dense weight `name`."""
    specs = module.format.specs(module.shape, dtype)
    tensors = {key: torch.empty(shape, dtype=kind) for key, (kind, shape) in specs.items()}
    for start, part in encode_rows(checkpoint, name, module.format, dtype, module.format.methods[0]):
        for key, rows in part.items():
            tensors[key][start : start + len(rows)] = rows
    tensors |= module.format.constants(module.shape)
    for key, tensor in tensors.items():
        setattr(module, key, tensor)


def encode_rows(
    checkpoint: Checkpoint, name: str, format: Format, dtype: torch.dtype, method: str
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """A checkpoint's weight in a format, a bounded number of rows at a time: (first row, suffix -> rows)."""
    out, columns = checkpoint.info(name).shape
    step = max(1, SLICE_ELEMENTS // columns)
    for start in range(0, out, step):
        rows = checkpoint.rows(name, start, min(out, start + step))
        try:
            yield start, format.encode(rows, dtype, method)
        except FormatError as error:
            raise FormatError(f"{name}, rows {start} to {start + len(rows) - 1}: {error}") from error


def _initialize_heads(model: GPTNeoXPreTrainedModel, fresh: list[str], dtype: torch.dtype, folder: Path) -> None:
    warnings.warn(f"{folder}: has no {', '.join(fresh)}; initialized at random, so train it before use", stacklevel=5)
    for name in fresh:
        module = model.get_submodule(name.rpartition(".")[0])
        key = name.rpartition(".")[2]
        values = torch.zeros(module._parameters[key].shape, dtype=dtype)  # type: ignore[union-attr]
        if key == "weight":
            values.normal_(0.0, model.config.initializer_range)
        setattr(module, key, nn.Parameter(values, requires_grad=False))


def _use_small_head(model: GPTNeoXPreTrainedModel, folder: Path) -> None:
    """Swap the head for the int8 one that a quantized folder carries."""
    if not hasattr(model, "embed_out"):
        raise ArgumentError(f"head='int8': {type(model).__name__} has no vocabulary head")
    with Checkpoint.open_file(folder, HEAD) as checkpoint:
        scale = checkpoint.info("embed_out.weight_scale").shape
        module: Linear = model.embed_out  # type: ignore[assignment]
        head = Linear(module.in_features, module.out_features, False)
        head.become(GroupInt(8, module.in_features // scale[1]))
        specs = head.format.specs(head.shape, checkpoint.info("embed_out.weight_scale").dtype)
        checkpoint.check({f"embed_out.{k}": (shape, (kind,)) for k, (kind, shape) in specs.items()})
        for key in specs:
            setattr(head, key, checkpoint.tensor(f"embed_out.{key}"))
        model.embed_out = head


# Placement ------------------------------------------------------------------------------------------------------------


def _device(model: GPTNeoXPreTrainedModel, options: LoadOptions) -> torch.device:
    """The one device that a device_map asks for, checked against what is there."""
    asked, limits = options.device_map, dict(options.max_memory or {})
    if isinstance(asked, Mapping):
        if len(set(map(str, asked.values()))) != 1:
            raise UnsupportedError(
                "device_map with several devices needs offload, which this version lacks; use one device"
            )
        asked = next(iter(asked.values()))
    if asked == "auto":
        return _roomiest(model.get_memory_footprint(), limits)
    if limits:
        raise ArgumentError("max_memory limits device_map='auto'; pass both or neither")
    if isinstance(asked, int):
        asked = f"cuda:{asked}"
    try:
        device = torch.device(asked or "cpu")
    except RuntimeError:
        raise ArgumentError(f"device_map is {asked!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device_map is {asked!r}, but torch sees no CUDA device here; use 'cpu' or 'auto'")
    return device


def _roomiest(model_bytes: int, limits: dict[Any, int | str]) -> torch.device:
    """The GPU if the weights and half a GiB for cache and scratch fit, else the CPU; announced."""
    wanted = model_bytes + (1 << 29)
    if torch.cuda.is_available():
        limit = next((parse_bytes(v) for k, v in limits.items() if str(k) in ("0", "cuda", "cuda:0")), None)
        free = min(torch.cuda.mem_get_info()[0], limit if limit is not None else 1 << 62)
        if wanted <= free:
            return torch.device("cuda")
        announce(
            f"the model needs {wanted / 2**30:.1f} GiB with its cache, {free / 2**30:.1f} GiB of GPU are free: using the CPU"
        )
    budget = limits.get("cpu")
    if budget is not None and wanted > parse_bytes(budget):
        raise ArgumentError(f"max_memory allows {budget} on the CPU, but the model needs {wanted / 2**30:.1f} GiB")
    return torch.device("cpu")


def parse_bytes(value: int | str) -> int:
    """A number of bytes, or text such as "8GiB" or "500MB"."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?)B?\s*", value, re.IGNORECASE)
    if match is None:
        raise ArgumentError(f"{value!r} is not a size; write for instance '8GiB' or '500MB'")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def announce(text: str) -> None:
    """Tell the user a decision, once, on stderr."""
    print(f"neox-lite: {text}", file=sys.stderr)


# Writing --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The tensors of one module on their way into a folder: what they will be, and the values by row slices."""

    specs: list[Spec]
    rows: Callable[[], Iterable[tuple[str, Tensor, int]]]  # (full name, rows, first row)


def write_model(
    folder: Path,
    config: GPTNeoXConfig,
    parts: Sequence[Part],
    companions: Mapping[str, bytes],
    head: Part | None = None,
    max_shard_bytes: int = 5_000_000_000,
    source: Path | None = None,
    progress: Callable[[int], object] | None = None,
    **manifest: Any,
) -> None:
    """Write a model folder, atomically and in bounded memory. progress is told the bytes of each slice written."""
    order = {"weight_packed": 0, "weight_scale": 1, "weight_shape": 3}  # vector data first, so that it starts aligned
    by_name = {spec.name: part for part in parts for spec in part.specs}
    with FolderWriter(folder, source=source) as out:
        shards = split_into_shards([part.specs for part in parts], max_shard_bytes)
        out.shards([sorted(shard, key=lambda s: order.get(s.name.rpartition(".")[2], 2)) for shard in shards])
        for i, shard in enumerate(shards):
            with out.shard(i) as file:
                for part in {id(by_name[spec.name]): by_name[spec.name] for spec in shard}.values():
                    _write_part(file, part, progress)
        if head is not None:
            with out.extra(HEAD, head.specs) as file:
                _write_part(file, head, progress)
        for name, content in companions.items():
            out.file(name, content)
        out.finish(config.to_json_string(), **manifest)


def _write_part(file: Any, part: Part, progress: Callable[[int], object] | None) -> None:
    for name, rows, start in part.rows():
        file.write(name, rows, start)
        if progress is not None:
            progress(rows.nbytes)


def save_pretrained(model: GPTNeoXPreTrainedModel, folder: Path, max_shard_size: int | str) -> None:
    """Write a model as it is; quantized weights stay quantized."""
    head = getattr(model, "embed_out", None)
    if isinstance(head, Linear) and head.format != DENSE:
        raise ArgumentError("save_pretrained: the model runs with the int8 head; load it with head='fp16' to save it")
    config = model.config.copy(dtype=str(model.dtype).removeprefix("torch."), architectures=[type(model).__name__])
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if not (name == "embed_out.weight" and config.tie_word_embeddings):
            groups.setdefault(name.rpartition(".")[0], {})[name] = tensor
    parts = [
        Part([Spec(n, t.dtype, tuple(t.shape)) for n, t in group.items()], lambda group=group: whole(group))  # type: ignore[misc]
        for group in groups.values()
    ]
    generation = getattr(model, "generation_config", None)
    companions = {"generation_config.json": generation.to_json_string().encode()} if generation is not None else {}
    write_model(
        folder, config, parts, companions, max_shard_bytes=parse_bytes(max_shard_size), method="save_pretrained"
    )


def whole(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, int]]:
    for name, tensor in tensors.items():
        yield name, tensor, 0


def read_companions(folder: Path) -> dict[str, bytes]:
    """The small files of a model folder that a copy of it needs."""
    return {name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).is_file()}


# Quantized while loading: kept for the next time ------------------------------------------------------------------------


def cache_root() -> Path:
    """Where models quantized while loading are kept: beside the hub cache."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(home).expanduser() / "neox-lite"


def _cached_folder(
    cls: type,
    name: str | os.PathLike[str],
    options: LoadOptions,
    folder: Path,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
) -> Path:
    """A folder named after everything that decides the result: source files, format, dtype and class."""
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.files]
    config = (folder / "config.json").stat().st_mtime_ns if options.config is None else options.config.to_json_string()
    identity = repr((str(folder.resolve()), stats, config, options.quantization, str(dtype), cls.__name__))
    label = re.sub(r"[^A-Za-z0-9._-]+", "--", Path(os.fspath(name)).name)
    return cache_root() / f"{label}-{options.quantization}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _keep_quantized(model: GPTNeoXPreTrainedModel, cached: Path) -> None:
    """Save what was just quantized; a full or read-only disk costs the next start time, not this one."""
    try:
        model.save_pretrained(cached)
        announce(f"kept the quantized model in {cached} for the next start")
    except (NeoxLiteError, OSError) as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(cached)
        announce(f"the quantized model could not be kept for the next start: {error}")


__all__ = ["LoadOptions", "Part", "Source", "Weight", "field", "from_pretrained", "save_pretrained", "write_model"]
