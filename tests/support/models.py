"""Small random models in memory, their linear layers in a format, and passes through them. Knows no test and no folder."""

import torch

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.formats import DENSE, GroupInt, make_format
from neox_lite.layers import Linear

from .backends import stored

SHAPE = {"vocab_size": 131, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 256, "max_position_embeddings": 512,
         "initializer_range": 0.09}  # fmt: skip  # about one over the root of the inputs: every part changes the logits
SMALL = {"vocab_size": 67, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 128, "max_position_embeddings": 200}  # fmt: skip  # for Triton's interpreter
INT4, INT8, NF4 = make_format("int4", 32), make_format("int8", 64), make_format("nf4")
# What models differ in for kernels: formats, of layers one after another where there are several, heads, activations, biases.
MODELS = {
    "dense": {},
    "int4-g128": {"format": GroupInt(4, 128)},
    "int8-g64-sequential": {"format": INT8, "use_parallel_residual": False},
    "int4-g32-hidden160": {"format": INT4, "hidden_size": 160, "num_attention_heads": 2, "rotary_pct": 0.4},
    "int8-g128-head8-tanh": {"format": GroupInt(8, 128), "head": GroupInt(8, 128), "hidden_act": "gelu_fast"},
    "int4-g64-tied-nobias": {"format": GroupInt(4, 64), "tie_word_embeddings": True, "attention_bias": False},
    "mixed": {"format": [INT4, INT8, INT8, INT4, INT8, DENSE, DENSE, INT4], **SMALL, "vocab_size": 131},
    "nf4": {"format": NF4, "num_hidden_layers": 2},
}


def tiny_model(format=DENSE, head=DENSE, dtype=torch.float32, scales=torch.float16, seed=0, **config):
    """A model whose every parameter matters. format: of the blocks' linear layers, or a list, taken in turn."""
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**SHAPE, **config}))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    model.gpt_neox.embed_in.weight.data.normal_()
    model.to(dtype)
    layers = [module for module in model.gpt_neox.modules() if isinstance(module, Linear)]
    for i, layer in enumerate(layers):
        become(layer, format[i % len(format)] if isinstance(format, list) else format, scales)
    become(model.embed_out, head, scales)
    return model


def become(layer, format, scales=torch.float16):
    """Round a plain linear layer to a format."""
    if format != DENSE:
        weight = stored(format, layer.weight.data, scales)
        layer.become(weight.format, scales)
        for name, tensor in weight.tensors.items():
            layer._buffers[name] = tensor


@torch.no_grad()
def prefill_and_decode(model, lengths=(9, 3, 1), steps=3):
    """Logits of prompts of different lengths in one pass, and of steps of them all."""
    ids = torch.randint(1, 131, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    pool = model.new_pool(pages=8)
    block_tables = [pool.new() for _ in lengths]
    passes = [[ids[3 * i : 3 * i + n] for i, n in enumerate(lengths)]]
    passes += [[[id] for id in ids[20 + step : 20 + step + len(lengths)]] for step in range(steps)]
    return torch.stack([model.step(pool, block_tables, tokens).cpu() for tokens in passes])
