"""What this machine does in a second, measured once and kept, and what memory is free now. Knows no model and no plan.

The profile is measured on random weights through the very operations that a model calls. It lies in machine.json (where:
kept.py) and counts for as long as `identity()` stays the same.
"""

from __future__ import annotations

import csv
import ctypes
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import user_cache
from ..cache import Batch, PagePool
from ..config import GPTNeoXConfig
from ..errors import ArgumentError
from ..formats import DENSE, Format, GroupInt
from ..kernels import cpu, dispatch
from ..layers import GPTNeoXLayer, Linear, Rotary
from ..units import PAGE
from ..user_cache import entry, shown
from ..version import __version__
from .plan import Card, Machine, Rates
from .stream import Files, Origin

Progress = Callable[[int, int], object]  # steps done, steps in all

FILE = "machine.json"
FORMAT_VERSION = 3
MOST_KEPT = 8  # profiles: of other thread counts or kernels on the same machine
INT4 = GroupInt(4, 128)
LARGE = (6144, 1)  # hidden size and layers: one of GPT-NeoX-20B, 234 MB as int4
LARGE_ON_LITTLE = (2048, 8)  # where less than LITTLE is free
LITTLE = 2 << 30
PLAIN = (2048, 1)  # 100 MB in 16 bits
SMALL = (768, 32)  # many small ones, 118 MB together: more than processors keep to themselves
MANY = 256  # tokens of the pass that shows operations a second
SECONDS = 0.6  # to repeat a measurement for
REPEATS = (3, 25)  # least and most
BUS_BYTES = 256 << 20
DISK_BYTES = 1 << 30
SLOT_BYTES = 128 << 20  # of a file read at a time: a layer or so
CONTEXT_BYTES = 512 << 20  # of a driver's context where the driver does not say
PROCESS_BYTES = 600 << 20  # of a process that has imported torch, where the system does not say
# What a number in a kept profile can be: wider than any machine, narrow enough that arithmetic with it means something.
SENSIBLE = {
    "read_bytes_per_s": (1e6, 1e15),
    "flops_per_s": (1e6, 1e18),
    "plain_flops_per_s": (1e6, 1e18),
    "layer_s": (0.0, 10.0),
    "feature_s": (0.0, 1.0),
    "bus_bytes_per_s": (1e6, 1e13),
    "disk_bytes_per_s": (1e3, 1e12),
    "process_bytes": (1 << 20, 1 << 40),
    "bytes": (1 << 20, 1 << 44),
    "context_bytes": (1, 1 << 40),
}
HOST_MARGIN = 512 << 20  # of what is free now, left to the rest of the system
GPU_MARGIN = 256 << 20


# The profile ----------------------------------------------------------------------------------------------------------


@overload
def profile(progress: Progress | None = None, measure: Literal[True] = True) -> Machine: ...
@overload
def profile(progress: Progress | None = None, *, measure: bool) -> Machine | None: ...
def profile(progress: Progress | None = None, measure: bool = True) -> Machine | None:
    """This machine's rates: the kept ones if they are of this machine as it is now, else measured (seconds) and kept.

    progress is told the steps done and in all while measuring. Without `measure`, None where nothing is kept.
    """
    found = _load(identity())
    return renew(progress) if found is None and measure else found


def renew(progress: Progress | None = None) -> Machine:
    """This machine's rates, measured now and kept in place of what was kept of it."""
    found = _measured(progress or (lambda done, total: None))
    _keep(identity(), found)
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
    """Where the profile is kept. Raises OSError where the user has no home."""
    return user_cache.folder() / FILE


def _load(here: dict[str, Any]) -> Machine | None:
    """The kept profile of this identity; None where there is none, or where the file makes no sense, which is said once."""
    try:
        for one in _kept():
            if entry(one, "identity") == here:
                return _parse(entry(one, "machine"))
    except ValueError as error:
        _say(f"{cache_file()} is not used: {error}")
    return None


def _kept() -> list[Any]:
    """The entries of the file, whatever they are; none where there is no file. Raises ValueError if it holds anything else."""
    found = user_cache.read(FILE)
    entries = [] if found is None else entry(found, "profiles")
    if not isinstance(entries, list):
        raise ValueError("profiles is no list")
    return entries


def _parse(found: Any) -> Machine:
    """Raises ValueError for anything but a profile of numbers that a machine can have."""
    card, disk = entry(found, "card"), entry(found, "disk_bytes_per_s")
    return Machine(
        _rates(entry(found, "cpu")),
        None if disk is None else _number(found, "disk_bytes_per_s"),
        int(_number(found, "process_bytes")),
        None if card is None else _card(card),
    )


def _card(found: Any) -> Card:
    name = entry(found, "name")
    if not isinstance(name, str) or not name.isprintable():
        raise ValueError(f"name is {shown(name)}, expected a GPU's")
    sizes = {key: int(_number(found, key)) for key in ("bytes", "context_bytes")}
    return Card(name, rates=_rates(entry(found, "rates")), bus_bytes_per_s=_number(found, "bus_bytes_per_s"), **sizes)


def _rates(found: Any) -> Rates:
    known = {key: _number(found, key) for key in ("read_bytes_per_s", "flops_per_s", "layer_s", "feature_s")}
    plain = entry(found, "plain_flops_per_s")
    return Rates(**known, plain_flops_per_s=None if plain is None else _number(found, "plain_flops_per_s"))


def _number(found: Any, key: str) -> float:
    value, (low, high) = entry(found, key), SENSIBLE[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{key} is {shown(value)}, expected {low:.3g} to {high:.3g}")
    return value


def _keep(here: dict[str, Any], found: Machine) -> None:
    """Write the profile beside those of other identities, whole or not at all; a folder that cannot be written is said once."""
    others: list[Any] = []
    with suppress(ValueError):  # a file that is not one of ours is replaced
        others = [p for p in _kept() if isinstance(p, dict) and p.get("identity") != here]
    profiles = [{"identity": here, "machine": asdict(found)}, *others][:MOST_KEPT]
    try:
        user_cache.write(FILE, {"profiles": profiles})
    except OSError as error:
        reason = error.strerror or error
        _say(f"the machine's measured speed cannot be kept, so it is measured every time: {reason}")


@cache
def _say(text: str) -> None:
    """Warn of something once."""
    warnings.warn(text, stacklevel=4)


def _measured(progress: Progress) -> Machine:
    gpu = torch.cuda.is_available()
    total = 7 if gpu else 4
    host = measure_rates(torch.device("cpu"), lambda done, _: progress(done, total))
    disk = measure_disk()
    progress(3, total)
    process = measure_process()
    progress(4, total)
    card = measure_card(lambda done, _: progress(4 + done, total)) if gpu else None
    return Machine(host, disk, process, card)


# Processors -----------------------------------------------------------------------------------------------------------


def measure_rates(device: torch.device, progress: Progress = lambda done, total: None) -> Rates:
    """Rates of a device in int4 layers of groups of 128: of one large layer and of many small ones.

    A straight line through the two gives the seconds for each byte and those of a layer beside them at one token, and at
    many tokens the seconds for each operation and those of a feature beside them. One plain layer gives the operations a second
    of those.
    """
    free = free_memory()[1] if device.type == "cpu" else free_gpu(device.index or 0)[1]
    large = LARGE_ON_LITTLE if free is not None and free < LITTLE else LARGE
    one, many = [], []

    def prefill_s(layers: Layers) -> float:
        """Seconds of a token in a layer, among many."""
        return _seconds(lambda: layers.prefill(MANY), device) / layers.count / MANY

    with torch.inference_mode():
        for step, (hidden, count) in enumerate((large, SMALL)):
            layers = Layers(device, hidden, count)
            one.append((layers.nbytes / count, _seconds(layers.decode(), device) / count))
            many.append((2 * layers.weights / hidden, prefill_s(layers) / hidden))
            del layers
            progress(step + 1, 2)
        plain = Layers(device, *PLAIN, DENSE)
        plain_s = prefill_s(plain)
    (byte_s, layer_s), (operation_s, feature_s) = _line(*one), _line(*many)
    products_s = max(plain_s - feature_s * PLAIN[0], 0.5 * plain_s)  # most of it, whatever noise says
    return Rates(1 / byte_s, 1 / operation_s, layer_s, feature_s, 2 * plain.weights / products_s)


def _line(large: tuple[float, float], small: tuple[float, float]) -> tuple[float, float]:
    """Slope and height at 0 of the line through two points, neither of them negative: on a busy machine they could be."""
    slope = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
    height = small[1] - slope * small[0]
    return (slope, height) if slope > 0 and height >= 0 else (large[1] / large[0], 0.0)


class Layers:
    """Layers of random weights on a device, and passes through them."""

    def __init__(self, device: torch.device, hidden: int, count: int, format: Format = INT4) -> None:
        config = GPTNeoXConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_attention_heads=hidden // 96 if hidden % 96 == 0 else hidden // 128,
            num_hidden_layers=count,
        )
        with device:
            self.layers = [GPTNeoXLayer(config, i, lambda name: format) for i in range(count)]
        for layer in self.layers:
            _fill(layer)
        self.count = count
        self.weights = sum(m.in_features * m.out_features for m in self.layers[0].modules() if isinstance(m, Linear))
        self.nbytes = sum(t.nbytes for layer in self.layers for t in (*layer.parameters(), *layer.buffers()))
        self.ops = dispatch.choose(device)
        self.rotary = Rotary(config).table.to(device)
        self.embedding = torch.randn(MANY, hidden, device=device).half()
        self.pool = PagePool(
            config.num_attention_heads, config.head_dim, torch.float16, [device] * count, pages=1 + -(-MANY // PAGE)
        )

    def decode(self) -> Callable[[], object]:
        """A pass of one token, captured where the backend can do that."""
        ids, batch = torch.tensor([0]), Batch.reserve(self.pool, [self.pool.new()], [1])
        passes = self.ops.pass_runner(lambda ids, pool, batch: self._run(ids, batch), self.embedding.device, PAGE)
        return lambda: passes.run(ids, self.pool, batch)

    def prefill(self, tokens: int) -> None:
        """A pass of so many tokens of one sequence."""
        block_table = self.pool.new()
        self._run(torch.arange(tokens), Batch.reserve(self.pool, [block_table], [tokens]))
        self.pool.free(block_table)

    def _run(self, ids: Tensor, batch: Batch) -> Tensor:
        device = self.embedding.device
        x = self.ops.embed(ids, self.embedding, self.ops.activation_dtype(torch.float16, device))
        for layer in self.layers:
            x = layer(x, self.ops, self.pool, batch, self.rotary)
        return x


def _fill(layer: GPTNeoXLayer) -> None:
    """16-bit values: random words, scales with which activations stay of order one."""
    for module in layer.modules():
        if isinstance(module, Linear):
            module.become(module.format, torch.float16)
    layer.half()
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if name.endswith("weight_packed"):
            tensor.random_(-(1 << 31), 1 << 31)
        elif name.endswith("weight_scale"):
            tensor.uniform_(0.5, 1.5).mul_(0.2 * (tensor.shape[1] * 128) ** -0.5)
        elif tensor.dim() == 2:
            tensor.uniform_(-1, 1).mul_(tensor.shape[1] ** -0.5)
        elif name.endswith("bias"):
            tensor.zero_()
        else:  # gains of norms; and weight_shape, which nothing reads while running
            tensor.fill_(1)


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


def measure_card(progress: Progress = lambda done, total: None) -> Card:
    """The first GPU: its rates, how fast pinned memory is copied there, and what the driver takes of it."""
    device = torch.device("cuda:0")
    rates = measure_rates(device, progress)
    bus = measure_bus(device)
    progress(3, 3)
    torch.cuda.empty_cache()
    return Card(torch.cuda.get_device_name(0), free_gpu()[0], rates, bus, context_bytes())


def measure_bus(device: torch.device) -> float:
    """Bytes a second that are copied from pinned host memory to a GPU, in pieces of 256 MiB."""
    source = torch.zeros(BUS_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(BUS_BYTES, dtype=torch.uint8, device=device)
    return BUS_BYTES / _seconds(lambda: target.copy_(source, non_blocking=True), device)


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


# Disk -----------------------------------------------------------------------------------------------------------------


def measure_disk() -> float | None:
    """Bytes a second of the disk that torch is installed on, from torch's own libraries; None where it cannot be told."""
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
    files, size = Files(), min(DISK_BYTES, found.st_size)
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


# Memory ---------------------------------------------------------------------------------------------------------------

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
    if not Path("/proc/self/status").exists():
        return PROCESS_BYTES
    code = PROBE.format(path=[os.fspath(Path(p).absolute()) for p in sys.path], threads=torch.get_num_threads())
    for _ in range(2):  # the first compiles kernels, which takes memory
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if (held := _resident(out.stdout)) is None:
        raise ArgumentError(
            f"a process to measure memory in failed: {(out.stderr.strip().splitlines() or ['no word'])[-1]}"
        )
    return sum(held.values())


def _resident(status: str) -> dict[str, int] | None:
    """Bytes of memory by kind, from the text of /proc/self/status."""
    found = dict(re.findall(r"^Rss(Anon|File|Shmem):\s*(\d+) kB", status, re.MULTILINE))
    return {kind: int(kib) << 10 for kind, kib in found.items()} if len(found) == 3 else None


def budgets(
    here: Machine, cpu_bytes: int | None = None, gpu_bytes: int | None = None, gpu: int | None = 0
) -> tuple[int, int | None]:
    """What this process may take of host memory and of the GPU number `gpu` in all.

    That is as given, or else what it holds and what is free now but a margin. None for the GPU's where `gpu` is None or the
    machine has none. Raises ArgumentError where the system does not say what is free.
    """
    if cpu_bytes is None:
        free = free_memory()[1]
        if free is None:
            raise ArgumentError("this system does not say how much memory is free; give the budget")
        held = _own_memory()
        own = held["Anon"] + held["Shmem"] if held else 0  # memory of files counts as free already
        cpu_bytes = max(0, free + own - HOST_MARGIN)
    if gpu is None or here.card is None:
        return cpu_bytes, None
    if gpu_bytes is None and torch.cuda.is_available():
        held_there = here.card.context_bytes + torch.cuda.memory_reserved(gpu)  # asking has made the context
        gpu_bytes = max(0, free_gpu(gpu)[1] + held_there - GPU_MARGIN)
    return cpu_bytes, gpu_bytes


def resident() -> int | None:
    """Bytes of memory that this process holds now; None where the system does not say."""
    held = _own_memory()
    return sum(held.values()) if held else None


def _own_memory() -> dict[str, int] | None:
    status = Path("/proc/self/status")
    return _resident(status.read_text()) if status.exists() else None


def free_gpu(index: int = 0) -> tuple[int, int]:
    """Total and free bytes of a GPU. Raises ArgumentError where torch sees no such device."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise ArgumentError(f"torch sees no CUDA device {index} here")
    free, total = torch.cuda.mem_get_info(index)
    return total, free


def free_memory() -> tuple[int | None, int | None]:
    """Total and available bytes of host memory, within a container's limit; None where the system does not say."""
    if platform.system() == "Windows":
        return _windows_memory()
    if platform.system() == "Darwin":
        return _mac_memory()
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    except (OSError, LookupError, ValueError):
        return None, None
    for limit, used in _cgroup_limits():
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _cgroup_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """(limit, used) of each control group above this process; used leaves out file pages that the kernel would drop."""
    names = {
        "v2": ("memory.max", "memory.current", "inactive_file"),
        "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    found = []
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, path in groups:
        if controllers and "memory" not in controllers.split(","):
            continue
        limit, usage, inactive = names["v1" if controllers else "v2"]
        mount = root / "memory" if controllers else root
        inner = mount / path.lstrip("/")
        for folder in {mount, inner, *(p for p in inner.parents if mount in p.parents)}:
            with suppress(OSError, ValueError):  # no such group here, or "max": no limit
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / usage).read_text()) - int(stat.get(inactive, 0))
                found.append((int((folder / limit).read_text()), used))
    return found


class _MemoryStatus(ctypes.Structure):
    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "free", "page_total", "page_free", "virtual", "virtual_free")),
        ("extended", ctypes.c_uint64),
    )


def _windows_memory() -> tuple[int | None, int | None]:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined]
        return None, None
    return status.total, status.free


def _mac_memory() -> tuple[int | None, int | None]:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        counts = subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return None, None
    return total, _mac_free(counts)


def _mac_free(text: str) -> int | None:
    """Bytes that macOS can give at once, from vm_stat's page counts."""
    size = re.search(r"page size of (\d+) bytes", text)
    pages = [re.search(rf"^Pages {kind}:\s*(\d+)", text, re.MULTILINE) for kind in ("free", "inactive", "speculative")]
    return int(size[1]) * sum(int(p[1]) for p in pages if p) if size and all(pages) else None


# The processor --------------------------------------------------------------------------------------------------------


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
