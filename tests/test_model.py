"""The forward pass: equal to transformers' over every axis of the family, and what the arguments mean.

Tolerances: our order of additions differs from transformers', so equal means within float32 rounding. Logits here are
of order one and pass through two layers; 2e-5 is about 100 roundings of 1.2e-7, and the worst case seen is far below.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.peers import TINY, difference, ours, pair, peer, random_ids
from torch import Tensor

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, GPTNeoXModel
from neox_lite.errors import ArgumentError, CacheError, ContextLengthError, UnsupportedError
from neox_lite.layers import Rotary
from neox_lite.modeling.pretrained import ABSENT
from neox_lite.units import PAGE

EQUAL = 2e-5
LONG = PAGE + 22  # tokens: the second page of a sequence is in use

Record = Callable[[str, Any], None]


def rope(kind: str, theta: float = 10000.0, share: float = 1.0, **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": share, **keys}}


def part(percent: int) -> dict[str, Any]:
    return rope("default", share=percent / 100)


def yarn(**keys: Any) -> dict[str, Any]:
    return rope("yarn", **{"factor": 4.0, "original_max_position_embeddings": 64, **keys})


def heads(head_dim: int, **keys: Any) -> dict[str, Any]:
    return {"hidden_size": 2 * head_dim, "num_attention_heads": 2, **keys}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    f"{'parallel' if parallel else 'sequential'}-rotary{share}": {"use_parallel_residual": parallel, **part(share)}
    for parallel in (True, False)
    for share in (25, 50, 100)
}
CONFIGS |= {
    "sequential-rotary100-tied": {"use_parallel_residual": False, "tie_word_embeddings": True, **part(100)},
    "parallel-tied": {"tie_word_embeddings": True},
    "rope-theta500": rope("default", theta=500.0),
    "rope-linear": rope("linear", factor=4.0),
    "rope-linear-share25-sequential": {"use_parallel_residual": False, **rope("linear", share=0.25, factor=4.0)},
    "rope-llama3": rope("llama3", **LLAMA3),
    "rope-llama3-share50": rope("llama3", share=0.5, **LLAMA3),
    "rope-yarn": yarn(original_max_position_embeddings=2048),  # long enough for the default beta_fast to matter
    "rope-yarn-short": yarn(),
    "rope-yarn-mscale": yarn(mscale=0.7, mscale_all_dim=0.9),
    "rope-yarn-attention-factor": yarn(attention_factor=1.3),
    "rope-yarn-not-truncated": yarn(truncate=False),
    "rope-yarn-betas": yarn(beta_fast=2.0, beta_slow=0.5),
    "gelu": {"hidden_act": "gelu"},
    "gelu_fast": {"hidden_act": "gelu_fast"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh", "use_parallel_residual": False},
    "no-attention-bias": {"attention_bias": False},
    "no-attention-bias-sequential": {"attention_bias": False, "use_parallel_residual": False},
    "vocab257": {"vocab_size": 257},
    "vocab8": {"vocab_size": 8, "tie_word_embeddings": True},
    "head64": heads(64),
    "head80-of-pythia-2.8b": heads(80),
    "head80-of-redpajama-3b": heads(80, use_parallel_residual=False, **rope("default")),
    "head96-of-gpt-neox-20b": heads(96, hidden_act="gelu_fast"),
    "head96-of-line-3.6b": heads(96, use_parallel_residual=False, tie_word_embeddings=True, **rope("default")),
    "head128": heads(128),
    "head256-of-pythia-1b": heads(256),
    "layer-norm-eps-1e-12": {"layer_norm_eps": 1e-12},
    "layer-norm-eps-0.1": {"layer_norm_eps": 0.1},
    "one-head-one-layer": {"num_attention_heads": 1, "num_hidden_layers": 1},
}


def refused(error: type[Exception], told: str) -> Any:
    return pytest.raises(error, match=told)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(ours, transformers'), for tests that are about the call and not about the configuration."""
    return pair(tmp_path_factory.mktemp("tiny"))


# Equal to transformers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_matches_transformers(name: str, tmp_path: Path, record_property: Record) -> None:
    model, reference = pair(tmp_path, **CONFIGS[name])
    ids = random_ids(2, LONG, model.config.vocab_size)
    expected = reference(ids).logits
    logits = model(ids).logits
    assert logits.dtype == torch.float32
    assert 0.3 < expected.std() < 3  # of order one, as the tolerance assumes
    worst = difference(logits, expected)
    record_property("max_abs_difference", worst)
    assert worst <= EQUAL


# Our products are float32 and only weights, cached keys and values are half precision, so we are closer to the float32
# model than transformers is, which rounds after every operation. 1.05 leaves room for the draw of the random weights.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name",
    ["parallel-rotary25", "sequential-rotary100-tied", "head96-of-gpt-neox-20b", "rope-yarn", "no-attention-bias"],
)
@torch.no_grad()
def test_half_precision_is_as_close_to_float32_as_transformers_is(
    name: str, dtype: torch.dtype, tmp_path: Path, record_property: Record
) -> None:
    reference = peer(**CONFIGS[name])
    ids = random_ids(2, LONG)
    truth = reference(ids).logits
    model = ours(reference, tmp_path, dtype=dtype)
    assert model.dtype == dtype
    error = (model(ids).logits - truth).square().mean().sqrt().item()
    theirs = (reference.to(dtype)(ids).logits.float() - truth).square().mean().sqrt().item()
    record_property("rms_error_ratio", error / theirs)
    assert error <= 1.05 * theirs


@pytest.mark.parametrize("name", [n for n in CONFIGS if "rope" in n or "rotary" in n])
def test_rotary_tables_equal_those_of_transformers(name: str) -> None:
    theirs = transformers.GPTNeoXConfig(**{**TINY, **CONFIGS[name]})
    module = transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXRotaryEmbedding(theirs)
    positions = torch.arange(theirs.max_position_embeddings)[None]
    cos, sin = module(torch.zeros(1), positions)  # (1, positions, rotary_dim), both halves alike
    table = Rotary(GPTNeoXConfig(**theirs.to_dict())).table
    expected = torch.stack((cos[0], sin[0]))[..., : table.shape[-1]]
    # the same float32 expressions, but pow, sin and cos may differ in their last bit between torch's vector widths
    assert difference(table, expected) <= 2e-6


@torch.no_grad()
def test_a_full_context_matches_transformers(tmp_path: Path) -> None:
    model, reference = pair(tmp_path, max_position_embeddings=2 * PAGE)
    ids = random_ids(1, 2 * PAGE)
    assert difference(model(ids).logits, reference(ids).logits) <= EQUAL


# Base model and task heads --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_question_answering_matches_transformers(tmp_path: Path) -> None:
    model, reference = pair(tmp_path, "GPTNeoXForQuestionAnswering")
    ids = random_ids(3, 20)
    start, end = torch.tensor([2, 5, 99]), torch.tensor([4, 19, 7])  # 99 is outside the row: left out of the loss
    found = model(ids, start_positions=start, end_positions=end)
    expected = reference(ids, start_positions=start, end_positions=end)
    assert difference(found.start_logits, expected.start_logits) <= EQUAL
    assert difference(found.end_logits, expected.end_logits) <= EQUAL
    assert difference(found.loss, expected.loss) <= EQUAL


@torch.no_grad()
def test_question_answering_loss_does_not_depend_on_padding(tmp_path: Path) -> None:
    model, _ = pair(tmp_path, "GPTNeoXForQuestionAnswering")
    ids, mask = random_ids(1, 20), torch.tensor([[1] * 12 + [0] * 8])
    span = {"start_positions": torch.tensor([2]), "end_positions": torch.tensor([5])}
    alone, padded = model(ids[:, :12], **span), model(ids, attention_mask=mask, **span)
    assert difference(alone.loss, padded.loss) <= EQUAL
    with refused(ArgumentError, "names a masked column"):
        model(ids, attention_mask=mask, start_positions=torch.tensor([15]), end_positions=torch.tensor([5]))


@pytest.mark.parametrize(
    ("problem", "labels", "given"),
    [
        ("single", torch.tensor([0, 2, 1]), {"num_labels": 3}),
        ("multi", torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]]), {"num_labels": 3}),
        ("regression", torch.tensor([0.5, -1.0, 2.0]), {"num_labels": 1}),
        (
            "regression",
            torch.tensor([[0.5, 1, 1], [1, 0, 0.2], [0, 9, 0]]),
            {"num_labels": 3, "problem_type": "regression"},
        ),
        (
            "multi",
            torch.tensor([[0.0, 1], [1, 0], [0, 0]]),
            {"num_labels": 2, "problem_type": "multi_label_classification"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_sequence_classification_matches_transformers(
    problem: str, labels: Tensor, given: dict[str, Any], side: str, tmp_path: Path
) -> None:
    model, reference = pair(tmp_path, "GPTNeoXForSequenceClassification", pad_token_id=0, **given)
    ids, mask = padded_batch(side)
    for masked in ({"attention_mask": mask}, {}):  # without a mask, both find the last token by pad_token_id
        found, expected = model(ids, labels=labels, **masked), reference(ids, labels=labels, **masked)
        assert difference(found.logits, expected.logits) <= EQUAL
        assert difference(found.loss, expected.loss) <= EQUAL * max(1, expected.loss.item())


@torch.no_grad()
def test_sequence_classification_needs_to_know_each_rows_last_token(tmp_path: Path) -> None:
    model, reference = pair(tmp_path, "GPTNeoXForSequenceClassification")
    ids = random_ids(2, 9)
    assert difference(model(ids[:1]).logits, reference(ids[:1]).logits) <= EQUAL
    with refused(ArgumentError, "a batch of 2 rows without attention_mask needs config.pad_token_id"):
        model(ids)
    with refused(ArgumentError, "row 1 holds padding only"):
        model(ids, attention_mask=torch.tensor([[1] * 9, [0] * 9]))
    with refused(ArgumentError, "labels: found 2, expected -100 or 0 to 1"):
        model(ids[:1], labels=torch.tensor([2]))


@torch.no_grad()
def test_token_classification_matches_transformers(tmp_path: Path) -> None:
    model, reference = pair(tmp_path, "GPTNeoXForTokenClassification", num_labels=5)
    ids, mask = padded_batch("right")
    labels = torch.randint(0, 5, ids.shape).masked_fill(mask == 0, -100)
    labels[0, 3] = -100
    found = model(ids, attention_mask=mask, labels=labels)
    expected = reference(ids, attention_mask=mask, labels=labels)
    assert difference(found.logits[mask == 1], expected.logits[mask == 1]) <= EQUAL
    assert difference(found.loss, expected.loss) <= EQUAL
    with refused(ArgumentError, "a masked position has a label other than -100"):
        model(ids, attention_mask=mask, labels=torch.zeros_like(ids))


@torch.no_grad()
def test_language_model_loss_matches_transformers(tiny: tuple[Any, Any]) -> None:
    model, reference = tiny
    ids = random_ids(2, 30)
    labels = ids.clone()
    labels[0, 5:9] = -100
    assert difference(model(ids, labels=labels).loss, reference(ids, labels=labels).loss) <= EQUAL


@torch.no_grad()
def test_language_model_loss_leaves_out_padding(tiny: tuple[Any, Any]) -> None:
    model, reference = tiny
    ids, mask = padded_batch("left")
    labels = ids.masked_fill(mask == 0, -100)
    first = mask.argmax(1, keepdim=True)  # the first real token: nothing real stands before it to predict it from
    theirs = reference(ids, attention_mask=mask, labels=labels.scatter(1, first, -100)).loss
    assert difference(model(ids, attention_mask=mask, labels=labels).loss, theirs) <= EQUAL


# What is refused ------------------------------------------------------------------------------------------------------

IDS, MASK = random_ids(2, 5), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
EMBEDS, POSITIONS = torch.zeros(2, 5, 64), torch.arange(5)[None]
NO_SENSE: list[tuple[dict[str, Any], str]] = [
    (
        {"attention_mask": MASK, "labels": IDS},
        "a masked position has a label other than -100; set labels there to -100",
    ),
    ({"labels": torch.full_like(IDS, 131)}, "labels: found 131, expected -100 or 0 to 130"),
    ({"labels": IDS[:, :4]}, r"labels are \(2, 4\), expected \(2, 5\)"),
    ({"labels": IDS.float()}, "labels are torch.float32, expected integers"),
    ({"attention_mask": torch.ones(2, 4)}, r"attention_mask is \(2, 4\), expected \(2, 5\)"),
    ({"attention_mask": torch.full((2, 5), -10000.0)}, "values other than 0 and 1"),
    ({"position_ids": POSITIONS[:, 1:]}, r"position_ids are \(1, 4\), expected \(2, 5\)"),
    ({"position_ids": POSITIONS + 0.5}, "position_ids are torch.float32, expected integers"),
    ({"position_ids": POSITIONS - 1}, "position_ids: found -1, expected 0 to 255"),
    ({"inputs_embeds": EMBEDS}, "exactly one of input_ids and inputs_embeds"),
    ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
    ({"input_ids": None, "inputs_embeds": EMBEDS[..., 1:]}, r"are \(2, 5, 63\), expected \(batch, tokens, 64\)"),
    *(({"logits_to_keep": n}, "logits_to_keep is .*expected a number of columns") for n in (-1, 1.5, IDS[0])),
    ({"logits_to_keep": 1, "labels": IDS}, "logits_to_keep and labels exclude each other"),
    ({"input_ids": torch.tensor([[1, 131]])}, "input_ids: found 131, expected 0 to 130"),
    ({"input_ids": torch.tensor([[-1, 1]])}, "input_ids: found -1, expected 0 to 130"),
    ({"input_ids": IDS.tolist()}, "input_ids is a list, expected a tensor"),
    *(({"input_ids": ids}, r"input_ids are .*expected \(batch, tokens\) int64") for ids in (IDS[0], IDS.float())),
    ({"attn_mask": MASK}, "knows no argument 'attn_mask'"),
]
NOT_SUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"has 4 dimensions; expected \(batch, tokens\) of 0 and 1"),
    ({"output_attentions": True}, "output_attentions: attention weights are never materialized"),
    ({"head_mask": torch.ones(2, 2)}, "head_mask: heads cannot be masked"),
    ({"encoder_hidden_states": EMBEDS}, "encoder_hidden_states: GPT-NeoX has no cross attention"),
    ({"past_key_values": transformers.DynamicCache()}, "past_key_values is a DynamicCache; pass back what forward"),
    ({"past_key_values": ((IDS, IDS),)}, "past_key_values is a tuple"),
]
REFUSED = [*((*row, ArgumentError) for row in NO_SENSE), *((*row, UnsupportedError) for row in NOT_SUPPORTED)]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_arguments_that_cannot_be_honoured_are_refused_by_name(number: int, tiny: tuple[Any, Any]) -> None:
    arguments, told, error = REFUSED[number]
    with refused(error, told):
        tiny[0](**{"input_ids": IDS, **arguments})


# Masks and positions --------------------------------------------------------------------------------------------------


def padded_batch(side: str, lengths: tuple[int, ...] = (40, 17, 1)) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, padded with id 0 -> ids and mask (rows, longest)."""
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place] = random_ids(1, length, seed=row)[0]
        mask[row, place] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_equal_transformers_and_rows_run_alone(side: str, tiny: tuple[Any, Any]) -> None:
    model, reference = tiny
    ids, mask = padded_batch(side, (LONG, 17, 1))
    logits = model(ids, attention_mask=mask).logits
    real = mask.bool()
    assert difference(logits[real], reference(ids, attention_mask=mask).logits[real]) <= EQUAL
    for row in range(len(ids)):
        # positions of a left-padded row are shifted as a whole, which rotary attention does not see but for rounding
        assert difference(logits[row][real[row]], model(ids[row][real[row]][None]).logits[0]) <= EQUAL


@torch.no_grad()
def test_interior_zeros_are_dropped_and_positions_still_count_them(tiny: tuple[Any, Any]) -> None:
    model, reference = tiny
    ids = random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 3:9] = mask[0, 20] = mask[1, 0] = mask[1, 29] = 0
    found = model(ids, attention_mask=mask, output_hidden_states=True)
    expected = reference(ids, attention_mask=mask).logits
    real = mask.bool()
    assert difference(found.logits[real], expected[real]) <= EQUAL
    for output in (found.logits, *found.hidden_states):
        assert output[~real].abs().max() == 0


@torch.no_grad()
def test_any_zero_one_mask_will_do(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    ids, mask = padded_batch("left")
    expected = model(ids, attention_mask=mask).logits
    for same in (mask.bool(), mask.float(), mask.int()):
        assert torch.equal(model(ids, attention_mask=same).logits, expected)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


@torch.no_grad()
def test_position_ids_are_the_rotary_positions(tiny: tuple[Any, Any]) -> None:
    model, reference = tiny
    ids = random_ids(2, 12)
    positions = torch.stack((torch.arange(12) * 3, torch.arange(12) + 100))
    expected = reference(ids, position_ids=positions).logits
    assert difference(model(ids, position_ids=positions).logits, expected) <= EQUAL
    shared = model(ids, position_ids=positions[:1]).logits
    assert difference(shared, reference(ids, position_ids=positions[:1]).logits) <= EQUAL


def test_more_than_the_context_is_refused_with_the_numbers(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    with refused(ContextLengthError, "position 256 is outside the context: this model has 256 positions.* 257 tokens"):
        model(random_ids(1, 257))
    past = model(random_ids(1, 250)).past_key_values
    with refused(ContextLengthError, "7 tokens after 250 cached ones") as caught:
        model(random_ids(1, 7), past_key_values=past)
    assert caught.value.code == "context_length_exceeded"
    assert past.get_seq_length() == 250  # a refused call leaves the cache as it was
    model(random_ids(1, 6), past_key_values=past)


# Inputs and outputs ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_inputs_embeds_stand_for_ids(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    ids, mask = padded_batch("left")
    embeds = model.get_input_embeddings()(ids)
    expected = model(ids, attention_mask=mask).logits
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("cls", ["GPTNeoXForCausalLM", "GPTNeoXModel"])
@torch.no_grad()
def test_hidden_states_are_those_of_transformers(cls: str, tmp_path: Path) -> None:
    model, reference = pair(tmp_path, cls, num_hidden_layers=3)
    ids = random_ids(2, 20)
    found = model(ids, output_hidden_states=True).hidden_states
    expected = reference(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 4
    for state, theirs in zip(found, expected, strict=True):
        assert difference(state, theirs) <= EQUAL
    assert torch.equal(found[-1], model.base_model(ids).last_hidden_state)  # the last is after the final norm
    assert model(ids).hidden_states is None


def test_outputs_are_read_by_attribute_name_and_place(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    ids = random_ids(1, 5)
    output = model(ids, labels=ids)
    assert output.loss is output["loss"] is output[0]
    assert output.logits is output["logits"] is output[1]
    assert list(output) == ["loss", "logits", "past_key_values"]
    assert [type(part) for part in model(ids, return_dict=False)] == [Tensor, type(output.past_key_values)]
    assert model(ids).loss is None
    assert "loss" not in model(ids)
    with pytest.raises(AttributeError, match="no output 'logit'; there are logits, past_key_values"):
        model(ids).logit  # noqa: B018


@torch.no_grad()
def test_logits_to_keep_computes_the_last_columns_only(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    ids, mask = padded_batch("right")
    every = model(ids, attention_mask=mask).logits
    for count in (1, 7, 40, 100):
        some = model(ids, attention_mask=mask, logits_to_keep=count).logits
        # a product over fewer rows may be summed in another order
        assert difference(some, every[:, -count:]) <= EQUAL


@torch.no_grad()
def test_ids_may_be_of_any_integer_type(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    ids = random_ids(1, 9)
    for kind in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(model(ids.to(kind)).logits, model(ids).logits)
    model(torch.tensor([[1, -1]]), attention_mask=torch.tensor([[1, 0]]))  # a masked id is never looked at
    wide = GPTNeoXForCausalLM(model.config.copy(vocab_size=1 << 16))  # more than int16 and uint8 can count
    for kind in (torch.int16, torch.uint8):
        assert torch.equal(wide(ids.to(kind)).logits, wide(ids).logits)


def test_nothing_of_a_model_is_trained(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    assert model.eval() is model and not model.training
    with refused(UnsupportedError, r"train\(\): this package is for inference"):
        model.train()
    assert model(IDS, output_attentions=False, head_mask=None).logits.shape == (2, 5, 131)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(random_ids(1, 3)).logits.requires_grad


# Cache ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parallel-rotary25", "sequential-rotary100", "rope-yarn-mscale"])
@torch.no_grad()
def test_decode_matches_full_forward(name: str, tmp_path: Path) -> None:
    model, _ = pair(tmp_path, **CONFIGS[name])
    ids = random_ids(2, LONG)
    full = model(ids).logits
    past, parts = None, []
    for first, last in [(0, PAGE - 3), *((i, i + 1) for i in range(PAGE - 3, PAGE + 3)), (PAGE + 3, LONG)]:
        output = model(ids[:, first:last], past_key_values=past)
        past = output.past_key_values
        parts.append(output.logits)
        assert past.get_seq_length() == last
    assert difference(torch.cat(parts, 1), full) <= EQUAL


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_continuing_a_padded_batch_matches_transformers(side: str, tiny: tuple[Any, Any]) -> None:
    model, reference = tiny
    ids, mask = padded_batch(side)
    found = model(ids, attention_mask=mask)
    expected = reference(ids, attention_mask=mask)
    past, theirs = found.past_key_values, expected.past_key_values
    for step in range(3):
        new = random_ids(3, 2, seed=50 + step)
        mask = torch.cat((mask, torch.ones_like(new)), 1)
        found = model(new, attention_mask=mask, past_key_values=past)
        expected = reference(new, attention_mask=mask, past_key_values=theirs)
        assert found.past_key_values is past  # changed in place
        assert difference(found.logits, expected.logits) <= EQUAL
    assert past.get_seq_length() == theirs.get_seq_length() == 46


@torch.no_grad()
def test_a_mask_may_cover_only_the_new_columns(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    ids, mask = padded_batch("left")
    new = random_ids(3, 2)
    whole = torch.cat((mask, torch.ones_like(new)), 1)
    past = model(ids, attention_mask=mask).past_key_values
    expected = model(new, attention_mask=whole, past_key_values=past.fork()).logits
    assert torch.equal(model(new, attention_mask=whole[:, -2:], past_key_values=past.fork()).logits, expected)
    assert torch.equal(model(new, past_key_values=past.fork()).logits, expected)
    whole[1, 0] = 1
    with refused(ArgumentError, "row 1 masks cached tokens differently from when they were cached"):
        model(new, attention_mask=whole, past_key_values=past)


@torch.no_grad()
def test_crop_forgets_columns(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    ids, mask = padded_batch("left", (LONG, 17, 1))
    new = random_ids(3, 4)
    expected = model(new, past_key_values=model(ids[:, :-5], attention_mask=mask[:, :-5]).past_key_values).logits
    for length in (LONG - 5, -5):
        past = model(ids, attention_mask=mask).past_key_values
        past.crop(length)
        assert past.get_seq_length() == LONG - 5
        assert difference(model(new, past_key_values=past).logits, expected) <= EQUAL
    past.crop(10_000)  # longer than it is: nothing to forget
    assert past.get_seq_length() == LONG - 1
    with refused(ArgumentError, "max_length is -1000"):
        past.crop(-1000)


@torch.no_grad()
def test_a_fork_is_independent(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    ids = random_ids(2, PAGE + 5)
    past = model(ids).past_key_values
    twin = past.fork()
    a, b = random_ids(2, 4, seed=8), random_ids(2, 4, seed=9)
    first, second = model(a, past_key_values=past).logits, model(b, past_key_values=twin).logits
    assert difference(first, model(torch.cat((ids, a), 1)).logits[:, -4:]) <= EQUAL
    assert difference(second, model(torch.cat((ids, b), 1)).logits[:, -4:]) <= EQUAL
    twin.crop(3)
    again = model(b, past_key_values=past).logits
    assert difference(again, model(torch.cat((ids, a, b), 1)).logits[:, -4:]) <= EQUAL


@torch.no_grad()
def test_use_cache_says_whether_the_cache_is_returned(tmp_path: Path) -> None:
    model, _ = pair(tmp_path, use_cache=False)
    ids = random_ids(1, 5)
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 5


def test_caches_of_another_batch_or_model_are_refused(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    past = model(IDS).past_key_values
    with refused(ArgumentError, "past_key_values holds 2 rows, but the call has 1"):
        model(IDS[:1], past_key_values=past)
    other = GPTNeoXForCausalLM(model.config.copy(num_attention_heads=4))
    with refused(ArgumentError, r"past_key_values is of another model: .* are \(2, 2, 32\), expected \(2, 4, 16\)"):
        other(IDS, past_key_values=past)
    past.free()
    with refused(CacheError, "the sequence was freed"):
        model(IDS, past_key_values=past)


# Moving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_dtype_moves_change_weights_and_never_the_rotary_table(tied: bool, tmp_path: Path) -> None:
    model, _ = pair(tmp_path, tie_word_embeddings=tied)
    ids = random_ids(1, 30)
    table, expected = model.base_model.rotary.table.clone(), model(ids).logits
    moves: list[tuple[Callable[[Any], Any], torch.dtype]] = [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.to("cpu", torch.float16), torch.float16),
        (lambda m: m.bfloat16().float(), torch.float32),
    ]
    for move, dtype in moves:
        moved = move(copy.deepcopy(model))
        assert {p.dtype for p in moved.parameters()} == {dtype}
        assert moved.dtype == dtype
        assert torch.equal(moved.base_model.rotary.table, table)
        assert (moved.embed_out.weight is moved.base_model.embed_in.weight) is tied
        output = moved(ids, output_hidden_states=True)
        assert output.logits.dtype == torch.float32  # in every dtype: users take the softmax of it
        assert output.hidden_states[0].dtype == dtype
        assert output.past_key_values.pool.dtype == dtype
        # bfloat16 weights have 8 bits: each is off by up to 1/256, over 64 of them and two layers
        assert difference(output.logits, expected) < 0.3


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA; this one has it")
def test_cuda_without_a_gpu_is_one_clear_line(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    for move in (lambda: model.cuda(), lambda: model.to("cuda"), lambda: model.to(torch.device("cuda:1"))):
        with refused(ArgumentError, "torch sees no CUDA device here") as caught:
            move()
        assert "\n" not in str(caught.value)
    assert model.cpu() is model


# Building -------------------------------------------------------------------------------------------------------------


def test_a_model_built_from_a_config_is_random_and_runs() -> None:
    config = GPTNeoXConfig(**TINY, num_labels=3)
    assert GPTNeoXForCausalLM(config)(random_ids(1, 4)).logits.shape == (1, 4, 131)
    assert GPTNeoXForSequenceClassification(config)(random_ids(1, 4)).logits.shape == (1, 3)
    hidden = GPTNeoXModel(config)(random_ids(1, 4)).last_hidden_state
    assert hidden.shape == (1, 4, 64)
    assert torch.isfinite(hidden).all()


def test_state_dict_has_the_checkpoints_names(tiny: tuple[Any, Any]) -> None:
    model, reference = tiny
    theirs = {name.replace("lm_head", "embed_out") for name in reference.state_dict()}
    assert set(model.state_dict()) == theirs
    built = GPTNeoXForCausalLM(model.config)
    built.load_state_dict(model.state_dict())
    ids = random_ids(1, 9)
    assert torch.equal(built(ids).logits, model(ids).logits)
    assert built.num_parameters() == reference.num_parameters()


@torch.no_grad()
def test_empty_rows_and_empty_calls_return_empty_or_zero_outputs(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    ids = random_ids(2, 4)
    assert model(ids[:, :0]).logits.shape == (2, 0, 131)
    logits = model(ids, attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])).logits
    assert logits[1].abs().max() == 0
    assert difference(logits[:1], model(ids[:1]).logits) <= EQUAL


@pytest.mark.parametrize("name", ABSENT)
def test_methods_that_are_not_there_say_what_stands_for_them(tiny: tuple[Any, Any], name: str) -> None:
    assert not hasattr(tiny[0], name)
    with pytest.raises(AttributeError, match=f"^GPTNeoXForCausalLM has no {name}: {ABSENT[name]}$"):
        getattr(tiny[0], name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = tiny[0].nothing


def test_a_model_that_memory_does_not_hold_is_refused_before_it_takes_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox_lite.core.network.free_memory", lambda: (2 << 20, 1 << 20))
    needed = "weights of 4 bytes take 82.2 GB, 0.0 GB of memory are free; give a smaller config, or load a checkpoint"
    with pytest.raises(ArgumentError, match=needed):
        GPTNeoXModel(GPTNeoXConfig())
    with torch.device("meta"):
        assert GPTNeoXModel(GPTNeoXConfig()).embed_in.weight.is_meta
    assert GPTNeoXModel.from_config(GPTNeoXConfig(**TINY)).can_generate() is False
    assert GPTNeoXForCausalLM(GPTNeoXConfig(**TINY)).can_generate() is True
