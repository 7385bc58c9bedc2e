"""The page on the GPU kernels: its tables are the script's, predictions keep below floors, measurements stand by themselves."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "kernels.md"
FOUND = {
    "device": "NVIDIA H200",
    "torch": "2.11",
    "rehearsal": False,
    "packages": {"triton": "3.6"},
    "pairs": [
        {"shape": "gpt-neox-20b", "format": "int8", "launch": "qkv beside h to 4h", "us": 99.0},
        {"shape": "gpt-neox-20b", "format": "int4", "launch": "qkv beside h to 4h", "us": 40.0},
    ],
    "models": [
        {"engine": "neox-lite", "format": "int4", "tokens_per_s": {"0": 200.0}, "section": "int4"},
        {"engine": "neox-lite", "format": "int4", "tokens_per_s": {"0": 260.0}, "section": "int4"},
        {"engine": "neox-lite", "format": "int4", "tokens_per_s": {"0": 900.0}, "batch": 4, "section": "int4"},
        {"engine": "neox-lite", "format": "int4", "tokens_per_s": {"0": 290.0}, "section": "tuned"},
        {"engine": "transformers + bitsandbytes", "format": "int4", "tokens_per_s": {"0": 999.0}},
    ],
}


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import roofline

    return roofline


def test_the_page_s_tables_are_the_script_s(roofline):
    text = PAGE.read_text()
    assert roofline.page(text, roofline.measurements(roofline.RESULTS)) == text


def test_nothing_is_predicted_to_beat_its_floor(roofline):
    for card in roofline.CARDS:
        for launch in roofline.launches():
            assert roofline.predicted_s(launch.nbytes, card) > launch.nbytes / card.bandwidth
        for format in roofline.BITS:
            assert roofline.step_s(format, card) > roofline.step_bytes(format) / card.bandwidth
        times = [roofline.product_s(tokens, card) for tokens in roofline.TOKENS]
        assert times == sorted(times)
        for tokens, seconds in zip(roofline.TOKENS, times, strict=True):
            assert seconds > 2 * 4 * roofline.HIDDEN**2 * tokens / card.flops


def test_bytes_are_those_of_the_format(roofline):
    step = roofline.step_bytes("int4")
    assert step == pytest.approx(10.59e9, rel=0.001)  # 19.93 billion weights in 4.125 bits, and the head in 8.125
    assert roofline.step_bytes("int4", 1) - step == 2 * 44 * 6144 * 2


def test_what_was_measured_stands_in_its_own_columns_and_nowhere_else(roofline, tmp_path):
    (tmp_path / "gpu_nvidia_h200.json").write_text(json.dumps(FOUND))
    (tmp_path / "gpu_rehearsal.json").write_text(json.dumps({**FOUND, "rehearsal": True, "device": "RTX 3090"}))
    (tmp_path / "gpu_no_device.json").write_text(json.dumps({**FOUND, "device": None}))
    found = roofline.measurements(tmp_path)
    assert set(found) == {"H200"}
    before, after = roofline.page(PAGE.read_text(), {}), roofline.page(PAGE.read_text(), found)
    assert "**No GPU has run these kernels" in before and "NVIDIA H200, torch 2.11, Triton 3.6" in after
    row = next(line for line in after.splitlines() if line.startswith("| qkv beside"))
    old = next(line for line in before.splitlines() if line.startswith("| qkv beside"))
    assert row.endswith("| 40.0 | 71% |") and old.endswith("| not yet | not yet |")
    assert row.rsplit("|", 3)[0] == old.rsplit("|", 3)[0]  # predictions do not move
    cells = next(line for line in after.splitlines() if line.startswith("| H200 |")).split(" | ")
    assert cells[4] == "260" and cells[7] == "not yet |"  # neither the batch, nor a peer, nor sizes timed there


def test_a_page_without_its_marks_is_refused(roofline):
    with pytest.raises(SystemExit, match="0 places marked <!-- told -->"):
        roofline.page("nothing", {})
