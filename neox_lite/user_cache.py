"""Small JSON files kept for this user between runs: where they lie, read with doubt, written whole. Knows no content.

They lie in ~/.cache/neox-lite; XDG_CACHE_HOME moves the first part of that, NEOX_LITE_CACHE names the whole folder.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST_BYTES = 4 << 20  # of a file: what we write is a few kilobytes


def folder() -> Path:
    """Raises OSError, without a file name, where the user has no home."""
    own = os.environ.get("NEOX_LITE_CACHE")
    above = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        return Path(own).expanduser() if own else Path(above or "~/.cache").expanduser() / "neox-lite"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def read(name: str) -> Any:
    """What the file of this name in the folder holds; None where there is no file. Raises ValueError for what is no JSON."""
    try:
        path = folder() / name
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # and what cannot be written either is said where it is written
        if error.filename is None:  # there is no home
            return None
        raise ValueError(f"it cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    if found is None:
        raise ValueError("it holds null")
    return found


def write(name: str, value: Any) -> None:
    """Replace the file of this name by another, whole or not at all. Raises OSError."""
    text = json.dumps(value, indent=1) + "\n"
    partial = None
    try:
        target = folder() / name
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as written:
            partial = Path(written.name)
            written.write(text)
        partial.replace(target)
    except OSError:
        if partial is not None:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        raise


def entry(kept: Any, key: str) -> Any:
    """kept[key] of what a file held. Raises ValueError where it is no such thing."""
    if not isinstance(kept, dict) or key not in kept:
        raise ValueError(f"{shown(kept)} has no {key}")
    return kept[key]


def shown(value: Any) -> str:
    """What a file held, short enough for a line."""
    text = json.dumps(value)
    return text if len(text) < 40 else f"{text[:36]} …"
