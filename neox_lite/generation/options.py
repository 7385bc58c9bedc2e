"""What generation can be asked for: names, bounds, defaults, and what to use instead of what is refused. Knows no model."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, ConfigError, ContextLengthError, UnsupportedError
from ..files import read_json, write_atomically
from ..hub import Access, fetch_files, local_folder
from .parameters import PARAMETERS
from .sampling import Sampling
from .speculative import Speculation
from .values import (
    check_count,
    check_drafts,
    parse_biases,
    parse_callables,
    parse_ids,
    parse_sequence_biases,
    parse_texts,
    time_limit,
)

FILE = "generation_config.json"
DEFAULT_NEW_TOKENS = 20  # transformers' default
MAX_TOKEN_ID = 1 << 31

# Integers and their bounds, which also limit what a hostile generation_config.json can ask for; None: no upper one.
COUNTS: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "min_new_tokens", "min_length"), (0, None)),
    "num_return_sequences": (1, 1 << 12),
    **dict.fromkeys(("num_assistant_tokens", "prompt_lookup_num_tokens"), (1, 1 << 10)),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), (-1, MAX_TOKEN_ID)),
}
SWITCHES = ("return_dict_in_generate", "output_scores", "output_logits", "renormalize_logits")
# transformers' options that are honoured only at the value that means "off", with what to do instead.
OFF_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1, None), "beam search is not supported; use do_sample=True or greedy decoding"),
    "num_beam_groups": ((1, None), "beam search is not supported; use do_sample=True or greedy decoding"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search is not supported; use do_sample=True with top_p"),
    "dola_layers": ((None,), "DoLa is not supported; use do_sample=True with top_p"),
    "constraints": ((None,), "constrained beams are not supported; use logits_processor"),
    "force_words_ids": ((None,), "constrained beams are not supported; use logits_processor"),
    "guidance_scale": ((None, 1, 1.0), "classifier-free guidance is not supported; use logits_processor"),
    "output_attentions": ((None, False), "attention weights are never materialized"),
    "output_hidden_states": ((None, False), "call forward(output_hidden_states=True) instead"),
    "inputs_embeds": ((None,), "generate takes ids; call forward(inputs_embeds=...) instead"),
    "past_key_values": ((None,), "generate makes its own cache; leave it out"),
    "epsilon_cutoff": ((None, 0, 0.0), "use min_p or top_p"),
    "eta_cutoff": ((None, 0, 0.0), "use min_p or top_p"),
    "encoder_no_repeat_ngram_size": ((None, 0), "GPT-NeoX has no encoder"),
    "encoder_repetition_penalty": ((None, 1, 1.0), "GPT-NeoX has no encoder"),
    "begin_suppress_tokens": ((None, []), "use logits_processor"),
    "forced_bos_token_id": ((None,), "put the token into the prompt"),
    "forced_eos_token_id": ((None,), "use eos_token_id"),
    "exponential_decay_length_penalty": ((None,), "use logits_processor"),
    "watermarking_config": ((None,), "use logits_processor"),
    "token_healing": ((None, False), "cut the prompt at a token boundary"),
}
# Options that change nothing here: the cache is always used, lengths of beams and encoders do not arise.
NO_EFFECT = {
    "use_cache", "early_stopping", "length_penalty", "diversity_penalty", "remove_invalid_values",
    "transformers_version", "decoder_start_token_id", "num_assistant_tokens_schedule", "cache_implementation", "low_memory",
    "trust_remote_code", "synced_gpus", "disable_compile", "token_type_ids",
}  # fmt: skip
# Other options under which these are known: forbidden words are biases, and time that is up is a reason to stop.
OTHER_NAMES = {"stop", "bad_words_ids", "suppress_tokens", "max_time"}


@dataclass(frozen=True)
class Options:
    """What `generate` and `stream` take.

    sampling: the fields of Sampling, each an option of its own; without a seed, torch.manual_seed decides.
    max_new_tokens: of the answer; takes precedence over max_length. With neither, 20 or what the context leaves.
    max_length: tokens of prompt and answer together.
    min_new_tokens: nothing ends the sequence before.
    min_length: the same, counted with the prompt.
    bos_token_id: starts an empty prompt.
    eos_token_id: ids that end a sequence, [] for none.
    pad_token_id: fills sequences that end early.
    stop_strings: (or stop) texts that end it, looked for in the new text; `generate` keeps the token that completes one,
        `stream` cuts the text before it.
    num_return_sequences: samples of each prompt.
    logits_processor: callables (ids (1, n), logits (1, vocabulary)) -> logits.
    stopping_criteria: callables (ids (1, n), logits) -> bool.
    streamer: an object with put(ids) and end().
    return_dict_in_generate: `generate` returns an object with `.sequences`, and those of the next two.
    output_scores: `.scores`, for each new token (batch, vocabulary) float32, from which it was sampled.
    output_logits: `.logits`, of the same shape, as the model returns them.
    renormalize_logits: scores are log-probabilities of what can be sampled.
    assistant_model: a smaller model with the same tokenizer that drafts; changes no token.
    num_assistant_tokens: of a draft at most; its length is chosen for speed.
    prompt_lookup_num_tokens: of a draft at most, which is looked up in the prompt and the answer instead.
    speculation: counts drafts and their acceptance.

    Also bad_words_ids and suppress_tokens, lists of what is never sampled, and max_time, seconds until the last token.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    stop_strings: tuple[str, ...] = ()
    num_return_sequences: int = 1
    logits_processor: tuple[Callable[[Tensor, Tensor], Tensor], ...] = ()
    stopping_criteria: tuple[Callable[[Tensor, Tensor], Any], ...] = ()
    streamer: Any = None
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    renormalize_logits: bool = False
    assistant_model: Any = None
    num_assistant_tokens: int | None = None
    prompt_lookup_num_tokens: int | None = None
    speculation: Speculation = field(default_factory=Speculation)

    @classmethod
    def parse(cls, *layers: dict[str, Any]) -> Options:
        """Merge layers of option names and values, later ones winning; None means "as below"."""
        # 1. The names: refused, without effect, or known.
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= {k: v for k, v in layer.items() if v is not None}
        if "stop" in merged:
            merged["stop_strings"] = merged.pop("stop")
        merged = {name: value for name, value in merged.items() if _is_known(name, value)}
        # 2. How a token is sampled.
        merged["eos_token_id"] = parse_ids("eos_token_id", merged.get("eos_token_id"))
        merged["sequence_bias"] = parse_sequence_biases(merged)
        if "logit_bias" in merged:
            merged["logit_bias"] = parse_biases(merged["logit_bias"])
        # Without a seed, torch.manual_seed makes scripts repeatable.
        if merged.get("do_sample") and "seed" not in merged:
            merged["seed"] = int(torch.randint(2**63 - 1, ()))
        sampling = Sampling(**{p.name: p.parse(merged.pop(p.name)) for p in PARAMETERS if p.name in merged})
        # 3. The other values.
        for name, (low, high) in COUNTS.items():
            check_count(name, merged.get(name), low, high)
        for name in SWITCHES:
            if not isinstance(merged.get(name, False), bool):
                raise ArgumentError(f"{name} is {merged[name]!r}, expected True or False")
        merged["stop_strings"] = parse_texts(merged.get("stop_strings"))
        for name in ("logits_processor", "stopping_criteria"):
            merged[name] = parse_callables(name, merged.get(name, ()))
        if (seconds := merged.pop("max_time", None)) is not None:
            merged["stopping_criteria"] += (time_limit(seconds),)
        if "streamer" in merged and not (hasattr(merged["streamer"], "put") and hasattr(merged["streamer"], "end")):
            raise ArgumentError(f"streamer is {merged['streamer']!r}, expected an object with put(ids) and end()")
        check_drafts(merged)
        options = cls(sampling=sampling, **merged)
        if options.num_return_sequences > 1 and sampling.greedy:
            raise ArgumentError(
                "num_return_sequences above 1 needs do_sample=True and a temperature: greedy sequences are all the same"
            )
        return options

    def warn_of_what_is_without_effect(self, given: Mapping[str, Any]) -> None:
        """Of a script's own options; those who call it stand three calls above the script."""
        for p in PARAMETERS:
            if p.sampled and not self.sampling.do_sample and given.get(p.name) not in (None, 0, p.neutral, p.default):
                warnings.warn(f"{p.name} is without effect, because do_sample is not set", stacklevel=5)
        if given.get("max_length") is not None and self.max_new_tokens is not None:
            warnings.warn("max_length is without effect, because max_new_tokens is set", stacklevel=5)
        for name in ("output_scores", "output_logits"):
            if given.get(name) and not self.return_dict_in_generate:
                warnings.warn(f"{name} is without effect, because return_dict_in_generate is not set", stacklevel=5)

    def new_tokens(self, prompt_tokens: int, context: int) -> int:
        """How many tokens may follow a prompt. Raises ContextLengthError when they do not fit."""
        if self.max_new_tokens is not None:
            new_tokens = self.max_new_tokens
        elif self.max_length is not None:
            new_tokens = self.max_length - prompt_tokens
            if new_tokens < 0:
                raise ArgumentError(
                    f"the prompt has {prompt_tokens} tokens, more than max_length {self.max_length}; raise max_length or "
                    "use max_new_tokens"
                )
        else:
            new_tokens = max(min(DEFAULT_NEW_TOKENS, context - prompt_tokens), 1)
        if prompt_tokens + new_tokens > context:
            room = context - prompt_tokens
            instead = f" or ask for at most {room} new token{'s' if room > 1 else ''}" if room > 0 else ""
            raise ContextLengthError(
                f"{prompt_tokens} prompt tokens and {new_tokens} new ones are {prompt_tokens + new_tokens}, but the "
                f"maximum context length is {context} tokens; shorten the prompt{instead}"
            )
        return new_tokens


def option_names() -> set[str]:
    """What `generate` takes, under the names that callers use."""
    return {f.name for f in dataclasses.fields(Options)} - {"sampling"} | {p.name for p in PARAMETERS}


def _is_known(name: str, value: Any) -> bool:
    """Whether a name is an option; False where it has no effect. Raises for an unknown or unsupported one."""
    if name in OFF_ONLY:
        allowed, instead = OFF_ONLY[name]
        if value not in allowed:
            raise UnsupportedError(f"{name}: {instead}")
        return False
    if name in NO_EFFECT or name.startswith("_"):
        return False
    known = option_names() | OTHER_NAMES
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise ArgumentError(f"generate knows no option {name!r}" + (f"; nearest is {near[0]!r}" if near else ""))
    return True


def known_names() -> set[str]:
    """What a generation_config.json may name: that, other names for it, and what is refused or without effect."""
    return option_names() | OTHER_NAMES | OFF_ONLY.keys() | NO_EFFECT


class GenerationConfig:
    """generation_config.json: defaults for `generate`, under transformers' names, as attributes."""

    def __init__(self, **options: Any) -> None:
        known = known_names()
        unknown = [k for k in options if k not in known and not k.startswith("_")]
        if unknown:
            warnings.warn(f"generation config: {', '.join(unknown)} unknown and without effect", stacklevel=2)
        self.__dict__.update({k: v for k, v in options.items() if k not in unknown})

    def __getattr__(self, name: str) -> Any:
        if name in known_names():
            return None
        raise AttributeError(f"GenerationConfig has no option {name!r}")

    def update(self, **options: Any) -> dict[str, Any]:
        """Set options; return those that are unknown, as transformers does."""
        known = known_names()
        self.__dict__.update({k: v for k, v in options.items() if k in known})
        return {k: v for k, v in options.items() if k not in known}

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if v is not None and not k.startswith("_")}

    def to_diff_dict(self) -> dict[str, Any]:
        """What is set; nothing else is ever held."""
        return self.to_dict()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | os.PathLike[str], revision: str | None = None, **options: Any
    ) -> GenerationConfig:
        """Read generation_config.json of a folder, which may lack it, or of a hub id; options replace what it says."""
        name, access = pretrained_model_name, Access.take(options)
        folder = local_folder(name if isinstance(name, Path) else os.fspath(name), revision)
        path = (folder or fetch_files(os.fspath(name), [FILE], revision, access)) / FILE
        return cls(**{**(read_json(path, ConfigError) if path.is_file() else {}), **options})

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **options: Any) -> GenerationConfig:
        return cls(**{**config_dict, **options})

    def validate(self, strict: bool = False) -> None:
        """Raise for a value that `generate` would refuse."""
        Options.parse(self.to_dict())

    def save_pretrained(self, save_directory: str | os.PathLike[str], config_file_name: str = FILE) -> None:
        """Write it into a folder, under its final name only when complete."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(save_directory) / config_file_name, self.to_json_string())

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


def as_dict(config: Any) -> dict[str, Any]:
    """A GenerationConfig, ours or transformers', or a dict, as what it sets itself."""
    if config is None or isinstance(config, dict):
        return config or {}
    if not hasattr(config, "to_dict"):
        raise ArgumentError(f"generation_config is a {type(config).__name__}, expected a GenerationConfig or a dict")
    return config.to_diff_dict() if hasattr(type(config), "to_diff_dict") else config.to_dict()
