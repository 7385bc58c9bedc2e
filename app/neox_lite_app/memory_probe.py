"""How fast memory is read and copied, and how much of it this process holds. Knows no model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

SAMPLE_S = 0.05
COPY_RUNS = 20


def copy_gb_per_s(device: torch.device, nbytes: int, runs: int = COPY_RUNS) -> list[float]:
    """Rates of copies from a device's memory to the same memory, read and write counted: what a kernel can hope for."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> float:
        if device.type != "cuda":
            return seconds(lambda: target.copy_(source))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3

    return [2 * nbytes / copy() / 1e9 for _ in range(runs + 3)][3:]


@contextmanager
def fastest_read(tensors: Sequence[Tensor], threads: int) -> Iterator[tuple[Callable[[], object], str]]:
    """The plain code that reads all of these tensors fastest with so many threads, and its name.

    It is not the same everywhere, nor is a buffer read as fast as weights: where the system has put a page decides.
    """
    views = [t.detach().flatten().view(torch.uint8) for t in tensors]
    reads: dict[str, Callable[[], object]] = {"torch maximum of bytes": lambda: [v.max() for v in views][-1].item()}
    if all(len(v) % 8 == 0 for v in views):
        wide = [v.view(torch.int64) for v in views]
        reads["torch sum of int64"] = lambda: [w.sum() for w in wide][-1].item()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(threads) as pool:
            if views[0].device.type == "cpu":
                reads["numpy or of bytes"] = _numpy_read(views, threads, pool)
            times = {name: min(seconds(read) for _ in range(2)) for name, read in reads.items()}
            best = min(times, key=lambda name: times[name])
            yield reads[best], best
    finally:
        torch.set_num_threads(before)


def _numpy_read(views: Sequence[Tensor], threads: int, pool: ThreadPoolExecutor) -> Callable[[], object]:
    """Every thread reads its share of every tensor."""
    import numpy

    shares = list(zip(*(numpy.array_split(v.numpy(), threads) for v in views), strict=True))
    return lambda: list(pool.map(lambda share: [numpy.bitwise_or.reduce(part) for part in share], shares))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def anonymous_peak() -> Iterator[Callable[[], int | None]]:
    """Watches how much memory this process holds that no file backs; gives a function that returns the most so far.

    It returns None where the system has no such counter (Linux has one).
    """
    highest, ended = status_bytes("RssAnon"), threading.Event()

    def watch() -> None:
        nonlocal highest
        while not ended.wait(SAMPLE_S):
            highest = max(highest or 0, status_bytes("RssAnon") or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    if highest is not None:
        watcher.start()
    try:
        yield lambda: highest
    finally:
        ended.set()


def peak_bytes(device: torch.device) -> int | None:
    """The most memory held: on a GPU, tensors there; on the CPU, all of this process, mapped files included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (found := status_bytes("VmHWM")) is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, the system that is left


def status_bytes(key: str) -> int | None:
    """An entry of Linux's /proc/self/status in bytes."""
    try:
        return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return None
