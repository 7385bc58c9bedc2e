"""from_pretrained: config + checkpoint -> tensors in their place on their device. Takes the class to build."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint.adapter import Adapter, Settings
from ..checkpoint.manifest import CONFIG
from ..checkpoint.reader import Checkpoint
from ..config import GPTNeoXConfig
from ..errors import ArgumentError, CheckpointError, FormatError, NeoxLiteError
from ..formats import DENSE, Format, GroupInt, formats_of, make_format
from ..hub import ADAPTER_CONFIG, HEAD, WEIGHTS, holds_adapter, resolve
from ..layers import Linear, LowRank
from ..offload.accelerator import Accelerator
from ..offload.placement import Decision, check, decide, let_go, remember, settle, sizes_in
from ..offload.plan import Sizes
from ..offload.run import Placement
from ..units import DTYPES, dtype_name
from .options import LoadOptions
from .quantize import read_ahead
from .skeleton import Blueprint, Source, _converted

if TYPE_CHECKING:
    from ..modeling.pretrained import GPTNeoXPreTrainedModel

WARM_BYTES = 16 << 20  # read between two reports of progress


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
        config.dtype = dtype_name(dtype)
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
        sizes = replace(sizes, decoded=max(out * columns for out, columns, _ in config.linear_shapes.values()))
    return sizes if "embed_out" in blueprint.heads else replace(sizes, head=0, small_head=None)


def _target(quantization: str | None, config: GPTNeoXConfig, folder: Path) -> Format | None:
    """The format to quantize to while loading, or None."""
    if quantization is None:
        return None
    wanted = make_format(quantization)
    if config.quantization_config is None:
        return wanted
    format_of = formats_of(config.quantization_config)
    layers = (f"gpt_neox.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in config.linear_shapes)
    stored = {format_of(name).name for name in layers} - {DENSE.name}
    if stored == {wanted.name}:
        return None  # the folder is what was asked for
    raise FormatError(f"{folder}: is quantized already ({' and '.join(sorted(stored))}); leave quantization out")


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    name = next((n for n in checkpoint.names() if n.endswith("embed_in.weight")), None)
    return checkpoint.info(name).dtype if name else torch.float32


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
            read_ahead(ahead)
        chunk.max()  # reads it all, at the speed of memory where it is there already
        done += len(chunk)
        if progress is not None:
            progress(done, total)


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


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
