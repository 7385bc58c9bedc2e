"""What this machine does in a second, measured once and stored, and what of its memory a process may take. Knows no model.

The profile is measured on random weights through the very products that a model calls. It lies in machine.json (where:
user_cache.py) and counts for as long as `identity()` stays the same.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import user_cache
from ..errors import ArgumentError
from ..formats import DENSE, Format, GroupInt, Weight
from ..kernels import cpu, dispatch
from ..user_cache import entry, shown
from ..version import __version__
from .memory import STATUS, free_gpu, free_memory, own_memory
from .plan import Budgets, Card, HardwareProfile, Rates
from .stream import FileReader, Origin

Progress = Callable[[int, int], object]  # steps done, steps in all
T = TypeVar("T")

FILE = "machine.json"
FORMAT_VERSION = 4
MAX_PROFILES = 8  # in the file: of other thread counts or kernels on the same machine
INT4 = GroupInt(4, 128)
COLUMNS = 12288  # of a weight of 156 or 101 MB, more than processors' caches hold
ROWS: dict[Format, int] = {INT4: 24576, DENSE: 4096}
MANY = 256  # tokens of the product that shows operations a second
SECONDS = 0.6  # to repeat a measurement for
REPEATS = (3, 25)  # least and most
BUS_BYTES = 256 << 20
DISK_BYTES = 1 << 30
SLOT_BYTES = 128 << 20  # of a file read at a time: a layer or so
CONTEXT_BYTES = 512 << 20  # of a driver's context where the driver does not say
PROCESS_BYTES = 600 << 20  # of a process that has imported torch, where the system does not say
HOST_MARGIN = 512 << 20  # of what is free now, left to the rest of the system
GPU_MARGIN = 256 << 20


def load() -> HardwareProfile | None:
    """The stored profile of this machine as it is now; None where there is none, or where the file makes no sense, with a
    warning."""
    here = identity()
    try:
        for one in _stored():
            if entry(one, "identity") == here:
                return _parse(HardwareProfile, entry(one, "machine"))
    except ValueError as error:
        _warn(f"{cache_file()} is not used: {error}")
    return None


def measure(progress: Progress = lambda done, total: None) -> HardwareProfile:
    """Measure the rates of this machine, which takes seconds, and store them in place of earlier ones."""
    found, here, others = _measured(progress), identity(), list[Any]()
    with suppress(ValueError):  # a file that is not one of ours is replaced
        others = [one for one in _stored() if isinstance(one, dict) and one.get("identity") != here]
    profiles = [{"identity": here, "machine": asdict(found)}, *others][:MAX_PROFILES]
    try:
        user_cache.write(FILE, {"profiles": profiles})
    except OSError as error:
        reason = error.strerror or error
        _warn(f"the machine's measured speed cannot be kept, so it is measured every time: {reason}")
    return found


def identity() -> dict[str, Any]:
    """What a profile depends on: another one is measured when any of it changes."""
    gpu = torch.cuda.is_available()
    return {
        "format": FORMAT_VERSION,
        "neox_lite": __version__,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": _kernel_path(),
        "gpu": torch.cuda.get_device_name(0) if gpu else None,
        "driver": _driver() if gpu else None,
    }


def cache_file() -> Path:
    """Where profiles are stored. Raises OSError where the user has no home."""
    return user_cache.folder() / FILE


def _stored() -> list[Any]:
    """The entries of the file, whatever they are; none where there is no file. Raises ValueError if it holds anything else."""
    found = user_cache.read(FILE)
    entries = [] if found is None else entry(found, "profiles")
    if not isinstance(entries, list):
        raise ValueError("profiles is no list")
    return entries


def _parse(kind: Callable[..., T], found: Any) -> T:
    """A profile or a part of one. Raises ValueError for a number that no machine has."""
    parts = {"cpu": Rates, "rates": Rates, "card": Card}
    values = {}
    for key in (field.name for field in fields(kind)):  # type: ignore[arg-type]
        value = entry(found, key)
        if key in parts and (value is not None or key != "card"):
            value = _parse(parts[key], value)
        elif key == "name":
            if not isinstance(value, str) or not value.isprintable():
                raise ValueError(f"name is {shown(value)}, expected a GPU's")
        elif value is not None or key not in ("card", "disk_bytes_per_s", "plain_flops_per_s"):
            low, high = (1e3, 1e18) if key.endswith("_per_s") else (1, 1 << 44)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{key} is {shown(value)}, expected {low:.3g} to {high:.3g}")
        values[key] = value
    return kind(**values)


@cache
def _warn(text: str) -> None:
    """Warn of something once."""
    warnings.warn(text, stacklevel=4)


def _measured(progress: Progress) -> HardwareProfile:
    gpu = torch.device("cuda:0") if torch.cuda.is_available() else None
    steps: list[Callable[[], Any]] = [lambda: measure_rates(torch.device("cpu")), measure_disk, measure_process]
    steps += [lambda: measure_card(gpu)] if gpu is not None else []
    found: list[Any] = []
    for done, step in enumerate(steps):
        found.append(step())
        progress(done + 1, len(steps))
    return HardwareProfile(found[0], found[1], found[2], found[3] if gpu is not None else None)


def measure_rates(device: torch.device) -> Rates:
    """Rates of a device, from products of one and of many tokens with int4 weights in groups of 128, and with plain ones."""
    ops = dispatch.choose(device)

    def product(format: Format, tokens: int) -> tuple[float, int]:
        """Seconds of a product, and the bytes of its weight."""
        weight = _random_weight(format, device)
        x = torch.randn(tokens, COLUMNS, device=device).to(ops.activation_dtype(torch.float16, device))
        seconds = _seconds(lambda: ops.grouped_linear([x], [weight], [None], [None], [None]), device)
        return seconds, sum(t.nbytes for t in weight.tensors.values())

    def flops_per_s(format: Format) -> float:
        return 2 * ROWS[format] * COLUMNS * MANY / product(format, MANY)[0]

    with torch.inference_mode():
        seconds, nbytes = product(INT4, 1)
        return Rates(nbytes / seconds, flops_per_s(INT4), flops_per_s(DENSE))


def _random_weight(format: Format, device: torch.device) -> Weight:
    """16-bit values: random words, and scales with which products stay of order one."""
    shape, tensors = (ROWS[format], COLUMNS), {}
    for name, (dtype, size) in format.specs(shape, torch.float16).items():
        tensor = tensors[name] = torch.zeros(size, dtype=dtype, device=device)
        if dtype == torch.int32:
            tensor.random_(-(1 << 31), 1 << 31)
        elif dtype == torch.float16:
            tensor.uniform_(0.5, 1.5).mul_((0.2 if format == INT4 else 1.0) * COLUMNS**-0.5)
    return Weight(format, shape, tensors)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call that a quarter of all stay below, after one that compiles and one that warms up.

    What else a machine does at the time only makes calls longer.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    for _ in range(2):
        call()
    wait()
    ends = time.perf_counter() + SECONDS
    while len(times) < REPEATS[0] or (time.perf_counter() < ends and len(times) < REPEATS[1]):
        began = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 4]


def measure_card(device: torch.device) -> Card:
    """A GPU: its rates, how fast pinned memory is copied there, and what the driver takes of it."""
    rates = measure_rates(device)
    source = torch.zeros(BUS_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(BUS_BYTES, dtype=torch.uint8, device=device)
    bus = BUS_BYTES / _seconds(lambda: target.copy_(source, non_blocking=True), device)
    torch.cuda.empty_cache()
    return Card(torch.cuda.get_device_name(device), free_gpu(device.index)[0], rates, bus, context_bytes())


def context_bytes() -> int:
    """GPU memory that the driver's context takes: what the driver counts for this process beyond torch's own."""
    for pid, used in _nvidia_smi("--query-compute-apps=pid,used_memory"):
        if pid == str(os.getpid()) and used.isdecimal():
            return max(0, (int(used) << 20) - torch.cuda.memory_reserved()) or CONTEXT_BYTES
    return CONTEXT_BYTES


def _driver() -> str | None:
    return next((row[0] for row in _nvidia_smi("--query-gpu=driver_version")), None)


def _nvidia_smi(query: str) -> list[list[str]]:
    """Rows of what nvidia-smi answers; none where it is missing or fails."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in row] for row in csv.reader(out.splitlines()) if row]


def measure_disk() -> float | None:
    """Bytes a second of the disk that torch is installed on, from torch's own libraries; None where it cannot be measured."""
    files = sorted(Path(torch.__file__).parent.rglob("*.so*"), key=lambda f: f.stat().st_size, reverse=True)
    return disk_rate(files[0]) if files else None


def disk_rate(path: Path) -> float | None:
    """Bytes a second at which up to 1 GiB of a file comes from its disk, read as layers on the disk are.

    What memory keeps of the file is dropped first; pages that a process has mapped stay, so what counts is the bytes that
    the system says came from the disk. None on systems that do not say, or where few did.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    files, size = FileReader(), min(DISK_BYTES, found.st_size)
    slot = torch.empty(min(SLOT_BYTES, size), dtype=torch.uint8).fill_(0)
    before, began = _disk_reads(), time.perf_counter()
    for start in range(0, size, SLOT_BYTES):
        files.read([(Origin(path, start, found.st_mtime_ns), slot[: size - start])])
    seconds, after = time.perf_counter() - began, _disk_reads()
    if before is None or after is None or after - before < size // 4:
        return None
    return (after - before) / seconds


def _disk_reads() -> int | None:
    """Bytes that this process has had read from disks (Linux)."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/io").read_text().partition("\nread_bytes:")[2].split()[0])
    return None


PROBE = """
import sys
sys.path[:] = {path!r}
import torch
from pathlib import Path
from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
torch.set_num_threads({threads})
config = GPTNeoXConfig(num_hidden_layers=1, hidden_size=128, num_attention_heads=2, intermediate_size=128, vocab_size=64)
model = GPTNeoXForCausalLM(config)
if torch.cuda.is_available():
    model = model.cuda()
model.generate(torch.tensor([[1]]), max_new_tokens=2)
print(Path("/proc/self/status").read_text())
"""


def measure_process() -> int:
    """Bytes of memory of a process that has imported torch and taken two steps of a tiny model; a constant elsewhere."""
    if not STATUS.exists():
        return PROCESS_BYTES
    code = PROBE.format(path=[os.fspath(Path(p).absolute()) for p in sys.path], threads=torch.get_num_threads())
    for _ in range(2):  # the first compiles kernels, which takes memory
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if (held := own_memory(out.stdout)) is None:
        reason = (out.stderr.strip().splitlines() or ["no word"])[-1]
        raise ArgumentError(f"a process to measure memory in failed: {reason}")
    return sum(held.values())


def cpu_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _kernel_path() -> str:
    """The instructions that the CPU's kernels use, or the backend that stands in for them."""
    if cpu.why_not(torch.device("cpu")) is not None:
        return "reference"
    from ..kernels.cpu import target

    return target.host().path


def budgets(
    here: HardwareProfile, cpu_bytes: int | None = None, gpu_bytes: int | None = None, gpu: int | None = 0
) -> Budgets:
    """What this process may take of host memory and of the GPU number `gpu` in all.

    That is as given, or else what it holds and what is free now but a margin. None for the GPU's where `gpu` is None or the
    machine has none. Raises ArgumentError where the system does not say what is free.
    """
    if cpu_bytes is None:
        free = free_memory()[1]
        if free is None:
            raise ArgumentError("this system does not say how much memory is free; give the budget")
        held = own_memory()
        own = held["Anon"] + held["Shmem"] if held else 0  # memory of files counts as free already
        cpu_bytes = max(0, free + own - HOST_MARGIN)
    if gpu is None or here.card is None:
        return Budgets(cpu_bytes)
    if gpu_bytes is None and torch.cuda.is_available():
        held_there = here.card.context_bytes + torch.cuda.memory_reserved(gpu)  # asking has made the context
        gpu_bytes = max(0, free_gpu(gpu)[1] + held_there - GPU_MARGIN)
    return Budgets(cpu_bytes, gpu_bytes)
