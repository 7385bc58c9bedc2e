"""neox-lite doctor: what this machine has, what will be used, and why not more."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

from neox_lite.errors import ArgumentError
from neox_lite.kernels import cpu, dispatch
from neox_lite.kernels.triton import tuning
from neox_lite.loading.quantized_cache import cache_root
from neox_lite.offload import profile
from neox_lite.offload.memory import free_memory
from neox_lite.offload.plan import HardwareProfile
from neox_lite.units import format_bytes
from neox_lite.version import __version__

from .load_for_command import default_threads, measure_hardware
from .terminal import print_json

PACKAGES = (
    "torch",
    "triton",
    "llvmlite",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "gradio",
    "transformers",
)


def doctor(args: argparse.Namespace) -> None:
    torch.set_num_threads(default_threads())
    if args.measure:
        for device in cards()[:1]:  # the one that is measured, which times what it launches
            tuning.tuner(device).renew()
    result = examine(measure_hardware() if args.measure else measured())
    if args.json:
        print_json(result)
    else:
        print(describe(result))


def examine(rates: HardwareProfile | None) -> dict[str, Any]:
    """Facts about this machine; memory and disk in bytes."""
    total, free = free_memory()
    cache = cache_root().parent
    above = next(p for p in (cache, *cache.parents) if p.exists())
    return {
        "neox_lite": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {
            "name": profile.cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "memory_bytes": total,
        "memory_free_bytes": free,
        "gpus": gpus(),
        "gpu_why_not": None if torch.cuda.is_available() else no_gpu_reason(),
        "gpu_kernels": sizes(),
        "cpu_kernels": cpu.paths() if cpu.why_not(torch.device("cpu")) is None else {},
        "backends": {where: dispatch.reasons(torch.device(where)) for where in devices()},
        "measured": None if rates is None else asdict(rates),
        "packages": {name: version(name) for name in PACKAGES},
        "cache": str(cache),
        "cache_free_bytes": shutil.disk_usage(above).free,
    }


def devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def cards() -> list[torch.device]:
    """The GPUs that Triton's kernels run on."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cuda", i) for i in range(count)]
    return [d for d in devices if dispatch.load("triton").why_not(d) is None]


def sizes() -> dict[str, dict[str, Any]]:
    """Which sizes Triton's kernels take on each GPU, why, and those that were timed there."""
    found = {}
    for device in cards():
        try:
            here = tuning.tuner(device)
        except ArgumentError as error:
            found[str(device)] = {"why": str(error), "timed": {}}
        else:
            found[str(device)] = {"why": tuned(here), "timed": here.tuned}
    return found


def tuned(here: tuning.Tuner) -> str:
    """Which sizes are used on a card, and why."""
    stored = f"{len(here.tuned)} timed on this card, kept in {tuning.FILE}; others" if here.tuned else "all"
    if here.enabled:
        reason = "as asked" if here.when == "always" else "no choices are shipped for its class"
        return f"{stored} are timed on first use ({reason})"
    unknown = f"on most cards: its class is unknown, and {tuning.VARIABLE} is never"
    return f"{stored} as {unknown if here.shipped is None else f'shipped for {here.shipped}'}"


def gpus() -> list[dict[str, Any]]:
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        major, minor = torch.cuda.get_device_capability(i)
        found.append(
            {
                "name": torch.cuda.get_device_name(i),
                "capability": f"{major}.{minor}",
                "bytes": total,
                "free_bytes": free,
            }
        )
    return found


def no_gpu_reason() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA; install the CUDA build of torch to use an NVIDIA GPU"
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver found (nvidia-smi is missing)"
    return f"torch was built for CUDA {torch.version.cuda}, but the driver shows it no device; see nvidia-smi"


def measured() -> HardwareProfile | None:
    """The rates that predictions rest on; None where they were not measured yet, or no kernel is left to measure."""
    try:
        return profile.load()
    except ArgumentError:
        return None


def speed(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not measured yet; neox-lite doctor --measure does that"
    shown = [f"CPU {_processor(found['cpu'])}"]
    if found["card"] is not None:
        bus = found["card"]["bus_bytes_per_s"] / 1e9
        shown.append(f"GPU {_processor(found['card']['rates'])}, {bus:.0f} GB/s to it")
    if found["disk_bytes_per_s"] is not None:
        shown.append(f"disk {found['disk_bytes_per_s'] / 1e9:.1f} GB/s")
    return "; ".join(shown) + " (neox-lite doctor --measure measures again)"


def _processor(rates: dict[str, float]) -> str:
    return f"{rates['read_bytes_per_s'] / 1e9:.0f} GB/s of int4 weights, {rates['flops_per_s'] / 1e12:.2f} TFLOP/s"


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(result: dict[str, Any]) -> str:
    cpu = result["cpu"]
    lines = [
        f"neox-lite {result['neox_lite']}, Python {result['python']}, {result['system']}",
        f"CPU      {cpu['name']}: {cpu['cores']} cores, {cpu['threads']} threads used, {cpu['instructions']}",
        f"memory   {known(result['memory_free_bytes'])} free of {known(result['memory_bytes'])}",
    ]
    for gpu in result["gpus"]:
        sm = gpu["capability"].replace(".", "")
        free, total = format_bytes(gpu["free_bytes"]), format_bytes(gpu["bytes"])
        lines.append(f"GPU      {gpu['name']}, sm_{sm}: {free} free of {total}")
    if result["gpu_why_not"]:
        lines.append(f"GPU      none: {result['gpu_why_not']}")
    for where, reasons in result["backends"].items():
        lines += _choice(f"backend  on {where}: ", reasons)
    lines += [f"kernels  on {where}: {found['why']}" for where, found in result["gpu_kernels"].items()]
    lines += _choice("kernels  for this processor: ", result["cpu_kernels"]) if result["cpu_kernels"] else []
    lines.append(f"speed    {speed(result['measured'])}")
    lines.append(f"cache    {result['cache']}, {format_bytes(result['cache_free_bytes'])} free on its disk")
    lines.append("packages " + ", ".join(f"{name} {found}" for name, found in result["packages"].items() if found))
    absent = [name for name, found in result["packages"].items() if not found]
    lines += [f"         not installed: {', '.join(absent)}"] if absent else []
    return "\n".join(lines)


def _choice(what: str, reasons: dict[str, str | None]) -> list[str]:
    """The first that works, and why each before it does not."""
    used = next((name for name, reason in reasons.items() if reason is None), None)
    lines = [what + (used or "none")]
    for name, reason in reasons.items():
        if name == used:
            break
        lines.append(f"         {name} not used: {reason}")
    return lines


def known(count: int | None) -> str:
    return "unknown" if count is None else format_bytes(count)
