"""From a ticket of the engine to what the browser is sent: an append-only text of JSON lines. Knows no page and no Gradio.

Gradio sends a browser only what a generator's text grew by, so an update costs the same however long the answer is.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from collections.abc import AsyncGenerator
from typing import Any

from neox_lite import GPTNeoXTokenizerFast
from neox_lite.generation.sampling import TokenLogprob
from neox_lite.tokenizer import StreamDecoder

from ..serving.jobs import Ticket, Update

SECONDS = 0.1  # between two updates, at least
ALTERNATIVES = 5  # likeliest tokens that are shown beside the one that was chosen


async def batches(ticket: Ticket, seconds: float = SECONDS) -> AsyncGenerator[list[Update], None]:
    """A ticket's updates as they come, those within `seconds` together. Closed early, the job is cancelled."""
    loop, updates = asyncio.get_running_loop(), aiter(ticket)
    coming: asyncio.Future[Update] = asyncio.ensure_future(anext(updates))
    sent, batch = -math.inf, list[Update]()
    try:
        while not batch or batch[-1].finish_reason is None:
            wait = max(0.0, sent + seconds - loop.time()) if batch else None
            await asyncio.wait({coming}, timeout=wait)
            if coming.done():
                batch.append(coming.result())
                if batch[-1].finish_reason is None:
                    coming = asyncio.ensure_future(anext(updates))
            if batch and (batch[-1].finish_reason is not None or loop.time() >= sent + seconds):
                yield batch
                if batch[-1].finish_reason is not None:
                    return
                sent, batch = loop.time(), []
    finally:
        ticket.cancel()
        coming.cancel()


class Feed:
    """What the browser is sent in answer to one event, growing at its end only. value: the whole of it so far."""

    def __init__(self) -> None:
        self.value = json.dumps({"event": secrets.token_hex(8)}) + "\n"

    def add(self, update: dict[str, Any]) -> str:
        self.value += json.dumps(update, separators=(",", ":")) + "\n"
        return self.value


def meter(ticket: Ticket, context: int) -> dict[str, Any]:
    """What the status strip says of a job: time to its first token, tokens a second, tokens of the context."""
    clock = ticket.clock
    used = {"used": len(ticket.job.prompt) + clock.tokens, "context": context}
    if clock.wait_s is None:
        return used
    rate = None if clock.tokens_per_s is None else round(clock.tokens_per_s, 1)
    return {
        **used,
        "tokens": clock.tokens,
        "first": round(clock.wait_s, 3),
        "rate": rate,
        "reused": ticket.reused_tokens,
    }


class Spans:
    """Tokens with their probabilities as [text, probability, [[text, probability], …]], those of one character together."""

    def __init__(self, tokenizer: GPTNeoXTokenizerFast) -> None:
        self.tokenizer, self.decoder = tokenizer, StreamDecoder(tokenizer, skip_special_tokens=True)
        self.open: TokenLogprob | None = None  # of the first token of a character that is not complete

    def add(self, token: int, score: TokenLogprob | None) -> list[list[Any]]:
        """The span that a token completes; none inside a character."""
        first = self.open or score
        if self.open and score and self.open.logprob is not None and score.logprob is not None:
            first = TokenLogprob(self.open.logprob + score.logprob, self.open.top)
        if not (text := self.decoder.put(token)):
            self.open = first
            return []
        self.open = None
        if first is None or first.logprob is None:
            return [[text, None, []]]
        top = [[self.tokenizer.decode([id]), _share(logprob)] for id, logprob in first.top]
        return [[text, _share(first.logprob), top]]


def _share(logprob: float) -> float:
    return float(f"{math.exp(min(0.0, logprob)):.3g}")
