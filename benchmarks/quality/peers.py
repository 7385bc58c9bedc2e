"""Other tools' quantized weights, decoded to float32 folders that run here. llama.cpp, bitsandbytes and HQQ.

Each is used through its own package: llama-cpp-python quantizes a GGUF file and gguf decodes it, bitsandbytes and hqq quantize
and decode on the CPU. Embedding and head stay 16 bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neox_lite.config import GPTNeoXConfig
from neox_lite_quant import export_gguf
from neox_lite_quant.gguf_tensors import own_name, places

LINEAR = ("query_key_value.weight", "attention.dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")
LLAMA_TYPES = {"Q4_0": 2, "Q4_K_S": 14, "Q4_K_M": 15}  # llama_ftype
F16 = 1  # ggml_type


def quantized(model: Path, out: Path) -> Iterator[tuple[str, float, str]]:
    """Write each peer's weights to `out`, a folder that the caller removes; name, bits per weight and a note."""
    for name in LLAMA_TYPES:
        bits, kinds = _write(model, out, lambda weights, name=name: _llama(model, out, name))
        yield f"llama.cpp {name}", bits, f"linear layers are {kinds}"
    bits, _ = _write(model, out, _nf4)
    yield "bitsandbytes nf4", bits, "blocks of 64"
    for group_size in (64, 128):
        bits, _ = _write(model, out, lambda weights, size=group_size: _hqq(weights, size))
        yield f"HQQ int4 g{group_size}", bits, "axis 1, 16-bit scales and zeros"


Encoded = tuple[dict[str, Tensor], float, str]  # decoded weights, bits per weight, note


def _write(model: Path, out: Path, encode: Callable[[dict[str, Tensor]], Encoded]) -> tuple[float, str]:
    tensors = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    found, bits, note = encode({name: tensor for name, tensor in tensors.items() if name.endswith(LINEAR)})
    out.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(model / name, out / name)
    config = json.loads((model / "config.json").read_text()) | {"dtype": "float32", "torch_dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config))
    save_file({**tensors, **found}, out / "model.safetensors", metadata={"format": "pt"})
    return bits, note


def _llama(model: Path, out: Path, name: str) -> Encoded:
    import gguf
    import llama_cpp

    out.mkdir(exist_ok=True)
    plain, small = out / "plain.gguf", out / "small.gguf"
    for file in (plain, small):
        file.unlink(missing_ok=True)
    export_gguf(model, plain)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.output_tensor_type, options.token_embedding_type = LLAMA_TYPES[name], F16, F16
    if llama_cpp.llama_model_quantize(str(plain).encode(), str(small).encode(), options):
        raise RuntimeError(f"llama.cpp could not quantize to {name}")
    config, found, size, count, kinds = GPTNeoXConfig.from_pretrained(model), {}, 0, 0, set()
    for tensor in gguf.GGUFReader(small).tensors:
        ours = own_name(tensor.name)
        if ours is None or not ours.endswith(LINEAR):
            continue
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if ours.endswith("query_key_value.weight"):
            weight = weight[places(config, 0, len(weight))]
        found[ours], size, count = weight, size + int(tensor.n_bytes), count + weight.numel()
        kinds.add(tensor.tensor_type.name)
    return found, 8 * size / count, " and ".join(sorted(kinds))


def _nf4(weights: dict[str, Tensor]) -> Encoded:
    from bitsandbytes import functional

    found = {}
    for name, weight in weights.items():
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        found[name] = functional.dequantize_4bit(codes, state).float()
    return found, 4 + 32 / 64, ""


def _hqq(weights: dict[str, Tensor], group_size: int) -> Encoded:
    from hqq.core.quantize import Quantizer

    found = {}
    for name, weight in weights.items():
        how = {"nbits": 4, "group_size": group_size, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
        codes, state = Quantizer.quantize(weight, **how)
        state |= {key: state[key].half().float() for key in ("scale", "zero")}  # as they are stored
        found[name] = Quantizer.dequantize(codes, state).float()
    return found, 4 + 32 / group_size, ""
