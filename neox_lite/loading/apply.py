"""A loaded model into its place: its head, its cache, its parts on their devices, its files in memory. Decides nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.reader import Checkpoint
from ..core.network import Network
from ..errors import ArgumentError, CheckpointError
from ..formats import GroupInt
from ..hub import HEAD
from ..layers import Linear
from ..offload.accelerator import Accelerator
from ..offload.placement import PlacementDecision, evict, move, share_memory
from ..offload.run import Placement
from .quantize import read_ahead

WARM_BYTES = 16 << 20  # read between two reports of progress


def warm(model: Network, progress: Callable[[int, int], object] | None = None) -> None:
    """Read all weights that files back into memory, in the order of the files, before a first token waits for each.

    Later steps then find them in the system's page cache, for as long as it has room. progress gets the bytes read so
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


def announce(text: str) -> None:
    """Tell the user a decision, once, on stderr."""
    print(f"neox-lite: {text}", file=sys.stderr)


def apply(model: Network, decision: PlacementDecision) -> None:
    """Make a model that lies in host memory what was decided of it: its head, its cache, and its place."""
    if decision.head == "int8":
        assert model.source.folder is not None
        _use_small_head(model, model.source.folder)
    model.kv, model.plan = decision.kv, decision.plan
    if decision.plan is not None:
        model.first_pages, model.cache_pages = decision.plan.pages, decision.plan.max_pages
        share_memory(model)
    if decision.placement is None:
        model.to(decision.device)
    else:
        move_parts(model, decision.placement, decision.accelerator())


def move_parts(model: Network, placement: Placement, accelerator: Accelerator | None = None) -> None:
    """Move what the placement gives to the GPU there; nothing else changes its place. accelerator: that GPU."""
    base = model.base_model
    parts: list[tuple[str, str, nn.Module]] = [(placement.embedding, "embed_in.", base.embed_in)]
    parts += [(tier, f"layers.{i}.", base.blocks[i]) for i, tier in enumerate(placement.layers)]
    parts += [(placement.head, "final_layer_norm.", base.final_layer_norm)]
    parts += [(placement.head, f"{name}.", head) for name, head in model.heads.items()]
    for tier, prefix, module in parts:
        if tier == "gpu":
            assert accelerator is not None
            mapped = model.source.origins_in(module, prefix).keys()
            left = [tensor for name, tensor in module.state_dict().items() if name in mapped]
            move(module, accelerator)
            for tensor in left:
                evict(tensor)
    model.rebind(placement, accelerator)


def _use_small_head(model: Network, folder: Path) -> None:
    """Swap the head for the int8 one that a quantized folder carries."""
    if "embed_out" not in model.heads:
        raise ArgumentError(f"head='int8': {type(model).__name__} has no vocabulary head")
    if not (folder / HEAD).exists():
        raise ArgumentError(f"{folder}: has no {HEAD}; head='int8' is for folders that `neox-lite quantize` wrote")
    with Checkpoint.open_file(folder, HEAD) as checkpoint:
        scale = checkpoint.info("embed_out.weight_scale").shape
        if len(scale) != 2 or not scale[1]:
            raise CheckpointError(f"{folder / HEAD}: embed_out.weight_scale is {list(scale)}, expected (ids, groups)")
        module = model.heads["embed_out"]
        head = Linear(module.in_features, module.out_features, False)
        head.become(GroupInt(8, module.in_features // scale[1]))
        specs = head.format.specs(head.shape, checkpoint.info("embed_out.weight_scale").dtype)
        checkpoint.check({f"embed_out.{k}": (shape, (kind,)) for k, (kind, shape) in specs.items()})
        for key in specs:
            setattr(head, key, checkpoint.tensor(f"embed_out.{key}"))
        model.embed_out = head
