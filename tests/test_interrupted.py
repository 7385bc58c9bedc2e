"""Whole `quantize` runs that are killed, run out of disk, or are given something hostile: never a folder that lies.

Killed at 6 random moments and before every 12th call that writes; with NEOX_LITE_TIMES=12 or more before every one.
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
from support.checkpoints import change_tensors, digests
from support.checkpoints import write_source as write_model
from support.commands import environment, run_python
from support.often import TIMES, times

from neox_lite import GPTNeoXForCausalLM
from neox_lite.checkpoint.folder_writer import ShardWriter
from neox_lite.checkpoint.reader import verify_folder
from neox_lite.errors import CheckpointError, ConfigError, NeoxLiteError
from neox_lite.files import partials
from neox_lite_quant import convert

KILLS = times(6)
STRIDE = max(1, 12 // TIMES)  # of the calls before which a run is killed, or in which the disk is full
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
    return noted | {path.name.partition(".safetensors")[0] + ".safetensors" for path in partials(folder)}


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
        assert not partials(folder)
        quantize(source, folder)
        assert digests(folder) == whole
    assert k > 4


# -- hostile sources -----------------------------------------------------------------------------------------------------


WEIGHT = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
INDEX = "model.safetensors.index.json"


def tensors(change):
    """Rewrite the file that holds WEIGHT."""

    def damage(source):
        change_tensors(source / json.loads((source / INDEX).read_text())["weight_map"][WEIGHT], change)

    return damage


def lead_out(source):
    index = json.loads((source / INDEX).read_text())
    file = index["weight_map"][WEIGHT]
    (source / file).rename(source.parent / file)
    index["weight_map"] = {k: f"../{file}" if v == file else v for k, v in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps(index))


def cut(source):
    path = max(source.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (cut, "truncated?"),
        (lead_out, "../model-"),
        (
            tensors(lambda state: state.update({"gpt_neox.embed_in.weight": state[WEIGHT].clone()})),
            "embed_in.weight is in both",
        ),
        (tensors(lambda state: state.update(extra=torch.ones(2))), "extra is in"),
        (tensors(lambda state: state.pop(WEIGHT)), WEIGHT),
        (
            tensors(lambda state: state.update({WEIGHT: state[WEIGHT].T.contiguous()})),
            "[256, 128], expected [128, 256]",
        ),
        (tensors(lambda state: state.update({WEIGHT: state[WEIGHT].to(torch.int16)})), f"{WEIGHT} is int16"),
        (tensors(lambda state: state.update({WEIGHT: state[WEIGHT].to(torch.float8_e4m3fn)})), "is float8_e4m3fn"),
    ],
    ids=["cut", "out-of-the-folder", "in-both", "extra", "missing", "shape", "integers", "float8"],
)
def test_a_hostile_source_is_refused_and_nothing_is_written(source, tmp_path, damage, word):
    damage(source)
    with pytest.raises(NeoxLiteError) as caught:
        convert(source, tmp_path / "out")
    assert word in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


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
        while not all(list((tmp_path / "out").glob(name)) for name in ("*.safetensors", "*.safetensors.*.partial")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert process.returncode != 0 and "config.json" not in left
    assert not partials(tmp_path / "out")
    with pytest.raises(ConfigError, match="unfinished"):
        GPTNeoXForCausalLM.from_pretrained(tmp_path / "out")
    quantize(source, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
