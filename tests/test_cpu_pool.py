"""The threads that run kernels: every item once, in the order that was asked for, whatever the threads happen to do."""

import faulthandler
import os
import random
import signal
import threading
import time
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from neox_lite.kernels.cpu.code import I64, Code
from neox_lite.kernels.cpu.compile import compiled
from neox_lite.kernels.cpu.pool import NEXT, Task, ThreadPool, _yield_address, task_table
from neox_lite.kernels.cpu.target import host

THREADS = [1, 2, 3, 5]  # more threads than this machine has cores are allowed, and meet in more orders
PATIENCE = 30_000  # looks, a millisecond apart: not a time, which would pass while this process is stopped
HOUR_S = 3600.0
forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture(autouse=True)
def no_hanging():
    """A runtime without locks fails by waiting for ever; then say where."""
    faulthandler.dump_traceback_later(HOUR_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def pool():
    before, made = torch.get_num_threads(), ThreadPool()
    yield made
    made.shutdown()
    torch.set_num_threads(before)


# Kernels that watch -----------------------------------------------------------------------------------------------------


def write_watch(module):
    """For each item: note the sum over all counters of earlier tasks and the scratch memory, dawdle, then count the item.

    arguments: all counters, how many belong to earlier tasks, then of this task counters, sums, scratches, and polls to dawdle.
    """
    code = Code(module, "watch", 4)
    table, start, stop, scratch = code.arguments
    everything, earlier, counters, sums, scratches, polls = code.load_arguments(table, 6)
    with code.for_range(start, stop) as item:
        total = code.variable(code.constant(0))
        with code.for_range(0, earlier) as i:
            total.value = total.value + code.load(I64, everything, i * 8)
        code.store(total.value, sums, item * 8)
        code.store(scratch, scratches, item * 8)
        with code.for_range(0, polls % (item + 7)):
            code.atomic_load(everything)
        code.atomic_add(counters + item * 8, 1)
    code.ret()


def write_meet(module):
    """Each of the items waits until all have begun, which takes as many threads; those of higher number then dawdle.

    arguments: a counter, items, turns to give away before giving up, the function that gives one away, polls to dawdle.
    """
    code = Code(module, "meet", 4)
    table, start, stop, _ = code.arguments
    begun, items, patience, yield_thread, polls = code.load_arguments(table, 5)
    with code.for_range(start, stop) as item:
        code.atomic_add(begun, 1)
        turns = code.variable(code.constant(0))
        with code.loop() as break_if:
            break_if((code.atomic_load(begun) >= items) | (turns.value > patience))
            code.call(yield_thread, [])
            turns.value = turns.value + 1
        with code.if_then(turns.value > patience):
            code.atomic_add(begun, -1)
        with code.for_range(0, item * polls):
            code.atomic_load(begun)
    code.ret()


def write_fill(module):
    """For each item: fill the scratch memory with its number, dawdle, and note how much of that is left.

    arguments: int64 words of scratch memory, found.
    """
    code = Code(module, "fill", 4)
    table, start, stop, scratch = code.arguments
    words, found = code.load_arguments(table, 2)
    with code.for_range(start, stop) as item:
        with code.for_range(0, words) as i:
            code.store(item + 1, scratch, i * 8)
        with code.for_range(0, 2000):
            code.atomic_load(found)
        same = code.variable(code.constant(0))
        with code.for_range(0, words) as i:
            same.value = same.value + code.load(I64, scratch, i * 8).equals(item + 1).zero_extend(I64)
        code.store(same.value, found, item * 8)
    code.ret()


class Filled:
    """A program whose items fill the scratch memory of their thread and find it as they left it."""

    def __init__(self, items=60, scratch_bytes=1 << 12):
        self.words, self.found = scratch_bytes // 8, np.zeros(items, np.int64)
        self.table = np.array([self.words, self.found.ctypes.data], np.int64)
        self.tasks = task_table([Task(compiled("fill", write_fill, host()), self.table.ctypes.data, items)])

    def run(self, pool):
        self.found.fill(-1)
        pool.run(self.tasks, 8 * self.words)
        return self

    @property
    def is_right(self):
        return bool((self.found == self.words).all())


class Watched:
    """A program whose every task counts its items and what it saw of the earlier ones."""

    def __init__(self, shape, polls=0):
        """shape: items, grain and barrier of each task."""
        self.shape, self.starts = shape, np.cumsum([0, *(items for items, _, _ in shape)])
        self.counters, self.sums, self.scratches = (np.zeros(int(self.starts[-1]) + 1, np.int64) for _ in range(3))
        self.tables, calls = [], []
        for (items, grain, barrier), start in zip(shape, self.starts, strict=False):
            own = [a.ctypes.data + 8 * int(start) for a in (self.counters, self.sums, self.scratches)]
            self.tables.append(np.array([self.counters.ctypes.data, start, *own, polls], np.int64))
            calls.append(
                Task(compiled("watch", write_watch, host()), self.tables[-1].ctypes.data, items, grain, barrier)
            )
        self.tasks = task_table(calls)

    @classmethod
    def random(cls, seed):
        chance = random.Random(seed)
        tasks = range(chance.randint(1, 12))
        sizes = (0, 1, 2, 3, 7, 32, 100)
        return cls(
            [(chance.choice(sizes), chance.randint(1, 9), chance.random() < 0.6) for _ in tasks],
            polls=chance.choice((0, 0, 50, 1000)),
        )

    def run(self, pool, scratch_bytes=0):
        for seen in (self.counters, self.sums, self.scratches):
            seen.fill(0)
        pool.run(self.tasks, scratch_bytes)
        return self

    @property
    def is_right(self):
        """Every item ran once, and those of tasks with a barrier saw all earlier items done."""
        once = bool((self.counters[:-1] == 1).all()) and self.counters[-1] == 0
        tasks = zip(self.shape, self.starts, self.starts[1:], strict=False)
        return once and all(bool((self.sums[a:b] == a).all()) for (_, _, barrier), a, b in tasks if barrier)

    @property
    def threads(self):
        """The threads that took part, by their scratch memory."""
        return set(self.scratches[:-1].tolist())


def until(condition):
    """Wait for something that another thread or process does in a moment."""
    for _ in range(PATIENCE):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("it did not come about")


def asleep(pool):
    return all(worker._state[0] == 1 for worker in pool._workers)


class Meeting:
    """A program that needs all of some threads at once, followed by tasks without items."""

    def __init__(self, threads, polls=0, empty_tasks=0):
        self.begun, self.threads = np.zeros(1, np.int64), threads
        self.table = np.array([self.begun.ctypes.data, threads, 500_000, _yield_address(), polls], np.int64)
        call = Task(compiled("meet", write_meet, host()), self.table.ctypes.data, threads)
        self.tasks = task_table([call, *[call._replace(items=0, barrier=False)] * empty_tasks])

    def run(self, pool):
        """How many threads took part. Tries more than once: a worker about to fall asleep may miss a program."""
        for _ in range(5):
            self.begun.fill(0)
            pool.run(self.tasks)
            if self.begun[0] == self.threads:
                break
        return int(self.begun[0])


# Programs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", THREADS)
def test_every_item_runs_once_and_tasks_with_a_barrier_see_what_earlier_ones_wrote(threads, pool):
    torch.set_num_threads(threads)
    for seed in range(150):
        program = Watched.random(seed)
        for _ in range(2):  # a program can run again
            assert program.run(pool).is_right, f"seed {seed}"


def test_tasks_without_items_hold_nobody_up(pool):
    assert Watched([(0, 1, True), (0, 3, False), (2, 5, True), (0, 1, True)]).run(pool).is_right


def test_one_thread_works_without_workers(pool):
    torch.set_num_threads(1)
    program = Watched([(100, 3, True)] * 3).run(pool)
    assert program.is_right and pool._workers == []
    assert program.threads == {pool._scratch[0].ctypes.data}


def test_all_threads_take_part(pool):
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert Meeting(threads).run(pool) == threads


def test_the_number_of_threads_follows_torch(pool):
    ended = []
    for threads in (1, 3, 2, 2, 4, 1):
        torch.set_num_threads(threads)
        before = [worker._thread for worker in pool._workers]
        assert Watched.random(threads).run(pool).is_right
        now = [worker._thread for worker in pool._workers]
        assert len(now) == threads - 1 and all(t.is_alive() for t in now)
        ended += [t for t in before if t not in now]
        assert not any(t.is_alive() for t in ended)
    assert len(ended) == 2 + 1 + 3


@pytest.mark.parametrize("threads", [1, 3])
def test_python_threads_may_run_programs_at_the_same_time(threads, pool):
    torch.set_num_threads(threads)
    right = []

    def work(first):
        for seed in range(first, first + 40):
            right.append(Watched.random(seed).run(pool).is_right and Filled().run(pool).is_right)

    callers = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert right == [True] * 160


def test_shutdown_ends_the_threads_and_the_next_program_starts_new_ones(pool):
    torch.set_num_threads(3)
    Watched.random(0).run(pool)
    until(lambda: asleep(pool))  # asleep or awake, they end
    for _ in range(2):
        threads = [worker._thread for worker in pool._workers]
        pool.shutdown()
        assert len(threads) == 2 and not any(t.is_alive() for t in threads)
        assert Watched.random(1).run(pool).is_right


# Sleeping and late workers --------------------------------------------------------------------------------------------


def test_idle_workers_fall_asleep_and_wake_for_the_next_program(pool):
    torch.set_num_threads(3)
    for seed in range(5):
        assert Watched.random(seed).run(pool).is_right
        until(lambda: asleep(pool))
        assert Meeting(3).run(pool) == 3


def test_programs_that_come_while_workers_fall_asleep_are_done(pool):
    """Pauses about as long as a worker spins: it goes to sleep while the next program starts."""
    torch.set_num_threads(3)
    chance = random.Random(0)
    for _ in range(300):
        assert Watched([(5, 1, True), (3, 2, True)]).run(pool).is_right
        time.sleep(chance.uniform(0.0, 0.002))


def test_a_worker_that_never_wakes_keeps_nobody_waiting(pool):
    torch.set_num_threads(2)
    Watched.random(0).run(pool)
    until(lambda: asleep(pool))
    pool._workers[0].wake = lambda: None  # type: ignore[method-assign]
    for seed in range(50):
        program = Watched.random(seed).run(pool)
        assert program.is_right and program.threads <= {pool._scratch[0].ctypes.data}


def test_a_worker_that_comes_late_leaves_the_finished_program_alone(pool):
    torch.set_num_threads(2)
    Watched.random(0).run(pool)
    (worker,) = pool._workers
    for seed in range(20):
        until(lambda: asleep(pool))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker, "wake", lambda: None)
            program = Watched.random(seed).run(pool)
        assert program.is_right
        counted = program.counters.copy()
        program.tasks.fill(0)  # its memory is free for others: to take items from it now is to call address 0
        program.tasks[:, 2] = 1_000_000
        worker.wake()
        until(lambda: asleep(pool))
        assert np.array_equal(program.counters, counted)
        assert Watched.random(seed).run(pool).is_right


def test_nobody_is_left_inside_a_program_that_has_ended(pool):
    """Its memory may be freed. The thread that works last has tasks without items to pass when the other is done with them."""
    torch.set_num_threads(2)
    for _ in range(10):
        program = Meeting(2, polls=1_000_000, empty_tasks=20_000)
        assert program.run(pool) == 2
        taken = int(program.tasks[-1, NEXT])  # every thread that passes a task counts this up
        time.sleep(0.005)
        assert program.tasks[-1, NEXT] == taken


# Forks ----------------------------------------------------------------------------------------------------------------


def in_a_child(compute):
    """What a forked child computes; b"" if it fails or does not answer."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of forking with threads: what is tested here
        child = os.fork()
    if not child:
        try:
            os.write(writer, compute())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        until(lambda: os.waitpid(child, os.WNOHANG)[0] == child)
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        return pipe.read()


def several_right(pool):
    """b"right 2" where programs run correctly, by 2 threads of this process."""
    right = all(Watched.random(seed).run(pool).is_right for seed in range(20))
    return f"{'right' if right else 'wrong'} {Meeting(2).run(pool)}".encode()


@forking
def test_a_forked_child_has_threads_of_its_own(pool):
    torch.set_num_threads(2)
    assert several_right(pool) == b"right 2"
    assert in_a_child(lambda: several_right(pool)) == b"right 2"
    assert several_right(pool) == b"right 2"  # the parent's go on


@forking
def test_a_fork_in_the_middle_of_another_thread_s_program_is_no_trap(pool):
    torch.set_num_threads(2)
    program, done, right = Watched([(100, 1, True)] * 10, polls=3000), threading.Event(), [True]

    def work():
        while not done.is_set():
            right.append(program.run(pool).is_right)

    thread = threading.Thread(target=work)
    thread.start()
    answers = [in_a_child(lambda: several_right(pool)) for _ in range(5)]
    done.set()
    thread.join()
    assert answers == [b"right 2"] * 5 and all(right)


# Scratch memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_each_thread_has_scratch_memory_of_its_own_on_a_cache_line(threads, pool):
    torch.set_num_threads(threads)
    for size in (0, 1 << 12, 1 << 20, 1 << 14):  # more than before, and less
        assert Filled(60, size).run(pool).is_right
        places = sorted(Watched([(200, 1, True)], polls=1000).run(pool, size).threads)
        assert all(place % 64 == 0 for place in places) and len(places) <= threads
        assert all(b - a >= size for a, b in pairwise(places))
