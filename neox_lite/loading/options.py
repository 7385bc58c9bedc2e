"""What `from_pretrained` can be asked for: names, bounds, and what to use instead of what is refused. Loads nothing."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ..config import FIELDS, GPTNeoXConfig
from ..errors import ArgumentError, UnsupportedError
from ..formats import make_format
from ..hub import USUAL, Access
from ..offload.plan import PlacementRequest
from ..units import parse_bytes, parse_dtype

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
# Those that could not change a result: a warning names them.
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
    access: settings for the hub; its fields, cache_dir, token and local_files_only, are options of their own.
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
    def placement_request(self) -> PlacementRequest:
        return PlacementRequest(self.device_map, self.max_memory, self.context, self.kv, self.head)


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
