"""A model's tensors as GGUF names and lays them out: names, the order of rows, blocks of 32 weights. Knows no file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from neox_lite.config import GPTNeoXConfig
from neox_lite.errors import FormatError
from neox_lite.formats import DENSE, Format, GroupInt

from .gguf_file import BF16, BLOCK, DECODED, F16, F32, Q4_0, Q8_0, TYPE_NAMES

NAMES = {"gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
OWN_NAMES = {gguf: own for own, gguf in (NAMES | LAYER_NAMES).items()}
PLAIN = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
GROUPS = {Q4_0: GroupInt(4, BLOCK), Q8_0: GroupInt(8, BLOCK)}

Spans = list[tuple[int, int]]  # rows of a stored tensor, in the order in which they are written


# -- names and rows ---------------------------------------------------------------------------------------------------


def gguf_name(name: str) -> str | None:
    """llama.cpp's name of a module, or None for one without tensors of its own."""
    if name in NAMES:
        return NAMES[name]
    head, _, rest = name.removeprefix("gpt_neox.layers.").partition(".")
    return f"blk.{head}.{LAYER_NAMES[rest]}" if rest in LAYER_NAMES else None


def own_name(name: str) -> str | None:
    """The checkpoint's name of a tensor that llama.cpp calls `name`, or None for one that this architecture lacks."""
    found = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,3})\.)?([a-z_]+)\.(weight|bias)", name)
    if found is None or (module := OWN_NAMES.get(found[2])) is None or (found[1] is None) != (module in NAMES):
        return None
    return f"{module}.{found[3]}" if found[1] is None else f"gpt_neox.layers.{found[1]}.{module}.{found[3]}"


def by_part(config: GPTNeoXConfig) -> Spans:
    """Rows of query_key_value, stored as (heads, q k v, head_dim), in GGUF's order (q k v, heads, head_dim)."""
    size = config.head_dim
    starts = [(3 * head + part) * size for part in range(3) for head in range(config.num_attention_heads)]
    return [(start, start + size) for start in starts]


def places(config: GPTNeoXConfig, start: int, stop: int) -> Tensor:
    """Where rows start..stop of query_key_value lie in a GGUF file: the inverse of `by_part`."""
    rows, size = torch.arange(start, stop), config.head_dim
    head, part, inner = rows // (3 * size), rows // size % 3, rows % size
    return (part * config.num_attention_heads + head) * size + inner


# -- blocks -----------------------------------------------------------------------------------------------------------


def kind_of(format: Format) -> int:
    """The ggml type that holds a format's weights exactly (for plain ones: to float16); raises FormatError without one."""
    if isinstance(format, GroupInt):
        return Q4_0 if format.bits == 4 else Q8_0
    if format != DENSE:
        raise FormatError(
            f"GGUF has no type that holds {format.name}; export the checkpoint itself, or an int4 folder of it"
        )
    return F16


def blocks(format: Format, rows: Mapping[str, Tensor]) -> Tensor:
    """Stored rows, n of them -> (n, bytes) uint8 as ggml lays them out.

    Raises FormatError for values that float16 cannot hold: scales must be exact, plain weights may be rounded.
    """
    if not isinstance(format, GroupInt):
        return _half(rows["weight"]).view(torch.uint8)
    packed, scale = rows["weight_packed"], rows["weight_scale"]
    half = scale.to(torch.float16)
    if not torch.equal(half.to(scale.dtype), scale):
        worst = scale[half.to(scale.dtype) != scale][0].item()
        raise FormatError(f"a scale of {worst:.9g} is not a float16 number; quantize from a float16 checkpoint")
    half = half.repeat_interleave(format.group_size // BLOCK, dim=1).unsqueeze(-1).view(torch.uint8)  # (n, blocks, 2)
    stored = packed.contiguous().view(torch.uint8)  # int4: elements 2i and 2i + 1 in byte i; int8: one each, + 128
    if format.bits == 8:
        codes = (stored ^ 128).view(len(stored), -1, BLOCK)
    else:  # Q4_0's byte i holds elements i and i + 16 of its block, in the same + 8 form
        codes = torch.stack((stored & 15, stored >> 4), dim=-1).view(len(stored), -1, 2, BLOCK // 2)
        codes = codes[:, :, 0] | (codes[:, :, 1] << 4)
    return torch.cat((half, codes), dim=-1).flatten(1)


def _half(values: Tensor) -> Tensor:
    half = values.to(torch.float16)
    if not torch.isfinite(half).all():
        raise FormatError("holds values that are not finite as float16")
    return half


def from_blocks(kind: int, raw: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The inverse of `blocks`: (n, bytes) uint8 of a ggml type -> what makes each stored tensor of the exact format."""
    if kind in PLAIN:
        return {"weight": lambda: raw.contiguous().view(PLAIN[kind])}
    if kind in DECODED:
        return {"weight": lambda: decoded(kind, raw)}
    block = raw.contiguous().view(len(raw), -1, 18 if kind == Q4_0 else 34)
    return {
        "weight_packed": lambda: _stored_codes(kind, block[..., 2:]),
        "weight_scale": lambda: block[..., :2].contiguous().view(torch.float16).squeeze(-1),
    }


def decoded(kind: int, raw: Tensor) -> Tensor:
    """(n, bytes) uint8 of a type that no format here holds -> its numbers (n, in) float32, by the gguf package."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise FormatError(f"{TYPE_NAMES[kind]} is decoded by the gguf package: pip install 'neox-lite[gguf]'") from None
    try:
        return torch.from_numpy(quants.dequantize(raw.contiguous().numpy(), GGMLQuantizationType(kind)))
    except (NotImplementedError, ValueError):
        raise FormatError(f"this gguf package does not decode {TYPE_NAMES[kind]}: pip install -U gguf") from None


def _stored_codes(kind: int, codes: Tensor) -> Tensor:
    """A block's codes (n, blocks, bytes) -> (n, words) as our formats pack them."""
    if kind == Q8_0:
        return (codes ^ 128).flatten(1).view(torch.int32)
    codes = torch.cat((codes & 15, codes >> 4), dim=-1)  # (n, blocks, 32), elements in order
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).flatten(1).view(torch.int32)
