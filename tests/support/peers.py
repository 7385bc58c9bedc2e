"""Tiny random models of transformers, the peer that tests compare with, and the same weights opened here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import neox_lite

TINY = {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
        "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
NO_EOS = {"eos_token_id": []}


def peer(cls: str = "GPTNeoXForCausalLM", seed: int = 0, **config: Any) -> Any:
    """A float32 model of transformers whose every parameter matters: random gains and biases, outputs of order one."""
    torch.manual_seed(seed)
    model = getattr(transformers, cls)(transformers.GPTNeoXConfig(**{**TINY, **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_in" in name and not model.config.tie_word_embeddings:
                parameter.normal_(0, 1)
            elif parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            elif "norm.weight" in name:
                parameter.normal_(1, 0.3)
            else:
                parameter.normal_(0, 0.2)
    return model


def ours(model: Any, folder: Path, **options: Any) -> Any:
    """The same class here, loaded from what transformers saved into `folder`; exact, unless told otherwise."""
    if not (folder / "config.json").is_file():
        model.save_pretrained(folder)
    return getattr(neox_lite, type(model).__name__).from_pretrained(folder, **{"exact": True, **options})


def pair(folder: Path, cls: str = "GPTNeoXForCausalLM", seed: int = 0, **config: Any) -> tuple[Any, Any]:
    """(ours, peer) with the same weights."""
    model = peer(cls, seed, **config)
    return ours(model, folder), model


def opened_by_transformers(folder: Path, cls: Any = transformers.AutoModelForCausalLM) -> Any:
    """A quantized folder as transformers opens it, computing in float32. Skips the test where the library for it is missing."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if config["quant_method"] != "bitsandbytes":
        pytest.importorskip("compressed_tensors")
        return cls.from_pretrained(folder, dtype=torch.float32).eval()
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    pytest.importorskip("accelerate", reason="transformers reads nf4 with accelerate only")
    model = cls.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
    for parameter in model.parameters():
        if parameter.is_floating_point():  # of what a 16-bit folder with nf4 holds, 5.23 casts biases only
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.float32
            module.support_avx512bf16_for_cpu = False  # where a processor has that, products would be bfloat16
    return model


@torch.no_grad()
def beside_transformers(folder: Path, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a quantized folder here and in transformers, both in float32: only the order of sums differs."""
    model = neox_lite.GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32, exact=True)
    return model(ids).logits, opened_by_transformers(folder)(ids).logits


def random_ids(rows: int, width: int, vocab: int = TINY["vocab_size"], seed: int = 1) -> Tensor:
    """Ids (rows, width) that leave out 0, which tests use for padding."""
    return torch.randint(1, vocab, (rows, width), generator=torch.Generator().manual_seed(seed))


def padded(prompts: list[Tensor], side: str, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts as a batch, and its mask: (rows, longest) each."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), fill)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[i, place], mask[i, place] = prompt, 1
    return ids, mask


def prompts_of_many_lengths(count: int) -> list[Tensor]:
    """1 to 40 ids each."""
    return [random_ids(1, 1 + 7 * i % 40, seed=i)[0] for i in range(count)]


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; shapes must agree."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.float() - b.float()).abs().max().item()
