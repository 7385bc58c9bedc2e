"""Decode steps as graphs, without a GPU: what is captured can be repeated, and what is replayed gives the tokens of launches.

`SimulatedGraphs` stands in for the device; everything else is what runs on one. Kernels run in Triton's interpreter (slow, so
models are tiny); where only launches are looked at, nothing runs at all.
"""

import random
from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from support.models import INT4, INT8, MODELS, NF4, SMALL, tiny_model
from support.simulated_graphs import NotCapturable, SimulatedGraphs

from neox_lite.cache import Batch
from neox_lite.errors import NeoxLiteError
from neox_lite.formats import DENSE
from neox_lite.generation.options import Options
from neox_lite.generation.request import Sequence
from neox_lite.generation.sampling import Sampling, exclude, sample_token
from neox_lite.kernels import reference, triton
from neox_lite.kernels.backend import DeviceSampling
from neox_lite.kernels.graphs import GraphCache
from neox_lite.kernels.triton import attention, device_calls, embed_and_sample, steps
from neox_lite.kernels.triton.device import DeviceProperties
from neox_lite.kernels.triton.operations import Operations

pytestmark = [pytest.mark.skipif(not triton.interpreted(), reason="a GPU is there: tests/test_gpu.py captures on it")]


AMPERE, TURING = DeviceProperties((8, 0)), DeviceProperties((7, 5))
FORMS = {
    "dense": {},
    "int4": {"format": INT4},
    "sequential int8": {"format": INT8, "use_parallel_residual": False},
    "mixed": {"format": MODELS["mixed"]["format"]},
    "nf4": {"format": NF4},
}


def tiny(format=DENSE, dtype=torch.float32, **config):
    return tiny_model(format, dtype=dtype, scales=dtype, **{**SMALL, **config})


def small(format=INT4):
    """One layer that says something else every time, for tests that run it."""
    return tiny(format, num_hidden_layers=1, max_position_embeddings=512, initializer_range=0.4, seed=1)


def graphed(model, device, machine=AMPERE):
    """A model whose steps are captured on a simulated device."""
    model.ops = Operations(False, lambda _: machine, graphs=device)
    model.graph = True
    return model


def prompt(length, seed=0):
    return torch.randint(0, 67, (1, length), generator=torch.Generator().manual_seed(seed))


def ids(*lengths):
    return [prompt(length, seed)[0].tolist() for seed, length in enumerate(lengths)]


def generate(model, prompts, options):
    """Rows generated together, each with options of its own."""
    rows = [model._sequences([ids], Options.parse(given))[0] for ids, given in zip(prompts, options, strict=True)]
    for _ in model._decode(rows, Options()):
        pass
    return [row.tokens for row in rows]


# Equal tokens ---------------------------------------------------------------------------------------------------------

GREEDY = {"max_new_tokens": 4}
SAMPLED = [
    GREEDY,
    {"max_new_tokens": 3, "do_sample": True, "seed": 1, "temperature": 0.7},
    {"max_new_tokens": 4, "do_sample": True, "seed": 2**64 - 1, "top_k": 0, "top_p": 0.8},
    {"max_new_tokens": 3, "do_sample": True, "seed": 3, "top_k": 0, "min_p": 0.1, "temperature": 1.5},
    {"max_new_tokens": 5, "do_sample": True, "seed": 4, "top_k": 20, "top_p": 0.9},
]
GENERATIONS = {
    "one after the other, across a page": (INT4, AMPERE, [[127], [3], [1], [7]], GREEDY),
    "two, of different lengths": (INT4, AMPERE, [[5, 20], [12, 2]], None),
    "three, padded to four": (INT4, AMPERE, [[9, 3, 7]], None),
    "five, padded to eight, on an old card": (INT8, TURING, [[1, 2, 3, 4, 5]], None),
    "four, plain": (DENSE, AMPERE, [[6, 11, 2, 20]], None),
}  # 20 generations


@pytest.mark.parametrize("name", GENERATIONS)
def test_replayed_steps_give_the_tokens_of_steps_launched_one_by_one(name):
    format, machine, batches, options = GENERATIONS[name]
    model, device = small(format), SimulatedGraphs()
    graphed(model, device, machine)
    with device:
        for lengths in batches:
            asked = [options or SAMPLED[i % len(SAMPLED)] for i in range(len(lengths))]
            found = generate(model, ids(*lengths), asked)
            model.graph = False  # what was read of the prompts stays in the cache
            assert found == generate(model, ids(*lengths), asked)
            assert all(len(set(tokens)) > 1 for tokens in found)
            model.graph = True
    assert model.graph_reason is None and device.replays >= 3 * len(batches) and device.behind >= 3


def test_a_step_is_given_before_the_last_one_is_read_and_an_end_found_late_throws_it_away():
    model, device = small(), SimulatedGraphs()
    graphed(model, device)
    with device:
        (expected,) = generate(model, ids(5), [{"max_new_tokens": 7}])
        replays = device.replays
        (found,) = generate(model, ids(5), [{"max_new_tokens": 7, "eos_token_id": expected[3]}])
        assert found == expected[: expected.index(expected[3]) + 1] and len(found) > 1
        assert device.replays - replays == len(found)  # one more than there are tokens after the prompt's
        assert generate(model, [ids(5)[0] + found], [{"max_new_tokens": 2}])[0] == expected[len(found) :][:2]
    pool = model._cache_holder.prefixes.pool
    assert pool.pages - pool.free_pages == model._cache_holder.prefixes.pages


def test_work_is_late_and_host_memory_is_not_written_over_before_it_is_read(monkeypatch):
    """Else none of these tests would see a race."""
    monkeypatch.setattr(
        steps.PendingGraph, "tokens", lambda self: [0] * self._count
    )  # nobody waits for what was before
    model, device = small(), SimulatedGraphs()
    graphed(model, device)
    with device:
        pool = model.new_pool(4)
        model.step(pool, block_tables := [pool.new()], ids(4))
        for token in (1, 2, 3):
            model.launch(pool, block_tables, [token], [DeviceSampling()])
        ids_there = {int(buffer.tables.sampling[0, 0]) for buffer in model.runner.passes._buffers}
    assert device.behind >= 6 and ids_there == {2, 3}  # the first step's id is gone, and its copy has not run yet


def test_a_model_may_leave_inference_mode_between_two_calls():
    model, device = small(), SimulatedGraphs()
    graphed(model, device)
    with device:
        with torch.inference_mode():
            first = generate(model, ids(5), [GREEDY])
        model.forget()
        assert generate(model, ids(5), [GREEDY]) == first and model.graph_reason is None


def test_a_pool_that_grows_is_captured_anew():
    model, device = small(), SimulatedGraphs(dry=True)
    graphed(model, device)
    with device:
        pool = model.new_pool(1)
        block_table = pool.new()
        Batch.reserve(pool, [block_table], [3]).commit()
        for _ in range(2):
            model.launch(pool, [block_table], [1], [DeviceSampling()])
        other = pool.new()
        model.launch(pool, [other], [1], [DeviceSampling()])
        assert pool.pages == 2 and device.captures == 2 and list(model.runner.passes.graphs(pool)) == [(1, 1)]


def test_tokens_of_a_step_that_another_followed_are_found_all_the_same():
    """Two calls share a model: what the device chose last is not what this row's next step asks for."""
    model, device = small(), SimulatedGraphs()
    graphed(model, device)
    prompts = ids(5, 9)
    with device:
        model.graph = False
        expected = [generate(model, [p], [GREEDY])[0] for p in prompts]
        model.graph, model.reuse_prefix = True, False
        rows = [model._sequences([p], Options.parse(GREEDY))[0] for p in prompts]
        calls = [model._decode([row], Options()) for row in rows]
        for _ in range(GREEDY["max_new_tokens"]):
            for call in calls:
                next(call)
    assert [row.tokens for row in rows] == expected


def test_rows_without_a_token_write_nothing():
    model, device = small(), SimulatedGraphs()
    graphed(model, device)
    with device:
        pool = model.new_pool(8)
        block_tables = [pool.new() for _ in range(4)]
        for _ in range(steps.MAX_PENDING):
            model.launch(pool, block_tables, [1, 2, 3, 4], [DeviceSampling()] * 4).tokens()
        pool.free(block_tables.pop())  # its page is still in the tables
        for storage in pool.storage:
            storage[pool._free] = float("nan")
        pending = model.launch(pool, block_tables, [1, 2, 3], [DeviceSampling()] * 3)
        assert len(pending.tokens()) == 3 and list(model.runner.passes.graphs(pool)) == [(4, 1)]
        assert all(bool(storage[pool._free].isnan().all()) for storage in pool.storage)


# Choices --------------------------------------------------------------------------------------------------------------


def test_draws_are_the_host_s_id_for_id():
    """Every filter and several together; ties, ids that do not exist, logits that are NaN or infinite."""
    pick = random.Random(0)
    seen = Counter()
    for _ in range(12):
        vocabulary, rows = pick.choice([5, 67, 300]), 4
        logits = torch.randn(rows, vocabulary) * pick.choice([0.1, 1, 5, 20])
        if pick.random() < 0.4:
            logits = logits.round()
        if pick.random() < 0.3:
            logits[pick.randrange(rows), pick.randrange(vocabulary)] = pick.choice([float("nan"), float("inf")])
        missing = torch.tensor(sorted(pick.sample(range(vocabulary), pick.randrange(vocabulary // 4 + 1))))
        samplings = [
            Sampling(
                pick.random() < 0.9,
                temperature=pick.choice([0.0, 0.3, 1.0, 1.9]),
                top_k=pick.choice([0, 1, 2, 50, 1000]),
                top_p=pick.choice([1.0, 0.9, 0.5, 0.0]),
                min_p=pick.choice([0.0, 0.05, 1.0]),
                seed=pick.randrange(2**64),
            )
            for _ in range(rows)
        ]
        streams, lengths = ([pick.randrange(2**n) for _ in range(rows)] for n in (32, 11))
        found = drawn(logits, missing, samplings, streams, lengths, block=pick.choice([16, 64, 512]))
        for i, sampling in enumerate(samplings):
            history, steps = torch.zeros(lengths[i] + 1), [lambda _, x, missing=missing: exclude(x, missing.long())]
            try:
                expected = sample_token(logits[i], history, streams[i], sampling, steps)
            except NeoxLiteError:
                expected = -1
            assert found[i] == expected, (vocabulary, sampling)
            seen["nothing" if expected < 0 else "greedy" if sampling.greedy else "drawn"] += 1
    assert min(seen[kind] for kind in ("nothing", "greedy", "drawn")) >= 2, seen


def drawn(logits, missing, samplings, streams, starts, block):
    rows, vocabulary = logits.shape
    buffer = steps.StagingBuffer(SimulatedGraphs(), 1)
    batch = Batch(
        tuple(EMPTY for _ in starts), tuple(starts), tuple(range(rows + 1)), *torch.zeros(3, rows, dtype=torch.long)
    )
    asked = [Sequence([0], 1, s, options=Options(sampling)) for s, sampling in zip(streams, samplings, strict=True)]
    buffer.fill(batch, [0] * rows, [row.device_sampling for row in asked], rows)
    tables = steps.Tables.cut(buffer.data, 1)
    excluded = torch.zeros(vocabulary, dtype=torch.int8).index_fill_(0, missing.long(), 1)
    values, listed = torch.full((rows, vocabulary), float("nan")), torch.full((rows, vocabulary), -1, dtype=torch.int32)
    chosen = torch.full((rows,), -2)
    device_calls.launch(
        embed_and_sample.sample,
        (rows,),
        logits,
        excluded,
        tables.sequences,
        3,
        tables.sampling,
        values,
        listed,
        chosen,
        vocabulary,
        block,
    )
    return chosen.tolist()


class EMPTY:
    pages = ()


def test_ids_that_do_not_exist_are_left_out_on_the_device_too():
    model, device = small(), SimulatedGraphs()
    graphed(model, device)
    with device:
        first = generate(model, ids(5), [GREEDY])[0]
        model.forget()
        model.padding_ids = torch.tensor(sorted(set(first)))
        found = generate(model, ids(5), [GREEDY])[0]
        model.graph = False
        model.forget()
        assert found == generate(model, ids(5), [GREEDY])[0] and not set(found) & set(first)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"repetition_penalty": 1.3}, "repetition_penalty is the host's work"),
        ({"do_sample": True, "seed": 1, "typical_p": 0.8}, "typical_p is the host's work"),
        ({"logit_bias": {3: 50.0}}, "logit_bias is the host's work"),
        ({"logits_processor": [lambda ids, logits: logits]}, "logits_processor see the logits"),
        ({"stopping_criteria": [lambda ids, logits: False]}, "stopping_criteria see the logits"),
        ({"min_new_tokens": 3, "eos_token_id": 66}, "the end of the text is held back"),
        ({"scores": 2}, "log-probabilities are asked for"),
    ],
)
def test_a_row_that_needs_the_host_says_why_and_gets_its_tokens_from_a_graph_s_logits(given, reason):
    model, device = small(), SimulatedGraphs()
    graphed(model, device)
    given, scores = dict(given), given.get("scores")
    given.pop("scores", None)

    def run():
        row = Sequence(ids(5)[0], 4, 0, options=Options.parse({**given, "max_new_tokens": 4}), num_logprobs=scores)
        assert row.host_reason() == reason
        for _ in model._decode([row], Options()):
            pass
        return row

    with device:
        found = run()
        assert device.replays == 3 or reason.startswith("the end")  # one for each token after the first, none in vain
        model.graph = False
        assert run().tokens == found.tokens and (scores is None) == (found.logprob is None)


def test_nothing_to_choose_from_ends_the_row_with_the_host_s_error():
    model, device = small(), SimulatedGraphs()
    graphed(model, device)
    (row,) = model._sequences(ids(5), Options.parse(GREEDY))
    with device, pytest.raises(NeoxLiteError, match="no id can be chosen"):
        for _ in model._decode([row], Options()):
            if len(row.tokens) == 2:  # the third is on its way
                model.gpt_neox.final_layer_norm.weight.fill_(float("nan"))
    assert len(row.tokens) == 3


# Nothing but launches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [AMPERE, TURING])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kv", ["fp16", "int8"])
@pytest.mark.parametrize("name", FORMS)
def test_a_step_of_any_bucket_launches_the_same_whatever_is_in_it(name, kv, dtype, machine):
    """Every replay is compared with what the step would launch then: kernels, grids, addresses, numbers."""
    model, device = tiny(dtype=dtype, **FORMS[name]), SimulatedGraphs(dry=True)
    model.kv = kv
    graphed(model, device, machine)
    with device:
        pool = model.new_pool(200)
        for rows, longest in ((1, 1), (2, 100), (3, 150), (9, 120), (33, 60)):
            block_tables = [pool.new() for _ in range(rows)]
            Batch.reserve(pool, block_tables, [longest * (i + 1) // rows for i in range(rows)]).commit()
            pending = None
            for step in range(3):
                given = [-1 - i if pending is not None else step for i in range(rows)]
                pending = model.launch(pool, block_tables, given, [DeviceSampling(seed=step)] * rows, previous=pending)
            for block_table in block_tables:
                pool.free(block_table)
        assert list(model.runner.passes.graphs(pool)) == [(1, 1), (2, 1), (4, 2), (16, 1), (64, 1)]
    assert model.graph_reason is None and device.replays == 15
    if name == "int4":  # one token: embedding, two layers, norm and head, draw
        with device:
            model.launch(pool, [pool.new()], [1], [DeviceSampling()])
            model.runner.passes._cache = GraphCache()
            model.launch(pool, [pool.new()], [1], [DeviceSampling()])
        assert len(device.launches) == 1 + 2 * 4 + 2 + 1


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda x: x[0, 0].item(), "item brings numbers to the host"),
        (lambda x: bool(x.sum() > 0), "neither a launch nor new memory|brings numbers"),
        (lambda x: x[0].tolist(), "tolist brings numbers"),
        (lambda x: x.cpu(), "cpu brings numbers"),
        (lambda x: x.to("cpu"), "to brings numbers"),
        (lambda x: x.nonzero(), "aten.nonzero is neither"),
        (lambda x: f"{x}", "brings numbers"),
        (lambda x: x.add_(0), "aten.add_ is neither"),
        (lambda x: torch.zeros(3), "aten.zeros is neither"),
        (lambda x: torch.empty(next(COUNTER)), "where .* was asked for"),
    ],
)
def test_what_a_graph_cannot_repeat_is_found_and_said_and_launches_one_by_one_go_on(monkeypatch, fault, found):
    model, device = small(), SimulatedGraphs(dry=True)
    attention = Operations.attention

    def with_fault(self, qkv, *given):
        if self._local.step is not None:
            fault(qkv)
        return attention(self, qkv, *given)

    monkeypatch.setattr(Operations, "attention", with_fault)
    graphed(model, device)
    with device:
        pool = model.new_pool(2)
        with pytest.warns(UserWarning, match=f"without CUDA graphs, which is slower: .*({found})"):
            assert model.launch(pool, [pool.new()], [1], [DeviceSampling()]) is None
        assert "could not be captured" in model.graph_reason and not device.replays
        assert model.step(pool, [pool.new()], [[1]]).isfinite().all()


COUNTER = iter(range(1, 1000))


@pytest.mark.parametrize("fault", ["a position as a number", "memory from elsewhere"])
def test_a_launch_that_depends_on_the_step_is_found_when_it_is_replayed(monkeypatch, fault):
    model, device = small(), SimulatedGraphs(dry=True)
    graphed(model, device)
    pool = model.new_pool(2)
    block_tables, others = [pool.new()], torch.empty(4, 4)
    with device:
        launch = device_calls.launch

        def depends(kernel, grid, *arguments, **options):
            if kernel is attention.paged_decode:
                now = block_tables[0].length // 3
                arguments += (now if fault == "a position as a number" else others[now],)
            launch(kernel, grid, *arguments, **options)

        monkeypatch.setattr(device_calls, "launch", depends)
        for _ in range(3):
            model.launch(pool, block_tables, [1], [DeviceSampling()])
        with pytest.raises(NotCapturable, match=r"launch .*paged_decode.* where it was"):
            model.launch(pool, block_tables, [1], [DeviceSampling()])


# Buckets and bounds ---------------------------------------------------------------------------------------------------


def test_buckets_are_the_next_powers_of_two_and_end_with_the_context():
    model, device = tiny(max_position_embeddings=1600), SimulatedGraphs(dry=True)
    graphed(model, device)

    def bucket(*starts):
        return model.runner.passes.bucket(Batch((None,) * len(starts), starts, (), None, None, None))

    assert [bucket(*[0] * n)[0] for n in (1, 2, 3, 4, 5, 8, 9, 33, 64)] == [1, 2, 4, 4, 8, 8, 16, 64, 64]
    places = {0: 1, 127: 1, 128: 2, 255: 2, 256: 4, 511: 4, 512: 8, 1023: 8, 1024: 13, 1599: 13}
    assert {start: bucket(3, start)[1] for start in places} == places  # 1600 positions are 13 pages


def test_more_rows_than_a_graph_takes_run_without_one():
    model, device = tiny(), SimulatedGraphs(dry=True)
    graphed(model, device)
    with device:
        pool = model.new_pool(70)
        block_tables = [pool.new() for _ in range(65)]
        assert (
            model.launch(pool, block_tables, [1] * 65, [DeviceSampling()] * 65) is None and not block_tables[0].length
        )
    assert model.graph_reason is None


def test_graphs_are_bounded_in_number_and_the_least_recently_used_goes():
    model, device = tiny(), SimulatedGraphs(dry=True)
    graphed(model, device)
    model.runner.passes._cache = GraphCache(3)
    with device:
        pool = model.new_pool(40)
        for rows in (1, 2, 4, 1, 8):
            model.launch(pool, [pool.new() for _ in range(rows)], [1] * rows, [DeviceSampling()] * rows)
    assert list(model.runner.passes.graphs(pool)) == [(4, 1), (1, 1), (8, 1)] and device.captures == 4


# When there is none ---------------------------------------------------------------------------------------------------


def test_why_there_are_no_graphs_is_said(tmp_path):
    model = tiny()
    assert "on the CPU" in model.graph_reason
    model.ops = reference
    assert "operation by operation" in model.graph_reason
    model.ops = Operations(False, lambda _: AMPERE)
    assert "interpreter" in model.graph_reason
    model.graph = False
    assert model.graph_reason == "model.graph is off"


def test_layers_outside_the_gpu_are_a_reason():
    from support.simulated_accelerator import SimulatedAccelerator

    from neox_lite.loading.apply import move_parts
    from neox_lite.offload.run import Placement

    model = tiny()
    move_parts(model, Placement(("gpu", "cpu"), "gpu", "gpu"), SimulatedAccelerator())
    assert "layers are outside the GPU" in model.graph_reason


# Weights that move ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [True, False])
def test_a_weight_that_was_replaced_is_read_from_its_new_place(graph):
    """Captured on the simulated device, and by the CPU's own backend."""
    model, device = small(DENSE), SimulatedGraphs()
    if graph:
        graphed(model, device)
    with device:
        pool = model.new_pool(4)
        one, other = pool.new(), pool.new()
        model.step(pool, [one, other], [ids(5)[0]] * 2)
        before = model.step(pool, [one], [[3]])
        held = model.gpt_neox.final_layer_norm.weight.data
        model.gpt_neox.final_layer_norm.weight.data = held * 2 + torch.rand(64)
        after = model.step(pool, [other], [[3]])
        model.ops = reference
        third = pool.new()
        model.step(pool, [third], ids(5))
        expected = model.step(pool, [third], [[3]])
    assert float((after - expected).abs().max()) < 1e-3 < float((before - expected).abs().max())


def test_exact_takes_effect_at_once():
    model = small()
    before = model.runner
    assert not model.ops.exact
    model.exact = True
    assert model.runner is not before and model.ops.exact
    model.exact = True
    assert model.runner.ops.exact
