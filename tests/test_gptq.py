"""gptq's solver beside GPTQ as published, unblocked and in float64; and what it must never do to a weight."""

import itertools
from functools import partial

import pytest
import torch
from support.refusals import refused

from neox_lite.errors import FormatError
from neox_lite.formats import GroupInt, unpack
from neox_lite_quant import gptq

OUT, IN, TOKENS = 24, 384, 600


def inputs(columns=IN, tokens=TOKENS):
    """Correlated, of unequal sizes and not centred, as activations are."""
    mixing = torch.randn(columns, columns) / columns**0.5 + 0.5 * torch.eye(columns)
    return (torch.randn(tokens, columns) @ mixing + 0.3 * torch.randn(columns)) * torch.rand(columns).exp()


def moments_of(x, out=OUT):
    moments = gptq.Moments.empty((out, x.shape[1]))
    for part in x.split(100):
        moments.add(part, torch.zeros(len(part), out))
    return moments


INT4 = GroupInt(4, 128)


def quantized(weight, x, bias=None, format=INT4):
    return gptq.quantize(weight.clone(), bias, moments_of(x, len(weight)), format, torch.float16)


def decoded_error(weight, x):
    found = quantized(weight, x, torch.zeros(OUT))
    return float((INT4.decode(found, torch.float32) - weight).square().mean())


def damped(x):
    second = x.T @ x / len(x)
    gptq.damp(second)
    return second


def published(weight, second, scales, format, order):
    """Frantar et al. 2022, algorithm 1 without its blocks: errors fed forward through the inverse of H, in float64."""
    work, top = weight.double()[:, order], 1 << (format.bits - 1)
    inverse = torch.linalg.inv(second.double()[order][:, order])
    codes = torch.empty_like(work)
    for j in range(len(order)):
        step = scales[:, order[j] // format.group_size].double()
        codes[:, j] = (work[:, j] / step).round().clamp(-top, top - 1)
        error = (work[:, j] - codes[:, j] * step) / inverse[j, j]
        work[:, j:] -= error[:, None] * inverse[j, j:]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]  # without row and column j
    return codes[:, order.argsort()].to(torch.int8)


@pytest.mark.parametrize("ordered", [False, True], ids=["columns in order", "important columns first"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (4, 128), (8, 128)])
def test_codes_are_those_of_the_published_algorithm(bits, group_size, ordered):
    weight, second, format = torch.randn(OUT, IN), damped(inputs()), GroupInt(bits, group_size)
    scales = gptq.search_scales(weight, second.diagonal(), format, torch.float16)
    order = second.diagonal().argsort().flip(0) if ordered else torch.arange(IN)
    found = gptq.nearest_plane(weight, gptq.Plane.of(second, ordered), scales, format)
    expected = published(weight, second, scales, format, order)
    differing = (found != expected).any(1)  # a tie in float32 changes what follows in its row
    assert differing.float().mean() <= 0.1, f"{int(differing.sum())} of {OUT} rows differ"


def test_the_size_of_the_blocks_changes_no_code():
    weight, second, format = torch.randn(OUT, IN).double(), damped(inputs().double()), GroupInt(4, 128)
    scales = gptq.search_scales(weight.float(), second.diagonal().float(), format, torch.float16)
    one, many = (gptq.nearest_plane(weight, gptq.Plane.of(second), scales.double(), format, block=b) for b in (1, 100))
    assert torch.equal(one, many)


def error_of(weight, second, codes, scales):
    difference = (weight - gptq.decoded(codes, scales)).double()
    return float(((difference @ second.double()) * difference).sum())


@pytest.mark.parametrize("bits", [4, 8])
def test_error_feedback_and_descent_each_lower_the_error(bits):
    weight, second, format = torch.randn(OUT, IN), damped(inputs()), GroupInt(bits, 128)
    scales = gptq.search_scales(weight, second.diagonal(), format, torch.float16)
    top = 1 << (bits - 1)
    rounded = (weight.view(OUT, -1, 128) / scales.float().unsqueeze(-1)).round().clamp(-top, top - 1).flatten(1)
    nearest = gptq.nearest_plane(weight, gptq.Plane.of(second), scales, format)
    swept, refitted = gptq.descend(weight, second, nearest, scales, format, torch.float16)
    errors = [error_of(weight, second, *pair) for pair in ((rounded, scales), (nearest, scales), (swept, refitted))]
    assert errors[0] > 1.5 * errors[1] and errors[1] > 1.02 * errors[2]


def test_more_sweeps_never_make_the_error_larger():
    weight, second, format = torch.randn(OUT, IN), damped(inputs()), GroupInt(4, 64)
    scales = gptq.search_scales(weight, second.diagonal(), format, torch.bfloat16)
    codes, errors = gptq.nearest_plane(weight, gptq.Plane.of(second), scales, format), []
    for _ in range(5):
        errors.append(error_of(weight, second, codes, scales))
        codes, scales = gptq.descend(weight, second, codes, scales, format, torch.bfloat16, sweeps=1)
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))


def test_scales_search_is_never_worse_than_the_largest_weight_as_the_scale():
    weight, importance, format = torch.randn(OUT, IN), torch.rand(IN) + 0.1, GroupInt(4, 32)
    scales = gptq.search_scales(weight, importance, format, torch.float16)
    groups = weight.view(OUT, -1, 32)
    peak = (groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8).half().float()

    def error(scale):
        codes = (groups / scale).round().clamp(-8, 7)
        return (importance.view(-1, 32) * (groups - codes * scale) ** 2).sum(-1)

    assert (error(scales.float().unsqueeze(-1)) <= error(peak) * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_stay_near_and_their_mean_is_kept_by_the_bias(dtype):
    weight, bias, x, format = torch.randn(OUT, IN), torch.randn(OUT), inputs(), GroupInt(4, 128)
    found = gptq.quantize(weight, bias, moments_of(x), format, dtype)
    assert found["weight_scale"].dtype == found["bias"].dtype == dtype
    before = x @ weight.T + bias
    after = x @ format.decode(found, torch.float32).T + found["bias"].float()
    plain = format.encode(weight, dtype, "mse")
    rounded = x @ format.decode(plain, torch.float32).T + bias
    assert (after - before).square().mean() < 0.6 * (rounded - before).square().mean()
    assert (after - before).mean(0).abs().max() < torch.finfo(dtype).eps * found["bias"].float().abs().max()


def test_a_layer_without_bias_gets_none():
    assert set(quantized(torch.randn(OUT, IN), inputs())) == {"weight_packed", "weight_scale"}


def test_errors_of_earlier_layers_are_made_up_for():
    weight, x, format = torch.randn(OUT, IN), inputs(), GroupInt(8, 128)
    moved = x + 0.2 * inputs()[: len(x)] @ torch.randn(IN, IN) / IN**0.5  # what the layer is fed, less exactly x
    informed, blind = gptq.Moments.empty((OUT, IN)), gptq.Moments.empty((OUT, IN))
    informed.add(moved, (x - moved) @ weight.T)
    blind.add(moved, torch.zeros(len(x), OUT))
    errors = []
    for moments in (informed, blind):
        found = gptq.quantize(weight.clone(), torch.zeros(OUT), moments, format, torch.float16)
        out = moved @ format.decode(found, torch.float32).T + found["bias"].float()
        errors.append(float((out - x @ weight.T).square().mean()))
    assert errors[0] < 0.9 * errors[1]


def test_the_bias_takes_up_all_of_what_earlier_layers_shift_on_average():
    weight, x, format = torch.randn(OUT, IN), inputs(), GroupInt(4, 128)
    moved, moments = x + torch.randn(IN), gptq.Moments.empty((OUT, IN))
    moments.add(moved, (x - moved) @ weight.T)
    found = gptq.quantize(weight, torch.zeros(OUT), moments, format, torch.float16)
    out = moved @ format.decode(found, torch.float32).T + found["bias"].float()
    before = (moved - x) @ weight.T
    assert (out - x @ weight.T).mean(0).abs().max() < 0.01 * before.mean(0).abs().max()


def test_channels_that_are_never_used_and_groups_of_zeros_are_harmless():
    weight, x, format = torch.randn(OUT, IN), inputs(), GroupInt(4, 32)
    x[:, 40:72], weight[:, 64:96] = 0, 0
    decoded = format.decode(quantized(weight, x, torch.zeros(OUT), format), torch.float32)
    assert torch.isfinite(decoded).all() and (decoded - weight)[:, 40:64].abs().max() < weight.abs().max() / 2
    dead = quantized(weight, torch.zeros(10, IN), torch.zeros(OUT), format)
    assert torch.isfinite(format.decode(dead, torch.float32)).all()


def test_the_scale_of_a_channel_does_not_matter():
    """Columns divided by what their inputs are multiplied with give the same damping, and so as good a result."""
    second = damped(inputs())
    factor = torch.rand(IN).exp() * 10
    scaled = (second * factor[:, None] * factor).clone()
    gptq.damp(second)
    gptq.damp(scaled)
    assert torch.allclose(scaled.diagonal() / factor.square(), second.diagonal(), rtol=1e-3)


def nearly_constant(spread):
    return torch.randn(IN) + spread * torch.randn(TOKENS, IN)


def of_large_mean_and_small_variance():
    x = inputs()
    x[:, 7] += 3e4
    x[:, 9] = 1e4
    return x


UNUSUAL = {"few": partial(inputs, tokens=20), "large-mean": of_large_mean_and_small_variance}
UNUSUAL |= {f"constant-{spread}": partial(nearly_constant, spread) for spread in (0.0, 1e-4, 1e-3)}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_inputs_break_nothing(kind):
    assert decoded_error(torch.randn(OUT, IN), UNUSUAL[kind]()) < 0.05


def test_values_that_cannot_be_stored_are_refused_by_name():
    weight, x, told = torch.randn(OUT, IN), inputs(), "the bias holds values that are not finite as float16"
    for value in (float("nan"), 1e6):
        refused(FormatError, told, quantized, weight, x, torch.full((OUT,), value))
    refused(FormatError, "overflows float16", quantized, weight * 1e7, x)
    for name, tensor in (("weight", weight), ("inputs", x)):
        kept, tensor[3, 5] = float(tensor[3, 5]), float("nan")
        refused(FormatError, f"the {name} holds? values that are not finite", quantized, weight, x, torch.zeros(OUT))
        tensor[3, 5] = kept


def test_codes_are_in_their_range_and_groups_are_of_neighbours():
    found = quantized(torch.randn(OUT, IN) * 3, inputs(), format=GroupInt(4, 64))
    codes = unpack(found["weight_packed"], 4)
    assert codes.shape == (OUT, IN) and found["weight_scale"].shape == (OUT, IN // 64)
    assert codes.min() >= -8 and codes.max() <= 7 and codes.unique().numel() == 16


def test_the_number_of_threads_changes_no_code(monkeypatch):
    weight, x, found, format = torch.randn(700, 128), inputs(128), [], GroupInt(4, 32)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(quantized(weight, x, format=format))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    codes = unpack(found[0]["weight_packed"], 4)
    alone = quantized(weight[300:], x, format=format)
    assert (unpack(alone["weight_packed"], 4) == codes[300:]).float().mean() > 0.99  # rows know nothing of each other
