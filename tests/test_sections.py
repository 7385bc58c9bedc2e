"""Long measurements in parts: a fault, a death or a hang costs its own part, and the file is always whole."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FAKE = f"""
import os, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
from sections import Worker

def section(name):
    print("noise of a library")
    yield {{"of": name}}
    if name == "raises":
        raise ValueError("no such kernel\\nmore")
    if name == "dies":
        os._exit(3)
    if name == "killed":
        os.kill(os.getpid(), 9)
    if name == "hangs":
        time.sleep(600)
    if name == "breaks":
        raise RuntimeError("an illegal memory access")
    yield {{"of": name, "last": True}}

broken = []
def usable():
    if broken:
        raise RuntimeError("the device is lost")

def run(name):
    try:
        yield from section(name)
    except RuntimeError:
        broken.append(name)
        raise

if "never" in sys.argv[1]:
    sys.exit("cannot import")
Worker(usable).run((name, lambda name=name: run(name)) for name in sys.argv[1].split(","))
"""


@pytest.fixture
def sections(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sections

    return sections


@pytest.fixture
def run(sections, tmp_path):
    """Sections by name -> rows, faults, those that ended, and how many processes it took."""
    script = tmp_path / "worker.py"
    script.write_text(FAKE)

    def call(*names, seconds=60.0, limit_s=30.0):
        rows, faults, done, started = [], {}, [], []

        def command(left, seconds):
            started.append(list(left))
            return [sys.executable, str(script), ",".join(left)]

        supervisor = sections.Supervisor(
            command,
            time.monotonic() + seconds,
            lambda name, row: rows.append((name, row.get("last", False))),
            faults.__setitem__,
            lambda name, seconds: done.append(name),
        )
        supervisor.run([sections.Section(name, limit_s) for name in names])
        return rows, faults, done, started

    return call


def test_sections_without_fault_take_one_process(run):
    rows, faults, done, started = run("a", "b")
    assert rows == [("a", False), ("a", True), ("b", False), ("b", True)]
    assert faults == {} and done == ["a", "b"] and started == [["a", "b"]]


def test_a_section_that_raises_keeps_what_it_had_and_the_next_goes_on_beside_it(run):
    rows, faults, done, started = run("raises", "b")
    assert ("raises", False) in rows and ("raises", True) not in rows and ("b", True) in rows
    assert faults == {"raises": "ValueError: no such kernel"} and done == ["raises", "b"] and len(started) == 1


@pytest.mark.parametrize(("name", "why"), [("dies", "exit code 3"), ("killed", "SIGKILL")])
def test_after_a_death_another_process_goes_on(run, name, why):
    rows, faults, done, started = run("a", name, "b")
    assert faults == {name: f"its process ended with {why}"} and done == ["a", "b"]
    assert (name, False) in rows and started == [["a", name, "b"], ["b"]]


def test_a_device_that_is_lost_is_left_with_the_process(run):
    _, faults, done, started = run("breaks", "b", "c")
    assert faults == {"breaks": "RuntimeError: an illegal memory access"}
    assert done == ["breaks", "b", "c"] and started == [["breaks", "b", "c"], ["b", "c"]]


def test_a_hang_is_ended_and_the_rest_goes_on(run, sections, monkeypatch):
    monkeypatch.setattr(sections, "GRACE_S", 0.5)
    _, faults, done, _ = run("hangs", "b", limit_s=2.0)
    assert faults == {"hangs": "it hung and was ended"} and done == ["b"]


def test_a_worker_that_never_begins_ends_too(run):
    _, faults, done, started = run("never", "b")
    assert faults == {"never": "its process ended with exit code 1"} and done == ["b"] and len(started) == 2


def test_what_no_time_is_left_for_is_named(run):
    _, faults, done, started = run("a", "b", seconds=-1.0)
    assert faults == {"a": "no time was left", "b": "no time was left"} and done == started == []


# gpu.py ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def found(**changes):
    return {"device": "A card", "rehearsal": False, "ok": True, "left_out": {}, "section_s": {}, "torch": "2",
            "packages": {}, "declined": {}, **changes}  # fmt: skip


def test_the_file_is_whole_after_every_row_and_shares_are_of_the_copy(gpu, tmp_path):
    report = gpu.Report(found(), tmp_path, add=False)
    report.tell("copy", {"median": 200.0})
    report.tell("pairs", {"launch": "x", "gb_per_s": 150.0})
    (file,) = tmp_path.iterdir()
    assert file.name == "gpu_a_card.json"
    kept = json.loads(file.read_text())
    assert kept["copy_gb_per_s"] == {"median": 200.0}
    assert kept["pairs"] == [{"launch": "x", "gb_per_s": 150.0, "share_of_copy": 0.75, "section": "pairs"}]


def test_a_later_run_of_some_sections_replaces_those_alone(gpu, tmp_path):
    first = gpu.Report(found(), tmp_path, add=False)
    for section in ("int4", "int8", "tuned"):
        first.tell(section, {"engine": "neox-lite", "tokens_per_s": {"0": 1.0}})
    first.tell("tuned", {"table": "choices", "choice": "rows"})
    first.fault("nf4", "not there")
    later = gpu.Report(found(), tmp_path, add=True)
    later.begin(["int8", "nf4", "tuned"])
    later.tell("int8", {"engine": "neox-lite", "tokens_per_s": {"0": 2.0}})
    rows = [(row["section"], row["tokens_per_s"]["0"]) for row in later.found["models"]]
    assert rows == [("int4", 1.0), ("int8", 2.0)] and later.found["left_out"] == {} == dict(later.found["choices"])


def test_faults_of_ours_fail_the_run_and_what_peers_lack_does_not(gpu, tmp_path):
    report = gpu.Report(found(), None, add=False)
    report.fault("gemlite", "ModuleNotFoundError")
    report.fault("int8", "no time was left")
    report.judge()
    assert report.found["ok"]
    report.fault("int8", "RuntimeError")
    report.judge()
    assert not report.found["ok"]
    report.begin(["int8"])  # and it was repeated, without fault
    report.judge()
    assert report.found["ok"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"device": "A card"}', '{"left_out": [], "section_s": {}}'])
def test_a_half_written_file_is_named_and_left_alone(gpu, tmp_path, text):
    (tmp_path / "gpu_a_card.json").write_text(text)
    with pytest.raises(SystemExit, match=r"gpu_a_card\.json: is no file of this program"):
        gpu.Report(found(), tmp_path, add=True)
    assert (tmp_path / "gpu_a_card.json").read_text() == text
    gpu.Report(found(), tmp_path, add=False).keep()  # a whole run begins anew
    assert json.loads((tmp_path / "gpu_a_card.json").read_text())["ok"]


def test_stopping_it_keeps_what_was_found_and_says_where(gpu, tmp_path, monkeypatch, capsys):
    def stopped(self, sections):
        self._tell("copy", {"median": 1.0})
        self._tell("pairs", {"launch": "x"})
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu.Supervisor, "run", stopped)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--checks"])
    assert gpu.main() == 130
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["pairs"][0]["launch"] == "x" and "stopped" in capsys.readouterr().err


def test_sections_run_in_the_order_of_importance_and_checks_come_alone(gpu):
    args = gpu.parse(["--only", "tokens,int4"])
    assert [s.name for s in gpu.wanted(args, True, True)] == ["int4", "tokens"]
    names = [s.name for s in gpu.wanted(gpu.parse([]), True, True)]
    assert names[:3] == ["first checks", "copy", "int4"] and set(names) == {s.name for s in gpu.SECTIONS}
    assert [s.name for s in gpu.wanted(gpu.parse(["--checks"]), True, True)] == ["checks"]
    assert [s.name for s in gpu.wanted(gpu.parse([]), False, False)] == ["checks"]
    command = gpu.command_of(gpu.parse(["--packages", "/x"]))
    assert (
        command(["int4", "int8", "cap 8", "nf4"], 60)[3] == "int4,int8" and command(["cap 8", "nf4"], 60)[3] == "cap 8"
    )
    assert command(["cap 8"], 90)[4:] == ["--minutes", "1.5", "--packages", "/x"]
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "int5"])


def test_a_model_with_a_peer_s_products_computes_the_same(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_peers

    from neox_lite.formats import make_format
    from neox_lite.kernels import dispatch
    from neox_lite.kernels import triton as backend
    from neox_lite_app.models.random_model import RandomModel, config_of

    device = torch.device("cpu" if backend.interpreted() else "cuda")
    config = config_of("1x128x2").copy(vocab_size=70)
    model = RandomModel(config, make_format("int4"), small_head=True).build(lambda done, total: None).to(device)
    made = []
    model.ops = gpu_peers.substituted(lambda weight: made.append(weight) or gpu_peers.torch_fp16(weight))
    ids = torch.tensor([[1, 2, 3]], device=device)
    theirs = [model(ids).logits, model(ids).logits]
    assert len(made) == 4  # each weight of the layer once, and not the head
    model.ops = dispatch.load("triton").bind(False)
    assert torch.equal(theirs[0], theirs[1])
    assert float((model(ids).logits - theirs[0]).abs().max()) < 1e-2 * float(theirs[0].abs().max())
