"""What sampling promises: transformers' processors, published random numbers, draws that follow the distribution."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as peers

from neox_lite.errors import ArgumentError, NeoxLiteError
from neox_lite.generation.sampling import (
    FILTERS,
    Sampling,
    add_bias,
    candidates,
    forbid_repeats,
    gumbel,
    penalize_frequency,
    penalize_repetition,
    philox4x32,
    sample_token,
    token_logprob,
    top_k,
    top_p,
)

HISTORY, NOTHING = torch.tensor([3, 7, 7, 60, 3]), torch.empty(0, dtype=torch.long)
EVERYTHING = Sampling(do_sample=True, top_k=0)  # draws from the plain distribution
INFINITY = float("inf")


def logits_with_ties(seed):
    """64 logits; odd seeds have only a few different values, so that every border falls among equals."""
    logits = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:4] = -INFINITY  # ids that something before excluded
    return logits.round() if seed % 2 else logits


def same(found, expected):
    """Exactly the same kept ids and the same values."""
    assert torch.equal(found, expected), (found - expected).abs().nan_to_num().max()


def same_but_for_ties(found, expected):
    """Among equals, which are kept is up to how torch sorts, but not how many; everything else is the same."""
    same(found.sort().values, expected.sort().values)
    assert set(found[found != expected].tolist()) <= {-INFINITY, float(found[found.isfinite()].min())}


def filtered(name, logits, value):
    """The logits that a filter keeps, and -inf elsewhere."""
    places = torch.from_numpy(FILTERS[name](logits.numpy(), value))
    return torch.full_like(logits, -INFINITY).index_copy(0, places, logits[places])


# Processors -----------------------------------------------------------------------------------------------------------

LIKE_TRANSFORMERS = {
    "top_k": (peers.TopKLogitsWarper, same, (1, 2, 10, 64, 1000)),
    "top_p": (peers.TopPLogitsWarper, same_but_for_ties, (0.0, 0.1, 0.5, 0.9, 0.999)),
    "min_p": (peers.MinPLogitsWarper, same, (0.01, 0.1, 0.5, 1.0)),
    "typical_p": (peers.TypicalLogitsWarper, same, (0.01, 0.3, 0.9, 0.999)),
    "repetition_penalty": (peers.RepetitionPenaltyLogitsProcessor, same, (0.5, 1.3, 10.0)),
}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", LIKE_TRANSFORMERS)
def test_a_processor_is_transformers(name, seed):
    peer, compare, values = LIKE_TRANSFORMERS[name]
    for value in values:
        logits = logits_with_ties(seed)
        expected = peer(value)(HISTORY[None], logits[None])[0]
        compare(
            filtered(name, logits, value) if name in FILTERS else penalize_repetition(HISTORY, logits, value), expected
        )


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
def test_no_repeated_ngrams_are_transformers(n):
    generator = torch.Generator().manual_seed(n)
    for length in (1, 2, 3, 8, 40, 300):
        history = torch.randint(0, 4, (length,), generator=generator)
        expected = peers.NoRepeatNGramLogitsProcessor(n)(history[None], torch.zeros(1, 64))[0]
        same(forbid_repeats(history, torch.zeros(64), n), expected)


def test_a_bias_is_transformers_sequence_bias_of_single_ids():
    logits, biases = logits_with_ties(0), {5: 2.5, 60: -100.0, 7: 0.25}
    peer = peers.SequenceBiasLogitsProcessor({(i,): bias for i, bias in biases.items()})
    same(add_bias(HISTORY, logits, biases), peer(HISTORY[None], logits[None])[0])


def test_frequency_and_presence_are_openais_over_new_tokens_alone():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting new tokens, not those of the prompt."""
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0))
    steps = Sampling(frequency_penalty=0.5, presence_penalty=-1.25).processors(prompt=2)
    (found,) = [step(HISTORY, logits) for step in steps]  # the new tokens are 7, 60 and 3
    expected = logits.clone()
    expected[[7, 60, 3]] -= 0.5 - 1.25
    same(found, expected)
    counted = penalize_frequency(torch.tensor([9, 9, 4]), logits, 2.0, 0.5)
    assert (logits - counted)[[9, 4, 3]].tolist() == pytest.approx([4.5, 2.5, 0.0], abs=1e-6)
    same(penalize_frequency(NOTHING, logits, 2.0, 0.5), logits)


def test_penalties_come_in_order_bias_repetition_frequency_ngrams_then_the_callers():
    sampling = Sampling(
        logit_bias={3: 4.0}, repetition_penalty=2.0, presence_penalty=1.0, no_repeat_ngram_size=2, frequency_penalty=0.5
    )
    logits = torch.ones(64)
    for step in sampling.processors([lambda history, logits: logits * 2], prompt=4):
        logits = step(HISTORY, logits)
    assert logits[3] == ((1 + 4) / 2 - 1.5) * 2
    assert logits[7] == -INFINITY  # 3 was followed by 7 before
    assert logits[60] == 1 / 2 * 2  # it is the prompt's, not new
    assert logits[5] == 2


@pytest.mark.parametrize("seed", range(10))
def test_all_processors_together_are_transformers_in_its_order(seed):
    sampling = Sampling(do_sample=True, temperature=0.7, top_k=30, top_p=0.9, min_p=0.05, repetition_penalty=1.3)
    logits = expected = logits_with_ties(seed)
    for step in sampling.processors():
        logits = step(HISTORY, logits)
    ids, values = map(torch.from_numpy, candidates(logits.numpy(), sampling))
    for peer in (
        peers.RepetitionPenaltyLogitsProcessor(1.3),
        peers.TemperatureLogitsWarper(0.7),
        peers.TopKLogitsWarper(30),
        peers.TopPLogitsWarper(0.9),
        peers.MinPLogitsWarper(0.05),
    ):
        expected = peer(HISTORY[None], expected[None])[0]
    same_but_for_ties(torch.full_like(expected, -INFINITY).index_copy(0, ids, values), expected)


def test_what_acts_only_when_sampling_does_nothing_when_greedy():
    assert Sampling().processors() == Sampling(top_k=5, top_p=0.5, temperature=2.0).processors() == []


def test_processors_leave_the_models_logits_alone():
    logits = logits_with_ties(0)
    before = logits.clone()
    penalties = {"frequency_penalty": 1.0, "presence_penalty": 1.0, "no_repeat_ngram_size": 2, "logit_bias": {5: 1.0}}
    filters = {"top_k": 9, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.9}
    sampling = Sampling(do_sample=True, temperature=0.5, repetition_penalty=2.0, **filters, **penalties)
    sample_token(logits, HISTORY, 0, sampling, sampling.processors())
    token_logprob(logits, 5, 3, torch.tensor([1]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "temperature": [-0.1, math.nan, math.inf, 1e300],
        "top_k": [-1, 2**31],
        "top_p": [-0.1, 1.1, math.nan],
        "min_p": [-0.1, 1.1, math.nan],
        "typical_p": [-0.1, 1.1, math.nan],
        "repetition_penalty": [0.0, -1.0, math.nan, math.inf],
        "frequency_penalty": [-2.1, 2.1, math.nan],
        "presence_penalty": [-2.1, 2.1, math.nan],
        "no_repeat_ngram_size": [-1, 2**31],
        "seed": [-1, 2**64],
        "logit_bias": [{-1: 0.0}, {5: 100.5}, {5: math.nan}],
    }.items(),
)
def test_a_value_out_of_bounds_is_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ArgumentError, match=rf"^{name}(:| is) .*, expected "):
            Sampling(**{name: value})


def plain_top_p(values, p):
    """By definition: sort everything, drop from the least likely on while all of them reach no more than 1 - p."""
    weights = np.exp(values - values.max())
    order = weights.argsort(kind="stable")
    kept = weights[order].cumsum(dtype=np.float64) > (1 - p) * weights.sum(dtype=np.float64)
    kept[-1] = True
    return np.sort(order[kept])


def test_large_vocabularies_keep_what_the_definitions_say():
    """Where ids are left out without being sorted, before the exact rule: peaked and flat, with ties and without."""
    assert len(top_p(np.zeros(4, np.float32), 0.5)) == 2  # four times 0.25: exact in binary
    generator = np.random.default_rng(0)
    for i in range(60):
        n = int(generator.integers(1, 50_000))
        values = (generator.normal(size=n) * generator.choice([0.1, 1, 3, 10])).astype(np.float32)
        values = values.round(1) if i % 2 else values
        for k in (1, 7, 50, 3000):
            expected = np.flatnonzero(values >= np.sort(values)[-min(k, n)])
            assert np.array_equal(top_k(values, k), expected)
        for p in (0.0, 0.1, 0.5, 0.95, 0.9999999):
            assert np.array_equal(top_p(values, p), plain_top_p(values, p)), (n, p)


# Random numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    counter, key, words = (tuple(int(word, 16) for word in text.split()) for text in (counter, key, words))
    assert philox4x32(counter, key) == words


def philox_gives(monkeypatch, number):
    words = (number >> 32, number & 0xFFFFFFFF, 0, 0)
    monkeypatch.setattr("neox_lite.generation.sampling.philox4x32", lambda counter, key: words)


def test_gumbel_numbers_continue_splitmix64_from_what_philox_gives(monkeypatch):
    """SplitMix64's published first outputs from 1234567 are 6457827717110365317, 3203168211198807973, ..."""
    philox_gives(monkeypatch, 1234567)
    uniform = [((x >> 12) + 0.5) / 2**52 for x in (6457827717110365317, 3203168211198807973)]
    expected = [-math.log(-math.log(u)) for u in uniform]
    assert gumbel(0, 0, 0, np.array([1, 2])).tolist() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("number", [0, 2**64 - 1])
def test_the_ends_of_the_random_range_are_finite_and_hit_ids_that_are_possible(number, monkeypatch):
    philox_gives(monkeypatch, number)
    assert np.isfinite(gumbel(0, 0, 0, np.arange(1000))).all()
    logits = torch.tensor([-INFINITY, 1.0, 1.3, 0.2, -INFINITY])
    assert sample_token(logits, HISTORY, 0, EVERYTHING, []) in (1, 2, 3)


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("varied", ["seed", "position", "stream", "ids"])
def test_random_numbers_are_spread_evenly_whatever_is_counted(varied):
    if varied == "ids":
        values = gumbel(5, 6, 7, np.arange(20_000))
    else:
        given = {"seed": 5, "position": 6, "stream": 7, "ids": np.array([8])}
        values = np.concatenate([gumbel(**{**given, varied: i}) for i in range(20_000)])
    numbers = torch.from_numpy(np.exp(-np.exp(-values)))  # uniform, if the values have Gumbel's distribution
    assert 0 < numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    # 99.9 % of true random sets, 99 degrees of freedom
    assert chi_square(torch.histc(numbers, 100, 0, 1), torch.full((100,), 200.0)) < 148.2
    centred = numbers - 0.5
    neighbours = (centred[1:] * centred[:-1]).mean() * 12
    assert abs(neighbours) < 4 / 20_000**0.5  # four standard errors of a correlation


# Drawing --------------------------------------------------------------------------------------------------------------


def draws(logits, sampling, count):
    steps = sampling.processors()
    return Counter(sample_token(logits, HISTORY, stream, sampling, steps) for stream in range(count))


@pytest.mark.parametrize(
    ("sampling", "kept", "limit"),  # 99.9 % of true random sets: 19 and 7 degrees of freedom
    [(EVERYTHING, 20, 43.8), (Sampling(do_sample=True, temperature=1.7, top_k=8), 8, 24.3)],
    ids=["plain", "filtered"],
)
def test_draws_follow_the_distribution_that_processors_leave(sampling, kept, limit):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(3))
    counts, best = draws(logits, sampling, 20_000), logits.topk(kept)
    assert set(counts) <= set(best.indices.tolist())
    found = torch.tensor([float(counts[i]) for i in best.indices.tolist()])
    assert chi_square(found, (best.values / sampling.temperature).softmax(-1) * 20_000) < limit


def test_a_draw_depends_on_seed_position_and_stream_only():
    logits = torch.zeros(1000)

    def draw(seed=1, position=5, stream=0, first=0):
        history = torch.full((position,), first)
        return sample_token(logits, history, stream, Sampling(do_sample=True, top_k=0, seed=seed), [])

    assert draw() == draw() == draw(first=9)
    assert len({draw(), draw(seed=2), draw(seed=1 + 2**32), draw(position=6), draw(stream=1)}) == 5


def test_temperature_zero_and_colder_than_float32_can_divide_by_are_greedy():
    logits = logits_with_ties(0) * 1e4
    for temperature in (0.0, 1e-12, 1e-5):
        sampling = Sampling(do_sample=True, temperature=temperature)
        assert sampling.greedy == (temperature < 1e-5)
        assert set(draws(logits, sampling, 20)) == {int(logits.argmax())}


def test_excluded_ids_are_never_drawn():
    logits = torch.full((50,), -INFINITY)
    logits[[0, 25, 49]] = torch.tensor([0.0, 5.0, -20.0])
    assert set(draws(logits, EVERYTHING, 3000)) <= {0, 25, 49}
    logits[49] = -INFINITY
    logits[25] = 80.0  # rounding: all other ids have probability 0
    assert set(draws(logits, EVERYTHING, 100)) == {25}


def test_a_draw_is_the_same_whatever_ids_are_excluded_beside_it():
    logits = torch.randn(100, generator=torch.Generator().manual_seed(1))
    for stream in range(200):
        drawn = sample_token(logits, HISTORY, stream, EVERYTHING, [])
        without = logits.index_fill(0, torch.tensor([(drawn + 1) % 100, (drawn + 50) % 100]), -INFINITY)
        assert sample_token(without, HISTORY, stream, EVERYTHING, []) == drawn


@pytest.mark.parametrize("vocabulary", [20, 1000, 50_000])
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.5])
def test_two_models_draw_the_same_id_nearly_as_often_as_is_possible(vocabulary, noise):
    """No coupling reaches more than 1 - d, d the total variation distance; this one is never below (1 - d) / (1 + d)."""
    generator, count = torch.Generator().manual_seed(7), 1000
    logits = 3 * torch.randn(vocabulary, generator=generator)
    other = logits + noise * torch.randn(vocabulary, generator=generator)
    optimum = float(torch.minimum(logits.double().softmax(-1), other.double().softmax(-1)).sum())
    same = sum(
        sample_token(logits, HISTORY, stream, EVERYTHING, []) == sample_token(other, HISTORY, stream, EVERYTHING, [])
        for stream in range(count)
    )
    spread = 4 * (0.25 / count) ** 0.5  # four standard errors at most
    assert optimum / (2 - optimum) - spread < same / count < optimum + spread


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(do_sample=True)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_to_choose_from_is_an_error_not_a_token(sampling, value):
    spoilt = torch.full((60,), value)
    spoilt[3] = 0.0  # a single NaN or infinity spoils a softmax
    for logits in (torch.full((60,), value), *([] if value < 0 else [spoilt])):
        with pytest.raises(NeoxLiteError, match="no id can be chosen"):
            sample_token(logits, NOTHING, 0, sampling, sampling.processors())


# Log-probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likeliest", [0, 1, 5, 60, 64, 100])
def test_a_score_is_log_softmax_and_its_largest(likeliest):
    logits = logits_with_ties(2)
    expected = logits.log_softmax(-1)
    found = token_logprob(logits, 17, likeliest)
    assert found.logprob == pytest.approx(float(expected[17]), abs=1e-5)
    best = [x for x in expected.sort(descending=True).values[:likeliest].tolist() if x > -math.inf]
    assert len(found.top) == len(best)
    assert [logprob for _, logprob in found.top] == pytest.approx(best, abs=1e-5)
    assert all(logprob == pytest.approx(float(expected[i]), abs=1e-5) for i, logprob in found.top)


def test_a_score_leaves_out_ids_that_do_not_exist_and_has_ties_in_the_order_of_their_ids():
    logits = torch.tensor([0.0, 1.0, 9.0, 9.5])
    found = token_logprob(logits, 1, 4, torch.tensor([2, 3]))
    assert found.logprob == pytest.approx(float(logits[:2].log_softmax(-1)[1]))
    assert [i for i, _ in found.top] == [1, 0]
    assert [i for i, _ in token_logprob(torch.zeros(1000), 3, 4).top] == [0, 1, 2, 3]
