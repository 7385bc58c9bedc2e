"""One conversation with the engine's model: what is sent, what comes back, and its figures. Knows no terminal and no page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from neox_lite.errors import ArgumentError
from neox_lite.generation.parameters import SAMPLED

from .conversations.conversation import Chat, Conversation, Fit, Store, fit
from .conversations.prompt_forms import Form
from .serving.engine import Engine, Job, Ticket

MIN_ANSWER = 512  # tokens that old turns make room for, at most a quarter of the context; max_new_tokens overrules it


@dataclass
class Figures:
    """Of one answer. first_s: from the question to the first token. finish_reason as of a Update."""

    fit: Fit
    tokens: int = 0
    tokens_per_s: float | None = None
    first_s: float | None = None
    finish_reason: str | None = None
    error: str | None = None


@dataclass
class Session:
    """A conversation with the engine's model. settings: sampling options, max_new_tokens and stop, as far as they are set."""

    engine: Engine
    form: Form
    conversation: Conversation
    settings: dict[str, Any] = field(default_factory=dict)
    store: Store | None = None
    figures: Figures = field(default_factory=lambda: Figures(Fit([], 0, 0)))

    def say(self, text: str) -> None:
        """Add a message; in place of the last one where that got no answer."""
        last = self.conversation.last
        if last is not None and last.role == "user":
            self.conversation.edit(last.id, text)
        else:
            self.conversation.append("user", text)

    def answer(self, go_on: bool = False, started: Callable[[Ticket], None] = lambda ticket: None) -> Iterator[str]:
        """Another answer to the last message, or with go_on the rest of the last one, as text that is kept as it comes.

        started: told the ticket, to cancel it. Figures of it are there afterwards; an answer without any text is not kept.
        """
        talk = self.conversation
        if not go_on:
            talk.regenerate()
        elif talk.last is None or talk.last.role != "assistant":
            raise ArgumentError("there is no answer to continue; write a message, or use /regen")
        assert talk.last is not None
        answer, before = talk.last.id, int(talk.last.details.get("tokens", 0)) if go_on else 0
        try:
            ticket, figures = self._submit(talk.last.text)
            started(ticket)
            yield from self._read(ticket, figures)
            rate = None if figures.tokens_per_s is None else round(figures.tokens_per_s, 2)
            about = {"finish_reason": figures.finish_reason, "tokens": before + figures.tokens, "tokens_per_s": rate}
            talk.extend("", **about, model=str(self.engine.name)[:200])
        finally:
            if not talk[answer].text:
                talk.delete(answer)
            if self.store is not None:
                self.store.save(talk)

    def prompt(self, open_answer: str = "") -> tuple[list[int], Fit]:
        """The ids for an answer to the last user's message, and what fits of the conversation."""
        talk, tokenizer = self.conversation, self.engine.tokenizer
        last = talk.last
        messages = talk.chat(last.parent if last is not None and last.role == "assistant" else None)

        def encode(part: Chat) -> list[int]:
            return self.form.encode(tokenizer, part, talk.system, open_answer or None)

        context = self.engine.context
        room = context - (self.settings.get("max_new_tokens") or min(MIN_ANSWER, context // 4))
        found = fit(messages, room, lambda part: len(encode(part)))
        return encode(found.messages), found

    def options(self) -> dict[str, Any]:
        """The settings as options of a job, with what ends an answer in this form."""
        draws = self.settings.get("temperature", 1.0) > 0
        given = {
            name: value for name, value in self.settings.items() if name != "stop" and (draws or name not in SAMPLED)
        }
        ends = self.engine.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list | tuple) else [ends]
        stops = [*self.form.stops, *self.settings.get("stop", [])]
        return {
            **given,
            "do_sample": draws,
            "eos_token_id": sorted({*ends, *self.form.stop_ids(self.engine.tokenizer)}),
            "stop_strings": list(dict.fromkeys(stops)) or None,
        }

    def _submit(self, open_answer: str) -> tuple[Ticket, Figures]:
        ids, fitted = self.prompt(open_answer)
        assert self.conversation.last is not None
        sample = self.conversation.place(self.conversation.last.id)[0] - 1  # another answer differs, whatever the seed
        self.figures = Figures(fitted)
        return self.engine.submit(Job(ids, self.options(), stream=sample)), self.figures

    def _read(self, ticket: Ticket, figures: Figures) -> Iterator[str]:
        assert self.conversation.last is not None
        reader = self.form.reader(self.conversation.last.text)
        for step in ticket:
            figures.tokens += step.token is not None
            figures.finish_reason, figures.error = step.finish_reason, step.error
            piece = reader.put(step.text) + (reader.end(step.finish_reason) if step.finish_reason else "")
            if piece:
                self.conversation.extend(piece)
                yield piece
        if ticket.first_s is not None and ticket.last_s is not None:
            figures.first_s = ticket.first_s - ticket.submitted_s
            if figures.tokens > 1 and ticket.last_s > ticket.first_s:
                figures.tokens_per_s = (figures.tokens - 1) / (ticket.last_s - ticket.first_s)
