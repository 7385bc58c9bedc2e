"""What Hugging Face's classes share: loading, saving, moving, and the padded forward pass; and the bare model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..cache import Batch, KVCache
from ..config import GPTNeoXConfig
from ..core import inputs
from ..core.network import Network, Transformer
from ..core.runner import Runner
from ..core.source import identities
from ..errors import ArgumentError, UnsupportedError
from ..formats import Format
from ..generation.outputs import ModelOutput
from ..kernels.backend import Backend
from ..layers import Linear
from ..loading.apply import warm
from ..loading.load import from_pretrained
from ..loading.options import LoadOptions
from ..loading.save import save_pretrained

Model = TypeVar("Model", bound="GPTNeoXPreTrainedModel")

# Methods that scripts call, and what stands for them here.
ABSENT = {
    "gradient_checkpointing_enable": "this package is for inference; train with transformers, then load the result",
    "push_to_hub": "save_pretrained, then `neox-lite push`",
    "resize_token_embeddings": "a model's vocabulary stays as it is; resize it with transformers, then load the result",
    "to_bettertransformer": "the kernels are chosen for the device; leave it out",
}
# Options of transformers' save_pretrained: the values that ask for what is done anyway, and what to do for others.
SAVE_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "is_main_process": ((True,), "call it in the main process only"),
    "state_dict": ((None,), "load_state_dict, then save"),
    "push_to_hub": ((False,), "save_pretrained, then `neox-lite push`"),
    "safe_serialization": ((True, None), "weights are always written as safetensors; leave it out"),
    "variant": ((None,), "rename the files afterwards"),
    "token": ((None, True, False), "it is for push_to_hub: `neox-lite push`"),
    "save_peft_format": ((True, False), "leave it out"),
    "save_original_format": ((True, False), "leave it out"),
    "distributed_checkpoint": ((False,), "a model is in one process; leave it out"),
}
# Copies and pickles bind their own kernels and have their own cache.
NOT_COPIED = {"_runner", "_cache_holder"}


@dataclass(frozen=True)
class Packed:
    """One forward pass: x (tokens, hidden) before the final norm, and where each token stands in the padded batch."""

    x: Tensor
    keep: Tensor  # (batch, width) bool
    cache: KVCache | None  # None: it is not to be returned
    hidden_states: tuple[Tensor, ...] | None

    def unpack(self, flat: Tensor) -> Tensor:
        """flat (tokens, n) -> (batch, width, n), zeros at masked positions."""
        return inputs.pad(flat, self.keep)


class GPTNeoXPreTrainedModel(Network):
    """A network with Hugging Face's methods, and the kernels that are bound to it when it first runs."""

    config_class = GPTNeoXConfig
    main_input_name = "input_ids"
    _runner: Runner | None = None

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in ABSENT:
                raise
        raise AttributeError(f"{type(self).__name__} has no {name}: {ABSENT[name]}")

    # Loading and saving -----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[Model], pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> Model:
        """Load a folder or hub id. Options: those of `LoadOptions`."""
        return from_pretrained(cls, pretrained_model_name_or_path, LoadOptions.parse(options))

    @classmethod
    def from_config(cls: type[Model], config: GPTNeoXConfig) -> Model:
        """Random weights, as `cls(config)`: what transformers' Auto classes call it."""
        return cls(config)

    @classmethod
    def can_generate(cls) -> bool:
        return hasattr(cls, "generate")

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB", **options: Any
    ) -> None:
        """Write config.json, the weights and their manifest; the folder opens here and in transformers.

        Other options are transformers', at the values that ask for this.
        """
        for name, value in options.items():
            if name not in SAVE_OPTIONS:
                raise ArgumentError(f"save_pretrained knows no option {name!r}")
            allowed, instead = SAVE_OPTIONS[name]
            if value not in allowed:
                raise UnsupportedError(f"save_pretrained({name}={value!r}): {instead}")
        save_pretrained(self, Path(save_directory), max_shard_size)

    def warm(self, progress: Callable[[int, int], object] | None = None) -> None:
        """Read mapped weights from the disk now rather than token by token; progress gets bytes done and in all."""
        warm(self, progress)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in NOT_COPIED}

    # Place ------------------------------------------------------------------------------------------------------------

    @property
    def name_or_path(self) -> str:
        """What it was loaded from; empty for a model built from a config."""
        return self.source.name or ""

    @property
    def hf_device_map(self) -> dict[str, torch.device]:
        """Where parts are that were placed apart, so that transformers' pipelines and Trainer leave them there.

        There is none, as in transformers, where all parts are on one device.
        """
        if self.placement is None:
            raise AttributeError("hf_device_map: all parts are on one device")
        base, prefix = self.base_model, "" if self.base_model is self else f"{self.base_model_prefix}."
        ends = {"embed_in": base.embed_in.weight.device, "final_layer_norm": base.final_layer_norm.weight.device}
        layers = {f"layers.{i}": layer.device for i, layer in enumerate(base.blocks)}
        heads = {name: head.handle.device for name, head in self.heads.items()}
        return {f"{prefix}{name}": device for name, device in (ends | layers).items()} | heads

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

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embed_in

    # Running ----------------------------------------------------------------------------------------------------------

    @property
    def runner(self) -> Runner:
        """The kernels, bound on the first call after loading, moving or another setting."""
        if self._runner is None or self._runner.version != self.version:
            self._runner = Runner(self)
        return self._runner

    @property
    def ops(self) -> Backend:
        """The operations where the head is. Set, they are used everywhere, until the model moves or changes."""
        return self.runner.ops

    @ops.setter
    def ops(self, ops: Backend) -> None:
        self.version += 1
        self._runner = Runner(self, ops)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of activations between operations."""
        return self.runner.layers.first_dtype

    def refresh(self) -> None:
        """Bind anew where a tensor is not the one that was bound: layers that are streamed are read from elsewhere."""
        if self._runner is not None and self._runner.watch.changed():
            self.version += 1

    def _cache_key(self) -> Any:
        """What cached keys and values depend on; a weight that was written to or replaced changes it."""
        self.refresh()
        return self.kv, self.version, identities(self)

    def _packed(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        output_hidden_states: bool | None = None,
        use_cache: bool | None = None,
        **other: Any,
    ) -> Packed:
        """Check the arguments of a forward pass, drop masked tokens and run the blocks. None: as the config says."""
        # 1. Arguments as packed tokens; `cache` is transformers' later name of past_key_values.
        if (cache := other.pop("cache", None)) is not None:
            past_key_values = cache
        inputs.check_options(other)
        self.refresh()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache is None:
            use_cache = self.config.use_cache
        given = inputs.pack(
            self.config, past_key_values, input_ids, attention_mask, position_ids, inputs_embeds, use_cache
        )
        cache = past_key_values if past_key_values is not None else KVCache(self.new_pool(), len(given.counts))
        # 2. The pass.
        runner = self.runner
        seen: list[Tensor] = []
        batch = Batch.reserve(cache.pool, cache.block_tables, given.counts, given.positions)
        x = runner.embed(given.tokens) if given.are_ids else runner.layers.to_first(given.tokens)
        x = runner.hidden_states(x, cache.pool, batch, seen.append if output_hidden_states else None)
        if use_cache or past_key_values is not None:
            cache.append(given.keep)
        # 3. Hidden states, the last one after the final norm.
        packed = Packed(x, given.keep, cache if use_cache else None, None)
        if not output_hidden_states:
            return packed
        states = tuple(packed.unpack(h).to(self.dtype) for h in (*seen, runner.final_norm(x)))
        return replace(packed, hidden_states=states)

    def _output(self, return_dict: bool | None, **values: Any) -> Any:
        """return_dict None: as the config says."""
        output = ModelOutput(**values)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class GPTNeoXModel(GPTNeoXPreTrainedModel, Transformer):
    """The bare transformer: ids -> last hidden states."""

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
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            past_key_values,
            output_hidden_states,
            use_cache,
            **other,
        )
        return self._output(
            return_dict,
            last_hidden_state=packed.unpack(self.runner.final_norm(packed.x)).to(self.dtype),
            past_key_values=packed.cache,
            hidden_states=packed.hidden_states,
        )


class Headed(GPTNeoXPreTrainedModel):
    """A base model under `gpt_neox` and one output layer."""

    head_name: str

    def __init__(
        self, config: GPTNeoXConfig, features: int, bias: bool, formats: Callable[[str], Format] | None
    ) -> None:
        super().__init__(config)
        self.gpt_neox = GPTNeoXModel(config, formats)
        setattr(self, self.head_name, Linear(config.hidden_size, features, bias))
        self.initialize()

    @property
    def head(self) -> Linear:
        return getattr(self, self.head_name)
