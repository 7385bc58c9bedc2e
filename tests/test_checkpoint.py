"""checkpoint.py, folder_writer.py and safetensors_file.py: what they read and write, and what they refuse, on real files."""

import errno
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import digests, flip
from support.commands import PIPES, environment, run_python
from support.often import times
from torch import Tensor

from neox_lite.checkpoint.folder_writer import FolderWriter, split_into_shards
from neox_lite.checkpoint.reader import Checkpoint, verify_folder
from neox_lite.checkpoint.safetensors_file import DTYPES, MAX_HEADER_BYTES, Spec, TensorInfo
from neox_lite.errors import CheckpointError
from neox_lite.files import partials

MUTATIONS = times(1000)  # of headers
PREFIX = "gpt_neox.layers.0.attention"


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Every bit pattern that is a number: floats are finite, so that equality and verify are meant."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        values = torch.randn(shape, generator=generator)
        return (values.abs() if dtype == torch.float8_e8m0fnu else values).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """A small model's worth: several dtypes, a scalar, an empty one, odd sizes."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "embed": ((50, 16), torch.float16),
        f"{PREFIX}.query_key_value.bias": ((48,), torch.float32),
        f"{PREFIX}.dense.bias": ((7,), torch.bfloat16),
        f"{PREFIX}.dense.weight_packed": ((16, 8), torch.int32),
        f"{PREFIX}.dense.weight_shape": ((2,), torch.int64),
        "scalar": ((), torch.float32),
        "empty": ((0, 4), torch.float16),
        "flags": ((3,), torch.bool),
    }
    return {name: random_tensor(shape, dtype, seed + i) for i, (name, (shape, dtype)) in enumerate(shapes.items())}


def specs(state: dict[str, Tensor]) -> list[Spec]:
    return [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]


def write_model(folder: Path, state: dict[str, Tensor], max_bytes: int = 10**9, **fields: Any) -> None:
    with FolderWriter(folder) as out:
        out.shards(split_into_shards([[spec] for spec in specs(state)], max_bytes))
        for i, planned in enumerate(out.plan):
            with out.shard(i) as shard:
                for spec in planned:
                    shard.write(spec.name, state[spec.name])
        out.file("tokenizer.json", "{}\n")
        out.finish('{"model_type": "gpt_neox"}', **fields)


def raw_file(path: Path, header: bytes | str | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file of any header, right or wrong."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str = "F16", shape: object = (2, 2), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(folder: Path, *words: str) -> str:
    """Opening the folder must raise a one-line CheckpointError with these words."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# -- reading safetensors ----------------------------------------------------------------------------------------------


def test_reads_what_the_safetensors_library_writes(tmp_path):
    state = {name: random_tensor((3, 5), dtype, 0) for name, dtype in DTYPES.items()} | tensors()
    save_file(state, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert sorted(checkpoint.names()) == sorted(state)
        assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in state.values())
        assert checkpoint.files == [tmp_path / "model.safetensors"]
        for name, tensor in state.items():
            info = checkpoint.info(name)
            assert (info.name, info.shape, info.dtype) == (name, tuple(tensor.shape), tensor.dtype)
            assert (info.file, info.nbytes) == (tmp_path / "model.safetensors", tensor.nbytes)
            stored = checkpoint.tensor(name)
            assert torch.equal(stored.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_rows_are_the_rows_of_the_tensor_and_are_checked(tmp_path):
    weight = torch.arange(60, dtype=torch.float32).reshape(10, 6)
    save_file({"w": weight, "s": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for start, stop in [(0, 10), (3, 7), (9, 10), (4, 4)]:
        assert torch.equal(checkpoint.rows("w", start, stop), weight[start:stop])
    for start, stop in [(-1, 3), (3, 2), (0, 11)]:
        with pytest.raises(CheckpointError, match=rf"rows {start}\.\.{stop}"):
            checkpoint.rows("w", start, stop)
    with pytest.raises(CheckpointError, match=r"rows 0\.\.1"):
        checkpoint.rows("s", 0, 1)


def test_tensors_share_the_mapped_pages_and_outlive_the_checkpoint(tmp_path):
    save_file({"w": torch.ones(1000)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    first, second, rows = checkpoint.tensor("w"), checkpoint.tensor("w"), checkpoint.rows("w", 10, 20)
    assert first.data_ptr() == second.data_ptr() == rows.data_ptr() - 40
    checkpoint.close()
    del checkpoint
    assert first.sum() == 1000
    assert rows.sum() == 10


def test_a_closed_checkpoint_says_so(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert "w" in checkpoint
        with pytest.raises(CheckpointError, match="no tensor named v"):
            checkpoint.tensor("v")
    assert "w" not in checkpoint
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.tensor("w")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_writing_into_a_tensor_never_reaches_the_file(tmp_path, kind):
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    save: Callable[..., Any] = safetensors.torch.save_file if kind == "safetensors" else torch.save
    save({"w": torch.zeros(5000)}, path)
    before = path.read_bytes()
    Checkpoint.open(tmp_path).tensor("w").fill_(1)
    assert path.read_bytes() == before
    assert Checkpoint.open(tmp_path).tensor("w").sum() == 0


@pytest.mark.parametrize("shift", range(1, 8))
def test_misaligned_data_is_copied_and_right(tmp_path, shift):
    weight, scalar = torch.arange(12, dtype=torch.float32).reshape(4, 3), torch.tensor(5, dtype=torch.int64)
    header = json.dumps({"w": entry("F32", [4, 3], [0, 48]), "s": entry("I64", [], [48, 56])}).encode()
    header += b" " * (-len(header) % 8 + shift)
    raw_file(tmp_path / "model.safetensors", header, weight.numpy().tobytes() + scalar.numpy().tobytes())
    checkpoint = Checkpoint.open(tmp_path)
    for tensor, expected in [
        (checkpoint.tensor("w"), weight),
        (checkpoint.rows("w", 1, 3), weight[1:3]),
        (checkpoint.tensor("s"), scalar),
    ]:
        assert torch.equal(tensor, expected)
        assert tensor.data_ptr() % tensor.element_size() == 0
    if shift == 4:  # aligned for float32, so mapped: both calls see one memory
        assert checkpoint.tensor("w").data_ptr() == checkpoint.tensor("w").data_ptr()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system may refuse to reserve so much")
def test_a_file_larger_than_memory_can_be_mapped(tmp_path):
    size = 4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path = raw_file(tmp_path / "model.safetensors", {"w": entry("U8", [size], [0, size])})
    os.truncate(path, path.stat().st_size + size)  # a hole: takes no space
    last = Checkpoint.open(tmp_path).rows("w", size - 1, size)
    assert last.tolist() == [0]


def malformed() -> dict[str, tuple[bytes | str | dict[str, Any], bytes, str]]:
    """Kinds of wrong headers: name -> header, data, a word of the message."""
    eight = bytes(8)
    return {
        "empty": ("", b"", "not start with"),
        "not-json": ('{"a":', b"", "not valid JSON"),
        "utf16": ("{}".encode("utf-16"), b"", "not start with"),
        "array": ("[]", b"", "not start with"),
        "duplicate-tensor": (f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}', eight, "'a' appears twice"),
        "entry-not-object": ({"a": 3}, eight, "a: expected exactly"),
        "extra-field": ({"a": {**entry(), "x": 1}}, eight, "expected exactly"),
        "missing-field": ({"a": {"dtype": "F16", "shape": [4]}}, eight, "expected exactly"),
        "unknown-dtype": ({"a": entry("F12")}, eight, "unknown dtype F12"),
        "dtype-not-string": ({"a": {**entry(), "dtype": ["F16"]}}, eight, "unknown dtype"),
        "shape-not-list": ({"a": entry(shape=4)}, eight, "shape must be"),
        "bool-dim": ({"a": entry(shape=[True, 4])}, eight, "shape must be"),
        "float-dim": ({"a": entry(shape=[2.0, 2])}, eight, "shape must be"),
        "negative-dim": ({"a": entry(shape=[-2, -2])}, eight, "shape must be"),
        "overflow": ({"a": entry(shape=[1 << 62, 1 << 62])}, eight, "overflows"),
        "overflow-hidden-by-zero": ({"a": entry(shape=[1 << 62, 8, 0], offsets=[0, 0])}, b"", "overflows"),
        "many-dims": ({"a": entry(shape=[1] * 65, offsets=[0, 2])}, b"12", "65 dimensions"),
        "one-offset": ({"a": entry(offsets=[8])}, eight, "begin <= end"),
        "backwards": ({"a": entry(offsets=[8, 0])}, eight, "begin <= end"),
        "negative-offset": ({"a": entry(offsets=[-8, 0])}, eight, "data_offsets must be"),
        "wrong-size": ({"a": entry(offsets=[0, 6])}, bytes(6), "is 8 bytes, data_offsets hold 6"),
        "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "b: data at byte 4 overlaps"),
        "hole": ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), "b: data at byte 12 leaves a hole"),
        "hole-at-start": ({"a": entry(offsets=[4, 12])}, bytes(12), "leaves a hole"),
        "data-too-short": ({"a": entry()}, bytes(7), "7 bytes of data"),
        "data-too-long": ({"a": entry()}, bytes(9), "9 bytes of data"),
        "metadata-not-object": ({"__metadata__": []}, b"", "__metadata__"),
        "metadata-not-strings": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    }


@pytest.mark.parametrize("kind", malformed())
def test_malformed_headers_are_refused(tmp_path, kind):
    header, data, word = malformed()[kind]
    raw_file(tmp_path / "model.safetensors", header, data)
    refused(tmp_path, str(tmp_path / "model.safetensors"), word)


@pytest.mark.parametrize("length", [3, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_wrong_header_lengths_are_refused(tmp_path, length):
    raw_file(tmp_path / "model.safetensors", '{"a": {}}', length=length)
    refused(tmp_path, "model.safetensors")


def test_a_header_beyond_the_limit_is_not_parsed(tmp_path):
    raw_file(tmp_path / "model.safetensors", b"{" + b" " * MAX_HEADER_BYTES + b"}")
    refused(tmp_path, f"more than the {MAX_HEADER_BYTES}")


def opens_or_is_refused(folder: Path) -> bool:
    """Whether it opens; what opens must be readable throughout, and only CheckpointError may be raised."""
    try:
        with Checkpoint.open(folder) as checkpoint:
            for name in checkpoint.names():
                checkpoint.tensor(name).reshape(-1).view(torch.uint8).sum()
    except CheckpointError as error:
        assert str(error)
        return False
    return True


def valid_bytes(tmp_path: Path) -> bytes:
    save_file(tensors(), tmp_path / "valid", metadata={"format": "pt"})
    return (tmp_path / "valid").read_bytes()


def test_every_truncation_is_refused(tmp_path):
    valid = valid_bytes(tmp_path)
    for length in random.Random(0).sample(range(len(valid)), 512):
        (tmp_path / "model.safetensors").write_bytes(valid[:length])
        assert not opens_or_is_refused(tmp_path), length


def test_mutated_headers_are_refused_or_read_quickly_and_in_little_memory(tmp_path):
    valid = valid_bytes(tmp_path)
    header_bytes = 8 + int.from_bytes(valid[:8], "little")
    chance = random.Random(0)
    slowest, opened = 0.0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(MUTATIONS):
        mutated = bytearray(valid)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(header_bytes)
            if chance.random() < 0.5:
                mutated[at] = chance.randrange(256)
            else:  # a character that JSON and the format care about
                mutated[at] = chance.choice(b'{}[],:"0123456789-tfn\\ ')
        (tmp_path / "model.safetensors").write_bytes(mutated)
        start = time.process_time()
        opened += opens_or_is_refused(tmp_path)
        slowest = max(slowest, time.process_time() - start)
    assert slowest < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB on Linux, bytes on macOS
    assert 0 < opened < MUTATIONS / 2  # a changed letter in a tensor's name is no error


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_worst_headers_take_little_time_and_memory(tmp_path):
    for body in ['"%x":0', "[]", "{}", "999"]:
        count = (MAX_HEADER_BYTES - 100) // (len(body) + (5 if "%" in body else 1))
        opening, closing = ('{"a":{', "}}") if "%" in body else ('{"a":[', "]}")
        items = (body % i if "%" in body else body for i in range(count))
        raw_file(tmp_path / body.strip('"%:') / "model.safetensors", opening + ",".join(items) + closing)
    code = (
        "import re, sys, time; from pathlib import Path; from neox_lite.checkpoint.reader import Checkpoint\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        "for folder in Path(sys.argv[1]).iterdir():\n"
        "    start = time.process_time()\n"
        "    try: Checkpoint.open(folder)\n"
        "    except ValueError: print(time.process_time() - start, peak() - before)"
    )
    measured = [line.split() for line in run_python(code, tmp_path).stdout.splitlines()]
    assert len(measured) == 4
    assert max(float(seconds) for seconds, _ in measured) < 2
    assert max(int(kib) for _, kib in measured) < 200_000


# -- .bin -------------------------------------------------------------------------------------------------------------


def test_reads_a_single_bin(tmp_path):
    base = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    state = {
        **tensors(),
        "transposed": base.t(),
        "tied": base,
        "part": base[1:2],
        "parameter": torch.nn.Parameter(base * 2),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(checkpoint.names()) == sorted(state)
    for name, tensor in state.items():
        read = checkpoint.tensor(name)
        assert torch.equal(read, tensor)
        assert (type(read), read.is_contiguous(), read.requires_grad) == (Tensor, True, False)
        assert checkpoint.info(name).shape == tuple(tensor.shape)
    assert torch.equal(checkpoint.rows("transposed", 1, 3), base.t()[1:3])


def test_reads_a_sharded_bin(tmp_path):
    state = tensors()
    names = list(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:3], "pytorch_model-00002-of-00002.bin": names[3:]}
    for file, held in parts.items():
        torch.save({name: state[name] for name in held}, tmp_path / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map, "metadata": {}}))
    checkpoint = Checkpoint.open(tmp_path)
    assert [path.name for path in checkpoint.files] == sorted(parts)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in state.items())


def test_safetensors_are_preferred_over_bin(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert Checkpoint.open(tmp_path).tensor("w").sum() == 2


class Bomb:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["value", "key", "whole", "bare-pickle"])
def test_a_malicious_bin_has_no_effect(tmp_path, how):
    bomb = Bomb(tmp_path / "exploded")
    contents: dict[str, Any] = {"value": {"w": torch.ones(2), "b": bomb}, "key": {bomb: torch.ones(2)}, "whole": bomb}
    if how == "bare-pickle":
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(bomb))
    else:
        torch.save(contents[how], tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([torch.ones(2)], "holds a list"),
        ({"w": {"inner": torch.ones(2)}}, "entry w is a dict"),
        ({"w": 3}, "entry w is a int"),
        ({3: torch.ones(2)}, "entry 3 is a Tensor"),
        ({"w": torch.ones(2, 2).to_sparse()}, "w: expected a plain tensor"),
        ({"w": torch.ones(1).expand(1 << 40)}, "w: expected a plain tensor"),
        ({"w": torch.ones(2, device="meta")}, "w: expected a plain tensor"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "w: expected a plain tensor"),
    ],
    ids=["list", "nested", "number", "integer-key", "sparse", "expanded", "meta", "complex"],
)
def test_a_bin_of_anything_but_plain_tensors_is_refused(tmp_path, content, word):
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", word)


def test_a_legacy_bin_is_refused_with_the_fix(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refused(tmp_path, "rewrite it with torch.save")


def test_damaged_bins_are_refused_or_read(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors(), path)
    valid, chance = path.read_bytes(), random.Random(0)
    for length in chance.sample(range(len(valid)), 60):
        path.write_bytes(valid[:length])
        assert not opens_or_is_refused(tmp_path)
    for _ in range(60):
        mutated = bytearray(valid)
        mutated[chance.randrange(len(valid))] = chance.randrange(256)
        path.write_bytes(mutated)
        opens_or_is_refused(tmp_path)


# -- index and links --------------------------------------------------------------------------------------------------


def sharded(folder: Path, parts: dict[str, dict[str, Tensor]], **changes: Any) -> Path:
    """A folder of safetensors shards and their index; changes replace entries of weight_map."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, state in parts.items():
        save_file(state, folder / file)
    weight_map = {name: file for file, state in parts.items() for name in state} | changes
    weight_map = {name: file for name, file in weight_map.items() if file is not None}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, "anything": 1}))
    return folder


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def two_parts() -> dict[str, dict[str, Tensor]]:
    return {A: {"a": torch.ones(2), "b": torch.ones(3)}, B: {"c": torch.ones(4)}}


def test_reads_shards_through_their_index(tmp_path):
    checkpoint = Checkpoint.open(sharded(tmp_path, two_parts()))
    assert sorted(checkpoint.names()) == ["a", "b", "c"]
    assert checkpoint.info("c") == TensorInfo("c", (4,), torch.float32, tmp_path / B, 16, checkpoint.info("c").offset)
    assert checkpoint.files == [tmp_path / A, tmp_path / B]


def test_old_buffers_are_skipped_and_nothing_else(tmp_path):
    old = [f"{p}layers.{i}.attention.{b}" for p in ("gpt_neox.", "") for i in (0, 11) for b in ("bias", "masked_bias")]
    old += ["gpt_neox.layers.3.attention.rotary_emb.inv_freq"]
    kept = [f"{PREFIX}.query_key_value.bias", f"{PREFIX}.dense.bias", "x.layers.0.attention.bias"]
    kept += [f"gpt_neox.layers.{name}" for name in ("x.attention.bias", "0.attention.bias2", "0.attention.bias\n")]
    state = {name: torch.ones(1) for name in (*old, *kept)}
    save_file(state, tmp_path / "model.safetensors")
    assert sorted(Checkpoint.open(tmp_path).names()) == sorted(kept)
    unlisted = {f"{PREFIX}.bias": None, f"{PREFIX}.masked_bias": A}  # in a file only, in the index only
    folder = sharded(tmp_path / "s", {A: {"a": torch.ones(1), f"{PREFIX}.bias": torch.ones(1)}}, **unlisted)
    assert Checkpoint.open(folder).names() == ["a"]


TWICE = {**two_parts(), B: {"a": torch.ones(2), "c": torch.ones(4)}}


@pytest.mark.parametrize(
    ("parts", "changes", "words"),
    [
        ({B: two_parts()[B]}, {"a": A, "d": "model-3.safetensors"}, ["2 of 3", A, "model-3.safetensors"]),
        (two_parts(), {"a": B}, ["a is not in"]),
        (two_parts(), {"a": None}, [f"a is in {A} but not in the index"]),
        (two_parts(), {"d": B}, [f"d is not in {B}"]),
        (TWICE, {}, [f"a is in both {A} and {B}"]),
    ],
    ids=["missing-files", "elsewhere", "unlisted", "nowhere", "twice"],
)
def test_index_and_files_must_agree(tmp_path, parts, changes, words):
    refused(sharded(tmp_path, parts, **changes), *words)


@pytest.mark.parametrize(
    "index",
    [
        *("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[" * 100_000),
        "\ufeff{}",
        f'{{"weight_map": {{"a": "{A}", "a": "{B}"}}}}',
        f'{{"weight_map": {{}}, "weight_map": {{"a": "{A}"}}}}',
    ],
)
def test_a_malformed_index_is_refused(tmp_path, index):
    sharded(tmp_path, two_parts())
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refused(tmp_path, "model.safetensors.index.json")


HOSTILE_NAMES = [
    *("../{0}", "x/../../{0}", "{1}/{0}", "..\\{0}", "C:\\{0}", "C:{0}", "a\0{0}", "", ".", "./{0}", "a//{0}"),
]
HOSTILE_NAMES += [
    *("link.safetensors", "linked/{0}", "loop.safetensors", "x" * 5000 + ".safetensors", "config.json", "{0}\n"),
]


@pytest.mark.parametrize("number", range(len(HOSTILE_NAMES)))
def test_a_weight_map_cannot_leave_the_folder(tmp_path, number):
    outside, folder = tmp_path / "outside", tmp_path / "model"
    outside.mkdir()
    save_file({"a": torch.ones(2)}, outside / A)
    save_file({"a": torch.ones(2)}, tmp_path / A)
    name = HOSTILE_NAMES[number].format(A, outside)
    sharded(folder, {}, a=name)
    (folder / "x").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "link.safetensors").symlink_to(outside / A)
    (folder / "linked").symlink_to(outside)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    refused(folder)


def hub_cache(root: Path, blob_folder: str = "models--o--m/blobs") -> Path:
    """A snapshot folder as the hub cache lays it out: every file a link into blobs."""
    snapshot, blobs = root / "models--o--m" / "snapshots" / "c0ffee", root / blob_folder
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    sharded(root / "staging", two_parts())
    for i, path in enumerate(sorted((root / "staging").iterdir())):
        path.rename(blobs / f"{i}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{i}", snapshot))
    return snapshot


def test_links_of_the_hub_cache_and_links_inside_the_folder_work(tmp_path):
    snapshot = hub_cache(tmp_path)
    assert sorted(Checkpoint.open(snapshot).names()) == ["a", "b", "c"]
    (tmp_path / "link").symlink_to(snapshot)
    assert sorted(Checkpoint.open(tmp_path / "link").names()) == ["a", "b", "c"]
    plain = tmp_path / "plain"
    (plain / "data").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, plain / "data" / "x")
    (plain / "model.safetensors").symlink_to("data/x")
    assert Checkpoint.open(plain).names() == ["a"]


def test_links_into_another_repositorys_cache_are_refused(tmp_path):
    refused(hub_cache(tmp_path, "models--o--other/blobs"), "links outside the folder")


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    refused(tmp_path / "none", "no such folder")
    refused(tmp_path, "model.safetensors", "pytorch_model.bin", ".index.json")
    raw_file(tmp_path / A, {})
    refused(tmp_path, A, "index is missing")
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, "not a regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    refused(tmp_path, name, "not a regular file")


# -- check ------------------------------------------------------------------------------------------------------------


def test_check_accepts_what_fits(tmp_path):
    state = tensors()
    save_file(state, tmp_path / "model.safetensors")
    expected = {name: (tensor.shape, {tensor.dtype, torch.float64}) for name, tensor in state.items()}
    Checkpoint.open(tmp_path).check(expected)
    Checkpoint.open(tmp_path).check({name: (list(tensor.shape), None) for name, tensor in state.items()})


def test_check_names_everything_that_does_not_fit_in_one_line(tmp_path):
    save_file({name: torch.ones(2, 3) for name in "abcdef"}, tmp_path / "model.safetensors")
    expected: dict[str, Any] = {f"missing{i}": ((1,), None) for i in range(6)}
    expected |= {"a": ((3, 2), None), "b": ((2, 3), [torch.float16, torch.bfloat16]), "c": ((2, 3), [torch.float32])}
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path).check(expected, where="here")
    assert str(caught.value) == (
        "here: the weights do not fit the config: 6 missing: missing0, missing1, missing2, missing3 and 2 more; "
        "3 unexpected: d, e, f; 1 wrong shape: a is [2, 3], expected [3, 2]; "
        "1 wrong dtype: b is float32, expected bfloat16 or float16"
    )


# -- writing ----------------------------------------------------------------------------------------------------------


def test_golden_bytes_of_a_written_file(tmp_path):
    state = {
        "scale": torch.tensor([[1.0, -2.0]], dtype=torch.float16),
        "packed": torch.arange(16, dtype=torch.int32).reshape(2, 8),
        "shape": torch.tensor([2, 64]),
    }
    write_model(tmp_path, state)
    raw = (tmp_path / "model.safetensors").read_bytes()
    # packed is 64 bytes and stays ahead; scale is 4 bytes, which would misalign shape, so it goes last.
    header = (
        '{"__metadata__":{"format":"pt"},'
        '"packed":{"dtype":"I32","shape":[2,8],"data_offsets":[0,64]},'
        '"shape":{"dtype":"I64","shape":[2],"data_offsets":[64,80]},'
        '"scale":{"dtype":"F16","shape":[1,2],"data_offsets":[80,84]}}'
    )
    assert raw[:8] == (4088).to_bytes(8, "little")
    assert raw[8:4096] == header.encode().ljust(4088)
    assert raw[4096:] == struct.pack("<16i", *range(16)) + struct.pack("<2q", 2, 64) + bytes.fromhex("003c00c0")


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    state = tensors()
    write_model(tmp_path, state)
    read = load_file(tmp_path / "model.safetensors")
    assert sorted(read) == sorted(state)
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned_whatever_the_sizes(tmp_path):
    chance = random.Random(0)
    dtypes = [torch.int8, torch.float16, torch.int32, torch.float64]
    state = {
        f"t{i}": random_tensor((chance.choice([1, 3, 7, 64]), chance.choice([1, 5, 32])), chance.choice(dtypes), i)
        for i in range(60)
    }
    write_model(tmp_path, state)
    checkpoint = Checkpoint.open(tmp_path)
    for name in checkpoint.names():
        info = checkpoint.info(name)
        assert info.offset is not None
        assert info.offset % math.gcd(info.nbytes, 64) == 0
        assert info.offset % info.dtype.itemsize == 0
        assert torch.equal(checkpoint.tensor(name), state[name])


def test_shards_keep_groups_together_and_have_an_index(tmp_path):
    groups = [[Spec(f"{g}.{i}", torch.float32, (10,)) for i in range(2)] for g in "abcd"]
    plan = split_into_shards(groups, max_bytes=170)
    assert [" ".join(spec.name for spec in shard) for shard in plan] == ["a.0 a.1 b.0 b.1", "c.0 c.1 d.0 d.1"]
    assert [len(shard) for shard in split_into_shards(groups, max_bytes=1)] == [2, 2, 2, 2]
    with FolderWriter(tmp_path) as out:
        out.shards(plan)
        for i, shard_specs in enumerate(plan):
            with out.shard(i) as shard:
                for spec in shard_specs:
                    shard.write(spec.name, torch.full(spec.shape, float(i)))
        out.finish("{}")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 320}
    assert set(index["weight_map"].values()) == {A, B}
    assert Checkpoint.open(tmp_path).tensor("d.1").tolist() == [1.0] * 10
    assert verify_folder(tmp_path) == []


def test_rows_may_come_in_any_order_and_from_several_threads(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    weight = torch.arange(1000 * 8, dtype=torch.float32).reshape(1000, 8)
    cuts = sorted(random.Random(0).sample(range(1, 1000), 50))
    slices = list(zip([0, *cuts], [*cuts, 1000], strict=True))
    random.Random(1).shuffle(slices)
    with FolderWriter(tmp_path) as out:
        out.shards([[Spec("w", torch.float32, (1000, 8))]])
        with out.shard(0) as shard, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda span: shard.write("w", weight[span[0] : span[1]], row=span[0]), slices))
        out.finish("{}")
    assert torch.equal(Checkpoint.open(tmp_path).tensor("w"), weight)


@pytest.mark.parametrize(
    ("write", "word"),
    [
        (lambda shard: None, "only rows [] of 4"),
        (lambda shard: shard.write("w", torch.ones(3, 2)), "only rows [(0, 3)] of 4"),
        (lambda shard: [shard.write("w", torch.ones(2, 2)) for _ in range(2)], "rows 0..2 are written twice"),
        (lambda shard: [shard.write("w", torch.ones(2, 2), row=r) for r in (2, 1)], "rows 1..3 are written twice"),
        (lambda shard: shard.write("w", torch.ones(4, 3)), "got float32 [4, 3], planned float32 [4, 2]"),
        (lambda shard: shard.write("w", torch.ones(4)), "got float32 [4]"),
        (lambda shard: shard.write("w", torch.ones(4, 2).half()), "got float16"),
        (lambda shard: shard.write("w", torch.ones(2, 2), row=3), "rows 3..5 of 4"),
        (lambda shard: shard.write("w", torch.ones(2, 2), row=-1), "rows -1..1 of 4"),
        (lambda shard: shard.write("v", torch.ones(2, 2)), "v is not planned"),
    ],
)
def test_a_shard_that_is_not_written_exactly_once_is_an_error(tmp_path, write, word):
    with pytest.raises(CheckpointError) as caught, FolderWriter(tmp_path) as out:
        out.shards([[Spec("w", torch.float32, (4, 2))]])
        with out.shard(0) as shard:
            write(shard)
    assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def write_one(out):
    out.shards([[Spec("w", torch.float32, (4,))]])
    with out.shard(0) as shard:
        shard.write("w", torch.ones(4))


PLAIN = ["../x", "a/b", "config.json", "neox_lite_manifest.json", "x.partial", "model.safetensors", "x\\y", ""]


@pytest.mark.parametrize(
    ("write", "word"),
    [
        (lambda out: out.shards([[Spec("w", torch.float32, (4,))]] * 2), "w is planned twice"),
        (lambda out: out.file("tokenizer.json", "{}"), "left without finish"),
        (
            lambda out: (out.shards([[Spec("w", torch.float32, (4,))]]), out.finish("{}")),
            "not written yet: model.safetensors",
        ),
        *((lambda out, name=name: out.file(name, "x"), None) for name in PLAIN),
    ],
)
def test_a_folder_takes_plain_files_and_each_tensor_once_and_is_finished(tmp_path, write, word):
    with pytest.raises(CheckpointError, match=word), FolderWriter(tmp_path / "m") as out:
        write(out)
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path / "m")


def test_an_extra_weight_file_stands_outside_of_the_index(tmp_path):
    with FolderWriter(tmp_path) as out:
        write_one(out)
        with out.extra("neox_lite_head.safetensors", [Spec("h", torch.int8, (3, 5))]) as extra:
            extra.write("h", torch.ones(3, 5, dtype=torch.int8))
        out.finish("{}")
    assert Checkpoint.open(tmp_path).names() == ["w"]
    assert Checkpoint.open_file(tmp_path, "neox_lite_head.safetensors").tensor("h").sum() == 15
    manifest = json.loads((tmp_path / "neox_lite_manifest.json").read_text())
    assert "neox_lite_head.safetensors" in manifest["files"]
    assert verify_folder(tmp_path) == []


def test_the_manifest_tells_sizes_hashes_and_what_the_caller_says(tmp_path):
    write_model(tmp_path, tensors(), method="mse", source="o/m", source_revision=None)
    manifest = json.loads((tmp_path / "neox_lite_manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert (manifest["method"], manifest["source"], manifest["source_revision"]) == ("mse", "o/m", None)
    assert manifest["created_by"].startswith("neox-lite")
    assert manifest["files"].keys() == {path.name for path in tmp_path.iterdir()} - {"neox_lite_manifest.json"}
    assert all(entry["bytes"] == (tmp_path / name).stat().st_size for name, entry in manifest["files"].items())


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_model(tmp_path / name, tensors(), max_bytes=400)
    write_model(tmp_path / "two", tensors(), max_bytes=400)  # over itself
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_new_model_replaces_the_old_one_whole(tmp_path):
    write_model(tmp_path, tensors(), max_bytes=400)
    assert (tmp_path / "model.safetensors.index.json").exists()
    (tmp_path / "mine.txt").write_text("keep")
    checkpoint = Checkpoint.open(tmp_path)
    held = checkpoint.tensor("embed")
    with FolderWriter(tmp_path) as out:
        out.shards([[Spec("w", torch.float32, (4,))]])
        with out.shard(0) as shard:
            assert not (tmp_path / "config.json").exists()
            assert not (tmp_path / "neox_lite_manifest.json").exists()
            shard.write("w", torch.ones(4))
        out.finish("{}")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.json", "mine.txt", "model.safetensors", "neox_lite_manifest.json"}
    assert verify_folder(tmp_path) == []
    assert torch.equal(held, tensors()["embed"])  # the reader still has the old file's pages


def test_nothing_is_touched_before_the_first_write(tmp_path):
    write_model(tmp_path, tensors())
    with pytest.raises(RuntimeError, match="early"), FolderWriter(tmp_path) as out:
        out.shards([[Spec("w", torch.float32, (4,))]])
        raise RuntimeError("early")
    assert verify_folder(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
)
def test_a_model_that_others_wrote_is_never_overwritten(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(CheckpointError, match="neox-lite did not write"):
        write_model(tmp_path, tensors())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
@pytest.mark.parametrize("name", ["neox_lite_manifest.json", "neox_lite_manifest.json.partial"])
def test_a_link_in_the_place_of_the_manifest_is_never_written_through(tmp_path, name):
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link, which is not written through"):
        write_model(tmp_path / "model", tensors())
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_the_folder_being_read_is_never_written(tmp_path):
    write_model(tmp_path / "model", tensors())
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for source in (tmp_path / "model", tmp_path / "link", tmp_path / "model" / ".." / "model"):
        with pytest.raises(CheckpointError, match="is the folder being read"):
            FolderWriter(tmp_path / "model", source=source)
    FolderWriter(tmp_path / "other", source="owner/name")


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_two_writers_cannot_share_a_folder(tmp_path):
    with FolderWriter(tmp_path) as first:
        first.file("tokenizer.json", "{}")
        with pytest.raises(CheckpointError, match="another process is writing"), FolderWriter(tmp_path) as second:
            second.file("tokenizer.json", "[]")
        first.finish("{}")
    assert "no weights; looked for" in verify_folder(tmp_path)[0]  # none were planned
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_a_file_system_without_locks_or_preallocation_serves_and_is_named(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*args: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    write_model(tmp_path, tensors())
    assert verify_folder(tmp_path) == []
    assert "has no locks" in caplog.text


# -- failures while writing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "replace"])
def test_a_full_disk_at_any_write_is_said_and_leaves_nothing_that_looks_complete(tmp_path, monkeypatch, call):
    """Let the k-th call fail, for every k: the first that does not fail ends the loop with a complete folder."""
    owner: Any = Path if call == "replace" else os
    real = getattr(owner, call)
    for k in range(200):
        folder, calls = tmp_path / str(k), 0

        def failing(*args: Any, k: int = k) -> Any:
            nonlocal calls
            calls += 1
            if calls == k + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        monkeypatch.setattr(owner, call, failing)
        try:
            write_model(folder, tensors(), max_bytes=400)
            break
        except CheckpointError as error:
            assert "disk full" in str(error)
            assert "are free" in str(error)
            assert "\n" not in str(error)
        finally:
            monkeypatch.setattr(owner, call, real)
        looks_complete = (folder / "config.json").exists()
        assert not looks_complete or verify_folder(folder) == []  # the very last fsync: everything is there already
        left = [path.name for path in folder.glob("*.partial")]
        assert left in ([], ["neox_lite_manifest.json.partial"])
        write_model(folder, tensors(), max_bytes=400)
        assert verify_folder(folder) == []
    assert 2 < k < 199
    assert verify_folder(folder) == []


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small tmpfs")
def test_a_really_full_disk_is_found_before_the_first_byte(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (tmp_path / "filler").write_bytes(bytes(700_000))
        with (
            pytest.raises(CheckpointError, match=r"needs 1200000 bytes, \d+ are free"),
            FolderWriter(tmp_path / "m") as out,
        ):
            out.shards([[Spec("w", torch.int8, (1_200_000,))]])
        with pytest.raises(CheckpointError, match="disk full: needs"), FolderWriter(tmp_path / "m") as out:
            out.shards([[Spec("w", torch.int8, (300_000,))]])
            (tmp_path / "more").write_bytes(bytes(200_000))
            with out.shard(0):
                pytest.fail("the space was not there")
        assert not (tmp_path / "m").exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def write_slowly(folder: Path, step: Callable[[], object] = lambda: None) -> None:
    """Three shards of four tensors of four slices each, with a step before every slice."""
    torch.manual_seed(0)
    with FolderWriter(folder) as out:
        out.shards([[Spec(f"{s}.{i}", torch.float32, (64, 64)) for i in range(4)] for s in "abc"])
        for i, planned in enumerate(out.plan):
            with out.shard(i) as shard:
                for spec in planned:
                    tensor = torch.randn(spec.shape)
                    for row in range(0, 64, 16):
                        step()
                        shard.write(spec.name, tensor[row : row + 16], row=row)
        out.finish("{}")


WRITER = """
import sys
from pathlib import Path
import test_checkpoint
def step():
    print(".", end="", flush=True)
    sys.stdin.read(1)
test_checkpoint.write_slowly(Path(sys.argv[1]), step)
"""


@pytest.mark.parametrize("kill", ["SIGKILL", "SIGINT"])
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_killed_writer_leaves_no_complete_folder_and_a_rerun_gives_the_same_bytes(tmp_path, kill):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write_slowly(whole)
    command = [sys.executable, "-c", WRITER, str(killed)]
    with subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, **PIPES) as process:
        process.stdin.write("x" * 21)  # into the second shard
        process.stdin.flush()
        process.stdout.read(22)
        process.send_signal(getattr(signal, kill))
    assert process.returncode != 0
    half = partials(killed)
    assert [path.name[:32] for path in half] == (["model-00002-of-00003.safetensors"] if kill == "SIGKILL" else [])
    left = {path.name for path in killed.iterdir()} - {path.name for path in half}
    assert left == {A.replace("00002", "00003"), "neox_lite_manifest.json.partial"}
    refused(killed, "unfinished")
    write_slowly(killed)
    assert digests(killed) == digests(whole) and verify_folder(killed) == []


def die_before(k: int) -> None:
    """Arrange that this process is killed just before its k-th write, fsync, rename or removal."""
    calls = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == k:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for owner, name in [(os, "pwrite"), (os, "fsync"), (Path, "replace"), (Path, "unlink")]:
        setattr(owner, name, counted(getattr(owner, name)))


def kill_everywhere(root: Path, over_an_older_model: bool) -> int:
    """Kill a writer before each of its system calls and write again; return at how many. Forks: run it in its own process."""
    older, new = tensors(1) | {"older": torch.ones(300)}, tensors(2)
    write_model(root / "whole", new, max_bytes=600)
    for k in range(1, 1000):
        folder = root / str(k)
        if over_an_older_model:
            write_model(folder, older, max_bytes=300)
        if (child := os.fork()) == 0:
            die_before(k)
            write_model(folder, new, max_bytes=600)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return k - 1
        assert not (folder / "config.json").exists() or verify_folder(folder) == [], k
        write_model(folder, new, max_bytes=600)
        assert digests(folder) == digests(root / "whole") and verify_folder(folder) == [], k
    raise AssertionError("the writer never ends")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("older", [False, True], ids=["fresh", "over-an-older-model"])
def test_a_writer_killed_before_any_system_call_can_be_run_again(tmp_path, older):
    code = f"import sys, test_checkpoint as t; print(t.kill_everywhere(t.Path(sys.argv[1]), {older}))"
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_finds_every_bit_flip(tmp_path):
    write_model(tmp_path, tensors(), max_bytes=400)
    files = sorted(path for path in tmp_path.iterdir() if path.name != "neox_lite_manifest.json")
    chance = random.Random(0)
    for _ in range(100):
        path, bit = chance.choice(files), chance.randrange(8)
        at = chance.randrange(path.stat().st_size)
        flip(path, at, bit)
        assert any(str(path) in problem for problem in verify_folder(tmp_path)), (path.name, at, bit)
        flip(path, at, bit)
    assert verify_folder(tmp_path) == []


def test_verify_finds_missing_short_and_unlisted_files(tmp_path):
    write_model(tmp_path / "m", tensors())
    copy = tmp_path / "copy"

    def problems(change: Callable[[], Any]) -> str:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "m", copy)
        change()
        return "; ".join(verify_folder(copy))

    assert "tokenizer.json: cannot be read" in problems((copy / "tokenizer.json").unlink)
    assert "no weights" in problems((copy / "model.safetensors").unlink)
    assert "bytes, expected" in problems(lambda: os.truncate(copy / "model.safetensors", 5000))
    assert "extra.bin: not in" in problems((copy / "extra.bin").touch)
    assert "no neox_lite_manifest.json" in problems((copy / "neox_lite_manifest.json").unlink)
    assert "not a manifest" in problems(lambda: (copy / "neox_lite_manifest.json").write_text("{}"))
    assert "unsafe file name" in problems(
        lambda: (copy / "neox_lite_manifest.json").write_text('{"format_version": 1, "files": {"../x": {}}}')
    )
    assert verify_folder(tmp_path / "none") == [f"{tmp_path / 'none'}: no such folder"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2])
def test_verify_finds_values_that_are_not_finite(tmp_path, value, dtype):
    weight = torch.ones(50, 20)
    weight[31, 7] = value
    write_model(tmp_path, {"w": weight.to(dtype), "ok": torch.ones(3)})
    (problem,) = verify_folder(tmp_path)
    assert problem.endswith("model.safetensors: w: 1 of 1000 values are not finite")


def test_verify_tells_its_progress_in_bytes(tmp_path):
    write_model(tmp_path, tensors())
    counts: list[int] = []
    verify_folder(tmp_path, counts.append)
    hashed = sum(path.stat().st_size for path in tmp_path.iterdir() if "manifest" not in path.name)
    checked = sum(tensor.nbytes for tensor in tensors().values() if tensor.dtype.is_floating_point)
    assert sum(counts) == hashed + checked


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "m").write_text("x")
    with pytest.raises(CheckpointError, match="m: is a file; choose another name"):
        FolderWriter(tmp_path / "m")
