"""What the scheduler promises: rows come and go between passes, and none of their tokens depends on what else runs.

Where passes are looked at, a scripted model notes them; no test depends on how fast the machine is.
"""

import random
from collections import Counter

import pytest
import torch
from support.often import times
from support.peers import pair, random_ids
from support.scripted import ScriptedModel, certain, failing

from neox_lite.cache import PrefixCache
from neox_lite.errors import CacheError
from neox_lite.generation.options import Options
from neox_lite.generation.protocols import PREFILL_TOKENS
from neox_lite.generation.request import Sequence
from neox_lite.generation.sampling import Sampling, sample_token
from neox_lite.generation.scheduler import MIN_PREFILL_TOKENS, PROMPT_LOGPROB_TOKENS, PrefillBudget, Scheduler
from neox_lite.units import PAGE

VOCABULARY = 50


def continuation(prompt, count):
    """What the scripted model generates after a prompt: each token is the last one plus the number of tokens so far."""
    ids = list(prompt)
    for _ in range(count):
        ids.append((ids[-1] + len(ids)) % VOCABULARY)
    return ids[len(prompt) :]


def check_complete(*sequences):
    for sequence in sequences:
        assert sequence.tokens == continuation(sequence.prompt, sequence.max_tokens)


def run(scheduler, passes=None):
    """All that is yielded, until nothing is left or for so many passes."""
    found = []
    while scheduler.busy and passes != 0:
        found += scheduler.step()
        passes = None if passes is None else passes - 1
    return found


class CountingScheduler(Scheduler):
    preemptions = 0

    def preempt(self, sequence):
        self.preemptions += 1
        super().preempt(sequence)


def scheduler_with(*sequences, budget=0, prefill_budget=False, **script):
    """A scripted model and a scheduler of it with sequences that wait; budget: pages of kept prefixes."""
    model = ScriptedModel(lambda place, token: certain((token + place) % VOCABULARY), **script)
    prefill_budget = PrefillBudget(1.0, lambda: model.now) if prefill_budget else None
    scheduler = CountingScheduler(model, PrefixCache(model.pool, budget), prefill_budget=prefill_budget)
    for sequence in sequences:
        scheduler.add(sequence)
    return model, scheduler


def used(model):
    return model.pool.pages - model.pool.free_pages


# The same tokens, whatever else runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Exact: its float32 sums differ in their order alone between passes."""
    return pair(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)[0]


class FinishedStep:
    """A PendingStep whose tokens are there; notes whether somebody has read them."""

    def __init__(self, tokens):
        self.sampled, self.was_read = tokens, False

    def tokens(self):
        self.was_read = True
        return self.sampled


class AsyncModel:
    """A model on a device that samples tokens itself, but for now and then."""

    def __init__(self, model, choice):
        self.model, self.choice, self.seen = model, choice, Counter()
        self.new_pool, self.step = model.new_pool, model.step

    @property
    def graph_reason(self):
        return "no graph for this step" if self.choice.random() < 0.1 else None

    def launch(self, pool, block_tables, ids, choices, excluded=None, previous=None):
        if self.choice.random() < 0.05:
            return None
        given = [id if id >= 0 else previous.sampled[-1 - id] for id in ids]
        self.seen["pending"] += previous is not None and not previous.was_read
        starts = [block_table.length for block_table in block_tables]
        logits = self.model.step(pool, block_tables, [[id] for id in given])
        tokens = []
        for start, one, logits_ in zip(starts, choices, logits, strict=True):
            sampling = Sampling(one.temperature > 0, one.temperature, one.top_k, one.top_p, one.min_p, seed=one.seed)
            tokens.append(sample_token(logits_, torch.zeros(start + 1), one.stream, sampling, []))
        self.seen["launched"] += 1
        return FinishedStep(tokens)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_random_schedules_give_every_row_the_tokens_it_gets_alone(model, asynchronous):
    """Arrivals, cancels, preemptions, shared beginnings, scores; rows with penalties, filters and seeds of their own.

    asynchronous: steps are asynchronous, and sequences are such that a device can choose for them, but for a few.
    """
    seen = Counter()
    for seed in range(times(15)):
        choice = random.Random(seed)
        prefixes = PrefixCache(model.new_pool(0, choice.choice([None, 4, 5])), choice.choice([0, 4]))
        budget = PrefillBudget(1.0, lambda: 0.0)
        budget.update = lambda *pass_, budget=budget, choice=choice: setattr(budget, "tokens", choice.randint(16, 200))
        model_runner = AsyncModel(model, choice) if asynchronous else model
        scheduler = CountingScheduler(model_runner, prefixes, prefill_budget=budget)
        trunk = random_ids(1, 300, seed=seed)[0].tolist()
        todo = [random_sequence(choice, trunk, i, asynchronous) for i in range(choice.randint(3, 10))]
        sequences = list(todo)
        while todo or scheduler.busy:
            while todo and choice.random() < 0.3:
                scheduler.add(todo.pop())
            for queue in (scheduler.running, scheduler.waiting):
                if choice.random() < 0.01 and queue:
                    scheduler.cancel(choice.choice(queue))
            if choice.random() < 0.03 and scheduler.running:
                scheduler.preempt(scheduler.running[-1])  # more often than the pool alone asks for it
            list(scheduler.step())
        for sequence in sequences:
            check_alone(model, sequence)
            seen[sequence.finish_reason] += 1
        assert scheduler._pool.pages - scheduler._pool.free_pages == prefixes.pages
        seen["preempted"] += scheduler.preemptions
        seen += model_runner.seen if asynchronous else Counter()
    assert not asynchronous or seen["pending"] > 0.8 * seen["launched"] > 250
    assert min(seen[name] for name in ("preempted", "cancelled", "length", "stop")) >= 5, seen


def random_sequence(choice, trunk, number, plain):
    """plain: one that a device can sample for."""
    own = random_ids(1, 80, seed=number + 1000)[0].tolist()
    prompt = trunk[: choice.choice([0, 1, 60, 130, 256])] + own[: choice.randint(1, 80)]
    prompt = choice.choice([prompt, trunk[:200]])  # now and then the same
    sampling = Sampling(
        do_sample=choice.random() < 0.7,
        seed=choice.randrange(2**64),
        top_p=choice.choice([1.0, 0.9]),
        temperature=choice.choice([0.7, 1.3]),
        repetition_penalty=choice.choice([1.0, 1.3]) if not plain or choice.random() < 0.1 else 1.0,
        frequency_penalty=choice.choice([0.0, 0.7]) if not plain else 0.0,
        no_repeat_ngram_size=choice.choice([0, 3]) if not plain else 0,
    )
    ends, least = choice.choice([(), tuple(range(0, 131, 40))]), choice.choice([0, 9])
    options = Options(sampling=sampling, eos_token_id=ends, min_new_tokens=least)
    scores, count = choice.choice([None, None, 3]), choice.choice([1, 20, 60, 140])
    return Sequence(prompt, count, choice.randint(0, 2), options=options, num_prompt_logprobs=scores)


def check_alone(model, sequence):
    """A row's tokens, up to where it was cancelled, and its scores."""
    alone = Sequence(sequence.prompt, sequence.max_tokens, sequence.stream, options=sequence.options)
    scheduler = Scheduler(model, PrefixCache(model.new_pool(), 0))
    scheduler.add(alone)
    run(scheduler)
    assert sequence.tokens == alone.tokens[: len(sequence.tokens)]
    if sequence.finish_reason != "cancelled":
        assert (sequence.tokens, sequence.finish_reason) == (alone.tokens, alone.finish_reason)
        if sequence.num_prompt_logprobs is not None:
            check_prompt_logprobs(model, sequence)


def check_prompt_logprobs(model, sequence):
    logs = model(torch.tensor([sequence.prompt])).logits[0].log_softmax(-1)
    own = logs[range(len(sequence.prompt) - 1), sequence.prompt[1:]].tolist()
    assert sequence.prompt_logprobs[0] == (None, ())
    assert [score.logprob for score in sequence.prompt_logprobs[1:]] == pytest.approx(own, abs=1e-3)
    for score, line in zip(sequence.prompt_logprobs[1:], logs, strict=False):
        best = line.topk(sequence.num_prompt_logprobs).values.tolist()
        assert [logprob for _, logprob in score.top] == pytest.approx(best, abs=1e-3)


# Prefill beside decode ------------------------------------------------------------------------------------------------


def test_rows_in_decode_get_a_token_in_every_pass_while_a_long_prompt_is_read():
    short = [Sequence([i + 5], 60, 0) for i in range(3)]
    # 100 tokens a second; a pass may take one
    model, scheduler = scheduler_with(*short, prefill_budget=True, cost=lambda tokens: 0.01 * tokens)
    run(scheduler, 2)
    scheduler.add(long := Sequence([1] * 700, 5, 0))
    before = len(model.passes)
    while not long.tokens:
        tokens = [len(sequence.tokens) for sequence in short]
        run(scheduler, 1)
        assert [len(sequence.tokens) for sequence in short] == [n + 1 for n in tokens]
    read = [sum(lengths[3:]) for lengths in model.passes[before:]]
    assert sum(read) == 700
    assert max(read) <= 110 and min(read[1:-1]) >= 90  # what fits into a second, after a first guess
    run(scheduler)
    check_complete(*short, long)


@pytest.mark.parametrize("lengths", [[3] * 8, [PREFILL_TOKENS], [PREFILL_TOKENS + 1], [500, 600, 3, 5], [1100, 1, 1]])
def test_prompts_are_read_together_in_large_pieces_while_nobody_is_in_decode(lengths):
    sequences = [Sequence([i + 1] * length, 1, 0) for i, length in enumerate(lengths)]
    # A prompt of one token is in decode as soon as it is there.
    model, scheduler = scheduler_with(*sequences, prefill_budget=1 not in lengths, cost=lambda tokens: 0.01 * tokens)
    run(scheduler)
    full, rest = divmod(sum(lengths), PREFILL_TOKENS)
    assert [sum(lengths) for lengths in model.passes] == [PREFILL_TOKENS] * full + [rest] * (rest > 0)


def test_the_prefill_budget_finds_what_fits_into_a_pass_and_follows_it():
    cases = ((0.0, 0.001, 250), (0.1, 0.001, 150), (0.2, 0.01, MIN_PREFILL_TOKENS), (0.0, 1e-5, PREFILL_TOKENS))
    for base, slope, fits in cases:
        budget = PrefillBudget(0.25)
        for _ in range(60):
            budget.update(budget.tokens, base + slope * budget.tokens)
        assert abs(budget.tokens - fits) <= 2


def test_the_prefill_budget_grows_at_most_twofold_and_a_short_rest_does_not_shrink_it():
    budget = PrefillBudget(1.0)
    for tokens, seconds, expected in (
        (64, 1e-6, 128),
        (3, 0.9, 128),  # nearly all of it went into the others' tokens
        (3, 2.0, MIN_PREFILL_TOKENS),
        (512, 0.0, PREFILL_TOKENS),  # a clock that stands still
    ):
        budget.update(tokens, seconds)
        assert budget.tokens == expected


# Beginnings in common -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 50])
@pytest.mark.parametrize(("length", "read"), [(600, [[512], [88]]), (20, [[20]]), (1, [[1]])])
def test_equal_prompts_are_read_once_and_answered_together(length, read, budget):
    sequences = [Sequence([1] * length, 3, i) for i in range(4)]
    model, scheduler = scheduler_with(*sequences, budget=budget)
    first = run(scheduler, len(read))
    assert model.passes == read and first == [sequences]
    run(scheduler)
    assert model.passes[len(read) :] == [[1] * 4] * 2
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, *[length] * 3]


@pytest.mark.parametrize(("length", "passes"), [(2 * PAGE, [[258], [1, 2, 2]]), (PAGE - 1, [[129] * 3])])
def test_a_common_beginning_of_a_page_is_read_once_and_a_shorter_one_is_not_waited_for(length, passes):
    sequences = [Sequence([*[7] * length, i, i], 2, 0) for i in range(3)]
    model, scheduler = scheduler_with(*sequences)
    run(scheduler, len(passes))
    assert model.passes == passes
    run(scheduler)
    check_complete(*sequences)


def test_who_waits_for_another_to_read_goes_on_when_that_one_is_cancelled():
    first, second = Sequence([1] * 600, 3, 0), Sequence([1] * 600, 3, 1)
    _, scheduler = scheduler_with(first, second)
    run(scheduler, 1)
    scheduler.cancel(first)
    run(scheduler)
    check_complete(second)
    assert first.tokens == []


def test_a_prompt_that_begins_like_a_row_at_work_takes_its_pages():
    model, scheduler = scheduler_with(first := Sequence([1] * 300, 50, 0))
    run(scheduler, 5)
    scheduler.add(second := Sequence([1] * 300 + first.tokens[:3] + [9], 2, 0))
    pages = used(model)
    run(scheduler, 1)
    assert second.num_cached_tokens == 303 and model.passes[-1] == [1, 1]
    assert used(model) == pages + 1
    run(scheduler)
    check_complete(first)


def test_the_next_turn_of_a_conversation_reads_what_is_new():
    model, scheduler = scheduler_with(first := Sequence([1] * 300, 20, 0), budget=20)
    run(scheduler)
    scheduler.add(second := Sequence([1] * 300 + first.tokens + [3, 4, 5], 2, 0))
    run(scheduler, 1)
    assert second.num_cached_tokens == 319 and model.passes[-1] == [4]  # the last token was chosen, but never read


# Scores of prompts ----------------------------------------------------------------------------------------------------


def test_prompts_that_are_scored_are_read_whole_and_in_small_pieces():
    model, scheduler = scheduler_with(Sequence([1] * 300, 1, 0), budget=20)
    run(scheduler)
    scored, plain = Sequence([1] * 300, 1, 0, num_prompt_logprobs=2), Sequence([2] * 30, 4, 0)
    scheduler.add(scored)
    scheduler.add(plain)
    model.passes.clear()
    run(scheduler)
    read = [lengths for lengths in model.passes if max(lengths) > 1]
    assert read[:3] == [[PROMPT_LOGPROB_TOKENS], [PROMPT_LOGPROB_TOKENS], [44]] and read[3:] in ([[1, 30]], [[30]])
    assert len(scored.prompt_logprobs) == 300
    check_complete(plain)


def test_a_row_that_is_preempted_while_its_prompt_is_scored_is_scored_from_the_start():
    sequence = Sequence([i % 7 for i in range(300)], 2, 0, num_prompt_logprobs=1)
    _, scheduler = scheduler_with(sequence, budget=20)
    run(scheduler, 2)
    assert len(sequence.prompt_logprobs) == 2 * PROMPT_LOGPROB_TOKENS + 1
    scheduler.preempt(sequence)
    run(scheduler)
    likeliest = [(token + place + 1) % VOCABULARY for place, token in enumerate(sequence.prompt[:-1])]
    assert [score.top[0][0] for score in sequence.prompt_logprobs[1:]] == likeliest and len(sequence.tokens) == 2


def test_a_row_that_wants_scores_alone_ends_without_a_token():
    sequence, one = (Sequence(prompt, 0, 0, num_prompt_logprobs=1) for prompt in ([1, 2, 4, 7], [1]))
    model, scheduler = scheduler_with(sequence, one, nothing := Sequence([1, 2], 0, 0))
    assert nothing.finish_reason == one.finish_reason == "length"  # nothing comes before a first token
    assert run(scheduler) == [[sequence]]
    assert sequence.finish_reason == "length" and sequence.tokens == []
    assert [score.top[0][0] for score in sequence.prompt_logprobs[1:]] == [2, 4, 7]  # the script
    assert used(model) == 0


# Where the cache is full ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 4])
def test_the_youngest_row_is_preempted_and_goes_on_later_with_the_same_tokens(budget):
    sequences = [Sequence([i + 1] * 100, 200, 0) for i in range(3)]  # three pages each in the end
    model, scheduler = scheduler_with(*sequences, budget=budget, limit=4)
    ended = []
    while scheduler.busy:
        ended += [sequence for changed in scheduler.step() for sequence in changed if sequence.finish_reason]
    assert ended == sequences
    check_complete(*sequences)
    assert 1 <= scheduler.preemptions <= 3
    assert used(model) == scheduler._prefixes.pages


def test_no_row_is_admitted_before_all_of_it_fits():
    """Read again and again in vain, prompts would cost more passes than they have tokens."""
    sequences = [Sequence([i + 1] * 700, 120, 0) for i in range(4)]  # seven pages each
    model, scheduler = scheduler_with(*sequences, limit=10)
    run(scheduler)
    assert all(sequence.finish_reason == "length" for sequence in sequences)
    assert sum(sum(lengths) for lengths in model.passes) == 4 * (700 + 119)


def test_a_row_that_does_not_fit_alone_ends_with_an_error_and_the_others_go_on():
    sequences = [
        Sequence([i + 1] * length, count, 0)
        for i, (length, count) in enumerate([(200, 10), (500, 10), (200, 300), (10, 10)])
    ]
    model, scheduler = scheduler_with(*sequences, limit=3)
    run(scheduler)
    assert [sequence.finish_reason for sequence in sequences] == ["length", "error", "error", "length"]
    assert all(isinstance(sequence.error, CacheError) for sequence in sequences[1:3])
    assert sequences[2].tokens == continuation(sequences[2].prompt, 3 * PAGE - 200 + 1)  # as far as it goes
    assert used(model) == 0


def test_kept_prefixes_make_room_before_anybody_is_preempted():
    model, scheduler = scheduler_with(budget=4, limit=4)
    for i in range(6):
        scheduler.add(Sequence([i + 1] * 300, 3, 0))
        run(scheduler)
    assert scheduler.preemptions == 0 and used(model) == 3


# Ends -----------------------------------------------------------------------------------------------------------------


def test_a_cancelled_row_frees_its_pages_at_once_wherever_it_is():
    sequences = answered, read, waiting = [
        Sequence([t] * n, 50, i) for i, (t, n) in enumerate([(1, 20), (2, 900), (2, 900)])
    ]
    model, scheduler = scheduler_with(*sequences)
    run(scheduler, 1)
    assert answered.tokens and not read.tokens and waiting.block_table is None
    before = used(model)
    for sequence, left in ((waiting, before), (read, 1), (answered, 0), (answered, 0)):  # twice is harmless
        scheduler.cancel(sequence)
        assert used(model) == left
    assert not scheduler.busy and {sequence.finish_reason for sequence in sequences} == {"cancelled"}


def test_a_failing_pass_ends_its_rows_and_nothing_else():
    boom = MemoryError("boom")
    kept, *failed = [Sequence([9] * 200, 1, 0), Sequence([1], 9, 0), Sequence([2], 9, 0)]
    model, scheduler = scheduler_with(kept, budget=20, fails=lambda number: boom if number == 3 else None)
    run(scheduler)
    assert scheduler._prefixes.pages == 2
    for sequence in failed:
        scheduler.add(sequence)
    run(scheduler)
    for sequence in failed:
        assert (sequence.finish_reason, sequence.error, len(sequence.tokens)) == ("error", boom, 1)
    assert used(model) == 0 and not scheduler.busy  # what was kept shares pages with what may be half written
    scheduler.add(after := Sequence([9] * 200, 3, 0))
    run(scheduler)
    check_complete(after)


def test_a_processor_that_fails_ends_its_own_row():
    failed, other = Sequence([1], 9, 0, options=Options(logits_processor=(failing(4),))), Sequence([2], 9, 0)
    model, scheduler = scheduler_with(failed, other)
    run(scheduler)
    assert (failed.finish_reason, type(failed.error), len(failed.tokens)) == ("error", MemoryError, 3)
    check_complete(other)
    assert used(model) == 0


def test_every_row_is_yielded_once_for_each_token_and_its_end():
    sequences = [Sequence([i + 1] * (i + 1), 5 + i, 0) for i in range(5)]
    _, scheduler = scheduler_with(*sequences)
    yielded = Counter(sequence for changed in run(scheduler) for sequence in changed)
    assert [yielded[sequence] for sequence in sequences] == [sequence.max_tokens for sequence in sequences]
