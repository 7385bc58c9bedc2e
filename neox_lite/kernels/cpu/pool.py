"""The thread pool that runs kernels: dynamic scheduling of tasks, with no lock and no Python between them. Knows no kernel.

A task is one kernel over a range of items. Every thread takes the next `grain` items of a task with one atomic addition, so a
slow core takes fewer and no core waits for it long. The calling thread works too and counts completed items, not threads: it
never waits for a worker that is late or asleep. Idle workers spin for a moment, because the next operation usually follows at
once, then sleep.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir

from .code import I64, Code, Value
from .compile import compiled
from .target import host

CACHE_LINE = 64  # bytes
# A task in the table that threads read: its int64 words, and where they lie. The two counters have cache lines of their own.
TASK_WORDS = 24
FUNCTION, ARGUMENTS, ITEMS, GRAIN, BARRIER, NEXT, COMPLETED = 0, 1, 2, 3, 4, 8, 16
# The control block of a pool: its int64 words, and where they lie.
CONTROL_WORDS = 32
EPOCH, ACTIVE, ACCEPTING, TASKS, COUNT, YIELD, STOP = 0, 8, 16, 24, 25, 26, 27
# A worker's own state: its int64 words, and where they lie.
STATE_WORDS = 16
SLEEPING, SEEN_EPOCH = 0, 8
SPINS_BEFORE_YIELD = 2_000  # some 20 to 100 microseconds
YIELDS_BEFORE_SLEEP = 300


class Task(NamedTuple):
    """A kernel over items 0..items, `grain` at a time; `barrier`: it starts only when all earlier tasks are completed."""

    function: int
    arguments: int
    items: int
    grain: int = 1
    barrier: bool = True


def task_table(tasks: Sequence[Task]) -> np.ndarray:
    """Tasks as the threads read them, (tasks, TASK_WORDS) int64."""
    table = np.zeros((len(tasks), TASK_WORDS), np.int64)
    table[:, : len(Task._fields)] = tasks
    return table


class ThreadPool:
    """Worker threads, one fewer than torch's thread count; resized when that changes."""

    def __init__(self) -> None:
        number, target = ctypes.c_int64, host()
        self._run = ctypes.CFUNCTYPE(number, *[number] * 4)(compiled("run", _write_runtime, target))
        self._worker_loop = ctypes.CFUNCTYPE(number, *[number] * 3)(compiled("worker_loop", _write_runtime, target))
        self._reset()
        if hasattr(os, "register_at_fork"):
            # Threads, and a lock that one of them holds, do not survive a fork.
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        # One program runs at a time.
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._size = 0
        self._control = np.zeros(CONTROL_WORDS, np.int64)
        self._control[YIELD] = _yield_address()
        self._scratch: list[np.ndarray] = [np.empty(0, np.uint8)]

    def run(self, tasks: np.ndarray, scratch_bytes: int = 0) -> None:
        """Run a table of tasks to its end: (tasks, TASK_WORDS) int64. scratch_bytes: memory of each thread alone."""
        with self._lock:
            if self._size != torch.get_num_threads() or len(self._scratch[0]) < scratch_bytes:
                self._resize(torch.get_num_threads(), scratch_bytes)
            for worker in self._workers:
                worker.wake()
            self._run(self._control.ctypes.data, tasks.ctypes.data, len(tasks), self._scratch[0].ctypes.data)

    def _resize(self, size: int, scratch_bytes: int) -> None:
        self.shutdown()
        amount = max(scratch_bytes, len(self._scratch[0]), 1 << 18)
        self._scratch = [_aligned(amount) for _ in range(size)]
        self._control[STOP] = 0
        self._workers = [_Worker(self._worker_loop, self._control, scratch) for scratch in self._scratch[1:]]
        self._size = size

    def shutdown(self) -> None:
        """End the workers."""
        self._control[STOP] = 1
        for worker in self._workers:
            worker.join()
        self._workers, self._size = [], 0


@cache
def shared_pool() -> ThreadPool:
    """The pool of this process."""
    return ThreadPool()


def _aligned(size: int) -> np.ndarray:
    """Bytes that start on a cache line: a vector across two of them takes twice as long to load."""
    raw = np.empty(size + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + size]


class _Worker:
    def __init__(self, loop: ctypes._CFuncPtr, control: np.ndarray, scratch: np.ndarray) -> None:  # type: ignore[name-defined]
        self._semaphore = threading.Semaphore(0)
        self._state = np.zeros(STATE_WORDS, np.int64)
        self._state[SEEN_EPOCH] = control[EPOCH]
        self._ended = False
        arguments = control.ctypes.data, scratch.ctypes.data, self._state.ctypes.data

        def run() -> None:
            while not self._ended:
                loop(*arguments)
                if not self._ended:
                    self._semaphore.acquire()

        self._keep = control, scratch
        self._thread = threading.Thread(target=run, name="neox-lite", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Before a program starts; a worker about to fall asleep may miss one."""
        if self._state[SLEEPING]:
            self._state[SLEEPING] = 0
            self._semaphore.release()

    def join(self) -> None:
        self._ended = True
        self._semaphore.release()
        self._thread.join()


def _yield_address() -> int:
    """Address of the system's function that lets another thread have the core."""
    system = ctypes.CDLL("kernel32" if os.name == "nt" else None)
    function = getattr(system, "SwitchToThread" if os.name == "nt" else "sched_yield")
    return ctypes.cast(function, ctypes.c_void_p).value or 0


# The runtime, compiled ------------------------------------------------------------------------------------------------


def _write_runtime(module: ir.Module) -> None:
    run_tasks = _run_tasks(module)
    _write_run(module, run_tasks)
    _write_worker_loop(module, run_tasks)


def _pause(code: Code, polls: Value, yield_thread: Value) -> Value:
    """Wait a moment after a poll; after SPINS_BEFORE_YIELD of them, let other threads have the core. -> polls + 1."""
    triple = code.module.triple
    if "86" in triple:
        code.builder.call(code._external("llvm.x86.sse2.pause", ir.FunctionType(ir.VoidType(), [])), [])
    elif "aarch64" in triple or "arm64" in triple:
        code.builder.call(
            code._external("llvm.aarch64.hint", ir.FunctionType(ir.VoidType(), [ir.IntType(32)])),
            [ir.Constant(ir.IntType(32), 1)],
        )
    with code.if_then(polls > SPINS_BEFORE_YIELD):
        code.call(yield_thread, [])
    return polls + 1


def _wait_for(code: Code, tasks: Value, first: Value, last: Value, yield_thread: Value) -> None:
    """Until all items of tasks first..last are completed."""
    with code.for_range(first, last) as i:
        task = tasks + i * (8 * TASK_WORDS)
        items, polls = code.load(I64, task, 8 * ITEMS), code.variable(code.constant(0))
        with code.loop() as break_if:
            break_if(code.atomic_load(task + 8 * COMPLETED) >= items)
            polls.value = _pause(code, polls.value, yield_thread)


def _run_tasks(module: ir.Module) -> ir.Function:
    """(tasks, count, scratch, yield): take items of task after task until none are left."""
    code = Code(module, "run_tasks", 4, exported=False)
    tasks, count, scratch, yield_thread = code.arguments
    with code.for_range(0, count) as i:
        task = tasks + i * (8 * TASK_WORDS)
        function, arguments, items, grain, barrier = code.load_arguments(task, 5)
        with code.if_then(barrier > 0):
            _wait_for(code, tasks, code.constant(0), i, yield_thread)
        with code.loop() as break_if:
            start = code.atomic_add(task + 8 * NEXT, grain)
            break_if(start >= items)
            stop = (start + grain).min(items)
            code.call(function, [arguments, start, stop, scratch])
            code.atomic_add(task + 8 * COMPLETED, stop - start)
    code.ret()
    return code.function


def _write_run(module: ir.Module, run_tasks: ir.Function) -> None:
    """(control, tasks, count, scratch): the calling thread's side of a program."""
    code = Code(module, "run", 4)
    control, tasks, count, scratch = code.arguments
    yield_thread = code.load(I64, control, 8 * YIELD)

    # 1. Reset the counters of every task and publish the program.
    with code.for_range(0, count) as i:
        for counter in (NEXT, COMPLETED):
            code.store(code.constant(0), tasks + i * (8 * TASK_WORDS), 8 * counter)
    code.store(tasks, control, 8 * TASKS)
    code.store(count, control, 8 * COUNT)
    code.atomic_store(1, control + 8 * ACCEPTING)
    code.atomic_add(control + 8 * EPOCH, 1)

    # 2. Take part in it, then wait for the items that others hold.
    code.call(run_tasks, [tasks, count, scratch, yield_thread])
    _wait_for(code, tasks, code.constant(0), count, yield_thread)

    # 3. Admit no further worker, and wait until the last one has left: the caller may free the program's memory.
    code.atomic_store(0, control + 8 * ACCEPTING)
    polls = code.variable(code.constant(0))
    with code.loop() as break_if:
        break_if(code.atomic_load(control + 8 * ACTIVE).equals(0))
        polls.value = _pause(code, polls.value, yield_thread)
    code.ret()


def _write_worker_loop(module: ir.Module, run_tasks: ir.Function) -> None:
    """(control, scratch, state): take part in programs until none has come for a while."""
    code = Code(module, "worker_loop", 3)
    control, scratch, state = code.arguments
    yield_thread = code.load(I64, control, 8 * YIELD)
    seen, polls = code.variable(code.load(I64, state, 8 * SEEN_EPOCH)), code.variable(code.constant(0))
    with code.loop() as break_if:
        break_if(code.atomic_load(control + 8 * STOP) > 0)
        epoch = code.atomic_load(control + 8 * EPOCH)
        is_seen = epoch.equals(seen.value)
        with code.if_then(is_seen.equals(0)):
            code.atomic_add(control + 8 * ACTIVE, 1)
            seen.value = code.atomic_load(control + 8 * EPOCH)
            with code.if_then(code.atomic_load(control + 8 * ACCEPTING) > 0):
                tasks, count = code.load(I64, control, 8 * TASKS), code.load(I64, control, 8 * COUNT)
                code.call(run_tasks, [tasks, count, scratch, yield_thread])
            code.atomic_add(control + 8 * ACTIVE, -1)
            polls.value = code.constant(0)
        break_if(polls.value > SPINS_BEFORE_YIELD + YIELDS_BEFORE_SLEEP)
        polls.value = _pause(code, polls.value, yield_thread)
    code.store(seen.value, state, 8 * SEEN_EPOCH)
    # State word SLEEPING is the first.
    code.atomic_store(1, state)
    code.ret()
