"""One conversation with the engine's model: what is sent, what comes back, and its figures. Knows no terminal and no page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from neox_lite.errors import ArgumentError
from neox_lite.generation.parameters import SAMPLED

from .conversations.conversation import Conversation, Store
from .conversations.prompt_forms import Form
from .conversations.turn import Turn, prepare
from .serving.engine import Engine
from .serving.jobs import Job, Ticket
from .serving.token_clock import TokenClock


@dataclass
class Figures:
    """Of one answer; turn: None before the first one. finish_reason and error: as of an Update."""

    turn: Turn | None = None
    clock: TokenClock = field(default_factory=TokenClock)
    finish_reason: str | None = None
    error: str | None = None

    @property
    def used(self) -> int:
        """Tokens of the context, the answer's own included."""
        return self.clock.tokens + (0 if self.turn is None else len(self.turn.ids))


@dataclass
class Session:
    """A conversation with the engine's model. settings: sampling options, max_new_tokens and stop, as far as they are set."""

    engine: Engine
    form: Form
    conversation: Conversation
    settings: dict[str, Any] = field(default_factory=dict)
    store: Store | None = None
    figures: Figures = field(default_factory=Figures)

    def say(self, text: str) -> None:
        """Add a message; in place of the last one where that got no answer."""
        last = self.conversation.last
        if last is not None and last.role == "user":
            self.conversation.edit(last.id, text)
        else:
            self.conversation.append("user", text)

    def answer(
        self, continue_last: bool = False, started: Callable[[Ticket], None] = lambda ticket: None
    ) -> Iterator[str]:
        """Another answer to the last message, or with continue_last the rest of the last one, as text that is kept as it comes.

        started: called with the ticket, which cancels the answer; `notes` are there by then, `figures` afterwards.
        An answer without any text is not kept.
        """
        talk = self.conversation
        if not continue_last:
            talk.regenerate()
        elif talk.last is None or talk.last.role != "assistant":
            raise ArgumentError("there is no answer to continue; write a message, or use /regen")
        assert talk.last is not None
        answer, before = talk.last.id, int(talk.last.details.get("tokens", 0)) if continue_last else 0
        try:
            ticket, figures = self._submit(talk.last.text)
            started(ticket)
            yield from self._read(ticket, figures)
            rate, tokens = figures.clock.tokens_per_s, before + figures.clock.tokens
            rate = None if rate is None else round(rate, 2)
            about = {"finish_reason": figures.finish_reason, "tokens": tokens, "tokens_per_s": rate}
            talk.extend("", **about, model=str(self.engine.name)[:200])
        finally:
            if not talk[answer].text:
                talk.delete(answer)
            if self.store is not None:
                self.store.save(talk)

    @property
    def notes(self) -> list[str]:
        """What people are to know of the answer before it comes."""
        return [] if self.figures.turn is None else self.figures.turn.notes

    def turn(self, open_answer: str = "") -> Turn:
        """The turn that answers the last message of the user, as it stands now."""
        talk, last = self.conversation, self.conversation.last
        messages = talk.chat(last.parent if last is not None and last.role == "assistant" else None)
        return prepare(self.engine, self.form, messages, self._options(), talk.system, open_answer or None)

    def _options(self) -> dict[str, Any]:
        """The settings as options of `generate`; greedy decoding gets none of those that shape a draw."""
        sampled = self.settings.get("temperature", 1.0) > 0
        given = {name: value for name, value in self.settings.items() if sampled or name not in SAMPLED}
        return {**given, "do_sample": sampled}

    def _submit(self, open_answer: str) -> tuple[Ticket, Figures]:
        turn = self.turn(open_answer)
        assert self.conversation.last is not None
        sample = self.conversation.place(self.conversation.last.id)[0] - 1  # another answer differs, whatever the seed
        ticket = self.engine.submit(Job(turn.ids, turn.options, stream=sample))
        self.figures = Figures(turn, ticket.clock)
        return ticket, self.figures

    def _read(self, ticket: Ticket, figures: Figures) -> Iterator[str]:
        assert figures.turn is not None
        reader = figures.turn.reader()
        for update in ticket:
            figures.finish_reason, figures.error = update.finish_reason, update.error
            piece = reader.put(update.text) + (reader.end(update.finish_reason) if update.finish_reason else "")
            if piece:
                self.conversation.extend(piece)
                yield piece
