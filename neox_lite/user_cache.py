"""Small JSON files of this user that last between runs: their folder, a careful reader, an atomic writer. Knows no content.

They lie in ~/.cache/neox-lite; XDG_CACHE_HOME moves the first part of that, NEOX_LITE_CACHE names the whole folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .files import read_json, write_atomically

MAX_BYTES = 4 << 20  # of a file: what we write is a few kilobytes


def folder() -> Path:
    """Raises OSError, without a file name, where the user has no home."""
    own = os.environ.get("NEOX_LITE_CACHE")
    above = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        return Path(own).expanduser() if own else Path(above or "~/.cache").expanduser() / "neox-lite"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def read(name: str) -> dict[str, Any] | None:
    """The JSON object in the file of this name; None where there is no file. Raises ValueError for anything else."""
    try:
        path = folder() / name
    except OSError:  # there is no home; `write` raises the same, and its caller reports it
        return None
    if not os.path.lexists(path):
        return None
    try:
        return read_json(path, ConfigError, MAX_BYTES)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix(f"{path}: ")) from error  # the caller names the file


def write(name: str, value: Any) -> None:
    """Replace the file of this name by another, whole or not at all. Raises OSError."""
    write_atomically(folder() / name, json.dumps(value, indent=1) + "\n", durable=False, private=True)


def entry(value: Any, key: str) -> Any:
    """value[key] of a value from a file. Raises ValueError unless it is an object with that key."""
    if not isinstance(value, dict) or key not in value:
        raise ValueError(f"{shown(value)} has no {key}")
    return value[key]


def shown(value: Any) -> str:
    """A value from a file, short enough for a line."""
    text = json.dumps(value)
    return text if len(text) < 40 else f"{text[:36]} …"
