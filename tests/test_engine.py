"""What the engine promises: every client gets its own text, in its turn; cancelled, failing and idle ones leave nothing behind.

The bundled demo model runs; where a pass must wait, fail or be looked at, its `step` is wrapped. Nothing depends on time.
"""

import asyncio
import gc
import itertools
import random
import threading
import time
import weakref
from collections import Counter
from contextlib import closing, contextmanager

import pytest
import torch

from neox_lite import GPTNeoXForCausalLM
from neox_lite.cache import PagePool
from neox_lite.errors import ArgumentError, CacheError, ContextLengthError, UnsupportedError
from neox_lite.generation.request import Sequence
from neox_lite.kernels import dispatch
from neox_lite_app.paths import DEMO
from neox_lite_app.serving.engine import Busy, Engine, NotLoaded, sentence
from neox_lite_app.serving.jobs import Job, Ticket, Update

SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95}
PATIENCE_S = 60  # a test that waits so long has failed
CANCELLED = Update("", None, "cancelled")


def load():
    return GPTNeoXForCausalLM.from_pretrained(DEMO)


@contextmanager
def running(load=load, **options):
    """An engine with the demo model."""
    with closing(Engine(**options)) as engine:
        engine.load("demo", load)
        yield engine


@pytest.fixture(scope="module")
def shared():
    """An engine whose model no test harms."""
    with running() as engine:
        yield engine


@pytest.fixture
def engine():
    """An engine with the demo model for one test."""
    with running(sequences=4, waiting=8) as engine:
        yield engine


@pytest.fixture
def empty():
    with closing(Engine()) as engine:
        yield engine


@pytest.fixture
def exact():
    """Loads the demo in float32, so that its tokens do not depend on what else runs."""
    model = GPTNeoXForCausalLM.from_pretrained(DEMO, exact=True).float()
    return lambda: model


def text_of(ticket):
    return "".join(update.text for update in ticket)


def last(ticket):
    return list(ticket)[-1]


def ids_of(engine, text):
    return engine.tokenizer(text).input_ids


def wait_until(condition):
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.001)


def pages_in_use(engine):
    """By rows at work: those that kept prefixes hold are not counted."""
    prefixes = engine._model._cache_holder.prefixes
    return prefixes.pool.pages - prefixes.pool.free_pages - prefixes.pages


@contextmanager
def gate(model):
    """Passes wait until the gate lets them: yields a semaphore, one release for each, and what passes that came there take."""
    passes, sizes, step = threading.Semaphore(0), [], model.step

    def waiting(pool, block_tables, tokens, **options):
        sizes.append([len(t) for t in tokens])
        passes.acquire(timeout=PATIENCE_S)
        return step(pool, block_tables, tokens, **options)

    model.step = waiting
    try:
        yield passes, sizes
    finally:
        passes.release(100_000)
        del model.step


# Answers --------------------------------------------------------------------------------------------------------------


def test_a_job_gives_the_events_of_stream(shared):
    prompt, options = ids_of(shared, "KING RICHARD III:\n"), {"max_new_tokens": 40, "seed": 5, **SAMPLED}
    for more in ({}, {"stop_strings": ["lord", "\n\n"]}, {"eos_token_id": 7}, {"max_new_tokens": 0}):
        updates = shared.submit(Job(prompt, options | more))
        events = shared._model.stream(prompt, **options | more)
        found, expected = ([(e.text, e.token, e.finish_reason) for e in one] for one in (updates, events))
        assert found == expected


def test_without_a_length_a_job_goes_to_the_end_of_the_context(shared):
    updates = list(shared.submit(Job([5] * (shared.context - 9), {"eos_token_id": []})))
    assert len(updates) == 9 and updates[-1].finish_reason == "length"
    with pytest.raises(ContextLengthError, match=f"maximum context length is {shared.context} tokens"):
        shared.submit(Job([5] * shared.context))


def test_jobs_of_one_seed_and_other_streams_are_the_samples_of_generate(shared):
    prompt, options = ids_of(shared, "ROMEO:\n"), {"max_new_tokens": 20, "seed": 9, "eos_token_id": [], **SAMPLED}
    tickets = [shared.submit(Job(prompt, options, stream=i)) for i in range(3)]
    found = [[step.token for step in ticket] for ticket in tickets]
    expected = shared._model.generate(torch.tensor([prompt]), num_return_sequences=3, **options)[:, len(prompt) :]
    assert found == expected.tolist()


def test_an_empty_prompt_starts_with_bos(shared):
    options = {"max_new_tokens": 5}
    assert list(shared.submit(Job([], options))) == list(shared.submit(Job([0], options)))


def test_scores_are_the_models_own_log_probabilities(shared):
    prompt = ids_of(shared, "JULIET:\nO Romeo, Romeo")
    options = {"max_new_tokens": 6, "repetition_penalty": 5.0, "eos_token_id": []}
    ticket = shared.submit(Job(prompt, options, logprobs=3, prompt_logprobs=2))
    steps = list(ticket)
    ids = prompt + [step.token for step in steps]
    logs = shared._model(torch.tensor([ids])).logits[0].log_softmax(-1)
    logprobs = [*ticket.prompt_logprobs, *(step.logprob for step in steps)]
    assert logprobs[0] == (None, ()) and len(logprobs) == len(ids)
    for i, score in enumerate(logprobs[1:]):
        assert score.logprob == pytest.approx(float(logs[i, ids[i + 1]]), abs=0.05)  # activations of 8 bits
        assert len(score.top) == (2 if i + 1 < len(prompt) else 3)
    spoilt = shared.submit(Job(prompt, options | {"logits_processor": lambda ids, logits: logits.zero_()}, logprobs=3))
    assert next(iter(spoilt)).logprob.top == steps[0].logprob.top  # whatever is done to the logits afterwards
    plain = list(shared.submit(Job(prompt, options)))
    assert [s.token for s in plain] == [s.token for s in steps] and {s.logprob for s in plain} == {None}
    echo = shared.submit(Job(prompt, {"max_new_tokens": 0}, prompt_logprobs=0))
    assert [(s.token, s.finish_reason) for s in echo] == [(None, "length")]
    assert len(echo.prompt_logprobs) == len(prompt) and {score.top for score in echo.prompt_logprobs} == {()}


def test_a_ticket_says_what_was_reused_and_when_steps_came(shared):
    prompt = ids_of(shared, "A prompt of its own, that nobody else has: 4711.")
    first = shared.submit(Job(prompt, {"max_new_tokens": 5}))
    assert len(list(first)) <= 5 and list(first) == []  # read once
    second = shared.submit(Job([*prompt, 9], {"max_new_tokens": 5}))
    list(second)
    assert first.reused_tokens < len(prompt) <= second.reused_tokens
    for ticket in (first, second):
        assert ticket.clock.start_s <= ticket.clock.first_s <= ticket.clock.last_s <= time.monotonic()


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        (Job([5, 10**6]), ArgumentError, "input_ids: found 1000000"),
        (Job([5, -1]), ArgumentError, "input_ids: found -1"),
        (Job([5.0]), ArgumentError, "expected a list of integers"),
        (Job("text"), ArgumentError, "expected a list of integers"),
        (Job([5], {"temprature": 1}), ArgumentError, "nearest is 'temperature'"),
        (Job([5], {"do_sample": True, "top_p": 3}), ArgumentError, "top_p is 3.0, expected 0.0 to 1.0"),
        (Job([5], {"num_beams": 3}), UnsupportedError, "num_beams"),
        (Job([5], {"num_return_sequences": 2}), ArgumentError, "num_return_sequences is not offered here"),
        (Job([5], {"prompt_lookup_num_tokens": 1}), ArgumentError, "prompt_lookup_num_tokens is not offered here"),
        (Job([5], {"logit_bias": {"9999": 1}}), ArgumentError, "logit_bias: found 9999, expected 0 to 1535"),
        (Job([5], {"logit_bias": {"a": 1}}), ArgumentError, "logit_bias: found 'a': 1"),
        (Job([5], {"logit_bias": [5]}), ArgumentError, r"logit_bias is \[5\]"),
        (Job([5], {"max_new_tokens": 600}), ContextLengthError, "600 new ones"),
        (Job([5], logprobs=-1), ArgumentError, "logprobs is -1"),
        (Job([5], prompt_logprobs=9999), ArgumentError, "prompt_logprobs is 9999"),
    ],
    ids=str,
)
def test_a_job_that_makes_no_sense_is_refused_at_once(shared, job, error, message):
    with pytest.raises(error, match=message):
        shared.submit(job)


# Many at a time -------------------------------------------------------------------------------------------------------


def test_64_clients_with_a_sentinel_each_get_their_own_text_and_no_one_elses(exact):
    """Each asks for its own texts, by threads and by an event loop, some leaving early; the tokens are those it gets alone."""
    found, model = {i: [] for i in range(64)}, exact()
    with running(exact) as engine:
        jobs = {i: [job_of(engine, i, turn) for turn in range(2)] for i in found}
        alone = {i: [text_of(model.stream(job.prompt, **job.options)) for job in own] for i, own in jobs.items()}
        model.forget()

        def threaded(i):
            found[i] += [text_of(engine.submit(job)) for job in jobs[i]]

        async def looped(i):
            for job in jobs[i]:
                ticket, pieces = engine.submit(job), []
                async for update in ticket:
                    pieces.append(update.text)
                    if i % 8 == 1 and len(pieces) == 5:
                        ticket.cancel()
                found[i].append("".join(pieces))

        async def loop():
            await asyncio.gather(*(looped(i) for i in range(1, 64, 2)))

        threads = [threading.Thread(target=threaded, args=(i,)) for i in range(0, 64, 2)]
        threads.append(threading.Thread(target=asyncio.run, args=(loop(),)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in jobs:
            for text, expected in zip(found[i], alone[i], strict=True):
                assert expected.startswith(text) if i % 8 == 1 else text == expected
        assert len(set(map(tuple, found.values()))) > 60  # else a wrong one might go unnoticed
        assert engine.status().active == engine.status().waiting == pages_in_use(engine) == 0


def job_of(engine, i, turn):
    sampled = {"seed": 100 * i + turn, "frequency_penalty": 0.1 * (i % 3), **SAMPLED} if i % 4 else {}
    return Job(ids_of(engine, f"{i} is the number {i}:"), {"max_new_tokens": 12 + i % 7, **sampled})


def test_500_cancels_in_mid_stream_free_their_pages_within_one_pass(shared):
    choice, count = random.Random(0), Counter()
    for round in range(10):
        tickets = [shared.submit(Job([5 + i, round], {"seed": i, **SAMPLED}, client=str(i))) for i in range(50)]
        for ticket in choice.sample(tickets, 25):  # those that are answered, and some still waiting
            next(iter(ticket))
        for ticket in tickets * 2:
            ticket.cancel()
        count.update(last(ticket).finish_reason for ticket in tickets)
        wait_until(lambda: not shared._serving)
        assert pages_in_use(shared) == 0
    assert count["cancelled"] + count["stop"] + count["length"] == 500 and count["cancelled"] > 450
    assert not shared._running and not shared._cancelled and not len(shared._queue)


def test_a_cancelled_job_ends_at_the_next_pass_and_others_go_on(engine):
    with gate(engine._model) as (allow, sizes):
        first, second = (engine.submit(Job([9, i], {"eos_token_id": []})) for i in range(2))
        allow.release(3)
        wait_until(lambda: len(sizes) == 4)
        first.cancel()
        allow.release(1)  # the pass that has begun
        updates = list(first)
        assert len(updates) == 5 and updates[-1] == CANCELLED
        allow.release(2)
        wait_until(lambda: len(sizes) == 7)
        assert [len(lengths) for lengths in sizes[2:]] == [2, 2, 1, 1, 1]
        second.cancel()
        allow.release(1)
        assert last(second) == CANCELLED


def test_a_job_that_waits_is_cancelled_without_a_pass():
    with running(sequences=1, waiting=5) as engine, gate(engine._model) as (allow, sizes):
        first, waiting = (engine.submit(Job([9, i], {"max_new_tokens": 3})) for i in range(2))
        waiting.cancel()
        assert list(waiting) == [CANCELLED] and len(sizes) <= 1
        allow.release(100)
        assert last(first).finish_reason in ("length", "stop")


def test_clients_take_turns_and_a_client_is_served_in_its_order():
    clients = ["first", *["busy"] * 5, "a", "b", "a"]
    with running(sequences=1, waiting=50) as engine, gate(engine._model) as (allow, _):
        tickets = [engine.submit(Job([9, i], {"max_new_tokens": 1}, client)) for i, client in enumerate(clients)]
        wait_until(lambda: engine.status().active == 1)
        allow.release(100)
        for ticket in tickets:
            list(ticket)
    order = sorted(range(len(clients)), key=lambda i: tickets[i].clock.first_s)
    assert [clients[i] for i in order] == ["first", "busy", "a", "b", "busy", "a", "busy", "busy", "busy"]
    assert [i for i in order if clients[i] == "busy"] == [1, 2, 3, 4, 5]


def test_beyond_the_bound_the_queue_refuses_and_takes_jobs_again_when_there_is_room(engine):
    with gate(engine._model) as (allow, _):
        tickets = [engine.submit(Job([9, i], {"max_new_tokens": 50, "eos_token_id": []})) for i in range(12)]
        with pytest.raises(Busy, match="12 jobs are running or waiting"):
            engine.submit(Job([9]))
        allow.release(1)
        wait_until(lambda: engine.status().active == 4)
        assert engine.status().waiting == 8
        tickets[-1].cancel()
        tickets[-1] = engine.submit(Job([9, 99], {"max_new_tokens": 2, "eos_token_id": []}))
        allow.release(1000)
        assert {last(ticket).finish_reason for ticket in tickets} == {"length"}


def test_a_chat_goes_on_while_a_long_prompt_is_read(shared):
    with gate(shared._model) as (allow, sizes):
        chat = shared.submit(Job([9], {"max_new_tokens": 100, "eos_token_id": []}))
        allow.release(3)
        wait_until(lambda: len(sizes) == 4)
        long = shared.submit(Job([7] * 400, {"max_new_tokens": 1}))
        shared._prefill_budget.tokens = 64
        allow.release(1000)
        list(long), chat.cancel()
        read = [lengths for lengths in sizes if len(lengths) == 2]
        assert len(read) > 1 and all(lengths[0] == 1 for lengths in read)
        assert sum(lengths[1] for lengths in read) == 400 - long.reused_tokens


def test_status_says_what_runs_and_what_is_in_memory(shared):
    with gate(shared._model) as (allow, sizes):
        tickets = [shared.submit(Job([9, i] * 50, {"eos_token_id": []})) for i in range(3)]
        allow.release(5)
        wait_until(lambda: len(sizes) == 6)
        status = shared.status()
        assert (status.state, status.name, status.active, status.waiting) == ("ready", "demo", 3, 0)
        assert status.fault is None and status.tokens_per_s > 0
        assert status.memory["weights_cpu"] == shared._model.get_memory_footprint()
        assert status.memory["cache_cpu"] == shared._model._cache_holder.prefixes.pool.nbytes
        assert status.memory["process"] > status.memory["weights_cpu"]
        for ticket in tickets:
            ticket.cancel()
        allow.release(5)
    for ticket in tickets:
        list(ticket)
    wait_until(lambda: shared.status().active == 0 and shared.status().cached_tokens >= 300)


# Loading and idling ---------------------------------------------------------------------------------------------------


def test_without_a_model_everything_says_so(empty):
    status = empty.status()
    assert (status.state, status.name, status.active, status.tokens_per_s) == ("empty", None, 0, 0.0)
    with pytest.raises(NotLoaded, match="no model is loaded; choose one"):
        empty.submit(Job([5]))
    for name in ("tokenizer", "config", "generation_config", "context"):
        with pytest.raises(NotLoaded, match="no model is loaded; choose one"):
            getattr(empty, name)


def test_a_load_that_fails_leaves_nothing_and_says_why(engine):
    ticket = engine.submit(Job([9], {"eos_token_id": []}))

    def fail():
        assert engine.status().state == "loading" and engine.status().name == "other"
        with pytest.raises(NotLoaded, match="other is being loaded"):
            engine.submit(Job([5]))
        raise ArgumentError("other: no such folder")

    with pytest.raises(ArgumentError, match="other: no such folder"):
        engine.load("other", fail)
    assert last(ticket) == CANCELLED
    status = engine.status()
    assert (status.state, status.name, status.fault) == ("failed", None, "other: no such folder")
    with pytest.raises(NotLoaded, match=r"no model is loaded \(other: no such folder\)"):
        engine.submit(Job([5]))
    engine.load("demo", load)
    assert engine.status().state == "ready" and engine.status().fault is None
    assert last(engine.submit(Job([9], {"max_new_tokens": 3}))).error is None


def test_another_model_takes_the_place_of_the_first_whose_memory_is_given_back(engine):
    tickets = [engine.submit(Job([9, i], {"eos_token_id": []})) for i in range(10)]
    next(iter(tickets[0]))
    model, pool = weakref.ref(engine._model), weakref.ref(engine._model._cache_holder.prefixes.pool)

    def second():
        assert model() is None and pool() is None  # before there are two
        return load()

    engine.load("again", second)
    assert {last(ticket).finish_reason for ticket in tickets} == {"cancelled"}
    assert engine.name == "again"
    engine.unload()
    assert engine.status().state == "empty" and "weights_cpu" not in engine.status().memory
    with pytest.raises(NotLoaded):
        engine.submit(Job([5]))


def test_an_idle_model_is_unloaded_and_comes_back_with_the_next_job():
    with running(idle_s=0.02) as engine:
        model = weakref.ref(engine._model)
        job = Job(ids_of(engine, "ROMEO:"), {"max_new_tokens": 10, "seed": 1, **SAMPLED})
        expected = text_of(engine.submit(job))
        for _ in range(2):
            wait_until(lambda: engine.status().state == "idle")
            assert model() is None
            status = engine.status()
            assert status.name == "demo" and status.cached_tokens == 0 and "weights_cpu" not in status.memory
            assert engine.tokenizer and engine.config and engine.context == 512 and engine.generation_config
            assert text_of(engine.submit(job)) == expected


def test_a_model_that_cannot_come_back_says_so_and_is_tried_again():
    fails = []

    def sometimes():
        if fails:
            raise MemoryError
        return load()

    with running(sometimes, idle_s=0.02) as engine:
        wait_until(lambda: engine.status().state == "idle")
        fails.append(True)
        (update,) = engine.submit(Job([5]))
        assert update.finish_reason == "error" and update.error.startswith("memory ran out")
        wait_until(lambda: engine.status().state == "failed")
        assert engine.status().fault == update.error
        fails.clear()
        assert last(engine.submit(Job([5], {"max_new_tokens": 2}))).error is None
        assert engine.status().fault is None


def test_a_closed_engine_has_ended_everything(engine):
    tickets = [engine.submit(Job([9, i], {"eos_token_id": []})) for i in range(5)]
    next(iter(tickets[0]))
    engine.close()
    engine.close()
    assert {last(ticket).finish_reason for ticket in tickets} == {"cancelled"}
    assert not engine._thread.is_alive()
    with pytest.raises(NotLoaded):
        engine.submit(Job([5]))
    with pytest.raises(NotLoaded, match="closed"):
        engine.load("demo", load)


def test_the_listener_of_a_closed_loop_harms_nobody(shared):
    async def listen():
        ticket = shared.submit(Job([9], {"eos_token_id": []}))
        async for _ in ticket:
            return ticket
        raise AssertionError

    ticket = asyncio.run(listen())
    assert last(shared.submit(Job([9, 8], {"max_new_tokens": 3}))).error is None
    ticket.cancel()
    assert last(ticket).finish_reason == "cancelled"


# Faults ---------------------------------------------------------------------------------------------------------------

ERRORS = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
]


OPERATIONS = ["layer_norms", "grouped_linear", "attention", "linear_residual"]  # once in each of the demo's four layers


@pytest.mark.parametrize(
    ("name", "layer"), [("embed", None), *((name, layer) for name in OPERATIONS for layer in (0, 1, 3)), ("head", None)]
)
def test_memory_that_runs_out_anywhere_ends_the_jobs_and_the_next_one_works(exact, name, layer, monkeypatch):
    """At each operation, while a prompt is read and while rows are answered."""
    exact().ops = ops = dispatch.load("reference").bind(True)  # whose operations are Python's to fail
    real, wanted = getattr(ops, name), {"max_new_tokens": 5, "eos_token_id": []}
    with running(exact) as engine:
        prompt = ids_of(engine, "ROMEO:")
        expected = text_of(engine.submit(Job(prompt, wanted)))
        for fails_in, error in zip((0, 2, 3), ERRORS, strict=True):  # passes, of which the first reads the prompt
            calls = itertools.count()

            def failing(
                *given, calls=calls, error=error, at=fails_in if layer is None else 4 * fails_in + layer, **named
            ):
                if next(calls) == at:
                    raise error
                return real(*given, **named)

            monkeypatch.setattr(ops, name, failing)
            with engine._changed:  # both come before the thread looks
                tickets = [engine.submit(Job([*prompt, i], wanted)) for i in range(2)]
            ends = [last(ticket) for ticket in tickets]
            assert "error" in {end.finish_reason for end in ends}
            assert {end.error for end in ends} <= {None, sentence(error)}
            monkeypatch.setattr(ops, name, real)
            wait_until(lambda: not engine._serving)
            assert engine._model._cache_holder is None  # the pool is gone, and with it all pages
            assert text_of(engine.submit(Job(prompt, wanted))) == expected
            assert engine.status().fault is None and engine.status().state == "ready"


def raising(error):
    def fail(*given, **named):
        raise error

    return fail


def test_an_error_that_ends_a_pass_is_reported_as_a_fault_until_a_job_ends_well(engine, monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nsecond line")
    monkeypatch.setattr(engine._model, "step", raising(error))
    tickets = [engine.submit(Job([9, i])) for i in range(3)]
    ends = [last(ticket) for ticket in tickets]
    assert {end.finish_reason for end in ends} == {"error"}
    assert {ticket._sequence.error for ticket in tickets} == {None}  # its traceback would hold on to tensors
    assert "the engine failed with RuntimeError: CUDA error: an illegal memory access" in ends[0].error
    assert engine.status().fault == ends[0].error
    monkeypatch.undo()
    assert last(engine.submit(Job([9], {"max_new_tokens": 3}))).error is None
    assert engine.status().fault is None


def test_a_fault_of_the_engine_itself_ends_all_jobs_and_it_goes_on(engine, monkeypatch):
    monkeypatch.setattr(Engine, "_count", raising(KeyError("a bug")))
    tickets = [engine.submit(Job([9, i], {"eos_token_id": []})) for i in range(8)]
    ends = [last(ticket) for ticket in tickets]
    assert {end.finish_reason for end in ends} == {"error"} and "KeyError" in ends[0].error
    wait_until(lambda: not engine._serving)
    assert engine._model._cache_holder is None  # who knows what state it was in
    tickets[0].cancel()
    monkeypatch.undo()
    assert last(engine.submit(Job([9], {"max_new_tokens": 3}))).error is None


def test_a_job_that_does_not_fit_into_the_cache_ends_and_the_others_share_it():
    def small():
        model = load()
        model.cache_pages = 3
        return model

    with running(small) as engine:
        tickets = [engine.submit(Job([9, i] * 60, {"max_new_tokens": 100, "eos_token_id": []})) for i in range(6)]
        tickets.append(engine.submit(Job([7] * 450, {"max_new_tokens": 2})))
        ends = [last(ticket) for ticket in tickets]
        assert [end.finish_reason for end in ends] == ["length"] * 6 + ["error"]
        assert ends[-1].error.startswith("the KV cache is full: 3 pages")
        wait_until(lambda: not engine._serving)
        assert engine.status().fault is None and pages_in_use(engine) == 0


def test_sentences_are_one_line_and_name_what_failed():
    assert sentence(CacheError("a  b\nc")) == "a b c"
    assert all(sentence(error).startswith("memory ran out") for error in ERRORS)
    assert sentence(KeyError()).startswith("the engine failed with KeyError: no word")


def test_memory_returns_to_where_it_was(shared):
    """500 jobs of all kinds later, nothing more refers to rows, tickets or pools."""

    def count():
        gc.collect()
        return Counter(type(thing) for thing in gc.get_objects() if type(thing) in (Sequence, Ticket, PagePool))

    choice, wanted = random.Random(1), {"max_new_tokens": 4}
    list(shared.submit(Job([5], wanted)))
    wait_until(lambda: not shared._serving)
    shared._model._cache_holder.prefixes.clear()
    before = count()
    for _ in range(10):
        tickets = [shared.submit(Job([choice.randint(5, 99)] * choice.randint(1, 40), wanted)) for _ in range(50)]
        for ticket in tickets:
            if choice.random() < 0.3:
                ticket.cancel()
            list(ticket)
    del tickets, ticket
    wait_until(lambda: not shared._serving)
    shared._model._cache_holder.prefixes.clear()
    assert count() <= before
