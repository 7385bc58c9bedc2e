"""The sampling parameters: one row each, from which come checks, flags, API fields, page controls and docs. Knows no tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import ArgumentError

MIN_TEMPERATURE = 1e-5  # below it, sampling is greedy: logits divided by less could overflow float32
MAX_BIAS = 100.0


class Slider(NamedTuple):
    """A number's control on the page, which may have narrower bounds than the number."""

    label: str
    low: float
    high: float
    step: float


@dataclass(frozen=True)
class Parameter:
    """A row. name: as `generate` takes it. kind: bool, int, float or dict. default: of `generate`, which is transformers'.

    help: a phrase for docs, flags and controls. low, high: bounds of a number. neutral: the value without an effect; it is
    what the commands, the page and the API take where neither the request nor generation_config.json has one. sampled: it acts
    only when sampling. on_device: a device can apply it. flag: placeholder of the command line's flag. other_names: under
    which other programs repeat it.
    """

    name: str
    kind: type
    default: Any
    help: str
    low: float = 0
    high: float = 0
    neutral: Any = None
    sampled: bool = False
    on_device: bool = False
    flag: str = ""
    slider: Slider | None = None
    other_names: tuple[str, ...] = ()

    def parse(self, value: Any) -> Any:
        """A value of this kind. Raises ArgumentError for another kind, and for a number that is not finite."""
        if self.kind is dict:
            return value
        try:
            plain = self.kind(value)
            whole = self.kind is not int or plain == value
            if isinstance(value, str) or not whole or (self.kind is bool and value not in (0, 1)):
                raise TypeError
        except (TypeError, ValueError, OverflowError):
            raise ArgumentError(f"{self.name} is {value!r}, expected a {self.kind.__name__}") from None
        return plain

    def check(self, value: Any) -> None:
        """Raise ArgumentError for a number out of bounds."""
        if self.kind in (int, float) and not self.low <= value <= self.high:
            raise ArgumentError(f"{self.name} is {value}, expected {self.low} to {self.high}")


def _row(default: Any, help: str, low: float = 0, high: float = 0, **more: Any) -> Any:
    """A field of SamplingParameters and its row; `neutral` is the default where it is not given."""
    given = {"default_factory": dict} if default is dict else {"default": default}
    value = {} if default is dict else default
    row = {"default": value, "neutral": value, "help": help, "low": low, "high": high, **more}
    return field(**given, metadata=row)


@dataclass(frozen=True)
class SamplingParameters:
    """How a token is sampled: the table. A parameter is a row here, and a filter or processor of its name in sampling.py."""

    do_sample: bool = _row(
        False,
        "samples; otherwise the likeliest id is taken, and what acts only when sampling has no effect",
        on_device=True,
    )
    temperature: float = _row(
        1.0, "divides the logits, so that more is more surprising; 0 takes the likeliest id",
        0.0, 100.0, sampled=True, on_device=True, flag="T", slider=Slider("Temperature", 0, 2, 0.05),
    )  # fmt: skip
    top_k: int = _row(
        50, "keeps the k likeliest ids; 0 keeps all",
        0, 2**31 - 1, neutral=0, sampled=True, on_device=True, flag="K", slider=Slider("Top-k", 0, 200, 1),
    )  # fmt: skip
    top_p: float = _row(
        1.0, "keeps the likeliest ids that together have this probability; 1 keeps all",
        0.0, 1.0, sampled=True, on_device=True, flag="P", slider=Slider("Top-p", 0, 1, 0.01),
    )  # fmt: skip
    min_p: float = _row(
        0.0, "keeps ids of at least this share of the likeliest one's probability; 0 keeps all",
        0.0, 1.0, sampled=True, on_device=True, flag="P", slider=Slider("Min-p", 0, 1, 0.01),
    )  # fmt: skip
    typical_p: float = _row(
        1.0, "keeps the ids nearest to the expected surprise that together have this probability; 1 keeps all",
        0.0, 1.0, sampled=True, flag="P", slider=Slider("Typical-p", 0.01, 1, 0.01), other_names=("typical",),
    )  # fmt: skip
    repetition_penalty: float = _row(
        1.0, "above 1 makes ids of the prompt and the answer less likely",
        0.01, 100.0, flag="R", slider=Slider("Repetition penalty", 0.5, 2, 0.01), other_names=("rep_pen", "repeat_penalty"),
    )  # fmt: skip
    frequency_penalty: float = _row(
        0.0, "lowers the logit of an id for each time it was generated",
        -2.0, 2.0, flag="F", slider=Slider("Frequency penalty", -2, 2, 0.05),
    )  # fmt: skip
    presence_penalty: float = _row(
        0.0, "lowers the logit of an id once if it was generated",
        -2.0, 2.0, flag="F", slider=Slider("Presence penalty", -2, 2, 0.05),
    )  # fmt: skip
    no_repeat_ngram_size: int = _row(
        0, "no run of this many tokens comes twice; 0 is off",
        0, 2**31 - 1, flag="N", slider=Slider("No-repeat n-gram", 0, 10, 1),
    )  # fmt: skip
    logit_bias: Mapping[int, float] = _row(dict, "is added to the logits of ids, -100 to 100")
    sequence_bias: Mapping[tuple[int, ...], float] = _row(
        dict, "is added to the logit of a sequence's last id where the ids before it have just come; -inf forbids it"
    )
    seed: int = _row(
        0, "makes sampling repeatable, whatever else runs",
        0, 2**64 - 1, sampled=True, on_device=True, flag="S", other_names=("sampler_seed",),
    )  # fmt: skip

    def __post_init__(self) -> None:
        for parameter in PARAMETERS:
            parameter.check(getattr(self, parameter.name))
        for token, bias in self.logit_bias.items():
            if token < 0:
                raise ArgumentError(f"logit_bias: found id {token}, expected ids from 0 on")
            if not -MAX_BIAS <= bias <= MAX_BIAS:
                raise ArgumentError(f"logit_bias: the bias of id {token} is {bias}, expected {-MAX_BIAS} to {MAX_BIAS}")

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature < MIN_TEMPERATURE

    @cached_property
    def host_reason(self) -> str | None:
        """Which of these a device cannot apply; None where it can apply all."""
        for parameter in PARAMETERS:
            if not parameter.on_device and getattr(self, parameter.name) != parameter.neutral:
                return f"{parameter.name} is the host's work"
        return None


KINDS = {"bool": bool, "int": int, "float": float}
PARAMETERS = tuple(
    Parameter(f.name, KINDS.get(str(f.type), dict), **f.metadata) for f in dataclasses.fields(SamplingParameters)
)
BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}
NUMBERS = tuple(parameter for parameter in PARAMETERS if parameter.kind in (int, float))
SAMPLED = frozenset(parameter.name for parameter in PARAMETERS if parameter.sampled)
# Below generation_config.json and a request, everywhere but in `generate` itself, whose defaults are transformers'.
NEUTRAL = {parameter.name: parameter.neutral for parameter in PARAMETERS if parameter.neutral != parameter.default}
