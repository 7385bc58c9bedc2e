"""Continuous batching: passes of a model over sequences that come and go between them. Knows no model class and no text.

A pass takes one token of every sequence in decode, and beside them the next chunks of prompts in prefill, so that a long prompt
does not stop the others. Where the device samples and all sequences are in decode, steps are asynchronous: the scheduler
launches the next step before it reads the tokens of the last one, and drops what that step did for sequences that ended in
between. Samples depend on positions alone (`sampling.sample_token`), so the tokens of a sequence depend neither on the other
sequences nor on preemption.
"""

from __future__ import annotations

import bisect
import time
from collections import abc, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ..cache import BlockTable, PrefixCache, PrefixEntry, common_length, copied
from ..errors import CacheError
from ..kernels.backend import PendingStep
from ..units import PAGE
from .protocols import PREFILL_TOKENS, AsyncRunner, ModelRunner
from .request import Sequence
from .sampling import no_token_left
from .speculative import Drafting

MIN_PREFILL_TOKENS = 16  # of a pass, however long it takes
PROMPT_LOGPROB_TOKENS = 128  # of a pass that needs logits, as many as the vocabulary, after every token of a prompt
PASS_SECONDS = 0.25  # of a pass that sequences in decode wait for


class PrefillBudget:
    """Prompt tokens of a pass beside sequences in decode, chosen so that a pass takes about `seconds`."""

    def __init__(self, seconds: float = PASS_SECONDS, clock: Callable[[], float] = time.perf_counter) -> None:
        self.tokens = 4 * MIN_PREFILL_TOKENS
        self.clock = clock
        self._seconds = seconds

    def update(self, tokens: int, seconds: float) -> None:
        """Learn from a pass with so many prompt tokens; the budget at most doubles."""
        fitting = min(int(tokens * self._seconds / max(seconds, 1e-9)), 2 * tokens)
        # The short rest of a prompt says little about long chunks.
        if tokens < self.tokens and seconds < self._seconds:
            fitting = max(fitting, self.tokens)
        self.tokens = max(MIN_PREFILL_TOKENS, min(fitting, PREFILL_TOKENS))


class StepLogits(NamedTuple):
    """What a sequence samples from: logits (drafted tokens + 1, vocabulary) after its last token and after each drafted one."""

    sequence: Sequence
    logits: Tensor
    draft: abc.Sequence[int] = ()


class PendingBatch(NamedTuple):
    """A step that was launched and not read yet, and the row of each sequence in its batch."""

    step: PendingStep
    rows: dict[Sequence, int]


class Scheduler:
    """Runs and samples the passes of many sequences. Not thread-safe.

    running: sequences with a block table, the oldest first. waiting: the others. Where the pool is full, the youngest sequence
    is preempted and recomputed once it fits. drafting: makes and verifies drafts; prompts then have passes of their own.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        prefixes: PrefixCache,
        drafting: Drafting | None = None,
        prefill_budget: PrefillBudget | None = None,
    ) -> None:
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._model_runner, self._prefixes, self._pool = model_runner, prefixes, prefixes.pool
        self._drafting, self._prefill_budget = drafting, prefill_budget
        self._async_runner = model_runner if isinstance(model_runner, AsyncRunner) and drafting is None else None
        self._pending: PendingBatch | None = None
        self._arrivals = 0
        # A waiting sequence -> the running one that computes their common prefix, and the length of that.
        self._prefix_leaders: dict[Sequence, tuple[Sequence, int]] = {}
        # No waiting sequence fits until a running one ends.
        self._full = False

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn; one that needs no pass at all ends here."""
        if sequence.max_tokens == 0 and not sequence.needs_prompt_logprobs:
            sequence.finish_reason = "length"
            return
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence that has not ended, and free its pages."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"
            self._remove(sequence)

    def close(self, keep: bool = True) -> None:
        """Drop all sequences. keep: their pages go into the prefix cache."""
        for sequence in [*self.running, *self.waiting]:
            self._remove(sequence, keep)

    def step(self) -> Iterator[list[Sequence]]:
        """Admit sequences and run a pass; yields those that got a token or ended, each time that happens to any of them."""
        # 1. Sequences whose next token needs no pass.
        yield from self._sample(self._admit())
        while self.running:
            sequences = list(self.running)
            try:
                # 2. An asynchronous step, where that is possible.
                changed = self._step_async()
                # 3. Else a pass of prompts and tokens, which the host samples.
                if changed is None:
                    batch = self._schedule()
                    sequences = list(batch)
                    ready = self._run(batch)
            except CacheError as error:
                # 4. The pool is full: preempt the youngest sequence and try again.
                if len(self.running) > 1:
                    self.preempt(self.running[-1])
                else:
                    yield [self._fail(self.running[0], error)]
            except Exception as error:
                # 5. The pass failed: cached prefixes share pages that may be half written.
                self._prefixes.clear()
                self._pending = None
                yield [self._fail(sequence, error) for sequence in sequences]
                return
            else:
                if changed is None:
                    yield from self._postprocess(ready)
                elif changed:
                    yield changed
                return

    def _postprocess(self, ready: list[StepLogits]) -> Iterator[list[Sequence]]:
        """Sample after a pass, also for sequences that waited for the logits of the same prompt; verify drafts."""
        before = [len(one.sequence.tokens) for one in ready]
        yield from self._sample([*ready, *self._admit()])
        # The pass of a prompt has no drafts.
        if self._drafting is None or not all(before):
            return
        new = [one.sequence.tokens[n:] for one, n in zip(ready, before, strict=True)]
        self._drafting.update([one.draft for one in ready], new)
        for sequence in self.running:
            assert sequence.block_table is not None
            # Without the drafted tokens that were rejected.
            self._pool.truncate(sequence.block_table, sequence.length - 1)

    # Admission and release --------------------------------------------------------------------------------------------

    def _admit(self) -> list[StepLogits]:
        """Start waiting sequences in their order while they fit -> those whose next logits are cached."""
        ready, following = [], []
        while self.waiting and not self._full:
            sequence = self.waiting.popleft()
            if self._has_prefix_leader(sequence):
                following.append(sequence)
                continue
            block_table, logits = self._match_prefix(sequence)
            if logits is None and self._find_prefix_leader(sequence, block_table):
                self._pool.free(block_table)
                following.append(sequence)
            elif not self._can_allocate(sequence, block_table):
                self._pool.free(block_table)
                self.waiting.appendleft(sequence)
                self._full = True
            else:
                sequence.block_table = block_table
                if sequence.num_cached_tokens is None:
                    sequence.num_cached_tokens = block_table.length
                bisect.insort(self.running, sequence, key=lambda other: other.arrival)
                if logits is not None:
                    ready.append(StepLogits(sequence, logits[None]))
        self.waiting.extendleft(reversed(following))
        return ready

    def _match_prefix(self, sequence: Sequence) -> tuple[BlockTable, Tensor | None]:
        """The cached part of a sequence, and the logits after it where it is the whole history and they are known."""
        if sequence.needs_prompt_logprobs:
            return self._pool.new(), None
        live = []
        for other in self.running:
            if (table := other.block_table) is not None:
                live.append(PrefixEntry(other.history[: table.length], table, len(other.prompt), other.prompt_logits))
        block_table, logits = self._prefixes.match_prefix(sequence.history, live)
        if logits is not None and not sequence.tokens:
            sequence.prompt_logits = copied(logits)
        return block_table, logits

    def _has_prefix_leader(self, sequence: Sequence) -> bool:
        """Whether the leader of a waiting sequence still computes their common prefix."""
        leader, length = self._prefix_leaders.get(sequence, (None, 0))
        if leader is not None and leader.block_table is not None and leader.block_table.length < length:
            return True
        self._prefix_leaders.pop(sequence, None)
        return False

    def _find_prefix_leader(self, sequence: Sequence, block_table: BlockTable) -> bool:
        """Whether a running sequence is about to compute at least a page more of this one's prefix, or all of its prompt."""
        if sequence.needs_prompt_logprobs:
            return False
        for other in self.running:
            assert other.block_table is not None
            common = common_length(sequence.history, other.history)
            same = common == len(sequence.prompt) == len(other.prompt) and not sequence.tokens and not other.tokens
            gained = min(common, sequence.length - 1) - block_table.length
            if other.block_table.length < common and (same or gained >= PAGE):
                self._prefix_leaders[sequence] = other, common
                return True
        return False

    def _can_allocate(self, sequence: Sequence, block_table: BlockTable) -> bool:
        """Whether the pool has room for a sequence's history, beside the running ones and a page more for each of them."""
        if self._pool.limit is None or not self.running:
            return True
        held, needed = set(block_table.pages), -(-(sequence.length + 1) // PAGE) - block_table.length // PAGE
        for other in self.running:
            assert other.block_table is not None
            held |= set(other.block_table.pages)
            pages = max(len(other.block_table.pages), -(-other.length // PAGE))
            needed += pages - len(other.block_table.pages)
            needed += len(other.prompt) + other.max_tokens > PAGE * pages
        return len(held) + needed <= self._pool.limit

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it waits, and is recomputed once it fits."""
        self.running.remove(sequence)
        self._deallocate(sequence, keep=True)
        if sequence.needs_prompt_logprobs:
            sequence.reset_prompt_logprobs()
        self.waiting.appendleft(sequence)
        self._full = False

    def _fail(self, sequence: Sequence, error: Exception) -> Sequence:
        sequence.finish_reason, sequence.error = "error", error
        self._remove(sequence, keep=False)
        return sequence

    def _remove(self, sequence: Sequence, keep: bool = True) -> None:
        (self.waiting if sequence.block_table is None else self.running).remove(sequence)
        self._prefix_leaders.pop(sequence, None)
        self._deallocate(sequence, keep)
        self._full = False

    def _deallocate(self, sequence: Sequence, keep: bool) -> None:
        """Give a sequence's pages to the prefix cache (keep), or free them."""
        if self._drafting is not None:
            self._drafting.drafter.drop(sequence)
        if self._pending is not None:
            self._pending.rows.pop(sequence, None)
        if (table := sequence.block_table) is None:
            return
        if keep:
            cached = min(table.length, max(sequence.length - 1, len(sequence.prompt)))
            self._pool.truncate(table, cached)
            self._prefixes.insert(sequence.history[:cached], table, len(sequence.prompt), sequence.prompt_logits)
        else:
            self._pool.free(table)
        sequence.block_table = sequence.prompt_logits = None

    # Passes -----------------------------------------------------------------------------------------------------------

    def _schedule(self) -> dict[Sequence, int]:
        """The sequences of the next pass, and how many tokens of each."""
        sequences = self.running
        if self._drafting is not None and not all(s.tokens and s.num_uncached == 1 for s in sequences):
            sequences = [s for s in sequences if not s.tokens or s.num_uncached > 1]
        batch = {s: 1 for s in sequences if s.num_uncached == 1}
        prefill = [s for s in sequences if s.num_uncached > 1]
        room = PREFILL_TOKENS - len(batch)
        if batch and self._prefill_budget is not None:
            room = min(room, self._prefill_budget.tokens)
        if prefill and prefill[0].needs_prompt_logprobs:
            room = min(room, PROMPT_LOGPROB_TOKENS)
        room = max(room, MIN_PREFILL_TOKENS)
        for sequence in prefill:
            if room and sequence.needs_prompt_logprobs == prefill[0].needs_prompt_logprobs:
                batch[sequence] = min(room, sequence.num_uncached)
                room -= batch[sequence]
        return batch

    def _run(self, batch: dict[Sequence, int]) -> list[StepLogits]:
        """Run a pass -> the logits of the sequences that are computed to their last token."""
        # 1. The next tokens of each sequence, and drafts behind them.
        sequences = list(batch)
        tokens = [sequence.uncached_tokens(count) for sequence, count in batch.items()]
        drafts: list[list[int]] = [[] for _ in sequences]
        if self._drafting is not None and all(s.tokens for s in sequences):
            drafts = self._drafting.drafts(sequences, [s.max_tokens - len(s.tokens) - 1 for s in sequences])
            tokens = [ids + draft for ids, draft in zip(tokens, drafts, strict=True)]
        # 2. The pass.
        every = any(drafts) or any(s.needs_prompt_logprobs for s in sequences)
        block_tables = [s.block_table for s in sequences if s.block_table is not None]
        with self._timing(sum(count for sequence, count in batch.items() if sequence.num_uncached > 1)):
            logits = self._step(block_tables, tokens, every)
        # 3. Each sequence's part of the logits.
        ready = []
        parts = logits.split(list(map(len, tokens))) if every else logits.unsqueeze(1).unbind()
        for sequence, part, draft in zip(sequences, parts, drafts, strict=True):
            if sequence.needs_prompt_logprobs:
                sequence.append_prompt_logprobs(part)
            if sequence.num_uncached + len(draft) == 0:
                if not sequence.tokens:
                    sequence.prompt_logits = copied(part[-1])
                ready.append(StepLogits(sequence, part if draft else part[-1:], draft))
        return ready

    def _step(self, block_tables: list[BlockTable], tokens: list[list[int]], every: bool) -> Tensor:
        # A ModelRunner that never verifies drafts need not have the argument.
        if every:
            return self._model_runner.step(self._pool, block_tables, tokens, every=True).cpu()
        return self._model_runner.step(self._pool, block_tables, tokens).cpu()

    @contextmanager
    def _timing(self, prefill: int) -> Iterator[None]:
        """Time a pass with so many prompt tokens for the drafts or the prefill budget."""
        if self._drafting is not None:
            with self._drafting.timing():
                yield
        elif self._prefill_budget is not None and prefill:
            began = self._prefill_budget.clock()
            yield
            self._prefill_budget.update(prefill, self._prefill_budget.clock() - began)
        else:
            yield

    # Asynchronous steps -----------------------------------------------------------------------------------------------

    def _step_async(self) -> list[Sequence] | None:
        """Launch a step, then read the one before -> the sequences that got a token; None where the host has to sample."""
        before = self._pending
        self._pending = self._launch()
        if before is not None:
            tokens = before.step.tokens()
            for sequence, row in before.rows.items():
                self._append(sequence, partial(_accept, sequence, tokens[row]))
            return list(before.rows)
        return None if self._pending is None else []

    def _launch(self) -> PendingBatch | None:
        """Launch the next token of every sequence that needs one; None where some of them need something else."""
        if self._async_runner is None or self._async_runner.graph_reason is not None:
            return None
        # 1. Whether all sequences are in decode, and the device can sample for all of them.
        before = self._pending
        rows = before.rows if before is not None else {}
        sequences = [s for s in self.running if len(s.tokens) + (s in rows) < s.max_tokens]
        if not sequences or not all(s in rows or (s.tokens and s.num_uncached == 1) for s in sequences):
            return None
        if any(s.host_reason(s in rows) for s in sequences) or len({id(s.padding_ids) for s in sequences}) > 1:
            return None
        # 2. The step; an id of -1 - i stands for what the pending step samples in its row i.
        block_tables = [s.block_table for s in sequences if s.block_table is not None]
        ids = [-1 - rows[s] if s in rows else s.tokens[-1] for s in sequences]
        sampling, excluded = [s.device_sampling for s in sequences], sequences[0].padding_ids
        previous = before.step if before is not None else None
        try:
            step = self._async_runner.launch(self._pool, block_tables, ids, sampling, excluded, previous)
        except CacheError:
            # Sequences that end with the pending step may make room.
            if before is not None:
                return None
            raise
        return None if step is None else PendingBatch(step, {s: i for i, s in enumerate(sequences)})

    # Sampling ---------------------------------------------------------------------------------------------------------

    def _sample(self, ready: list[StepLogits]) -> Iterator[list[Sequence]]:
        """Sample a token of every sequence, then the next where the draft was right; yields those that got one or ended."""
        depth = 0
        while ready:
            for sequence, logits, _ in ready:
                if sequence.max_tokens:
                    self._append(sequence, partial(sequence.sample, logits[depth]))
                else:
                    sequence.finish_reason = "length"
                    self._remove(sequence)
            yield [one.sequence for one in ready]
            ready = [one for one in ready if not one.sequence.finish_reason and _is_right(one, depth)]
            depth += 1

    def _append(self, sequence: Sequence, append: Callable[[], None]) -> None:
        """Append a token; an error of that, by a processor or for want of a token, ends this sequence alone."""
        try:
            append()
        except Exception as error:
            self._fail(sequence, error)
        else:
            if sequence.finish_reason:
                self._remove(sequence)


def _accept(sequence: Sequence, token: int) -> None:
    """Append what the device has sampled."""
    if token < 0:
        raise no_token_left()
    sequence.accept(token)


def _is_right(one: StepLogits, depth: int) -> bool:
    """Whether the draft has a token at this depth, and the sequence has sampled the same."""
    return depth < len(one.draft) and one.draft[depth] == one.sequence.tokens[-1]
