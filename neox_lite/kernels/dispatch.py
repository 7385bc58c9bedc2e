"""Which backend runs on a device: the table, and the reason for every one passed over."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch

from ..errors import ArgumentError
from .backend import Backend

# Fastest first: module, and the kind of device it is for (None: any). A new backend is one folder here and one line.
BACKENDS: dict[str, tuple[str, str | None]] = {
    "triton": ("neox_lite.kernels.triton", "cuda"),
    "cpu": ("neox_lite.kernels.cpu", "cpu"),
    "reference": ("neox_lite.kernels.reference", None),
}


def load(name: str) -> ModuleType:
    """The module of a backend by name: `why_not(device)` says whether it runs there, `bind(exact)` gives its operations."""
    if name not in BACKENDS:
        raise ArgumentError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[name][0])


def choose(device: torch.device, exact: bool = False) -> Backend:
    """The operations of the fastest backend that runs on `device`; exact: none that rounds activations to integers.

    A faster one made for this kind of device that cannot run is announced, with the reason.
    """
    for name, reason in reasons(device).items():
        if reason is None:
            return load(name).bind(exact)
        warnings.warn(f"the {name} backend cannot be used, this will be slow: {reason}", stacklevel=3)
    raise ArgumentError(f"no backend runs on {device}")


def reasons(device: torch.device) -> dict[str, str | None]:
    """For each backend made for this kind of device, None when it runs there, else why not."""
    made = [name for name, (_, kind) in BACKENDS.items() if kind in (None, device.type)]
    return {name: load(name).why_not(device) for name in made}
