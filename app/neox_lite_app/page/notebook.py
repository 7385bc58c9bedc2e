"""The Notebook: a text that the model continues. Knows no conversation."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

import gradio as gr

from neox_lite.errors import NeoxLiteError

from ..engine import Engine, Job
from .components import part
from .events import Handler, Running, Said, Update, listen, sentence
from .settings import options_of
from .stream import ALTERNATIVES, Feed, Meter, Spans, batches

MOST_SCORED = 100_000  # characters of a text that is scored


class Book(NamedTuple):
    """The tab's parts."""

    page: gr.HTML
    feed: gr.HTML


def build() -> Book:
    """Lay the tab out."""
    return Book(part("notebook", emits=("complete", "score", "stop")), part("notebook-feed"))


def wire(engine: Engine, book: Book, effects: gr.HTML, running: Running) -> None:
    """Say which event goes where."""
    page, feed = book

    def feeding(lines: Callable[[Said], AsyncGenerator[dict[str, Any], None]]) -> Handler:
        async def handler(said: Said) -> AsyncGenerator[Update, None]:
            async with aclosing(_ended(lines(said))) as values:
                async for value in values:
                    yield {feed: value}

        return handler

    async def stop(said: Said) -> AsyncGenerator[Update, None]:
        running.stop(said.session, "notebook")
        yield {}

    listen(page.complete, feeding(lambda said: _complete(engine, running, said)), [feed], effects)
    listen(page.score, feeding(lambda said: _score(engine, said)), [feed], effects)
    listen(page.stop, stop, [feed], effects)


async def _ended(answer: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[str, None]:
    """The texts of a feed; one that breaks off ends with its error, so that the browser never waits for more."""
    feed = Feed(id=secrets.token_hex(8))
    try:
        async with aclosing(answer) as lines:
            async for line in lines:
                yield feed.add(**line)
    except NeoxLiteError as error:
        yield feed.add(error=sentence(error), end="error")
    except Exception:
        yield feed.add(end="error")
        raise


async def _complete(engine: Engine, running: Running, said: Said) -> AsyncGenerator[dict[str, Any], None]:
    """The lines of a feed that continue a text."""
    text, scores, session = said.text("text"), bool(said.data.get("scores")), said.session
    options, tokenizer, context = options_of(said.settings), engine.tokenizer, engine.context
    ids: list[int] = await asyncio.to_thread(lambda: list(tokenizer(text).input_ids))
    new = min(options.get("max_new_tokens", context // 4), context // 2)
    if len(ids) > context - new:
        ids = ids[new - context :]
        note = f"The text is longer than the context of {context:,} tokens: the model sees its last {len(ids):,}."
        yield {"error": note}
    if "max_new_tokens" in options:
        options["max_new_tokens"] = min(options["max_new_tokens"], context - len(ids))
    ticket = engine.submit(Job(ids, options, client=session, scores=ALTERNATIVES if scores else None))
    running.start(session, "notebook", ticket)
    meter, spans = Meter(ticket, context), Spans(tokenizer)
    try:
        async with aclosing(batches(ticket)) as steps_of:
            async for steps in steps_of:
                meter.count(steps)
                line: dict[str, Any] = {"text": "".join(step.text for step in steps), "meter": meter.figures}
                if scores:
                    line["spans"] = [
                        s for step in steps if step.token is not None for s in spans.add(step.token, step.score)
                    ]
                if (last := steps[-1]).finish_reason is not None:
                    line["end"] = last.finish_reason
                    if last.error is not None:
                        line["error"] = sentence(NeoxLiteError(last.error))
                yield line
    finally:
        running.end(session, "notebook", ticket)


async def _score(engine: Engine, said: Said) -> AsyncGenerator[dict[str, Any], None]:
    """One line with the probabilities of a text's own tokens."""
    text = said.text("text")
    if len(text) > MOST_SCORED:
        yield {
            "error": f"The text has {len(text):,} characters; at most {MOST_SCORED:,} can be scored.",
            "end": "error",
        }
        return
    tokenizer, context = engine.tokenizer, engine.context
    ids: list[int] = await asyncio.to_thread(lambda: list(tokenizer(text).input_ids))
    if not 0 < len(ids) < context:
        problem = f"The text has {len(ids):,} tokens; 1 to {context - 1:,} can be scored."
        yield {"error": problem, "end": "error"}
        return
    ticket = engine.submit(Job(ids, {"max_new_tokens": 1}, client=said.session, prompt_scores=ALTERNATIVES))
    async with aclosing(batches(ticket)) as steps_of:
        async for steps in steps_of:
            if steps[-1].error is not None:
                yield {"error": sentence(NeoxLiteError(steps[-1].error)), "end": "error"}
                return
    spans = Spans(tokenizer)
    scored = [span for id, score in zip(ids, ticket.prompt_scores, strict=True) for span in spans.add(id, score)]
    yield {"spans": scored, "end": "stop"}
