"""What a forward pass and `generate` return. Knows nothing of what it holds."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

# Later names of transformers.
ALIASES = {"cache": "past_key_values"}


class ModelOutput(OrderedDict[str, Any]):
    """Values by attribute, by name, or by place, leaving out what is None."""

    def __init__(self, **values: Any) -> None:
        super().__init__((k, v) for k, v in values.items() if v is not None)
        self._names = frozenset(values)

    def __getattr__(self, name: str) -> Any:
        name = ALIASES.get(name, name)
        if name.startswith("_") or name not in self._names:
            raise AttributeError(f"no output {name!r}; there are {', '.join(self)}")
        return self.get(name)

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(ALIASES.get(key, key)) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())
