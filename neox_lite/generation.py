"""Prefill, decode, stop rules and streaming over a small step protocol. Knows no model class and no weight format."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cache import PAGE, PrefixCache, common_length, copied
from .cache import Sequence as CachedSequence
from .config import GPTNeoXConfig, read_json
from .errors import ArgumentError, ConfigError, ContextLengthError, UnsupportedError
from .sampling import Processor, Sampling, choose, exclude
from .speculative import (
    LONGEST,
    Drafting,
    DraftModel,
    PassTimes,
    PromptLookup,
    Speculation,
    check_vocabularies,
)
from .stepper import Stepper, advance
from .tokenizer import GPTNeoXTokenizerFast, StreamDecoder

DEFAULT_NEW_TOKENS = 20  # transformers' default
MAX_RETURN_SEQUENCES = 1 << 12  # bounds on what a hostile generation_config.json can ask for
MAX_TOKEN_ID = 1 << 31
MAX_DRAFT = 1 << 10
NEW_POOL_PAGES = 64  # that a pool without a limit starts with at most

SAMPLING_FIELDS = {f.name for f in dataclasses.fields(Sampling)}
# transformers' options that are honoured only at the value that means "off", with what to do instead.
OFF_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1, None), "beam search is not supported; use do_sample=True or greedy decoding"),
    "num_beam_groups": ((1, None), "beam search is not supported; use do_sample=True or greedy decoding"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search is not supported; use do_sample=True with top_p"),
    "dola_layers": ((None,), "DoLa is not supported; use do_sample=True with top_p"),
    "constraints": ((None,), "constrained beams are not supported; use logits_processor"),
    "force_words_ids": ((None,), "constrained beams are not supported; use logits_processor"),
    "guidance_scale": ((None, 1, 1.0), "classifier-free guidance is not supported; use logits_processor"),
    "return_dict_in_generate": ((None, False), "generate returns ids; use stream() for more"),
    "output_scores": ((None, False), "use logits_processor to see the scores"),
    "output_logits": ((None, False), "use logits_processor to see the logits"),
    "output_attentions": ((None, False), "attention weights are never materialized"),
    "output_hidden_states": ((None, False), "call forward(output_hidden_states=True) instead"),
    "inputs_embeds": ((None,), "generate takes ids; call forward(inputs_embeds=...) instead"),
    "past_key_values": ((None,), "generate makes its own cache; leave it out"),
    "typical_p": ((None, 1, 1.0), "use min_p or top_p"),
    "epsilon_cutoff": ((None, 0, 0.0), "use min_p or top_p"),
    "eta_cutoff": ((None, 0, 0.0), "use min_p or top_p"),
    "no_repeat_ngram_size": ((None, 0), "use repetition_penalty"),
    "encoder_no_repeat_ngram_size": ((None, 0), "GPT-NeoX has no encoder"),
    "encoder_repetition_penalty": ((None, 1, 1.0), "GPT-NeoX has no encoder"),
    "bad_words_ids": ((None,), "use logits_processor"),
    "sequence_bias": ((None,), "use logits_processor"),
    "suppress_tokens": ((None, []), "use logits_processor"),
    "begin_suppress_tokens": ((None, []), "use logits_processor"),
    "forced_bos_token_id": ((None,), "put the token into the prompt"),
    "forced_eos_token_id": ((None,), "use eos_token_id"),
    "exponential_decay_length_penalty": ((None,), "use logits_processor"),
    "max_time": ((None,), "use stopping_criteria"),
    "watermarking_config": ((None,), "use logits_processor"),
    "token_healing": ((None, False), "cut the prompt at a token boundary"),
}
# Options that change nothing here: the cache is always used, lengths of beams and encoders do not arise.
NO_EFFECT = {
    "use_cache",
    "early_stopping",
    "length_penalty",
    "diversity_penalty",
    "renormalize_logits",
    "remove_invalid_values",
    "transformers_version",
    "decoder_start_token_id",
    "num_assistant_tokens_schedule",
    "cache_implementation",
    "low_memory",
    "trust_remote_code",
    "synced_gpus",
    "disable_compile",
}


@dataclass(frozen=True)
class Event:
    """One token as it is chosen: the text it completes (stop strings and special tokens cut), and at the end, why."""

    text: str
    token: int | None
    finish_reason: str | None = None  # "stop" (end of text or a stop string) or "length"


@dataclass(frozen=True)
class Options:
    """What `generate` and `stream` take.

    sampling: see Sampling; without a seed, torch.manual_seed decides. max_new_tokens counts new tokens and goes before
    max_length, which counts the prompt too; with neither, 20 new tokens or what the context leaves. eos_token_id: ids that
    end a sequence, [] for none. stop_strings (or stop): texts that end it, looked for in the new text; `generate` keeps
    the token that completes one, `stream` cuts the text before it. bos_token_id starts an empty prompt.
    num_return_sequences: samples of each prompt. logits_processor: callables (ids (1, n), logits (1, vocabulary)) -> logits;
    stopping_criteria: callables (ids (1, n), logits) -> bool. streamer: an object with put(ids) and end().

    assistant_model: a smaller model with the same tokenizer that drafts, at most num_assistant_tokens at a time;
    prompt_lookup_num_tokens: drafts of at most so many tokens are looked up in the prompt and what followed it instead. Neither
    changes a token (speculative.py); drafts are as long as pays. speculation: counts what came of them.
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
    assistant_model: Any = None
    num_assistant_tokens: int | None = None
    prompt_lookup_num_tokens: int | None = None
    speculation: Speculation = field(default_factory=Speculation)

    @classmethod
    def parse(cls, *layers: dict[str, Any]) -> Options:
        """Merge layers of option names and values, later ones winning; None means "as below"."""
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= {k: v for k, v in layer.items() if v is not None}
        if "stop" in merged:
            merged["stop_strings"] = merged.pop("stop")
        known = option_names()
        for name in list(merged):
            if name in OFF_ONLY:
                allowed, instead = OFF_ONLY[name]
                if merged.pop(name) not in allowed:
                    raise UnsupportedError(f"{name}: {instead}")
            elif name in NO_EFFECT or name.startswith("_"):
                del merged[name]
            elif name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ArgumentError(
                    f"generate knows no option {name!r}" + (f"; nearest is {near[0]!r}" if near else "")
                )
        if merged.get("do_sample") and "seed" not in merged:  # torch.manual_seed makes scripts repeatable
            merged["seed"] = int(torch.randint(2**63 - 1, ()))
        sampling = Sampling(**{k: _number(k, merged.pop(k)) for k in list(merged) if k in SAMPLING_FIELDS})
        for name in ("max_new_tokens", "max_length", "min_new_tokens", "min_length"):
            _check_count(name, merged.get(name), 0)
        _check_count("num_return_sequences", merged.get("num_return_sequences"), 1, MAX_RETURN_SEQUENCES)
        for name in ("num_assistant_tokens", "prompt_lookup_num_tokens"):
            _check_count(name, merged.get(name), 1, MAX_DRAFT)
        for name in ("bos_token_id", "pad_token_id"):
            _check_count(name, merged.get(name), -1, MAX_TOKEN_ID)
        merged["eos_token_id"] = _ids(merged.get("eos_token_id"))
        merged["stop_strings"] = _texts(merged.get("stop_strings"))
        for name in ("logits_processor", "stopping_criteria"):
            merged[name] = _callables(name, merged.get(name, ()))
        if "streamer" in merged and not (hasattr(merged["streamer"], "put") and hasattr(merged["streamer"], "end")):
            raise ArgumentError(f"streamer is {merged['streamer']!r}, expected an object with put(ids) and end()")
        _check_drafts(merged)
        options = cls(sampling=sampling, **merged)
        if options.num_return_sequences > 1 and sampling.greedy:
            raise ArgumentError(
                "num_return_sequences above 1 needs do_sample=True and a temperature: greedy sequences are all the same"
            )
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            if not sampling.do_sample and layers[-1].get(name) not in (None, 0, getattr(Sampling, name)):
                warnings.warn(f"{name} is without effect, because do_sample is not set", stacklevel=5)
        if layers[-1].get("max_length") is not None and options.max_new_tokens is not None:
            warnings.warn("max_length is without effect, because max_new_tokens is set", stacklevel=5)
        return options

    def new_tokens(self, prompt_tokens: int, context: int) -> int:
        """How many tokens may follow a prompt. Raises ContextLengthError when they do not fit."""
        if self.max_new_tokens is not None:
            wanted = self.max_new_tokens
        elif self.max_length is not None:
            wanted = self.max_length - prompt_tokens
            if wanted < 0:
                raise ArgumentError(
                    f"the prompt has {prompt_tokens} tokens, more than max_length {self.max_length}; raise max_length or "
                    "use max_new_tokens"
                )
        else:
            wanted = max(min(DEFAULT_NEW_TOKENS, context - prompt_tokens), 1)
        if prompt_tokens + wanted > context:
            raise ContextLengthError(
                f"{prompt_tokens} prompt tokens and {wanted} new ones are {prompt_tokens + wanted}, more than the context of "
                f"{context} tokens; shorten the prompt or ask for at most {max(0, context - prompt_tokens)} new tokens"
            )
        return wanted


def option_names() -> set[str]:
    """What `generate` takes, under the names that callers use."""
    return {f.name for f in dataclasses.fields(Options)} - {"sampling"} | SAMPLING_FIELDS


def _number(name: str, value: Any) -> Any:
    kinds = {"do_sample": bool, "top_k": int, "seed": int}
    kind = kinds.get(name, float)
    try:
        plain = kind(value)
        if isinstance(value, str) or (kind is int and plain != value) or (kind is bool and value not in (0, 1)):
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(f"{name} is {value!r}, expected a {kind.__name__}") from None
    return plain


def _check_count(name: str, value: Any, low: int, high: int | None = None) -> None:
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if value is not None and not valid:
        bound = "" if high is None else f" and at most {high}"
        raise ArgumentError(f"{name} is {value!r}, expected an integer of at least {low}{bound}")


def _check_drafts(merged: dict[str, Any]) -> None:
    draft, counts = merged.get("assistant_model"), merged.get("speculation")
    if draft is not None and not all(hasattr(draft, name) for name in ("new_pool", "step", "config")):
        raise ArgumentError(f"assistant_model is a {type(draft).__name__}, expected a GPTNeoXForCausalLM")
    if draft is not None and merged.get("prompt_lookup_num_tokens") is not None:
        raise ArgumentError("assistant_model and prompt_lookup_num_tokens exclude each other; leave one out")
    if counts is not None and not isinstance(counts, Speculation):
        raise ArgumentError(f"speculation is a {type(counts).__name__}, expected a Speculation to count in")


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value.tolist() if isinstance(value, Tensor) else value
    ids = list(ids) if isinstance(ids, list | tuple | set) else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ArgumentError(f"eos_token_id is {value!r}, expected an id or a list of ids")
    return tuple(i for i in ids if i >= 0)


def _texts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = tuple(value) if isinstance(value, list | tuple | set) else (value,)
    if not all(isinstance(t, str) and t for t in texts):
        raise ArgumentError(f"stop_strings is {value!r}, expected texts that are not empty")
    return texts


def _callables(name: str, value: Any) -> tuple[Callable[[Tensor, Tensor], Any], ...]:
    found = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(map(callable, found)):
        raise ArgumentError(f"{name} is {value!r}, expected a callable or a list of callables")
    return found


class StopText:
    """Turns tokens into text that never shows a stop string, not even its beginning: what might become one is held back.

    The stop string that is complete first counts. Special tokens give no text, but one that contains a stop string stops.
    """

    def __init__(self, tokenizer: GPTNeoXTokenizerFast, stops: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
        self._stops = stops
        self._longest = max(map(len, stops), default=1)
        added = tokenizer.added_tokens_decoder if stops else {}
        self._stop_ids = {i for i, t in added.items() if t.special and any(stop in t.content for stop in stops)}
        self._held = ""
        self.stopped = False

    def put(self, token: int) -> str:
        """The text that is certain after one more token; sets `stopped` when a stop string is complete."""
        if token not in self._stop_ids:
            return self._take(self._decoder.put(token))
        text = self.end()
        self.stopped = True
        return text

    def end(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        text = self._take(self._decoder.end())
        held, self._held = self._held, ""
        return text + held

    def _take(self, piece: str) -> str:
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        tails = range(max(0, len(text) - self._longest + 1), len(text))
        hold = next((at for at in tails if any(stop.startswith(text[at:]) for stop in self._stops)), len(text))
        self._held = text[hold:]
        return text[:hold]


@dataclass(eq=False)
class Row:
    """One sequence being generated."""

    prompt: list[int]
    limit: int  # new tokens at most
    stream: int  # number of its random stream
    text: StopText | None = None
    sequence: CachedSequence | None = None
    tokens: list[int] = field(default_factory=list)
    piece: str = ""  # text that the last token completed
    finish_reason: str | None = None
    after_prompt: Tensor | None = None  # logits (vocabulary,)

    def __post_init__(self) -> None:
        self._ids = torch.tensor(self.prompt + [0] * self.limit)

    @property
    def history(self) -> Tensor:
        """Prompt and new tokens (tokens,)."""
        return self._ids[: len(self.prompt) + len(self.tokens)]

    def append(self, token: int) -> None:
        self._ids[len(self.prompt) + len(self.tokens)] = token
        self.tokens.append(token)


def decode(
    stepper: Stepper,
    prefixes: PrefixCache,
    rows: Sequence[Row],
    options: Options,
    missing_ids: Tensor | None = None,
    drafting: Drafting | None = None,
) -> Generator[list[Row], None, None]:
    """Generate all rows together; each iteration yields the rows that just got a token.

    missing_ids (n,) int64: ids that are never chosen. Rows with equal prompts share one prefill. Sequences go back to
    `prefixes` as rows end, also when the caller stops early; after an error they are freed.
    """
    steps = _processors(options, missing_ids)
    active = [row for row in rows if row.limit > 0]
    for row in rows:
        if row.limit == 0:
            row.finish_reason = "length"
    try:
        drafts: list[list[int]] = [[] for _ in active]
        scores = [logits[None] for logits in _prefill(stepper, prefixes, active)]
        while active:
            before = [len(row.tokens) for row in active]
            for chosen in _accept(active, scores, drafts, options, steps):
                for row in chosen:
                    if row.finish_reason:
                        _end(prefixes, drafting, row)
                yield chosen
            if drafting is not None and before[0]:  # the prompt's own pass had no drafts to judge
                drafting.judge(drafts, [row.tokens[n:] for row, n in zip(active, before, strict=True)])
            active = [row for row in active if not row.finish_reason]
            if active:
                drafts, scores = _pass(stepper, prefixes, active, drafting)
    except Exception:
        for row in rows:
            _free(prefixes, row)  # what an error left is not for later prompts
        raise
    finally:
        for row in rows:
            _end(prefixes, drafting, row)


def _accept(
    rows: Sequence[Row],
    scores: Sequence[Tensor],
    drafts: Sequence[Sequence[int]],
    options: Options,
    steps: list[Processor],
) -> Iterator[list[Row]]:
    """Choose a token for every row, then the next for those whose draft said the same, and so on; yields who got one.

    scores[i] (drafted tokens + 1, vocabulary).
    """
    going = list(zip(rows, scores, drafts, strict=True))
    depth = 0
    while going:
        for row, logits, _ in going:
            _choose_token(row, logits[depth], options, steps)
        yield [row for row, _, _ in going]
        going = [
            (row, logits, draft)
            for row, logits, draft in going
            if not row.finish_reason and depth < len(draft) and draft[depth] == row.tokens[-1]
        ]
        depth += 1


def _pass(
    stepper: Stepper, prefixes: PrefixCache, rows: Sequence[Row], drafting: Drafting | None
) -> tuple[list[list[int]], list[Tensor]]:
    """A draft for each row, and logits (drafted tokens + 1, vocabulary) after its last token and every drafted one."""
    pool, sequences = prefixes.pool, []
    drafts: list[list[int]] = [[] for _ in rows]
    for row in rows:
        assert row.sequence is not None
        pool.truncate(row.sequence, len(row.history) - 1)  # without what was drafted in vain
        sequences.append(row.sequence)
    last = [row.tokens[-1:] for row in rows]
    if drafting is None:
        return drafts, list(stepper.step(pool, sequences, last).cpu().split(1))
    drafts = drafting.drafts(rows, [row.limit - len(row.tokens) - 1 for row in rows])
    tokens = [ids + draft for ids, draft in zip(last, drafts, strict=True)]
    with drafting.timing():
        every = {"every": True} if any(drafts) else {}  # a Stepper that never drafts need not know the word
        logits = stepper.step(pool, sequences, tokens, **every).cpu()
    return drafts, list(logits.split([len(ids) for ids in tokens]))


def _end(prefixes: PrefixCache, drafting: Drafting | None, row: Row) -> None:
    """Give back what a row holds, for later prompts that begin alike."""
    if drafting is not None:
        drafting.drafter.drop(row)
    if row.sequence is not None:
        cached = min(row.sequence.length, max(len(row.history) - 1, len(row.prompt)))
        prefixes.pool.truncate(row.sequence, cached)
        prefixes.keep(row.history[:cached], row.sequence, len(row.prompt), row.after_prompt)
        row.sequence = None


def _free(prefixes: PrefixCache, row: Row) -> None:
    if row.sequence is not None:
        prefixes.pool.free(row.sequence)
        row.sequence = None


def _prefill(stepper: Stepper, prefixes: PrefixCache, rows: Sequence[Row]) -> list[Tensor]:
    """Logits (vocabulary,) after each row's prompt, of which only what no earlier prompt began with is computed.

    Prompts go through the model together, after what all of them begin with; one that came before is forked.
    """
    _prefill_common(stepper, prefixes, {tuple(row.prompt) for row in rows})
    logits: dict[tuple[int, ...], Tensor] = {}
    first: dict[tuple[int, ...], Row] = {}
    for row in rows:
        if (prompt := tuple(row.prompt)) not in first:
            first[prompt] = row
            row.sequence, known = prefixes.take(prompt)
            if known is not None:
                logits[prompt] = known
    sequences = {prompt: row.sequence for prompt, row in first.items() if prompt not in logits and row.sequence}
    rest = [prompt[sequence.length :] for prompt, sequence in sequences.items()]
    logits |= zip(sequences, advance(stepper, prefixes.pool, list(sequences.values()), rest), strict=True)
    kept = {prompt: copied(found) if prefixes.budget else None for prompt, found in logits.items()}
    for row in rows:
        prompt = tuple(row.prompt)
        if row is not first[prompt]:
            source = first[prompt].sequence
            assert source is not None
            row.sequence = prefixes.pool.fork(source)
        row.after_prompt = kept[prompt]
    return [logits[tuple(row.prompt)] for row in rows]


def _prefill_common(stepper: Stepper, prefixes: PrefixCache, prompts: Collection[tuple[int, ...]]) -> None:
    """Compute once what several prompts all begin with, and keep it, if that is a page or more."""
    ends = [torch.tensor(prompt) for prompt in (min(prompts), max(prompts))] if len(prompts) > 1 else []
    common = min(prompts)[: common_length(*ends)] if ends else ()
    if len(common) >= PAGE and prefixes.budget:
        sequence, _ = prefixes.take(common)
        advance(stepper, prefixes.pool, [sequence], [common[sequence.length :]])
        prefixes.keep(torch.tensor(common), sequence)


def _processors(options: Options, missing_ids: Tensor | None, users: bool = True) -> list[Processor]:
    """Everything between logits and choice: ids that do not exist, then sampling's own steps around the user's."""
    steps: list[Processor] = []
    if missing_ids is not None and len(missing_ids):
        steps.append(lambda history, logits: exclude(logits, missing_ids))
    return steps + options.sampling.processors([_of_rows(user) for user in options.logits_processor if users])


def _draft_choice(options: Options, missing_ids: Tensor, vocabulary: int) -> Callable[[Any, Tensor, Tensor], int]:
    """How a draft model's logits become an id of the target's vocabulary: as the target's own do.

    The user's processors are left out: they may remember their calls, which are one for each token.
    """
    steps = _processors(options, missing_ids, users=False)

    def draw(row: Row, history: Tensor, logits: Tensor) -> int:
        lacking = torch.full((max(0, vocabulary - len(logits)),), float("-inf"))
        logits = torch.cat((logits[:vocabulary], lacking)) if len(lacking) else logits[:vocabulary]
        logits = _hold_back_end(len(row.prompt), len(history), logits, options)
        return choose(logits, history, row.stream, options.sampling, steps)

    return draw


def _of_rows(user: Processor) -> Processor:
    """A processor of one row from one of a batch, as transformers' are."""
    return lambda history, logits: user(history[None], logits[None])[0]


def _choose_token(row: Row, logits: Tensor, options: Options, steps: list[Processor]) -> None:
    logits = _hold_back_end(len(row.prompt), len(row.history), logits, options)
    token = choose(logits, row.history, row.stream, options.sampling, steps)
    row.append(token)
    row.piece = row.text.put(token) if row.text is not None else ""
    stopped = token in options.eos_token_id or (row.text is not None and row.text.stopped)
    if stopped or any(_says_stop(stop, row, logits) for stop in options.stopping_criteria):
        row.finish_reason = "stop"
    elif len(row.tokens) >= row.limit:
        row.finish_reason = "length"
    if row.finish_reason and row.text is not None:
        row.piece += row.text.end()


def _hold_back_end(prompt_tokens: int, tokens: int, logits: Tensor, options: Options) -> Tensor:
    """Exclude the end of text from logits (vocabulary,) that follow too few tokens."""
    early = tokens - prompt_tokens < options.min_new_tokens or tokens < options.min_length
    if not early or not options.eos_token_id:
        return logits
    known = [i for i in options.eos_token_id if i < len(logits)]
    return exclude(logits, torch.tensor(known, dtype=torch.long))


def _says_stop(criterion: Callable[[Tensor, Tensor], Any], row: Row, logits: Tensor) -> bool:
    return bool(torch.as_tensor(criterion(row.history[None], logits[None])).all())


class GenerationConfig:
    """generation_config.json: defaults for `generate`, under transformers' names, as attributes."""

    def __init__(self, **options: Any) -> None:
        known = option_names() | OFF_ONLY.keys() | NO_EFFECT
        unknown = [k for k in options if k not in known and not k.startswith("_")]
        if unknown:
            warnings.warn(f"generation config: {', '.join(unknown)} unknown and without effect", stacklevel=2)
        self.__dict__.update({k: v for k, v in options.items() if k not in unknown})

    def __getattr__(self, name: str) -> Any:
        if name in option_names() | OFF_ONLY.keys() | NO_EFFECT:
            return None
        raise AttributeError(f"GenerationConfig has no option {name!r}")

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if v is not None and not k.startswith("_")}

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> GenerationConfig:
        path = Path(folder) / "generation_config.json"
        if not path.parent.is_dir():
            raise ConfigError(f"{folder}: no such folder; give the one that holds generation_config.json")
        return cls(**read_json(path)) if path.is_file() else cls()

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


class Lasting:
    """What a model keeps between calls: pages of earlier prompts, and how long its passes take. Lent to one call at a time."""

    def __init__(self, prefixes: PrefixCache, key: Any = None) -> None:
        self.prefixes, self.key, self.times = prefixes, key, PassTimes()
        self.lent = threading.Lock()


class GenerationMixin:
    """`generate` and `stream` for a class that is a Stepper and has a config and, where known, a folder with a tokenizer."""

    config: GPTNeoXConfig
    source: Any
    _generation_config: GenerationConfig | None = None
    _tokenizer: GPTNeoXTokenizerFast | None = None
    _lasting: Lasting | None = None
    _same_tokenizer: tuple[GPTNeoXTokenizerFast, GPTNeoXTokenizerFast] | None = None
    reuse_prefix = True  # keep the pages of prompts and what followed them, for later prompts that begin alike
    cache_pages: int | None = None  # most of the KV cache's pool; None: it grows as it must
    first_pages: int | None = (
        None  # of the pool, allocated at once and kept between calls; None: all, or as many as it takes
    )

    @property
    def generation_config(self) -> GenerationConfig:
        """Defaults of `generate`: generation_config.json's, where the model's folder has one."""
        if self._generation_config is None:
            folder = self.source.folder
            config = GenerationConfig.from_pretrained(folder) if folder is not None else GenerationConfig()
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if getattr(config, name) is None and getattr(self.config, name) is not None:
                    setattr(config, name, getattr(self.config, name))
            self._generation_config = config
        return self._generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self._generation_config = config

    @property
    def tokenizer(self) -> GPTNeoXTokenizerFast:
        """The tokenizer of the model's own folder; may be set."""
        if self._tokenizer is None:
            if self.source.folder is None:
                raise ArgumentError(
                    "this model was not loaded from a folder, so it has no tokenizer; set model.tokenizer"
                )
            self._tokenizer = GPTNeoXTokenizerFast.from_pretrained(self.source.folder)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: GPTNeoXTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.__dict__.pop("missing_ids", None)

    @property
    def _has_tokenizer(self) -> bool:
        folder = self.source.folder
        return self._tokenizer is not None or (folder is not None and (folder / "tokenizer.json").is_file())

    @cached_property
    def missing_ids(self) -> Tensor:
        """Ids (n,) that the vocabulary's padding holds and the tokenizer does not have; none where no tokenizer is known."""
        if not self._has_tokenizer:
            return torch.empty(0, dtype=torch.long)
        known = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        ids = torch.tensor([i for i in self.tokenizer.get_vocab().values() if i < len(known)], dtype=torch.long)
        known[ids] = True
        return (~known).nonzero().flatten()

    def _options(self, given: dict[str, Any]) -> Options:
        if (tokenizer := given.pop("tokenizer", None)) is not None:
            self.tokenizer = _own_tokenizer(tokenizer)
        config = given.pop("generation_config", None)
        options = Options.parse(_as_dict(self.generation_config), _as_dict(config), given)
        if options.assistant_model is not None:
            self._check_draft(options.assistant_model)
        return options

    def _rows(self, prompts: Sequence[list[int]], options: Options) -> list[Row]:
        """One row for each sample. Rows of equal prompts draw from different random streams, numbered from 0."""
        rows: list[Row] = []
        seen: Counter[tuple[int, ...]] = Counter()
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ArgumentError(f"prompt {i} is empty; give at least one token, for instance bos_token_id")
            limit = options.new_tokens(len(prompt), self.config.max_position_embeddings)
            if wrong := [i for i in prompt if not 0 <= i < self.config.vocab_size]:
                raise ArgumentError(f"input_ids: found {wrong[0]}, expected 0 to {self.config.vocab_size - 1}")
            for _ in range(options.num_return_sequences):
                text = StopText(self.tokenizer, options.stop_strings) if options.stop_strings else None
                rows.append(Row(prompt, limit, seen[tuple(prompt)], text))
                seen[tuple(prompt)] += 1
        return rows

    def forget(self) -> None:
        """Free the pages kept for later prompts."""
        self._lasting = None

    def _cache_key(self) -> Any:
        """What kept pages depend on: they are dropped when it changes."""
        return self.cache_pages

    @contextmanager
    def _lend(self: Any, pages: int) -> Iterator[Lasting]:
        """The lasting cache, or one for this call alone where another has it; pages: what the call needs at most."""
        limit, context = self.cache_pages, -(-self.config.max_position_embeddings // PAGE)
        size = self.first_pages or limit or min(pages, NEW_POOL_PAGES)
        stay = self.first_pages or limit or context
        if limit is not None:
            size, stay = min(size, limit), min(stay, limit)
        key, lasting = (limit, self.first_pages, self._cache_key()), self._lasting
        if self.reuse_prefix and (lasting is None or lasting.key != key):
            pool = self.new_pool(size, limit)
            if self.first_pages is None and limit is None and all(s.device.type == "cpu" for s in pool.storage):
                # Memory of the CPU is not taken before it is written to; one context kept and one at work spare all copies.
                pool = self.new_pool(max(pages, 2 * context))
            self._lasting = lasting = Lasting(PrefixCache(pool, stay), key)
        if not self.reuse_prefix or not lasting.lent.acquire(blocking=False):
            yield Lasting(PrefixCache(self.new_pool(size, limit), 0))
            return
        try:
            yield lasting
        finally:
            lasting.lent.release()
            if lasting.prefixes.pool.pages > max(size, 2 * stay) and self._lasting is lasting:
                self.forget()  # a large batch made it grow, and that is not to stay

    def _decode(self: Any, rows: list[Row], options: Options) -> Generator[list[Row], None, None]:
        pages = sum(-(-(len(row.prompt) + row.limit) // PAGE) for row in rows)
        with self._lend(pages) as lasting, self._drafting(options, lasting.times, pages) as drafting:
            yield from decode(self, lasting.prefixes, rows, options, self.missing_ids, drafting)

    @contextmanager
    def _drafting(self: Any, options: Options, times: PassTimes, pages: int) -> Iterator[Drafting | None]:
        """Speculation as the options ask for it."""
        draft, longest = options.assistant_model, options.prompt_lookup_num_tokens
        if draft is not None:
            missing, size = self.missing_ids, self.config.vocab_size
            lent: AbstractContextManager[Lasting]
            if isinstance(draft, GenerationMixin):
                lent = draft._lend(pages)
                missing = torch.cat((missing, draft.missing_ids[draft.missing_ids < size]))
            else:
                lent = nullcontext(Lasting(PrefixCache(draft.new_pool(), 0)))
            with lent as own:
                config, choice = draft.config, _draft_choice(options, missing, size)
                drafter = DraftModel(draft, own.prefixes, choice, config.vocab_size, config.max_position_embeddings)
                longest = options.num_assistant_tokens or LONGEST
                yield Drafting(drafter, longest, times, options.speculation, time.perf_counter)
        elif longest is not None:
            yield Drafting(PromptLookup(), longest, times, options.speculation, time.perf_counter)
        else:
            yield None

    def _check_draft(self, draft: Any) -> None:
        """Refuse a draft model with other ids."""
        own, other = (m.tokenizer if m._has_tokenizer else None for m in (self, draft))
        if own is None or other is None or self._same_tokenizer != (own, other):
            check_vocabularies(own, other, (self.config.vocab_size, draft.config.vocab_size))
            self._same_tokenizer = None if own is None or other is None else (own, other)

    def _generate(self: Any, input_ids: Tensor | None, given: dict[str, Any]) -> Tensor:
        given = dict(given)
        inputs, mask = given.pop("inputs", None), given.pop("attention_mask", None)
        options = self._options(given)
        ids, keep = _prompt_ids(input_ids if input_ids is not None else inputs, mask, options)
        rows = self._rows([row[k].tolist() for row, k in zip(ids, keep, strict=True)], options)
        streamer = options.streamer
        if streamer is not None:
            if len(rows) != 1:
                raise ArgumentError(f"streamer works for one sequence, but {len(rows)} are asked for")
            streamer.put(ids)
        for changed in self._decode(rows, options):
            if streamer is not None:
                streamer.put(torch.tensor(changed[0].tokens[-1:]))
        if streamer is not None:
            streamer.end()
        return _pad(ids, rows, options).to(self.device)

    def _stream(self, prompt: str | Tensor | Sequence[int], given: dict[str, Any]) -> Iterator[Event]:
        options = self._options(dict(given))
        if options.num_return_sequences != 1:
            raise ArgumentError("stream yields one sequence; leave num_return_sequences out")
        if options.streamer is not None:
            raise ArgumentError("stream yields events itself; leave streamer out, or pass it to generate")
        given_ids = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        try:
            ids = torch.as_tensor(given_ids)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ArgumentError(f"prompt is a {type(prompt).__name__}, expected a text or one row of ids") from error
        ids, _ = _prompt_ids(ids[None] if ids.dim() == 1 else ids, None, options)
        if len(ids) != 1:
            raise ArgumentError(f"stream takes one prompt, but {len(ids)} are given; call generate")
        (row,) = self._rows(ids.tolist(), options)
        row.text = StopText(self.tokenizer, options.stop_strings)
        return self._events(row, options)

    def _events(self, row: Row, options: Options) -> Iterator[Event]:
        if row.limit == 0:
            yield Event("", None, "length")
        with closing(self._decode([row], options)) as steps:  # a caller who stops early frees the pages at once
            for _ in steps:
                yield Event(row.piece, row.tokens[-1], row.finish_reason)


def _as_dict(config: Any) -> dict[str, Any]:
    """A GenerationConfig, ours or transformers', or a dict, as what it sets itself."""
    if config is None or isinstance(config, dict):
        return config or {}
    if not hasattr(config, "to_dict"):
        raise ArgumentError(f"generation_config is a {type(config).__name__}, expected a GenerationConfig or a dict")
    return config.to_diff_dict() if hasattr(type(config), "to_diff_dict") else config.to_dict()


def _own_tokenizer(tokenizer: Any) -> GPTNeoXTokenizerFast:
    if isinstance(tokenizer, GPTNeoXTokenizerFast):
        return tokenizer
    raise ArgumentError(f"tokenizer is a {type(tokenizer).__name__}, expected a neox_lite GPTNeoXTokenizerFast")


def _prompt_ids(ids: Any, mask: Any, options: Options) -> tuple[Tensor, Tensor]:
    """Ids (rows, tokens) and which of them are real (rows, tokens) bool; prompts without any token start with bos."""
    if ids is None:
        ids = torch.empty(1, 0, dtype=torch.long)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or (ids.is_floating_point() and ids.numel()) or not len(ids):
        found = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ArgumentError(f"input_ids is {found}, expected a tensor (batch, tokens) of ids: return_tensors='pt'")
    if ids.shape[1]:
        ids = ids.cpu().long()
        return ids, _prompt_mask(ids, mask, options)
    if options.bos_token_id is None:
        raise ArgumentError("the prompt is empty and there is no bos_token_id to start from; give at least one token")
    ids = torch.full((len(ids), 1), options.bos_token_id)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def _prompt_mask(ids: Tensor, mask: Any, options: Options) -> Tensor:
    """Which tokens of a padded batch are real: the mask, or, as transformers infers it, all but an unambiguous padding id."""
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise ArgumentError(f"attention_mask is a {type(mask).__name__}, expected a tensor (batch, tokens)")
        mask = mask.cpu()
        if mask.shape != ids.shape:
            raise ArgumentError(f"attention_mask is {tuple(mask.shape)}, expected {tuple(ids.shape)} as input_ids")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ArgumentError("attention_mask holds values other than 0 and 1")
        return mask.bool()
    if options.pad_token_id is not None and options.pad_token_id not in options.eos_token_id:
        return ids != options.pad_token_id
    return torch.ones_like(ids, dtype=torch.bool)


def _pad(ids: Tensor, rows: list[Row], options: Options) -> Tensor:
    """Prompts as given, each followed by its new tokens, then by padding up to the longest."""
    fill = options.pad_token_id
    if fill is None or fill < 0:
        fill = options.eos_token_id[0] if options.eos_token_id else 0
    width = max(len(row.tokens) for row in rows)
    new = torch.full((len(rows), width), fill, dtype=torch.long)
    for out, row in zip(new, rows, strict=True):
        out[: len(row.tokens)] = torch.tensor(row.tokens, dtype=torch.long)
    repeated = ids.repeat_interleave(options.num_return_sequences, 0)
    return torch.cat((repeated, new), 1)


@dataclass
class Clock:
    """Counts tokens per second between the first and the last token."""

    first: float | None = None
    last: float = 0.0
    tokens: int = 0

    def tick(self) -> None:
        self.last = time.perf_counter()
        self.first = self.first if self.first is not None else self.last
        self.tokens += 1

    @property
    def tokens_per_s(self) -> float | None:
        if self.first is None or self.tokens < 2 or self.last == self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)
