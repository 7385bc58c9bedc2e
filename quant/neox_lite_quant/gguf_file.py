"""The form of a GGUF file: its types, how it is written, and how one from anywhere is read. Knows no model.

A file is a header, metadata, one line about each tensor, then the tensors' data, all little-endian, each tensor at a
multiple of 32 bytes (or as general.alignment says). Reading checks every number against the file before it is used.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox_lite.checkpoint.safetensors_file import private_map
from neox_lite.errors import CheckpointError, FormatError, ShapeError, first_few, shown
from neox_lite.files import AtomicFile, disk_errors, free_bytes, open_regular

VERSION, ALIGNMENT, BLOCK = 3, 32, 32
F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30  # ggml's numbers
# Weights in a block, and its bytes.
EXACT = {F32: (1, 4), F16: (1, 2), BF16: (1, 2), Q4_0: (BLOCK, 18), Q8_0: (BLOCK, 34)}
# Those that the gguf package decodes and no format here holds.
DECODED = {
    **{3: (32, 20), 6: (32, 22), 7: (32, 24), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176)},
    **{14: (256, 210), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110)},
    **{22: (256, 82), 23: (256, 136), 29: (256, 56), 34: (256, 54), 35: (256, 66), 39: (32, 17)},
}
BYTES_OF = EXACT | DECODED
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9

Value = str | int | float | Sequence[str] | Sequence[int]


# -- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgufTensor:
    """One tensor to be written: its shape in torch's order, and its bytes, uint8, by rows."""

    name: str
    kind: int
    shape: tuple[int, ...]
    rows: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        weights, size = BYTES_OF[self.kind]
        if self.shape[-1] % weights:
            raise ShapeError(f"{self.name}: rows of {self.shape[-1]} weights, expected a multiple of {weights}")
        return math.prod(self.shape) // weights * size


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[GgufTensor],
    progress: Callable[[int], object] = lambda count: None,
) -> int:
    """Write one file, which gets its name when it is whole and on the disk; returns its size in bytes.

    Raises CheckpointError if something has that name or the disk is too full, ShapeError for data of another size.
    """
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path}: exists already; delete it or choose another name")
    prefix = _header(metadata, tensors)
    size = len(prefix) + sum(_padded(tensor.nbytes) for tensor in tensors)
    with disk_errors(path, size):
        if (free := free_bytes(path)) < size:
            raise CheckpointError(f"{path}: needs {size} bytes, {free} are free; choose another folder")
        with AtomicFile(path) as file:
            file.write(prefix)
            for tensor in tensors:
                written = 0
                for rows in tensor.rows():
                    file.write(rows.contiguous().numpy().data)
                    written += rows.nbytes
                    progress(rows.nbytes)
                if written != tensor.nbytes:
                    raise ShapeError(f"{path}: {tensor.name}: {written} bytes, expected {tensor.nbytes}")
                file.write(bytes(_padded(written) - written))
            if path.exists():
                raise CheckpointError(f"{path}: was written by another process meanwhile; choose another name")
    return size


def _header(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> bytes:
    """All bytes before the data, padded so that the data starts aligned. ggml lists the dimension of rows first."""
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, raw = _value(key, value)
        parts += [_string(key), struct.pack("<I", kind), raw]
    offset = 0
    for tensor in tensors:
        dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        parts += [_string(tensor.name), dimensions, struct.pack("<IQ", tensor.kind, offset)]
        offset += _padded(tensor.nbytes)
    raw = b"".join(parts)
    return raw + bytes(_padded(len(raw)) - len(raw))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _value(key: str, value: Value) -> tuple[int, bytes]:
    """A metadata value as (its type, its bytes). Raises FormatError for what these types cannot hold."""
    try:
        if isinstance(value, bool):  # before int, which it is too
            return BOOL, struct.pack("<?", value)
        if isinstance(value, int):
            return UINT32, struct.pack("<I", value)
        if isinstance(value, float):
            return FLOAT32, struct.pack("<f", value)
        if isinstance(value, str):
            return STRING, _string(value)
        kind = STRING if value and isinstance(value[0], str) else INT32
        raw = b"".join(_string(v) if isinstance(v, str) else struct.pack("<i", v) for v in value)
        return ARRAY, struct.pack("<IQ", kind, len(value)) + raw
    except (struct.error, OverflowError, UnicodeEncodeError) as error:
        raise FormatError(f"{key}: {str(value)[:60]!r} cannot be written to a GGUF file: {error}") from error


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


# -- reading ----------------------------------------------------------------------------------------------------------

MAX_TENSORS = MAX_KEYS = 1 << 16
MAX_ITEMS = 1 << 20  # of all arrays together; a vocabulary of 50,000 with its merges has 150,000
MAX_HEADER_BYTES = 64 << 20
MAX_DIMS = 4
MAX_PARTS = 1 << 10
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TYPE_NAMES = {
    **{
        3: "Q4_1",
        6: "Q5_0",
        7: "Q5_1",
        9: "Q8_1",
        10: "Q2_K",
        11: "Q3_K",
        12: "Q4_K",
        13: "Q5_K",
        14: "Q6_K",
        15: "Q8_K",
    },
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
    **{F32: "F32", F16: "F16", BF16: "BF16", Q4_0: "Q4_0", Q8_0: "Q8_0"},
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its ggml type, its shape in torch's order, and the position of its bytes in the file."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Part:
    """One file, checked and mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24 or file.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: not a GGUF file: it does not begin with GGUF")
            self.map = private_map(file.fileno(), size)
        read = _Header(self.map, min(size, MAX_HEADER_BYTES), path)
        tensor_count, key_count = read.counts()
        self.metadata = read.metadata(key_count)
        self.tensors = read.tensors(tensor_count, size, self.metadata.get("general.alignment", ALIGNMENT))


class GgufFile:
    """A GGUF file, or several that are one model's, given by the first: checked and mapped.

    metadata and tensors describe it; rows gives bytes that share its pages.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if it cannot be read or breaks a rule of the form, FormatError for unknown types."""
        self.path = path
        first = _Part(path)
        self.metadata = first.metadata
        self._part_of = {name: part for part in [first, *_others(first)] for name in part.tensors}
        self.tensors = {name: part.tensors[name] for name, part in self._part_of.items()}

    def rows(self, name: str) -> Tensor:
        """A tensor's bytes, mapped: (rows, bytes of a row) uint8; a vector's elements are its rows."""
        tensor = self.tensors[name]
        rows = tensor.shape[0]
        raw = torch.frombuffer(self._part_of[name].map, dtype=torch.uint8, count=tensor.nbytes, offset=tensor.offset)
        return raw.view(rows, tensor.nbytes // rows)


def _others(first: _Part) -> list[_Part]:
    """The further files of a model that llama-gguf-split has split: NAME-00002-of-00003.gguf and so on."""
    number, count, total = (first.metadata.get(f"split.{key}", 0) for key in ("no", "count", "tensors.count"))
    if count in (0, 1):
        return []
    path, named = first.path, re.fullmatch(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", first.path.name)
    if type(count) is not int or not 0 < count <= MAX_PARTS or named is None or int(named[3]) != count:
        raise CheckpointError(
            f"{path}: is one of {shown(count)} parts by its header, which its name does not say; expected "
            "NAME-00001-of-00003.gguf and the like, as llama-gguf-split names them"
        )
    if number != 0:
        raise CheckpointError(f"{path}: is a later part of a model; give {named[1]}-00001-of-{named[3]}.gguf")
    parts = []
    for i in range(1, count):
        part = _Part(path.with_name(f"{named[1]}-{i + 1:05}-of-{named[3]}.gguf"))
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (i, count):
            raise CheckpointError(f"{part.path}: is not part {i + 1} of {count} by its header; fetch the files again")
        parts.append(part)
    names = [name for part in (first, *parts) for name in part.tensors]
    if len(set(names)) != len(names) or total != len(names):
        raise CheckpointError(
            f"{path}: its parts have {len(names)} tensors, {len(set(names))} of different names; the first says {total!r}"
        )
    return parts


class _Header:
    """Reads the bytes before the data, value by value; never beyond `end`."""

    def __init__(self, raw: mmap.mmap, end: int, path: Path) -> None:
        self.raw, self.at, self.end, self.path, self.items = raw, 4, end, path, 0

    def counts(self) -> tuple[int, int]:
        """Numbers of tensors and of keys."""
        (version,) = self._take("I")
        if version not in (2, VERSION):
            hint = "big-endian" if version.to_bytes(4, "little") in (b"\0\0\0\2", b"\0\0\0\3") else "not 2 or 3"
            raise self._error(f"version {version} is {hint}; convert the checkpoint again with a current llama.cpp")
        tensors, keys = self._take("QQ")
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            raise self._error(f"{tensors} tensors and {keys} keys, more than the {MAX_TENSORS} that are read here")
        return tensors, keys

    def metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            if key in found:
                raise self._error(f"the key {shown(key)} appears twice")
            found[key] = self._value(key)
        return found

    def tensors(self, count: int, size: int, alignment: Any) -> dict[str, StoredTensor]:
        """The tensors, each within the file and none over another."""
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment!r}, expected a power of two from 8 on")
        listed = [self._tensor() for _ in range(count)]
        if len({name for name, *_ in listed}) != count:
            raise self._error("a tensor appears twice")
        _refuse_types([(name, kind) for name, kind, *_ in listed], self.path)
        data = -(-self.at // alignment) * alignment
        found = {name: self._placed(name, kind, shape, data, offset, alignment) for name, kind, shape, offset in listed}
        end = data
        for tensor in sorted(found.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self._error(f"{shown(tensor.name)} begins at byte {tensor.offset}, inside of another tensor")
            end = tensor.offset + tensor.nbytes
            if end > size:
                raise self._error(f"{shown(tensor.name)} ends at byte {end} of {size}: truncated; download it again")
        return found

    def _placed(
        self, name: str, kind: int, shape: tuple[int, ...], data: int, offset: int, alignment: int
    ) -> StoredTensor:
        weights, size = BYTES_OF[kind]
        if 0 in shape or shape[-1] % weights or offset % alignment:
            raise self._error(
                f"{shown(name)}: shape {list(shape)} at offset {offset}, expected no empty dimension, rows of a multiple of "
                f"{weights} and an offset of a multiple of {alignment}"
            )
        return StoredTensor(name, kind, shape, data + offset, math.prod(shape) // weights * size)

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        (dimensions,) = self._take("I")
        if not 1 <= dimensions <= MAX_DIMS:
            raise self._error(f"{shown(name)}: {dimensions} dimensions, expected 1 to {MAX_DIMS}")
        shape = self._take(f"{dimensions}Q")
        kind, offset = self._take("IQ")
        return name, kind, shape[::-1], offset

    def _value(self, key: str) -> Any:
        (kind,) = self._take("I")
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._take(SCALARS[kind])[0]
        if kind != ARRAY:
            raise self._error(f"{shown(key)} is of the unknown type {kind}")
        inner, count = self._take("IQ")
        self.items += count
        if self.items > MAX_ITEMS or (inner != STRING and inner not in SCALARS):
            raise self._error(
                f"{shown(key)}: an array of {count} values of type {inner} is too long, or of another type"
            )
        if inner == STRING:
            return [self._string() for _ in range(count)]
        return list(self._take(f"{count}{SCALARS[inner]}"))

    def _string(self) -> str:
        (length,) = self._take("Q")
        start = self._advance(length)
        try:
            return str(self.raw[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"a text at byte {start} is not UTF-8 ({error.reason})") from None

    def _take(self, form: str) -> tuple[Any, ...]:
        start = self._advance(struct.calcsize(f"<{form}"))
        return struct.unpack_from(f"<{form}", self.raw, start)

    def _advance(self, count: int) -> int:
        start = self.at
        if count > self.end - start:
            raise self._error(
                f"its header wants {count} bytes at byte {start}, but ends at {self.end}: truncated or damaged"
            )
        self.at = start + count
        return start

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")


def _refuse_types(kinds: Sequence[tuple[str, int]], path: Path) -> None:
    found = {kind: name for name, kind in reversed(kinds) if kind not in BYTES_OF}
    if found:
        named = [f"{TYPE_NAMES.get(kind, f'type {kind}')} ({shown(name)})" for kind, name in sorted(found.items())]
        raise FormatError(
            f"{path}: has {first_few(named)}, which nothing here decodes; quantize the original checkpoint: neox-lite quantize"
        )
