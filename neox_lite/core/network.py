"""The tree of modules that every class shares, and its state: settings, place and source. Knows no kernel and no file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..cache import PagePool
from ..checkpoint.adapter import Adapter
from ..config import GPTNeoXConfig
from ..errors import ArgumentError, UnsupportedError
from ..formats import DENSE, Format, formats_of
from ..layers import GPTNeoXLayer, Linear, Norm, Rotary, norm_of
from ..offload.accelerator import Accelerator
from ..offload.memory import free_memory
from ..offload.plan import KINDS, Plan
from ..offload.run import Placement
from .source import Source, on_meta

Self = TypeVar("Self", bound="Network")


class Network(nn.Module):
    """A model as modules that hold tensors. `Transformer` has the blocks; others hold one as `gpt_neox`, and an output layer.

    version: raised by whatever kernels must be bound again for: moves, new places, other settings.
    """

    base_model_prefix = "gpt_neox"

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.config = config
        self.source = Source()
        self.version = 0
        # What it was loaded with.
        self.adapter: Adapter | None = None
        # None: all parts are where the embedding is. The accelerator is what the placement's "gpu" stands for.
        self.placement: Placement | None = None
        self.accelerator: Accelerator | None = None
        # By which the loader placed it, with predicted bytes and times.
        self.plan: Plan | None = None
        self.kv = "fp16"
        self.cache_pages = None
        # Pages that a pool which outlives a call starts with.
        self.first_pages: int | None = None
        # Whether decode steps run as CUDA graphs where that can be; see `graph_reason`.
        self.graph = True
        self._exact = False
        super().train(False)

    def initialize(self) -> None:
        """Random weights, as for training: normal with the config's `initializer_range`, biases zero, norms identity."""
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Linear | nn.Embedding):
                weight = module._parameters.get("weight")
                if weight is None or weight.is_meta:
                    continue
                weight.normal_(0.0, self.config.initializer_range)
                if isinstance(module, Linear) and module.bias is not None:
                    module.bias.zero_()

    # Parts ------------------------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> Transformer:
        base = getattr(self, self.base_model_prefix, self)
        assert isinstance(base, Transformer)
        return base

    @property
    def heads(self) -> dict[str, Linear]:
        """The output layer by its name; none of a bare transformer."""
        return {name: module for name, module in self.named_children() if isinstance(module, Linear)}

    @property
    def final_norm(self) -> Norm:
        """The last LayerNorm's gain, bias and eps."""
        return norm_of(self.base_model.final_layer_norm)

    def tie_weights(self) -> None:
        """Share the embedding with the vocabulary head, where the config ties them."""
        head = self.heads.get("embed_out")
        if head is not None and self.config.tie_word_embeddings and head.format == DENSE:
            head.weight = self.base_model.embed_in.weight

    @property
    def dtype(self) -> torch.dtype:
        """Of dense tensors."""
        return self.base_model.embed_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the embedding."""
        return self.base_model.embed_in.weight.device

    def num_parameters(self) -> int:
        """Weights counted as numbers, whatever format stores them."""
        linears = [m for m in self.modules() if isinstance(m, Linear) and m.format != DENSE]
        return sum(p.numel() for p in self.parameters()) + sum(m.in_features * m.out_features for m in linears)

    def get_memory_footprint(self) -> int:
        """Bytes of all weights and tables."""
        return sum(t.nbytes for t in {id(t): t for t in (*self.parameters(), *self.buffers())}.values())

    # Settings ---------------------------------------------------------------------------------------------------------

    @property
    def kv(self) -> str:
        """What new pools hold: "fp16" for the model's own dtype, or "int8"."""
        return self._kv

    @kv.setter
    def kv(self, kind: str) -> None:
        if kind not in KINDS:
            raise ArgumentError(f"kv is {kind!r}, expected 'fp16' or 'int8'")
        self._kv = kind

    @property
    def cache_pages(self) -> int | None:
        """Most pages, of 128 tokens, of a pool; None: it grows as it must."""
        return self._cache_pages

    @cache_pages.setter
    def cache_pages(self, count: int | None) -> None:
        if count is not None and (type(count) is not int or count < 1):
            raise ArgumentError(f"cache_pages is {count!r}, expected a number of pages of at least 1, or None")
        self._cache_pages = count

    @property
    def exact(self) -> bool:
        """Whether quantized weights meet float32 activations where a backend could take coarser ones."""
        return self._exact

    @exact.setter
    def exact(self, value: bool) -> None:
        self.version += value != self._exact
        self._exact = value

    def new_pool(self, pages: int = 0, limit: int | None = None) -> PagePool:
        """An empty KV cache pool for this model's layers, of the kind that `kv` names. limit: None for `cache_pages`."""
        config, dtype = self.config, torch.int8 if self.kv == "int8" else self.dtype
        devices = [layer.device for layer in self.base_model.blocks]
        limit = self.cache_pages if limit is None else limit
        return PagePool(config.num_attention_heads, config.head_dim, dtype, devices, pages, limit)

    # Place ------------------------------------------------------------------------------------------------------------

    def rebind(self, placement: Placement, accelerator: Accelerator | None) -> None:
        """Run from now on as parts have been placed."""
        self.version += 1
        self.placement, self.accelerator = placement, accelerator

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for weight in self._plain_on_disk():
            if fn(weight[:0]).dtype != weight.dtype:
                raise UnsupportedError(
                    f"layers on the disk stay {weight.dtype}, as their files hold them; load the model with another dtype, "
                    "and more memory, instead of converting it"
                )
        self.version += 1
        devices = {tensor.device for tensor in (*self.parameters(), *self.buffers())}
        if self.placement is not None and any(fn(torch.empty(0, device=d)).device != d for d in devices):
            # All of it moves to one device.
            self.placement = self.accelerator = None
        return super()._apply(fn, recurse)

    def _plain_on_disk(self) -> list[Tensor]:
        """Weights of layers that stay on the disk, but for quantized ones, whose dtypes nothing changes."""
        tiers = self.placement.layers if self.placement is not None else ()
        layers = [layer for tier, layer in zip(tiers, self.base_model.blocks, strict=False) if tier == "disk"]
        linears = [m for layer in layers for m in layer.modules() if isinstance(m, Linear)]
        return [m.handle.tensors["weight"] for m in linears if m.format == DENSE]

    def __getstate__(self) -> dict[str, Any]:
        if self.placement is not None and "disk" in self.placement.layers:
            raise UnsupportedError("a model with layers on the disk cannot be copied or pickled; load it again")
        return dict(self.__dict__)


class Transformer(Network):
    """Embedding, blocks, final norm and rotary tables."""

    def __init__(self, config: GPTNeoXConfig, formats: Callable[[str], Format] | None = None) -> None:
        """formats: of each linear layer by its full name; None: as the config says."""
        super().__init__(config)
        _check_room(config)
        formats = formats or formats_of(config.quantization_config)
        # from_pretrained: nn.Embedding's own random numbers would, on the meta device, import all of torch's compiler
        self.embed_in = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(GPTNeoXLayer(config, i, formats) for i in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary = Rotary(config)
        self.initialize()

    @property
    def blocks(self) -> list[GPTNeoXLayer]:
        """The layers, as a typed list."""
        return list(self.layers)  # type: ignore[arg-type]


def _check_room(config: GPTNeoXConfig) -> None:
    """Refuse a model that memory does not hold, whose random weights would otherwise end the process."""
    if on_meta():
        return
    count, dtype, free = config.num_parameters, torch.get_default_dtype(), free_memory()[1]
    if config.quantization_config is None and free is not None and count * dtype.itemsize > free:
        raise ArgumentError(
            f"GPTNeoXModel(config): {count} weights of {dtype.itemsize} bytes take "
            f"{count * dtype.itemsize / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free; give a smaller config, or load "
            "a checkpoint with from_pretrained(..., quantization='int4')"
        )
