"""What every handler of the page shares: the data of an event, errors as sentences, and the jobs that a browser tab runs."""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import gradio as gr

from neox_lite.errors import ArgumentError, NeoxLiteError

from ..engine import Ticket

Update = dict[Any, Any]  # component -> its new value; others stay as they are
Handler = Callable[..., AsyncGenerator[Update, None]]
log = logging.getLogger(__name__)


def effect(do: str, **what: Any) -> dict[str, Any]:
    """Something that the browser is to do once, as the value of the part `effects`."""
    return {"do": do, "id": secrets.token_hex(8), **what}


def in_sentences(effects: gr.HTML) -> Callable[[Handler], Handler]:
    """Errors of a handler become notices on the page; those that nobody foresaw are logged whole."""

    def around(handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def run(*args: Any) -> AsyncGenerator[Update, None]:
            try:
                async with aclosing(handler(*args)) as updates:
                    async for update in updates:
                        yield update
            except NeoxLiteError as error:
                yield {effects: effect("notice", text=sentence(error))}
            except Exception as error:
                log.exception("the page could not handle an event")
                yield {effects: effect("notice", text=unforeseen(error))}

        return run

    return around


def sentence(error: BaseException) -> str:
    """An error of ours as people read it: a capital, if it begins with a word and no name, a full stop, no line breaks."""
    text = " ".join(str(error).split()) or type(error).__name__
    word = text.partition(" ")[0]
    start = word.capitalize() if word.isalpha() and word.islower() else word
    return start + text[len(word) :] + ("" if text.endswith((".", "!", "?")) else ".")


def unforeseen(error: BaseException) -> str:
    return f"Something went wrong that should not ({type(error).__name__}); the terminal of neox-lite says more."


def told(event: gr.EventData) -> dict[str, Any]:
    """What a part sent with its event."""
    return event._data if isinstance(event._data, dict) else {}


def text_of(event: gr.EventData, name: str) -> str:
    value = told(event).get(name)
    if not isinstance(value, str):
        raise ArgumentError(f"the page sent no {name}; reload it")
    return value


class Running:
    """What each browser tab is at: the job of its chat and its notebook, so that it can be stopped, and its conversation."""

    def __init__(self) -> None:
        self._tickets: dict[tuple[str, str], Ticket] = {}
        self._shown: dict[str, str] = {}

    def start(self, session: str, place: str, ticket: Ticket) -> None:
        self.stop(session, place)
        self._tickets[session, place] = ticket

    def end(self, session: str, place: str, ticket: Ticket) -> None:
        if self._tickets.get((session, place)) is ticket:
            del self._tickets[session, place]

    def stop(self, session: str, place: str) -> None:
        if (ticket := self._tickets.get((session, place))) is not None:
            ticket.cancel()

    def show(self, session: str, conversation: str) -> None:
        """A tab shows another conversation, to which answers that end now must not bring back the one before."""
        self._shown[session] = conversation

    def shown(self, session: str) -> str | None:
        return self._shown.get(session)

    def leave(self, session: str) -> None:
        """A tab was closed."""
        self._shown.pop(session, None)
        for place in ("chat", "notebook"):
            self.stop(session, place)
