"""A folder of a given size: the budget is kept, the choice is the best one, and the folder opens everywhere."""

import itertools
import json

import pytest
import torch
from support.checkpoints import IDS, digests, write_source
from support.peers import opened_by_transformers

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel
from neox_lite.checkpoint.reader import Checkpoint, verify_folder
from neox_lite.errors import ArgumentError, FormatError
from neox_lite.formats import GroupInt, formats_of, quantization_config
from neox_lite.layers import Linear
from neox_lite.loading.skeleton import Skeleton
from neox_lite_app.cli import main
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


def formats_in(folder):
    linears = GPTNeoXForCausalLM.from_pretrained(folder).gpt_neox.layers.named_modules()
    return {f"gpt_neox.layers.{name}": m.format for name, m in linears if isinstance(m, Linear)}


# The folder -----------------------------------------------------------------------------------------------------------


def test_a_folder_keeps_to_its_size_and_uses_most_of_it(source, sizes, tmp_path):
    low, high = sizes["int4", 128], sizes["int8", 32]
    last = 0.0
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
    peer = opened_by_transformers(folder)
    ours = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32, exact=True)
    with torch.no_grad():
        assert float((ours(IDS).logits - peer(IDS).logits).abs().max()) < 1e-5  # float32 sums in another order


def test_its_patterns_are_not_tied_to_the_name_of_the_whole_model(mixed):
    config = json.loads((mixed[0] / "config.json").read_text())["quantization_config"]
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert len(config["config_groups"]) == len(mixed[1].mix) and all(t.startswith("re:.*layers") for t in targets)
    lookup = formats_of(config)
    for name, format in formats_in(mixed[0]).items():
        assert lookup(name) == lookup(name.replace("gpt_neox.", "model.")) == lookup(name[9:]) == format


def test_layers_with_two_digits_are_told_apart():
    names = [f"gpt_neox.layers.{i}.mlp.dense_h_to_4h" for i in range(23)]
    formats = {name: FORMATS[i % len(FORMATS)] for i, name in enumerate(names)}
    lookup = formats_of(quantization_config(formats))
    assert all(lookup(name) == format for name, format in formats.items())


def test_the_same_model_gives_the_same_mix(source, target, mixed, tmp_path):
    convert(source, tmp_path / "again", target_size=target)
    assert digests(tmp_path / "again") == digests(mixed[0])


def test_a_mixed_folder_saved_again_is_the_same_model(mixed, tmp_path):
    model = GPTNeoXForCausalLM.from_pretrained(mixed[0])
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(model(IDS).logits, GPTNeoXForCausalLM.from_pretrained(tmp_path / "again")(IDS).logits)


def test_a_mix_is_not_taken_for_one_of_its_formats(mixed):
    for format in ("int4", "int8"):
        with pytest.raises(FormatError, match=r"is quantized already \(int4 and int8\); leave quantization out"):
            GPTNeoXForCausalLM.from_pretrained(mixed[0], quantization=format)


def test_a_base_model_is_mixed_too(sizes, tmp_path):
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
        assert total(mix) <= best + 0.3 * (
            total(smallest(TINY)) - best
        )  # knapsack: greedy is near, four things are few


def test_what_matters_more_gets_more_bits():
    least = stored_bytes(smallest(TINY), TINY, F16)
    mix = choose(losses_of((1, 1, 1000, 1)), TINY, F16, least + WEIGHT[2] // 2 + 64)
    assert mix[NAMES[2]].bits == 8 and all(mix[name].bits == 4 for name in NAMES if name != NAMES[2])


def test_predicted_losses_are_errors_of_outputs_for_inputs_of_those_sizes(source, tmp_path):
    """attention.dense and dense_4h_to_h write to the residual stream themselves: there the prediction is the error alone."""
    config = GPTNeoXConfig.from_pretrained(source)
    with Checkpoint.open(source) as checkpoint:
        skeleton = Skeleton(GPTNeoXForCausalLM, config, checkpoint, smallest(config), F16)
        names = [f"gpt_neox.layers.1.{n}" for n in ("attention.dense", "mlp.dense_4h_to_h")]
        moments = {n: torch.rand(skeleton.model.get_submodule(n).in_features) for n in names}
        found = predict(skeleton, F16, "mse", moments=moments)
        ratios = []
        for name in names:
            weight = checkpoint.tensor(f"{name}.weight").float()
            for format in (GroupInt(4, 128), GroupInt(8, 32)):
                error = format.decode(format.encode(weight, F16), torch.float32) - weight
                ratios.append(float((error.square() @ moments[name]).sum()) / found[name][format])
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-4)  # one factor: how large the stream is after the layer


def test_channels_that_a_norm_makes_large_count_more(source):
    def losses(gain):
        with Checkpoint.open(source) as checkpoint:
            config = GPTNeoXConfig.from_pretrained(source)
            skeleton = Skeleton(GPTNeoXForCausalLM, config, checkpoint, smallest(config), F16)
            tensor, name = checkpoint.tensor, "gpt_neox.layers.0.post_attention_layernorm.weight"
            skeleton.checkpoint.tensor = lambda n, sparse=False: tensor(n) * (gain if n == name else 1)
            return predict(skeleton, F16, "mse")

    up, qkv = (f"gpt_neox.layers.0.{n}" for n in ("mlp.dense_h_to_4h", "attention.query_key_value"))
    plain, large = losses(1.0), losses(4.0)
    assert large[up][FORMATS[0]] / plain[up][FORMATS[0]] > 2 * large[qkv][FORMATS[0]] / plain[qkv][FORMATS[0]]


def predicted(source, changed=None):
    """Predicted losses, with some weights of layer 0 multiplied."""
    with Checkpoint.open(source) as checkpoint:
        config, rows = GPTNeoXConfig.from_pretrained(source), checkpoint.rows
        skeleton = Skeleton(GPTNeoXForCausalLM, config, checkpoint, smallest(config), F16)
        factors = {f"gpt_neox.layers.0.{name}.weight": factor for name, factor in (changed or {}).items()}
        skeleton.checkpoint.rows = lambda name, *at: rows(name, *at) * factors.get(name, 1)
        return predict(skeleton, F16, "mse")


def test_errors_that_nothing_reads_cost_nothing(source):
    found = predicted(source, {"attention.dense": 0, "mlp.dense_4h_to_h": 0})
    for name in ("attention.query_key_value", "mlp.dense_h_to_4h"):
        assert (
            set(found[f"gpt_neox.layers.0.{name}"].values())
            == {0.0}
            != set(found[f"gpt_neox.layers.1.{name}"].values())
        )


def test_a_sample_of_rows_stands_for_all_of_them(source, monkeypatch):
    whole = predicted(source)
    monkeypatch.setattr("neox_lite_quant.mixed.SAMPLED", 64)
    for name, losses in predicted(source).items():
        for format, loss in losses.items():
            assert loss == pytest.approx(whole[name][format], rel=0.5), (name, format)  # of 256 to 768 random rows


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
    with pytest.raises(
        ArgumentError, match=r"target size is 1000 bytes, but the smallest folder of this model is (\d+)"
    ) as e:
        convert(source, tmp_path / "mix", target_size=1000)
    assert not (tmp_path / "mix").exists()
    least = int(str(e.value).split("model is ")[1].split(";")[0])
    assert convert(source, tmp_path / "mix", target_size=least).mix == {"int4 g128": 12}
    with pytest.raises(ArgumentError, match="smallest folder"):
        convert(source, tmp_path / "other", target_size=least - 1)


def test_rows_that_no_group_divides_are_refused(tmp_path):
    write_source(tmp_path / "odd", hidden_size=48, num_attention_heads=2, intermediate_size=128)
    with pytest.raises(FormatError, match="in_features 48 is not divisible"):
        convert(tmp_path / "odd", tmp_path / "mix", target_size=10**9)


def test_rows_that_large_groups_do_not_divide_get_smaller_ones(tmp_path):
    write_source(tmp_path / "odd", hidden_size=96, num_attention_heads=4, intermediate_size=192)
    report = convert(tmp_path / "odd", tmp_path / "mix", target_size=10**9)
    assert (
        report.mix == {"int8 g32": 8}
        and GPTNeoXForCausalLM.from_pretrained(tmp_path / "mix")(IDS).logits.isfinite().all()
    )


def test_a_format_and_a_size_exclude_each_other(source, tmp_path, capsys):
    for options in ({"format": "int8"}, {"format": "nf4"}, {"group_size": 64}):
        with pytest.raises(ArgumentError, match="leave format and group_size out"):
            convert(source, tmp_path / "mix", target_size=10**9, **options)
    for words in (["--format", "int4"], ["--group-size", "32"]):
        assert main(["quantize", str(source), str(tmp_path / "mix"), "--target-size", "1GB", *words]) == 1
        assert "leave --format and --group-size out" in capsys.readouterr().err
    for size in ("12XB", "-1", "", "many"):
        assert main(["quantize", str(source), str(tmp_path / "mix"), f"--target-size={size}"]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "mix").exists()


def test_a_dry_run_shows_the_mix_and_writes_nothing(source, target, mixed, tmp_path, capsys):
    words = ["quantize", str(source), str(tmp_path / "mix"), "--target-size", str(target), "--dry-run"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mix"] == dict(mixed[1].mix) and found["bits_per_weight"] == mixed[1].bits_per_weight
    assert found["bytes_out"] == mixed[1].bytes_out and not (tmp_path / "mix").exists()
    assert main(words) == 0
    assert f"linear layers: {', '.join(f'{n} {k}' for k, n in sorted(found['mix'].items()))}" in capsys.readouterr().out


def test_info_calls_a_mix_a_mix(mixed, capsys):
    assert main(["info", str(mixed[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "mixed"


# The head -------------------------------------------------------------------------------------------------------------


def test_the_small_head_can_be_left_out(source, tmp_path, capsys):
    assert main(["quantize", str(source), str(tmp_path / "a"), "--head", "none"]) == 0
    with_head = convert(source, tmp_path / "b")
    assert not (tmp_path / "a" / "neox_lite_head.safetensors").exists() and verify_folder(tmp_path / "a") == []
    assert folder_bytes(tmp_path / "b") - folder_bytes(tmp_path / "a") > 131 * 256
    assert GPTNeoXForCausalLM.from_pretrained(tmp_path / "a")(IDS).logits.isfinite().all()
    with pytest.raises(ArgumentError, match="has no neox_lite_head"):
        GPTNeoXForCausalLM.from_pretrained(tmp_path / "a", head="int8")
    assert with_head.bytes_out > convert(source, tmp_path / "c", small_head=False, dry_run=True).bytes_out
    capsys.readouterr()


def test_leaving_the_head_out_of_an_older_folder_removes_it(source, tmp_path):
    convert(source, tmp_path / "a")
    convert(source, tmp_path / "a", small_head=False)
    assert not (tmp_path / "a" / "neox_lite_head.safetensors").exists() and verify_folder(tmp_path / "a") == []


def test_what_the_small_head_took_goes_to_the_layers(source, target, mixed):
    without = convert(source, "unused", target_size=target, small_head=False, dry_run=True)
    assert without.bits_per_weight > mixed[1].bits_per_weight
