"""One sequence being generated: its tokens, the text they complete, and when and why it ends. Knows no model and no pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..cache import Sequence as CachedSequence
from ..cache import copied
from ..errors import ArgumentError
from ..kernels.backend import Choice
from ..tokenizer import GPTNeoXTokenizerFast, StreamDecoder
from .options import Options
from .sampling import Processor, Score, choose, drawn_from, exclude, score


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
    """One sequence being generated.

    limit: new tokens at most. stream: number of its random stream. missing_ids (n,) int64: ids that are never chosen.
    scores: how many likeliest ids to tell with each new token's log-probability, None for no such thing; prompt_scores:
    likewise of the prompt's tokens.
    """

    prompt: Sequence[int]
    limit: int
    stream: int
    text: StopText | None = None
    options: Options = field(default_factory=Options)
    missing_ids: Tensor | None = None
    scores: int | None = None
    prompt_scores: int | None = None

    tokens: list[int] = field(default_factory=list)
    piece: str = ""  # text that the last token completed
    score: Score | None = None  # the last token's
    scored: list[Score] = field(init=False)  # the prompt's tokens so far
    finish_reason: str | None = None  # "stop", "length", "cancelled", "error"
    error: Exception | None = None
    reused: int | None = None  # tokens of the prompt that were in the cache
    # (vocabulary,) of each new token, where options ask for them.
    kept_scores: list[Tensor] = field(default_factory=list)
    kept_logits: list[Tensor] = field(default_factory=list)

    sequence: CachedSequence | None = None  # what of the history is in the cache
    after_prompt: Tensor | None = None  # logits (vocabulary,)
    number: int = 0  # counts rows as they come

    def __post_init__(self) -> None:
        self._ids = torch.tensor([*self.prompt, *[0] * self.limit])
        self._places = self._ids.numpy()  # the same memory, where a number is written faster
        self.forget_scores()

    @property
    def history(self) -> Tensor:
        """Prompt and new tokens (tokens,)."""
        return self._ids[: self.length]

    @property
    def length(self) -> int:
        """Of the history."""
        return len(self.prompt) + len(self.tokens)

    @property
    def scoring(self) -> bool:
        """Whether tokens of the prompt are yet to be scored."""
        return self.prompt_scores is not None and len(self.scored) < len(self.prompt)

    def append(self, token: int) -> None:
        self._places[self.length] = token
        self.tokens.append(token)

    def choose(self, logits: Tensor) -> None:
        """Append the token that follows, from logits (vocabulary,) on the CPU, and see whether that is the end."""
        # The steps below may write into the logits, so that what is returned needs a copy.
        own = copied(logits) if self.scores is not None or self.options.output_logits else logits
        if self.options.output_logits:
            self.kept_logits.append(own)
        logits = hold_back_end(len(self.prompt), self.length, logits, self.options)
        token = choose(logits, self.history, self.stream, self.options.sampling, self._steps)
        if self.scores is not None:
            self.score = score(own, token, self.scores, self.missing_ids)
        self.take(token, logits)

    def take(self, token: int, logits: Tensor | None = None) -> None:
        """Append a token, and see whether that is the end. logits: that it was chosen from, where `host_reason` is not None."""
        self.append(token)
        self.piece = self.text.put(token) if self.text is not None else ""
        stopped = token in self.options.eos_token_id or (self.text is not None and self.text.stopped)
        if stopped or (logits is not None and self._criteria_stop(logits)):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason and self.text is not None:
            self.piece += self.text.end()

    def host_reason(self, ahead: int = 0) -> str | None:
        """Why the token after the next `ahead` cannot be chosen where the logits are; None where it can."""
        options = self.options
        if self.scores is not None:
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
    def device_choice(self) -> Choice:
        """What the device needs to know to choose."""
        sampling = self.options.sampling
        if sampling.greedy:
            return Choice()
        return Choice(sampling.seed, self.stream, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)

    def score_prompt(self, logits: Tensor) -> None:
        """Score the next tokens of the prompt, from logits (tokens, vocabulary) after those before them."""
        assert self.prompt_scores is not None
        for one in logits[: len(self.prompt) - len(self.scored)]:
            token = self.prompt[len(self.scored)]
            self.scored.append(score(one, token, self.prompt_scores, self.missing_ids))

    def forget_scores(self) -> None:
        """Score the prompt from the start; nothing comes before its first token."""
        self.scored = [Score(None)]

    @cached_property
    def _steps(self) -> list[Processor]:
        steps = processors(self.options, self.missing_ids, len(self.prompt))
        return [*steps, self._keep_scores] if self.options.output_scores else steps

    def _keep_scores(self, history: Tensor, logits: Tensor) -> Tensor:
        self.kept_scores.append(drawn_from(logits, self.options.sampling))
        return logits

    def _criteria_stop(self, logits: Tensor) -> bool:
        criteria = self.options.stopping_criteria
        return any(bool(torch.as_tensor(stops(self.history[None], logits[None])).all()) for stops in criteria)


def check_ids(prompt: Sequence[int], options: Options, vocabulary: int) -> None:
    """Refuse ids that a model of so many does not have."""
    sampling = options.sampling
    biased = [i for ids in sampling.sequence_bias for i in ids]
    for name, ids in (("input_ids", prompt), ("logit_bias", sampling.logit_bias), ("sequence_bias", biased)):
        if wrong := [i for i in ids if not 0 <= i < vocabulary]:
            raise ArgumentError(f"{name}: found {wrong[0]}, expected 0 to {vocabulary - 1}")


def processors(options: Options, missing_ids: Tensor | None, prompt: int, users: bool = True) -> list[Processor]:
    """Everything between logits and choice: ids that do not exist, then sampling's own steps around the user's."""
    steps: list[Processor] = []
    if missing_ids is not None and len(missing_ids):
        steps.append(lambda history, logits: exclude(logits, missing_ids))
    return steps + options.sampling.processors([_of_rows(user) for user in options.logits_processor if users], prompt)


def _of_rows(user: Processor) -> Processor:
    """A processor of one row from one of a batch, as transformers' are."""
    return lambda history, logits: user(history[None], logits[None])[0]


def is_early(prompt_tokens: int, tokens: int, options: Options) -> bool:
    """Whether the text must not end after so many tokens."""
    early = tokens - prompt_tokens < options.min_new_tokens or tokens < options.min_length
    return early and bool(options.eos_token_id)


def hold_back_end(prompt_tokens: int, tokens: int, logits: Tensor, options: Options) -> Tensor:
    """Exclude the end of text from logits (vocabulary,) that follow too few tokens."""
    if not is_early(prompt_tokens, tokens, options):
        return logits
    known = [i for i in options.eos_token_id if i < len(logits)]
    return exclude(logits, torch.tensor(known, dtype=torch.long))
