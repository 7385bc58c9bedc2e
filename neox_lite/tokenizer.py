"""GPTNeoXTokenizerFast over `tokenizers`, and a streaming decoder; it knows no model and no prompt form.

tokenizer.json is the truth about text and ids; tokenizer_config.json and its older companions name the special tokens
and the padding. The shared backend is configured once, at load, and only read afterwards: truncation and padding happen
here, so threads may encode and decode at the same time.
"""

import codecs
import difflib
import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import ConfigError, TokenizerError
from .files import read_json, write_atomically
from .hub import OTHER_TOKENIZER_FILES, TOKENIZER_FILES, Access, fetch_files

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What transformers' GPTNeoXTokenizer assumes where the files are silent; here, only if the vocabulary has the token.
DEFAULTS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>") | {"pad_token": "<|padding|>"}
BPE_FILES = ("vocab.json", "merges.txt")  # of a tokenizer without tokenizer.json
GPT2_DEFAULTS = {name: token for name, token in DEFAULTS.items() if name != "pad_token"}
MAX_BYTES = 256 << 20  # of a JSON file; the largest vocabularies take a tenth of that
UTF8_BYTES = 4  # of a character at most
NO_LIMIT = int(1e30)  # how transformers writes "no model_max_length"; it reads anything above 1e20 so
OPTIONS = (
    *SPECIAL,
    *("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "tokenizer_class", "chat_template"),
    *("add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens", "clean_up_tokenization_spaces"),
    *("padding_side", "truncation_side", "model_max_length"),
)
REFUSED = {  # harmless as None, False or 0, and then accepted
    "trust_remote_code": "code from a repository is never run; leave it out",
    "is_split_into_words": 'word lists are not supported; join the words: " ".join(words)',
    "stride": "overlapping windows are not supported; slice input_ids",
    "return_overflowing_tokens": "overlapping windows are not supported; slice input_ids",
}
ABSENT = {  # methods that scripts call, and what to use instead
    "add_special_tokens": "no model has embeddings for new tokens; "
    "set one that exists: tokenizer.pad_token = tokenizer.eos_token",
    "add_tokens": "no model has embeddings for new tokens",
    "apply_chat_template": "`neox-lite chat` and `neox-lite serve` render templates; write the form into the text",
    "batch_encode_plus": "call tokenizer(texts, ...)",
    "encode_plus": "call tokenizer(text, ...)",
    "push_to_hub": "save_pretrained, then `neox-lite push`",
}
SIDES = {"right": "right", "left": "left"}


class BatchEncoding(dict[str, Any]):
    """What a tokenizer call returns: a dict that also reads as attributes and goes straight into model(**encoding)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"BatchEncoding has no {name!r}; it holds {', '.join(self)}") from None

    def to(self, device: Any, non_blocking: bool = False) -> "BatchEncoding":
        """Move the tensors, in place, and return self; lists and arrays stay."""
        self.update({k: v.to(device=device, non_blocking=non_blocking) for k, v in self.items() if hasattr(v, "to")})
        return self


def _special_token(name: str) -> tuple[property, property]:
    """The settable attributes tokenizer.<name> and tokenizer.<name>_id; None where the tokenizer has no such token."""

    def get_id(self: "GPTNeoXTokenizerFast") -> int | None:
        return None if name not in self._special else self._tokenizer.token_to_id(self._special[name])

    def set_token(self: "GPTNeoXTokenizerFast", value: str | None) -> None:
        if value is not None and self._tokenizer.token_to_id(check_text(value, name)) is None:
            raise TokenizerError(
                f"{name}: {value!r} is not in the vocabulary of {self.name_or_path}, and no model has an embedding for "
                "it; set a token that exists, for example tokenizer.eos_token"
            )
        self._special = {k: v for k, v in {**self._special, name: value}.items() if v is not None}

    def set_id(self: "GPTNeoXTokenizerFast", value: int | None) -> None:
        token = None if value is None else self.convert_ids_to_tokens(value)
        if token is None and value is not None:
            raise TokenizerError(
                f"{name}_id: {value} is not among the {len(self)} ids of {self.name_or_path}; set another"
            )
        set_token(self, token)

    return property(lambda self: self._special.get(name), set_token), property(get_id, set_id)


class GPTNeoXTokenizerFast:
    """Text to ids and back, with Hugging Face's names and, for the same files, the same ids and the same text.

    from_pretrained(folder_or_hub_id) is the usual way in; GPTNeoXTokenizerFast("20B_tokenizer.json") reads a lone
    tokenizer.json. The options, `OPTIONS`, are those of transformers; any other is an error.
    """

    is_fast = True
    model_input_names = ("input_ids", "attention_mask")
    bos_token, bos_token_id = _special_token("bos_token")
    eos_token, eos_token_id = _special_token("eos_token")
    unk_token, unk_token_id = _special_token("unk_token")
    sep_token, sep_token_id = _special_token("sep_token")
    pad_token, pad_token_id = _special_token("pad_token")
    cls_token, cls_token_id = _special_token("cls_token")
    mask_token, mask_token_id = _special_token("mask_token")

    def __init__(self, tokenizer_file: str | os.PathLike[str], **options: Any) -> None:
        check_arguments("GPTNeoXTokenizerFast", options, OPTIONS)
        self.name_or_path = os.fspath(tokenizer_file)
        path = Path(tokenizer_file)
        # vocab.json and merges.txt alone, as the classes of those days read them.
        lone = path.name == "tokenizer.json" and not path.exists()
        self._tokenizer = backend = bpe_backend(path.parent, not is_gpt2(options)) if lone else read_backend(path)
        baked = {"padding_side": backend.padding, "truncation_side": backend.truncation}
        backend.no_padding()
        backend.no_truncation()
        sides = {name: options.get(name, (found or {}).get("direction", "right")) for name, found in baked.items()}
        self.padding_side: str = choose("padding_side", sides["padding_side"], SIDES)
        self.truncation_side: str = choose("truncation_side", sides["truncation_side"], SIDES)
        self.model_max_length = int(options.get("model_max_length") or NO_LIMIT)
        self.chat_template: str | None = options.get("chat_template")
        backend.encode_special_tokens = bool(options.get("split_special_tokens"))
        # transformers' class for this family sets the prefix space and the template from its options, whatever
        # tokenizer.json says; its generic class, which polyglot-ko names, leaves both to the file.
        generic = is_generic(options) and not lone
        self._set_prefix_space(options.get("add_prefix_space", None if generic else False))
        self._special: dict[str, str] = {}
        self._add_tokens(options, {} if generic else GPT2_DEFAULTS if lone and is_gpt2(options) else DEFAULTS)
        if not generic or backend.post_processor is None or {"add_bos_token", "add_eos_token"} & options.keys():
            self._set_template(options)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"GPTNeoXTokenizerFast has no {name}" + (f": {ABSENT[name]}" if name in ABSENT else ""))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], revision: str | None = None, **options: Any
    ) -> "GPTNeoXTokenizerFast":
        """Read a folder, or the same files of a hub repository at `revision`. Options given here win over the files.

        The fields of `hub.Access` are options, too. use_fast has no effect: True and False give this class in transformers.
        """
        source, access = os.fspath(pretrained_model_name_or_path), Access.take(options)
        options.pop("use_fast", None)
        check_arguments("from_pretrained", options, OPTIONS)
        folder = folder_of(source, ("config.json", *TOKENIZER_FILES, *OTHER_TOKENIZER_FILES), revision, access)
        require_tokenizer_files(folder, source)
        try:
            settings = read_settings(folder)
            baked = (folder / "tokenizer.json").is_file()
            ignored = [
                n for n in ("add_bos_token", "add_eos_token") if baked and settings.pop(n, False) and n not in options
            ]
            tokenizer = cls(folder / "tokenizer.json", **(settings | options))
        except TokenizerError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError) as error:  # JSON of an unforeseen shape
            raise TokenizerError(
                f"{source}: malformed tokenizer settings ({error!r}); fetch the files again"
            ) from error
        for name in ignored:  # transformers ignores them in silence
            warnings.warn(
                f"{source}: {name} in tokenizer_config.json has no effect beside a tokenizer.json, as in "
                f"transformers 5; pass {name}=True to from_pretrained to have it",
                stacklevel=2,
            )
        tokenizer.name_or_path = source
        return tokenizer

    def _set_prefix_space(self, value: bool | None) -> None:
        pre_tokenizer = self._tokenizer.pre_tokenizer
        if value is not None and isinstance(pre_tokenizer, pre_tokenizers.ByteLevel):
            pre_tokenizer.add_prefix_space = bool(value)
        elif value:
            raise TokenizerError(
                f"add_prefix_space: {self.name_or_path} has no plain ByteLevel pre_tokenizer but "
                f"{type(pre_tokenizer).__name__}; write the space into the text"
            )

    def _add_tokens(self, options: Mapping[str, Any], defaults: Mapping[str, str]) -> None:
        """Register the tokens that the settings name; those that tokenizer.json lacks get the next ids."""
        backend = self._tokenizer
        listed = {int(i): added_token(i, t) for i, t in (options.get("added_tokens_decoder") or {}).items()}
        backend.add_tokens([listed[i] for i in sorted(listed)])
        for index, token in listed.items():
            if (found := backend.token_to_id(token.content)) != index:
                raise TokenizerError(
                    f"{self.name_or_path}: the added token {token.content!r} has id {found}, expected {index}; "
                    "the files belong to different tokenizers, fetch them again"
                )
        named = {name: added_token(name, options[name], True) for name in SPECIAL if options.get(name) is not None}
        for name in defaults.keys() - options.keys():
            if backend.token_to_id(defaults[name]) is not None:
                named[name] = added_token(name, defaults[name])
        extra = options.get("extra_special_tokens") or options.get("additional_special_tokens") or []
        extra = extra.values() if isinstance(extra, dict) else extra
        unnamed = [added_token("extra_special_tokens", token, True) for token in extra]
        registered = {token.content for token in backend.get_added_tokens_decoder().values()}
        special = [named[name] for name in SPECIAL if name in named] + unnamed
        backend.add_tokens([token for token in special if token.content not in registered])
        self._special = {name: token.content for name, token in named.items()}
        self.extra_special_tokens = [token.content for token in unnamed]

    def _set_template(self, options: Mapping[str, Any]) -> None:
        around = {"add_bos_token": "bos_token", "add_eos_token": "eos_token"}
        for option, name in around.items():
            if options.get(option) and name not in self._special:
                raise TokenizerError(f"{option}: {self.name_or_path} has no {name}; pass {name}=... as well")
        bos, eos = ([self._special[name]] if options.get(option) else [] for option, name in around.items())
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *(f"{t}:1" for t in bos), "$B:1", *(f"{t}:1" for t in eos)],
            special_tokens=[(token, self._tokenizer.token_to_id(token)) for token in {*bos, *eos}],
        )

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        **others: Any,
    ) -> BatchEncoding:
        """Encode one text or a list of them, each followed by its text_pair where those are given.

        One text without return_tensors gives flat lists, everything else (batch, tokens); an empty list gives empty
        fields. As in transformers, max_length without padding and truncation truncates.
        """
        # 1. Check the options and the texts.
        check_arguments("tokenizer", others, self.__call__.__kwdefaults__ or ())
        width, limit = self._plan(padding, truncation, max_length, pad_to_multiple_of)
        texts = list(text) if isinstance(text, (list, tuple)) else [text]
        for index, one in enumerate(texts):
            check_text(one, "text" if one is text else f"text[{index}]")
        pairs: list[Any] = [None] * len(texts)
        if text_pair is not None:
            pairs = list(text_pair) if isinstance(text_pair, (list, tuple)) else [text_pair]
            for index, one in enumerate(pairs):
                check_text(one, f"text_pair[{index}]")
            if len(pairs) != len(texts) or isinstance(text, str) != isinstance(text_pair, str):
                raise TokenizerError(f"text_pair: found {len(pairs)} for {len(texts)} texts; give each text its own")
        # 2. Encode them one at a time: after encode_batch, older versions of `tokenizers` print a warning at every os.fork().
        encodings = [
            self._tokenizer.encode(one, pair, add_special_tokens=add_special_tokens)
            for one, pair in zip(texts, pairs, strict=True)
        ]
        if text_pair is not None and limit is not None and any(len(e.ids) > limit for e in encodings):
            raise TokenizerError(
                f"text_pair: a pair has {max(len(e.ids) for e in encodings)} tokens, more than max_length {limit}, and pairs "
                "are not truncated; shorten the texts"
            )
        # 3. Collect the fields; truncate and pad them.
        fields = {
            "input_ids": "ids",
            **({"token_type_ids": "type_ids"} if return_token_type_ids else {}),
            **({"attention_mask": "attention_mask"} if return_attention_mask is not False else {}),
            **({"special_tokens_mask": "special_tokens_mask"} if return_special_tokens_mask else {}),
            **({"offset_mapping": "offsets"} if return_offsets_mapping else {}),
        }
        columns = {k: [self._cut(getattr(e, v), e, limit) for e in encodings] for k, v in fields.items()}
        self._pad_columns(columns, width, padding_side)
        if return_length:
            columns["length"] = [len(ids) for ids in columns["input_ids"]]
        if isinstance(text, str) and return_tensors is None:
            columns = {k: v if k == "length" else v[0] for k, v in columns.items()}
        return to_tensors(columns, return_tensors)

    def encode(self, text: str | Sequence[str], **options: Any) -> Any:
        """The input_ids of tokenizer(text, ...)."""
        return self(text, **options)["input_ids"]

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """The vocabulary's names of a text's tokens."""
        return self._tokenizer.encode(check_text(text, "text"), add_special_tokens=add_special_tokens).tokens

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pad what is encoded already: one encoding, a batch of them, or a list of single encodings."""
        if not isinstance(encoded_inputs, Mapping):
            first = encoded_inputs[0] if encoded_inputs else {"input_ids": []}
            encoded_inputs = {key: [one[key] for one in encoded_inputs] for key in first}
        if "input_ids" not in encoded_inputs:
            raise TokenizerError(
                f"pad: found {sorted(encoded_inputs)}, expected input_ids; pass what tokenizer(...) gave"
            )
        return_tensors = return_tensors or tensor_kind(encoded_inputs["input_ids"])
        columns = {key: to_lists(value) for key, value in encoded_inputs.items()}
        single = bool(columns["input_ids"]) and not isinstance(columns["input_ids"][0], list)
        columns = {key: [value] for key, value in columns.items()} if single else columns
        if return_attention_mask is False:
            columns.pop("attention_mask", None)
        else:
            columns.setdefault("attention_mask", [[1] * len(ids) for ids in columns["input_ids"]])
        width, _ = self._plan(padding, False, max_length, pad_to_multiple_of)
        self._pad_columns(columns, width, padding_side)
        return to_tensors({k: v[0] for k, v in columns.items()} if single else columns, return_tensors)

    def _plan(
        self, padding: Any, truncation: Any, max_length: int | None, multiple: int | None
    ) -> tuple[Callable[[list[int]], int], int | None]:
        """The caller's options as (lengths of rows -> width to pad to, or 0; maximum tokens of a row, or None)."""
        pads = {False: None, True: "longest", "longest": "longest", "max_length": "max_length", "do_not_pad": None}
        cuts = {False: False, True: True, "longest_first": True, "only_first": True, "do_not_truncate": False}
        mode = choose("padding", padding, pads)
        automatic = max_length is not None and padding is False
        cut = automatic if truncation is None else choose("truncation", truncation, cuts)
        for name, value, least in (("max_length", max_length, 0), ("pad_to_multiple_of", multiple, 1)):
            if value is not None and (not isinstance(value, int) or value < least):
                raise TokenizerError(f"{name}: found {value!r}, expected an integer of at least {least}, or None")
        limit = max_length if max_length is not None or self.model_max_length > 1e20 else self.model_max_length
        if mode == "longest" and max_length is not None and not cut:
            warnings.warn("max_length does nothing with padding=True; use padding='max_length'", stacklevel=3)
        if limit is None and (cut or mode == "max_length"):
            what = "truncation" if cut else "padding='max_length'"
            warnings.warn(f"{what} does nothing without max_length, as model_max_length is not set", stacklevel=3)
            cut, mode = False, None if mode == "max_length" else mode
        if mode and self.pad_token_id is None:
            raise TokenizerError(
                f"padding: {self.name_or_path} has no pad_token; set it: tokenizer.pad_token = tokenizer.eos_token"
            )
        if mode and cut and multiple and limit is not None and limit % multiple:
            raise TokenizerError(f"max_length: {limit} is not a multiple of pad_to_multiple_of {multiple}; make it one")

        def width(lengths: list[int]) -> int:
            target = 0 if mode is None else max(lengths, default=0) if mode == "longest" else limit or 0
            return -(-target // (multiple or 1)) * (multiple or 1)

        return width, limit if cut else None

    def _cut(self, values: Any, encoding: Any, limit: int | None) -> Any:
        """Truncate the text's tokens, never those that the template put around them."""
        if limit is None or len(values) <= limit:
            return values
        added = encoding.special_tokens_mask  # 1 only for what the template added, not for "<|endoftext|>" in the text
        head, tail = (added.index(0), added[::-1].index(0)) if 0 in added else (len(added), 0)
        if (room := limit - head - tail) < 0:
            raise TokenizerError(f"max_length: {limit} is less than the {head + tail} special tokens; raise it")
        text = values[head : len(values) - tail]
        right = choose("truncation_side", self.truncation_side, SIDES) == "right"
        return values[:head] + (text[:room] if right else text[len(text) - room :]) + values[len(values) - tail :]

    def _pad_columns(self, columns: dict[str, Any], width: Callable[[list[int]], int], side: str | None) -> None:
        """Pad the fields that have one value per token, in place."""
        right = choose("padding_side", side or self.padding_side, SIDES) == "right"
        lengths = [len(ids) for ids in columns["input_ids"]]
        target = width(lengths)
        fill = {"input_ids": self.pad_token_id, "token_type_ids": 0, "attention_mask": 0, "offset_mapping": (0, 0)}
        fill["special_tokens_mask"] = 1
        for key in fill.keys() & columns.keys():
            gaps = [[fill[key]] * (target - length) for length in lengths]
            columns[key] = [row + gap if right else gap + row for row, gap in zip(columns[key], gaps, strict=True)]

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """The text of an id or of a sequence (list, tensor, array); for a batch, the list of its rows' texts.

        As in transformers, ids that the tokenizer does not have (models pad their vocabulary) decode to nothing, and
        clean_up_tokenization_spaces, which would eat spaces, is taken and ignored.
        """
        ids = to_lists(token_ids)
        ids = ids if isinstance(ids, list) else [ids]
        if ids and isinstance(ids[0], list):
            return [self._tokenizer.decode(check_ids(row), skip_special_tokens=skip_special_tokens) for row in ids]
        return self._tokenizer.decode(check_ids(ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """decode, with a single sequence's text in a list too."""
        text = self.decode(sequences, skip_special_tokens, **options)
        return [text] if isinstance(text, str) else text

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The vocabulary's name of an id, or of each; None for an id that it does not have."""
        ids = to_lists(ids)
        if not isinstance(ids, list):
            return self._tokenizer.id_to_token(check_ids([ids])[0])
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._tokenizer.id_to_token(index) for index in check_ids(ids) if index not in skipped]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or of each; unk_token_id for a token that the vocabulary does not have."""
        if isinstance(tokens, (list, tuple)):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self._tokenizer.token_to_id(check_text(tokens, "tokens"))
        return self.unk_token_id if index is None else index

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The `tokenizers` object underneath. It is shared: do not change it."""
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """The size of the base vocabulary, without the added tokens that len(tokenizer) counts."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return self._tokenizer.get_added_tokens_decoder()

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {name: self._special[name] for name in SPECIAL if name in self._special}

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def __repr__(self) -> str:
        return f"GPTNeoXTokenizerFast({self.name_or_path!r}, {len(self)} ids, {self.special_tokens_map})"

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and, if there is one, chat_template.jinja."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            # The one class that takes tokenizer.json as it is, in every version of transformers. Version 4 would add
            # token_type_ids for it, which the model refuses.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": self.model_input_names,
            **self.special_tokens_map,
            "additional_special_tokens": self.extra_special_tokens,
            "added_tokens_decoder": {str(i): token.__getstate__() for i, token in self.added_tokens_decoder.items()},
            "split_special_tokens": self._tokenizer.encode_special_tokens,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
        }
        files = {
            "tokenizer.json": self._tokenizer.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }
        if self.chat_template is not None:
            files["chat_template.jinja"] = self.chat_template
        else:
            (folder / "chat_template.jinja").unlink(missing_ok=True)  # it would give this tokenizer another's template
        for name, text in files.items():
            write_atomically(folder / name, text)
        return tuple(str(folder / name) for name in files)


class StreamDecoder:
    """Decode one id at a time: the pieces of put(id) and of end() join to exactly tokenizer.decode(all ids).

    A piece never ends inside a UTF-8 character and never has to be taken back, and an id costs the same however long
    the text is. A byte-level token is a fixed string of bytes, so one incremental UTF-8 decoder does it; for other
    decoders (a converted sentencepiece tokenizer) each id is decoded behind the one before it.
    """

    def __init__(self, tokenizer: GPTNeoXTokenizerFast, skip_special_tokens: bool = False) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._byte_level = is_byte_level(self._backend.decoder)
        added = self._backend.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = {index for index, token in added.items() if token.special}
        self._restart()

    def _restart(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []  # the last id whose text is settled, and those behind it
        self._shown = 0  # characters of the window's text that were given out

    def put(self, token_id: Any) -> str:
        """The text that this id settles; perhaps none."""
        (index,) = check_ids([to_lists(token_id)])
        token = self._backend.id_to_token(index)
        if token is None or index in self._skipped:
            return ""
        if self._byte_level:
            return self._utf8.decode(token_bytes(token))
        self._window.append(index)
        # A byte may still become a character.
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return ""
        text = self._backend.decode(self._window, skip_special_tokens=False)
        return "" if text.endswith("\ufffd") and len(self._window) <= UTF8_BYTES else self._settle()

    def end(self) -> str:
        """The rest; afterwards the decoder is ready for a new text."""
        rest = self._utf8.decode(b"", final=True) if self._byte_level else self._settle()
        self._restart()
        return rest

    def _settle(self) -> str:
        piece = self._backend.decode(self._window, skip_special_tokens=False)[self._shown :]
        self._window = self._window[-1:]
        self._shown = len(self._backend.decode(self._window, skip_special_tokens=False))
        return piece


def is_byte_level(decoder: Any) -> bool:
    """Whether a decoder of `tokenizers` joins byte-level tokens and does nothing else, also where a list holds it."""
    if decoder is None:
        return False
    kinds = [json.loads(decoder.__getstate__())]
    while any(kind["type"] == "Sequence" for kind in kinds):
        kinds = [one for kind in kinds for one in kind.get("decoders", [kind])]
    return [kind["type"] for kind in kinds] == ["ByteLevel"]


# The byte-level alphabet of GPT-2: printable Latin-1 characters stand for themselves, U+0100... for the other bytes.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
BYTE_OF_CHAR = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}


def token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token. Trap: an added token with any character outside the alphabet is plain text."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


def folder_of(source: str, names: Sequence[str], revision: str | None, access: Access) -> Path:
    """A folder as it is, or those of the named files that a hub repository has."""
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        if revision not in (None, "main"):
            raise TokenizerError(f"revision: {revision!r} means nothing for a folder, {source}; leave it out")
        return folder
    if folder.exists() or source.startswith(".") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise TokenizerError(f"{source!r}: neither a folder nor a hub id like EleutherAI/pythia-70m; check the path")
    return fetch_files(source, names, revision, access)


def read_backend(path: Path) -> Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read as a tokenizer.json: {error}; check the path") from None
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises bare Exception
        pointer = text.startswith("version https://git-lfs")
        advice = "it is a git-lfs pointer: run git lfs pull" if pointer else "fetch the file again"
        raise TokenizerError(f"{path}: not a tokenizer.json that `tokenizers` reads: {error}; {advice}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no file. What transformers reads passes: repeated keys, for instance."""
    return read_json(path, TokenizerError, MAX_BYTES, strict=False) if path.is_file() else {}


def read_settings(folder: Path) -> dict[str, Any]:
    """The options that a folder's files ask for, under the names of `OPTIONS`."""
    config = read_object(folder / "tokenizer_config.json")
    if not config.get("tokenizer_class"):
        config["tokenizer_class"] = read_object(folder / "config.json").get("tokenizer_class")
    if config.get("auto_map"):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: auto_map names code of the repository, which is never run; remove "
            "the key if tokenizer.json alone is the tokenizer"
        )
    if "added_tokens_decoder" not in config:  # an older folder; transformers too reads these files only then
        config |= read_object(folder / "special_tokens_map.json")
        if added := read_object(folder / "added_tokens.json"):
            special = {added_token(name, config[name]).content for name in SPECIAL if config.get(name)}
            file = folder / "tokenizer.json"
            known = {token["content"] for token in read_object(file).get("added_tokens", [])}
            config["added_tokens_decoder"] = {
                index: AddedToken(text, special=text in special) for text, index in added.items() if text not in known
            }
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif isinstance(config.get("chat_template"), list):  # several templates by name
        config["chat_template"] = {t["name"]: t["template"] for t in config["chat_template"]}.get("default")
    if is_generic(config) and (folder / "tokenizer.json").is_file():
        config.pop("add_prefix_space", None)  # transformers' generic class leaves it to tokenizer.json
    return {key: config[key] for key in OPTIONS if key in config}


def require_tokenizer_files(folder: Path, source: str) -> None:
    """Raise TokenizerError for a folder without a tokenizer of a kind that is read."""
    if (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in BPE_FILES):
        return
    found = [name for name in OTHER_TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise TokenizerError(f"{source}: no tokenizer.json; copy it from the model's repository, or pass ids")
    if found[0] in BPE_FILES:
        (missing,) = set(BPE_FILES) - set(found)
        raise TokenizerError(f"{source}: found {found[0]} without {missing}; fetch the files again")
    raise TokenizerError(
        f"{source}: no tokenizer.json (found {found[0]}, but sentencepiece tokenizers are not supported); pass ids to the "
        "model, or convert once with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )


def is_gpt2(settings: Mapping[str, Any]) -> bool:
    return str(settings.get("tokenizer_class")).startswith("GPT2Tokenizer")


def bpe_backend(folder: Path, nfc: bool = True) -> Tokenizer:
    """The tokenizer of vocab.json and merges.txt, built as transformers' GPTNeoXTokenizer is; GPT2Tokenizer has no nfc."""
    vocabulary, merges = (folder / name for name in BPE_FILES)
    try:
        backend = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise TokenizerError(f"{vocabulary}: not a vocabulary with merges: {error}; fetch the files again") from None
    if nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def is_generic(settings: Mapping[str, Any]) -> bool:
    """Whether the files name another class than this family's; then tokenizer.json alone decides."""
    return (settings.get("tokenizer_class") or "GPTNeoXTokenizer").removesuffix("Fast") != "GPTNeoXTokenizer"


def added_token(name: Any, value: Any, special: bool = False) -> AddedToken:
    """A token as the JSON files write it: a string, or an object with AddedToken's fields."""
    if isinstance(value, AddedToken):
        return value
    value = {"content": value, "special": True} if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise TokenizerError(
            f"{name}: found {value!r}, expected a token or an object with its content; correct the file"
        )
    flags = {k: bool(value[k]) for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in value}
    return AddedToken(check_text(value["content"], str(name)), **(flags | ({"special": True} if special else {})))


def check_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        advice = "join words and decode bytes first, pass ids straight to the model"
        raise TokenizerError(f"{where}: found {type(text).__name__}, expected str or a list of str; {advice}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{where}: found the lone surrogate U+{ord(text[error.start]):04X} at position {error.start}, expected "
            "Unicode text; read the source with errors='replace'"
        ) from None
    return text


def check_ids(ids: list[Any]) -> list[int]:
    for position, index in enumerate(ids):
        if type(index) is not int or not 0 <= index < 2**32:
            advice = "drop ignored labels such as -100" if isinstance(index, int) else "pass int ids or an int64 tensor"
            raise TokenizerError(f"ids[{position}]: found {index!r}, expected an integer from 0 on; {advice}")
    return ids


def check_arguments(where: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise for arguments that are refused, and for unknown ones; name the nearest known one."""
    for name, value in given.items():
        if name in REFUSED and value:
            raise TokenizerError(f"{where}: {name}={value!r}: {REFUSED[name]}")
        if name not in REFUSED and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(sorted(known))}"
            raise TokenizerError(f"{where}: unknown argument {name!r}; {advice}")


def choose(name: str, value: Any, table: Mapping[Any, Any]) -> Any:
    value = getattr(value, "value", value)  # an enumeration of transformers holds the plain string
    if not isinstance(value, (bool, str)) or value not in table:
        raise TokenizerError(f"{name}: found {value!r}, expected one of {', '.join(map(repr, table))}")
    return table[value]


def tensor_kind(value: Any) -> str | None:
    """The return_tensors that gives back what came in."""
    if isinstance(value, (list, tuple)):
        return tensor_kind(value[0]) if value else None
    return {"torch": "pt", "numpy": "np"}.get(type(value).__module__.partition(".")[0])


def to_lists(value: Any) -> Any:
    """Tensors, arrays and tuples, at any depth, as lists of Python numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [to_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def to_tensors(columns: dict[str, Any], kind: Any) -> BatchEncoding:
    """int64 tensors ("pt"), arrays ("np"), or the lists as they are (None)."""
    kind = None if kind is None else choose("return_tensors", kind, {"pt": "pt", "np": "np"})
    if kind is None:
        return BatchEncoding(columns)
    lengths = {len(row) for row in columns["input_ids"] if isinstance(row, list)}
    if len(lengths) > 1:
        raise TokenizerError(
            f"return_tensors: rows have {min(lengths)} to {max(lengths)} tokens, a tensor needs rows of equal length; "
            "pass padding=True"
        )
    if kind == "np":
        import numpy

        return BatchEncoding({key: numpy.array(value, dtype=numpy.int64) for key, value in columns.items()})
    import torch

    return BatchEncoding({key: torch.tensor(value, dtype=torch.int64) for key, value in columns.items()})


class AutoTokenizer:
    """A tokenizer by the model that it belongs to. GPTNeoXTokenizerFast takes that of any model."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], revision: str | None = None, **options: Any
    ) -> GPTNeoXTokenizerFast:
        """GPTNeoXTokenizerFast.from_pretrained. Raises ConfigError where config.json names another architecture."""
        name = pretrained_model_name_or_path
        tokenizer = GPTNeoXTokenizerFast.from_pretrained(name, revision, **options)
        path = folder_of(os.fspath(name), ["config.json"], revision, Access.take(options)) / "config.json"
        kind = read_json(path, ConfigError).get("model_type", "gpt_neox") if path.is_file() else "gpt_neox"
        if kind != "gpt_neox":
            raise ConfigError(f"{path}: model_type is {kind!r}, expected 'gpt_neox', the one architecture this runs")
        return tokenizer
