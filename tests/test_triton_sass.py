"""What the compiler makes of the Triton kernels for six generations of cards, none of which need be there."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.sass

ROOT = Path(__file__).parents[1]
# The oldest, a common one and the youngest, each half a minute; the others on request.
CARDS = (75, 86, 120, *(pytest.param(card, marks=pytest.mark.slow) for card in (80, 89, 90)))
KERNELS = {
    "layer_norms", "grouped_gemv", "gemv_residual", "gemm", "dequantize", "epilogue",
    "paged_decode", "combine_splits", "append_kv", "paged_prefill", "embed", "sample",
}  # fmt: skip


def compile_kernels(folder, *words):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-m", "benchmarks.gpu.sass", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr  # each broken rule is named there
    return done.stdout


@pytest.fixture(scope="module", params=CARDS)
def compiled(request, tmp_path_factory):
    """The kernels of a decode step, a batch and prompts at the shape of GPT-NeoX-20B: a card, and kernel -> its facts."""
    folder = tmp_path_factory.mktemp("sass")
    compile_kernels(folder, "--cards", request.param, "--out", folder / "facts.json")
    found = {}
    for row in json.loads((folder / "facts.json").read_text())["kernels"]:
        found.setdefault(row["kernel"], []).append(row)
    return request.param, found


def test_every_kernel_compiles_without_spilling(compiled):
    card, found = compiled
    assert set(found) == KERNELS - ({"gemm"} if card == 75 else set())
    assert all(row["spills"] == row["stack_bytes"] == 0 for rows in found.values() for row in rows)


def test_a_decode_step_streams_weights_128_bits_at_a_time_without_a_barrier(compiled):
    for kernel in ("grouped_gemv", "gemv_residual"):
        row = next(r for r in compiled[1][kernel] if r["halves"])
        streamed = [name for name in row["loads"] if ".EF" in name]
        assert streamed and all(".128" in name for name in streamed) and row["barriers"] == 0
        assert 1 < row["per_weight"] <= 3.3


def test_many_tokens_meet_weights_on_tensor_cores(compiled):
    card, found = compiled
    for kernel in ("gemm", "paged_prefill") if card > 75 else ():
        assert all(row["tensor_core"] for row in found[kernel])


@pytest.mark.slow
def test_no_size_that_tuning_may_pick_spills(tmp_path):
    """On the youngest card, whose compiler spilled first when sizes were chosen."""
    assert compile_kernels(tmp_path, "--cards", 120, "--candidates").count("gemm") > 20


def test_the_rules_name_what_they_find():
    from benchmarks.gpu import sass

    good = sass.Facts(
        "decode",
        "grouped_gemv",
        86,
        4,
        56,
        0,
        0,
        8,
        700,
        176,
        2.75,
        {"LDG.E.EF.128": 2},
        0,
        0,
        halves=True,
        float32=False,
    )
    assert sass.broken(good) == []
    changes = {
        "spills": 2, "shared_bytes": 1 << 17, "barriers": 1, "loads": {"LDG.E.EF": 8}, "per_weight": 3.4,
    }  # fmt: skip
    for name, value in changes.items():
        assert len(sass.broken(replace(good, **{name: value}))) == 1
    tiles = replace(good, kernel="gemm", halves=False)
    assert sass.broken(tiles) == ["no tensor cores"] and sass.broken(replace(tiles, card=75)) == []
    assert sass.parse(
        ".L_x_1:\n /*0000*/ LDG.E.EF.128 R4 ;\n /*0010*/ FADD R1 ;\n /*0020*/ FADD R2 ;\n /*0030*/ @P0 BRA `(.L_x_1) ;"
    )[1] == [(0, 4)]


def test_a_summary_counts_what_spills_and_keeps_the_most():
    from benchmarks.gpu import sass

    one = sass.Facts("decode", "append_kv", 80, 4, 40, 0, 0, 64, 9, 0, None, {}, 0, 0, False, False)
    rows = [
        one,
        replace(one, registers=90, spills=2),
        replace(one, stack_bytes=8, shared_bytes=0),
        replace(one, card=90),
    ]
    first, second = sass.summary(rows)
    assert first == {
        "card": 80, "kernel": "append_kv", "compiled": 3, "spill": 2, "registers": 90, "shared_bytes": 64
    }  # fmt: skip
    assert second["card"] == 90 and second["compiled"] == 1 and second["spill"] == 0
