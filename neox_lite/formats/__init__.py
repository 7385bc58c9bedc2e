"""Weight formats: the table, and which module of a checkpoint has which (compressed-tensors' `quantization_config`).

A new format is one file here and one line in FORMATS. Knows no file and no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import FormatError
from .dense import Dense
from .group_int import GROUP_SIZES, GroupInt, pack, unpack
from .weight import Format, Weight

__all__ = [
    "DENSE",
    "FORMATS",
    "GROUP_SIZES",
    "Dense",
    "Format",
    "GroupInt",
    "Weight",
    "formats_of",
    "make_format",
    "pack",
    "quantization_config",
    "unpack",
]

DENSE = Dense()
FORMATS: dict[str, Callable[[int], Format]] = {
    "int4": lambda group_size: GroupInt(4, group_size),
    "int8": lambda group_size: GroupInt(8, group_size),
}
HEAD_NAMES = ("lm_head", "embed_out")  # the head in transformers v5 and in checkpoints


def make_format(name: str, group_size: int = 128) -> Format:
    """The format that users call `name`; raises FormatError for unknown ones."""
    if not isinstance(name, str) or name not in FORMATS:
        raise FormatError(f"format is {name!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[name](group_size)


def quantization_config(format: GroupInt, dense: Iterable[str] = ()) -> dict[str, Any]:
    """config.json's entry for a folder whose linear layers all have `format`, but for the modules named in `dense`."""
    weights = {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": format.group_size,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [*HEAD_NAMES, *dense],
    }


def formats_of(config: dict[str, Any] | None) -> Callable[[str], Format]:
    """Read `quantization_config` (None: all dense) into a function from module name to format.

    Raises FormatError naming the key for every scheme that is not symmetric integer groups.
    """
    if config is None:
        return lambda name: DENSE
    if (method := config.get("quant_method")) != "compressed-tensors":
        raise FormatError(f"quantization_config: quant_method is {method!r}, expected 'compressed-tensors'")
    _expect(config, "format", ("pack-quantized", None))
    _expect(config, "quantization_status", ("compressed", None))
    _expect(config, "kv_cache_scheme", (None,))
    _expect(config, "sparsity_config", (None, {}))
    _expect(config, "transform_config", (None, {}))
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        raise FormatError(f"quantization_config: config_groups is {groups!r}, expected an object")
    rules = [(_names(group, "targets"), _scheme(name, group)) for name, group in groups.items()]
    ignore = [*_names(config, "ignore"), *HEAD_NAMES]

    def lookup(name: str) -> Format:
        if any(_matches(target, name, "") for target in ignore):
            return DENSE
        found = [scheme for targets, scheme in rules if any(_matches(t, name, "Linear") for t in targets)]
        return found[0] if found else DENSE

    return lookup


def _scheme(name: str, group: dict[str, Any]) -> Format:
    where = f"quantization_config.config_groups.{name}"
    _expect(group, "input_activations", (None,), where)
    _expect(group, "output_activations", (None,), where)
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise FormatError(f"{where}: weights is {weights!r}, expected an object")
    where += ".weights"
    _expect(weights, "type", ("int",), where)
    _expect(weights, "symmetric", (True,), where)
    _expect(weights, "strategy", ("group",), where)
    _expect(weights, "dynamic", (False, None), where)
    _expect(weights, "actorder", (None, False, "static", "weight"), where)
    _expect(weights, "num_bits", (4, 8), where)
    _expect(weights, "group_size", GROUP_SIZES, where)
    return GroupInt(weights["num_bits"], weights["group_size"])


def _expect(keys: dict[str, Any], key: str, allowed: tuple[Any, ...], where: str = "quantization_config") -> None:
    found = keys.get(key)
    if found not in allowed or isinstance(found, float):  # 4.0 equals 4, but is no size
        raise FormatError(
            f"{where}: {key} is {found!r}, expected {' or '.join(repr(a) for a in allowed if a is not None)}"
        )


def _names(keys: Any, key: str) -> list[str]:
    """A list of module names or patterns; raises FormatError for anything else."""
    names = keys.get(key, []) if isinstance(keys, dict) else None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise FormatError(f"quantization_config: {key} is {names!r}, expected a list of module names")
    for name in names:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise FormatError(f"quantization_config: {key} has the pattern {name!r}: {error}") from error
    return names


def _matches(target: str, name: str, kind: str) -> bool:
    """compressed-tensors' rule: `re:` patterns match from the start of the name; others are a name or a class."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in (name, kind)
