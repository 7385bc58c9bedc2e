"""What `neox-lite bench` reports and refuses. Never how fast anything is: that is the machine's business."""

import gc
import json
import time
import types
from pathlib import Path

import pytest
import torch

from neox_lite import GPTNeoXForCausalLM
from neox_lite.cache import Batch, PagePool
from neox_lite.errors import ArgumentError, FormatError
from neox_lite.formats import DENSE, make_format
from neox_lite.kernels.graphs import ReplayRunner
from neox_lite_app import bench
from neox_lite_app.cli import main
from neox_lite_app.models.random_model import SHAPES, RandomModel, config_of
from neox_lite_app.paths import DEMO

QUICK = ("--decode", 2, "--prefill", "3,8", "--batch", "1,2", "--context", 5, "--device", "cpu")
CONTRACT = {"shape", "format", "group_size", "device", "threads", "load_s", "peak_bytes"}
CONTRACT |= {"prefill_tokens_per_s", "decode_tokens_per_s", "weight_gb_per_s"}


@pytest.fixture(autouse=True)
def small_buffer(on_the_cpu, monkeypatch):
    monkeypatch.setattr(bench, "BUFFER_BYTES", 1 << 20)


@pytest.fixture
def run(run):
    return lambda *words: run("bench", *words)


def figures(run, *words):
    code, out, err = run(*words, *QUICK, "--json")
    assert code == 0, err
    return json.loads(out)


LINEAR = 2 * 12 * 128 * 128
# Codes and scales of the blocks, two numbers of shape a layer, and the head; the embedding is not read.
READ = LINEAR * (4 + 16 / 128) / 8 + 2 * 4 * 16 + 50304 * 128 * 2


@pytest.mark.parametrize(("words", "expected"), [
    (["--shape", "2x128x4"], {"model": None, "shape": "2x128x4", "format": "int4", "group_size": 128, "head": "fp16"}),
    (["--shape", "2x128x4"], {"weight_bytes_per_token": READ, "load_s": None}),
    (["--shape", "1x128x2", "--format", "int8", "--group-size", 64], {"format": "int8", "group_size": 64, "kv": "fp16"}),
    (["--shape", "1x128x2", "--format", "fp16", "--head", "int8"], {"format": "fp16", "group_size": None, "head": "int8"}),
    (["--shape", "1x128x2", "--kv", "int8", "--head", "int8"], {"format": "int4", "head": "int8", "kv": "int8"}),
    ([DEMO], {"model": str(DEMO), "shape": "4x256x4", "format": "fp16", "group_size": None}),
    (["--format", "int8", DEMO], {"model": str(DEMO), "format": "int8"}),  # quantized on its way in
])  # fmt: skip
def test_a_folder_or_a_shape_without_a_checkpoint_is_measured(run, words, expected):
    result = figures(run, *words)
    assert result.keys() >= CONTRACT and {name: result[name] for name in expected} == expected
    assert (result["load_s"] or 0) > 0 or result["model"] is None
    assert set(result["prefill_tokens_per_s"]) == {"3", "8"} and set(result["batch_decode_tokens_per_s"]) == {"2"}
    low, high = result["decode_quartiles_tokens_per_s"]
    assert 0 < low <= result["decode_tokens_per_s"] <= high
    per_token = result["weight_gb_per_s"] * 1e9 / result["decode_tokens_per_s"]
    assert per_token == pytest.approx(result["weight_bytes_per_token"])
    assert result["bandwidth_share"] > 0 and result["read_gb_per_s"] > 0
    assert result["weights_read_gb_per_s"] > 0 and 0 < result["outside_share"] < 1
    assert result["threads"] == torch.get_num_threads() and result["device"] == "cpu" and result["backend"]


def test_decoding_is_measured_after_several_contexts_and_batches_after_the_first(run):
    words = ("--shape", "1x128x2", "--decode", 2, "--prefill", 3, "--device", "cpu")
    code, out, err = run(*words, "--context", "0,9,300", "--batch", 2, "--json")
    assert code == 0, err
    result = json.loads(out)
    speeds = result["context_decode_tokens_per_s"]
    assert list(speeds) == ["0", "9", "300"] and all(speed > 0 for speed in speeds.values())
    assert result["context"] == 0 and result["decode_tokens_per_s"] == speeds["0"]
    assert result["first_token_s"]["3"] == pytest.approx(3 / result["prefill_tokens_per_s"]["3"])
    assert [result[key] for key in ("gpu_peak_bytes", "graph", "copy_gb_per_s", "copy_share")] == [None] * 4
    shown = run(*words, "--context", "0,9", "--batch", 1)[1]
    assert "after 0 cached tokens" in shown and "decode at 9" in shown


@pytest.mark.parametrize(("device", "gpu", "expected"), [("cpu", True, [128]), ("auto", False, [128]),
    ("auto", True, [0, 1024, 2012]), ("cuda:1", True, [0, 1024, 2012])])  # fmt: skip
def test_contexts_are_those_of_the_device_as_far_as_the_model_has_room(monkeypatch, device, gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    args = types.SimpleNamespace(context=None, device=device, decode=32, prefill=[8])
    assert bench.contexts_of(config_of("1x128x2"), args) == expected
    small = config_of("1x128x2").copy(max_position_embeddings=40)
    assert bench.contexts_of(small, args) == ([4] if expected == [128] else [0, 4])


def test_on_a_gpu_a_step_is_compared_with_a_copy_keys_and_values_counted(monkeypatch):
    """With the CPU standing in for the card: bytes and shares are real, its driver's count is not."""
    model = RandomModel(config_of("2x128x2"), make_format("int4", 128)).build(lambda done, total: None)
    monkeypatch.setattr(bench, "gpu_of", lambda model: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 << 20)
    monkeypatch.setattr(bench, "context_bytes", lambda: 2 << 20)
    monkeypatch.setattr(bench, "free_gpu", lambda index: (1 << 23, 1 << 22))
    monkeypatch.setattr(bench, "copy_gb_per_s", lambda device, nbytes: [nbytes / 1e6])
    found = bench.card(model, {"context_decode_tokens_per_s": {"0": 100.0, "50": 100.0}})
    assert found["gpu_peak_bytes"] == 7 << 20 and found["copy_gb_per_s"] == (1 << 20) / 1e6
    per_token = 2 * 2 * 128 * 2  # layers, keys and values, features, bytes
    assert bench.cache_bytes(model) == per_token
    weights = bench.weight_bytes(model) * 100 / 1e9 / found["copy_gb_per_s"]
    more = 50 * per_token * 100 / 1e9 / found["copy_gb_per_s"]
    assert found["copy_share"] == {"0": pytest.approx(weights), "50": pytest.approx(weights + more)}
    nothing = dict.fromkeys(("read_gb_per_s", "weights_read_gb_per_s", "read_method", "bandwidth_share"))
    assert "of which decode has" in bench.beside(found | nothing)
    assert not found["graph"] and "on the CPU" in found["why_no_graph"] and "none: " in bench.graphs(found)


def test_the_table_says_what_is_random_and_whether_steps_on_a_gpu_were_graphs_and_why_not(run):
    code, out, err = run("--shape", "1x128x2", *QUICK)
    assert code == 0 and "random weights, 1x128x2" in out and "decode x2" in out and "GB/s" in out
    assert "random weights, which say nothing of quality" in err and "100%" in err
    result = figures(run, "--shape", "1x128x2")
    assert "graphs" not in bench.table(result)
    on_gpu = result | {"gpu_peak_bytes": 1 << 20, "graph": False, "why_no_graph": "model.graph is off"}
    assert "graphs       none: model.graph is off" in bench.table(on_gpu)
    assert "each decode step one CUDA graph" in bench.table(on_gpu | {"graph": True})


def test_a_copy_is_timed():
    assert all(rate > 0 for rate in bench.copy_gb_per_s(torch.device("cpu"), 1 << 16, 3))


def test_batches_whose_cache_the_budget_cannot_hold_are_left_out_with_a_sentence(run, monkeypatch):
    load = bench.load_model

    def with_three_pages(args):
        model, load_s = load(args)
        model.cache_pages = 3
        return model, load_s

    monkeypatch.setattr(bench, "load_model", with_three_pages)
    words = (DEMO, "--context", 100, "--decode", 30, "--prefill", 8, "--batch", "1,2,5", "--device", "cpu", "--json")
    code, out, err = run(*words)  # sequences of 134 tokens take two pages each
    result = json.loads(out)
    assert code == 0 and result["decode_tokens_per_s"] > 0 and result["batch_decode_tokens_per_s"] == {}
    assert result["batches_left_out"] == [2, 5]
    assert "no batch of 2 or 5 is measured: the memory budget has room for 384 tokens of KV cache, 1 sequence of" in err


def test_scratch_writes_a_folder_that_loads_verifies_and_is_not_overwritten(run, tmp_path, capsys):
    folder = tmp_path / "random"
    result = figures(run, "--shape", "1x128x2", "--scratch", folder, "--head", "int8", "--warm")
    assert (
        result.keys() >= CONTRACT and result["load_s"] > 0 and result["head"] == "int8" and result["format"] == "int4"
    )
    assert figures(run, folder, "--head", "int8")["weight_bytes_per_token"] == result["weight_bytes_per_token"]
    assert main(["verify", str(folder)]) == 0
    capsys.readouterr()
    before = (folder / "config.json").stat().st_mtime_ns
    code, _, err = run("--shape", "1x128x2", "--scratch", folder)
    assert code == 1 and "is there already" in err and (folder / "config.json").stat().st_mtime_ns == before
    assert run(folder, *QUICK, "--format", "fp16")[0] == 1  # it is quantized


SHAPE = ("--shape", "1x128x2")


@pytest.mark.parametrize(("words", "message"), [
    (("--shape", "banana"), "expected pythia-70m"),
    (("--shape", "2x128"), "24x2048x16"),
    (("--shape", "2x100x3"), "hidden"),
    (("--shape", "1x96x2"), "not divisible by group_size 128; try 32"),
    (("--shape", "0x128x2"), "num_hidden_layers"),
    (("--shape", ""), "--shape is ''"),
    ((*SHAPE, "--context", 2040), "context is 2048"),
    ((*SHAPE, "--prefill", 4096), "--prefill is 4096"),
    ((*SHAPE, "--device", "cuda"), "no CUDA device"),
    ((*SHAPE, "--revision", "main"), "--revision goes with MODEL only"),
    ((*SHAPE, "--scratch", ""), "--scratch is empty"),
    ((*SHAPE, "--warm"), "--warm reads weights from the disk"),
    ((DEMO, "--context", 508, "--decode", 1), "--context 508 and --decode 1 need 513 tokens"),
    ((DEMO, "--prefill", 600), "--prefill is 600, but the model's context is 512"),
    ((DEMO, "--cpu-memory", ""), "--cpu-memory is '', expected a size"),
    ((DEMO, "--gpu-memory", "8GiB"), "--gpu-memory: torch sees no GPU here"),
    ((DEMO, "--group-size", 64), "--group-size goes with --shape only"),
    ((DEMO, "--scratch", "/tmp/x"), "--scratch goes with --shape only"),
    (("/no/such/folder",), "no such folder"),
])  # fmt: skip
def test_what_makes_no_sense_is_one_line_and_exits_1(run, words, message):
    code, out, err = run(*words)
    errors = [line for line in err.splitlines() if "error" in line]
    assert code == 1 and out == "" and len(errors) == 1 and message in errors[0]


def test_weights_larger_than_free_memory_are_refused_before_they_are_made(run, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda: (1 << 20, 1 << 20))
    code, _, err = run("--shape", "1x128x2")
    assert code == 1 and "--scratch DIR" in err and "100%" not in err


@pytest.mark.parametrize("format", [make_format("int4", 64), make_format("int8", 64), DENSE], ids=lambda f: f.name)
def test_random_weights_keep_activations_of_order_one(format):
    plan, told = RandomModel(config_of("3x256x4"), format, small_head=True), []
    model = plan.build(lambda done, total: told.append((done, total)))
    states = model(torch.arange(40)[None], output_hidden_states=True)
    assert 0.5 < float(states.hidden_states[-2].std()) < 5 and 0.2 < float(states.logits.std()) < 5
    assert told[-1] == (plan.nbytes, plan.nbytes)
    assert model.get_memory_footprint() == plan.nbytes + model.gpt_neox.rotary.table.nbytes


def test_random_weights_are_made_on_the_device_that_is_asked_for():
    plan = RandomModel(config_of("1x128x2"), make_format("int4", 128), small_head=True)
    model = plan.build(lambda done, total: None, torch.device("meta"))
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta", "cpu"}
    assert model.gpt_neox.rotary.table.device.type == "cpu"  # moved with the rest


BILLIONS = {
    "pythia-70m": 0.0704, "pythia-160m": 0.1623, "pythia-410m": 0.4053, "pythia-1b": 1.0118, "pythia-1.4b": 1.4146,
    "pythia-2.8b": 2.7752, "pythia-6.9b": 6.8573, "pythia-12b": 11.8461, "20b": 20.554,
}  # fmt: skip


def test_every_named_shape_has_as_many_parameters_as_its_model_s_own_page_counts():
    for shape in SHAPES:
        model = RandomModel(config_of(shape), make_format("int4", 128)).model
        assert model.num_parameters() == pytest.approx(BILLIONS[shape] * 1e9, rel=0.01), shape


def test_a_head_whose_rows_fill_no_group_and_a_text_that_is_no_shape_are_refused():
    with pytest.raises(FormatError, match="embed_out: in_features 48 is not divisible"):
        RandomModel(config_of("1x48x2"), DENSE, small_head=True)
    for text in ("", "x", "1x1x1x1", "-1x128x2", "1x128x2 ", "20B"):
        with pytest.raises(ArgumentError, match="--shape is"):
            config_of(text)


def test_operations_that_call_operations_count_once_and_captured_steps_count_too():
    def slow(result):
        time.sleep(0.02)
        return result

    operations = types.SimpleNamespace(size=3, inner=lambda: slow(1), fails=lambda: 1 / 0)
    watch = bench.Stopwatch()
    timed = bench.Timed(operations, watch)
    operations.outer = lambda: timed.inner() + timed.inner()
    captured = lambda *pass_: types.SimpleNamespace(replay=lambda x, batch: slow(2)) if operations.size else None  # noqa: E731
    operations.pass_runner = lambda: ReplayRunner(lambda *pass_: 4, captured, "a reason")
    began = time.perf_counter()
    assert timed.outer() == 2 and timed.size == 3 and not hasattr(timed, "missing")
    # twice this, were the inner calls added to the outer one
    assert 0.04 <= watch.seconds <= time.perf_counter() - began
    before = watch.seconds
    given = torch.empty(0), PagePool(1, 1, torch.float32, []), Batch((), (), (), *torch.empty(3, 0))
    assert timed.pass_runner().run(*given) == 2 and watch.seconds >= before + 0.02
    operations.size = 0
    assert timed.pass_runner().run(*given) == 4
    with pytest.raises(ZeroDivisionError):
        timed.fails()
    assert watch.depth == 0


def test_a_backend_that_works_beside_its_operations_has_no_outside_share(monkeypatch):
    model = RandomModel(config_of("1x64x2"), DENSE).build(lambda done, total: None)
    before = model.ops
    assert 0 < bench.outside_share(model, 3, 2, lambda: None) < 1
    monkeypatch.setattr(model, "step", lambda pool, block_tables, tokens: torch.zeros(len(block_tables), 5))
    assert bench.outside_share(model, 3, 2, lambda: None) is None
    assert model.ops is before


@pytest.mark.parametrize("kv", ["fp16", "int8"])
def test_decoding_starts_from_a_cache_of_the_asked_length(kv):
    model = GPTNeoXForCausalLM.from_pretrained(DEMO, kv=kv)
    pool = model.new_pool()
    block_table = bench.filled(pool, 200)
    assert block_table.length == 200 and len(block_table.pages) == 2
    keys, values = pool.read(0, block_table, 200)
    assert 0.9 < float(keys.float().std()) < 1.1 and not torch.equal(keys, values)
    assert all(step_s > 0 for step_s in bench.decode_s(model, 2, 200, 3))


def test_memory_is_read_by_the_fastest_of_several_codes_and_threads_stay_as_they_were():
    before = torch.get_num_threads()
    for tensors in ([torch.ones(1 << 16)], [torch.ones(3, 5), torch.ones(1001, dtype=torch.int8)]):
        with bench.fastest_read(tensors, 2) as (read, method):
            assert bench.seconds(read) > 0 and method
        assert torch.get_num_threads() == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not say what memory holds")
def test_the_peak_is_of_memory_that_no_file_backs():
    gc.collect()  # what other tests left would make room
    with bench.anonymous_peak() as peak:
        before = peak()
        held = torch.ones(256 << 20, dtype=torch.uint8)
        for _ in range(200):
            if peak() >= before + held.nbytes // 2:
                break
            torch.randn(1000, 1000)
    assert peak() >= before + held.nbytes // 2
