"""Memory of a loaded model: what its weights and its KV cache take, by tier, and how it is given back. Knows no job."""

from __future__ import annotations

import gc

import torch

from neox_lite import GPTNeoXForCausalLM
from neox_lite.offload.run import Placement


def return_memory() -> None:
    """Give what nothing refers to back to the system."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def weights_by_tier(model: GPTNeoXForCausalLM) -> dict[str, int]:
    """Bytes of weights under "weights_gpu", "weights_cpu" and "weights_disk", as far as there are any."""
    blocks = model.gpt_neox.blocks
    alone = Placement.alone("cpu" if model.device.type == "cpu" else "gpu", len(blocks))
    placement = model.placement or alone
    parts = [*zip(blocks, placement.layers, strict=True), (model.gpt_neox.embed_in, placement.embedding)]
    found: dict[str, int] = {}
    seen: set[int] = set()
    for part, tier in [*parts, (model, placement.head)]:  # the rest is where the head is
        for tensor in (*part.parameters(), *part.buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"weights_{tier}"] = found.get(f"weights_{tier}", 0) + tensor.nbytes
    return found


def cache_by_tier(model: GPTNeoXForCausalLM) -> dict[str, int]:
    """Bytes of the KV cache's pool under "cache_gpu" and "cache_cpu", as far as there are any."""
    holder, found = model._cache_holder, dict[str, int]()
    if holder is not None:
        for tensor in (*holder.prefixes.pool.storage, *holder.prefixes.pool.scales):
            tier = "cache_cpu" if tensor.device.type == "cpu" else "cache_gpu"
            found[tier] = found.get(tier, 0) + tensor.nbytes
    return found
