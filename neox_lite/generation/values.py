"""Options of `generate`, one kind of value at a time: checked, and in the form that generation reads. Knows no model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import ArgumentError
from .speculative import Speculation


def parse_biases(value: Any) -> dict[int, float]:
    """Biases by id; ids may be numbers in strings, as JSON has them."""
    if not isinstance(value, Mapping):
        raise ArgumentError(f"logit_bias is {value!r}, expected a bias for each of some ids: {{42: -5.0}}")
    found = {}
    for token, bias in value.items():
        try:
            number = int(token)
            if isinstance(token, bool | float) or isinstance(bias, bool | str):
                raise TypeError
            found[number] = float(bias)
        except (TypeError, ValueError, OverflowError):
            raise ArgumentError(f"logit_bias: found {token!r}: {bias!r}, expected an id and a number") from None
    return found


def parse_sequence_biases(merged: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """sequence_bias, with what bad_words_ids and suppress_tokens forbid; as in transformers, no word forbids the end."""
    given, words = merged.pop("sequence_bias", {}), merged.pop("bad_words_ids", [])
    suppressed, ends = parse_ids("suppress_tokens", merged.pop("suppress_tokens", None)), merged["eos_token_id"]
    try:
        pairs = given.items() if isinstance(given, Mapping) else given
        found = {tuple(ids): float(bias) for ids, bias in pairs}
        forbidden = [tuple(word) for word in words]
        if any(math.isnan(bias) or bias == math.inf for bias in found.values()):
            raise TypeError
        if not all(ids and all(type(i) is int for i in ids) for ids in (*found, *forbidden)):
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(
            f"sequence_bias is {given!r} and bad_words_ids is {words!r}, expected {{(42, 7): -5.0}} and [[42, 7]]"
        ) from None
    forbidden += [(i,) for i in suppressed]
    allowed = {(i,) for i in ends if i not in suppressed}
    return found | {ids: -math.inf for ids in forbidden if ids not in allowed}


def time_limit(seconds: Any) -> Callable[[Tensor, Tensor], bool]:
    """A criterion that stops from so many seconds after now on."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
        raise ArgumentError(f"max_time is {seconds!r}, expected a number of seconds")
    start = time.monotonic()
    return lambda ids, scores: time.monotonic() - start >= seconds


def check_count(name: str, value: Any, low: int, high: int | None = None) -> None:
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if value is not None and not valid:
        bound = "" if high is None else f" and at most {high}"
        raise ArgumentError(f"{name} is {value!r}, expected an integer of at least {low}{bound}")


def check_drafts(merged: dict[str, Any]) -> None:
    draft, counts = merged.get("assistant_model"), merged.get("speculation")
    if draft is not None and not all(hasattr(draft, name) for name in ("new_pool", "step", "config")):
        package = type(draft).__module__.partition(".")[0]
        origin = "" if package == "builtins" else f" of {package}"
        raise ArgumentError(
            f"assistant_model is a {type(draft).__name__}{origin}, expected one of neox_lite: load its folder with "
            "neox_lite.GPTNeoXForCausalLM.from_pretrained"
        )
    if draft is not None and merged.get("prompt_lookup_num_tokens") is not None:
        raise ArgumentError("assistant_model and prompt_lookup_num_tokens exclude each other; leave one out")
    if counts is not None and not isinstance(counts, Speculation):
        raise ArgumentError(f"speculation is a {type(counts).__name__}, expected a Speculation to count in")


def parse_ids(name: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value.tolist() if isinstance(value, Tensor) else value
    ids = list(ids) if isinstance(ids, list | tuple | set) else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ArgumentError(f"{name} is {value!r}, expected an id or a list of ids")
    return tuple(i for i in ids if i >= 0)


def parse_texts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = tuple(value) if isinstance(value, list | tuple | set) else (value,)
    if not all(isinstance(t, str) and t for t in texts):
        raise ArgumentError(f"stop_strings is {value!r}, expected texts that are not empty")
    return texts


def parse_callables(name: str, value: Any) -> tuple[Callable[[Tensor, Tensor], Any], ...]:
    found = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(map(callable, found)):
        raise ArgumentError(f"{name} is {value!r}, expected a callable or a list of callables")
    return found
