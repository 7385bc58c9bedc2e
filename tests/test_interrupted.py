"""Whole `quantize` runs that are killed, run out of disk, or are given something hostile: never a folder that lies.

Killed at 10 random moments and before every 8th call that writes; with NEOX_LITE_KILLS=200 at 200 and before every one.
"""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import digests
from support.checkpoints import write_source as write_model
from support.commands import environment, run_python

from neox_lite import GPTNeoXForCausalLM
from neox_lite.checkpoint.folder_writer import ShardWriter
from neox_lite.checkpoint.reader import verify_folder
from neox_lite.errors import CheckpointError, ConfigError, NeoxLiteError
from neox_lite_quant import convert

KILLS = int(os.environ.get("NEOX_LITE_KILLS", "10"))
STRIDE = 1 if KILLS >= 200 else 8  # of the calls before which a run is killed, or in which the disk is full
CALLS = [(os, "pwrite"), (os, "fsync"), (os, "posix_fallocate"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")]
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


def write_source(folder):
    write_model(folder, shard_size="200KB")
    (folder / "tokenizer.json").write_text("{}")


def quantize(source, folder):
    """Into some five weight files, by slices smaller than a tensor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["neox_lite_quant.convert"], "SHARD_BYTES", 60_000)
        for module in ("neox_lite.loading.quantize", "neox_lite_quant.convert"):
            patch.setattr(sys.modules[module], "SLICE_ELEMENTS", 16_384)
        convert(source, folder, threads=2)


@pytest.fixture
def source(tmp_path):
    write_source(tmp_path / "source")
    return tmp_path / "source"


# -- kills: a process forks runs, so that each takes milliseconds --------------------------------------------------------


def begun(folder):
    """The weight files that a run has noted as whole, and those that it left half-written."""
    journal = folder / "neox_lite_journal.json"
    noted = set(json.loads(journal.read_text())["files"]) if journal.exists() else set()
    return noted | {path.name.removesuffix(".partial") for path in folder.glob("*.safetensors.partial")}


def go_on(source, folder, whole):
    """Run again after a kill, and check everything that must hold then."""
    complete, before = (folder / "config.json").exists(), begun(folder) if folder.exists() else set()
    assert not complete or verify_folder(folder) == []
    opened, real = [], ShardWriter.__enter__

    def enter(self):
        opened.append(self.path.name)
        return real(self)

    ShardWriter.__enter__ = enter
    try:
        quantize(source, folder)
    finally:
        ShardWriter.__enter__ = real
    assert digests(folder) == whole
    if not complete:
        assert len(before & set(opened)) <= 1, (before, opened)


def forked(run):
    """Run in a fork; its process id."""
    if (child := os.fork()) == 0:
        try:
            run()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return child


def kill_at_random(root, kills):
    torch.set_num_threads(1)
    write_source(root / "source")
    began = time.perf_counter()
    for _ in range(3):
        os.waitpid(forked(lambda: quantize(root / "source", root / "whole")), 0)
    usual = (time.perf_counter() - began) / 3
    whole, chance, killed = digests(root / "whole"), random.Random(0), 0
    for i in range(10 * kills):
        if killed == kills:  # runs that ended before they were to be killed do not count
            break
        folder = root / f"killed-{i}"
        child = forked(lambda folder=folder: quantize(root / "source", folder))
        time.sleep(chance.uniform(0, usual))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        killed += status != 0
        status = os.waitpid(forked(lambda folder=folder: go_on(root / "source", folder, whole)), 0)[1]
        assert status == 0, i
    return killed


def die_before(k):
    """Arrange that this process is killed just before its k-th call that writes, from whichever thread."""
    lock, calls = threading.Lock(), 0

    def counted(real):
        def call(*args, **options):
            nonlocal calls
            with lock:
                calls += 1
                if calls == k:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for owner, name in CALLS:
        setattr(owner, name, counted(getattr(owner, name)))


def kill_before_every_call(root, older):
    torch.set_num_threads(1)
    write_source(root / "source")
    os.waitpid(forked(lambda: quantize(root / "source", root / "whole")), 0)
    whole = digests(root / "whole")
    for k in range(1, 1000, STRIDE):
        folder = root / f"killed-{k}"
        if older:
            os.waitpid(forked(lambda folder=folder: convert(root / "source", folder, format="int8")), 0)

        def dying(k=k, folder=folder):
            die_before(k)
            quantize(root / "source", folder)

        status = os.waitpid(forked(dying), 0)[1]
        assert status in (0, signal.SIGKILL)
        assert os.waitpid(forked(lambda folder=folder: go_on(root / "source", folder, whole)), 0)[1] == 0, k
        if status == 0:
            return k - 1
    raise AssertionError("the run never ends")


def in_a_process(call, root):
    """A forking function of this file, in a process without threads; what it returns."""
    done = run_python(f"import sys, test_interrupted as t; print(t.{call})", root)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@forks
def test_a_run_killed_at_random_moments_goes_on_to_the_same_bytes(tmp_path):
    assert in_a_process(f"kill_at_random(t.Path(sys.argv[1]), {KILLS})", tmp_path) == KILLS


@forks
@pytest.mark.parametrize("older", [False, True], ids=["fresh", "over-an-older-model"])
def test_a_run_killed_before_any_call_that_writes_goes_on_to_the_same_bytes(tmp_path, older):
    assert in_a_process(f"kill_before_every_call(t.Path(sys.argv[1]), {older})", tmp_path) > 60


# -- a full disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "replace"])
def test_a_full_disk_at_any_write_is_said_and_the_next_run_goes_on(source, tmp_path, monkeypatch, call):
    quantize(source, tmp_path / "whole")
    whole = digests(tmp_path / "whole")
    owner = Path if call == "replace" else os
    real, lock = getattr(owner, call), threading.Lock()
    for k in range(0, 500, STRIDE):
        folder, calls = tmp_path / str(k), 0

        def failing(*args, k=k):
            nonlocal calls
            with lock:
                calls += 1
                if calls == k + 1:
                    raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        monkeypatch.setattr(owner, call, failing)
        try:
            quantize(source, folder)
            break
        except CheckpointError as error:
            assert "disk full" in str(error) and "\n" not in str(error)
        finally:
            monkeypatch.setattr(owner, call, real)
        assert not (folder / "config.json").exists() or verify_folder(folder) == []
        assert not list(folder.glob("*.safetensors.partial"))
        quantize(source, folder)
        assert digests(folder) == whole
    assert k > 4


# -- hostile sources -----------------------------------------------------------------------------------------------------


def refused(source, tmp_path, *words):
    with pytest.raises(NeoxLiteError) as caught:
        convert(source, tmp_path / "out")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.fixture
def single(tmp_path):
    """A source of one file, and its tensors."""
    write_source(tmp_path / "shards")
    state = {}
    for path in (tmp_path / "shards").glob("*.safetensors"):
        state |= load_file(path)
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_bytes((tmp_path / "shards" / "config.json").read_bytes())
    save_file(state, folder / "model.safetensors")
    return folder, state


def test_every_truncated_source_is_refused_and_nothing_is_written(single, tmp_path):
    folder, _ = single
    valid = (folder / "model.safetensors").read_bytes()
    for length in random.Random(0).sample(range(len(valid)), 64):
        (folder / "model.safetensors").write_bytes(valid[:length])
        refused(folder, tmp_path, "model.safetensors")


def test_mutated_headers_give_a_whole_folder_or_a_sentence(single, tmp_path):
    folder, _ = single
    valid, chance, done = (folder / "model.safetensors").read_bytes(), random.Random(0), 0
    header_bytes = 8 + int.from_bytes(valid[:8], "little")
    for _ in range(64):
        mutated = bytearray(valid)
        mutated[chance.randrange(header_bytes)] = chance.choice(b'{}[],:"0123456789-tfn\\ ')
        (folder / "model.safetensors").write_bytes(mutated)
        try:
            convert(folder, tmp_path / "out")
            done += verify_folder(tmp_path / "out") == []
        except NeoxLiteError as error:
            assert "\n" not in str(error)
    assert done < 8  # a byte that means the same


WEIGHT = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda state: state.pop(WEIGHT), "1 missing"),
        (lambda state: state.update(extra=torch.ones(2)), "1 unexpected: extra"),
        (lambda state: state.update({WEIGHT: state[WEIGHT].T.contiguous()}), "[256, 128], expected [128, 256]"),
        (lambda state: state.update({WEIGHT: state[WEIGHT].to(torch.int16)}), "is int16"),
        (lambda state: state.update({WEIGHT: state[WEIGHT].to(torch.float8_e4m3fn)}), "is float8_e4m3fn"),
    ],
    ids=["missing", "extra", "shape", "integers", "float8"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(single, tmp_path, change, word):
    folder, state = single
    change(state)
    save_file(state, folder / "model.safetensors")
    refused(folder, tmp_path, word, "extra" if "extra" in word else WEIGHT)


def test_a_tensor_in_two_files_is_refused_by_name(source, tmp_path):
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in index.values() if file != index[WEIGHT])
    state = load_file(source / other)
    save_file({**state, WEIGHT: load_file(source / index[WEIGHT])[WEIGHT]}, source / other)
    refused(source, tmp_path, f"{WEIGHT} is in both")


@pytest.mark.parametrize("name", ["../{}", "{outside}", "a\\{}", "a\0{}", "C:{}", "link.safetensors"])
def test_an_index_cannot_lead_out_of_the_folder(source, tmp_path, name):
    index = json.loads((source / "model.safetensors.index.json").read_text())
    file = index["weight_map"][WEIGHT]
    (source / file).rename(tmp_path / file)
    (source / "link.safetensors").symlink_to(tmp_path / file)
    renamed = name.format(file, outside=tmp_path / file)
    index["weight_map"] = {k: renamed if v == file else v for k, v in index["weight_map"].items()}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, tmp_path)


def test_verify_finds_every_bit_flip_in_a_quantized_folder(source, tmp_path):
    quantize(source, tmp_path / "out")
    files, chance = sorted(p for p in (tmp_path / "out").iterdir() if "manifest" not in p.name), random.Random(0)
    for _ in range(100):
        path = chance.choice(files)
        valid = path.read_bytes()
        flipped = bytearray(valid)
        bit = chance.randrange(8 * len(valid))
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert any(str(path) in problem for problem in verify_folder(tmp_path / "out")), (path.name, bit)
        path.write_bytes(valid)
    assert verify_folder(tmp_path / "out") == []


# -- Ctrl-C --------------------------------------------------------------------------------------------------------------


def test_an_interrupt_leaves_whole_files_and_the_next_run_goes_on(source, tmp_path):
    quantize(source, tmp_path / "whole")
    code = (
        "import sys, test_interrupted as t\n"
        "t.signal.signal(t.signal.SIGINT, t.signal.default_int_handler)  # ignored where the tests run in the background\n"
        "print('here', flush=True)\n"
        "real = t.ShardWriter.write\n"
        "def slow(*args):\n    t.time.sleep(0.05); return real(*args)\n"
        "t.ShardWriter.write = slow\n"
        "t.quantize(*map(t.Path, sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment(), stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        while not all(list((tmp_path / "out").glob(name)) for name in ("*.safetensors", "*.safetensors.partial")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert process.returncode != 0 and "config.json" not in left
    assert not any(name.endswith(".safetensors.partial") for name in left)
    with pytest.raises(ConfigError, match="unfinished"):
        GPTNeoXForCausalLM.from_pretrained(tmp_path / "out")
    quantize(source, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
