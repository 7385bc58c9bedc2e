"""The checkpoint's reader, the folder's writer and safetensors files: what they read and write, and what they refuse.

Writers that are killed or find no space are in test_interrupted.py.
"""

import errno
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from support.checkpoints import change_json, digests, flip, random_tensor, some_tensors, write_shards, write_tensors
from support.commands import run_python
from support.faults import Bomb
from support.often import times
from support.refusals import refused
from torch import Tensor

from neox_lite.checkpoint.folder_writer import FolderWriter, split_into_shards
from neox_lite.checkpoint.reader import Checkpoint, verify_folder
from neox_lite.checkpoint.safetensors_file import DTYPES, MAX_HEADER_BYTES, Spec, TensorInfo
from neox_lite.errors import CheckpointError

MUTATIONS = times(1000)  # of headers
PREFIX = "gpt_neox.layers.0.attention"


def raw_file(path: Path, header: bytes | str | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file of any header, right or wrong."""
    header = json.dumps(header) if isinstance(header, dict) else header
    raw = header.encode() if isinstance(header, str) else header
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str = "F16", shape: object = (2, 2), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def opening_is_refused(folder: Path, *words: str) -> None:
    message = refused(CheckpointError, "", Checkpoint.open, folder)
    assert all(word in message for word in words), message


NAME = "model.safetensors"


# -- reading safetensors ----------------------------------------------------------------------------------------------


def test_reads_what_the_safetensors_library_writes(tmp_path):
    state = {name: random_tensor((3, 5), dtype, 0) for name, dtype in DTYPES.items()} | some_tensors()
    save_file(state, tmp_path / NAME)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert sorted(checkpoint.names()) == sorted(state)
        assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in state.values())
        assert checkpoint.files == [tmp_path / NAME]
        for name, tensor in state.items():
            info, stored = checkpoint.info(name), checkpoint.tensor(name)
            expected = (name, tuple(tensor.shape), tensor.dtype, tmp_path / NAME, tensor.nbytes)
            assert (info.name, info.shape, info.dtype, info.file, info.nbytes) == expected
            assert torch.equal(stored.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_rows_are_the_rows_of_the_tensor_and_are_checked(tmp_path):
    weight = torch.arange(60, dtype=torch.float32).reshape(10, 6)
    save_file({"w": weight, "s": torch.tensor(1.0)}, tmp_path / NAME)
    checkpoint = Checkpoint.open(tmp_path)
    for start, stop in [(0, 10), (3, 7), (9, 10), (4, 4)]:
        assert torch.equal(checkpoint.rows("w", start, stop), weight[start:stop])
    for name, start, stop in [("w", -1, 3), ("w", 3, 2), ("w", 0, 11), ("s", 0, 1)]:
        refused(CheckpointError, rf"rows {start}\.\.{stop}", checkpoint.rows, name, start, stop)


def test_tensors_share_the_mapped_pages_and_outlive_the_checkpoint_which_says_that_it_is_closed(tmp_path):
    save_file({"w": torch.ones(1000)}, tmp_path / NAME)
    with Checkpoint.open(tmp_path) as checkpoint:
        first, second, rows = checkpoint.tensor("w"), checkpoint.tensor("w"), checkpoint.rows("w", 10, 20)
        assert first.data_ptr() == second.data_ptr() == rows.data_ptr() - 40
        assert "w" in checkpoint
        refused(CheckpointError, "no tensor named v", checkpoint.tensor, "v")
    assert "w" not in checkpoint
    refused(CheckpointError, "closed", checkpoint.tensor, "w")
    del checkpoint
    assert (first.sum(), rows.sum()) == (1000, 10)


@pytest.mark.parametrize(("name", "save"), [(NAME, save_file), ("pytorch_model.bin", torch.save)])
def test_writing_into_a_tensor_never_reaches_the_file(tmp_path, name, save):
    save({"w": torch.zeros(5000)}, tmp_path / name)
    before = (tmp_path / name).read_bytes()
    Checkpoint.open(tmp_path).tensor("w").fill_(1)
    assert (tmp_path / name).read_bytes() == before
    assert Checkpoint.open(tmp_path).tensor("w").sum() == 0


@pytest.mark.parametrize("shift", range(1, 8))
def test_misaligned_data_is_copied_and_right(tmp_path, shift):
    weight, scalar = torch.arange(12, dtype=torch.float32).reshape(4, 3), torch.tensor(5, dtype=torch.int64)
    header = json.dumps({"w": entry("F32", [4, 3], [0, 48]), "s": entry("I64", [], [48, 56])}).encode()
    header += b" " * (-len(header) % 8 + shift)
    raw_file(tmp_path / NAME, header, weight.numpy().tobytes() + scalar.numpy().tobytes())
    checkpoint = Checkpoint.open(tmp_path)
    found = checkpoint.tensor("w"), checkpoint.rows("w", 1, 3), checkpoint.tensor("s")
    for tensor, expected in zip(found, (weight, weight[1:3], scalar), strict=True):
        assert torch.equal(tensor, expected)
        assert tensor.data_ptr() % tensor.element_size() == 0
    if shift == 4:  # aligned for float32, so mapped: both calls see one memory
        assert checkpoint.tensor("w").data_ptr() == found[0].data_ptr()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system may refuse to reserve so much")
def test_a_file_larger_than_memory_can_be_mapped(tmp_path):
    size = 4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path = raw_file(tmp_path / NAME, {"w": entry("U8", [size], [0, size])})
    os.truncate(path, path.stat().st_size + size)  # a hole: takes no space
    last = Checkpoint.open(tmp_path).rows("w", size - 1, size)
    assert last.tolist() == [0]


EIGHT = bytes(8)
# kind -> a word of the message, the header, its data, the length that is said
MALFORMED: dict[str, tuple[Any, ...]] = {
    "empty": ("not start with", ""),
    "not-json": ("not valid JSON", '{"a":'),
    "utf16": ("not start with", "{}".encode("utf-16")),
    "array": ("not start with", "[]"),
    "duplicate-tensor": ("'a' appears twice", f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}', EIGHT),
    "entry-not-object": ("a: expected exactly", {"a": 3}, EIGHT),
    "extra-field": ("expected exactly", {"a": {**entry(), "x": 1}}, EIGHT),
    "missing-field": ("expected exactly", {"a": {"dtype": "F16", "shape": [4]}}, EIGHT),
    "unknown-dtype": ("unknown dtype F12", {"a": entry("F12")}, EIGHT),
    "dtype-not-string": ("unknown dtype", {"a": {**entry(), "dtype": ["F16"]}}, EIGHT),
    "shape-not-list": ("shape must be", {"a": entry(shape=4)}, EIGHT),
    "bool-dim": ("shape must be", {"a": entry(shape=[True, 4])}, EIGHT),
    "float-dim": ("shape must be", {"a": entry(shape=[2.0, 2])}, EIGHT),
    "negative-dim": ("shape must be", {"a": entry(shape=[-2, -2])}, EIGHT),
    "overflow": ("overflows", {"a": entry(shape=[1 << 62, 1 << 62])}, EIGHT),
    "overflow-hidden-by-zero": ("overflows", {"a": entry(shape=[1 << 62, 8, 0], offsets=[0, 0])}),
    "many-dims": ("65 dimensions", {"a": entry(shape=[1] * 65, offsets=[0, 2])}, b"12"),
    "one-offset": ("begin <= end", {"a": entry(offsets=[8])}, EIGHT),
    "backwards": ("begin <= end", {"a": entry(offsets=[8, 0])}, EIGHT),
    "negative-offset": ("data_offsets must be", {"a": entry(offsets=[-8, 0])}, EIGHT),
    "wrong-size": ("is 8 bytes, data_offsets hold 6", {"a": entry(offsets=[0, 6])}, bytes(6)),
    "overlap": ("b: data at byte 4 overlaps", {"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "hole": ("b: data at byte 12 leaves a hole", {"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
    "hole-at-start": ("leaves a hole", {"a": entry(offsets=[4, 12])}, bytes(12)),
    "data-too-short": ("7 bytes of data", {"a": entry()}, bytes(7)),
    "data-too-long": ("9 bytes of data", {"a": entry()}, bytes(9)),
    "metadata-not-object": ("__metadata__", {"__metadata__": []}),
    "metadata-not-strings": ("__metadata__", {"__metadata__": {"a": 1}}),
    **{f"length-{length}": ("", '{"a": {}}', b"", length) for length in (3, 1 << 20, 1 << 40, (1 << 64) - 1)},
}


@pytest.mark.parametrize(("word", "arguments"), [(word, rest) for word, *rest in MALFORMED.values()], ids=MALFORMED)
def test_malformed_headers_are_refused(tmp_path, word, arguments):
    raw_file(tmp_path / NAME, *arguments)
    opening_is_refused(tmp_path, str(tmp_path / NAME), word)


def test_a_header_beyond_the_limit_is_not_parsed(tmp_path):
    raw_file(tmp_path / NAME, b"{" + b" " * MAX_HEADER_BYTES + b"}")
    opening_is_refused(tmp_path, f"more than the {MAX_HEADER_BYTES}")


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


@pytest.mark.parametrize(("name", "save", "count"), [(NAME, save_file, 512), ("pytorch_model.bin", torch.save, 60)])
def test_every_truncation_is_refused(tmp_path, name, save, count):
    save(some_tensors(), tmp_path / name)
    valid = (tmp_path / name).read_bytes()
    for length in random.Random(0).sample(range(len(valid)), count):
        (tmp_path / name).write_bytes(valid[:length])
        assert not opens_or_is_refused(tmp_path), length


def test_mutated_headers_are_refused_or_read_in_little_memory(tmp_path):
    save_file(some_tensors(), tmp_path / NAME, metadata={"format": "pt"})
    valid = (tmp_path / NAME).read_bytes()
    header_bytes = 8 + int.from_bytes(valid[:8], "little")
    chance, opened = random.Random(0), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(MUTATIONS):
        mutated = bytearray(valid)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(header_bytes)
            if chance.random() < 0.5:
                mutated[at] = chance.randrange(256)
            else:  # a character that JSON and the format care about
                mutated[at] = chance.choice(b'{}[],:"0123456789-tfn\\ ')
        (tmp_path / NAME).write_bytes(mutated)
        opened += opens_or_is_refused(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB on Linux, bytes on macOS
    assert 0 < opened < MUTATIONS / 2  # a changed letter in a tensor's name is no error


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_worst_headers_take_little_time_and_memory(tmp_path):
    for body in ['"%x":0', "[]", "{}", "999"]:
        count = (MAX_HEADER_BYTES - 100) // (len(body) + (5 if "%" in body else 1))
        opening, closing = ('{"a":{', "}}") if "%" in body else ('{"a":[', "]}")
        items = (body % i if "%" in body else body for i in range(count))
        raw_file(tmp_path / body.strip('"%:') / NAME, opening + ",".join(items) + closing)
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


def test_reads_a_bin(tmp_path):
    base = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    views = {"transposed": base.t(), "tied": base, "part": base[1:2], "parameter": torch.nn.Parameter(base * 2)}
    state = {**some_tensors(), **views}
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(checkpoint.names()) == sorted(state)
    for name, tensor in state.items():
        read = checkpoint.tensor(name)
        assert torch.equal(read, tensor)
        assert (type(read), read.is_contiguous(), read.requires_grad) == (Tensor, True, False)
        assert checkpoint.info(name).shape == tuple(tensor.shape)
    assert torch.equal(checkpoint.rows("transposed", 1, 3), base.t()[1:3])


def test_safetensors_are_preferred_over_bin(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / NAME)
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert Checkpoint.open(tmp_path).tensor("w").sum() == 2


@pytest.mark.parametrize("how", ["value", "key", "whole", "bare-pickle"])
def test_a_malicious_bin_has_no_effect(tmp_path, how):
    bomb = Bomb(tmp_path / "exploded")
    contents: dict[str, Any] = {"value": {"w": torch.ones(2), "b": bomb}, "key": {bomb: torch.ones(2)}, "whole": bomb}
    if how == "bare-pickle":
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(bomb))
    else:
        torch.save(contents[how], tmp_path / "pytorch_model.bin")
    opening_is_refused(tmp_path, "pytorch_model.bin")
    assert not (tmp_path / "exploded").exists()


NO_TENSORS: dict[str, tuple[Any, str]] = {
    "list": ([torch.ones(2)], "holds a list"),
    "nested": ({"w": {"inner": torch.ones(2)}}, "entry w is a dict"),
    "number": ({"w": 3}, "entry w is a int"),
    "integer-key": ({3: torch.ones(2)}, "entry 3 is a Tensor"),
    "sparse": ({"w": torch.ones(2, 2).to_sparse()}, "w: expected a plain tensor"),
    "expanded": ({"w": torch.ones(1).expand(1 << 40)}, "w: expected a plain tensor"),
    "meta": ({"w": torch.ones(2, device="meta")}, "w: expected a plain tensor"),
    "complex": ({"w": torch.ones(2, dtype=torch.complex64)}, "w: expected a plain tensor"),
}


@pytest.mark.parametrize(("content", "word"), NO_TENSORS.values(), ids=NO_TENSORS)
def test_a_bin_of_anything_but_plain_tensors_is_refused(tmp_path, content, word):
    torch.save(content, tmp_path / "pytorch_model.bin")
    opening_is_refused(tmp_path, "pytorch_model.bin", word)


def test_a_legacy_bin_is_refused_with_the_fix(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    opening_is_refused(tmp_path, "rewrite it with torch.save")


def test_mutated_bins_are_refused_or_read(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(some_tensors(), path)
    valid, chance = path.read_bytes(), random.Random(0)
    for _ in range(60):
        mutated = bytearray(valid)
        mutated[chance.randrange(len(valid))] = chance.randrange(256)
        path.write_bytes(mutated)
        opens_or_is_refused(tmp_path)


# -- index and links --------------------------------------------------------------------------------------------------


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def two_parts() -> dict[str, dict[str, Tensor]]:
    return {A: {"a": torch.ones(2), "b": torch.ones(3)}, B: {"c": torch.ones(4)}}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_reads_shards_through_their_index(tmp_path, kind):
    parts = {file.replace("safetensors", kind): state for file, state in two_parts().items()}
    checkpoint = Checkpoint.open(write_shards(tmp_path, parts, kind))
    assert checkpoint.files == [tmp_path / file for file in parts]
    assert sorted(checkpoint.names()) == ["a", "b", "c"]
    for file, state in parts.items():
        for name, tensor in state.items():
            info = checkpoint.info(name)
            expected = TensorInfo(name, tuple(tensor.shape), torch.float32, tmp_path / file, tensor.nbytes, info.offset)
            assert info == expected and torch.equal(checkpoint.tensor(name), tensor)


def test_old_buffers_are_skipped_and_nothing_else(tmp_path):
    old = [f"{p}layers.{i}.attention.{b}" for p in ("gpt_neox.", "") for i in (0, 11) for b in ("bias", "masked_bias")]
    old += ["gpt_neox.layers.3.attention.rotary_emb.inv_freq"]
    kept = [f"{PREFIX}.query_key_value.bias", f"{PREFIX}.dense.bias", "x.layers.0.attention.bias"]
    kept += [f"gpt_neox.layers.{name}" for name in ("x.attention.bias", "0.attention.bias2", "0.attention.bias\n")]
    save_file({name: torch.ones(1) for name in (*old, *kept)}, tmp_path / NAME)
    assert sorted(Checkpoint.open(tmp_path).names()) == sorted(kept)
    unlisted = {f"{PREFIX}.bias": None, f"{PREFIX}.masked_bias": A}  # in a file only, in the index only
    folder = write_shards(tmp_path / "s", {A: {"a": torch.ones(1), f"{PREFIX}.bias": torch.ones(1)}}, **unlisted)
    assert Checkpoint.open(folder).names() == ["a"]


DISAGREEING = {
    "missing-files": ({B: two_parts()[B]}, {"a": A, "d": "model-3.safetensors"}, ["2 of 3", A, "model-3.safetensors"]),
    "elsewhere": (two_parts(), {"a": B}, ["a is not in"]),
    "unlisted": (two_parts(), {"a": None}, [f"a is in {A} but not in the index"]),
    "nowhere": (two_parts(), {"d": B}, [f"d is not in {B}"]),
    "twice": ({**two_parts(), B: {"a": torch.ones(2), "c": torch.ones(4)}}, {}, [f"a is in both {A} and {B}"]),
}


@pytest.mark.parametrize(("parts", "changes", "words"), DISAGREEING.values(), ids=DISAGREEING)
def test_index_and_files_must_agree(tmp_path, parts, changes, words):
    opening_is_refused(write_shards(tmp_path, parts, **changes), *words)


MALFORMED_INDICES = ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}']
MALFORMED_INDICES += ["[" * 100_000, "\ufeff{}", f'{{"weight_map": {{"a": "{A}", "a": "{B}"}}}}']
MALFORMED_INDICES += [f'{{"weight_map": {{}}, "weight_map": {{"a": "{A}"}}}}']


@pytest.mark.parametrize("number", range(len(MALFORMED_INDICES)))
def test_a_malformed_index_is_refused(tmp_path, number):
    write_shards(tmp_path, two_parts())
    (tmp_path / f"{NAME}.index.json").write_text(MALFORMED_INDICES[number])
    opening_is_refused(tmp_path, f"{NAME}.index.json")


HOSTILE_NAMES = [
    "../{0}",
    "x/../../{0}",
    "{1}/{0}",
    "..\\{0}",
    "C:\\{0}",
    "C:{0}",
    "a\0{0}",
    "",
    ".",
    "./{0}",
    "a//{0}",
]
HOSTILE_NAMES += [
    "link.safetensors",
    "linked/{0}",
    "loop.safetensors",
    "x" * 5000 + ".safetensors",
    "config.json",
    "{0}\n",
]


@pytest.mark.parametrize("number", range(len(HOSTILE_NAMES)))
def test_a_weight_map_cannot_leave_the_folder(tmp_path, number):
    outside, folder = tmp_path / "outside", tmp_path / "model"
    outside.mkdir()
    save_file({"a": torch.ones(2)}, outside / A)
    save_file({"a": torch.ones(2)}, tmp_path / A)
    write_shards(folder, {}, a=HOSTILE_NAMES[number].format(A, outside))
    (folder / "x").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "link.safetensors").symlink_to(outside / A)
    (folder / "linked").symlink_to(outside)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    opening_is_refused(folder)


def hub_cache(root: Path, blob_folder: str = "models--o--m/blobs") -> Path:
    """A snapshot folder as the hub cache lays it out: every file a link into blobs."""
    snapshot, blobs = root / "models--o--m" / "snapshots" / "c0ffee", root / blob_folder
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    for i, path in enumerate(sorted(write_shards(root / "staging", two_parts()).iterdir())):
        path.rename(blobs / f"{i}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{i}", snapshot))
    return snapshot


def test_links_of_the_hub_cache_and_links_inside_the_folder_work_and_others_do_not(tmp_path):
    snapshot = hub_cache(tmp_path)
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        assert sorted(Checkpoint.open(folder).names()) == ["a", "b", "c"]
    plain = tmp_path / "plain"
    (plain / "data").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, plain / "data" / "x")
    (plain / NAME).symlink_to("data/x")
    assert Checkpoint.open(plain).names() == ["a"]
    opening_is_refused(hub_cache(tmp_path / "other", "models--o--other/blobs"), "links outside the folder")


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    opening_is_refused(tmp_path / "none", "no such folder")
    opening_is_refused(tmp_path, NAME, "pytorch_model.bin", ".index.json")
    write_tensors(tmp_path / "killed", some_tensors())
    (tmp_path / "killed" / "neox_lite_manifest.json.partial").touch()
    (tmp_path / "killed" / "config.json").unlink()
    opening_is_refused(tmp_path / "killed", "unfinished")
    raw_file(tmp_path / A, {})
    opening_is_refused(tmp_path, A, "index is missing")
    (tmp_path / NAME).mkdir()
    opening_is_refused(tmp_path, "not a regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("name", [NAME, "pytorch_model.bin", f"{NAME}.index.json"])
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    opening_is_refused(tmp_path, name, "not a regular file")


def test_check_accepts_what_fits_and_names_everything_else_in_one_line(tmp_path):
    save_file({name: torch.ones(2, 3) for name in "abcdef"}, tmp_path / NAME)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check({name: ((2, 3), {torch.float32, torch.float64}) for name in "abcdef"})
    checkpoint.check({name: ([2, 3], None) for name in "abcdef"})
    expected: dict[str, Any] = {f"missing{i}": ((1,), None) for i in range(6)}
    expected |= {"a": ((3, 2), None), "b": ((2, 3), [torch.float16, torch.bfloat16]), "c": ((2, 3), [torch.float32])}
    assert refused(CheckpointError, "", checkpoint.check, expected, where="here") == (
        "here: the weights do not fit the config: 6 missing: missing0, missing1, missing2, missing3 and 2 more; "
        "3 unexpected: d, e, f; 1 wrong shape: a is [2, 3], expected [3, 2]; "
        "1 wrong dtype: b is float32, expected bfloat16 or float16"
    )


# -- writing ----------------------------------------------------------------------------------------------------------


ONE = [[Spec("w", torch.float32, (4,))]]


def write_one(out: FolderWriter) -> None:
    out.shards(ONE)
    with out.shard(0) as shard:
        shard.write("w", torch.ones(4))


def test_golden_bytes_of_a_written_file(tmp_path):
    scale, shape = torch.tensor([[1.0, -2.0]], dtype=torch.float16), torch.tensor([2, 64])
    packed = torch.arange(16, dtype=torch.int32).reshape(2, 8)
    write_tensors(tmp_path, {"scale": scale, "packed": packed, "shape": shape})
    raw = (tmp_path / NAME).read_bytes()
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


def test_the_safetensors_library_reads_what_is_written_and_every_tensor_is_aligned(tmp_path):
    chance = random.Random(0)
    shapes = [(chance.choice([1, 3, 7, 64]), chance.choice([1, 5, 32])) for _ in range(60)]
    dtypes = chance.choices([torch.int8, torch.float16, torch.int32, torch.float64], k=60)
    state = {f"t{i}": random_tensor(shape, dtypes[i], i) for i, shape in enumerate(shapes)} | some_tensors()
    write_tensors(tmp_path, state)
    with safetensors.safe_open(tmp_path / NAME, "pt") as file:
        assert sorted(file.keys()) == sorted(state) and file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in state.items())
    checkpoint = Checkpoint.open(tmp_path)
    for name in checkpoint.names():
        info = checkpoint.info(name)
        assert info.offset is not None
        assert info.offset % math.gcd(info.nbytes, 64) == info.offset % info.dtype.itemsize == 0
        assert torch.equal(checkpoint.tensor(name), state[name])


def test_shards_keep_groups_together_and_have_an_index(tmp_path):
    groups = [[Spec(f"{g}.{i}", torch.float32, (10,)) for i in range(2)] for g in "abcd"]
    plan = split_into_shards(groups, max_bytes=170)
    assert [" ".join(spec.name for spec in shard) for shard in plan] == ["a.0 a.1 b.0 b.1", "c.0 c.1 d.0 d.1"]
    assert [len(shard) for shard in split_into_shards(groups, max_bytes=1)] == [2, 2, 2, 2]
    with FolderWriter(tmp_path) as out:
        out.shards(plan)
        for i, planned in enumerate(plan):
            with out.shard(i) as shard:
                for spec in planned:
                    shard.write(spec.name, torch.full(spec.shape, float(i)))
        out.finish("{}")
    index = json.loads((tmp_path / f"{NAME}.index.json").read_text())
    assert index["metadata"] == {"total_size": 320} and set(index["weight_map"].values()) == {A, B}
    assert Checkpoint.open(tmp_path).tensor("d.1").tolist() == [1.0] * 10
    assert verify_folder(tmp_path) == []


def test_rows_may_come_in_any_order_and_from_several_threads(tmp_path):
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


# calls of ShardWriter.write for a tensor of 4 rows -> words of the message
WRITES: list[tuple[list[tuple[Any, ...]], str]] = [
    ([], "only rows [] of 4"),
    ([("w", torch.ones(3, 2))], "only rows [(0, 3)] of 4"),
    ([("w", torch.ones(2, 2))] * 2, "rows 0..2 are written twice"),
    ([("w", torch.ones(2, 2), 2), ("w", torch.ones(2, 2), 1)], "rows 1..3 are written twice"),
    ([("w", torch.ones(4, 3))], "got float32 [4, 3], planned float32 [4, 2]"),
    ([("w", torch.ones(4))], "got float32 [4]"),
    ([("w", torch.ones(4, 2).half())], "got float16"),
    ([("w", torch.ones(2, 2), 3)], "rows 3..5 of 4"),
    ([("w", torch.ones(2, 2), -1)], "rows -1..1 of 4"),
    ([("v", torch.ones(2, 2))], "v is not planned"),
]


@pytest.mark.parametrize(("writes", "word"), WRITES, ids=[word for _, word in WRITES])
def test_a_shard_that_is_not_written_exactly_once_is_an_error(tmp_path, writes, word):
    with pytest.raises(CheckpointError, match=re.escape(word)), FolderWriter(tmp_path) as out:
        out.shards([[Spec("w", torch.float32, (4, 2))]])
        with out.shard(0) as shard:
            for name, tensor, *row in writes:
                shard.write(name, tensor, **({"row": row[0]} if row else {}))
    assert list(tmp_path.iterdir()) == []


NOT_PLAIN = ["../x", "a/b", "config.json", "neox_lite_manifest.json", "x.partial", NAME, "x\\y", ""]


@pytest.mark.parametrize(
    ("write", "word"),
    [
        (lambda out: out.shards(ONE * 2), "w is planned twice"),
        (lambda out: out.file("tokenizer.json", "{}"), "left without finish"),
        (lambda out: (out.shards(ONE), out.finish("{}")), f"not written yet: {NAME}"),
        *((lambda out, name=name: out.file(name, "x"), None) for name in NOT_PLAIN),
    ],
)
def test_a_folder_takes_plain_files_and_each_tensor_once_and_is_finished(tmp_path, write, word):
    with pytest.raises(CheckpointError, match=word), FolderWriter(tmp_path / "m") as out:
        write(out)
    opening_is_refused(tmp_path / "m")


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
    write_tensors(tmp_path, some_tensors(), method="mse", source="o/m", source_revision=None)
    manifest = json.loads((tmp_path / "neox_lite_manifest.json").read_text())
    told = [manifest[key] for key in ("format_version", "method", "source", "source_revision")]
    assert told == [1, "mse", "o/m", None] and manifest["created_by"].startswith("neox-lite")
    assert manifest["files"].keys() == {path.name for path in tmp_path.iterdir()} - {"neox_lite_manifest.json"}
    assert all(entry["bytes"] == (tmp_path / name).stat().st_size for name, entry in manifest["files"].items())


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("one", "two", "two"):  # the last over itself
        write_tensors(tmp_path / name, some_tensors(), max_bytes=400)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_new_model_replaces_the_old_one_whole_from_its_first_write_on(tmp_path):
    write_tensors(tmp_path, some_tensors(), max_bytes=400)
    assert (tmp_path / f"{NAME}.index.json").exists()
    with pytest.raises(RuntimeError, match="early"), FolderWriter(tmp_path) as out:
        out.shards(ONE)
        raise RuntimeError("early")
    assert verify_folder(tmp_path) == []  # nothing is touched before the first write
    (tmp_path / "mine.txt").write_text("keep")
    held = Checkpoint.open(tmp_path).tensor("embed")
    with FolderWriter(tmp_path) as out:
        out.shards(ONE)
        with out.shard(0) as shard:
            assert not (tmp_path / "config.json").exists()
            assert not (tmp_path / "neox_lite_manifest.json").exists()
            shard.write("w", torch.ones(4))
        out.finish("{}")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.json", "mine.txt", NAME, "neox_lite_manifest.json"}
    assert verify_folder(tmp_path) == []
    assert torch.equal(held, some_tensors()["embed"])  # the reader still has the old file's pages


@pytest.mark.parametrize("name", ["config.json", NAME, "pytorch_model.bin", f"{NAME}.index.json"])
def test_a_model_that_others_wrote_is_never_overwritten(tmp_path, name):
    (tmp_path / name).write_text("precious")
    refused(CheckpointError, "neox-lite did not write", write_tensors, tmp_path, some_tensors())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
@pytest.mark.parametrize("name", ["neox_lite_manifest.json", "neox_lite_manifest.json.partial"])
def test_a_link_in_the_place_of_the_manifest_is_never_written_through(tmp_path, name):
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).symlink_to(tmp_path / "elsewhere")
    refused(CheckpointError, "is a link, which is not written through", write_tensors, tmp_path / "m", some_tensors())
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_the_folder_being_read_and_a_file_are_no_destinations(tmp_path):
    write_tensors(tmp_path / "model", some_tensors())
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for source in (tmp_path / "model", tmp_path / "link", tmp_path / "model" / ".." / "model"):
        refused(CheckpointError, "is the folder being read", FolderWriter, tmp_path / "model", source=source)
    FolderWriter(tmp_path / "other", source="owner/name")
    (tmp_path / "f").write_text("x")
    refused(CheckpointError, "f: is a file; choose another name", FolderWriter, tmp_path / "f")


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
    write_tensors(tmp_path, some_tensors())
    assert verify_folder(tmp_path) == []
    assert "has no locks" in caplog.text


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


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_finds_every_bit_flip(tmp_path):
    write_tensors(tmp_path, some_tensors(), max_bytes=400)
    files = sorted(path for path in tmp_path.iterdir() if path.name != "neox_lite_manifest.json")
    chance = random.Random(0)
    for _ in range(100):
        path, bit = chance.choice(files), chance.randrange(8)
        at = chance.randrange(path.stat().st_size)
        flip(path, at, bit)
        assert any(str(path) in problem for problem in verify_folder(tmp_path)), (path.name, at, bit)
        flip(path, at, bit)
    assert verify_folder(tmp_path) == []


DAMAGES: dict[str, Callable[[Path], object]] = {
    "tokenizer.json: cannot be read": lambda folder: (folder / "tokenizer.json").unlink(),
    "no weights": lambda folder: (folder / NAME).unlink(),
    "bytes, expected": lambda folder: os.truncate(folder / NAME, 5000),
    "extra.bin: not in": lambda folder: (folder / "extra.bin").touch(),
    "no neox_lite_manifest.json": lambda folder: (folder / "neox_lite_manifest.json").unlink(),
    "not a manifest": lambda folder: (folder / "neox_lite_manifest.json").write_text("{}"),
    "unsafe file name": lambda folder: change_json(folder / "neox_lite_manifest.json", files={"../x": {}}),
    "no such folder": shutil.rmtree,
}


@pytest.mark.parametrize("words", DAMAGES)
def test_verify_finds_missing_short_and_unlisted_files(tmp_path, words):
    write_tensors(tmp_path / "m", some_tensors())
    DAMAGES[words](tmp_path / "m")
    assert words in "; ".join(verify_folder(tmp_path / "m"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2])
def test_verify_finds_values_that_are_not_finite(tmp_path, value, dtype):
    weight = torch.ones(50, 20)
    weight[31, 7] = value
    write_tensors(tmp_path, {"w": weight.to(dtype), "ok": torch.ones(3)})
    (problem,) = verify_folder(tmp_path)
    assert problem.endswith("model.safetensors: w: 1 of 1000 values are not finite")


def test_verify_tells_its_progress_in_bytes(tmp_path):
    write_tensors(tmp_path, some_tensors())
    counts: list[int] = []
    verify_folder(tmp_path, counts.append)
    hashed = sum(path.stat().st_size for path in tmp_path.iterdir() if "manifest" not in path.name)
    checked = sum(tensor.nbytes for tensor in some_tensors().values() if tensor.dtype.is_floating_point)
    assert sum(counts) == hashed + checked
