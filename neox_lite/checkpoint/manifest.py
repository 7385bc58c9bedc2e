"""Which files a model folder has, and the manifest with their sizes and hashes. Opens no weight file to read tensors."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown
from ..files import read_json
from .safetensors_file import MAX_HEADER_BYTES

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
FORMAT_VERSION = 1
CHUNK_BYTES = 16 << 20

EXTRA_WEIGHTS = re.compile(r"neox_lite_[a-z_]+\.safetensors")
OUR_WEIGHTS = re.compile(r"model(-[0-9]+-of-[0-9]+)?\.safetensors(\.index\.json)?|" + EXTRA_WEIGHTS.pattern)
ANY_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf)")


def is_model_file(name: str) -> bool:
    """Whether a file of this name is part of a model, whoever wrote it."""
    return name == CONFIG or bool(OUR_WEIGHTS.fullmatch(name) or ANY_WEIGHTS.fullmatch(name))


def check_file_name(name: str, where: object) -> None:
    """Raises CheckpointError unless name is a plain relative path on every system; where is the file that names it."""
    parts = name.split("/")
    plain = not re.search(r"[\\:\x00-\x1f]", name) and not any(part in ("", ".", "..") for part in parts)
    if not plain or len(name.encode()) > 255:
        raise CheckpointError(f"{where}: unsafe file name {shown(repr(name))}; expected a plain name inside the folder")


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest, or a journal, which has the same files. Raises CheckpointError if it is not one of ours.

    manifest["files"] maps the name of a file to {"bytes", "sha256"}.
    """
    manifest = read_json(path, CheckpointError, MAX_HEADER_BYTES)
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path}: not a manifest of format_version {FORMAT_VERSION}")
    for name, entry in files.items():
        check_file_name(name, path)
        if "/" in name or not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise CheckpointError(f"{path}: {shown(name)}: expected a file of this folder with bytes and sha256")
    return manifest


def manifest_entry(raw: bytes) -> dict[str, Any]:
    """What a manifest holds about a small file of this content."""
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def compare_file(
    path: Path, entry: Mapping[str, Any], progress: Callable[[int], object] = lambda count: None
) -> list[str]:
    """What is wrong with a file beside its entry in a manifest: its size or its SHA-256; [] if nothing.

    progress: called with the number of bytes of each piece that was read.
    """
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return [f"{path}: {size} bytes, expected {entry['bytes']}"]
        if _sha256_of(path, progress) != entry["sha256"]:
            return [f"{path}: SHA-256 differs from the manifest: the file has changed"]
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror or error}"]
    return []


def _sha256_of(path: Path, progress: Callable[[int], object]) -> str:
    """SHA-256 of a file, read in pieces; hashlib.file_digest needs Python 3.11."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            progress(count)
    return digest.hexdigest()
