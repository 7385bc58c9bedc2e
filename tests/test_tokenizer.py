"""What the tokenizer promises: the ids and the text of transformers, streams that join to the whole, clear refusals.

Runs on a small tokenizer that is trained here, and on the real 20B one where shared/data is there.
"""

import copy
import itertools
import json
import os
import random
import re
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import tokenizers
import torch
import transformers
from support.commands import ROOT, run_python
from support.often import times
from support.refusals import refused
from tokenizers import decoders

from neox_lite.errors import TokenizerError
from neox_lite.tokenizer import ABSENT, BatchEncoding, GPTNeoXTokenizerFast, StreamDecoder

DATA = Path(__file__).parents[2] / "shared/data"
open_ours, open_theirs = GPTNeoXTokenizerFast.from_pretrained, transformers.GPTNeoXTokenizer.from_pretrained
CORPUS = [
    "def main(args):\n        return [x for x in args if x]  # comment",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "今日は 안녕 привет שלום naïve café 🙂👍🏽",
] * 4


def small_backend() -> tokenizers.Tokenizer:
    """A byte-level BPE made like the real one: every byte, two special tokens, runs of whitespace added on top."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return backend


def opened(folder, **options):
    """(ours, transformers') for a folder, whose class its settings name."""
    return open_ours(folder, **options), transformers.AutoTokenizer.from_pretrained(folder, **options)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    small_backend().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory) -> Path:
    if not (DATA / "20B_tokenizer.json").is_file():
        pytest.skip(f"the real tokenizer, {DATA / '20B_tokenizer.json'}, is not there")
    folder = tmp_path_factory.mktemp("real")
    (folder / "tokenizer.json").write_bytes((DATA / "20B_tokenizer.json").read_bytes())
    return folder


@pytest.fixture(scope="session", params=["small", "20B"])
def folder(request) -> Path:
    return request.getfixturevalue("small_folder" if request.param == "small" else "real_folder")


@pytest.fixture(scope="session")
def ours(folder):
    return open_ours(folder)


@pytest.fixture(scope="session")
def theirs(folder):
    return open_theirs(folder)


@pytest.fixture
def small(small_folder):
    """A fresh tokenizer, free to be changed."""
    return open_ours(small_folder)


def write(folder: Path, source: Path | None = None, **files) -> Path:
    """A folder with source's tokenizer.json, or its own, and the given JSON files beside it."""
    folder.mkdir(exist_ok=True)
    if source is not None:
        (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# -- texts -------------------------------------------------------------------------------------------------------------

PIECES = [
    *("hello", " world", "The", "'s", "'LL", " don't", "naïve", "https://example.org/?q=%20", "\\begin{equation}"),
    *(" ", "  ", "\t", "\n", "\r\n", "\r", "\v", "\f", "\x00", "\x07", "\x1b[0m", "\x7f", "\x85", "\xa0", "\u2028"),
    *("\u3000", "\u200b", "\u200d", "\ufeff", "\ufffd", "\uffff", "\U0010ffff", "\ue000", "\u202e", "\u2066"),
    *("👩‍👩‍👧‍👦", "👍🏽", "🇺🇳", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "❤️", "🙂"),
    *("今日は", "世界", "안녕", "각", "พิษณุโลก", "שָׁלוֹם", "مرحبا", "नमस्ते", "\U0001d518\U0001d52b"),
    *("Ǆ", "ﬁ", "½", "①", "٣", "Å", "Ω"),
    *("e\u0301", "\u0301", "o\u0302\u0301", "a\u0323\u0307", "a\u0307\u0323", "\u1100\u1161\u11a8", "Z\u0351\u036b"),
    *("<|endoftext|>", "<|padding|>", "<|endoftext", "|>", "<|ENDOFTEXT|>", " <|endoftext|> "),
    *("def f(x):\n    return x\n", "if (a<b) {\n\t\tb--;\n}\n", '{"k": [1, 2.5e-3]}', "0123456789", "3.14159"),
    "______",
    *("Ġ", "Ċ", "ĠĠ", "Ã©", "a" * 50, "ab" * 40, "=" * 33, "日" * 20),
]


def random_text(rng: random.Random) -> str:
    """One ordinary or hostile string; no lone surrogates."""
    kind = rng.randrange(5)
    if kind == 0:
        return "".join(rng.choices(PIECES, k=rng.randint(1, 12)))
    if kind == 1:
        return "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(12))
    if kind == 2:
        return "".join(rng.choice(" \t\n\rab,") * rng.randint(1, 9) for _ in range(8))
    if kind == 3:
        return "".join(chr(rng.randrange(0x250)) for _ in range(rng.randint(1, 40)))
    return unicodedata.normalize("NFD", "".join(rng.choices(PIECES, k=rng.randint(1, 6))))


def all_texts() -> list[str]:
    ends = (("", ""), ("a", "b"))
    runs = [f"{left}{blank * n}{right}" for n in range(101) for blank in " \t\n" for left, right in ends]
    words = ["a" * 5000, "é" * 3000, "supercalifragilistic" * 300]
    words += ["".join(map(chr, range(0x20, 0xD800, 7))), " " * 5000]
    lines = []
    for name in ("shakespeare.txt", "wikitext-2-valid.txt"):
        if (DATA / name).is_file():
            lines += (DATA / name).read_text(encoding="utf-8").splitlines(keepends=True)[:6000:10]
    rng = random.Random(20)
    return [*runs, *words, *lines, *PIECES, "", *(random_text(rng) for _ in range(1500))]


def test_ids_and_text_are_those_of_transformers(ours, theirs):
    texts, different = all_texts(), []
    assert len(texts) > 2000
    for text in texts:
        ids = theirs(text)["input_ids"]
        same = ours(text)["input_ids"] == ids and ours.tokenize(text) == theirs.tokenize(text)
        same = same and all(ours.decode(ids, skip) == theirs.decode(ids, skip) for skip in (False, True))
        if not same:
            different.append(text)
    assert different == []


def test_offsets_are_those_of_transformers(ours, theirs):
    texts = [text for text in all_texts()[::10] if text]
    got, want = (tokenizer(texts, return_offsets_mapping=True) for tokenizer in (ours, theirs))
    assert got == dict(want)
    assert list(got) == list(want)


def test_ordinary_text_survives_the_round_trip(ours):
    # NFC of Python and of `tokenizers` may follow different versions of Unicode: no random characters here.
    for text in [text for text in all_texts() if text.isascii()] + PIECES:
        assert ours.decode(ours(text).input_ids) == unicodedata.normalize("NFC", text)


def test_any_ids_decode_as_in_transformers(ours, theirs):
    rng = random.Random(3)
    for _ in range(500):
        ids = [rng.randrange(len(ours) + 60) for _ in range(rng.randint(0, 12))]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert ours.convert_ids_to_tokens(ids, True) == theirs.convert_ids_to_tokens(ids, True)


def test_the_real_ids_are_the_known_ones(real_folder):
    tokenizer = open_ours(real_folder)
    assert tokenizer("Hello world\n        x<|endoftext|>").input_ids == [12092, 1533, 187, 50270, 89, 0]
    assert (len(tokenizer), tokenizer.vocab_size) == (50277, 50254)
    assert [getattr(tokenizer, f"{name}_token_id") for name in ("eos", "bos", "unk", "pad")] == [0, 0, 0, 1]
    assert [tokenizer.convert_tokens_to_ids(" " * n) for n in (24, 3, 2)] == [50254, 50275, 50276]
    assert tokenizer.decode([50277, 50431, 12092, 2**32 - 1]) == "Hello"  # the model's padded vocabulary is no text


def test_special_tokens_and_vocabulary_are_those_of_transformers(ours, theirs):
    for name in ("all_special_ids", "all_special_tokens", "special_tokens_map", "vocab_size", "model_max_length"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (len(ours), ours.get_vocab()) == (len(theirs), theirs.get_vocab())
    added = [{i: str(token) for i, token in t.added_tokens_decoder.items()} for t in (ours, theirs)]
    assert added[0] == added[1]
    for tokens in (["<|endoftext|>", "a", "no such token", "  "], "Ġthe"):
        assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)


# -- padding, truncation, tensors --------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"padding": True},
    {"padding": "longest", "pad_to_multiple_of": 8},
    {"padding": "max_length", "max_length": 7},
    {"padding": "max_length", "max_length": 7, "truncation": True},
    {"padding": "max_length", "max_length": 5, "pad_to_multiple_of": 4},
    {"padding": "do_not_pad", "max_length": 3},
    {"padding": True, "truncation": True, "max_length": 3, "padding_side": "left"},
    {"truncation": "longest_first", "max_length": 4},
    {"truncation": "only_first", "max_length": 1},
    {"truncation": "do_not_truncate", "max_length": 4},
    {"truncation": False, "max_length": 4},
    {"truncation": True, "max_length": 0},
    {"max_length": 3},
    {"pad_to_multiple_of": 4},
    {"add_special_tokens": False, "return_attention_mask": False},
    {"return_token_type_ids": True, "return_offsets_mapping": True, "return_length": True, "padding": True},
    {"return_length": True, "truncation": True, "max_length": 2},
]
BATCHES = ["one text here", "", ["a"], ["", "b c"], ["a longer text of some words", "", "  x\n    y", "<|endoftext|>b"]]


def as_plain(encoding) -> dict:
    return {k: (type(v).__name__, v.tolist() if hasattr(v, "tolist") else v) for k, v in encoding.items()}


@pytest.mark.filterwarnings("ignore:.*max_length. ")
@pytest.mark.parametrize("kind", [None, "pt", "np"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_call_matches_transformers(ours, theirs, options, kind):
    for batch in BATCHES:
        lengths = {len(ids) for ids in theirs(batch, **options)["input_ids"]} if isinstance(batch, list) else {0}
        if kind and len(lengths) > 1:
            with pytest.raises(TokenizerError, match="padding=True"):
                ours(batch, return_tensors=kind, **options)
            continue
        got, want = ours(batch, return_tensors=kind, **options), theirs(batch, return_tensors=kind, **options)
        assert as_plain(got) == as_plain(want)
        if kind == "pt":
            assert {k: (v.dtype, v.shape) for k, v in got.items()} == {k: (v.dtype, v.shape) for k, v in want.items()}


def test_sides_match_transformers(small, small_folder):
    texts, theirs = ["a b c d e f", "a"], open_theirs(small_folder)
    for small.padding_side in ("left", "right"):
        for small.truncation_side in ("left", "right"):
            theirs.padding_side, theirs.truncation_side = small.padding_side, small.truncation_side
            for options in OPTIONS[1:]:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    assert small(texts, **options) == dict(theirs(texts, **options)), options


def test_model_max_length_is_the_default_length(tmp_path, small_folder):
    ours, theirs = opened(write(tmp_path, small_folder, tokenizer_config=CONFIGS["short"]))
    for options in ({"truncation": True}, {"padding": "max_length"}, {"padding": "max_length", "truncation": True}):
        for texts in (["a b c d e f", "a"], "a b c d e f", "a"):
            assert ours(texts, **options) == dict(theirs(texts, **options))


def test_options_without_a_length_say_that_they_do_nothing_and_an_empty_list_gives_empty_fields(small):
    with pytest.warns(UserWarning, match="truncation does nothing without max_length"):
        assert small("a b", truncation=True) == small("a b")
    with pytest.warns(UserWarning, match="padding='max_length' does nothing"):
        assert small("a b", padding="max_length") == small("a b")
    assert small([]) == {"input_ids": [], "attention_mask": []}
    assert small([], padding=True, return_tensors="pt").input_ids.tolist() == []


MASK = {"return_special_tokens_mask": True}
PAIRS = {
    "one": (("Who was Jim Henson?", "A nice puppet"), {}),
    "types": (("Who?", " He."), {"return_token_type_ids": True, **MASK}),
    "batch": ((["Who?", "Where, and when?"], ["A", "In  there"]), {"padding": True, **MASK}),
    "offsets": (("Who?", "He"), {"return_offsets_mapping": True}),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("around", [{}, {"add_bos_token": True, "add_eos_token": True}], ids=["plain", "bos-eos"])
def test_pairs_are_those_of_transformers(small_folder, name, around):
    """Of what transformers is told in the call: it ignores add_bos_token beside a tokenizer.json, but not set afterwards."""
    (text, pair), options = PAIRS[name]
    ours, theirs = open_ours(small_folder, **around), open_theirs(small_folder)
    for key, value in around.items():
        setattr(theirs, key, value)
    assert dict(ours(text, pair, **options)) == dict(theirs(text, pair, **options))
    assert dict(ours(text, text_pair=pair, **options)) == dict(theirs(text, text_pair=pair, **options))


def test_pad_matches_transformers(ours, theirs):
    batch = {"input_ids": [[5, 6, 7], [8], []], "attention_mask": [[1, 1, 1], [1], []]}
    rows = [{"input_ids": ids} for ids in batch["input_ids"][:2]]
    tensors = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "attention_mask": torch.ones(2, 2, dtype=torch.int64)}
    every = [{}, {"padding": False}, {"pad_to_multiple_of": 4, "return_tensors": "pt"}]
    every += [{"padding": "max_length", "max_length": 6, "padding_side": "left"}]
    every += [{"return_attention_mask": True, "return_tensors": "np"}]
    cases = [*itertools.product((batch, rows, {"input_ids": [1, 2, 3]}), every), (tensors, {"pad_to_multiple_of": 4})]
    for given, options in cases:
        copies = [copy.deepcopy(given) for _ in range(2)]
        assert as_plain(ours.pad(copies[0], **options)) == as_plain(theirs.pad(copies[1], **options)), options
    assert ours.pad({"input_ids": [[1]], "attention_mask": [[1]]}, return_attention_mask=False) == {"input_ids": [[1]]}
    ours.pad(batch)
    assert batch["input_ids"] == [[5, 6, 7], [8], []]  # the caller's lists are left alone


def test_encode_gives_the_input_ids(ours, theirs):
    for options in ({}, {"max_length": 2}):
        assert ours.encode("a b c", **options) == theirs.encode("a b c", **options)
    assert torch.equal(ours.encode("a b", return_tensors="pt"), theirs.encode("a b", return_tensors="pt"))


def test_encoding_feeds_a_model(small):
    encoding = small(["a b", "c"], padding=True, return_tensors="pt")
    assert isinstance(encoding, BatchEncoding)
    assert (lambda input_ids, attention_mask: (input_ids, attention_mask))(**encoding)[0] is encoding.input_ids
    assert encoding.to("meta") is encoding
    assert encoding.attention_mask.device.type == "meta"
    with pytest.raises(AttributeError, match="holds input_ids, attention_mask"):
        _ = encoding.labels
    assert small("a").to("cpu") == small("a")


def test_decode_takes_ids_in_any_container(ours, theirs):
    ids = [40, 41, 42]
    for value in (40, ids, tuple(ids), torch.tensor(ids), numpy.array(ids), torch.tensor(40), numpy.int64(40), []):
        assert ours.decode(value) == theirs.decode(value)
    for value in (ids, tuple(ids), torch.tensor(ids), numpy.array(ids)):  # of one id alone, versions differ
        assert ours.batch_decode(value) == theirs.batch_decode(value)
    tensors = [torch.tensor(ids), torch.tensor([43])]
    for batch in ([ids, [43]], torch.tensor([ids, ids]), numpy.array([ids]), tensors, [[]]):
        assert ours.decode(batch) == ours.batch_decode(batch) == theirs.batch_decode(batch)
    assert ours.decode(list(map(numpy.int32, ids))) == theirs.decode(ids)
    assert ours.decode(ids, clean_up_tokenization_spaces=True) == ours.decode(ids)


def test_decoding_never_eats_spaces(tmp_path, small_folder):
    tokenizer = open_ours(write(tmp_path, small_folder, tokenizer_config={"clean_up_tokenization_spaces": True}))
    text = "do n't , stop . it 's  here !"
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=True) == text


def test_threads_do_not_see_each_others_options(small):
    jobs = [{"padding": "max_length", "max_length": n, "truncation": bool(n % 2)} for n in range(1, 40)] * 5
    texts = ["a b c d e f g", "x"]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda o: small(texts, **o), jobs)) == [small(texts, **options) for options in jobs]
    assert (small.backend_tokenizer.padding, small.backend_tokenizer.truncation) == (None, None)


# -- the files ---------------------------------------------------------------------------------------------------------

EOS = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "normalized": True}
SEP = {"__type": "AddedToken", "content": "<|sep|>", "rstrip": True}
CONFIGS = {
    "none": {},
    "pythia": {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False, "eos_token": "<|endoftext|>"},
    "objects": {"eos_token": EOS, "sep_token": SEP},
    "short": {"tokenizer_class": "GPTNeoXTokenizer", "model_max_length": 4, "padding_side": "left"},
    "no-pad": {"pad_token": None, "unk_token": None},
    "new-tokens": {"additional_special_tokens": ["### End", "### Response:\n"], "sep_token": "<|sep|>"},
    "prefix-space": {"add_prefix_space": True},
    "generic": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "add_prefix_space": True},
    "split-special": {"split_special_tokens": True},
    "added": {"added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True, "lstrip": True}}},
}
SAMPLES = ["Hello world ### End", "<|padding|>x<|im_end|> y", "a<|endoftext|> b <|sep|>", "", " café e\u0301"]
SAMPLES += ["x\n        y ### Response:\nz"]


def same_tokenizer(ours, theirs) -> bool:
    """Equal ids, offsets and text for the samples, and equal special tokens; transformers adds tokens we leave out."""
    for text in SAMPLES:
        got, want = ours(text, return_offsets_mapping=True), theirs(text, return_offsets_mapping=True)
        assert got == dict(want)
        assert ours.decode(got.input_ids, True) == theirs.decode(got.input_ids, True)
    assert (ours.special_tokens_map, ours.all_special_ids) == (theirs.special_tokens_map, theirs.all_special_ids)
    return len(ours) == len(theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokenizer_config_means_what_it_means_to_transformers(tmp_path, small_folder, name):
    folder = write(tmp_path, small_folder, tokenizer_config={"tokenizer_class": "GPTNeoXTokenizer"} | CONFIGS[name])
    if name == "added":  # transformers then takes no added token from tokenizer.json, so name them all
        known = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_added_tokens_decoder()
        listed = {str(i): t.__getstate__() for i, t in known.items()} | CONFIGS[name]["added_tokens_decoder"]
        write(tmp_path, small_folder, tokenizer_config={"added_tokens_decoder": listed})
        assert same_tokenizer(open_ours(folder), open_theirs(folder))
    else:
        assert same_tokenizer(*opened(folder))


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_folder_opens_equal_here_and_in_transformers(tmp_path, small_folder, name):
    folder, out = write(tmp_path / "in", small_folder, tokenizer_config=CONFIGS[name]), tmp_path / "out"
    first = open_ours(folder, padding_side="left", model_max_length=77)
    first.chat_template = "{{ messages }}\n"
    assert sorted(Path(f).name for f in first.save_pretrained(out)) == sorted(p.name for p in out.iterdir())
    again, theirs = opened(out)
    assert same_tokenizer(again, theirs) and same_tokenizer(first, theirs)
    for tokenizer in (again, theirs):
        assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 77)
        assert tokenizer.chat_template == first.chat_template
    again.save_pretrained(tmp_path / "twice")
    for file in out.iterdir():
        assert (tmp_path / "twice" / file.name).read_bytes() == file.read_bytes()


def test_folder_saved_by_transformers_opens_equal(tmp_path, folder, theirs):
    theirs.save_pretrained(tmp_path)
    assert same_tokenizer(open_ours(tmp_path), theirs)


def test_saving_over_another_tokenizer_leaves_nothing_of_it(tmp_path, small, small_folder):
    write(tmp_path, small_folder, special_tokens_map={"eos_token": "a"}, added_tokens={"<x>": 999})
    (tmp_path / "chat_template.jinja").write_text("old")
    small.save_pretrained(tmp_path)
    again = open_ours(tmp_path)
    assert (again.eos_token, again.chat_template) == ("<|endoftext|>", None)


@pytest.mark.parametrize("flags", [{"add_bos_token": True}, {"add_eos_token": True, "add_bos_token": True}], ids=str)
def test_bos_and_eos_are_added_on_request(tmp_path, small_folder, flags):
    ours, theirs = open_ours(small_folder, **flags), open_theirs(small_folder, **flags)
    texts = ["a b c d", "", "<|endoftext|>a b"]
    for options in ({}, {"add_special_tokens": False}, {"max_length": 3}, {"max_length": 2}, {"padding": True}):
        for ours.truncation_side in ("left", "right"):
            theirs.truncation_side = ours.truncation_side
            assert ours(texts, **options) == dict(theirs(texts, **options))
    refused(TokenizerError, r"max_length: 0 is less than the . special tokens", ours, "a", max_length=0)
    ours.save_pretrained(tmp_path)
    for again in opened(tmp_path):
        assert dict(again(texts)) == dict(ours(texts))


def test_add_bos_token_in_the_file_is_ignored_aloud(tmp_path, small_folder):
    folder = write(tmp_path, small_folder, tokenizer_config={"add_bos_token": True, "add_eos_token": False})
    with pytest.warns(UserWarning, match=r"pass add_bos_token=True to from_pretrained"):
        tokenizer = open_ours(folder)
    assert tokenizer("a") == dict(open_theirs(folder)("a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_ours(folder, add_bos_token=True)("a").input_ids[0] == 0


def test_older_companion_files_are_read(tmp_path):
    backend = small_backend()
    backend.add_tokens([tokenizers.AddedToken("Hello", rstrip=True)])  # listed twice: tokenizer.json has its flags
    size = backend.get_vocab_size()
    backend.save(str(tmp_path / "tokenizer.json"))
    write(
        tmp_path,
        tokenizer_config={"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "<|endoftext|>"},
        special_tokens_map={"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": "<|endoftext|>"},
        added_tokens={"<|im_end|>": size, "Hello": size - 1, "<extra>": size + 1},
    )
    ours, theirs = opened(tmp_path)
    assert same_tokenizer(ours, theirs)
    assert (ours.eos_token_id, ours("<extra>").input_ids) == (size, [size + 1])


def test_baked_padding_and_truncation_do_not_act(tmp_path):
    backend = small_backend()
    backend.enable_padding(direction="left", pad_id=1, pad_token="<|padding|>", length=50)
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = open_ours(tmp_path), open_theirs(tmp_path)
    assert ours(["a b c d", "e"]) == dict(theirs(["a b c d", "e"]))
    assert ours.padding_side == theirs.padding_side == "left"


@pytest.mark.parametrize("name", ["GPTNeoXTokenizerFast", "PreTrainedTokenizerFast"])
def test_prefix_space_comes_from_the_options_of_this_family_and_from_the_file_of_others(tmp_path, name):
    backend = small_backend()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert same_tokenizer(*opened(write(tmp_path, tokenizer_config={"tokenizer_class": name})))


def test_a_tokenizer_without_the_default_tokens_has_none(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = GPTNeoXTokenizerFast(tmp_path / "tokenizer.json")
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == (None, None)
    assert (tokenizer.all_special_ids, len(tokenizer)) == ([], 2)


def test_chat_template_is_the_file_or_the_config(tmp_path, small_folder):
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    for stored, template in (("from config", "from config"), (named, "d")):
        write(tmp_path, small_folder, tokenizer_config={"chat_template": stored})
        assert open_ours(tmp_path).chat_template == template
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert open_ours(tmp_path).chat_template == "from file"


def test_a_hub_id_fetches_only_tokenizer_files(monkeypatch, small_folder, tmp_path):
    asked = []

    def fetch_files(repo_id, names, revision, access):
        asked.append((repo_id, tuple(names), revision))
        return small_folder if repo_id == "EleutherAI/pythia-70m" else tmp_path

    (tmp_path / "spiece.model").write_bytes(b"\n\x00")
    monkeypatch.setattr("neox_lite.tokenizer.fetch_files", fetch_files)
    tokenizer = open_ours("EleutherAI/pythia-70m", revision="step3000")
    assert tokenizer.name_or_path == "EleutherAI/pythia-70m"
    ((repo_id, names, revision),) = asked
    assert (repo_id, revision) == ("EleutherAI/pythia-70m", "step3000")
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"} < set(names)
    assert not [name for name in names if name.endswith((".safetensors", ".bin"))]
    told = r"rinna/japanese: no tokenizer.json \(found spiece.model, but sentencep"
    refused(TokenizerError, told, open_ours, "rinna/japanese")


# -- special tokens ----------------------------------------------------------------------------------------------------


def test_special_tokens_can_be_set(small):
    small.pad_token = small.eos_token
    assert small.pad_token_id == small.eos_token_id == 0
    small.pad_token_id = 5
    assert small.pad_token == small.convert_ids_to_tokens(5)
    assert small(["a", "a b"], padding=True).input_ids[0][-1] == 5
    small.pad_token = None
    assert (small.pad_token, small.pad_token_id) == (None, None)
    assert "pad_token" not in small.special_tokens_map
    small.sep_token = "a"
    assert small.all_special_tokens == ["<|endoftext|>", "a"]


def test_padding_never_borrows_eos(small):
    small.pad_token = None
    told = r"has no pad_token; set it: tokenizer.pad_token = tokenizer.eos_token"
    refused(TokenizerError, told, small, ["a", "a b"], padding=True)
    refused(TokenizerError, "has no pad_token", small.pad, [{"input_ids": [1]}])
    assert small(["a", "a b"]).input_ids


# -- streaming ---------------------------------------------------------------------------------------------------------


def stream(tokenizer, ids, skip=False) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip_special_tokens=skip)
    return [*(decoder.put(index) for index in ids), decoder.end()]


def test_streamed_text_of_random_strings_is_the_whole(ours):
    rng = random.Random(7)
    for _ in range(times(3_000)):
        ids = ours(random_text(rng)).input_ids
        for skip in (False, True) if rng.random() < 0.2 else (False,):
            assert "".join(stream(ours, ids, skip)) == ours.decode(ids, skip_special_tokens=skip)


def test_streamed_random_ids_are_the_whole(ours):
    """Broken UTF-8, special tokens and whitespace between its bytes, ids beyond the vocabulary."""
    rng = random.Random(8)
    hostile = [i for t, i in ours.get_vocab().items() if "\ufffd" in ours.decode(i)]
    hostile += [*ours.all_special_ids * 20, *range(len(ours) - 25, len(ours) + 30)]
    assert len(hostile) > 200
    for _ in range(times(3_000)):
        pick = lambda: rng.choice(hostile) if rng.random() < 0.8 else rng.randrange(len(ours))  # noqa: E731
        ids = [pick() for _ in range(rng.randint(0, 9))]
        skip = rng.random() < 0.5
        assert "".join(stream(ours, ids, skip)) == ours.decode(ids, skip_special_tokens=skip)


def test_stream_holds_back_only_a_character_that_is_not_whole(ours):
    for text in all_texts()[::5]:
        ids = ours(text).input_ids
        shown = ""
        for count, piece in enumerate(stream(ours, ids)[:-1], 1):
            shown += piece
            whole = ours.decode(ids[:count])
            assert whole.startswith(shown)
            assert set(whole[len(shown) :]) <= {"\ufffd"}, "text was ready but held back"


def test_stream_of_emoji_bytes_waits_for_the_last_one(small):
    ids = [small.convert_tokens_to_ids(token) for token in "ðŁĻĤ"]
    assert stream(small, ids) == ["", "", "", "🙂", ""]
    assert stream(small, [*ids[:2], 0]) == ["", "", "\ufffd<|endoftext|>", ""]
    assert stream(small, [*ids[:2], 0, *ids[2:]], skip=True) == ["", "", "", "", "🙂", ""]
    assert stream(small, ids[:3]) == ["", "", "", "\ufffd"]


def test_stream_restarts_after_end(small):
    decoder = StreamDecoder(small)
    for text in ("first", "second é", ""):
        assert "".join(map(decoder.put, small(text).input_ids)) + decoder.end() == text
    assert decoder.put(torch.tensor(small("a").input_ids[0])) == "a"


def test_an_added_token_that_looks_like_bytes_streams_as_it_decodes(small):
    small.backend_tokenizer.add_tokens(["é", "🙂", "x é"])
    ids = small("🙂éx é").input_ids
    assert "".join(stream(small, ids)) == small.decode(ids)


FALLBACK = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
SENTENCEPIECE = {"metaspace": decoders.Metaspace(), "byte-fallback": decoders.Sequence(FALLBACK), "none": None}


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_stream_of_a_converted_sentencepiece_tokenizer_is_the_whole(tmp_path, name):
    words = ["▁", "▁a", "b", "▁▁", "日", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([(word, -1.0) for word in words], 0, byte_fallback=True))
    if SENTENCEPIECE[name] is not None:
        backend.decoder = SENTENCEPIECE[name]
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = GPTNeoXTokenizerFast(tmp_path / "tokenizer.json", tokenizer_class="T5Tokenizer", eos_token="</s>")
    rng = random.Random(9)
    for _ in range(600):
        emoji = [words.index(f"<0x{byte:02X}>") for byte in "🙂é".encode()]
        pieces = [rng.choice([[rng.randrange(7)], [rng.randrange(270)], emoji[:4], emoji[4:]]) for _ in range(6)]
        ids = [index for piece in pieces for index in piece]
        skip = rng.random() < 0.5
        assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


# -- refusals ----------------------------------------------------------------------------------------------------------

ODD = {"pad_to_multiple_of": 4, "padding": True, "truncation": True}
BAD_CALLS = {
    "text: found the lone surrogate U+D800 at position 2": lambda t: t("ab\ud800c"),
    r"text\[1\]: found the lone surrogate U+DFFF at position 0": lambda t: t(["a", "\udfff"]),
    "lone surrogate U+DC80": lambda t: t.tokenize("\udc80"),
    "tokens: found the lone surrogate": lambda t: t.convert_tokens_to_ids(["\ud83d"]),
    "pad_token: found the lone surrogate": lambda t: setattr(t, "pad_token", "\ud83d"),
    "text: found NoneType, expected str or a list of str": lambda t: t(None),
    "text: found bytes": lambda t: t.encode(b"a"),
    r"text\[0\]: found int, expected str": lambda t: t([1, 2]),
    r"text\[0\]: found list": lambda t: t([["a", "b"]]),
    "text_pair: found 1 for 2 texts; give each text its own": lambda t: t(["a", "b"], "c"),
    r"text_pair\[0\]: found int": lambda t: t("a", 4),
    "text_pair: a pair has 2 tokens, more than max_length 1": lambda t: t("a", "b", max_length=1, truncation=True),
    "is_split_into_words=True: word lists": lambda t: t(["a"], is_split_into_words=True),
    "unknown argument 'paddin'; did you mean padding?": lambda t: t("a", paddin=True),
    "stride=4: overlapping windows": lambda t: t("a", stride=4),
    "padding: found 'top', expected one of": lambda t: t("a", padding="top"),
    "truncation: found 'only_second'": lambda t: t("a", truncation="only_second", max_length=3),
    "padding_side: found 'middle', expected one of 'right', 'left'": lambda t: t("a", padding_side="middle"),
    "return_tensors: found 'tf', expected one of 'pt', 'np'": lambda t: t("a", return_tensors="tf"),
    "max_length: found -1, expected an integer of at least 0": lambda t: t("a", max_length=-1),
    "pad_to_multiple_of: found 0": lambda t: t("a", pad_to_multiple_of=0),
    "max_length: 7 is not a multiple of pad_to_multiple_of 4": lambda t: t("a", max_length=7, **ODD),
    "return_tensors: rows have 1 to 2 tokens": lambda t: t(["a", "ab\n"[::2]], return_tensors="pt"),
    r"ids\[1\]: found -100, expected an integer from 0 on; drop ignored labels": lambda t: t.decode([1, -100]),
    r"ids\[0\]: found -1": lambda t: t.batch_decode([[1], [-1]]),
    r"ids\[0\]: found 1.5": lambda t: t.decode([1.5]),
    r"ids\[0\]: found True": lambda t: t.decode(torch.tensor([True])),
    r"ids\[0\]: found 'a'": lambda t: t.decode("a"),
    r"ids\[0\]: found 4294967296": lambda t: t.decode(2**32),
    r"ids\[0\]: found -2": lambda t: StreamDecoder(t).put(-2),
    "pad_token: '<nope>' is not in the vocabulary of": lambda t: setattr(t, "pad_token", "<nope>"),
    "eos_token_id: 99999 is not among the": lambda t: setattr(t, "eos_token_id", 99999),
    r"pad: found \['labels'\], expected input_ids": lambda t: t.pad({"labels": [1]}),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_are_refused_in_one_line(small, message):
    refused(TokenizerError, message.replace("U+", r"U\+").replace("?", r"\?"), BAD_CALLS[message], small)


BAD_OPTIONS = [
    ({"revision": "v2"}, "revision: 'v2' means nothing for a folder"),
    ({"trust_remote_code": True}, "trust_remote_code=True: code from a repository is never run"),
    ({"pading_side": "left"}, r"unknown argument 'pading_side'; did you mean padding_side\?"),
    ({"zzz": 1}, "unknown argument 'zzz'; there are add_bos_token, "),
    ({"padding_side": "top"}, "padding_side: found 'top'"),
    ({"pad_token": 3}, "pad_token: found 3, expected a token"),
    ({"eos_token": None, "add_eos_token": True}, "add_eos_token: .* has no eos_token"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=str)
def test_bad_load_options_are_refused(small_folder, options, message):
    refused(TokenizerError, message, open_ours, small_folder, **options)


@pytest.mark.parametrize("name", ABSENT)
def test_methods_that_are_not_there_say_what_stands_for_them(small, name):
    assert not hasattr(small, name)
    with pytest.raises(AttributeError, match=re.escape(f"GPTNeoXTokenizerFast has no {name}: {ABSENT[name]}")):
        getattr(small, name)


def test_harmless_values_of_refused_options_are_accepted(small_folder):
    tokenizer = open_ours(small_folder, trust_remote_code=False, use_fast=False, token=True)
    assert tokenizer("a", text_pair=None, stride=0, is_split_into_words=False) == tokenizer("a")


GOOD = None  # stands for a whole tokenizer.json
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
MALFORMED = [{"added_tokens_decoder": {"x": "a"}}, {"tokenizer_class": 5}, {"chat_template": [1]}]
MALFORMED += [{"additional_special_tokens": 7}, {"added_tokens_decoder": {"0": {}}}, {"model_max_length": "long"}]
BAD_FILES = [
    ({}, ": no tokenizer.json; copy it"),
    ({"spiece.model": ""}, "found spiece.model, but sentencepiece tokenizers are not supported.*pass ids"),
    ({"tokenizer.model": ""}, "found tokenizer.model, but sentencepiece"),
    ({"vocab.json": "{", "merges.txt": ""}, "vocab.json: not a vocabulary with merges: .*fetch the files again"),
    ({"tokenizer.json": "{"}, "tokenizer.json: not a tokenizer.json that `tokenizers` reads: .*fetch the file again"),
    ({"tokenizer.json": LFS}, "run git lfs pull"),
    ({"tokenizer.json": GOOD, "tokenizer_config.json": "{,}"}, "tokenizer_config.json: not valid JSON: .* line 1"),
    ({"tokenizer.json": GOOD, "special_tokens_map.json": "[]"}, "special_tokens_map.json: found a JSON list"),
    (
        {"tokenizer.json": GOOD, "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": "x.Y"}}'},
        "auto_map names code",
    ),
    ({"tokenizer.json": GOOD, "added_tokens.json": '{"<x>": 9999}'}, "'<x>' has id .*, expected 9999"),
]
BAD_FILES += [
    ({"tokenizer.json": GOOD, "tokenizer_config.json": json.dumps(c)}, "malformed tokenizer settings|correct the file")
    for c in MALFORMED
]


@pytest.mark.parametrize("number", range(len(BAD_FILES)))
def test_bad_files_are_refused_with_their_path(tmp_path, small_folder, number):
    files, message = BAD_FILES[number]
    for name, content in files.items():
        whole = (small_folder / "tokenizer.json").read_text(encoding="utf-8")
        (tmp_path / name).write_text(whole if content is GOOD else content, encoding="utf-8")
    told = refused(TokenizerError, message, open_ours, tmp_path)
    assert str(tmp_path) in told or "correct the file" in told


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "a/b/c", "~/nowhere", ""])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(source):
    refused(TokenizerError, "neither a folder nor a hub id", open_ours, source)


# -- manners -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forking_after_use_prints_no_warning(small_folder):
    code = """if True:
        import os, sys
        from neox_lite.tokenizer import GPTNeoXTokenizerFast
        tokenizer = GPTNeoXTokenizerFast.from_pretrained(sys.argv[1])
        ids = tokenizer(["some text"] * 100).input_ids
        tokenizer.batch_decode(ids)
        if os.fork() == 0:
            tokenizer(["some text"] * 100)
            os._exit(0)
        os.wait()
    """
    result = run_python(code, small_folder, TOKENIZERS_PARALLELISM=None)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_importing_the_tokenizer_imports_neither_torch_nor_numpy():
    code = """if True:
        import sys, types
        package = sys.modules["neox_lite"] = types.ModuleType("neox_lite")  # in place of its __init__
        package.__path__ = [sys.argv[1]]
        import neox_lite.tokenizer
        print(*({"torch", "numpy", "transformers"} & sys.modules.keys()))
    """
    result = run_python(code, ROOT / "neox_lite")
    assert (result.returncode, result.stdout, result.stderr) == (0, "\n", "")


def test_a_stream_keeps_nothing_of_the_text_but_a_characters_start(small):
    decoder = StreamDecoder(small)
    for index in small("a🙂 " * 5000).input_ids:
        decoder.put(index)
        assert len(decoder._utf8.getstate()[0]) < 4
    assert decoder._window == []
