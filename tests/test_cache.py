"""What the paged KV cache promises: a sequence reads back what it wrote, however its pages are shared, moved and reused."""

import gc
import random
import weakref
from collections import Counter

import pytest
import torch
from support.often import times
from support.peers import TINY, difference, pair, random_ids

from neox_lite import GPTNeoXForCausalLM
from neox_lite.cache import MAX_ENTRIES, Batch, KVCache, PagePool, PrefixCache, quantize
from neox_lite.errors import ArgumentError, CacheError
from neox_lite.kernels import dispatch
from neox_lite.units import PAGE, dtype_name
from neox_lite_app.evaluation.quality import cut, quality_of
from neox_lite_app.paths import DEMO

CPU = torch.device("cpu")
HEADS, HEAD_DIM, LAYERS = 2, 3, 2
# Logits here are of order one; splitting a prompt changes only the order in which float32 products are summed. With int8, that
# now and then moves a key or value across the middle between two codes, which changes it by 1/127 of its head's largest.
ROUNDING = {"fp16": 1e-4, "int8": 5e-3}
# By what pages hold, the uncached run rounding keys and values alike: float16 moves by 2**-11 of itself where a sum crosses the
# middle between two.
STORED = {torch.float32: 1e-4, torch.float16: 1e-3, torch.int8: 5e-3}


class NanPool(PagePool):
    """A pool whose unwritten slots hold NaN, those of pages given back too, so that reading one shows."""

    def _grow(self, at_least):
        before = self.pages
        super()._grow(at_least)
        for tensor in self.scales or self.storage:
            tensor[before:] = float("nan")

    def _drop(self, page):
        super()._drop(page)
        if self._users[page] == 0:
            for tensor in self.scales or self.storage:
                tensor[page] = float("nan")


@pytest.fixture(params=[torch.float32, torch.int8], ids=["float32", "int8"])
def new_pool(request):
    return lambda pages=0, limit=None: NanPool(HEADS, HEAD_DIM, request.param, [CPU] * LAYERS, pages, limit)


def append(pool, block_tables, counts):
    """Write random keys and values to all layers -> what each sequence should hold, (layers, 2, count, heads, head_dim)."""
    batch = Batch.reserve(pool, block_tables, counts)
    written = torch.randn(LAYERS, 2, sum(counts), HEADS, HEAD_DIM)
    for layer, (keys, values) in enumerate(written):
        pool.write(layer, batch, keys, values)
    batch.commit()
    if pool.dtype == torch.int8:  # codes with a float16 scale for each vector, spelled out
        scale = (written.abs().max(-1, keepdim=True).values / 127).half().float()
        written = (written / scale).round() * scale
    return list(written.split(counts, dim=2))


def started(pool, count):
    """A new sequence of so many tokens, and what it should hold."""
    block_table = pool.new()
    return block_table, append(pool, [block_table], [count])[0]


def contents(pool, block_table):
    """All that a sequence holds, (layers, 2, length, heads, head_dim)."""
    layers = [torch.stack(pool.read(layer, block_table, block_table.length)) for layer in range(LAYERS)]
    return torch.stack(layers).transpose(2, 3)


def check_counts(pool, block_tables):
    """Every page is either free or counted once for each sequence that holds it."""
    held = [page for block_table in block_tables for page in block_table.pages]
    assert pool._users == [held.count(page) for page in range(pool.pages)]
    assert sorted(pool._free) == [page for page in range(pool.pages) if page not in held]


def test_random_operations_match_plain_tensors(new_pool):
    choice = random.Random(0)
    pool = new_pool(limit=30)
    model, seen = {}, Counter()  # what each sequence should hold
    while seen.total() < times(500):
        live = list(model)
        doing = choice.choice(["append"] * 4 + ["new", "fork", "truncate", "free"]) if live else "new"
        if doing == "new":
            model[pool.new()] = torch.empty(LAYERS, 2, 0, HEADS, HEAD_DIM)
        elif doing == "fork":
            twin = choice.choice(live)
            model[pool.fork(twin)] = model[twin]
        elif doing == "truncate":
            cut = choice.choice(live)
            length = choice.choice([0, cut.length, choice.randint(0, cut.length)])
            pool.truncate(cut, length)
            model[cut] = model[cut][:, :, :length]
        elif doing == "free":
            gone = choice.choice(live)
            pool.free(gone)
            del model[gone]
        else:
            rows = choice.sample(live, min(len(live), choice.randint(1, 8)))
            counts = [choice.choice([0, 1, 1, 7, PAGE - 1, PAGE, PAGE + 1]) for _ in rows]
            try:
                for row, written in zip(rows, append(pool, rows, counts), strict=True):
                    model[row] = torch.cat((model[row], written), 2)
            except CacheError:  # nothing may have changed; make room
                doing = "full"
                gone = max(live, key=lambda s: s.length)
                pool.free(gone)
                del model[gone]
        seen[doing] += 1
        check_counts(pool, list(model))
        for block_table, expected in model.items():
            assert torch.equal(contents(pool, block_table), expected), (doing, seen)
    assert min(seen[name] for name in ("append", "new", "fork", "truncate", "free", "full")) >= 10, seen
    for block_table in model:
        pool.free(block_table)
    assert pool._users == [0] * pool.pages
    assert pool.free_pages == pool.pages == 30


def test_a_full_pool_says_its_limit_and_what_is_free_and_takes_no_page(new_pool):
    pool = new_pool(limit=3)
    second = pool.new()
    with pytest.raises(CacheError):
        Batch.reserve(pool, [pool.new(), second], [2 * PAGE, 2 * PAGE])
    assert pool.free_pages == pool.pages
    first, _ = started(pool, 2 * PAGE)
    with pytest.raises(CacheError, match="3 pages of 128 tokens, 1 free, 2 needed"):
        pool.reserve(second, PAGE + 1)
    append(pool, [second], [PAGE])
    with pytest.raises(CacheError, match="0 free, 1 needed"):
        append(pool, [second], [1])
    pool.free(first)
    append(pool, [second], [2 * PAGE])


def test_tokens_reserved_but_never_committed_leave_nothing_behind(new_pool):
    pool = new_pool()
    block_table, before = started(pool, 5)
    Batch.reserve(pool, [block_table], [300])  # a forward pass that failed
    append(pool, [block_table], [0])
    assert torch.equal(contents(pool, block_table), before)
    assert len(block_table.pages) == 1


def test_growth_doubles_and_keeps_contents(new_pool):
    pool = new_pool(pages=1)
    block_table, sizes, parts = pool.new(), [], []
    for _ in range(9):
        parts += append(pool, [block_table], [PAGE])
        sizes.append(pool.pages)
    assert sizes == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert torch.equal(contents(pool, block_table), torch.cat(parts, 2))
    vector_bytes = {torch.float32: 4 * HEAD_DIM, torch.int8: HEAD_DIM + 2}[pool.dtype]
    assert pool.nbytes == 16 * 2 * HEADS * PAGE * vector_bytes * LAYERS


def test_sharing_uses_no_page_until_one_writes(new_pool):
    pool = new_pool(pages=10)
    prompt, shared = started(pool, PAGE + 10)
    branches = [pool.fork(prompt) for _ in range(4)]
    assert pool.free_pages == 8
    new = append(pool, branches, [1] * 4)
    assert pool.free_pages == 4  # the full page is still shared by five, the half-filled one was copied four times
    for branch, written in zip(branches, new, strict=True):
        assert torch.equal(contents(pool, branch), torch.cat((shared, written), 2))
    assert torch.equal(contents(pool, prompt), shared)


def test_the_last_owner_of_a_page_writes_in_place_and_a_fork_at_a_page_boundary_copies_nothing(new_pool):
    pool = new_pool(pages=4)
    first, _ = started(pool, 10)
    second = pool.fork(first)
    pool.free(first)
    append(pool, [second], [1])
    assert pool.free_pages == 3
    append(pool, [second], [PAGE - 11])
    append(pool, [second, pool.fork(second)], [1, 1])
    assert pool.free_pages == 1


USES = {
    "free": lambda pool, s: pool.free(s),
    "fork": lambda pool, s: pool.fork(s),
    "truncate": lambda pool, s: pool.truncate(s, 0),
    "reserve": lambda pool, s: pool.reserve(s, 1),
    "read": lambda pool, s: pool.read(0, s, 1),
    "batch": lambda pool, s: Batch.reserve(pool, [s], [1]),
}


@pytest.mark.parametrize("use", USES)
def test_a_freed_sequence_is_refused(new_pool, use):
    pool = new_pool()
    block_table, other = started(pool, PAGE)[0], started(pool, PAGE)[0]
    pool.free(block_table)
    with pytest.raises(CacheError, match="freed"):
        USES[use](pool, block_table)
    check_counts(pool, [other])


@pytest.mark.parametrize("length", [-1, 11])
def test_truncating_to_what_is_not_there_is_refused(new_pool, length):
    pool = new_pool()
    with pytest.raises(ArgumentError, match=f"length is {length}, expected 0 to 10"):
        pool.truncate(started(pool, 10)[0], length)


def test_a_batch_of_nothing_is_legal(new_pool):
    pool = new_pool(pages=1)
    block_table, written = started(pool, 0)
    assert written.shape == contents(pool, block_table).shape == (LAYERS, 2, 0, HEADS, HEAD_DIM)


def test_crop_and_fork_follow_the_columns_of_a_padded_batch(new_pool):
    cache = KVCache(new_pool(), 2)
    keep = torch.tensor([[False, True, True, True], [True, True, False, True]])
    append(cache.pool, cache.block_tables, keep.sum(1).tolist())
    cache.append(keep)
    twin = cache.fork()
    cache.crop(-1)
    assert cache.get_seq_length() == 3 and cache.columns == [[1, 2], [0, 1]]
    assert [s.length for s in cache.block_tables] == [2, 2]
    cache.crop(100)  # more than it holds: nothing to forget
    assert cache.get_seq_length() == 3
    with pytest.raises(ArgumentError, match="max_length is -4, but the cache holds 3 columns"):
        cache.crop(-4)
    assert twin.get_seq_length() == 4 and [s.length for s in twin.block_tables] == [3, 3]
    cache.free()
    twin.free()
    assert cache.pool.free_pages == cache.pool.pages


# int8 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [1e-2, 1.0, 1e4])
def test_int8_is_within_half_a_code_of_what_was_written(magnitude):
    x = torch.randn(1000, 96) * magnitude
    codes, scale = quantize(x)
    found = codes.float() * scale.float()[:, None]
    # A scale stored in float16 is off by at most 2**-11 of itself, and so is half a code; float32 adds less than 1e-6.
    bound = x.abs().amax(1, keepdim=True) / 127 * (0.5 * (1 + 2**-11) + 1e-4)
    assert bool(((found - x).abs() <= bound).all())
    assert codes.abs().amax(1).eq(127).all() and torch.equal(quantize(-x)[0], -codes)


def test_int8_survives_zeros_tiny_and_huge_numbers_and_shows_nan():
    huge = torch.finfo(torch.float16).max * 127
    x = torch.tensor([[0.0, 0.0], [1e-9, -1e-9], [8.0 * huge, -huge / 127], [torch.inf, 1.0], [torch.nan, 1.0]])
    codes, scale = quantize(x)
    assert codes[:4].tolist() == [[0, 0], [0, 0], [127, -1], [127, 0]]
    assert scale[:4].tolist() == [0, 0, 65504, 65504] and bool(scale[4].isnan())


def test_int8_takes_half_the_bytes_of_fp16_and_two_for_a_scale_and_other_integers_are_refused():
    small, usual = (PagePool(64, 96, dtype, [CPU], pages=1).nbytes for dtype in (torch.int8, torch.float16))
    assert small == usual // 2 + 2 * 64 * PAGE * 2
    with pytest.raises(ArgumentError, match=r"dtype is torch.int16, expected a floating-point one or torch.int8"):
        PagePool(1, 1, torch.int16, [CPU])


# Kept sequences -------------------------------------------------------------------------------------------------------


def kept(pool, prefixes, ids, **known):
    """Write a sequence of these ids and keep it; what it holds."""
    block_table, written = started(pool, len(ids))
    prefixes.insert(torch.tensor(ids), block_table, **known)
    return written


def lengths_of(prefixes, *prompts):
    """How much of each prompt is kept."""
    return [prefixes.match_prefix(prompt)[0].length for prompt in prompts]


def test_the_longest_common_beginning_is_taken_and_its_pages_are_shared(new_pool):
    pool = new_pool(pages=8)
    prefixes = PrefixCache(pool, 8)
    short = kept(pool, prefixes, [1] * 50)
    long = kept(pool, prefixes, [1] * 100 + [2] * 200)
    assert (prefixes.pages, prefixes.tokens()) == (4, 350)
    free = pool.free_pages
    for wanted, length, source in (
        ([1] * 40 + [3], 40, short),
        ([1] * 100 + [2] * 150 + [3] * 9, 250, long),
        ([1] * 100 + [2] * 200, 299, long),  # one is left to compute
        ([3] * 40, 0, short),
        ([1], 0, short),
    ):
        taken, logits = prefixes.match_prefix(wanted)
        assert taken.length == length and logits is None
        assert torch.equal(contents(pool, taken), source[:, :, :length])
        assert pool.free_pages == free and prefixes.tokens([taken]) == 350  # shared pages count once
        append(pool, [taken], [1])  # into a page of its own
        pool.free(taken)
    again, _ = prefixes.match_prefix([1] * 100 + [2] * 200)
    assert torch.equal(contents(pool, again), long[:, :, :299])


def test_logits_come_back_for_the_very_prompt_they_followed_alone(new_pool):
    pool = new_pool()
    prefixes, logits = PrefixCache(pool, 8), torch.randn(9)
    kept(pool, prefixes, [1, 2, 3, 4, 5], prompt=3, logits=logits)
    taken, found = prefixes.match_prefix([1, 2, 3])
    assert taken.length == 3 and torch.equal(found, logits)
    found.zero_()
    assert torch.equal(prefixes.match_prefix([1, 2, 3])[1], logits)
    for other in ([1, 2], [1, 2, 3, 4], [1, 2, 4]):
        taken, found = prefixes.match_prefix(other)
        assert found is None and taken.length < len(other)


def test_the_least_recently_used_goes_first_when_the_budget_is_full(new_pool):
    prefixes = PrefixCache(pool := new_pool(), 3)
    for first in (1, 2, 3):
        kept(pool, prefixes, [first] * 10)
    pool.free(prefixes.match_prefix([1] * 5)[0])
    kept(pool, prefixes, [4] * 10)
    assert lengths_of(prefixes, *([first] * 11 for first in (1, 2, 3, 4))) == [10, 0, 10, 10]
    kept(pool, prefixes, [5] * 300)
    assert lengths_of(prefixes, *([first] * 301 for first in (1, 3, 4, 5))) == [0, 0, 0, 300]
    kept(pool, prefixes, [6] * 400)  # more than the budget
    assert prefixes.pages == 0


def test_equal_ids_are_kept_once_and_sequences_are_few(new_pool):
    prefixes = PrefixCache(pool := new_pool(), 1000)
    for _ in range(5):
        kept(pool, prefixes, [1] * 10)
    assert prefixes.pages == 1
    for i in range(MAX_ENTRIES + 5):
        kept(pool, prefixes, [i + 2] * 3)
    assert prefixes.pages == MAX_ENTRIES
    prefixes.clear()
    assert pool.free_pages == pool.pages


def test_live_sequences_get_the_pages_that_are_kept(new_pool):
    pool = new_pool(limit=4)
    prefixes = PrefixCache(pool, 4)
    kept(pool, prefixes, [1] * 200)
    kept(pool, prefixes, [2] * 200)
    taken, _ = prefixes.match_prefix([1] * 201)
    (new,) = append(pool, [taken], [250])  # the others' pages, and its own which it then need not copy
    assert torch.equal(contents(pool, taken)[:, :, 200:], new) and len(taken.pages) == 4
    with pytest.raises(CacheError, match="the KV cache is full"):
        append(pool, [taken], [100])
    assert prefixes.pages == 0


def test_a_pool_without_a_limit_grows_to_the_budget_before_anything_is_given_up(new_pool):
    prefixes = PrefixCache(pool := new_pool(), 8)
    for first in range(20):
        kept(pool, prefixes, [first] * 100)
    assert prefixes.pages == pool.pages == 8
    block_tables = [pool.new() for _ in range(10)]
    append(pool, block_tables, [100] * 10)  # live ones may go beyond
    assert prefixes.pages == 0 and pool.pages >= 10


def test_with_a_budget_of_nothing_nothing_is_kept(new_pool):
    prefixes = PrefixCache(pool := new_pool(), 0)
    kept(pool, prefixes, [1] * 10)
    assert pool.free_pages == pool.pages and lengths_of(prefixes, [1] * 11) == [0]


def test_a_pool_and_its_kept_sequences_go_without_the_garbage_collector(new_pool):
    prefixes = PrefixCache(pool := new_pool(), 4)
    kept(pool, prefixes, [1] * 10)
    gone = weakref.ref(pool)
    gc.disable()
    try:
        del pool, prefixes
        assert gone() is None
    finally:
        gc.enable()


# Through a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("model"), use_parallel_residual=False)[0]


def nan_pool(model, dtype=None):
    config = model.config
    dtype = dtype or model.new_pool().dtype
    return NanPool(config.num_attention_heads, config.head_dim, dtype, [CPU] * config.num_hidden_layers)


@pytest.mark.parametrize("dtype", STORED, ids=lambda dtype: dtype_name(dtype))
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_random_steps_of_sequences_match_uncached_logits(model, backend, dtype, monkeypatch):
    """Split, rewind, branch, free, keep, take up again, in batches of 1-8: every token's logits are those of the whole."""
    if (reason := dispatch.load(backend).why_not(CPU)) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(model, "ops", dispatch.load(backend).bind(True))
    choice, pool = random.Random(0), nan_pool(model, dtype)
    prefixes = PrefixCache(pool, 12)
    texts, known = {pool.new(): []}, [[1, 2, 3]]
    context, worst, seen = TINY["max_position_embeddings"], 0.0, Counter()

    def rewind(block_table, length):
        del texts[block_table][length:]
        pool.truncate(block_table, length)

    for _ in range(times(200)):
        for block_table in list(texts):
            doing = choice.choices(["rewind", "fork", "free", "keep", "stay"], [3, 3, 1, 2, 11])[0]
            if doing == "rewind":
                rewind(block_table, choice.randint(0, block_table.length))
            elif doing == "fork" and len(texts) < 8:
                texts[pool.fork(block_table)] = list(texts[block_table])
            elif doing == "free" and len(texts) > 1:
                pool.free(block_table)
                del texts[block_table]
            elif doing == "keep" and len(texts) > 1:
                known.append(texts.pop(block_table))
                prefixes.insert(torch.tensor(known[-1], dtype=torch.long), block_table)
            seen[doing] += 1
        if choice.random() < 0.5 and len(texts) < 8:
            start = choice.choice(known[-8:])
            wanted = [*start[: choice.randint(0, len(start))], choice.randint(1, 130)]
            taken, _ = prefixes.match_prefix(wanted)
            texts[taken] = wanted[: taken.length]
            seen["taken"] += taken.length > 0
        rows = choice.sample(list(texts), choice.randint(1, len(texts)))
        for row in rows:
            if row.length > context - 100:
                rewind(row, choice.randint(0, 150))
        counts = [choice.choice([1, 1, 1, 2, 5, choice.randint(1, 100)]) for _ in rows]
        new = [random_ids(1, n, seed=choice.randrange(2**31))[0].tolist() for n in counts]
        logits = model.step(pool, rows, new, every=True).split(counts)
        for row, ids in zip(rows, new, strict=True):
            texts[row] += ids
        check = choice.randrange(len(rows))  # one row of each step: an uncached pass costs more than the step
        fresh = PagePool(2, 32, dtype, [CPU] * 2)
        whole = model.step(fresh, [fresh.new()], [texts[rows[check]]], every=True)
        worst = max(worst, difference(logits[check], whole[-counts[check] :]))
        assert prefixes.pages <= 12
    assert worst < STORED[dtype], worst
    assert min(seen[name] for name in ("rewind", "fork", "free", "keep", "taken")) > 20, seen
    for block_table in texts:
        pool.free(block_table)
    prefixes.clear()
    assert pool.free_pages == pool.pages


@pytest.mark.parametrize("kv", ROUNDING)
def test_random_splits_of_padded_batches_match_uncached_logits(model, kv, monkeypatch):
    monkeypatch.setattr(model, "kv", kv)
    choice, worst = random.Random(1), 0.0
    for _ in range(times(40)):
        rows, width = choice.randint(1, 8), choice.randint(2, 200)
        ids = random_ids(rows, width, seed=choice.randrange(2**31))
        mask = torch.ones_like(ids)
        for row in mask:
            row[: choice.randint(0, width // 2)] = 0
            row[width - choice.randint(0, width // 3) :] = 0
        whole = model(ids, attention_mask=mask).logits
        cache = KVCache(nan_pool(model), rows)
        while (done := cache.get_seq_length()) < width:
            stop = min(width, done + choice.choice([1, 2, 17, 130]))
            part = model(ids[:, done:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits
            worst = max(worst, difference(part, whole[:, done:stop]))
            if choice.random() < 0.2:
                cache.crop(choice.randint(0, stop))
        cache.free()
        assert cache.pool.free_pages == cache.pool.pages
    assert worst < ROUNDING[kv]


def test_an_int8_cache_costs_the_demo_model_little():
    plain, small = (GPTNeoXForCausalLM.from_pretrained(DEMO, kv=kv) for kv in (None, "int8"))
    assert (plain.new_pool().dtype, small.new_pool().dtype) == (torch.float16, torch.int8)
    windows = cut(plain, (DEMO / "heldout.txt").read_text(encoding="utf-8"), 256)[:8]
    quality = quality_of(plain, small, windows, "int8 cache")
    # Measured over 40 windows: 5.2e-5 nats a token, where int8 weights cost 3e-5; a quarter of that would not be int8.
    assert 1e-5 < quality.kl < 2e-4 and quality.top1 > 0.98
    int4 = GPTNeoXForCausalLM.from_pretrained(DEMO, quantization="int4", exact=True)
    assert quality.kl < quality_of(plain, int4, windows, "int4 weights").kl / 50  # measured over 90 windows: 1/134
    ids = plain.tokenizer("KING RICHARD III:\n", return_tensors="pt").input_ids
    out = small.generate(ids, max_new_tokens=20)
    logits = plain(out).logits[0, ids.shape[1] - 1 : -1]
    chosen = logits.gather(1, out[0, ids.shape[1] :, None])[:, 0]
    assert float((logits.amax(1) - chosen).max()) < 0.1  # another token only where the best two are about equal


def test_what_is_no_cache_is_refused():
    model, kinds = GPTNeoXForCausalLM.from_pretrained(DEMO), r"kv is .*, expected 'fp16' or 'int8'"
    for kv in ("int4", "fp8", 8, ["int8"]):
        with pytest.raises(ArgumentError, match=kinds):
            GPTNeoXForCausalLM.from_pretrained(DEMO, kv=kv)
        with pytest.raises(ArgumentError, match=kinds):
            model.kv = kv
    for count in (-1, 0, True, 2.0, "8"):
        with pytest.raises(ArgumentError, match=r"cache_pages is .*, expected a number of pages"):
            model.cache_pages = count
    assert model.kv == "fp16" and model.cache_pages is None
