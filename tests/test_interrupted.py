"""Runs that write a folder and are killed, interrupted, out of disk, or given something hostile: never a folder that lies.

A writer is killed before every call that writes; whole `quantize` runs at 6 random moments and before every 12th such call,
with NEOX_LITE_TIMES=12 or more before every one.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.checkpoints import change_tensors, digests, some_tensors, write_source, write_tensors
from support.commands import environment, run_python
from support.faults import die_before, disk_full_at, forked, status_of
from support.often import TIMES, times
from support.refusals import refused

from neox_lite import GPTNeoXForCausalLM
from neox_lite.checkpoint.folder_writer import ShardWriter
from neox_lite.checkpoint.reader import Checkpoint, verify_folder
from neox_lite.errors import CheckpointError, ConfigError, NeoxLiteError
from neox_lite.files import partials
from neox_lite_quant import convert

KILLS = times(6)
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


def make_source(folder):
    write_source(folder, shard_size="200KB")
    (folder / "tokenizer.json").write_text("{}")


def quantize(source, folder):
    """Into some five weight files, by slices smaller than a tensor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["neox_lite_quant.convert"], "SHARD_BYTES", 60_000)
        for module in ("neox_lite.loading.quantize", "neox_lite_quant.convert"):
            patch.setattr(sys.modules[module], "SLICE_ELEMENTS", 16_384)
        convert(source, folder, threads=2)


# name -> (a run, a run that wrote another model before, every how many calls it is ended)
RUNS = {
    "writer": (
        lambda source, folder: write_tensors(folder, some_tensors(2), max_bytes=600),
        lambda source, folder: write_tensors(folder, some_tensors(1) | {"old": torch.ones(300)}, max_bytes=300),
        1,
    ),
    "quantize": (quantize, lambda source, folder: convert(source, folder, format="int8"), max(1, 12 // TIMES)),
}


@pytest.fixture
def source(tmp_path):
    make_source(tmp_path / "source")
    return tmp_path / "source"


# -- kills: a process forks runs, so that each takes milliseconds --------------------------------------------------------


def begun(folder):
    """The weight files that a run has noted as whole, and those that it left half-written."""
    journal = folder / "neox_lite_journal.json"
    noted = set(json.loads(journal.read_text())["files"]) if journal.exists() else set()
    return noted | {path.name.partition(".safetensors")[0] + ".safetensors" for path in partials(folder)}


def says_that_it_is_unfinished(folder):
    if (folder / "neox_lite_manifest.json.partial").exists() and not (folder / "config.json").exists():
        refused(CheckpointError, "unfinished", Checkpoint.open, folder)


def go_on(run, source, folder, whole):
    """Run again after a kill, and check everything that must hold then."""
    complete, before = (folder / "config.json").exists(), begun(folder) if folder.exists() else set()
    assert not complete or verify_folder(folder) == []
    says_that_it_is_unfinished(folder)
    opened, real = [], ShardWriter.__enter__

    def enter(self):
        opened.append(self.path.name)
        return real(self)

    ShardWriter.__enter__ = enter
    try:
        run(source, folder)
    finally:
        ShardWriter.__enter__ = real
    assert digests(folder) == whole and verify_folder(folder) == []
    if not complete:
        assert len(before & set(opened)) <= 1, (before, opened)


def kill_at_random(root, kills):
    torch.set_num_threads(1)
    make_source(root / "source")
    began = time.perf_counter()
    for _ in range(3):
        status_of(quantize, root / "source", root / "whole")
    usual = (time.perf_counter() - began) / 3
    whole, chance, killed = digests(root / "whole"), random.Random(0), 0
    for i in range(10 * kills):
        if killed == kills:  # runs that ended before they were to be killed do not count
            break
        child = forked(quantize, root / "source", root / f"killed-{i}")
        time.sleep(chance.uniform(0, usual))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        killed += status != 0
        assert status_of(go_on, quantize, root / "source", root / f"killed-{i}", whole) == 0, i
    return killed


def kill_before_every_call(root, name, older):
    torch.set_num_threads(1)
    make_source(root / "source")
    run, other, stride = RUNS[name]
    status_of(run, root / "source", root / "whole")
    status_of(other, root / "source", root / "older")
    whole = digests(root / "whole")

    def dying(k):
        die_before(k)
        run(root / "source", root / f"killed-{k}")

    for k in range(1, 1000, stride):
        if older:
            shutil.copytree(root / "older", root / f"killed-{k}")
        status = status_of(dying, k)
        assert status in (0, signal.SIGKILL)
        assert status_of(go_on, run, root / "source", root / f"killed-{k}", whole) == 0, k
        if status == 0:
            return k - 1
    raise AssertionError("the run never ends")


def in_a_process(call, root, *arguments):
    """A forking function of this file, in a process without threads; what it returns."""
    done = run_python(f"import sys, test_interrupted as t; print(t.{call}(t.Path(sys.argv[1]), *{arguments}))", root)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@forks
def test_a_run_killed_at_random_moments_goes_on_to_the_same_bytes(tmp_path):
    assert in_a_process("kill_at_random", tmp_path, KILLS) == KILLS


@forks
@pytest.mark.parametrize("older", [False, True], ids=["fresh", "over-an-older-model"])
@pytest.mark.parametrize(("run", "calls"), [("writer", 20), ("quantize", 60)])
def test_a_run_killed_before_any_call_that_writes_goes_on_to_the_same_bytes(tmp_path, run, calls, older):
    assert in_a_process("kill_before_every_call", tmp_path, run, older) > calls


# -- a full disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "replace"])
@pytest.mark.parametrize("name", RUNS)
def test_a_full_disk_at_any_write_is_said_and_the_next_run_goes_on(source, tmp_path, name, call):
    """The first call that does not fail ends the loop with a complete folder."""
    run, _, stride = RUNS[name]
    run(source, tmp_path / "whole")
    whole = digests(tmp_path / "whole")
    for k in range(1, 500, stride):
        folder = tmp_path / str(k)
        try:
            with disk_full_at(k, Path if call == "replace" else os, call):
                run(source, folder)
            break
        except CheckpointError as error:
            assert "disk full" in str(error) and "are free" in str(error) and "\n" not in str(error)
        # the very last fsync: everything is there already
        assert not (folder / "config.json").exists() or verify_folder(folder) == []
        assert not partials(folder)
        says_that_it_is_unfinished(folder)
        run(source, folder)
        assert digests(folder) == whole
    assert 3 < k < 499
    assert digests(folder) == whole and verify_folder(folder) == []


# -- hostile sources -----------------------------------------------------------------------------------------------------


WEIGHT, EMBEDDING = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight", "gpt_neox.embed_in.weight"
INDEX = "model.safetensors.index.json"


def tensors(change):
    """Rewrite the file that holds WEIGHT."""

    def damage(source):
        change_tensors(source / json.loads((source / INDEX).read_text())["weight_map"][WEIGHT], change)

    return damage


def replaced(change):
    return tensors(lambda state: state.update({WEIGHT: change(state[WEIGHT])}))


def lead_out(source):
    index = json.loads((source / INDEX).read_text())
    file = index["weight_map"][WEIGHT]
    (source / file).rename(source.parent / file)
    index["weight_map"] = {k: f"../{file}" if v == file else v for k, v in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps(index))


def cut(source):
    path = max(source.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


HOSTILE = {
    "cut": (cut, "truncated?"),
    "out-of-the-folder": (lead_out, "../model-"),
    "in-both": (tensors(lambda state: state.update({EMBEDDING: state[WEIGHT].clone()})), "embed_in.weight is in both"),
    "extra": (tensors(lambda state: state.update(extra=torch.ones(2))), "extra is in"),
    "missing": (tensors(lambda state: state.pop(WEIGHT)), WEIGHT),
    "shape": (replaced(lambda weight: weight.T.contiguous()), "[256, 128], expected [128, 256]"),
    "integers": (replaced(lambda weight: weight.to(torch.int16)), f"{WEIGHT} is int16"),
    "float8": (replaced(lambda weight: weight.to(torch.float8_e4m3fn)), "is float8_e4m3fn"),
}


@pytest.mark.parametrize(("damage", "word"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_source_is_refused_and_nothing_is_written(source, tmp_path, damage, word):
    damage(source)
    refused(NeoxLiteError, re.escape(word), convert, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
