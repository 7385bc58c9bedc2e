"""The Chat tab: its parts, and what each of their events does to a conversation.

A browser tab says in each event which conversation it shows; the ids of new ones are its own, so it never waits for one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing

import gradio as gr

from neox_lite.errors import ArgumentError

from ..conversations.conversation import Conversation, Message, Store, imported
from ..conversations.prompt_forms import names
from ..serving.engine import Engine
from .chat import Chat, ChatRequest
from .components import part
from .events import Handler, PageEvent, PageUpdate, Running, Updates, listen
from .settings import options_of

AUTO = "auto"  # the prompt form that the model is known by
MAX_SENT = 500_000  # characters of a message or system text
# Changes a conversation, and returns the answer that is to be written.
Change = Callable[[Conversation, PageEvent], Message | None]


def send(conversation: Conversation, event: PageEvent) -> Message:
    conversation.append("user", event.text("text"))
    return conversation.append("assistant")


def regenerate(conversation: Conversation, event: PageEvent) -> Message:
    return conversation.regenerate(event.text("id"))


def resume(conversation: Conversation, event: PageEvent) -> Message:
    last = conversation.last
    if last is None or last.id != event.text("id") or last.role != "assistant":
        raise ArgumentError("only the newest answer can be continued")
    return last


def edit(conversation: Conversation, event: PageEvent) -> Message | None:
    """An edited message of the user's is answered anew; an edited answer stays as it was written."""
    changed = conversation.edit(event.text("id"), event.text("text"))
    return conversation.append("assistant") if changed.role == "user" else None


class Tab:
    """Event handlers."""

    def __init__(self, engine: Engine, store: Store, running: Running, form: str | None) -> None:
        self.chat, self.store, self.running, self.default_form = Chat(engine, store, running), store, running, form

    def build(self) -> None:
        """Lay the tab out."""
        forms = [("Automatic: the model's own", AUTO), *names()]
        with gr.Row(elem_id="nx-chat"):
            self.conversations = part("conversations", ("open", "rename", "delete", "import"))
            with gr.Column(elem_id="nx-talk"):
                self.transcript = part(
                    "transcript", ("regenerate", "edit", "continue", "switch", "branch", "export", "raw")
                )
                self.about = part("about", ("keep",), forms=forms)
                self.composer = part("composer", ("send", "stop"))

    def wire(self) -> None:
        """Say which event goes where."""
        handlers: dict[gr.HTML, dict[str, Handler]] = {
            self.composer: {"send": self._answering(send), "stop": self.stop},
            self.transcript: {
                "regenerate": self._answering(regenerate),
                "edit": self._answering(edit),
                "continue": self._answering(resume),
                "switch": self.switch,
                "branch": self.branch,
                "export": self.export,
                "raw": self.raw,
            },
            self.conversations: {
                "open": self.open,
                "rename": self.rename,
                "delete": self.delete,
                "import": self.import_,
            },
            self.about: {"keep": self.keep},
        }
        for place, events in handlers.items():
            for name, handler in events.items():
                listen(place, name, handler)

    # Answers ----------------------------------------------------------------------------------------------------------

    def _answering(self, change: Change) -> Handler:
        """The handler of an event that asks for an answer."""

        async def handler(event: PageEvent) -> Updates:
            conversation = self._load(event)
            answer, taken = change(conversation, event), False
            if answer is None:
                self.store.save(conversation)
            else:
                try:
                    async with aclosing(self.chat.answer(conversation, answer, self._request(event))) as updates:
                        async for update in updates:
                            yield update if taken else {**update, **self._show(conversation, event)}
                            taken = True
                except Exception:
                    if taken:  # what cannot be kept is shown all the same
                        yield self._show(conversation, event)
                    raise
            yield self._show(self.chat.load(conversation.id), event)

        return handler

    def _request(self, event: PageEvent) -> ChatRequest:
        form = event.text("form")
        return ChatRequest(options_of(event.settings), self.default_form if form == AUTO else form, event.session)

    async def stop(self, event: PageEvent) -> Updates:
        self.running.stop(event.session, "chat")
        yield {}

    async def raw(self, event: PageEvent) -> Updates:
        """What the model is given, to the letter."""
        text, note = self.chat.raw(self._load(event), self._request(event))
        yield {"prompt": {"text": text, "note": note}}

    # Conversations ----------------------------------------------------------------------------------------------------

    async def open(self, event: PageEvent) -> Updates:
        """Another conversation, or a new one; an answer that streams into the last one ends."""
        yield {"conversations": self.chat.entries()}  # also where this one cannot be read
        conversation = self.chat.load(event.text("conversation"))
        if self.running.written(event.session, "chat") not in conversation.messages:
            self.running.stop(event.session, "chat")
        yield self._show(conversation, event)

    async def switch(self, event: PageEvent) -> Updates:
        conversation = self._load(event)
        conversation.switch(event.text("id"), -1 if event.data.get("step") == -1 else 1)
        self.store.save(conversation)
        yield self._show(conversation, event)

    async def branch(self, event: PageEvent) -> Updates:
        conversation = self._load(event).branch(event.text("id"))
        self.store.save(conversation)
        yield self._show(conversation, event)

    async def rename(self, event: PageEvent) -> Updates:
        self.store.rename(event.text("id"), event.text("title"))
        yield self._show(self._load(event), event)

    async def delete(self, event: PageEvent) -> Updates:
        self.store.delete(event.text("id"))
        yield {"conversations": self.chat.entries()}

    async def keep(self, event: PageEvent) -> Updates:
        """A system text is kept as soon as it is left, in a conversation that has been saved."""
        if event.text("conversation") in self.store:
            self.store.save(self._load(event))
        yield {}

    async def export(self, event: PageEvent) -> Updates:
        conversation = self._load(event)
        if not conversation.messages:
            raise ArgumentError("there is nothing to export yet; write a message first")
        markdown = event.data.get("kind") == "markdown"
        text = conversation.to_markdown() if markdown else conversation.to_json()
        name = "".join(c if c.isalnum() else "-" for c in conversation.label)[:60].strip("-") or "conversation"
        kind = ("md", "text/markdown") if markdown else ("json", "application/json")
        yield {"download": {"name": f"{name}.{kind[0]}", "type": kind[1], "text": text}}

    async def import_(self, event: PageEvent) -> Updates:
        conversation = imported(event.text("text"), event.text("name")[:200])
        self.store.save(conversation)
        yield self._show(conversation, event)

    def _load(self, event: PageEvent) -> Conversation:
        """The conversation that the tab shows, with the system text as it stands there, once the tab knows it."""
        conversation = self.chat.load(event.text("conversation"))
        if event.data.get("system") is not None:
            conversation.system = event.text("system")
            if len(conversation.system) > MAX_SENT:
                raise ArgumentError(
                    f"the system text has {len(conversation.system):,} characters; at most {MAX_SENT:,}"
                )
        return conversation

    def _show(self, conversation: Conversation, event: PageEvent) -> PageUpdate:
        """What is there now. asked: the conversation that the tab showed when it asked; request: the id of what it asked."""
        view = self.chat.view(conversation, live=self.running.written(event.session, "chat"))
        view |= {"asked": event.text("conversation"), "request": event.data.get("request")}
        return {"transcript": view, "conversations": self.chat.entries()}
