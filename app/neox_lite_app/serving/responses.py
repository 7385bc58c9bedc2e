"""Updates of jobs -> OpenAI's JSON: texts, log-probabilities, usage, chunks. Knows no HTTP and starts no job."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from neox_lite import GPTNeoXTokenizerFast
from neox_lite.generation.sampling import TokenLogprob
from neox_lite.tokenizer import StreamDecoder, is_byte_level, token_bytes

from ..conversations.prompt_forms import Reader
from .jobs import Ticket, Update

KNOWN_TOKENS = 1 << 16
MIN_LOGPROB = -9999.0  # JSON has no -Infinity; OpenAI writes this


class Tokens:
    """How single tokens are written."""

    def __init__(self, tokenizer: GPTNeoXTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._byte_level = is_byte_level(tokenizer.backend_tokenizer.decoder)
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

    reader: tidies the text of a chat's answer. last_s: when its last token came.
    """

    index: int
    ticket: Ticket
    tokenizer: GPTNeoXTokenizerFast
    prompt_text: str | None
    top: int | None
    reader: Reader | None
    tokens: int = 0
    finish_reason: str | None = None
    last_s: float | None = None
    _length: int = 0  # characters before the next token's text
    _begun: bool = False

    def __post_init__(self) -> None:
        self._decoder = StreamDecoder(self.tokenizer, skip_special_tokens=True)

    def take(self, update: Update) -> tuple[str, Scored]:
        """What an update adds to the answer: text, and tokens to report."""
        text, scored = ("", []) if self._begun or self.prompt_text is None else self._prompt(self.prompt_text)
        self._begun, self.finish_reason = True, update.finish_reason
        if update.token is not None:
            self.tokens += 1
            if self.top is not None and update.logprob is not None:
                scored.append(ScoredToken(update.token, update.logprob, self._length))
                self._length += len(self._decoder.put(update.token))
        if self.reader is None:
            return text + update.text, scored
        text += self.reader.put(update.text)
        return (text if update.finish_reason is None else text + self.reader.end(update.finish_reason)), scored

    def _prompt(self, text: str) -> tuple[str, Scored]:
        """What echo puts before the answer; the engine has it with the first update."""
        scored, decoder = [], StreamDecoder(self.tokenizer)
        if self.top is not None:
            for token, score in zip(self.ticket.job.prompt, self.ticket.prompt_logprobs, strict=True):
                scored.append(ScoredToken(token, score, self._length))
                self._length += len(decoder.put(token))
        self._length = len(text)
        return text, scored


class Responses:
    """What stands around the choices of one request. tokens: of the loaded model, which clients call `model`."""

    prefix, whole_kind, chunk_kind = "", "", ""

    def __init__(self, tokens: Tokens, model: str, fingerprint: str, include_usage: bool) -> None:
        self._tokens, self._include_usage = tokens, include_usage
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._head["system_fingerprint"] = fingerprint

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": usage}

    def chunk(self, choice: dict[str, Any]) -> bytes:
        """A choice's part as an event; where usage is asked for, OpenAI sends usage: null with all but the last."""
        without = {"usage": None} if self._include_usage else {}
        return event({**self._head, "object": self.chunk_kind, **without, "choices": [choice]})

    def last_chunk(self, usage: dict[str, Any]) -> bytes:
        """The end of a stream, with its usage where that is asked for."""
        last = event({**self._head, "object": self.chunk_kind, "choices": [], "usage": usage})
        return (last if self._include_usage else b"") + b"data: [DONE]\n\n"

    def choice(self, index: int, text: str, scored: Scored | None, finish_reason: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, index: int, text: str, scored: Scored | None, finish_reason: str | None) -> dict[str, Any]:
        """A choice as a part of a stream."""
        return self.choice(index, text, scored, finish_reason)

    def opening(self, index: int) -> bytes:
        """What comes before the first part of a choice."""
        return b""


class Completions(Responses):
    """The shapes of /v1/completions."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, scored: Scored | None, finish_reason: str | None) -> dict[str, Any]:
        logprobs = None if scored is None else self._logprobs(scored)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

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


class Chats(Responses):
    """The shapes of /v1/chat/completions."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, scored: Scored | None, finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": None if scored is None else self._logprobs(scored),
            "finish_reason": finish_reason,
        }

    def delta(self, index: int, text: str, scored: Scored | None, finish_reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text or scored else {}
        return {
            "index": index,
            "delta": delta,
            "logprobs": None if scored is None else self._logprobs(scored),
            "finish_reason": finish_reason,
        }

    def opening(self, index: int) -> bytes:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self.chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def _logprobs(self, scored: Scored) -> dict[str, Any]:
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
