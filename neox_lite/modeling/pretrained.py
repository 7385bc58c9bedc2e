"""GPTNeoXModel, GPTNeoXForCausalLM and the task heads: Hugging Face's names and meanings over packed tokens.

Padding is dropped on the way in and put back as zeros on the way out. Knows no file and no kernel.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..cache import Batch, BlockTable, KVCache, PagePool
from ..checkpoint.adapter import Adapter
from ..config import GPTNeoXConfig
from ..errors import ArgumentError, ContextLengthError, GraphError, UnsupportedError
from ..formats import DENSE, Format, formats_of
from ..generation.mixin import Event, GenerationMixin
from ..kernels.backend import Backend, Choice, Decoder, Flight
from ..kernels.captured import MOST_TOKENS
from ..layers import GPTNeoXLayer, Linear, Rotary, norm_of
from ..loading import load
from ..loading import save as saving
from ..loading.options import LoadOptions
from ..loading.skeleton import Source, identity_of
from ..offload.accelerator import Accelerator
from ..offload.plan import KINDS, Plan
from ..offload.profile import free_memory
from ..offload.run import Placement, Runner
from ..outputs import ModelOutput
from ..units import dtype_name

Model = TypeVar("Model", bound="GPTNeoXPreTrainedModel")
Result = TypeVar("Result")

REFUSED = {
    "output_attentions": "attention weights are never materialized",
    "head_mask": "heads cannot be masked",
    "encoder_hidden_states": "GPT-NeoX has no cross attention",
}
ABSENT = {  # methods that scripts call, and what stands for them here
    "gradient_checkpointing_enable": "this package is for inference; train with transformers, then load the result",
    "push_to_hub": "save_pretrained, then `neox-lite push`",
    "resize_token_embeddings": "a model's vocabulary stays as it is; resize it with transformers, then load the result",
    "to_bettertransformer": "the kernels are chosen for the device; leave it out",
}
OWN = {"_runner", "_cache_holder", "_tables", "_addresses"}  # what copies do not share
ACCEPTED = {"cache_position", "token_type_ids"}  # say nothing that the other arguments do not


@dataclass(frozen=True)
class Packed:
    """One forward pass: x (tokens, hidden) before the final norm, and where each token stands in the padded batch."""

    x: Tensor
    keep: Tensor  # (rows, width) bool
    cache: KVCache
    hidden_states: tuple[Tensor, ...] | None

    def unpack(self, flat: Tensor) -> Tensor:
        """flat (tokens, n) -> (rows, width, n), zeros at masked positions."""
        return pad(flat, self.keep)


def pad(flat: Tensor, keep: Tensor) -> Tensor:
    """flat (tokens, n), keep (rows, width) bool marking that many places -> (rows, width, n), zeros elsewhere."""
    out = flat.new_zeros(*keep.shape, flat.shape[-1])
    out[keep.to(flat.device)] = flat
    return out


class GPTNeoXPreTrainedModel(nn.Module):
    """What all classes share: loading, saving, moving, and the packed forward pass."""

    base_model_prefix = "gpt_neox"
    config: GPTNeoXConfig

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.config = config
        self.source = Source()
        self.adapter: Adapter | None = None  # what it was loaded with
        self.kv = "fp16"
        self.cache_pages = None
        self.first_pages: int | None = None  # pages that the prefix cache's pool starts with
        self._exact = False
        self.graph = True  # run decode steps as CUDA graphs where that can be; see GPTNeoXForCausalLM.graph_reason
        self.placement: Placement | None = None  # None: all parts are where the embedding is
        self.plan: Plan | None = None  # what the loader placed it by, with predicted bytes and times
        self.accelerator: Accelerator | None = None  # what the placement's "gpu" is
        self._runner: Runner | None = None
        self._bound: list[tuple[int, int]] = []  # the tensors that the runner was made for
        self._tables: list[dict[str, Any]] = []  # in which modules keep those
        self._addresses: list[int] = []
        super().train(False)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in ABSENT:
                raise
        raise AttributeError(f"{type(self).__name__} has no {name}: {ABSENT[name]}")

    # Loading and saving -----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls: type[Model], name: str | os.PathLike[str], **options: Any) -> Model:
        """Load a folder or hub id. Options: those of `LoadOptions`."""
        return load.from_pretrained(cls, name, LoadOptions.parse(options))

    @classmethod
    def from_config(cls: type[Model], config: GPTNeoXConfig) -> Model:
        """Random weights, as `cls(config)`: what transformers' Auto classes call it."""
        return cls(config)

    @classmethod
    def can_generate(cls) -> bool:
        return issubclass(cls, GenerationMixin)

    def save_pretrained(self, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write config.json, the weights and their manifest; the folder opens here and in transformers."""
        saving.save_pretrained(self, Path(folder), max_shard_size)

    def _initialize(self) -> None:
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

    # The KV cache -----------------------------------------------------------------------------------------------------

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
    def exact(self, wanted: bool) -> None:
        if wanted != self._exact:
            self._exact = wanted
            self._unbind()

    def new_pool(self, pages: int = 0, limit: int | None = None) -> PagePool:
        """An empty KV cache pool for this model's layers, of the kind that `kv` names. limit: None for `cache_pages`."""
        config, dtype = self.config, torch.int8 if self.kv == "int8" else self.dtype
        devices = [layer.device for layer in self.base_model.blocks]
        limit = self.cache_pages if limit is None else limit
        return PagePool(config.num_attention_heads, config.head_dim, dtype, devices, pages, limit)

    # Placement --------------------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> GPTNeoXModel:
        base = getattr(self, self.base_model_prefix, self)
        assert isinstance(base, GPTNeoXModel)
        return base

    @property
    def dtype(self) -> torch.dtype:
        return self.base_model.embed_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.base_model.embed_in.weight.device

    @property
    def hf_device_map(self) -> dict[str, torch.device] | None:
        """Where parts are that were placed apart, so that transformers' pipelines leave them there; None: all on one device."""
        if self.placement is None:
            return None
        base, prefix = self.base_model, "" if self.base_model is self else f"{self.base_model_prefix}."
        ends = {"embed_in": base.embed_in.weight.device, "final_layer_norm": base.final_layer_norm.weight.device}
        layers = {f"layers.{i}": layer.device for i, layer in enumerate(base.blocks)}
        heads = {name: part.handle.device for name, part in self.named_children() if isinstance(part, Linear)}
        return {f"{prefix}{name}": device for name, device in (ends | layers).items()} | heads

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of activations between operations."""
        return self.runner.first_dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPTNeoXPreTrainedModel:
        for weight in self._plain_on_disk():
            if fn(weight[:0]).dtype != weight.dtype:
                raise UnsupportedError(
                    f"layers on the disk stay {weight.dtype}, as their files hold them; load the model with another dtype, "
                    "and more memory, instead of converting it"
                )
        self._unbind()  # kernels are bound again on the next call
        if self.placement is not None and any(fn(torch.empty(0, device=d)).device != d for d in self._devices()):
            self.placement = self.accelerator = None  # all of it moves to one device
        return super()._apply(fn, recurse)

    def _devices(self) -> set[torch.device]:
        return {tensor.device for tensor in (*self.parameters(), *self.buffers())}

    def _plain_on_disk(self) -> list[Tensor]:
        """Weights of layers that stay on the disk, but for quantized ones, whose dtypes nothing changes."""
        tiers = self.placement.layers if self.placement is not None else ()
        layers = [layer for tier, layer in zip(tiers, self.base_model.blocks, strict=False) if tier == "disk"]
        linears = [m for layer in layers for m in layer.modules() if isinstance(m, Linear)]
        return [m.handle.tensors["weight"] for m in linears if m.format == DENSE]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles bind their own kernels and have their own cache."""
        if self.placement is not None and "disk" in self.placement.layers:
            raise UnsupportedError("a model with layers on the disk cannot be copied or pickled; load it again")
        return {name: value for name, value in self.__dict__.items() if name not in OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._unbind()

    def rebind(self, placement: Placement, accelerator: Accelerator | None) -> None:
        """Run from now on as parts have been placed."""
        self._unbind()
        self.placement, self.accelerator = placement, accelerator

    def _weights_key(self) -> list[tuple[int, int]]:
        """Changes when a tensor is written to or replaced."""
        return [identity_of(t) for t in (*self.parameters(), *self.buffers())]

    def _notice_moves(self) -> None:
        """Bind anew where a tensor lies elsewhere than what was captured reads it; one written to in place does not."""
        if self._addresses != self._addresses_now():
            self._unbind()

    def _addresses_now(self) -> list[int]:
        return [tensor.data_ptr() for table in self._tables for tensor in table.values() if tensor is not None]

    def _refresh(self) -> None:
        """Bind anew where a tensor is not the one that was bound: layers that pass through slots are read from elsewhere."""
        if self._runner is not None and self._bound != self._weights_key():
            self._unbind()

    def _unbind(self) -> None:
        self.__dict__.update(_runner=None, _cache_holder=None, _tables=[], _addresses=[])

    def cuda(self: Model, device: int | torch.device | None = None) -> Model:
        """Move all of it to a GPU. Raises ArgumentError where torch sees none; device_map="auto" takes what fits."""
        if not torch.cuda.is_available():
            raise ArgumentError("cuda(): torch sees no CUDA device here; leave .cuda() out to run on the CPU")
        return super().cuda(device)

    def to(self: Model, *args: Any, **kwargs: Any) -> Model:
        """Move, or change the dtype of dense tensors and activations; codes, scales and rotary tables stay as they are."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and device.type == "cuda" and not torch.cuda.is_available():
            raise ArgumentError(f"to({str(device)!r}): torch sees no CUDA device here; use 'cpu'")
        return super().to(*args, **kwargs)

    def train(self: Model, mode: bool = True) -> Model:
        if mode:
            raise UnsupportedError(
                "train(): this package is for inference; train with transformers, then load the result"
            )
        return super().train(False)

    def num_parameters(self) -> int:
        """Weights counted as numbers, whatever format stores them."""
        linears = [m for m in self.modules() if isinstance(m, Linear) and m.format != DENSE]
        return sum(p.numel() for p in self.parameters()) + sum(m.in_features * m.out_features for m in linears)

    def get_memory_footprint(self) -> int:
        """Bytes of all weights and tables."""
        return sum(t.nbytes for t in {id(t): t for t in (*self.parameters(), *self.buffers())}.values())

    def warm(self, progress: Callable[[int, int], object] | None = None) -> None:
        """Read mapped weights from the disk now rather than token by token; progress is told bytes done and in all."""
        load.warm(self, progress)

    # Running ----------------------------------------------------------------------------------------------------------

    @property
    def runner(self) -> Runner:
        """What runs the layers, with kernels chosen on the first call after loading or moving."""
        return self._runner or self._bind()

    def _bind(self, ops: Backend | None = None) -> Runner:
        base = self.base_model
        placement = self.placement or Placement.alone("cpu" if self.device.type == "cpu" else "gpu", len(base.layers))
        origins = [self.source.origins_in(layer, f"layers.{i}.") for i, layer in enumerate(base.blocks)]
        self._bound = self._weights_key()
        tables = [table for module in self.modules() for table in (module._parameters, module._buffers)]
        self._tables = [table for table in tables if table]
        self._addresses = self._addresses_now()
        self._runner = Runner(
            base.blocks, base.rotary.table, self.dtype, placement, self.exact, self.accelerator, origins, ops
        )
        return self._runner

    @property
    def ops(self) -> Backend:
        """The operations where the head is. Set, they are used everywhere, until the model moves or changes."""
        return self.runner.last

    @ops.setter
    def ops(self, ops: Backend) -> None:
        self._unbind()
        self._bind(ops)

    def run_layers(
        self, x: Tensor, pool: PagePool, batch: Batch, each: Callable[[Tensor], Any] | None = None
    ) -> Tensor:
        """x (tokens, hidden) through all blocks; `each` sees the input of every block. Tokens are cached on success."""
        x = self.runner(x, pool, batch, each)
        batch.commit()
        return x

    def _packed(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        output_hidden_states: bool | None = None,
        **other: Any,
    ) -> Packed:
        """Check the arguments of a forward pass, drop masked tokens and run the blocks."""
        check_options(other)
        self._refresh()
        tensors = {"attention_mask": attention_mask, "position_ids": position_ids}
        for name, value in {**tensors, "input_ids": input_ids, "inputs_embeds": inputs_embeds}.items():
            if value is not None and not isinstance(value, Tensor):
                raise ArgumentError(f"{name} is a {type(value).__name__}, expected a tensor: return_tensors='pt'")
        given = _exactly_one(input_ids, inputs_embeds, self.config.hidden_size)
        rows, width = given.shape[:2]
        cache = past_key_values if past_key_values is not None else KVCache(self.new_pool(), rows)
        self._check_cache(cache, rows)
        keep = _keep(attention_mask, rows, width, cache)
        positions = self._positions(position_ids, rows, width, cache.width)[keep]
        batch = Batch.reserve(cache.pool, cache.block_tables, keep.sum(1).tolist(), positions)
        if input_ids is not None:
            x = self._embed(input_ids.cpu()[keep])
        else:
            x = self.runner.to_first(given[keep.to(given.device)])
        seen: list[Tensor] = []
        x = self.run_layers(x, cache.pool, batch, seen.append if output_hidden_states else None)
        cache.append(keep)
        packed = Packed(x, keep, cache, None)
        if not output_hidden_states:
            return packed
        last = self.ops.final_norm(x, norm_of(self.base_model.final_layer_norm))
        states = tuple(packed.unpack(h).to(self.dtype) for h in (*seen, last))
        return Packed(x, keep, cache, states)

    def _check_cache(self, cache: Any, rows: int) -> None:
        if not isinstance(cache, KVCache):
            raise UnsupportedError(
                f"past_key_values is a {type(cache).__name__}; pass back what forward() returned, a neox_lite KVCache"
            )
        if len(cache) != rows:
            raise ArgumentError(f"past_key_values holds {len(cache)} rows, but the call has {rows}")
        found = len(cache.pool.storage), cache.pool.storage[0].shape[2], cache.pool.storage[0].shape[4]
        own = self.config.num_hidden_layers, self.config.num_attention_heads, self.config.head_dim
        if found != own:
            raise ArgumentError(
                f"past_key_values is of another model: (layers, heads, head size) are {found}, expected {own}"
            )

    def _embed(self, ids: Tensor) -> Tensor:
        """ids (tokens,) -> x (tokens, hidden); ids outside the vocabulary are named."""
        ids = self._check_ids(ids)
        return self.runner.first.embed(ids, self.base_model.embed_in.weight, self.compute_dtype)

    def _check_ids(self, ids: Tensor) -> Tensor:
        ids = ids.long()  # before comparing: a narrower type would wrap the vocabulary's size
        wrong = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(wrong):
            raise ArgumentError(f"input_ids: found {wrong[0].item()}, expected 0 to {self.config.vocab_size - 1}")
        return ids

    def _positions(self, position_ids: Tensor | None, rows: int, width: int, past: int) -> Tensor:
        """Rotary positions (rows, width) on the CPU, refused beyond the context."""
        limit = self.config.max_position_embeddings
        if position_ids is None:
            positions = torch.arange(past, past + width).expand(rows, width)
        else:
            positions = position_ids.cpu()
            if positions.is_floating_point():
                raise ArgumentError(f"position_ids are {positions.dtype}, expected integers")
            positions = positions.long()
            if positions.dim() != 2 or positions.shape[1] != width or positions.shape[0] not in (1, rows):
                raise ArgumentError(f"position_ids are {tuple(positions.shape)}, expected {(rows, width)}")
            positions = positions.expand(rows, width)
        if positions.numel() and int(positions.min()) < 0:
            raise ArgumentError(f"position_ids: found {int(positions.min())}, expected 0 to {limit - 1}")
        if positions.numel() and int(positions.max()) >= limit:
            raise ContextLengthError(
                f"position {int(positions.max())} is outside the context: this model has {limit} positions "
                f"(max_position_embeddings), the call has {width} tokens after {past} cached ones"
            )
        return positions

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embed_in

    def _output(self, return_dict: bool | None, **values: Any) -> Any:
        output = ModelOutput(**values)
        return output.to_tuple() if return_dict is False else output


def check_options(other: dict[str, Any]) -> None:
    """Refuse arguments of a forward pass that would otherwise be ignored."""
    for name, value in other.items():
        if name in REFUSED and value is not None and value is not False:
            raise UnsupportedError(f"{name}: {REFUSED[name]}; leave it out")
        if name not in REFUSED and name not in ACCEPTED:
            raise ArgumentError(f"forward() knows no argument {name!r}")


def _exactly_one(input_ids: Tensor | None, inputs_embeds: Tensor | None, hidden: int) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise ArgumentError("give exactly one of input_ids and inputs_embeds")
    if input_ids is not None:
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ArgumentError(
                f"input_ids are {tuple(input_ids.shape)} {input_ids.dtype}, expected (batch, tokens) int64"
            )
        return input_ids
    assert inputs_embeds is not None
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != hidden:
        raise ArgumentError(f"inputs_embeds are {tuple(inputs_embeds.shape)}, expected (batch, tokens, {hidden})")
    return inputs_embeds


def _keep(mask: Tensor | None, rows: int, width: int, cache: KVCache) -> Tensor:
    """Which of the new tokens (rows, width) are real; the mask may also cover the cached columns, and then must agree."""
    if mask is None:
        return torch.ones(rows, width, dtype=torch.bool)
    if mask.dim() != 2:
        raise UnsupportedError(f"attention_mask has {mask.dim()} dimensions; expected (batch, tokens) of 0 and 1")
    past = cache.width
    if mask.shape[0] != rows or mask.shape[1] not in (width, past + width):
        raise ArgumentError(f"attention_mask is {tuple(mask.shape)}, expected {(rows, past + width)}")
    mask = mask.cpu()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ArgumentError("attention_mask holds values other than 0 and 1")
    keep = mask.bool()
    if past and keep.shape[1] == past + width:
        for row, columns in enumerate(cache.columns):
            if keep[row, :past].nonzero().flatten().tolist() != columns:
                raise ArgumentError(
                    f"attention_mask: row {row} masks cached tokens differently from when they were cached"
                )
    return keep[:, -width:] if width else keep[:, :0]


class GPTNeoXModel(GPTNeoXPreTrainedModel):
    """The bare transformer: ids -> last hidden states."""

    def __init__(self, config: GPTNeoXConfig, formats: Callable[[str], Format] | None = None) -> None:
        super().__init__(config)
        _check_room(config)
        formats = formats or formats_of(config.quantization_config)
        # from_pretrained: nn.Embedding's own random numbers would, on the meta device, import all of torch's compiler
        self.embed_in = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(GPTNeoXLayer(config, i, formats) for i in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary = Rotary(config)
        self._initialize()

    @property
    def blocks(self) -> list[GPTNeoXLayer]:
        """The layers, as a typed list."""
        return list(self.layers)  # type: ignore[arg-type]

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **other: Any,
    ) -> Any:
        """-> last_hidden_state (batch, tokens, hidden) in the model's dtype, past_key_values, hidden_states."""
        packed = self._packed(
            input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, output_hidden_states, **other
        )
        last = self.ops.final_norm(packed.x, norm_of(self.final_layer_norm))
        return self._output(
            return_dict,
            last_hidden_state=packed.unpack(last).to(self.dtype),
            past_key_values=cache_out(self, use_cache, packed),
            hidden_states=packed.hidden_states,
        )


def _check_room(config: GPTNeoXConfig) -> None:
    """Refuse a model that memory does not hold, whose random weights would otherwise end the process."""
    if torch.empty(0).device.type != "cpu":  # "meta", which from_pretrained starts with, takes none
        return
    count, dtype, free = config.num_parameters, torch.get_default_dtype(), free_memory()[1]
    if config.quantization_config is None and free is not None and count * dtype.itemsize > free:
        raise ArgumentError(
            f"GPTNeoXModel(config): {count} weights of {dtype_name(dtype)} take "
            f"{count * dtype.itemsize / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free; give a smaller config, or load "
            "a checkpoint with from_pretrained(..., quantization='int4')"
        )


def cache_out(model: GPTNeoXPreTrainedModel, use_cache: bool | None, packed: Packed) -> KVCache | None:
    return packed.cache if (model.config.use_cache if use_cache is None else use_cache) else None


class Headed(GPTNeoXPreTrainedModel):
    """A base model under `gpt_neox` and one output matrix."""

    head_name: str

    def __init__(
        self, config: GPTNeoXConfig, features: int, bias: bool, formats: Callable[[str], Format] | None
    ) -> None:
        super().__init__(config)
        self.gpt_neox = GPTNeoXModel(config, formats)
        setattr(self, self.head_name, Linear(config.hidden_size, features, bias))
        self._initialize()

    @property
    def head(self) -> Linear:
        return getattr(self, self.head_name)

    def _head(self, packed: Packed, rows: Tensor | None = None) -> Tensor:
        """Final norm and output matrix of some tokens (None: all) -> (tokens, features) float32."""
        norm = norm_of(self.gpt_neox.final_layer_norm)
        out = self.ops.head(packed.x, rows, norm, self.head.handle)
        return out if self.head.bias is None else out + self.head.bias.float()


class GPTNeoXForCausalLM(Headed, GenerationMixin):
    """The language model: ids -> float32 logits over the vocabulary, and `generate`."""

    head_name = "embed_out"
    embed_out: Linear

    def __init__(self, config: GPTNeoXConfig, formats: Callable[[str], Format] | None = None) -> None:
        super().__init__(config, config.vocab_size, False, formats)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings and self.embed_out.format == DENSE:
            self.embed_out.weight = self.gpt_neox.embed_in.weight

    @property
    def lm_head(self) -> Linear:
        return self.embed_out

    def get_output_embeddings(self) -> Linear:
        return self.embed_out

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **other: Any,
    ) -> Any:
        """-> loss, logits (batch, tokens, vocabulary) float32, past_key_values, hidden_states.

        labels (batch, tokens), -100 for "do not score": the loss is the mean cross entropy of each label given the
        tokens before it, leaving out labels whose preceding position is masked. logits_to_keep n > 0 computes the last
        n columns only.
        """
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ArgumentError(f"logits_to_keep is {logits_to_keep!r}, expected a number of columns")
        if logits_to_keep and labels is not None:
            raise ArgumentError("logits_to_keep and labels exclude each other: the loss needs all logits")
        packed = self._packed(
            input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, output_hidden_states, **other
        )
        shown = packed.keep.clone()
        if logits_to_keep:
            shown[:, : max(0, shown.shape[1] - logits_to_keep)] = False
        rows = shown[packed.keep].nonzero().flatten() if logits_to_keep else None
        flat = self._head(packed, rows)
        logits = pad(flat, shown)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return self._output(
            return_dict,
            loss=None if labels is None else _language_loss(logits, labels, packed.keep),
            logits=logits,
            past_key_values=cache_out(self, use_cache, packed),
            hidden_states=packed.hidden_states,
        )

    # What generation asks of a model (protocols.ModelRunner) ------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        pool: PagePool,
        block_tables: Sequence[BlockTable],
        tokens: Sequence[Sequence[int]],
        every: bool = False,
    ) -> Tensor:
        """Append tokens[i] to block_tables[i] -> float32 logits (sequences, vocabulary) after the last token of each.

        every: logits (tokens in all, vocabulary) after every token, sequence after sequence. Raises ContextLengthError, with
        nothing appended, for tokens beyond the model's positions.
        """
        counts, limit = [len(t) for t in tokens], self.config.max_position_embeddings
        for block_table, count in zip(block_tables, counts, strict=True):
            if block_table.length + count > limit:
                raise ContextLengthError(
                    f"{count} tokens after {block_table.length} cached ones do not fit: this model has {limit} positions "
                    "(max_position_embeddings)"
                )
        ids = self._check_ids(torch.tensor([i for t in tokens for i in t]))
        batch = Batch.reserve(pool, block_tables, counts)
        single = all(count == 1 for count in counts)
        small = single or (every and len(ids) <= MOST_TOKENS)
        logits = None
        if small:
            self._notice_moves()
            if single and (decoder := self._decoder_for(batch)) is not None:
                logits = self._captured(lambda: decoder.logits(pool, batch, ids.tolist()))
            if logits is None and self.runner.whole is not None:
                logits = self.runner.whole.run(self._every_token, ids, pool, batch)
        if logits is None and (single or every):
            logits = self._every_token(ids, pool, batch, small)
        elif logits is None:
            rows = torch.tensor(batch.offsets[1:]) - 1
            x = self.runner(self._embed(ids), pool, batch)
            logits = self.ops.head(x, rows, norm_of(self.gpt_neox.final_layer_norm), self.embed_out.handle)
        batch.commit()
        return logits

    def _every_token(self, ids: Tensor, pool: PagePool, batch: Batch, small: bool = False) -> Tensor:
        """ids (tokens,) of a batch's sequences, all in the vocabulary -> logits (tokens, vocabulary)."""
        x = self.runner.first.embed(ids, self.gpt_neox.embed_in.weight, self.compute_dtype)
        x = self.runner(x, pool, batch, small=small)
        return self.ops.head(x, None, norm_of(self.gpt_neox.final_layer_norm), self.embed_out.handle)

    # Steps as graphs (protocols.Ahead) ------------------------------------------------------------------------------------

    @property
    def graph_reason(self) -> str | None:
        """Why decode steps are not CUDA graphs that choose the next tokens themselves; None where they are."""
        found = self._decoder
        return found if isinstance(found, str) else None

    @property
    def _decoder(self) -> Decoder | str:
        if not self.graph:
            return "model.graph is off"
        runner = self.runner
        if runner.decoder is None:
            config, device = self.config, self.device
            if runner.whole is None:
                runner.decoder = "layers are outside the GPU, and between it and the CPU a step is the host's work"
            else:
                runner.decoder = runner.last.decoder(
                    self._every_token, device, config.vocab_size, config.max_position_embeddings
                )
        return runner.decoder

    def _decoder_for(self, batch: Batch) -> Decoder | None:
        found = self._decoder
        return None if isinstance(found, str) or found.why_not(batch) is not None else found

    def _captured(self, run: Callable[[], Result]) -> Result | None:
        """What a step gives that is to be a graph; None, from then on, where it cannot be captured."""
        try:
            return run()
        except GraphError as error:
            self.runner.decoder = str(error)
            warnings.warn(f"decode steps run without CUDA graphs, which is slower: {error}", stacklevel=3)
            return None

    @torch.no_grad()
    def launch(
        self,
        pool: PagePool,
        block_tables: Sequence[BlockTable],
        ids: Sequence[int],
        choices: Sequence[Choice],
        excluded: Tensor | None = None,
        previous: Flight | None = None,
    ) -> Flight | None:
        """Append an id to each sequence and have the next ones chosen, without waiting for it; see `Decoder.launch`.

        None, with nothing appended, where steps like it are no graphs.
        """
        self._notice_moves()
        if isinstance(self._decoder, str):
            return None
        limit = self.config.max_position_embeddings
        if any(block_table.length >= limit for block_table in block_tables):
            raise ContextLengthError(f"a sequence has {limit} tokens, all positions of this model")
        self._check_ids(torch.tensor([id for id in ids if id >= 0]))
        batch = Batch.reserve(pool, block_tables, [1] * len(ids))
        if (decoder := self._decoder_for(batch)) is None:
            return None
        flight = self._captured(lambda: decoder.launch(pool, batch, ids, choices, excluded, previous))
        if flight is not None:
            batch.commit()
        return flight

    def _cache_key(self) -> Any:
        """What cached keys and values depend on; a weight that was written to or replaced changes it."""
        self._refresh()
        return self.kv, self.exact, self._weights_key()

    def generate(self, input_ids: Tensor | None = None, **options: Any) -> Any:
        """Continue prompts (batch, tokens) -> ids with what follows, or return_dict_in_generate's. Options: those of `Options`
        and `Sampling`."""
        return self._generate(input_ids, options)

    def stream(self, prompt: str | Tensor | Sequence[int], **options: Any) -> Iterator[Event]:
        """Continue one prompt, yielding an `Event` for each token as it is chosen. Options: as of `generate`."""
        return self._stream(prompt, options)


def _language_loss(logits: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
    labels, keep = labels.to(logits.device), keep.to(logits.device)
    check_labels(labels, keep, logits.shape[-1])
    targets = torch.where(keep[:, :-1], labels[:, 1:], -100)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)


def check_labels(labels: Tensor, keep: Tensor, classes: int) -> None:
    if labels.is_floating_point():
        raise ArgumentError(f"labels are {labels.dtype}, expected integers")
    if labels.shape != keep.shape:
        raise ArgumentError(f"labels are {tuple(labels.shape)}, expected {tuple(keep.shape)}")
    if bool((labels[~keep] != -100).any()):
        raise ArgumentError("labels: a masked position has a label other than -100; set labels there to -100")
    wrong = labels[(labels != -100) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise ArgumentError(f"labels: found {wrong[0].item()}, expected -100 or 0 to {classes - 1}")
