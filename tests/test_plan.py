"""Placement: bytes exact against real tensors, budgets kept, and every promise of a plan checked by following it."""

import json
import random
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import change_json

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM, cache
from neox_lite.errors import ArgumentError, FormatError
from neox_lite.formats import DENSE, GroupInt, formats_of, quantization_config
from neox_lite.generation import protocols
from neox_lite.offload import advice, plan, profile
from neox_lite.offload.plan import Budgets, Card, HardwareProfile, PlacementRequest, Plan, Rates, make_plan, sizes_of
from neox_lite.units import PAGE, parse_bytes
from neox_lite_app.cli import main
from neox_lite_app.models.family import FAMILY
from neox_lite_app.models.plan import CARDS, bar_of
from neox_lite_app.models.random_model import SHAPES, RandomModel, config_of
from neox_lite_app.paths import DEMO

GIB = 1 << 30
ODD = {
    "sequential-rotary100-tied": {"use_parallel_residual": False, "rotary_pct": 1.0, "tie_word_embeddings": True,
                                  "num_attention_heads": 3, "hidden_size": 192, "intermediate_size": 320},
    "no-attention-bias": {"attention_bias": False,
                          "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 96},
    "odd-vocabulary": {"vocab_size": 50277, "max_position_embeddings": 130, "rotary_pct": 0.5,
                       "num_attention_heads": 3, "hidden_size": 288, "intermediate_size": 1152},
}  # fmt: skip
INT4 = GroupInt(4, 128)
CPU = Rates(30e9, 500e9)
SMALL_CARD = Card("8 GiB", 8 << 30, Rates(300e9, 20e12), 12e9, 512 << 20)
HOME = HardwareProfile(CPU, 2e9, 400 << 20, SMALL_CARD)
NO_GPU = replace(HOME, card=None)
CPU_MEMORY, HOME_MEMORY = (16 << 30, None), (16 << 30, 8 << 30)  # free, of the CPU and of a GPU
OF_20B = sizes_of(config_of("20b"), INT4, small_head=True)


def odd(name):
    return GPTNeoXConfig(**{"num_hidden_layers": 3, "vocab_size": 503, **ODD[name]})


def best(sizes, here, cpu_gib, gpu_gib=None, **asked):
    budgets = Budgets(int(cpu_gib * GIB), None if gpu_gib is None else int(gpu_gib * GIB))
    return make_plan(sizes, here, PlacementRequest(**asked), budgets)


def placed(sizes, gpu_layers, kv="fp16", **asked):
    return Plan(sizes, HOME, PlacementRequest(**asked), Budgets(1 << 40), kv, "fp16", 0, gpu_layers, "cpu")


def built(config, format, skipped=(), dtype=torch.float16):
    """The model on the meta device, as a folder holds it."""
    scheme = None if format == DENSE else quantization_config(format, skipped)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return GPTNeoXForCausalLM(config.copy(quantization_config=scheme))
    finally:
        torch.set_default_dtype(torch.float32)


def nbytes(module):
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("name", [*SHAPES, *ODD])
def test_sizes_are_those_of_the_real_tensors(name, bits):
    config = odd(name) if name in ODD else config_of(name)
    format = DENSE if bits is None else GroupInt(bits, 32 if name in ODD else 128)
    model, sizes = built(config, format), sizes_of(config, format)
    assert sizes.layers == tuple(nbytes(layer) for layer in model.gpt_neox.layers)
    assert sizes.embedding == sizes.head == model.gpt_neox.embed_in.weight.nbytes == model.embed_out.weight.nbytes
    assert sizes.rest == nbytes(model.gpt_neox.final_layer_norm) + nbytes(model.gpt_neox.rotary)
    assert sizes.total == nbytes(model)
    assert config.num_parameters == model.num_parameters()
    for kv, dtype in (("fp16", torch.float16), ("int8", torch.int8)):
        found, devices = placed(sizes, 0, kv, context=130), [torch.device("meta")] * config.num_hidden_layers
        pool = cache.PagePool(config.num_attention_heads, config.head_dim, dtype, devices, pages=found.pages)
        assert found.pages == 2 and found.parts["cpu"]["cache"] == pool.nbytes


def test_the_family_s_sizes_are_those_of_the_real_tensors():
    for member in FAMILY:
        assert sizes_of(member.config(), INT4).total == nbytes(built(member.config(), INT4)), member.id


@pytest.mark.parametrize("name", ["pythia-70m", "sequential-rotary100-tied"])
def test_the_small_head_s_size_is_that_of_the_real_one(name):
    config, format = (odd(name), GroupInt(4, 64)) if name in ODD else (config_of(name), INT4)
    config.tie_word_embeddings = False  # a random model has a head of its own
    head = RandomModel(config, format, small_head=True).small_head
    assert sizes_of(config, format, small_head=True).small_head == nbytes(head)


def test_layers_of_several_formats_are_counted_each_as_it_is():
    config, format = odd("odd-vocabulary"), GroupInt(4, 32)
    skipped = ["gpt_neox.layers.1.mlp.dense_h_to_4h", "gpt_neox.layers.2.attention.dense"]
    sizes = sizes_of(config, formats_of(quantization_config(format, skipped)), torch.float32)
    layers = built(config, format, skipped, torch.float32).gpt_neox.layers
    assert sizes.layers == tuple(map(nbytes, layers)) and len(set(sizes.layers)) == 3


def test_a_file_s_windows_are_counted_as_random_rows_touch_them():
    for context in (1, 50, 2048):
        rows, row = random.Random(1), OF_20B.embedding // OF_20B.vocabulary
        touched = [{rows.randrange(OF_20B.vocabulary) * row // plan.WINDOW for _ in range(context)} for _ in range(9)]
        mean = plan.WINDOW * sum(map(len, touched)) / len(touched)
        found = placed(OF_20B, 44, context=context)
        assert found.parts["cpu"]["weights"] == pytest.approx(mean, rel=0.02)  # nine samples of thousands of windows


def test_a_prompt_is_planned_in_the_pieces_that_generation_reads():
    assert plan.PREFILL_TOKENS == protocols.PREFILL_TOKENS


def cases(count, seed):
    """Random models, machines and budgets, from far too little memory to more than enough."""
    rng = random.Random(seed)
    for _ in range(count):
        hidden = 128 * rng.randint(2, 48)
        config = GPTNeoXConfig(
            hidden_size=hidden,
            num_attention_heads=hidden // 64,
            intermediate_size=hidden * rng.choice([2, 4, 4, 4]),
            num_hidden_layers=rng.randint(1, 14),
            vocab_size=rng.randint(100, 60_000),
            max_position_embeddings=rng.choice([128, 2048, 4096]),
            use_parallel_residual=rng.random() < 0.7,
            tie_word_embeddings=rng.random() < 0.3,
            attention_bias=rng.random() < 0.8,
        )
        sizes = sizes_of(config, rng.choice([DENSE, INT4, GroupInt(8, 128)]), small_head=rng.random() < 0.7)
        rates = Rates(rng.uniform(200, 1000) * 1e9, rng.uniform(10, 150) * 1e12)
        card = Card("a card", 8 << 30, rates, rng.uniform(6, 50) * 1e9, rng.randint(0, 600) << 20)
        slow = Rates(rng.uniform(5, 100) * 1e9, rng.uniform(0.05, 5) * 1e12)
        card, disk = rng.choice([card, card, None]), rng.choice([None, 5e8, 3e9])
        whole = sizes.total + 2 * sizes.context * sizes.kv_fp16 * len(sizes.layers) + (1 << 30)
        shares = [rng.choice([0, rng.random(), rng.random(), 1.2]) for _ in range(2)]
        request = PlacementRequest(
            context=rng.randint(1, sizes.context),
            kv=rng.choice([None, "fp16", "int8"]),
            head=rng.choice([None, "fp16", *(["int8"] if sizes.small_head else [])]),
        )
        budgets = Budgets(int(whole * shares[0]), int(whole * shares[1]) if card else None)
        yield sizes, HardwareProfile(slow, disk, rng.randint(100, 600) << 20, card), request, budgets


def test_a_plan_never_exceeds_its_budgets_and_places_every_part_once():
    seen = set()
    for sizes, here, request, budgets in cases(3000, seed=1):
        found = make_plan(sizes, here, request, budgets)
        assert found.totals["gpu"] <= (budgets.gpu or 0)
        assert found.totals["cpu"] <= budgets.cpu + found.short_by and found.fits == (found.short_by == 0)
        order = [plan.TIERS[::-1].index(tier) for tier in found.layers]
        assert order == sorted(order) and len(order) == len(sizes.layers)
        parts, host = found.parts, found.gpu_layers < len(sizes.layers)
        kv = found.pages * PAGE * sizes.kv_bytes(found.kv)
        assert sum(tier.get("cache", 0) for tier in parts.values()) == len(sizes.layers) * kv
        embedding = found._embedding_bytes("cpu") if found.embedding_on == "cpu" else sizes.embedding
        if sizes.tied and found.head == "fp16" and found.embedding_on == found.head_on:
            embedding = 0  # one tensor
        weights = (
            sum(sizes.layers) + sizes.head_bytes(found.head) + embedding + sizes.rest * (bool(found.gpu_layers) + host)
        )
        assert sum(tier.get("weights", 0) for tier in parts.values()) == weights
        assert found.embedding_on == "cpu" or not host
        buffers = 2 * (max(sizes.layers) + (kv if found.mixed else 0)) if found.mixed or found.disk_layers else 0
        assert parts["cpu"]["layer_buffers"] == buffers
        assert parts["gpu"].get("layer_buffers", 0) == (buffers if found.mixed else 0)
        assert request.kv in (None, found.kv) and request.head in (None, found.head)
        seen.add(found.level)
    assert seen == {plan.NO, plan.DISK, plan.CPU, plan.MIXED, plan.GPU}


def test_more_memory_never_gives_more_layers_on_the_disk_or_then_fewer_on_the_gpu():
    rng = random.Random(2)
    for sizes, here, request, budgets in cases(3000, seed=2):
        request = replace(request, kv=request.kv or "fp16", head=request.head or "fp16")
        found, more = make_plan(sizes, here, request, budgets), int(rng.random() * sizes.total)
        grown = [replace(budgets, cpu=budgets.cpu + more)]
        grown += [replace(budgets, gpu=budgets.gpu + more)] if here.card else []
        for larger in (make_plan(sizes, here, request, b) for b in grown):
            assert larger.level >= found.level, (found, larger)
            if found.fits:
                assert (-larger.disk_layers, larger.gpu_layers) >= (-found.disk_layers, found.gpu_layers)


def test_rates_move_no_layer():
    for sizes, here, request, budgets in cases(300, seed=7):
        found = make_plan(sizes, here, request, budgets)
        card = here.card and replace(here.card, rates=CPU, bus_bytes_per_s=1e9)
        other = replace(here, cpu=Rates(1e12, 1e15), card=card, disk_bytes_per_s=1e3)
        assert make_plan(sizes, other, request, budgets).layers == found.layers


def test_what_a_plan_is_short_by_makes_it_fit():
    for sizes, here, request, budgets in cases(2000, seed=3):
        found = make_plan(sizes, here, request, budgets)
        if not found.fits:
            enough = budgets.cpu + found.short_by
            assert make_plan(sizes, here, request, replace(budgets, cpu=enough)).fits
            assert not make_plan(sizes, here, request, replace(budgets, cpu=enough - 1)).fits


def followed(request, budgets, sentence):
    """The request and the budgets as a sentence of advice would have them."""
    if found := re.match(r"an int8 .* \((kv|head)\) ", sentence):
        return replace(request, **{found[1]: "int8"}), budgets
    if found := re.match(r"a context of (\d+) ", sentence):
        return replace(request, context=int(found[1])), budgets
    found = re.match(r"([\d.]+GiB) of (CPU|GPU) memory, ", sentence)
    return request, replace(budgets, **{found[2].lower(): parse_bytes(found[1])})


def test_following_advice_does_what_it_says():
    kinds = set()
    for sizes, here, request, budgets in cases(700, seed=4):
        found = make_plan(sizes, here, request, budgets)
        for sentence in advice.advice(found):
            lifted = make_plan(sizes, here, *followed(request, budgets, sentence))
            assert lifted.level > found.level and advice.GAINS[lifted.level] == sentence.partition(" would ")[2]
            kinds.add(sentence.split()[2])
            if shorter := re.match(r"a context of (\d+) ", sentence):  # a page more would not do
                kinds.add("a page less" if int(shorter[1]) + PAGE >= found.context else "many pages less")
                longer = min(int(shorter[1]) + PAGE, found.context)
                assert make_plan(sizes, here, replace(request, context=longer), budgets).level == found.level
        assert advice.advice(found) or found.level > plan.DISK
    assert kinds == {"KV", "head", "of", "CPU", "GPU", "a page less", "many pages less"}


def test_the_least_degraded_choice_that_reaches_the_best_level_is_taken():
    for sizes, here, request, budgets in cases(700, seed=5):
        found = make_plan(sizes, here, replace(request, kv=None, head=None), budgets)
        choices = [("fp16", "fp16"), ("int8", "fp16")]
        choices += [("fp16", "int8"), ("int8", "int8")] if sizes.small_head else []
        levels = [make_plan(sizes, here, replace(request, kv=kv, head=head), budgets).level for kv, head in choices]
        if found.fits:
            assert (found.kv, found.head) == choices[levels.index(max(levels))]
        assert bool(advice.notes(found)) == ("int8" in (found.kv, found.head))


def test_a_decode_step_takes_the_time_of_its_bytes():
    layer, cpu, gpu = OF_20B.layers[0] + 1024 * OF_20B.kv_fp16, 400 * 6144, 100 * 6144
    on_cpu, mixed = best(OF_20B, NO_GPU, 32), best(OF_20B, HOME, 16, 8)
    whole = best(OF_20B, replace(HOME, card=CARDS["RTX 3090"]), 32, 24)
    slow, fast = (44 - mixed.gpu_layers) * (layer + cpu) / 30e9, mixed.gpu_layers * (layer + gpu) / 300e9
    for found, seconds in (
        (on_cpu, (44 * (layer + cpu) + OF_20B.head) / 30e9),
        (whole, (44 * (layer + gpu) + OF_20B.head) / (0.92 * 936e9)),
        (mixed, slow + fast + OF_20B.head / 300e9),
    ):
        assert 1 / found.decode_tokens_per_s == pytest.approx(seconds + 44 * plan.LAYER_S)


def test_a_disk_sets_the_pace_of_what_it_holds():
    found = best(OF_20B, NO_GPU, 8)
    slower, unknown = (best(OF_20B, replace(NO_GPU, disk_bytes_per_s=rate), 8) for rate in (1e9, None))
    more_s = 1 / slower.decode_tokens_per_s - 1 / found.decode_tokens_per_s
    assert found.level == plan.DISK
    assert more_s == pytest.approx(found.disk_layers * OF_20B.layers[0] / 2e9, rel=1e-6)
    assert unknown.fits and unknown.decode_tokens_per_s is None and unknown.prefill_tokens_per_s is None


def test_passes_stream_from_the_crossover_on_and_never_before():
    found = best(OF_20B, HOME, 16, 8)
    turn, stored = found.crossover_tokens, OF_20B.layers[0]
    assert found.streamed_s(stored, turn) < found.in_place_s(stored, turn)
    assert found.streamed_s(stored, turn - 1) >= found.in_place_s(stored, turn - 1)
    operations = CPU.flops_per_s * (stored / 12e9 - plan.LAYER_S)  # in the time that the bus takes for a layer
    operations /= 1 + 400 * 6144 / 30e9 * CPU.flops_per_s / (2 * OF_20B.weights)  # less the time of activations
    assert turn == pytest.approx(operations / (2 * OF_20B.weights), abs=2)
    without = replace(found, hardware=replace(HOME, card=replace(SMALL_CARD, bus_bytes_per_s=1e6)))
    assert without.pass_s(turn - 1, 0) == pytest.approx(found.pass_s(turn - 1, 0))
    assert without.pass_s(4 * turn, 0) > found.pass_s(4 * turn, 0) and without.crossover_tokens is None
    whole = best(OF_20B, replace(HOME, card=CARDS["RTX 4090"]), 32, 24)
    assert whole.level == plan.GPU and whole.embedding_on == "gpu"
    assert whole.crossover_tokens is best(OF_20B, NO_GPU, 32).crossover_tokens is None


def test_plain_layers_have_a_rate_and_scratch_of_their_own():
    """The CPU writes plain weights out as float32 for many tokens, 64 MiB at a time."""
    config, here = config_of("pythia-1.4b"), replace(NO_GPU, cpu=replace(CPU, plain_flops_per_s=10e9))
    plain, int4 = (best(sizes_of(config, format), here, 32, context=512) for format in (DENSE, INT4))
    # 500 operations for 10, but as many activations beside them
    assert plain.pass_s(512, 0) == pytest.approx(50 * int4.pass_s(512, 0), rel=0.15)
    assert plain.parts["cpu"]["scratch"] - int4.parts["cpu"]["scratch"] == (32 << 20) + 2 * (64 << 20)
    narrow = best(sizes_of(config_of("pythia-160m")), here, 32, context=512)
    assert narrow.parts["cpu"]["scratch"] < (32 << 20) + 2 * 4 * 768 * 3072 + (16 << 20)


def test_graphs_of_decode_steps_are_counted_where_the_whole_model_is_on_the_gpu():
    """Logits, ids and values of one row; none between two memories, where no step is a graph."""
    whole, mixed = (best(OF_20B, HOME, 32, size, context=512) for size in (24, 8))
    assert (whole.level, mixed.level) == (plan.GPU, plan.MIXED)
    activations = 2 * (8 * OF_20B.hidden + 2.5 * OF_20B.inner)
    assert whole.parts["gpu"]["graphs"] == (16 << 20) + 12 * OF_20B.vocabulary + activations
    assert mixed.parts["gpu"]["graphs"] == 0


def test_a_longer_pass_never_takes_less_time():
    for case in cases(300, seed=6):
        found = make_plan(*case)
        times = [found.pass_s(n, cached) for cached in (0, found.context) for n in (1, 2, 8, 64, 512)]
        assert times[:5] == sorted(times[:5]) and times[5:] == sorted(times[5:]) and times[0] <= times[5]


@pytest.mark.parametrize(("asked", "gpu", "message"), [
    ({"context": 4096}, None, "context is 4096, but the model's own context is 2048"),
    ({"context": 0}, None, "context is 0"),
    ({"head": "int8"}, None, "has no int8 head"),
    ({}, 1, "has no GPU"),
])  # fmt: skip
def test_what_cannot_be_planned_is_named(asked, gpu, message):
    with pytest.raises(ArgumentError, match=message):
        best(sizes_of(config_of("20b"), INT4), NO_GPU, 1 << 10, gpu, **asked)
    with pytest.raises(FormatError, match=r"layers\.0\.attention\.query_key_value: .* 192 .* 128; try 32 or 64"):
        sizes_of(odd("sequential-rotary100-tied"), INT4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """20b: its configuration alone; int8: the bundled model."""
    out = tmp_path_factory.mktemp("plan")
    config_of("20b").save_pretrained(out / "20b")
    assert main(["quantize", str(DEMO), str(out / "int8"), "--format", "int8", "--group-size", "64"]) == 0
    return out


@pytest.fixture
def run(capsys, monkeypatch, folders):
    """The command where `folders` are, on a machine of 16 GiB without a GPU, or with as much free of one as is given."""

    def call(*words, here=HOME, free=CPU_MEMORY):
        monkeypatch.chdir(folders)
        monkeypatch.setattr(profile, "load", lambda: replace(here, card=here.card if free[1] else None))
        monkeypatch.setattr(profile, "free_memory", lambda: (64 << 30, free[0] + profile.HOST_MARGIN))
        monkeypatch.setattr(profile, "own_memory", lambda: None)
        if free[1] is not None:
            driver = here.card.context_bytes - profile.GPU_MARGIN
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(profile, "free_gpu", lambda gpu: (here.card.bytes, free[1] - driver))
        monkeypatch.setattr("neox_lite_app.models.plan.fetch_files", lambda name, files, revision: folders / "20b")
        code = main(["plan", *map(str, words)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def json_of(run):
    def call(*words, **options):
        code, out, err = run(*words, "--json", **options)
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


def test_the_command_s_json_holds_the_contract(json_of):
    result = json_of("20b", free=HOME_MEMORY)
    assert list(result) == [
        *("model", "format", "dtype", "has_weights", "gpu", "gpu_by_specification", "budgets", "predicted", "fits"),
        *("tiers", "layers", "embedding_on", "head_on", "kv", "head", "context", "pages", "decode_tokens_per_s"),
        *("prefill_tokens_per_s", "crossover_tokens", "short_by", "parts", "notes", "advice"),
    ]
    assert result["predicted"] is True and result["fits"] is True
    assert result["format"] == "int4 g128" and result["gpu"] == "8 GiB" and result["context"] == 2048
    assert sum(result["layers"].values()) == 44 and result["layers"]["gpu"] > 20 and result["layers"]["disk"] == 0
    assert result["tiers"] == {tier: sum(parts.values()) for tier, parts in result["parts"].items()}
    assert all("layer_buffers" not in parts for parts in result["parts"].values())  # "ring", as scripts know it


HUB_ID = "EleutherAI/gpt-neox-20b"


@pytest.mark.parametrize(("words", "free", "expected"), [
    ("20b --context 512 --kv int8 --head int8", HOME_MEMORY, {"context": 512, "kv": "int8", "head": "int8"}),
    ("20b --gpu-memory 6GiB --cpu-memory 9GB", HOME_MEMORY, {"budgets": {"gpu": 6 << 30, "cpu": 9_000_000_000}}),
    ("20b --card RTX3060 --gpu-memory 8GiB", CPU_MEMORY, {"gpu_by_specification": True, "gpu": "RTX 3060"}),
    ("20b --card RTX3060 --gpu-memory 8GiB", CPU_MEMORY, {"budgets": {"gpu": 8 << 30, "cpu": 16 << 30}}),
    ("20b --cpu-memory 1GiB", CPU_MEMORY, {"fits": False}),
    ("20b", CPU_MEMORY, {"has_weights": False}),
    (HUB_ID, CPU_MEMORY, {"has_weights": None, "layers": {"gpu": 0, "cpu": 44, "disk": 0}}),
    ("int8", CPU_MEMORY, {"has_weights": True, "format": "int8 g64", "context": 512, "head": "fp16"}),
    ("int8 --head int8", CPU_MEMORY, {"head": "int8"}),
    (f"{DEMO} --format fp16", CPU_MEMORY, {"format": "fp16", "dtype": "float16"}),
])  # fmt: skip
def test_what_is_asked_for_is_planned(json_of, words, free, expected):
    result = json_of(*words.split(), free=free)
    assert {name: result[name] for name in expected} == expected
    assert result["fits"] == (result["short_by"] == 0)
    for tier, budget in result["budgets"].items():
        assert not result["fits"] or result["tiers"][tier] <= (budget or 0)


@pytest.mark.parametrize(("words", "found", "absent"), [
    ("20b --card 'rtx 3090'", ["runs on the GPU", "from the specifications of the RTX 3090"], "does not fit"),
    ("20b --cpu-memory 1GiB", [r"does not fit, \d\.\d GiB of CPU memory short",
        r"advice +\S+GiB of CPU memory, .* would make it run, with layers read from the disk"], "tokens/s"),
    ("20b --format int4", ["runs on the CPU", "missing   20b has no weights"], "--format"),
    ("20b --format fp16", ["fp16, context 2048: runs with layers read from the disk",
        "--format int4 would keep every layer off the disk"], "once quantized"),
    ("int8", ["measured speed", "neox-lite doctor --measure"], "no weights"),
    (HUB_ID, ["int4 g128, once quantized"], "no weights"),
    ("", ["measured speed", "neox-lite doctor --measure"], "specifications"),
    ("int8 --card 'RTX 3060'", ["measured speed", "neox-lite doctor --measure"], "no weights"),
    # Budgets of nothing, and below a gibibyte; no GPU is no less.
    ("--card 'RTX 3060' --gpu-memory 0", ["within 0 GiB of GPU and 16.0 GiB of CPU memory"], "no weights"),
    ("--cpu-memory 0", ["within 0 GiB of CPU memory"], "GPU"),
    ("--gpu-memory 0", ["within 16.0 GiB of CPU memory"], "GPU"),
    (f"{DEMO} --card 'RTX 3060' --gpu-memory 40MiB", [r"GPU .*\n +0 of 40 MiB\n", r"CPU .*\n +4\d\d MiB of 16\.0 GiB"], "0.0"),
])  # fmt: skip
def test_people_read_what_is_planned_and_why(run, words, found, absent):
    code, out, _ = run(*shlex.split(words))
    assert code == 0 and absent not in out
    for pattern in found:
        assert re.search(pattern, out), pattern


def test_a_quantized_folder_s_bytes_are_those_of_its_model(json_of, folders):
    result, model = json_of("int8"), GPTNeoXForCausalLM.from_pretrained(folders / "int8")
    embedding, mapped = model.gpt_neox.embed_in.weight.nbytes, result["parts"]["cpu"]["weights"]
    assert nbytes(model) - embedding < mapped <= nbytes(model)


def test_a_model_on_disk_is_planned_with_the_speed_of_its_own_disk(json_of, folders, monkeypatch):
    asked = []
    monkeypatch.setattr(profile, "disk_rate", lambda path: asked.append(path) or 1e6)
    least = json_of("int8", "--cpu-memory", "0B")["short_by"]
    result = json_of("int8", "--cpu-memory", f"{least}B")
    assert {path.resolve() for path in asked} == {folders / "int8" / "model.safetensors"} and result["layers"][
        "disk"
    ] > 0
    assert 1 / result["decode_tokens_per_s"] > result["tiers"]["disk"] / 1e6


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_picture_is_as_narrow_as_the_terminal_and_plain_where_the_encoding_lacks_blocks(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = run("20b", free=(4 << 30, 8 << 30))[1]
    assert max(map(len, out.splitlines())) <= columns
    bars = re.findall(r"^(GPU|CPU|DISK) +([█▓▒·]+)$", out, re.MULTILINE)
    assert [name for name, _ in bars] == ["GPU", "CPU", "DISK"]
    assert {len(bar) for _, bar in bars} == {min(columns, 100) - 6}
    assert "of 8.0 GiB" in out and "· free" in out
    monkeypatch.setattr("neox_lite_app.models.plan.can_print", lambda text: False)
    assert run("20b", free=(4 << 30, 8 << 30))[1].isascii()


def test_a_bar_is_as_long_as_its_shares():
    assert (
        bar_of({"weights": 50, "cache": 25, "layer_buffers": 5, "process": 5}, 100, 20, "#=-.")
        == "##########=====--..."
    )
    assert bar_of({"weights": 300}, 100, 10, "#=-.") == "#" * 10 and bar_of({}, 100, 4, "#=-.") == "...."


def test_the_table_holds_the_whole_family_in_both_formats(json_of):
    rows = json_of(free=HOME_MEMORY)["rows"]
    expected = [(member.id, f"{format} g128") for member in FAMILY for format in ("int4", "int8")]
    assert [(row["model"], row["format"]) for row in rows] == expected
    assert all(row["predicted"] and "layers" in row and "decode_tokens_per_s" in row for row in rows)


@pytest.mark.parametrize(("columns", "line"), [
    (200, r"gpt-neox-20b +2048 +int4 +\d"),
    (80, r"gpt-neox-20b +int4 +11\.5 GB +GPU \d+ \+ CPU \d+ +\d\.\d"),
    (40, ""),
])  # fmt: skip
def test_the_table_is_as_narrow_as_the_terminal(run, monkeypatch, columns, line):
    monkeypatch.setenv("COLUMNS", str(columns))
    out, names = run(free=HOME_MEMORY)[1], [member.name for member in FAMILY]
    assert max(map(len, out.splitlines())) <= columns
    assert [word for word in re.findall(r"^\S+", out, re.MULTILINE) if word in names] == names
    assert len(re.findall(r"\bint[48] +(?:\d\.\d|\d+)\S* [MG]B", out)) == 2 * len(FAMILY)
    assert re.search(line, out) and "+ with an int8 KV cache" in out
    everything_fits = run(free=(64 << 30, None))[1]
    assert " +" not in everything_fits and "int8 KV cache" not in everything_fits


@pytest.mark.parametrize("columns", ["20", "1", "0", "-3", "x", "99999999"])
@pytest.mark.parametrize("words", [(), (DEMO,)])
def test_no_width_is_too_odd(run, monkeypatch, columns, words):
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = run(*words, free=(4 << 30, 8 << 30))
    assert code == 0 and "predicted" in out


def test_a_plain_checkpoint_is_planned_in_its_own_dtype(run, json_of, tmp_path):
    half = json_of(DEMO, "--format", "fp16")
    GPTNeoXForCausalLM.from_pretrained(DEMO, dtype="float32").save_pretrained(tmp_path)
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    for _ in range(2):
        full = json_of(tmp_path, "--format", "fp16")
        assert (full["format"], full["dtype"]) == ("float32", "float32")
        weights = full["parts"]["cpu"]["weights"]
        assert nbytes(model) - model.gpt_neox.embed_in.weight.nbytes < weights <= nbytes(model)
        assert full["parts"]["cpu"]["cache"] == 2 * half["parts"]["cpu"]["cache"]
        config = json.loads((tmp_path / "config.json").read_text())
        untyped = {key: value for key, value in config.items() if "dtype" not in key}
        (tmp_path / "config.json").write_text(json.dumps(untyped))  # what loading takes then is what the weights have
    out = run(tmp_path, "--format", "fp16")[1]
    assert "float32, context 512: runs on the CPU" in out and "kept as   float32 KV cache, float32 head" in out
    assert "once quantized" not in out and "int4 g128, once quantized" in run(tmp_path)[1]
    int4 = [json_of(path)["parts"]["cpu"]["weights"] for path in (tmp_path, DEMO)]
    assert int4[0] == int4[1]  # quantized, what is left plain has 16 bits


@pytest.mark.parametrize("changed", ["dtype", "pickled"])
def test_layers_stay_on_the_disk_only_where_files_hold_them_as_they_run(run, json_of, tmp_path, changed):
    GPTNeoXForCausalLM.from_pretrained(DEMO).save_pretrained(tmp_path)
    words = (tmp_path, "--format", "fp16", "--cpu-memory")
    least = json_of(*words, "0")["short_by"]
    assert json_of(*words, f"{least}B")["layers"]["disk"] > 0
    if changed == "dtype":
        change_json(tmp_path / "config.json", dtype="bfloat16", torch_dtype="bfloat16")
    else:
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    result = json_of(*words, f"{least}B")
    assert not result["fits"] and result["layers"]["disk"] == 0
    out = run(*words, f"{least}B")[1]
    assert "disk      layers cannot stay there" in out and "--format int8 would" in out


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda weights: weights.write_bytes(b"short"), "model.safetensors"),
    (lambda weights: (weights.unlink(), weights.symlink_to("/nowhere")), "model.safetensors: cannot be read"),
    (lambda weights: weights.rename(weights.with_name("model-00001-of-00002.safetensors")), "index is missing"),
], ids=["cut", "dangling", "without-index"])  # fmt: skip
def test_weights_that_cannot_be_read_are_no_answer(run, folders, tmp_path, spoil, message):
    shutil.copytree(folders / "int8", tmp_path / "spoiled")
    spoil(tmp_path / "spoiled" / "model.safetensors")
    code, out, err = run(tmp_path / "spoiled")
    assert code == 1 and out == "" and len(err.splitlines()) == 1 and message in err


def test_the_help_says_what_the_exit_code_means(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "Exit code 0 says that there is an answer, not that MODEL fits" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("words", "message"), [
    (["/no/such/folder"], "no such folder"),
    ([DEMO, "--cpu-memory", ""], "--cpu-memory is '', expected a size such as 8GiB"),
    ([DEMO, "--gpu-memory", ""], "--gpu-memory is '', expected a size such as 8GiB"),
    ([DEMO, "--cpu-memory", "9" * 999], "--cpu-memory is '999"),
    ([DEMO, "--cpu-memory", "much"], "--cpu-memory is 'much', expected a size such as 8GiB"),
    ([DEMO, "--card", ""], "--card is '', expected one of RTX 3060"),
    ([DEMO, "--card", "RTX 1"], "--card is 'RTX 1', expected one of RTX 3060"),
    ([DEMO, "--gpu-memory", "8GiB"], "--gpu-memory: there is no GPU here"),
    ([DEMO, "--context", 4096], "context is 4096, but the model's own context is 512"),
    ([DEMO, "--format", "fp16", "--head", "int8"], "has no int8 head"),
    (["int8", "--format", "int4"], "is quantized already (int8 g64)"),
    (["--format", "int4"], "--format goes with MODEL only"),
    (["--revision", ""], "--revision goes with MODEL only"),
])  # fmt: skip
def test_failures_are_one_line_and_exit_1(run, words, message):
    code, out, err = run(*words)
    assert code == 1 and out == "" and len(err.splitlines()) == 1 and message in err


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("card", "gigabytes"), {"RTX 3060": 12, "RTX 4060 Ti": 16, "RTX 3090": 24, "RTX 4090": 24}.items()
)
def test_the_readme_s_table_of_cards_says_what_the_plan_does(json_of, card, gigabytes):
    (line,) = re.findall(rf"^\| {gigabytes}&nbsp;GB \|.*", README, re.MULTILINE)
    rows = json_of("--card", card, "--context", 2048)["rows"]
    found = {(row["model"], row["format"]): row for row in rows}
    whole = found["EleutherAI/gpt-neox-20b", "int4 g128"]
    assert whole["layers"]["gpu"] == 44 and f"{whole['decode_tokens_per_s']:.0f} on an {card}" in line
    assert (whole["kv"], whole["head"]) == (("int8", "int8") if gigabytes == 12 else ("fp16", "fp16"))
    also = re.findall(r"((?:Pythia|GPT-NeoX)-\S+?b)(?:, \S+)? as (int\d) \(([\d.]+) GB\)", line, re.IGNORECASE)
    assert also
    for name, format, total in also:
        row = found[f"EleutherAI/{name.lower()}", f"{format} g128"]
        assert set(row["layers"].values()) == {row["layers"]["gpu"], 0} and f"{row['tiers']['gpu'] / 1e9:.1f}" == total
