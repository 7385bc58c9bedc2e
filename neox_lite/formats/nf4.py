"""nf4 as bitsandbytes stores it: codes of 16 fixed levels, a scale for each 64 weights. Knows no file and no kernel.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314: the levels are quantiles of the normal distribution, a weight is
level[code] * absmax of its block. Double quantization stores absmax minus its mean in 8 bits with a dynamic exponent (Dettmers
2015, https://arxiv.org/abs/1511.04561), with a scale for each 256 of them. Layout: docs/format.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import FormatError
from ..files import parse_json
from ..units import dtype_name
from .weight import ByRows, Specs

BLOCK = 64  # weights that share a scale: transformers' value, and bitsandbytes' default
NESTED_BLOCK = 256  # scales that share a scale, the only number that bitsandbytes multiplies with
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
ABSMAX, MAP = "weight.absmax", "weight.quant_map"
NESTED_ABSMAX, NESTED_MAP = "weight.nested_absmax", "weight.nested_quant_map"
STATE = "weight.quant_state.bitsandbytes__nf4"  # JSON
STATE_BYTES = 256  # padded with spaces, so that its length is known before its content
TILE = 1 << 17  # weights quantized at a time


@dataclass(frozen=True)
class NF4(ByRows):
    """w[i, j] = level[code[i, j]] * absmax[i, j // 64]; rows are whole blocks.

    double: absmax itself is quantized, and `offset` is the mean that was subtracted from it, which differs by weight.
    """

    double: bool = False
    offset: float = 0.0
    methods = ("absmax",)
    late = (ABSMAX,)
    loose = (STATE,)

    @property
    def name(self) -> str:
        return "nf4-double" if self.double else "nf4"

    @classmethod
    def of(cls, group_size: int | None, double: bool = False) -> NF4:
        if group_size not in (None, BLOCK):
            raise FormatError(f"group_size is {group_size}, but nf4 always has blocks of {BLOCK}; leave it out")
        return cls(double)

    def why_not(self, shape: tuple[int, int]) -> str | None:
        if shape[1] % BLOCK == 0:
            return None
        return f"in_features {shape[1]} is not divisible by nf4's block of {BLOCK}; leave it plain, or try int4"

    def specs(self, shape: tuple[int, int], dtype: torch.dtype) -> Specs:
        out, columns = shape
        nested: Specs = {
            NESTED_ABSMAX: (torch.float32, (-(-out * columns // BLOCK // NESTED_BLOCK),)),
            NESTED_MAP: (torch.float32, (256,)),
        }
        return {
            "weight": (torch.uint8, (out, columns // 2)),
            ABSMAX: (torch.uint8 if self.double else torch.float32, (out, columns // BLOCK)),
            MAP: (torch.float32, (16,)),
            **(nested if self.double else {}),
            STATE: (torch.uint8, (STATE_BYTES,)),
        }

    def file_shape(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        flat: dict[str, tuple[int, ...]] = {"weight": (math.prod(shape), 1), ABSMAX: (math.prod(shape),)}
        return flat.get(key, shape)

    def laid(self, key: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if key == STATE:
            return functional.pad(tensor, (0, shape[0] - len(tensor)), value=ord(" "))
        return tensor.view(shape)

    def bits_per_weight(self, dtype: torch.dtype) -> float:
        return 4 + ((8 + 32 / NESTED_BLOCK) if self.double else 32) / BLOCK

    def scheme(self, dense: list[str], dtype: torch.dtype) -> dict[str, Any]:
        """As transformers writes it. It computes in the compute dtype, whatever dtype the rest is loaded in."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double,
            "bnb_4bit_compute_dtype": dtype_name(dtype),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": dense,
        }

    # Writing ----------------------------------------------------------------------------------------------------------

    def encode(self, rows: Tensor, dtype: torch.dtype, method: str = "absmax") -> dict[str, Tensor]:
        """Quantize a row slice, (n, in) -> weight (n, in / 2) uint8 and absmax (n, in / 64) float32, as bitsandbytes rounds.

        Raises FormatError for values that are not finite.
        """
        if (reason := self.why_not((rows.shape[0], rows.shape[1]))) is not None:
            raise FormatError(reason)
        if method not in self.methods:
            raise FormatError(f"method is {method!r}, expected {self.methods[0]!r}")
        packed, scales = [], []
        for part in rows.split(max(1, TILE // rows.shape[1])):
            blocks = part.float().reshape(len(part), -1, BLOCK)
            if not torch.isfinite(blocks).all():
                raise FormatError("the weight holds values that are not finite")
            absmax = blocks.abs().amax(-1)
            codes = _nearest(blocks * (1.0 / absmax.clamp(min=1e-38))[..., None], _levels(rows.device)).flatten(1)
            packed.append(codes[:, 0::2] << 4 | codes[:, 1::2])
            scales.append(absmax)
        return {"weight": torch.cat(packed), ABSMAX: torch.cat(scales)}

    def constants(self, shape: tuple[int, int], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        levels = {MAP: _levels(torch.device("cpu")).clone()}
        return levels | ({NESTED_MAP: dynamic_map()} if self.double else {STATE: self._state(shape, dtype)})

    def finish(self, collected: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        """All of a weight's scales (out, in / 64) float32 -> their stored form; if double, with the state that describes it."""
        absmax = collected[ABSMAX]
        if not self.double:
            return {ABSMAX: absmax}
        offset = absmax.mean()
        blocks = functional.pad((absmax - offset).flatten(), (0, -absmax.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
        scale = blocks.abs().amax(-1)
        codes = _nearest(blocks * (1.0 / scale.clamp(min=1e-38))[:, None], dynamic_map())
        return {
            ABSMAX: codes.flatten()[: absmax.numel()].view_as(absmax),
            NESTED_ABSMAX: scale,
            STATE: replace(self, offset=offset.item())._state(shape, dtype),
        }

    def _state(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype_name(dtype), "shape": list(shape)}
        if self.double:
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": self.offset}
        return torch.tensor(list(json.dumps(state).encode().ljust(STATE_BYTES)), dtype=torch.uint8)

    # Reading ----------------------------------------------------------------------------------------------------------

    def opened(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> NF4:
        """The format with the offset that a file states. Raises FormatError for a file that means something else."""
        if not torch.allclose(tensors[MAP].cpu(), _levels(torch.device("cpu")), rtol=0, atol=1e-6):
            raise FormatError(f"{MAP}: is not the table of nf4's 16 levels")
        for key in (ABSMAX, NESTED_ABSMAX, NESTED_MAP):
            if key in tensors and tensors[key].is_floating_point() and not torch.isfinite(tensors[key]).all():
                raise FormatError(f"{key}: holds values that are not finite")
        state = parse_json(bytes(tensors[STATE].tolist()), STATE, FormatError)
        expected: dict[str, tuple[Any, ...]] = {
            "quant_type": ("nf4",),
            "blocksize": (BLOCK,),
            "shape": (list(shape),),
            "dtype": ("float16", "bfloat16", "float32"),
        }
        if self.double:
            expected |= {"nested_blocksize": (NESTED_BLOCK,), "nested_dtype": ("float32",)}
        known = expected.keys() | ({"nested_offset"} if self.double else set())
        if state.keys() != known:
            raise FormatError(f"{STATE}: expected an object with {', '.join(sorted(known))}")
        for key, allowed in expected.items():
            if not any(state[key] == value and type(state[key]) is type(value) for value in allowed):  # 64.0 is no size
                choices = " or ".join(map(repr, allowed))
                raise FormatError(f"{STATE}: {key} is {str(state[key])[:60]!r}, expected {choices}")
        offset = state.get("nested_offset", 0.0)
        if type(offset) not in (int, float) or not abs(offset) < torch.finfo(torch.float32).max:
            raise FormatError(f"{STATE}: nested_offset is {str(offset)[:60]!r}, expected a finite number")
        return replace(self, offset=float(offset))

    def rows(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], start: int, stop: int) -> dict[str, Tensor]:
        absmax = self.scales(tensors) if self.double else tensors[ABSMAX]
        return {"weight": tensors["weight"][start:stop], ABSMAX: absmax[start:stop]}

    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """absmax (out, in / 64) in float32, of a whole weight."""
        absmax = tensors[ABSMAX]
        if not self.double:
            return absmax.float()
        levels = tensors[NESTED_MAP][absmax.flatten().int()]
        scale = tensors[NESTED_ABSMAX].repeat_interleave(NESTED_BLOCK)[: len(levels)]
        return (levels * scale + self.offset).view_as(absmax)

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """weight (n, in / 2) and absmax (n, in / 64) in float32 -> (n, in) in `dtype`."""
        weight, absmax = tensors["weight"], tensors[ABSMAX]
        pairs = functional.embedding(weight.int(), _pairs(weight.device))  # (n, in / 2, 2)
        blocks = pairs.view(len(weight), -1, BLOCK).mul_(absmax.float()[..., None])
        return blocks.flatten(1).to(dtype)


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Codes, as uint8, of the levels nearest to values; halfway, the lower one, as bitsandbytes' kernels do."""
    return torch.bucketize(values.clamp_(-1, 1), (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)


@lru_cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)


@lru_cache
def _pairs(device: torch.device) -> Tensor:
    """The two levels that each byte stands for, the first one in its high bits: (256, 2)."""
    codes = torch.arange(256, device=device)
    return _levels(device)[torch.stack((codes >> 4, codes & 15), -1)]


def dynamic_map() -> Tensor:
    """The 256 levels for scales, ascending: seven decades of either sign, each with twice as many as the one below it."""
    found = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * ((ends[:-1] + ends[1:]) / 2)
        found += [middles, -middles]
    return torch.cat(found).sort().values
