"""Prefill, decode, stop rules and streaming over a small step protocol. Knows no model class and no weight format."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .cache import PAGE, PagePool
from .cache import Sequence as CachedSequence
from .config import GPTNeoXConfig, read_json
from .errors import ArgumentError, ContextLengthError, UnsupportedError
from .sampling import Processor, Sampling, choose
from .tokenizer import GPTNeoXTokenizerFast, StreamDecoder

PREFILL_TOKENS = 512  # tokens of a prompt that go through the model at a time
DEFAULT_NEW_TOKENS = 20  # transformers' default

SAMPLING_FIELDS = {f.name for f in dataclasses.fields(Sampling)}
# transformers' options that are honoured only at the value that means "off", with what to do instead.
OFF_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1, None), "beam search is not supported; use do_sample=True or greedy decoding"),
    "num_beam_groups": ((1, None), "beam search is not supported; use do_sample=True or greedy decoding"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search is not supported; use do_sample=True with top_p"),
    "dola_layers": ((None,), "DoLa is not supported; use do_sample=True with top_p"),
    "constraints": ((None,), "constrained beams are not supported; use logits_processor"),
    "force_words_ids": ((None,), "constrained beams are not supported; use logits_processor"),
    "assistant_model": ((None,), "speculative decoding is not in this version; leave it out"),
    "prompt_lookup_num_tokens": ((None,), "speculative decoding is not in this version; leave it out"),
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
    "bos_token_id",
    "decoder_start_token_id",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "cache_implementation",
    "low_memory",
    "trust_remote_code",
    "synced_gpus",
    "disable_compile",
}


class Stepper(Protocol):
    """What generation asks of a model: a pool for its cache, and logits after appending tokens to sequences."""

    def new_pool(self, pages: int = 0, limit: int | None = None) -> PagePool: ...

    def step(self, pool: PagePool, sequences: Sequence[CachedSequence], tokens: Sequence[Sequence[int]]) -> Tensor: ...


@dataclass(frozen=True)
class Event:
    """One token as it is chosen: the text it completes (stop strings and special tokens cut), and at the end, why."""

    text: str
    token: int | None
    finish_reason: str | None = None  # "stop" (end of text or a stop string) or "length"


@dataclass(frozen=True)
class Options:
    """What `generate` and `stream` take.

    sampling: see Sampling. max_new_tokens counts new tokens; max_length counts the prompt too; with neither, 20 new tokens
    or what the context leaves. eos_token_id: ids that end a sequence. stop_strings: texts that end it; `stream` cuts them.
    num_return_sequences: samples a prompt. logits_processor: callables (ids (1, n), logits (1, vocabulary)) -> logits;
    stopping_criteria: callables (ids (1, n), logits) -> bool. streamer: an object with put(ids) and end().
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    stop_strings: tuple[str, ...] = ()
    num_return_sequences: int = 1
    logits_processor: tuple[Callable[[Tensor, Tensor], Tensor], ...] = ()
    stopping_criteria: tuple[Callable[[Tensor, Tensor], Any], ...] = ()
    streamer: Any = None

    @classmethod
    def parse(cls, *layers: dict[str, Any]) -> Options:
        """Merge layers of option names and values, later ones winning; None means "as below"."""
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= {k: v for k, v in layer.items() if v is not None}
        if merged.get("stop") is not None:
            merged["stop_strings"] = merged.pop("stop")
        known = {f.name for f in dataclasses.fields(cls)} - {"sampling"} | SAMPLING_FIELDS
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
        if merged.get("seed") is None:  # torch.manual_seed makes scripts repeatable, as they expect
            merged["seed"] = int(torch.randint(2**63 - 1, ()))
        sampling = Sampling(**{k: _number(k, merged.pop(k)) for k in list(merged) if k in SAMPLING_FIELDS})
        for name in ("max_new_tokens", "max_length", "min_new_tokens", "min_length"):
            _check_count(name, merged.get(name), 0)
        _check_count("num_return_sequences", merged.get("num_return_sequences"), 1)
        merged["eos_token_id"] = _ids(merged.get("eos_token_id"))
        merged["stop_strings"] = _texts(merged.get("stop_strings"))
        for name in ("logits_processor", "stopping_criteria"):
            value = merged.get(name, ())
            merged[name] = (value,) if callable(value) and not isinstance(value, list | tuple) else tuple(value)
        options = cls(sampling=sampling, **merged)
        if options.num_return_sequences > 1 and sampling.greedy:
            raise ArgumentError("num_return_sequences above 1 needs do_sample=True: greedy sequences are all the same")
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


def _check_count(name: str, value: Any, low: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
        raise ArgumentError(f"{name} is {value!r}, expected an integer of at least {low}")


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value.tolist() if isinstance(value, Tensor) else value
    ids = [ids] if isinstance(ids, int) else list(ids)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ArgumentError(f"eos_token_id is {value!r}, expected an id or a list of ids")
    return tuple(i for i in ids if i >= 0)


def _texts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(t, str) and t for t in texts):
        raise ArgumentError(f"stop_strings is {value!r}, expected texts that are not empty")
    return texts


class StopText:
    """Turns tokens into text that never shows a stop string, not even its beginning: what might become one is held back."""

    def __init__(self, tokenizer: GPTNeoXTokenizerFast, stops: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
        self._stops = stops
        self._held = ""
        self.stopped = False

    def put(self, token: int) -> str:
        """The text that is certain after one more token; sets `stopped` when a stop string is complete."""
        return self._take(self._decoder.put(token))

    def end(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        text = self._take(self._decoder.end())
        held, self._held = self._held, ""
        return text + held

    def _take(self, piece: str) -> str:
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max((len(s) for s in self._stops), default=1) - 1
        keep = next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


@dataclass
class Row:
    """One sequence being generated."""

    prompt: list[int]
    limit: int  # new tokens at most
    stream: int  # number of its random stream
    sequence: CachedSequence | None = None
    tokens: list[int] = field(default_factory=list)
    text: StopText | None = None
    piece: str = ""  # text that the last token completed
    finish_reason: str | None = None


def decode(
    stepper: Stepper, pool: PagePool, rows: Sequence[Row], options: Options, missing_ids: Tensor | None = None
) -> Iterator[list[Row]]:
    """Generate all rows together; each iteration yields the rows that just got a token.

    missing_ids (n,) int64: ids that are never chosen. Rows with equal prompts share one prefill. Pages are freed as rows
    end, also when the caller stops early.
    """
    steps = [*_restrictions(options, missing_ids), *options.sampling.processors()]
    try:
        active = [row for row in rows if row.limit > 0]
        for row in rows:
            if row.limit == 0:
                row.finish_reason = "length"
        logits = _prefill(stepper, pool, active)
        while active:
            for row, scores in zip(active, logits, strict=True):
                _choose_token(row, scores, options, steps)
            yield active
            for row in active:
                if row.finish_reason and row.sequence is not None:
                    pool.free(row.sequence)
                    row.sequence = None
            active = [row for row in active if not row.finish_reason]
            if active:
                sequences = [row.sequence for row in active if row.sequence is not None]
                logits = list(stepper.step(pool, sequences, [row.tokens[-1:] for row in active]))
    finally:
        for row in rows:
            if row.sequence is not None:
                pool.free(row.sequence)
                row.sequence = None


def _prefill(stepper: Stepper, pool: PagePool, rows: Sequence[Row]) -> list[Tensor]:
    """Logits (vocabulary,) after each row's prompt; a prompt that came before is forked instead of computed again."""
    done: dict[tuple[int, ...], tuple[Row, Tensor]] = {}
    out = []
    for row in rows:
        key = tuple(row.prompt)
        if key in done:
            twin, logits = done[key]
            assert twin.sequence is not None
            row.sequence = pool.fork(twin.sequence)
        else:
            row.sequence = pool.new()
            for start in range(0, len(row.prompt), PREFILL_TOKENS):
                logits = stepper.step(pool, [row.sequence], [row.prompt[start : start + PREFILL_TOKENS]])[0]
            done[key] = row, logits
        out.append(logits)
    return out


def _restrictions(options: Options, missing_ids: Tensor | None) -> list[Processor]:
    """Processors that come before sampling's own: ids that do not exist, and the user's."""
    steps: list[Processor] = []
    if missing_ids is not None and len(missing_ids):
        steps.append(lambda history, logits: logits.index_fill(0, missing_ids, float("-inf")))
    for user in options.logits_processor:
        steps.append(lambda history, logits, user=user: user(history[None], logits[None])[0])  # type: ignore[misc]
    return steps


def _choose_token(row: Row, logits: Tensor, options: Options, steps: list[Processor]) -> None:
    history = row.prompt + row.tokens
    early = len(row.tokens) < options.min_new_tokens or len(history) < options.min_length
    if early and options.eos_token_id:
        logits = logits.index_fill(0, torch.tensor(options.eos_token_id, device=logits.device), float("-inf"))
    token = choose(logits, history, len(history), row.stream, options.sampling, steps)
    row.tokens.append(token)
    row.piece = row.text.put(token) if row.text is not None else ""
    if token in options.eos_token_id or (row.text is not None and row.text.stopped):
        row.finish_reason = "stop"
    elif options.stopping_criteria:
        ids = torch.tensor([row.prompt + row.tokens])
        if any(bool(torch.as_tensor(stop(ids, logits[None])).all()) for stop in options.stopping_criteria):
            row.finish_reason = "stop"
    if row.finish_reason is None and len(row.tokens) >= row.limit:
        row.finish_reason = "length"
    if row.finish_reason and row.text is not None:
        row.piece += row.text.end()


class GenerationConfig:
    """generation_config.json: defaults for `generate`, under transformers' names, as attributes."""

    def __init__(self, **options: Any) -> None:
        known = {f.name for f in dataclasses.fields(Options)} - {"sampling"} | SAMPLING_FIELDS
        unknown = [k for k in options if k not in known | OFF_ONLY.keys() | NO_EFFECT and not k.startswith("_")]
        if unknown:
            warnings.warn(f"generation config: {', '.join(unknown)} unknown and without effect", stacklevel=2)
        self.__dict__.update({k: v for k, v in options.items() if k not in unknown})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if v is not None and not k.startswith("_")}

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> GenerationConfig:
        path = Path(folder) / "generation_config.json"
        return cls(**read_json(path)) if path.is_file() else cls()

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


class GenerationMixin:
    """`generate` and `stream` for a class that is a Stepper and has a config and, where known, a folder with a tokenizer."""

    config: GPTNeoXConfig
    source: Any
    device: torch.device
    _generation_config: GenerationConfig | None = None
    _tokenizer: GPTNeoXTokenizerFast | None = None

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

    @cached_property
    def missing_ids(self) -> Tensor:
        """Ids (n,) that the vocabulary's padding holds and the tokenizer does not have; none where no tokenizer is known."""
        folder = self.source.folder
        if self._tokenizer is None and (folder is None or not (folder / "tokenizer.json").is_file()):
            return torch.empty(0, dtype=torch.long)
        known = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        ids = torch.tensor([i for i in self.tokenizer.get_vocab().values() if i < len(known)], dtype=torch.long)
        known[ids] = True
        return (~known).nonzero().flatten()

    def _options(self, given: dict[str, Any]) -> Options:
        config = given.pop("generation_config", None)
        extra = config if isinstance(config, dict) else config.to_dict() if config is not None else {}
        return Options.parse(self.generation_config.to_dict(), extra, given)

    def _rows(self, prompts: Sequence[list[int]], options: Options) -> list[Row]:
        context = self.config.max_position_embeddings
        rows = []
        for prompt in prompts:
            if not prompt:
                raise ArgumentError("a prompt is empty; give at least one token, for instance bos_token_id")
            if wrong := [i for i in prompt if not 0 <= i < self.config.vocab_size]:
                raise ArgumentError(f"input_ids: found {wrong[0]}, expected 0 to {self.config.vocab_size - 1}")
            limit = options.new_tokens(len(prompt), context)
            for stream in range(options.num_return_sequences):
                text = StopText(self.tokenizer, options.stop_strings) if options.stop_strings else None
                rows.append(Row(list(prompt), limit, stream, text=text))
        return rows

    def _decode(self: Any, rows: list[Row], options: Options) -> Iterator[list[Row]]:
        pages = sum(-(-(len(row.prompt) + row.limit) // PAGE) for row in rows)
        return decode(self, self.new_pool(min(pages, 64)), rows, options, self.missing_ids)

    def _generate(self, input_ids: Tensor | None, given: dict[str, Any]) -> Tensor:
        given = dict(given)
        if (tokenizer := given.pop("tokenizer", None)) is not None:
            self.tokenizer = _own_tokenizer(tokenizer)
        inputs, mask = given.pop("inputs", None), given.pop("attention_mask", None)
        input_ids = input_ids if input_ids is not None else inputs
        options = self._options(given)
        ids = self._prompt_ids(input_ids)
        keep = _prompt_mask(ids, mask, options)
        rows = self._rows([row[k].tolist() for row, k in zip(ids, keep, strict=True)], options)
        if options.streamer is not None:
            if len(rows) != 1:
                raise ArgumentError(f"streamer works for one sequence, but {len(rows)} are asked for")
            options.streamer.put(ids)
        for changed in self._decode(rows, options):
            if options.streamer is not None:
                options.streamer.put(torch.tensor(changed[0].tokens[-1:]))
        if options.streamer is not None:
            options.streamer.end()
        return self._pad(ids, rows, options)

    def _pad(self, ids: Tensor, rows: list[Row], options: Options) -> Tensor:
        """Prompts as given, each followed by its new tokens, then by padding up to the longest."""
        fill = options.pad_token_id
        if fill is None or fill < 0:
            fill = options.eos_token_id[0] if options.eos_token_id else 0
        width = max(len(row.tokens) for row in rows)
        new = torch.full((len(rows), width), fill, dtype=torch.long)
        for out, row in zip(new, rows, strict=True):
            out[: len(row.tokens)] = torch.tensor(row.tokens, dtype=torch.long)
        repeated = ids.repeat_interleave(options.num_return_sequences, 0)
        return torch.cat((repeated, new), 1).to(self.device)

    def _prompt_ids(self, ids: Any) -> Tensor:
        if ids is None:
            ids = torch.empty(1, 0, dtype=torch.long)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            found = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ArgumentError(f"input_ids is {found}, expected a tensor (batch, tokens) of ids: return_tensors='pt'")
        if ids.shape[1] == 0:
            bos = self.generation_config.bos_token_id
            if bos is None:
                raise ArgumentError("the prompt is empty and the config names no bos_token_id to start from")
            ids = torch.full((ids.shape[0], 1), bos, dtype=torch.long)
        return ids.cpu().long()

    def _stream(self, prompt: str | Tensor | Sequence[int], given: dict[str, Any]) -> Iterator[Event]:
        options = self._options(dict(given))
        if options.num_return_sequences != 1:
            raise ArgumentError("stream yields one sequence; leave num_return_sequences out")
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt).input_ids
        else:
            ids = prompt.flatten().tolist() if isinstance(prompt, Tensor) else list(prompt)
        ids = ids or self._prompt_ids(None)[0].tolist()
        (row,) = self._rows([ids], options)
        row.text = StopText(self.tokenizer, options.stop_strings)
        return self._events(row, options)

    def _events(self, row: Row, options: Options) -> Iterator[Event]:
        if row.limit == 0:
            yield Event("", None, "length")
        for _ in self._decode([row], options):
            yield Event(row.piece, row.tokens[-1], row.finish_reason)


def _own_tokenizer(tokenizer: Any) -> GPTNeoXTokenizerFast:
    if isinstance(tokenizer, GPTNeoXTokenizerFast):
        return tokenizer
    raise ArgumentError(f"tokenizer is a {type(tokenizer).__name__}, expected a neox_lite GPTNeoXTokenizerFast")


def _prompt_mask(ids: Tensor, mask: Any, options: Options) -> Tensor:
    """Which tokens of a padded batch are real: the mask, or, as transformers infers it, all but an unambiguous padding id."""
    if mask is not None:
        mask = torch.as_tensor(mask).cpu()
        if mask.shape != ids.shape:
            raise ArgumentError(f"attention_mask is {tuple(mask.shape)}, expected {tuple(ids.shape)} as input_ids")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ArgumentError("attention_mask holds values other than 0 and 1")
        return mask.bool()
    pad = options.pad_token_id
    if pad is not None and pad not in options.eos_token_id:
        return ids != pad
    return torch.ones_like(ids, dtype=torch.bool)


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
