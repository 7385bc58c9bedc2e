"""Placement: bytes exact against real tensors, budgets kept, and every promise of a plan checked by following it."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM, cache
from neox_lite.errors import ArgumentError, FormatError
from neox_lite.formats import GROUP_SIZES, GroupInt, formats_of, quantization_config
from neox_lite.generation import protocols
from neox_lite.offload import plan, profile
from neox_lite.offload.plan import CARDS, Card, Machine, Plan, Rates, Request, sizes_of
from neox_lite.units import parse_bytes
from neox_lite_app.cli import main
from neox_lite_app.models.family import FAMILY
from neox_lite_app.models.plan import bar_of
from neox_lite_app.models.random_model import SHAPES, RandomModel, config_of
from neox_lite_app.paths import DEMO

ODD = {
    "sequential-rotary100-tied": {
        "use_parallel_residual": False,
        "rotary_pct": 1.0,
        "tie_word_embeddings": True,
        "num_attention_heads": 3,
        "hidden_size": 192,
        "intermediate_size": 320,
    },
    "no-attention-bias": {
        "attention_bias": False,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 96,
    },
    "odd-vocabulary": {
        "vocab_size": 50277,
        "max_position_embeddings": 130,
        "rotary_pct": 0.5,
        "hidden_size": 288,
        "num_attention_heads": 3,
        "intermediate_size": 1152,
    },
}
CPU = Rates(30e9, 500e9, 20e-6)
SMALL_CARD = Card("8 GiB", 8 << 30, Rates(300e9, 20e12, 20e-6), 12e9, 512 << 20)
HOME = Machine(CPU, 2e9, 400 << 20, SMALL_CARD)


def odd(name, **keys):
    return GPTNeoXConfig(**{"num_hidden_layers": 3, "vocab_size": 503, **ODD[name], **keys})


def of_20b(**keys):
    return sizes_of(config_of("20b"), 4, **{"small_head": True, **keys})


def best(sizes, here, request):
    return plan.plan(sizes, here, request)


# Bytes ----------------------------------------------------------------------------------------------------------------


def built(config, bits, group):
    """The model on the meta device, in float16 as a folder holds it."""
    scheme = quantization_config(GroupInt(bits, group)) if bits else None
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            return GPTNeoXForCausalLM(config.copy(quantization_config=scheme))
    finally:
        torch.set_default_dtype(torch.float32)


def nbytes(module):
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("config", [*SHAPES, *ODD])
def test_sizes_are_those_of_the_real_tensors(config, bits):
    group = 32 if config in ODD else 128
    config = odd(config) if config in ODD else config_of(config)
    model, sizes = built(config, bits, group), sizes_of(config, bits, group)
    assert sizes.layers == tuple(nbytes(layer) for layer in model.gpt_neox.layers)
    assert sizes.embedding == sizes.head == model.gpt_neox.embed_in.weight.nbytes == model.embed_out.weight.nbytes
    assert sizes.rest == nbytes(model.gpt_neox.final_layer_norm) + nbytes(model.gpt_neox.rotary)
    assert sizes.total == nbytes(model)
    assert config.num_parameters == model.num_parameters()


def test_the_family_s_sizes_are_those_of_the_real_tensors():
    for member in FAMILY:
        config = member.config()
        assert sizes_of(config, 4).total == nbytes(built(config, 4, 128)), member.id


@pytest.mark.parametrize("name", ["pythia-70m", "sequential-rotary100-tied"])
def test_the_small_head_s_size_is_that_of_the_real_one(name):
    config = odd(name) if name in ODD else config_of(name)
    group = 64 if name in ODD else 128
    config.tie_word_embeddings = False  # a random model has a head of its own
    head = RandomModel(config, GroupInt(4, group), small_head=True).small_head
    assert sizes_of(config, 4, group, small_head=True).small_head == nbytes(head)


def test_layers_of_several_formats_are_counted_each_as_it_is():
    config, skipped = (
        odd("odd-vocabulary"),
        ["gpt_neox.layers.1.mlp.dense_h_to_4h", "gpt_neox.layers.2.attention.dense"],
    )
    scheme = quantization_config(GroupInt(4, 32), skipped)
    lookup = formats_of(scheme)

    def packing(name):
        format = lookup(name)
        return (format.bits, format.group_size) if isinstance(format, GroupInt) else None

    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config.copy(quantization_config=scheme))
    sizes = sizes_of(config, packing, scale_bytes=4, itemsize=4)
    assert sizes.layers == tuple(nbytes(layer) for layer in model.gpt_neox.layers) and len(set(sizes.layers)) == 3


@pytest.mark.parametrize(("kv", "dtype"), [("fp16", torch.float16), ("int8", torch.int8)])
def test_the_cache_s_size_is_that_of_the_real_one(kv, dtype):
    for config in (config_of("20b"), odd("odd-vocabulary")):
        layers = config.num_hidden_layers
        found = Plan(sizes_of(config, None), HOME, Request(130, 1 << 40, sequences=3, kv=kv), kv, "fp16", 0, 0, "cpu")
        pool = cache.PagePool(
            config.num_attention_heads, config.head_dim, dtype, [torch.device("meta")] * layers, pages=found.pages
        )
        assert found.pages == 6 and found.parts["cpu"]["cache"] == pool.nbytes


def test_a_file_s_windows_are_counted_as_random_rows_touch_them():
    sizes = of_20b()
    for context in (1, 50, 2048):
        found = Plan(sizes, HOME, Request(context, 1 << 40), "fp16", "fp16", 0, 44, "cpu")
        rows, row = random.Random(1), sizes.embedding // sizes.vocabulary
        touched = [
            len({rows.randrange(sizes.vocabulary) * row // plan.WINDOW for _ in range(context)}) for _ in range(9)
        ]
        mean = plan.WINDOW * sum(touched) / len(touched)
        assert found.parts["cpu"]["weights"] == pytest.approx(mean, rel=0.02)  # nine samples of thousands of windows


def test_sizes_name_a_row_that_groups_do_not_divide():
    with pytest.raises(FormatError, match=r"layers\.0\.attention\.query_key_value: .* 192 .* 128; try 32 or 64"):
        sizes_of(odd("sequential-rotary100-tied"), 4)


def test_numbers_that_stand_in_several_rooms_agree():
    assert (plan.PAGE, plan.CHUNK) == (cache.PAGE, protocols.PREFILL_TOKENS)
    assert sorted(plan.GROUP_SIZES) == sorted(GROUP_SIZES)


# Promises, on thousands of random cases -------------------------------------------------------------------------------


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
        sizes = sizes_of(config, rng.choice([None, 4, 8]), small_head=rng.random() < 0.7)
        rates = Rates(rng.uniform(200, 1000) * 1e9, rng.uniform(10, 150) * 1e12, rng.uniform(0, 20) * 1e-6)
        card = Card("a card", 8 << 30, rates, rng.uniform(6, 50) * 1e9, rng.randint(0, 600) << 20)
        slow = Rates(rng.uniform(5, 100) * 1e9, rng.uniform(0.05, 5) * 1e12, rng.uniform(20, 80) * 1e-6)
        here = Machine(slow, rng.choice([None, 5e8, 3e9]), rng.randint(100, 600) << 20, rng.choice([card, card, None]))
        whole = sizes.total + 2 * sizes.context * sizes.kv_fp16 * len(sizes.layers) + (1 << 30)
        yield (
            sizes,
            here,
            Request(
                context=rng.randint(1, sizes.context),
                cpu_bytes=int(whole * rng.choice([0, rng.random(), rng.random(), 1.2])),
                gpu_bytes=int(whole * rng.choice([0, rng.random(), rng.random(), 1.2])) if here.card else None,
                sequences=rng.choice([1, 1, 2, 4]),
                kv=rng.choice([None, "fp16", "int8"]),
                head=rng.choice([None, "fp16", *(["int8"] if sizes.small_head else [])]),
            ),
        )


def test_a_plan_never_exceeds_its_budgets_and_places_every_part_once():
    seen = set()
    for sizes, here, request in cases(3000, seed=1):
        found = plan._best(sizes, here, request)
        assert found.totals["gpu"] <= (request.gpu_bytes or 0)
        assert found.totals["cpu"] <= request.cpu_bytes + found.short_by and found.fits == (found.short_by == 0)
        order = [plan.TIERS[::-1].index(tier) for tier in found.layers]
        assert order == sorted(order) and len(order) == len(sizes.layers)
        parts, host = found.parts, found.gpu_layers < len(sizes.layers)
        kv = found.pages * plan.PAGE * sizes.kv_bytes(found.kv)
        assert sum(tier.get("cache", 0) for tier in parts.values()) == len(sizes.layers) * kv
        embedding = found._touched_bytes() if found.embedding_on == "cpu" else sizes.embedding
        if sizes.tied and found.head == "fp16" and found.embedding_on == found.head_on:
            embedding = 0  # one tensor
        rest = sizes.rest * (bool(found.gpu_layers) + host)
        expected = sum(sizes.layers) + sizes.head_bytes(found.head) + embedding + rest
        assert sum(tier.get("weights", 0) for tier in parts.values()) == expected
        assert found.embedding_on == "cpu" or not host
        ring = 2 * (max(sizes.layers) + (kv if found.mixed else 0)) if found.mixed or found.disk_layers else 0
        assert parts["cpu"]["ring"] == ring and parts["gpu"].get("ring", 0) == (ring if found.mixed else 0)
        assert request.kv in (None, found.kv) and request.head in (None, found.head)
        seen.add(found.level)
    assert seen == {plan.NO, plan.DISK, plan.CPU, plan.MIXED, plan.GPU}


def test_more_memory_never_gives_a_slower_plan_or_fewer_layers_on_the_gpu():
    rng = random.Random(2)
    for sizes, here, request in cases(3000, seed=2):
        request = replace(request, kv=request.kv or "fp16", head=request.head or "fp16")
        found, more = plan._best(sizes, here, request), int(rng.random() * sizes.total)
        grown = [replace(request, cpu_bytes=request.cpu_bytes + more)]
        grown += [replace(request, gpu_bytes=request.gpu_bytes + more)] if here.card else []
        for larger in (plan._best(sizes, here, r) for r in grown):
            assert larger.level >= found.level or (found.level == plan.CPU and larger.gpu_layers), (found, larger)
            if found.fits:
                assert larger.pass_s() <= found.pass_s(), (found, larger)
                assert larger.gpu_layers >= found.gpu_layers or larger.level > found.level, (found, larger)


def test_what_a_plan_is_short_by_makes_it_fit():
    for sizes, here, request in cases(2000, seed=3):
        found = plan._best(sizes, here, request)
        if not found.fits:
            assert plan._best(sizes, here, replace(request, cpu_bytes=request.cpu_bytes + found.short_by)).fits
            assert not plan._best(sizes, here, replace(request, cpu_bytes=request.cpu_bytes + found.short_by - 1)).fits


def followed(request, sentence):
    """The request as a sentence of advice would have it."""
    if found := re.match(r"an int8 .* \((kv|head)\) ", sentence):
        return replace(request, **{found[1]: "int8"})
    if found := re.match(r"a context of (\d+) ", sentence):
        return replace(request, context=int(found[1]))
    found = re.match(r"([\d.]+GiB) of (CPU|GPU) memory, ", sentence)
    return replace(request, **{f"{found[2].lower()}_bytes": parse_bytes(found[1])})


def test_following_advice_does_what_it_says():
    kinds = set()
    for sizes, here, request in cases(700, seed=4):
        found = best(sizes, here, request)
        for sentence in found.advice:
            lifted = best(sizes, here, followed(request, sentence))
            assert lifted.level > found.level and plan.GAINS[lifted.level] == sentence.partition(" would ")[2]
            kinds.add(sentence.split()[2])
        assert found.advice or found.level > plan.DISK
    assert kinds == {"KV", "head", "of", "CPU", "GPU"}


def test_the_least_degraded_choice_that_reaches_the_best_level_is_taken():
    for sizes, here, request in cases(700, seed=5):
        free = replace(request, kv=None, head=None)
        found = best(sizes, here, free)
        choices = [
            ("fp16", "fp16"),
            ("int8", "fp16"),
            *([("fp16", "int8"), ("int8", "int8")] if sizes.small_head else []),
        ]
        levels = [plan._best(sizes, here, replace(request, kv=kv, head=head)).level for kv, head in choices]
        if found.fits:
            assert (found.kv, found.head) == choices[levels.index(max(levels))]
        assert bool(found.notes) == ("int8" in (found.kv, found.head))


# Time -----------------------------------------------------------------------------------------------------------------


def test_a_decode_step_takes_the_time_of_its_bytes():
    sizes = of_20b()
    found = best(sizes, replace(HOME, card=None), Request(2048, 32 << 30))
    read = sum(sizes.layers) + sizes.head + 44 * 1024 * sizes.kv_fp16
    assert 1 / found.decode_tokens_per_s == pytest.approx(read / 30e9 + 44 * 20e-6)
    whole = best(sizes, replace(HOME, card=CARDS["RTX 3090"]), Request(2048, 32 << 30, 24 << 30))
    assert 1 / whole.decode_tokens_per_s == pytest.approx((read + 44 * 6144 * 100) / (0.92 * 936e9) + 44 * 20e-6)
    mixed = best(sizes, HOME, Request(2048, 16 << 30, 8 << 30))
    layer = sizes.layers[0] + 1024 * sizes.kv_fp16
    slow, fast = 44 - mixed.gpu_layers, mixed.gpu_layers
    expected = slow * (layer / 30e9 + 20e-6) + fast * (layer / 300e9 + 20e-6) + sizes.head / 300e9 + 40e-6
    assert 1 / mixed.decode_tokens_per_s == pytest.approx(expected)


def test_a_disk_sets_the_pace_of_what_it_holds():
    sizes, request = of_20b(), Request(2048, 8 << 30)
    here = replace(HOME, card=None)
    found = best(sizes, here, request)
    assert found.level == plan.DISK
    slower = best(sizes, replace(here, disk_bytes_per_s=1e9), request)
    assert 1 / slower.decode_tokens_per_s - 1 / found.decode_tokens_per_s == pytest.approx(
        found.disk_layers * sizes.layers[0] / 2e9, rel=1e-6
    )
    unknown = best(sizes, replace(here, disk_bytes_per_s=None), request)
    assert unknown.fits and unknown.decode_tokens_per_s is None and unknown.prefill_tokens_per_s is None


def test_passes_stream_from_the_crossover_on_and_never_before():
    found = best(of_20b(), HOME, Request(2048, 16 << 30, 8 << 30))
    turn, stored = found.crossover_tokens, found.sizes.layers[0]
    assert found.streamed_s(stored, turn) < found.in_place_s(stored, turn)
    assert found.streamed_s(stored, turn - 1) >= found.in_place_s(stored, turn - 1)
    bytes_a_weight = stored / found.sizes.weights
    assert turn == pytest.approx(CPU.flops_per_s * bytes_a_weight / (2 * SMALL_CARD.bus_bytes_per_s), abs=2)
    without = replace(found, machine=replace(HOME, card=replace(SMALL_CARD, bus_bytes_per_s=1e6)))
    assert without.pass_s(turn - 1, 0) == pytest.approx(found.pass_s(turn - 1, 0))
    assert without.pass_s(4 * turn, 0) > found.pass_s(4 * turn, 0) and without.crossover_tokens is None


def test_plain_layers_have_a_rate_and_scratch_of_their_own():
    """The CPU writes plain weights out as float32 for many tokens, 64 MiB at a time."""
    config, request = config_of("pythia-1.4b"), Request(512, 32 << 30)
    here = Machine(replace(CPU, plain_flops_per_s=100e9), 2e9, 400 << 20, None)
    plain, int4 = (best(sizes_of(config, bits), here, request) for bits in (None, 4))
    assert plain.pass_s(512, 0) == pytest.approx(5 * int4.pass_s(512, 0), rel=0.05)  # 500 operations for 100
    assert plain.parts["cpu"]["scratch"] - int4.parts["cpu"]["scratch"] == (32 << 20) + 2 * (64 << 20)
    narrow = best(sizes_of(config_of("pythia-160m"), None), here, request)
    assert narrow.parts["cpu"]["scratch"] < (32 << 20) + 2 * 4 * 768 * 3072 + (16 << 20)


def test_graphs_of_decode_steps_are_counted_where_the_whole_model_is_on_the_gpu():
    """Logits for 1, 2, 4 and 8 rows, and 8 rows of ids and values; none between two memories, where no step is a graph."""
    sizes, here = of_20b(), replace(HOME, card=SMALL_CARD)
    whole, mixed = (best(sizes, here, Request(512, 32 << 30, size << 30, 5)) for size in (24, 8))
    assert (whole.level, mixed.level) == (plan.GPU, plan.MIXED)
    logits, lists = (1 + 2 + 4 + 8) * sizes.vocabulary * 4, 8 * sizes.vocabulary * 8
    activations = 8 * 2 * (8 * sizes.hidden + 2.5 * sizes.inner)
    assert whole.parts["gpu"]["graphs"] == (16 << 20) + logits + lists + activations
    assert mixed.parts["gpu"]["graphs"] == 0


def test_there_is_no_crossover_without_both_memories():
    assert best(of_20b(), replace(HOME, card=None), Request(2048, 32 << 30)).crossover_tokens is None
    whole = best(of_20b(), replace(HOME, card=CARDS["RTX 4090"]), Request(2048, 32 << 30, 24 << 30))
    assert whole.level == plan.GPU and whole.crossover_tokens is None and whole.embedding_on == "gpu"


def test_a_longer_pass_never_takes_less_time():
    for sizes, here, request in cases(300, seed=6):
        found = plan._best(sizes, here, request)
        times = [found.pass_s(n, cached) for cached in (0, request.context) for n in (1, 2, 8, 64, 512)]
        assert times[:5] == sorted(times[:5]) and times[5:] == sorted(times[5:]) and times[0] <= times[5]


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"context": 4096}, "context is 4096, but the model's own context is 2048"),
        ({"context": 0}, "context is 0"),
        ({"sequences": 0}, "sequences is 0"),
        ({"cpu_bytes": -1}, "cpu_bytes is -1"),
        ({"kv": "int4"}, "kv is 'int4'"),
        ({"head": "int8"}, "has no int8 head"),
        ({"gpu_bytes": 1}, "has no GPU"),
    ],
)
def test_what_cannot_be_planned_is_named(keys, message):
    with pytest.raises(ArgumentError, match=message):
        best(
            of_20b(small_head=False),
            replace(HOME, card=None),
            Request(**{"context": 2048, "cpu_bytes": 1 << 40, **keys}),
        )


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, monkeypatch):
    """The command on a machine of 16 GiB without a GPU, or with the one that it is called with."""

    def call(*words, here=HOME, free=(16 << 30, None)):
        monkeypatch.setattr(profile, "profile", lambda measure: replace(here, card=here.card if free[1] else None))
        monkeypatch.setattr(profile, "free_memory", lambda: (64 << 30, free[0] + profile.HOST_MARGIN))
        monkeypatch.setattr(profile, "_own_memory", lambda: None)
        if free[1] is not None:
            driver = here.card.context_bytes - profile.GPU_MARGIN
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(profile, "free_gpu", lambda gpu: (here.card.bytes, free[1] - driver))
        code = main(["plan", *map(str, words)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "neox-20b"
    config_of("20b").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "int8"
    assert main(["quantize", str(DEMO), str(path), "--format", "int8", "--group-size", "64"]) == 0
    return path


def test_the_command_s_json_holds_the_contract(run, folder):
    code, out, err = run(folder, "--json", free=(16 << 30, 8 << 30))
    result = json.loads(out)
    assert code == 0 and err == "" and result["predicted"] is True and result["fits"] is True
    assert {
        *("tiers", "layers", "decode_tokens_per_s", "prefill_tokens_per_s", "kv", "head", "context"),
        *("crossover_tokens", "short_by", "advice", "parts", "notes", "gpu", "budgets"),
    } <= result.keys()
    assert result["format"] == "int4 g128" and result["gpu"] == "8 GiB" and result["context"] == 2048
    assert sum(result["layers"].values()) == 44 and result["layers"]["gpu"] > 20 and result["layers"]["disk"] == 0
    assert result["tiers"] == {tier: sum(parts.values()) for tier, parts in result["parts"].items()}


def test_options_are_planned_for(run, folder):
    words = (
        "--context",
        512,
        "--kv",
        "int8",
        "--head",
        "int8",
        "--gpu-memory",
        "6GiB",
        "--cpu-memory",
        "9GB",
        "--json",
    )
    result = json.loads(run(folder, *words, free=(16 << 30, 8 << 30))[1])
    assert (result["context"], result["kv"], result["head"]) == (512, "int8", "int8")
    assert result["budgets"] == {"gpu": 6 << 30, "cpu": 9_000_000_000}
    assert result["tiers"]["gpu"] <= 6 << 30 and result["tiers"]["cpu"] <= 9_000_000_000


def test_a_card_is_planned_for_by_its_specifications_and_labelled(run, folder):
    code, out, _ = run(folder, "--card", "rtx 3090")
    assert code == 0 and "runs on the GPU" in out and "predicted from the specifications of the RTX 3090" in out
    result = json.loads(run(folder, "--card", "RTX3060", "--gpu-memory", "8GiB", "--json")[1])
    assert result["gpu_by_specification"] and result["gpu"] == "RTX 3060" and result["budgets"]["gpu"] == 8 << 30


def test_what_does_not_fit_is_an_answer_with_the_bytes_that_lack(run, folder):
    code, out, _ = run(folder, "--cpu-memory", "1GiB")
    assert code == 0 and re.search(r"does not fit, \d\.\d GiB of CPU memory short", out) and "tokens/s" not in out
    assert re.search(r"advice +\S+GiB of CPU memory, .* would make it run, with layers read from the disk", out)
    code, out, _ = run(folder, "--cpu-memory", "1GiB", "--json")
    assert code == 0 and json.loads(out)["fits"] is False and json.loads(out)["short_by"] > 0


def test_a_smaller_format_is_advised_where_it_helps(run, folder):
    out = run(folder, "--format", "fp16")[1]
    assert "fp16, context 2048: runs with layers read from the disk" in out
    assert "--format int4 would keep every layer off the disk" in out
    assert "runs on the CPU" in run(folder, "--format", "int4")[1]


def test_a_quantized_folder_is_planned_as_it_is(run, int8):
    result = json.loads(run(int8, "--json")[1])
    model = GPTNeoXForCausalLM.from_pretrained(int8)
    assert result["format"] == "int8 g64" and result["context"] == model.config.max_position_embeddings
    embedding, mapped = model.gpt_neox.embed_in.weight.nbytes, result["parts"]["cpu"]["weights"]
    assert nbytes(model) - embedding < mapped <= nbytes(model)
    assert json.loads(run(int8, "--head", "int8", "--json")[1])["head"] == "int8"
    code, _, err = run(int8, "--format", "int4")
    assert code == 1 and "is quantized already (int8 g64)" in err


def test_a_model_on_disk_is_planned_with_the_speed_of_its_own_disk(run, int8, monkeypatch):
    asked = []
    monkeypatch.setattr(profile, "disk_rate", lambda path: asked.append(path) or 1e6)
    least = json.loads(run(int8, "--cpu-memory", "0B", "--json")[1])["short_by"]
    result = json.loads(run(int8, "--cpu-memory", f"{least}B", "--json")[1])
    assert set(asked) == {int8 / "model.safetensors"} and result["layers"]["disk"] > 0
    assert 1 / result["decode_tokens_per_s"] > result["tiers"]["disk"] / 1e6


def test_the_picture_is_bounded_and_plain_where_the_encoding_lacks_blocks(run, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(folder, free=(4 << 30, 8 << 30))[1].splitlines()
    bars = [line for line in lines if re.match(r"(GPU|CPU|DISK) ", line)]
    assert [line[:4].strip() for line in bars] == ["GPU", "CPU", "DISK"] and max(map(len, bars)) <= 80
    assert len({re.search("[█▓▒·]+", line).span() for line in bars}) == 1
    monkeypatch.setattr("neox_lite_app.models.plan.can_print", lambda text: False)
    assert run(folder, free=(4 << 30, 8 << 30))[1].isascii()


def test_a_bar_is_as_long_as_its_shares():
    assert bar_of({"weights": 50, "cache": 25, "ring": 5, "process": 5}, 100, 20, "#=-.") == "##########=====--..."
    assert bar_of({"weights": 300}, 100, 10, "#=-.") == "#" * 10 and bar_of({}, 100, 4, "#=-.") == "...."


def test_the_table_holds_the_whole_family_in_both_formats(run):
    code, out, _ = run("--json", free=(16 << 30, 8 << 30))
    rows = json.loads(out)["rows"]
    assert code == 0 and len(rows) == 2 * len(FAMILY) and {row["format"] for row in rows} == {"int4 g128", "int8 g128"}
    assert {row["model"] for row in rows} == {member.id for member in FAMILY}
    assert all(row["predicted"] and "layers" in row and "decode_tokens_per_s" in row for row in rows)
    out = run(free=(16 << 30, 8 << 30))[1].splitlines()
    assert len(out) == len(FAMILY) + 5 and out[1].split()[:2] == ["checkpoint", "context"]
    assert any(line.endswith(" +") or " +  " in line for line in out[2:-3]) and out[-1].startswith("+ with an int8")
    assert re.search(r"gpt-neox-20b +2048 +11\.5 GB +GPU \d+ \+ CPU \d+", "\n".join(out))


def test_a_plus_is_explained_only_where_there_is_one(run):
    out = run(free=(64 << 30, None))[1]
    assert " +" not in out and "int8 KV cache" not in out


def test_a_budget_of_nothing_is_said(run):
    assert "within 0 GiB of GPU and 16.0 GiB of CPU memory" in run("--card", "RTX 3060", "--gpu-memory", 0)[1]
    assert "within 0 GiB of CPU memory" in run("--cpu-memory", 0)[1]
    assert "within 16.0 GiB of CPU memory" in run("--gpu-memory", 0)[1]  # and no GPU is no less


def test_memory_below_a_gibibyte_is_told_in_smaller_units(run):
    out = run(DEMO, "--card", "RTX 3060", "--gpu-memory", "40MiB")[1]
    assert re.search(r"GPU .* 0 of 40 MiB", out) and re.search(r"CPU .* 4\d\d MiB of 16\.0 GiB", out)
    assert "0.0" not in out


@pytest.mark.parametrize("columns", [100, 80, 40])
def test_the_table_is_as_narrow_as_the_terminal(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = run(free=(16 << 30, 8 << 30))[1].splitlines()
    assert max(map(len, out)) <= columns
    names = [line.split()[0] for line in out if line and not line.startswith(" ")]
    assert [name for name in names if name in {m.name for m in FAMILY}] == [m.name for m in FAMILY]
    assert all(sum(f" {format} " in f" {line} " for line in out) >= 1 for format in ("int4", "int8"))
    assert len(re.findall(r"\d\.\d GB|\d+ [MG]B", "\n".join(out))) >= 2 * len(FAMILY)


def test_the_picture_is_as_narrow_as_the_terminal_and_its_bars_stay_whole(run, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("COLUMNS", "40")
    out = run(folder.name, free=(4 << 30, 8 << 30))[1].splitlines()
    assert max(map(len, out)) <= 40
    bars = [line for line in out if re.match(r"(GPU|CPU|DISK) ", line)]
    assert len(bars) == 3 and {len(re.fullmatch(r"\w+ +([█▓▒·]+)", line)[1]) for line in bars} == {34}
    assert "of 8.0 GiB" in " ".join(out) and "· free" in " ".join(out)


@pytest.mark.parametrize("columns", ["20", "1", "0", "-3", "x", "99999999"])
@pytest.mark.parametrize("words", [(), (DEMO,)])
def test_no_width_is_too_odd(run, monkeypatch, columns, words):
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = run(*words, free=(4 << 30, 8 << 30))
    assert code == 0 and "predicted" in out


def test_a_plain_checkpoint_is_planned_in_its_own_dtype(run, tmp_path):
    half = json.loads(run(DEMO, "--format", "fp16", "--json")[1])
    assert (half["format"], half["dtype"]) == ("fp16", "float16")
    GPTNeoXForCausalLM.from_pretrained(DEMO, dtype="float32").save_pretrained(tmp_path)
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    for _ in range(2):
        full = json.loads(run(tmp_path, "--format", "fp16", "--json")[1])
        assert (full["format"], full["dtype"]) == ("float32", "float32")
        weights = full["parts"]["cpu"]["weights"]
        assert nbytes(model) - model.gpt_neox.embed_in.weight.nbytes < weights <= nbytes(model)
        assert full["parts"]["cpu"]["cache"] == 2 * half["parts"]["cpu"]["cache"]
        config = json.loads((tmp_path / "config.json").read_text())
        kept = {key: value for key, value in config.items() if "dtype" not in key}
        (tmp_path / "config.json").write_text(json.dumps(kept))  # what loading takes then is what the weights have
    out = run(tmp_path, "--format", "fp16")[1]
    assert "float32, context 512: runs on the CPU" in out and "kept as   float32 KV cache, float32 head" in out
    assert "once quantized" not in out and "int4 g128, once quantized" in run(tmp_path)[1]
    int4 = [json.loads(run(path, "--json")[1])["parts"]["cpu"]["weights"] for path in (tmp_path, DEMO)]
    assert int4[0] == int4[1]  # quantized, what is left plain has 16 bits


def test_a_folder_without_weights_is_planned_and_said_to_have_none(run, folder, int8):
    assert "missing   " + f"{folder} has no weights" in run(folder)[1]
    assert json.loads(run(folder, "--json")[1])["has_weights"] is False
    assert "no weights" not in run(int8)[1] and json.loads(run(int8, "--json")[1])["has_weights"] is True


def test_a_hub_id_is_planned_from_its_configuration_alone(run, folder, monkeypatch):
    monkeypatch.setattr("neox_lite_app.models.plan.fetch_files", lambda name, files, revision: folder)
    result = json.loads(run("EleutherAI/gpt-neox-20b", "--json")[1])
    assert result["has_weights"] is None and sum(result["layers"].values()) == 44
    assert "no weights" not in run("EleutherAI/gpt-neox-20b")[1]


@pytest.mark.parametrize("changed", ["dtype", "pickled"])
def test_layers_stay_on_the_disk_only_where_files_hold_them_as_they_run(run, tmp_path, changed):
    GPTNeoXForCausalLM.from_pretrained(DEMO).save_pretrained(tmp_path)
    words = (tmp_path, "--format", "fp16", "--cpu-memory")
    least = json.loads(run(*words, "0", "--json")[1])["short_by"]
    assert json.loads(run(*words, f"{least}B", "--json")[1])["layers"]["disk"] > 0
    if changed == "dtype":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    else:
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    result = json.loads(run(*words, f"{least}B", "--json")[1])
    assert not result["fits"] and result["layers"]["disk"] == 0
    out = run(*words, f"{least}B")[1]
    assert "disk      layers cannot stay there" in out and "--format int8 would" in out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights: weights.write_bytes(b"short"), "model.safetensors"),
        (lambda weights: (weights.unlink(), weights.symlink_to("/nowhere")), "model.safetensors: cannot be read"),
        (lambda weights: weights.rename(weights.with_name("model-00001-of-00002.safetensors")), "index is missing"),
    ],
    ids=["cut", "dangling", "without-index"],
)
def test_weights_that_cannot_be_read_are_no_answer(run, int8, tmp_path, spoil, message):
    shutil.copytree(int8, tmp_path / "spoiled")
    spoil(tmp_path / "spoiled" / "model.safetensors")
    code, out, err = run(tmp_path / "spoiled")
    assert code == 1 and out == "" and len(err.splitlines()) == 1 and message in err


def test_a_plan_says_how_to_measure_anew(run):
    for words in ((DEMO,), (DEMO, "--card", "RTX 3060"), ()):
        assert "measured speed" in (out := run(*words)[1]) and "neox-lite doctor --measure" in out


def test_the_help_says_what_the_exit_code_means(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "Exit code 0 says that there is an answer, not that MODEL fits" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/no/such/folder"], "no such folder"),
        ([DEMO, "--cpu-memory", ""], "--cpu-memory is '', expected a size such as 8GiB"),
        ([DEMO, "--gpu-memory", ""], "--gpu-memory is '', expected a size such as 8GiB"),
        ([DEMO, "--cpu-memory", "9" * 999], "--cpu-memory is '999"),
        ([DEMO, "--card", ""], "--card is '', expected one of RTX 3060"),
        (["--revision", ""], "--revision goes with MODEL only"),
        ([DEMO, "--card", "RTX 1"], "--card is 'RTX 1', expected one of RTX 3060"),
        ([DEMO, "--gpu-memory", "8GiB"], "--gpu-memory: there is no GPU here"),
        ([DEMO, "--cpu-memory", "much"], "--cpu-memory is 'much', expected a size such as 8GiB"),
        ([DEMO, "--context", 4096], "context is 4096, but the model's own context is 512"),
        ([DEMO, "--format", "fp16", "--head", "int8"], "has no int8 head"),
        (["--format", "int4"], "--format goes with MODEL only"),
    ],
)
def test_failures_are_one_line_and_exit_1(run, words, message):
    code, out, err = run(*words)
    assert code == 1 and out == "" and len(err.splitlines()) == 1 and message in err


@pytest.mark.parametrize("words", [["--format", "int3"], ["--kv", "int4"], ["a", "b"], ["--context", "0"]])
def test_wrong_usage_is_one_line_and_exits_2(run, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("card", "gigabytes"), [("RTX 3060", 12), ("RTX 4060 Ti", 16), ("RTX 3090", 24), ("RTX 4090", 24)]
)
def test_the_readme_s_table_of_cards_says_what_the_plan_does(run, card, gigabytes):
    (line,) = re.findall(rf"^\| {gigabytes}&nbsp;GB \|.*", README, re.MULTILINE)
    rows = json.loads(run("--card", card, "--context", 2048, "--json")[1])["rows"]
    found = {(row["model"], row["format"]): row for row in rows}
    whole = found["EleutherAI/gpt-neox-20b", "int4 g128"]
    assert whole["layers"]["gpu"] == 44 and f"{whole['decode_tokens_per_s']:.0f} on an {card}" in line
    assert (whole["kv"], whole["head"]) == (("int8", "int8") if gigabytes == 12 else ("fp16", "fp16"))
    also = re.findall(r"((?:Pythia|GPT-NeoX)-\S+?b)(?:, \S+)? as (int\d) \(([\d.]+) GB\)", line, re.IGNORECASE)
    assert also
    for name, format, gigabytes in also:
        row = found[f"EleutherAI/{name.lower()}", f"{format} g128"]
        assert (
            set(row["layers"].values()) == {row["layers"]["gpu"], 0} and f"{row['tiers']['gpu'] / 1e9:.1f}" == gigabytes
        )
