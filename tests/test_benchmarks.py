"""Measurements start, and those that are cheap run once, whatever they find; the tables of a page are those of its script."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
HOME = ROOT / "benchmarks"
COMMANDS = sorted(
    ".".join(path.relative_to(HOME).with_suffix("").parts)
    for path in HOME.rglob("*.py")
    if ".parse_args()" in path.read_text()
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_measurement_says_what_it_needs(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 0 and "usage" in capsys.readouterr().out


def test_the_calls_of_a_token_and_of_a_request_are_counted(tmp_path):
    command = [sys.executable, "-m", "benchmarks.count_calls", "--out", str(tmp_path / "calls.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "calls.json").read_text())
    assert all(row["calls"] >= row["changes"] >= row["files"] > 1 for row in found.values())


def test_the_tables_of_kernels_md_are_those_of_the_roofline():
    from benchmarks.gpu import roofline

    text = (ROOT / "docs" / "kernels.md").read_text()
    assert roofline.page(text, roofline.measurements(roofline.RESULTS)) == text


def benchmark(tmp_path, *flags):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (written,) = tmp_path.glob("*.json")
    result = json.loads(written.read_text())
    assert done.returncode == 0 and result["ok"] and json.loads(done.stdout) == result, done.stderr
    return result, done.stderr


def test_the_benchmark_s_checks_pass_and_it_says_where_no_gpu_is(tmp_path):
    result, messages = benchmark(tmp_path, "--checks")
    assert len(result["checks"]) > 5
    assert (result["device"] is None) == (not torch.cuda.is_available()) == ("no CUDA device" in messages)


@pytest.mark.slow
def test_every_path_of_the_benchmark_runs_without_a_gpu(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    result, _ = benchmark(tmp_path, "--rehearse")
    needs = {"transformers": "bitsandbytes", "nf4": "bitsandbytes", "gemlite": "gemlite", "torch tinygemm": "CPU"}
    assert result["rehearsal"] and set(result["section_s"]) == {
        "first checks", "copy", "int4", "transformers", "nf4", "pairs", "torch tinygemm", "fp16", "cap 12", "gemlite",
        "attention", "tuned", "tokens", "peers", "slices",
    }  # fmt: skip
    assert set(result["left_out"]) <= needs.keys()
    assert all(needs[name] in why for name, why in result["left_out"].items())
    assert {row["launch"] for row in result["pairs"]} == {"qkv beside h to 4h", "dense plus 4h to h", "norm and head"}
    assert {row["tokens"] for row in result["tokens"]} == {1, 3, 260}
    assert all(row["error_rms"] < 1e-3 for row in result["tokens"] if "error_rms" in row)
    assert {row["engine"] for row in result["peers"]} == {"torch tinygemm", "bitsandbytes nf4", "gemlite"}
    ours = [row for row in result["models"] if row["engine"] == "neox-lite"]
    assert {row["section"] for row in ours} >= {"int4", "fp16", "tuned"}
    assert all(rate > 0 for row in result["models"] for rate in row["tokens_per_s"].values())
    assert [row["gpu_gib"] for row in result["caps"]] == [12] and result["choices"] and len(result["checks"]) > 5
