"""A class and a checkpoint: proof that all tensors fit, then a model that holds them. Knows no device and no plan."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.adapter import Adapter
from ..checkpoint.reader import Checkpoint
from ..config import GPTNeoXConfig
from ..core.network import Network
from ..core.source import identity_of
from ..errors import CheckpointError, FormatError
from ..formats import DENSE, NF4, Format, GroupInt, formats_of, quantization_config, with_plain
from ..hub import Access, resolve_adapter
from ..layers import Linear
from ..offload.stream import Origin
from ..units import DTYPES, dtype_name
from .quantize import quantize_module

# A class leaves the heads of others alone; v_head is trl's value head.
HEADS = ("embed_out", "lm_head", "score", "classifier", "qa_outputs", "v_head")
# What compressed-tensors leaves beside weights that it has decompressed.
LEFT_OVER = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


class Skeleton:
    """A class built without memory, what a checkpoint calls each of its tensors, and the proof that all of them fit.

    target: the format that linear layers get from a plain checkpoint, one for all or by full name; None: the one the config
    says they have. dtype: what everything else gets with it.
    Raises FormatError or CheckpointError naming what does not fit.
    """

    def __init__(
        self,
        cls: type[Network],
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
        self.heads = list(self.model.heads)
        self.prefix = f"{self.model.base_model_prefix}." if self.heads else ""
        if target is not None:
            config.quantization_config = quantization_config(target, self.heads, dtype)
        self.tied = config.tie_word_embeddings and hasattr(self.model, "embed_out")
        self.fresh: list[str] = []  # task heads that the checkpoint lacks
        self.packed_heads = dict(self._packed_heads())
        if self.packed_heads:
            # What is saved from here has them plain.
            config.quantization_config = with_plain(config.quantization_config, self.packed_heads)
        self._check()

    def stored(self, name: str) -> str:
        """The checkpoint's name of a tensor: it may have or lack the base model's prefix, and call the head lm_head."""
        prefix, here = self.model.base_model_prefix + ".", self.checkpoint
        if name.startswith("embed_out.") and name not in here and (later := f"lm_head.{name[10:]}") in here:
            return later
        if name.partition(".")[0] in self.heads:
            return name
        has_prefix = any(n.startswith(prefix) for n in here.names())
        stored = prefix + name.removeprefix(prefix) if has_prefix else name.removeprefix(prefix)
        if stored.endswith("embed_in.weight") and stored not in here and self.model.config.tie_word_embeddings:
            # safetensors.torch.save_model keeps the first of two names for one tensor.
            return next((head for head in ("embed_out.weight", "lm_head.weight") if head in here), stored)
        return stored

    def is_encoded(self, module: nn.Module) -> bool:
        """Whether a module's dense weight is to be quantized on its way in."""
        return self.target is not None and isinstance(module, Linear) and module.format != DENSE

    def _packed_heads(self) -> Iterator[tuple[str, Linear]]:
        """Heads that the checkpoint holds quantized, which run plain here: a layer without memory that stands for each."""
        for name, head in self.model.heads.items():
            format: Format | None = None
            if self.stored(f"{name}.weight.absmax") in self.checkpoint:
                layers = (m.format for m in self.model.base_model.layers.modules() if isinstance(m, Linear))
                format = next((f for f in layers if isinstance(f, NF4)), None)
            elif (packed := self.stored(f"{name}.weight_packed")) in self.checkpoint:
                words = self.checkpoint.info(packed).shape
                groups = self.checkpoint.info(self.stored(f"{name}.weight_scale")).shape
                if len(words) == len(groups) == 2 and words[1] and groups[1]:
                    format = GroupInt(words[1] * 32 // head.in_features, head.in_features // groups[1])
            if format is not None:
                with torch.device("meta"):
                    yield name, Linear(head.in_features, head.out_features, head.bias is not None, format)

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules by name, as the checkpoint holds them."""
        for name, module in self.model.named_modules():
            yield name, self.packed_heads.get(name, module)

    def _check(self) -> None:
        if packed := [n for n in self.checkpoint.names() if n.endswith("embed_in.weight_packed")]:
            raise FormatError(
                f"{self.checkpoint.folder}: {packed[0]}: the embedding must be plain here; put 'gpt_neox.embed_in' into "
                "`ignore` and quantize again, or run neox-lite quantize on the original checkpoint"
            )
        floating = tuple(DTYPES.values())
        expected: dict[str, tuple[Sequence[int], tuple[torch.dtype, ...] | None]] = {}
        for name, module in self._modules():
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
        if self.model.config.was_decompressed:
            spare |= {n for n in self.checkpoint.names() if n.endswith(LEFT_OVER)} - expected.keys()
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
                    stored, needed = (dtype_name(kind) for kind in (info.dtype, dtype))
                    return f"{info.file.name} holds {stored}, and they are to be {needed}; pass dtype={stored!r}, or quantize"
        return None

    def adapter(self, name: str | os.PathLike[str] | None, access: Access) -> Adapter | None:
        """The adapter in a folder or under a hub id, proved to fit the model."""
        if name is None:
            return None
        head = next((head for head in self.heads if head != "embed_out"), None)
        folder, language = resolve_adapter(os.fspath(name), access), "embed_out" in self.heads
        return Adapter.open(folder, os.fspath(name), self.model.config, head, language)

    def fill(self, dtype: torch.dtype, following: Collection[str] = ()) -> Network:
        """Put every tensor in its place: mapped where dtype and format are the file's, else converted.

        following: tensors of heads that the checkpoint may lack, since they come from elsewhere.
        """
        encoded = {n: m for n, m in self.model.named_modules() if isinstance(m, Linear) and self.is_encoded(m)}
        for name, linear in _with_bar(encoded):
            quantize_module(linear, self.checkpoint, self.stored(f"{name}.weight"), dtype)
        for name, module in self._modules():
            for key, tensor in self._own_tensors(name, module):
                stored, last = self.stored(key), key.removeprefix(f"{name}.")
                if stored not in self.checkpoint or (last == "weight" and self.is_encoded(module)):
                    continue
                mapped = value = self.checkpoint.tensor(
                    stored, sparse=isinstance(module, nn.Embedding) and not self.tied
                )
                if last in module._parameters:
                    value = nn.Parameter(converted(value, dtype, stored), requires_grad=False)
                elif isinstance(module, Linear):
                    value = module.format.laid(last, value, tuple(tensor.shape))
                setattr(module, last, value)
                if value.data_ptr() == mapped.data_ptr() and name not in self.packed_heads:
                    self._note_origin(key, stored, value)
            if isinstance(module, Linear) and module.format != DENSE:
                module.format = self._opened(name, module, module._buffers)  # type: ignore[arg-type]
        for name, packed in self.packed_heads.items():
            head = self.model.heads[name]
            head.weight = nn.Parameter(packed.handle.decode(dtype), requires_grad=False)
            head.bias = packed.bias
        _initialize_heads(self.model, [n for n in self.fresh if n not in following], dtype, self.checkpoint.folder)
        if self.tied:
            self.model.tie_weights()
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


def converted(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
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


def _initialize_heads(model: Network, fresh: list[str], dtype: torch.dtype, folder: Path) -> None:
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
