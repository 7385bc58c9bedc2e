"""Quantizing from a hub id: one weight file after another is fetched, converted and deleted. Against a fake hub."""

import json
import signal
import sys

import pytest
import torch
from huggingface_hub import constants
from support.checkpoints import digests, write_source
from support.commands import run_python
from support.fake_hub import FakeHub

from neox_lite.checkpoint.reader import Checkpoint, verify_folder
from neox_lite.errors import CheckpointError, HubError
from neox_lite.hub import Remote
from neox_lite_quant import convert
from neox_lite_quant.streaming import Stream

WEIGHTS = "*.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    write_source(folder, shard_size="250KB", num_hidden_layers=6)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def small_steps(patch):
    """Weight files of the result hold two layers or so, and what is under way is less than a source file."""
    patch.setattr(sys.modules["neox_lite_quant.convert"], "SHARD_BYTES", 120_000)
    for name in ("neox_lite_quant.convert", "neox_lite.loading.quantize"):
        patch.setattr(sys.modules[name], "SLICE_ELEMENTS", 4096)


@pytest.fixture
def hub(source, tmp_path, monkeypatch):
    small_steps(monkeypatch)
    with FakeHub() as server:
        server.stand_in(monkeypatch, tmp_path)
        server.add("o/m", {path.name: path.read_bytes() for path in source.iterdir()})
        yield server


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What the same checkpoint gives from a folder."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        small_steps(patch)
        convert(source, folder / "model")
    return digests(folder / "model", WEIGHTS)


@pytest.fixture
def held(monkeypatch):
    """How many source files were on the disk after each fetch."""
    counts, fetch = [], Stream._fetch

    def watched(self, name):
        found = fetch(self, name)
        counts.append(len(list(self.folder.glob(WEIGHTS))))
        return found

    monkeypatch.setattr(Stream, "_fetch", watched)
    return counts


def shards(source):
    return sorted(path.name for path in source.glob(WEIGHTS))


def downloads(hub):
    """How often each weight file was asked for to its end."""
    names = [name for name in hub.fetched() if "model-" in name]
    return {n: len([r for r in hub.gets(n) if not r.range or r.range.endswith("-")]) for n in names}


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "hub").rglob(WEIGHTS))


def converted(folder):
    """The weight files that the journal of a result names."""
    journal = folder / "neox_lite_journal.json"
    return sorted(json.loads(journal.read_text())["files"]) if journal.exists() else []


def test_files_are_fetched_once_used_and_deleted_and_the_result_is_that_of_a_folder(hub, source, whole, held, tmp_path):
    convert("o/m", tmp_path / "out")
    assert max(held) <= 2 and len(held) == len(shards(source)) > 6
    assert digests(tmp_path / "out", WEIGHTS) == whole and verify_folder(tmp_path / "out") == []
    assert downloads(hub) == dict.fromkeys(shards(source), 1)
    assert cached(tmp_path) == [] and not (tmp_path / "out.fetched").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_dry_run_reads_headers_and_fetches_no_weights(hub, source, tmp_path):
    report = convert("o/m", tmp_path / "out", dry_run=True)
    assert report.bytes_in == convert(source, tmp_path / "x", dry_run=True).bytes_in
    assert downloads(hub) == {} and not (tmp_path / "out").exists() and not (tmp_path / "out.fetched").exists()


@pytest.mark.parametrize("bytes", [1000, 150_000])
def test_a_cut_connection_is_survived(hub, source, whole, tmp_path, bytes):
    hub.cut = dict.fromkeys(cut := shards(source)[1::2], bytes)
    convert("o/m", tmp_path / "out")
    assert hub.cut == {} and digests(tmp_path / "out", WEIGHTS) == whole
    assert downloads(hub) == {name: 2 if name in cut else 1 for name in shards(source)}


def test_a_hub_that_goes_away_is_said_and_the_next_run_goes_on(hub, whole, tmp_path):
    def leave(done, total):
        hub.down = hub.down or len(converted(tmp_path / "out")) > 0

    with pytest.raises(HubError):
        convert("o/m", tmp_path / "out", progress=leave)
    hub.down = False
    convert("o/m", tmp_path / "out")
    assert digests(tmp_path / "out", WEIGHTS) == whole


KILLED = """
import os, signal, sys, pytest, test_streaming as test
from pathlib import Path
test.small_steps(pytest.MonkeyPatch())
out = Path(sys.argv[1])
def die(done, total):
    if len(test.converted(out)) >= 2:
        os.kill(os.getpid(), signal.SIGKILL)
test.convert("o/m", out, progress=die)
"""


def test_what_is_converted_is_not_fetched_again_after_a_kill(hub, source, whole, held, tmp_path):
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "0"}
    done = run_python(KILLED, tmp_path / "out", HF_HUB_DISABLE_XET="1", **own)
    assert done.returncode == -signal.SIGKILL, done.stderr
    written = converted(tmp_path / "out")
    convert("o/m", tmp_path / "out")
    assert digests(tmp_path / "out", WEIGHTS) == whole and verify_folder(tmp_path / "out") == []
    assert not (tmp_path / "out.fetched").exists()
    used = {name for name in shards(source) if first_use(source, name, tmp_path / "out") in written}
    assert used and len(held) <= len(shards(source)) - len(used)


def first_use(source, name, result):
    """The weight file of the result that the last tensor of a source file goes into."""
    indexes = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (source, result))
    theirs, ours = (index["weight_map"] for index in indexes)
    inside = [tensor for tensor, file in theirs.items() if file == name]
    return max(ours.get(tensor) or ours[f"{tensor.removesuffix('weight')}weight_packed"] for tensor in inside)


def test_a_cached_checkpoint_is_used_and_not_deleted(hub, source, whole, tmp_path):
    convert("o/m", tmp_path / "first", keep_source=True)
    assert cached(tmp_path) == shards(source)
    hub.requests.clear()
    convert("o/m", tmp_path / "out")
    assert downloads(hub) == {} and cached(tmp_path) == shards(source)
    assert digests(tmp_path / "first", WEIGHTS) == digests(tmp_path / "out", WEIGHTS) == whole


def test_a_disk_that_is_too_full_for_result_and_source_is_reported_before_anything_is_fetched(
    hub, source, tmp_path, monkeypatch
):
    # Room for all but two files of the source.
    needed = convert(source, tmp_path / "x", dry_run=True).bytes_out + 100_000
    monkeypatch.setattr("neox_lite.checkpoint.folder_writer.free_bytes", lambda path: needed)
    with pytest.raises(CheckpointError, match=f"{needed} are free"):
        convert("o/m", tmp_path / "out")
    assert downloads(hub) == {} and not (tmp_path / "out").exists()


def test_a_file_that_changed_between_header_and_fetch_is_refused(hub, source, tmp_path, monkeypatch):
    fetch, changed = Remote.fetch, shards(source)[3]

    def late(self, name, folder):
        path = fetch(self, name, folder)
        if name == changed:
            path.write_bytes(path.read_bytes().replace(b"F16", b"I16", 1))
        return path

    monkeypatch.setattr(Remote, "fetch", late)
    with pytest.raises(CheckpointError, match="is not the file whose header the hub sent"):
        convert("o/m", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out.fetched").exists()


def test_methods_that_look_at_several_weights_fetch_into_the_cache(hub, source, tmp_path):
    dry = convert("o/m", tmp_path / "out", dry_run=True, method="gptq")
    assert downloads(hub) == {} and dry.bytes_out > 0
    convert("o/m", tmp_path / "out", method="balance")
    convert(source, tmp_path / "folder", method="balance")
    tensors = [Checkpoint.open(tmp_path / name) for name in ("out", "folder")]
    assert all(torch.equal(*(t.tensor(name) for t in tensors)) for name in tensors[0].names())
    assert cached(tmp_path) == shards(source) and not (tmp_path / "out.fetched").exists()
