"""Weight formats: the table. A new format is one file here, one line in FORMATS, and how a config names it in schemes.py.

Knows no file and no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..errors import FormatError
from .dense import Dense
from .group_int import GROUP_SIZES, GroupInt, pack, unpack
from .nf4 import NF4
from .schemes import DENSE, HEAD_NAMES, formats_of
from .weight import Format, Weight

__all__ = [
    "DENSE",
    "FORMATS",
    "GROUPED",
    "GROUP_SIZES",
    "NF4",
    "Dense",
    "Format",
    "GroupInt",
    "Weight",
    "formats_of",
    "label",
    "make_format",
    "pack",
    "quantization_config",
    "unpack",
    "with_plain",
]

FORMATS: dict[str, Callable[[int | None], Format]] = {
    "int4": lambda group_size: GroupInt(4, 128 if group_size is None else group_size),
    "int8": lambda group_size: GroupInt(8, 128 if group_size is None else group_size),
    "nf4": lambda group_size: NF4.of(group_size),
    "nf4-double": lambda group_size: NF4.of(group_size, double=True),
}


GROUPED = ("int4", "int8")  # those whose group size can be chosen


def make_format(name: str, group_size: int | None = None) -> Format:
    """The format that users call `name`, with groups of its usual size for None; raises FormatError for unknown ones."""
    if not isinstance(name, str) or name not in FORMATS:
        raise FormatError(f"format is {name!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[name](group_size)


def label(format: Format, plain: str) -> str:
    """The name of a format for users: int4 g128, nf4, or `plain` for weights that are not quantized."""
    if isinstance(format, Dense):
        return plain
    return f"{format.name} g{format.group_size}" if isinstance(format, GroupInt) else format.name


def with_plain(config: dict[str, Any] | None, modules: Iterable[str]) -> dict[str, Any] | None:
    """config.json's entry for the same folder with these modules plain."""
    if config is None:
        return None
    key = "llm_int8_skip_modules" if config.get("quant_method") == "bitsandbytes" else "ignore"
    return {**config, key: list(dict.fromkeys([*(config.get(key) or HEAD_NAMES), *modules]))}


def quantization_config(
    format: Format | Mapping[str, Format], dense: Iterable[str] = (), dtype: torch.dtype = torch.float16
) -> dict[str, Any]:
    """config.json's entry for a folder whose linear layers all have `format`, but for the modules named in `dense`.

    format: one for all, or integer groups by the layers' full names. dtype: of everything else in the folder.
    """
    plain = list(dict.fromkeys((*HEAD_NAMES, *dense)))
    if not isinstance(format, Mapping):
        return format.scheme(plain, dtype)
    layers: dict[Format, dict[str, list[str]]] = {}  # format -> name within a layer -> numbers of layers
    for name, own in format.items():
        number, _, last = name.partition("layers.")[2].partition(".")
        layers.setdefault(own, {}).setdefault(last, []).append(number)
    groups = {}
    for i, (own, names) in enumerate(sorted(layers.items(), key=lambda item: label(item[0], ""))):
        (group,) = own.scheme(plain, dtype)["config_groups"].values()
        # The pattern leaves out the prefix gpt_neox., for which other programs have other names.
        targets = [rf"re:.*layers\.({'|'.join(numbers)})\.{re.escape(last)}$" for last, numbers in names.items()]
        groups[f"group_{i}"] = {**group, "targets": targets}
    return {**next(iter(layers)).scheme(plain, dtype), "config_groups": groups}
