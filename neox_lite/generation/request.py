"""One sequence of a request: its tokens, the text they complete, when and why it ends. Knows no model and no pass."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..cache import BlockTable, copied
from ..errors import ArgumentError
from ..kernels.backend import DeviceSampling
from ..tokenizer import GPTNeoXTokenizerFast, StreamDecoder
from .options import Options
from .sampling import Processor, TokenLogprob, exclude, sample_token, sampled_logits, token_logprob


class StopStringChecker:
    """Decodes tokens to text and stops at stop strings. Text that may begin a stop string is held back.

    The stop string that is complete first counts. Special tokens give no text, but one that contains a stop string stops.
    """

    def __init__(self, tokenizer: GPTNeoXTokenizerFast, stops: abc.Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
        self._stops = stops
        self._longest = max(map(len, stops), default=1)
        added = tokenizer.added_tokens_decoder if stops else {}
        self._stop_ids = {i for i, t in added.items() if t.special and any(stop in t.content for stop in stops)}
        self._held = ""
        self.stopped = False

    def put(self, token: int) -> str:
        """Add a token -> the text that is certain now; sets `stopped` when a stop string is complete."""
        if token not in self._stop_ids:
            return self._append(self._decoder.put(token))
        text = self.end()
        self.stopped = True
        return text

    def end(self) -> str:
        """The text still held back, after the last token."""
        if self.stopped:
            return ""
        text = self._append(self._decoder.end())
        held, self._held = self._held, ""
        return text + held

    def _append(self, piece: str) -> str:
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
class Sequence:
    """One sequence of a request.

    max_tokens: new tokens at most. stream: number of its random stream. padding_ids (n,) int64: ids that pad the vocabulary
    and are never sampled. num_logprobs: None, or how many of the likeliest ids to return with the log-probability of each new
    token. num_prompt_logprobs: the same for the prompt's tokens.
    """

    prompt: abc.Sequence[int]
    max_tokens: int
    stream: int
    stop_checker: StopStringChecker | None = None
    options: Options = field(default_factory=Options)
    padding_ids: Tensor | None = None
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None

    tokens: list[int] = field(default_factory=list)
    new_text: str = ""  # that the last token completed
    logprob: TokenLogprob | None = None  # of the last token
    prompt_logprobs: list[TokenLogprob] = field(init=False)  # of the prompt's first tokens, as far as they are computed
    finish_reason: str | None = None  # "stop", "length", "cancelled", "error"
    error: Exception | None = None
    num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache
    step_scores: list[Tensor] = field(default_factory=list)  # (vocabulary,) of each new token, with output_scores
    step_logits: list[Tensor] = field(default_factory=list)  # the same, with output_logits

    block_table: BlockTable | None = None  # of the tokens in the cache; None while it waits
    prompt_logits: Tensor | None = None  # (vocabulary,) after the prompt
    arrival: int = 0  # its number among the sequences of a scheduler

    def __post_init__(self) -> None:
        self._ids = torch.tensor([*self.prompt, *[0] * self.max_tokens])
        # The same memory: numpy writes single numbers faster.
        self._numpy_ids = self._ids.numpy()
        self.reset_prompt_logprobs()

    @property
    def history(self) -> Tensor:
        """Prompt and new tokens (tokens,)."""
        return self._ids[: self.length]

    @property
    def length(self) -> int:
        """Tokens of the history."""
        return len(self.prompt) + len(self.tokens)

    @property
    def num_uncached(self) -> int:
        """Tokens of a running sequence outside of the cache; below 0 where the cache holds drafts or unread tokens."""
        assert self.block_table is not None
        return self.length - self.block_table.length

    def uncached_tokens(self, count: int) -> list[int]:
        """The next `count` tokens that go into the cache."""
        assert self.block_table is not None
        if count == 1 and self.tokens and self.num_uncached == 1:
            return self.tokens[-1:]
        return self.history[self.block_table.length :][:count].tolist()

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are still missing."""
        return self.num_prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt)

    def append(self, token: int) -> None:
        self._numpy_ids[self.length] = token
        self.tokens.append(token)

    def sample(self, logits: Tensor) -> None:
        """Sample the next token from logits (vocabulary,) on the CPU, and append it."""
        # A copy, because the user's processors may write to the logits.
        own = copied(logits) if self.num_logprobs is not None or self.options.output_logits else logits
        if self.options.output_logits:
            self.step_logits.append(own)
        logits = hold_back_end(len(self.prompt), self.length, logits, self.options)
        token = sample_token(logits, self.history, self.stream, self.options.sampling, self._processors)
        if self.num_logprobs is not None:
            self.logprob = token_logprob(own, token, self.num_logprobs, self.padding_ids)
        self.accept(token, logits)

    def accept(self, token: int, logits: Tensor | None = None) -> None:
        """Append a sampled token and set `finish_reason` if it is the last. logits (vocabulary,): what it was sampled from."""
        self.append(token)
        checker = self.stop_checker
        self.new_text = checker.put(token) if checker is not None else ""
        stopped = token in self.options.eos_token_id or (checker is not None and checker.stopped)
        if stopped or (logits is not None and self._criteria_stop(logits)):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason and checker is not None:
            self.new_text += checker.end()

    def host_reason(self, ahead: int = 0) -> str | None:
        """Why the device cannot sample the token after the next `ahead`; None where it can."""
        options = self.options
        if self.num_logprobs is not None:
            return "log-probabilities are asked for"
        if not 0 <= self.stream < 1 << 32:
            return "the number of its random stream has more than 32 bits"
        for name in ("logits_processor", "stopping_criteria", "output_scores", "output_logits"):
            if getattr(options, name):
                return f"{name} see the logits"
        if is_early(len(self.prompt), self.length + ahead, options):
            return "the end of the text is held back"
        return options.sampling.host_reason

    @cached_property
    def device_sampling(self) -> DeviceSampling:
        """The parameters by which the device samples."""
        sampling = self.options.sampling
        if sampling.greedy:
            return DeviceSampling()
        return DeviceSampling(
            sampling.seed, self.stream, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        )

    def append_prompt_logprobs(self, logits: Tensor) -> None:
        """Add those of the next tokens of the prompt. logits (tokens, vocabulary): after the tokens before them."""
        assert self.num_prompt_logprobs is not None
        for one in logits[: len(self.prompt) - len(self.prompt_logprobs)]:
            token = self.prompt[len(self.prompt_logprobs)]
            self.prompt_logprobs.append(token_logprob(one, token, self.num_prompt_logprobs, self.padding_ids))

    def reset_prompt_logprobs(self) -> None:
        """Start again at the first token, which has none."""
        self.prompt_logprobs = [TokenLogprob(None)]

    @cached_property
    def _processors(self) -> list[Processor]:
        found = processors(self.options, self.padding_ids, len(self.prompt))
        return [*found, self._keep_step_scores] if self.options.output_scores else found

    def _keep_step_scores(self, history: Tensor, logits: Tensor) -> Tensor:
        scores = sampled_logits(logits, self.options.sampling)
        self.step_scores.append(scores.log_softmax(-1) if self.options.renormalize_logits else scores)
        return logits

    def _criteria_stop(self, logits: Tensor) -> bool:
        criteria = self.options.stopping_criteria
        return any(bool(torch.as_tensor(stops(self.history[None], logits[None])).all()) for stops in criteria)


def check_ids(prompt: abc.Sequence[int], options: Options, vocabulary: int) -> None:
    """Raise ArgumentError for ids outside of a vocabulary of that size."""
    sampling = options.sampling
    biased = [i for ids in sampling.sequence_bias for i in ids]
    for name, ids in (("input_ids", prompt), ("logit_bias", sampling.logit_bias), ("sequence_bias", biased)):
        if wrong := [i for i in ids if not 0 <= i < vocabulary]:
            raise ArgumentError(f"{name}: found {wrong[0]}, expected 0 to {vocabulary - 1}")


def processors(options: Options, padding_ids: Tensor | None, prompt: int, users: bool = True) -> list[Processor]:
    """Every processor of a sequence in its order: padding ids, sampling's own, the user's (if `users`)."""
    found: list[Processor] = []
    if padding_ids is not None and len(padding_ids):
        found.append(lambda history, logits: exclude(logits, padding_ids))
    return found + options.sampling.processors([_unbatched(user) for user in options.logits_processor if users], prompt)


def _unbatched(user: Processor) -> Processor:
    """A processor of one sequence from one of a batch, which transformers' are."""
    return lambda history, logits: user(history[None], logits[None])[0]


def is_early(prompt_tokens: int, tokens: int, options: Options) -> bool:
    """Whether min_new_tokens or min_length keep the text from ending after so many tokens."""
    early = tokens - prompt_tokens < options.min_new_tokens or tokens < options.min_length
    return early and bool(options.eos_token_id)


def hold_back_end(prompt_tokens: int, tokens: int, logits: Tensor, options: Options) -> Tensor:
    """Exclude the end of text from logits (vocabulary,) while it is too early for it."""
    if not is_early(prompt_tokens, tokens, options):
        return logits
    known = [i for i in options.eos_token_id if i < len(logits)]
    return exclude(logits, torch.tensor(known, dtype=torch.long))
