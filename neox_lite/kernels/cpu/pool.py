"""The threads that run kernels: programs of kernel calls, shared out in small pieces, without a lock or Python in between.

A program is a list of rows; a row is one kernel over a range of items. Every thread takes the next few items of a row with
one atomic addition, so a slow core takes fewer and no core waits for it long. The calling thread works too and counts finished
items, not threads: it never waits for a worker that is late or asleep. Idle workers spin for a moment, because the next
operation usually follows at once, then sleep. Knows no kernel.
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

ROW = 24  # int64 slots of a row; the two counters have cache lines of their own
FUNCTION, ARGUMENTS, ITEMS, GRAIN, WAITS, NEXT, DONE = 0, 1, 2, 3, 4, 8, 16
EPOCH, ACTIVE, OPEN, ROWS, COUNT, YIELD, STOP = 0, 8, 16, 24, 25, 26, 27  # slots of the control block
CONTROL = 32
LINE = 64
SPINS = 2_000  # polls before a waiting thread lets others have its core: some 20 to 100 microseconds
YIELDS = 300  # turns given away before an idle worker sleeps


class Call(NamedTuple):
    """A kernel over items 0..items, `grain` at a time; `waits`: not before all earlier rows are done."""

    function: int
    arguments: int
    items: int
    grain: int = 1
    waits: bool = True


def rows_of(calls: Sequence[Call]) -> np.ndarray:
    """Calls as the threads read them, (calls, ROW) int64."""
    table = np.zeros((len(calls), ROW), np.int64)
    table[:, : len(Call._fields)] = calls
    return table


class Pool:
    """Worker threads, one fewer than torch's thread count; resized when that changes."""

    def __init__(self) -> None:
        number, target = ctypes.c_int64, host()
        self._run = ctypes.CFUNCTYPE(number, *[number] * 4)(compiled("run", _write_runtime, target))
        self._serve = ctypes.CFUNCTYPE(number, *[number] * 3)(compiled("serve", _write_runtime, target))
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin)  # threads, and a lock held by one, do not survive it

    def _begin(self) -> None:
        self._lock = threading.Lock()  # one program at a time
        self._workers: list[_Worker] = []
        self._size = 0
        self._control = np.zeros(CONTROL, np.int64)
        self._control[YIELD] = _yield_address()
        self._scratch: list[np.ndarray] = [np.empty(0, np.uint8)]

    def run(self, rows: np.ndarray, scratch_bytes: int = 0) -> None:
        """Run a program to its end. rows (calls, ROW) int64; each thread has scratch_bytes of memory to itself."""
        with self._lock:
            if self._size != torch.get_num_threads() or len(self._scratch[0]) < scratch_bytes:
                self._resize(torch.get_num_threads(), scratch_bytes)
            for worker in self._workers:
                worker.wake()
            self._run(self._control.ctypes.data, rows.ctypes.data, len(rows), self._scratch[0].ctypes.data)

    def _resize(self, size: int, scratch_bytes: int) -> None:
        self.stop()
        amount = max(scratch_bytes, len(self._scratch[0]), 1 << 18)
        self._scratch = [_aligned(amount) for _ in range(size)]
        self._control[STOP] = 0
        self._workers = [_Worker(self._serve, self._control, scratch) for scratch in self._scratch[1:]]
        self._size = size

    def stop(self) -> None:
        """End the workers."""
        self._control[STOP] = 1
        for worker in self._workers:
            worker.end()
        self._workers, self._size = [], 0


@cache
def shared_pool() -> Pool:
    """The pool of this process."""
    return Pool()


def _aligned(size: int) -> np.ndarray:
    """Bytes that start on a cache line: a vector across two of them takes twice as long to load."""
    raw = np.empty(size + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start : start + size]


class _Worker:
    def __init__(self, serve: ctypes._CFuncPtr, control: np.ndarray, scratch: np.ndarray) -> None:  # type: ignore[name-defined]
        self._bell = threading.Semaphore(0)
        self._state = np.zeros(16, np.int64)  # whether it sleeps, and the last program it took part in
        self._state[8] = control[EPOCH]
        self._ended = False
        arguments = control.ctypes.data, scratch.ctypes.data, self._state.ctypes.data

        def live() -> None:
            while not self._ended:
                serve(*arguments)
                if not self._ended:
                    self._bell.acquire()

        self._keep = control, scratch
        self._thread = threading.Thread(target=live, name="neox-lite", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Before a program starts; a worker about to fall asleep may miss one."""
        if self._state[0]:
            self._state[0] = 0
            self._bell.release()

    def end(self) -> None:
        self._ended = True
        self._bell.release()
        self._thread.join()


def _yield_address() -> int:
    """Address of the system's function that lets another thread have the core."""
    system = ctypes.CDLL("kernel32" if os.name == "nt" else None)
    function = getattr(system, "SwitchToThread" if os.name == "nt" else "sched_yield")
    return ctypes.cast(function, ctypes.c_void_p).value or 0


# The runtime, compiled ------------------------------------------------------------------------------------------------


def _write_runtime(module: ir.Module) -> None:
    work = _work(module)
    _write_run(module, work)
    _write_serve(module, work)


def _pause(code: Code, polls: Value, give_way: Value) -> Value:
    """Wait a moment after the polls-th look; after SPINS of them, let others have the core. -> polls + 1."""
    triple = code.module.triple
    if "86" in triple:
        code.builder.call(code._external("llvm.x86.sse2.pause", ir.FunctionType(ir.VoidType(), [])), [])
    elif "aarch64" in triple or "arm64" in triple:
        code.builder.call(
            code._external("llvm.aarch64.hint", ir.FunctionType(ir.VoidType(), [ir.IntType(32)])),
            [ir.Constant(ir.IntType(32), 1)],
        )
    with code.if_then(polls > SPINS):
        code.call(give_way, [])
    return polls + 1


def _wait_for(code: Code, rows: Value, first: Value, last: Value, give_way: Value) -> None:
    """Until all items of rows first..last are done."""
    with code.for_range(first, last) as r:
        row = rows + r * (8 * ROW)
        items, polls = code.load(I64, row, 8 * ITEMS), code.variable(code.constant(0))
        with code.loop() as break_if:
            break_if(code.atomic_load(row + 8 * DONE) >= items)
            polls.value = _pause(code, polls.value, give_way)


def _work(module: ir.Module) -> ir.Function:
    """(rows, count, scratch, yield): take items of row after row until none are left."""
    code = Code(module, "work", 4, exported=False)
    rows, count, scratch, give_way = code.arguments
    with code.for_range(0, count) as r:
        row = rows + r * (8 * ROW)
        function, arguments, items, grain, waits = code.load_arguments(row, 5)
        with code.if_then(waits > 0):
            _wait_for(code, rows, code.constant(0), r, give_way)
        with code.loop() as break_if:
            start = code.atomic_add(row + 8 * NEXT, grain)
            break_if(start >= items)
            stop = (start + grain).min(items)
            code.call(function, [arguments, start, stop, scratch])
            code.atomic_add(row + 8 * DONE, stop - start)
    code.ret()
    return code.function


def _write_run(module: ir.Module, work: ir.Function) -> None:
    """(control, rows, count, scratch): the calling thread's side of a program."""
    code = Code(module, "run", 4)
    control, rows, count, scratch = code.arguments
    give_way = code.load(I64, control, 8 * YIELD)
    with code.for_range(0, count) as r:
        for counter in (NEXT, DONE):
            code.store(code.constant(0), rows + r * (8 * ROW), 8 * counter)
    code.store(rows, control, 8 * ROWS)
    code.store(count, control, 8 * COUNT)
    code.atomic_store(1, control + 8 * OPEN)
    code.atomic_add(control + 8 * EPOCH, 1)
    code.call(work, [rows, count, scratch, give_way])
    _wait_for(code, rows, code.constant(0), count, give_way)
    code.atomic_store(0, control + 8 * OPEN)  # whoever comes now stays out; wait for those inside
    polls = code.variable(code.constant(0))
    with code.loop() as break_if:
        break_if(code.atomic_load(control + 8 * ACTIVE).equals(0))
        polls.value = _pause(code, polls.value, give_way)
    code.ret()


def _write_serve(module: ir.Module, work: ir.Function) -> None:
    """(control, scratch, state): take part in programs until none has come for a while."""
    code = Code(module, "serve", 3)
    control, scratch, state = code.arguments
    give_way = code.load(I64, control, 8 * YIELD)
    seen, polls = code.variable(code.load(I64, state, 64)), code.variable(code.constant(0))
    with code.loop() as break_if:
        break_if(code.atomic_load(control + 8 * STOP) > 0)
        epoch = code.atomic_load(control + 8 * EPOCH)
        is_new = epoch.equals(seen.value)
        with code.if_then(is_new.equals(0)):
            code.atomic_add(control + 8 * ACTIVE, 1)
            seen.value = code.atomic_load(control + 8 * EPOCH)
            with code.if_then(code.atomic_load(control + 8 * OPEN) > 0):
                rows, count = code.load(I64, control, 8 * ROWS), code.load(I64, control, 8 * COUNT)
                code.call(work, [rows, count, scratch, give_way])
            code.atomic_add(control + 8 * ACTIVE, -1)
            polls.value = code.constant(0)
        break_if(polls.value > SPINS + YIELDS)
        polls.value = _pause(code, polls.value, give_way)
    code.store(seen.value, state, 64)
    code.atomic_store(1, state)  # asleep from here on
    code.ret()
