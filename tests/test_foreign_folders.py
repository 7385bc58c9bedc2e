"""Folders that compressed-tensors writes, as llm-compressor does: equal logits, or a refusal that says what to choose."""

import json
import re

import pytest
import torch
from support.checkpoints import change_json, change_tensors
from support.peers import beside_transformers, difference, opened_by_transformers, peer, random_ids
from support.refusals import refused

from neox_lite import GPTNeoXForCausalLM
from neox_lite.errors import FormatError, NeoxLiteError
from neox_lite.formats import formats_of
from neox_lite_app.cli import main
from neox_lite_quant import export_gguf, import_gguf

pytest.importorskip("compressed_tensors.compressors.model_compressors", reason="compressed-tensors is not installed")
from compressed_tensors.compressors.model_compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.quantization.utils.helpers import is_module_quantized

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPE = {"hidden_size": 128, "intermediate_size": 256}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
INT8 = {**INT4, "num_bits": 8, "group_size": 32}
CHANNEL = {**INT8, "strategy": "channel", "group_size": None}
ATTENTION, MLP = r"re:.*attention\.(query_key_value|dense)", r"re:.*mlp\.dense"
LAYERS = r"re:.*\.(dense|query_key_value)"
TENSOR = {**INT8, "strategy": "tensor", "group_size": None}


def write(folder, groups, ignore=("lm_head",), dtype=torch.float32):
    """Quantize a random model with the library itself: groups is [(targets, weights' arguments, other arguments)]."""
    model = peer(**SHAPE).to(dtype)
    schemes = {
        f"group_{i}": QuantizationScheme(targets=targets, weights=QuantizationArgs(**weights), **dict(*more))
        for i, (targets, weights, *more) in enumerate(groups)
    }
    apply_quantization_config(model, QuantizationConfig(config_groups=schemes, ignore=list(ignore)))
    for module in model.modules():
        if is_module_quantized(module) and hasattr(module, "weight_scale"):
            _observe(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


@pytest.fixture
def int4(tmp_path):
    """A folder in int4 of that library, to be changed."""
    return write(tmp_path / "m", [(["Linear"], INT4)])


def _observe(module):
    """Scales and zero points from the weights' own range."""
    arguments, weight = module.quantization_scheme.weights, module.weight
    size = arguments.group_size if arguments.strategy == "group" else weight.shape[1]
    groups = weight.reshape(weight.shape[0], -1, size)
    groups = groups.reshape(1, 1, -1) if arguments.strategy == "tensor" else groups
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    module.weight_scale.data = scale.to(module.weight_scale.dtype).reshape(module.weight_scale.shape)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype).reshape(module.weight_zero_point.shape)


def equal_logits(folder, tolerance=2e-5):
    """The formats of a folder's layers; its logits here equal transformers'."""
    assert difference(*beside_transformers(folder, random_ids(2, 24))) < tolerance
    layers = GPTNeoXForCausalLM.from_pretrained(folder).gpt_neox.layers
    return {n: m.format.name for n, m in layers.named_modules() if hasattr(m, "format")}


def logits(folder):
    return GPTNeoXForCausalLM.from_pretrained(folder, exact=True)(random_ids(1, 9)).logits


def loading_is_refused(words, folder, error=FormatError):
    return refused(error, words, GPTNeoXForCausalLM.from_pretrained, folder)


# -- what loads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_groups_load_with_equal_logits(tmp_path, bits, group_size):
    write(tmp_path / "m", [(["Linear"], {**INT4, "num_bits": bits, "group_size": group_size})])
    assert set(equal_logits(tmp_path / "m").values()) == {f"int{bits}"}


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [({}, torch.float16), ({}, torch.bfloat16), ({"actorder": "weight"}, None), ({"actorder": "static"}, None)],
)
def test_half_precision_and_orders_that_leave_columns_in_place_load_with_equal_logits(tmp_path, weights, dtype):
    equal_logits(write(tmp_path / "m", [(["Linear"], {**INT4, **weights})], dtype=dtype or torch.float32))


QKV, DENSE, UP, DOWN = "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"


@pytest.mark.parametrize(
    ("groups", "ignore", "expected"),
    [
        ([([ATTENTION], INT8), ([MLP], INT4)], ["lm_head"], ["int8", "int8", "int4", "int4"]),
        ([(["Linear"], INT4)], ["lm_head", "re:.*dense_4h_to_h$"], ["int4", "int4", "int4", "dense"]),
        ([(["Linear"], INT4)], ["lm_head", f"gpt_neox.layers.0.{UP}"], ["int4", "int4", "dense", "int4"]),
        # of several targets, a name comes before patterns, patterns in their alphabetical order, a class last
        ([(["Linear"], INT4), ([MLP], INT8)], ["lm_head"], ["int4", "int4", "int8", "int8"]),
        ([([MLP], INT8), ([r"re:.*\.dense"], INT4)], ["lm_head"], ["dense", "int4", "int4", "int4"]),
        ([([LAYERS], INT8), ([f"gpt_neox.layers.0.{QKV}"], INT4)], ["re:lm_head"], ["int4"] + 3 * ["int8"]),
    ],
    ids=["patterns", "ignored-pattern", "ignored-name", "pattern-over-class", "two-patterns", "name-over-pattern"],
)  # fmt: skip
def test_targets_and_ignored_names_mean_what_they_mean_there(tmp_path, groups, ignore, expected):
    write(tmp_path / "m", groups, ignore)
    found = equal_logits(tmp_path / "m")
    assert [found[f"0.{name}"] for name in (QKV, DENSE, UP, DOWN)] == expected


@pytest.mark.parametrize("shift", range(8, 65, 8))
def test_data_may_begin_anywhere_in_the_file(int4, shift):
    """Other tools' packed codes begin at 24 to 48 modulo 64; kernels must not assume more."""
    path = int4 / "model.safetensors"
    raw, wanted = path.read_bytes(), logits(int4).clone()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + shift).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * shift + raw[8 + length :])
    assert torch.equal(logits(int4), wanted)


def test_such_a_folder_goes_to_gguf_and_through_save_pretrained(tmp_path):
    write(tmp_path / "m", [(["Linear"], INT4)], dtype=torch.float16)
    export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    GPTNeoXForCausalLM.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "again")
    for name in ("back", "again"):
        assert torch.equal(logits(tmp_path / name), logits(tmp_path / "m"))


def test_what_we_save_again_of_their_folder_opens_there_with_the_same_logits(tmp_path):
    write(tmp_path / "m", [([ATTENTION], INT8), ([MLP], INT4)])
    GPTNeoXForCausalLM.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "again")
    ids = random_ids(1, 9)
    wanted, found = (opened_by_transformers(tmp_path / name)(ids).logits for name in ("m", "again"))
    assert torch.equal(found, wanted)


# -- what is refused --------------------------------------------------------------------------------------------------

INPUTS = {"input_activations": QuantizationArgs(num_bits=8, dynamic=True, strategy="token")}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
ZERO_POINTS = "symmetric is False.*zero points are not read; choose a symmetric"
UNREADABLE = {
    "asymmetric": ((["Linear"], {**INT4, "symmetric": False}), ZERO_POINTS),
    "channel": ((["Linear"], CHANNEL), "strategy is 'channel', expected 'group'; choose groups of 32, 64 or 128"),
    "tensor": ((["Linear"], TENSOR), "strategy is 'tensor'.*choose groups"),
    "group-of-16": ((["Linear"], {**INT8, "group_size": 16}), "group_size is 16.*choose groups"),
    "fp8": ((["Linear"], FP8), "format is '(float|naive)-quantized'"),
    "w8a8": ((["Linear"], CHANNEL, INPUTS), "format is 'int-quantized'"),
}


@pytest.mark.parametrize(("group", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_the_library_can_make_and_we_cannot_read_is_refused_with_advice(tmp_path, group, message, capsys):
    folder = write(tmp_path / "m", [group])
    assert "neox-lite quantize SRC" in loading_is_refused(message, folder)
    assert main(["generate", str(folder), "--prompt", "x"]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_columns_in_another_order_are_refused_with_advice(int4):
    config = json.loads((int4 / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"  # as older versions wrote it
    change_json(int4 / "config.json", quantization_config=config)
    advice = "or make a folder from the original checkpoint: neox-lite quantize SRC"
    loading_is_refused(rf"actorder is 'group'.*choose 'static'.*{advice}", int4)


def test_a_quantized_embedding_is_refused_with_advice(tmp_path):
    folder = write(tmp_path / "m", [(["gpt_neox.embed_in", "Linear"], INT4)], ignore=["lm_head"])
    loading_is_refused(r"embed_in.weight_packed: the embedding must be plain.*put 'gpt_neox.embed_in'", folder)


def test_a_quantized_head_is_decoded(tmp_path):
    folder = write(tmp_path / "m", [(["lm_head", "Linear"], INT4)], ignore=[])
    ours, theirs = GPTNeoXForCausalLM.from_pretrained(folder, exact=True), opened_by_transformers(folder)
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert difference(ours(ids).logits, theirs(ids).logits) < 1e-4


@pytest.mark.parametrize("kind", ["group", "whole"])
def test_groups_of_another_format_are_refused(int4, kind):
    config = json.loads((int4 / "config.json").read_text())["quantization_config"]
    (config["config_groups"]["group_0"] if kind == "group" else config)["format"] = "int-quantized"
    refused(FormatError, r"format is 'int-quantized', expected 'pack-quantized'; .*quantize SRC", formats_of, config)


@pytest.mark.parametrize("key", ["weight_zero_point", "weight_g_idx"])
def test_tensors_that_the_config_does_not_announce_are_refused_by_name(int4, key):
    extra = {f"gpt_neox.layers.0.{UP}.{key}": torch.zeros(4, dtype=torch.int32)}
    change_tensors(int4 / "model.safetensors", lambda tensors: tensors | extra)
    loading_is_refused(rf"unexpected: gpt_neox.layers.0.{UP}.{key}", int4, NeoxLiteError)
