"""What speculation promises: the tokens of plain decoding, whatever is drafted; drafts as long as pays; nothing left behind.

The clock is simulated, so that no figure depends on the machine.
"""

import random
from collections import Counter

import pytest
import tokenizers
import torch
from support.often import times
from support.peers import NO_EOS, padded, pair, prompts_of_many_lengths, random_ids
from support.scripted import ScriptedModel, certain, failing

from neox_lite import GPTNeoXForCausalLM, GPTNeoXTokenizerFast, Speculation
from neox_lite.cache import PrefixCache
from neox_lite.errors import ArgumentError
from neox_lite.generation.mixin import decode
from neox_lite.generation.options import Options
from neox_lite.generation.request import Sequence
from neox_lite.generation.speculative import (
    MAX_DRAFT_TOKENS,
    Drafting,
    DraftLengthController,
    DraftModel,
    PassTimes,
    PromptLookup,
    estimate,
)
from neox_lite.kernels import dispatch
from neox_lite_app.paths import DEMO

VOCABULARY = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pair(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    """A float32 model, exact: its rounding is the order of float32 sums alone."""
    return GPTNeoXForCausalLM.from_pretrained(folder, exact=True)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Another model of the same vocabulary, with one layer: what it drafts is mostly wrong."""
    return pair(tmp_path_factory.mktemp("stranger"), seed=5, num_hidden_layers=1)[0]


@pytest.fixture(scope="module")
def relative(folder):
    """The model with noise in its weights: what it drafts is right now and then."""
    model = GPTNeoXForCausalLM.from_pretrained(folder, exact=True)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.1)
    return model


@pytest.fixture(params=["reference", "cpu"])
def backend(request, model, stranger, relative):
    """The models run on a backend."""
    if (reason := dispatch.load(request.param).why_not(torch.device("cpu"))) is not None:
        pytest.skip(reason)
    for one in (model, stranger, relative):
        one.version += 1
        one.ops = dispatch.load(request.param).bind(one.exact)
    return request.param


@pytest.fixture
def any_length(monkeypatch):
    """Drafts of random lengths, whether they pay or not."""
    choice = random.Random(0)
    length = lambda self, rows, drafting, longest: choice.randint(0, longest if drafting else 0)  # noqa: E731
    monkeypatch.setattr(DraftLengthController, "length", length)


@pytest.fixture
def always_five(monkeypatch):
    monkeypatch.setattr(DraftLengthController, "length", lambda self, rows, drafting, longest: 5 if drafting else 0)


# The same tokens ------------------------------------------------------------------------------------------------------

SAMPLED = {"do_sample": True, "seed": 7, "top_k": 20, "temperature": 0.9}


GREEDY_AND_SAMPLED = pytest.mark.parametrize("options", [NO_EOS, {**NO_EOS, **SAMPLED}], ids=["greedy", "sampled"])


@GREEDY_AND_SAMPLED
def test_all_prompts_get_the_same_tokens_whoever_drafts(model, stranger, relative, backend, options, any_length):
    drafters = {
        "lookup": {"prompt_lookup_num_tokens": 7},
        "itself": {"assistant_model": model},
        "relative": {"assistant_model": relative},
        "stranger": {"assistant_model": stranger, "num_assistant_tokens": 4},
    }
    counts = {name: Speculation() for name in drafters}
    for ids in prompts_of_many_lengths(times(40 if backend == "cpu" else 12)):  # the reference is slow
        plain = model.generate(ids[None], max_new_tokens=24, **options)
        for name, drafter in drafters.items():
            out = model.generate(ids[None], max_new_tokens=24, speculation=counts[name], **drafter, **options)
            assert torch.equal(out, plain), name
    shares = {name: c.accepted / c.drafted for name, c in counts.items()}
    assert shares["itself"] > 0.98 > shares["relative"] > 0.2 > shares["stranger"], shares
    assert counts["itself"].mean_tokens_per_pass > 5
    assert all(c.tokens <= times(40) * 23 and c.passes + c.accepted == c.tokens for c in counts.values())


@GREEDY_AND_SAMPLED
def test_a_batch_with_ragged_drafts_gets_the_tokens_of_single_runs(model, relative, backend, options, any_length):
    prompts = prompts_of_many_lengths(8)
    ids, mask = padded(prompts, "left", fill=99)
    alone = [model.generate(ids[None], max_new_tokens=30, **options)[0, len(ids) :] for ids in prompts]
    for drafter in ({"prompt_lookup_num_tokens": 5}, {"assistant_model": relative}):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=30, **drafter, **options)
        assert torch.equal(out[:, ids.shape[1] :], torch.stack(alone))


def test_several_samples_of_a_prompt_are_those_of_plain_decoding(model, relative, any_length):
    options = {"do_sample": True, "seed": 3, "max_new_tokens": 25, "num_return_sequences": 5, **NO_EOS}
    ids = random_ids(2, 6)
    plain = model.generate(ids, **options)
    for drafter in ({"prompt_lookup_num_tokens": 6}, {"assistant_model": relative}):
        assert torch.equal(model.generate(ids, **drafter, **options), plain)


class ScriptedDrafter:
    """Drafts what it is given, right or wrong: script(position) -> id. spend(drafted tokens, unseen ones) is its cost."""

    def __init__(self, script, spend=lambda tokens, unseen: None):
        self.script, self.spend, self.rows, self.seen = script, spend, set(), 0

    def ready(self, rows):
        self.rows |= set(rows)
        return list(rows)

    def propose(self, rows, counts):
        end = max(len(row.history) for row in rows)
        self.spend(max(counts), end - self.seen)
        self.seen = end + max(counts)
        return [[self.script(len(row.history) + i) for i in range(n)] for row, n in zip(rows, counts, strict=True)]

    def drop(self, row):
        self.rows.discard(row)


def speculate(
    target, drafter, rows, options=None, clock=lambda: 0.0, longest=MAX_DRAFT_TOKENS, yielded=lambda changed: None
):
    """Run rows to their end -> the statistics. yielded: sees every list of rows. All pages must be free in the end."""
    counts, prefixes = Speculation(), PrefixCache(target.new_pool(), 0)
    drafting = Drafting(drafter, longest, PassTimes(), counts, clock)
    for row in rows:
        row.options = options or Options()
    for changed in decode(target, prefixes, rows, drafting):
        yielded(changed)
    assert prefixes.pool.free_pages == prefixes.pool.pages
    return counts


def test_drafts_that_are_always_wrong_change_nothing(model, any_length):
    for ids in prompts_of_many_lengths(20):
        plain = model.generate(ids[None], max_new_tokens=40, **NO_EOS)[0].tolist()
        row = Sequence(ids.tolist(), 40, 0)
        wrong = ScriptedDrafter(lambda place, plain=plain: (plain[min(place, len(plain) - 1)] + 1) % 131)
        counts = speculate(model, wrong, [row])
        assert row.prompt + row.tokens == plain
        assert counts.accepted == 0 < counts.drafted and counts.mean_tokens_per_pass == 1
        assert not wrong.rows


# With everything else -------------------------------------------------------------------------------------------------


def truth(place):
    """The token that a script has at a place, never 0."""
    return 1 + place * 7919 % (VOCABULARY - 1)


def logits_at(place, token):
    return certain(truth(place))


def test_a_row_yields_its_tokens_one_by_one_in_order(always_five):
    rows, counts, lengths = [Sequence([1], 13, 0), Sequence([1], 4, 0)], Counter(), []

    def note(changed):
        counts.update(changed)
        lengths.append([len(row.tokens) for row in rows])
        assert lengths[-1] == [counts[row] for row in rows]

    speculate(target := ScriptedModel(logits_at), ScriptedDrafter(truth), rows, longest=5, yielded=note)
    assert lengths == [[i, min(i, 4)] for i in range(1, 14)]
    assert target.passes == [[1], [6, 3], [6]]  # the prompt once, drafts no longer than what may still come
    assert [row.finish_reason for row in rows] == ["length"] * 2


def test_an_end_inside_an_accepted_draft_drops_what_follows(always_five):
    end = truth(4)
    row = Sequence([1], 40, 0)
    speculate(target := ScriptedModel(logits_at), ScriptedDrafter(truth), [row], Options(eos_token_id=(end,)))
    assert row.tokens == [truth(1), truth(2), truth(3), end] and row.finish_reason == "stop"
    assert target.passes == [[1], [6]]
    held = Sequence([1], 9, 0)
    speculate(ScriptedModel(logits_at), ScriptedDrafter(truth), [held], Options(eos_token_id=(end,), min_new_tokens=6))
    assert len(held.tokens) == 9 and end not in held.tokens[:6]


def test_processors_and_criteria_see_every_token_once_and_in_order(model, relative, any_length):
    def run(**drafter):
        seen = []

        def look(ids, logits):
            seen.append(tuple(ids[0].tolist()))
            return logits

        def stop(ids, logits):
            seen.append(("criterion", ids.shape[1]))
            return ids.shape[1] == 40

        out = model.generate(
            random_ids(1, 9), max_new_tokens=60, logits_processor=look, stopping_criteria=stop, **drafter, **NO_EOS
        )
        return out.tolist(), seen

    plain = run()
    assert len(plain[0][0]) == 40
    assert run(assistant_model=relative) == plain
    assert run(prompt_lookup_num_tokens=8) == plain


def test_stop_strings_and_streams_are_those_of_plain_decoding(any_length):
    demo = GPTNeoXForCausalLM.from_pretrained(DEMO).float()
    prompt = "KING RICHARD III:\nMy lord, my lord, the king, the king"
    options = {"max_new_tokens": 60, "stop_strings": ["\n\n", "lord"]}
    plain, *others = (
        [(e.text, e.token, e.finish_reason) for e in demo.stream(prompt, **drafter, **options)]
        for drafter in ({}, {"prompt_lookup_num_tokens": 6}, {"assistant_model": demo})
    )
    assert others == [plain] * 2


def test_closing_a_stream_early_frees_the_pages_of_both_models(model, relative, any_length, monkeypatch):
    pools = []
    for one in (model, relative):
        make = lambda *given, make=one.new_pool: pools.append(make(*given)) or pools[-1]  # noqa: E731
        monkeypatch.setattr(one, "new_pool", make)
        monkeypatch.setattr(one, "reuse_prefix", False)
    options = Options(assistant_model=relative, eos_token_id=())
    stream = model._decode([Sequence([5] * 130, 50, 0, options=options)], options)
    for _ in range(7):
        next(stream)
    assert len(pools) == 2 and pools[0].free_pages < pools[0].pages
    stream.close()
    assert all(pool.free_pages == pool.pages for pool in pools)


def test_an_error_in_the_middle_frees_the_pages_of_both_models(model, relative, any_length):
    for one in (model, relative):
        one.forget()
    options = {"assistant_model": relative, "logits_processor": failing(9), "max_new_tokens": 30}
    with pytest.raises(MemoryError):
        model.generate(random_ids(1, 5), **options, **NO_EOS)
    for one, kept in ((model, 0), (relative, 1)):
        prefixes = one._cache_holder.prefixes
        assert prefixes.pool.pages - prefixes.pool.free_pages == prefixes.pages == kept
    assert model.generate(random_ids(1, 5), max_new_tokens=3, **NO_EOS).shape == (1, 8)


# Drafters -------------------------------------------------------------------------------------------------------------


def test_prompt_lookup_proposes_what_followed_the_longest_and_last_match():
    choice, lookup = random.Random(2), PromptLookup()
    for _ in range(30):
        row = Sequence([choice.randint(1, 4) for _ in range(choice.randint(1, 30))], 60, 0)
        for _ in range(60):
            ids = row.history.tolist()
            count = choice.randint(1, 12)
            expected = naive_lookup(ids, count)
            ready = lookup.ready([row])
            assert bool(ready) == bool(expected)
            if ready:
                assert lookup.propose([row], [count]) == [expected]
            row.append(choice.randint(1, 4))
        lookup.drop(row)
    assert not lookup._indexes


def naive_lookup(ids, count):
    """By definition: scan for the last earlier place of the last 4, else 3, else 2 tokens."""
    for n in (4, 3, 2):
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - n : end] == ids[-n:]:
                whole = list(ids)
                for i in range(count):
                    whole.append(whole[end + i])  # beyond the end it reads its own guesses
                return whole[len(ids) :]
    return []


def test_prompt_lookup_takes_in_each_token_once():
    lookup, row = PromptLookup(), Sequence(list(range(1, 2000)), 60, 0)
    assert lookup.ready([row]) == []
    entries = len(lookup._indexes[row].ends)
    row.append(5)
    lookup.ready([row])
    assert len(lookup._indexes[row].ends) - entries == 3


def test_without_a_match_there_is_no_draft_and_no_pass_of_several_tokens():
    target = ScriptedModel(logits_at)
    counts = speculate(target, PromptLookup(), [Sequence([1], 40, 0)])  # 49 different tokens
    assert counts.drafted == 0 and counts.passes == 39
    assert all(lengths == [1] for lengths in target.passes)


def draft_model(model, draw=lambda row, history, logits: int(logits.argmax()), vocabulary=VOCABULARY, context=10**6):
    return DraftModel(model, PrefixCache(model.new_pool(), 0), draw, vocabulary, context)


def check_true(*rows):
    for row in rows:
        assert row.tokens == [truth(len(row.prompt) + i) for i in range(row.max_tokens)]


def test_a_draft_model_reads_every_token_once_and_forgets_what_was_refused(any_length):
    wrong = {7, 11, 12, 30}
    draft = ScriptedModel(lambda place, token: logits_at(place + (place in wrong), token))
    counts = speculate(ScriptedModel(logits_at), draft_model(draft), [row := Sequence([1] * 5, 45, 0)])
    check_true(row)
    read = sum(sum(lengths) for lengths in draft.passes)
    assert read <= 5 + counts.drafted + counts.passes  # the prompt, its own drafts, and one token of the target a pass
    assert draft.pool.free_pages == draft.pool.pages


def test_a_draft_model_stops_at_its_context_and_at_ids_that_it_lacks(always_five):
    draft = ScriptedModel(logits_at)
    speculate(ScriptedModel(logits_at), draft_model(draft, context=12), [row := Sequence([1], 30, 0)])
    check_true(row)
    small = draft_model(draft, vocabulary=40)
    rows = [Sequence([1], 30, 0), Sequence([45], 30, 0)]  # the second begins with an id that the draft model lacks
    assert small.ready(rows) == rows[:1]
    speculate(ScriptedModel(logits_at), small, rows)
    check_true(*rows)
    first_lacking = next(i for i in range(1, 40) if truth(i) >= 40)
    assert max(map(len, draft.passes)) <= 2 and first_lacking < 30


def test_vocabularies_of_other_sizes_are_padded_and_cut(model, tmp_path, any_length):
    for size in (101, 200):
        draft = pair(tmp_path / str(size), vocab_size=size)[0]
        for options in ({}, {"do_sample": True, "seed": 4, "repetition_penalty": 1.3}):
            counts = Speculation()
            for ids in prompts_of_many_lengths(6):
                ids = ids[None].clamp(max=100)
                plain = model.generate(ids, max_new_tokens=30, **NO_EOS, **options)
                drafter = {"assistant_model": draft, "speculation": counts}
                assert torch.equal(model.generate(ids, max_new_tokens=30, **drafter, **NO_EOS, **options), plain)
            assert counts.drafted > 0


def test_a_draft_model_with_another_tokenizer_is_refused_with_the_first_id_that_differs(
    model, stranger, tmp_path, monkeypatch
):
    def tokenizer_of(words):
        backend = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, []))
        backend.save(str(tmp_path / "tokenizer.json"))
        return GPTNeoXTokenizerFast(tmp_path / "tokenizer.json")

    words = ["<|endoftext|>", "<|padding|>", *"abcdefghij"]
    for one, own in ((model, words), (stranger, [*words[:5], *reversed(words[5:])])):
        monkeypatch.setattr(one, "_tokenizer", tokenizer_of(own))
        monkeypatch.delitem(one.__dict__, "padding_ids", raising=False)
    with pytest.raises(ArgumentError, match=r"id 5 is 'j' to it, but 'd' to this model"):
        model.generate(random_ids(1, 4), assistant_model=stranger)
    stranger.tokenizer = tokenizer_of([*words, "k"])  # one more is no difference
    out = model.generate(random_ids(1, 4), assistant_model=stranger, max_new_tokens=5, **NO_EOS)
    assert int(out[0, 4:].max()) < len(words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": "EleutherAI/pythia-160m"}, "assistant_model is a str, expected one of neox_lite"),
        ({"assistant_model": ScriptedModel(logits_at), "prompt_lookup_num_tokens": 3}, "exclude each other"),
        (
            {"assistant_model": ScriptedModel(logits_at, vocabulary=5000)},
            "its vocab_size is 5000, but this model's is 131",
        ),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens is 0, expected an integer of at least 1"),
        ({"num_assistant_tokens": 2.5}, "num_assistant_tokens is 2.5"),
        ({"prompt_lookup_num_tokens": 4, "speculation": {}}, "speculation is a dict"),
    ],
    ids=["name", "both", "vocabulary", "zero", "fraction", "counts"],
)
def test_what_cannot_draft_is_refused(model, options, message):
    for draft in (d for d in options.values() if isinstance(d, ScriptedModel)):
        draft._has_tokenizer = False
    with pytest.raises(ArgumentError, match=message):
        model.generate(random_ids(1, 4), **options)


# The length of drafts -------------------------------------------------------------------------------------------------

COSTS = {
    "flat": lambda n: 1.0,
    "linear": lambda n: 1 + 0.1 * (n - 1),
    "steps": lambda n: 1.0 if n <= 4 else 1.4 if n <= 8 else 2.0,
}


PROMPT = 400


def speed(cost, acceptance, draft_s, tokens, rows=1):
    """Tokens a second on a simulated clock with drafts right with probability acceptance(place), and when each token came."""
    target, choice, arrivals = ScriptedModel(logits_at, cost), random.Random(1), []

    def guess(place):
        return truth(place) if choice.random() < acceptance(place) else truth(place) % (VOCABULARY - 1) + 1

    def spend(count, unseen):
        """What was not drafted is read at a tenth of the cost: the prompt at first, and after every pause."""
        target.now += draft_s * (count + 0.1 * max(unseen, 0))

    batch = [Sequence([1] * PROMPT, tokens, 0) for _ in range(rows)]
    note = lambda changed: arrivals.extend([target.now] * (batch[0] in changed))  # noqa: E731
    speculate(target, ScriptedDrafter(guess, spend), batch, clock=lambda: target.now, yielded=note)
    check_true(*batch)
    return rows * (tokens - 1) / (target.now - arrivals[0]), arrivals


def optimum(cost, acceptance, draft_s, rows=1):
    """Tokens a second with drafts of the best constant length, known from the start."""
    return max(
        rows * sum(acceptance**i for i in range(g + 1)) / (cost(rows * (g + 1)) + g * draft_s)
        for g in range(MAX_DRAFT_TOKENS + 1)
    )


@pytest.mark.parametrize("draft_s", [0.02, 0.1])
@pytest.mark.parametrize("cost", COSTS)
def test_drafts_that_are_never_right_cost_at_most_3_percent(cost, draft_s):
    found, _ = speed(COSTS[cost], lambda place: 0.0, draft_s, 1000)
    assert found > 0.97 / COSTS[cost](1)


@pytest.mark.parametrize("acceptance", [0.6, 0.8])
@pytest.mark.parametrize("draft_s", [0.02, 0.1])
@pytest.mark.parametrize("cost", COSTS)
def test_drafts_get_nearly_the_speed_of_the_best_length(cost, draft_s, acceptance):
    """What is lost is the price of finding costs and acceptance out; chance moves both by a few percent more."""
    found, _ = speed(COSTS[cost], lambda place: acceptance, draft_s, 5000)
    assert 0.94 < found / optimum(COSTS[cost], acceptance, draft_s) < 1.05


def test_drafts_of_a_batch_get_nearly_the_speed_of_the_best_length():
    cost = lambda n: 1 + 0.03 * n  # noqa: E731
    found, _ = speed(cost, lambda place: 0.8, 0.05, 1500, rows=4)
    # rows wait for no other, so that few have equal drafts
    assert 0.9 < found / optimum(cost, 0.8, 0.05, rows=4) < 1.05


@pytest.mark.parametrize("cost", COSTS)
def test_drafts_come_back_soon_after_acceptance_does(cost):
    """1,000 tokens without any, then 0.8: 100 tokens later the average since is most of the best speed."""
    _, times = speed(COSTS[cost], lambda place: 0.8 if place > PROMPT + 1000 else 0.0, 0.1, 1200)
    assert 100 / (times[1100] - times[1000]) > 0.7 * optimum(COSTS[cost], 0.8, 0.1)


def test_costs_between_and_beyond_known_lengths_are_neither_hopeless_nor_dreams():
    known = {1: 1.0, 4: 1.6, 8: 1.6}
    assert [estimate(known, n) for n in (1, 4, 8)] == [1.0, 1.6, 1.6]
    assert estimate(known, 2) == 1.0  # next to a known length: it may be a step
    assert 1.0 < estimate(known, 3) < 1.4 and estimate(known, 16) == 1.6
    assert estimate({1: 1.0}, 9) == 5.0
    assert estimate({3: 1.0, 5: 3.0}, 2) == 1.0 and estimate({3: 1.0, 5: 3.0}, 8) == 4.5


def test_the_time_of_a_pass_leaves_out_its_first_and_is_at_most_that_of_a_longer_one():
    times = PassTimes()
    for seconds in (100.0, 1.0, 5.0, 2.0):  # the first one compiles
        times.add(3, seconds)
    assert times.known == {3: 2.0}
    for _ in range(20):
        times.add(3, 4.0)
    assert times.known == {3: 4.0}
    times = PassTimes()
    for tokens, seconds in ((1, 9.0), (2, 3.0), (4, 5.0)):
        times.add(tokens, 0.0)
        times.add(tokens, seconds)
    assert times.known == {1: 3.0, 2: 3.0, 4: 5.0} and list(times.known) == [1, 2, 4]


def test_drafts_end_though_plain_passes_were_last_seen_on_a_busy_machine():
    """Acceptance 0, passes of one token measured at twice what they cost now."""
    times = PassTimes()
    for _ in range(3):
        times.add(1, 2.0)
    for _ in range(3):
        times.add(2, 1.0)
    controller, drafted = DraftLengthController(times), 0
    for _ in range(200):
        length = controller.length(1, 1, MAX_DRAFT_TOKENS)
        if length:
            controller.record_draft(length, 0.2 * length)
        controller.record_pass(1, 1 + length, 1.0, length, 0)
        drafted += length > 0
    assert drafted < 25
