"""Tensors -> a model folder: what save_pretrained and the quantizer share. Knows no algorithm and reads no weight file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.folder_writer import FolderWriter, ShardWriter, split_into_shards
from ..checkpoint.safetensors_file import Spec
from ..config import GPTNeoXConfig
from ..core.network import Network
from ..errors import ArgumentError, UnsupportedError
from ..formats import DENSE, Format
from ..hub import COMPANIONS, HEAD, MERGE
from ..layers import Linear
from ..units import dtype_name, parse_bytes


def specs_of(prefix: str, format: Format, shape: tuple[int, int], dtype: torch.dtype) -> list[Spec]:
    """The stored tensors of a weight of this (out, in) shape, as a file has them under names with a prefix."""
    every = format.specs(shape, dtype).items()
    return [Spec(f"{prefix}{key}", kind, own, format.file_shape(key, own)) for key, (kind, own) in every]


SYNC_BYTES = 64 << 20  # written between two calls of ShardWriter.hash_and_sync

Rows = Iterable[tuple[str, Tensor, int]]  # full name, rows, first row
Slice = Callable[[], Rows]


@dataclass(frozen=True)
class Part:
    """The tensors of one module that will be written: their specs, and what computes their values by row slices.

    slices: calls that several threads may run at the same time, in any order. rows: what follows them, in the calling
    thread and in the order of the parts. written: called when all of it is in the file.
    """

    specs: list[Spec]
    rows: Callable[[], Rows] = tuple
    slices: Callable[[], Iterable[Slice]] = tuple
    written: Callable[[], object] = tuple


def write_model(
    folder: Path,
    config: GPTNeoXConfig,
    parts: Sequence[Part],
    companions: Mapping[str, bytes],
    head: Part | None = None,
    max_shard_bytes: int = 5_000_000_000,
    source: Path | None = None,
    progress: Callable[[int], object] = lambda count: None,
    threads: int = 1,
    job: str | None = None,
    scratch_bytes: int = 0,
    **manifest: Any,
) -> None:
    """Write a model folder, atomically and in bounded memory, whose bytes do not depend on the number of threads.

    progress is called with the bytes of each slice written. job: as for FolderWriter; a run of the same job resumes.
    scratch_bytes: disk space that the parts' sources use on the same disk at the same time.
    """
    order = {"weight_packed": 0, "weight_scale": 1, "weight_shape": 3}  # vector data first, so that it starts aligned
    by_name = {spec.name: part for part in parts for spec in part.specs}
    with FolderWriter(folder, source=source, job=job) as out, WriterPool(threads) as pool:
        shards = split_into_shards([part.specs for part in parts], max_shard_bytes)
        planned = [sorted(shard, key=lambda s: order.get(s.name.rpartition(".")[2], 2)) for shard in shards]
        others = {name: len(content) for name, content in companions.items()}
        if head is not None:
            others[HEAD] = sum(spec.nbytes for spec in head.specs)
        out.shards(planned, others, scratch_bytes)
        for i, shard in enumerate(shards):
            inside = list({id(by_name[spec.name]): by_name[spec.name] for spec in shard}.values())
            _write_file(out, out.shard_name(i), partial(out.shard, i), inside, pool, progress)
        if head is not None:
            specs = head.specs
            _write_file(out, HEAD, lambda: out.extra(HEAD, specs), [head], pool, progress)
        for name, content in companions.items():
            out.file(name, content)
        out.finish(config.to_json_string(), **manifest)


def _write_file(
    out: FolderWriter,
    name: str,
    opened: Callable[[], ShardWriter],
    parts: Sequence[Part],
    pool: WriterPool,
    progress: Callable[[int], object],
) -> None:
    if out.is_done(name):
        for part in parts:
            part.written()
            progress(sum(spec.nbytes for spec in part.specs))
        return
    with opened() as file:
        pool.write(file, parts, progress)


class WriterPool:
    """Threads that compute the slices of parts and write them, and one that hashes and syncs the bytes that are whole.

    Only a few slices are computed at a time, so memory does not grow with the model.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._ended = False

    def __enter__(self) -> WriterPool:
        self._workers = ThreadPoolExecutor(self.threads, "slices", torch.set_num_threads, (1,))
        self._syncer = ThreadPoolExecutor(1, "sync")
        return self

    def __exit__(self, *exc: object) -> None:
        """Waits for the slices that are being computed and drops the others."""
        self._ended = True
        self._workers.shutdown(cancel_futures=True)
        self._syncer.shutdown(cancel_futures=True)
        torch.set_num_threads(torch.get_num_threads())  # the workers' number is torch's default for new threads

    def write(self, file: ShardWriter, parts: Sequence[Part], progress: Callable[[int], object]) -> None:
        """Write all of these parts; returns when every byte is in the file."""
        # In the order of the file; None stands behind a part's last slice.
        waiting: deque[tuple[Part, Future[int] | None]] = deque()
        syncing, unsynced = self._syncer.submit(self._check), 0

        def report(count: int) -> None:
            nonlocal syncing, unsynced
            progress(count)
            unsynced += count
            if unsynced >= SYNC_BYTES and syncing.done():
                syncing.result()  # raises the errors of that thread
                syncing, unsynced = self._syncer.submit(file.hash_and_sync, self._check), 0

        def finish_next() -> None:
            part, slice = waiting.popleft()
            if slice is not None:
                report(slice.result())
                return
            for name, rows, first in part.rows():
                file.write(name, rows, first)
                report(rows.nbytes)
            part.written()

        for part in parts:
            for slice in part.slices():
                waiting.append((part, self._workers.submit(self._compute, slice, file)))
                if len(waiting) > 2 * self.threads:
                    finish_next()
            waiting.append((part, None))
        while waiting:
            finish_next()
        syncing.result()

    def _compute(self, slice: Slice, file: ShardWriter) -> int:
        written = 0
        for name, rows, first in slice():
            self._check()
            file.write(name, rows, first)
            written += rows.nbytes
        return written

    def _check(self) -> None:
        if self._ended:
            raise CancelledError


def save_pretrained(model: Network, folder: Path, max_shard_size: int | str) -> None:
    """Write a model as it is; quantized weights stay quantized."""
    if model.adapter is not None:
        raise UnsupportedError(
            f"save_pretrained: the model runs with the adapter {model.adapter.name}, whose folder is as it was; load the model "
            f"without it to save that, or {MERGE}"
        )
    head = model.heads.get("embed_out")
    if head is not None and head.format != DENSE:
        raise ArgumentError("save_pretrained: the model runs with the int8 head; load it with head='fp16' to save it")
    config = model.config.copy(dtype=dtype_name(model.dtype), architectures=[type(model).__name__])
    groups: dict[str, dict[str, Tensor]] = {}
    stated = {
        spec.name: spec.stated
        for name, module in model.named_modules()
        if isinstance(module, Linear)
        for spec in specs_of(f"{name}.", module.format, module.shape, model.dtype)
    }
    for name, tensor in model.state_dict().items():
        if name == "embed_out.weight" and config.tie_word_embeddings:
            continue
        if name.endswith(".weight_scale") and tensor.dtype != model.dtype:  # readers want one dtype in a folder
            if model.dtype != torch.float32:
                raise ArgumentError(
                    f"save_pretrained: scales are {tensor.dtype}, the rest {model.dtype}; use .float() first"
                )
            tensor = tensor.float()
        groups.setdefault(name.rpartition(".")[0], {})[name] = tensor
    parts = [_part(group, stated) for group in groups.values()]
    generation = getattr(model, "generation_config", None)
    companions = {"generation_config.json": generation.to_json_string().encode()} if generation is not None else {}
    write_model(
        folder, config, parts, companions, max_shard_bytes=parse_bytes(max_shard_size), method="save_pretrained"
    )


def _part(tensors: Mapping[str, Tensor], stated: Mapping[str, tuple[int, ...] | None]) -> Part:
    specs = [Spec(name, t.dtype, tuple(t.shape), stated.get(name)) for name, t in tensors.items()]
    return Part(specs, lambda: whole(tensors))


def whole(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, int]]:
    for name, tensor in tensors.items():
        yield name, tensor, 0


def read_companions(folder: Path) -> dict[str, bytes]:
    """The small files of a model folder that a copy of it needs."""
    return {name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).is_file()}
