"""GGUF files for tests: a plain reader, the naive twin of the writer; models and tokenizers to export; changed files."""

import shutil
import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from neox_lite.formats import GroupInt
from neox_lite_quant.gguf_file import F16, F32, Q4_0, Q8_0, GgufFile, GgufTensor, write_gguf
from neox_lite_quant.gguf_tensors import blocks
from support import checkpoints

IDS = [i * 7 % 131 for i in range(40)]

LAYER = {"attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
         "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}  # fmt: skip

ENDS = {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"}


def write_source(folder, dtype=torch.float16, **config):
    """With the one activation that llama.cpp has."""
    checkpoints.write_source(folder, dtype, **{"hidden_act": "gelu_fast", **config})
    return folder


def give_tokenizer(source, folder, model=None, split=None, added=("   ",)):
    """A copy of a model's folder with a small tokenizer of this family's kind."""
    if source is not None:
        shutil.copytree(source, folder)
    tokenizer = Tokenizer(model or models.BPE())
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder, tokenizer.normalizer = decoders.ByteLevel(), normalizers.NFC()
    if model is None:
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<|endoftext|>"], show_progress=False)
        tokenizer.train_from_iterator(["the theory of thick things, then: 3 of them\n"] * 9, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


SCALARS = {4: "<I", 5: "<i", 6: "<f", 7: "<?"}


class Reader:
    """A GGUF file, read value by value."""

    def __init__(self, path):
        self.raw, self.at = Path(path).read_bytes(), 4
        version, tensors, keys = self.take("<I")[0], *self.take("<QQ")
        assert (self.raw[:4], version) == (b"GGUF", 3)
        self.metadata = {self.string(): self.value(self.take("<I")[0]) for _ in range(keys)}
        infos = [(self.string(), self.take(f"<{self.take('<I')[0]}Q"), *self.take("<IQ")) for _ in range(tensors)]
        start = -(-self.at // 32) * 32
        self.tensors = {name: (kind, shape[::-1], start + offset) for name, shape, kind, offset in infos}
        assert all(offset % 32 == 0 for *_, offset in self.tensors.values())

    def take(self, form):
        found = struct.unpack_from(form, self.raw, self.at)
        self.at += struct.calcsize(form)
        return found

    def string(self):
        length = self.take("<Q")[0]
        self.at += length
        return self.raw[self.at - length : self.at].decode()

    def value(self, kind):
        if kind == 8:
            return self.string()
        if kind != 9:
            return self.take(SCALARS[kind])[0]
        inner, count = self.take("<IQ")
        return [self.value(inner) for _ in range(count)]

    def decode(self, name):
        """The float32 values of a tensor, block by block as ggml documents them."""
        kind, shape, offset = self.tensors[name]
        count = int(np.prod(shape))
        if kind in (F32, F16):
            values = np.frombuffer(self.raw, "<f4" if kind == F32 else "<f2", count, offset).astype(np.float32)
        else:
            size = 18 if kind == Q4_0 else 34
            block = np.frombuffer(self.raw, np.uint8, count // 32 * size, offset).reshape(-1, size)
            scale = block[:, :2].copy().view("<f2").astype(np.float32)
            codes = block[:, 2:]
            if kind == Q4_0:  # low nibbles are elements 0 to 15, high nibbles 16 to 31
                codes = np.concatenate((codes & 15, codes >> 4), axis=1).astype(np.float32) - 8
            else:
                codes = codes.view(np.int8).astype(np.float32)
            values = codes * scale
        return values.reshape(shape)


def expected(model):
    """llama.cpp's name -> float32 array, from a model that is loaded here."""
    config, found = model.config, {}
    modules = {ours: model.get_submodule(theirs) for ours, theirs in ENDS.items()}
    for i in range(config.num_hidden_layers):
        modules |= {f"blk.{i}.{k}": model.get_submodule(f"gpt_neox.layers.{i}.{v}") for k, v in LAYER.items()}
    for name, module in modules.items():
        found[f"{name}.weight"] = module.handle.decode() if hasattr(module, "handle") else module.weight
        if getattr(module, "bias", None) is not None:
            found[f"{name}.bias"] = module.bias
    for name, tensor in found.items():
        if "attn_qkv" in name:
            heads = tensor.reshape(config.num_attention_heads, 3, config.head_dim, -1)
            found[name] = torch.cat([heads[:, part].flatten(0, 1) for part in range(3)]).reshape(tensor.shape)
    return {name: tensor.float().numpy() for name, tensor in found.items()}


def rewritten(path, out, metadata=None, without=(), data=None):
    """The file once more, with other metadata (None drops a key), without some tensors, with others in their place."""
    file = GgufFile(path)
    metadata = {k: v for k, v in {**file.metadata, **(metadata or {})}.items() if v is not None}
    kept = [t for name, t in file.tensors.items() if name not in without and name not in (data or {})]
    tensors = [GgufTensor(t.name, t.kind, t.shape, lambda t=t: [file.rows(t.name).clone()]) for t in kept]
    tensors += [GgufTensor(n, kind, shape, lambda raw=raw: [raw]) for n, (kind, shape, raw) in (data or {}).items()]
    write_gguf(out, metadata, tensors)
    return out


def as_blocks(weight, bits):
    """A float matrix as (kind, shape, bytes) of Q4_0 or Q8_0."""
    format = GroupInt(bits, 32)
    return {4: Q4_0, 8: Q8_0}[bits], tuple(weight.shape), blocks(format, format.encode(weight, torch.float16, "rtn"))


# the shapes that both programs compute
VARIANTS = {
    "parallel": {},
    "sequential-rotary100": {"use_parallel_residual": False, "rotary_pct": 1.0},
    "tied-no-attention-bias": {"tie_word_embeddings": True, "attention_bias": False},
    "rotary-base-500": {"rotary_emb_base": 500.0, "rotary_pct": 0.5, "layer_norm_eps": 1e-3},
    "rope-linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope-yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}},
}
