"""from_pretrained: config + checkpoint -> tensors in their place on their device. Takes the class to build."""

from __future__ import annotations

import ctypes
import difflib
import hashlib
import mmap
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Settings
from .checkpoint import Checkpoint
from .config import FIELDS, GPTNeoXConfig
from .errors import ArgumentError, CheckpointError, FormatError, NeoxLiteError, UnsupportedError
from .folder_writer import CONFIG
from .formats import DENSE, Format, GroupInt, formats_of, make_format, quantization_config
from .hub import ADAPTER_CONFIG, HEAD, USUAL, WEIGHTS, Access, holds_adapter, resolve, resolve_adapter
from .kernels import cpu
from .layers import Linear, LowRank
from .offload.accelerator import Accelerator
from .offload.place import Decision, Wish, check, decide, let_go, remember, settle, sizes_in
from .offload.plan import Sizes, linears_of
from .offload.ring import Origin, Origins
from .offload.run import Placement
from .saving import parse_bytes

if TYPE_CHECKING:
    from .model import GPTNeoXPreTrainedModel

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SLICE_ELEMENTS = 1 << 22  # weights read and quantized at a time: 16 MB as float32
WARM_BYTES = 16 << 20  # read between two reports of progress
READ_AHEAD_BYTES = 128 << 10  # Linux cuts a longer request to the disk's read-ahead, which is at least this
# Options of transformers that scripts pass, and what stands for them here.
EXPLAINED = {
    "trust_remote_code": "code from checkpoints is never run",
    "force_download": "delete the cached copy to fetch it again",
    "proxies": "set the environment variable HTTPS_PROXY",
    "subfolder": "give the folder itself",
    "variant": "variants are not supported; give a folder with the weights under their usual names",
    "state_dict": "call load_state_dict on a model built from a config",
    "from_tf": "convert the weights to safetensors first",
    "from_flax": "convert the weights to safetensors first",
    "ignore_mismatched_sizes": "a weight of another shape is always an error",
    "output_loading_info": "every mismatch is an error that names it",
}
# Those that could not change a result, which are told.
WITHOUT_EFFECT = {
    "attn_implementation": "the kernels are chosen for the device",
    "offload_folder": "weights are mapped from their own files",
    "offload_state_dict": "weights are mapped from their own files",
}
# Settings of the model, which replace those of config.json.
SETTINGS = {
    *FIELDS,
    "id2label",
    "label2id",
    "num_labels",
    "rope_parameters",
    "rope_scaling",
    "rotary_emb_base",
    "rotary_pct",
}
HEADS = ("embed_out", "lm_head", "score", "classifier", "qa_outputs")  # a class leaves the heads of others alone


@dataclass
class Source:
    """Where a model came from; empty for one built from a config.

    origins: by full name, the place in a file of each tensor that is mapped from there, its address and its version.
    """

    folder: Path | None = None
    name: str | None = None
    revision: str | None = None
    origins: dict[str, tuple[Origin, int, int]] = field(default_factory=dict, compare=False, repr=False)

    def origins_in(self, module: nn.Module, prefix: str) -> Origins:
        """Places in files of a module's tensors, as far as they are still what the files hold."""
        found = {name: (tensor, self.origins.get(prefix + name)) for name, tensor in module.state_dict().items()}
        return {n: at[0] for n, (tensor, at) in found.items() if at is not None and at[1:] == identity_of(tensor)}


def identity_of(tensor: Tensor) -> tuple[int, int]:
    """Another address or version, and the tensor was replaced or written to."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class LoadOptions:
    """What `from_pretrained` takes.

    revision: branch, tag or commit of a hub id.
    quantization: "int4" or "int8" to quantize a plain checkpoint while loading (groups of 128, method "mse"), "nf4" or
        "nf4-double"; kept beside the hub cache for the next time.
    device_map: None or "cpu", "cuda", "cuda:1"; "auto": as much on the GPU as fits, then the CPU, then the disk; or a map
        from module names to devices and, for layers, "disk".
    max_memory: {"cuda": "8GiB", "cpu": "16GiB"}, the most that the process may take there, all included; None: what is free.
    context: tokens that a sequence is planned for; None: the model's own.
    dtype: of dense tensors; None: the checkpoint's.
    head: "fp16" for the head as the checkpoint has it, "int8" for the small one of a quantized folder; None: "fp16", but for
        a plan that fits only with "int8".
    kv: what the KV cache holds, "fp16" for the model's own dtype, "int8" for about half of that; None: as with head.
    exact: multiply quantized weights with float32 activations, where the CPU's kernels would otherwise round those to 8 bits
        with a scale per 32.
    graph: run decode steps as CUDA graphs where that can be; `model.graph_reason` says why not.
    config: used in place of config.json.
    adapter: folder or hub id of a LoRA adapter in peft's format, which runs beside the weights, in the model's dtype.
    settings: of the model, such as num_labels, each an option of its own; they replace those of config.json.
    access: how the hub is asked; its fields, cache_dir, token and local_files_only, are options of their own.
    """

    revision: str | None = None
    quantization: str | None = None
    device_map: Any = None
    max_memory: Mapping[Any, int] | None = None
    context: int | None = None
    dtype: torch.dtype | None = None
    head: str | None = None
    kv: str | None = None
    exact: bool = False
    graph: bool = True
    config: GPTNeoXConfig | None = None
    adapter: str | os.PathLike[str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    access: Access = USUAL

    @classmethod
    def parse(cls, given: dict[str, Any]) -> LoadOptions:
        """Map transformers' arguments, explain those that have no meaning here, refuse the rest."""
        given = dict(given)
        given["access"] = Access.take(given)
        given["settings"] = {name: given.pop(name) for name in list(given) if name in SETTINGS}
        known = {f.name for f in fields(cls)}
        for harmless in ("low_cpu_mem_usage", "use_safetensors", "_fast_init"):
            given.pop(harmless, None)
        old = given.pop("torch_dtype", None)
        if old is not None and parse_dtype(given.setdefault("dtype", old)) != parse_dtype(old):
            raise ArgumentError(f"torch_dtype={old!r} and dtype={given['dtype']!r} contradict each other")
        _take_bits(given)
        for name in list(given):
            if name in WITHOUT_EFFECT:
                if given.pop(name) not in (None, False):
                    warnings.warn(f"{name} is without effect: {WITHOUT_EFFECT[name]}", stacklevel=3)
            elif name in EXPLAINED:
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
        if (limits := given.get("max_memory")) is not None:
            if not isinstance(limits, Mapping):
                raise ArgumentError(f"max_memory is {limits!r}, expected for instance {{'cuda': '8GiB'}}")
            given["max_memory"] = {where: parse_bytes(limit) for where, limit in limits.items()}
        if (context := given.get("context")) is not None and (type(context) is not int or context < 1):
            raise ArgumentError(f"context is {context!r}, expected a number of tokens")
        if given.get("head") not in (None, "fp16", "int8"):
            raise ArgumentError(f"head is {given['head']!r}, expected 'fp16' or 'int8'")
        if given.get("kv") not in (None, "fp16", "int8"):
            raise ArgumentError(f"kv is {given['kv']!r}, expected 'fp16' or 'int8'")
        for name in ("exact", "graph"):
            if not isinstance(given.get(name, True), bool):
                raise ArgumentError(f"{name} is {given[name]!r}, expected True or False")
        if not isinstance(given.get("adapter"), str | os.PathLike | None):
            raise ArgumentError(f"adapter is {given['adapter']!r}, expected one folder or hub id")
        if (config := given.get("config")) is not None and not isinstance(config, GPTNeoXConfig):
            if not hasattr(config, "to_dict"):
                raise ArgumentError(f"config is a {type(config).__name__}, expected a GPTNeoXConfig")
            given["config"] = GPTNeoXConfig(**config.to_dict())
        return cls(**given)

    @property
    def wish(self) -> Wish:
        return Wish(self.device_map, self.max_memory, self.context, self.kv, self.head)


def _take_bits(given: dict[str, Any]) -> None:
    """Map load_in_4bit, load_in_8bit and bitsandbytes' config object to `quantization`."""
    asked = given.pop("quantization_config", None)
    bits = {
        name: given.pop(f"load_in_{name}", False) or getattr(asked, f"load_in_{name}", False)
        for name in ("4bit", "8bit")
    }
    if asked is not None and not any(bits.values()):
        raise UnsupportedError(
            f"quantization_config of type {type(asked).__name__}: use quantization='int4', 'int8' or 'nf4'"
        )
    if all(bits.values()):
        raise ArgumentError("load_in_4bit and load_in_8bit exclude each other")
    chosen = "int4" if bits["4bit"] else "int8" if bits["8bit"] else None
    if chosen == "int4" and getattr(asked, "bnb_4bit_quant_type", None) == "nf4":
        double = getattr(asked, "bnb_4bit_use_double_quant", False)
        given["quantization"] = given.get("quantization") or ("nf4-double" if double else "nf4")
        return
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
    """Build `cls` from a folder or hub id, that of an adapter too. Raises a NeoxLiteError naming the first thing that does not
    fit."""
    check(options.wish)
    folder = resolve(os.fspath(name), options.revision, options.access, adapter=True)
    if options.adapter is None and (folder / ADAPTER_CONFIG).exists():
        return _from_adapter(cls, os.fspath(name), folder, options)
    return _from_folder(cls, name, folder, options)


def _from_folder(
    cls: type[GPTNeoXPreTrainedModel], name: str | os.PathLike[str], folder: Path, options: LoadOptions
) -> Any:
    config = options.config or GPTNeoXConfig.from_pretrained(folder)
    if options.config or options.settings:
        config = config.copy(**options.settings)
    with Checkpoint.open(folder) as checkpoint:
        dtype = options.dtype or DTYPES.get(config.dtype or "") or _stored_dtype(checkpoint)
        target = _target(options.quantization, config, folder)
        if target is not None:
            if options.head == "int8":
                raise ArgumentError("head='int8' is for folders that `neox-lite quantize` wrote, not for quantization=")
            changed = config if options.config or options.settings else None
            cached = _cached_folder(cls, name, options.quantization, changed, folder, checkpoint, dtype)
            if (cached / CONFIG).is_file():
                return _from_cache(cls, cached, options, Source(folder, os.fspath(name), options.revision), dtype)
        config.dtype = str(dtype).removeprefix("torch.")
        blueprint = Blueprint(cls, config, checkpoint, target, dtype)
        adapter = blueprint.adapter(options.adapter, options.access)
        sizes = _sizes(blueprint, dtype, folder, options.exact)
        decision = decide(
            options.wish,
            sizes if adapter is None else sizes.with_adapter(adapter.layer_weights, dtype.itemsize),
            blueprint.heads,
            blueprint.prefix,
            blueprint.not_on_disk(dtype),
        )
        if decision.announcement is not None:
            announce(decision.announcement)
        model = blueprint.fill(dtype, () if adapter is None else adapter.heads)
    model.source = Source(folder, os.fspath(name), options.revision, model.source.origins)
    if target is not None and not blueprint.fresh:  # a random head would pass for a trained one the next time
        _keep_quantized(model, cached)
        if (cached / CONFIG).is_file():  # mapped from there, it takes no memory of its own
            return _from_cache(cls, cached, options, model.source, dtype)
    if adapter is not None:
        attach(model, adapter, dtype)
    model.exact, model.graph = options.exact, options.graph
    put(model, decision)
    return model


def _from_adapter(cls: type[GPTNeoXPreTrainedModel], name: str, folder: Path, options: LoadOptions) -> Any:
    """An adapter on the base that it names, as transformers does."""
    if not holds_adapter(folder):
        own = next(n for n in WEIGHTS if (folder / n).exists())
        raise ArgumentError(
            f"{name}: holds both an adapter ({ADAPTER_CONFIG}) and a model ({own}); to run the adapter on that model pass "
            f"adapter={name!r} too"
        )
    settings = Settings.read(folder)
    if settings.base is None:
        raise CheckpointError(f"{settings.path}: names no base model; pass that model, and adapter={name!r}")
    try:
        base = resolve(settings.base, settings.base_revision, options.access)
    except NeoxLiteError as error:
        advice = f"pass the model that it was trained on, and adapter={name!r}"
        raise type(error)(f"{name}: an adapter whose base model cannot be had: {error}; {advice}") from error
    model = _from_folder(cls, settings.base, base, replace(options, revision=settings.base_revision, adapter=folder))
    model.adapter = replace(model.adapter, name=name)
    return model


def attach(model: GPTNeoXPreTrainedModel, adapter: Adapter, dtype: torch.dtype) -> None:
    """Give linear layers what an adapter adds to them, and a task head that it brings, in the model's dtype."""
    for name, pair in adapter.low_ranks.items():
        a, b = (_converted(tensor, dtype, f"{adapter.name}: {name}") for tensor in pair)
        linear = model.base_model.get_submodule(name)
        assert isinstance(linear, Linear)
        linear.adapter = LowRank(a, b)
    for name, tensor in adapter.heads.items():
        head, _, key = name.partition(".")
        setattr(getattr(model, head), key, nn.Parameter(_converted(tensor, dtype, name), requires_grad=False))
    model.adapter = replace(adapter, low_ranks={}, heads={})  # the model holds them now


def _from_cache(
    cls: type[GPTNeoXPreTrainedModel], cached: Path, options: LoadOptions, source: Source, dtype: torch.dtype
) -> Any:
    """What was quantized before, as if it were its source."""
    try:
        model = from_pretrained(
            cls, cached, replace(options, revision=None, quantization=None, config=None, settings={}, dtype=dtype)
        )
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {cached} only keeps what was quantized before: delete it") from error
    model.source = replace(source, origins=model.source.origins)
    return model


def _sizes(blueprint: Blueprint, dtype: torch.dtype, folder: Path, exact: bool) -> Sizes:
    """Bytes of a model's parts as they will be."""
    config = blueprint.model.config
    scale = next((n for n in blueprint.checkpoint.names() if n.endswith(".weight_scale")), None)
    scale_dtype = blueprint.checkpoint.info(scale).dtype if scale is not None else dtype
    formats = formats_of(config.quantization_config)
    sizes = sizes_in(config, formats, dtype, scale_dtype, (folder / HEAD).exists())
    if exact:  # quantized weights, too, are written out for many tokens
        sizes = replace(sizes, decoded=max(out * columns for out, columns, _ in linears_of(config).values()))
    return sizes if "embed_out" in blueprint.heads else replace(sizes, head=0, small_head=None)


def _target(quantization: str | None, config: GPTNeoXConfig, folder: Path) -> Format | None:
    """The format to quantize to while loading, or None."""
    if quantization is None:
        return None
    wanted = make_format(quantization)
    if config.quantization_config is None:
        return wanted
    format_of = formats_of(config.quantization_config)
    layers = (f"gpt_neox.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in linears_of(config))
    stored = {format_of(name).name for name in layers} - {DENSE.name}
    if stored == {wanted.name}:
        return None  # the folder is what was asked for
    raise FormatError(f"{folder}: is quantized already ({' and '.join(sorted(stored))}); leave quantization out")


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    name = next((n for n in checkpoint.names() if n.endswith("embed_in.weight")), None)
    return checkpoint.info(name).dtype if name else torch.float32


class Blueprint:
    """A class built without memory, what a checkpoint calls each of its tensors, and the proof that all of them fit.

    target: the format that linear layers get from a plain checkpoint, one for all or by full name; None: the one the config
    says they have. dtype: what everything else gets with it.
    Raises FormatError or CheckpointError naming what does not fit.
    """

    def __init__(
        self,
        cls: type[GPTNeoXPreTrainedModel],
        config: GPTNeoXConfig,
        checkpoint: Checkpoint,
        target: Format | Mapping[str, Format] | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        self.checkpoint, self.target = checkpoint, target
        if target is None:
            formats: Callable[[str], Format] = formats_of(config.quantization_config)
        elif isinstance(target, Mapping):
            formats = target.__getitem__
        else:
            formats = lambda name: target  # noqa: E731
        with torch.device("meta"):
            self.model = cls(config, formats=formats)  # type: ignore[call-arg]
        self.heads = [name for name, module in self.model.named_children() if isinstance(module, Linear)]
        self.prefix = f"{self.model.base_model_prefix}." if self.heads else ""
        if target is not None:
            config.quantization_config = quantization_config(target, self.heads, dtype)
        self.tied = config.tie_word_embeddings and hasattr(self.model, "embed_out")
        self.fresh: list[str] = []  # task heads that the checkpoint lacks
        self._check()

    def stored(self, name: str) -> str:
        """The checkpoint's name of a tensor: it may have or lack the base model's prefix, and call the head lm_head."""
        prefix, here = self.model.base_model_prefix + ".", self.checkpoint
        if name == "embed_out.weight" and name not in here and "lm_head.weight" in here:
            return "lm_head.weight"
        if name.partition(".")[0] in self.heads:
            return name
        has_prefix = any(n.startswith(prefix) for n in here.names())
        return prefix + name.removeprefix(prefix) if has_prefix else name.removeprefix(prefix)

    def is_encoded(self, module: nn.Module) -> bool:
        """Whether a module's dense weight is to be quantized on its way in."""
        return self.target is not None and isinstance(module, Linear) and module.format != DENSE

    def _check(self) -> None:
        if packed := [
            n for n in self.checkpoint.names() if re.search(r"(embed_in|embed_out|lm_head)\.weight_packed$", n)
        ]:
            raise FormatError(
                f"{self.checkpoint.folder}: {packed[0]}: embedding and head must be plain here; put 'lm_head' and "
                "'gpt_neox.embed_in' into `ignore` and quantize again, or run neox-lite quantize on the original checkpoint"
            )
        floating = tuple(DTYPES.values())
        expected: dict[str, tuple[Sequence[int], tuple[torch.dtype, ...] | None]] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, Linear) and (reason := module.format.why_not(module.shape)) is not None:
                raise FormatError(f"{name}: {reason}")
            for key, tensor in self._own_tensors(name, module):
                stored = self.stored(key)
                if name in self.heads and name != "embed_out" and stored not in self.checkpoint:
                    self.fresh.append(key)
                elif not (self.tied and name == "embed_out"):
                    shape = self._file_shape(module, key.removeprefix(f"{name}."), tensor, stored)
                    expected[stored] = shape, floating if tensor.is_floating_point() else (tensor.dtype,)
        spare = {n for n in self.checkpoint.names() if n.partition(".")[0] in HEADS} - expected.keys()
        copies = spare & {"embed_out.weight", "lm_head.weight"} if "embed_out" in self.heads else set()
        if not self.tied:
            spare -= copies
        self.checkpoint.check({**expected, **{n: (self.checkpoint.info(n).shape, None) for n in spare}})
        for name in copies:
            embedding = self.stored("gpt_neox.embed_in.weight")
            copy, original = self.checkpoint.tensor(name), self.checkpoint.tensor(embedding)
            if copy.dtype != original.dtype or not torch.equal(copy, original):
                raise CheckpointError(
                    f"{self.checkpoint.folder}: the config ties the head to the embedding, but {name} differs from "
                    f"{embedding}; set tie_word_embeddings to false to use it"
                )

    def _own_tensors(self, name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """(full name, meta tensor) of what the checkpoint must hold for this module itself, not its children."""
        dot = f"{name}." if name else ""
        if self.is_encoded(module):
            assert isinstance(module, Linear)
            yield f"{dot}weight", torch.empty(module.shape, device="meta")
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            encoded = self.is_encoded(module) and key != "bias"
            if tensor is not None and not encoded and key not in module._non_persistent_buffers_set:
                yield dot + key, tensor

    def _file_shape(self, module: nn.Module, key: str, tensor: Tensor, stored: str) -> tuple[int, ...]:
        """The shape that the checkpoint must state for a tensor."""
        shape = tuple(tensor.shape)
        if not isinstance(module, Linear) or self.is_encoded(module):
            return shape
        if key in module.format.loose and stored in self.checkpoint:
            found = self.checkpoint.info(stored).shape
            return found if len(found) == 1 and found[0] <= shape[0] else shape
        return module.format.file_shape(key, shape)

    def not_on_disk(self, dtype: torch.dtype) -> str | None:
        """Why layers cannot stay in their files; None where these hold their weights as they run."""
        if self.target is not None:
            return "quantization= makes their weights; run `neox-lite quantize` first, and load the folder it writes"
        for name, module in self.model.base_model.layers.named_modules():
            for key in module.format.specs(module.shape, dtype) if isinstance(module, Linear) else ():
                info = self.checkpoint.info(self.stored(f"gpt_neox.layers.{name}.{key}"))
                if info.offset is None:
                    return f"{info.file.name} is no safetensors file; save the model as one, or quantize it"
                if module.format == DENSE and info.dtype != dtype:
                    stored, wanted = (str(kind).removeprefix("torch.") for kind in (info.dtype, dtype))
                    return f"{info.file.name} holds {stored}, and they are to be {wanted}; pass dtype={stored!r}, or quantize"
        return None

    def adapter(self, name: str | os.PathLike[str] | None, access: Access) -> Adapter | None:
        """The adapter in a folder or under a hub id, proved to fit the model."""
        if name is None:
            return None
        head = next((head for head in self.heads if head != "embed_out"), None)
        return Adapter.open(resolve_adapter(os.fspath(name), access), os.fspath(name), self.model.config, head)

    def fill(self, dtype: torch.dtype, following: Collection[str] = ()) -> GPTNeoXPreTrainedModel:
        """Put every tensor in its place: mapped where dtype and format are the file's, else converted.

        following: tensors of heads that the checkpoint may lack, since they come from elsewhere.
        """
        encoded = {n: m for n, m in self.model.named_modules() if isinstance(m, Linear) and self.is_encoded(m)}
        for name, module in _with_bar(encoded):
            quantize_module(module, self.checkpoint, self.stored(f"{name}.weight"), dtype)
        for name, module in self.model.named_modules():
            for key, tensor in self._own_tensors(name, module):
                stored, last = self.stored(key), key.removeprefix(f"{name}.")
                if stored not in self.checkpoint or (last == "weight" and self.is_encoded(module)):
                    continue
                mapped = value = self.checkpoint.tensor(
                    stored, sparse=isinstance(module, nn.Embedding) and not self.tied
                )
                if last in module._parameters:
                    value = nn.Parameter(_converted(value, dtype, stored), requires_grad=False)
                elif isinstance(module, Linear):
                    value = module.format.laid(last, value, tuple(tensor.shape))
                setattr(module, last, value)
                if value.data_ptr() == mapped.data_ptr():
                    self._note_origin(key, stored, value)
            if isinstance(module, Linear) and module.format != DENSE:
                module.format = self._opened(name, module, module._buffers)  # type: ignore[arg-type]
        _initialize_heads(self.model, [n for n in self.fresh if n not in following], dtype, self.checkpoint.folder)
        if self.tied:
            self.model.tie_weights()  # type: ignore[operator]
        return self.model

    def check_formats(self) -> None:
        """Raise CheckpointError where the stored tensors of a quantized weight contradict each other or the config."""
        for name, module in self.model.named_modules():
            if isinstance(module, Linear) and module.format != DENSE and not self.is_encoded(module):
                tensors = {key: self.checkpoint.tensor(self.stored(f"{name}.{key}")) for key in module._buffers}
                shapes = {key: tuple(tensor.shape) for key, tensor in module._buffers.items() if tensor is not None}
                laid = {key: module.format.laid(key, tensors[key], shape) for key, shape in shapes.items()}
                self._opened(name, module, laid)

    def _opened(self, name: str, module: Linear, tensors: Mapping[str, Tensor]) -> Format:
        try:
            return module.format.opened(tensors, module.shape)
        except FormatError as error:
            stored = self.stored(f"{name}.weight").removesuffix("weight")
            raise CheckpointError(f"{self.checkpoint.folder}: {stored}{error}") from error

    def _note_origin(self, name: str, stored: str, tensor: Tensor) -> None:
        info = self.checkpoint.info(stored)
        if info.offset is not None:
            origin = Origin(info.file, info.offset, info.file.stat().st_mtime_ns)
            self.model.source.origins[name.removeprefix("gpt_neox.")] = (origin, *identity_of(tensor))


def _converted(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another dtype (itself in its own); a finite value that overflows there is an error."""
    converted = value.to(dtype)
    if dtype == torch.float16 != value.dtype and bool((converted.isinf() & value.isfinite()).any()):
        raise FormatError(f"{name}: holds values that overflow float16; load it with dtype='bfloat16' or 'float32'")
    return converted


def _with_bar(layers: dict[str, Linear]) -> Iterable[tuple[str, Linear]]:
    """The layers that are about to be quantized, counted by a progress bar on stderr where there are any."""
    if not layers:
        return ()
    from tqdm import tqdm

    target = next(iter(layers.values())).format.name
    return tqdm(layers.items(), desc=f"quantize to {target}", unit="layer", file=sys.stderr)


def quantize_module(module: Linear, checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> None:
    """Fill a module's quantized tensors from the checkpoint's dense weight `name`."""
    specs = module.format.specs(module.shape, dtype)
    tensors = {key: torch.empty(shape, dtype=kind) for key, (kind, shape) in specs.items()}
    encoding = Encoding(checkpoint, name, module.format, dtype, module.format.methods[0])
    for slice in encoding.slices():
        start, part = slice()
        for key, rows in part.items():
            tensors[key][start : start + len(rows)] = rows
    tensors |= encoding.rest()
    for key, tensor in tensors.items():
        setattr(module, key, tensor)


class Encoding:
    """A checkpoint's weight on its way into a format, a bounded number of rows at a time."""

    def __init__(self, checkpoint: Checkpoint, name: str, format: Format, dtype: torch.dtype, method: str) -> None:
        self.checkpoint, self.name, self.format, self.dtype, self.method = checkpoint, name, format, dtype, method
        self.shape: tuple[int, int] = checkpoint.info(name).shape  # type: ignore[assignment]
        self._kept: dict[str, dict[int, Tensor]] = {key: {} for key in format.late}  # suffix -> first row -> rows

    def slices(self) -> Iterator[Callable[[], tuple[int, dict[str, Tensor]]]]:
        """Calls that give (first row, suffix -> rows), one after another or at once; reading starts when one is asked for."""
        step = max(1, SLICE_ELEMENTS // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = self.checkpoint.rows(self.name, start, min(self.shape[0], start + step))
            _read_ahead(rows)
            yield partial(self._encode, start, rows)

    def _encode(self, start: int, rows: Tensor) -> tuple[int, dict[str, Tensor]]:
        try:
            part = encode(self.format, rows, self.dtype, self.method)
        except FormatError as error:
            raise FormatError(f"{self.name}, rows {start} to {start + len(rows) - 1}: {error}") from error
        for key, parts in self._kept.items():
            parts[start] = part.pop(key)
        return start, part

    def rest(self) -> dict[str, Tensor]:
        """After all slices: the tensors that are not made of rows."""
        kept = {key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in self._kept.items()}
        self._kept = {key: {} for key in self._kept}
        constants = self.format.constants(self.shape, self.dtype)
        return constants | self.format.finish(kept, self.shape, self.dtype)


def encode(format: Format, rows: Tensor, dtype: torch.dtype, method: str) -> dict[str, Tensor]:
    """What format.encode gives, from the CPU's kernel where there is one: the same bits, many times as fast."""
    if isinstance(format, GroupInt) and cpu.why_not(rows.device) is None:
        from .kernels.cpu import encode as kernel

        if kernel.why_not(rows) is None:
            return kernel.encode(format, rows, dtype, method)
    return format.encode(rows, dtype, method)


def _initialize_heads(model: GPTNeoXPreTrainedModel, fresh: list[str], dtype: torch.dtype, folder: Path) -> None:
    if fresh:
        warnings.warn(
            f"{folder}: has no {', '.join(fresh)}; initialized at random, so train it before use", stacklevel=6
        )
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
    if not (folder / HEAD).exists():
        raise ArgumentError(f"{folder}: has no {HEAD}; head='int8' is for folders that `neox-lite quantize` wrote")
    with Checkpoint.open_file(folder, HEAD) as checkpoint:
        scale = checkpoint.info("embed_out.weight_scale").shape
        if len(scale) != 2 or not scale[1]:
            raise CheckpointError(f"{folder / HEAD}: embed_out.weight_scale is {list(scale)}, expected (ids, groups)")
        module: Linear = model.embed_out  # type: ignore[assignment]
        head = Linear(module.in_features, module.out_features, False)
        head.become(GroupInt(8, module.in_features // scale[1]))
        specs = head.format.specs(head.shape, checkpoint.info("embed_out.weight_scale").dtype)
        checkpoint.check({f"embed_out.{k}": (shape, (kind,)) for k, (kind, shape) in specs.items()})
        for key in specs:
            setattr(head, key, checkpoint.tensor(f"embed_out.{key}"))
        model.embed_out = head


def warm(model: GPTNeoXPreTrainedModel, progress: Callable[[int, int], object] | None = None) -> None:
    """Read all weights that files back into memory, in the order of the files, before a first token waits for each.

    Later steps then find them in the system's page cache, for as long as it has room. progress is told the bytes read so
    far and in all. Weights that were copied elsewhere, as onto a GPU, and those that stay on the disk need no reading.
    """
    layers = model.base_model.blocks
    tiers = model.placement.layers if model.placement is not None else ("",) * len(layers)
    left = {id(t) for tier, layer in zip(tiers, layers, strict=True) if tier == "disk" for t in tensors_of(layer)}
    every = {t.data_ptr(): t for t in tensors_of(model) if t.device.type == "cpu" and t.numel() and id(t) not in left}
    chunks = [c for _, t in sorted(every.items()) for c in t.detach().flatten().view(torch.uint8).split(WARM_BYTES)]
    done, total = 0, sum(len(chunk) for chunk in chunks)
    for chunk, ahead in zip(chunks, [*chunks[1:], None], strict=True):
        if ahead is not None:
            _read_ahead(ahead)
        chunk.max()  # reads it all, at the speed of memory where it is there already
        done += len(chunk)
        if progress is not None:
            progress(done, total)


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _read_ahead(chunk: Tensor) -> None:
    """Let Linux fetch a mapped range while we do something else; without it every page fault waits for the disk."""
    if not hasattr(mmap, "MADV_WILLNEED"):
        return
    advise, first = ctypes.CDLL(None).madvise, chunk.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    for start in range(first, chunk.data_ptr() + chunk.nbytes, READ_AHEAD_BYTES):
        length = min(READ_AHEAD_BYTES, chunk.data_ptr() + chunk.nbytes - start)
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_WILLNEED)  # advice: refused, it costs nothing


# Placement ------------------------------------------------------------------------------------------------------------


def announce(text: str) -> None:
    """Tell the user a decision, once, on stderr."""
    print(f"neox-lite: {text}", file=sys.stderr)


def put(model: GPTNeoXPreTrainedModel, decision: Decision) -> None:
    """Make a model that lies in host memory what was decided of it: its head, its cache, and its place."""
    if decision.head == "int8":
        assert model.source.folder is not None
        _use_small_head(model, model.source.folder)
    model.kv, model.plan = decision.kv, decision.plan
    if decision.plan is not None:
        model.first_pages, model.cache_pages = decision.plan.pages, decision.plan.most_pages
        remember(model)
    if decision.placement is None:
        model.to(decision.device)
    else:
        place(model, decision.placement, decision.accelerator())


def place(model: GPTNeoXPreTrainedModel, placement: Placement, accelerator: Accelerator | None = None) -> None:
    """Move what the placement gives to the GPU there; nothing else changes its place. accelerator: that GPU."""
    base = model.base_model
    heads = {name: module for name, module in model.named_children() if isinstance(module, Linear)}
    parts: list[tuple[str, str, nn.Module]] = [(placement.embedding, "embed_in.", base.embed_in)]
    parts += [(tier, f"layers.{i}.", base.blocks[i]) for i, tier in enumerate(placement.layers)]
    parts += [(placement.head, "final_layer_norm.", base.final_layer_norm)]
    parts += [(placement.head, f"{name}.", head) for name, head in heads.items()]
    for tier, prefix, module in parts:
        if tier == "gpu":
            assert accelerator is not None
            mapped = model.source.origins_in(module, prefix).keys()
            left = [tensor for name, tensor in module.state_dict().items() if name in mapped]
            settle(module, accelerator)
            for tensor in left:
                let_go(tensor)
    model.rebind(placement, accelerator)


# Quantized while loading: kept for the next time ------------------------------------------------------------------------


def cache_root() -> Path:
    """Where models quantized while loading are kept: beside the hub cache."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(home).expanduser() / "neox-lite"


def _cached_folder(
    cls: type,
    name: str | os.PathLike[str],
    quantization: str | None,
    changed: GPTNeoXConfig | None,
    folder: Path,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
) -> Path:
    """A folder named after everything that decides the result: source files, format, dtype and class.

    changed: the config, where it is another than the source's.
    """
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.files]
    config = (folder / "config.json").stat().st_mtime_ns if changed is None else changed.to_json_string()
    identity = repr((str(folder.resolve()), stats, config, quantization, str(dtype), cls.__name__))
    label = re.sub(r"[^A-Za-z0-9._-]+", "--", Path(os.fspath(name)).name)
    return cache_root() / f"{label}-{quantization}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _keep_quantized(model: GPTNeoXPreTrainedModel, cached: Path) -> None:
    """Save what was just quantized; a full or read-only disk costs the next start time, not this one.

    Written beside its place and renamed. The writer lets one process in at a time, and takes over what a killed one left.
    """
    partial = cached.with_name(f"{cached.name}.partial")
    try:
        model.save_pretrained(partial)
        partial.rename(cached)
        announce(f"kept the quantized model in {cached} for the next start")
    except (NeoxLiteError, OSError) as error:
        if (cached / CONFIG).is_file():  # another process was quicker
            shutil.rmtree(partial, ignore_errors=True)
        else:
            announce(f"the quantized model could not be kept for the next start: {error}")
