"""What others do with the same numbers: products of one weight, products inside our model, and transformers' model.

Written against the sources of torch 2.13, bitsandbytes 0.50, gemlite 0.6 and transformers 5. Whatever does not import or cannot
run here raises; those who call name it with its reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neox_lite.config import GPTNeoXConfig
from neox_lite.formats import GroupInt, Weight
from neox_lite.formats.group_int import unpack

# One weight -----------------------------------------------------------------------------------------------------------


def torch_fp16(weight: Weight) -> Callable[[Tensor], Tensor]:
    plain = weight.decode(torch.float16)
    return lambda x: torch.mm(x, plain.T)


def codes_of(weight: Weight) -> Tensor:
    """(out, in) uint8, 8 for zero."""
    return (unpack(weight.tensors["weight_packed"], 4) + 8).to(torch.uint8)


def torch_tinygemm(weight: Weight) -> Callable[[Tensor], Tensor]:
    """torch's own int4 product, of bfloat16: (code - 8) * scale + zero."""
    codes = codes_of(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], 8)
    scale = weight.tensors["weight_scale"].bfloat16().T
    scales_and_zeros = torch.stack((scale, torch.zeros_like(scale)), -1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales_and_zeros)


def gemlite(weight: Weight) -> Callable[[Tensor], Tensor]:
    from gemlite import DType, GemLiteLinear

    rows, columns = weight.shape
    layer = GemLiteLinear(
        4, group_size=128, in_features=columns, out_features=rows, input_dtype=DType.FP16, output_dtype=DType.FP16
    )
    scale = weight.tensors["weight_scale"].contiguous()
    layer.pack(codes_of(weight), scale, torch.full_like(scale, 8), bias=None)
    return layer


def bitsandbytes_nf4(weight: Weight) -> Callable[[Tensor], Tensor]:
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(weight.decode(torch.float16), blocksize=64, quant_type="nf4")
    return lambda x: bitsandbytes.matmul_4bit(x, packed.t(), state)


@dataclass(frozen=True)
class Peer:
    """Products of one weight by another library, of activations of a dtype; tokens: how many to time, () for all."""

    make: Callable[[Weight], Callable[[Tensor], Tensor]]
    tokens: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float16


PEERS = {
    "torch tinygemm": Peer(torch_tinygemm, dtype=torch.bfloat16),
    "bitsandbytes nf4": Peer(bitsandbytes_nf4),  # its error is that of 16 other levels
    "gemlite": Peer(gemlite, (2, 8, 16, 64, 1, 4, 32)),  # tunes itself for each
}


def once_for_each(make: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """`make`, computed again only for another tensor."""
    held: list[Any] = [None, None]

    def get(x: Tensor) -> Any:
        if held[0] is not x:
            held[:] = x, make(x)
        return held[1]

    return get


# Inside our model -----------------------------------------------------------------------------------------------------


def substituted(make: Callable[[Weight], Callable[[Tensor], Tensor]]) -> Any:
    """The triton backend with the products of int4 weights made by a peer; the rest of a step stays as it is."""
    from neox_lite.kernels.triton.linear import LinearKernels
    from neox_lite.kernels.triton.linear_method import TORCH, LinearMethod
    from neox_lite.kernels.triton.operations import Operations

    class PeerProducts(LinearKernels):
        def __init__(self, ops: Operations) -> None:
            super().__init__(False, ops.properties, ops.tuner, ops._scratch)
            self._made: dict[int, Callable[[Tensor], Tensor]] = {}

        def method(self, weight: Weight, like: Tensor) -> LinearMethod:
            return TORCH if theirs(weight) else super().method(weight, like)

        def by_torch(self, x: Any, weight: Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
            if not theirs(weight):
                return super().by_torch(x, weight, dtype, out)
            key = weight.tensors["weight_packed"].data_ptr()
            if key not in self._made:
                self._made[key] = make(weight)
            # The result is in the peer's dtype: what follows reads any.
            found = self._made[key](x)
            return found if out is None else out.copy_(found)

    class Substituted(Operations):
        name = "triton, products by a peer"

        def __init__(self) -> None:
            super().__init__(False)
            self.linear = PeerProducts(self)

    def theirs(weight: Weight) -> bool:
        return isinstance(weight.format, GroupInt) and weight.format.bits == 4

    return Substituted()


# transformers ---------------------------------------------------------------------------------------------------------


class Transformers:
    """transformers' GPT-NeoX with random weights, its linear layers nf4 by bitsandbytes, as its users run it."""

    def __init__(self, config: GPTNeoXConfig, device: torch.device) -> None:
        import transformers

        self.device, dtype = device, torch.float16
        theirs = transformers.GPTNeoXConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
        )
        with torch.device("meta"):
            self.model = transformers.GPTNeoXForCausalLM(theirs).to(dtype).eval()
        base = self.model.gpt_neox
        base.rotary_emb = type(base.rotary_emb)(config=theirs).to(device)  # computed, which it is not on meta
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.Linear) and name != "embed_out":
                parent, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(parent), last, self._nf4(module))
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    made = torch.randn(parameter.shape, dtype=dtype, device=device).mul_(0.02)
                    setattr(module, name, nn.Parameter(made, requires_grad=False))
        self.vocabulary = config.vocab_size

    def _nf4(self, linear: nn.Linear) -> nn.Module:
        from bitsandbytes.nn import Linear4bit, Params4bit

        size = linear.in_features, linear.out_features
        made = Linear4bit(
            *size, True, compute_dtype=torch.float16, compress_statistics=False, quant_type="nf4", device="meta"
        )
        plain = torch.randn(size[1], size[0], dtype=torch.float16, device=self.device).mul_(size[0] ** -0.5)
        weight = Params4bit(plain, requires_grad=False, compress_statistics=False, quant_type="nf4", module=made)
        made.weight = weight.to(self.device)  # which quantizes it
        return made

    def prefill_s(self, tokens: int, runs: int) -> list[float]:
        return [self._timed(self._ids(tokens))[0] for _ in range(runs)]

    def decode_s(self, context: int, steps: int) -> list[float]:
        """Seconds of each greedy step after so many tokens; the first ones warm up."""
        past, token, times = None, self._ids(1), []
        if context:
            _, token, past = self._timed(self._ids(context))
        for _ in range(steps):
            taken, token, past = self._timed(token, past)
            times.append(taken)
        return times

    def _ids(self, tokens: int) -> Tensor:
        return torch.randint(self.vocabulary, (1, tokens), device=self.device)

    def _timed(self, ids: Tensor, past: Any = None) -> tuple[float, Tensor, Any]:
        """Seconds of a pass until its token is known, that token, and the cache."""
        began = time.perf_counter()
        out = self.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        token.item()  # waits for a GPU
        return time.perf_counter() - began, token[:, -1:], out.past_key_values
