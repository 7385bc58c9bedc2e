"""A model of a given shape with random weights, in memory or as a folder: as fast as a trained one. It says nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.checkpoint.safetensors_file import Spec
from neox_lite.errors import ArgumentError, FormatError
from neox_lite.formats import DENSE, GROUP_SIZES, NF4, Dense, Format, GroupInt, formats_of, quantization_config
from neox_lite.formats.nf4 import LEVELS
from neox_lite.formats.weight import Specs
from neox_lite.layers import Linear
from neox_lite.loading.save import Part, write_model
from neox_lite.offload.plan import ModelSizes, sizes_of

from .family import FAMILY

Progress = Callable[[int, int], None]  # bytes made so far, bytes in all

# Layers, hidden size, heads, vocabulary. The inner size is four times the hidden one, the context 2048 tokens.
SHAPES = {
    {"gpt-neox-20b": "20b"}.get(m.name, m.name): (m.layers, m.hidden, m.heads, m.vocabulary)
    for m in FAMILY
    if m.id.startswith("EleutherAI/") and m.rotary == 0.25
}
DTYPE = torch.float16
CPU = torch.device("cpu")
BLOCK = 1 << 24  # random words that all weights repeat: 64 MB, made in a moment
STRIDE = 1_000_003  # each tensor starts elsewhere in the block


def config_of(shape: str) -> GPTNeoXConfig:
    """The config of a named shape or of "LxHxA". Raises ArgumentError for other texts, ConfigError for what cannot be."""
    found = re.fullmatch(r"(\d{1,4})x(\d{1,6})x(\d{1,4})", shape)
    if found is None and shape not in SHAPES:
        raise ArgumentError(
            f"--shape is {shape!r}, expected {', '.join(SHAPES)}, or layers x hidden size x heads such as 24x2048x16"
        )
    layers, hidden, heads, vocab = (*map(int, found.groups()), 50304) if found else SHAPES[shape]
    return GPTNeoXConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        vocab_size=vocab,
        max_position_embeddings=2048,
        dtype="float16",
        architectures=["GPTNeoXForCausalLM"],
    )


class RandomModel:
    """A model of `config` whose blocks' linear layers have a format, planned: its values are made as they are asked for.

    small_head: the vocabulary head is int8. Raises FormatError where a format does not suit the shape.
    """

    def __init__(self, config: GPTNeoXConfig, format: Dense | GroupInt | NF4, small_head: bool = False) -> None:
        scheme = None if format == DENSE else quantization_config(format)
        self.config = config.copy(quantization_config=scheme)
        with torch.device("meta"):
            self.model = GPTNeoXForCausalLM(self.config)
            self.small_head = _small_head(self.model.embed_out) if small_head else None
        for name, module in self.model.named_modules():
            if isinstance(module, Linear) and (reason := module.format.why_not(module.shape)) is not None:
                raise FormatError(f"{name}: {reason}")

    @property
    def sizes(self) -> ModelSizes:
        """Bytes of the parts, with the one head that is in use."""
        sizes = sizes_of(
            self.config, formats_of(self.config.quantization_config), DTYPE, DTYPE, self.small_head is not None
        )
        return replace(sizes, head=sizes.small_head or sizes.head, small_head=None)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, with the one head that is in use."""
        modules = [m for m in self.model.modules() if self.small_head is None or m is not self.model.embed_out]
        every = [*modules, *([self.small_head] if self.small_head is not None else [])]
        return sum(Spec("", *spec).nbytes for module in every for spec in _specs(module).values())

    def build(self, progress: Progress, device: torch.device = CPU) -> GPTNeoXForCausalLM:
        """The model in a device's memory, its rotary table in the host's; the plan is used up."""
        model, noise, total, done = self.model, _Noise(device), self.nbytes, 0
        if self.small_head is not None:
            model.embed_out = self.small_head
        for module in model.modules():
            for key in _specs(module):
                value = _value(module, key, noise)
                done += value.nbytes
                is_parameter = key in module._parameters
                setattr(module, key, nn.Parameter(value, requires_grad=False) if is_parameter else value)
                progress(done, total)
        return model

    def write(self, folder: Path, progress: Progress) -> None:
        """A folder to load like any other; it holds the head in 16 bits too. At most one tensor is in memory."""
        noise, done = _Noise(), 0
        parts = [_part(name, module, noise) for name, module in self.model.named_modules() if _specs(module)]
        head = _part("embed_out", self.small_head, noise) if self.small_head is not None else None
        total = sum(spec.nbytes for part in [*parts, *([head] if head else [])] for spec in part.specs)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        write_model(folder, self.config, parts, {}, head, progress=advance, method="random")


def _small_head(head: Linear) -> Linear:
    """An int8 head of the same shape, in the largest groups that fit, as the quantizer makes it."""
    size = next((g for g in reversed(GROUP_SIZES) if head.in_features % g == 0), None)
    if size is None:
        raise FormatError(f"embed_out: {GroupInt(8, GROUP_SIZES[0]).why_not(head.shape)}")
    small = Linear(head.in_features, head.out_features, False)
    small.become(GroupInt(8, size), DTYPE)
    return small


def _specs(module: nn.Module) -> Specs:
    """Key -> (dtype, shape) of a module's own tensors that a folder holds."""
    dense: Specs = {key: (DTYPE, tuple(p.shape)) for key, p in module._parameters.items() if p is not None}
    return {**module.format.specs(module.shape, DTYPE), **dense} if isinstance(module, Linear) else dense


def _part(name: str, module: nn.Module, noise: _Noise) -> Part:
    def rows() -> Iterator[tuple[str, Tensor, int]]:
        for key in _specs(module):
            yield f"{name}.{key}", _value(module, key, noise), 0

    format = module.format if isinstance(module, Linear) else DENSE
    every = _specs(module).items()
    return Part([Spec(f"{name}.{key}", kind, own, format.file_shape(key, own)) for key, (kind, own) in every], rows)


def _value(module: nn.Module, key: str, noise: _Noise) -> Tensor:
    """Weights with which activations stay of order one: rows of about unit length, norms the identity, biases zero."""
    kind, shape = _specs(module)[key]
    if key == "bias":
        return torch.zeros(shape, dtype=kind, device=noise.device)
    if isinstance(module, nn.LayerNorm):
        return torch.ones(shape, dtype=kind, device=noise.device)
    if not isinstance(module, Linear):  # the embedding
        return noise.normal(shape)
    if key in (constants := module.format.constants(module.shape)):
        return constants[key].to(noise.device)
    if module.format == DENSE:
        return noise.normal(shape).mul_(module.in_features**-0.5)
    if not kind.is_floating_point:
        return noise.words((*shape[:-1], shape[-1] * kind.itemsize // 4)).view(kind)
    return noise.scales(shape).to(kind).mul_(module.in_features**-0.5 / _codes_std(module.format))


def _codes_std(format: Format) -> float:
    """Of codes that are all equally frequent."""
    if isinstance(format, GroupInt):
        return math.sqrt((4.0**format.bits - 1) / 12)
    return math.sqrt(sum(level**2 for level in LEVELS) / len(LEVELS))


class _Noise:
    """Random numbers as fast as memory is written: blocks made once and repeated."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.device, generator = device, torch.Generator().manual_seed(0)
        self._words = torch.randint(-(1 << 31), 1 << 31, (BLOCK,), dtype=torch.int32, generator=generator)
        self._normal = torch.randn(BLOCK >> 4, generator=generator).to(DTYPE)
        self._scales = (1.5 - torch.rand(BLOCK >> 4, generator=generator)).to(DTYPE)
        self._scales[::2] *= -1  # the mean code is -1/2, which scales of one sign would turn into a bias
        self._words, self._normal, self._scales = (t.to(device) for t in (self._words, self._normal, self._scales))
        self._start = 0

    def words(self, shape: tuple[int, ...]) -> Tensor:
        return self._repeated(self._words, shape)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return self._repeated(self._normal, shape)

    def scales(self, shape: tuple[int, ...]) -> Tensor:
        """Half to one and a half, of either sign."""
        return self._repeated(self._scales, shape)

    def _repeated(self, block: Tensor, shape: tuple[int, ...]) -> Tensor:
        out = torch.empty(shape, dtype=block.dtype, device=block.device)
        flat, done = out.view(-1), 0
        self._start += STRIDE
        at = self._start % len(block)
        while done < len(flat):
            piece = block[at : at + len(flat) - done]
            flat[done : done + len(piece)] = piece
            done, at = done + len(piece), 0
        return out
