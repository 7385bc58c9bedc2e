"""One safetensors file: its strict header, its memory map, its bytes when written. It knows no folder and no model."""

import ctypes
import json
import math
import mmap
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, shown
from ..files import open_regular, parse_json

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The format allows headers of 100 MB, but one made to hurt takes 25 times its size to parse (8 MiB took 212 MB). A tensor
# needs about 100 bytes of header, so this is room for some 40,000; GPT-NeoX-20B has fewer than 1,000.
MAX_HEADER_BYTES = 4 << 20
MAX_DIMS = 64  # torch's own limit
DATA_ALIGNMENT = 4096  # our files' data starts at a multiple of this, so a page of the file is a page of the tensor
TENSOR_ALIGNMENT = 64
HUGE_PAGE = 2 << 20
MAP_FIXED = 0x10  # Linux's, everywhere


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor, unread: shape and dtype as stored, nbytes, offset of its first byte in the file (None: a .bin)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    nbytes: int
    offset: int | None = None


@dataclass(frozen=True)
class Spec:
    """A tensor that will be written: its final name, dtype and shape.

    stated: the shape that the file states, where that is another one of as many numbers.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stated: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# -- reading ----------------------------------------------------------------------------------------------------------


class SafetensorsFile:
    """A safetensors file, checked and mapped: infos tells what is in it, read gives tensors that share its pages.

    The mapping is private: writing into a tensor never reaches the file. It lives as long as a tensor that uses it.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError with the path and the reason if it cannot be read or breaks the format's rules."""
        with open_regular(path) as file:
            self._stat = os.fstat(file.fileno())
            size = self._stat.st_size
            header, data_start = read_header(file, size, path)
            self.infos, self.metadata = parse_header(header, data_start, size, path)
            self._map = private_map(file.fileno(), size)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """The tensor, or its rows start..stop of the first dimension, in the stored dtype, without a copy.

        Only data that is not aligned to its item size is copied (just the rows asked for).
        """
        info = self.infos[name]
        assert info.offset is not None
        shape, offset = info.shape, info.offset
        if start is not None and stop is not None:
            row_bytes = math.prod(shape[1:]) * info.dtype.itemsize
            shape, offset = (stop - start, *shape[1:]), offset + start * row_bytes
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=info.dtype)
        if offset % info.dtype.itemsize == 0:  # the map itself starts on a page
            return torch.frombuffer(self._map, dtype=info.dtype, count=count, offset=offset).reshape(shape)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=count * info.dtype.itemsize, offset=offset)
        return raw.clone().view(info.dtype).reshape(shape)

    def read_sparsely(self, name: str) -> Tensor:
        """The tensor, mapped so that a row that is used brings little else into memory; where that cannot be, as `read`."""
        info = self.infos[name]
        assert info.offset is not None
        if sys.platform != "linux" or info.offset % info.dtype.itemsize or not info.nbytes:
            return self.read(name)
        with open_regular(info.file) as file:
            # The file was replaced since; the map of the whole file still has the old one.
            if not os.path.samestat(os.fstat(file.fileno()), self._stat):
                return self.read(name)
            memory, offset = _small_pages_map(file.fileno(), info.offset, info.nbytes)
        return torch.frombuffer(memory, dtype=info.dtype, count=math.prod(info.shape), offset=offset).reshape(
            info.shape
        )


def read_header(file: Any, size: int, path: Path) -> tuple[bytes, int]:
    """The header's raw JSON and the byte at which the data starts."""
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes is too short for a safetensors file; download or convert it again")
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise CheckpointError(
            f"{path}: header of {length} bytes in a file of {size}: truncated, or not safetensors; download it again"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: header of {length} bytes, more than the {MAX_HEADER_BYTES} that are read here")
    header = file.read(length)
    if len(header) != length or not header.startswith(b"{"):
        raise CheckpointError(f"{path}: the header does not start with '{{': not a safetensors file")
    return header, 8 + length


def parse_header(header: bytes, data_start: int, size: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Check every rule of the format; return the tensors in file order and the metadata.

    data_start and size in bytes. Tensors must fill data_start..size without holes or overlaps. Raises CheckpointError.
    """
    entries = parse_json(header, f"{path}: header", CheckpointError)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map names to strings")
    spans = []
    for name, entry in entries.items():
        dtype, shape, begin, end = _parse_entry(entry, f"{path}: {shown(name)}")
        spans.append((begin, end, TensorInfo(name, shape, dtype, path, end - begin, data_start + begin)))
    spans.sort(key=lambda span: span[:2])
    expected = 0
    for begin, end, info in spans:
        if begin != expected:
            what = "overlaps the tensor before it" if begin < expected else "leaves a hole before it"
            raise CheckpointError(f"{path}: {shown(info.name)}: data at byte {begin} {what}; expected byte {expected}")
        expected = end
    if expected != size - data_start:
        data_bytes = size - data_start
        raise CheckpointError(f"{path}: {data_bytes} bytes of data, but the header describes {expected}; truncated?")
    return {info.name: info for _, _, info in spans}, metadata


def _parse_entry(entry: Any, where: str) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: unknown dtype {shown(entry['dtype'])}; known are {', '.join(DTYPES)}")
    shape = _naturals(entry["shape"], f"{where}: shape")
    if len(shape) > MAX_DIMS:
        raise CheckpointError(f"{where}: {len(shape)} dimensions, more than {MAX_DIMS}")
    offsets = _naturals(entry["data_offsets"], f"{where}: data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets must be [begin, end] with begin <= end")
    if math.prod(size for size in shape if size) * dtype.itemsize >= 1 << 63:
        raise CheckpointError(f"{where}: shape {list(shape)} overflows")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != offsets[1] - offsets[0]:
        held = offsets[1] - offsets[0]
        raise CheckpointError(f"{where}: {entry['dtype']} {list(shape)} is {nbytes} bytes, data_offsets hold {held}")
    return dtype, shape, offsets[0], offsets[1]


def _naturals(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):  # True is no int
        raise CheckpointError(f"{where} must be a list of non-negative integers")
    return tuple(value)


def private_map(fileno: int, size: int) -> mmap.mmap:
    """Map a file copy-on-write: readable and writable memory whose changes stay in this process."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(fileno, size, access=mmap.ACCESS_COPY)
    return mmap.mmap(fileno, size, flags=_map_flags(), prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _map_flags() -> int:
    """A writable private map counts as memory that may be needed, so Linux refuses one larger than RAM plus swap.

    NORESERVE says that we will not write it. The constant is missing from Python's mmap before 3.13.
    """
    usual = 0x4000 if platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64") else 0
    return mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", usual)


def _small_pages_map(fileno: int, start: int, size: int) -> tuple[mmap.mmap, int]:
    """Bytes of a file mapped copy-on-write, on Linux: memory, and where in it they begin.

    Linux lays a file's map so that huge pages of its cache can be mapped whole: 2 MB for a row of a few KB. Half a huge page
    away from such a place it maps 64 KB at most.
    """
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    length = start + size - first
    # This map owns the addresses; the file is mapped over most of them below.
    memory = mmap.mmap(-1, length + 2 * HUGE_PAGE, flags=_map_flags())
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    target = base + (first + HUGE_PAGE // 2 - base) % HUGE_PAGE
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = ctypes.c_void_p
    system.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_int64]
    if system.mmap(target, length, mmap.PROT_READ | mmap.PROT_WRITE, _map_flags() | MAP_FIXED, fileno, first) != target:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return memory, target - base + start - first


# -- writing ----------------------------------------------------------------------------------------------------------


def layout(specs: Sequence[Spec]) -> list[Spec]:
    """The order in the file: the caller's, except that sizes which would misalign what follows go last.

    Every tensor then starts at a multiple of its item size, and those of a multiple of 64 bytes at a multiple of 64.
    """
    return sorted(specs, key=lambda spec: -math.gcd(spec.nbytes, TENSOR_ALIGNMENT))  # stable; gcd(0, 64) is 64


def encode_header(specs: Iterable[Spec]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes (length, JSON, spaces up to a multiple of 4096) and each tensor's offset in the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers looks for
    begins: dict[str, int] = {}
    position = 0
    for spec in specs:
        begins[spec.name], end = position, position + spec.nbytes
        offsets, shape = [position, end], list(spec.shape if spec.stated is None else spec.stated)
        header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": shape, "data_offsets": offsets}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    data_start = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT
    if data_start - 8 > MAX_HEADER_BYTES:
        raise CheckpointError(f"{len(begins)} tensors need a header of {len(text)} bytes, more than {MAX_HEADER_BYTES}")
    prefix = (data_start - 8).to_bytes(8, "little") + text.ljust(data_start - 8)
    return prefix, {name: data_start + begin for name, begin in begins.items()}
