"""The random model of a shape in every form that an engine of `engines.py` needs.

    python -m benchmarks.peers.model WHAT HOME SHAPE

All weights are the same in all forms: a linear weight is a 4-bit code times a scale of few digits, which int4, int8,
float16 and bfloat16 hold exactly; embedding and head are 8-bit codes times a power of two. So one float32 run of the
`reference` backend is the truth for all, and an engine's error is that of its arithmetic and of what its format rounds.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.engines import GROUP
from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.checkpoint.safetensors_file import Spec
from neox_lite.formats import DENSE, GroupInt, pack, quantization_config, unpack
from neox_lite.loading.save import Part, write_model
from neox_lite.units import dtype_name
from neox_lite_app.models import random_model
from neox_lite_quant import export_gguf

Rows = Iterator[tuple[str, Tensor, int]]  # full name, rows, first row
INT4, INT8 = GroupInt(4, GROUP), GroupInt(8, GROUP)


def config_of(shape: str) -> GPTNeoXConfig:
    """With the tanh form of GELU under the name that all engines run as one operation."""
    return random_model.config_of(shape).copy(hidden_act="gelu_pytorch_tanh", bos_token_id=0, eos_token_id=0)


class RandomModel:
    """A shape's weights: bits 4 or 8 for a quantized folder, 16 for a plain bfloat16 checkpoint. Bounded memory."""

    def __init__(self, shape: str, bits: int) -> None:
        self.bits = bits
        self.format = {4: INT4, 8: INT8, 16: DENSE}[bits]
        self.dtype = torch.bfloat16 if bits == 16 else torch.float16
        self.config = config_of(shape).copy(dtype=dtype_name(self.dtype))
        if bits < 16:
            self.config.quantization_config = quantization_config(self.format)
        with torch.device("meta"):
            self.model = GPTNeoXForCausalLM(self.config)

    def write(self, folder: Path) -> None:
        parts = []
        for name, module in self.model.named_modules():
            own = {**module._parameters, **module._buffers}
            own = {key: tensor for key, tensor in own.items() if tensor is not None and key != "table"}
            kinds = {key: self.dtype if t.is_floating_point() else t.dtype for key, t in own.items()}
            specs = [Spec(f"{name}.{key}", kinds[key], tuple(tensor.shape)) for key, tensor in own.items()]
            if specs:
                parts.append(Part(specs, lambda name=name, module=module: self.rows(name, module)))  # type: ignore[misc]
        sizes = INT8.specs((self.config.vocab_size, self.config.hidden_size), torch.float16)
        small = [Spec(f"embed_out.{key}", kind, size) for key, (kind, size) in sizes.items()]
        head = Part(small, self.small_head) if self.bits < 16 else None
        write_model(folder, self.config, parts, {}, head, method="random")

    def rows(self, name: str, module: nn.Module) -> Rows:
        if name in ("gpt_neox.embed_in", "embed_out"):
            codes, scale = self.table(name)
            yield f"{name}.weight", codes.to(self.dtype) * scale, 0
            return
        inner = hasattr(module, "format")
        if inner:
            yield from self.linear(name, *module.shape)
        for key in ("bias",) if inner else ("weight", "bias"):
            noise = torch.randn(getattr(module, key).shape, generator=generator(f"{name}.{key}")) * 0.1
            yield f"{name}.{key}", (noise + (key == "weight")).bfloat16().to(self.dtype), 0

    def linear(self, name: str, out: int, columns: int) -> Rows:
        random, step = generator(name), max(1, (1 << 24) // columns)
        unit = 2.0 ** -round(math.log2(53 * columns**0.5))  # code times digit has rms 53: weights near columns**-0.5
        for start in range(0, out, step):
            count = min(step, out - start)
            words = torch.randint(-(1 << 31), 1 << 31, (count, columns // 8), generator=random, dtype=torch.int32)
            words[:, :: GROUP // 8] &= ~15  # code -8 in every group: who quantizes the plain weight finds this scale
            scale = (torch.randint(8, 16, (count, columns // GROUP), generator=random) * unit).to(torch.float16)
            part = {"weight_packed": words, "weight_scale": scale}
            if self.bits == 8:
                part = {"weight_packed": pack(unpack(words, 4) * 16, 8), "weight_scale": scale / 16}
            elif self.bits == 16:
                part = {"weight": INT4.decode(part, self.dtype)}
            for key, tensor in part.items():
                yield f"{name}.{key}", tensor, start
        for key, tensor in self.format.constants((out, columns)).items():
            yield f"{name}.{key}", tensor, 0

    def table(self, name: str) -> tuple[Tensor, float]:
        """8-bit codes and their one scale, of embedding and head; each row has both ends of the range."""
        size = self.config.vocab_size, self.config.hidden_size
        codes = torch.randint(-128, 128, size, generator=generator(name), dtype=torch.int8)
        codes[:, 0], codes[:, 1] = -128, 127
        return codes, 2.0**-6 if name == "gpt_neox.embed_in" else 2.0 ** -round(math.log2(74 * size[1] ** 0.5))

    def small_head(self) -> Rows:
        codes, scale = self.table("embed_out")
        scales = torch.full((len(codes), codes.shape[1] // GROUP), scale, dtype=torch.float16)
        yield "embed_out.weight_packed", pack(codes, 8), 0
        yield "embed_out.weight_scale", scales, 0
        yield "embed_out.weight_shape", torch.tensor(codes.shape), 0


def generator(name: str) -> torch.Generator:
    """Random numbers that depend on the tensor's name alone."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def write_openvino(folder: Path, home: Path) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    weights = OVWeightQuantizationConfig(bits=4, sym=True, group_size=GROUP, ratio=1.0)
    model = OVModelForCausalLM.from_pretrained(home / "plain", export=True, compile=False, quantization_config=weights)
    model.save_pretrained(folder)


def write_ctranslate2(folder: Path, home: Path) -> None:
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer, models

    class Converter(TransformersConverter):
        def load_model(self, *args: Any, **options: Any) -> Any:
            model = super().load_model(*args, **options)
            model.config.rotary_pct, model.embed_out = 0.25, model.get_output_embeddings()  # transformers 4's names
            return model

    source = home / "plain-with-tokenizer"  # the converter asks for one; a name for every id will do
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    for path in (home / "plain").iterdir():
        (source / path.name).symlink_to(path)
    count = json.loads((source / "config.json").read_text())["vocab_size"]
    Tokenizer(models.WordLevel({str(i): i for i in range(count)}, "0")).save(str(source / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "0")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    Converter(str(source), load_as_float16=True, low_cpu_mem_usage=True).convert(str(folder), quantization="int8")


def prepare(what: str, home: Path, shape: str) -> None:
    """Write one form of the model, under its name only when it is whole."""
    partial = home / f"{what}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.unlink(missing_ok=True)
    makers: dict[str, Callable[[], object]] = {
        "int4": lambda: RandomModel(shape, 4).write(partial),
        "int8": lambda: RandomModel(shape, 8).write(partial),
        "plain": lambda: RandomModel(shape, 16).write(partial),
        "int4.gguf": lambda: export_gguf(home / "int4", partial, head="q8_0"),
        "int8.gguf": lambda: export_gguf(home / "int8", partial, head="q8_0"),
        "openvino": lambda: write_openvino(partial, home),
        "ctranslate2": lambda: write_ctranslate2(partial, home),
    }
    makers[what]()
    partial.rename(home / what)


if __name__ == "__main__":
    prepare(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
