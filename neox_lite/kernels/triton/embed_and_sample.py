"""The two ends of a step: rows of the embedding, and the next token. `sample` is sampling.sample_token on the device.

It chooses the same ids: filters in the same order, ties broken alike, the same counter-based random numbers, compared in
float64. What differs is the order of sums, which top_p therefore forms from integers, and a GPU's exponential, which may round
otherwise. One program takes a row of logits: it writes the ids that may be sampled to a list, and each filter shortens it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of a row's choice, int64; TEMPERATURE, REST and MIN_P are float64. See steps.Inputs.
GIVEN, SEED, STREAM, TOP_K = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
TEMPERATURE, REST, MIN_P = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
SAMPLING = tl.constexpr(8)
# Sampled where logits leave nothing to sample from.
NO_TOKEN = tl.constexpr(-1)
# A probability weight of 1 in fixed point: 2**16 of them fit into 63 bits.
FIXED_POINT_ONE = tl.constexpr(float(1 << 46))
# More than float32 errs in value + Gumbel noise.
FLOAT32_ERROR = tl.constexpr(1e-3)
# Ids compared at a time in float64, of which most cards do little.
BLOCK_FLOAT64 = tl.constexpr(32)


@triton.jit
def embed(ids_ptr, stride_ids, sampled_ptr, w_ptr, x_ptr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """x (tokens, N) = w[ids]; an id of -1 - i stands for the id that the last step sampled in row i."""
    m = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    id = tl.load(ids_ptr + m * stride_ids).to(tl.int64)
    if sampled_ptr is not None:
        id = tl.where(id < 0, tl.load(sampled_ptr + tl.maximum(-1 - id, 0)), id)
    # NO_TOKEN: the host discards what follows.
    id = tl.maximum(id, 0)
    x = tl.load(w_ptr + id * N + offs_n, mask=mask, other=0)  # (BLOCK_N,)
    tl.store(x_ptr + m * N + offs_n, x, mask=mask)


@triton.jit
def sample(
    logits_ptr, excluded_ptr, starts_ptr, stride_starts, sampling_ptr, values_ptr, ids_ptr, sampled_ptr,
    VOCAB_SIZE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """sampled[row] = the next id, for rows of a batch with a token in it.

    logits (rows, VOCAB_SIZE) float32; excluded (VOCAB_SIZE,) int8: ids that are never sampled. values float32 and ids int32
    (rows, VOCAB_SIZE): the list.
    """
    # 1. The row's tables, and the largest logit with its id.
    row = tl.program_id(0).to(tl.int64)
    start, count = tl.load(starts_ptr + row * stride_starts), tl.load(starts_ptr + row * stride_starts + 2)
    if count == 0:
        return
    row_ptr = sampling_ptr + row * SAMPLING
    logits_ptr += row * VOCAB_SIZE
    values_ptr += row * VOCAB_SIZE
    ids_ptr += row * VOCAB_SIZE
    temperature = _load_float64(row_ptr + TEMPERATURE).to(tl.float32)
    lane = tl.arange(0, BLOCK_V)
    lane_max, lane_argmax = tl.full((BLOCK_V,), -float("inf"), tl.float32), lane
    num_nan = tl.zeros((BLOCK_V,), tl.int32)
    for start_v in range(0, VOCAB_SIZE, BLOCK_V):
        offs_v = start_v + lane
        logit = _load_logits(logits_ptr, excluded_ptr, offs_v, VOCAB_SIZE)  # (BLOCK_V,) float32
        num_nan += (logit != logit).to(tl.int32)
        lane_argmax = tl.where(logit > lane_max, offs_v, lane_argmax)
        lane_max = tl.where(logit > lane_max, logit, lane_max)
    peak = tl.max(lane_max, axis=0)
    if (tl.sum(num_nan, axis=0) > 0) | (tl.abs(peak) == float("inf")):
        tl.store(sampled_ptr + row, NO_TOKEN)
        return
    if temperature == 0:
        best = tl.min(tl.where(lane_max == peak, lane_argmax, VOCAB_SIZE), axis=0)
        tl.store(sampled_ptr + row, best)
        return

    # 2. A lower bound for top_k: at least k values reach the k-th largest of the lanes' maxima.
    peak = tl.div_rn(peak, temperature)
    top_k = tl.load(row_ptr + TOP_K)
    min_value = -float("inf")
    if (top_k > 0) & (top_k < BLOCK_V):
        tl.store(values_ptr + lane, tl.div_rn(lane_max, temperature), mask=lane < VOCAB_SIZE)
        tl.debug_barrier()
        min_value = _kth_largest(values_ptr, tl.minimum(VOCAB_SIZE, BLOCK_V), top_k, peak, BLOCK_V)
        tl.debug_barrier()

    # 3. Write the list.
    n = 0
    for start_v in range(0, VOCAB_SIZE, BLOCK_V):
        offs_v = start_v + lane
        value = tl.div_rn(_load_logits(logits_ptr, excluded_ptr, offs_v, VOCAB_SIZE), temperature)
        keep = (value >= min_value) & (value > -float("inf"))
        to = n + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(values_ptr + to, value, mask=keep)
        tl.store(ids_ptr + to, offs_v, mask=keep)
        n += tl.sum(keep.to(tl.int32), axis=0)
    tl.debug_barrier()

    # 4. Shorten it by top_k, top_p and min_p.
    if (top_k > 0) & (top_k < n):
        min_value = _kth_largest(values_ptr, n, top_k, peak, BLOCK_V)
        n = _filter(values_ptr, ids_ptr, n, min_value, BLOCK_V)
    rest = _load_float64(row_ptr + REST)
    if rest > 0:
        n = _top_p(values_ptr, ids_ptr, n, peak, rest, BLOCK_V)
    n = _filter(values_ptr, ids_ptr, n, peak + _load_float64(row_ptr + MIN_P).to(tl.float32), BLOCK_V)

    # 5. Gumbel-max over what is left, with the row's own stream of random numbers.
    position, stream = (start + 1).to(tl.uint32), tl.load(row_ptr + STREAM).to(tl.uint32)
    none = (stream * 0).to(tl.uint32)
    high, low, _, _ = tl.philox(tl.load(row_ptr + SEED), position, stream, none, none)
    counter = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    tl.store(sampled_ptr + row, _gumbel_argmax(values_ptr, ids_ptr, n, peak, counter, BLOCK_V))


@triton.jit
def _load_float64(ptr):
    return tl.load(ptr).to(tl.float64, bitcast=True)


@triton.jit
def _load_logits(logits_ptr, excluded_ptr, offs_v, VOCAB_SIZE: tl.constexpr):
    mask = offs_v < VOCAB_SIZE
    logit = tl.load(logits_ptr + offs_v, mask=mask, other=-float("inf"))
    return tl.where(tl.load(excluded_ptr + offs_v, mask=mask, other=1) != 0, -float("inf"), logit)


# The list -------------------------------------------------------------------------------------------------------------


@triton.jit
def _filter(values_ptr, ids_ptr, n, min_value, BLOCK_V: tl.constexpr):
    """Shorten the list to values of at least min_value -> its new length."""
    return _filter_scores(values_ptr, ids_ptr, n, 0.0, min_value, 0, False, BLOCK_V)


@triton.jit
def _filter_scores(values_ptr, ids_ptr, n, peak, min_score, skip, IS_WEIGHT: tl.constexpr, BLOCK_V: tl.constexpr):
    """Shorten the list to scores of at least min_score, without the first `skip` that equal it -> its new length.

    A score is the value, or, IS_WEIGHT, exp(value - peak).
    """
    lane = tl.arange(0, BLOCK_V)
    num_kept, num_equal = 0, 0
    for start_v in range(0, n, BLOCK_V):
        mask = start_v + lane < n
        value = tl.load(values_ptr + start_v + lane, mask=mask, other=-float("inf"))
        id = tl.load(ids_ptr + start_v + lane, mask=mask, other=0)
        score = _weight(value, peak) if IS_WEIGHT else value
        equal = (mask & (score == min_score)).to(tl.int32)
        nth_equal = num_equal + tl.cumsum(equal, axis=0)  # from 1 on
        keep = mask & ((score > min_score) | ((equal > 0) & (nth_equal > skip)))
        to = num_kept + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        # All of a block is read before any of it is overwritten.
        tl.debug_barrier()
        tl.store(values_ptr + to, value, mask=keep)
        tl.store(ids_ptr + to, id, mask=keep)
        num_kept += tl.sum(keep.to(tl.int32), axis=0)
        num_equal += tl.sum(equal, axis=0)
    tl.debug_barrier()
    return num_kept


@triton.jit
def _sort_key(value):
    """An integer that orders as float32 does."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _kth_largest(values_ptr, n, k, peak, BLOCK_V: tl.constexpr):
    """The k-th largest of n values, the largest of which is `peak`; -infinity where there are fewer. By bisection."""
    low, high = _sort_key(tl.full((), -float("inf"), tl.float32)).to(tl.int64), _sort_key(peak).to(tl.int64)
    lane = tl.arange(0, BLOCK_V)
    while low < high:
        middle = low + (high - low + 1) // 2
        count = tl.zeros((BLOCK_V,), tl.int32)
        for start_v in range(0, n, BLOCK_V):
            value = tl.load(values_ptr + start_v + lane, mask=start_v + lane < n, other=-float("inf"))
            count += (_sort_key(value).to(tl.int64) >= middle).to(tl.int32)
        enough = tl.sum(count, axis=0) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return _sort_key(low.to(tl.int32).to(tl.float32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(value, peak):
    return tl.exp(value - peak)


@triton.jit
def _sum_weights(values_ptr, n, peak, max_bits, BLOCK_V: tl.constexpr):
    """The sum of weights whose bits are at most max_bits, int64 in fixed point."""
    lane = tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_V,), tl.int64)
    for start_v in range(0, n, BLOCK_V):
        value = tl.load(values_ptr + start_v + lane, mask=start_v + lane < n, other=-float("inf"))
        weight = _weight(value, peak)
        acc += tl.where(weight.to(tl.int32, bitcast=True) <= max_bits, (weight * FIXED_POINT_ONE).to(tl.int64), 0)
    return tl.sum(acc, axis=0)


@triton.jit
def _top_p(values_ptr, ids_ptr, n, peak, rest, BLOCK_V: tl.constexpr):
    """Shorten the list to the smallest set that leaves out at most `rest` of its weight; of equals the last are kept."""
    one = tl.full((), 1.0, tl.float32).to(tl.int32, bitcast=True)
    total = _sum_weights(values_ptr, n, peak, one, BLOCK_V)
    left_out = tl.minimum((rest * total.to(tl.float64)).to(tl.int64), total - 1)  # at least one is kept
    # Weights so small that all of them together could be left out need no further look.
    small = (left_out // n).to(tl.float32) / FIXED_POINT_ONE * 0.999
    n = _filter_scores(values_ptr, ids_ptr, n, peak, small, 0, True, BLOCK_V)
    left_out -= total - _sum_weights(values_ptr, n, peak, one, BLOCK_V)
    # Bisect for the bits of the smallest weight that is kept.
    low, high = one * 0, one
    while low < high:
        middle = (low + high) // 2
        more = _sum_weights(values_ptr, n, peak, middle, BLOCK_V) > left_out
        low, high = tl.where(more, low, middle + 1), tl.where(more, middle, high)
    weight = low.to(tl.float32, bitcast=True)
    skip = (left_out - _sum_weights(values_ptr, n, peak, low - 1, BLOCK_V)) // (weight * FIXED_POINT_ONE).to(tl.int64)
    return _filter_scores(values_ptr, ids_ptr, n, peak, weight, skip, True, BLOCK_V)


# Gumbel-max -----------------------------------------------------------------------------------------------------------


@triton.jit
def _random(counter, id):
    """52 random bits for each id, as sampling.gumbel takes them."""
    x = counter + id.to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)) >> 12


@triton.jit
def _gumbel_float32(bits):
    """-log(-log(u)) for u = (bits + 0.5) / 2**52 in float32, good to FLOAT32_ERROR also where u is next to 1."""
    u = (bits.to(tl.float32) + 0.5) * (2.0**-52)
    one_minus_u = ((bits ^ 0xFFFFFFFFFFFFF).to(tl.float32) + 0.5) * (2.0**-52)
    small = one_minus_u * (1 + one_minus_u * (0.5 + one_minus_u / 3))
    return -tl.log(tl.where(one_minus_u < 0.0078125, small, -tl.log(u)))


@triton.jit
def _gumbel_argmax(values_ptr, ids_ptr, n, peak, counter, BLOCK_V: tl.constexpr):
    """The id with the largest value + Gumbel noise."""
    # 1. The largest score in float32.
    lane = tl.arange(0, BLOCK_V)
    best = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    for start_v in range(0, n, BLOCK_V):
        mask = start_v + lane < n
        value = tl.load(values_ptr + start_v + lane, mask=mask, other=-float("inf"))
        bits = _random(counter, tl.load(ids_ptr + start_v + lane, mask=mask, other=0))
        best = tl.maximum(best, tl.where(mask, value - peak + _gumbel_float32(bits), -float("inf")))

    # 2. Shorten the list to those that may be the largest in float64.
    min_score = tl.max(best, axis=0) - FLOAT32_ERROR
    num_near = 0
    tl.debug_barrier()
    for start_v in range(0, n, BLOCK_V):
        mask = start_v + lane < n
        value = tl.load(values_ptr + start_v + lane, mask=mask, other=-float("inf"))
        id = tl.load(ids_ptr + start_v + lane, mask=mask, other=0)
        keep = mask & (value - peak + _gumbel_float32(_random(counter, id)) >= min_score)
        to = num_near + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.debug_barrier()
        tl.store(values_ptr + to, value, mask=keep)
        tl.store(ids_ptr + to, id, mask=keep)
        num_near += tl.sum(keep.to(tl.int32), axis=0)
    tl.debug_barrier()

    # 3. The largest of those in float64; of equals the smallest id.
    offs = tl.arange(0, BLOCK_FLOAT64)
    best_score, best_id = tl.full((), -float("inf"), tl.float64), tl.full((), 0, tl.int32)
    for start_v in range(0, num_near, BLOCK_FLOAT64):
        mask = start_v + offs < num_near
        value = tl.load(values_ptr + start_v + offs, mask=mask, other=0)
        id = tl.load(ids_ptr + start_v + offs, mask=mask, other=0)
        u = (_random(counter, id).to(tl.float64) + 0.5) * (2.0**-52)
        score = tl.where(mask, value.to(tl.float64) - tl.log(-tl.log(u)), -float("inf"))
        block_best = tl.max(score, axis=0)
        id = tl.min(tl.where(score == block_best, id, 0x7FFFFFFF), axis=0)
        best_id, best_score = tl.where(block_best > best_score, id, best_id), tl.maximum(block_best, best_score)
    return best_id.to(tl.int64)
