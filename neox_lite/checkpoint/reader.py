"""Names -> lazy tensors from a folder, whichever way its weights are stored; the only room that opens weight files.

It does not know what the names mean, which dtypes a model wants, or how a folder came to be on this machine.
"""

import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError, first_few, shown
from ..files import open_regular, read_json
from ..hub import MANIFEST, UNFINISHED, holds_adapter, no_model
from ..units import dtype_name
from .manifest import (
    ANY_WEIGHTS,
    CHUNK_BYTES,
    CONFIG,
    EXTRA_WEIGHTS,
    INDEX,
    check_file_name,
    compare_file,
    read_manifest,
)
from .megatron import layer_files, open_layers
from .safetensors_file import DTYPE_NAMES, MAX_HEADER_BYTES, SafetensorsFile, TensorInfo

# Buffers that old transformers versions saved; recomputed, never read. Not to be confused with query_key_value.bias.
OLD_BUFFER = re.compile(r"(gpt_neox\.)?layers\.[0-9]+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")
SHARD_NAME = re.compile(r"model-[0-9]+-of-[0-9]+\.safetensors")


class WeightFile(Protocol):
    infos: dict[str, TensorInfo]

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor: ...


# -- reading ----------------------------------------------------------------------------------------------------------


class Checkpoint:
    """The tensors of one folder by name. Opening reads headers only; a tensor's pages are read when it is used.

    Iteration order is the order of the files and of the data in them. Tensors stay valid after close.
    """

    def __init__(self, folder: Path, files: dict[Path, WeightFile]) -> None:
        self.folder = folder
        self._files = files
        self._place: dict[str, WeightFile] = {
            name: file for file in files.values() for name in file.infos if not OLD_BUFFER.fullmatch(name)
        }

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Open the one set of weights in a folder: safetensors before .bin before layer files, a single file before an index.

        Raises CheckpointError if there is none, or if a file, index or link is malformed, inconsistent or unsafe.
        """
        folder = Path(folder)
        try:
            if not folder.is_dir():
                raise CheckpointError(f"{folder}: no such folder")
            if (folder / UNFINISHED).exists() and not (folder / CONFIG).exists():
                raise CheckpointError(f"{folder}: unfinished; run the command that wrote it again")
            return cls(folder, _open_weights(folder))
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from error

    @classmethod
    def of(cls, folder: Path, files: Mapping[str, WeightFile]) -> "Checkpoint":
        """Weight files by name that are not in the folder; it holds their index if there are several, which must agree."""
        index = folder / INDEX
        if _exists(index):
            _check_index(index, _read_weight_map(folder, index, ".safetensors"), files)
        return cls(folder, {folder / name: file for name, file in files.items()})

    @classmethod
    def open_file(cls, folder: str | Path, name: str) -> "Checkpoint":
        """Open one file of a folder that stands outside of the index, such as neox_lite_head.safetensors; or a .bin."""
        path = inside(Path(folder), name)
        return cls(Path(folder), {path: _BinFile(path) if name.endswith(".bin") else SafetensorsFile(path)})

    def names(self) -> list[str]:
        """Every tensor's name, without the old buffers."""
        return list(self._place)

    def __contains__(self, name: object) -> bool:
        return name in self._place

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and file of a tensor, without reading it. Raises CheckpointError if there is no such tensor."""
        return self._file(name).infos[name]

    def tensor(self, name: str, sparse: bool = False) -> Tensor:
        """The whole tensor in its stored dtype, mapped; changes to it stay in this process.

        sparse: single rows of it will be used, and the others are to take no memory.
        """
        file = self._file(name)
        return file.read_sparsely(name) if sparse and isinstance(file, SafetensorsFile) else file.read(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of the first dimension, mapped. Raises CheckpointError if they are not all there."""
        shape = self.info(name).shape
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise CheckpointError(f"{shown(name)}: rows {start}..{stop} of a tensor of shape {list(shape)}")
        return self._file(name).read(name, start, stop)

    @property
    def files(self) -> list[Path]:
        """The weight files, in order."""
        return list(self._files)

    @property
    def total_bytes(self) -> int:
        """The size of all named tensors together."""
        return sum(self.info(name).nbytes for name in self._place)

    def check(
        self,
        expected: Mapping[str, tuple[Sequence[int], Collection[torch.dtype] | None]],
        where: str | None = None,
        basis: str = "the config",
    ) -> None:
        """Compare with what a model needs: name -> (shape, allowed dtypes, or None for any). basis: its source, in words.

        Raises one CheckpointError naming the first few missing, unexpected, wrongly shaped and wrongly typed tensors.
        """
        missing = [shown(name) for name in expected if name not in self._place]
        extra = [shown(name) for name in self._place if name not in expected]
        shapes, dtypes = [], []
        for name, (shape, allowed) in expected.items():
            if name not in self._place:
                continue
            info = self.info(name)
            if info.shape != tuple(shape):
                shapes.append(f"{name} is {list(info.shape)}, expected {list(shape)}")
            elif allowed is not None and info.dtype not in allowed:
                choices = " or ".join(sorted(dtype_name(dtype) for dtype in allowed))
                dtypes.append(f"{name} is {dtype_name(info.dtype)}, expected {choices}")
        problems = {"missing": missing, "unexpected": extra, "wrong shape": shapes, "wrong dtype": dtypes}
        listed = [f"{len(found)} {what}: {first_few(found)}" for what, found in problems.items() if found]
        if listed:
            raise CheckpointError(f"{where or self.folder}: the weights do not fit {basis}: {'; '.join(listed)}")

    def close(self) -> None:
        """Close the files; tensors that were read stay valid."""
        self._place, self._files = {}, {}

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _file(self, name: str) -> WeightFile:
        file = self._place.get(name)
        if file is None:
            raise CheckpointError(f"{self.folder}: no tensor named {shown(name)}{'' if self._files else ' (closed)'}")
        return file


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a dangling link is an error to report, not an absent file


def inside(folder: Path, name: str) -> Path:
    """folder/name; raises CheckpointError unless its file truly lies in the folder or in this repo's hub cache."""
    check_file_name(name, folder)
    path, home = folder / name, folder.resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")  # the hub cache keeps the bytes there and links to them
    if not any(real.is_relative_to(root) for root in allowed):
        raise CheckpointError(f"{path}: links outside the folder, to {real}; put the file itself there")
    return path


def _open_weights(folder: Path) -> dict[Path, WeightFile]:
    """Find the one set of weights and open its files. Raises CheckpointError if there is none."""
    opener: Callable[[Path], WeightFile]
    for stem, suffix, opener in (("model", ".safetensors", SafetensorsFile), ("pytorch_model", ".bin", _BinFile)):
        index, single = folder / f"{stem}{suffix}.index.json", folder / f"{stem}{suffix}"
        if _exists(single):
            if _exists(index) and not _names_only(folder, index, single.name):
                warnings.warn(
                    f"{folder}: holds two models; {single.name} is read, as in transformers, and {index.name} with its "
                    "files is not: delete one of them",
                    stacklevel=4,
                )
            return {single: opener(inside(folder, single.name))}
        if _exists(index):
            return _open_indexed(folder, index, suffix, opener)
    if holds_adapter(folder):
        raise CheckpointError(no_model(folder))
    listed = sorted(path.name for path in folder.iterdir())
    if layers := layer_files(listed, folder):
        config = read_json(folder / CONFIG, CheckpointError) if _exists(folder / CONFIG) else {}
        parallel = config.get("use_parallel_residual", True) is not False
        return {**open_layers(folder, layers, lambda name: _BinFile(inside(folder, name)), parallel)}
    shards = [name for name in listed if SHARD_NAME.fullmatch(name)]
    if shards:
        raise CheckpointError(f"{folder}: has {shards[0]} but its index is missing: {INDEX}")
    raise CheckpointError(
        f"{folder}: no weights; looked for model.safetensors and pytorch_model.bin, each alone or with .index.json, and for "
        "EleutherAI's layer files"
    )


def _names_only(folder: Path, index: Path, name: str) -> bool:
    """Whether an index that is not needed names this file alone; one that cannot be read is of some other model."""
    try:
        return set(_read_weight_map(folder, index, ".safetensors").values()) == {name}
    except CheckpointError:
        return False


def _open_indexed(
    folder: Path, index: Path, suffix: str, opener: Callable[[Path], WeightFile]
) -> dict[Path, WeightFile]:
    """Open every file of an index and check that index and files agree."""
    weight_map = _read_weight_map(folder, index, suffix)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not _exists(folder / name)]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} weight files are missing: {first_few(missing, 10)}"
        )
    files = {name: opener(inside(folder, name)) for name in names}
    _check_index(index, weight_map, files)
    return {folder / name: file for name, file in files.items()}


def _check_index(index: Path, weight_map: Mapping[str, str], files: Mapping[str, WeightFile]) -> None:
    """Raise CheckpointError unless index and files agree."""
    seen: dict[str, str] = {}
    problems = []
    for file_name, file in files.items():
        for name in file.infos:
            if OLD_BUFFER.fullmatch(name):
                continue
            if name in seen:
                problems.append(f"{shown(name)} is in both {seen[name]} and {file_name}")
            elif name not in weight_map:
                problems.append(f"{shown(name)} is in {file_name} but not in the index")
            seen[name] = file_name
    for name, file_name in weight_map.items():
        if not OLD_BUFFER.fullmatch(name) and name not in files[file_name].infos:
            problems.append(f"{shown(name)} is not in {file_name}, where the index says it is")
    if problems:
        raise CheckpointError(f"{index}: {first_few(problems)}")


def _read_weight_map(folder: Path, index: Path, suffix: str) -> dict[str, str]:
    """weight_map of an index file, tensor name -> file name, every file name safe and of the index's kind."""
    weight_map = read_json(inside(folder, index.name), CheckpointError, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected an object with a non-empty weight_map")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise CheckpointError(f"{index}: weight_map of {shown(name)} is not a file name")
    for file_name in set(weight_map.values()):
        check_file_name(file_name, index)
        if not file_name.endswith(suffix):
            raise CheckpointError(f"{index}: weight_map names {file_name!r}, which is not a {suffix} file")
    return weight_map


class _BinFile:
    """A pytorch_model*.bin: mapped, and unpickled by torch's restricted loader only."""

    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            magic = file.read(4)
        if magic != b"PK\x03\x04":
            raise CheckpointError(
                f"{path}: not a zip-based torch file (older than torch 1.6, or damaged), so it cannot be mapped; "
                "rewrite it with torch.save(torch.load(PATH, weights_only=True), PATH)"
            )
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a hostile pickle can raise anything; whatever it is, the file is refused
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path}: does not load as plain tensors (weights_only): {shown(reason)}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
        self._tensors: dict[str, Tensor] = content
        self.infos = {name: _bin_info(name, tensor, path) for name, tensor in content.items()}

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """As SafetensorsFile.read; only a tensor that is not contiguous in the file is copied."""
        return self._tensors[name].detach()[slice(start, stop) if start is not None else ...].contiguous()


def _bin_info(name: object, tensor: object, path: Path) -> TensorInfo:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise CheckpointError(f"{path}: entry {shown(name)} is a {type(tensor).__name__}, expected a named tensor")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in DTYPE_NAMES
    if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {shown(name)}: expected a plain tensor, found {tensor.dtype} {tensor.layout}")
    return TensorInfo(name, tuple(tensor.shape), tensor.dtype, path, tensor.nbytes)


# -- verifying --------------------------------------------------------------------------------------------------------


def verify_folder(
    folder: str | Path, progress: Callable[[int], object] | None = None, needs_manifest: bool = True
) -> list[str]:
    """Read a folder through and list what is wrong with it, one line each; [] if nothing.

    Sizes and SHA-256 of every file in the manifest, weight files that are not in it, the rules that Checkpoint.open
    checks, and values that are not finite; shapes are checked against a config elsewhere. progress is called with
    numbers of bytes as they are read: each weight twice, once for its hash and once for its values. A folder of another
    tool's making has no manifest; with needs_manifest False that is no problem.
    """
    folder, report = Path(folder), progress or (lambda count: None)
    if not folder.is_dir():
        return [f"{folder}: no such folder"]
    problems: list[str] = []
    weights = sorted(path.name for path in folder.iterdir() if ANY_WEIGHTS.fullmatch(path.name))
    try:
        if _exists(folder / MANIFEST):
            listed = read_manifest(folder / MANIFEST)["files"]
            for name, entry in listed.items():
                problems += compare_file(folder / name, entry, report)
            problems += [f"{folder / name}: not in {MANIFEST}" for name in weights if name not in listed]
        elif needs_manifest:
            problems.append(f"{folder}: no {MANIFEST}, so no hashes to check; neox-lite writes one with every model")
    except CheckpointError as error:
        problems.append(str(error))
    try:
        with Checkpoint.open(folder) as checkpoint:
            problems += _not_finite(checkpoint, report)
        for name in filter(EXTRA_WEIGHTS.fullmatch, weights):
            problems += _not_finite(Checkpoint.open_file(folder, name), report)
    except CheckpointError as error:
        problems.append(str(error))
    return problems


def _not_finite(checkpoint: Checkpoint, report: Callable[[int], object]) -> list[str]:
    """Name the floating tensors that hold NaN or infinity, reading a few MiB at a time."""
    problems = []
    for name in checkpoint.names():
        info = checkpoint.info(name)
        if not info.dtype.is_floating_point or not info.nbytes:
            continue
        rows = info.shape[0] if info.shape else 1
        step = max(1, CHUNK_BYTES // (info.nbytes // rows))
        bad = 0
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            values = checkpoint.rows(name, start, stop) if info.shape else checkpoint.tensor(name)
            values = values.float() if info.dtype.itemsize == 1 else values  # torch has no isfinite for float8
            bad += values.numel() - int(torch.isfinite(values).sum())
            report(values.nbytes)
        if bad:
            problems.append(f"{info.file}: {shown(name)}: {bad} of {math.prod(info.shape)} values are not finite")
    return problems
