"""`generate` and `stream`: prompts and options in, tokens and text out, over a small step protocol. Knows no model class."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..cache import PrefixCache
from ..config import GPTNeoXConfig
from ..errors import ArgumentError, UnsupportedError
from ..outputs import ModelOutput
from ..tokenizer import GPTNeoXTokenizerFast
from ..units import PAGE
from .options import GenerationConfig, Options, as_dict
from .protocols import Stepper
from .request import Row, StopText, check_ids, hold_back_end, processors
from .sampling import choose
from .scheduler import Scheduler
from .speculative import LONGEST, Drafting, DraftModel, PassTimes, PromptLookup, check_vocabularies

NEW_POOL_PAGES = 64  # that a pool without a limit starts with at most


@dataclass(frozen=True)
class Event:
    """One token as it is chosen.

    text: what it completes, "" where that is no whole character yet; stop strings and special tokens are cut. token: its id.
    finish_reason: with the last one "stop" (end of text or a stop string) or "length", else None.
    """

    text: str
    token: int | None
    finish_reason: str | None = None


def decode(
    stepper: Stepper, prefixes: PrefixCache, rows: Sequence[Row], drafting: Drafting | None = None
) -> Generator[list[Row], None, None]:
    """Generate all rows together; each iteration yields the rows that just got a token. Raises what ends a row with an error.

    Rows that begin alike share what they begin with. Sequences go back to `prefixes` as rows end, also when the caller stops
    early; after an error they are freed.
    """
    scheduler = Scheduler(stepper, prefixes, drafting)
    for row in rows:
        scheduler.add(row)
    try:
        while scheduler.busy:
            for changed in scheduler.step():
                for row in changed:
                    if row.error is not None:
                        raise row.error
                yield changed
    except Exception:
        scheduler.close(keep=False)  # what an error left is not for later prompts
        raise
    finally:
        scheduler.close()


def _draft_choice(options: Options, missing_ids: Tensor, vocabulary: int) -> Callable[[Any, Tensor, Tensor], int]:
    """How a draft model's logits become an id of the target's vocabulary: as the target's own do.

    The user's processors are left out: they may remember their calls, which are one for each token.
    """

    def draw(row: Row, history: Tensor, logits: Tensor) -> int:
        lacking = torch.full((max(0, vocabulary - len(logits)),), float("-inf"))
        logits = torch.cat((logits[:vocabulary], lacking)) if len(lacking) else logits[:vocabulary]
        logits = hold_back_end(len(row.prompt), len(history), logits, options)
        steps = processors(options, missing_ids, len(row.prompt), users=False)
        return choose(logits, history, row.stream, options.sampling, steps)

    return draw


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
        options = Options.parse(as_dict(self.generation_config), as_dict(config), given)
        options.warn_of_what_is_without_effect(given)
        if options.assistant_model is not None:
            self._check_draft(options.assistant_model)
        return options

    def _rows(self, prompts: Sequence[list[int]], options: Options) -> list[Row]:
        """One row for each sample. Rows of equal prompts draw from different random streams, numbered from 0."""
        rows: list[Row] = []
        seen: Counter[tuple[int, ...]] = Counter()
        context, vocabulary = self.config.max_position_embeddings, self.config.vocab_size
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ArgumentError(f"prompt {i} is empty; give at least one token, for instance bos_token_id")
            limit = options.new_tokens(len(prompt), context)
            check_ids(prompt, options, vocabulary)
            for _ in range(options.num_return_sequences):
                text = StopText(self.tokenizer, options.stop_strings) if options.stop_strings else None
                rows.append(Row(prompt, limit, seen[tuple(prompt)], text, options, self.missing_ids))
                seen[tuple(prompt)] += 1
        return rows

    def forget(self) -> None:
        """Free the pages kept for later prompts."""
        self._lasting = None

    def _cache_key(self) -> Any:
        """What kept pages depend on: they are dropped when it changes."""
        return self.cache_pages

    @contextmanager
    def lend(self: Any, pages: int, keep_bytes: int = 0) -> Iterator[Lasting]:
        """The lasting cache, or one for this call alone where another has it.

        pages: what the call needs at most. keep_bytes: of pages that may stay, where a context's are fewer.
        """
        limit, context = self.cache_pages, -(-self.config.max_position_embeddings // PAGE)
        size = self.first_pages or limit or min(pages, NEW_POOL_PAGES)
        stay = self.first_pages or limit or context
        if keep_bytes:
            stay = max(stay, keep_bytes // self.new_pool().page_bytes)
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
        lasting.prefixes.budget = stay = max(stay, lasting.prefixes.budget)
        try:
            yield lasting
        finally:
            lasting.lent.release()
            if lasting.prefixes.pool.pages > max(size, 2 * stay) and self._lasting is lasting:
                self.forget()  # a large batch made it grow, and that is not to stay

    def _decode(self: Any, rows: list[Row], options: Options) -> Generator[list[Row], None, None]:
        pages = sum(-(-(len(row.prompt) + row.limit) // PAGE) for row in rows)
        with self.lend(pages) as lasting, self._drafting(options, lasting.times, pages) as drafting:
            yield from decode(self, lasting.prefixes, rows, drafting)

    @contextmanager
    def _drafting(self: Any, options: Options, times: PassTimes, pages: int) -> Iterator[Drafting | None]:
        """Speculation as the options ask for it."""
        draft, longest = options.assistant_model, options.prompt_lookup_num_tokens
        if draft is not None:
            missing, size = self.missing_ids, self.config.vocab_size
            lent: AbstractContextManager[Lasting]
            if isinstance(draft, GenerationMixin):
                lent = draft.lend(pages)
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

    def _generate(self: Any, input_ids: Tensor | None, given: dict[str, Any]) -> Any:
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
        padded = _pad(ids, rows, options).to(self.device)
        if not options.return_dict_in_generate:
            return padded
        return ModelOutput(
            sequences=padded,
            scores=_steps_of([row.kept_scores for row in rows], padded) if options.output_scores else None,
            logits=_steps_of([row.kept_logits for row in rows], padded) if options.output_logits else None,
        )

    def compute_transition_scores(
        self, sequences: Tensor, scores: Sequence[Tensor], beam_indices: None = None, normalize_logits: bool = False
    ) -> Tensor:
        """What `scores` say of each new token of `sequences` -> (batch, new tokens); normalize_logits: log-probabilities."""
        if beam_indices is not None:
            raise UnsupportedError("beam_indices: beam search is not supported; leave it out")
        steps = torch.stack(tuple(scores), 1)  # (batch, new tokens, vocabulary)
        chosen = sequences[:, sequences.shape[1] - steps.shape[1] :, None].to(steps.device)
        return (steps.log_softmax(-1) if normalize_logits else steps).gather(2, chosen)[..., 0]

    def _stream(self, prompt: str | Tensor | Sequence[int], given: dict[str, Any]) -> Iterator[Event]:
        options = self._options(dict(given))
        if options.num_return_sequences != 1:
            raise ArgumentError("stream yields one sequence; leave num_return_sequences out")
        if options.return_dict_in_generate:
            raise ArgumentError("stream yields events; leave return_dict_in_generate out, or pass it to generate")
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


def _steps_of(rows: list[list[Tensor]], padded: Tensor) -> tuple[Tensor, ...]:
    """Rows' (vocabulary,) of each new token as, for each new token, (rows, vocabulary); padding is certain: 0, others -inf."""
    width = max(map(len, rows))
    steps = []
    for i in range(width):
        found = torch.full((len(rows), len(rows[0][0])), float("-inf"))
        for n, row in enumerate(rows):
            if i < len(row):
                found[n] = row[i]
            else:
                found[n, padded[n, padded.shape[1] - width + i]] = 0.0
        steps.append(found.to(padded.device))
    return tuple(steps)


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
