"""Sizes of kernels: shipped, kept, or timed by a timer that is made up here. That all give the same results, interpreted."""

import json
import math
import os
import threading
import time
from dataclasses import asdict, replace

import pytest
import torch

from neox_lite import user_cache
from neox_lite.errors import ArgumentError
from neox_lite.kernels.triton import tile_configs, tuning
from neox_lite.kernels.triton.tile_configs import Candidates, Machine, Page

KNOWN, UNKNOWN = Machine((8, 6)), Machine((10, 3))
CARD = tuning.Card("RTX 6090", "10.3", "600.1", "3.9.0")
PAGES = Candidates("page", "heads", (Page(8), Page(4, 2), Page(16, 8)))
OTHERS = Candidates("page", "other heads", (Page(8), Page(4, 2)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEOX_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NEOX_LITE_TUNE", raising=False)


class Bench:
    """Times launches by a table of seconds by lanes; counts them, and hears what is reported."""

    def __init__(self, seconds=None):
        self.seconds, self.launched, self.said = seconds or {8: 3.0, 4: 2.0, 16: 1.0}, [], []

    def launch(self, tile):
        self.launched.append(tile)

    def timer(self, launch):
        launch()
        found = self.seconds[self.launched[-1].lanes]
        if isinstance(found, Exception):
            raise found
        return found

    def tuning(self, machine=UNKNOWN, card=CARD, **options):
        return tuning.Tuning(machine, lambda: card, self.timer, report=self.said.append, **options)


# Choosing -------------------------------------------------------------------------------------------------------------


def test_a_card_of_a_known_class_takes_what_is_shipped_and_times_nothing():
    bench = Bench()
    assert bench.tuning(KNOWN).pick(PAGES, bench.launch) == Page(8)
    assert bench.launched == bench.said == [] and not user_cache.folder().exists()


def test_a_choice_is_made_once(monkeypatch):
    bench = Bench()
    here = bench.tuning(KNOWN)
    first = here.pick(PAGES, bench.launch)
    monkeypatch.setattr(here, "_decide", None)  # no launch pays for it again
    assert here.pick(PAGES, bench.launch) == first


def test_an_unknown_card_takes_the_fastest_and_the_next_start_finds_it():
    bench = Bench()
    first = bench.tuning()
    assert first.pick(PAGES, bench.launch) == Page(16, 8) == first.pick(PAGES, bench.launch)
    assert bench.launched == list(PAGES.tiles)
    assert bench.tuning().pick(PAGES, bench.launch) == Page(16, 8) and len(bench.launched) == 3
    assert [f.name for f in user_cache.folder().iterdir()] == ["tuning.json"]


def test_what_is_going_on_is_said():
    bench = Bench()
    bench.tuning().pick(PAGES, bench.launch)
    began, done = bench.said
    assert "timing sizes of kernels on RTX 6090, once: at most 60 s; NEOX_LITE_TUNE=never" in began
    assert done == "page, heads: number 3 of 3, 67% less time"


@pytest.mark.parametrize("change", [{"name": "RTX 6080"}, {"driver": "600.2"}, {"triton": "3.10"}, {"neox_lite": "9"}])
def test_another_card_driver_or_version_is_timed_anew_and_both_are_kept(change):
    bench = Bench()
    bench.tuning().pick(PAGES, bench.launch)
    bench.tuning(card=replace(CARD, **change)).pick(PAGES, bench.launch)
    assert len(bench.launched) == 6
    for card in (CARD, replace(CARD, **change)):
        assert bench.tuning(card=card).pick(PAGES, bench.launch) == Page(16, 8) and len(bench.launched) == 6


def test_what_was_timed_on_a_card_of_a_known_class_is_used_there_too():
    bench = Bench()
    bench.tuning(KNOWN, when="always").pick(PAGES, bench.launch)
    later = bench.tuning(KNOWN)
    assert later.pick(PAGES, bench.launch) == Page(16, 8) and later.pick(OTHERS, bench.launch) == Page(8)
    assert len(bench.launched) == 3


def test_a_lead_within_noise_changes_nothing():
    bench = Bench({8: 1.0, 4: 0.99, 16: 0.985})
    assert bench.tuning().pick(PAGES, bench.launch) == Page(8)
    assert bench.said[-1] == "page, heads: the shipped size, of 3"


def test_a_size_that_the_card_cannot_run_is_passed_over():
    triton = pytest.importorskip("triton", reason="triton is not installed")
    refused = triton.runtime.errors.OutOfResources(200, 100, "shared memory")
    bench = Bench({8: refused, 4: 2.0, 16: refused})
    assert bench.tuning().pick(PAGES, bench.launch) == Page(4, 2)
    none = Bench({8: refused, 4: refused})
    assert none.tuning().pick(OTHERS, none.launch) == Page(8)  # which then says itself what it lacks


def test_a_size_that_the_compiler_breaks_on_is_passed_over():
    bench = Bench({8: 2.0, 4: RuntimeError("PassManager::run failed"), 16: 1.0})
    assert bench.tuning().pick(PAGES, bench.launch) == Page(16, 8)


def test_any_other_fault_is_nobody_s_to_hide():
    bench = Bench({8: RuntimeError("an illegal memory access")})
    with pytest.raises(RuntimeError, match="illegal"):
        bench.tuning().pick(PAGES, bench.launch)


def test_nothing_is_timed_while_launches_are_recorded_but_later():
    bench, recording = Bench(), [True]
    here = bench.tuning(busy=lambda: recording[0])
    assert here.pick(PAGES, bench.launch) == Page(8) and bench.launched == []
    recording[0] = False
    assert here.pick(PAGES, bench.launch) == Page(16, 8)


def test_a_launch_that_is_not_typical_decides_nothing():
    bench = Bench()
    here = bench.tuning()
    assert here.pick(PAGES, None) == Page(8) and not user_cache.folder().exists()
    assert here.pick(PAGES, bench.launch) == Page(16, 8) == here.pick(PAGES, None)


def test_time_is_bounded_and_the_next_start_goes_on():
    bench = Bench()
    here = bench.tuning(limit_s=0.0)
    assert here.pick(PAGES, bench.launch) == Page(8) == here.pick(PAGES, bench.launch) and len(bench.launched) == 1
    assert here.pick(OTHERS, bench.launch) == Page(8) and len(bench.launched) == 1
    assert "used up after 0 s; the next start goes on" in bench.said[-1] and not user_cache.folder().exists()
    assert bench.tuning().pick(PAGES, bench.launch) == Page(16, 8)


def test_a_card_without_room_to_time_runs_with_the_shipped_sizes():
    bench = Bench({8: 1.0, 4: torch.OutOfMemoryError("CUDA out of memory")})
    here = bench.tuning()
    assert here.pick(PAGES, bench.launch) == Page(8) and here.pick(OTHERS, bench.launch) == Page(8)
    assert "too little memory" in bench.said[-1] and len(bench.said) == 2


@pytest.mark.parametrize(("when", "known", "timed"), [("never", False, 0), ("always", True, 3), ("auto", False, 3)])
def test_the_variable_says_when(monkeypatch, when, known, timed):
    monkeypatch.setenv("NEOX_LITE_TUNE", when)
    bench = Bench()
    bench.tuning(KNOWN if known else UNKNOWN, when=tuning.when()).pick(PAGES, bench.launch)
    assert len(bench.launched) == timed
    monkeypatch.setenv("NEOX_LITE_TUNE", "yes")
    with pytest.raises(ArgumentError, match="NEOX_LITE_TUNE is 'yes', expected auto, always or never"):
        tuning.when()


def test_renewing_times_everything_anew():
    bench = Bench()
    here = bench.tuning(KNOWN, when="always")
    here.pick(PAGES, bench.launch)
    bench.seconds = {8: 3.0, 4: 1.0, 16: 2.0}
    here.renew()
    assert here.pick(PAGES, bench.launch) == Page(4, 2) and len(bench.launched) == 6
    assert bench.tuning(KNOWN).pick(PAGES, bench.launch) == Page(4, 2) and len(bench.launched) == 6


def test_threads_that_ask_at_once_time_once():
    bench, found, timer = Bench(), [], Bench.timer
    here = bench.tuning()
    here._timer = lambda launch: time.sleep(0.02) or timer(bench, launch)  # long enough for the others to come
    threads = [threading.Thread(target=lambda: found.append(here.pick(PAGES, bench.launch))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [Page(16, 8)] * 8 and len(bench.launched) == 3


# The file -------------------------------------------------------------------------------------------------------------


def spoiled(*path, to):
    found = json.loads((user_cache.folder() / "tuning.json").read_text())
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return json.dumps(found)


CHOICE = ("cards", 0, "choices", "page: heads")


@pytest.mark.parametrize(
    "text",
    [
        lambda: "",
        lambda: "\0\xff",
        lambda: "null",
        lambda: "[1]",
        lambda: "[" * 100_000,
        lambda: " " * (5 << 20),
        lambda: '{"profiles": []}',
        lambda: '{"cards": 7}',
        lambda: '{"cards": [7]}',
        lambda: (user_cache.folder() / "tuning.json").read_text()[:-30],
        lambda: spoiled("cards", 0, "choices", to=[]),
        lambda: spoiled(*CHOICE, to=None),
        lambda: spoiled(*CHOICE, "tile", to="large"),
        lambda: spoiled(*CHOICE, "tile", "lanes", to=True),
        lambda: spoiled(*CHOICE, "tile", "lanes", to=1.5),
        lambda: spoiled(*CHOICE, "saved", to=float("nan")),
        lambda: spoiled(*CHOICE, "timed", to=[2]),
    ],
)
def test_a_file_that_makes_no_sense_is_said_in_a_line_and_replaced(text):
    bench = Bench()
    bench.tuning().pick(PAGES, bench.launch)
    (user_cache.folder() / "tuning.json").write_text(text(), encoding="utf-8")
    bench.said.clear()
    assert bench.tuning().pick(PAGES, bench.launch) == Page(16, 8) and len(bench.launched) == 6
    complaint = bench.said[0]
    assert complaint.startswith(f"{user_cache.folder() / 'tuning.json'} is not used: ")
    assert "\n" not in complaint and len(complaint) < 300
    assert bench.tuning().pick(PAGES, bench.launch) == Page(16, 8) and len(bench.launched) == 6


@pytest.mark.parametrize("tile", [{"lanes": 7, "warps": 4}, {"lanes": 16}, {}, {"lanes": 1 << 40, "warps": 8, "x": 1}])
def test_a_kept_size_that_is_no_candidate_is_not_used(tile):
    bench = Bench()
    bench.tuning().pick(PAGES, bench.launch)
    (user_cache.folder() / "tuning.json").write_text(spoiled(*CHOICE, "tile", to=tile))
    assert bench.tuning().pick(PAGES, bench.launch) == Page(16, 8) and len(bench.launched) == 6


def test_choices_of_two_processes_are_both_kept():
    bench = Bench()
    one, other = bench.tuning(), bench.tuning()
    assert one.kept == other.kept == {}
    one.pick(PAGES, bench.launch)
    other.pick(OTHERS, bench.launch)
    assert set(bench.tuning().kept) == {"page: heads", "page: other heads"}


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEOX_LITE_CACHE", str(tmp_path / "file"))
    bench = Bench()
    here = bench.tuning()
    assert here.pick(PAGES, bench.launch) == Page(16, 8)  # timed, so used
    assert here.pick(OTHERS, bench.launch) == Page(8)
    assert "cannot be kept, so no more are timed" in bench.said[-1]


def test_where_files_are_kept(monkeypatch, tmp_path):
    assert user_cache.folder() == tmp_path / "cache"
    monkeypatch.delenv("NEOX_LITE_CACHE")
    assert user_cache.folder().parts[-1] == "neox-lite" and str(user_cache.folder()).startswith(
        os.environ["XDG_CACHE_HOME"]
    )
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    if os.name != "nt":
        assert user_cache.folder() == tmp_path / ".cache" / "neox-lite"


# Why ------------------------------------------------------------------------------------------------------------------


def test_it_says_what_is_used_and_why():
    bench = Bench()
    assert bench.tuning(KNOWN).why() == "all as shipped for RTX 30, A10, A40"
    assert "timed on first use (no choices are shipped for its class)" in bench.tuning().why()
    assert "its class is unknown, and NEOX_LITE_TUNE is never" in bench.tuning(when="never").why()
    bench.tuning().pick(PAGES, bench.launch)
    told = bench.tuning(KNOWN).why()
    assert told.startswith("1 timed on this card, kept in ") and told.endswith("others as shipped for RTX 30, A10, A40")


def test_doctor_tells_it_and_times_anew_when_it_measures(monkeypatch, capsys):
    from neox_lite.offload import profile
    from neox_lite.offload.plan import HardwareProfile, Rates
    from neox_lite_app import doctor
    from neox_lite_app.cli import main

    bench, device = Bench(), torch.device("cuda", 0)
    here = bench.tuning(KNOWN)
    monkeypatch.setattr(doctor, "cards", lambda: [device])
    monkeypatch.setattr(tuning, "of", lambda found: here)
    rates = HardwareProfile(Rates(2e10, 3e11), None, 400 << 20, None)
    monkeypatch.setattr(profile, "_measured", lambda progress: here.pick(PAGES, bench.launch) and rates)
    assert main(["doctor"]) == 0 and bench.launched == []
    assert "kernels  on cuda:0: all as shipped for RTX 30" in capsys.readouterr().out
    assert main(["doctor", "--measure", "--json"]) == 0 and len(bench.launched) == 3
    told = json.loads(capsys.readouterr().out)["gpu_kernels"]["cuda:0"]
    assert "1 timed on this card" in told["why"] and told["timed"]["page: heads"]["tile"] == {"lanes": 16, "warps": 8}

    def refuse(device):
        raise ArgumentError("NEOX_LITE_TUNE is 'yes'")

    monkeypatch.setattr(tuning, "of", refuse)
    assert main(["doctor"]) == 0 and "NEOX_LITE_TUNE is 'yes'" in capsys.readouterr().out


def test_the_driver_s_version_is_read_where_the_system_tells_it(monkeypatch, tmp_path):
    tuning.driver.cache_clear()
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)\nGCC version: 12"
    monkeypatch.setattr(tuning.Path, "read_text", lambda self, **options: text)
    assert tuning.driver() == "570.86.15"
    tuning.driver.cache_clear()
    monkeypatch.setattr(tuning.Path, "read_text", lambda self, **options: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tuning.driver() == "unknown"
    tuning.driver.cache_clear()


# Candidates -----------------------------------------------------------------------------------------------------------

HALF = torch.float16
ROWS = [
    tile_configs.rows(Machine(capability), size, words, bits, inner, tokens, math)
    for capability in (*tile_configs.SHIPPED, (10, 0))
    for size, words in ((43008, (768,)), (6144, (768, 3072)), (768, (96,)), (2560, (320, 1280)))
    for bits, inner, math in ((4, 16, "halves"), (8, 32, "float16"), (4, 4, "float32"), (0, 1, "float16"))
    for tokens in (1, 2, 7)
]
TILES = [
    tile_configs.tiles(size, 6144, tokens, bits, dtype)
    for size in (768, 43008)
    for tokens in (3, 17, 33, 200)
    for bits in (4, 8)
    for dtype in (HALF, torch.bfloat16)
]
BLOCKS = [tile_configs.blocks(Machine(c), dim, True, HALF) for c in tile_configs.SHIPPED for dim in (64, 96, 256)]
PAGE_SIZES = [tile_configs.page(piece, True, HALF) for piece in (16, 32, 128, 256)]


@pytest.mark.parametrize("every", [ROWS, TILES, BLOCKS, PAGE_SIZES], ids=["rows", "tiles", "blocks", "page"])
def test_a_kernel_has_two_to_six_different_candidates_of_powers_of_two(every):
    for candidates in every:
        assert 2 <= len(candidates.tiles) <= 6 == tile_configs.MOST and len(set(candidates.tiles)) == len(
            candidates.tiles
        )
        for tile in candidates.tiles:
            sizes = [value for name, value in asdict(tile).items() if name not in ("registers", "stages")]
            assert all(value & (value - 1) == 0 and value > 0 for value in sizes)


def test_a_thread_loads_16_bytes_of_a_row_in_every_candidate():
    for candidates in ROWS:
        per = 4 if candidates.shape.startswith("int") else 8
        for tile in candidates.tiles:
            assert tile.lanes * tile.groups * tile.inner == per * 32 * tile.warps


def test_shapes_of_a_class_share_their_candidates():
    by_shape = {}
    for candidates in ROWS:
        by_shape.setdefault(candidates.shape, set()).add(candidates.tiles[1:])
    assert tile_configs.tiles(43008, 6144, 3, 4, HALF).shape == tile_configs.tiles(40000, 5120, 9, 4, HALF).shape
    assert tile_configs.tiles(43008, 6144, 3, 4, HALF).shape != tile_configs.tiles(6144, 6144, 3, 4, HALF).shape
    assert len(by_shape) > 20


def test_large_products_of_one_token_are_cut_otherwise_on_cards_short_of_instructions():
    here, there = (tile_configs.rows(Machine(c), 43008, (768,), 4, 16, 1, "halves").tiles[0] for c in ((9, 0), (8, 6)))
    assert (here.rows, there.rows) == (4, 2) and replace(here, rows=2) == there
    assert tile_configs.rows(Machine((9, 0)), 6144, (768,), 4, 16, 1, "halves").tiles[0].rows == 2


# Results --------------------------------------------------------------------------------------------------------------


class Nth:
    """Picks the nth candidate of every choice."""

    def __init__(self, nth):
        self.nth, self.seen = nth, set()

    def pick(self, candidates, launch):
        tile = candidates.tiles[self.nth % len(candidates.tiles)]
        self.seen.add((candidates.kernel, tile))
        return tile


@pytest.fixture
def checks():
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks.gpu import checks

    return checks


@pytest.mark.parametrize("nth", range(tile_configs.MOST))
def test_every_candidate_is_within_the_kernel_s_bounds(checks, nth):
    from neox_lite.kernels import triton
    from neox_lite.kernels.triton.operations import Operations

    device, picks = torch.device("cpu" if triton.interpreted() else "cuda"), Nth(nth)
    ops = Operations(False, lambda device: Machine((8, 0)), lambda device: picks)
    here = checks.Checks("triton", ops, HALF, device)
    verdicts = [
        *(here.product(f, 32, 384, tokens, 40) for f, tokens in (("int4", 1), ("int4", 2), ("int8", 1))),
        here.product("int4", 32, 160, 3, 40),
        here.product("dense", 0, 384, 1, 40),
        *(here.product("int4", 32, 160, tokens, 40) for tokens in (17, 40, 70)),
        here.attention(32, torch.int8, (130,)),
    ]
    assert all(verdict["ok"] for verdict in verdicts), [v for v in verdicts if not v["ok"]]
    assert {kernel for kernel, _ in picks.seen} == {"rows", "tiles", "blocks", "page"}


def test_candidates_that_keep_a_row_in_a_warp_give_the_same_bits(checks):
    from neox_lite.kernels import triton
    from neox_lite.kernels.triton.operations import Operations

    device = torch.device("cpu" if triton.interpreted() else "cuda")
    weight = checks.Checks("triton", None, HALF, device).weight("int4", 32, 43, 2048, 1)
    x, found = torch.randn(1, 2048, generator=torch.Generator().manual_seed(0)).half().to(device), {}
    for nth in range(tile_configs.MOST):
        picks = Nth(nth)
        ops = Operations(False, lambda device: Machine((8, 0)), lambda device, picks=picks: picks)
        inputs = ops.layer_norms(x, [(torch.ones_like(x[0]), torch.zeros_like(x[0]), 1e-5)], [weight])
        (y,) = ops.grouped_linear(inputs, [weight], [None], [None], [None])
        ((_, tile),) = picks.seen
        found.setdefault(tile.groups * tile.inner, []).append(y)
    assert sorted(map(len, found.values())) == [1, 5]
    for results in found.values():
        assert all(torch.equal(y, results[0]) for y in results)


def test_nothing_is_timed_in_the_interpreter_or_for_cards_that_are_not_there():
    here = tuning.of(torch.device("meta"))
    assert not here.times and here is tuning.of(torch.device("meta"))
    assert here.pick(PAGES, lambda tile: math.nan) == Page(8)
