"""What every backend of its table does, in every format of the other table: a new entry of either is tested by being there."""

import pytest
import torch

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.formats import FORMATS
from neox_lite.kernels import dispatch
from neox_lite.kernels.dispatch import BACKENDS
from neox_lite_app.commands import QUANTIZED

# Sums of float32 in another order, through a layer, relative to the logits' root mean square.
EQUAL = 2e-5
IDS = [3, 14, 15, 9, 26, 5]

others = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
every_format = pytest.mark.parametrize("format", [None, *FORMATS], ids=lambda name: name or "dense")
every_residual = pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])


def device_of(backend):
    """Where a backend runs here, or a skip with the reason that it gives."""
    device = torch.device("cuda" if BACKENDS[backend][1] == "cuda" and torch.cuda.is_available() else "cpu")
    if (reason := dispatch.load(backend).why_not(device)) is not None:
        pytest.skip(reason)
    return device


@pytest.fixture
def checkpoint(tmp_path, parallel):
    config = GPTNeoXConfig(
        hidden_size=128, num_attention_heads=2, num_hidden_layers=1, intermediate_size=128, vocab_size=33,
        max_position_embeddings=64, use_parallel_residual=parallel, initializer_range=0.1,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def prefill_and_decode(model):
    """Logits after two prompts of different lengths in one pass, and after a step of both."""
    pool = model.new_pool(pages=4)
    block_tables = [pool.new(), pool.new()]
    passes = [[IDS[:5], IDS[5:6]], [[7], [8]]]
    return torch.stack([model.step(pool, block_tables, tokens).cpu() for tokens in passes])


@others
@every_format
@every_residual
def test_logits_equal_the_reference_s(backend, format, checkpoint):
    device = device_of(backend)
    model = GPTNeoXForCausalLM.from_pretrained(checkpoint, quantization=format, exact=True)
    model.ops = dispatch.load("reference").bind(True)
    expected = prefill_and_decode(model)
    model = model.to(device)
    model.ops = dispatch.load(backend).bind(True)
    assert model.ops.name == backend
    found = prefill_and_decode(model)
    assert float((found - expected).abs().max()) < EQUAL * float(expected.square().mean().sqrt())


@others
@every_format
@pytest.mark.parametrize("parallel", [True], ids=[""])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_a_plain_tensor_may_stand_wherever_an_act_may(backend, format, checkpoint, tokens):
    """Beside a weight, an adapter reads the same input, which is then laid out for neither."""
    device = device_of(backend)
    model = GPTNeoXForCausalLM.from_pretrained(checkpoint, quantization=format, exact=True).to(device)
    layer = model.gpt_neox.layers[0]
    weights = [layer.attention.query_key_value.handle, layer.mlp.dense_h_to_4h.handle]
    x, addend = torch.randn(tokens, 128, device=device), torch.randn(tokens, 384, device=device)
    found = []
    for ops in (dispatch.load("reference").bind(True), dispatch.load(backend).bind(True)):
        states, inner = ops.grouped_linear([x, x], weights, [addend, None], [None, "erf"], [None, None])
        found.append(
            torch.cat([states, inner, ops.linear_residual([x, inner], [weights[1]] * 2, [None, None], x)], dim=1)
        )
    assert float((found[0] - found[1]).abs().max()) < EQUAL * float(found[0].square().mean().sqrt())


def test_the_command_line_offers_every_format():
    assert set(QUANTIZED) == set(FORMATS)
