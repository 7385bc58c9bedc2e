"""Where a model's tensors came from, and whether they are still the same ones. Knows no module class and reads no file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..offload.stream import Origin, Origins


@dataclass
class Source:
    """Where a model came from; empty for one built from a config.

    origins: by full name, the place in a file of each tensor that is mapped from there, its address and its version.
    """

    folder: Path | None = None
    name: str | None = None
    revision: str | None = None
    origins: dict[str, tuple[Origin, int, int]] = field(default_factory=dict, compare=False, repr=False)

    def origins_in(self, module: nn.Module, prefix: str) -> Origins:
        """Places in files of a module's tensors, as far as they are still what the files hold."""
        found = {name: (tensor, self.origins.get(prefix + name)) for name, tensor in module.state_dict().items()}
        return {n: at[0] for n, (tensor, at) in found.items() if at is not None and at[1:] == identity_of(tensor)}


def identity_of(tensor: Tensor) -> tuple[int, int]:
    """Another address or version, and the tensor was replaced or written to."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def identities(module: nn.Module) -> list[tuple[int, int]]:
    """Of all tensors of a module: changes when one is written to or replaced."""
    tensors = (*module.parameters(), *module.buffers())
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


class TensorWatch:
    """Notices that tensors of a module are not those, or not where, they were."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        tables: list[Any] = [table for part in module.modules() for table in (part._parameters, part._buffers)]
        slots = [(table, name) for table in tables for name, tensor in table.items() if tensor is not None]
        self._tables, self._names = [table for table, _ in slots], [name for _, name in slots]
        self._identities, self._addresses = identities(module), self._addresses_now()

    def changed(self) -> bool:
        """Whether one was written to or replaced. Takes some 100 us for a small model."""
        return self._identities != identities(self._module)

    def moved(self) -> bool:
        """Whether one lies elsewhere or is gone; one written to in place does not. For every step: takes some 10 us."""
        return self._addresses != self._addresses_now()

    def _addresses_now(self) -> list[int]:
        try:
            return list(map(Tensor.data_ptr, map(dict.__getitem__, self._tables, self._names)))
        # A tensor was deleted, or replaced by None.
        except (KeyError, TypeError):
            return []


def on_meta() -> bool:
    """Whether tensors are made without memory just now, as from_pretrained has a model built."""
    return torch.empty(0).device.type == "meta"
