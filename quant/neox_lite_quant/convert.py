"""Checkpoint -> quantized folder, one row slice at a time. Knows formats by name only; the folder's form is docs/format.md."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from neox_lite.checkpoint.folder_writer import check_destination
from neox_lite.checkpoint.reader import Checkpoint
from neox_lite.checkpoint.safetensors_file import Spec
from neox_lite.config import GPTNeoXConfig
from neox_lite.errors import ArgumentError, FormatError
from neox_lite.formats import GROUP_SIZES, Format, GroupInt, label, make_format
from neox_lite.hub import local_folder, remote_checkpoint, resolve
from neox_lite.layers import Linear
from neox_lite.loading.quantize import SLICE_ELEMENTS, Encoding
from neox_lite.loading.save import Part, Rows, Slice, read_companions, specs_of, write_model
from neox_lite.loading.skeleton import Skeleton
from neox_lite.modeling.heads import class_of
from neox_lite.units import DTYPES, dtype_name
from neox_lite.version import __version__

from .balance import Balanced
from .calibrated import Calibrated
from .estimate import check_memory, predict_seconds
from .mixed import Mix, mix_for, smallest, stored_bytes
from .streaming import Stream

# Methods of int4 and int8 that look at several weights at once, so that they need the whole checkpoint.
CALIBRATED_METHODS = ("balance", "gptq")
SHARD_BYTES = 1_000_000_000  # of a weight file: what a run that is ended has to do again at most
Progress = Callable[[int, int], None]  # bytes written so far, bytes in all; of gptq, steps


@dataclass(frozen=True)
class Report:
    """What a conversion did: sizes of all weights in bytes, wall time, peak memory beyond page cache; dry, a forecast.

    scratch_bytes: disk space that gptq uses while it runs, else 0. mix: how many linear layers have each format.
    bits_per_weight: of those, scales included.
    """

    destination: Path
    bytes_in: int
    bytes_out: int
    seconds: float
    peak_bytes: int
    scratch_bytes: int = 0
    mix: Mapping[str, int] = field(default_factory=dict)
    bits_per_weight: float = 0.0


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    format: str = "int4",
    group_size: int | None = None,
    method: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    threads: int | None = None,
    keep_source: bool = False,
    calibration: str | os.PathLike[str] | None = None,
    calibration_windows: int | None = None,
    target_size: int | None = None,
    small_head: bool = True,
    choosing: Progress | None = None,
    dtype: str | None = None,
) -> Report:
    """Quantize every linear layer of a checkpoint; embedding, head and norms stay as they are, float32 becomes float16.

    A run with the same source and options resumes from the whole weight files that an ended run left in the destination.
    threads: that compute, None for torch's number; the result does not depend on it.
    keep_source: weight files of a hub id are fetched into the hub's cache and stay there, as "balance", "gptq" and target_size
    always require. Otherwise those that the cache lacks are fetched beside the destination, one after another, and deleted
    after use.
    calibration: a text file for "gptq", None for text that the model writes itself.
    target_size: bytes that the folder may take at most. Each linear layer then gets int4 or int8 groups so that the loss is
    least, in place of format and group_size; choosing is called with (layers that were looked at, layers).
    small_head: write an int8 head in addition to the 16-bit one.
    dtype: "float16" or "bfloat16", of all that is not quantized, None for the checkpoint's own. Activations and the KV cache
    have it too, and bfloat16 holds larger ones.
    Raises FormatError for a shape or value that the format cannot hold, CheckpointError for a source that is not whole.
    """
    began = time.perf_counter()
    threads = torch.get_num_threads() if threads is None else threads

    # 1. Check the memory and the options before anything is opened or fetched.
    memory_bytes = check_memory(threads)
    uniform = make_format(format, group_size)
    method = _method(uniform, method)
    if target_size is not None and (uniform.name != "int4" or group_size is not None):
        raise ArgumentError(
            "target_size chooses int4 or int8, and the groups, for each layer; leave format and group_size out"
        )
    if method != "gptq" and (calibration is not None or calibration_windows is not None):
        raise ArgumentError(f"calibration is for method 'gptq', but the method is {method!r}")
    destination = Path(destination)
    keep_source = keep_source or ((method in CALIBRATED_METHODS or target_size is not None) and not dry_run)

    with _opened(os.fspath(source), revision, destination, keep_source) as (checkpoint, stream):
        check_destination(destination, checkpoint.folder)

        # 2. Choose the dtype, and a format for each linear layer.
        config, dense_dtype = _target_config(checkpoint, dtype)
        target: Format | Mix = uniform
        if target_size is not None:
            if stream is not None:
                raise ArgumentError(
                    f"{source}: a mix is chosen by its weights, which are not here yet; add --keep-source"
                )
            target = _mix(config, checkpoint, dense_dtype, method, small_head, target_size, choosing)

        # 3. Plan every tensor of the folder; nothing is computed yet.
        skeleton = _skeleton(config, checkpoint, target, dense_dtype, method, stream)
        calibrated = Calibrated(skeleton, dense_dtype, calibration, calibration_windows) if method == "gptq" else None
        modules = skeleton.model.named_modules()
        parts = [
            part for name, m in modules if (part := _part(skeleton, name, m, dense_dtype, method, stream, calibrated))
        ]
        head = _head(skeleton, dense_dtype, stream) if small_head else None
        report = _planned(destination, skeleton, dense_dtype, [*parts, *([head] if head is not None else [])])

        # 4. A dry run ends here, with a forecast.
        if dry_run and calibrated is not None:
            return replace(
                report,
                seconds=calibrated.predict_seconds(),
                peak_bytes=calibrated.memory_bytes,
                scratch_bytes=calibrated.scratch_bytes,
            )
        if dry_run:
            file = max(checkpoint.files, key=lambda path: path.stat().st_size) if stream is None else None
            weights, rounding = _weights(skeleton), _rounding(method)
            seconds = predict_seconds(weights, report.bytes_in, report.bytes_out, threads, uniform, rounding, file)
            return replace(report, seconds=seconds, peak_bytes=memory_bytes)

        # 5. Let gptq read or write its text, and write the folder.
        meter = Meter(progress if calibrated is None else None, report.bytes_out)
        options: dict[str, Any] = {
            "method": method,
            "format": format,
            "group_size": getattr(target, "group_size", None),
        }
        if target_size is not None:
            options |= {"format": "mixed", "target_size": target_size}
        decisive: dict[str, Any] = {}
        if calibrated is not None:
            decisive = {"threads": torch.get_num_threads()}  # gptq's sums depend on it in their last bits
            report = replace(report, scratch_bytes=calibrated.scratch_bytes)
            options |= calibrated.prepare(destination, partial(_report_steps, meter, progress))
        write_model(
            destination,
            config,
            parts,
            read_companions(checkpoint.folder),
            head,
            max_shard_bytes=SHARD_BYTES,
            source=checkpoint.folder,
            progress=meter,
            threads=threads,
            job=_job(checkpoint, stream, config, parts, options | decisive),
            scratch_bytes=stream.scratch_bytes if stream is not None else report.scratch_bytes,
            **options,
            source_name=Path(os.fspath(source)).name if Path(source).is_dir() else os.fspath(source),
            source_revision=revision,
        )
        return replace(report, seconds=time.perf_counter() - began, peak_bytes=meter.peak_bytes)


def _planned(destination: Path, skeleton: Skeleton, dtype: torch.dtype, parts: Sequence[Part]) -> Report:
    """What is known before anything is computed; seconds and peak_bytes are 0."""
    linears = _encoded(skeleton)
    bits = sum(math.prod(m.shape) * m.format.bits_per_weight(dtype) for m in linears) / _weights(skeleton)
    bytes_out = sum(spec.nbytes for part in parts for spec in part.specs)
    mix = Counter(label(m.format, "") for m in linears)
    return Report(destination, skeleton.checkpoint.total_bytes, bytes_out, 0.0, 0, mix=mix, bits_per_weight=bits)


def _encoded(skeleton: Skeleton) -> list[Linear]:
    """The linear layers that get a quantized format."""
    return [module for module in skeleton.model.modules() if _is_encoded(module, skeleton)]


def _weights(skeleton: Skeleton) -> int:
    """Numbers in all of them."""
    return sum(math.prod(module.shape) for module in _encoded(skeleton))


def _skeleton(
    config: GPTNeoXConfig,
    checkpoint: Checkpoint,
    target: Format | Mix,
    dtype: torch.dtype,
    method: str,
    stream: Stream | None = None,
) -> Skeleton:
    skeleton = Skeleton(class_of(config), config, checkpoint, target, dtype)
    if skeleton.fresh:
        raise ArgumentError(
            f"{checkpoint.folder}: has no {', '.join(skeleton.fresh)}; save the whole model before quantizing it"
        )
    if method in CALIBRATED_METHODS and stream is None:
        skeleton.checkpoint = Balanced(checkpoint, config, skeleton.stored, dtype)
    return skeleton


def _mix(
    config: GPTNeoXConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    method: str,
    small_head: bool,
    target_bytes: int,
    choosing: Progress | None,
) -> Mix:
    """Formats by layer for a folder that takes at most target_bytes, all of its files counted."""
    smallest_mix = smallest(config)
    skeleton = _skeleton(config, checkpoint, smallest_mix, dtype, method)
    modules = skeleton.model.named_modules()
    parts = [part for name, m in modules if (part := _part(skeleton, name, m, dtype, _rounding(method), None, None))]
    head = _head(skeleton, dtype, None) if small_head else None
    specs = [spec for part in [*parts, *([head] if head is not None else [])] for spec in part.specs]
    other_bytes = sum(spec.nbytes for spec in specs) - stored_bytes(smallest_mix, config, dtype)
    other_bytes += sum(map(len, read_companions(checkpoint.folder).values()))
    other_bytes += _metadata_bytes(specs, config, target_bytes)
    return mix_for(skeleton, dtype, "rtn" if method == "rtn" else "mse", target_bytes, other_bytes, choosing)


def _metadata_bytes(specs: Sequence[Spec], config: GPTNeoXConfig, target_bytes: int) -> int:
    """Bytes of headers, index, manifest and config.json, or a little more."""
    names, files = sum(len(spec.name) for spec in specs), target_bytes // SHARD_BYTES + 3
    index = names + 50 * len(specs) if target_bytes > SHARD_BYTES else 0
    groups = 6 * 500 + 24 * (60 + 4 * config.num_hidden_layers)  # formats, and their patterns
    return names + 90 * len(specs) + index + files * (4096 + 200) + len(config.to_json_string()) + groups


def _method(target: Format, method: str | None) -> str:
    known = target.methods + (CALIBRATED_METHODS if isinstance(target, GroupInt) else ())
    if method is None:
        return known[0]
    if method not in known:
        raise ArgumentError(f"method is {method!r}, expected one of {', '.join(known)}")
    return method


def _rounding(method: str) -> str:
    """The format's own method that rounds rows for a method of `convert`."""
    return "mse" if method == "balance" else method


def _report_steps(meter: Meter, progress: Progress | None, done: int, total: int) -> None:
    meter(0)
    if progress is not None:
        progress(done, total)


@contextmanager
def _opened(
    source: str, revision: str | None, destination: Path, keep_source: bool
) -> Iterator[tuple[Checkpoint, Stream | None]]:
    """The checkpoint, and the stream that fetches its files one after another; None where they are on the disk."""
    remote = None
    if local_folder(source, revision) is None and not keep_source:
        remote = remote_checkpoint(source, revision)
    if remote is None:
        with Checkpoint.open(resolve(source, revision)) as checkpoint:
            yield checkpoint, None
    else:
        with Stream(remote, Path(f"{destination.absolute()}.fetched")) as stream:
            yield stream.checkpoint, stream


def _job(
    checkpoint: Checkpoint,
    stream: Stream | None,
    config: GPTNeoXConfig,
    parts: Sequence[Part],
    options: Mapping[str, Any],
) -> str:
    """A digest of everything that decides the bytes of the weight files; only a run with the same one resumes."""
    if stream is not None:
        files: Any = (stream.remote.repo_id, stream.remote.commit)
    else:
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files]
    specs = [spec for part in parts for spec in part.specs]
    decisive = repr((__version__, SHARD_BYTES, files, config.to_json_string(), specs, sorted(options.items())))
    return hashlib.sha256(decisive.encode()).hexdigest()


def _target_config(checkpoint: Checkpoint, wish: str | None) -> tuple[GPTNeoXConfig, torch.dtype]:
    """The folder's config and dtype: the one that is asked for, else the checkpoint's own 16-bit dtype, else float16."""
    config = GPTNeoXConfig.from_pretrained(checkpoint.folder)
    if config.quantization_config is not None:
        raise FormatError(f"{checkpoint.folder}: is quantized already; give the checkpoint that it was made from")
    stored = {checkpoint.info(name).dtype for name in checkpoint.names()}
    named = DTYPES.get(config.dtype or "")
    dtype = named if named in (torch.float16, torch.bfloat16) else torch.float16
    if stored == {torch.bfloat16}:
        dtype = torch.bfloat16
    if wish is not None:
        if wish not in ("float16", "bfloat16"):
            raise ArgumentError(f"dtype is {wish!r}, expected 'float16' or 'bfloat16'")
        dtype = DTYPES[wish]
    return config.copy(dtype=dtype_name(dtype)), dtype


def _part(
    skeleton: Skeleton,
    name: str,
    module: torch.nn.Module,
    dtype: torch.dtype,
    method: str,
    stream: Stream | None,
    calibrated: Calibrated | None,
) -> Part | None:
    """One module's own tensors as they will be written, or None if it has none."""
    dot = f"{name}." if name else ""
    dense = {
        f"{dot}{key}": tuple(p.shape)
        for key, p in module._parameters.items()
        if p is not None and not (skeleton.tied and name == "embed_out")
    }
    specs, encoding = [Spec(key, dtype, shape) for key, shape in dense.items()], None
    if _is_encoded(module, skeleton):
        specs = specs_of(dot, module.format, module.shape, dtype) + specs
        if calibrated is not None:
            return Part(specs, partial(calibrated.rows, name))
        stored = skeleton.stored(f"{dot}weight")
        encoding = Encoding(skeleton.checkpoint, stored, module.format, dtype, _rounding(method))
    if not specs:
        return None

    def slices() -> Iterator[Slice]:
        for key in dense:
            yield from _cast(skeleton.checkpoint, skeleton.stored(key), key, dtype)
        if encoding is not None:
            yield from _encode(encoding, dot)

    read = [skeleton.stored(key) for key in dense] + ([encoding.name] if encoding is not None else [])
    rest = partial(_rest, encoding, dot) if encoding is not None else tuple
    return Part(specs, rest, slices, _expected(stream, read))


def _is_encoded(module: torch.nn.Module, skeleton: Skeleton) -> TypeGuard[Linear]:
    return isinstance(module, Linear) and skeleton.is_encoded(module)


def _expected(stream: Stream | None, tensors: list[str]) -> Callable[[], object]:
    """Announce to the stream that these tensors will be used; returns the call that announces that they were."""
    if stream is None:
        return tuple
    stream.expect(tensors)
    return partial(stream.used, tensors)


def _encode(encoding: Encoding, dot: str) -> Iterator[Slice]:
    """A weight's quantized rows, under the names they have in the folder."""
    for slice in encoding.slices():
        yield partial(_named, slice, dot)


def _named(slice: Callable[[], tuple[int, dict[str, Tensor]]], dot: str) -> Rows:
    start, part = slice()
    return [(f"{dot}{key}", rows, start) for key, rows in part.items()]


def _rest(encoding: Encoding, dot: str) -> Rows:
    return [(f"{dot}{key}", tensor, 0) for key, tensor in encoding.rest().items()]


def _cast(checkpoint: Checkpoint, stored: str, name: str, dtype: torch.dtype) -> Iterator[Slice]:
    """A dense tensor by row slices."""
    shape = checkpoint.info(stored).shape
    step = max(1, SLICE_ELEMENTS // max(1, shape[1] if len(shape) > 1 else 1))
    for start in range(0, shape[0], step):
        yield partial(
            _cast_rows, checkpoint.rows(stored, start, min(shape[0], start + step)), stored, name, start, dtype
        )


def _cast_rows(rows: Tensor, stored: str, name: str, start: int, dtype: torch.dtype) -> Rows:
    """Raises FormatError for values that are not finite, or overflow the narrower dtype."""
    values = rows.to(dtype)
    if not torch.isfinite(values).all():
        raise FormatError(f"{stored}: holds values that are not finite as {dtype_name(dtype)}")
    return [(name, values, start)]


def _head(skeleton: Skeleton, dtype: torch.dtype, stream: Stream | None) -> Part | None:
    """The int8 copy of the head, for GPUs that are short of memory; None for a model without a head or with odd rows."""
    module: Any = getattr(skeleton.model, "embed_out", None)
    size = next((g for g in reversed(GROUP_SIZES) if module is not None and module.in_features % g == 0), None)
    if size is None:
        return None
    format, source = GroupInt(8, size), "gpt_neox.embed_in.weight" if skeleton.tied else "embed_out.weight"
    specs = specs_of("embed_out.", format, module.shape, dtype)
    stored = skeleton.stored(source)
    encoding = Encoding(skeleton.checkpoint, stored, format, dtype, "mse")
    slices, rest = partial(_encode, encoding, "embed_out."), partial(_rest, encoding, "embed_out.")
    return Part(specs, rest, slices, _expected(stream, [stored]))


class Meter:
    """Counts the bytes written, and measures the peak memory of this process beyond mapped files."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done, self.peak_bytes = progress, total, 0, private_bytes()

    def __call__(self, count: int) -> None:
        self.done += count
        self.peak_bytes = max(self.peak_bytes, private_bytes())
        if self.progress is not None:
            self.progress(self.done, self.total)


def private_bytes() -> int:
    """Memory of this process that no file backs (Linux; elsewhere its peak resident size)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
