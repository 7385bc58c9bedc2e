"""Which backend runs on a device: the table, and the reason for every one passed over."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from ..errors import ArgumentError

# Fastest first. A new backend is one folder beside this file and one line here.
BACKENDS = {"reference": "neox_lite.kernels.reference"}


def load(name: str) -> ModuleType:
    """The module of a backend by name."""
    if name not in BACKENDS:
        raise ArgumentError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[name])


def choose(device: torch.device) -> ModuleType:
    """The fastest backend that runs on `device`."""
    return next(module for name in BACKENDS if (module := load(name)).why_not(device) is None)


def reasons(device: torch.device) -> dict[str, str | None]:
    """For each backend, None when it runs on `device`, else why not."""
    return {name: load(name).why_not(device) for name in BACKENDS}
