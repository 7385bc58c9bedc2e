"""from_pretrained: config + checkpoint -> tensors in their place on their device. Takes the class to build."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.adapter import Adapter, Settings
from ..checkpoint.manifest import CONFIG
from ..checkpoint.reader import Checkpoint
from ..config import GPTNeoXConfig
from ..core.network import Network
from ..core.source import Source
from ..errors import ArgumentError, CheckpointError, FormatError, NeoxLiteError
from ..formats import DENSE, Format, formats_of, make_format
from ..hub import ADAPTER_CONFIG, HEAD, WEIGHTS, holds_adapter, resolve
from ..layers import Linear, LowRank
from ..offload.placement import check, decide
from ..offload.plan import ModelSizes, sizes_of
from ..units import DTYPES, dtype_name
from .apply import announce, apply
from .options import LoadOptions
from .quantized_cache import cached_folder, keep_quantized
from .skeleton import Skeleton, converted


def from_pretrained(cls: type[Network], name: str | os.PathLike[str], options: LoadOptions) -> Any:
    """Build `cls` from a folder or hub id, that of an adapter too. Raises a NeoxLiteError naming the first thing that does not
    fit."""
    check(options.placement_request)
    folder = resolve(os.fspath(name), options.revision, options.access, adapter=True)
    if options.adapter is None and (folder / ADAPTER_CONFIG).exists():
        return _from_adapter(cls, os.fspath(name), folder, options)
    return _from_folder(cls, name, folder, options)


def _from_folder(cls: type[Network], name: str | os.PathLike[str], folder: Path, options: LoadOptions) -> Any:
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
            cached = cached_folder(cls, name, options.quantization, changed, folder, checkpoint, dtype)
            if (cached / CONFIG).is_file():
                return _from_cache(cls, cached, options, Source(folder, os.fspath(name), options.revision), dtype)
        config.dtype = dtype_name(dtype)
        skeleton = Skeleton(cls, config, checkpoint, target, dtype)
        adapter = skeleton.adapter(options.adapter, options.access)
        sizes = _sizes(skeleton, dtype, folder, options.exact)
        decision = decide(
            options.placement_request,
            sizes if adapter is None else sizes.with_adapter(adapter.layer_weights, dtype.itemsize),
            skeleton.heads,
            skeleton.prefix,
            skeleton.not_on_disk(dtype),
        )
        if adapter is not None and adapter.language_head[0] is not None and decision.head == "int8":
            raise ArgumentError(
                f"head='int8' is that of the base model, which {adapter.name} changes; pass head='fp16', or quantize a merged "
                "model"
            )
        if decision.announcement is not None:
            announce(decision.announcement)
        model = skeleton.fill(dtype, () if adapter is None else adapter.heads)
    model.source = Source(folder, os.fspath(name), options.revision, model.source.origins)
    if target is not None and not skeleton.fresh:  # a random head would pass for a trained one the next time
        keep_quantized(model, cached)
        if (cached / CONFIG).is_file():  # mapped from there, it takes no memory of its own
            return _from_cache(cls, cached, options, model.source, dtype)
    if adapter is not None:
        attach(model, adapter, dtype)
    model.exact, model.graph = options.exact, options.graph
    apply(model, decision)
    return model


def _from_adapter(cls: type[Network], name: str, folder: Path, options: LoadOptions) -> Any:
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


def attach(model: Network, adapter: Adapter, dtype: torch.dtype) -> None:
    """Give linear layers what an adapter adds to them, and a head that it brings or changes, in the model's dtype."""
    for name, pair in adapter.low_ranks.items():
        a, b = (converted(tensor, dtype, f"{adapter.name}: {name}") for tensor in pair)
        linear = model.base_model.get_submodule(name)
        assert isinstance(linear, Linear)
        linear.adapter = LowRank(a, b)
    for name, tensor in adapter.heads.items():
        head, _, key = name.partition(".")
        setattr(getattr(model, head), key, nn.Parameter(converted(tensor, dtype, name), requires_grad=False))
    low_rank, whole = adapter.language_head
    if low_rank is not None:
        # The head is one product in all, so what is added to it becomes part of its weight.
        linear = model.heads["embed_out"]
        weight = linear.handle.tensors["weight"] if whole is None else whole
        changed = weight.float().addmm(low_rank[1], low_rank[0].float())
        linear.weight = nn.Parameter(converted(changed, dtype, f"{adapter.name}: embed_out"), requires_grad=False)
    # The model holds them now.
    model.adapter = replace(adapter, low_ranks={}, heads={}, language_head=(None, None))


def _from_cache(cls: type[Network], cached: Path, options: LoadOptions, source: Source, dtype: torch.dtype) -> Any:
    """What was quantized before, as if it were its source."""
    try:
        model = from_pretrained(
            cls, cached, replace(options, revision=None, quantization=None, config=None, settings={}, dtype=dtype)
        )
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {cached} only keeps what was quantized before: delete it") from error
    model.source = replace(source, origins=model.source.origins)
    return model


def _sizes(skeleton: Skeleton, dtype: torch.dtype, folder: Path, exact: bool) -> ModelSizes:
    """Bytes of a model's parts as they will be."""
    config = skeleton.model.config
    scale = next((n for n in skeleton.checkpoint.names() if n.endswith(".weight_scale")), None)
    scale_dtype = skeleton.checkpoint.info(scale).dtype if scale is not None else dtype
    formats = formats_of(config.quantization_config)
    sizes = sizes_of(config, formats, dtype, scale_dtype, (folder / HEAD).exists())
    if exact:  # quantized weights, too, are written out for many tokens
        sizes = replace(sizes, decoded=max(out * columns for out, columns, _ in config.linear_shapes.values()))
    return sizes if "embed_out" in skeleton.heads else replace(sizes, head=0, small_head=None)


def _target(quantization: str | None, config: GPTNeoXConfig, folder: Path) -> Format | None:
    """The format to quantize to while loading, or None."""
    if quantization is None:
        return None
    requested = make_format(quantization)
    if config.quantization_config is None:
        return requested
    format_of = formats_of(config.quantization_config)
    layers = (f"gpt_neox.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in config.linear_shapes)
    stored = {format_of(name).name for name in layers} - {DENSE.name}
    if stored == {requested.name}:
        return None  # the folder is what was asked for
    raise FormatError(f"{folder}: is quantized already ({' and '.join(sorted(stored))}); leave quantization out")


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    name = next((n for n in checkpoint.names() if n.endswith("embed_in.weight")), None)
    return checkpoint.info(name).dtype if name else torch.float32
