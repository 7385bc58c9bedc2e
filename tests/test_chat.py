"""The terminal chat, through pipes and through a real pseudo-terminal, and the session underneath."""

import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import commands
from support.serving import demo_engine

from neox_lite.errors import ArgumentError, ContextLengthError
from neox_lite.generation.parameters import NUMBERS
from neox_lite_app.chat import Terminal
from neox_lite_app.cli import build_parser
from neox_lite_app.conversations.conversation import Conversation, Store, read_file
from neox_lite_app.conversations.prompt_forms import FORMS
from neox_lite_app.paths import DEMO
from neox_lite_app.session import Session
from neox_lite_app.terminal import printable

pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
PATIENCE_S = 120  # with a process that shows nothing new; no test waits so long unless it fails


@pytest.fixture(scope="module")
def engine():
    with demo_engine() as engine:
        yield engine


@pytest.fixture
def session(engine, tmp_path):
    settings = {"temperature": 0.8, "seed": 5, "max_new_tokens": 24}
    return Session(engine, FORMS["dialogue"], Conversation(), settings, Store(tmp_path))


def talk(session, text):
    session.say(text)
    return "".join(session.answer())


# The session -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_streamed_kept_and_saved_with_its_figures(session):
    shown = talk(session, "Who art thou?")
    last = session.conversation.last
    assert shown and shown == last.text and last.role == "assistant"
    assert last.details["finish_reason"] in ("stop", "length") and 0 < last.details["tokens"] <= 24
    assert last.details["model"] == str(DEMO) and session.figures.clock.wait_s >= 0
    assert session.store.load(session.conversation.id) == session.conversation


def test_the_model_gets_exactly_the_forms_prompt(session, engine):
    talk(session, "Who art thou?")
    session.say("And who am I?")
    session.conversation.system = "Speak."
    text = session.form.render(session.conversation.chat(), "Speak.")
    assert session.turn().ids == engine.tokenizer(text).input_ids


def test_another_answer_differs_even_with_a_seed_and_comes_back_the_same_in_a_new_session(session, engine):
    first = talk(session, "Who art thou?")
    second = "".join(session.answer())
    assert first != second and session.conversation.place(session.conversation.leaf) == (2, 2)
    again = Session(engine, session.form, Conversation(), session.settings)
    assert talk(again, "Who art thou?") == first and "".join(again.answer()) == second


def test_a_continued_answer_grows_and_counts_all_its_tokens(session):
    first = talk(session, "Who art thou?")
    while session.figures.finish_reason != "length":
        first = "".join(session.answer())
    tokens = session.conversation.last.details["tokens"]
    more = "".join(session.answer(continue_last=True))
    assert session.conversation.last.text == first + more
    assert session.conversation.last.details["tokens"] == tokens + session.figures.clock.tokens
    with pytest.raises(ArgumentError, match="no answer to continue"):
        "".join(Session(session.engine, session.form, Conversation()).answer(continue_last=True))


def test_a_cancelled_answer_keeps_what_there_is(session):
    session.settings["max_new_tokens"] = 300
    session.say("Speak at length.")
    tickets, pieces = [], []
    for piece in session.answer(started=tickets.append):
        pieces.append(piece)
        tickets[0].cancel()
    assert session.figures.finish_reason == "cancelled" and session.figures.clock.tokens < 300
    assert session.conversation.last.text == "".join(pieces) and pieces


def test_an_answer_cancelled_before_its_first_word_leaves_the_question_to_be_replaced(session):
    session.say("Who art thou?")
    assert list(session.answer(started=lambda ticket: ticket.cancel())) == []
    assert session.conversation.last.role == "user"
    session.say("Who am I?")  # instead of a second question in a row
    assert [message.text for message in session.conversation.path()] == ["Who am I?"]


def test_forty_turns_go_on_past_the_context_with_a_marker(session):
    session.settings["max_new_tokens"] = 16
    for number in range(40):
        talk(session, f"This is question number {number}, and it takes some of the context.")
        assert session.figures.used <= session.engine.context
    assert session.figures.turn.dropped > 20 and "no longer sent" in session.notes[0]
    assert len(session.conversation.path()) == 80


def test_a_message_that_is_too_long_is_refused_and_the_chat_goes_on(session):
    session.say("word " * 1000)
    with pytest.raises(ContextLengthError, match="room for 511"):
        list(session.answer())
    assert session.conversation.last.role == "user"
    assert talk(session, "Short.")


def test_in_greedy_decoding_nothing_is_set_that_has_no_effect(session, recwarn):
    session.settings |= {"temperature": 0, "top_k": 5, "top_p": 0.5}
    assert talk(session, "Who art thou?") and not [w for w in recwarn if "effect" in str(w.message)]


# Flags -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["chat", "M"], ["generate", "M", "--prompt", "x"]])
def test_every_number_of_sampling_has_its_flag(command):
    names = [parameter.name for parameter in NUMBERS]
    flags = [word for name in names for word in (f"--{name.replace('_', '-')}", "1")]
    args = build_parser().parse_args([*command, *flags])
    assert [getattr(args, name) for name in names] == [1] * len(names)
    assert build_parser().parse_args(["chat", "M"]).temperature == 0.8


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("over\rwritten\x08\x7f\x00", "over\\x0dwritten\\x08\\x7f\\x00"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),
        ("日本 ü \u200f", "日本 ü \u200f"),
    ],
)
def test_control_characters_are_shown_and_never_sent_to_the_terminal(text, shown):
    assert printable(text) == shown


# Through pipes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path):
    data = {"NEOX_LITE_DATA": str(tmp_path / "data"), "TERM": "xterm", "CUDA_VISIBLE_DEVICES": ""}
    return commands.environment(NO_COLOR=None, **data)


@pytest.fixture
def piped(run, environment, monkeypatch):
    monkeypatch.setenv("NEOX_LITE_DATA", environment["NEOX_LITE_DATA"])

    def call(text, *words):
        raw = io.BytesIO(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="utf-8"))
        return run("chat", DEMO, "--device", "cpu", *words)

    return call


def test_lines_of_a_pipe_are_turns_and_only_answers_are_printed(piped, session, environment):
    flags = ("--seed", "5", "--max-new-tokens", "24")
    code, out, err = piped("Who art thou?\n\n/help me\n", *flags)
    expected = [talk(session, "Who art thou?"), talk(session, "/help me")]
    assert (code, out) == (0, "\n".join(expected) + "\n")
    assert "demo_model" in err and ">" not in err and "tokens/s" not in err
    assert Store(Path(environment["NEOX_LITE_DATA"]) / "conversations").list() == []


def test_a_piped_line_that_is_not_utf8_ends_with_one_sentence(piped):
    code, _, err = piped(b"ok\n\xff\n", "--max-new-tokens", "4")
    assert code == 1 and "stdin: line 2 is not UTF-8" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message", "loads"),
    [
        ("--temperature -1", "temperature is -1.0", False),
        ("--form llama", "prompt form: found 'llama'", False),
        ("--form template", "has no chat template", True),
        ("--resume", "no saved conversation", False),
    ],
)
def test_a_wrong_flag_is_one_sentence_before_loading_where_that_can_be(piped, words, message, loads):
    code, out, err = piped("x\n", *words.split())
    assert ("backend" in err) == loads
    assert code == 1 and out == "" and message in err.splitlines()[-1] and "Traceback" not in err


# In a terminal ---------------------------------------------------------------------------------------------------------


class Screen:
    """A process on a pseudo-terminal of its own, and what it has shown."""

    def __init__(self, command, environment):
        self._fd, inner = pty.openpty()

        def take_terminal():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        ends = {"stdin": inner, "stdout": inner, "stderr": inner}
        self.process = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=take_terminal, **ends
        )
        os.close(inner)
        self.shown, self.read = "", 0

    def type(self, text):
        os.write(self._fd, text.encode())

    def interrupt(self):
        """Ctrl-C, as people press it: not while the line editor draws, which would notice it a key later."""
        time.sleep(0.3)
        self.type("\x03")

    def expect(self, pattern):
        """Wait for what was not waited for before; what stood before it."""
        while not (found := re.compile(pattern).search(self.shown, self.read)):
            assert self._more(), f"{pattern!r} not in {self.shown[self.read :]!r}"
        before, self.read = self.shown[self.read : found.start()], found.end()
        return before

    def say(self, line, *shown):
        """Type a line, wait for each of these, and for the next prompt."""
        self.type(line + "\n")
        self.expect(re.escape(line[-20:].splitlines()[-1]))
        for pattern in shown:
            self.expect(pattern)
        self.expect("> ")

    def leave(self):
        self.type("/exit\n")
        assert self.end() == 0 and "Traceback" not in self.shown

    def end(self):
        """Its exit code."""
        with contextlib.suppress(OSError):
            while self._more():
                pass
        return self.process.wait(60)

    def _more(self):
        try:
            data = os.read(self._fd, 65536) if select.select([self._fd], [], [], PATIENCE_S)[0] else b""
        except OSError:  # Linux's end of a terminal
            data = b""
        self.shown += data.decode(errors="replace")
        return bool(data)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._fd)


@pytest.fixture
def terminal(environment):
    """Start the chat on a pseudo-terminal, and wait for its first prompt."""
    screens = []

    def start(*words, **variables):
        command = commands.command("chat", DEMO, "--threads", 1, "--seed", 3, *words)
        screens.append(Screen(command, {**environment, **variables}))
        screens[-1].expect("/help lists the commands")
        screens[-1].expect("> ")
        return screens[-1]

    yield start
    for screen in screens:
        screen.close()


def saved(environment):
    store = Store(Path(environment["NEOX_LITE_DATA"]) / "conversations")
    return [store.load(entry.id) for entry in store.list()]


STATUS = r"\d+ tokens, [\d.]+ tokens/s, the first after [\d.]+ s, context \d+ of 512"


def test_ctrl_c_stops_the_answer_and_keeps_it_and_the_chat_goes_on(terminal, environment):
    screen = terminal()
    screen.type("Speak at length of love and war.\n")
    screen.expect(r"war\.\r\n")
    screen.expect(r"\w+")  # the answer has begun
    screen.type("\x03")
    screen.expect(STATUS + "; stopped, /continue goes on")
    screen.expect("> ")
    (conversation,) = saved(environment)
    partial = conversation.last
    assert partial.details["finish_reason"] == "cancelled" and partial.text
    screen.say("/set max_new_tokens 5", "max_new_tokens 5")
    screen.say("/continue", "5 tokens")
    (conversation,) = saved(environment)
    assert conversation.last.text.startswith(partial.text) and len(conversation.last.text) > len(partial.text)
    screen.leave()


def test_ctrl_c_drops_a_line_and_leaves_at_an_empty_one(terminal):
    screen = terminal()
    screen.type("half a li")
    screen.expect("half a li")
    screen.interrupt()
    screen.expect("> ")
    screen.type("two \\\n")
    screen.expect(r"\. ")
    screen.interrupt()
    screen.expect("> ")
    screen.interrupt()
    assert screen.end() == 0 and "tokens" not in screen.shown and "Traceback" not in screen.shown
    assert "\x1b[1m" in screen.shown


def test_every_command_does_what_its_line_says(terminal, environment, tmp_path):
    screen = terminal("--max-new-tokens", "12", "--system", "Be brief.")
    screen.say("/help", "/regen", "another answer", '""" begins')
    screen.say("First question.", STATUS)
    screen.say("/regen", STATUS)
    (conversation,) = saved(environment)
    assert conversation.place(conversation.leaf) == (2, 2) and conversation.system == "Be brief."
    for line, *shown in (
        ("/edit Second question.", STATUS),
        ("/raw", "Be brief", "User: Second question", "Assistant:"),
        ("/system Be long.", "system text: Be long"),
        ("/set temperature 0.5", "temperature 0.5"),
        ("/set temperature cold", "found 'cold', expected a number"),
        ("/set temperature -3", "temperature is -3"),
        ("/set colour 1", "found 'colour', expected one of temperature, "),
        ("/params", "context 512, prompt form dialogue", "temperature 0.5"),
        (f"/save {tmp_path / 'talk.md'}", "saved as"),
        (f"/save {tmp_path / 'talk.md'}", "exists; name another"),
        (f"/save {tmp_path / 'talk.json'}", "saved as"),
        ("/undo", "taken back; 2 messages are left"),  # the first wording of the question is shown again
        ("/new", "a new conversation"),
        ("//list is a message", STATUS),
        ("/list", "1  /list is a message", "2  First question"),
        ("/load 2", "First question"),
        (f"/load {tmp_path / 'talk.md'}", "Second question"),
        (f"/load {tmp_path / 'absent'}", "cannot be read"),
        ("/load 9", "no such number"),
        ("/load ~nobody-at-all/x", "no such user"),
        (f"/load {tmp_path}", "not a regular file"),
        ("/save /nowhere/x", "cannot be written"),
        ("/continuee", "did you mean /continue"),
        ("/new now", "usage: /new"),
    ):
        screen.say(line, *shown)
    screen.leave()
    exported = [read_file(tmp_path / name) for name in ("talk.md", "talk.json")]
    assert exported[0].chat() == exported[1].chat() and exported[0].path()[0].text == "Second question."
    assert json.loads((tmp_path / "talk.json").read_text())["system"] == "Be long."


def test_messages_of_several_lines(terminal, environment):
    screen = terminal("--max-new-tokens", "4")
    for lines in ("one \\\ntwo\n", '"""\n/not a command\n  indented\n"""\n'):
        screen.type(lines)
        screen.expect(STATUS)
        screen.expect("> ")
    (conversation,) = saved(environment)
    texts = [message.text for message in conversation.path() if message.role == "user"]
    assert texts == ["one \ntwo", "/not a command\n  indented"]


def test_the_history_outlives_the_session_and_edit_brings_the_text_back(terminal, environment):
    screen = terminal("--max-new-tokens", "4", NO_COLOR="1")
    screen.say("remember me", STATUS)
    screen.type("/edit\n")
    screen.expect("> remember me")
    screen.type(" well\n")
    screen.expect(STATUS)
    screen.expect("> ")
    screen.type("\x04")
    assert screen.end() == 0
    (conversation,) = saved(environment)
    assert conversation.path()[0].text == "remember me well" and conversation.place(conversation.path()[0].id) == (2, 2)
    again = terminal("--resume", "--max-new-tokens", "4", NO_COLOR="1")
    assert "> remember me well" in again.shown
    again.type("\x1b[A\x1b[A\x1b[A\n")  # up, past " well" and /edit
    again.expect("remember me\r?\n")
    again.expect(STATUS)
    (conversation,) = saved(environment)
    assert [message.text for message in conversation.path()][::2] == ["remember me well", "remember me"]


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_are_for_terminals_that_want_them(session, monkeypatch, capsys, variable):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for wanted in (True, False):
        Terminal(session, session.store)._tell("noted")
        out = capsys.readouterr()
        assert ("\x1b[" in out.out + out.err) == wanted
        monkeypatch.setenv(*variable)


def test_text_of_others_does_not_reach_the_terminal_as_it_is(terminal, tmp_path):
    talk = Conversation(title="\x1b]0;evil\x07")
    talk.append("user", "\x1b[2Jq")
    talk.append("assistant", "\x1b[31mred\x9b")
    path = tmp_path / "evil.json"
    path.write_text(talk.to_json().replace(r"\u001b]0;evil\u0007", "evil"))
    screen = terminal(NO_COLOR="1")
    screen.say(f"/load {path}", r"\\x1b\[31mred\\x9b")
    screen.say("/raw", r"Assistant: \\x1b\[31mred")
    assert "\x1b[31m" not in screen.shown and "\x1b[2J" not in screen.shown


def test_an_answer_into_a_file_is_plain_text(environment, tmp_path):
    """stdin is a terminal, stdout is not: what people see goes to stderr, the answers to the file."""
    with (tmp_path / "out").open("w") as out:
        command = f"exec {sys.executable} -m neox_lite_app chat {DEMO} --threads 1 --max-new-tokens 4 > {out.name}"
        with contextlib.closing(Screen(["bash", "-c", command], environment)) as screen:
            screen.expect("> ")
            screen.say("hello", STATUS)
            screen.leave()
    (conversation,) = saved(environment)
    assert (tmp_path / "out").read_text() == conversation.last.text + "\n" and "\x1b[2m" not in screen.shown
