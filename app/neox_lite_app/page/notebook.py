"""The Notebook: a text that the model continues. Knows no conversation."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import gradio as gr

from neox_lite.errors import ArgumentError, NeoxLiteError

from ..conversations.turn import room_for_answer
from ..serving.engine import Engine
from ..serving.jobs import Job
from .components import part
from .events import PageEvent, Running, Updates, as_sentence, listen
from .settings import options_of
from .stream import ALTERNATIVES, Spans, batches, meter

MAX_SCORED = 100_000  # characters of a text that is scored


def build() -> gr.HTML:
    """Lay the tab out."""
    return part("notebook", ("complete", "score", "stop"))


def wire(engine: Engine, page: gr.HTML, running: Running) -> None:
    """Say which event goes where."""

    async def complete(event: PageEvent) -> Updates:
        async with aclosing(_ended(_complete(engine, running, event))) as updates:
            async for update in updates:
                yield update

    async def score(event: PageEvent) -> Updates:
        async with aclosing(_ended(_score(engine, event))) as updates:
            async for update in updates:
                yield update

    async def stop(event: PageEvent) -> Updates:
        running.stop(event.session, "notebook")
        yield {}

    listen(page, "complete", complete)
    listen(page, "score", score)
    listen(page, "stop", stop)


async def _ended(updates: Updates) -> Updates:
    """Updates that end also where they break off, so that the browser never waits for more."""
    try:
        async with aclosing(updates) as found:
            async for update in found:
                yield update
    except Exception:
        yield {"completion": {"end": "error"}}
        raise


async def _complete(engine: Engine, running: Running, event: PageEvent) -> Updates:
    """A text that goes on, as it comes."""
    text, scores, session = event.text("text"), bool(event.data.get("scores")), event.session
    options, tokenizer, context = options_of(event.settings), engine.tokenizer, engine.context
    ids: list[int] = await asyncio.to_thread(lambda: list(tokenizer(text).input_ids))
    room = room_for_answer(options.get("max_new_tokens"), context)
    if len(ids) > context - room:
        ids = ids[room - context :]
        yield {
            "notice": f"The text is longer than the context of {context:,} tokens: the model sees its last {len(ids):,}."
        }
    if "max_new_tokens" in options:
        options["max_new_tokens"] = min(options["max_new_tokens"], context - len(ids))
    ticket = engine.submit(Job(ids, options, client=session, logprobs=ALTERNATIVES if scores else None))
    running.start(session, "notebook", ticket)
    spans = Spans(tokenizer)
    try:
        async with aclosing(batches(ticket)) as arriving:
            async for updates in arriving:
                last, chosen = (
                    updates[-1],
                    [(update.token, update.logprob) for update in updates if update.token is not None],
                )
                completion: dict[str, Any] = {
                    "text": "".join(update.text for update in updates),
                    "end": last.finish_reason,
                }
                if scores:
                    completion["spans"] = [span for token, score in chosen for span in spans.add(token, score)]
                notice = {"notice": as_sentence(last.error)} if last.error is not None else {}
                yield {"completion": completion, "meter": meter(ticket, context), **notice}
    finally:
        running.end(session, "notebook", ticket)


async def _score(engine: Engine, event: PageEvent) -> Updates:
    """The probabilities of a text's own tokens."""
    text, tokenizer, context = event.text("text"), engine.tokenizer, engine.context
    if len(text) > MAX_SCORED:
        raise ArgumentError(f"the text has {len(text):,} characters; at most {MAX_SCORED:,} can be scored")
    ids: list[int] = await asyncio.to_thread(lambda: list(tokenizer(text).input_ids))
    if not 0 < len(ids) < context:
        raise ArgumentError(f"the text has {len(ids):,} tokens; 1 to {context - 1:,} can be scored")
    ticket = engine.submit(Job(ids, {"max_new_tokens": 1}, client=event.session, prompt_logprobs=ALTERNATIVES))
    async with aclosing(batches(ticket)) as arriving:
        async for updates in arriving:
            if updates[-1].error is not None:
                raise NeoxLiteError(updates[-1].error)
    spans = Spans(tokenizer)
    scored = [span for id, score in zip(ids, ticket.prompt_logprobs, strict=True) for span in spans.add(id, score)]
    yield {"completion": {"spans": scored, "end": "stop"}}
