"""Jobs, the queue in which clients take turns, and how what is generated reaches who asked. Knows no model and no HTTP."""

from __future__ import annotations

import asyncio
import queue
from collections import OrderedDict, abc, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from neox_lite import Event
from neox_lite.generation.request import Sequence
from neox_lite.generation.sampling import TokenLogprob

from .token_clock import TokenClock


@dataclass(frozen=True)
class Update(Event):
    """An Event of a job: one token as it is chosen, or an end.

    logprob: where the job asked for it. finish_reason: also "cancelled", or "error", and then `error` says why in a sentence.
    token: None where an end comes without one.
    """

    logprob: TokenLogprob | None = None
    error: str | None = None


CANCELLED = Update("", None, "cancelled")


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
    """A job on its way: iterate (or `async for`) over its updates; the last one has a finish_reason.

    prompt_logprobs and reused_tokens (of the prompt, found in the cache) are there before the first update.
    """

    def __init__(self, job: Job, sequence: Sequence, cancel: Callable[[Ticket], None]) -> None:
        self.job, self.clock = job, TokenClock()
        self.prompt_logprobs: list[TokenLogprob] = []
        self.reused_tokens = 0
        self._sequence, self._cancel = sequence, cancel
        self._updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        self._over = False  # the last update was read
        self._listener: Listener | None = None

    def cancel(self) -> None:
        """End it at the next pass; harmless when it has ended."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Update]:
        while not self._over:
            yield self._read()

    async def __aiter__(self) -> AsyncIterator[Update]:
        async for _, update in arrivals([self]):
            if update is not None:
                yield update

    def _read(self) -> Update:
        update = self._updates.get()
        self._over = update.finish_reason is not None
        return update

    def _put(self, update: Update) -> None:
        """Add an update; who listens is still to be notified."""
        if update.token is not None:
            self.clock.tick()
        self._updates.put(update)


Listener = tuple[
    asyncio.AbstractEventLoop, asyncio.Event
]  # an event loop, and what is set there when there are updates


async def arrivals(
    tickets: abc.Sequence[Ticket], silence_s: float | None = None
) -> AsyncGenerator[tuple[int, Update | None], None]:
    """(number of the ticket, update) as they come, until all tickets have ended; (0, None) after `silence_s` of silence."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    for ticket in tickets:
        ticket._listener = loop, arrived
    running, heard_s = list(enumerate(tickets)), loop.time()
    while running:
        arrived.clear()
        for number, ticket in running:
            while not ticket._over and not ticket._updates.empty():
                yield number, ticket._read()
                heard_s = loop.time()
        running = [(number, ticket) for number, ticket in running if not ticket._over]
        if not running:
            return
        if silence_s is None:
            await arrived.wait()
            continue
        alarm = loop.call_at(heard_s + silence_s, arrived.set)
        await arrived.wait()
        alarm.cancel()
        if loop.time() >= heard_s + silence_s:
            yield 0, None
            heard_s = loop.time()


def notify(tickets: Iterable[Ticket]) -> None:
    """Wake the event loops that wait for updates of these tickets, each once: a call may cost the lock of the interpreter."""
    events: dict[asyncio.AbstractEventLoop, set[asyncio.Event]] = {}
    for ticket in tickets:
        if ticket._listener is not None:
            loop, arrived = ticket._listener
            events.setdefault(loop, set()).add(arrived)
    for loop, of_loop in events.items():
        # Of a closed loop nobody listens any more.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_set_all, of_loop)


def _set_all(events: Iterable[asyncio.Event]) -> None:
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
