"""From what a caller asks for to a place for every part of a model: one device, a map, or the plan's choice."""

from __future__ import annotations

import ctypes
import difflib
import gc
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, UnsupportedError
from . import profile
from .accelerator import Accelerator, Cuda
from .advice import advice, notes
from .memory import own_memory
from .plan import CPU, DISK, GPU, NO, Budgets, HardwareProfile, ModelSizes, PlacementRequest, Plan, Rates, make_plan
from .run import Placement
from .stream import LayerLayout, set_tensor

NOMINAL = Rates(20e9, 3e11)  # of a processor that was not measured; only predictions depend on it
PROCESS_GROWTH = 16 << 20  # what binding the kernels adds to a process
PLANNED: WeakSet[Any] = WeakSet()  # models of this process that were placed by a plan


@dataclass(frozen=True)
class PlacementDecision:
    """Where a model goes. Without a placement all of it is on `device`; with one, what is on "gpu" is.

    max_bytes: that torch may take of the GPU's memory, where the caller set a limit.
    """

    device: torch.device
    placement: Placement | None = None
    kv: str = "fp16"
    head: str = "fp16"
    plan: Plan | None = None
    max_bytes: int | None = None

    def accelerator(self) -> Accelerator | None:
        return Cuda(self.device, self.max_bytes) if self.placement is not None and self.device.type == "cuda" else None

    @property
    def everything_there(self) -> bool:
        """Whether all of the model goes to the device, and no limit was set that counts from what torch holds before."""
        return self.max_bytes is None and (self.placement is None or self.placement.tiers == {"gpu"})

    @property
    def announcement(self) -> str | None:
        """What a user should know before it happens; None where the whole model is in one memory, as it would be anyway."""
        found = self.plan
        if found is None or (found.level in (CPU, GPU) and not notes(found)):
            return None
        names = {"gpu": str(self.device), "cpu": "the CPU", "disk": "the disk"}
        shares = [f"{found.layers.count(tier)} on {name}" for tier, name in names.items() if tier in found.layers]
        speed = found.decode_tokens_per_s if found.hardware.cpu != NOMINAL else None
        rate = "" if speed is None else f"; about {speed:.2g} tokens/s by prediction"
        first = advice(found)[:1] if found.level == DISK else []
        return "; ".join([f"of {len(found.layers)} layers {', '.join(shares)}{rate}", *notes(found), *first])


def device_of(asked: Any, who: str = "device_map is") -> torch.device:
    """A device as callers name it. Raises ArgumentError for one that is not there, or that nothing here runs on."""
    try:
        device = torch.device(f"cuda:{asked}" if isinstance(asked, int) else "cpu" if asked is None else asked)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"{who} {asked!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"{who} {asked!r}, but torch sees no CUDA device here; use 'cpu' or 'auto'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"{who} {asked!r}, but there are {torch.cuda.device_count()} CUDA devices")
    return device


def check(request: PlacementRequest) -> None:
    """Raise ArgumentError or UnsupportedError for what cannot be honoured, before anything is read."""
    if isinstance(request.device_map, Mapping):
        _devices(request.device_map)
    elif request.device_map != "auto":
        device_of(request.device_map)
    planned = request.device_map is not None and not isinstance(request.device_map, Mapping)
    if request.max_memory is not None and not planned:
        raise ArgumentError("max_memory limits device_map='auto', 'cpu' or 'cuda'; pass both or neither")
    if request.context is not None and not planned:
        raise ArgumentError("context is what device_map='auto' plans memory for; pass both or neither")
    for key, limit in (request.max_memory or {}).items():
        if key != "cpu" and limit:  # nothing of a GPU can be had anywhere
            device_of(key, "max_memory names")


def _devices(asked: Mapping[str, Any]) -> dict[str, str | torch.device]:
    """A map's values: "disk" or a device each. At most one GPU."""
    found = {str(name): "disk" if where == "disk" else _numbered(device_of(where)) for name, where in asked.items()}
    gpus = {str(where) for where in found.values() if isinstance(where, torch.device) and where.type == "cuda"}
    if len(gpus) > 1:
        raise UnsupportedError(f"device_map names {' and '.join(sorted(gpus))}, but a model runs on one GPU at most")
    return found


def _numbered(device: torch.device) -> torch.device:
    """The first GPU where none is named, as "cuda" is "cuda:0" to those who write both."""
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def decide(
    request: PlacementRequest,
    sizes: ModelSizes,
    heads: list[str],
    prefix: str = "gpt_neox.",
    not_on_disk: str | None = None,
) -> PlacementDecision:
    """Where a model goes. heads: names of its output layers; prefix: of its other parts.

    not_on_disk: why its layers cannot stay in their files, None where they can. Raises ArgumentError where the model fits
    nowhere, saying by how much and what would help.
    """
    if isinstance(request.device_map, Mapping):
        return _by_map(request, sizes, heads, prefix, not_on_disk)
    if request.device_map == "auto" or request.max_memory is not None:
        return _by_plan(request, sizes, not_on_disk)
    return PlacementDecision(device_of(request.device_map), None, request.kv or "fp16", request.head or "fp16")


def _by_plan(request: PlacementRequest, sizes: ModelSizes, not_on_disk: str | None) -> PlacementDecision:
    device, limits = _gpu_of(request), dict(request.max_memory or {})
    here = hardware(measure=device is not None)
    limit = next((n for key, n in limits.items() if device is not None and key in _names_of(device)), None)
    budgets = profile.budgets(here, limits.get("cpu"), limit, None if device is None else device.index)
    found = make_plan(sizes, here, request, replace(budgets, disk=not_on_disk is None))
    if found.level == NO:
        beside = " with the models loaded before" if PLANNED else ""
        reason = f"; layers cannot stay on the disk: {not_on_disk}" if not_on_disk else ""
        advices = advice(found)
        changes = f"; {', or '.join(advices)}" if advices else ""
        raise ArgumentError(
            f"the model does not fit: {found.short_by / 2**20:.0f} MiB of CPU memory are missing, the process{beside} "
            f"alone takes {here.process_bytes / 2**20:.0f}{reason}{changes}"
        )
    placement = None
    if found.gpu_layers or found.disk_layers:
        placement = Placement(found.layers, found.embedding_on, found.head_on, found.crossover_tokens, found.pages)
    where = device if device is not None and found.gpu_layers else torch.device("cpu")
    max_bytes = limit - here.card.context_bytes if limit is not None and here.card is not None else None
    return PlacementDecision(where, placement, found.kv, found.head, found, max_bytes)


def _gpu_of(request: PlacementRequest) -> torch.device | None:
    """The GPU that a plan may use."""
    if request.device_map == "auto" and not torch.cuda.is_available():
        return None
    device = device_of("cuda" if request.device_map == "auto" else request.device_map)
    unlimited = all(n > 0 for key, n in (request.max_memory or {}).items() if key in _names_of(device))
    return _numbered(device) if device.type == "cuda" and unlimited else None


def _names_of(device: torch.device) -> tuple[Any, ...]:
    """What max_memory may call the GPU in use."""
    return device.index or 0, f"cuda:{device.index or 0}", "cuda"


def hardware(measure: bool) -> HardwareProfile:
    """This machine with this process: as measured before, or now if `measure`; else with nominal rates.

    What the process holds already, and what models that were planned before may come to hold, counts as the process's own.
    """
    found = profile.load() or (profile.measure() if measure else HardwareProfile(NOMINAL, None, 0, None))
    if PLANNED:
        gc.collect()  # a model that nobody refers to may still be in a cycle
    planned = [model.plan.totals for model in PLANNED if model.plan is not None]
    held = own_memory()
    own = profile.PROCESS_BYTES if held is None else sum(held.values()) + PROCESS_GROWTH
    card = found.card
    if card is not None and torch.cuda.is_initialized():
        taken = card.context_bytes + torch.cuda.memory_reserved()
        card = replace(card, context_bytes=max(taken, *(totals["gpu"] for totals in planned), 0))
    process = max(own, found.process_bytes, *(totals["cpu"] for totals in planned))
    return replace(found, process_bytes=process, card=card)


def share_memory(model: Any) -> None:
    """Models that are planned from now on share the memory with this one; the caches of earlier ones stay as planned."""
    for earlier in PLANNED:
        if earlier.plan is not None:
            earlier.cache_pages = earlier.plan.pages
    PLANNED.add(model)


def _by_map(
    request: PlacementRequest, sizes: ModelSizes, heads: list[str], prefix: str, not_on_disk: str | None
) -> PlacementDecision:
    """A place for every part from a map as accelerate writes them: a module's name stands for all that is in it."""
    devices, count = _devices(request.device_map), len(sizes.layers)
    # The head's name in transformers v5.
    if "embed_out" in heads and "lm_head" in devices:
        devices.setdefault("embed_out", devices.pop("lm_head"))
    names = [f"{prefix}embed_in", *(f"{prefix}layers.{i}" for i in range(count)), f"{prefix}final_layer_norm", *heads]
    gpu = next((d for d in devices.values() if isinstance(d, torch.device) and d.type == "cuda"), None)
    tiers, unused = [], set(devices) - {f"{prefix}rotary_emb"}
    # 1. The longest key that covers a part is its tier.
    for name in names:
        covering = [key for key in devices if key in ("", name) or name.startswith(f"{key}.")]
        if not covering:
            raise ArgumentError(f"device_map says nothing of {name}")
        where = devices[key := max(covering, key=len)]
        tiers.append(where if isinstance(where, str) else "gpu" if where.type == "cuda" else "cpu")
        unused.discard(key)
    # 2. What cannot run is refused.
    if unused:
        near = difflib.get_close_matches(wrong := min(unused), names, 1)
        parts = [names[0], f"{names[1]} to {names[count]}", *names[count + 1 :]]
        raise ArgumentError(
            f"device_map names {wrong!r}, which is no part of this model; "
            + (f"nearest is {near[0]!r}; " if near else "")
            + f"parts are {', '.join(parts)}"
        )
    embedding, layers, ends = tiers[0], tuple(tiers[1 : count + 1]), set(tiers[count + 1 :])
    if "disk" in {embedding, *ends}:
        raise ArgumentError("device_map: only layers can be on the disk; give the embedding and the head a device")
    if "disk" in layers and not_on_disk is not None:
        raise ArgumentError(f"device_map: layers cannot stay on the disk: {not_on_disk}")
    if len(ends) > 1:
        raise ArgumentError("device_map: the final norm goes where the head is; give both the same device")
    # 3. One memory needs no placement; of two, rates say from how many tokens on layers are streamed.
    device, kv, head = gpu or torch.device("cpu"), request.kv or "fp16", request.head or "fp16"
    if len({embedding, *layers, *ends}) == 1:
        return PlacementDecision(device, None, kv, head)
    on_gpu, stream_from = layers.count("gpu"), None
    if 0 < on_gpu < count:
        here = hardware(measure=True)
        as_plan = Plan(sizes, here, request, Budgets(0, 0), kv, "fp16", layers.count("disk"), on_gpu, "cpu")
        stream_from = as_plan.crossover_tokens
    return PlacementDecision(device, Placement(layers, embedding, ends.pop(), stream_from), kv, head)


def move(module: nn.Module, accelerator: Accelerator) -> None:
    """Move all tensors of a module to the device, into one piece of its memory."""
    layout = LayerLayout(module)
    memory = accelerator.empty(layout.nbytes)
    for slot in layout.slots:
        slot.view(memory).copy_(slot.tensor)
        set_tensor(module, slot.name, slot.view(memory))


def evict(tensor: Tensor) -> None:
    """Return the memory that a mapped file's pages take, where nothing has been written to them.

    For tensors that are mapped and unchanged only: what lies there otherwise is lost.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
