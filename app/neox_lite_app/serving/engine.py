"""One model and all the sequences that it generates at a time, for the page, the API and Python alike. Knows no HTTP.

One thread runs the model: it takes jobs from a queue in which clients take turns, and hands out tokens as they are chosen.
What other threads do is queue, cancel and read; none of them waits for a pass, but those that load and unload.
"""

from __future__ import annotations

import operator
import threading
import time
from collections import abc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXTokenizerFast
from neox_lite.cache import PrefixCache
from neox_lite.errors import ArgumentError, NeoxLiteError
from neox_lite.generation.options import GenerationConfig, Options, as_dict
from neox_lite.generation.parameters import NEUTRAL
from neox_lite.generation.request import Sequence, StopStringChecker, check_ids
from neox_lite.generation.scheduler import PrefillBudget, Scheduler
from neox_lite.offload.memory import own_memory

from .jobs import CANCELLED, FairQueue, Job, Ticket, Update, notify
from .memory import cache_by_tier, return_memory, weights_by_tier
from .token_clock import RecentRate

KEPT_BYTES = 2 << 30  # of pages that stay for later prompts that begin alike; one context's where that is more
RATE_SECONDS = 5.0  # over which tokens a second are counted
COUNT_SECONDS = 0.25  # between looks at how full the cache is
NOT_OFFERED = (
    "num_return_sequences",
    "streamer",
    "assistant_model",
    "num_assistant_tokens",
    "prompt_lookup_num_tokens",
)


class Busy(NeoxLiteError):
    """The queue is full; try again later (HTTP 429)."""


class NotLoaded(NeoxLiteError):
    """No model is loaded (HTTP 503)."""


@dataclass(frozen=True)
class Status:
    """What the engine is doing. state: "empty", "loading", "ready", "idle" (unloaded, comes back by itself), "failed".

    memory: bytes of "weights_gpu", "weights_cpu", "weights_disk", "cache_gpu", "cache_cpu" (what of these there is), and of
    the "process", files that it has mapped included.
    """

    state: str
    name: str | None
    active: int  # sequences being generated
    waiting: int  # jobs in the queue
    tokens_per_s: float  # new tokens of all sequences, over the last seconds
    cached_tokens: int  # in the KV cache, of active and kept sequences
    memory: Mapping[str, int]
    fault: str | None = None  # the last error of the engine itself, until a job ends well


@dataclass(frozen=True)
class LoadedModel:
    """What is known of a model also while it is idle."""

    name: str
    load: Callable[[], GPTNeoXForCausalLM]
    config: GPTNeoXConfig
    generation_config: GenerationConfig
    tokenizer: GPTNeoXTokenizerFast | None
    padding_ids: Tensor
    context: int
    weights: Mapping[str, int]  # bytes by tier

    @classmethod
    def of(cls, name: str, load: Callable[[], GPTNeoXForCausalLM], model: GPTNeoXForCausalLM) -> LoadedModel:
        tokenizer = model.tokenizer if model._has_tokenizer else None
        context = model.plan.context if model.plan is not None else model.config.max_position_embeddings
        loaded = (model.config, model.generation_config, tokenizer, model.padding_ids)
        return cls(name, load, *loaded, context, weights_by_tier(model))

    def sequence(self, job: Job) -> Sequence:
        """What the scheduler is to run. Raises what is wrong with the job."""
        given = dict(job.options)
        for name in NOT_OFFERED:
            if given.get(name) not in ((None, 1) if name == "num_return_sequences" else (None,)):
                raise ArgumentError(f"{name} is not offered here; submit a job for each sequence, or call generate()")
        prompt = self._prompt(job.prompt)
        if given.get("max_new_tokens") is None and given.get("max_length") is None:
            given["max_new_tokens"] = max(1, self.context - len(prompt))
        options = Options.parse(NEUTRAL, as_dict(self.generation_config), given)
        limit = options.new_tokens(len(prompt), self.context)
        check_ids(prompt, options, self.config.vocab_size)
        for name in ("logprobs", "prompt_logprobs"):
            if not 0 <= (getattr(job, name) or 0) <= self.config.vocab_size:
                raise ArgumentError(f"{name} is {getattr(job, name)}, expected 0 to {self.config.vocab_size}")
        if options.stop_strings and self.tokenizer is None:
            raise ArgumentError(
                "stop_strings need a tokenizer, which this model's folder does not have; leave them out"
            )
        text = StopStringChecker(self.tokenizer, options.stop_strings) if self.tokenizer is not None else None
        return Sequence(prompt, limit, job.stream, text, options, self.padding_ids, job.logprobs, job.prompt_logprobs)

    def _prompt(self, ids: abc.Sequence[int]) -> list[int]:
        try:
            prompt = [operator.index(i) for i in ids]
        except TypeError:
            raise ArgumentError("prompt holds something other than ids, expected a list of integers") from None
        if not prompt and self.generation_config.bos_token_id is None:
            raise ArgumentError(
                "the prompt is empty and there is no bos_token_id to start from; give at least one token"
            )
        return prompt or [self.generation_config.bos_token_id]


class Engine:
    """One model at a time. All methods may be called from any thread."""

    def __init__(self, sequences: int = 64, waiting: int = 256, idle_s: float | None = None) -> None:
        """sequences: generated together at most. waiting: jobs in the queue at most. idle_s: unload after so many seconds."""
        self._max_sequences, self._max_jobs = sequences, sequences + waiting
        self._idle_s = idle_s
        self._switching = threading.Lock()  # one load or unload at a time
        self._changed = threading.Condition()  # guards what follows
        self._loaded: LoadedModel | None = None
        self._model: GPTNeoXForCausalLM | None = None
        self._state = "empty"
        self._name: str | None = None
        self._fault: str | None = None
        self._queue = FairQueue()
        self._running: dict[Sequence, Ticket] = {}
        self._cancelled: list[Ticket] = []  # of those running
        self._halted = self._closed = False  # no pass may begin; never again
        self._serving = False  # the thread is at the model
        self._used_s = time.monotonic()  # when it last was
        self._scheduler: Scheduler | None = None
        self._prefill_budget = PrefillBudget()
        self._out_of_memory = False  # memory ran out: the pool is to go when nothing runs
        self._rate = RecentRate(RATE_SECONDS, COUNT_SECONDS)
        self._cached_tokens, self._counted_s = 0, 0.0
        self._thread = threading.Thread(target=self._work, name="neox-lite engine", daemon=True)
        self._thread.start()

    # Which model ------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        return self._name

    def load(self, name: str, load: Callable[[], GPTNeoXForCausalLM]) -> None:
        """Replace the model by what `load` returns; what runs is cancelled first. Raises what `load` raises; then nothing is
        loaded."""
        with self._halting():
            if self._closed:
                raise NotLoaded("the engine is closed; make a new one")
            self._drop_model("loading", name)
            try:
                model = load()
                loaded = LoadedModel.of(name, load, model)
            except BaseException as error:
                self._drop_model("failed", None, sentence(error))
                raise
            with self._changed:
                self._model, self._loaded, self._state = model, loaded, "ready"
                self._prefill_budget = PrefillBudget()
                self._used_s = time.monotonic()

    def unload(self) -> None:
        """Forget the model and return its memory; what runs is cancelled."""
        with self._halting():
            self._drop_model("empty", None)

    def close(self) -> None:
        """End everything and the thread."""
        with self._changed:
            self._closed = True
        self.unload()
        self._thread.join()

    @contextmanager
    def _halting(self) -> Iterator[None]:
        """Cancel all jobs, and keep the thread from the model."""
        with self._switching:
            with self._changed:
                self._halted = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._serving)
                self._end_queue(CANCELLED)
            try:
                yield
            finally:
                with self._changed:
                    self._halted = False
                    self._changed.notify_all()

    def _drop_model(self, state: str, name: str | None, fault: str | None = None) -> None:
        with self._changed:
            self._model = self._loaded = None
            self._state, self._name, self._fault = state, name, fault
            self._cached_tokens = 0
            self._end_queue(CANCELLED)
        return_memory()

    # Of the model, also while it is idle; NotLoaded where there is none.

    @property
    def tokenizer(self) -> GPTNeoXTokenizerFast:
        if (tokenizer := self._require_loaded().tokenizer) is None:
            raise ArgumentError("this model's folder has no tokenizer; put its tokenizer.json there")
        return tokenizer

    @property
    def config(self) -> GPTNeoXConfig:
        return self._require_loaded().config

    @property
    def generation_config(self) -> GenerationConfig:
        return self._require_loaded().generation_config

    @property
    def context(self) -> int:
        """Tokens that a sequence may hold."""
        return self._require_loaded().context

    def _require_loaded(self) -> LoadedModel:
        if (loaded := self._loaded) is not None:
            return loaded
        if self._state == "loading":
            raise NotLoaded(f"{self._name} is being loaded; try again in a moment")
        why = f" ({self._fault})" if self._fault else ""
        raise NotLoaded(f"no model is loaded{why}; choose one on the Model tab, or start with neox-lite serve MODEL")

    # Jobs -------------------------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> Ticket:
        """Queue a job. Raises Busy, NotLoaded, ContextLengthError, ArgumentError."""
        loaded = self._require_loaded()
        ticket = Ticket(job, loaded.sequence(job), self._cancel)
        with self._changed:
            if self._closed or self._loaded is not loaded:
                raise NotLoaded("the model was unloaded just now; try again")
            if len(self._queue) + len(self._running) >= self._max_jobs:
                raise Busy(f"{self._max_jobs} jobs are running or waiting, as many as the queue holds; try again later")
            self._queue.put(ticket)
            self._changed.notify_all()
        return ticket

    def status(self) -> Status:
        with self._changed:
            scheduler, model, loaded = self._scheduler, self._model, self._loaded
            behind = len(scheduler.waiting) if scheduler is not None else 0
            active, waiting = len(self._running) - behind, len(self._queue) + behind
            rate, cached = self._rate.tokens_per_s, self._cached_tokens
            state, name, fault = self._state, self._name, self._fault
        memory = dict(loaded.weights) if loaded is not None and model is not None else {}
        if model is not None:
            memory |= cache_by_tier(model)
        if (process := own_memory()) is not None:
            memory["process"] = sum(process.values())
        return Status(state, name, active, waiting, rate, cached, memory, fault)

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            if self._queue.remove(ticket):
                ticket._put(CANCELLED)
                notify([ticket])
            elif ticket._sequence in self._running:
                self._cancelled.append(ticket)

    def _end_queue(self, update: Update) -> None:
        ended = []
        while len(self._queue):
            ended.append(self._queue.get())
            ended[-1]._put(update)
        notify(ended)

    # The thread -------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (task := self._next_task()) is not None:
            try:
                task()
            except Exception as error:  # a fault of the engine itself: the jobs end, it goes on
                self._fail(error)
            finally:
                with self._changed:
                    self._serving, self._scheduler = False, None
                    self._used_s = time.monotonic()
                    self._changed.notify_all()

    def _next_task(self) -> Callable[[], None] | None:
        """What there is to do; None where everything is over."""
        with self._changed:
            while not self._closed:
                wait_s = None
                if not self._halted and len(self._queue):
                    self._serving = True
                    return self._serve
                if not self._halted and self._model is not None and self._idle_s is not None:
                    wait_s = self._used_s + self._idle_s - time.monotonic()
                    if wait_s <= 0:
                        self._serving = True
                        return self._fall_idle
                self._changed.wait(wait_s)
        return None

    def _fall_idle(self) -> None:
        with self._changed:
            self._model, self._state, self._cached_tokens = None, "idle", 0
        return_memory()

    def _serve(self) -> None:
        """Run jobs until there are none."""
        if (model := self._ready_model()) is None:
            return
        with model.acquire_prefix_cache(0, KEPT_BYTES) as holder:
            self._scheduler = scheduler = Scheduler(model, holder.prefixes, prefill_budget=self._prefill_budget)
            try:
                while self._take_jobs(scheduler):
                    for changed in scheduler.step():
                        self._deliver(changed)
                    self._count(holder.prefixes, scheduler.running)
            finally:
                scheduler.close()
                self._count(holder.prefixes, [])
        if self._out_of_memory:
            self._out_of_memory = False
            model.forget()
            return_memory()

    def _ready_model(self) -> GPTNeoXForCausalLM | None:
        """The model, loaded again where it is idle; None, and the jobs have ended, where that fails."""
        loaded = self._require_loaded()
        if self._model is None:
            self._state = "loading"
            try:
                self._model = loaded.load()
            except Exception as error:
                self._fail(error)
                self._state = "failed"
                return None
            self._state = "ready"
        return self._model

    def _take_jobs(self, scheduler: Scheduler) -> bool:
        """Between passes: end what was cancelled, take up what fits; whether there is anything to run."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, []
            if self._halted:
                cancelled = list(self._running.values())
            cancelled = [ticket for ticket in cancelled if ticket._sequence in self._running]
            for ticket in cancelled:
                scheduler.cancel(ticket._sequence)
                self._end(ticket, CANCELLED)
            notify(cancelled)
            while not self._halted and len(self._queue) and len(self._running) < self._max_sequences:
                ticket = self._queue.get()
                self._running[ticket._sequence] = ticket
                scheduler.add(ticket._sequence)
                if ticket._sequence.finish_reason:  # it asked for nothing
                    _note_prompt(ticket, ticket._sequence)
                    self._end(ticket, Update("", None, ticket._sequence.finish_reason))
                    notify([ticket])
        return scheduler.busy

    def _deliver(self, changed: list[Sequence]) -> None:
        """Hand out what sequences got."""
        tickets = [self._running[sequence] for sequence in changed]
        with self._changed:
            self._rate.add(len(changed))
        for sequence, ticket in zip(changed, tickets, strict=True):
            if not ticket.clock.tokens:
                _note_prompt(ticket, sequence)
            update = self._update_of(sequence)
            if update.finish_reason is None:
                ticket._put(update)
            else:
                self._end(ticket, update)
        notify(tickets)

    def _update_of(self, sequence: Sequence) -> Update:
        """What a sequence got last."""
        if sequence.error is not None:
            error, sequence.error = sequence.error, None  # its traceback holds on to tensors
            if not isinstance(error, NeoxLiteError):  # what a user could not cause is a fault of the engine
                self._fault = sentence(error)
                self._out_of_memory = self._out_of_memory or is_short_of_memory(error)
            return Update("", None, "error", None, sentence(error))
        if sequence.finish_reason is not None:
            self._fault = None
        if not sequence.tokens:
            return Update("", None, sequence.finish_reason)
        return Update(sequence.new_text, sequence.tokens[-1], sequence.finish_reason, sequence.logprob)

    def _end(self, ticket: Ticket, update: Update) -> None:
        with self._changed:
            if self._running.pop(ticket._sequence, None) is not None:
                ticket._put(update)

    def _count(self, prefixes: PrefixCache, sequences: abc.Sequence[Sequence]) -> None:
        """See how full the cache is: now and then, and when there is nothing to do."""
        now = time.monotonic()
        if not sequences or now - self._counted_s > COUNT_SECONDS:
            self._counted_s = now
            self._cached_tokens = prefixes.tokens(
                sequence.block_table for sequence in sequences if sequence.block_table is not None
            )

    def _fail(self, error: Exception) -> None:
        """End all jobs with an error."""
        with self._changed:
            self._fault = sentence(error)
            update = Update("", None, "error", None, self._fault)
            ended = list(self._running.values())
            for ticket in ended:
                self._end(ticket, update)
            notify(ended)
            self._end_queue(update)
            if self._model is not None:
                self._model.forget()
        return_memory()


def sentence(error: BaseException) -> str:
    """An error in words for those who wait for an answer."""
    text = " ".join(str(error).split())
    if isinstance(error, NeoxLiteError):
        return text
    if is_short_of_memory(error):
        return "memory ran out; try again with shorter or fewer texts at a time, or load the model with a smaller --context"
    return (
        f"the engine failed with {type(error).__name__}: {text[:300] or 'no word'}; try again, or load the model again"
    )


def is_short_of_memory(error: BaseException) -> bool:
    """As Python, torch's CUDA and torch's CPU allocator say it."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or ("alloc" in text and "memory" in text)


def _note_prompt(ticket: Ticket, sequence: Sequence) -> None:
    """What a ticket has of its prompt before the first update."""
    ticket.prompt_logprobs = sequence.prompt_logprobs if sequence.num_prompt_logprobs is not None else []
    ticket.reused_tokens = sequence.num_cached_tokens or 0
