"""Tiny random models of transformers, the peer that tests compare with, and the same weights opened here."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import neox_lite

TINY = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


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


def random_ids(rows: int, width: int, vocab: int = TINY["vocab_size"], seed: int = 1) -> Tensor:
    """Ids (rows, width) that leave out 0, which tests use for padding."""
    return torch.randint(1, vocab, (rows, width), generator=torch.Generator().manual_seed(seed))


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; shapes must agree."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.float() - b.float()).abs().max().item()
