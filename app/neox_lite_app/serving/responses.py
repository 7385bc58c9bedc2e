"""Steps of the engine -> OpenAI's JSON: texts, log-probabilities, usage, chunks. Knows no HTTP and starts no job."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import decoders

from neox_lite import GPTNeoXTokenizerFast
from neox_lite.generation.sampling import TokenLogprob
from neox_lite.tokenizer import StreamDecoder, token_bytes

from ..conversations.prompt_forms import Reader
from .engine import Ticket, Update

KNOWN_TOKENS = 1 << 16
MIN_LOGPROB = -9999.0  # JSON has no -Infinity; OpenAI writes this


class Tokens:
    """How single tokens are written."""

    def __init__(self, tokenizer: GPTNeoXTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._byte_level = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
        self.bytes = lru_cache(KNOWN_TOKENS)(self._bytes)  # the likeliest tokens come again and again
        self.text = lru_cache(KNOWN_TOKENS)(self._text)

    def _bytes(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # the model's vocabulary is padded
            return b""
        return token_bytes(name) if self._byte_level else self._tokenizer.decode([token]).encode()

    def _text(self, token: int) -> str:
        """Its text; for a part of a character OpenAI's notation of bytes."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class ScoredToken(NamedTuple):
    """A token to report. offset: where its text starts."""

    token: int
    score: TokenLogprob
    offset: int


Scored = list[ScoredToken]


@dataclass
class Choice:
    """One answer as it comes. prompt_text: what echo shows, None without; top: None, or how many likeliest ids to report.

    reader: tidies the text of a chat's answer.
    """

    index: int
    ticket: Ticket
    tokenizer: GPTNeoXTokenizerFast
    prompt_text: str | None
    top: int | None
    reader: Reader | None
    tokens: int = 0
    finish_reason: str | None = None
    _length: int = 0  # characters before the next token's text
    _begun: bool = False

    def __post_init__(self) -> None:
        self._decoder = StreamDecoder(self.tokenizer, skip_special_tokens=True)

    def take(self, step: Update) -> tuple[str, Scored]:
        """What a step adds to the answer: text, and tokens to report."""
        text, scored = ("", []) if self._begun else self._prompt()
        self._begun, self.finish_reason = True, step.finish_reason
        if step.token is not None:
            self.tokens += 1
            if self.top is not None and step.logprob is not None:
                scored.append(ScoredToken(step.token, step.logprob, self._length))
                self._length += len(self._decoder.put(step.token))
        return text + self._tidy(step), scored

    def _tidy(self, step: Update) -> str:
        if self.reader is None:
            return step.text
        text = self.reader.put(step.text)
        return text if step.finish_reason is None else text + self.reader.end(step.finish_reason)

    def _prompt(self) -> tuple[str, Scored]:
        """What echo puts before the answer; the engine has it with the first step."""
        if self.prompt_text is None:
            return "", []
        scored, decoder = [], StreamDecoder(self.tokenizer)
        if self.top is not None:
            for token, score in zip(self.ticket.job.prompt, self.ticket.prompt_logprobs, strict=True):
                scored.append(ScoredToken(token, score, self._length))
                self._length += len(decoder.put(token))
        self._length = len(self.prompt_text)
        return self.prompt_text, scored


class Completions:
    """The shapes of /v1/completions."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def choice(self, index: int, text: str, scored: Scored | None, finish_reason: str | None) -> dict[str, Any]:
        logprobs = None if scored is None else self._logprobs(scored)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    delta = choice

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def _logprobs(self, scored: Scored) -> dict[str, Any]:
        text = self._tokens.text
        tops = [
            None
            if score.logprob is None
            else {text(i): _finite(p) for i, p in score.top} | {text(token): _finite(score.logprob)}
            for token, score, _ in scored
        ]
        return {
            "tokens": [text(token) for token, _, _ in scored],
            "token_logprobs": [None if score.logprob is None else _finite(score.logprob) for _, score, _ in scored],
            "top_logprobs": tops,
            "text_offset": [offset for _, _, offset in scored],
        }


class Chats:
    """The shapes of /v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def choice(self, index: int, text: str, scored: Scored | None, finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(scored),
            "finish_reason": finish_reason,
        }

    def delta(self, index: int, text: str, scored: Scored | None, finish_reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text or scored else {}
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(scored),
            "finish_reason": finish_reason,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, scored: Scored | None) -> dict[str, Any] | None:
        if scored is None:
            return None
        content = [
            {**self._entry(token, score.logprob), "top_logprobs": [self._entry(i, p) for i, p in score.top]}
            for token, score, _ in scored
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = self._tokens.bytes(token)
        return {"token": self._tokens.text(token), "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is None else max(logprob, MIN_LOGPROB)


class Envelope:
    """What stands around the choices of one request."""

    def __init__(self, shapes: Completions | Chats, model: str, fingerprint: str) -> None:
        self._shapes = shapes
        self._head = {"id": f"{shapes.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._head["system_fingerprint"] = fingerprint

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self._shapes.whole, "choices": choices, "usage": usage}

    def chunks(self, usage_too: bool) -> Callable[[list[dict[str, Any]]], bytes]:
        """How choices become an event; with usage_too, OpenAI sends usage: null with all but the last."""
        head = {**self._head, "object": self._shapes.chunk, **({"usage": None} if usage_too else {})}
        return lambda choices: event({**head, "choices": choices})

    def usage(self, usage: dict[str, Any]) -> bytes:
        return event({**self._head, "object": self._shapes.chunk, "choices": [], "usage": usage})


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event. JSON in ASCII: no line separator of Unicode can break the framing."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def usage(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """Tokens of a request; n choices share each prompt, which counts once."""
    prompts = [choice.ticket for choice in choices[::n]]
    prompt, new = sum(len(t.job.prompt) for t in prompts), sum(choice.tokens for choice in choices)
    cached = sum(ticket.reused_tokens for ticket in prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
