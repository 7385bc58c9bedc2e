"""neox-lite chat: a conversation in the terminal, streamed through the engine. Knows no page and no HTTP.

Where stdin is no terminal, its lines are the turns and the answers are all that is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from neox_lite.errors import ArgumentError, NeoxLiteError
from neox_lite.generation.options import Options
from neox_lite.generation.parameters import NUMBERS

from .conversations.conversation import Conversation, Store, read_file
from .conversations.prompt_forms import check_name, form_named, form_of
from .load_for_command import load, sampling
from .paths import data_folder
from .serving.engine import Engine
from .serving.jobs import Ticket
from .session import Session
from .terminal import note, printable

try:
    import readline
except ImportError:  # on Windows; then there is no history
    readline = None  # type: ignore[assignment]

HISTORY_LINES = 1000
SHOWN_AGAIN = 4  # messages of a resumed conversation
SETTINGS = (*(parameter.name for parameter in NUMBERS), "max_new_tokens", "stop")
COMMANDS = {
    "help": ("", "this list"),
    "new": ("", "a new conversation; the present one stays in /list"),
    "regen": ("", "another answer to the last message"),
    "edit": ("[TEXT]", "write the last message anew"),
    "undo": ("", "take the last message and its answer back"),
    "continue": ("", "go on with the last answer"),
    "system": ("[TEXT|none]", "show or set the system text"),
    "save": ("FILE", "write the conversation: Markdown for a name that ends in .md, else JSON"),
    "load": ("FILE|N", "go on with an exported conversation, or with number N of /list"),
    "list": ("", "saved conversations, the newest first"),
    "params": ("", "model, prompt form and settings"),
    "set": ("NAME VALUE", "change a setting, as /set temperature 0.5; the value none takes it back"),
    "raw": ("", "the prompt as the model sees it"),
    "exit": ("", "leave; so does Ctrl-D, and Ctrl-C where nothing is typed"),
}


def chat(args: argparse.Namespace) -> None:
    settings = {**sampling(args), "max_new_tokens": args.max_new_tokens, "stop": args.stop}
    settings = {name: value for name, value in settings.items() if value is not None}
    check_settings(settings)  # bad values are refused before minutes of loading
    if args.form is not None:
        check_name(args.form)
    typed = sys.stdin is not None and sys.stdin.isatty()
    store = Store()
    conversation = _newest(store) if args.resume else Conversation()
    if args.system is not None:
        conversation.system = args.system
    engine = Engine(sequences=1)
    try:
        engine.load(args.model, lambda: load(args.model, args, args.head))
        form = form_of(args.model, engine.tokenizer, args.form)
        saved_to = store if typed or args.resume else None  # what a script pipes in is not to fill the list
        session = Session(engine, form, conversation, settings, saved_to)
        if typed:
            Terminal(session, store).run()
        else:
            _piped(session)
    finally:
        engine.close()


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse bad values."""
    Options.parse({**settings, "do_sample": True})


def _newest(store: Store) -> Conversation:
    found = [entry for entry in store.list() if entry.problem is None]
    if not found:
        raise ArgumentError(f"--resume: no saved conversation in {store.folder}; start without it")
    return store.load(found[0].id)


def _piped(session: Session) -> None:
    def started(ticket: Ticket) -> None:
        for text in session.notes:
            note(text)

    lines = sys.stdin.buffer if sys.stdin is not None else []
    for number, raw in enumerate(lines, 1):
        try:
            text = raw.decode().strip()
        except UnicodeDecodeError as error:
            raise ArgumentError(f"stdin: line {number} is not UTF-8 text (byte {error.start} of it)") from error
        if not text:
            continue
        session.say(text)
        for piece in session.answer(started=started):
            print(piece, end="", flush=True)
        print(flush=True)
        if session.figures.error:
            raise NeoxLiteError(session.figures.error)


# The terminal ----------------------------------------------------------------------------------------------------------


class StopKey:
    """While it is entered, Ctrl-C cancels a ticket and does nothing else."""

    def __init__(self) -> None:
        self._pressed = False
        self._ticket: Ticket | None = None

    def __enter__(self) -> StopKey:
        self._previous = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        signal.signal(signal.SIGINT, self._previous)
        return False

    def aim(self, ticket: Ticket) -> None:
        self._ticket = ticket
        if self._pressed:
            ticket.cancel()

    def _press(self, *_: object) -> None:
        self._pressed = True
        if self._ticket is not None:
            self._ticket.cancel()


class Terminal:
    """Reads lines and commands, prints answers. Model text never controls the terminal."""

    def __init__(self, session: Session, store: Store) -> None:
        self._session, self._store = session, store
        self._shown = sys.stdout.isatty()
        self._colours = self._shown and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._typed = False  # whether something stood on the line when Ctrl-C came
        self._listed: list[str] = []  # ids, as /list numbered them

    def run(self) -> None:
        """Until people leave."""
        self._tell(f"prompt form: {self._session.form.title}. /help lists the commands.")
        self._show_again()
        previous = signal.signal(signal.SIGINT, self._interrupt)
        try:
            with _history():
                while (text := self._read()) is not None:
                    try:
                        if text and self._act(text) == "exit":
                            return
                    except NeoxLiteError as error:
                        self._tell(str(error))
                    except KeyboardInterrupt:  # between two steps of a command
                        self._tell("interrupted")
        finally:
            signal.signal(signal.SIGINT, previous)

    # Reading -------------------------------------------------------------------------------------------------------

    def _read(self) -> str | None:
        """A message or command of one or more lines, "" for none, None to leave."""
        try:
            text = self._line("> ")
            if text.startswith('"""'):
                while not text.rstrip().endswith('"""') or len(text.rstrip()) < 6:
                    text += "\n" + self._line(". ")
                text = text.rstrip()[3:-3].strip("\n")
                return f"/{text}" if text.startswith("/") else text  # no command
            while text.endswith("\\"):
                text = text[:-1] + "\n" + self._line(". ")
            return text.strip()
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return "" if self._typed else None

    def _line(self, prompt: str) -> str:
        self._typed = prompt != "> "
        if not self._shown:  # then the prompt is no part of the output
            print(prompt, end="", file=sys.stderr, flush=True)
            return input()
        return input(f"\001\033[1m\002{prompt}\001\033[0m\002" if self._colours else prompt)

    def _interrupt(self, *_: object) -> None:
        """Ctrl-C at the prompt: a line that is being typed is dropped."""
        self._typed = self._typed or (readline is not None and bool(readline.get_line_buffer()))
        raise KeyboardInterrupt

    # Showing -------------------------------------------------------------------------------------------------------

    def _print(self, text: str, end: str = "\n") -> None:
        print(printable(text) if self._shown else text, end=end, flush=True)

    def _tell(self, text: str) -> None:
        """A line that is not the model's."""
        text = printable(text)
        note(f"\033[2m{text}\033[0m" if self._colours else text)

    def _show_again(self) -> None:
        for message in self._session.conversation.path()[-SHOWN_AGAIN:]:
            self._print(f"> {message.text}" if message.role == "user" else message.text)

    def _answer(self, continue_last: bool = False) -> None:
        """Stream an answer, then its figures. Ctrl-C ends it; what is there is kept."""
        session = self._session
        with StopKey() as key:

            def started(ticket: Ticket) -> None:
                key.aim(ticket)
                for text in session.notes:
                    self._tell(text)

            for piece in session.answer(continue_last, started):
                self._print(piece, end="")
            self._print("")
        self._tell(session.figures.error or self._status())

    def _status(self) -> str:
        figures = self._session.figures
        clock = figures.clock
        parts = [f"{clock.tokens} tokens"]
        if clock.tokens_per_s is not None:
            parts.append(f"{clock.tokens_per_s:.1f} tokens/s")
        if clock.wait_s is not None:
            parts.append(f"the first after {clock.wait_s:.2f} s")
        parts.append(f"context {figures.used} of {self._session.engine.context}")
        why = {"length": "; cut at the limit, /continue goes on", "cancelled": "; stopped, /continue goes on"}
        return ", ".join(parts) + why.get(str(figures.finish_reason), "")

    # Commands ------------------------------------------------------------------------------------------------------

    def _act(self, text: str) -> str | None:
        """A message, or a command; "exit" is handed back. //x is the message /x."""
        if not text.startswith("/") or text.startswith("//"):
            self._session.say(text.removeprefix("/"))
            self._answer()
            return None
        name, _, rest = text[1:].partition(" ")
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            advice = f"did you mean /{near[0]}" if near else "/help lists them"
            raise ArgumentError(f"/{name}: no such command; {advice}; a message that begins so is typed //{name}")
        argument = COMMANDS[name][0]
        rest = rest.strip()
        if (rest and not argument) or (not rest and argument and not argument.startswith("[")):
            raise ArgumentError(f"usage: /{name} {argument}".rstrip())
        if name == "exit":
            return name
        act: Callable[[str], None] = getattr(self, f"_{name}")
        act(rest)
        return None

    def _help(self, _: str) -> None:
        for name, (arguments, what) in COMMANDS.items():
            self._tell(f"/{name} {arguments}".ljust(22) + what)
        self._tell('A line that ends in \\ goes on in the next one; """ begins and ends a text of several lines.')

    def _new(self, _: str) -> None:
        self._session.conversation = Conversation(system=self._session.conversation.system)
        self._tell("a new conversation")

    def _regen(self, _: str) -> None:
        self._answer()

    def _edit(self, text: str) -> None:
        last = self._last_message()
        text = text or self._prefilled(self._session.conversation[last].text)
        if text.strip():
            self._session.conversation.edit(last, text)
            self._answer()

    def _prefilled(self, text: str) -> str:
        """What people make of a text."""
        if readline is None:
            raise ArgumentError("usage: /edit TEXT (there is no line editor here)")
        readline.set_startup_hook(lambda: readline.insert_text(text))
        try:
            return self._line("> ")
        except EOFError:
            return ""
        finally:
            readline.set_startup_hook(None)

    def _undo(self, _: str) -> None:
        self._session.conversation.delete(self._last_message())
        self._save_quietly()
        left = len(self._session.conversation.path())
        self._tell(f"taken back; {left} messages are left")

    def _last_message(self) -> str:
        """The id of the last message of the user."""
        last = self._session.conversation.last
        if last is None:
            raise ArgumentError("there is no message yet")
        return last.id if last.parent is None or last.role == "user" else last.parent

    def _continue(self, _: str) -> None:
        self._answer(continue_last=True)

    def _system(self, text: str) -> None:
        if text:
            self._session.conversation.system = "" if text == "none" else text
            self._save_quietly()
        self._tell(f"system text: {self._session.conversation.system or 'none (the prompt form may have its own)'}")

    def _save(self, name: str) -> None:
        path, talk = _path(name), self._session.conversation
        text = talk.to_markdown() if path.suffix.lower() == ".md" else talk.to_json()
        try:
            with path.open("x", encoding="utf-8", newline="") as file:
                file.write(text)
        except FileExistsError:
            raise ArgumentError(f"{path}: exists; name another file") from None
        except OSError as error:
            raise ArgumentError(f"{path}: cannot be written: {error.strerror}") from None
        self._tell(f"saved as {path}")

    def _load(self, name: str) -> None:
        number = int(name) if re.fullmatch("[0-9]{1,5}", name) else 0
        if 0 < number <= len(self._listed):
            self._session.conversation = self._store.load(self._listed[number - 1])
        elif number and not _path(name).exists():
            raise ArgumentError(f"/load {name}: no such number; /list shows them")
        else:
            self._session.conversation = read_file(_path(name))
        self._show_again()

    def _list(self, _: str) -> None:
        entries = self._store.list()
        self._listed = [entry.id for entry in entries]
        for number, entry in enumerate(entries, 1):
            what = (
                f"cannot be read: {entry.problem}"
                if entry.problem
                else f"{entry.messages} messages, {entry.updated[:16]}"
            )
            self._tell(f"{number:3}  {entry.title}  ({what})")
        if not entries:
            self._tell(f"none yet in {self._store.folder}")

    def _params(self, _: str) -> None:
        session = self._session
        self._tell(f"model {session.engine.name}, context {session.engine.context}, prompt form {session.form.name}")
        for name, value in session.settings.items():
            self._tell(f"{name} {value}")

    def _set(self, words: str) -> None:
        name, _, value = words.partition(" ")
        settings, value = self._session.settings, value.strip()
        if name == "form":
            self._session.form = form_named(value, self._session.engine.tokenizer)
        elif value == "none":
            settings.pop(name, None)
        else:
            if name not in SETTINGS:
                raise ArgumentError(f"/set: found {name!r}, expected one of {', '.join(SETTINGS)}, form")
            found = [value] if name == "stop" else _number(value)
            check_settings({name: found})
            settings[name] = found
        self._tell(f"{name} {value}")

    def _raw(self, _: str) -> None:
        """As for the next answer: without what does not fit."""
        session, last = self._session, self._session.conversation.last
        turn = session.turn(last.text if last is not None and last.role == "assistant" else "")
        for text in turn.notes:
            self._tell(text)
        self._print(session.engine.tokenizer.decode(turn.ids, skip_special_tokens=False))

    def _save_quietly(self) -> None:
        if self._session.store is not None:
            self._session.store.save(self._session.conversation)


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ArgumentError(f"{name}: there is no such user; give the whole path") from None


def _number(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ArgumentError(f"/set: found {text!r}, expected a number, or none") from None


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """The lines typed before, also in earlier sessions."""
    if readline is None:
        yield
        return
    path = data_folder("chat_history")
    with contextlib.suppress(OSError):  # there is none yet
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(path)
        except OSError as error:
            note(f"{path}: the history cannot be written: {error.strerror}")
