"""The two ends of a step: rows of the embedding, and the token that follows. `draw` is sampling.sample_token on the device.

It takes the same ids: filters in the same order, ties broken alike, the same counter-based random numbers, compared in float64.
What differs is the order of sums, which top_p therefore forms from integers, and a GPU's exponential, which may round
otherwise.
One program has a row: ids that may be drawn are written to a list, and each filter shortens it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of a row's choice, int64; TEMPERATURE, REST and MIN_P are float64. See steps.Inputs.
GIVEN, SEED, STREAM, TOP_K = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
TEMPERATURE, REST, MIN_P = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
SAMPLING = tl.constexpr(8)
NOTHING = tl.constexpr(-1)  # chosen where logits leave nothing to choose from
UNIT = tl.constexpr(float(1 << 46))  # a weight of 1 as an integer: 2**16 of them fit into 63 bits
NEAR = tl.constexpr(1e-3)  # more than float32 errs in the race of ids
FINALISTS = tl.constexpr(32)  # looked at together in float64, of which most cards do little


@triton.jit
def embed(ids_ptr, id_step, chosen_ptr, weight_ptr, x_ptr, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """x (tokens, FEATURES) = weight[ids]; an id of -1 - i stands for what was chosen last in row i."""
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < FEATURES
    row = tl.load(ids_ptr + token * id_step).to(tl.int64)
    if chosen_ptr is not None:
        row = tl.where(row < 0, tl.load(chosen_ptr + tl.maximum(-1 - row, 0)), row)
    row = tl.maximum(row, 0)  # where nothing could be chosen, what follows is thrown away
    x = tl.load(weight_ptr + row * FEATURES + feature, mask=inside, other=0)
    tl.store(x_ptr + token * FEATURES + feature, x, mask=inside)


@triton.jit
def draw(
    logits_ptr, excluded_ptr, starts_ptr, start_step, choices_ptr, values_ptr, ids_ptr, chosen_ptr,
    VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """chosen[row] = the id that follows, for rows of a batch with a token in it.

    excluded (vocabulary,) int8: ids that do not exist. values, ids (rows, vocabulary): the list.
    """
    row = tl.program_id(0).to(tl.int64)
    start, count = tl.load(starts_ptr + row * start_step), tl.load(starts_ptr + row * start_step + 2)
    if count == 0:
        return
    choice_ptr = choices_ptr + row * SAMPLING
    logits_ptr += row * VOCABULARY
    values_ptr += row * VOCABULARY
    ids_ptr += row * VOCABULARY
    temperature = _float64(choice_ptr + TEMPERATURE).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    tops, at, odd = tl.full((BLOCK,), -float("inf"), tl.float32), lane, tl.zeros((BLOCK,), tl.int32)
    for first in range(0, VOCABULARY, BLOCK):
        id = first + lane
        value = _logit(logits_ptr, excluded_ptr, id, VOCABULARY)
        odd += (value != value).to(tl.int32)
        at = tl.where(value > tops, id, at)
        tops = tl.where(value > tops, value, tops)
    peak = tl.max(tops, axis=0)
    if (tl.sum(odd, axis=0) > 0) | (tl.abs(peak) == float("inf")):
        tl.store(chosen_ptr + row, NOTHING)
        return
    if temperature == 0:
        best = tl.min(tl.where(tops == peak, at, VOCABULARY), axis=0)
        tl.store(chosen_ptr + row, best)
        return
    peak = tl.div_rn(peak, temperature)
    top_k = tl.load(choice_ptr + TOP_K)
    least = -float("inf")
    if (top_k > 0) & (top_k < BLOCK):  # at least as many values as lanes reach the k-th largest of the lanes' maxima
        tl.store(values_ptr + lane, tl.div_rn(tops, temperature), mask=lane < VOCABULARY)
        tl.debug_barrier()
        least = _kth_largest(values_ptr, tl.minimum(VOCABULARY, BLOCK), top_k, peak, BLOCK)
        tl.debug_barrier()
    n = 0
    for first in range(0, VOCABULARY, BLOCK):
        id = first + lane
        value = tl.div_rn(_logit(logits_ptr, excluded_ptr, id, VOCABULARY), temperature)
        stays = (value >= least) & (value > -float("inf"))
        to = n + tl.cumsum(stays.to(tl.int32), axis=0) - 1
        tl.store(values_ptr + to, value, mask=stays)
        tl.store(ids_ptr + to, id, mask=stays)
        n += tl.sum(stays.to(tl.int32), axis=0)
    tl.debug_barrier()
    if (top_k > 0) & (top_k < n):
        least = _kth_largest(values_ptr, n, top_k, peak, BLOCK)
        n = _keep(values_ptr, ids_ptr, n, least, BLOCK)
    rest = _float64(choice_ptr + REST)
    if rest > 0:
        n = _top_p(values_ptr, ids_ptr, n, peak, rest, BLOCK)
    n = _keep(values_ptr, ids_ptr, n, peak + _float64(choice_ptr + MIN_P).to(tl.float32), BLOCK)
    position, stream = (start + 1).to(tl.uint32), tl.load(choice_ptr + STREAM).to(tl.uint32)
    none = (stream * 0).to(tl.uint32)
    high, low, _, _ = tl.philox(tl.load(choice_ptr + SEED), position, stream, none, none)
    counter = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    tl.store(chosen_ptr + row, _winner(values_ptr, ids_ptr, n, peak, counter, BLOCK))


@triton.jit
def _float64(ptr):
    return tl.load(ptr).to(tl.float64, bitcast=True)


@triton.jit
def _logit(logits_ptr, excluded_ptr, id, VOCABULARY: tl.constexpr):
    there = id < VOCABULARY
    value = tl.load(logits_ptr + id, mask=there, other=-float("inf"))
    return tl.where(tl.load(excluded_ptr + id, mask=there, other=1) != 0, -float("inf"), value)


# The list -------------------------------------------------------------------------------------------------------------


@triton.jit
def _keep(values_ptr, ids_ptr, n, least, BLOCK: tl.constexpr):
    """Shorten the list to values of at least `least` -> its new length."""
    return _keep_weighed(values_ptr, ids_ptr, n, 0.0, least, 0, False, BLOCK)


@triton.jit
def _keep_weighed(values_ptr, ids_ptr, n, peak, least, skipped, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """Shorten the list to values, or WEIGHTS, of at least `least`, without the first `skipped` that equal it."""
    lane = tl.arange(0, BLOCK)
    kept, equals = 0, 0
    for first in range(0, n, BLOCK):
        there = first + lane < n
        value = tl.load(values_ptr + first + lane, mask=there, other=-float("inf"))
        id = tl.load(ids_ptr + first + lane, mask=there, other=0)
        score = _weight(value, peak) if WEIGHTS else value
        equal = (there & (score == least)).to(tl.int32)
        nth = equals + tl.cumsum(equal, axis=0)  # from 1 on
        stays = there & ((score > least) | ((equal > 0) & (nth > skipped)))
        to = kept + tl.cumsum(stays.to(tl.int32), axis=0) - 1
        tl.debug_barrier()  # all of a block is read before any of it is written over
        tl.store(values_ptr + to, value, mask=stays)
        tl.store(ids_ptr + to, id, mask=stays)
        kept += tl.sum(stays.to(tl.int32), axis=0)
        equals += tl.sum(equal, axis=0)
    tl.debug_barrier()
    return kept


@triton.jit
def _key(value):
    """An integer that orders as float32 does."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _kth_largest(values_ptr, n, k, peak, BLOCK: tl.constexpr):
    """The k-th largest of n values, the largest of which is `peak`; -infinity where there are fewer."""
    low, high = _key(tl.full((), -float("inf"), tl.float32)).to(tl.int64), _key(peak).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    while low < high:
        middle = low + (high - low + 1) // 2
        count = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, n, BLOCK):
            value = tl.load(values_ptr + first + lane, mask=first + lane < n, other=-float("inf"))
            count += (_key(value).to(tl.int64) >= middle).to(tl.int32)
        enough = tl.sum(count, axis=0) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return _key(low.to(tl.int32).to(tl.float32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(value, peak):
    return tl.exp(value - peak)


@triton.jit
def _mass(values_ptr, n, peak, highest, BLOCK: tl.constexpr):
    """The sum of weights whose bits are at most `highest`, in UNITs."""
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, n, BLOCK):
        value = tl.load(values_ptr + first + lane, mask=first + lane < n, other=-float("inf"))
        weight = _weight(value, peak)
        sums += tl.where(weight.to(tl.int32, bitcast=True) <= highest, (weight * UNIT).to(tl.int64), 0)
    return tl.sum(sums, axis=0)


@triton.jit
def _top_p(values_ptr, ids_ptr, n, peak, rest, BLOCK: tl.constexpr):
    """Shorten the list to the smallest set that leaves out at most `rest` of its weight; of equals the last stay."""
    one = tl.full((), 1.0, tl.float32).to(tl.int32, bitcast=True)
    total = _mass(values_ptr, n, peak, one, BLOCK)
    left_out = tl.minimum((rest * total.to(tl.float64)).to(tl.int64), total - 1)  # at least one stays
    # Those so light that all of them together could be left out need not be looked at again.
    light = (left_out // n).to(tl.float32) / UNIT * 0.999
    n = _keep_weighed(values_ptr, ids_ptr, n, peak, light, 0, True, BLOCK)
    left_out -= total - _mass(values_ptr, n, peak, one, BLOCK)
    low, high = one * 0, one  # bits of the lightest weight that stays
    while low < high:
        middle = (low + high) // 2
        more = _mass(values_ptr, n, peak, middle, BLOCK) > left_out
        low, high = tl.where(more, low, middle + 1), tl.where(more, middle, high)
    weight = low.to(tl.float32, bitcast=True)
    skipped = (left_out - _mass(values_ptr, n, peak, low - 1, BLOCK)) // (weight * UNIT).to(tl.int64)
    return _keep_weighed(values_ptr, ids_ptr, n, peak, weight, skipped, True, BLOCK)


# The race -------------------------------------------------------------------------------------------------------------


@triton.jit
def _random(counter, id):
    """52 random bits for each id, as sampling.gumbel takes them."""
    x = counter + id.to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)) >> 12


@triton.jit
def _quick_gumbel(bits):
    """-log(-log(u)) for u = (bits + 0.5) / 2**52 in float32, good to NEAR also where u is next to 1."""
    u = (bits.to(tl.float32) + 0.5) * (2.0**-52)
    away = ((bits ^ 0xFFFFFFFFFFFFF).to(tl.float32) + 0.5) * (2.0**-52)  # 1 - u
    return -tl.log(tl.where(away < 0.0078125, away * (1 + away * (0.5 + away / 3)), -tl.log(u)))


@triton.jit
def _winner(values_ptr, ids_ptr, n, peak, counter, BLOCK: tl.constexpr):
    """The id with the largest value + Gumbel number: in float32, then in float64 of those that are near."""
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    for first in range(0, n, BLOCK):
        there = first + lane < n
        value = tl.load(values_ptr + first + lane, mask=there, other=-float("inf"))
        bits = _random(counter, tl.load(ids_ptr + first + lane, mask=there, other=0))
        best = tl.maximum(best, tl.where(there, value - peak + _quick_gumbel(bits), -float("inf")))
    least = tl.max(best, axis=0) - NEAR
    near = 0
    tl.debug_barrier()
    for first in range(0, n, BLOCK):
        there = first + lane < n
        value = tl.load(values_ptr + first + lane, mask=there, other=-float("inf"))
        id = tl.load(ids_ptr + first + lane, mask=there, other=0)
        stays = there & (value - peak + _quick_gumbel(_random(counter, id)) >= least)
        to = near + tl.cumsum(stays.to(tl.int32), axis=0) - 1
        tl.debug_barrier()
        tl.store(values_ptr + to, value, mask=stays)
        tl.store(ids_ptr + to, id, mask=stays)
        near += tl.sum(stays.to(tl.int32), axis=0)
    tl.debug_barrier()
    few = tl.arange(0, FINALISTS)
    first_place, winner = tl.full((), -float("inf"), tl.float64), tl.full((), 0, tl.int32)
    for first in range(0, near, FINALISTS):
        there = first + few < near
        value = tl.load(values_ptr + first + few, mask=there, other=0)
        id = tl.load(ids_ptr + first + few, mask=there, other=0)
        u = (_random(counter, id).to(tl.float64) + 0.5) * (2.0**-52)
        score = tl.where(there, value.to(tl.float64) - tl.log(-tl.log(u)), -float("inf"))
        top = tl.max(score, axis=0)
        id = tl.min(tl.where(score == top, id, 0x7FFFFFFF), axis=0)
        winner, first_place = tl.where(top > first_place, id, winner), tl.maximum(top, first_place)
    return winner.to(tl.int64)
