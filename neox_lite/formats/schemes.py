"""config.json's `quantization_config` -> which module of a checkpoint has which format. Knows no file and no tensor.

compressed-tensors' symmetric integer groups, and bitsandbytes' nf4. Everything else is refused; the message names the key.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..errors import FormatError
from .dense import Dense
from .group_int import GROUP_SIZES, GroupInt
from .nf4 import NF4
from .weight import Format

DENSE = Dense()
HEAD_NAMES = ("lm_head", "embed_out")  # the head in transformers v5 and in checkpoints
TASK_HEADS = ("score", "classifier", "qa_outputs")
WHERE = "quantization_config"
CLASSES = ("Linear", "Module")  # targets that mean every linear layer
ADVICE = {  # what to choose instead in the tool that made a folder
    "quantization_status": "save it compressed (save_compressed=True)",
    "kv_cache_scheme": "leave it out; --kv int8 does that here",
    "input_activations": "activations are not quantized by folders here; choose a weight-only scheme, W4A16 or W8A16",
    "output_activations": "activations are not quantized by folders here; choose a weight-only scheme, W4A16 or W8A16",
    "type": "choose integers, W4A16 or W8A16",
    "symmetric": "zero points are not read; choose a symmetric scheme, W4A16 or W8A16",
    "strategy": "choose groups of 32, 64 or 128",
    "group_size": "choose groups of 32, 64 or 128",
    "actorder": "columns in another order are not read; choose 'static', which leaves them in place",
    "num_bits": "choose W4A16 or W8A16",
}
AGAIN = "or make a folder from the original checkpoint: neox-lite quantize SRC"
Lookup = Callable[[str], Format]


def formats_of(config: dict[str, Any] | None) -> Lookup:
    """Read `quantization_config` (None: all dense) into a function from module name to format.

    Raises FormatError naming the key for every scheme that is not known here.
    """
    if config is None:
        return lambda name: DENSE
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in SCHEMES:
        raise FormatError(f"{WHERE}: quant_method is {method!r}, expected {' or '.join(map(repr, SCHEMES))}")
    return SCHEMES[method](config)


# compressed-tensors -------------------------------------------------------------------------------------------------


def _compressed_tensors(config: dict[str, Any]) -> Lookup:
    _expect(config, "format", ("pack-quantized", None))
    _expect(config, "quantization_status", ("compressed", None))
    _expect(config, "kv_cache_scheme", (None,))
    _expect(config, "sparsity_config", (None, {}))
    _expect(config, "transform_config", (None, {}))
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        raise FormatError(f"{WHERE}: config_groups is {groups!r}, expected an object")
    rules: dict[str, Format] = {}
    for name, group in groups.items():
        rules |= dict.fromkeys(_names(group, "targets"), _group(name, group))
    # The library takes the first target that matches, in this order.
    order = sorted(rules, key=lambda target: ("re:" in target, target))
    ignore = [*_names(config, "ignore"), *HEAD_NAMES]

    def lookup(name: str) -> Format:
        if any(_matches(target, name) or target in CLASSES for target in ignore):
            return DENSE
        by_name = next((rules[target] for target in order if _matches(target, name)), None)
        return by_name or next((rules[target] for target in order if target in CLASSES), DENSE)

    return lookup


def _group(name: str, group: dict[str, Any]) -> Format:
    where = f"{WHERE}.config_groups.{name}"
    _expect(group, "format", ("pack-quantized", None), where)
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


def _matches(target: str, name: str) -> bool:
    """compressed-tensors' rule: `re:` patterns match from the start of the name; others are the name."""
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


# bitsandbytes -------------------------------------------------------------------------------------------------------


def _bitsandbytes(config: dict[str, Any]) -> Lookup:
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        raise FormatError(
            f"{WHERE}: load_in_8bit, bitsandbytes' LLM.int8(), is not read here; make an int8 folder from the checkpoint that "
            "it was made from: neox-lite quantize SRC --format int8"
        )
    if config.get("bnb_4bit_quant_type", "fp4") == "fp4":
        raise FormatError(
            f"{WHERE}: bnb_4bit_quant_type is 'fp4', expected 'nf4'; quantize the checkpoint that it was made from again"
        )
    _expect(config, "load_in_4bit", (True,))
    _expect(config, "bnb_4bit_quant_type", ("nf4",))
    _expect(config, "bnb_4bit_quant_storage", ("uint8", None))
    _expect(config, "bnb_4bit_compute_dtype", ("float32", "float16", "bfloat16", None))
    _expect(config, "bnb_4bit_use_double_quant", (True, False, None))
    format = NF4(bool(config.get("bnb_4bit_use_double_quant")))
    if config.get("llm_int8_skip_modules") is None:
        return lambda name: DENSE if name in HEAD_NAMES + TASK_HEADS else format
    skipped = [_pattern(name) for name in _names(config, "llm_int8_skip_modules")]

    def lookup(name: str) -> Format:
        return DENSE if any(pattern.search(name) for pattern in skipped) else format

    return lambda name: DENSE if name in HEAD_NAMES + TASK_HEADS else lookup(name)


def _pattern(key: str) -> re.Pattern[str]:
    """transformers' rule: a name's beginning, up to a dot, matches the key as a pattern, or its end is the key."""
    try:
        return re.compile(rf"\A(?:{key})(?:(?<=\.)|(?=\.|$))|{re.escape(key)}\Z")
    except re.error as error:
        raise FormatError(f"{WHERE}: llm_int8_skip_modules has the pattern {key!r}: {error}") from error


# Both ---------------------------------------------------------------------------------------------------------------


def _expect(keys: dict[str, Any], key: str, allowed: tuple[Any, ...], where: str = WHERE) -> None:
    found = keys.get(key)
    # 4.0 equals 4, but it is not a size.
    same_kind = any(found is a or (found == a and type(found) is type(a)) for a in allowed)
    if not same_kind:
        expected = " or ".join(repr(a) for a in allowed if a is not None) or "none"
        advice = f"{ADVICE[key]}, {AGAIN}" if key in ADVICE else AGAIN.removeprefix("or ")
        raise FormatError(f"{where}: {key} is {found!r}, expected {expected}; {advice}")


def _names(keys: Any, key: str) -> list[str]:
    """A list of module names or patterns; raises FormatError for anything else."""
    names = keys.get(key, []) if isinstance(keys, dict) else None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise FormatError(f"{WHERE}: {key} is {names!r}, expected a list of module names")
    for name in names:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise FormatError(f"{WHERE}: {key} has the pattern {name!r}: {error}") from error
    return names


SCHEMES: dict[str, Callable[[dict[str, Any]], Lookup]] = {
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
}
