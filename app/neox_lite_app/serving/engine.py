"""One model and all the sequences that it generates at a time, for the page, the API and Python alike. Knows no HTTP.

One thread runs the model: it takes jobs from a queue in which clients take turns, and hands out tokens as they are chosen.
What other threads do is queue, cancel and read; none of them waits for a pass, but those that load and unload.
"""

from __future__ import annotations

import asyncio
import gc
import operator
import queue
import threading
import time
from collections import OrderedDict, abc, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXTokenizerFast
from neox_lite.cache import PrefixCache
from neox_lite.errors import ArgumentError, NeoxLiteError
from neox_lite.generation.options import GenerationConfig, Options, as_dict
from neox_lite.generation.parameters import NEUTRAL
from neox_lite.generation.request import Sequence, StopStringChecker, check_ids
from neox_lite.generation.sampling import TokenLogprob
from neox_lite.generation.scheduler import PrefillBudget, Scheduler
from neox_lite.offload.memory import own_memory
from neox_lite.offload.run import Placement

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
class Update:
    """One token as it is chosen. text: what it completes, "" where a character or stop string is still open.

    logprob: where the job asked for it. finish_reason: "stop" or "length" with the last one, "cancelled" or "error" (then
    `error` says why, in a sentence) where it ended otherwise; token is None where an end comes without one.
    """

    text: str
    token: int | None
    finish_reason: str | None = None
    logprob: TokenLogprob | None = None
    error: str | None = None


@dataclass(frozen=True)
class Job:
    """What is to be generated. options: those of `generate`, under its names; max_new_tokens None: to the end of the context.

    client: whose job it is; clients take turns in the queue. logprobs: None, or how many likeliest ids to report with each new
    token (0: only the token's own log-probability). prompt_logprobs: likewise for every token of the prompt. stream: number of
    the random stream; jobs that are alike but for it are different samples of one seed.
    """

    prompt: abc.Sequence[int]
    options: Mapping[str, Any] = field(default_factory=dict)
    client: str = ""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stream: int = 0


class Ticket:
    """A job on its way: iterate (or `async for`) over its steps; the last one has a finish_reason."""

    def __init__(self, job: Job, sequence: Sequence, cancel: Callable[[Ticket], None]) -> None:
        self.job = job
        self.prompt_logprobs: list[TokenLogprob] = []  # there before the first step
        self.reused_tokens = 0  # of the prompt, found in the cache
        self.submitted_s = time.monotonic()
        self.first_s: float | None = None  # when the first step came, and the last one
        self.last_s: float | None = None
        self._sequence, self._cancel = sequence, cancel
        self._steps: queue.SimpleQueue[Update] = queue.SimpleQueue()
        self._over = False  # the last step was read
        self._listener: Listener | None = None

    def cancel(self) -> None:
        """End it at the next pass; harmless when it has ended."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Update]:
        while not self._over:
            yield self._read()

    async def __aiter__(self) -> AsyncIterator[Update]:
        arrived = asyncio.Event()
        self._listener = asyncio.get_running_loop(), arrived
        while not self._over:
            arrived.clear()
            while not self._over and not self._steps.empty():
                yield self._read()
            if not self._over:
                await arrived.wait()

    def _read(self) -> Update:
        step = self._steps.get()
        self._over = step.finish_reason is not None
        return step

    def _put(self, step: Update) -> None:
        """Add a step; who listens is still to be notified."""
        self.last_s = time.monotonic()
        self.first_s = self.first_s or self.last_s
        self._steps.put(step)


Listener = tuple[asyncio.AbstractEventLoop, asyncio.Event]  # an event loop, and what is set there when there are steps


def notify(tickets: Iterable[Ticket]) -> None:
    """Wake the event loops that wait for steps of these tickets, each once: every call may cost the lock of the interpreter."""
    events: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for ticket in tickets:
        if ticket._listener is not None:
            loop, arrived = ticket._listener
            events.setdefault(loop, []).append(arrived)
    for loop, of_loop in events.items():
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(set_all, of_loop)


def set_all(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        event.set()


class FairQueue:
    """Tickets that wait: clients take turns, and a client's own come first come, first served."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[Ticket]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def put(self, ticket: Ticket) -> None:
        self._of.setdefault(ticket.job.client, deque()).append(ticket)

    def get(self) -> Ticket:
        client, tickets = self._of.popitem(last=False)
        ticket = tickets.popleft()
        if tickets:
            self._of[client] = tickets  # behind the others
        return ticket

    def remove(self, ticket: Ticket) -> bool:
        """Whether it was there."""
        tickets = self._of.get(ticket.job.client, deque())
        if ticket not in tickets:
            return False
        tickets.remove(ticket)
        if not tickets:
            del self._of[ticket.job.client]
        return True


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
        self._sequences, self._most = sequences, sequences + waiting
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
        self._short = False  # memory ran out: the pool is to go when nothing runs
        self._rates: deque[tuple[float, int]] = deque()  # when tokens came, and how many
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
                self._end_queue(Update("", None, "cancelled"))
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
            self._end_queue(Update("", None, "cancelled"))
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
            if len(self._queue) + len(self._running) >= self._most:
                raise Busy(f"{self._most} jobs are running or waiting, as many as the queue holds; try again later")
            self._queue.put(ticket)
            self._changed.notify_all()
        return ticket

    def status(self) -> Status:
        with self._changed:
            scheduler, model, loaded = self._scheduler, self._model, self._loaded
            behind = len(scheduler.waiting) if scheduler is not None else 0
            active, waiting = len(self._running) - behind, len(self._queue) + behind
            rate, cached = self._tokens_per_s(), self._cached_tokens
            state, name, fault = self._state, self._name, self._fault
        memory = dict(loaded.weights) if loaded is not None and model is not None else {}
        if model is not None:
            memory |= cache_by_tier(model)
        if (process := own_memory()) is not None:
            memory["process"] = sum(process.values())
        return Status(state, name, active, waiting, rate, cached, memory, fault)

    def _tokens_per_s(self) -> float:
        now, rates = time.monotonic(), self._rates
        while rates and rates[0][0] < now - RATE_SECONDS:
            rates.popleft()
        return sum(count for _, count in rates) / max(now - rates[0][0], COUNT_SECONDS) if len(rates) > 1 else 0.0

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            if self._queue.remove(ticket):
                ticket._put(Update("", None, "cancelled"))
                notify([ticket])
            elif ticket._sequence in self._running:
                self._cancelled.append(ticket)

    def _end_queue(self, step: Update) -> None:
        ended = []
        while len(self._queue):
            ended.append(self._queue.get())
            ended[-1]._put(step)
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
        if self._short:
            self._short = False
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
                self._end(ticket, Update("", None, "cancelled"))
            notify(cancelled)
            while not self._halted and len(self._queue) and len(self._running) < self._sequences:
                ticket = self._queue.get()
                self._running[ticket._sequence] = ticket
                scheduler.add(ticket._sequence)
                if ticket._sequence.finish_reason:  # it asked for nothing
                    self._end(ticket, Update("", None, ticket._sequence.finish_reason))
                    notify([ticket])
        return scheduler.busy

    def _deliver(self, changed: list[Sequence]) -> None:
        """Hand out what sequences got."""
        tickets = [self._running[sequence] for sequence in changed]
        with self._changed:
            self._rates.append((time.monotonic(), len(changed)))
        for sequence, ticket in zip(changed, tickets, strict=True):
            if ticket.first_s is None:
                ticket.prompt_logprobs = sequence.prompt_logprobs if sequence.num_prompt_logprobs is not None else []
                ticket.reused_tokens = sequence.num_cached_tokens or 0
            step = self._step_of(sequence)
            if step.finish_reason is None:
                ticket._put(step)
            else:
                self._end(ticket, step)
        notify(tickets)

    def _step_of(self, sequence: Sequence) -> Update:
        """What a sequence got last."""
        if sequence.error is not None:
            error, sequence.error = sequence.error, None  # its traceback holds on to tensors
            if not isinstance(error, NeoxLiteError):  # what a user could not cause is a fault of the engine
                self._fault = sentence(error)
                self._short = self._short or is_short_of_memory(error)
            return Update("", None, "error", None, sentence(error))
        if sequence.finish_reason is not None:
            self._fault = None
        if not sequence.tokens:
            return Update("", None, sequence.finish_reason)
        return Update(sequence.new_text, sequence.tokens[-1], sequence.finish_reason, sequence.logprob)

    def _end(self, ticket: Ticket, step: Update) -> None:
        with self._changed:
            if self._running.pop(ticket._sequence, None) is not None:
                ticket._put(step)

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
            step = Update("", None, "error", None, self._fault)
            ended = list(self._running.values())
            for ticket in ended:
                self._end(ticket, step)
            notify(ended)
            self._end_queue(step)
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


def return_memory() -> None:
    """Give what nothing refers to back to the system."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def weights_by_tier(model: GPTNeoXForCausalLM) -> dict[str, int]:
    """Bytes of weights under "weights_gpu", "weights_cpu" and "weights_disk", as far as there are any."""
    blocks = model.gpt_neox.blocks
    alone = Placement.alone("cpu" if model.device.type == "cpu" else "gpu", len(blocks))
    placement = model.placement or alone
    parts = [*zip(blocks, placement.layers, strict=True), (model.gpt_neox.embed_in, placement.embedding)]
    found: dict[str, int] = {}
    seen: set[int] = set()
    for part, tier in [*parts, (model, placement.head)]:  # the rest is where the head is
        for tensor in (*part.parameters(), *part.buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"weights_{tier}"] = found.get(f"weights_{tier}", 0) + tensor.nbytes
    return found


def cache_by_tier(model: GPTNeoXForCausalLM) -> dict[str, int]:
    """Bytes of the KV cache's pool under "cache_gpu" and "cache_cpu", as far as there are any."""
    holder, found = model._cache_holder, dict[str, int]()
    if holder is not None:
        for tensor in (*holder.prefixes.pool.storage, *holder.prefixes.pool.scales):
            tier = "cache_cpu" if tensor.device.type == "cpu" else "cache_gpu"
            found[tier] = found.get(tier, 0) + tensor.nbytes
    return found
