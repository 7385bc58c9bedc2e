"""`generate` and `stream`: prompts and options in, tokens and text out, over a small step protocol. Knows no model class."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter, abc
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..cache import PrefixCache
from ..config import GPTNeoXConfig
from ..errors import ArgumentError, UnsupportedError
from ..tokenizer import GPTNeoXTokenizerFast
from ..units import PAGE
from .batch import pad, prompt_ids, stack_steps
from .options import FILE, GenerationConfig, Options, as_dict
from .outputs import ModelOutput
from .protocols import ModelRunner
from .request import Sequence, StopStringChecker, check_ids, hold_back_end, processors
from .sampling import sample_token
from .scheduler import Scheduler
from .speculative import MAX_DRAFT_TOKENS, Drafting, DraftModel, PassTimes, PromptLookup, check_vocabularies

NEW_POOL_PAGES = 64  # at most, at the start of a pool without a limit


@dataclass(frozen=True)
class Event:
    """One new token.

    text: what it completes, "" where that is no whole character yet; stop strings and special tokens are cut. token: its id.
    finish_reason: with the last one "stop" (end of text or a stop string) or "length", else None.
    """

    text: str
    token: int | None
    finish_reason: str | None = None


def decode(
    model_runner: ModelRunner,
    prefixes: PrefixCache,
    sequences: abc.Sequence[Sequence],
    drafting: Drafting | None = None,
) -> Generator[list[Sequence], None, None]:
    """Generate all sequences together; yields those that just got a token. Raises what ends one of them with an error.

    Sequences share the pages of a common prefix. Their pages go to `prefixes` as they end, also when the caller stops early;
    after an error they are freed.
    """
    scheduler = Scheduler(model_runner, prefixes, drafting)
    for sequence in sequences:
        scheduler.add(sequence)
    try:
        while scheduler.busy:
            for changed in scheduler.step():
                for sequence in changed:
                    if sequence.error is not None:
                        raise sequence.error
                yield changed
    except Exception:
        # Pages that an error left half written must not serve later prompts.
        scheduler.close(keep=False)
        raise
    finally:
        scheduler.close()


def _draft_sampler(options: Options, padding_ids: Tensor, vocabulary: int) -> Callable[[Any, Tensor, Tensor], int]:
    """How a draft model samples an id of the target's vocabulary: as the target does.

    The user's processors are left out: they may count their calls, one for each token.
    """

    def sample(sequence: Sequence, history: Tensor, logits: Tensor) -> int:
        lacking = torch.full((max(0, vocabulary - len(logits)),), float("-inf"))
        logits = torch.cat((logits[:vocabulary], lacking)) if len(lacking) else logits[:vocabulary]
        logits = hold_back_end(len(sequence.prompt), len(history), logits, options)
        steps = processors(options, padding_ids, len(sequence.prompt), users=False)
        return sample_token(logits, history, sequence.stream, options.sampling, steps)

    return sample


class PrefixCacheHolder:
    """What a model keeps between calls: its prefix cache, and how long its passes take. One call has it at a time."""

    def __init__(self, prefixes: PrefixCache, key: Any = None) -> None:
        self.prefixes, self.key, self.times = prefixes, key, PassTimes()
        self.lock = threading.Lock()


class GenerationMixin:
    """`generate` and `stream` for a class that is a ModelRunner and has a config and, where it has one, a folder."""

    config: GPTNeoXConfig
    source: Any
    _generation_config: GenerationConfig | None = None
    _tokenizer: GPTNeoXTokenizerFast | None = None
    _cache_holder: PrefixCacheHolder | None = None
    _same_tokenizer: tuple[GPTNeoXTokenizerFast, GPTNeoXTokenizerFast] | None = None
    reuse_prefix = True  # keep a prefix cache between calls
    cache_pages: int | None = None  # of the KV cache's pool at most; None: it grows without limit
    # Pages of the pool that are allocated at once and stay between calls; None: all of a limit, or as many as a call needs.
    first_pages: int | None = None

    @property
    def generation_config(self) -> GenerationConfig:
        """Defaults of `generate`: generation_config.json's, where the model's folder has one, else those in config.json."""
        if self._generation_config is None:
            folder = self.source.folder
            if folder is not None and (folder / FILE).is_file():
                config = GenerationConfig.from_pretrained(folder)
            else:
                config = GenerationConfig(**self.config.generation_settings)
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
        self.__dict__.pop("padding_ids", None)

    @property
    def _has_tokenizer(self) -> bool:
        folder = self.source.folder
        return self._tokenizer is not None or (folder is not None and (folder / "tokenizer.json").is_file())

    @cached_property
    def padding_ids(self) -> Tensor:
        """Ids (n,) int64 that pad the vocabulary: the tokenizer does not have them. Empty without a tokenizer."""
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

    def _sequences(self, prompts: abc.Sequence[list[int]], options: Options) -> list[Sequence]:
        """One sequence for each sample. Those of equal prompts sample from different random streams, numbered from 0."""
        sequences: list[Sequence] = []
        seen: Counter[tuple[int, ...]] = Counter()
        context, vocabulary = self.config.max_position_embeddings, self.config.vocab_size
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ArgumentError(f"prompt {i} is empty; give at least one token, for instance bos_token_id")
            limit = options.new_tokens(len(prompt), context)
            check_ids(prompt, options, vocabulary)
            for _ in range(options.num_return_sequences):
                text = StopStringChecker(self.tokenizer, options.stop_strings) if options.stop_strings else None
                sequences.append(Sequence(prompt, limit, seen[tuple(prompt)], text, options, self.padding_ids))
                seen[tuple(prompt)] += 1
        return sequences

    def forget(self) -> None:
        """Free the prefix cache."""
        self._cache_holder = None

    def _cache_key(self) -> Any:
        """What the prefix cache depends on: a change of it drops the cache."""
        return self.cache_pages

    @contextmanager
    def acquire_prefix_cache(self: Any, pages: int, keep_bytes: int = 0) -> Iterator[PrefixCacheHolder]:
        """The model's prefix cache, or an empty one for this call alone while another call has it.

        pages: what the call needs at most. keep_bytes: of pages that may stay, where those of a context are fewer.
        """
        limit, context = self.cache_pages, -(-self.config.max_position_embeddings // PAGE)
        size = self.first_pages or limit or min(pages, NEW_POOL_PAGES)
        stay = self.first_pages or limit or context
        if keep_bytes:
            stay = max(stay, keep_bytes // self.new_pool().page_bytes)
        if limit is not None:
            size, stay = min(size, limit), min(stay, limit)
        key, holder = (limit, self.first_pages, self._cache_key()), self._cache_holder
        if self.reuse_prefix and (holder is None or holder.key != key):
            pool = self.new_pool(size, limit)
            if self.first_pages is None and limit is None and all(s.device.type == "cpu" for s in pool.storage):
                # The system gives memory where it is written to; one cached context and one running spare all copies.
                pool = self.new_pool(max(pages, 2 * context))
            self._cache_holder = holder = PrefixCacheHolder(PrefixCache(pool, stay), key)
        if not self.reuse_prefix or not holder.lock.acquire(blocking=False):
            yield PrefixCacheHolder(PrefixCache(self.new_pool(size, limit), 0))
            return
        holder.prefixes.budget = stay = max(stay, holder.prefixes.budget)
        try:
            yield holder
        finally:
            holder.lock.release()
            if holder.prefixes.pool.pages > max(size, 2 * stay) and self._cache_holder is holder:
                # A large batch made the pool grow; it does not stay that large.
                self.forget()

    def _decode(self: Any, sequences: list[Sequence], options: Options) -> Generator[list[Sequence], None, None]:
        pages = sum(-(-(len(sequence.prompt) + sequence.max_tokens) // PAGE) for sequence in sequences)
        with self.acquire_prefix_cache(pages) as holder, self._drafting(options, holder.times, pages) as drafting:
            yield from decode(self, holder.prefixes, sequences, drafting)

    @contextmanager
    def _drafting(self: Any, options: Options, times: PassTimes, pages: int) -> Iterator[Drafting | None]:
        """Speculation as the options ask for it."""
        draft, longest = options.assistant_model, options.prompt_lookup_num_tokens
        if draft is not None:
            missing, size = self.padding_ids, self.config.vocab_size
            lent: AbstractContextManager[PrefixCacheHolder]
            if isinstance(draft, GenerationMixin):
                lent = draft.acquire_prefix_cache(pages)
                missing = torch.cat((missing, draft.padding_ids[draft.padding_ids < size]))
            else:
                lent = nullcontext(PrefixCacheHolder(PrefixCache(draft.new_pool(), 0)))
            with lent as own:
                config, choice = draft.config, _draft_sampler(options, missing, size)
                drafter = DraftModel(draft, own.prefixes, choice, config.vocab_size, config.max_position_embeddings)
                longest = options.num_assistant_tokens or MAX_DRAFT_TOKENS
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
        ids, keep = prompt_ids(input_ids if input_ids is not None else inputs, mask, options)
        sequences = self._sequences([row[k].tolist() for row, k in zip(ids, keep, strict=True)], options)
        streamer = options.streamer
        if streamer is not None:
            if len(sequences) != 1:
                raise ArgumentError(f"streamer works for one sequence, but {len(sequences)} are asked for")
            streamer.put(ids)
        for changed in self._decode(sequences, options):
            if streamer is not None:
                streamer.put(torch.tensor(changed[0].tokens[-1:]))
        if streamer is not None:
            streamer.end()
        padded = pad(ids, sequences, options).to(self.device)
        if not options.return_dict_in_generate:
            return padded
        scores = stack_steps([s.step_scores for s in sequences], padded) if options.output_scores else None
        logits = stack_steps([s.step_logits for s in sequences], padded) if options.output_logits else None
        return ModelOutput(sequences=padded, scores=scores, logits=logits)

    def compute_transition_scores(
        self, sequences: Tensor, scores: abc.Sequence[Tensor], beam_indices: None = None, normalize_logits: bool = False
    ) -> Tensor:
        """What `scores` say of each new token of `sequences` -> (batch, new tokens); normalize_logits: log-probabilities."""
        if beam_indices is not None:
            raise UnsupportedError("beam_indices: beam search is not supported; leave it out")
        steps = torch.stack(tuple(scores), 1)  # (batch, new tokens, vocabulary)
        chosen = sequences[:, sequences.shape[1] - steps.shape[1] :, None].to(steps.device)
        return (steps.log_softmax(-1) if normalize_logits else steps).gather(2, chosen)[..., 0]

    def _stream(self, prompt: str | Tensor | abc.Sequence[int], given: dict[str, Any]) -> Iterator[Event]:
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
        ids, _ = prompt_ids(ids[None] if ids.dim() == 1 else ids, None, options)
        if len(ids) != 1:
            raise ArgumentError(f"stream takes one prompt, but {len(ids)} are given; call generate")
        (sequence,) = self._sequences(ids.tolist(), options)
        sequence.stop_checker = StopStringChecker(self.tokenizer, options.stop_strings)
        return self._events(sequence, options)

    def _events(self, sequence: Sequence, options: Options) -> Iterator[Event]:
        if sequence.max_tokens == 0:
            yield Event("", None, "length")
        with closing(self._decode([sequence], options)) as steps:  # a caller who stops early frees the pages at once
            for _ in steps:
                yield Event(sequence.new_text, sequence.tokens[-1], sequence.finish_reason)


def _own_tokenizer(tokenizer: Any) -> GPTNeoXTokenizerFast:
    """tokenizer, or that of transformers, as one of this package."""
    if isinstance(tokenizer, GPTNeoXTokenizerFast):
        return tokenizer
    if hasattr(tokenizer, "backend_tokenizer") and hasattr(tokenizer, "save_pretrained"):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return GPTNeoXTokenizerFast.from_pretrained(folder)
    raise ArgumentError(f"tokenizer is a {type(tokenizer).__name__}, expected a neox_lite GPTNeoXTokenizerFast")
