"""The Chat tab: its parts, and what each of their events does to a conversation."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import gradio as gr

from neox_lite.errors import ArgumentError

from ..conversation import Conversation, Message, Store, imported
from ..engine import Engine
from ..prompt_forms import names
from .chat import Asked, Chat
from .components import part
from .events import Running, Update, effect, in_sentences, text_of, told
from .settings import options_of

AUTO = "auto"  # the prompt form that the model is known by
MOST_SENT = 500_000  # characters of a message or system text
Change = Callable[
    [Conversation, gr.EventData], Message
]  # changes a conversation and says which answer is to be written


def send(conversation: Conversation, event: gr.EventData) -> Message:
    conversation.append("user", text_of(event, "text"))
    return conversation.append("assistant")


def regenerate(conversation: Conversation, event: gr.EventData) -> Message:
    return conversation.regenerate(text_of(event, "id"))


def resume(conversation: Conversation, event: gr.EventData) -> Message:
    last = conversation.last
    if last is None or last.id != text_of(event, "id") or last.role != "assistant":
        raise ArgumentError("only the newest answer can be continued")
    return last


def edit(conversation: Conversation, event: gr.EventData) -> Message | None:
    """An edited message of the user's is answered anew; an edited answer stays as it was written."""
    changed = conversation.edit(text_of(event, "id"), text_of(event, "text"))
    return conversation.append("assistant") if changed.role == "user" else None


class Tab:
    """Event handlers, as Gradio calls them. Each yields new values of parts; nothing of a browser tab is kept between two."""

    def __init__(self, engine: Engine, store: Store, running: Running, form: str | None, effects: gr.HTML) -> None:
        self.chat, self.store, self.default_form, self.effects = Chat(engine, store, running), store, form, effects
        self.running = running

    def build(self) -> None:
        """Lay the tab out."""
        with gr.Row(elem_id="nx-chat"):
            self.conversations = part(
                "conversations", {"entries": [], "current": ""}, ("open", "new", "rename", "delete", "import")
            )
            with gr.Column(elem_id="nx-talk"):
                self.transcript = part(
                    "transcript", None, ("regenerate", "edit", "continue", "switch", "branch", "export", "raw")
                )
                with gr.Accordion("System text and prompt form", open=False, elem_id="nx-system"):
                    self.system = gr.Textbox(
                        label="System text",
                        info="Stands before the conversation, where the prompt form has a place for it",
                        lines=2,
                        max_lines=8,
                        elem_id="nx-system-text",
                    )
                    forms = [("Automatic: the model's own", AUTO), *names()]
                    self.form = gr.Dropdown(forms, value=AUTO, label="Prompt form", elem_id="nx-form", filterable=False)
                self.composer = part("composer", None, ("send", "stop"))
        self.feed = part("chat-feed")
        self.current = gr.Textbox(visible=False)  # the id of the conversation shown

    def wire(self, page: gr.Blocks, settings: gr.HTML) -> None:
        """Say which event goes where."""
        shown = [self.conversations, self.transcript, self.system, self.composer, self.feed, self.current, self.effects]
        about = [self.current, self.system]
        quiet: Any = {"show_progress": "hidden", "api_visibility": "private"}
        told_of = in_sentences(self.effects)
        asks = [*about, self.form, settings]
        for listen, change in (
            (self.composer.send, send),
            (self.transcript.regenerate, regenerate),
            (getattr(self.transcript, "continue"), resume),
            (self.transcript.edit, edit),
        ):
            listen(told_of(self._answering(change)), asks, shown, **quiet)
        for listen, handler in (
            (self.transcript.switch, self.switch),
            (self.transcript.branch, self.branch),
            (self.transcript.export, self.export),
            (self.conversations.new, self.new),
            (self.conversations.open, self.open),
            (self.conversations.rename, self.rename),
            (self.conversations.delete, self.delete),
            (getattr(self.conversations, "import"), self.import_),
            (self.system.blur, self.keep_system),
        ):
            listen(told_of(handler), about, shown, **quiet)
        self.transcript.raw(told_of(self.raw), asks, shown, **quiet)
        self.composer.stop(self.stop, None, None, **quiet)
        page.load(told_of(self.arrive), self.current, shown, js="() => neox.arrive()", **quiet)

    # Answers ----------------------------------------------------------------------------------------------------------

    def _answering(self, change: Callable[[Conversation, gr.EventData], Message | None]) -> Any:
        """The handler of an event that asks for an answer."""

        async def handler(
            id: str, system: str, form: str, values: dict[str, Any], event: gr.EventData, request: gr.Request
        ) -> AsyncGenerator[Update, None]:
            conversation = self._load(id, system)
            back = {"text": told(event).get("text")} if change is send else None
            try:
                answer = change(conversation, event)
                if answer is None:
                    self.store.save(conversation)
                    yield self._show(conversation)
                    return
                asked = self._asked(form, values, request)
                async with aclosing(self.chat.answer(conversation, answer, asked)) as feed:
                    first = True
                    async for value in feed:
                        back = None
                        shown = self._show(conversation, live=answer.id) if first else {}
                        yield {**shown, self.feed: value}
                        first = False
            except BaseException:
                if back is not None:  # what could not be sent stands in the box again
                    yield {self.composer: {**back, "id": effect("")["id"]}}
                raise
            if self.running.shown(asked.session) in (None, conversation.id):
                yield self._show(self.store.load(conversation.id))

        return handler

    def _asked(self, form: str, values: dict[str, Any], request: gr.Request) -> Asked:
        chosen = self.default_form if form == AUTO else form
        return Asked(options_of(values), chosen, request.session_hash or "")

    def stop(self, request: gr.Request) -> None:
        self.running.stop(request.session_hash or "", "chat")

    async def raw(
        self, id: str, system: str, form: str, values: dict[str, Any], event: gr.EventData, request: gr.Request
    ) -> AsyncGenerator[Update, None]:
        """What the model is given, to the letter."""
        text, note = self.chat.raw(self._load(id, system), self._asked(form, values, request))
        yield {self.effects: effect("prompt", text=text, note=note)}

    # Conversations ----------------------------------------------------------------------------------------------------

    async def arrive(self, id: str, request: gr.Request) -> AsyncGenerator[Update, None]:
        """A page was opened: the conversation that it had shown, if that is still there."""
        yield self._show(self._load(id, None))

    async def new(self, id: str, system: str, event: gr.EventData, request: gr.Request) -> AsyncGenerator[Update, None]:
        yield self._go(Conversation(), request)

    async def open(
        self, id: str, system: str, event: gr.EventData, request: gr.Request
    ) -> AsyncGenerator[Update, None]:
        yield self._go(self.store.load(text_of(event, "id")), request)

    async def switch(self, id: str, system: str, event: gr.EventData) -> AsyncGenerator[Update, None]:
        conversation = self._load(id, system)
        conversation.switch(text_of(event, "id"), -1 if told(event).get("step") == -1 else 1)
        self.store.save(conversation)
        yield self._show(conversation)

    async def branch(
        self, id: str, system: str, event: gr.EventData, request: gr.Request
    ) -> AsyncGenerator[Update, None]:
        conversation = self._load(id, system).branch(text_of(event, "id"))
        self.store.save(conversation)
        yield self._go(conversation, request)

    async def rename(self, id: str, system: str, event: gr.EventData) -> AsyncGenerator[Update, None]:
        self.store.rename(text_of(event, "id"), text_of(event, "title"))
        yield self._show(self._load(id, system))

    async def delete(
        self, id: str, system: str, event: gr.EventData, request: gr.Request
    ) -> AsyncGenerator[Update, None]:
        gone = text_of(event, "id")
        if gone == id:
            self.running.stop(request.session_hash or "", "chat")
        self.store.delete(gone)
        yield self._go(Conversation(), request) if gone == id else {self.conversations: self.chat.entries(id)}

    async def keep_system(self, id: str, system: str, request: gr.Request) -> AsyncGenerator[Update, None]:
        """A system text is kept as soon as it is left, in a conversation that has been saved."""
        conversation = self._load(id, None)
        if conversation.messages and conversation.system != system:
            self.store.save(self._load(id, system))
        yield {}

    async def export(self, id: str, system: str, event: gr.EventData) -> AsyncGenerator[Update, None]:
        conversation = self._load(id, system)
        if not conversation.messages:
            raise ArgumentError("there is nothing to export yet; write a message first")
        markdown = told(event).get("kind") == "markdown"
        text = conversation.to_markdown() if markdown else conversation.to_json()
        name = "".join(c if c.isalnum() else "-" for c in conversation.label)[:60].strip("-") or "conversation"
        kind = ("md", "text/markdown") if markdown else ("json", "application/json")
        yield {self.effects: effect("download", name=f"{name}.{kind[0]}", type=kind[1], text=text)}

    async def import_(
        self, id: str, system: str, event: gr.EventData, request: gr.Request
    ) -> AsyncGenerator[Update, None]:
        conversation = imported(text_of(event, "text"), text_of(event, "name")[:200])
        self.store.save(conversation)
        yield self._go(conversation, request)

    def _load(self, id: str, system: str | None) -> Conversation:
        """The conversation that a page shows, with the system text as it stands in the page."""
        conversation = self.chat.load(id)
        if system is not None:
            if len(system) > MOST_SENT:
                raise ArgumentError(f"the system text has {len(system):,} characters; at most {MOST_SENT:,}")
            conversation.system = system
        return conversation

    def _go(self, conversation: Conversation, request: gr.Request) -> Update:
        """Show another conversation; an answer that streams into the last one ends."""
        session = request.session_hash or ""
        self.running.stop(session, "chat")
        self.running.show(session, conversation.id)
        return self._show(conversation)

    def _show(self, conversation: Conversation, live: str | None = None) -> Update:
        return {
            self.transcript: self.chat.view(conversation, live),
            self.conversations: self.chat.entries(conversation.id),
            self.system: conversation.system,
            self.current: conversation.id,
        }
