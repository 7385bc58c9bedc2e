"""A folder of a given size: the budget is kept, the choice is the best one, and the folder opens everywhere."""

import itertools
import json
import re

import pytest
import torch
from support.checkpoints import IDS, digests, write_source
from support.peers import beside_transformers, difference
from support.refusals import refused

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel
from neox_lite.checkpoint.reader import Checkpoint, verify_folder
from neox_lite.errors import ArgumentError, FormatError
from neox_lite.formats import GroupInt, formats_of, quantization_config
from neox_lite.layers import Linear
from neox_lite.loading.skeleton import Skeleton
from neox_lite_quant import convert
from neox_lite_quant.mixed import FORMATS, _activated, choose, predict, smallest, stored_bytes

F16 = torch.float16


def folder_bytes(folder):
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    write_source(folder, hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    return folder


open_model = GPTNeoXForCausalLM.from_pretrained


@pytest.fixture(scope="module")
def sizes(source, tmp_path_factory):
    """Bytes of the folders in one format."""
    root, found = tmp_path_factory.mktemp("uniform"), {}
    for format, size in (("int4", 128), ("int4", 32), ("int8", 32)):
        convert(source, root / f"{format}-{size}", format=format, group_size=size)
        found[format, size] = folder_bytes(root / f"{format}-{size}")
    return found


@pytest.fixture(scope="module")
def target(sizes):
    return (sizes["int4", 32] + sizes["int8", 32]) // 2


@pytest.fixture(scope="module")
def mixed(source, target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "model"
    return folder, convert(source, folder, target_size=target)


# The folder -----------------------------------------------------------------------------------------------------------


def test_a_folder_keeps_to_its_size_and_uses_most_of_it(source, sizes, tmp_path):
    low, high, last = sizes["int4", 128], sizes["int8", 32], 0.0
    for i in range(1, 6):
        wanted = low + (high - low) * i // 5 + 20_000 * (i == 5)
        report = convert(source, tmp_path / f"mix-{i}", target_size=wanted)
        assert wanted * 0.96 < folder_bytes(tmp_path / f"mix-{i}") <= wanted
        assert report.bits_per_weight > last and sum(report.mix.values()) == 12
        last = report.bits_per_weight
    assert last == 8.5 and report.mix == {"int8 g32": 12}


def test_a_mixed_folder_opens_here_and_in_transformers_with_equal_logits(mixed):
    folder, report = mixed
    assert len(report.mix) > 1 and verify_folder(folder) == []
    assert difference(*beside_transformers(folder, IDS)) < 1e-5  # float32 sums in another order


def test_its_patterns_are_not_tied_to_the_name_of_the_whole_model(mixed):
    config = json.loads((mixed[0] / "config.json").read_text())["quantization_config"]
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert len(config["config_groups"]) == len(mixed[1].mix) and all(t.startswith("re:.*layers") for t in targets)
    lookup = formats_of(config)
    for name, module in open_model(mixed[0]).gpt_neox.layers.named_modules():
        if isinstance(module, Linear):
            assert {lookup(f"{prefix}layers.{name}") for prefix in ("gpt_neox.", "model.", "")} == {module.format}


def test_layers_with_two_digits_are_told_apart():
    names = [f"gpt_neox.layers.{i}.mlp.dense_h_to_4h" for i in range(23)]
    formats = {name: FORMATS[i % len(FORMATS)] for i, name in enumerate(names)}
    lookup = formats_of(quantization_config(formats))
    assert all(lookup(name) == format for name, format in formats.items())


def test_the_same_model_gives_the_same_mix_and_saved_again_the_same_model(source, target, mixed, tmp_path):
    convert(source, tmp_path / "twice", target_size=target)
    assert digests(tmp_path / "twice") == digests(mixed[0])
    model = open_model(mixed[0])
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(model(IDS).logits, open_model(tmp_path / "again")(IDS).logits)


def test_a_mix_is_not_taken_for_one_of_its_formats(mixed, run):
    for format in ("int4", "int8"):
        told = r"is quantized already \(int4 and int8\); leave quantization out"
        refused(FormatError, told, open_model, mixed[0], quantization=format)
    code, out, _ = run("info", mixed[0], "--json")
    assert (code, json.loads(out)["format"]) == (0, "mixed")


def test_a_base_model_is_mixed_too(tmp_path):
    write_source(tmp_path / "base", cls=GPTNeoXModel)
    small = convert(tmp_path / "base", tmp_path / "int4").bytes_out
    report = convert(tmp_path / "base", tmp_path / "mix", target_size=small + 60_000)
    assert len(report.mix) > 1 and folder_bytes(tmp_path / "mix") <= small + 60_000
    assert GPTNeoXModel.from_pretrained(tmp_path / "mix")(IDS).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("method", ["rtn", "balance", "gptq"])
def test_every_method_rounds_a_mix(source, target, tmp_path, method):
    options = {"calibration_windows": 2} if method == "gptq" else {}
    report = convert(source, tmp_path / "mix", target_size=target, method=method, **options)
    assert len(report.mix) > 1 and folder_bytes(tmp_path / "mix") <= target and verify_folder(tmp_path / "mix") == []


# The choice -----------------------------------------------------------------------------------------------------------

TINY = GPTNeoXConfig(vocab_size=131, hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256)
NAMES = [f"gpt_neox.layers.0.{name}" for name in TINY.linear_shapes]
WEIGHT = [out * columns for out, columns, _ in TINY.linear_shapes.values()]


def losses_of(importances):
    return {
        name: {f: importance * 4.0**-f.bits * f.group_size**0.2 for f in FORMATS}
        for name, importance in zip(NAMES, importances, strict=True)
    }


@pytest.mark.parametrize("importances", [(1, 1, 1, 1), (100, 1, 1, 1), (1, 30, 2, 0.1), (0, 0, 5, 1)])
def test_the_choice_is_nearly_the_best_of_all(importances):
    losses, least = losses_of(importances), stored_bytes(smallest(TINY), TINY, F16)

    def total(mix):
        return sum(losses[name][format] for name, format in mix.items())

    every = [dict(zip(NAMES, formats, strict=True)) for formats in itertools.product(FORMATS, repeat=4)]
    every = [(stored_bytes(mix, TINY, F16), total(mix)) for mix in every]
    for extra in range(0, 140_000, 7_000):
        best = min(loss for size, loss in every if size <= least + extra)
        mix = choose(losses, TINY, F16, least + extra)
        assert stored_bytes(mix, TINY, F16) <= least + extra
        # knapsack: greedy is near, four things are few
        assert total(mix) <= best + 0.3 * (total(smallest(TINY)) - best)


def test_what_matters_more_gets_more_bits():
    least = stored_bytes(smallest(TINY), TINY, F16)
    mix = choose(losses_of((1, 1, 1000, 1)), TINY, F16, least + WEIGHT[2] // 2 + 64)
    assert mix[NAMES[2]].bits == 8 and all(mix[name].bits == 4 for name in NAMES if name != NAMES[2])


def predicted(source, changed=None, moments=None):
    """Predicted losses, with some weights of layer 0 multiplied, by name; moments: a function of the model's skeleton."""
    with Checkpoint.open(source) as checkpoint:
        config = GPTNeoXConfig.from_pretrained(source)
        skeleton = Skeleton(GPTNeoXForCausalLM, config, checkpoint, smallest(config), F16)
        factors = {f"gpt_neox.layers.0.{name}.weight": factor for name, factor in (changed or {}).items()}
        tensor, rows = checkpoint.tensor, checkpoint.rows
        skeleton.checkpoint.tensor = lambda name, sparse=False: tensor(name) * factors.get(name, 1)
        skeleton.checkpoint.rows = lambda name, *at: rows(name, *at) * factors.get(name, 1)
        return predict(skeleton, F16, "mse", moments=moments and moments(skeleton.model))


def test_predicted_losses_are_errors_of_outputs_for_inputs_of_those_sizes(source):
    """attention.dense and dense_4h_to_h write to the residual stream themselves: there the prediction is the error alone."""
    names, sizes = [f"gpt_neox.layers.1.{n}" for n in ("attention.dense", "mlp.dense_4h_to_h")], {}

    def moments(model):
        return sizes.update({n: torch.rand(model.get_submodule(n).in_features) for n in names}) or sizes

    found, ratios = predicted(source, moments=moments), []
    with Checkpoint.open(source) as checkpoint:
        for name, format in itertools.product(names, (GroupInt(4, 128), GroupInt(8, 32))):
            weight = checkpoint.tensor(f"{name}.weight").float()
            error = format.decode(format.encode(weight, F16), torch.float32) - weight
            ratios.append(float((error.square() @ sizes[name]).sum()) / found[name][format])
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-4)  # one factor: how large the stream is after the layer


def test_channels_that_a_norm_makes_large_count_more(source):
    up, qkv = (f"gpt_neox.layers.0.{n}" for n in ("mlp.dense_h_to_4h", "attention.query_key_value"))
    plain, large = predicted(source), predicted(source, {"post_attention_layernorm": 4.0})
    assert large[up][FORMATS[0]] / plain[up][FORMATS[0]] > 2 * large[qkv][FORMATS[0]] / plain[qkv][FORMATS[0]]


def test_errors_that_nothing_reads_cost_nothing(source):
    found = predicted(source, {"attention.dense": 0, "mlp.dense_4h_to_h": 0})
    for name in ("attention.query_key_value", "mlp.dense_h_to_4h"):
        first, second = (set(found[f"gpt_neox.layers.{layer}.{name}"].values()) for layer in (0, 1))
        assert first == {0.0} != second


def test_a_sample_of_rows_stands_for_all_of_them(source, monkeypatch):
    whole = predicted(source)
    monkeypatch.setattr("neox_lite_quant.mixed.SAMPLED", 64)
    for name, losses in predicted(source).items():
        assert losses == pytest.approx(whole[name], rel=0.5), name  # of 256 to 768 random rows


@pytest.mark.parametrize("activation", ["erf", "tanh"])
def test_moments_behind_the_activation_are_those_of_samples(activation):
    torch.manual_seed(0)
    mean, deviation = torch.tensor([-2.0, 0.0, 1.5]), torch.tensor([0.5, 1.0, 2.0])
    u = (mean + deviation * torch.randn(400_000, 3)).requires_grad_()
    y = torch.nn.functional.gelu(u, approximate="none" if activation == "erf" else "tanh")
    (slope,) = torch.autograd.grad(y.sum(), u)
    sampled = (y.square().mean(0), y.mean(0), slope.square().mean(0))
    for found, expected in zip(_activated(mean, deviation, activation), sampled, strict=True):
        assert torch.allclose(found, expected.detach(), rtol=0.02, atol=2e-3)


# Refusals and the command ---------------------------------------------------------------------------------------------


def test_a_size_that_nothing_fits_is_refused_with_the_least_that_does(source, tmp_path):
    mix, words = tmp_path / "mix", r"target size is 1000 bytes, but the smallest folder of this model is (\d+)"
    least = int(re.search(words, refused(ArgumentError, words, convert, source, mix, target_size=1000))[1])
    refused(ArgumentError, "smallest folder", convert, source, mix, target_size=least - 1)
    assert not mix.exists()
    assert convert(source, mix, target_size=least).mix == {"int4 g128": 12}


def test_rows_that_large_groups_do_not_divide_get_smaller_ones_or_are_refused(tmp_path):
    odd, mix = tmp_path / "odd", tmp_path / "mix"
    write_source(odd, hidden_size=48, num_attention_heads=2, intermediate_size=128)
    refused(FormatError, "in_features 48 is not divisible", convert, odd, mix, target_size=10**9)
    write_source(odd, hidden_size=96, num_attention_heads=4, intermediate_size=192)
    assert convert(odd, mix, target_size=10**9).mix == {"int8 g32": 8}
    assert open_model(mix)(IDS).logits.isfinite().all()


def test_a_format_and_a_size_exclude_each_other(source, tmp_path, run):
    mix = tmp_path / "mix"
    for options in ({"format": "int8"}, {"format": "nf4"}, {"group_size": 64}):
        told = "leave format and group_size out"
        refused(ArgumentError, told, convert, source, mix, target_size=10**9, **options)
    for words in (["--format", "int4"], ["--group-size", "32"]):
        code, _, err = run("quantize", source, mix, "--target-size", "1GB", *words)
        assert code == 1 and "leave --format and --group-size out" in err
    for size in ("12XB", "-1", "", "many"):
        code, _, err = run("quantize", source, mix, f"--target-size={size}")
        assert code == 1 and len(err.splitlines()) == 1
    assert not mix.exists()


def test_a_dry_run_shows_the_mix_and_writes_nothing(source, target, mixed, tmp_path, run):
    words = ["quantize", source, tmp_path / "mix", "--target-size", target, "--dry-run"]
    code, out, _ = run(*words, "--json")
    found, report = json.loads(out), mixed[1]
    expected = (0, dict(report.mix), report.bits_per_weight, report.bytes_out)
    assert (code, found["mix"], found["bits_per_weight"], found["bytes_out"]) == expected
    assert f"linear layers: {', '.join(f'{n} {k}' for k, n in sorted(found['mix'].items()))}" in run(*words)[1]
    assert not (tmp_path / "mix").exists()


# The head -------------------------------------------------------------------------------------------------------------


def test_the_small_head_can_be_left_out(source, tmp_path, run):
    assert run("quantize", source, tmp_path / "a", "--head", "none")[0] == 0
    with_head = convert(source, tmp_path / "b")
    assert folder_bytes(tmp_path / "b") - folder_bytes(tmp_path / "a") > 131 * 256
    assert with_head.bytes_out > convert(source, tmp_path / "c", small_head=False, dry_run=True).bytes_out
    convert(source, tmp_path / "b", small_head=False)  # removes the older one
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert not (folder / "neox_lite_head.safetensors").exists() and verify_folder(folder) == []
    assert open_model(tmp_path / "a")(IDS).logits.isfinite().all()
    refused(ArgumentError, "has no neox_lite_head", open_model, tmp_path / "a", head="int8")


def test_what_the_small_head_took_goes_to_the_layers(source, target, mixed):
    without = convert(source, "unused", target_size=target, small_head=False, dry_run=True)
    assert without.bits_per_weight > mixed[1].bits_per_weight
