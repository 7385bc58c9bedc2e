"""The Chat: what a browser asks of a conversation, answers as they stream, and all of it kept in the Store."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from neox_lite.errors import ArgumentError

from ..conversations.conversation import Conversation, Message, Store
from ..conversations.prompt_forms import form_of
from ..conversations.turn import Turn, dropped_note, prepare
from ..serving.engine import Engine
from ..serving.jobs import Job, Ticket, Update
from .events import PageUpdate, Running, Updates, as_sentence
from .stream import batches, meter

ENDS = {"length": "cut at the limit", "cancelled": "stopped", "error": "broken off"}


@dataclass(frozen=True)
class ChatRequest:
    """What an answer depends on besides the conversation: form, settings and tab."""

    options: dict[str, Any]
    form: str | None
    session: str


class Chat:
    """Conversations and answers, without the page."""

    def __init__(self, engine: Engine, store: Store, running: Running) -> None:
        self.engine, self.store, self.running = engine, store, running

    # What the browser shows -------------------------------------------------------------------------------------------

    def view(self, conversation: Conversation, live: str | None = None) -> dict[str, Any]:
        """A conversation's path for the part `transcript`. live: the answer that is streaming in."""
        path = conversation.path()
        dropped = next((int(m.details.get("dropped", 0)) for m in reversed(path) if m.role == "assistant"), 0)
        return {
            "id": conversation.id,
            "title": conversation.label,
            "system": conversation.system,
            "turns": [self._turn(conversation, message) for message in path],
            "live": live,
            "dropped": dropped,
            "dropped_note": dropped_note(dropped),
            "read": time.monotonic(),  # answers to two events may overtake each other
        }

    def _turn(self, conversation: Conversation, message: Message) -> dict[str, Any]:
        details, note = message.details, ""
        if message.role == "assistant":
            count, end = details.get("tokens"), ENDS.get(str(details.get("end")), "")
            note = " · ".join(filter(None, [f"{count} tokens" if count else "", end]))
        place = conversation.place(message.id)
        return {"id": message.id, "role": message.role, "text": message.text, "place": place, "note": note}

    def entries(self) -> dict[str, Any]:
        """The list for the part `conversations`."""
        listed = [{"id": e.id, "title": e.title, "updated": e.updated, "problem": e.problem} for e in self.store.list()]
        return {"entries": listed, "read": time.monotonic()}

    def load(self, id: str) -> Conversation:
        """A saved conversation, or a new one of this id, which the browser chose."""
        return self.store.load(id) if id in self.store else Conversation(id=id)

    # Answers ----------------------------------------------------------------------------------------------------------

    def turn(self, conversation: Conversation, answer: Message, request: ChatRequest) -> Turn:
        """What is to be written for an answer, from what is written of it on."""
        form = form_of(self.engine.name or "", self.engine.tokenizer, request.form)
        messages = conversation.chat(answer.parent)
        return prepare(self.engine, form, messages, request.options, conversation.system, answer.text or None)

    def raw(self, conversation: Conversation, request: ChatRequest) -> tuple[str, str]:
        """The prompt of the conversation's last answer, or of the one that would come next, and a sentence about it."""
        last = conversation.last
        if last is None:
            raise ArgumentError("there is no prompt yet; write a message first")
        blank = Message("", "assistant", "", last.id if last.role == "user" else last.parent)
        turn = self.turn(conversation, blank, request)
        text: str = self.engine.tokenizer.decode(turn.ids, skip_special_tokens=False)
        about = f"{len(turn.ids):,} of {self.engine.context:,} tokens, written as {turn.form.title}."
        return text, " ".join([about, *map(as_sentence, turn.notes)])

    async def answer(self, conversation: Conversation, answer: Message, request: ChatRequest) -> Updates:
        """An answer, or more of one, as it comes; kept in the Store however that ends. The first update says it is submitted.

        What is refused is refused before the conversation is saved: an error leaves it as it was.
        """
        turn = await asyncio.to_thread(self.turn, conversation, answer, request)
        ticket = self.engine.submit(Job(turn.ids, turn.options, client=request.session))
        self.running.start(request.session, "chat", ticket, answer.id)
        writing = _Writing(answer, turn, ticket, self.engine.context)
        try:
            self.store.save(conversation)
            yield {} if turn.capped_note is None else {"notice": as_sentence(turn.capped_note)}
            async with aclosing(batches(ticket)) as arriving:
                async for updates in arriving:
                    yield writing.take(updates)
        finally:
            ticket.cancel()
            self.running.end(request.session, "chat", ticket)
            conversation.messages[answer.id] = writing.message
            self.keep(conversation.id, writing.message)

    def keep(self, id: str, message: Message) -> None:
        """Write an answer into its conversation as that is by now: another tab may have changed or deleted it meanwhile."""
        if id not in self.store:
            return
        conversation = self.store.load(id)
        conversation.messages[conversation[message.id].id] = message
        self.store.save(conversation)


@dataclass
class _Writing:
    """An answer as it comes."""

    answer: Message
    turn: Turn
    ticket: Ticket
    context: int
    end: str = "cancelled"
    tokens: int = 0
    parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reader = self.turn.reader()
        self.tokens = int(self.answer.details.get("tokens", 0))

    def take(self, updates: list[Update]) -> PageUpdate:
        """What some updates bring to the page."""
        self.tokens += sum(update.token is not None for update in updates)
        last = updates[-1]
        text = "".join(self.reader.put(update.text) for update in updates)
        shown: PageUpdate = {"meter": meter(self.ticket, self.context)}
        if last.finish_reason is not None:
            text += self.reader.end(last.finish_reason)
            self.end = last.finish_reason
            if last.error is not None:
                shown["notice"] = as_sentence(last.error)
        self.parts.append(text)
        return {**shown, "answer": {"id": self.answer.id, "text": text, "end": last.finish_reason}}

    @property
    def message(self) -> Message:
        details = {**self.answer.details, "tokens": self.tokens, "end": self.end, "dropped": self.turn.dropped}
        return replace(self.answer, text=self.answer.text + "".join(self.parts), details=details)
