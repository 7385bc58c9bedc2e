"""The machine's profile: measured once, kept, thrown away when it is not this machine's; and what memory is free."""

import json
import os
import stat
import warnings
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path

import pytest
import torch

from neox_lite.errors import ArgumentError
from neox_lite.offload import profile
from neox_lite.offload.plan import Card, Machine, Rates
from neox_lite_app import doctor
from neox_lite_app.cli import main

RATES = Rates(2e10, 3e11, 1e-5, 1e-9, 1e11)
KNOWN = Machine(RATES, 2.5e9, 400 << 20, Card("a card", 8 << 30, RATES, 1.2e10, 500 << 20))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    profile._say.cache_clear()


@pytest.fixture
def measurements(monkeypatch):
    """Counts how often the machine is measured, and says what it finds."""
    made = []
    monkeypatch.setattr(profile, "_measured", lambda progress: made.append(progress(1, 1)) or KNOWN)
    return made


# Kept -----------------------------------------------------------------------------------------------------------------


def test_a_profile_is_measured_once_and_read_back_exactly(measurements):
    assert profile.profile(measure=False) is None and measurements == []
    steps = []
    assert profile.profile(lambda done, total: steps.append((done, total))) == KNOWN and steps == [(1, 1)]
    assert profile.profile() == KNOWN == profile.profile(measure=False) and len(measurements) == 1
    assert profile.cache_file().parent == Path(os.environ["XDG_CACHE_HOME"]) / "neox-lite"
    assert [f.name for f in profile.cache_file().parent.iterdir()] == ["machine.json"]


@pytest.mark.parametrize(
    "name", ["format", "neox_lite", "torch", "cpu", "cores", "threads", "kernels", "gpu", "driver"]
)
def test_another_identity_has_a_profile_of_its_own(measurements, monkeypatch, name):
    first = profile.identity()
    profile.profile()
    monkeypatch.setattr(profile, "identity", lambda: {**first, name: "another"})
    assert profile.profile(measure=False) is None
    assert profile.profile() == KNOWN and len(measurements) == 2
    monkeypatch.setattr(profile, "identity", lambda: first)
    assert profile.profile() == KNOWN and len(measurements) == 2  # the first is still there


def test_only_the_latest_profiles_are_kept(measurements, monkeypatch):
    for threads in range(profile.MOST_KEPT + 1):
        monkeypatch.setattr(profile, "identity", lambda threads=threads: {"threads": threads})
        profile.profile()
    assert len(measurements) == profile.MOST_KEPT + 1 == len(profile._kept()) + 1
    monkeypatch.setattr(profile, "identity", lambda: {"threads": 0})
    assert profile.profile(measure=False) is None


def test_the_identity_follows_the_thread_count():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert profile.identity()["threads"] == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_a_forced_kernel_path_has_a_profile_of_its_own(measurements, monkeypatch):
    pytest.importorskip("llvmlite")
    from neox_lite.kernels.cpu import target

    profile.profile()
    monkeypatch.setenv(target.VARIABLE, "portable")
    target.host.cache_clear()
    try:
        assert profile.identity()["kernels"] == "portable"
        profile.profile()
        assert len(measurements) == 2
    finally:
        target.host.cache_clear()


def without(path):
    """A kept profile that lacks one entry."""
    kept = json.loads(profile.cache_file().read_text())
    inner = kept["profiles"][0]
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return json.dumps(kept)


def with_value(path, value):
    """A kept profile with another value at the path, keys with dots between them."""
    kept = json.loads(profile.cache_file().read_text())
    *inner, last = path.split(".")
    reduce(dict.__getitem__, inner, kept["profiles"][0]["machine"])[last] = value
    return json.dumps(kept)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda: "",
        lambda: "not JSON",
        lambda: "[]",
        lambda: "null",
        lambda: '{"profiles": 1}',
        lambda: '{"profiles": [1, {}, null]}',
        lambda: profile.cache_file().read_text()[:-40],
        lambda: without(["machine"]),
        lambda: without(["machine", "card"]),
        lambda: without(["machine", "cpu", "layer_s"]),
        lambda: without(["machine", "cpu", "feature_s"]),
        lambda: without(["machine", "card", "rates", "flops_per_s"]),
        lambda: with_value("process_bytes", "many"),
        lambda: with_value("process_bytes", True),
        lambda: with_value("process_bytes", -1),
        lambda: with_value("disk_bytes_per_s", 0),
        lambda: with_value("disk_bytes_per_s", float("inf")),
        lambda: with_value("cpu", [1, 2, 3]),
        lambda: with_value("process_bytes", 1e300),
        lambda: with_value("process_bytes", 10**400),
        lambda: with_value("cpu.read_bytes_per_s", -2e10),
        lambda: with_value("cpu.flops_per_s", float("nan")),
        lambda: with_value("cpu.layer_s", 1e6),
        lambda: with_value("card.bytes", 1 << 60),
        lambda: with_value("card.bus_bytes_per_s", "fast"),
        lambda: with_value("card.name", 3060),
        lambda: with_value("card.name", "a\ncard"),
        lambda: "\0\xff",
    ],
)
def test_a_spoiled_file_is_said_in_a_line_measured_again_and_replaced(measurements, spoil):
    profile.profile()
    profile.cache_file().write_text(spoil(), encoding="utf-8")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert profile.profile() == KNOWN and len(measurements) == 2
    (text,) = (str(warning.message) for warning in said)
    assert text.startswith(f"{profile.cache_file()} is not used: ") and "\n" not in text and len(text) < 300
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert profile.profile() == KNOWN and len(measurements) == 2


def test_a_spoiled_number_is_named_with_what_it_can_be(measurements):
    profile.profile()
    profile.cache_file().write_text(with_value("process_bytes", 1e300), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"process_bytes is 1e\+300, expected 1.05e\+06 to 1.1e\+12"):
        assert profile.profile(measure=False) is None


def test_every_number_of_a_profile_has_its_bounds():
    assert set(profile.SENSIBLE) == {
        key
        for part in (KNOWN, KNOWN.card, KNOWN.cpu)
        for key, value in asdict(part).items()
        if isinstance(value, int | float)
    }


def test_measuring_anew_replaces_what_was_kept(measurements, monkeypatch):
    first = profile.identity()
    monkeypatch.setattr(profile, "identity", lambda: {**first, "threads": 99})
    profile.profile()
    monkeypatch.setattr(profile, "identity", lambda: first)
    profile.profile()
    faster = replace(KNOWN, disk_bytes_per_s=5e9)
    monkeypatch.setattr(profile, "_measured", lambda progress: faster)
    assert profile.renew() == faster == profile.profile() and len(profile._kept()) == 2
    monkeypatch.setattr(profile, "identity", lambda: {**first, "threads": 99})
    assert profile.profile() == KNOWN


def test_doctor_measures_anew_and_shows_it(measurements, monkeypatch, capsys):
    profile.profile()
    faster = replace(KNOWN, disk_bytes_per_s=5e9)
    monkeypatch.setattr(profile, "_measured", lambda progress: measurements.append(progress(1, 1)) or faster)
    assert main(["doctor"]) == 0 and len(measurements) == 1 and "disk 2.5 GB/s" in capsys.readouterr().out
    assert main(["doctor", "--measure"]) == 0 and len(measurements) == 2
    out, err = capsys.readouterr()
    assert "disk 5.0 GB/s" in out and "measure this machine: 100%" in err
    assert main(["doctor", "--json"]) == 0 and json.loads(capsys.readouterr().out)["measured"] == asdict(faster)
    assert len(measurements) == 2


def test_measuring_on_a_busy_machine_is_said(measurements, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (7.5, 0, 0), raising=False)
    assert main(["doctor", "--measure"]) == 0 and "busy (load 7.5)" in capsys.readouterr().err


def test_a_machine_without_gpu_and_with_an_unknown_disk_is_kept_too(monkeypatch):
    plain = replace(KNOWN, card=None, disk_bytes_per_s=None)
    monkeypatch.setattr(profile, "_measured", lambda progress: plain)
    assert profile.profile() == plain == profile.profile(measure=False)


def test_a_folder_that_cannot_be_written_is_said_once_and_measured_each_time(measurements, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept, so it is measured every time"):
        assert profile.profile() == KNOWN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert profile.profile() == KNOWN
    assert len(measurements) == 2


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no file modes")
def test_the_folder_is_the_user_s_own(measurements):
    profile.profile()
    assert stat.S_IMODE(profile.cache_file().parent.stat().st_mode) == 0o700


# Measured -------------------------------------------------------------------------------------------------------------


def test_rates_are_measured_through_the_operations(monkeypatch):
    monkeypatch.setattr(profile, "LARGE", (512, 2))
    monkeypatch.setattr(profile, "SMALL", (256, 2))
    monkeypatch.setattr(profile, "PLAIN", (128, 2))
    monkeypatch.setattr(profile, "MANY", 16)
    monkeypatch.setattr(profile, "SECONDS", 0.0)
    steps = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = profile.measure_rates(torch.device("cpu"), lambda done, total: steps.append((done, total)))
    assert 1e6 < rates.read_bytes_per_s < 1e12 and 1e7 < rates.flops_per_s < 1e14 and 0 <= rates.layer_s < 1
    assert 1e7 < rates.plain_flops_per_s < 1e14
    assert steps == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("large_s", "small_s", "expected"),
    [
        (11e-3, 2e-3, Rates(1e11, 1.0, 1e-3)),  # 10 ms and 1 ms of bytes, 1 ms beside
        (10e-3, 0.5e-3, Rates(1e11, 1.0, 0.0)),  # small layers faster than their bytes: nothing beside
        (1e-3, 2e-3, Rates(1e12, 1.0, 0.0)),
    ],
)
def test_bytes_a_second_and_seconds_a_layer_are_a_line_through_two_sizes(monkeypatch, large_s, small_s, expected):
    class Fake:
        def __init__(self, device, hidden, count, format=profile.INT4):
            large, self.rate = hidden == profile.LARGE[0], 3.0 if format == profile.INT4 else 2.0
            self.nbytes, self.weights, self.hidden, self.count = (
                (1e9 if large else 1e8) * count,
                12 * hidden**2,
                hidden,
                count,
            )
            self.decode_s = large_s if large else small_s

        def decode(self):
            return self.decode_s * self.count

        def prefill(self, tokens):  # three operations a second, plain ones two, and seven seconds for a feature
            return tokens * self.count * (2 * self.weights / self.rate + 7.0 * self.hidden)

    monkeypatch.setattr(profile, "Layers", Fake)
    monkeypatch.setattr(profile, "free_memory", lambda: (1 << 40, 1 << 40))
    monkeypatch.setattr(profile, "_seconds", lambda call, device: call() if callable(call) else call)
    found = profile.measure_rates(torch.device("cpu"))
    assert found.read_bytes_per_s == pytest.approx(expected.read_bytes_per_s)
    assert found.layer_s == pytest.approx(expected.layer_s, abs=1e-12)
    assert (found.flops_per_s, found.feature_s) == (pytest.approx(3.0), pytest.approx(7.0))
    assert found.plain_flops_per_s == pytest.approx(2.0)


def test_little_memory_is_measured_with_smaller_layers(monkeypatch):
    made = []

    class Fake:
        weights = count = 1

        def __init__(self, device, hidden, count, format=profile.INT4):
            made.append(hidden)
            self.nbytes = hidden * count

        def decode(self):
            return lambda: None

        prefill = decode

    monkeypatch.setattr(profile, "Layers", Fake)
    monkeypatch.setattr(profile, "free_memory", lambda: (4 << 30, 1 << 30))
    monkeypatch.setattr(profile, "_seconds", lambda call, device: 1.0)
    profile.measure_rates(torch.device("cpu"))
    assert made == [profile.LARGE_ON_LITTLE[0], profile.SMALL[0], profile.PLAIN[0]]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not say what memory a process has")
def test_a_process_with_torch_takes_some_hundred_megabytes():
    assert 100 << 20 < profile.measure_process() < 4 << 30


def test_a_probe_that_fails_is_named(monkeypatch):
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
    monkeypatch.setattr(profile, "_disk_reads", lambda: 0)
    assert profile.disk_rate(path) is None  # all of it was in memory
    monkeypatch.setattr(profile, "_disk_reads", lambda: None)
    assert profile.disk_rate(path) is None


def test_a_context_is_what_the_driver_counts_beyond_torch(monkeypatch):
    rows = [["1", "900"], [str(os.getpid()), "700"]]
    monkeypatch.setattr(profile, "_nvidia_smi", lambda query: rows)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 100 << 20)
    assert profile.context_bytes() == 600 << 20
    rows[1][1] = "[N/A]"
    assert profile.context_bytes() == profile.CONTEXT_BYTES
    rows.pop()
    assert profile.context_bytes() == profile.CONTEXT_BYTES


def test_nvidia_smi_that_is_missing_or_fails_answers_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert profile._nvidia_smi("--query-gpu=name") == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    assert profile._nvidia_smi("--query-gpu=name") == []
    tool.write_text("#!/bin/sh\necho '17, 300'\necho ''\n")
    if os.name != "nt":
        assert profile._nvidia_smi("--query-gpu=name") == [["17", "300"]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
def test_a_gpu_is_measured():
    card = profile.measure_card()
    assert card.bytes > 1 << 30 and card.rates.read_bytes_per_s > 5e10 and card.rates.flops_per_s > 1e12
    assert card.bus_bytes_per_s > 1e9 and 0 < card.context_bytes < 4 << 30


# Memory ---------------------------------------------------------------------------------------------------------------


def test_free_memory_is_within_the_total():
    total, free = profile.free_memory()
    assert total is not None and free is not None and 0 < free <= total


def group(folder, version, limit, usage, inactive):
    names = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\n")


@pytest.mark.parametrize(("version", "line"), [(2, "0::/a/b\n"), (1, "4:cpu,memory:/a/b\n3:cpuset:/\n")])
def test_every_control_group_above_counts(tmp_path, version, line):
    mount = tmp_path / "cgroup" / ("memory" if version == 1 else "")
    (tmp_path / "own").write_text(line)
    group(mount / "a" / "b", version, 8000, 3000, 1000)
    group(mount / "a", version, 5000, 4000, 0)
    group(mount, version, "max", 9000, 0)
    found = profile._cgroup_limits(tmp_path / "cgroup", tmp_path / "own")
    assert sorted(found) == [(5000, 4000), (8000, 2000)]
    assert profile._cgroup_limits(tmp_path / "cgroup", tmp_path / "nothing") == []


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="control groups bound what Linux says")
def test_a_container_s_limit_bounds_what_is_free(monkeypatch):
    monkeypatch.setattr(profile, "_cgroup_limits", lambda: [(1 << 20, 1 << 18), (1 << 30, 0)])
    assert profile.free_memory() == (1 << 20, (1 << 20) - (1 << 18))
    monkeypatch.setattr(profile, "_cgroup_limits", lambda: [(1 << 20, 1 << 21)])
    assert profile.free_memory() == (1 << 20, 0)


def test_what_macos_counts_is_read():
    text = "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n" + "\n".join(
        f"Pages {kind}:   {count}."
        for kind, count in (("free", 10), ("active", 99), ("inactive", 20), ("speculative", 5))
    )
    assert profile._mac_free(text) == 35 * 16384
    assert profile._mac_free("nothing of the kind") is None


def test_budgets_are_what_is_free_and_what_this_process_holds_but_a_margin(monkeypatch):
    monkeypatch.setattr(profile, "free_memory", lambda: (32 << 30, 10 << 30))
    host, gpu = profile.budgets(replace(KNOWN, card=None))
    assert gpu is None and (10 << 30) - profile.HOST_MARGIN <= host < 20 << 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 1 << 30)
    monkeypatch.setattr(profile, "free_gpu", lambda gpu: (8 << 30, (5 + gpu) << 30))
    assert profile.budgets(KNOWN)[1] == (6 << 30) + (500 << 20) - profile.GPU_MARGIN
    assert profile.budgets(KNOWN, gpu=1)[1] == (7 << 30) + (500 << 20) - profile.GPU_MARGIN
    assert profile.budgets(KNOWN, gpu=None)[1] is None
    monkeypatch.setattr(profile, "free_memory", lambda: (None, None))
    with pytest.raises(ArgumentError, match="give the budget"):
        profile.budgets(KNOWN)
    assert profile.budgets(KNOWN, 7, 0) == (7, 0)  # what is given needs no asking


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="no CUDA device 0"):
        profile.free_gpu()


def test_doctor_shows_what_was_measured_and_how_to_measure_again(measurements):
    assert doctor.speed(doctor.measured()) == "not measured yet; neox-lite doctor --measure does that"
    profile.profile()
    shown = doctor.speed(asdict(doctor.measured()))
    assert shown.startswith("CPU 20 GB/s of int4 weights, 0.30 TFLOP/s; GPU 20 GB/s") and "disk 2.5 GB/s" in shown
    assert "neox-lite doctor --measure measures again" in shown
