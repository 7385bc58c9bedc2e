"""The atomic writer of a model folder, and the manifest it leaves; it never opens a weight file to read tensors.

A weight file gets its name when every byte is there, synced and hashed. config.json comes last, so a folder that looks
complete is complete. Outputs carry no times and no paths: the same input gives the same bytes.
A writer with a job writes a journal of the weight files that are whole, from which a run of the same job resumes.
"""

import contextlib
import hashlib
import json
import logging
import os
import threading
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError, first_few, shown
from ..files import (
    PARTIAL,
    UNSUPPORTED,
    AtomicFile,
    disk_errors,
    free_bytes,
    lock,
    partials,
    sync_folder,
    write_atomically,
)
from ..hub import MANIFEST, UNFINISHED
from ..units import dtype_name
from ..version import __version__
from .manifest import (
    CHUNK_BYTES,
    CONFIG,
    EXTRA_WEIGHTS,
    FORMAT_VERSION,
    INDEX,
    OUR_WEIGHTS,
    check_file_name,
    compare_file,
    is_model_file,
    manifest_entry,
    read_manifest,
)
from .safetensors_file import DTYPE_NAMES, Spec, encode_header, layout

logger = logging.getLogger("neox_lite")

JOURNAL = "neox_lite_journal.json"  # there while a folder is being written: for which job, and the weight files that are whole


# -- one weight file --------------------------------------------------------------------------------------------------


def split_into_shards(groups: Sequence[Sequence[Spec]], max_bytes: int = 5_000_000_000) -> list[list[Spec]]:
    """Fill shards of at most max_bytes in order, keeping each group (say, one module's tensors) in one shard.

    A group larger than max_bytes gets a shard of its own.
    """
    shards: list[list[Spec]] = [[]]
    for group in groups:
        if shards[-1] and sum(spec.nbytes for spec in (*shards[-1], *group)) > max_bytes:
            shards.append([])
        shards[-1].extend(group)
    return shards


class ShardWriter:
    """One weight file while it is written. It gets its name when every byte is there and on the disk."""

    def __init__(
        self, path: Path, specs: Sequence[Spec], finished: Callable[["ShardWriter"], object] = lambda writer: None
    ) -> None:
        """finished is called when the file has its name."""
        self.path = path
        self.sha256 = ""  # known when the file is complete
        self._finished = finished
        self._atomic = AtomicFile(path)
        self._specs = {spec.name: spec for spec in layout(specs)}
        self._prefix, self._offsets = encode_header(self._specs.values())
        self.size = len(self._prefix) + sum(spec.nbytes for spec in specs)
        self._claimed: dict[str, list[tuple[int, int]]] = {name: [] for name in self._specs}
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in self._specs}
        self._lock = threading.Lock()
        self._digest, self._hashed = hashlib.sha256(), 0  # of the file's first bytes

    def __enter__(self) -> "ShardWriter":
        with disk_errors(self.path, self.size):
            self._file: Any = self._atomic.__enter__().raw  # type: ignore[attr-defined]
            try:
                _preallocate(self._file, self.size)
                self._put(memoryview(self._prefix), 0)
            except BaseException:
                self.discard()
                raise
        return self

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Put a tensor, or some of its rows starting at row, in place; in any order, each row once, from any thread.

        tensor (rows, *spec.shape[1:]) in spec.dtype, on any device. Raises CheckpointError if it does not fit its Spec.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise CheckpointError(f"{self.path}: {shown(name)} is not planned for this file")
        if tensor.dtype != spec.dtype or tensor.shape[1:] != spec.shape[1:] or tensor.dim() != len(spec.shape):
            found, expected = dtype_name(tensor.dtype), dtype_name(spec.dtype)
            raise CheckpointError(f"{name}: got {found} {list(tensor.shape)}, planned {expected} {list(spec.shape)}")
        rows, total = (tensor.shape[0], spec.shape[0]) if spec.shape else (1, 1)
        if not 0 <= row <= row + rows <= total:
            raise CheckpointError(f"{name}: rows {row}..{row + rows} of {total}")
        if rows:
            self._note(self._claimed, name, row, row + rows)
        if tensor.numel():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            with disk_errors(self.path, self.size):
                self._put(data, self._offsets[name] + row * (spec.nbytes // total))
        if rows:
            self._note(self._written, name, row, row + rows)

    def hash_and_sync(self, progress: Callable[[], object] = lambda: None) -> None:
        """Hash what is whole from the file's start on, and sync it to the disk, so that less is left to do at the end.

        May run beside writes; in one thread at a time. progress is called every 16 MB.
        """
        stop, buffer = self._whole_bytes(), memoryview(bytearray(CHUNK_BYTES))
        with disk_errors(self.path, self.size):
            while self._hashed < stop:
                count = self._get(buffer[: min(CHUNK_BYTES, stop - self._hashed)], self._hashed)
                self._digest.update(buffer[:count])
                self._hashed += count
                progress()
            os.fsync(self._file.fileno())

    def _whole_bytes(self) -> int:
        """How many bytes from the file's start on are written."""
        end = len(self._prefix)
        with self._lock:
            for name, spec in self._specs.items():
                rows = spec.shape[0] if spec.shape else 1
                spans = self._written[name]
                first = spans[0][1] if spans and not spans[0][0] else 0
                end += spec.nbytes * first // rows if rows else 0
                if first < rows:
                    break
        return end

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._check_is_whole()
                self.hash_and_sync()
        except BaseException:
            self.discard()
            raise
        with disk_errors(self.path, self.size):
            self._atomic.__exit__(kind, error, trace)
        if kind is None:
            self.sha256 = self._digest.hexdigest()
            self._finished(self)

    def _check_is_whole(self) -> None:
        for name, spec in self._specs.items():
            rows = spec.shape[0] if spec.shape else 1
            if rows and self._written[name] != [(0, rows)]:
                raise CheckpointError(f"{self.path}: {name}: only rows {self._written[name]} of {rows} are written")

    def discard(self) -> None:
        """Remove what is not whole; harmless after a good end."""
        self._atomic.discard()

    def _note(self, of: dict[str, list[tuple[int, int]]], name: str, start: int, stop: int) -> None:
        """Add rows start..stop to the spans of a tensor; touching ones are merged, so a complete tensor has one span."""
        with self._lock:
            spans = of[name]
            at = bisect(spans, (start, stop))
            if (at and spans[at - 1][1] > start) or (at < len(spans) and spans[at][0] < stop):
                raise CheckpointError(f"{name}: rows {start}..{stop} are written twice")
            if at < len(spans) and spans[at][0] == stop:
                stop = spans.pop(at)[1]
            if at and spans[at - 1][1] == start:
                start = spans.pop(at - 1)[0]
                at -= 1
            spans.insert(at, (start, stop))

    def _put(self, data: memoryview, offset: int) -> None:
        while data:
            if hasattr(os, "pwrite"):
                count = os.pwrite(self._file.fileno(), data[: 64 << 20], offset)
            else:  # Windows
                with self._lock:
                    self._file.seek(offset)
                    count = self._file.write(data[: 64 << 20])
            data, offset = data[count:], offset + count

    def _get(self, buffer: memoryview, offset: int) -> int:
        """Read into the buffer; how many bytes there were, which is never none."""
        if hasattr(os, "preadv"):
            count: int = os.preadv(self._file.fileno(), [buffer], offset)
        else:  # Windows, macOS before 11
            with self._lock:
                self._file.seek(offset)
                count = self._file.readinto(buffer)
        if not count:
            raise CheckpointError(f"{self.path}: was cut short by another program while it was written; run again")
        return count


# -- the folder -------------------------------------------------------------------------------------------------------


class FolderWriter:
    """Writes a model folder that looks complete only when it is: config.json appears last.

        with FolderWriter(folder, source=source_folder) as out:
            out.shards(split_into_shards(groups))
            for i in range(len(out.plan)):
                with out.shard(i) as shard:
                    shard.write(name, tensor)
            out.file("tokenizer.json", text)
            out.finish(config_json, method="mse", source="owner/name", source_revision=commit)

    A model that neox-lite wrote there before is replaced, from the first write on; any other model is refused.
    One writer per folder at a time.
    """

    def __init__(self, folder: str | Path, source: str | Path | None = None, job: str | None = None) -> None:
        """source: the folder being read, which must be another.

        job: a digest of everything that decides the bytes of the weight files. `is_done` then finds those that an earlier run
        of the same job left whole.
        """
        self.folder = Path(folder)
        self.plan: list[list[Spec]] = []
        self._job = job
        self._earlier: dict[str, dict[str, Any]] = {}  # manifest entries of weight files that an earlier run left
        self._weights: dict[str, dict[str, Any]] = {}  # manifest entries of whole weight files
        self._writers: dict[str, ShardWriter] = {}
        self._small: dict[str, dict[str, Any]] = {}  # manifest entries of the small files
        self._stale: set[str] = set()
        self._marker: Any = None
        self._finished = False
        self._is_new = False
        check_destination(self.folder, None if source is None else Path(source))

    def __enter__(self) -> "FolderWriter":
        return self

    def shards(
        self, shards: Sequence[Sequence[Spec]], others: Mapping[str, int] | None = None, scratch_bytes: int = 0
    ) -> None:
        """Plan the weight files. others: bytes of other files by name. scratch_bytes: of files that will be deleted again.

        Raises CheckpointError on a duplicate, or if the disk is too full.
        """
        seen: set[str] = set()
        for spec in (spec for shard in shards for spec in shard):
            if spec.name in seen or spec.name == "__metadata__" or spec.dtype not in DTYPE_NAMES:
                raise CheckpointError(f"{self.folder}: {shown(spec.name)} is planned twice or cannot be stored: {spec}")
            seen.add(spec.name)
        self.plan = [list(shard) for shard in shards]
        sizes = {self.shard_name(i): sum(spec.nbytes for spec in shard) for i, shard in enumerate(self.plan)}
        sizes |= others or {}
        with disk_errors(self.folder):
            # What a killed run left is removed first; a file that replaces another lies beside it until it is whole.
            free = free_bytes(self.folder) + self._bytes_of(path.name for path in partials(self.folder))
            needed = scratch_bytes + max(sum(sizes.values()) - self._bytes_of(sizes), *sizes.values(), 0)
        if needed > free:
            raise CheckpointError(f"{self.folder}: needs {needed} bytes, {free} are free; choose another folder")

    def shard(self, i: int) -> ShardWriter:
        """The writer of the i-th planned shard, to be used in a with statement."""
        return self._writer(self.shard_name(i), self.plan[i])

    def _bytes_of(self, names: Iterable[str]) -> int:
        return sum((self.folder / name).stat().st_size for name in names if (self.folder / name).exists())

    def is_done(self, name: str) -> bool:
        """Whether an earlier run of the same job left this weight file whole, so that it need not be written again."""
        self._begin()
        entry = self._earlier.pop(name, None)
        if entry is not None and not compare_file(self.folder / name, entry):
            self._weights[name] = entry
        return name in self._weights

    def extra(self, name: str, specs: Sequence[Spec]) -> ShardWriter:
        """The writer of a weight file outside of the index, neox_lite_NAME.safetensors, which other readers ignore."""
        if not EXTRA_WEIGHTS.fullmatch(name):
            raise CheckpointError(f"{name}: a weight file outside of the index is named neox_lite_NAME.safetensors")
        return self._writer(name, specs)

    def file(self, name: str, content: str | bytes) -> None:
        """Write a small file atomically."""
        if "/" in name or name == MANIFEST or name.endswith(PARTIAL) or is_model_file(name):
            raise CheckpointError(f"{name}: not a small file; weights go through shard, config.json through finish")
        check_file_name(name, self.folder)
        self._begin()
        self._small[name] = self._write_small(name, content)

    def finish(self, config_json: str, **manifest_fields: Any) -> None:
        """Write index and manifest, remove what an older model left behind, and let config.json appear.

        manifest_fields: what to record, such as method, source and source_revision; nothing that differs between runs.
        """
        shards = [self.shard_name(i) for i in range(len(self.plan))]
        unwritten = [name for name in dict.fromkeys((*shards, *self._writers)) if name not in self._weights]
        if unwritten:
            raise CheckpointError(f"{self.folder}: not written yet: {first_few(unwritten)}")
        own = {"format_version": FORMAT_VERSION, "created_by": f"neox-lite {__version__}"}
        if clash := manifest_fields.keys() & {*own, "files"}:
            raise CheckpointError(f"{self.folder}: manifest fields {sorted(clash)} are the writer's own")
        self._begin()
        if len(self.plan) > 1:
            self._small[INDEX] = self._write_small(INDEX, self._index())
        files = {**self._weights, **self._small, CONFIG: manifest_entry(config_json.encode())}
        with disk_errors(self.folder):
            for name in self._stale - files.keys():
                (self.folder / name).unlink(missing_ok=True)
        self._publish_manifest({**own, **manifest_fields, "files": dict(sorted(files.items()))})
        self._write_small(CONFIG, config_json)
        self._finished = True
        with disk_errors(self.folder):
            (self.folder / JOURNAL).unlink(missing_ok=True)  # last: until here the same job would go on from it

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        """Raises CheckpointError if finish was forgotten. After an error only whole shards stay, and no config.json."""
        if self._marker is not None:
            for writer in self._writers.values():
                writer.discard()  # an interrupt may have come between opening a file and its with statement
            if not self._finished and not any(is_model_file(path.name) for path in self.folder.iterdir()):
                (self.folder / UNFINISHED).unlink(missing_ok=True)  # an error before the first shard was whole
            self._marker.close()  # which ends the lock
            if self._is_new and not self._finished:
                with contextlib.suppress(OSError):  # not empty: whole shards stay
                    self.folder.rmdir()
        if kind is None and not self._finished:
            raise CheckpointError(f"{self.folder}: left without finish()")

    def shard_name(self, i: int) -> str:
        count = len(self.plan)
        return "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"

    def _index(self) -> str:
        weight_map = {spec.name: self.shard_name(i) for i, shard in enumerate(self.plan) for spec in shard}
        total_bytes = sum(spec.nbytes for shard in self.plan for spec in shard)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        return json.dumps(index, indent=2, ensure_ascii=False) + "\n"

    def _writer(self, name: str, specs: Sequence[Spec]) -> ShardWriter:
        self._begin()
        self._writers[name] = ShardWriter(self.folder / name, specs, self._note)
        return self._writers[name]

    def _note(self, writer: ShardWriter) -> None:
        """A weight file is whole."""
        self._weights[writer.path.name] = {"bytes": writer.size, "sha256": writer.sha256}
        self._write_journal()

    def _write_journal(self) -> None:
        if self._job is not None:
            journal = {"format_version": FORMAT_VERSION, "job": self._job, "files": {**self._earlier, **self._weights}}
            self._write_small(JOURNAL, json.dumps(journal, indent=2) + "\n")

    def _write_small(self, name: str, content: str | bytes) -> dict[str, Any]:
        """Write a small file; return its manifest entry."""
        raw = content.encode() if isinstance(content, str) else content
        with disk_errors(self.folder / name, len(raw)):
            write_atomically(self.folder / name, raw)
        return manifest_entry(raw)

    def _read_journal(self) -> None:
        """Resume from the weight files of an earlier run of the same job; remove those of another job, with a warning."""
        path = self.folder / JOURNAL
        if not path.exists():
            return
        try:
            journal = read_manifest(path)
            self._earlier, job = journal["files"], journal.get("job")
        except CheckpointError as error:
            logger.warning("%s; the folder is written from the start", error)
            job = None
        if self._job is None or job != self._job:
            logger.warning(
                "%s: was left unfinished by a run with another source or other options; starting over", self.folder
            )
            for name in self._earlier:
                (self.folder / name).unlink(missing_ok=True)
            self._earlier = {}
            path.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Before the first write: keep other writers out and make an older model in the folder look unfinished."""
        if self._marker is not None:
            return
        folder, marker = self.folder, self.folder / UNFINISHED
        with disk_errors(folder):
            self._is_new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            present = {path.name for path in folder.iterdir()}
            is_ours = bool(present & {MANIFEST, UNFINISHED})
            _check_is_ours(folder)
            found = folder / MANIFEST if MANIFEST in present else marker
            if found.is_symlink():
                raise CheckpointError(
                    f"{found}: is a link, which is not written through; remove it or choose another folder"
                )
            file = found.open("r+b" if is_ours else "x+b")
            try:
                _lock(file, found)
                for left in partials(folder):
                    left.unlink(missing_ok=True)
                (folder / CONFIG).unlink(missing_ok=True)
                if found != marker:  # the old manifest becomes the marker: a second attempt still knows the old files
                    found.replace(marker)
                sync_folder(folder)
            except BaseException:
                file.close()
                raise
        self._marker = file
        with disk_errors(folder):
            self._read_journal()
        if is_ours:
            self._stale = {name for name in present if OUR_WEIGHTS.fullmatch(name)}
            with contextlib.suppress(CheckpointError):  # an unreadable old manifest only means fewer names to remove
                self._stale |= read_manifest(marker)["files"].keys() - {MANIFEST, UNFINISHED}

    def _publish_manifest(self, manifest: dict[str, Any]) -> None:
        with disk_errors(self.folder / MANIFEST):
            self._marker.truncate(0)
            self._marker.seek(0)
            self._marker.write(json.dumps(manifest, indent=2).encode() + b"\n")
            self._marker.flush()
            os.fsync(self._marker.fileno())
            if os.name == "nt":  # Windows renames no open file
                self._marker.close()
            (self.folder / UNFINISHED).replace(self.folder / MANIFEST)
            sync_folder(self.folder)


def check_destination(folder: Path, source: Path | None = None) -> None:
    """Raises CheckpointError where no model folder could be written; touches nothing. source: the folder being read."""
    if source is not None and source.exists() and folder.exists() and folder.samefile(source):
        raise CheckpointError(f"{folder}: is the folder being read; write to another one")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; choose another name for the folder to write")
    if folder.is_symlink() and not folder.exists():
        raise CheckpointError(f"{folder}: is a link to what is not there; remove it or choose another folder")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "cannot be written to" if above.is_dir() else "is no folder"
        raise CheckpointError(f"{folder}: cannot be written: {above} {what}; choose another folder")
    if above == folder:
        with disk_errors(folder):
            _check_is_ours(folder)


def _check_is_ours(folder: Path) -> None:
    """Raises CheckpointError for a folder with a model that somebody else wrote."""
    present = {path.name for path in folder.iterdir()}
    if not {MANIFEST, UNFINISHED} & present and any(map(is_model_file, present)):
        raise CheckpointError(f"{folder}: holds a model that neox-lite did not write; choose another folder")


def _preallocate(file: Any, size: int) -> None:
    """Take the space at once, so that a full disk is found before an hour of work and not after it."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
    file.truncate(size)
    return None


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep other writers out until the file is closed. Raises CheckpointError if one is there already."""
    locked = lock(file, path)
    if locked is False:
        raise CheckpointError(f"{path.parent}: another process is writing there; wait for it or choose another folder")
    if locked is None and os.name != "nt":
        logger.warning("%s: this file system has no locks; do not write there from two processes at once", path.parent)
