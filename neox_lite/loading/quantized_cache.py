"""Models that were quantized while loading, kept beside the hub cache for the next time. Knows no format."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

import torch

from ..checkpoint.folder_writer import CONFIG
from ..checkpoint.reader import Checkpoint
from ..config import GPTNeoXConfig
from ..core.network import Network
from ..errors import NeoxLiteError
from .apply import announce
from .save import save_pretrained


def cache_root() -> Path:
    """Where models quantized while loading are kept: beside the hub cache."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(home).expanduser() / "neox-lite"


def cached_folder(
    cls: type,
    name: str | os.PathLike[str],
    quantization: str | None,
    changed: GPTNeoXConfig | None,
    folder: Path,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
) -> Path:
    """A folder named after everything that decides the result: source files, format, dtype and class.

    changed: the config, where it is another than the source's.
    """
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.files]
    config = (folder / "config.json").stat().st_mtime_ns if changed is None else changed.to_json_string()
    identity = repr((str(folder.resolve()), stats, config, quantization, str(dtype), cls.__name__))
    label = re.sub(r"[^A-Za-z0-9._-]+", "--", Path(os.fspath(name)).name)
    return cache_root() / f"{label}-{quantization}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def keep_quantized(model: Network, cached: Path) -> None:
    """Save what was just quantized; a full or read-only disk costs the next start time, not this one.

    Written beside its place and renamed. The writer lets one process in at a time, and takes over what a killed one left.
    """
    partial = cached.with_name(f"{cached.name}.partial")
    try:
        save_pretrained(model, partial, "5GB")
        partial.rename(cached)
        announce(f"kept the quantized model in {cached} for the next start")
    except (NeoxLiteError, OSError) as error:
        if (cached / CONFIG).is_file():  # another process was quicker
            shutil.rmtree(partial, ignore_errors=True)
        else:
            announce(f"the quantized model could not be kept for the next start: {error}")
