"""What every handler of the page shares: what the browser sent, errors as sentences, and the jobs that a browser tab runs.

All that a handler depends on comes with its event, as JSON that a part made: nothing of a browser tab is kept between two.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from neox_lite.errors import ArgumentError, NeoxLiteError

from ..serving.jobs import Ticket
from .components import part
from .stream import Feed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PageEvent:
    """What a part sent with its event. session: the browser tab that sent it."""

    data: dict[str, Any]
    session: str

    def text(self, name: str) -> str:
        value = self.data.get(name)
        if not isinstance(value, str):
            raise ArgumentError(f"the page sent no {name}; reload it")
        return value

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling controls, as `options_of` reads them."""
        value = self.data.get("settings")
        return value if isinstance(value, dict) else {}


# What one line of an answer brings to the browser: a value for each kind of update, as JSON.
PageUpdate = dict[str, Any]
Updates = AsyncGenerator[PageUpdate, None]
Handler = Callable[[PageEvent], Updates]


def listen(place: gr.HTML, name: str, handler: Handler) -> None:
    """Answer an event of a part; errors become notices on the page.

    Each event has a part of its own for its answers, for two reasons. Of several values that a part is given between two
    frames Gradio shows the last; and each part beside that a handler could write to would cost it a millisecond an update.
    """
    reply = part("reply", name=f"{place.elem_id}-{name}")

    async def run(sent: gr.EventData, request: gr.Request) -> AsyncGenerator[str, None]:
        event, feed = PageEvent(sent._data if isinstance(sent._data, dict) else {}, request.session_hash or ""), Feed()
        try:
            async with aclosing(handler(event)) as updates:
                async for update in updates:
                    yield feed.add(update)
        except Exception as error:
            foreseen = isinstance(error, NeoxLiteError)
            if not foreseen:
                log.exception("the page could not handle an event")
            notice = sentence(error) if foreseen else unforeseen(error)
            yield feed.add({"notice": notice, "refused": {"request": event.data.get("request")}})

    # By itself Gradio drops what comes while an earlier event of the same kind is being answered.
    options: Any = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "multiple"}
    getattr(place, name)(run, None, [reply], **options)


def sentence(error: BaseException) -> str:
    """An error of ours as people read it."""
    return as_sentence(str(error)) or f"{type(error).__name__}."


def as_sentence(text: str) -> str:
    """A line of ours as people read it: a capital, if it begins with a word and no name, a full stop, no line breaks."""
    text = " ".join(text.split())
    if not text:
        return ""
    word = text.partition(" ")[0]
    start = word.capitalize() if word.isalpha() and word.islower() else word
    return start + text[len(word) :] + ("" if text.endswith((".", "!", "?")) else ".")


def unforeseen(error: BaseException) -> str:
    return f"Something went wrong that should not ({type(error).__name__}); the terminal of neox-lite says more."


class Running:
    """The job of each browser tab's chat and notebook, and what it writes there: so that it can be stopped, and shown anew."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[str, str], tuple[Ticket, str]] = {}

    def start(self, session: str, place: str, ticket: Ticket, writes: str = "") -> None:
        """writes: the id of the message that the job writes."""
        self.stop(session, place)
        self._jobs[session, place] = ticket, writes

    def end(self, session: str, place: str, ticket: Ticket) -> None:
        if self._jobs.get((session, place), (None, ""))[0] is ticket:
            del self._jobs[session, place]

    def written(self, session: str, place: str) -> str | None:
        """What the job under way writes; None without one."""
        return self._jobs.get((session, place), (None, None))[1]

    def stop(self, session: str, place: str) -> None:
        if (job := self._jobs.get((session, place))) is not None:
            job[0].cancel()

    def leave(self, session: str) -> None:
        """A tab was closed."""
        for place in ("chat", "notebook"):
            self.stop(session, place)
