"""Sizes of kernels: shipped, kept, or timed by a timer that is made up here. That all give the same results, interpreted."""

import json
import math
import threading
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from neox_lite import user_cache
from neox_lite.errors import ArgumentError
from neox_lite.kernels.triton import tile_configs, tuning
from neox_lite.kernels.triton.device import DeviceProperties
from neox_lite.kernels.triton.tile_configs import Candidates, DecodeTile

CARD, CLASS = "RTX 6090 (10.3), Triton 3.9.0, neox-lite 1", "RTX 30, A10, A40"
PAGES = Candidates("decode: heads", (DecodeTile(8), DecodeTile(4, 2), DecodeTile(16, 8)))
OTHERS = Candidates("decode: other heads", (DecodeTile(8), DecodeTile(4, 2)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEOX_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NEOX_LITE_TUNE", raising=False)


class Bench:
    """Times launches by a table of seconds by block_n; counts them, and hears what is reported."""

    def __init__(self, seconds=None):
        self.seconds, self.launched, self.reported = seconds or {8: 3.0, 4: 2.0, 16: 1.0}, [], []

    def launch(self, tile):
        self.launched.append(tile)

    def timer(self, launch):
        launch()
        found = self.seconds[self.launched[-1].block_n]
        if isinstance(found, Exception):
            raise found
        return found

    def tuner(self, shipped=None, card=CARD, **options):
        return tuning.Tuner(card, shipped, self.timer, report=self.reported.append, **options)

    def pick(self, *args, candidates=PAGES, **options):
        """What a new process takes."""
        return self.tuner(*args, **options).pick(candidates, self.launch)


def kept_file():
    return user_cache.folder() / "tuning.json"


# Choosing -------------------------------------------------------------------------------------------------------------


def test_a_card_of_a_known_class_takes_what_is_shipped_and_times_nothing():
    bench = Bench()
    assert bench.pick(CLASS) == DecodeTile(8)
    assert bench.launched == bench.reported == [] and not kept_file().exists()


def test_an_unknown_card_takes_the_fastest_once_and_the_next_start_finds_it(monkeypatch):
    bench = Bench()
    first = bench.tuner()
    assert first.pick(PAGES, bench.launch) == DecodeTile(16, 8) and bench.launched == list(PAGES.tiles)
    monkeypatch.setattr(first, "_lock", None)  # no launch pays for it again
    assert first.pick(PAGES, bench.launch) == DecodeTile(16, 8)
    began, done = bench.reported
    assert began == f"timing sizes of kernels on {CARD}, once: at most 60 s; NEOX_LITE_TUNE=never leaves it out"
    assert done == "decode: heads: number 3, 67% less time, of 3"
    assert bench.pick() == DecodeTile(16, 8) and len(bench.launched) == 3
    assert [f.name for f in user_cache.folder().iterdir()] == ["tuning.json"]


def test_another_card_or_version_is_timed_anew_and_both_are_kept():
    bench = Bench()
    for card in (CARD, "another card"):
        bench.pick(card=card)
    assert len(bench.launched) == 6
    assert (
        all(bench.pick(card=card) == DecodeTile(16, 8) for card in (CARD, "another card")) and len(bench.launched) == 6
    )


def test_what_was_timed_on_a_card_of_a_known_class_is_used_there_too():
    bench = Bench()
    bench.pick(CLASS, when="always")
    later = bench.tuner(CLASS)
    assert later.pick(PAGES, bench.launch) == DecodeTile(16, 8) and later.pick(OTHERS, bench.launch) == DecodeTile(8)
    assert len(bench.launched) == 3


def test_a_lead_within_noise_changes_nothing():
    bench = Bench({8: 1.0, 4: 0.99, 16: 0.985})
    assert bench.pick() == DecodeTile(8) and bench.reported[-1] == "decode: heads: the shipped size, of 3"


def test_a_size_that_the_card_or_the_compiler_cannot_do_is_passed_over_and_no_other_fault_is_hidden():
    triton = pytest.importorskip("triton", reason="triton is not installed")
    refused = triton.runtime.errors.OutOfResources(200, 100, "shared memory")
    broken = RuntimeError("PassManager::run failed")
    assert Bench({8: refused, 4: 2.0, 16: broken}).pick() == DecodeTile(4, 2)
    assert Bench({8: refused, 4: refused}).pick(candidates=OTHERS) == DecodeTile(
        8
    )  # which then says itself what it lacks
    with pytest.raises(RuntimeError, match="illegal"):
        Bench({8: RuntimeError("an illegal memory access")}).pick(card="another")


def test_nothing_is_timed_while_launches_are_captured_or_are_not_typical_but_later():
    bench, capturing = Bench(), [True]
    here = bench.tuner(busy=lambda: capturing[0])
    assert here.pick(PAGES, bench.launch) == DecodeTile(8) and bench.launched == []
    capturing[0] = False
    assert here.pick(PAGES, None) == DecodeTile(8) and bench.launched == [] and not kept_file().exists()
    assert here.pick(PAGES, bench.launch) == DecodeTile(16, 8) == here.pick(PAGES, None)


def test_time_is_bounded_and_the_next_start_goes_on():
    bench = Bench()
    here = bench.tuner(limit_s=0.0)
    assert (
        here.pick(PAGES, bench.launch) == DecodeTile(8) == here.pick(PAGES, bench.launch) and len(bench.launched) == 1
    )
    assert here.pick(OTHERS, bench.launch) == DecodeTile(8) and len(bench.launched) == 1
    assert bench.reported[-1] == "0 s are used up; the next start goes on with it" and not kept_file().exists()
    assert bench.pick() == DecodeTile(16, 8)


def test_a_card_without_room_to_time_runs_with_the_shipped_sizes():
    bench = Bench({8: 1.0, 4: torch.OutOfMemoryError("CUDA out of memory")})
    here = bench.tuner()
    assert here.pick(PAGES, bench.launch) == DecodeTile(8) and here.pick(OTHERS, bench.launch) == DecodeTile(8)
    assert "too little memory" in bench.reported[-1] and len(bench.reported) == 2


@pytest.mark.parametrize(("when", "shipped", "timed"), [("never", None, 0), ("always", CLASS, 3), ("auto", None, 3)])
def test_the_variable_names_when(monkeypatch, when, shipped, timed):
    monkeypatch.setenv("NEOX_LITE_TUNE", when)
    bench = Bench()
    bench.pick(shipped, when=tuning.when())
    assert len(bench.launched) == timed
    monkeypatch.setenv("NEOX_LITE_TUNE", "yes")
    with pytest.raises(ArgumentError, match="NEOX_LITE_TUNE is 'yes', expected auto, always or never"):
        tuning.when()


def test_renewing_times_everything_anew():
    bench = Bench()
    here = bench.tuner(CLASS, when="always")
    here.pick(PAGES, bench.launch)
    bench.seconds = {8: 3.0, 4: 1.0, 16: 2.0}
    here.renew()
    assert here.pick(PAGES, bench.launch) == DecodeTile(4, 2) and len(bench.launched) == 6
    assert bench.pick(CLASS) == DecodeTile(4, 2) and len(bench.launched) == 6


def test_threads_that_ask_at_once_time_once():
    bench, found, timer = Bench(), [], Bench.timer
    here = bench.tuner()
    here.timer = lambda launch: time.sleep(0.02) or timer(bench, launch)  # long enough for the others to come
    threads = [threading.Thread(target=lambda: found.append(here.pick(PAGES, bench.launch))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [DecodeTile(16, 8)] * 8 and len(bench.launched) == 3


# The file -------------------------------------------------------------------------------------------------------------


def with_tile(tile):
    return json.dumps({CARD: {"decode: heads": {"tile": tile, "saved": 0.5, "timed": 3}}})


@pytest.mark.parametrize("text", ["", "\0\xff", "null", "[1]", "[" * 100_000, " " * (5 << 20), '{"cards": 7}', "cut"])
def test_a_file_that_makes_no_sense_is_named_in_a_line_and_replaced(text):
    bench = Bench()
    bench.pick()
    kept_file().write_text(kept_file().read_text()[:-30] if text == "cut" else text, encoding="utf-8")
    bench.reported.clear()
    assert bench.pick() == DecodeTile(16, 8) and len(bench.launched) == 6
    complaint = bench.reported[0]
    assert complaint.startswith("tuning.json is not used: ") and "\n" not in complaint and len(complaint) < 300
    assert bench.pick() == DecodeTile(16, 8) and len(bench.launched) == 6


@pytest.mark.parametrize(
    "tile",
    [None, "large", {"block_n": 7, "num_warps": 4}, {"block_n": 16}, {}, {"block_n": 16, "num_warps": 8, "x": 1}],
)
def test_a_kept_size_that_is_no_candidate_is_not_used(tile):
    bench = Bench()
    bench.pick()
    kept_file().write_text(with_tile(tile))
    assert bench.pick() == DecodeTile(16, 8) and len(bench.launched) == 6


def test_choices_of_two_processes_are_both_kept():
    bench = Bench()
    one, other = bench.tuner(), bench.tuner()
    assert one.tuned == other.tuned == {}
    one.pick(PAGES, bench.launch)
    other.pick(OTHERS, bench.launch)
    assert set(bench.tuner().tuned) == {"decode: heads", "decode: other heads"}


def test_a_folder_that_cannot_be_written_is_named_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEOX_LITE_CACHE", str(tmp_path / "file"))
    bench = Bench()
    here = bench.tuner()
    assert here.pick(PAGES, bench.launch) == DecodeTile(16, 8)  # timed, so used
    assert here.pick(OTHERS, bench.launch) == DecodeTile(8)
    assert "cannot be kept, so no more are timed" in bench.reported[-1]


def test_doctor_names_what_is_used_and_why_and_times_anew_when_it_measures(monkeypatch, capsys):
    from neox_lite.offload import profile
    from neox_lite.offload.plan import HardwareProfile, Rates
    from neox_lite_app import doctor
    from neox_lite_app.cli import main

    bench = Bench()
    assert doctor.tuned(bench.tuner()) == "all are timed on first use (no choices are shipped for its class)"
    assert "its class is unknown, and NEOX_LITE_TUNE is never" in doctor.tuned(bench.tuner(when="never"))
    here = bench.tuner(CLASS)
    monkeypatch.setattr(doctor, "cards", lambda: [torch.device("cuda", 0)])
    monkeypatch.setattr(tuning, "tuner", lambda found: here)
    rates = HardwareProfile(Rates(2e10, 3e11), None, 400 << 20, None)
    monkeypatch.setattr(profile, "_measured", lambda progress: here.pick(PAGES, bench.launch) and rates)
    assert main(["doctor"]) == 0 and bench.launched == []
    assert "kernels  on cuda:0: all as shipped for RTX 30" in capsys.readouterr().out
    assert main(["doctor", "--measure", "--json"]) == 0 and len(bench.launched) == 3
    found = json.loads(capsys.readouterr().out)["gpu_kernels"]["cuda:0"]
    assert found["why"] == "1 timed on this card, kept in tuning.json; others are timed on first use (as asked)"
    assert found["timed"]["decode: heads"] == {"tile": {"block_n": 16, "num_warps": 8}, "saved": 1 - 1 / 3, "timed": 3}

    def refuse(device):
        raise ArgumentError("NEOX_LITE_TUNE is 'yes'")

    monkeypatch.setattr(tuning, "tuner", refuse)
    assert main(["doctor"]) == 0 and "NEOX_LITE_TUNE is 'yes'" in capsys.readouterr().out


@pytest.mark.parametrize(("capability", "shipped"), [((8, 6), CLASS), ((10, 3), None)])
def test_a_gpu_s_tuner_is_its_own_and_waits_for_captures(monkeypatch, capability, shipped):
    """As far as it goes without a GPU: the card, its class, and what times it, with memory given back and nothing captured."""
    testing = pytest.importorskip("triton.testing", reason="triton is not installed")
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    done = []

    def do_bench(launch, **options):
        assert tuning.CAPTURING.acquire(blocking=False)  # held by this thread already, which may enter again
        tuning.CAPTURING.release()
        done.append(launch())
        return 2.0  # ms

    monkeypatch.setattr(testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "device", lambda device: tuning.suppress())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    here = tuning.tuner.__wrapped__(torch.device("cuda", 0))
    assert here.card.startswith(f"a card ({capability[0]}.{capability[1]}), Triton ") and here.shipped == shipped
    assert here.enabled == (shipped is None)
    assert here.timer(lambda: "launched") == 2e-3 and done == ["launched", "emptied"]


def test_nothing_is_timed_in_the_interpreter_or_for_cards_that_are_not_there():
    here = tuning.tuner(torch.device("meta"))
    assert not here.enabled and here is tuning.tuner(torch.device("meta"))
    assert here.pick(PAGES, lambda tile: math.nan) == DecodeTile(8)


# Candidates -----------------------------------------------------------------------------------------------------------

HALF = torch.float16
CLASSES = [DeviceProperties(capability) for capability in tile_configs.SHIPPED]
ROWS = [
    tile_configs.gemv_tiles(device, size, words, bits, inner, tokens, math)
    for device in (*CLASSES, DeviceProperties((10, 0)))
    for size, words in ((43008, (768,)), (6144, (768, 3072)), (768, (96,)), (2560, (320, 1280)))
    for bits, inner, math in ((4, 16, "half2"), (8, 32, "float16"), (4, 4, "float32"), (0, 1, "float16"))
    for tokens in (1, 2, 7)
]
TILES = [
    tile_configs.gemm_tiles(size, 6144, tokens, bits, dtype)
    for size in (768, 43008)
    for tokens in (3, 17, 33, 200)
    for bits in (4, 8)
    for dtype in (HALF, torch.bfloat16)
]
BLOCKS = [tile_configs.prefill_tiles(device, dim, True, HALF) for device in CLASSES for dim in (64, 96, 256)]
PAGE_SIZES = [tile_configs.decode_tiles(piece, True, HALF) for piece in (16, 32, 128, 256)]


@pytest.mark.parametrize("every", [ROWS, TILES, BLOCKS, PAGE_SIZES], ids=["rows", "tiles", "blocks", "page"])
def test_a_kernel_has_two_to_six_different_candidates_of_powers_of_two(every):
    for candidates in every:
        assert 2 <= len(candidates.tiles) <= 6 == tile_configs.MAX_CANDIDATES
        assert len(set(candidates.tiles)) == len(candidates.tiles)
        for tile in candidates.tiles:
            sizes = [value for name, value in asdict(tile).items() if name not in ("maxnreg", "num_stages")]
            assert all(value & (value - 1) == 0 and value > 0 for value in sizes)


def test_a_thread_loads_16_bytes_of_a_row_in_every_candidate():
    for candidates in ROWS:
        per = 4 if candidates.key.startswith("gemv: int") else 8
        for tile in candidates.tiles:
            assert tile.block_n * tile.groups * tile.group_words == per * 32 * tile.num_warps


def test_shapes_of_a_class_share_their_choice_and_large_products_are_cut_by_the_class_of_the_card():
    few = tile_configs.gemm_tiles(43008, 6144, 3, 4, HALF)
    assert (
        few.key
        == tile_configs.gemm_tiles(40000, 5120, 9, 4, HALF).key
        != tile_configs.gemm_tiles(6144, 6144, 3, 4, HALF).key
    )
    assert len({candidates.key for candidates in ROWS}) > 20
    one_token = (43008, (768,), 4, 16, 1, "half2")
    here, there = (tile_configs.gemv_tiles(DeviceProperties(c), *one_token).tiles[0] for c in ((9, 0), (8, 6)))
    assert (here.unroll_n, there.unroll_n) == (4, 2) and replace(
        here, unroll_n=2
    ) == there  # 9.0 is short of instructions
    assert tile_configs.gemv_tiles(DeviceProperties((9, 0)), 6144, *one_token[1:]).tiles[0].unroll_n == 2


# Results --------------------------------------------------------------------------------------------------------------


class Nth:
    """Picks the nth candidate of every choice."""

    def __init__(self, nth):
        self.nth, self.seen = nth, set()

    def pick(self, candidates, launch):
        tile = candidates.tiles[self.nth % len(candidates.tiles)]
        self.seen.add((candidates.key.partition(":")[0], tile))
        return tile


@pytest.fixture
def kernels():
    """The kernels' checks, a device, and operations that take the nth candidates."""
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks.gpu.checks import Checks
    from neox_lite.kernels import triton as backend
    from neox_lite.kernels.triton.operations import Operations

    def of(picks):
        return Operations(False, lambda device: DeviceProperties((8, 0)), lambda device: picks)

    device = torch.device("cpu" if backend.interpreted() else "cuda")
    return SimpleNamespace(of=of, device=device, checks=lambda ops: Checks("triton", ops, HALF, device))


@pytest.mark.parametrize("nth", range(tile_configs.MAX_CANDIDATES))
def test_every_candidate_is_within_the_kernel_s_bounds(kernels, nth):
    picks = Nth(nth)
    here = kernels.checks(kernels.of(picks))
    verdicts = [
        *(here.product(f, 32, 384, tokens, 40) for f, tokens in (("int4", 1), ("int4", 2), ("int8", 1))),
        here.product("int4", 32, 160, 3, 40),
        here.product("dense", 0, 384, 1, 40),
        *(here.product("int4", 32, 160, tokens, 40) for tokens in (17, 40, 70)),
        here.attention(32, torch.int8, (130,)),
    ]
    assert all(verdict["ok"] for verdict in verdicts), [v for v in verdicts if not v["ok"]]
    assert {kernel for kernel, _ in picks.seen} == {"gemv", "gemm", "prefill", "decode"}


def test_candidates_that_keep_a_row_in_a_warp_give_the_same_bits(kernels):
    weight = kernels.checks(None).weight("int4", 32, 43, 2048, 1)
    x = torch.randn(1, 2048, generator=torch.Generator().manual_seed(0)).half().to(kernels.device)
    found = {}
    for nth in range(tile_configs.MAX_CANDIDATES):
        picks = Nth(nth)
        ops = kernels.of(picks)
        inputs = ops.layer_norms(x, [(torch.ones_like(x[0]), torch.zeros_like(x[0]), 1e-5)], [weight])
        (y,) = ops.grouped_linear(inputs, [weight], [None], [None], [None])
        ((_, tile),) = picks.seen
        found.setdefault(tile.groups * tile.group_words, []).append(y)
    assert sorted(map(len, found.values())) == [1, 5]
    for results in found.values():
        assert all(torch.equal(y, results[0]) for y in results)
