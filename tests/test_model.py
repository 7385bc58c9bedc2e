"""The forward pass: equal to transformers' over every axis of the family, and what the arguments mean.

Tolerances: our order of additions differs from transformers', so equal means within float32 rounding. Logits here are
of order one and pass through two layers; 2e-5 is about 100 roundings of 1.2e-7, and the worst case seen is far below.
"""

import copy

import pytest
import torch
import transformers
from support.peers import TINY, difference, ours, padded, pair, peer, random_ids

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, GPTNeoXModel
from neox_lite.errors import ArgumentError, CacheError, ContextLengthError, UnsupportedError
from neox_lite.layers import Rotary
from neox_lite.modeling.pretrained import ABSENT
from neox_lite.units import PAGE

EQUAL = 2e-5
LONG = PAGE + 22  # tokens: the second page of a sequence is in use


def rope(kind, theta=10000.0, share=1.0, **keys):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": share, **keys}}


def part(percent):
    return rope("default", share=percent / 100)


def yarn(**keys):
    return rope("yarn", **{"factor": 4.0, "original_max_position_embeddings": 64, **keys})


def heads(head_dim, **keys):
    return {"hidden_size": 2 * head_dim, "num_attention_heads": 2, **keys}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SEQUENTIAL, TIED = {"use_parallel_residual": False}, {"tie_word_embeddings": True}
CONFIGS = {
    f"{'parallel' if parallel else 'sequential'}-rotary{share}": {"use_parallel_residual": parallel, **part(share)}
    for parallel in (True, False)
    for share in (25, 50, 100)
}
CONFIGS |= {
    "sequential-rotary100-tied": {**SEQUENTIAL, **TIED, **part(100)},
    "parallel-tied": TIED,
    "rope-theta500": rope("default", theta=500.0),
    "rope-linear": rope("linear", factor=4.0),
    "rope-linear-share25-sequential": {**SEQUENTIAL, **rope("linear", share=0.25, factor=4.0)},
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
    "gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh", **SEQUENTIAL},
    "no-attention-bias": {"attention_bias": False},
    "no-attention-bias-sequential": {"attention_bias": False, **SEQUENTIAL},
    "vocab257": {"vocab_size": 257},
    "vocab8": {"vocab_size": 8, **TIED},
    "head64": heads(64),
    "head80-of-pythia-2.8b": heads(80),
    "head80-of-redpajama-3b": heads(80, **SEQUENTIAL, **rope("default")),
    "head96-of-gpt-neox-20b": heads(96, hidden_act="gelu_fast"),
    "head96-of-line-3.6b": heads(96, **SEQUENTIAL, **TIED, **rope("default")),
    "head128": heads(128),
    "head256-of-pythia-1b": heads(256),
    "layer-norm-eps-1e-12": {"layer_norm_eps": 1e-12},
    "layer-norm-eps-0.1": {"layer_norm_eps": 0.1},
    "one-head-one-layer": {"num_attention_heads": 1, "num_hidden_layers": 1},
}


@pytest.fixture(autouse=True)
def without_gradients():
    """transformers' models would record them."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(ours, transformers'), for tests that are about the call and not about the configuration."""
    return pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(tiny):
    return tiny[0]


def padded_batch(side, lengths=(40, 17, 1)):
    """Rows of different lengths, padded with id 0 -> ids and mask (rows, longest)."""
    return padded([random_ids(1, length, seed=row)[0] for row, length in enumerate(lengths)], side)


# Equal to transformers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_transformers(name, tmp_path, record_property):
    model, reference = pair(tmp_path, **CONFIGS[name])
    ids = random_ids(2, LONG, model.config.vocab_size)
    expected, logits = reference(ids).logits, model(ids).logits
    assert logits.dtype == torch.float32
    assert 0.3 < expected.std() < 3  # of order one, as the tolerance assumes
    record_property("max_abs_difference", worst := difference(logits, expected))
    assert worst <= EQUAL


# Our products are float32 and only weights, cached keys and values are half precision, so we are closer to the float32
# model than transformers is, which rounds after every operation. 1.05 leaves room for the draw of the random weights.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name",
    ["parallel-rotary25", "sequential-rotary100-tied", "head96-of-gpt-neox-20b", "rope-yarn", "no-attention-bias"],
)
def test_half_precision_is_as_close_to_float32_as_transformers_is(name, dtype, tmp_path, record_property):
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
def test_rotary_tables_equal_those_of_transformers(name):
    theirs = transformers.GPTNeoXConfig(**{**TINY, **CONFIGS[name]})
    module = transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXRotaryEmbedding(theirs)
    positions = torch.arange(theirs.max_position_embeddings)[None]
    cos, sin = module(torch.zeros(1), positions)  # (1, positions, rotary_dim), both halves alike
    table = Rotary(GPTNeoXConfig(**theirs.to_dict())).table
    expected = torch.stack((cos[0], sin[0]))[..., : table.shape[-1]]
    # the same float32 expressions, but pow, sin and cos may differ in their last bit between torch's vector widths
    assert difference(table, expected) <= 2e-6


def test_a_full_context_matches_transformers(tiny):
    model, reference = tiny
    ids = random_ids(1, model.config.max_position_embeddings)
    assert difference(model(ids).logits, reference(ids).logits) <= EQUAL


# Base model and task heads --------------------------------------------------------------------------------------------


def test_question_answering_matches_transformers_and_its_loss_leaves_out_padding(tmp_path):
    model, reference = pair(tmp_path, "GPTNeoXForQuestionAnswering")
    ids = random_ids(3, 20)
    start, end = torch.tensor([2, 5, 99]), torch.tensor([4, 19, 7])  # 99 is outside the row: left out of the loss
    found, expected = (m(ids, start_positions=start, end_positions=end) for m in (model, reference))
    for name in ("start_logits", "end_logits", "loss"):
        assert difference(found[name], expected[name]) <= EQUAL
    ids, mask = ids[:1], torch.tensor([[1] * 12 + [0] * 8])
    span = {"start_positions": torch.tensor([2]), "end_positions": torch.tensor([5])}
    alone, beside_padding = model(ids[:, :12], **span), model(ids, attention_mask=mask, **span)
    assert difference(alone.loss, beside_padding.loss) <= EQUAL
    with pytest.raises(ArgumentError, match="names a masked column"):
        model(ids, attention_mask=mask, **{**span, "start_positions": torch.tensor([15])})


LABELS, FLAGS, SCORES = [0, 2, 1], [[0.0, 1, 1], [1, 0, 0], [0, 0, 0]], [[0.5, 1, 1], [1, 0, 0.2], [0, 9, 0]]
PROBLEMS = {
    "single-label": (LABELS, {"num_labels": 3}),
    "multi-label": (FLAGS, {"num_labels": 3}),
    "multi-label, named": ([[0.0, 1], [1, 0], [0, 0]], {"num_labels": 2, "problem_type": "multi_label_classification"}),
    "regression": ([0.5, -1.0, 2.0], {"num_labels": 1}),
    "regression of three": (SCORES, {"num_labels": 3, "problem_type": "regression"}),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification_matches_transformers(problem, side, tmp_path):
    labels, config = PROBLEMS[problem]
    model, reference = pair(tmp_path, "GPTNeoXForSequenceClassification", pad_token_id=0, **config)
    ids, mask = padded_batch(side)
    for masked in ({"attention_mask": mask}, {}):  # without a mask, both find the last token by pad_token_id
        found, expected = (m(ids, labels=torch.tensor(labels), **masked) for m in (model, reference))
        assert difference(found.logits, expected.logits) <= EQUAL
        assert difference(found.loss, expected.loss) <= EQUAL * max(1, expected.loss.item())


def test_sequence_classification_needs_to_know_each_rows_last_token(tmp_path):
    model, reference = pair(tmp_path, "GPTNeoXForSequenceClassification")
    ids = random_ids(2, 9)
    assert difference(model(ids[:1]).logits, reference(ids[:1]).logits) <= EQUAL
    for arguments, message in (
        ({"input_ids": ids}, "a batch of 2 rows without attention_mask needs config.pad_token_id"),
        ({"input_ids": ids, "attention_mask": torch.tensor([[1] * 9, [0] * 9])}, "row 1 is masked as a whole"),
        ({"input_ids": ids[:1], "labels": torch.tensor([2])}, "labels: found 2, expected -100 or 0 to 1"),
    ):
        with pytest.raises(ArgumentError, match=message):
            model(**arguments)


def test_token_classification_matches_transformers(tmp_path):
    model, reference = pair(tmp_path, "GPTNeoXForTokenClassification", num_labels=5)
    ids, mask = padded_batch("right")
    labels = torch.randint(0, 5, ids.shape).masked_fill(mask == 0, -100)
    labels[0, 3] = -100
    found, expected = (m(ids, attention_mask=mask, labels=labels) for m in (model, reference))
    assert difference(found.logits[mask == 1], expected.logits[mask == 1]) <= EQUAL
    assert difference(found.loss, expected.loss) <= EQUAL
    with pytest.raises(ArgumentError, match="a masked position has a label other than -100"):
        model(ids, attention_mask=mask, labels=torch.zeros_like(ids))


def test_language_model_loss_matches_transformers_and_leaves_out_padding(tiny):
    model, reference = tiny
    ids = random_ids(2, 30)
    labels = ids.clone()
    labels[0, 5:9] = -100
    assert difference(model(ids, labels=labels).loss, reference(ids, labels=labels).loss) <= EQUAL
    ids, mask = padded_batch("left")
    labels = ids.masked_fill(mask == 0, -100)
    first = mask.argmax(1, keepdim=True)  # the first real token: nothing real stands before it to predict it from
    theirs = reference(ids, attention_mask=mask, labels=labels.scatter(1, first, -100)).loss
    assert difference(model(ids, attention_mask=mask, labels=labels).loss, theirs) <= EQUAL


# What is refused ------------------------------------------------------------------------------------------------------

IDS, MASK = random_ids(2, 5), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
EMBEDS, POSITIONS = torch.zeros(2, 5, 64), torch.arange(5)[None]
MASKED_LABEL = "a masked position has a label other than -100; set labels there to -100"
NO_SENSE = [
    ({"attention_mask": MASK, "labels": IDS}, MASKED_LABEL),
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
    *(({"logits_to_keep": n}, "logits_to_keep is .*expected a number of columns") for n in (-1, 1.5, True)),
    ({"logits_to_keep": 1, "labels": IDS}, "logits_to_keep and labels exclude each other"),
    ({"input_ids": torch.tensor([[1, 131]])}, "input_ids: found 131, expected 0 to 130"),
    ({"input_ids": torch.tensor([[-1, 1]])}, "input_ids: found -1, expected 0 to 130"),
    ({"input_ids": IDS.tolist()}, "input_ids is a list, expected a tensor"),
    *(({"input_ids": ids}, r"input_ids are .*expected \(batch, tokens\) int64") for ids in (IDS[0], IDS.float())),
    ({"attn_mask": MASK}, "knows no argument 'attn_mask'"),
]
NOT_SUPPORTED = [
    ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"has 4 dimensions; expected \(batch, tokens\) of 0 and 1"),
    ({"output_attentions": True}, "output_attentions: attention weights are never materialized"),
    ({"head_mask": torch.ones(2, 2)}, "head_mask: heads cannot be masked"),
    ({"encoder_hidden_states": EMBEDS}, "encoder_hidden_states: GPT-NeoX has no cross attention"),
    ({"past_key_values": transformers.DynamicCache()}, "past_key_values is a DynamicCache; pass back what forward"),
    ({"past_key_values": ((IDS, IDS),)}, "past_key_values is a tuple"),
]
REFUSED = [*((*row, ArgumentError) for row in NO_SENSE), *((*row, UnsupportedError) for row in NOT_SUPPORTED)]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_arguments_that_cannot_be_honoured_are_refused_by_name(number, model):
    arguments, message, error = REFUSED[number]
    with pytest.raises(error, match=message):
        model(**{"input_ids": IDS, **arguments})


# Masks and positions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_transformers_and_rows_run_alone(side, tiny):
    model, reference = tiny
    ids, mask = padded_batch(side, (LONG, 17, 1))
    logits, real = model(ids, attention_mask=mask).logits, mask.bool()
    assert difference(logits[real], reference(ids, attention_mask=mask).logits[real]) <= EQUAL
    for row in range(len(ids)):
        # positions of a left-padded row are shifted as a whole, which rotary attention does not see but for rounding
        assert difference(logits[row][real[row]], model(ids[row][real[row]][None]).logits[0]) <= EQUAL


def test_interior_zeros_are_dropped_and_positions_still_count_them(tiny):
    model, reference = tiny
    ids = random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 3:9] = mask[0, 20] = mask[1, 0] = mask[1, 29] = 0
    found, real = model(ids, attention_mask=mask, output_hidden_states=True), mask.bool()
    assert difference(found.logits[real], reference(ids, attention_mask=mask).logits[real]) <= EQUAL
    for output in (found.logits, *found.hidden_states):
        assert output[~real].abs().max() == 0


def test_inputs_in_another_form_give_the_same_logits(model):
    ids, mask = padded_batch("left")
    expected = model(ids, attention_mask=mask).logits
    for same in (mask.bool(), mask.float(), mask.int()):
        assert torch.equal(model(ids, attention_mask=same).logits, expected)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits, expected)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)
    model(torch.tensor([[1, -1]]), attention_mask=torch.tensor([[1, 0]]))  # a masked id is never looked at
    wide = GPTNeoXForCausalLM(model.config.copy(vocab_size=1 << 16))  # more than int16 and uint8 can count
    for kind in (torch.int32, torch.int16, torch.uint8):
        for one in (model, wide):
            assert torch.equal(one(ids.to(kind)).logits, one(ids).logits)


def test_position_ids_are_the_rotary_positions(tiny):
    ids, positions = random_ids(2, 12), torch.stack((torch.arange(12) * 3, torch.arange(12) + 100))
    for given in (positions, positions[:1]):
        found, expected = (m(ids, position_ids=given).logits for m in tiny)
        assert difference(found, expected) <= EQUAL


def test_more_than_the_context_is_refused_with_the_numbers(model):
    context = "position 256 is outside the context: this model has 256 positions.* 257 tokens"
    with pytest.raises(ContextLengthError, match=context):
        model(random_ids(1, 257))
    past = model(random_ids(1, 250)).past_key_values
    with pytest.raises(ContextLengthError, match="7 tokens after 250 cached ones") as caught:
        model(random_ids(1, 7), past_key_values=past)
    assert caught.value.code == "context_length_exceeded"
    assert past.get_seq_length() == 250  # a refused call leaves the cache as it was
    model(random_ids(1, 6), past_key_values=past)


# Outputs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ["GPTNeoXForCausalLM", "GPTNeoXModel"])
def test_hidden_states_are_those_of_transformers(cls, tmp_path):
    model, reference = pair(tmp_path, cls, num_hidden_layers=3)
    ids = random_ids(2, 20)
    found, expected = (m(ids, output_hidden_states=True).hidden_states for m in (model, reference))
    assert len(found) == len(expected) == 4
    assert max(map(difference, found, expected)) <= EQUAL
    assert torch.equal(found[-1], model.base_model(ids).last_hidden_state)  # the last is after the final norm
    assert model(ids).hidden_states is None


def test_outputs_are_read_by_attribute_name_and_place(model):
    ids = random_ids(1, 5)
    output = model(ids, labels=ids)
    assert output.loss is output["loss"] is output[0]
    assert output.logits is output["logits"] is output[1]
    assert list(output) == ["loss", "logits", "past_key_values"]
    assert [type(part) for part in model(ids, return_dict=False)] == [torch.Tensor, type(output.past_key_values)]
    assert model(ids).loss is None and "loss" not in model(ids)
    with pytest.raises(AttributeError, match="no output 'logit'; there are logits, past_key_values"):
        model(ids).logit  # noqa: B018


def test_logits_to_keep_computes_the_last_columns_only(model):
    ids, mask = padded_batch("right")
    every = model(ids, attention_mask=mask).logits
    for count in (1, 7, 40, 100):
        some = model(ids, attention_mask=mask, logits_to_keep=count).logits
        # a product over fewer rows may be summed in another order
        assert difference(some, every[:, -count:]) <= EQUAL


def test_nothing_of_a_model_is_trained(model):
    assert model.eval() is model and not model.training
    with pytest.raises(UnsupportedError, match=r"train\(\): this package is for inference"):
        model.train()
    assert model(IDS, output_attentions=False, head_mask=None).logits.shape == (2, 5, 131)
    assert not any(p.requires_grad for p in model.parameters())
    with torch.enable_grad():
        assert not model(random_ids(1, 3)).logits.requires_grad


def test_empty_rows_and_empty_calls_return_empty_or_zero_outputs(model):
    ids = random_ids(2, 4)
    assert model(ids[:, :0]).logits.shape == (2, 0, 131)
    logits = model(ids, attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])).logits
    assert logits[1].abs().max() == 0
    assert difference(logits[:1], model(ids[:1]).logits) <= EQUAL


# Cache ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parallel-rotary25", "sequential-rotary100", "rope-yarn-mscale"])
def test_decode_matches_full_forward(name, tmp_path):
    model, _ = pair(tmp_path, **CONFIGS[name])
    ids, past, parts = random_ids(2, LONG), None, []
    for first, last in [(0, PAGE - 3), *((i, i + 1) for i in range(PAGE - 3, PAGE + 3)), (PAGE + 3, LONG)]:
        output = model(ids[:, first:last], past_key_values=past)
        past = output.past_key_values
        parts.append(output.logits)
        assert past.get_seq_length() == last
    assert difference(torch.cat(parts, 1), model(ids).logits) <= EQUAL


@pytest.mark.parametrize("side", ["left", "right"])
def test_continuing_a_padded_batch_matches_transformers(side, tiny):
    ids, mask = padded_batch(side)
    past, theirs = (m(ids, attention_mask=mask).past_key_values for m in tiny)
    for step in range(3):
        new = random_ids(3, 2, seed=50 + step)
        mask = torch.cat((mask, torch.ones_like(new)), 1)
        found, expected = (
            m(new, attention_mask=mask, past_key_values=cache) for m, cache in zip(tiny, (past, theirs), strict=True)
        )
        assert found.past_key_values is past  # changed in place
        assert difference(found.logits, expected.logits) <= EQUAL
    assert past.get_seq_length() == theirs.get_seq_length() == 46


def test_a_mask_may_cover_only_the_new_columns(model):
    ids, mask = padded_batch("left")
    new = random_ids(3, 2)
    whole = torch.cat((mask, torch.ones_like(new)), 1)
    past = model(ids, attention_mask=mask).past_key_values
    expected = model(new, attention_mask=whole, past_key_values=past.fork()).logits
    assert torch.equal(model(new, attention_mask=whole[:, -2:], past_key_values=past.fork()).logits, expected)
    assert torch.equal(model(new, past_key_values=past.fork()).logits, expected)
    whole[1, 0] = 1
    with pytest.raises(ArgumentError, match="row 1 masks cached tokens differently from when they were cached"):
        model(new, attention_mask=whole, past_key_values=past)


def test_use_cache_says_whether_the_cache_is_returned(tmp_path):
    model, _ = pair(tmp_path, use_cache=False)
    ids = random_ids(1, 5)
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 5


def test_caches_of_another_batch_or_model_are_refused(model):
    past = model(IDS).past_key_values
    with pytest.raises(ArgumentError, match="past_key_values holds 2 rows, but the call has 1"):
        model(IDS[:1], past_key_values=past)
    other = GPTNeoXForCausalLM(model.config.copy(num_attention_heads=4))
    shapes = r"past_key_values is of another model: .* are \(2, 2, 32\), expected \(2, 4, 16\)"
    with pytest.raises(ArgumentError, match=shapes):
        other(IDS, past_key_values=past)
    past.free()
    with pytest.raises(CacheError, match="the sequence was freed"):
        model(IDS, past_key_values=past)


# Moving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_dtype_moves_change_weights_and_never_the_rotary_table(tied, tmp_path):
    model, _ = pair(tmp_path, tie_word_embeddings=tied)
    ids = random_ids(1, 30)
    table, expected = model.base_model.rotary.table.clone(), model(ids).logits
    for move, dtype in (
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.to("cpu", torch.float16), torch.float16),
        (lambda m: m.bfloat16().float(), torch.float32),
    ):
        moved = move(copy.deepcopy(model))
        assert {p.dtype for p in moved.parameters()} == {dtype} == {moved.dtype}
        assert torch.equal(moved.base_model.rotary.table, table)
        assert (moved.embed_out.weight is moved.base_model.embed_in.weight) is tied
        output = moved(ids, output_hidden_states=True)
        assert output.logits.dtype == torch.float32  # in every dtype: users take the softmax of it
        assert output.hidden_states[0].dtype == output.past_key_values.pool.dtype == dtype
        # bfloat16 weights have 8 bits: each is off by up to 1/256, over 64 of them and two layers
        assert difference(output.logits, expected) < 0.3


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA; this one has it")
def test_cuda_without_a_gpu_is_one_clear_line(model):
    for move in (lambda: model.cuda(), lambda: model.to("cuda"), lambda: model.to(torch.device("cuda:1"))):
        with pytest.raises(ArgumentError, match="torch sees no CUDA device here") as caught:
            move()
        assert "\n" not in str(caught.value)
    assert model.cpu() is model


# Building -------------------------------------------------------------------------------------------------------------


def test_a_model_built_from_a_config_is_random_and_runs():
    config = GPTNeoXConfig(**TINY, num_labels=3)
    assert GPTNeoXForCausalLM(config)(random_ids(1, 4)).logits.shape == (1, 4, 131)
    assert GPTNeoXForSequenceClassification(config)(random_ids(1, 4)).logits.shape == (1, 3)
    hidden = GPTNeoXModel(config)(random_ids(1, 4)).last_hidden_state
    assert hidden.shape == (1, 4, 64) and torch.isfinite(hidden).all()


def test_state_dict_has_the_checkpoints_names(tiny):
    model, reference = tiny
    assert set(model.state_dict()) == {name.replace("lm_head", "embed_out") for name in reference.state_dict()}
    built = GPTNeoXForCausalLM(model.config)
    built.load_state_dict(model.state_dict())
    assert torch.equal(built(IDS).logits, model(IDS).logits)
    assert built.num_parameters() == reference.num_parameters()


@pytest.mark.parametrize("name", ABSENT)
def test_methods_that_are_not_there_say_what_stands_for_them(model, name):
    assert not hasattr(model, name)
    with pytest.raises(AttributeError, match=f"^GPTNeoXForCausalLM has no {name}: {ABSENT[name]}$"):
        getattr(model, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = model.nothing


def test_a_model_that_memory_does_not_hold_is_refused_before_it_takes_any(monkeypatch):
    monkeypatch.setattr("neox_lite.core.network.free_memory", lambda: (2 << 20, 1 << 20))
    needed = "weights of 4 bytes take 82.2 GB, 0.0 GB of memory are free; give a smaller config, or load a checkpoint"
    with pytest.raises(ArgumentError, match=needed):
        GPTNeoXModel(GPTNeoXConfig())
    with torch.device("meta"):
        assert GPTNeoXModel(GPTNeoXConfig()).embed_in.weight.is_meta
    assert GPTNeoXModel.from_config(GPTNeoXConfig(**TINY)).can_generate() is False
    assert GPTNeoXForCausalLM(GPTNeoXConfig(**TINY)).can_generate() is True
