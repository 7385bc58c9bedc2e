"""A model of this package as lm-evaluation-harness asks it. Knows no task, no metric and no command.

What is cut, what stands before an empty context, where a pair of texts is split and how a generated text ends are as in the
harness's own `hf` model; the tests compare with it.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter, abc, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from neox_lite import GPTNeoXForCausalLM
from neox_lite.errors import ArgumentError
from neox_lite.generation.options import Options, as_dict
from neox_lite.generation.request import Sequence, StopStringChecker
from neox_lite.generation.scheduler import Scheduler
from neox_lite.units import PAGE

from ..conversations.prompt_forms import Form
from ..terminal import bar, note
from .answer_cache import AnswerCache, digest
from .scoring import Text, blocks, score

NEW_TOKENS = 256  # where a task does not say; the harness's own default
MAX_SEQUENCES = 64  # generated together
CACHE_BYTES = 2 << 30  # of the KV cache that rows fill together, but one always fits
SEED = 1234  # of sampled texts; the harness's own

Pair = tuple[tuple[str, str] | None, list[int], list[int]]


class NeoxLiteLM(TemplateLM):
    """model: what answers. form: how it wants a chat written down. cache: of answers.

    requests, found: how many so far, and those among them whose answer was in the cache. computed: tokens that went through
    the layers to score texts. cut: requests that were longer than the context and lost their beginning.
    """

    def __init__(
        self, model: GPTNeoXForCausalLM, form: Form | None = None, cache: AnswerCache | None = None, label: str = ""
    ) -> None:
        super().__init__()
        self.model, self.form, self.cache, self.label = model, form, cache, label
        self.tokenizer = model.tokenizer
        self.requests = self.found = self.computed = self.cut = 0
        self._stderr = sys.stderr  # the harness's own is silenced

    # What the harness asks about --------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        index = self.model.tokenizer.eos_token_id
        if index is None:
            raise ArgumentError("the tokenizer has no end-of-text token, from which texts without a context start")
        return index

    @property
    def prefix_token_id(self) -> int:
        index = self.model.tokenizer.bos_token_id
        return self.eot_token_id if index is None else index

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        tokenizer = self.model.tokenizer
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, tokenizer.decode([self.prefix_token_id]))
        ids: list[int] = tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.form is None:
            raise ArgumentError("this model was opened without a prompt form for chats")
        if add_generation_prompt:
            return self.form.render(chat_history)
        return self.form.render(chat_history[:-1], open_answer=chat_history[-1]["content"])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return None if self.form is None else self.form.name

    # Log-likelihoods --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Pair], **_: Any) -> list[tuple[float, bool]]:
        return self._scores([self._text(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts, owners = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for window in windows:
                texts.append(self._text(*make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._scores(texts), strict=True):
            totals[owner] += value
        return totals

    def _text(self, context: abc.Sequence[int], continuation: abc.Sequence[int]) -> Text:
        """A pair as one text, cut on the left to what the model can read, and one more."""
        if not continuation:
            raise ArgumentError("a continuation has no tokens, so it cannot be scored")
        if len(continuation) > self.max_length:
            raise ArgumentError(
                f"a continuation has {len(continuation)} tokens, more than the {self.max_length} that the model can read"
            )
        self.cut += len(context) + len(continuation) > self.max_length + 1
        return Text([*context, *continuation][-(self.max_length + 1) :], len(continuation))

    def _scores(self, texts: list[Text]) -> list[tuple[float, bool]]:
        keys = [digest(text) for text in texts]
        answers = self._cached(keys)
        with self._progress(len(set(keys)), len(answers)) as progress:
            for block in blocks(texts):
                new = list({keys[i]: i for i in block if keys[i] not in answers}.values())
                if new:
                    scores, computed = score(self.model, [texts[i] for i in new], partial(progress, len(answers)))
                    self.computed += computed
                    found = {keys[i]: list(one) for i, one in zip(new, scores, strict=True)}
                    self._store(found)
                    answers |= found
        return [(value, greedy) for value, greedy in (answers[key] for key in keys)]

    # Texts ------------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Rows come and go in one continuous batch. Equal requests draw from different random streams."""
        seen: Counter[str] = Counter()
        keys, sequences, untils = [], [], []
        for request in requests:
            context, given = request.args
            same = digest([context, given])
            sequence, until = self._sequence(context, given, seen[same])
            keys.append(digest([context, given, seen[same], SEED]))
            sequences.append(sequence)
            untils.append(until)
            seen[same] += 1
        answers = self._cached(keys)
        with self._progress(len(keys), len(answers)) as progress:
            new = [i for i, key in enumerate(keys) if key not in answers]
            for i in self._generated(sequences, sorted(new, key=lambda i: list(sequences[i].prompt))):
                text = self.model.tokenizer.decode(sequences[i].tokens, skip_special_tokens=True)
                answers[keys[i]] = postprocess_generated_text(text, untils[i], None)
                self._store({keys[i]: answers[keys[i]]})
                progress(len(answers), 0)
        return [answers[key] for key in keys]

    def _sequence(self, context: str, given: dict[str, Any], stream: int) -> tuple[Sequence, list[str]]:
        """A request as a row, and the texts that end it."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, NEW_TOKENS))
        tokenizer, room = self.model.tokenizer, kwargs.pop("max_gen_toks")
        end = tokenizer.decode([self.eot_token_id])
        until = handle_stop_sequences(kwargs.pop("until"), eos=end)
        if "max_length" in kwargs:
            raise ArgumentError("generation_kwargs: max_length counts the prompt too; give max_gen_toks")
        if room >= self.max_length:
            raise ArgumentError(
                f"generation_kwargs: max_gen_toks is {room}, expected fewer than the {self.max_length} of the context"
            )
        if not kwargs["do_sample"]:
            kwargs.pop("temperature", None)
        stops = [text for text in until if text not in ("", end)]
        chosen = {**kwargs, "seed": SEED, "max_new_tokens": room, "stop_strings": stops}
        options = Options.parse(as_dict(self.model.generation_config), chosen)
        options = replace(options, eos_token_id=(*options.eos_token_id, self.eot_token_id))
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.cut += len(ids) > self.max_length - room
        limit = 1 if "" in until else room  # every text has nothing in it: hf's ends with its first token
        text = StopStringChecker(tokenizer, options.stop_strings)
        return Sequence(ids[-(self.max_length - room) :], limit, stream, text, options, self.model.padding_ids), until

    def _generated(self, sequences: abc.Sequence[Sequence], order: abc.Sequence[int]) -> Iterator[int]:
        """Generate some of the rows; yields the indices of those that have ended."""
        model = self.model
        pages = {i: -(-(len(sequences[i].prompt) + sequences[i].max_tokens) // PAGE) for i in order}
        most = max([CACHE_BYTES // model.new_pool().page_bytes, *pages.values()])
        waiting, working = deque(order), dict[Sequence, int]()
        with model.acquire_prefix_cache(min(most, sum(pages.values()))) as holder:
            scheduler = Scheduler(model, holder.prefixes)
            try:
                while waiting or working:
                    while waiting and len(working) < MAX_SEQUENCES:
                        if sum(pages[i] for i in working.values()) + pages[waiting[0]] > most:
                            break
                        i = waiting.popleft()
                        scheduler.add(sequences[i])
                        if sequences[i].finish_reason is not None:  # it asks for nothing
                            yield i
                        else:
                            working[sequences[i]] = i
                    for changed in scheduler.step():
                        for sequence in changed:
                            if sequence.error is not None:
                                raise sequence.error
                            if sequence.finish_reason is not None:
                                yield working.pop(sequence)
            finally:
                scheduler.close(keep=False)
        model.forget()

    # The cache of answers ---------------------------------------------------------------------------------------------

    def _cached(self, keys: abc.Sequence[str]) -> dict[str, Any]:
        answers = {} if self.cache is None else self.cache.get(keys)
        self.requests += len(keys)
        self.found += sum(key in answers for key in keys)
        if answers:
            with contextlib.redirect_stderr(self._stderr):
                note(f"{len(answers)} of {len(set(keys))} answers are known from an earlier run; --fresh asks again")
        return answers

    def _store(self, answers: dict[str, Any]) -> None:
        if self.cache is not None:
            self.cache.put(answers)

    @contextlib.contextmanager
    def _progress(self, total: int, known: int) -> Iterator[Callable[[int, int], None]]:
        """A bar, updated by a call with (requests that were in the cache, requests done since)."""
        with contextlib.redirect_stderr(self._stderr), bar(self.label or "answer", "request") as progress:
            if known:
                progress(known, total)
            yield lambda before, since: progress(before + since, total)
