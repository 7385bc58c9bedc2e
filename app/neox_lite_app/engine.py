"""One model and all the sequences that it generates at a time, for the page, the API and Python alike. Knows no HTTP.

INTERIM INTERNALS: the public names, arguments and errors here are final; one job runs at a time until the scheduler lands.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXTokenizerFast
from neox_lite.errors import NeoxLiteError
from neox_lite.generation import GenerationConfig, Options


class Busy(NeoxLiteError):
    """The queue is full; try again later (HTTP 429)."""


class NotLoaded(NeoxLiteError):
    """No model is loaded (HTTP 503)."""


class Score(NamedTuple):
    """log-probability of a token before sampling's own steps (None for the very first of a text), and the likeliest ids there."""

    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Step:
    """One token as it is chosen. text: what it completes, "" where a character or stop string is still open.

    score: where the job asked for it. finish_reason: "stop" or "length" with the last one, "cancelled" or "error" (then
    `error` says why, in a sentence) where it ended otherwise; token is None where an end comes without one.
    """

    text: str
    token: int | None
    finish_reason: str | None = None
    score: Score | None = None
    error: str | None = None


@dataclass(frozen=True)
class Job:
    """What is to be generated. options: those of `generate`, under its names; max_new_tokens None: to the end of the context.

    client: whose job it is; clients take turns in the queue. scores: None, or how many likeliest ids to report with each new
    token (0: only the token's own log-probability). prompt_scores: likewise for every token of the prompt.
    """

    prompt: Sequence[int]
    options: Mapping[str, Any] = field(default_factory=dict)
    client: str = ""
    scores: int | None = None
    prompt_scores: int | None = None


class Ticket:
    """A job on its way: iterate (or `async for`) over its steps; the last one has a finish_reason."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.prompt_scores: list[Score] = []  # there before the first step
        self.reused_tokens = 0  # of the prompt, found in the cache
        self.submitted_s, self.first_s, self.last_s = (
            time.monotonic(),
            None,
            None,
        )  # when: submitted, first and last step
        self._steps: queue.SimpleQueue[Step] = queue.SimpleQueue()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End it at the next pass; harmless when it has ended."""
        self._cancelled.set()

    def __iter__(self) -> Iterator[Step]:
        while True:
            yield (step := self._steps.get())
            if step.finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Step]:
        while True:
            yield (step := await asyncio.to_thread(self._steps.get))
            if step.finish_reason is not None:
                return


@dataclass(frozen=True)
class Status:
    """What the engine is doing. state: "empty", "loading", "ready", "idle" (unloaded, comes back by itself), "failed"."""

    state: str
    name: str | None
    active: int  # sequences being generated
    waiting: int  # jobs in the queue
    tokens_per_s: float  # new tokens of all sequences, over the last seconds
    cached_tokens: int  # in the KV cache, of active and kept sequences
    memory: Mapping[str, int]  # bytes by tier, as far as known
    fault: str | None = None  # the last error of the engine itself


class Engine:
    """One model at a time. All methods may be called from any thread."""

    def __init__(self, sequences: int = 64, waiting: int = 256, idle_s: float | None = None) -> None:
        """sequences: generated together at most. waiting: jobs in the queue at most. idle_s: unload after so many seconds."""
        self._lock = threading.Lock()
        self._model: GPTNeoXForCausalLM | None = None
        self.name: str | None = None

    def load(self, name: str, load: Callable[[], GPTNeoXForCausalLM]) -> None:
        """Replace the model by what `load` returns; what runs is cancelled first. Raises what `load` raises; then nothing is
        loaded."""
        self._model, self.name = None, None
        model = load()
        self._model, self.name = model, name

    def unload(self) -> None:
        """Forget the model and return its memory; what runs is cancelled."""
        self._model, self.name = None, None

    def close(self) -> None:
        """End everything and the thread."""
        self.unload()

    # Of the model, also while it is idle; NotLoaded where there is none.

    @property
    def tokenizer(self) -> GPTNeoXTokenizerFast:
        return self._loaded().tokenizer

    @property
    def config(self) -> GPTNeoXConfig:
        return self._loaded().config

    @property
    def generation_config(self) -> GenerationConfig:
        return self._loaded().generation_config

    @property
    def context(self) -> int:
        """Tokens that a sequence may hold."""
        model = self._loaded()
        return model.plan.context if model.plan is not None else model.config.max_position_embeddings

    def _loaded(self) -> GPTNeoXForCausalLM:
        if self._model is None:
            raise NotLoaded("no model is loaded; choose one on the Model tab, or start with neox-lite serve MODEL")
        return self._model

    def submit(self, job: Job) -> Ticket:
        """Queue a job. Raises Busy, NotLoaded, ContextLengthError, ArgumentError."""
        model = self._loaded()
        Options.parse(dict(job.options))
        ticket = Ticket(job)
        threading.Thread(target=self._run, args=(model, ticket), daemon=True).start()
        return ticket

    def _run(self, model: GPTNeoXForCausalLM, ticket: Ticket) -> None:
        options = dict(ticket.job.options)
        if options.get("max_new_tokens") is None:
            options["max_new_tokens"] = self.context - len(ticket.job.prompt)
        with self._lock:
            try:
                for event in model.stream(list(ticket.job.prompt), **options):
                    if ticket._cancelled.is_set():
                        ticket._steps.put(Step("", None, "cancelled"))
                        return
                    ticket.first_s = ticket.first_s or time.monotonic()
                    ticket.last_s = time.monotonic()
                    score = None if ticket.job.scores is None else Score(0.0, ((event.token or 0, 0.0),))
                    ticket._steps.put(Step(event.text, event.token, event.finish_reason, score))
            except Exception as error:
                ticket._steps.put(Step("", None, "error", None, str(error)))

    def status(self) -> Status:
        state = "ready" if self._model is not None else "empty"
        return Status(state, self.name, 0, 0, 0.0, 0, {})
