"""Special tokens that people write in messages: kept apart from those of the form, and encoded as plain text. Knows no form."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer

from neox_lite.tokenizer import GPTNeoXTokenizerFast


class Hiding:
    """Puts signs that no text holds in place of what looks like a special token, until the prompt is rendered."""

    def __init__(self, control: Mapping[str, AddedToken], texts: Sequence[str]) -> None:
        self.found: list[str] = []
        self._tokens = sorted(control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._tokens)) or "(?!)")
        (self._sign,) = unused("".join(texts), 1)

    def hide(self, text: Any) -> Any:
        """Also the beginning of a token at the end of the text, which the form could complete."""
        if not isinstance(text, str):
            return text
        text = self._pattern.sub(lambda found: self._keep(found[0]), text)
        tail = open_end(text, self._tokens)
        return text[: len(text) - tail] + self._keep(text[len(text) - tail :]) if tail else text

    def parts(self, prompt: str) -> Iterator[tuple[str, bool]]:
        """The rendered prompt as (text, whether it may hold special tokens)."""
        for number, text in enumerate(re.split(f"{self._sign}([0-9]+){self._sign}", prompt)):
            yield (self.found[int(text)], False) if number % 2 else (text, True)

    def _keep(self, text: str) -> str:
        self.found.append(text)
        return f"{self._sign}{len(self.found) - 1}{self._sign}"


def counts(control: Mapping[str, AddedToken], parts: Sequence[tuple[str, bool]]) -> Counter[str]:
    """How many of each control token the parts hold that may hold some."""
    pattern = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")
    return Counter(token for text, may in parts if may for token in pattern.findall(text))


def encode_parts(
    tokenizer: GPTNeoXTokenizerFast, control: Mapping[str, AddedToken], parts: Iterator[tuple[str, bool]]
) -> list[int]:
    """Ids of a prompt of which only some parts may hold special tokens. Between those, text is encoded as one."""
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(control, key=len, reverse=True))) + ")")
    pieces = [""]  # text, token, text, token, …, text
    for text, may in parts:
        first, *rest = pattern.split(text) if may else [text]
        pieces[-1] += first
        pieces += rest
    plain, ids = _plain(tokenizer, frozenset(control)), list[int]()
    for number, piece in enumerate(pieces):
        if number % 2:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
            continue
        if number and control[pieces[number - 1]].rstrip:
            piece = piece.lstrip()
        if number + 1 < len(pieces) and control[pieces[number + 1]].lstrip:
            piece = piece.rstrip()
        ids += plain.encode(piece, add_special_tokens=False).ids
    return ids


_plain_tokenizers: WeakKeyDictionary[GPTNeoXTokenizerFast, dict[frozenset[str], Tokenizer]] = WeakKeyDictionary()


def _plain(tokenizer: GPTNeoXTokenizerFast, control: frozenset[str]) -> Tokenizer:
    """The same tokenizer, to which control tokens are text like any other. The tokenizer's own must not be changed."""
    known = _plain_tokenizers.setdefault(tokenizer, {})
    if control not in known:
        value = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in value["added_tokens"]:
            token["special"] = token["special"] or token["content"] in control
        known[control] = Tokenizer.from_str(json.dumps(value))
        known[control].encode_special_tokens = True
    return known[control]


def open_end(text: str, tokens: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of one of the tokens."""
    ends = (
        size for token in tokens for size in range(min(len(token) - 1, len(text)), 0, -1) if text.endswith(token[:size])
    )
    return max(ends, default=0)


def unused(text: str, count: int) -> list[str]:
    """Characters of a private range that the text does not hold."""
    free: Callable[[str], bool] = lambda sign: sign not in text  # noqa: E731
    signs = filter(free, map(chr, range(0xF0000, 0xFFFFE)))
    return [next(signs) for _ in range(count)]
