"""What generation promises: transformers' tokens, exact stops, honest streams, and options that are honoured or refused.

Tiny random models beside transformers' own; where a test needs certain tokens, a scripted model that says them.
"""

import copy
import itertools
import json
import pickle
import random
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from support.often import times
from support.peers import TINY, pair, random_ids
from torch import Tensor

from neox_lite import GenerationConfig, GPTNeoXTokenizerFast
from neox_lite.cache import Batch, BlockTable, PagePool
from neox_lite.errors import (
    ArgumentError,
    CacheError,
    CheckpointError,
    ContextLengthError,
    NeoxLiteError,
    TokenizerError,
    UnsupportedError,
)
from neox_lite.generation.mixin import GenerationMixin
from neox_lite.generation.options import OFF_ONLY
from neox_lite.generation.protocols import PREFILL_TOKENS

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")  # transformers' own
CONTEXT, VOCABULARY = TINY["max_position_embeddings"], TINY["vocab_size"]
NO_EOS = {"eos_token_id": []}
DEFAULT_ROPE, SEQUENTIAL = {"rope_type": "default", "rope_theta": 1e4}, {"use_parallel_residual": False}
CONFIGS = {
    "parallel-rotary25": {},
    "parallel-rotary100": {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 1.0}},
    "sequential": SEQUENTIAL,
    "tied": {"tie_word_embeddings": True},
    "gelu_fast": {"hidden_act": "gelu_fast"},
    "sequential-tied-unbiased": {**SEQUENTIAL, "tie_word_embeddings": True, "attention_bias": False},
}
# Two libraries add the same float32 products in different orders; logits closer than this may change places.
TIE = 1e-4


@pytest.fixture(scope="module", params=CONFIGS)
def both(request, tmp_path_factory):
    """(ours, transformers') of each configuration."""
    return pair(tmp_path_factory.mktemp("model"), **CONFIGS[request.param])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> GPTNeoXTokenizerFast:
    """Every byte, a few longer pieces, and three special tokens of which one is a stop text, as in Dolly."""
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("Ċ", "Ċ"), ("E", "N"), ("EN", "D")]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", "<|padding|>", *alphabet, "ab", "bc", "abc", "ĊĊ", "EN", "END"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|padding|>", "### End"])
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(file))
    return GPTNeoXTokenizerFast(file)


class Scripted(GenerationMixin):
    """A model that says the given ids one after the other, whatever it is asked, then 0; its cache is a real one.

    Lists of ids are for the prompts of a batch. What it says hangs on a sequence, not on its ids, so none is used again.
    """

    reuse_prefix = False

    def __init__(self, says: list, tokenizer=None, context: int = CONTEXT, vocabulary: int = 300) -> None:
        self.config = SimpleNamespace(
            max_position_embeddings=context, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, pad_token_id=1
        )
        self.source, self.device = SimpleNamespace(folder=None), torch.device("cpu")
        self.scripts = iter(says) if says and isinstance(says[0], list) else itertools.repeat(says)
        self.running: dict[BlockTable, Iterator[int]] = {}
        self.pools, self.steps = [], 0
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def new_pool(self, pages: int = 0, limit: int | None = None) -> PagePool:
        self.pools.append(PagePool(1, 1, torch.float32, [self.device], pages, limit))
        return self.pools[-1]

    def step(self, pool, block_tables, tokens) -> Tensor:
        self.steps += 1
        Batch.reserve(pool, block_tables, [len(t) for t in tokens]).commit()
        logits = torch.zeros(len(block_tables), self.config.vocab_size)
        for row, block_table in zip(logits, block_tables, strict=True):
            if block_table not in self.running:
                self.running[block_table] = itertools.chain(next(self.scripts), itertools.repeat(0))
            row[next(self.running[block_table])] = 50.0
        return logits

    def generate(self, ids=None, **options) -> Tensor:
        return self._generate(ids, options)

    def stream(self, prompt, **options) -> Iterator:
        return self._stream(prompt, options)


def said(model, prompt=(5,), **options) -> tuple[str, str]:
    """The text of a stream and why it ended; the reason comes with the last event and only there."""
    events = list(model.stream(list(prompt), **options))
    assert [e.finish_reason is not None for e in events] == [False] * (len(events) - 1) + [True]
    return "".join(e.text for e in events), events[-1].finish_reason


def all_pages_free(model) -> bool:
    return all(pool.free_pages == pool.pages for pool in model.pools)


def padded(prompts: list[Tensor], side: str, fill: int = 0) -> tuple[Tensor, Tensor]:
    """A batch and its mask."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), fill)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[i, place], mask[i, place] = prompt, 1
    return ids, mask


def prompts_of_many_lengths(count: int) -> list[Tensor]:
    return [random_ids(1, 1 + 7 * i % 40, seed=i)[0] for i in range(count)]


# The same tokens as transformers --------------------------------------------------------------------------------------


def check_same_but_for_ties(ours: Tensor, theirs: Tensor, mask: Tensor, peer) -> None:
    """Equal tokens; where a row differs, the two logits at the first difference must be a tie, and ties are rare."""
    ties = 0
    for mine, yours, keep in zip(ours, theirs, mask, strict=True):
        if not torch.equal(mine, yours):
            at = int((mine != yours).nonzero()[0])
            logits = peer(yours[len(keep) - int(keep.sum()) : at][None]).logits[0, -1]
            assert abs(logits[mine[at]] - logits[yours[at]]) < TIE, f"token {at}: {mine[at]} instead of {yours[at]}"
            ties += 1
    assert ties <= len(ours) // 25


def test_50_prompts_of_64_greedy_tokens_are_those_of_transformers(both):
    ours, peer = both
    ids, mask = padded(prompts_of_many_lengths(50), "left")
    options = {"attention_mask": mask, "max_new_tokens": 64, "pad_token_id": 1}
    check_same_but_for_ties(ours.generate(ids, **options), peer.generate(ids, **options), mask, peer)


def test_default_settings_give_transformers_20_tokens(both):
    ours, peer = both
    ids = random_ids(1, 9)
    expected = peer.generate(ids)
    assert torch.equal(ours.generate(ids), expected)
    assert expected.shape[1] <= 29


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"max_length": 30},
        {"min_new_tokens": 15, "eos_token_id": list(range(40))},
        {"min_length": 20, "eos_token_id": list(range(40))},
        {"eos_token_id": 77},
        {"suppress_tokens": None, "num_beams": 1, "use_cache": True, "typical_p": 1.0},
    ],
    ids=str,
)
def test_an_option_gives_transformers_tokens(options, tmp_path):
    ours, peer = pair(tmp_path)
    ids = random_ids(6, 10)
    mask = torch.ones_like(ids)
    options = {"attention_mask": mask, "pad_token_id": 1, **options}
    check_same_but_for_ties(ours.generate(ids, **options), peer.generate(ids, **options), mask, peer)


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 7, "top_k": 20}], ids=["greedy", "sampled"])
def test_eight_padded_rows_are_eight_single_runs(model, side, options):
    prompts = prompts_of_many_lengths(8)
    ids, mask = padded(prompts, side, fill=99)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=30, **NO_EOS, **options)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    for prompt, row in zip(prompts, out, strict=True):
        alone = model.generate(prompt[None], max_new_tokens=30, **NO_EOS, **options)[0]
        assert torch.equal(row[ids.shape[1] :], alone[len(prompt) :])


def test_without_a_mask_an_unambiguous_padding_id_is_left_out(model):
    ids, mask = padded(prompts_of_many_lengths(4), "left", fill=99)
    options = {"max_new_tokens": 10, "pad_token_id": 99}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, attention_mask=mask, **options))
    with_eos = {"max_new_tokens": 10, "pad_token_id": 99, "eos_token_id": [99, 0]}  # may be text: kept, as transformers
    everything = torch.ones_like(mask)
    assert torch.equal(model.generate(ids, **with_eos), model.generate(ids, attention_mask=everything, **with_eos))


def test_rows_that_end_early_are_padded(model):
    ids = random_ids(8, 5)
    free = model.generate(ids, max_new_tokens=40, **NO_EOS)[:, 5:]
    eos = free[[0, 3, 6], [4, 11, 2]].tolist()
    out = model.generate(ids, max_new_tokens=40, eos_token_id=eos, pad_token_id=128)[:, 5:]
    ends = []
    for row, whole in zip(out, free, strict=True):
        at = next((i + 1 for i, token in enumerate(whole.tolist()) if token in eos), 40)
        ends.append(at)
        assert torch.equal(row[:at], whole[:at])
        assert (row[at:] == 128).all()
    assert len(set(ends)) > 2
    assert out.shape[1] == max(ends)
    without_pad = model.generate(ids, max_new_tokens=40, eos_token_id=eos)[:, 5:]
    assert torch.equal(without_pad, torch.where(out == 128, eos[0], out))


@pytest.mark.parametrize("kind", [int, list, tuple, torch.tensor], ids=["int", "list", "tuple", "tensor"])
def test_eos_may_be_an_id_or_several(model, kind):
    ids = random_ids(1, 5)
    third = int(model.generate(ids, max_new_tokens=3, **NO_EOS)[0, -1])
    eos = third if kind is int else kind([third, 2])
    assert model.generate(ids, eos_token_id=eos)[0, -1] == third
    assert model.generate(ids, eos_token_id=eos).shape[1] <= 8


def test_samples_of_one_prompt_differ_and_begin_like_the_single_run(model):
    prompts, options = random_ids(2, 6), {"do_sample": True, "seed": 3, "max_new_tokens": 12, **NO_EOS}
    out = model.generate(prompts, num_return_sequences=4, **options)
    assert torch.equal(out[:, :6], prompts.repeat_interleave(4, 0))
    assert torch.equal(out[[0, 4]], model.generate(prompts, **options))
    assert len({tuple(row.tolist()) for row in out}) == 8


def test_a_prompt_given_three_times_is_three_samples_of_it(model):
    prompt, options = random_ids(1, 6), {"do_sample": True, "seed": 3, "max_new_tokens": 12, **NO_EOS}
    samples = model.generate(prompt, num_return_sequences=3, **options)
    assert torch.equal(model.generate(prompt.expand(3, -1), **options), samples)


def test_equal_prompts_are_computed_once_and_share_pages():
    model = Scripted([7, 8, 9])
    model.generate(torch.full((1, 200), 5), do_sample=True, num_return_sequences=4, max_new_tokens=3)
    assert model.steps == 3  # the prompt, and two more tokens
    assert model.pools[0].pages <= 8
    assert all_pages_free(model)


@pytest.mark.parametrize("lengths", [[3] * 8, [PREFILL_TOKENS], [PREFILL_TOKENS + 1], [500, 600, 3, 5], [1100, 1, 1]])
def test_prompts_are_read_together_but_never_too_much_at_a_time(lengths):
    model, sizes = Scripted([7], context=2048), []
    step = model.step
    model.step = lambda pool, block_tables, tokens: (
        sizes.append(sum(map(len, tokens))) or step(pool, block_tables, tokens)
    )
    ids, mask = padded([random_ids(1, n, seed=i)[0] for i, n in enumerate(lengths)], "left")
    model.generate(ids, attention_mask=mask, max_new_tokens=1)
    full, rest = divmod(sum(lengths), PREFILL_TOKENS)
    assert sizes == [PREFILL_TOKENS] * full + [rest] * (rest > 0)


def test_a_long_prompt_in_pieces_is_the_same_prompt(model, monkeypatch):
    prompts = [random_ids(1, n, seed=n)[0] for n in (190, 3, 60)]
    ids, mask = padded(prompts, "left")
    expected = model.generate(ids, attention_mask=mask, **NO_EOS)
    monkeypatch.setattr("neox_lite.generation.scheduler.PREFILL_TOKENS", 50)
    model.forget()
    assert torch.equal(model.generate(ids, attention_mask=mask, **NO_EOS), expected)


def test_the_repetition_penalty_ignores_padding(tmp_path):
    ours, peer = pair(tmp_path)
    prompts = prompts_of_many_lengths(6)
    favourite = int(ours.generate(prompts[0][None], max_new_tokens=1, **NO_EOS)[0, -1])
    ids, mask = padded(prompts, "left", fill=favourite)  # a padding id that would be penalized if it counted
    options = {"attention_mask": mask, "repetition_penalty": 3.0, "max_new_tokens": 30, "pad_token_id": 1}
    out = ours.generate(ids, **options)
    check_same_but_for_ties(out, peer.generate(ids, **options), mask, peer)
    alone = ours.generate(prompts[0][None], repetition_penalty=3.0, max_new_tokens=30, pad_token_id=1)[0]
    assert torch.equal(out[0, ids.shape[1] :][: len(alone) - len(prompts[0])], alone[len(prompts[0]) :])


# Lengths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "new"),
    [
        ({}, 20),
        ({"max_new_tokens": 7}, 7),
        ({"max_new_tokens": 0}, 0),
        ({"max_length": 25}, 15),
        ({"max_length": 10}, 0),
        ({"max_new_tokens": CONTEXT - 10}, CONTEXT - 10),
        ({"max_length": CONTEXT}, CONTEXT - 10),
    ],
    ids=str,
)
def test_as_many_new_tokens_as_asked_for(model, options, new):
    assert model.generate(random_ids(1, 10), **NO_EOS, **options).shape == (1, 10 + new)


def test_max_new_tokens_goes_before_max_length_and_says_so(model):
    with pytest.warns(UserWarning, match="max_length is without effect, because max_new_tokens is set"):
        out = model.generate(random_ids(1, 10), max_new_tokens=4, max_length=50, **NO_EOS)
    assert out.shape[1] == 14


def test_min_new_tokens_holds_back_the_end():
    model = Scripted([0] * 50)  # wants to end at once
    assert model.generate(torch.tensor([[5]])).tolist() == [[5, 0]]
    out = model.generate(torch.tensor([[5]]), min_new_tokens=5)[0].tolist()
    assert len(out) == 7
    assert 0 not in out[:-1]
    assert model.generate(torch.tensor([[5]]), min_length=4)[0].tolist()[4:] == [0]
    assert model.generate(torch.tensor([[5]]), min_length=4, eos_token_id=[0, 10**6]).shape == (1, 5)


def test_more_than_the_context_is_refused_with_the_numbers(model):
    with pytest.raises(ContextLengthError, match=r"250 prompt tokens and 7 new ones are 257, .* 256 .* at most 6 new"):
        model.generate(random_ids(1, 250), max_new_tokens=7)
    with pytest.raises(ContextLengthError) as caught:
        model.stream(random_ids(1, CONTEXT), max_new_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(ContextLengthError, match=r"300 prompt tokens .*; shorten the prompt$"):
        model.generate(random_ids(1, 300))
    with pytest.raises(ContextLengthError):
        model.generate(random_ids(1, 300), max_new_tokens=0)


def test_the_default_of_20_tokens_is_cut_at_the_end_of_the_context(model):
    assert model.generate(random_ids(1, CONTEXT - 3), **NO_EOS).shape[1] == CONTEXT
    assert model.generate(random_ids(1, CONTEXT - 1), max_new_tokens=1).shape[1] == CONTEXT
    assert model.generate(random_ids(1, CONTEXT), max_new_tokens=0).shape[1] == CONTEXT
    with pytest.raises(ContextLengthError):
        model.generate(random_ids(1, CONTEXT))


# Prompts --------------------------------------------------------------------------------------------------------------


def test_an_empty_prompt_starts_with_bos(model, tokenizer):
    expected = model.generate(torch.tensor([[0]]))
    empty = torch.empty(1, 0, dtype=torch.long)
    for out in (
        model.generate(),
        model.generate(empty),
        model.generate(empty, attention_mask=empty),
        model.generate(torch.tensor([[]]), attention_mask=torch.tensor([[]])),  # as transformers' tokenizers give it
    ):
        assert torch.equal(out, expected)
    assert model.generate(bos_token_id=9)[0, 0] == 9
    scripted = Scripted([*tokenizer("ab").input_ids], tokenizer)
    assert "".join(event.text for event in scripted.stream("")) == "ab"


def test_an_empty_prompt_without_bos_is_refused():
    model = Scripted([5])
    model.config.bos_token_id = None
    for call in (model.generate, lambda: model.stream([])):
        with pytest.raises(ArgumentError, match="prompt is empty and there is no bos_token_id"):
            call()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([5, 6]), r"input_ids is \(2,\) torch.int64, expected a tensor \(batch, tokens\)"),
        (torch.tensor([[5.0]]), "torch.float32"),
        (torch.empty(0, 3, dtype=torch.long), r"\(0, 3\)"),
        ([[5]], "input_ids is list"),
        ("text", "input_ids is str"),
        (torch.tensor([[5, -1]]), f"found -1, expected 0 to {VOCABULARY - 1}"),
        (torch.tensor([[5, VOCABULARY]]), f"found {VOCABULARY}, expected 0 to {VOCABULARY - 1}"),
    ],
    ids=["1d", "floats", "no-rows", "list", "text", "negative", "too-large"],
)
def test_a_prompt_that_is_no_batch_of_ids_is_refused(model, ids, message):
    with pytest.raises(ArgumentError, match=message):
        model.generate(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask is \(1, 3\), expected \(2, 4\)"),
        ({"attention_mask": [[1] * 4] * 2}, "attention_mask is a list, expected a tensor"),
        ({"attention_mask": torch.full((2, 4), 2)}, "values other than 0 and 1"),
        ({"attention_mask": torch.tensor([[1] * 4, [0] * 4])}, "prompt 1 is empty"),
        ({"max_length": 3}, "the prompt has 4 tokens, more than max_length 3"),
        ({"num_return_sequences": 2}, "num_return_sequences above 1 needs do_sample=True"),
    ],
    ids=["shape", "list", "values", "nothing-left", "longer-than-max", "greedy-samples"],
)
def test_options_that_do_not_fit_the_prompt_are_refused(model, options, message):
    with pytest.raises(ArgumentError, match=message):
        model.generate(random_ids(2, 4), **options)


def test_a_stream_takes_text_ids_a_list_or_a_tensor_but_one_prompt(tokenizer):
    ids = tokenizer("abc").input_ids
    for prompt in ("abc", ids, torch.tensor(ids), torch.tensor([ids])):
        assert "".join(e.text for e in Scripted([*tokenizer("xyz").input_ids], tokenizer).stream(prompt)) == "xyz"
    with pytest.raises(ArgumentError, match="stream takes one prompt, but 2 are given"):
        Scripted([], tokenizer).stream(torch.tensor([ids, ids]))
    for wrong in (None, b"abc", ["a"], {}):
        with pytest.raises(ArgumentError, match="expected a text or one row of ids"):
            Scripted([], tokenizer).stream(wrong)
    with pytest.raises(ArgumentError, match="stream yields one sequence"):
        Scripted([], tokenizer).stream("abc", do_sample=True, num_return_sequences=2)
    with pytest.raises(TokenizerError, match=r"lone surrogate U\+D800 at position 1"):
        Scripted([], tokenizer).stream("a\ud800b")


def test_nul_is_a_character_like_any_other(tokenizer):
    (nul,) = tokenizer("\0").input_ids
    assert said(Scripted([nul, *tokenizer("x").input_ids], tokenizer), tokenizer("a\0b").input_ids) == ("\0x", "stop")


def test_a_prompt_of_a_megabyte_is_a_context_error(tokenizer):
    with pytest.raises(ContextLengthError, match="1000000 prompt tokens"):
        Scripted([], tokenizer).stream("x y z\n12" * 125_000)


# Text and stop strings ------------------------------------------------------------------------------------------------


SPECIAL = ["a", "b", "#", "### End", "c", "d"]


@pytest.mark.parametrize(
    ("tokens", "stops", "shown"),
    [
        ("one STOP two", "STOP", "one "),  # over several tokens
        (["abc", "abc", "END"], "bca", "a"),  # from inside a token into another
        (["abc", "END", "abc"], ["ND", "cE"], "ab"),
        # the one that is complete first counts, however the text is cut into tokens
        *((tokens, ["abca", "bc"], "a") for tokens in (["abc", "abc"], "abcabc")),
        *((tokens, ["bc", "abc"], "") for tokens in (["abc", "abc"], "abcabc")),
        (SPECIAL, (), "ab#cd"),  # special tokens have no text
        (SPECIAL, "### End", "ab#"),
        (SPECIAL, ["###", "##!"], "ab#"),
    ],
    ids=str,
)
def test_a_stop_string_is_cut_wherever_it_begins_and_ends(tokenizer, tokens, stops, shown):
    model = Scripted([tokenizer(token).input_ids[0] for token in tokens], tokenizer)
    assert said(model, stop_strings=stops) == said(model, stop=stops) == (shown, "stop")


def test_what_never_becomes_a_stop_string_is_shown_in_the_end(tokenizer):
    text = "one STO"
    model = Scripted([tokenizer(char).input_ids[0] for char in text], tokenizer)
    assert said(model, stop_strings="STOP") == (text, "stop")  # ended by eos
    assert said(model, stop_strings="STOP", max_new_tokens=len(text)) == (text, "length")
    pieces = [event.text for event in model.stream([5], stop_strings="STOP")]
    assert pieces[:8] == ["o", "n", "e", " ", "", "", "", "STO"]


def first_stop(text: str, stops: list[str]) -> str | None:
    """The text before the stop string that is complete first, by definition."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


def test_random_texts_are_cut_exactly(tokenizer):
    choice = random.Random(0)
    tokens = [tokenizer(text).input_ids[0] for text in ("a", "b", "c", "ab", "bc", "abc")]
    tokens += tokenizer("é").input_ids  # two bytes: alone, each is a replacement character
    ends = dict.fromkeys(("stop", "length"), 0)
    for _ in range(times(600)):
        says = [choice.choice(tokens) for _ in range(choice.randint(1, 12))]
        stops = ["".join(choice.choices("abcé", k=choice.randint(1, 4))) for _ in range(choice.randint(1, 3))]
        text, reason = said(Scripted(says, tokenizer), stop_strings=stops, max_new_tokens=len(says))
        whole = tokenizer.decode(says)
        cut = first_stop(whole, stops)
        assert text == (whole if cut is None else cut), (whole, stops)
        assert reason == ("length" if cut is None else "stop")
        ends[reason] += 1
    assert min(ends.values()) > 90, ends


def test_generate_keeps_the_token_that_completes_a_stop_string_row_by_row(tokenizer):
    says = [tokenizer(char).input_ids[0] for char in "xENDxENDx"]
    model = Scripted(says, tokenizer)
    out = model.generate(torch.tensor([[5], [6]]), stop_strings="END")
    assert out[:, 1:].tolist() == [says[:4]] * 2
    (abc,) = tokenizer("abc").input_ids
    model = Scripted([abc, abc, *says], tokenizer)
    assert model.generate(torch.tensor([[5]]), stop_strings="bca")[0].tolist() == [5, abc, abc]


def test_rows_stop_at_their_own_stop_strings(tokenizer):
    texts = ["one. two", "a long text without an end", "x", "y END. z", "ab", ".", "one two three", "ENDEN."]
    says = [[tokenizer(char).input_ids[0] for char in text] for text in texts]
    out = Scripted(says, tokenizer).generate(random_ids(8, 3), stop_strings=[".", "END"], max_new_tokens=12)[:, 3:]
    shown = ["one.", "a long text ", "x", "y END", "ab", ".", "one two thre", "END"]
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in out] == shown


def test_stop_strings_without_a_tokenizer_are_refused(tokenizer):
    with pytest.raises(ArgumentError, match="no tokenizer"):
        Scripted([5]).generate(torch.tensor([[5]]), stop_strings="x")
    says = tokenizer("abx").input_ids
    out = Scripted(says).generate(torch.tensor([[5]]), stop_strings="x", tokenizer=tokenizer)
    assert out[0].tolist() == [5, *says]


def test_streamed_pieces_join_to_the_decoded_tokens(model, tokenizer, tmp_path):
    """Random ids make broken UTF-8 all the time, so pieces must wait for characters and still lose nothing."""
    ours, _ = pair(tmp_path, vocab_size=264)
    ours.tokenizer = tokenizer
    for seed in range(10):
        options = {"do_sample": True, "seed": seed, "top_k": 0, "max_new_tokens": 60}
        events = list(ours.stream([5, 6], **options))
        out = ours.generate(torch.tensor([[5, 6]]), **options)[0, 2:].tolist()
        assert [event.token for event in events] == out
        assert "".join(event.text for event in events) == tokenizer.decode(out, skip_special_tokens=True)


def test_characters_of_several_tokens_are_never_split(shared_data):
    file = shared_data / "20B_tokenizer.json"
    if not file.is_file():
        pytest.skip(f"no {file.name} in shared data")
    tokenizer = GPTNeoXTokenizerFast(file)
    text = "naïve 東京 🙂👍🏽 안녕 שלום\n    x = 'ﬀ'  # 𓂀𒀀"
    ids = tokenizer(text).input_ids
    model = Scripted(ids, tokenizer, vocabulary=len(tokenizer))
    pieces = [event.text for event in model.stream([5], max_new_tokens=len(ids))]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # some tokens do end inside a character
    assert said(model, max_new_tokens=len(ids), stop_strings="👍🏽") == ("naïve 東京 🙂", "stop")


def test_zero_new_tokens_are_one_event_without_text(tokenizer):
    (event,) = Scripted([5], tokenizer).stream("ab", max_new_tokens=0)
    assert (event.text, event.token, event.finish_reason) == ("", None, "length")


# Pages ----------------------------------------------------------------------------------------------------------------


def test_closing_a_stream_early_frees_its_pages(tokenizer):
    model = Scripted([7] * 100, tokenizer)
    stream = model.stream([5] * 130, max_new_tokens=50)
    next(stream), next(stream)
    assert not all_pages_free(model)
    stream.close()
    assert all_pages_free(model)


def test_a_row_that_ends_gives_its_pages_back_while_others_run():
    model, used = Scripted([[0], [7, 0], [7, 7, 0]]), []
    step = model.step
    model.step = lambda pool, *call: used.append(pool.pages - pool.free_pages) or step(pool, *call)
    model.generate(random_ids(3, 5))
    assert used == [0, 2, 1]


def test_an_error_in_the_middle_frees_all_pages(tokenizer):
    model = Scripted([7] * 100, tokenizer)
    for fails_at in (1, 4):  # in the prompt, while decoding
        calls = itertools.count(1)

        def fail(ids, logits, calls=calls, fails_at=fails_at):
            if next(calls) == fails_at:
                raise MemoryError
            return logits

        with pytest.raises(MemoryError):
            model.generate(torch.tensor([[5, 6], [6, 7]]), logits_processor=fail)
        assert all_pages_free(model)


def test_logits_that_are_not_numbers_end_in_an_error(tokenizer):
    model = Scripted([7] * 5, tokenizer)
    with pytest.raises(NeoxLiteError, match="no id can be chosen"):
        model.generate(torch.tensor([[5]]), logits_processor=lambda ids, logits: logits * float("nan"))
    assert all_pages_free(model)


# Kept prefixes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """A model that no other test has used, which notes how many tokens every pass takes."""
    model, _ = pair(tmp_path, max_position_embeddings=1024)
    return noting(model)


def noting(model):
    model.sizes, step = [], type(model).step

    def noted(pool, block_tables, tokens, **options):
        model.sizes.append(sum(map(len, tokens)))
        return step(model, pool, block_tables, tokens, **options)

    model.step = noted
    return model


def kept_pages(model) -> int:
    """Pages that are held between calls."""
    pool = model._cache_holder.prefixes.pool
    assert pool.pages - pool.free_pages == model._cache_holder.prefixes.pages
    return pool.pages - pool.free_pages


def test_a_second_turn_computes_only_what_is_new(own):
    first = own.generate(random_ids(1, 300), max_new_tokens=20, **NO_EOS)
    second = torch.cat((first, random_ids(1, 30, seed=2)), 1)
    own.sizes.clear()
    out = own.generate(second, max_new_tokens=5, **NO_EOS)
    assert own.sizes == [31, 1, 1, 1, 1]  # the last token of the answer was chosen, but never read
    own.forget()
    own.sizes.clear()
    assert torch.equal(own.generate(second, max_new_tokens=5, **NO_EOS), out)
    assert own.sizes[0] == 350


def test_a_branch_of_a_conversation_takes_what_is_common(own):
    trunk = random_ids(1, 200)
    for seed in range(3):
        own.generate(torch.cat((trunk, random_ids(1, 50, seed=10 + seed)), 1), max_new_tokens=3, **NO_EOS)
    assert own.sizes == [250, 1, 1, 50, 1, 1, 50, 1, 1]


@pytest.mark.parametrize("exact", [True, False])
def test_a_repeated_call_is_bit_identical_and_computes_no_prompt(exact, own):
    own.version += 1
    own.exact = exact
    ids, seen = random_ids(2, 150), []

    def look(ids, logits):
        seen[-1].append(logits.clone())
        logits.zero_()[0, ids.shape[1] % 7] = 1.0  # what a processor writes must not reach later calls
        return logits

    for _ in range(3):
        seen.append([])
        own.generate(ids, max_new_tokens=12, logits_processor=look, **NO_EOS)
    assert own.sizes == [300, *[2] * 11, *[2] * 11, *[2] * 11]
    for logits in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(logits, seen[0], strict=True))


def test_what_all_prompts_of_a_call_begin_with_is_computed_once(own):
    common = random_ids(1, 200).expand(4, -1)
    ids = torch.cat((common, random_ids(4, 10, seed=3)), 1)
    out = own.generate(ids, max_new_tokens=2, **NO_EOS)
    assert own.sizes == [210, 31, 3]  # the first goes ahead; it has two tokens by the time the others have one
    assert kept_pages(own) <= 1 + 5  # one full page is shared by all
    own.reuse_prefix = False
    assert torch.equal(own.generate(ids, max_new_tokens=2, **NO_EOS), out)
    assert own.sizes[3:] == [210, 31, 3]


def test_40_random_turns_give_the_tokens_of_a_model_without_memory(own, tmp_path):
    """Branches, repetitions and new conversations, batches too, greedy and sampled."""
    forgetful = noting(type(own).from_pretrained(tmp_path, exact=True))
    forgetful.reuse_prefix = False
    choice, known = random.Random(0), [random_ids(1, 10)[0]]
    for turn in range(40):
        rows = [choice.choice(known) for _ in range(choice.choice([1, 1, 3]))]
        rows = [row[: choice.randint(1, len(row))] for row in rows]
        rows = [torch.cat((row, random_ids(1, choice.randint(0, 60), seed=turn)[0])) for row in rows]
        rows = [row[:600] for row in rows]
        ids, mask = padded(rows, "left")
        options = {"max_new_tokens": choice.randint(1, 30), "attention_mask": mask, **NO_EOS}
        if turn % 2:
            options |= {"do_sample": True, "seed": turn}
        out = own.generate(ids, **options)
        assert torch.equal(out, forgetful.generate(ids, **options)), turn
        known += [full[len(keep) - int(keep.sum()) :] for full, keep in zip(out, mask, strict=True)]
        assert kept_pages(own) <= 1024 // 128
    assert sum(own.sizes) < 0.8 * sum(forgetful.sizes)


def test_a_stream_that_is_closed_leaves_what_it_had_and_an_error_leaves_nothing(own, tokenizer):
    own.tokenizer = tokenizer
    stream = own.stream(random_ids(1, 130)[0], max_new_tokens=50, **NO_EOS)
    tokens = [next(stream).token for _ in range(10)]
    stream.close()
    own.sizes.clear()
    more = torch.cat((random_ids(1, 130), torch.tensor([tokens])), 1)
    own.generate(more, max_new_tokens=1, **NO_EOS)
    assert own.sizes == [1]
    before = kept_pages(own)
    with pytest.raises(MemoryError):
        own.generate(random_ids(1, 400, seed=5), logits_processor=raise_memory_error)
    assert kept_pages(own) == before


def raise_memory_error(ids, logits):
    raise MemoryError


def test_nothing_is_kept_where_that_is_turned_off_and_forget_frees_it(own):
    own.reuse_prefix = False
    for _ in range(2):
        own.generate(random_ids(1, 20), max_new_tokens=1, **NO_EOS)
    assert own.sizes == [20, 20] and own._cache_holder is None
    own.reuse_prefix = True
    own.generate(random_ids(1, 20), max_new_tokens=1, **NO_EOS)
    pool = weakref.ref(own._cache_holder.prefixes.pool)
    own.forget()
    assert pool() is None


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.to("cpu"),
        lambda model: setattr(model, "kv", "int8"),
        lambda model: setattr(model, "exact", False),
        lambda model: setattr(model, "cache_pages", 9),
        lambda model: model.gpt_neox.layers[0].attention.dense.weight.mul_(1.01),
        lambda model: setattr(model.embed_out.weight, "data", model.embed_out.weight.data.clone()),
        lambda model: model.load_state_dict(model.state_dict()),
    ],
    ids=["half", "to", "kv", "exact", "cache_pages", "write", "replace", "load_state_dict"],
)
def test_a_model_that_changes_forgets(own, change):
    own.generate(random_ids(1, 20), max_new_tokens=1, **NO_EOS)
    pool = weakref.ref(own._cache_holder.prefixes.pool)
    change(own)
    own.generate(random_ids(1, 20), max_new_tokens=1, **NO_EOS)
    assert own.sizes == [20, 20] and pool() is None


def test_copies_and_pickles_share_no_pages(own):
    del own.step
    expected = own.generate(random_ids(1, 20), **NO_EOS)
    assert own._cache_holder is not None
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert twin._cache_holder is None
        assert torch.equal(twin.generate(random_ids(1, 20), **NO_EOS), expected)


def test_calls_at_the_same_time_do_not_meet(own, tokenizer):
    own.tokenizer = tokenizer
    prompts = [random_ids(1, 60, seed=seed) for seed in range(4)]
    expected = [own.generate(ids, max_new_tokens=30, **NO_EOS)[0, 60:].tolist() for ids in prompts]
    streams = [own.stream(ids[0], max_new_tokens=30, **NO_EOS) for ids in prompts]  # all of them half way at once
    found = [[event.token for event in events] for events in zip(*streams, strict=True)]
    assert [list(tokens) for tokens in zip(*found, strict=True)] == expected
    results: dict[int, list] = {}

    def run(i: int) -> None:
        results[i] = [own.generate(prompts[i], max_new_tokens=30, **NO_EOS)[0, 60:].tolist() for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [tokens] * 5 for i, tokens in enumerate(expected)}


def test_pages_kept_in_inference_mode_serve_outside_it(own):
    with torch.inference_mode():
        first = own.generate(random_ids(1, 200), max_new_tokens=60, **NO_EOS)
    assert own.generate(first, max_new_tokens=90, **NO_EOS).shape == (1, 350)


def test_a_planned_cache_is_allocated_once_and_never_grows(own):
    own.cache_pages = 6
    long = own.generate(random_ids(1, 600), max_new_tokens=20, **NO_EOS)
    pool = own._cache_holder.prefixes.pool
    places = [s.data_ptr() for s in pool.storage]
    assert pool.pages == pool.limit == 6
    for seed in range(5):  # kept pages make room
        own.generate(random_ids(1, 500, seed=seed), max_new_tokens=20, **NO_EOS)
    assert torch.equal(own.generate(random_ids(1, 600), max_new_tokens=20, **NO_EOS), long)
    assert own._cache_holder.prefixes.pool is pool and [s.data_ptr() for s in pool.storage] == places
    with pytest.raises(CacheError, match=r"6 pages of 128 tokens, .* use fewer or shorter sequences"):
        own.generate(random_ids(1, 800), max_new_tokens=1, **NO_EOS)
    assert own.generate(random_ids(1, 700), max_new_tokens=1, **NO_EOS).shape == (1, 701)


def test_a_large_batch_leaves_at_most_one_context_behind(own):
    own.generate(random_ids(30, 300), max_new_tokens=2, **NO_EOS)
    assert own._cache_holder is None
    own.generate(random_ids(1, 300), max_new_tokens=2, **NO_EOS)
    assert own._cache_holder.prefixes.pool.pages <= 16


def test_captured_steps_outlive_a_call(own):
    own.version += 1
    own.exact = False
    if own.ops.name != "cpu":
        pytest.skip("only the cpu backend captures")
    own.generate(random_ids(1, 20), max_new_tokens=3, **NO_EOS)
    captured = own.runner.passes.graphs(own._cache_holder.prefixes.pool)[1, 1]
    for seed in range(20):
        own.generate(random_ids(1, 200, seed=seed), max_new_tokens=3, **NO_EOS)
    assert captured is not None
    assert own.runner.passes.graphs(own._cache_holder.prefixes.pool)[1, 1] is captured


# Sampling -------------------------------------------------------------------------------------------------------------


def test_ids_that_the_tokenizer_lacks_are_never_sampled(tokenizer):
    """10,000 draws at temperature 2 from a padded vocabulary whose padding the model likes best."""
    known, vocabulary = len(tokenizer), 320
    model = Scripted([], tokenizer, vocabulary=vocabulary)
    step = model.step
    scores = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    scores[known:] += 30.0
    model.step = lambda *call: step(*call) * 0 + scores
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 100, "seed": 1, **NO_EOS}
    out = model.generate(torch.full((1, 1), 5), num_return_sequences=100, **options)[:, 1:]
    assert out.shape == (100, 100)
    assert out.unique().tolist() == scores[:known].topk(50).indices.sort().values.tolist()  # the default top_k
    assert model.generate(torch.tensor([[5]]), max_new_tokens=5)[0, 1:].max() < known  # nor when greedy


def test_the_same_seed_is_the_same_text_and_another_seed_is_another(model):
    def run(**options) -> list[int]:
        return model.generate(random_ids(1, 4), do_sample=True, **NO_EOS, **options)[0].tolist()

    assert run(seed=1) == run(seed=1)
    assert len({tuple(run(seed=seed)) for seed in range(10)}) == 10


def test_without_a_seed_manual_seed_repeats_and_the_next_call_differs(model):
    def run() -> list[int]:
        return model.generate(random_ids(1, 4), do_sample=True, **NO_EOS)[0].tolist()

    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert (run(), run()) == (first, second)
    assert first != second


def test_greedy_generation_leaves_torchs_random_state_alone(model):
    before = torch.get_rng_state()
    model.generate(random_ids(1, 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_temperature_zero_and_top_k_one_are_greedy(model):
    ids = random_ids(3, 4)
    greedy = model.generate(ids)
    assert torch.equal(model.generate(ids, do_sample=True, temperature=0), greedy)
    assert torch.equal(model.generate(ids, do_sample=True, top_k=1), greedy)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "seed"])
def test_a_sampling_option_without_do_sample_says_that_it_does_nothing(model, name):
    with pytest.warns(UserWarning, match=f"{name} is without effect, because do_sample is not set") as caught:
        model.generate(random_ids(1, 4), **{name: {"top_k": 10, "seed": 10}.get(name, 0.5)})
    assert caught[0].filename == __file__


# Hooks ----------------------------------------------------------------------------------------------------------------


def test_transformers_text_streamer_prints_what_is_generated(tokenizer):
    printed = []

    class Recorder(transformers.TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            printed.append((text, stream_end))

    says = tokenizer("ab cd\nef é").input_ids
    model = Scripted([*says, 0], tokenizer)
    prompt = tokenizer("abc", return_tensors="pt").input_ids
    model.generate(prompt, streamer=Recorder(tokenizer, skip_special_tokens=True))
    assert "".join(text for text, _ in printed) == "abcab cd\nef é"
    assert [end for _, end in printed][-1] is True
    with pytest.raises(ArgumentError, match="streamer works for one sequence, but 2 are asked for"):
        model.generate(prompt.expand(2, -1), streamer=Recorder(tokenizer))
    with pytest.raises(ArgumentError, match="leave streamer out"):
        model.stream("abc", streamer=Recorder(tokenizer))


def test_stopping_criteria_see_all_ids_and_end_a_row(model):
    ids, seen = random_ids(2, 4), []

    def stop(ids: Tensor, scores: Tensor) -> bool:
        seen.append((ids.shape, scores.shape))
        return ids.shape[1] == 9

    out = model.generate(ids, stopping_criteria=stop, **NO_EOS)
    assert out.shape == (2, 9)
    assert seen[0] == ((1, 5), (1, VOCABULARY))
    criteria = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(8)])
    assert torch.equal(model.generate(ids, stopping_criteria=criteria, **NO_EOS), out[:, :8])


def test_logits_processors_run_after_the_penalty_and_before_the_temperature(model):
    ids, plain, penalized = random_ids(1, 4), [], []
    model.generate(ids, max_new_tokens=1, logits_processor=lambda ids, scores: plain.append(scores) or scores)
    look = [lambda ids, scores: penalized.append(scores) or scores]
    options = {"do_sample": True, "repetition_penalty": 2.0, "temperature": 0.1}
    model.generate(ids, max_new_tokens=1, logits_processor=look, **options)
    peer = transformers.RepetitionPenaltyLogitsProcessor(2.0)
    assert torch.equal(penalized[0], peer(ids, plain[0]))


def test_transformers_logits_processors_work(tmp_path):
    ours, peer = pair(tmp_path)
    ids = random_ids(3, 6)
    banned = transformers.LogitsProcessorList([transformers.SuppressTokensLogitsProcessor(list(range(60)))])
    out, theirs = (m.generate(ids, logits_processor=banned, pad_token_id=1) for m in (ours, peer))
    check_same_but_for_ties(out, theirs, torch.ones_like(ids), peer)
    assert out[:, 6:].min() >= 60


# Options --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model's folder whose generation_config.json asks for seven tokens and a penalty."""
    pair(tmp_path)
    settings = {"max_new_tokens": 7, "repetition_penalty": 1.5, "eos_token_id": [], "transformers_version": "4.1"}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_generation_config_json_is_honoured_and_arguments_go_before_it(folder, model):
    ours, ids = type(model).from_pretrained(folder), random_ids(1, 4)
    plain = {"max_new_tokens": 7, "repetition_penalty": 1.5, **NO_EOS}
    assert ours.generation_config.max_new_tokens == 7
    assert ours.generation_config.bos_token_id == 0  # config.json fills what is silent
    assert torch.equal(ours.generate(ids), model.generate(ids, **plain))
    assert ours.generate(ids, max_new_tokens=3).shape[1] == 7
    ours.generation_config.max_new_tokens = 2
    assert ours.generate(ids).shape[1] == 6
    ours.generation_config = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=[])
    assert ours.generate(ids).shape[1] == 7


@pytest.mark.parametrize(
    "kind", [dict, GenerationConfig, transformers.GenerationConfig], ids=["dict", "ours", "transformers"]
)
def test_generation_config_may_be_a_dict_or_either_librarys_object(folder, model, kind):
    ours, ids = type(model).from_pretrained(folder), random_ids(1, 4)
    options = {"max_new_tokens": 9, "do_sample": True, "top_k": 5}
    config = kind(**options)
    out = ours.generate(ids, generation_config=config, seed=3)
    assert torch.equal(out, model.generate(ids, **options, seed=3, repetition_penalty=1.5, eos_token_id=[]))
    assert ours.generate(ids, generation_config=config, max_new_tokens=1).shape[1] == 5


def test_generation_config_names_what_it_does_not_know(tmp_path):
    with pytest.warns(UserWarning, match="max_new_token unknown and without effect"):
        config = GenerationConfig(max_new_token=5, top_p=0.5)
    assert config.to_dict() == {"top_p": 0.5}
    assert json.loads(config.to_json_string()) == {"top_p": 0.5}
    assert config.max_new_tokens is None
    with pytest.raises(AttributeError, match="max_new_token"):
        _ = config.max_new_token
    assert GenerationConfig.from_pretrained(tmp_path).to_dict() == {}
    with pytest.raises(CheckpointError, match="no such folder"):
        GenerationConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="generation_config is a int"):
        Scripted([5]).generate(generation_config=5)


FORBIDDEN = {  # of the new tokens that come without them, so that they matter
    "bad words": lambda new: {"bad_words_ids": [[7], new[:1], new[2:4], [*new[:2], 5]]},
    "suppressed": lambda new: {"suppress_tokens": [*range(2, 9), new[1]]},
    "biased": lambda new: {"sequence_bias": {(17,): 1.5, (new[0],): -9.0, tuple(new[1:4]): -50.0}},
    "biased and penalized": lambda new: {
        "sequence_bias": [[[17], 3.0], [new[1:2], -4.0]],
        "repetition_penalty": 1.3,
        "bad_words_ids": [new[3:5]],
    },
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_biases_and_forbidden_words_are_those_of_transformers(both, name):
    ours, peer = both
    ids = random_ids(2, 5)
    plain = ours.generate(ids, max_new_tokens=12, **NO_EOS)
    options = {**FORBIDDEN[name](plain[0, 5:].tolist()), "max_new_tokens": 12}
    peer.generation_config.eos_token_id = None
    found = ours.generate(ids, **options, **NO_EOS)
    assert torch.equal(found, peer.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=1, **options))
    assert not torch.equal(found, plain)


def test_a_bad_word_does_not_forbid_the_end():
    assert Scripted([5, 0]).generate(torch.tensor([[5]]), bad_words_ids=[[0]], max_new_tokens=9).tolist() == [[5, 5, 0]]
    forbidden = Scripted([5, 0]).generate(torch.tensor([[5]]), suppress_tokens=[0], max_new_tokens=3).tolist()
    assert forbidden[0][:2] == [5, 5] and 0 not in forbidden[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bad_words_ids": [[]]}, r"bad_words_ids is \[\[\]\], expected .* and \[\[42, 7\]\]"),
        ({"bad_words_ids": [["a"]]}, "bad_words_ids is"),
        ({"bad_words_ids": 5}, "bad_words_ids is 5"),
        (
            {"sequence_bias": {5: 1.0}},
            r"sequence_bias is {5: 1.0} and bad_words_ids is \[\], expected {\(42, 7\): -5.0}",
        ),
        ({"sequence_bias": {(5,): float("nan")}}, "sequence_bias is"),
        ({"bad_words_ids": [[300]]}, "sequence_bias: found 300, expected 0 to 299"),
        ({"suppress_tokens": ["a"]}, r"suppress_tokens is \['a'\], expected an id or a list of ids"),
        ({"max_time": -1}, "max_time is -1, expected a number of seconds"),
        ({"max_time": "1"}, "max_time is '1', expected a number of seconds"),
        ({"output_scores": 1}, "output_scores is 1, expected True or False"),
    ],
    ids=str,
)
def test_what_cannot_be_forbidden_or_asked_for_is_refused(options, told):
    with pytest.raises(ArgumentError, match=told) as caught:
        Scripted([5]).generate(torch.tensor([[5]]), **options)
    assert "\n" not in str(caught.value)


def test_time_that_is_up_ends_a_text(tokenizer):
    assert Scripted([5, 6, 7]).generate(torch.tensor([[5]]), max_time=0).tolist() == [[5, 5]]
    assert Scripted([5, 6, 7]).generate(torch.tensor([[5]]), max_time=3600.0).tolist() == [[5, 5, 6, 7, 0]]
    assert said(Scripted([5, 6, 7], tokenizer), max_time=0)[1] == "stop"


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_scores_and_logits_are_those_of_transformers(both, sampled):
    """transformers is made to choose what was chosen here: a draw of its own would go elsewhere."""
    ours, peer = both
    ids, asked = random_ids(2, 5), {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8} if sampled else {}
    options |= {"max_new_tokens": 6, "repetition_penalty": 1.2}
    found = ours.generate(ids, **options, **asked, **NO_EOS)
    assert (len(found.scores), found.scores[0].shape) == (6, (2, VOCABULARY))
    assert torch.equal(found.sequences, found["sequences"]) and torch.equal(found[0], found.sequences)
    peer.generation_config.eos_token_id = None
    for n in range(6):
        prompt = found.sequences[:, : 5 + n]
        more = {**options, **asked, "max_new_tokens": 1, "pad_token_id": 1}
        expected = peer.generate(prompt, attention_mask=torch.ones_like(prompt), **more)
        torch.testing.assert_close(found.logits[n], expected.logits[0], atol=TIE, rtol=0)
        torch.testing.assert_close(found.scores[n], expected.scores[0], atol=TIE / 0.7, rtol=0)
    for normalize in (False, True):
        own, theirs = (
            m.compute_transition_scores(found.sequences, found.scores, normalize_logits=normalize) for m in (ours, peer)
        )
        torch.testing.assert_close(own, theirs)


def test_scores_of_the_padding_after_an_ended_row_are_certain():
    options = {"max_new_tokens": 9, "return_dict_in_generate": True, "output_scores": True}
    found = Scripted([[5, 0], [6, 7, 0]]).generate(torch.tensor([[5], [6]]), **options)
    assert found.sequences.tolist() == [[5, 5, 0, 1], [6, 6, 7, 0]]
    assert found.scores[2][0, 1] == 0 and found.scores[2][0, 2] == -torch.inf
    assert found.logits is None and list(found) == ["sequences", "scores"]


def test_what_generate_returns_is_asked_of_generate_alone(tokenizer):
    with pytest.raises(ArgumentError, match="stream yields events; leave return_dict_in_generate out"):
        Scripted([5], tokenizer).stream("a", return_dict_in_generate=True)
    with pytest.warns(UserWarning, match="output_scores is without effect, because return_dict_in_generate is not set"):
        Scripted([5]).generate(torch.tensor([[5]]), output_scores=True)
    with pytest.raises(UnsupportedError, match="beam_indices: beam search is not supported; leave it out"):
        Scripted([5]).compute_transition_scores(torch.tensor([[5]]), [torch.zeros(1, 9)], beam_indices=1)


def test_drafts_change_neither_scores_nor_what_is_forbidden(model):
    """A draft's tokens are scored as they are taken, once each."""
    ids = random_ids(1, 4).repeat(1, 6)
    options = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True, **NO_EOS}
    plain = model.generate(ids, bad_words_ids=[[7], [9, 11]], **options)
    drafted = model.generate(ids, bad_words_ids=[[7], [9, 11]], prompt_lookup_num_tokens=4, **options)
    assert torch.equal(plain.sequences, drafted.sequences) and len(drafted.scores) == 20
    torch.testing.assert_close(torch.stack(plain.scores), torch.stack(drafted.scores), atol=TIE, rtol=0)


def test_a_generation_config_is_updated_as_transformers_updates_its_own(folder):
    config = GenerationConfig.from_pretrained(folder, top_p=0.5)
    assert (config.max_new_tokens, config.top_p) == (7, 0.5)
    assert config.update(top_p=0.7, nonsense=4) == {"nonsense": 4}
    assert config.to_diff_dict() == config.to_dict() and config.to_dict()["top_p"] == 0.7
    assert copy.deepcopy(config).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", OFF_ONLY)
def test_what_is_not_supported_is_refused_by_name_but_its_off_value_is_not(name):
    off, advice = OFF_ONLY[name]
    model, ids = Scripted([5]), torch.tensor([[5]])
    with pytest.raises(UnsupportedError) as caught:
        model.generate(ids, **{name: 4})
    assert str(caught.value) == f"{name}: {advice}"
    for value in off:
        model.generate(ids, **{name: value})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("max_new_token", "max_new_tokens"), ("temprature", "temperature"), ("eos_token", "eos_token_id"), ("zzzz", None)],
)
def test_an_unknown_option_is_refused_with_the_nearest_one(name, nearest):
    with pytest.raises(ArgumentError) as caught:
        Scripted([5]).generate(torch.tensor([[5]]), **{name: 4})
    assert str(caught.value) == f"generate knows no option {name!r}" + (f"; nearest is {nearest!r}" if nearest else "")


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "max_new_tokens": [-1, 2.5, "5", True],
        "max_length": [-1, "long"],
        "min_new_tokens": [-1],
        "min_length": [0.5],
        "num_return_sequences": [0, -1, 1.0, 10**9],
        "do_sample": ["yes", 2],
        "temperature": [-1, "hot", float("nan")],
        "top_k": [2.5, -1],
        "top_p": [1.5],
        "min_p": [-0.5],
        "repetition_penalty": [0],
        "seed": [-1, 0.5, 2**64],
        "eos_token_id": ["a", [1, "b"], True, 1.5, {}],
        "pad_token_id": ["a", [1], 2**70],
        "bos_token_id": ["a", 2**70],
        "stop_strings": ["", ["a", ""], [5], 5, b"a"],
        "logits_processor": [3, "ab", [3]],
        "stopping_criteria": [3, [3]],
        "streamer": [3],
    }.items(),
)
def test_a_value_that_makes_no_sense_is_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ArgumentError, match=f"^{name} is "):
            Scripted([5]).generate(torch.tensor([[5]]), **{"do_sample": True, name: value})


def test_sensible_calls_warn_of_nothing(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(random_ids(1, 4), max_new_tokens=2, do_sample=False, temperature=1.0, top_k=50, use_cache=True)
        model.generate(inputs=random_ids(1, 4), max_new_tokens=2, do_sample=True, temperature=0.5, top_p=0.9)
        ids = random_ids(1, 4)
        mask, types = torch.ones_like(ids), torch.zeros_like(ids)
        found = model.generate(input_ids=ids, attention_mask=mask, token_type_ids=types)
    assert torch.equal(found, model.generate(ids))
