"""What generation promises: transformers' tokens, exact stops, honest streams, and options that are honoured or refused.

Tiny random models beside transformers' own; where a test needs certain tokens, a model that generates a script.
"""

import copy
import itertools
import json
import pickle
import random
import threading
import warnings
import weakref
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from support.often import times
from support.peers import NO_EOS, TINY, padded, pair, prompts_of_many_lengths, random_ids
from support.scripted import failing

from neox_lite import GenerationConfig, GPTNeoXTokenizerFast
from neox_lite.cache import Batch, PagePool
from neox_lite.errors import (
    ArgumentError,
    CacheError,
    CheckpointError,
    ContextLengthError,
    TokenizerError,
    UnsupportedError,
)
from neox_lite.generation.mixin import GenerationMixin
from neox_lite.generation.options import OFF_ONLY

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")  # transformers' own
CONTEXT, VOCABULARY = TINY["max_position_embeddings"], TINY["vocab_size"]
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
ONE = torch.tensor([[5]])  # a prompt


@pytest.fixture(scope="module", params=CONFIGS)
def both(request, tmp_path_factory):
    """(ours, transformers') of each configuration."""
    return pair(tmp_path_factory.mktemp("model"), **CONFIGS[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(ours, transformers') of the first configuration, for tests that are about options."""
    return pair(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(plain):
    return plain[0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
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
    """A model that generates the given ids one after the other, whatever the prompt, then 0; its cache is a real one.

    Lists of ids are for the prompts of a batch. A script belongs to a sequence, not to its ids, so no prefix is reused.
    """

    reuse_prefix = False

    def __init__(self, script, tokenizer=None, vocabulary=300):
        self.config = SimpleNamespace(
            generation_settings={},
            max_position_embeddings=CONTEXT,
            vocab_size=vocabulary,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
        self.source, self.device = SimpleNamespace(folder=None), torch.device("cpu")
        self.scripts = iter(script) if script and isinstance(script[0], list) else itertools.repeat(script)
        self.running = {}
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def new_pool(self, pages=0, limit=None):
        return PagePool(1, 1, torch.float32, [self.device], pages, limit)

    def step(self, pool, block_tables, tokens):
        Batch.reserve(pool, block_tables, [len(t) for t in tokens]).commit()
        logits = torch.zeros(len(block_tables), self.config.vocab_size)
        for row, block_table in zip(logits, block_tables, strict=True):
            if block_table not in self.running:
                self.running[block_table] = itertools.chain(next(self.scripts), itertools.repeat(0))
            row[next(self.running[block_table])] = 50.0
        return logits

    def generate(self, ids=None, **options):
        return self._generate(ids, options)

    def stream(self, prompt, **options):
        return self._stream(prompt, options)


def streamed(model, prompt=(5,), **options):
    """The text of a stream and why it ended; the reason comes with the last event and only there."""
    events = list(model.stream(list(prompt), **options))
    assert [e.finish_reason is not None for e in events] == [False] * (len(events) - 1) + [True]
    return "".join(e.text for e in events), events[-1].finish_reason


def spelled(tokenizer, text):
    """One id for each character."""
    return [tokenizer(char).input_ids[0] for char in text]


# The same tokens as transformers --------------------------------------------------------------------------------------


def check_same_but_for_ties(models, ids, mask, **options):
    """Equal tokens; where a row differs, the two logits at the first difference must be a tie, and ties are rare.

    Returns our tokens.
    """
    peer, ties = models[1], 0
    ours, theirs = (m.generate(ids, attention_mask=mask, pad_token_id=1, **options) for m in models)
    for mine, yours, keep in zip(ours, theirs, mask, strict=True):
        if not torch.equal(mine, yours):
            at = int((mine != yours).nonzero()[0])
            logits = peer(yours[len(keep) - int(keep.sum()) : at][None]).logits[0, -1]
            assert abs(logits[mine[at]] - logits[yours[at]]) < TIE, f"token {at}: {mine[at]} instead of {yours[at]}"
            ties += 1
    assert ties <= len(ours) // 25
    return ours


def test_50_prompts_of_64_greedy_tokens_are_those_of_transformers(both):
    check_same_but_for_ties(both, *padded(prompts_of_many_lengths(50), "left"), max_new_tokens=64)


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
def test_an_option_gives_transformers_tokens(options, plain):
    ids = random_ids(6, 10)
    check_same_but_for_ties(plain, ids, torch.ones_like(ids), **options)


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
    options["eos_token_id"] = [99, 0]  # may be text: kept, as transformers
    everything = torch.ones_like(mask)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, attention_mask=everything, **options))


def test_rows_that_end_early_are_padded(model):
    ids = random_ids(8, 5)
    free = model.generate(ids, max_new_tokens=40, **NO_EOS)[:, 5:]
    eos = free[[0, 3, 6], [4, 11, 2]].tolist()
    out = model.generate(ids, max_new_tokens=40, eos_token_id=eos, pad_token_id=128)[:, 5:]
    ends = []
    for row, whole in zip(out, free, strict=True):
        at = next((i + 1 for i, token in enumerate(whole.tolist()) if token in eos), 40)
        ends.append(at)
        assert torch.equal(row[:at], whole[:at]) and (row[at:] == 128).all()
    assert len(set(ends)) > 2
    assert out.shape[1] == max(ends)
    without_pad = model.generate(ids, max_new_tokens=40, eos_token_id=eos)[:, 5:]
    assert torch.equal(without_pad, torch.where(out == 128, eos[0], out))


def test_eos_may_be_an_id_or_several(model):
    ids = random_ids(1, 5)
    third = int(model.generate(ids, max_new_tokens=3, **NO_EOS)[0, -1])
    for eos in (third, [third, 2], (third, 2), torch.tensor([third, 2])):
        out = model.generate(ids, eos_token_id=eos)
        assert out[0, -1] == third and out.shape[1] <= 8


def test_samples_of_a_prompt_differ_begin_like_its_single_run_and_are_those_of_the_prompt_repeated(model):
    prompts, options = random_ids(2, 6), {"do_sample": True, "seed": 3, "max_new_tokens": 12, **NO_EOS}
    out = model.generate(prompts, num_return_sequences=4, **options)
    assert torch.equal(out[:, :6], prompts.repeat_interleave(4, 0))
    assert torch.equal(out[[0, 4]], model.generate(prompts, **options))
    assert len({tuple(row.tolist()) for row in out}) == 8
    assert torch.equal(model.generate(prompts[:1].expand(4, -1), **options), out[:4])


def test_the_repetition_penalty_ignores_padding(plain):
    model, prompts = plain[0], prompts_of_many_lengths(6)
    favourite = int(model.generate(prompts[0][None], max_new_tokens=1, **NO_EOS)[0, -1])
    ids, mask = padded(prompts, "left", fill=favourite)  # a padding id that would be penalized if it counted
    options = {"repetition_penalty": 3.0, "max_new_tokens": 30}
    out = check_same_but_for_ties(plain, ids, mask, **options)
    alone = model.generate(prompts[0][None], **options, pad_token_id=1)[0]
    assert torch.equal(out[0, ids.shape[1] :][: len(alone) - len(prompts[0])], alone[len(prompts[0]) :])


# Lengths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "new"),
    [
        (10, {}, 20),
        (10, {"max_new_tokens": 7}, 7),
        (10, {"max_new_tokens": 0}, 0),
        (10, {"max_length": 25}, 15),
        (10, {"max_length": 10}, 0),
        (10, {"max_new_tokens": CONTEXT - 10}, CONTEXT - 10),
        (10, {"max_length": CONTEXT}, CONTEXT - 10),
        (CONTEXT - 3, {}, 3),  # the default of 20 is cut
        (CONTEXT - 1, {"max_new_tokens": 1}, 1),
        (CONTEXT, {"max_new_tokens": 0}, 0),
    ],
    ids=str,
)
def test_as_many_new_tokens_as_asked_for(model, prompt, options, new):
    assert model.generate(random_ids(1, prompt), **NO_EOS, **options).shape == (1, prompt + new)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (250, {"max_new_tokens": 7}, r"250 prompt tokens and 7 new ones are 257, .* 256 .* at most 6 new"),
        (300, {}, r"300 prompt tokens .*; shorten the prompt$"),
        (300, {"max_new_tokens": 0}, "300 prompt tokens"),
        (CONTEXT, {"max_new_tokens": 1}, "256 prompt tokens"),
        (CONTEXT, {}, "256 prompt tokens"),
    ],
    ids=str,
)
def test_more_than_the_context_is_refused_with_the_numbers(model, prompt, options, message):
    for call in (model.generate, model.stream):
        with pytest.raises(ContextLengthError, match=message) as caught:
            call(random_ids(1, prompt), **options)
        assert caught.value.code == "context_length_exceeded"


def test_max_new_tokens_goes_before_max_length_and_says_so(model):
    with pytest.warns(UserWarning, match="max_length is without effect, because max_new_tokens is set"):
        out = model.generate(random_ids(1, 10), max_new_tokens=4, max_length=50, **NO_EOS)
    assert out.shape[1] == 14


def test_min_new_tokens_holds_back_the_end():
    model = Scripted([0] * 50)  # wants to end at once
    assert model.generate(ONE).tolist() == [[5, 0]]
    out = model.generate(ONE, min_new_tokens=5)[0].tolist()
    assert len(out) == 7 and 0 not in out[:-1]
    assert model.generate(ONE, min_length=4)[0].tolist()[4:] == [0]
    assert model.generate(ONE, min_length=4, eos_token_id=[0, 10**6]).shape == (1, 5)


# Prompts --------------------------------------------------------------------------------------------------------------


def test_an_empty_prompt_starts_with_bos(model, tokenizer):
    expected, empty = model.generate(torch.tensor([[0]])), torch.empty(1, 0, dtype=torch.long)
    floats = {"input_ids": torch.tensor([[]]), "attention_mask": torch.tensor([[]])}  # as transformers' tokenizers give
    for given in ({}, {"input_ids": empty}, {"input_ids": empty, "attention_mask": empty}, floats):
        assert torch.equal(model.generate(**given), expected)
    assert model.generate(bos_token_id=9)[0, 0] == 9
    assert streamed(Scripted(tokenizer("ab").input_ids, tokenizer), []) == ("ab", "stop")
    model = Scripted([5])
    model.config.bos_token_id = None
    for call in (model.generate, lambda: model.stream([])):
        with pytest.raises(ArgumentError, match="prompt is empty and there is no bos_token_id"):
            call()


def test_a_stream_takes_text_ids_a_list_or_a_tensor_but_one_prompt(tokenizer):
    ids = tokenizer("abc").input_ids
    for prompt in ("abc", ids, torch.tensor(ids), torch.tensor([ids])):
        assert "".join(e.text for e in Scripted(tokenizer("xyz").input_ids, tokenizer).stream(prompt)) == "xyz"
    for prompt, options, error, message in (
        (torch.tensor([ids, ids]), {}, ArgumentError, "stream takes one prompt, but 2 are given"),
        *((wrong, {}, ArgumentError, "expected a text or one row of ids") for wrong in (None, b"abc", ["a"], {})),
        ("abc", {"do_sample": True, "num_return_sequences": 2}, ArgumentError, "stream yields one sequence"),
        ("abc", {"streamer": transformers.TextStreamer(tokenizer)}, ArgumentError, "leave streamer out"),
        ("abc", {"return_dict_in_generate": True}, ArgumentError, "leave return_dict_in_generate out"),
        ("a\ud800b", {}, TokenizerError, r"lone surrogate U\+D800 at position 1"),
        ("x y z\n12" * 125_000, {}, ContextLengthError, "1000000 prompt tokens"),
    ):
        with pytest.raises(error, match=message):
            Scripted([], tokenizer).stream(prompt, **options)


def test_nul_is_a_character_like_any_other(tokenizer):
    assert streamed(Scripted(tokenizer("\0x").input_ids, tokenizer), tokenizer("a\0b").input_ids) == ("\0x", "stop")


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
    model = Scripted(spelled(tokenizer, tokens), tokenizer)
    assert streamed(model, stop_strings=stops) == streamed(model, stop=stops) == (shown, "stop")


def test_what_never_becomes_a_stop_string_is_shown_in_the_end(tokenizer):
    text = "one STO"
    model = Scripted(spelled(tokenizer, text), tokenizer)
    assert streamed(model, stop_strings="STOP") == (text, "stop")  # ended by eos
    assert streamed(model, stop_strings="STOP", max_new_tokens=len(text)) == (text, "length")
    pieces = [event.text for event in model.stream([5], stop_strings="STOP")]
    assert pieces[:8] == ["o", "n", "e", " ", "", "", "", "STO"]


def first_stop(text, stops):
    """The text before the stop string that is complete first, by definition."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


def test_random_texts_are_cut_exactly(tokenizer):
    choice = random.Random(0)
    tokens = spelled(tokenizer, ("a", "b", "c", "ab", "bc", "abc"))
    tokens += tokenizer("é").input_ids  # two bytes: alone, each is a replacement character
    ends = dict.fromkeys(("stop", "length"), 0)
    for _ in range(times(600)):
        script = [choice.choice(tokens) for _ in range(choice.randint(1, 12))]
        stops = ["".join(choice.choices("abcé", k=choice.randint(1, 4))) for _ in range(choice.randint(1, 3))]
        text, reason = streamed(Scripted(script, tokenizer), stop_strings=stops, max_new_tokens=len(script))
        whole = tokenizer.decode(script)
        cut = first_stop(whole, stops)
        assert text == (whole if cut is None else cut), (whole, stops)
        assert reason == ("length" if cut is None else "stop")
        ends[reason] += 1
    assert min(ends.values()) > 90, ends


def test_generate_keeps_the_token_that_completes_a_stop_string_row_by_row(tokenizer):
    texts = ["one. two", "a long text without an end", "x", "y END. z", "ab", ".", "one two three", "ENDEN."]
    scripts = [spelled(tokenizer, text) for text in texts]
    out = Scripted(scripts, tokenizer).generate(random_ids(8, 3), stop_strings=[".", "END"], max_new_tokens=12)[:, 3:]
    shown = ["one.", "a long text ", "x", "y END", "ab", ".", "one two thre", "END"]
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in out] == shown
    script = spelled(tokenizer, ["abc", "abc", "x"])
    assert Scripted(script, tokenizer).generate(ONE, stop_strings="bca")[0].tolist() == [5, *script[:2]]


def test_stop_strings_without_a_tokenizer_are_refused(tokenizer):
    with pytest.raises(ArgumentError, match="no tokenizer"):
        Scripted([5]).generate(ONE, stop_strings="x")
    script = tokenizer("abx").input_ids
    assert Scripted(script).generate(ONE, stop_strings="x", tokenizer=tokenizer)[0].tolist() == [5, *script]


def test_streamed_pieces_join_to_the_decoded_tokens(tokenizer, tmp_path):
    """Random ids make broken UTF-8 all the time, so pieces must wait for characters and still lose nothing."""
    ours, _ = pair(tmp_path, vocab_size=264)
    ours.tokenizer = tokenizer
    for seed in range(10):
        options = {"do_sample": True, "seed": seed, "top_k": 0, "max_new_tokens": 60}
        events = list(ours.stream([5, 6], **options))
        out = ours.generate(torch.tensor([[5, 6]]), **options)[0, 2:].tolist()
        assert [event.token for event in events] == out
        assert "".join(event.text for event in events) == tokenizer.decode(out, skip_special_tokens=True)


def test_zero_new_tokens_are_one_event_without_text(tokenizer):
    (event,) = Scripted([5], tokenizer).stream("ab", max_new_tokens=0)
    assert (event.text, event.token, event.finish_reason) == ("", None, "length")


# Kept prefixes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """A model that no other test has used, which notes how many tokens every pass takes."""
    return noting(pair(tmp_path, max_position_embeddings=1024)[0])


def noting(model):
    model.sizes, step = [], type(model).step

    def noted(pool, block_tables, tokens, **options):
        model.sizes.append(sum(map(len, tokens)))
        return step(model, pool, block_tables, tokens, **options)

    model.step = noted
    return model


def kept_pages(model):
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
    assert own.sizes == [300, *[2] * 33]
    for logits in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(logits, seen[0], strict=True))


def test_40_random_turns_give_the_tokens_of_a_model_without_memory(own, tmp_path):
    """Branches, repetitions and new conversations, batches too, greedy and sampled."""
    forgetful = noting(type(own).from_pretrained(tmp_path, exact=True))
    forgetful.reuse_prefix = False
    choice, known = random.Random(0), [random_ids(1, 10)[0]]
    for turn in range(40):
        rows = [choice.choice(known) for _ in range(choice.choice([1, 1, 3]))]
        rows = [row[: choice.randint(1, len(row))] for row in rows]
        rows = [torch.cat((row, random_ids(1, choice.randint(0, 60), seed=turn)[0]))[:600] for row in rows]
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
        own.generate(random_ids(1, 400, seed=5), logits_processor=failing(1))
    assert kept_pages(own) == before


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


CHANGES = {
    "half": lambda model: model.half(),
    "to": lambda model: model.to("cpu"),
    "kv": lambda model: setattr(model, "kv", "int8"),
    "exact": lambda model: setattr(model, "exact", False),
    "cache_pages": lambda model: setattr(model, "cache_pages", 9),
    "write": lambda model: model.gpt_neox.layers[0].attention.dense.weight.mul_(1.01),
    "replace": lambda model: setattr(model.embed_out.weight, "data", model.embed_out.weight.data.clone()),
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_forgets(own, change):
    own.generate(random_ids(1, 20), max_new_tokens=1, **NO_EOS)
    pool = weakref.ref(own._cache_holder.prefixes.pool)
    CHANGES[change](own)
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
    results = {}

    def run(i):
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
    out = model.generate(ONE, num_return_sequences=100, **options)[:, 1:]
    assert out.shape == (100, 100)
    assert out.unique().tolist() == scores[:known].topk(50).indices.sort().values.tolist()  # the default top_k
    assert model.generate(ONE, max_new_tokens=5)[0, 1:].max() < known  # nor when greedy


def test_a_seed_or_else_torchs_repeats_a_text(model):
    def run(**options):
        return model.generate(random_ids(1, 4), do_sample=True, **NO_EOS, **options)[0].tolist()

    assert run(seed=1) == run(seed=1)
    assert len({tuple(run(seed=seed)) for seed in range(10)}) == 10
    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert (run(), run()) == (first, second)
    assert first != second


def test_temperature_zero_and_top_k_one_are_greedy_and_draw_no_random_number(model):
    ids, before = random_ids(3, 4), torch.get_rng_state()
    greedy = model.generate(ids)
    assert torch.equal(torch.get_rng_state(), before)
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

    model, prompt = (
        Scripted([*tokenizer("ab cd\nef é").input_ids, 0], tokenizer),
        torch.tensor([spelled(tokenizer, "abc")]),
    )
    model.generate(prompt, streamer=Recorder(tokenizer, skip_special_tokens=True))
    assert "".join(text for text, _ in printed) == "abcab cd\nef é"
    assert [end for _, end in printed][-1] is True
    with pytest.raises(ArgumentError, match="streamer works for one sequence, but 2 are asked for"):
        model.generate(prompt.expand(2, -1), streamer=Recorder(tokenizer))


def test_stopping_criteria_see_all_ids_and_end_a_row(model):
    ids, seen = random_ids(2, 4), []

    def stop(ids, scores):
        seen.append((ids.shape, scores.shape))
        return ids.shape[1] == 9

    out = model.generate(ids, stopping_criteria=stop, **NO_EOS)
    assert out.shape == (2, 9)
    assert seen[0] == ((1, 5), (1, VOCABULARY))
    criteria = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(8)])
    assert torch.equal(model.generate(ids, stopping_criteria=criteria, **NO_EOS), out[:, :8])


def test_transformers_logits_processors_work(plain):
    ids = random_ids(3, 6)
    banned = transformers.LogitsProcessorList([transformers.SuppressTokensLogitsProcessor(list(range(60)))])
    out = check_same_but_for_ties(plain, ids, torch.ones_like(ids), logits_processor=banned)
    assert out[:, 6:].min() >= 60


# Options --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
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
    options = {"max_new_tokens": 9, "do_sample": True, "top_k": 5}
    for kind in (dict, GenerationConfig, transformers.GenerationConfig):
        config = kind(**options)
        out = ours.generate(ids, generation_config=config, seed=3)
        assert torch.equal(out, model.generate(ids, **{**plain, **options}, seed=3)), kind
        assert ours.generate(ids, generation_config=config, max_new_tokens=1).shape[1] == 5
    ours.generation_config.max_new_tokens = 2
    assert ours.generate(ids).shape[1] == 6
    ours.generation_config = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=[])
    assert ours.generate(ids).shape[1] == 7


def test_a_generation_config_names_what_it_does_not_know_and_is_updated_as_transformers_updates_its_own(folder):
    with pytest.warns(UserWarning, match="max_new_token unknown and without effect"):
        config = GenerationConfig(max_new_token=5, top_p=0.5)
    assert config.to_dict() == json.loads(config.to_json_string()) == {"top_p": 0.5}
    assert config.max_new_tokens is None
    with pytest.raises(AttributeError, match="max_new_token"):
        _ = config.max_new_token
    config = GenerationConfig.from_pretrained(folder, top_p=0.5)
    assert (config.max_new_tokens, config.top_p) == (7, 0.5)
    assert config.update(top_p=0.7, nonsense=4) == {"nonsense": 4}
    assert config.to_diff_dict() == config.to_dict() and config.to_dict()["top_p"] == 0.7
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    (folder / "generation_config.json").unlink()
    assert GenerationConfig.from_pretrained(folder).to_dict() == {}
    with pytest.raises(CheckpointError, match="no such folder"):
        GenerationConfig.from_pretrained(folder / "nowhere")


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


def test_a_bad_word_does_not_forbid_the_end_but_a_suppressed_token_does():
    assert Scripted([5, 0]).generate(ONE, bad_words_ids=[[0]], max_new_tokens=9).tolist() == [[5, 5, 0]]
    (suppressed,) = Scripted([5, 0]).generate(ONE, suppress_tokens=[0], max_new_tokens=3).tolist()
    assert suppressed[:2] == [5, 5] and 0 not in suppressed


def test_time_that_is_up_ends_a_text(tokenizer):
    assert Scripted([5, 6, 7]).generate(ONE, max_time=0).tolist() == [[5, 5]]
    assert Scripted([5, 6, 7]).generate(ONE, max_time=3600.0).tolist() == [[5, 5, 6, 7, 0]]
    assert streamed(Scripted([5, 6, 7], tokenizer), max_time=0)[1] == "stop"


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


def test_what_generate_returns_is_asked_of_generate_alone():
    with pytest.warns(UserWarning, match="output_scores is without effect, because return_dict_in_generate is not set"):
        Scripted([5]).generate(ONE, output_scores=True)
    with pytest.raises(UnsupportedError, match="beam_indices: beam search is not supported; leave it out"):
        Scripted([5]).compute_transition_scores(ONE, [torch.zeros(1, 9)], beam_indices=1)


def test_drafts_change_neither_scores_nor_what_is_forbidden(model):
    """A draft's tokens are scored as they are taken, once each."""
    ids = random_ids(1, 4).repeat(1, 6)
    options = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True, **NO_EOS}
    options["bad_words_ids"] = [[7], [9, 11]]
    plain, drafted = (model.generate(ids, **options, **more) for more in ({}, {"prompt_lookup_num_tokens": 4}))
    assert torch.equal(plain.sequences, drafted.sequences) and len(drafted.scores) == 20
    torch.testing.assert_close(torch.stack(plain.scores), torch.stack(drafted.scores), atol=TIE, rtol=0)


def test_sensible_calls_warn_of_nothing(model):
    ids = random_ids(1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, max_new_tokens=2, do_sample=False, temperature=1.0, top_k=50, use_cache=True)
        model.generate(inputs=ids, max_new_tokens=2, do_sample=True, temperature=0.5, top_p=0.9)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        found = model.generate(**given)
    assert torch.equal(found, model.generate(ids))


# Refusals -------------------------------------------------------------------------------------------------------------

FOUR = random_ids(2, 4)
REFUSED = [
    # prompts that are no batch of ids
    ({"input_ids": torch.tensor([5, 6])}, r"input_ids is \(2,\) torch.int64, expected a tensor \(batch, tokens\)"),
    ({"input_ids": torch.tensor([[5.0]])}, "torch.float32"),
    ({"input_ids": torch.empty(0, 3, dtype=torch.long)}, r"\(0, 3\)"),
    ({"input_ids": [[5]]}, "input_ids is list"),
    ({"input_ids": "text"}, "input_ids is str"),
    ({"input_ids": torch.tensor([[5, -1]])}, f"found -1, expected 0 to {VOCABULARY - 1}"),
    ({"input_ids": torch.tensor([[5, VOCABULARY]])}, f"found {VOCABULARY}, expected 0 to {VOCABULARY - 1}"),
    # options that do not fit the prompt
    ({"attention_mask": torch.ones(1, 3)}, r"attention_mask is \(1, 3\), expected \(2, 4\)"),
    ({"attention_mask": [[1] * 4] * 2}, "attention_mask is a list, expected a tensor"),
    ({"attention_mask": torch.full((2, 4), 2)}, "values other than 0 and 1"),
    ({"attention_mask": torch.tensor([[1] * 4, [0] * 4])}, "prompt 1 is empty"),
    ({"max_length": 3}, "the prompt has 4 tokens, more than max_length 3"),
    ({"num_return_sequences": 2}, "num_return_sequences above 1 needs do_sample=True"),
    # values that make no sense
    ({"bad_words_ids": [[]]}, r"bad_words_ids is \[\[\]\], expected .* and \[\[42, 7\]\]"),
    ({"bad_words_ids": [["a"]]}, "bad_words_ids is"),
    ({"bad_words_ids": 5}, "bad_words_ids is 5"),
    ({"sequence_bias": {5: 1.0}}, r"sequence_bias is {5: 1.0} and bad_words_ids is \[\], expected {\(42, 7\): -5.0}"),
    ({"sequence_bias": {(5,): float("nan")}}, "sequence_bias is"),
    ({"bad_words_ids": [[300]]}, "sequence_bias: found 300, expected 0 to 130"),
    ({"suppress_tokens": ["a"]}, r"suppress_tokens is \['a'\], expected an id or a list of ids"),
    ({"max_time": -1}, "max_time is -1, expected a number of seconds"),
    ({"max_time": "1"}, "max_time is '1', expected a number of seconds"),
    ({"output_scores": 1}, "output_scores is 1, expected True or False"),
    ({"generation_config": 5}, "generation_config is a int"),
    # unknown names
    ({"max_new_token": 4}, "^generate knows no option 'max_new_token'; nearest is 'max_new_tokens'$"),
    ({"temprature": 4}, "^generate knows no option 'temprature'; nearest is 'temperature'$"),
    ({"eos_token": 4}, "^generate knows no option 'eos_token'; nearest is 'eos_token_id'$"),
    ({"zzzz": 4}, "^generate knows no option 'zzzz'$"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_makes_no_sense_is_refused_in_one_line(model, options, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        model.generate(**{"input_ids": FOUR, **options})
    assert "\n" not in str(caught.value)


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
            Scripted([5]).generate(ONE, **{"do_sample": True, name: value})


@pytest.mark.parametrize("name", OFF_ONLY)
def test_what_is_not_supported_is_refused_by_name_but_its_off_value_is_not(name):
    off, advice = OFF_ONLY[name]
    with pytest.raises(UnsupportedError) as caught:
        Scripted([5]).generate(ONE, **{name: 4})
    assert str(caught.value) == f"{name}: {advice}"
    for value in off:
        Scripted([5]).generate(ONE, **{name: value})
