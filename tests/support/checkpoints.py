"""Small random checkpoints on the disk, and what tests compare of folders. Knows no test and no hub."""

import hashlib
import json

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM

SHAPE = {"vocab_size": 131, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
         "max_position_embeddings": 256, "initializer_range": 0.1}  # fmt: skip
IDS = torch.arange(40)[None] * 7 % 131


def write_source(folder, dtype=torch.float16, cls=GPTNeoXForCausalLM, shard_size="5GB", **config):
    """Save a random model whose every parameter matters; returns it."""
    torch.manual_seed(0)
    model = cls(GPTNeoXConfig(**{**SHAPE, **config}))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return model


def write_words(folder):
    """A tokenizer of the words w1 to w130, whose numbers are their ids."""
    words = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, 131)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def change_json(path, **keys):
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def change_tensors(path, change):
    """Rewrite a weight file after `change` of its tensors by name, which are changed in place or returned as a dict."""
    tensors = load_file(path)
    changed = change(tensors)
    tensors = changed if isinstance(changed, dict) else tensors
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {"format": "pt"})


def digests(folder, pattern="*"):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob(pattern)}


def flip(path, at, bit=0):
    """Change one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)
