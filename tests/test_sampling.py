"""What sampling promises: transformers' processors, published random numbers, draws that follow the distribution."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process

from neox_lite.errors import ArgumentError, NeoxLiteError
from neox_lite.generation.sampling import (
    Sampling,
    add_bias,
    candidates,
    forbid_repeats,
    gumbel,
    min_p,
    penalize_frequency,
    penalize_repetition,
    philox4x32,
    sample_token,
    token_logprob,
    top_k,
    top_p,
    typical_p,
)

HISTORY = torch.tensor([3, 7, 7, 60, 3])
EVERYTHING = Sampling(do_sample=True, top_k=0)  # draws from the plain distribution


def logits_with_ties(seed: int) -> Tensor:
    """64 logits; odd seeds have only a few different values, so that every border falls among equals."""
    logits = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:4] = float("-inf")  # ids that something before excluded
    return logits.round() if seed % 2 else logits


def same(found: Tensor, expected: Tensor) -> None:
    """Exactly the same kept ids and the same values."""
    assert torch.equal(found, expected), (found - expected).abs().nan_to_num().max()


def kept(logits: Tensor, places: np.ndarray) -> Tensor:
    """The logits at these places, and -inf elsewhere."""
    out = torch.full_like(logits, float("-inf"))
    out[torch.from_numpy(places)] = logits[torch.from_numpy(places)]
    return out


def same_but_for_ties(found: Tensor, expected: Tensor) -> None:
    """Among equals, which are kept is up to how torch sorts, but not how many; everything else is the same."""
    same(found.sort().values, expected.sort().values)
    assert set(found[found != expected].tolist()) <= {float("-inf"), float(found[found.isfinite()].min())}


# Processors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("k", [1, 2, 10, 64, 1000])
def test_top_k_is_transformers(k, seed):
    logits = logits_with_ties(seed)
    same(kept(logits, top_k(logits.numpy(), k)), logits_process.TopKLogitsWarper(k)(None, logits[None])[0])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_transformers(p, seed):
    logits = logits_with_ties(seed)
    expected = logits_process.TopPLogitsWarper(p)(None, logits[None])[0]
    same_but_for_ties(kept(logits, top_p(logits.numpy(), p)), expected)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    logits = logits_with_ties(0)
    chosen = kept(logits, top_p(logits.numpy(), p)).isfinite()
    probabilities = logits.softmax(-1)[chosen]
    assert probabilities.sum() >= p > probabilities.sum() - probabilities.min()
    assert logits[chosen].min() > logits[~chosen].max()


def test_top_p_stops_at_the_id_that_reaches_p_exactly():
    assert len(top_p(np.zeros(4, np.float32), 0.5)) == 2  # four times 0.25: exact in binary


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 1.0])
def test_min_p_is_transformers(p, seed):
    logits = logits_with_ties(seed)
    same(kept(logits, min_p(logits.numpy(), p)), logits_process.MinPLogitsWarper(p)(None, logits[None])[0])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_is_transformers(penalty, seed):
    logits = logits_with_ties(seed)
    expected = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(HISTORY[None], logits[None])[0]
    same(penalize_repetition(HISTORY, logits, penalty), expected)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("mass", [0.01, 0.3, 0.9, 0.999])
def test_typical_p_is_transformers(mass, seed):
    logits = logits_with_ties(seed)
    expected = logits_process.TypicalLogitsWarper(mass)(None, logits[None])[0]
    same(kept(logits, typical_p(logits.numpy(), mass)), expected)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
def test_no_repeated_ngrams_are_transformers(n):
    generator = torch.Generator().manual_seed(n)
    for length in (1, 2, 3, 8, 40, 300):
        history = torch.randint(0, 4, (length,), generator=generator)
        expected = logits_process.NoRepeatNGramLogitsProcessor(n)(history[None], torch.zeros(1, 64))[0]
        same(forbid_repeats(history, torch.zeros(64), n), expected)


def test_a_bias_is_transformers_sequence_bias_of_single_ids():
    logits, biases = logits_with_ties(0), {5: 2.5, 60: -100.0, 7: 0.25}
    peer = logits_process.SequenceBiasLogitsProcessor({(i,): bias for i, bias in biases.items()})
    found = add_bias(HISTORY, logits, biases)
    same(found, peer(HISTORY[None], logits[None])[0])


def test_frequency_and_presence_are_openais_over_new_tokens_alone():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting what was said, not what was asked."""
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0))
    steps = Sampling(frequency_penalty=0.5, presence_penalty=-1.25).processors(prompt=2)
    (found,) = [step(HISTORY, logits) for step in steps]  # the new tokens are 7, 60 and 3
    expected = logits.clone()
    expected[[7, 60, 3]] -= 0.5 - 1.25
    same(found, expected)
    counted = penalize_frequency(torch.tensor([9, 9, 4]), logits, 2.0, 0.5)
    assert (logits - counted)[[9, 4, 3]].tolist() == pytest.approx([4.5, 2.5, 0.0], abs=1e-6)
    same(penalize_frequency(HISTORY[:0], logits, 2.0, 0.5), logits)


def test_penalties_come_in_order_bias_repetition_frequency_ngrams_then_the_callers():
    def own(history: Tensor, logits: Tensor) -> Tensor:
        return logits * 2

    sampling = Sampling(
        logit_bias={3: 4.0}, repetition_penalty=2.0, presence_penalty=1.0, no_repeat_ngram_size=2, frequency_penalty=0.5
    )
    logits = torch.ones(64)
    for step in sampling.processors([own], prompt=4):
        logits = step(HISTORY, logits)
    assert logits[3] == ((1 + 4) / 2 - 1.5) * 2
    assert logits[7] == float("-inf")  # 3 was followed by 7 before
    assert logits[60] == 1 / 2 * 2  # it is the prompt's, not new
    assert logits[5] == 2


@pytest.mark.parametrize("seed", range(10))
def test_all_processors_together_are_transformers_in_its_order(seed):
    sampling = Sampling(do_sample=True, temperature=0.7, top_k=30, top_p=0.9, min_p=0.05, repetition_penalty=1.3)
    logits = expected = logits_with_ties(seed)
    for step in sampling.processors():
        logits = step(HISTORY, logits)
    ids, values = candidates(logits.numpy(), sampling)
    for peer in (
        logits_process.RepetitionPenaltyLogitsProcessor(1.3),
        logits_process.TemperatureLogitsWarper(0.7),
        logits_process.TopKLogitsWarper(30),
        logits_process.TopPLogitsWarper(0.9),
        logits_process.MinPLogitsWarper(0.05),
    ):
        expected = peer(HISTORY[None], expected[None])[0]
    found = torch.full_like(expected, float("-inf")).index_copy(0, torch.from_numpy(ids), torch.from_numpy(values))
    same_but_for_ties(found, expected)


def test_defaults_and_off_values_do_nothing():
    assert Sampling().processors() == []
    assert Sampling(top_k=5, top_p=0.5, temperature=2.0).processors() == []  # greedy: no draw to shape
    plain = Sampling(do_sample=True, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, temperature=1.0)
    assert plain.processors() == [] == plain.filters


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
    }.items(),
)
def test_a_value_out_of_bounds_is_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ArgumentError, match=rf"^{name} is .*, expected .* to "):
            Sampling(**{name: value})


@pytest.mark.parametrize("bias", [{-1: 0.0}, {5: 100.5}, {5: math.nan}], ids=str)
def test_a_bias_out_of_bounds_is_refused_by_name(bias):
    with pytest.raises(ArgumentError, match=r"^logit_bias: .*, expected "):
        Sampling(logit_bias=bias)


def plain_top_p(values: np.ndarray, p: float) -> np.ndarray:
    """By definition: sort everything, drop from the least likely on while all of them reach no more than 1 - p."""
    weights = np.exp(values - values.max())
    order = weights.argsort(kind="stable")
    kept = weights[order].cumsum(dtype=np.float64) > (1 - p) * weights.sum(dtype=np.float64)
    kept[-1] = True
    return np.sort(order[kept])


def test_large_vocabularies_keep_what_the_definitions_say():
    """Where ids are left out without being sorted, before the exact rule: peaked and flat, with ties and without."""
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
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(word, 16) for word in text.split())

    assert philox4x32(numbers(counter), numbers(key)) == numbers(words)


def test_gumbel_numbers_continue_splitmix64_from_what_philox_gives():
    """SplitMix64's published first outputs from 1234567 are 6457827717110365317, 3203168211198807973, ..."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neox_lite.generation.sampling.philox4x32", lambda counter, key: (0, 1234567, 0, 0))
        found = gumbel(0, 0, 0, np.array([1, 2]))
    uniform = [((x >> 12) + 0.5) / 2**52 for x in (6457827717110365317, 3203168211198807973)]
    assert found.tolist() == pytest.approx([-math.log(-math.log(u)) for u in uniform], rel=1e-15)


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
    assert (
        chi_square(torch.histc(numbers, 100, 0, 1), torch.full((100,), 200.0)) < 148.2
    )  # 99.9 % of true random sets, 99 degrees of freedom
    centred = numbers - 0.5
    neighbours = (centred[1:] * centred[:-1]).mean() * 12
    assert abs(neighbours) < 4 / 20_000**0.5  # four standard errors of a correlation


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


# Drawing --------------------------------------------------------------------------------------------------------------


def draws(logits: Tensor, sampling: Sampling, count: int) -> Counter[int]:
    steps = sampling.processors()
    return Counter(sample_token(logits, HISTORY, stream, sampling, steps) for stream in range(count))


def test_draws_follow_the_distribution():
    logits = torch.randn(20, generator=torch.Generator().manual_seed(3))
    counts = draws(logits, EVERYTHING, 20_000)
    found = torch.tensor([float(counts[i]) for i in range(20)])
    assert chi_square(found, logits.softmax(-1) * 20_000) < 43.8  # 99.9 %, 19 degrees of freedom


def test_draws_follow_the_distribution_that_processors_leave():
    logits = torch.randn(20, generator=torch.Generator().manual_seed(4))
    sampling = Sampling(do_sample=True, temperature=1.7, top_k=8)
    counts = draws(logits, sampling, 20_000)
    best = logits.topk(8)
    assert set(counts) == set(best.indices.tolist())
    found = torch.tensor([float(counts[i]) for i in best.indices.tolist()])
    assert chi_square(found, (best.values / 1.7).softmax(-1) * 20_000) < 24.3  # 99.9 %, 7 degrees of freedom


def test_a_draw_depends_on_seed_position_and_stream_only():
    logits = torch.zeros(1000)

    def draw(seed: int = 1, position: int = 5, stream: int = 0, first: int = 0) -> int:
        history = torch.full((position,), first)
        return sample_token(logits, history, stream, Sampling(do_sample=True, top_k=0, seed=seed), [])

    assert draw() == draw() == draw(first=9)
    assert len({draw(), draw(seed=2), draw(seed=1 + 2**32), draw(position=6), draw(stream=1)}) == 5


def test_temperature_zero_and_colder_than_float32_can_divide_by_are_greedy():
    logits = logits_with_ties(0) * 1e4
    for temperature in (0.0, 1e-12):
        sampling = Sampling(do_sample=True, temperature=temperature)
        assert sampling.greedy
        assert {sample_token(logits, HISTORY, i, sampling, sampling.processors()) for i in range(20)} == {
            int(logits.argmax())
        }
    cold = Sampling(do_sample=True, temperature=1e-5)
    assert sample_token(logits, HISTORY, 0, cold, cold.processors()) == int(logits.argmax())


def test_excluded_ids_are_never_drawn():
    logits = torch.full((50,), float("-inf"))
    logits[[0, 25, 49]] = torch.tensor([0.0, 5.0, -20.0])
    assert set(draws(logits, EVERYTHING, 3000)) <= {0, 25, 49}
    logits[49] = float("-inf")
    logits[25] = 80.0  # rounding: all other ids have probability 0
    assert set(draws(logits, EVERYTHING, 100)) == {25}


@pytest.mark.parametrize("number", [0, 2**64 - 1])
def test_the_ends_of_the_random_range_are_finite_and_hit_ids_that_are_possible(number, monkeypatch):
    monkeypatch.setattr(
        "neox_lite.generation.sampling.philox4x32", lambda counter, key: (number >> 32, number & 0xFFFFFFFF, 0, 0)
    )
    assert np.isfinite(gumbel(0, 0, 0, np.arange(1000))).all()
    logits = torch.tensor([float("-inf"), 1.0, 1.3, 0.2, float("-inf")])
    assert sample_token(logits, HISTORY, 0, EVERYTHING, []) in (1, 2, 3)


def test_a_draw_is_the_same_whatever_ids_are_excluded_beside_it():
    logits = torch.randn(100, generator=torch.Generator().manual_seed(1))
    for stream in range(200):
        drawn = sample_token(logits, HISTORY, stream, EVERYTHING, [])
        without = logits.index_fill(0, torch.tensor([(drawn + 1) % 100, (drawn + 50) % 100]), float("-inf"))
        assert sample_token(without, HISTORY, stream, EVERYTHING, []) == drawn


@pytest.mark.parametrize("vocabulary", [20, 1000, 50_000])
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.5])
def test_two_models_draw_the_same_id_nearly_as_often_as_is_possible(vocabulary, noise):
    """No coupling reaches more than 1 - d, d the total variation distance; this one is never below (1 - d) / (1 + d)."""
    generator, draws = torch.Generator().manual_seed(7), 1000
    logits = 3 * torch.randn(vocabulary, generator=generator)
    other = logits + noise * torch.randn(vocabulary, generator=generator)
    optimum = float(torch.minimum(logits.double().softmax(-1), other.double().softmax(-1)).sum())
    same = sum(
        sample_token(logits, HISTORY, stream, EVERYTHING, []) == sample_token(other, HISTORY, stream, EVERYTHING, [])
        for stream in range(draws)
    )
    spread = 4 * (0.25 / draws) ** 0.5  # four standard errors at most
    assert optimum / (2 - optimum) - spread < same / draws < optimum + spread


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(do_sample=True)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_to_choose_from_is_an_error_not_a_token(sampling, value):
    logits = torch.full((60,), value)
    with pytest.raises(NeoxLiteError, match="no id can be chosen"):
        sample_token(logits, torch.empty(0, dtype=torch.long), 0, sampling, sampling.processors())
    logits[3] = 0.0
    if not value < 0:  # a single NaN or infinity spoils a softmax
        with pytest.raises(NeoxLiteError, match="no id can be chosen"):
            sample_token(logits, torch.empty(0, dtype=torch.long), 0, sampling, sampling.processors())


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


def test_a_score_leaves_out_ids_that_do_not_exist():
    logits = torch.tensor([0.0, 1.0, 9.0, 9.5])
    found = token_logprob(logits, 1, 4, torch.tensor([2, 3]))
    assert found.logprob == pytest.approx(float(logits[:2].log_softmax(-1)[1]))
    assert [i for i, _ in found.top] == [1, 0]


def test_ties_in_a_score_are_told_in_the_order_of_their_ids_and_no_more_than_asked_for():
    assert [i for i, _ in token_logprob(torch.zeros(1000), 3, 4).top] == [0, 1, 2, 3]
