"""What every handler of the page shares: what the browser said, errors as sentences, and the jobs that a browser tab runs.

All that a handler depends on comes with its event, as JSON that a part made: nothing of a browser tab is kept between two.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from neox_lite.errors import ArgumentError, NeoxLiteError

from ..engine import Ticket

Update = dict[Any, Any]  # component -> its new value; others stay as they are
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Said:
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


Handler = Callable[[Said], AsyncGenerator[Update, None]]


def listen(event: Any, handler: Handler, shown: list[gr.HTML], effects: gr.HTML) -> None:
    """Answer an event of a part with a handler's values for the parts `shown`; its errors become notices on the page."""

    async def run(sent: gr.EventData, request: gr.Request) -> AsyncGenerator[Update, None]:
        said = Said(sent._data if isinstance(sent._data, dict) else {}, request.session_hash or "")
        try:
            async with aclosing(handler(said)) as updates:
                async for update in updates:
                    yield update or gr.skip()
        except NeoxLiteError as error:
            yield {effects: effect("notice", text=sentence(error))}
        except Exception as error:  # those that nobody foresaw
            log.exception("the page could not handle an event")
            yield {effects: effect("notice", text=unforeseen(error))}

    # By itself Gradio drops what comes while an earlier event of the same kind is being answered.
    event(run, None, [*shown, effects], show_progress="hidden", api_visibility="private", trigger_mode="multiple")


def effect(do: str, **what: Any) -> dict[str, Any]:
    """Something that the browser is to do once, as the value of the part `effects`."""
    return {"do": do, "id": secrets.token_hex(8), **what}


def sentence(error: BaseException) -> str:
    """An error of ours as people read it: a capital, if it begins with a word and no name, a full stop, no line breaks."""
    text = " ".join(str(error).split()) or type(error).__name__
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
