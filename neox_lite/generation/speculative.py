"""Speculative decoding: drafts of the next tokens, their length, and their statistics. Knows no model class.

A draft never changes a token. Samples depend on (seed, position, stream) alone, so the target's token at every position is a
function of its logits there: one pass gives the logits after every drafted token, and the scheduler samples from them one by
one for as long as the draft agrees. Greedy or sampled, the tokens are those of plain decoding, up to what passes of different
lengths round differently. A draft model samples with the same random numbers, which makes it sample the same token nearly as
often as any coupling could (`sampling.sample_token`).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..cache import BlockTable, PrefixCache
from ..errors import ArgumentError
from ..tokenizer import GPTNeoXTokenizerFast
from .protocols import ModelRunner, advance

MAX_DRAFT_TOKENS = 15  # where the caller sets none: with the token before them, as many as a captured pass takes
NGRAMS = (4, 3, 2)  # lengths of the n-grams that prompt lookup matches, the longest first
SAMPLES = 9  # of a median
ACCEPTANCE_WINDOW = 32  # drafted tokens over which acceptance is averaged
PRIOR_ACCEPTANCE = 0.7  # acceptance before any is seen
PROBE_EVERY = 4  # passes from the last draft to the first probe, while drafts do not pay
PROBE_SHARE = 0.015  # of the time that probes may take
LOSS_SHARE = 0.02  # of the time of plain decoding: what drafts may cost beyond it, even if all are rejected
HEAD_START = 16  # plain passes that count as done before the first draft
VOCABULARY_PADDING = 512  # checkpoints with the same tokenizer differ by less in vocab_size


class SequenceView(Protocol):
    """What a drafter sees of a sequence. Its hash is its identity."""

    stream: int

    @property
    def history(self) -> Tensor:
        """Prompt and tokens so far (tokens,) int64."""
        ...


class Drafter(Protocol):
    """Drafts the next tokens of sequences."""

    def ready(self, sequences: Sequence[SequenceView]) -> list[SequenceView]:
        """Those that it can draft for, in negligible time."""
        ...

    def propose(self, sequences: Sequence[SequenceView], counts: Sequence[int]) -> list[list[int]]:
        """At most counts[i] ids that may follow sequences[i], all of them ready."""
        ...

    def drop(self, sequence: SequenceView) -> None:
        """Drop the state of a sequence that has ended, if there is any."""
        ...


@dataclass
class Speculation:
    """Counts of speculation. passes: of the target after the prompt, once for each sequence; tokens: what they gave."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0

    @property
    def mean_tokens_per_pass(self) -> float | None:
        """1 without speculation; None before the first pass."""
        return self.tokens / self.passes if self.passes else None


# Drafters -------------------------------------------------------------------------------------------------------------


@dataclass
class _Index:
    """A history, where the n-grams in it last ended, and where the one at its end did before."""

    ids: list[int] = field(default_factory=list)
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    found: int | None = None


class PromptLookup:
    """Drafts what followed the last occurrence of the last n-gram, in the prompt or after it; the longest n-gram counts."""

    def __init__(self) -> None:
        self._indexes: dict[SequenceView, _Index] = {}

    def ready(self, sequences: Sequence[SequenceView]) -> list[SequenceView]:
        return [sequence for sequence in sequences if self._update(sequence).found is not None]

    def propose(self, sequences: Sequence[SequenceView], counts: Sequence[int]) -> list[list[int]]:
        drafts = []
        for sequence, count in zip(sequences, counts, strict=True):
            index = self._indexes[sequence]
            assert index.found is not None
            known = list(index.ids[index.found : index.found + count])
            # Beyond its end the history repeats itself.
            period = len(index.ids) - index.found
            known += [known[i % period] for i in range(len(known), count)]
            drafts.append(known)
        return drafts

    def drop(self, sequence: SequenceView) -> None:
        self._indexes.pop(sequence, None)

    def _update(self, sequence: SequenceView) -> _Index:
        """Index new tokens, with a dictionary entry for each n."""
        index = self._indexes.setdefault(sequence, _Index())
        ids = index.ids
        for token in sequence.history[len(ids) :].tolist():
            index.ends |= {tuple(ids[-n:]): len(ids) for n in NGRAMS if len(ids) >= n}
            ids.append(token)
        matches = (index.ends.get(tuple(ids[-n:])) for n in NGRAMS if len(ids) >= n)
        index.found = next((end for end in matches if end is not None), None)
        return index


@dataclass(eq=False)
class _DraftState:
    """What a draft model holds of a sequence: its ids in the cache, and how many of them are the sequence's own."""

    block_table: BlockTable
    ids: list[int]
    verified: int = 0
    seen: int = 0  # tokens of the history that were compared with the vocabulary
    in_vocabulary: bool = True


class DraftModel:
    """Drafts with a smaller model of the same tokenizer.

    sample(sequence, history (tokens,), logits (vocabulary,)) -> id samples as the target does. vocabulary, context: ids and
    positions that the model has; sequences beyond them get no drafts.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        prefixes: PrefixCache,
        sample: Callable[[SequenceView, Tensor, Tensor], int],
        vocabulary: int,
        context: int,
    ) -> None:
        self._model_runner, self._prefixes, self._sample = model_runner, prefixes, sample
        self._vocabulary, self._context = vocabulary, context
        self._states: dict[SequenceView, _DraftState] = {}

    def ready(self, sequences: Sequence[SequenceView]) -> list[SequenceView]:
        return [s for s in sequences if len(s.history) < self._context and self._state(s).in_vocabulary]

    def propose(self, sequences: Sequence[SequenceView], counts: Sequence[int]) -> list[list[int]]:
        """All sequences together, one pass for each drafted token; the first also takes the tokens since the last draft."""
        room = [min(count, self._context - len(s.history)) for s, count in zip(sequences, counts, strict=True)]
        lengths = {sequence: count for sequence, count in zip(sequences, room, strict=True) if count}
        drafts: dict[SequenceView, list[int]] = {sequence: [] for sequence in sequences}
        new = {sequence: self._rewind(sequence) for sequence in lengths}
        while new:
            states = [self._states[sequence] for sequence in new]
            block_tables = [state.block_table for state in states]
            logits = advance(self._model_runner, self._prefixes.pool, block_tables, list(new.values()))
            for (sequence, ids), state, one in zip(new.items(), states, logits, strict=True):
                state.ids += ids
                history = torch.cat((sequence.history, torch.tensor(drafts[sequence], dtype=torch.long)))
                drafts[sequence].append(self._sample(sequence, history, one))
            new = {sequence: drafts[sequence][-1:] for sequence in new if len(drafts[sequence]) < lengths[sequence]}
        return [drafts[sequence] for sequence in sequences]

    def drop(self, sequence: SequenceView) -> None:
        """Move what is verified into the prefix cache."""
        if (state := self._states.pop(sequence, None)) is not None:
            state.verified = self._count_verified(sequence, state)
            self._prefixes.pool.truncate(state.block_table, state.verified)
            self._prefixes.insert(sequence.history[: state.verified], state.block_table)

    def _state(self, sequence: SequenceView) -> _DraftState:
        if sequence not in self._states:
            block_table, _ = self._prefixes.match_prefix(sequence.history.tolist())
            ids = sequence.history[: block_table.length].tolist()
            self._states[sequence] = _DraftState(block_table, ids, len(ids))
        state = self._states[sequence]
        state.in_vocabulary = state.in_vocabulary and bool((sequence.history[state.seen :] < self._vocabulary).all())
        state.seen = len(sequence.history)
        return state

    def _rewind(self, sequence: SequenceView) -> list[int]:
        """Drop rejected drafts -> the ids of the history that are not in the cache, at least one."""
        state = self._states[sequence]
        state.verified = min(self._count_verified(sequence, state), len(sequence.history) - 1)
        self._prefixes.pool.truncate(state.block_table, state.verified)
        del state.ids[state.verified :]
        return sequence.history[state.verified :].tolist()

    def _count_verified(self, sequence: SequenceView, state: _DraftState) -> int:
        """How many of the cached ids are the sequence's own."""
        count = state.verified
        for drafted, token in zip(state.ids[count:], sequence.history[count:].tolist(), strict=False):
            if drafted != token:
                break
            count += 1
        return count


def check_vocabularies(
    target: GPTNeoXTokenizerFast | None, draft: GPTNeoXTokenizerFast | None, sizes: tuple[int, int]
) -> None:
    """Raise ArgumentError for a draft model whose ids mean something else; sizes: both models' vocab_size.

    An id that only one of the tokenizers has is never drafted, and allowed. Without one of the tokenizers, sizes must be close.
    """
    if target is None or draft is None:
        if abs(sizes[0] - sizes[1]) >= VOCABULARY_PADDING:
            raise ArgumentError(
                f"assistant_model: its vocab_size is {sizes[1]}, but this model's is {sizes[0]}; "
                "a draft model needs the same tokenizer"
            )
        return
    words = [{i: word for word, i in tokenizer.get_vocab().items()} for tokenizer in (target, draft)]
    different = [i for i in words[0].keys() & words[1].keys() if words[0][i] != words[1][i]]
    if different:
        first = min(different)
        raise ArgumentError(
            f"assistant_model: id {first} is {words[1][first]!r} to it, but {words[0][first]!r} to this model; "
            "a draft model needs the same tokenizer"
        )


# Length of drafts -----------------------------------------------------------------------------------------------------


class PassTimes:
    """Seconds of passes by their tokens: the median of the last SAMPLES, and at most those of any longer pass.

    The bound keeps a length that was last measured on a busy machine from looking slow beside later ones. The first pass of
    each length does not count, because it may compile or capture.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self.known: dict[int, float] = {}  # by tokens, ascending

    def add(self, tokens: int, seconds: float) -> None:
        if tokens not in self._seconds:
            self._seconds[tokens] = deque(maxlen=SAMPLES)
            return
        self._seconds[tokens].append(seconds)
        known, least = [], math.inf
        for n, times in sorted(self._seconds.items(), reverse=True):
            if times:
                least = min(least, statistics.median(times))
                known.append((n, least))
        self.known = dict(reversed(known))


def estimate(known: dict[int, float], tokens: int, step: int = 1) -> float:
    """Seconds of a pass of so many tokens. known: measured ones by tokens, ascending, at least one.

    An unmeasured length takes at least as long as the next shorter one, and at most about what the line through its neighbours
    gives; the estimate is the mean of the two. Where the next shorter one is at most `step` shorter, the estimate is the lower
    bound, because only a try finds a step in the cost.
    """
    if tokens in known:
        return known[tokens]
    shorter, longer = [n for n in known if n < tokens], [n for n in known if n > tokens]
    if not shorter:
        return known[longer[0]]
    least, last = known[shorter[-1]], shorter[-1]
    if tokens - last <= step:
        return least
    if longer:
        slope = (known[longer[0]] - least) / (longer[0] - last)
    elif len(shorter) > 1:
        slope = (least - known[shorter[-2]]) / (last - shorter[-2])
    else:
        slope = least / last
    return least + max(0.0, slope) * (tokens - last) / 2


class DraftLengthController:
    """Chooses the length of drafts with most tokens a second, and 0 where plain decoding is faster.

    With acceptance a, a draft of g tokens gives (1 - a**(g+1)) / (1 - a) tokens for a pass of g + 1 tokens and g steps of the
    drafter. While drafts do not pay, a draft of one token probes from time to time: after twice as many passes each time, up to
    where probes take PROBE_SHARE of the time. No draft is so long that, if all of it is rejected, everything so far takes more
    than LOSS_SHARE longer than plain decoding; the draft model's prefill, which happens once, does not count.
    """

    def __init__(self, times: PassTimes) -> None:
        self.acceptance = PRIOR_ACCEPTANCE
        self._times = times
        self._evidence = 1.0  # drafted tokens in the average of acceptance
        self._draft_s: deque[float] | None = None  # for each drafted token
        self._idle = 0  # passes since the last draft
        self._wait = PROBE_EVERY
        self._probe_s: float | None = None  # time of a running probe's draft
        self._drafting_s = 0.0  # time of the running pass's draft
        self._plain_s = 0.0  # time of the tokens so far in plain decoding
        self._lost_s = 0.0  # time beyond that; negative where drafts pay

    def length(self, batch_size: int, drafting: int, longest: int) -> int:
        """Tokens to draft for each of `drafting` sequences out of `batch_size`, at most `longest`."""
        known = self._times.known
        if batch_size not in known or not drafting or longest < 1:
            return 0
        lengths = [0, *(g for g in range(1, longest + 1) if self._is_bearable(known, batch_size, drafting, g))]
        best = max(lengths, key=lambda g: self._rate(known, batch_size, drafting, g))
        if best:
            self._wait, self._probe_s = PROBE_EVERY, None
            return best
        if self._idle < self._wait or 1 not in lengths:
            return 0
        self._probe_s = 0.0
        return 1

    def _is_bearable(self, known: dict[int, float], batch_size: int, drafting: int, length: int) -> bool:
        """Whether LOSS_SHARE allows that all of a draft is rejected."""
        plain_s = known[batch_size]
        cost_s = estimate(known, batch_size + drafting * length, drafting) + length * (self.draft_s or 0.0) - plain_s
        return self._lost_s + cost_s <= LOSS_SHARE * (self._plain_s + HEAD_START * plain_s)

    def _rate(self, known: dict[int, float], batch_size: int, drafting: int, length: int) -> float:
        """Expected tokens a second."""
        a = min(self.acceptance, 0.999)
        tokens = batch_size - drafting + drafting * (1 - a ** (length + 1)) / (1 - a)
        draft_s = self.draft_s or 0.0
        return tokens / (estimate(known, batch_size + drafting * length, drafting) + length * draft_s)

    @property
    def draft_s(self) -> float | None:
        """Seconds of a drafted token; None before the second draft."""
        return statistics.median(self._draft_s) if self._draft_s else None

    def record_draft(self, length: int, seconds: float) -> None:
        """Learn from a draft of at most `length` tokens. The first includes prefill and does not count; one after a pause also
        takes the tokens of the pause, so it is an upper bound."""
        if self._probe_s is not None:
            self._probe_s = seconds
        if self._draft_s is None:
            self._draft_s = deque(maxlen=SAMPLES)
            return
        usual_s = self.draft_s
        self._drafting_s = seconds if usual_s is None else min(seconds, 3 * length * usual_s)
        if self._idle == 0 or self.draft_s is None or seconds / length < self.draft_s:
            self._draft_s.append(seconds / length)

    def record_pass(self, batch_size: int, tokens: int, seconds: float, tested: int, accepted: int) -> None:
        """Learn from a pass of so many sequences and tokens; of its drafts, the target has sampled at `tested` tokens."""
        self._times.add(tokens, seconds)
        self._account(batch_size, tokens, accepted)
        for hit in [True] * accepted + [False] * (tested - accepted):
            self._evidence = min(self._evidence + 1, ACCEPTANCE_WINDOW)
            self.acceptance += (hit - self.acceptance) / self._evidence
        if tokens == batch_size:
            self._idle += 1
            # Old acceptance says little about the present text.
            self._evidence = max(1.0, self._evidence * 0.9)
            return
        self._idle = 0
        if self._probe_s is not None:
            cost = (seconds + self._probe_s) / estimate(self._times.known, batch_size) - 1  # in plain passes
            lost = cost - self.acceptance * (tokens - batch_size) / batch_size
            bearable = max(0, math.ceil(lost / PROBE_SHARE))
            self._wait = 0 if accepted / batch_size > cost else min(2 * max(1, self._wait), bearable)
            self._probe_s = None

    def _account(self, batch_size: int, tokens: int, accepted: int) -> None:
        """Add a pass with the usual time of its length: a first one that compiles says nothing about the next."""
        known = self._times.known
        if batch_size in known:
            plain_s = known[batch_size] * (batch_size + accepted) / batch_size
            self._plain_s += plain_s
            if tokens > batch_size:
                self._lost_s += estimate(known, tokens, tokens - batch_size) + self._drafting_s - plain_s
        self._drafting_s = 0.0


class Drafting:
    """The drafts of one call. clock: in seconds. counts: updated with every pass."""

    def __init__(
        self,
        drafter: Drafter,
        longest: int,
        times: PassTimes,
        counts: Speculation,
        clock: Callable[[], float],
    ) -> None:
        self.drafter, self.longest, self.counts = drafter, longest, counts
        self.controller = DraftLengthController(times)
        self._clock, self._pass_s = clock, 0.0

    def drafts(self, sequences: Sequence[SequenceView], most: Sequence[int]) -> list[list[int]]:
        """A draft for each sequence, of at most `most[i]` tokens; [] where there is none or it does not pay."""
        room = dict(zip(sequences, most, strict=True))
        ready = self.drafter.ready([s for s in sequences if room[s] > 0])
        length = self.controller.length(len(sequences), len(ready), self.longest)
        if not length:
            return [[] for _ in sequences]
        began = self._clock()
        found = dict(zip(ready, self.drafter.propose(ready, [min(length, room[s]) for s in ready]), strict=True))
        self.controller.record_draft(length, self._clock() - began)
        return [found.get(sequence, []) for sequence in sequences]

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Time a pass of the target."""
        began = self._clock()
        yield
        self._pass_s = self._clock() - began

    def update(self, drafts: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]]) -> None:
        """Learn from the last pass. chosen[i]: the tokens that a sequence with drafts[i] got."""
        pairs = list(zip(drafts, chosen, strict=True))
        tested = sum(min(len(draft), len(tokens)) for draft, tokens in pairs)
        accepted = sum(a == b for draft, tokens in pairs for a, b in zip(draft, tokens, strict=False))
        drafted = sum(map(len, drafts))
        self.controller.record_pass(len(pairs), len(pairs) + drafted, self._pass_s, tested, accepted)
        self.counts.passes += len(pairs)
        self.counts.drafted += drafted
        self.counts.accepted += accepted
        self.counts.tokens += sum(map(len, chosen))
