"""What commands share: loading a model as the placement flags say, progress bars, JSON out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.errors import ArgumentError
from neox_lite.formats import Format, formats_of, label
from neox_lite.generation.parameters import NUMBERS
from neox_lite.layers import Linear
from neox_lite.offload import profile
from neox_lite.offload.placement import device_of
from neox_lite.offload.plan import HardwareProfile
from neox_lite.units import dtype_name, parse_bytes

from .terminal import amount, bar, note

MIXED = "mixed"
BUSY = 0.3  # load average from which on measurements suffer


def load(name: str, args: argparse.Namespace, head: str | None = None, **options: Any) -> GPTNeoXForCausalLM:
    """Load a model as the placement flags say, but for what options say, and say in one line what runs where."""
    torch.set_num_threads(args.threads or default_threads())
    given = {name: getattr(args, name, None) for name in ("revision", "adapter")}
    given |= {"exact": args.exact, "head": head, **placing(args)}
    model = GPTNeoXForCausalLM.from_pretrained(name, **{**given, **options})
    note(f"{name}: {describe(model)}")
    if args.warm:
        with bar("read the weights") as progress:
            model.warm(progress)
    return model


def placing(args: argparse.Namespace) -> dict[str, Any]:
    """What the placement flags mean as options of from_pretrained. Raises ArgumentError, in the flags' own names."""
    gpu_bytes, cpu_bytes = memory_limit(args, "gpu"), memory_limit(args, "cpu")
    device = None if args.device == "auto" else device_of(args.device, "--device is")
    if gpu_bytes and device is not None and device.type == "cpu":
        raise ArgumentError("--gpu-memory and --device cpu contradict each other; leave one out")
    if gpu_bytes and not torch.cuda.is_available():
        raise ArgumentError("--gpu-memory: torch sees no GPU here; leave it out")
    limits = {args.device if args.device.startswith("cuda") else "cuda": gpu_bytes, "cpu": cpu_bytes}
    limits = {where: limit for where, limit in limits.items() if limit is not None}
    return {
        "device_map": args.device,
        "max_memory": limits or None,
        "context": getattr(args, "context", None),
        "kv": args.kv,
    }


def memory_limit(args: argparse.Namespace, side: str) -> int | None:
    """Bytes that --gpu-memory or --cpu-memory allows; None where it is not given."""
    text = vars(args)[f"{side}_memory"]
    try:
        return None if text is None else parse_bytes(text)
    except (ArgumentError, OverflowError) as error:
        raise ArgumentError(f"--{side}-memory is {text[:40]!r}, expected a size such as 8GiB or 500MB") from error


def measure_hardware() -> HardwareProfile:
    """Measure this machine's speed, with a progress bar, and keep it."""
    warn_if_busy()
    with bar("measure this machine", "step") as progress:
        return profile.measure(progress)


def warn_if_busy() -> float | None:
    """The load average where the system tells it, with a warning where that is high."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > BUSY:
        note(f"neox-lite: warning: this machine is busy (load {load:.1f}); figures may be low")
    return load


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the sampling flags under the names of `generate`; None where a flag is not given."""
    return {parameter.name: getattr(args, parameter.name) for parameter in NUMBERS}


def default_threads() -> int:
    """Torch's choice, one for each core, but no more than the share of the processor that a container was given.

    Threads beyond that share make the system halt all of them together, again and again.
    """
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        share = max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return torch.get_num_threads()
    return min(share, torch.get_num_threads())


def describe(model: GPTNeoXForCausalLM) -> str:
    """Format, size, device and backend in one line."""
    size = amount(model.get_memory_footprint(), "B")
    cache = ", int8 KV cache" if model.kv == "int8" else ""
    adapter = f", adapter {model.adapter.name}" if model.adapter is not None else ""
    return f"{format_name(model)}{adapter}, {size} on {placement(model)}{cache}"


def placement(model: GPTNeoXForCausalLM) -> str:
    """The devices and the backends that will run, in words."""
    where = model.placement
    if where is None:
        return _side(model, "cpu" if model.device.type == "cpu" else "gpu")
    counts = {tier: where.layers.count(tier) for tier in ("gpu", "cpu", "disk")}
    names = {"gpu": _side(model, "gpu"), "cpu": _side(model, "cpu"), "disk": "the disk"}
    return ", ".join(f"{names[tier]} for {count} layers" for tier, count in counts.items() if count)


def _side(model: GPTNeoXForCausalLM, side: str) -> str:
    if side not in model.runner.layers.ops:
        return ""
    name = model.runner.layers.ops[side].name
    if side == "gpu":
        device = model.accelerator.device if model.accelerator is not None else model.device
        reason = model.graph_reason
        graphs = "CUDA graphs" if reason is None else f"no CUDA graphs: {reason}"
        return f"{device} ({name} backend, {graphs})"
    threads = torch.get_num_threads()
    return f"the CPU ({name} backend, {threads} thread{'s' if threads > 1 else ''})"


def format_name(model: GPTNeoXForCausalLM) -> str:
    """How the linear layers are stored, in words."""
    linears = (m for m in model.gpt_neox.layers.modules() if isinstance(m, Linear))
    return common_label((m.format for m in linears), dtype_name(model.dtype))


def formats_in(config: GPTNeoXConfig) -> set[Format]:
    """The formats of the linear layers."""
    lookup = formats_of(config.quantization_config)
    return {lookup(f"gpt_neox.layers.{i}.{n}") for i in range(config.num_hidden_layers) for n in config.linear_shapes}


def common_label(formats: Iterable[Format], plain: str) -> str:
    """int4 g128, nf4, float16, …; mixed where formats differ."""
    found = {label(format, plain) for format in formats}
    return found.pop() if len(found) == 1 else MIXED
