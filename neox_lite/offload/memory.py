"""What memory this machine has, what is free of it now, and what this process holds. Knows no model and no plan."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

from ..errors import ArgumentError

STATUS = Path("/proc/self/status")


def free_gpu(index: int = 0) -> tuple[int, int]:
    """Total and free bytes of a GPU. Raises ArgumentError where torch sees no such device."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise ArgumentError(f"torch sees no CUDA device {index} here")
    free, total = torch.cuda.mem_get_info(index)
    return total, free


def own_memory(status: str | None = None) -> dict[str, int] | None:
    """Bytes of this process's memory by kind, Anon, File and Shmem; None where the system does not say.

    status: the text of another process's /proc/PID/status.
    """
    if status is None:
        if not STATUS.exists():
            return None
        status = STATUS.read_text()
    found = dict(re.findall(r"^Rss(Anon|File|Shmem):\s*(\d+) kB", status, re.MULTILINE))
    return {kind: int(kib) << 10 for kind, kib in found.items()} if len(found) == 3 else None


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
