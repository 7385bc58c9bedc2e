"""A byte-level tokenizer as GGUF metadata, and back. Knows no tensor."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from neox_lite.errors import FormatError, TokenizerError
from neox_lite.tokenizer import GPTNeoXTokenizerFast

from .gguf_file import Value

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens
WHOLE, TEMPLATE = "tokenizer.huggingface.json", "tokenizer.chat_template"
NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
SPLITTERS = ("olmo", "gpt-2", "gpt2", "default")  # llama.cpp's names for GPT-2's way of splitting text


# -- tokenizer -> metadata --------------------------------------------------------------------------------------------


def tokenizer_metadata(folder: Path, vocab_size: int) -> dict[str, Value]:
    """The vocabulary and merges of tokenizer.json; a vocabulary without texts where the folder has no tokenizer.json."""
    if not (folder / "tokenizer.json").is_file():
        warnings.warn(f"{folder}: has no tokenizer.json; llama.cpp will have ids but no text", stacklevel=3)
        return {"tokenizer.ggml.model": "no_vocab"}
    tokenizer = GPTNeoXTokenizerFast.from_pretrained(folder)
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model, split = backend["model"], backend.get("pre_tokenizer") or {}
    if model["type"] != "BPE" or split.get("type") != "ByteLevel" or split.get("add_prefix_space"):
        raise FormatError(
            f"{folder / 'tokenizer.json'}: a {model['type']} model after {split.get('type')} splitting; llama.cpp's "
            "gptneox needs byte-level BPE without a prefix space; without tokenizer.json the weights alone are written"
        )
    if backend.get("normalizer"):
        warnings.warn(
            f"{folder}: llama.cpp does not apply the tokenizer's {backend['normalizer']['type']} normalizer; text that "
            "it would change gets other ids there",
            stacklevel=3,
        )
    names, kinds = _tokens(tokenizer, vocab_size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id}
    ids |= {"padding": tokenizer.pad_token_id}
    around: list[int] = tokenizer.encode("")
    found: dict[str, Value] = {
        "model": "gpt2",
        "pre": "olmo",  # llama.cpp's name for GPT-NeoX-20B's tokenizer: GPT-2's way of splitting text
        "tokens": names,
        "token_type": kinds,
        "merges": merges,
        **{f"{name}_token_id": index for name, index in ids.items() if index is not None},
        "add_bos_token": tokenizer.bos_token_id in around[:1],
        "add_eos_token": tokenizer.eos_token_id in around[-1:] and len(around) == 2,
    }
    whole: dict[str, Value] = {WHOLE: tokenizer.backend_tokenizer.to_str()}  # also what the other keys cannot express
    template: dict[str, Value] = {TEMPLATE: tokenizer.chat_template} if tokenizer.chat_template else {}
    return {f"tokenizer.ggml.{k}": v for k, v in found.items()} | template | whole


def _tokens(tokenizer: GPTNeoXTokenizerFast, vocab_size: int) -> tuple[list[str], list[int]]:
    """The text and kind of every id of the model; ids that the tokenizer leaves out become unused ones."""
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for text, index in tokenizer.get_vocab().items():
        if index >= vocab_size:
            raise TokenizerError(f"tokenizer.json: {text!r} has id {index}, but the model has {vocab_size} ids")
        texts[index], kinds[index] = text, NORMAL
    for index, token in tokenizer.added_tokens_decoder.items():
        kinds[index] = CONTROL if token.special else USER_DEFINED
    return texts, kinds


# -- metadata -> tokenizer --------------------------------------------------------------------------------------------


def tokenizer_files(metadata: Mapping[str, Any], vocab_size: int, where: str) -> dict[str, bytes]:
    """The tokenizer's files of a model folder, name -> content; none, with a warning, where there is nothing to restore.

    where: the GGUF file, for messages. Raises TokenizerError for a vocabulary that is malformed or contradicts itself.
    """
    found = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    if found.get("model") != "gpt2":
        warnings.warn(
            f"{where}: its tokenizer is of the kind {found.get('model', 'no_vocab')!r}, which is not restored; copy the "
            "tokenizer's files from the original checkpoint into the folder",
            stacklevel=3,
        )
        return {}
    tokens = _texts(found, vocab_size, where)
    if WHOLE in metadata:
        backend = _read_whole(metadata[WHOLE], tokens, where)
    else:
        backend = _rebuilt(found, tokens, where)
    settings: dict[str, Any] = {"tokenizer_class": "GPTNeoXTokenizerFast", "clean_up_tokenization_spaces": False}
    if backend.encode("").ids:  # tokens around every text: transformers' class of this family would leave them out
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for gguf, own in NAMED.items():
        index = found.get(f"{gguf}_token_id")
        if index is not None and (type(index) is not int or index not in tokens):
            raise TokenizerError(f"{where}: tokenizer.ggml.{gguf}_token_id is {index}, which no token has")
        settings[own] = None if index is None else backend.id_to_token(index)
    if TEMPLATE in metadata:
        if not isinstance(metadata[TEMPLATE], str):
            raise TokenizerError(f"{where}: {TEMPLATE} is no text")
        settings["chat_template"] = metadata[TEMPLATE]
    return {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def _texts(found: Mapping[str, Any], vocab_size: int, where: str) -> dict[int, tuple[str, int]]:
    """Id -> (text, kind) of every token in use."""
    texts, kinds = found.get("tokens"), found.get("token_type")
    kinds = [NORMAL] * len(texts or ()) if kinds is None else kinds
    if not isinstance(texts, list) or not isinstance(kinds, list) or not len(texts) == len(kinds) <= vocab_size:
        raise TokenizerError(
            f"{where}: tokenizer.ggml.tokens and token_type are not lists of one length and at most {vocab_size} entries"
        )
    tokens = {i: (text, kind) for i, (text, kind) in enumerate(zip(texts, kinds, strict=True)) if kind != UNUSED}
    if len({text for text, _ in tokens.values()}) != len(tokens) or not all(type(t) is str for t, _ in tokens.values()):
        raise TokenizerError(f"{where}: tokenizer.ggml.tokens names a token twice, or holds something else than texts")
    return tokens


def _read_whole(text: Any, tokens: Mapping[int, tuple[str, int]], where: str) -> Tokenizer:
    """The tokenizer.json in a file. Raises TokenizerError unless its vocabulary is the one that the file lists."""
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise TokenizerError(f"{where}: {WHOLE} is not a tokenizer.json that `tokenizers` reads: {error}") from None
    if backend.get_vocab() != {text: index for index, (text, _) in tokens.items()}:
        raise TokenizerError(f"{where}: {WHOLE} and tokenizer.ggml.tokens are different vocabularies; export it again")
    return backend


def _rebuilt(found: Mapping[str, Any], tokens: Mapping[int, tuple[str, int]], where: str) -> Tokenizer:
    """GPT-NeoX's kind of tokenizer from tokens and merges, with the family's NFC, for which GGUF has no key."""
    if (splitter := found.get("pre", "default")) not in SPLITTERS:
        raise TokenizerError(
            f"{where}: tokenizer.ggml.pre is {splitter!r}, expected {', '.join(SPLITTERS)}: another way of splitting text"
        )
    if found.get("add_space_prefix"):
        raise TokenizerError(f"{where}: tokenizer.ggml.add_space_prefix is set, which byte-level tokenizers here lack")
    added = {i: (text, kind) for i, (text, kind) in tokens.items() if kind in (CONTROL, USER_DEFINED)}
    last = max((i for i in tokens if i not in added), default=-1)
    vocabulary = {text: i for i, (text, _) in tokens.items() if i < last or i not in added}
    try:
        merges = [tuple(merge.split(" ")) for merge in found.get("merges", [])]
        backend = Tokenizer(models.BPE(vocabulary, merges))
        backend.normalizer, backend.decoder = normalizers.NFC(), decoders.ByteLevel()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.add_tokens(
            [
                AddedToken(text, special=kind == CONTROL, normalized=kind != CONTROL)
                for _, (text, kind) in sorted(added.items())
            ]
        )
        around = [tokens[found[f"{n}_token_id"]][0] if found.get(f"add_{n}_token") else None for n in ("bos", "eos")]
    except Exception as error:  # `tokenizers` raises bare Exception
        raise TokenizerError(f"{where}: tokenizer.ggml.tokens and merges make no tokenizer: {error!r}") from None
    if backend.get_vocab() != {text: index for index, (text, _) in tokens.items()}:
        raise TokenizerError(
            f"{where}: tokenizer.ggml.tokens leaves ids out before an added token; nothing restores that"
        )
    if any(around):
        single = [around[0], "$A", around[1]]
        backend.post_processor = processors.TemplateProcessing(
            single=[part for part in single if part],
            pair=["$A", "$B:1"],  # never used
            special_tokens=[(token, backend.token_to_id(token)) for token in {*around} if token],
        )
    return backend
