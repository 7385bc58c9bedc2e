"""Speculation: cheap guesses at the next tokens, how long they should be, and what became of them. Knows no model class.

A draft never changes a token. Draws depend on (seed, position, stream) alone, so the target's choice at every place is a
function of its logits there: one pass gives the logits after every drafted token, and generation chooses from them one after
the other, as long as the draft said the same. Greedy or sampled, the tokens are those of plain decoding, but for what passes
of different lengths round differently. A draft model draws with the same random numbers, which makes it draw the same token
nearly as often as any coupling could (`sampling.choose`).
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

from ..cache import PrefixCache
from ..cache import Sequence as CachedSequence
from ..errors import ArgumentError
from ..tokenizer import GPTNeoXTokenizerFast
from .protocols import Stepper, advance

LONGEST = 15  # tokens of a draft, where nothing else is said: with the token before them, what a captured pass takes
NGRAMS = (4, 3, 2)  # tokens that must have occurred before, the longest first
SAMPLES = 9  # times that a median is taken of
MEMORY = 32  # drafted tokens over which acceptance is averaged
PRIOR = 0.7  # acceptance before any is seen
PROBE_EVERY = 4  # passes from the last draft to the first probe, where drafts do not pay
PROBE_SHARE = 0.015  # of the time that probes may take
LOSS_SHARE = 0.02  # of the time of plain decoding that drafts may cost beyond it, whatever becomes of them
HEAD_START = 16  # plain passes that count as done when the first draft is weighed
VOCABULARY_PADDING = 512  # checkpoints with the same tokenizer differ by less in vocab_size


class Sequel(Protocol):
    """What a drafter sees of a sequence being generated. Its hash is its identity."""

    stream: int

    @property
    def history(self) -> Tensor:
        """Prompt and tokens so far (tokens,) int64."""
        ...


class Drafter(Protocol):
    """Guesses how sequences go on."""

    def ready(self, rows: Sequence[Sequel]) -> list[Sequel]:
        """Those that it has a guess for; takes no time worth counting."""
        ...

    def propose(self, rows: Sequence[Sequel], counts: Sequence[int]) -> list[list[int]]:
        """At most counts[i] ids that may follow ready rows[i]."""
        ...

    def drop(self, row: Sequel) -> None:
        """Forget a row, if it is known; it gets no more tokens."""
        ...


@dataclass
class Speculation:
    """What came of drafts. passes counts each row of each pass of the target after the prompt, tokens what they gave."""

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
    """Guesses what followed the last occurrence of the last few tokens, in the prompt or after it; the longest match counts."""

    def __init__(self) -> None:
        self._indexes: dict[Sequel, _Index] = {}

    def ready(self, rows: Sequence[Sequel]) -> list[Sequel]:
        return [row for row in rows if self._update(row).found is not None]

    def propose(self, rows: Sequence[Sequel], counts: Sequence[int]) -> list[list[int]]:
        drafts = []
        for row, count in zip(rows, counts, strict=True):
            index = self._indexes[row]
            assert index.found is not None
            known = list(index.ids[index.found : index.found + count])
            period = len(index.ids) - index.found  # beyond its end the history is taken to repeat itself
            known += [known[i % period] for i in range(len(known), count)]
            drafts.append(known)
        return drafts

    def drop(self, row: Sequel) -> None:
        self._indexes.pop(row, None)

    def _update(self, row: Sequel) -> _Index:
        """Take in new tokens, a few dictionary entries for each."""
        index = self._indexes.setdefault(row, _Index())
        ids = index.ids
        for token in row.history[len(ids) :].tolist():
            index.ends |= {tuple(ids[-n:]): len(ids) for n in NGRAMS if len(ids) >= n}
            ids.append(token)
        matches = (index.ends.get(tuple(ids[-n:])) for n in NGRAMS if len(ids) >= n)
        index.found = next((end for end in matches if end is not None), None)
        return index


@dataclass(eq=False)
class _Shadow:
    """A draft model's sequence for a row: its ids, and how many of them are the row's own, not a draft."""

    sequence: CachedSequence
    ids: list[int]
    certain: int = 0
    seen: int = 0  # tokens of the history whose ids were looked at
    readable: bool = True


class DraftModel:
    """Guesses what a smaller model of the same tokenizer says.

    choose(row, history (tokens,), logits (vocabulary,)) -> id draws as the target would. vocabulary, context: ids and
    positions that the model has; rows that go beyond get no drafts.
    """

    def __init__(
        self,
        stepper: Stepper,
        prefixes: PrefixCache,
        choose: Callable[[Sequel, Tensor, Tensor], int],
        vocabulary: int,
        context: int,
    ) -> None:
        self._stepper, self._prefixes, self._choose = stepper, prefixes, choose
        self._vocabulary, self._context = vocabulary, context
        self._shadows: dict[Sequel, _Shadow] = {}

    def ready(self, rows: Sequence[Sequel]) -> list[Sequel]:
        return [row for row in rows if len(row.history) < self._context and self._shadow(row).readable]

    def propose(self, rows: Sequence[Sequel], counts: Sequence[int]) -> list[list[int]]:
        """All rows together, one pass for each drafted token; the first takes in what the model has not seen."""
        wanted = {
            row: min(count, self._context - len(row.history)) for row, count in zip(rows, counts, strict=True) if count
        }
        drafts: dict[Sequel, list[int]] = {row: [] for row in rows}
        new = {row: self._rewind(row) for row in wanted}
        while new:
            shadows = [self._shadows[row] for row in new]
            logits = advance(self._stepper, self._prefixes.pool, [s.sequence for s in shadows], list(new.values()))
            for (row, ids), shadow, scores in zip(new.items(), shadows, logits, strict=True):
                shadow.ids += ids
                history = torch.cat((row.history, torch.tensor(drafts[row], dtype=torch.long)))
                drafts[row].append(self._choose(row, history, scores))
            new = {row: drafts[row][-1:] for row in new if len(drafts[row]) < wanted[row]}
        return [drafts[row] for row in rows]

    def drop(self, row: Sequel) -> None:
        """Keep what is certain for later prompts."""
        if (shadow := self._shadows.pop(row, None)) is not None:
            shadow.certain = self._agreed(row, shadow)
            self._prefixes.pool.truncate(shadow.sequence, shadow.certain)
            self._prefixes.keep(row.history[: shadow.certain], shadow.sequence)

    def _shadow(self, row: Sequel) -> _Shadow:
        if row not in self._shadows:
            sequence, _ = self._prefixes.take(row.history.tolist())
            ids = row.history[: sequence.length].tolist()
            self._shadows[row] = _Shadow(sequence, ids, len(ids))
        shadow = self._shadows[row]
        shadow.readable = shadow.readable and bool((row.history[shadow.seen :] < self._vocabulary).all())
        shadow.seen = len(row.history)
        return shadow

    def _rewind(self, row: Sequel) -> list[int]:
        """Forget drafts that were not accepted -> the ids of the history that the model has not seen, at least one."""
        shadow = self._shadows[row]
        shadow.certain = min(self._agreed(row, shadow), len(row.history) - 1)
        self._prefixes.pool.truncate(shadow.sequence, shadow.certain)
        del shadow.ids[shadow.certain :]
        return row.history[shadow.certain :].tolist()

    def _agreed(self, row: Sequel, shadow: _Shadow) -> int:
        """How many of the model's ids are the row's."""
        count = shadow.certain
        for drafted, token in zip(shadow.ids[count:], row.history[count:].tolist(), strict=False):
            if drafted != token:
                break
            count += 1
        return count


def check_vocabularies(
    target: GPTNeoXTokenizerFast | None, draft: GPTNeoXTokenizerFast | None, sizes: tuple[int, int]
) -> None:
    """Refuse a draft model whose ids mean something else; sizes are both models' vocab_size.

    An id that only one of the tokenizers has is never drafted, and no reason. Where one is not known, sizes must be close.
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


# How long drafts should be --------------------------------------------------------------------------------------------


class PassTimes:
    """Seconds of passes by how many tokens they take: the median of the last few, and at most those of any longer pass.

    So a length last seen while the machine was busy does not look dear beside one seen later. The first pass of each length
    is left out, because it may compile or capture.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self.known: dict[int, float] = {}  # by growing number of tokens

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
    """Seconds of a pass from those of other lengths, by growing length, at least one.

    A length that was not tried takes at least as long as the next shorter one; the straight line through its neighbours says
    more. The mean of the two is hopeful enough to try what may be cheap, and wary enough not to try what will not be. Where
    the next shorter one is at most `step` shorter, hope alone counts: steps in the cost are found by going there.
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


class Pace:
    """Chooses the length of drafts that gives most tokens a second, and 0 where none beats plain decoding.

    With acceptance a, a draft of g tokens gives (1 - a**(g+1)) / (1 - a) tokens for a pass of g + 1 tokens and g steps of the
    drafter. Where drafts do not pay, one of a single token probes now and then: after twice as many passes each time, up to
    where probes take PROBE_SHARE of the time. No draft is so long that, were it all wrong, everything so far would have taken
    more than LOSS_SHARE longer than plain decoding; reading the prompt, which a draft model does once, is left out.
    """

    def __init__(self, times: PassTimes) -> None:
        self.acceptance = PRIOR
        self._times = times
        self._evidence = 1.0  # drafted tokens that the acceptance stands for
        self._draft_s: deque[float] | None = None  # for each drafted token
        self._idle = 0  # passes since the last draft
        self._wait = PROBE_EVERY
        self._probe_s: float | None = None  # what a running probe has taken for drafting
        self._drafting_s = 0.0  # what the draft of the running pass has taken
        self._plain_s = 0.0  # what the tokens so far would have taken without drafts
        self._lost_s = 0.0  # what they took beyond that; negative where drafts were worth it

    def length(self, rows: int, drafting: int, longest: int) -> int:
        """Tokens to draft for each of `drafting` rows out of `rows`, at most `longest`."""
        known = self._times.known
        if rows not in known or not drafting or longest < 1:
            return 0
        lengths = [0, *(g for g in range(1, longest + 1) if self._is_bearable(known, rows, drafting, g))]
        best = max(lengths, key=lambda g: self._rate(known, rows, drafting, g))
        if best:
            self._wait, self._probe_s = PROBE_EVERY, None
            return best
        if self._idle < self._wait or 1 not in lengths:
            return 0
        self._probe_s = 0.0
        return 1

    def _is_bearable(self, known: dict[int, float], rows: int, drafting: int, length: int) -> bool:
        """Whether a draft may be all wrong."""
        plain_s = known[rows]
        cost_s = estimate(known, rows + drafting * length, drafting) + length * (self.draft_s or 0.0) - plain_s
        return self._lost_s + cost_s <= LOSS_SHARE * (self._plain_s + HEAD_START * plain_s)

    def _rate(self, known: dict[int, float], rows: int, drafting: int, length: int) -> float:
        """Expected tokens a second."""
        a = min(self.acceptance, 0.999)
        tokens = rows - drafting + drafting * (1 - a ** (length + 1)) / (1 - a)
        draft_s = self.draft_s or 0.0
        return tokens / (estimate(known, rows + drafting * length, drafting) + length * draft_s)

    @property
    def draft_s(self) -> float | None:
        """Seconds that a drafted token takes, if that is known."""
        return statistics.median(self._draft_s) if self._draft_s else None

    def drafted(self, length: int, seconds: float) -> None:
        """A draft of at most `length` tokens was made. The first reads the prompt and is left out; one after a pause has to
        catch up, and tells only that others take no longer."""
        if self._probe_s is not None:
            self._probe_s = seconds
        if self._draft_s is None:
            self._draft_s = deque(maxlen=SAMPLES)
            return
        usual_s = self.draft_s
        self._drafting_s = seconds if usual_s is None else min(seconds, 3 * length * usual_s)
        if self._idle == 0 or self.draft_s is None or seconds / length < self.draft_s:
            self._draft_s.append(seconds / length)

    def judged(self, rows: int, tokens: int, seconds: float, tested: int, accepted: int) -> None:
        """A pass of so many rows and tokens took `seconds`; of its drafts, `tested` tokens were compared."""
        self._times.add(tokens, seconds)
        self._account(rows, tokens, accepted)
        for hit in [True] * accepted + [False] * (tested - accepted):
            self._evidence = min(self._evidence + 1, MEMORY)
            self.acceptance += (hit - self.acceptance) / self._evidence
        if tokens == rows:
            self._idle += 1
            self._evidence = max(1.0, self._evidence * 0.9)  # what was seen long ago says little about the text of now
            return
        self._idle = 0
        if self._probe_s is not None:
            cost = (seconds + self._probe_s) / estimate(self._times.known, rows) - 1  # in plain passes
            lost = cost - self.acceptance * (tokens - rows) / rows
            bearable = max(0, math.ceil(lost / PROBE_SHARE))
            self._wait = 0 if accepted / rows > cost else min(2 * max(1, self._wait), bearable)
            self._probe_s = None

    def _account(self, rows: int, tokens: int, accepted: int) -> None:
        """Enter a pass with what such passes usually take: a first one that compiles says nothing about the next."""
        known = self._times.known
        if rows in known:
            plain_s = known[rows] * (rows + accepted) / rows
            self._plain_s += plain_s
            if tokens > rows:
                self._lost_s += estimate(known, tokens, tokens - rows) + self._drafting_s - plain_s
        self._drafting_s = 0.0


class Drafting:
    """One call's drafts: made by a drafter, as long as they should be, timed by a clock in seconds, and counted."""

    def __init__(
        self,
        drafter: Drafter,
        longest: int,
        times: PassTimes,
        counts: Speculation,
        clock: Callable[[], float],
    ) -> None:
        self.drafter, self.longest, self.counts = drafter, longest, counts
        self.pace = Pace(times)
        self._clock, self._pass_s = clock, 0.0

    def drafts(self, rows: Sequence[Sequel], most: Sequence[int]) -> list[list[int]]:
        """A draft for each row, of at most most[i] tokens; [] where there is none or none would pay."""
        room = dict(zip(rows, most, strict=True))
        ready = self.drafter.ready([row for row in rows if room[row] > 0])
        length = self.pace.length(len(rows), len(ready), self.longest)
        if not length:
            return [[] for _ in rows]
        began = self._clock()
        found = dict(zip(ready, self.drafter.propose(ready, [min(length, room[row]) for row in ready]), strict=True))
        self.pace.drafted(length, self._clock() - began)
        return [found.get(row, []) for row in rows]

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Around a pass of the target."""
        began = self._clock()
        yield
        self._pass_s = self._clock() - began

    def judge(self, drafts: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]]) -> None:
        """Learn from the last pass: what was drafted for each row, and the tokens it got."""
        pairs = list(zip(drafts, chosen, strict=True))
        tested = sum(min(len(draft), len(tokens)) for draft, tokens in pairs)
        accepted = sum(a == b for draft, tokens in pairs for a, b in zip(draft, tokens, strict=False))
        drafted = sum(map(len, drafts))
        self.pace.judged(len(pairs), len(pairs) + drafted, self._pass_s, tested, accepted)
        self.counts.passes += len(pairs)
        self.counts.drafted += drafted
        self.counts.accepted += accepted
        self.counts.tokens += sum(map(len, chosen))
