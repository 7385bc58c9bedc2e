"""Passes of a model over rows that come and go between them. Knows no model class, no text, and nobody who waits for it.

A pass takes one token of every row that is being continued, and beside them the next tokens of prompts still to be read, so
that reading a long prompt does not halt the others. Where a device chooses tokens itself and rows are only continued, a pass is
always in the air: the next is given to the device before the tokens of the last are read. What it did for a row that has ended
by then, or has left, is thrown away. Draws depend on places alone (`sampling.choose`), so that a row's tokens
do not depend on what else runs, nor on whether it had to give way and was read again.
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ..cache import Kept, PrefixCache, common_length, copied
from ..cache import Sequence as CachedSequence
from ..errors import CacheError
from ..kernels.backend import Flight
from ..units import PAGE
from .protocols import PREFILL_TOKENS, Ahead, Stepper
from .request import Row
from .sampling import nothing_to_choose
from .speculative import Drafting

LEAST_TOKENS = 16  # of prompts that a pass reads, however long that takes
SCORED_TOKENS = 128  # of prompts whose every token is scored: each brings logits of the whole vocabulary
PASS_SECONDS = 0.25  # that those who are being answered may wait for a pass


class ReadingPace:
    """How many tokens of prompts a pass reads beside rows that are being continued, so that it takes about so many seconds."""

    def __init__(self, seconds: float = PASS_SECONDS, clock: Callable[[], float] = time.perf_counter) -> None:
        self.tokens = 4 * LEAST_TOKENS
        self.clock = clock
        self._seconds = seconds

    def took(self, tokens: int, seconds: float) -> None:
        """Learn from a pass that read so many tokens of prompts: at most twice as many are tried next."""
        fitting = min(int(tokens * self._seconds / max(seconds, 1e-9)), 2 * tokens)
        if tokens < self.tokens and seconds < self._seconds:  # a short rest of a prompt says little about long pieces
            fitting = max(fitting, self.tokens)
        self.tokens = max(LEAST_TOKENS, min(fitting, PREFILL_TOKENS))


class Ready(NamedTuple):
    """A row that is to get tokens: logits (drafted tokens + 1, vocabulary) after its last token and every drafted one."""

    row: Row
    logits: Tensor
    draft: Sequence[int] = ()


class InTheAir(NamedTuple):
    """A pass given to the device, and where in it each row is."""

    flight: Flight
    places: dict[Row, int]


class Scheduler:
    """Rows at work and rows that wait, and passes over them.

    rows: those with a sequence in the cache, the oldest first. waiting: the others. Where the pool is full, the youngest row
    goes back to wait, and is read again once it fits. drafting: drafts are made and judged; then prompts are read in passes
    of their own. Not for several threads.
    """

    def __init__(
        self,
        stepper: Stepper,
        prefixes: PrefixCache,
        drafting: Drafting | None = None,
        pace: ReadingPace | None = None,
    ) -> None:
        self.rows: list[Row] = []
        self.waiting: deque[Row] = deque()
        self._stepper, self._prefixes, self._pool = stepper, prefixes, prefixes.pool
        self._drafting, self._pace = drafting, pace
        self._ahead = stepper if isinstance(stepper, Ahead) and drafting is None else None
        self._in_the_air: InTheAir | None = None
        self._added = 0
        self._leaders: dict[Row, tuple[Row, int]] = {}  # whom a waiting row waits for, and until it has read how much
        self._full = False  # no row that waits fits, until another leaves

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.waiting)

    def add(self, row: Row) -> None:
        """Take a row; one that asks for nothing has ended already."""
        if row.limit == 0 and not row.scoring:
            row.finish_reason = "length"
            return
        self._added += 1
        row.number = self._added
        self.waiting.append(row)

    def cancel(self, row: Row) -> None:
        """End a row, if it has not ended, and give its pages back."""
        if row.finish_reason is None:
            row.finish_reason = "cancelled"
            self._leave(row)

    def close(self, keep: bool = True) -> None:
        """Forget all rows. keep: what they hold is for later prompts that begin alike."""
        for row in [*self.rows, *self.waiting]:
            self._leave(row, keep)

    def step(self) -> Iterator[list[Row]]:
        """Admit rows and run a pass; yields rows that got a token or ended, as often as that happens to any of them."""
        yield from self._choose(self._admit())
        while self.rows:
            rows = list(self.rows)
            try:
                landed = self._fly()
                if landed is None:
                    batch = self._select()
                    rows = list(batch)
                    ready = self._run(batch)
            except CacheError as error:
                if len(self.rows) > 1:
                    self._put_back(self.rows[-1])
                else:
                    yield [self._fail(self.rows[0], error)]
            except Exception as error:
                self._prefixes.clear()  # they share pages with what may be half written
                self._in_the_air = None
                yield [self._fail(row, error) for row in rows]
                return
            else:
                if landed is None:
                    yield from self._continue(ready)
                elif landed:
                    yield landed
                return

    def _continue(self, ready: list[Ready]) -> Iterator[list[Row]]:
        """What follows a pass: tokens for its rows, and for those that wait for one of the same prompt; a look at drafts."""
        before = [len(one.row.tokens) for one in ready]
        yield from self._choose([*ready, *self._admit()])
        if self._drafting is None or not all(before):  # the pass of a prompt has no drafts
            return
        self._drafting.judge(
            [one.draft for one in ready], [one.row.tokens[n:] for one, n in zip(ready, before, strict=True)]
        )
        for row in self.rows:
            assert row.sequence is not None
            self._pool.truncate(row.sequence, row.length - 1)  # without what was drafted in vain

    # Coming and going -------------------------------------------------------------------------------------------------

    def _admit(self) -> list[Ready]:
        """Take up rows that wait, in their order, as far as they fit; those whose next token needs no pass."""
        ready, following = [], []
        while self.waiting and not self._full:
            row = self.waiting.popleft()
            if self._follows(row):
                following.append(row)
                continue
            sequence, logits = self._begin(row)
            if logits is None and self._find_leader(row, sequence):
                self._pool.free(sequence)
                following.append(row)
            elif not self._fits(row, sequence):
                self._pool.free(sequence)
                self.waiting.appendleft(row)
                self._full = True
            else:
                row.sequence = sequence
                row.reused = sequence.length if row.reused is None else row.reused
                bisect.insort(self.rows, row, key=lambda row: row.number)
                if logits is not None:
                    ready.append(Ready(row, logits[None]))
        self.waiting.extendleft(reversed(following))
        return ready

    def _begin(self, row: Row) -> tuple[CachedSequence, Tensor | None]:
        """As much of a row as is in the cache, and the logits that follow, where it is all and they are known."""
        if row.scoring:
            return self._pool.new(), None
        live = [
            Kept(other.history[: other.sequence.length], other.sequence, len(other.prompt), other.after_prompt)
            for other in self.rows
            if other.sequence is not None
        ]
        sequence, logits = self._prefixes.take(row.history, live)
        if logits is not None and not row.tokens:
            row.after_prompt = copied(logits)
        return sequence, logits

    def _follows(self, row: Row) -> bool:
        """Whether a row still waits for another that is reading what both begin with."""
        leader, length = self._leaders.get(row, (None, 0))
        if leader is not None and leader.sequence is not None and leader.sequence.length < length:
            return True
        self._leaders.pop(row, None)
        return False

    def _find_leader(self, row: Row, sequence: CachedSequence) -> bool:
        """Whether a row gains by waiting: a page or more beyond what it has, or all of its prompt."""
        if row.scoring:
            return False
        for other in self.rows:
            assert other.sequence is not None
            common = common_length(row.history, other.history)
            same = common == len(row.prompt) == len(other.prompt) and not row.tokens and not other.tokens
            if other.sequence.length < common and (same or min(common, row.length - 1) - sequence.length >= PAGE):
                self._leaders[row] = other, common
                return True
        return False

    def _fits(self, row: Row, sequence: CachedSequence) -> bool:
        """Whether a row can be read to its end beside the others, with a page for each that will need one."""
        if self._pool.limit is None or not self.rows:
            return True
        held, needed = set(sequence.pages), -(-(row.length + 1) // PAGE) - sequence.length // PAGE
        for other in self.rows:
            assert other.sequence is not None
            held |= set(other.sequence.pages)
            pages = max(len(other.sequence.pages), -(-other.length // PAGE))
            needed += pages - len(other.sequence.pages)
            needed += len(other.prompt) + other.limit > PAGE * pages
        return len(held) + needed <= self._pool.limit

    def _put_back(self, row: Row) -> None:
        """Let a row wait for pages; it is read again then."""
        self.rows.remove(row)
        self._release(row, keep=True)
        if row.scoring:
            row.forget_scores()
        self.waiting.appendleft(row)
        self._full = False

    def _fail(self, row: Row, error: Exception) -> Row:
        row.finish_reason, row.error = "error", error
        self._leave(row, keep=False)
        return row

    def _leave(self, row: Row, keep: bool = True) -> None:
        (self.waiting if row.sequence is None else self.rows).remove(row)
        self._leaders.pop(row, None)
        self._release(row, keep)
        self._full = False

    def _release(self, row: Row, keep: bool) -> None:
        """Give back what a row holds, to be kept for later prompts that begin alike, or not."""
        if self._drafting is not None:
            self._drafting.drafter.drop(row)
        if self._in_the_air is not None:
            self._in_the_air.places.pop(row, None)
        if row.sequence is None:
            return
        if keep:
            cached = min(row.sequence.length, max(row.length - 1, len(row.prompt)))
            self._pool.truncate(row.sequence, cached)
            self._prefixes.keep(row.history[:cached], row.sequence, len(row.prompt), row.after_prompt)
        else:
            self._pool.free(row.sequence)
        row.sequence = row.after_prompt = None

    # Passes -----------------------------------------------------------------------------------------------------------

    def _select(self) -> dict[Row, int]:
        """The rows of the next pass, and how many tokens of each."""
        rows = self.rows
        if self._drafting is not None and not all(row.tokens and unread(row) == 1 for row in rows):
            rows = [row for row in rows if not row.tokens or unread(row) > 1]
        batch = {row: 1 for row in rows if unread(row) == 1}
        room = PREFILL_TOKENS - len(batch)
        if batch and self._pace is not None:
            room = min(room, self._pace.tokens)
        reading = [row for row in rows if unread(row) > 1]
        if reading and reading[0].scoring:
            room = min(room, SCORED_TOKENS)
        room = max(room, LEAST_TOKENS)
        for row in reading:
            if room and row.scoring == reading[0].scoring:
                batch[row] = min(room, unread(row))
                room -= batch[row]
        return batch

    def _run(self, batch: dict[Row, int]) -> list[Ready]:
        """A pass; the rows of which everything is in the cache then, with what follows."""
        rows = list(batch)
        tokens = [next_tokens(row, count) for row, count in batch.items()]
        drafts: list[list[int]] = [[] for _ in rows]
        if self._drafting is not None and all(row.tokens for row in rows):
            drafts = self._drafting.drafts(rows, [row.limit - len(row.tokens) - 1 for row in rows])
            tokens = [ids + draft for ids, draft in zip(tokens, drafts, strict=True)]
        every = any(drafts) or any(row.scoring for row in rows)
        with self._timing(sum(count for row, count in batch.items() if unread(row) > 1)):
            logits = self._step([row.sequence for row in rows if row.sequence is not None], tokens, every)
        ready = []
        for row, found, draft in zip(rows, logits.split(list(map(len, tokens)) if every else 1), drafts, strict=True):
            if row.scoring:
                row.score_prompt(found)
            if unread(row) + len(draft) == 0:
                if not row.tokens:
                    row.after_prompt = copied(found[-1])
                ready.append(Ready(row, found if draft else found[-1:], draft))
        return ready

    def _step(self, sequences: list[CachedSequence], tokens: list[list[int]], every: bool) -> Tensor:
        if every:  # a Stepper that is never asked for all logits need not know the word
            return self._stepper.step(self._pool, sequences, tokens, every=True).cpu()
        return self._stepper.step(self._pool, sequences, tokens).cpu()

    @contextmanager
    def _timing(self, read: int) -> Iterator[None]:
        """Around a pass that reads so many tokens of prompts."""
        if self._drafting is not None:
            with self._drafting.timing():
                yield
        elif self._pace is not None and read:
            began = self._pace.clock()
            yield
            self._pace.took(read, self._pace.clock() - began)
        else:
            yield

    # Passes in the air ------------------------------------------------------------------------------------------------

    def _fly(self) -> list[Row] | None:
        """Launch a pass and read the one before -> the rows that got a token; None where the next pass is not for the air."""
        before = self._in_the_air
        self._in_the_air = self._launch()
        if before is not None:
            tokens = before.flight.tokens()
            for row, place in before.places.items():
                self._end_if_done(row, partial(_take, row, tokens[place]))
            return list(before.places)
        return None if self._in_the_air is None else []

    def _launch(self) -> InTheAir | None:
        """The next token of every row that will need one; None where that is not all there is to do."""
        if self._ahead is None or self._ahead.graph_reason is not None:
            return None
        before = self._in_the_air
        places = before.places if before is not None else {}
        rows = [row for row in self.rows if len(row.tokens) + (row in places) < row.limit]
        if not rows or not all(row in places or (row.tokens and unread(row) == 1) for row in rows):
            return None
        if any(row.host_reason(row in places) for row in rows) or len({id(row.missing_ids) for row in rows}) > 1:
            return None
        sequences = [row.sequence for row in rows if row.sequence is not None]
        ids = [-1 - places[row] if row in places else row.tokens[-1] for row in rows]
        choices, excluded = [row.device_choice for row in rows], rows[0].missing_ids
        try:
            flight = self._ahead.launch(
                self._pool, sequences, ids, choices, excluded, None if before is None else before.flight
            )
        except CacheError:
            if before is None:
                raise
            return None  # rows that end with what is in the air may make room
        return None if flight is None else InTheAir(flight, {row: i for i, row in enumerate(rows)})

    # Tokens -----------------------------------------------------------------------------------------------------------

    def _choose(self, ready: list[Ready]) -> Iterator[list[Row]]:
        """A token for every row, then the next for those whose draft said the same, and so on; yields who got one or ended."""
        depth = 0
        while ready:
            for row, logits, _ in ready:
                self._choose_one(row, logits[depth])
            yield [one.row for one in ready]
            ready = [
                one
                for one in ready
                if not one.row.finish_reason and depth < len(one.draft) and one.draft[depth] == one.row.tokens[-1]
            ]
            depth += 1

    def _choose_one(self, row: Row, logits: Tensor) -> None:
        if row.limit:
            self._end_if_done(row, partial(row.choose, logits))
        else:
            row.finish_reason = "length"
            self._leave(row)

    def _end_if_done(self, row: Row, choose: Callable[[], None]) -> None:
        try:
            choose()
        except Exception as error:  # of a processor, or of logits that leave no choice: the others go on
            self._fail(row, error)
        else:
            if row.finish_reason:
                self._leave(row)


def _take(row: Row, token: int) -> None:
    """What the device has chosen."""
    if token < 0:
        raise nothing_to_choose()
    row.take(token)


def unread(row: Row) -> int:
    """Tokens of a row at work that are not in the cache; less than none where drafts are, or what the device has chosen."""
    assert row.sequence is not None
    return row.length - row.sequence.length


def next_tokens(row: Row, count: int) -> list[int]:
    """The first tokens that are not in the cache."""
    assert row.sequence is not None
    if count == 1 and row.tokens and unread(row) == 1:
        return row.tokens[-1:]
    return row.history[row.sequence.length :][:count].tolist()
