"""The hardware profile: measured once, kept, thrown away when it is not this machine's; and what memory is free."""

import contextlib
import json
import os
import stat
import warnings
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path

import pytest
import torch

from neox_lite import user_cache
from neox_lite.errors import ArgumentError
from neox_lite.offload import memory, profile
from neox_lite.offload.plan import Budgets, Card, HardwareProfile, Rates
from neox_lite_app import doctor

RATES = Rates(2e10, 3e11, 1e11)
KNOWN = HardwareProfile(RATES, 2.5e9, 400 << 20, Card("a card", 8 << 30, RATES, 1.2e10, 500 << 20))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    profile._warn.cache_clear()


@pytest.fixture
def measure(monkeypatch):
    """Says what measuring finds; counts how often that is done in `measure.made`."""

    def finds(found):
        monkeypatch.setattr(profile, "_measured", lambda progress: made.append(progress(1, 1)) or found)

    made = finds.made = []
    finds(KNOWN)
    return finds


@pytest.fixture
def identify(monkeypatch):
    """Changes what the machine is."""
    first = profile.identity()
    return lambda **changes: monkeypatch.setattr(profile, "identity", lambda: {**first, **changes})


def known_or_measured():
    return profile.load() or profile.measure()


@contextlib.contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_profile_is_measured_once_and_read_back_exactly(measure):
    assert profile.load() is None and measure.made == []
    steps = []
    assert profile.measure(lambda done, total: steps.append((done, total))) == KNOWN and steps == [(1, 1)]
    assert known_or_measured() == KNOWN and len(measure.made) == 1
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "neox-lite"
    assert [f.name for f in folder.iterdir()] == ["machine.json"]
    if hasattr(os, "getuid"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # the user's own


@pytest.mark.parametrize("plain", [{"card": None, "disk_bytes_per_s": None}, {"cpu": Rates(2e10, 3e11)}])
def test_a_machine_without_gpu_disk_rate_or_plain_rate_is_stored_too(measure, plain):
    measure(replace(KNOWN, **plain))
    assert profile.measure() == replace(KNOWN, **plain) == profile.load()


NAMES = ["format", "neox_lite", "torch", "cpu", "cores", "threads", "kernels", "gpu", "driver"]


@pytest.mark.parametrize("name", NAMES)
def test_another_identity_has_a_profile_of_its_own(measure, identify, name):
    assert name in profile.identity()
    profile.measure()
    identify(**{name: "another"})
    assert profile.load() is None
    assert known_or_measured() == KNOWN and len(measure.made) == 2
    identify()
    assert known_or_measured() == KNOWN and len(measure.made) == 2  # the first is still there


def test_only_the_latest_profiles_are_stored_one_for_each_identity(measure, identify):
    for threads in range(profile.MAX_PROFILES + 1):
        identify(threads=threads)
        profile.measure()
    assert len(profile._stored()) == profile.MAX_PROFILES
    identify(threads=0)
    assert profile.load() is None
    identify(threads=5)
    measure(replace(KNOWN, disk_bytes_per_s=5e9))
    assert profile.measure() == replace(KNOWN, disk_bytes_per_s=5e9) == profile.load()
    assert len(profile._stored()) == profile.MAX_PROFILES
    identify(threads=1)  # the oldest
    assert profile.load() == KNOWN


def test_the_identity_follows_the_thread_count_and_a_forced_kernel_path(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert profile.identity()["threads"] == 77
    pytest.importorskip("llvmlite")
    from neox_lite.kernels.cpu import target

    monkeypatch.setenv(target.VARIABLE, "portable")
    target.host.cache_clear()
    try:
        assert profile.identity()["kernels"] == "portable"
    finally:
        target.host.cache_clear()


def spoiled(path, *value):
    """A stored profile with another value at the path, keys with dots between them, or without that entry."""
    stored = json.loads(profile.cache_file().read_text())
    *inner, last = path.split(".")
    owner = reduce(dict.__getitem__, inner, stored["profiles"][0])
    if value:
        owner[last] = value[0]
    else:
        del owner[last]
    return json.dumps(stored)


@pytest.mark.parametrize("spoil", [
    *("", "not JSON", "[]", "null", '{"profiles": 1}', '{"profiles": [1, {}, null]}', "\0\xff", "cut short"),
    *(("machine",), ("machine.card",), ("machine.cpu.flops_per_s",), ("machine.card.rates.read_bytes_per_s",)),
    *(("machine.process_bytes", value) for value in ("many", True, -1, 1e300, 10**400, None)),
    *(("machine.disk_bytes_per_s", value) for value in (0, float("inf"))),
    *(("machine.cpu", value) for value in ([1, 2, 3], None)),
    *(("machine.cpu.read_bytes_per_s", -2e10), ("machine.cpu.flops_per_s", float("nan"))),
    *(("machine.card.bytes", 1 << 60), ("machine.card.bus_bytes_per_s", "fast")),
    *(("machine.card.name", value) for value in (3060, "a\ncard", None)),
], ids=str)  # fmt: skip
def test_a_spoiled_file_is_named_in_a_line_measured_again_and_replaced(measure, spoil):
    profile.measure()
    text = spoiled(*spoil) if isinstance(spoil, tuple) else spoil
    text = profile.cache_file().read_text()[:-40] if spoil == "cut short" else text
    profile.cache_file().write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning) as caught:
        assert known_or_measured() == KNOWN and len(measure.made) == 2
    (text,) = (str(warning.message) for warning in caught)
    assert text.startswith(f"{profile.cache_file()} is not used: ") and "\n" not in text and len(text) < 300
    if spoil == ("machine.process_bytes", 1e300):
        assert "process_bytes is 1e+300, expected 1 to 1.76e+13" in text
    with silence():
        assert profile.load() == KNOWN


def test_a_folder_that_cannot_be_written_is_named_once_and_measured_each_time(measure, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept, so it is measured every time"):
        assert known_or_measured() == KNOWN
    with silence():
        assert known_or_measured() == KNOWN
    assert len(measure.made) == 2


def test_doctor_shows_what_was_measured_and_measures_anew(measure, monkeypatch, run):
    assert doctor.speed(doctor.measured()) == "not measured yet; neox-lite doctor --measure does that"
    profile.measure()
    faster = replace(KNOWN, disk_bytes_per_s=5e9)
    measure(faster)
    code, out, _ = run("doctor")
    assert code == 0 and len(measure.made) == 1
    assert "CPU 20 GB/s of int4 weights, 0.30 TFLOP/s; GPU 20 GB/s" in out and "disk 2.5 GB/s" in out
    assert "neox-lite doctor --measure measures again" in out
    monkeypatch.setattr(os, "getloadavg", lambda: (7.5, 0, 0), raising=False)
    code, out, err = run("doctor", "--measure")
    assert code == 0 and len(measure.made) == 2
    assert "disk 5.0 GB/s" in out and "measure this machine: 100%" in err and "busy (load 7.5)" in err
    assert json.loads(run("doctor", "--json")[1])["measured"] == asdict(faster) and len(measure.made) == 2


def test_rates_are_those_of_products_with_random_weights(monkeypatch):
    """Of one token with codes, and of many with codes and with plain weights, whose results are finite."""
    rows = {profile.INT4: 512, profile.DENSE: 384}
    for name, value in {"COLUMNS": 256, "ROWS": rows, "MANY": 16, "SECONDS": 0.0}.items():
        monkeypatch.setattr(profile, name, value)
    with silence():
        rates = profile.measure_rates(torch.device("cpu"))
    assert 1e3 < rates.read_bytes_per_s < 1e12 and 1e3 < min(rates.flops_per_s, rates.plain_flops_per_s) < 1e14

    def timed(call, device):
        (y,) = call()
        assert 0.1 < float(y.std()) < 10
        return {(1, 512): 2.0, (16, 512): 3.0, (16, 384): 5.0}[tuple(y.shape)]

    monkeypatch.setattr(profile, "_seconds", timed)
    nbytes = 512 * 256 // 2 + 512 * 2 * 2 + 16  # codes, two scales a row, and the shape
    expected = Rates(nbytes / 2, 2 * 512 * 256 * 16 / 3, 2 * 384 * 256 * 16 / 5)
    assert profile.measure_rates(torch.device("cpu")) == expected


def test_everything_is_measured_in_steps(monkeypatch):
    for name, value in (("rates", RATES), ("disk", None), ("process", 7), ("card", KNOWN.card)):
        monkeypatch.setattr(profile, f"measure_{name}", lambda *device, value=value: value)
    steps = []
    for gpu, card in ((False, None), (True, KNOWN.card)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        found = profile._measured(lambda done, total: steps.append((done, total)))
        assert found == HardwareProfile(RATES, None, 7, card)
    assert steps == [(1, 3), (2, 3), (3, 3), (1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not say what memory a process has")
def test_a_process_with_torch_takes_some_hundred_megabytes_and_one_that_fails_is_named(monkeypatch):
    assert 100 << 20 < profile.measure_process() < 4 << 30
    monkeypatch.setattr(profile, "PROBE", "raise SystemExit('no luck')")
    with pytest.raises(ArgumentError, match="failed: no luck"):
        profile.measure_process()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot drop a file from memory")
def test_a_disk_s_rate_counts_what_came_from_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 << 20))
    reads = iter([0, 4 << 20])
    monkeypatch.setattr(profile, "_disk_reads", lambda: next(reads))
    rate = profile.disk_rate(path)
    assert rate is not None and rate > 1e6
    for nothing in (0, None):  # all of it was in memory; a system that does not say
        monkeypatch.setattr(profile, "_disk_reads", lambda nothing=nothing: nothing)
        assert profile.disk_rate(path) is None


@pytest.mark.parametrize(("own", "expected"), [
    ([["700"]], 600 << 20), ([["[N/A]"]], profile.CONTEXT_BYTES), ([], profile.CONTEXT_BYTES),
])  # fmt: skip
def test_a_context_is_what_the_driver_counts_beyond_torch(monkeypatch, own, expected):
    rows = [["1", "900"], *([str(os.getpid()), *used] for used in own)]
    monkeypatch.setattr(profile, "_nvidia_smi", lambda query: rows)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 100 << 20)
    assert profile.context_bytes() == expected


@pytest.mark.skipif(os.name == "nt", reason="the tool is a shell script")
@pytest.mark.parametrize(("script", "rows"), [
    (None, []), ("#!/bin/sh\nexit 9\n", []), ("#!/bin/sh\necho '17, 300'\necho ''\n", [["17", "300"]]),
], ids=["missing", "failing", "answering"])  # fmt: skip
def test_nvidia_smi_that_is_missing_or_fails_answers_nothing(monkeypatch, tmp_path, script, rows):
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert profile._nvidia_smi("--query-gpu=name") == rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
def test_a_gpu_is_measured():
    card = profile.measure_card(torch.device("cuda:0"))
    assert card.bytes > 1 << 30 and card.rates.read_bytes_per_s > 5e10 and card.rates.flops_per_s > 1e12
    assert card.bus_bytes_per_s > 1e9 and 0 < card.context_bytes < 4 << 30


def test_free_memory_is_within_the_total():
    total, free = memory.free_memory()
    assert total is not None and free is not None and 0 < free <= total


def group(folder, names, limit, usage, inactive):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, usage, f"anon 5\n{names[3]} {inactive}"), strict=False):
        (folder / name).write_text(f"{text}\n")


@pytest.mark.parametrize(("mount", "line", "names"), [
    ("", "0::/a/b\n", ("memory.max", "memory.current", "memory.stat", "inactive_file")),
    ("memory", "4:cpu,memory:/a/b\n3:cpuset:/\n",
     ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")),
], ids=["v2", "v1"])  # fmt: skip
def test_every_control_group_above_counts(tmp_path, mount, line, names):
    root = tmp_path / "cgroup"
    (tmp_path / "own").write_text(line)
    group(root / mount / "a" / "b", names, 8000, 3000, 1000)
    group(root / mount / "a", names, 5000, 4000, 0)
    group(root / mount, names, "max", 9000, 0)
    assert sorted(memory._cgroup_limits(root, tmp_path / "own")) == [(5000, 4000), (8000, 2000)]
    assert memory._cgroup_limits(root, tmp_path / "nothing") == []


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="control groups bound what Linux says")
def test_a_container_s_limit_bounds_what_is_free(monkeypatch):
    for used, free in ((1 << 18, (1 << 20) - (1 << 18)), (1 << 21, 0)):
        monkeypatch.setattr(memory, "_cgroup_limits", lambda used=used: [(1 << 20, used), (1 << 30, 0)])
        assert memory.free_memory() == (1 << 20, free)


def test_what_macos_counts_is_read():
    counts = {"free": 10, "active": 99, "inactive": 20, "speculative": 5}
    pages = "\n".join(f"Pages {kind}:   {count}." for kind, count in counts.items())
    assert memory._mac_free(f"Mach Virtual Memory Statistics: (page size of 16384 bytes)\n{pages}") == 35 * 16384
    assert memory._mac_free("nothing of the kind") is None


def test_budgets_are_what_is_free_and_what_this_process_holds_but_a_margin(monkeypatch):
    monkeypatch.setattr(profile, "free_memory", lambda: (32 << 30, 10 << 30))
    host = profile.budgets(replace(KNOWN, card=None))
    assert host.gpu is None and (10 << 30) - profile.HOST_MARGIN <= host.cpu < 20 << 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 1 << 30)
    monkeypatch.setattr(profile, "free_gpu", lambda gpu: (8 << 30, (5 + gpu) << 30))
    assert profile.budgets(KNOWN).gpu == (6 << 30) + (500 << 20) - profile.GPU_MARGIN
    assert profile.budgets(KNOWN, gpu=1).gpu == (7 << 30) + (500 << 20) - profile.GPU_MARGIN
    assert profile.budgets(KNOWN, gpu=None).gpu is None
    monkeypatch.setattr(profile, "free_memory", lambda: (None, None))
    with pytest.raises(ArgumentError, match="give the budget"):
        profile.budgets(KNOWN)
    assert profile.budgets(KNOWN, 7, 0) == Budgets(7, 0)  # what is given needs no asking


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="no CUDA device 0"):
        memory.free_gpu()


def test_files_are_kept_where_the_environment_says(monkeypatch, tmp_path):
    assert user_cache.folder() == tmp_path / "cache" / "neox-lite"
    monkeypatch.setenv("NEOX_LITE_CACHE", str(tmp_path / "own"))
    assert user_cache.folder() == tmp_path / "own"
    monkeypatch.delenv("NEOX_LITE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    if os.name != "nt":
        assert user_cache.folder() == tmp_path / ".cache" / "neox-lite"
