"""Weight formats: exact bytes, inverses, errors bounded by the scale, and what is refused."""

import json

import pytest
import torch
from support.backends import IN_GROUPS, OTHERS
from support.backends import stored as written

from neox_lite.errors import FormatError, ShapeError
from neox_lite.formats import (
    Dense,
    GroupInt,
    formats_of,
    label,
    make_format,
    quantization_config,
)
from neox_lite.formats.group_int import pack, unpack

every_format = pytest.mark.parametrize("format", IN_GROUPS + OTHERS, ids=lambda f: label(f, "").replace(" ", "-"))
every_grouped = pytest.mark.parametrize("format", IN_GROUPS, ids=lambda f: label(f, "").replace(" ", "-"))
every_method = pytest.mark.parametrize("method", ["rtn", "mse"])


def gaussian(rows=24, columns=256, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def squared_error(format, weight, method, dtype=torch.float16):
    stored = format.encode(weight, dtype, method)
    return float((format.decode(stored, torch.float32) - weight).square().mean() / weight.square().mean())


# Golden bytes ---------------------------------------------------------------------------------------------------------


def test_int4_words_hold_eight_codes_from_the_lowest_bits_up_offset_by_eight():
    codes = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]], dtype=torch.int8)
    assert pack(codes, 4).tolist() == [[0xFEA9_8710 - (1 << 32)]]  # nibbles 0 1 7 8 9 a e f, least significant first


def test_int8_words_hold_four_codes_from_the_lowest_byte_up_offset_by_128():
    codes = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    assert pack(codes, 8).tolist() == [[0xFF80_7F00 - (1 << 32)]]


@pytest.mark.parametrize("bits", [4, 8])
def test_unpack_inverts_pack(bits):
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (17, 64), dtype=torch.int8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_pack_agrees_with_compressed_tensors(bits):
    peer = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors' packer"
    )
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (16, 96), dtype=torch.int8)
    assert torch.equal(pack(codes, bits), peer.pack_to_int32(codes, bits))


def test_pack_refuses_other_widths_and_broken_words():
    with pytest.raises(ShapeError, match="bits is 3"):
        pack(torch.zeros(1, 8, dtype=torch.int8), 3)
    with pytest.raises(ShapeError, match="multiple of 8 columns"):
        pack(torch.zeros(1, 12, dtype=torch.int8), 4)


# Contract of every format in the table --------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_encode_gives_what_specs_promise(format, dtype):
    for method in format.methods:
        stored = written(format, gaussian(), dtype, method).tensors
        specs = format.specs((24, 256), dtype)
        assert {k: (t.dtype, tuple(t.shape)) for k, t in stored.items()} == specs


@every_grouped
@every_method
def test_every_weight_is_within_its_step_of_the_original(format, method):
    weight = gaussian()
    stored = format.encode(weight, torch.float16, method)
    step = stored["weight_scale"].float().abs().repeat_interleave(format.group_size, 1)
    error = (format.decode(stored, torch.float32) - weight).abs()
    if method == "rtn":  # nothing but the far end opposite the peak is clipped, by at most one step
        assert bool((error <= step * 1.001).all())
    else:  # the search trades clipped tails for a finer step; nine of ten weights still round to nearest
        assert float((error <= step * 0.5001).float().mean()) > 0.9


@every_grouped
def test_mse_is_never_worse_than_rtn_in_any_group(format):
    weight = gaussian(64, 256) * torch.logspace(-3, 2, 64)[:, None]
    groups = {}
    for method in ("rtn", "mse"):
        decoded = format.decode(format.encode(weight, torch.float16, method), torch.float32)
        groups[method] = (decoded - weight).square().view(64, -1, format.group_size).sum(-1)
    assert bool((groups["mse"] <= groups["rtn"] * (1 + 1e-6)).all())  # equal up to float32 summation


@pytest.mark.parametrize(
    ("format", "method", "bound"),
    [
        # x1000, Gaussian weights. Peaks over -8: 10.7 (g128), 9.0 (g64); signed search: 9.4 and 8.1; with 3 % slack.
        (GroupInt(4, 128), "rtn", 11.0),
        (GroupInt(4, 128), "mse", 9.6),
        (GroupInt(4, 64), "rtn", 9.3),
        (GroupInt(4, 64), "mse", 8.3),
        (GroupInt(8, 128), "mse", 0.041),
    ],
    ids=str,
)
def test_relative_error_on_gaussian_weights(format, method, bound):
    assert squared_error(format, gaussian(256, 1024), method) * 1000 < bound


@every_format
def test_row_slices_give_the_same_bytes_as_the_whole(format):
    weight, method = gaussian(32), format.methods[0]
    whole = format.encode(weight, torch.float16, method)
    parts = [format.encode(weight[a : a + 8], torch.float16, method) for a in range(0, 32, 8)]
    for key, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([p[key] for p in parts]))


@every_grouped
def test_codes_are_rounded_against_the_scale_as_stored(format):
    weight, stored = gaussian(), None
    stored = format.encode(weight, torch.bfloat16, "rtn")
    scale = stored["weight_scale"].float().repeat_interleave(format.group_size, 1)
    top = 1 << (format.bits - 1)
    assert torch.equal(
        unpack(stored["weight_packed"], format.bits).float(), (weight / scale).round().clamp(-top, top - 1)
    )


@every_grouped
@every_method
def test_quantizing_a_decoded_weight_again_changes_nothing_much(format, method):
    once = format.decode(format.encode(gaussian(), torch.float32, method), torch.float32)
    assert squared_error(format, once, method, torch.float32) < 1e-3 / (1 << (2 * format.bits - 8))


@every_grouped
@every_method
def test_an_all_zero_group_decodes_to_zero_with_a_scale_of_one(format, method):
    weight = gaussian()
    weight[3] = 0
    stored = format.encode(weight, torch.float16, method)
    assert bool((stored["weight_scale"][3] == 1).all())
    assert bool((format.decode(stored, torch.float32)[3] == 0).all())


@every_format
def test_a_row_of_zeros_stays_zero(format):
    weight = gaussian()
    weight[3] = 0
    assert bool((written(format, weight).decode()[3] == 0).all())
    assert bool((written(format, torch.zeros(2, 256)).decode() == 0).all())


@every_format
def test_weights_too_small_for_the_scale_become_zero(format):
    for method in format.methods:
        decoded = written(format, torch.full((1, 128), 1e-9), torch.float16, method).decode()
        assert bool(decoded.isfinite().all()) and float(decoded.abs().max()) < 1e-6


@every_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(format, bad):
    weight = gaussian()
    weight[5, 7] = bad
    with pytest.raises(FormatError, match="not finite"):
        format.encode(weight, torch.float16, format.methods[0])


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_a_scale_that_overflows_float16_is_refused(method):
    with pytest.raises(FormatError, match="overflows float16"):
        GroupInt(4, 32).encode(torch.full((1, 32), 1e6), torch.float16, method)


def test_in_features_that_do_not_divide_name_the_group_sizes_that_do():
    assert "try 64 or 32" in GroupInt(4, 128).why_not((8, 64)) or "try 32 or 64" in GroupInt(4, 128).why_not((8, 64))
    assert "must stay dense" in GroupInt(4, 32).why_not((8, 40))
    with pytest.raises(FormatError, match="not divisible by group_size 128"):
        GroupInt(4, 128).encode(torch.zeros(2, 96), torch.float16)


def test_unknown_formats_groups_and_methods_are_named():
    with pytest.raises(FormatError, match="'int3', expected one of int4, int8, nf4"):
        make_format("int3")
    with pytest.raises(FormatError, match="group_size is 96, expected one of 32, 64, 128"):
        make_format("int4", 96)
    with pytest.raises(FormatError, match="method is 'awq'"):
        GroupInt(4, 32).encode(gaussian(), torch.float16, "awq")


@every_format
def test_weight_decodes_rows_as_the_whole_does(format):
    weight = written(format, gaussian(200, 1024))  # more than one block of nf4's scales
    for start, stop in ((0, 1), (5, 11), (63, 200), (199, 200)):
        assert torch.equal(weight.decode()[start:stop], weight.decode(torch.float32, start, stop))
    assert weight.nbytes == sum(t.nbytes for t in weight.tensors.values())


@every_format
def test_bits_per_weight_count_codes_and_scales(format):
    stored = written(format, gaussian(64, 256)).tensors
    beside = {*format.constants((64, 256)), *format.loose}
    counted = sum(t.nbytes for key, t in stored.items() if key not in beside)
    assert format.bits_per_weight(torch.float16) == counted * 8 / (64 * 256)


# quantization_config --------------------------------------------------------------------------------------------------


@every_format
def test_quantization_config_reads_back_as_the_format_it_names(format):
    lookup = formats_of(json.loads(json.dumps(quantization_config(format, ["gpt_neox.layers.1.mlp.dense_4h_to_h"]))))
    assert lookup("gpt_neox.layers.0.attention.dense") == format
    assert lookup("embed_out") == lookup("lm_head") == Dense()
    assert lookup("gpt_neox.layers.1.mlp.dense_4h_to_h") == Dense()


def test_regular_expressions_choose_a_format_by_module():
    config = quantization_config(GroupInt(4, 128))
    group = config["config_groups"]["group_0"]
    eight = {**group, "targets": ["re:.*attention.*"], "weights": {**group["weights"], "num_bits": 8}}
    four = {**group, "targets": ["re:.*mlp.*"]}
    lookup = formats_of({**config, "config_groups": {"a": eight, "b": four}})
    assert lookup("gpt_neox.layers.0.attention.dense") == GroupInt(8, 128)
    assert lookup("gpt_neox.layers.0.mlp.dense_h_to_4h") == GroupInt(4, 128)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("symmetric", False), ("type", "float"), ("strategy", "channel"), ("num_bits", 3), ("num_bits", 4.0)),
        *(("group_size", 100), ("group_size", 128.0), ("actorder", "group"), ("dynamic", True)),
    ],
)
def test_schemes_that_are_not_symmetric_groups_are_refused_by_key(key, value):
    config = quantization_config(GroupInt(4, 128))
    config["config_groups"]["group_0"]["weights"][key] = value
    with pytest.raises(FormatError, match=f"group_0.weights: {key} is {value!r}"):
        formats_of(config)


def test_other_quantizers_are_refused_by_name():
    with pytest.raises(FormatError, match="quant_method is 'gptq', expected 'compressed-tensors' or 'bitsandbytes'"):
        formats_of({"quant_method": "gptq", "bits": 4})


@pytest.mark.parametrize(
    "broken",
    [
        {"config_groups": []},
        {"config_groups": {"g": {"weights": None}}},
        {"format": "dense"},
        {"transform_config": {"a": 1}},
    ],
)
def test_malformed_quantization_configs_are_refused_with_a_format_error(broken):
    with pytest.raises(FormatError):
        formats_of({**quantization_config(GroupInt(4, 128)), **broken})
