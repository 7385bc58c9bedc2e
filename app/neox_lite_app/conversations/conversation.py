"""Conversations: a tree of turns of which one path is shown, as JSON, as Markdown, and as files in a folder.

Knows no model, no tokenizer and no page; not safe for threads that change one conversation at the same time.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

from neox_lite.errors import NeoxLiteError
from neox_lite.files import parse_json, read_regular, write_atomically

from ..paths import data_folder

SCHEMA, VERSION = "neox-lite conversation", 1
ROLES = ("user", "assistant")
MAX_BYTES = 10_000_000  # of a conversation as JSON or Markdown
MAX_MESSAGES = 10_000
MAX_TITLE = 200  # characters
MAX_DETAILS, MAX_DETAIL = 32, 1_000  # of one message; characters of one of them
_ID = re.compile(r"[0-9a-f]{32}")
_MARK = re.compile(r"^(\\*)## (System|User|Assistant) <!-- neox-lite -->\r?$", re.MULTILINE)


class ConversationError(NeoxLiteError, ValueError):
    """A conversation cannot be changed, read or written as asked; the sentence says why."""


@dataclass(frozen=True)
class Message:
    """One turn. parent: the message that it answers, None for a first one. details: tokens, model and the like."""

    id: str
    role: str  # "user" or "assistant"
    text: str
    parent: str | None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Conversation:
    """A tree of messages whose roles alternate, beginning with a user's, and the path that is shown: from a root to `leaf`.

    Messages stand in the order of their making, so a parent always stands before what answers it.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    title: str = ""
    system: str = ""
    created: str = field(default_factory=lambda: _now())
    updated: str = field(default_factory=lambda: _now())
    leaf: str | None = None  # the last message shown; None before the first
    messages: dict[str, Message] = field(default_factory=dict)

    # Reading -------------------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """The title, or else the beginning of the first message."""
        if self.title:
            return self.title
        first = " ".join(self.path()[0].text[:1000].split()) if self.leaf else ""
        return (first[:59] + "…" if len(first) > 60 else first) or "New conversation"

    @property
    def last(self) -> Message | None:
        """The last message shown."""
        return self.messages[self.leaf] if self.leaf else None

    def path(self, end: str | None = None) -> list[Message]:
        """The messages shown, or those from the root to the message `end`, oldest first."""
        found: list[Message] = []
        at = self.leaf if end is None else end
        while at is not None:
            found.append(self[at])
            at = found[-1].parent
        return found[::-1]

    def chat(self, end: str | None = None) -> list[dict[str, str]]:
        """The path as prompt forms take it."""
        return [{"role": message.role, "content": message.text} for message in self.path(end)]

    def siblings(self, id: str) -> list[Message]:
        """A message and its alternatives, oldest first."""
        parent = self[id].parent
        return [message for message in self.messages.values() if message.parent == parent]

    def place(self, id: str) -> tuple[int, int]:
        """(2, 3) for the second of three alternatives."""
        siblings = self.siblings(id)
        return siblings.index(self[id]) + 1, len(siblings)

    def __getitem__(self, id: str) -> Message:
        if id not in self.messages:
            raise ConversationError(f"no message {str(id)[:40]!r} in the conversation {self.label!r}; reload it")
        return self.messages[id]

    # Changing ------------------------------------------------------------------------------------------------------

    def append(self, role: str, text: str = "", **details: Any) -> Message:
        """Add a message after the last one shown, and show it."""
        return self._add(role, text, self.leaf, details)

    def extend(self, more: str, **details: Any) -> Message:
        """Add text to the last answer shown, while it streams or when it is continued; details replace those of their names."""
        last = self.last
        if last is None or last.role != "assistant":
            raise ConversationError("there is no answer to continue; regenerate gives the last message one")
        changed = replace(last, text=last.text + _text(more), details=_details({**last.details, **details}))
        self.messages[last.id] = changed
        self.updated = _now()
        return changed

    def edit(self, id: str, text: str) -> Message:
        """Write a message anew: an alternative beside it, shown, with nothing after it."""
        return self._add(self[id].role, text, self[id].parent, {})

    def regenerate(self, id: str | None = None) -> Message:
        """Show a new, empty answer beside an answer (default: the last message shown), or to a user's message."""
        start = self.last if id is None else self[id]
        if start is None:
            raise ConversationError("there is no message to answer yet; write one")
        return self._add("assistant", "", start.id if start.role == "user" else start.parent, {})

    def branch(self, id: str | None = None) -> Conversation:
        """A new conversation of the path up to a message (default: the last one shown)."""
        path = self.path(id)
        leaf = path[-1].id if path else None
        title = f"{self.label[: MAX_TITLE - 9]} (branch)"
        return Conversation(title=title, system=self.system, leaf=leaf, messages={m.id: m for m in path})

    def show(self, id: str) -> None:
        """Lead the path through a message, and on to the newest that follows it."""
        newest = {message.parent: message.id for message in self.messages.values()}
        at: str | None = self[id].id
        while at is not None:
            self.leaf, at = at, newest.get(at)

    def switch(self, id: str, step: int) -> None:
        """Show the alternative `step` places after (or before) a message; at the ends it stays."""
        siblings = self.siblings(id)
        at = siblings.index(self[id]) + step
        self.show(siblings[min(max(at, 0), len(siblings) - 1)].id)

    def delete(self, id: str) -> None:
        """Remove a message and all that follows it. If it was shown, an alternative is, or else what it answered."""
        siblings, parent = self.siblings(id), self[id].parent
        at = siblings.index(self[id])
        gone = {id}
        for message in self.messages.values():  # parents come first
            if message.parent in gone:
                gone.add(message.id)
        self.messages = {key: message for key, message in self.messages.items() if key not in gone}
        self.updated = _now()
        if self.leaf in gone:
            self.leaf = parent
            others = siblings[max(at - 1, 0) : at] or siblings[at + 1 : at + 2]
            if others:
                self.show(others[0].id)

    def rename(self, title: str) -> None:
        """Give it a title, cut to one line; an empty one brings back the beginning of the first message."""
        self.title = _text(" ".join(_CONTROL.sub(" ", title[: 4 * MAX_TITLE]).split())[:MAX_TITLE])

    def _add(self, role: str, text: str, parent: str | None, details: Mapping[str, Any]) -> Message:
        if len(self.messages) >= MAX_MESSAGES:
            raise ConversationError(f"the conversation has {MAX_MESSAGES} messages, the most it can hold; branch it")
        message = Message(uuid.uuid4().hex, role, _text(text), parent, _details(details))
        _check_role(message, self.messages)
        self.messages[message.id] = message
        self.leaf, self.updated = message.id, _now()
        return message

    # JSON ----------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """All of it. Raises ConversationError where it could not be read again, being too large for instance."""
        _text(self.system, "the system text")
        about = {"schema": SCHEMA, "version": VERSION, **{name: getattr(self, name) for name in _ABOUT}}
        text = json.dumps({**about, "messages": [_as_json(m) for m in self.messages.values()]}, ensure_ascii=False)
        return _sized(text + "\n", "the conversation")

    @classmethod
    def from_json(cls, text: str, where: str = "the file") -> Conversation:
        """Read what to_json wrote. Raises ConversationError, one sentence, for anything else."""
        try:
            value = parse_json(_sized(text, where), where, ConversationError)
        except NeoxLiteError as error:
            raise ConversationError(" ".join(str(error).split())[:300]) from error
        if value.get("schema") != SCHEMA:
            raise ConversationError(f"{where}: schema is {_short(value.get('schema'))}, expected {SCHEMA!r}")
        if value.get("version") != VERSION:
            version = _short(value.get("version"))
            raise ConversationError(f"{where}: version is {version}, expected {VERSION}; update neox-lite to read it")
        try:
            return cls._parse(value)
        except ConversationError as error:
            raise ConversationError(f"{where}: {error}") from None

    @classmethod
    def _parse(cls, value: dict[str, Any]) -> Conversation:
        _check_keys("the conversation", value, {"schema", "version", *_ABOUT, "messages"}, set())
        if not isinstance(value["messages"], list) or len(value["messages"]) > MAX_MESSAGES:
            raise ConversationError(f"messages is not a list of at most {MAX_MESSAGES}")
        messages: dict[str, Message] = {}
        for number, item in enumerate(value["messages"]):
            message = _parse_message(item, f"messages[{number}]")
            if message.id in messages:
                raise ConversationError(f"messages[{number}]: the id {message.id!r} appears twice")
            if message.parent is not None and message.parent not in messages:  # neither unknown ones nor cycles
                raise ConversationError(f"messages[{number}]: parent {message.parent!r} is no earlier message")
            _check_role(message, messages, f"messages[{number}]: ")
            messages[message.id] = message
        leaf = value["leaf"]
        if (leaf is None) != (not messages) or (
            leaf is not None and (not isinstance(leaf, str) or leaf not in messages)
        ):
            raise ConversationError(f"leaf is {_short(leaf)}, expected the id of a message")
        title = _text(value["title"], "title")
        if len(title) > MAX_TITLE or _CONTROL.search(title):
            raise ConversationError(f"title is {_short(title)}, expected one line of at most {MAX_TITLE} characters")
        created, updated = (_time(value[name], name) for name in ("created", "updated"))
        return cls(_id(value["id"], "id"), title, _text(value["system"], "system"), created, updated, leaf, messages)

    # Markdown ------------------------------------------------------------------------------------------------------

    def to_markdown(self) -> str:
        """The path shown, to be read by people; from_markdown reads it as well."""
        parts = [("System", self.system)] if self.system else []
        parts += [(message.role.capitalize(), message.text) for message in self.path()]
        turns = [f"## {name} <!-- neox-lite -->\n\n{_MARK.sub(_escape, text)}\n" for name, text in parts]
        return "\n".join([f"# {self.label}\n", *turns])

    @classmethod
    def from_markdown(cls, text: str, where: str = "the file") -> Conversation:
        """Read what to_markdown wrote: title, system text and one path. Raises ConversationError for anything else."""
        head = _sized(text, where).partition("\n")[0]
        if head.endswith("\r"):  # an editor's line ends: ours are never so in the first line
            text = text.replace("\r\n", "\n")
        marks = [mark for mark in _MARK.finditer(text) if not mark[1]]
        if not head.startswith("# ") or not marks or text[len(head) : marks[0].start()].strip():
            raise ConversationError(
                f"{where}: not a conversation: expected a title, '# …', and turns that neox-lite wrote"
            )
        conversation = cls()
        conversation.rename(head[2:])
        ends = [mark.start() - 1 for mark in marks[1:]] + [len(text)]
        for mark, end in zip(marks, ends, strict=True):
            body = text[mark.end() : end].removeprefix("\n").removeprefix("\n").removesuffix("\n")
            body = _MARK.sub(lambda found: found[0].removeprefix("\\"), body)
            if mark[2] == "System":
                if mark is not marks[0]:
                    raise ConversationError(f"{where}: a system text stands after the first turn; put it first")
                conversation.system = _text(body, "system text")
            else:
                conversation.append(mark[2].lower(), body)
        return conversation


_ABOUT = ("id", "title", "system", "created", "updated", "leaf")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def imported(text: str, where: str = "the file") -> Conversation:
    """A conversation from an export in JSON or Markdown, under a new id: nothing saved before is overwritten by it."""
    read = Conversation.from_json if text.lstrip()[:1] == "{" else Conversation.from_markdown
    return replace(read(text, where), id=uuid.uuid4().hex)


def read_file(path: Path) -> Conversation:
    """`imported` of a file."""
    return imported(_read(path), str(path))


# Saved conversations ---------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A saved conversation in a list. problem: why its file cannot be read, else None."""

    id: str
    title: str
    updated: str
    messages: int
    problem: str | None = None


class Store:
    """Conversations as files <id>.json in a folder, each replaced as a whole: several processes may share it."""

    def __init__(self, folder: Path | None = None) -> None:
        """folder: by default `conversations` among the user's data."""
        self.folder = folder if folder is not None else data_folder("conversations")
        self._listed: dict[Path, tuple[tuple[int, int], Entry]] = {}

    def save(self, conversation: Conversation) -> None:
        """Write a conversation in place of what its file held."""
        text = conversation.to_json().encode()
        path = self._path(conversation.id)
        try:
            write_atomically(path, text, private=True)
        except OSError as error:
            raise ConversationError(
                f"{path}: cannot be written: {error.strerror}; free some space or check it"
            ) from error

    def load(self, id: str) -> Conversation:
        path = self._path(id)
        conversation = Conversation.from_json(_read(path), str(path))
        if conversation.id != id:
            raise ConversationError(f"{path}: holds the conversation {conversation.id}; name the file after it")
        return conversation

    def __contains__(self, id: str) -> bool:
        return self._path(id).is_file()

    def list(self) -> list[Entry]:
        """All of them, newest first; a file that cannot be read stands last, with its problem, and stays as it is."""
        try:
            paths = [path for path in self.folder.iterdir() if path.suffix == ".json" and _ID.fullmatch(path.stem)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConversationError(f"{self.folder}: cannot be listed: {error.strerror}") from error
        return sorted(filter(None, map(self._entry, paths)), key=lambda e: (e.problem is None, e.updated), reverse=True)

    def rename(self, id: str, title: str) -> None:
        conversation = self.load(id)
        conversation.rename(title)
        self.save(conversation)

    def delete(self, id: str) -> None:
        """Remove the file; harmless where there is none."""
        try:
            self._path(id).unlink(missing_ok=True)
        except OSError as error:
            raise ConversationError(f"{self._path(id)}: cannot be deleted: {error.strerror}") from error

    def _entry(self, path: Path) -> Entry | None:
        """One file's line, read only if it changed; None where it is gone by now."""
        try:
            found = path.stat()
        except OSError:
            return None
        key = (found.st_mtime_ns, found.st_size)
        if path not in self._listed or self._listed[path][0] != key:
            try:
                whole = self.load(path.stem)
                entry = Entry(whole.id, whole.label, whole.updated, len(whole.messages))
            except ConversationError as error:
                entry = Entry(path.stem, path.name, "", 0, str(error))
            self._listed[path] = key, entry
        return self._listed[path][1]

    def _path(self, id: str) -> Path:
        return self.folder / f"{_id(id, 'id')}.json"


# Checks ----------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    """A regular UTF-8 file of bounded size."""
    try:
        return read_regular(path, ConversationError, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConversationError(f"{path}: not UTF-8 text: byte {error.start} is wrong") from error


def _sized(text: str, where: str) -> str:
    size = len(text) if len(text) > MAX_BYTES else len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise ConversationError(
            f"{where}: {size} bytes, more than the {MAX_BYTES} that a conversation can have; branch it"
        )
    return text


def _as_json(message: Message) -> dict[str, Any]:
    fields = {"id": message.id, "role": message.role, "text": message.text, "parent": message.parent}
    return {**fields, "details": dict(message.details)} if message.details else fields


def _parse_message(value: Any, where: str) -> Message:
    _check_keys(where, value, {"id", "role", "text", "parent"}, {"details"})
    parent = value["parent"] if value["parent"] is None else _id(value["parent"], f"{where}.parent")
    details = _details(value.get("details", {}), f"{where}.details")
    return Message(
        _id(value["id"], f"{where}.id"), value["role"], _text(value["text"], f"{where}.text"), parent, details
    )


def _check_keys(where: str, value: Any, needed: set[str], allowed: set[str]) -> None:
    if not isinstance(value, dict):
        raise ConversationError(f"{where} is a {type(value).__name__}, expected an object")
    if missing := sorted(needed - value.keys()):
        raise ConversationError(f"{where} has no {missing[0]}")
    if extra := sorted(value.keys() - needed - allowed):
        raise ConversationError(
            f"{where} has {_short(extra[0])}, which is not known; expected {', '.join(sorted(needed))}"
        )


def _check_role(message: Message, messages: Mapping[str, Message], where: str = "") -> None:
    """Roles alternate: many chat templates refuse anything else."""
    if message.role not in ROLES:
        raise ConversationError(f"{where}role is {_short(message.role)}, expected user or assistant")
    expected = "user" if message.parent is None or messages[message.parent].role == "assistant" else "assistant"
    if message.role != expected:
        after = (
            "the first message"
            if message.parent is None
            else f"what follows a message of the {messages[message.parent].role}"
        )
        raise ConversationError(f"{where}{after} is of the {expected}, not of the {message.role}")


def _id(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise ConversationError(f"{where} is {_short(value)}, expected 32 hexadecimal digits")
    return value


def _text(value: Any, where: str = "the text") -> str:
    if not isinstance(value, str):
        raise ConversationError(f"{where} is a {type(value).__name__}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
            f"{where} holds half a character (a lone surrogate) at {error.start}; remove it"
        ) from None
    return value


def _details(value: Any, where: str = "details") -> dict[str, Any]:
    if not isinstance(value, Mapping) or len(value) > MAX_DETAILS:
        raise ConversationError(f"{where} is not an object of at most {MAX_DETAILS} values")
    for name, one in value.items():
        number = isinstance(one, int | float) and math.isfinite(one) and abs(one) < 2**63
        fine = one is None or number or (isinstance(one, str) and len(one) <= MAX_DETAIL)
        if not fine or not re.fullmatch(r"[a-z][a-z_]{0,39}", name):
            raise ConversationError(
                f"{where}: {_short(name)} is {_short(one)}, expected a short text or a finite number"
            )
        if isinstance(one, str):
            _text(one, f"{where}.{name}")
    return dict(value)


def _time(value: Any, where: str) -> str:
    try:
        time = datetime.fromisoformat(value)
        if time.utcoffset() == timedelta(0):
            return time.isoformat(timespec="microseconds")  # one form, so that texts sort as times do
    except (TypeError, ValueError):
        pass
    raise ConversationError(f"{where} is {_short(value)}, expected a time in UTC such as {_now()}")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:59] + "…"


def _escape(mark: re.Match[str]) -> str:
    """A line of a text that looks like one of ours: one more backslash."""
    return "\\" + mark[0]
