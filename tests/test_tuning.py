"""Sizes of kernels: shipped, kept, or timed by a timer that is made up here. That all give the same results, interpreted."""

import itertools
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from neox_lite import user_cache
from neox_lite.errors import ArgumentError
from neox_lite.kernels.triton import tile_configs, tuning
from neox_lite.kernels.triton.device import DeviceProperties
from neox_lite.kernels.triton.tile_configs import Candidates, DecodeTile
from neox_lite.offload import profile
from neox_lite.offload.plan import HardwareProfile, Rates
from neox_lite_app import doctor

CARD, CLASS = "RTX 6090 (10.3), Triton 3.9.0, neox-lite 1", "RTX 30, A10, A40"
SHIPPED, HALF, BEST = DecodeTile(8), DecodeTile(4, 2), DecodeTile(16, 8)
PAGES = Candidates("decode: heads", (SHIPPED, HALF, BEST))
OTHERS = Candidates("decode: other heads", (SHIPPED, HALF))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEOX_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NEOX_LITE_TUNE", raising=False)


class Bench:
    """Times launches by a table of seconds, or faults, by block_n; counts them, and hears what is reported."""

    def __init__(self, seconds=None):
        self.seconds, self.launched, self.reported = seconds or {8: 3.0, 4: 2.0, 16: 1.0}, [], []

    def launch(self, tile):
        self.launched.append(tile)

    def timer(self, launch):
        launch()
        found = self.seconds[self.launched[-1].block_n]
        if found == "too large":
            errors = pytest.importorskip("triton.runtime.errors", reason="triton is not installed")
            found = errors.OutOfResources(200, 100, "shared memory")
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


USUAL, UNKNOWN, KNOWN = {8: 3.0, 4: 2.0, 16: 1.0}, {}, {"shipped": CLASS}


@pytest.mark.parametrize(("seconds", "options", "picked", "timed", "report"), [
    (USUAL, KNOWN, SHIPPED, 0, None),
    (USUAL, UNKNOWN, BEST, 3, "number 3, 67% less time, of 3"),
    (USUAL, UNKNOWN | {"when": "never"}, SHIPPED, 0, None),
    (USUAL, KNOWN | {"when": "always"}, BEST, 3, "number 3, 67% less time, of 3"),
    # A lead within noise changes nothing.
    ({8: 1.0, 4: 0.99, 16: 0.985}, UNKNOWN, SHIPPED, 3, "the shipped size, of 3"),
    # What the card or the compiler cannot do is passed over; where it can do none, the launch says what it lacks.
    ({8: "too large", 4: 2.0, 16: RuntimeError("PassManager::run failed")}, UNKNOWN, HALF, 3, "number 2, 0% less time, of 3"),
    (dict.fromkeys((8, 4, 16), "too large"), UNKNOWN, SHIPPED, 3, "the shipped size, of 3"),
], ids=["known", "unknown", "never", "always", "noise", "faults", "nothing works"])  # fmt: skip
def test_a_card_takes_what_is_shipped_or_the_fastest_and_the_next_start_finds_it(
    seconds, options, picked, timed, report
):
    bench = Bench(seconds)
    assert bench.pick(**options) == picked and len(bench.launched) == timed
    began = f"timing sizes of kernels on {CARD}, once: at most 60 s; NEOX_LITE_TUNE=never leaves it out"
    assert bench.reported == ([began, f"decode: heads: {report}"] if timed else [])
    assert user_cache.folder().is_dir() == bool(timed)
    assert not timed or [f.name for f in user_cache.folder().iterdir()] == ["tuning.json"]
    later = bench.tuner(CLASS)  # uses what was timed, though it would time nothing
    assert later.pick(PAGES, bench.launch) == picked and later.pick(OTHERS, bench.launch) == SHIPPED
    assert len(bench.launched) == timed


def test_no_other_fault_is_hidden():
    with pytest.raises(RuntimeError, match="illegal"):
        Bench({8: RuntimeError("an illegal memory access")}).pick()


def test_no_launch_pays_for_a_choice_again(monkeypatch):
    bench = Bench()
    here = bench.tuner()
    assert here.pick(PAGES, bench.launch) == BEST and bench.launched == list(PAGES.tiles)
    monkeypatch.setattr(here, "_lock", None)
    assert here.pick(PAGES, bench.launch) == BEST


def test_another_card_or_version_is_timed_anew_and_both_are_stored():
    bench = Bench()
    for card, launched in ((CARD, 3), ("another card", 6), (CARD, 6), ("another card", 6)):
        assert bench.pick(card=card) == BEST and len(bench.launched) == launched


def test_nothing_is_timed_while_launches_are_captured_or_are_not_typical_but_later():
    bench, capturing = Bench(), [True]
    here = bench.tuner(busy=lambda: capturing[0])
    assert here.pick(PAGES, bench.launch) == SHIPPED and bench.launched == []
    capturing[0] = False
    assert here.pick(PAGES, None) == SHIPPED and bench.launched == [] and not kept_file().exists()
    assert here.pick(PAGES, bench.launch) == BEST == here.pick(PAGES, None)


@pytest.mark.parametrize(("seconds", "limit_s", "launched", "report"), [
    (USUAL, 0.0, 1, "0 s are used up; the next start goes on with it"),
    ({8: 1.0, 4: torch.OutOfMemoryError("CUDA out of memory")}, 60.0, 2,
     "too little memory is free to time kernels; their shipped sizes are used"),
], ids=["time", "memory"])  # fmt: skip
def test_without_time_or_memory_the_shipped_sizes_are_used_until_the_next_start(seconds, limit_s, launched, report):
    bench = Bench(seconds)
    here = bench.tuner(limit_s=limit_s)
    for candidates in (PAGES, PAGES, OTHERS):
        assert here.pick(candidates, bench.launch) == SHIPPED and len(bench.launched) == launched
    assert bench.reported[1:] == [report] and not kept_file().exists()
    bench.seconds = USUAL
    assert bench.pick() == BEST


def test_the_variable_names_when(monkeypatch):
    assert tuning.when() == "auto"
    for when in ("never", "always", "auto"):
        monkeypatch.setenv("NEOX_LITE_TUNE", when)
        assert tuning.when() == when
    monkeypatch.setenv("NEOX_LITE_TUNE", "yes")
    with pytest.raises(ArgumentError, match="NEOX_LITE_TUNE is 'yes', expected auto, always or never"):
        tuning.when()


def test_renewing_times_everything_anew():
    bench = Bench()
    here = bench.tuner(CLASS, when="always")
    here.pick(PAGES, bench.launch)
    bench.seconds = {8: 3.0, 4: 1.0, 16: 2.0}
    here.renew()
    assert here.pick(PAGES, bench.launch) == HALF and len(bench.launched) == 6
    assert bench.pick(CLASS) == HALF and len(bench.launched) == 6


def test_threads_that_ask_at_once_time_once():
    bench, timer = Bench(), Bench.timer
    here = bench.tuner()
    here.timer = lambda launch: time.sleep(0.02) or timer(bench, launch)  # long enough for the others to come
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda _: here.pick(PAGES, bench.launch), range(8))) == [BEST] * 8
    assert len(bench.launched) == 3


@pytest.mark.parametrize("text", ["", "\0\xff", "null", "[1]", "[" * 100_000, " " * (5 << 20), '{"cards": 7}', "cut"])
def test_a_file_that_makes_no_sense_is_named_in_a_line_and_replaced(text):
    bench = Bench()
    bench.pick()
    kept_file().write_text(kept_file().read_text()[:-30] if text == "cut" else text, encoding="utf-8")
    bench.reported.clear()
    assert bench.pick() == BEST and len(bench.launched) == 6
    complaint = bench.reported[0]
    assert complaint.startswith("tuning.json is not used: ") and "\n" not in complaint and len(complaint) < 300
    assert bench.pick() == BEST and len(bench.launched) == 6


OTHER_TILES = [
    None,
    "large",
    {"block_n": 7, "num_warps": 4},
    {"block_n": 16},
    {},
    {"block_n": 16, "num_warps": 8, "x": 1},
]


@pytest.mark.parametrize("tile", OTHER_TILES)
def test_a_stored_size_that_is_no_candidate_is_not_used(tile):
    bench = Bench()
    bench.pick()
    kept_file().write_text(json.dumps({CARD: {"decode: heads": {"tile": tile, "saved": 0.5, "timed": 3}}}))
    assert bench.pick() == BEST and len(bench.launched) == 6


def test_choices_of_two_processes_are_both_stored():
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
    assert here.pick(PAGES, bench.launch) == BEST  # timed, so used
    assert here.pick(OTHERS, bench.launch) == SHIPPED
    assert "cannot be kept, so no more are timed" in bench.reported[-1]


def test_doctor_names_what_is_used_and_why_and_times_anew_when_it_measures(monkeypatch, run):
    bench = Bench()
    assert doctor.tuned(bench.tuner()) == "all are timed on first use (no choices are shipped for its class)"
    assert "its class is unknown, and NEOX_LITE_TUNE is never" in doctor.tuned(bench.tuner(when="never"))
    here, rates = bench.tuner(CLASS), HardwareProfile(Rates(2e10, 3e11), None, 400 << 20, None)
    monkeypatch.setattr(doctor, "cards", lambda: [torch.device("cuda", 0)])
    monkeypatch.setattr(tuning, "tuner", lambda device: here)
    monkeypatch.setattr(profile, "_measured", lambda progress: here.pick(PAGES, bench.launch) and rates)
    assert "kernels  on cuda:0: all as shipped for RTX 30" in run("doctor")[1] and bench.launched == []
    found = json.loads(run("doctor", "--measure", "--json")[1])["gpu_kernels"]["cuda:0"]
    assert found["why"] == "1 timed on this card, kept in tuning.json; others are timed on first use (as asked)"
    assert found["timed"]["decode: heads"] == {"tile": {"block_n": 16, "num_warps": 8}, "saved": 1 - 1 / 3, "timed": 3}
    monkeypatch.setattr(tuning, "tuner", lambda device: tuning.when())
    monkeypatch.setenv("NEOX_LITE_TUNE", "yes")
    code, out, _ = run("doctor")
    assert code == 0 and "NEOX_LITE_TUNE is 'yes'" in out


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
    assert here.pick(PAGES, lambda tile: math.nan) == SHIPPED


FLOAT16 = torch.float16
CLASSES = [DeviceProperties(capability) for capability in tile_configs.SHIPPED]
GEMV = [
    tile_configs.gemv_tiles(device, n, k_words, bits, group_words, m, compute)
    for device in (*CLASSES, DeviceProperties((10, 0)))
    for n, k_words in ((43008, (768,)), (6144, (768, 3072)), (768, (96,)), (2560, (320, 1280)))
    for bits, group_words, compute in ((4, 16, "half2"), (8, 32, "float16"), (4, 4, "float32"), (0, 1, "float16"))
    for m in (1, 2, 7)
]
GEMM_CASES = itertools.product((768, 43008), (3, 17, 33, 200), (4, 8), (FLOAT16, torch.bfloat16))
GEMM = [tile_configs.gemm_tiles(n, 6144, m, bits, dtype) for n, m, bits, dtype in GEMM_CASES]
PREFILL = [tile_configs.prefill_tiles(device, dim, True, FLOAT16) for device in CLASSES for dim in (64, 96, 256)]
DECODE = [tile_configs.decode_tiles(block_d, True, FLOAT16) for block_d in (16, 32, 128, 256)]


@pytest.mark.parametrize("every", [GEMV, GEMM, PREFILL, DECODE], ids=["gemv", "gemm", "prefill", "decode"])
def test_a_kernel_has_two_to_six_different_candidates_of_powers_of_two(every):
    for candidates in every:
        assert 2 <= len(candidates.tiles) <= 6 == tile_configs.MAX_CANDIDATES
        assert len(set(candidates.tiles)) == len(candidates.tiles)
        for tile in candidates.tiles:
            sizes = [value for name, value in asdict(tile).items() if name not in ("maxnreg", "num_stages")]
            assert all(value & (value - 1) == 0 and value > 0 for value in sizes)


def test_a_thread_loads_16_bytes_of_a_row_in_every_candidate():
    for candidates in GEMV:
        per = 4 if candidates.key.startswith("gemv: int") else 8
        for tile in candidates.tiles:
            assert tile.block_n * tile.groups * tile.group_words == per * 32 * tile.num_warps


def test_shapes_of_a_class_share_their_choice_and_large_products_are_cut_by_the_class_of_the_card():
    few, others = (tile_configs.gemm_tiles(n, 6144, 3, 4, FLOAT16).key for n in (43008, 6144))
    assert few == tile_configs.gemm_tiles(40000, 5120, 9, 4, FLOAT16).key != others
    assert len({candidates.key for candidates in GEMV}) > 20
    hopper, ampere = DeviceProperties((9, 0)), DeviceProperties((8, 6))
    here, there, small = (
        tile_configs.gemv_tiles(device, n, (768,), 4, 16, 1, "half2").tiles[0]
        for device, n in ((hopper, 43008), (ampere, 43008), (hopper, 6144))
    )
    assert (here.unroll_n, there.unroll_n, small.unroll_n) == (4, 2, 2)  # 9.0 is short of instructions
    assert replace(here, unroll_n=2) == there


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
    return SimpleNamespace(of=of, device=device, checks=lambda ops: Checks("triton", ops, FLOAT16, device))


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
