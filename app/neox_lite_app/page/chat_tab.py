"""The Chat tab: its parts, and what each of their events does to a conversation.

A browser tab says in each event which conversation it shows; the ids of new ones are its own, so it never waits for one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import gradio as gr

from neox_lite.errors import ArgumentError

from ..conversations.conversation import Conversation, Message, Store, imported
from ..conversations.prompt_forms import names
from ..serving.engine import Engine
from .chat import Asked, Chat
from .components import part
from .events import Handler, Running, Said, Told, listen
from .settings import options_of

AUTO = "auto"  # the prompt form that the model is known by
MOST_SENT = 500_000  # characters of a message or system text
Change = Callable[[Conversation, Said], Message | None]  # changes a conversation and says which answer is to be written


def send(conversation: Conversation, said: Said) -> Message:
    conversation.append("user", said.text("text"))
    return conversation.append("assistant")


def regenerate(conversation: Conversation, said: Said) -> Message:
    return conversation.regenerate(said.text("id"))


def resume(conversation: Conversation, said: Said) -> Message:
    last = conversation.last
    if last is None or last.id != said.text("id") or last.role != "assistant":
        raise ArgumentError("only the newest answer can be continued")
    return last


def edit(conversation: Conversation, said: Said) -> Message | None:
    """An edited message of the user's is answered anew; an edited answer stays as it was written."""
    changed = conversation.edit(said.text("id"), said.text("text"))
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

        async def handler(said: Said) -> AsyncGenerator[Told, None]:
            conversation = self._load(said)
            answer, taken = change(conversation, said), False
            if answer is None:
                self.store.save(conversation)
            else:
                try:
                    async with aclosing(self.chat.answer(conversation, answer, self._asked(said))) as news:
                        async for told in news:
                            yield told if taken else self._show(conversation, said)
                            taken = True
                except Exception:
                    if taken:  # what cannot be kept is shown all the same
                        yield self._show(conversation, said)
                    raise
            yield self._show(self.chat.load(conversation.id), said)

        return handler

    def _asked(self, said: Said) -> Asked:
        form = said.text("form")
        return Asked(options_of(said.settings), self.default_form if form == AUTO else form, said.session)

    async def stop(self, said: Said) -> AsyncGenerator[Told, None]:
        self.running.stop(said.session, "chat")
        yield {}

    async def raw(self, said: Said) -> AsyncGenerator[Told, None]:
        """What the model is given, to the letter."""
        text, note = self.chat.raw(self._load(said), self._asked(said))
        yield {"prompt": {"text": text, "note": note}}

    # Conversations ----------------------------------------------------------------------------------------------------

    async def open(self, said: Said) -> AsyncGenerator[Told, None]:
        """Another conversation, or a new one; an answer that streams into the last one ends."""
        yield {"conversations": self.chat.entries()}  # also where this one cannot be read
        conversation = self.chat.load(said.text("conversation"))
        if self.running.written(said.session, "chat") not in conversation.messages:
            self.running.stop(said.session, "chat")
        yield self._show(conversation, said)

    async def switch(self, said: Said) -> AsyncGenerator[Told, None]:
        conversation = self._load(said)
        conversation.switch(said.text("id"), -1 if said.data.get("step") == -1 else 1)
        self.store.save(conversation)
        yield self._show(conversation, said)

    async def branch(self, said: Said) -> AsyncGenerator[Told, None]:
        conversation = self._load(said).branch(said.text("id"))
        self.store.save(conversation)
        yield self._show(conversation, said)

    async def rename(self, said: Said) -> AsyncGenerator[Told, None]:
        self.store.rename(said.text("id"), said.text("title"))
        yield self._show(self._load(said), said)

    async def delete(self, said: Said) -> AsyncGenerator[Told, None]:
        self.store.delete(said.text("id"))
        yield {"conversations": self.chat.entries()}

    async def keep(self, said: Said) -> AsyncGenerator[Told, None]:
        """A system text is kept as soon as it is left, in a conversation that has been saved."""
        if said.text("conversation") in self.store:
            self.store.save(self._load(said))
        yield {}

    async def export(self, said: Said) -> AsyncGenerator[Told, None]:
        conversation = self._load(said)
        if not conversation.messages:
            raise ArgumentError("there is nothing to export yet; write a message first")
        markdown = said.data.get("kind") == "markdown"
        text = conversation.to_markdown() if markdown else conversation.to_json()
        name = "".join(c if c.isalnum() else "-" for c in conversation.label)[:60].strip("-") or "conversation"
        kind = ("md", "text/markdown") if markdown else ("json", "application/json")
        yield {"download": {"name": f"{name}.{kind[0]}", "type": kind[1], "text": text}}

    async def import_(self, said: Said) -> AsyncGenerator[Told, None]:
        conversation = imported(said.text("text"), said.text("name")[:200])
        self.store.save(conversation)
        yield self._show(conversation, said)

    def _load(self, said: Said) -> Conversation:
        """The conversation that the tab shows, with the system text as it stands there, once the tab knows it."""
        conversation = self.chat.load(said.text("conversation"))
        if said.data.get("system") is not None:
            conversation.system = said.text("system")
            if len(conversation.system) > MOST_SENT:
                raise ArgumentError(
                    f"the system text has {len(conversation.system):,} characters; at most {MOST_SENT:,}"
                )
        return conversation

    def _show(self, conversation: Conversation, said: Said) -> Told:
        """What is there now, for a tab that asked for it when it showed said's conversation, by a wish of that name."""
        view = self.chat.view(conversation, live=self.running.written(said.session, "chat"))
        view |= {"asked": said.text("conversation"), "wish": said.data.get("wish")}
        return {"transcript": view, "conversations": self.chat.entries()}
