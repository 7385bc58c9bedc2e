"""The sampling controls: a slider for each number of `parameters`, presets, and from a form's values to options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import gradio as gr

from neox_lite.errors import ArgumentError
from neox_lite.generation.parameters import NUMBERS, SAMPLED

from .components import part


@dataclass(frozen=True)
class Field:
    """A number that `generate` takes under this name. neutral: the value that changes nothing; it is then left out."""

    name: str
    label: str
    low: float
    high: float
    step: float
    neutral: float
    hint: str


FIELDS = tuple(
    Field(p.name, *p.slider, p.neutral, p.help[:1].upper() + p.help[1:]) for p in NUMBERS if p.slider is not None
)
LIMIT = Field("max_new_tokens", "Max new tokens", 0, 4096, 1, 0, "0 goes on to the end of the context")
TEXTS = {
    "seed": ("Seed", "A number makes an answer repeatable; empty is random"),
    "stop": ("Stop strings", "One in each line; \\n stands for a line break"),
    "logit_bias": ("Logit bias", "id:bias in each line, as in 42:-5"),
}
NEUTRAL = {field.name: field.neutral for field in FIELDS}
PRESETS = {
    "Precise": {"temperature": 0.3, "top_p": 0.9, "repetition_penalty": 1.05},
    "Balanced": {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.05},
    "Creative": {"temperature": 1.1, "min_p": 0.05},
    "Greedy": {"temperature": 0.0},
}
DEFAULT = {**NEUTRAL, **PRESETS["Balanced"], "max_new_tokens": 256, "seed": "", "stop": "", "logit_bias": ""}
MAX_STOPS, MAX_BIASES, MAX_STOP_CHARACTERS = 16, 300, 200  # stop strings, biased ids, characters of a stop string
SEEDS = 2**63


def settings_part() -> gr.HTML:
    """The panel; events that ask for tokens hold what `options_of` reads."""
    fields = [asdict(field) for field in (*FIELDS, LIMIT)]
    presets = {name: {**NEUTRAL, **values} for name, values in PRESETS.items()}
    return part("settings", initial=dict(DEFAULT), fields=fields, texts=TEXTS, presets=presets)


def options_of(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of `generate` that the controls show, so that generation_config.json never hides behind a control."""
    values = values or {}
    options: dict[str, Any] = {f.name: _number(f, values.get(f.name, f.neutral)) for f in (*FIELDS, LIMIT)}
    options["do_sample"] = options["temperature"] > 0
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in SAMPLED}
    if options["max_new_tokens"] == LIMIT.neutral:
        del options["max_new_tokens"]
    readers = {"seed": _seed, "stop": _stops, "logit_bias": _biases}
    for name, read in readers.items():
        if text := str(values.get(name) or "").strip("\n" if name == "stop" else None):
            options[name] = read(text)
    return options


def _number(field: Field, value: Any) -> float | int:
    """A control's value within its bounds, whole where its step is."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        found = "empty" if value == "" else repr(value)
        raise ArgumentError(f"{field.label} is {found}, expected a number from {field.low} to {field.high}") from None
    if not field.low <= number <= field.high:
        raise ArgumentError(f"{field.label} is {number:g}, expected {field.low} to {field.high}")
    return round(number) if field.step == 1 else number


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > len(str(SEEDS)) or int(text) >= SEEDS:
        raise ArgumentError(
            f"Seed is {text[:40]!r}, expected a whole number from 0 to 2^63 - 1, or nothing for a random one"
        )
    return int(text)


def _stops(text: str) -> list[str]:
    stops = [line.replace("\\n", "\n") for line in text.splitlines() if line]
    if len(stops) > MAX_STOPS or max(map(len, stops), default=0) > MAX_STOP_CHARACTERS:
        raise ArgumentError(f"Stop strings: at most {MAX_STOPS} lines of at most {MAX_STOP_CHARACTERS} characters")
    return stops


def _biases(text: str) -> dict[int, float]:
    biases: dict[int, float] = {}
    for line in text.replace(",", "\n").splitlines():
        if not line.strip():
            continue
        try:
            id, bias = line.split(":")
            biases[int(id)] = float(bias)
        except ValueError:
            raise ArgumentError(f"Logit bias: {line[:40]!r} is not of the form id:bias, as in 42:-5") from None
    if len(biases) > MAX_BIASES:
        raise ArgumentError(f"Logit bias: {len(biases)} ids, at most {MAX_BIASES}")
    return biases
