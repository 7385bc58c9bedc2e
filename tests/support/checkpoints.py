"""Small random checkpoints on the disk, and what tests compare of folders. Knows no test and no hub."""

import hashlib
import json

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.checkpoint.folder_writer import FolderWriter, split_into_shards
from neox_lite.checkpoint.safetensors_file import Spec

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


def random_tensor(shape, dtype, seed):
    """Every bit pattern that is a number: floats are finite, so that equality and verify are meant."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        values = torch.randn(shape, generator=generator)
        return (values.abs() if dtype == torch.float8_e8m0fnu else values).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def some_tensors(seed=0):
    """A small model's worth: several dtypes, a scalar, an empty one, odd sizes."""
    prefix = "gpt_neox.layers.0.attention"
    shapes = {
        "embed": ((50, 16), torch.float16),
        f"{prefix}.query_key_value.bias": ((48,), torch.float32),
        f"{prefix}.dense.bias": ((7,), torch.bfloat16),
        f"{prefix}.dense.weight_packed": ((16, 8), torch.int32),
        f"{prefix}.dense.weight_shape": ((2,), torch.int64),
        "scalar": ((), torch.float32),
        "empty": ((0, 4), torch.float16),
        "flags": ((3,), torch.bool),
    }
    return {name: random_tensor(*shape, seed + i) for i, (name, shape) in enumerate(shapes.items())}


def write_tensors(folder, state, max_bytes=10**9, **fields):
    """A folder of ours that holds these tensors; fields: of its manifest."""
    specs = [[Spec(name, tensor.dtype, tuple(tensor.shape))] for name, tensor in state.items()]
    with FolderWriter(folder) as out:
        out.shards(split_into_shards(specs, max_bytes))
        for i, planned in enumerate(out.plan):
            with out.shard(i) as shard:
                for spec in planned:
                    shard.write(spec.name, state[spec.name])
        out.file("tokenizer.json", "{}\n")
        out.finish('{"model_type": "gpt_neox"}', **fields)


def write_shards(folder, parts, kind="safetensors", **changes):
    """Weight files {name: tensors} and their index; changes replace entries of its weight_map, None takes one away."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, state in parts.items():
        (save_file if kind == "safetensors" else torch.save)(state, folder / file)
    weight_map = {name: file for file, state in parts.items() for name in state} | changes
    weight_map = {name: file for name, file in weight_map.items() if file is not None}
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"weight_map": weight_map, "metadata": {}}))
    return folder


def write_bpe(folder, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"), **settings):
    """A byte-level tokenizer of single bytes and a few merges, with these special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "he", "ll", "hell", "Ġw"])}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w")]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    return backend


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
