"""The documents as data, and a session that runs one: its blocks in order, in one folder, with one Python namespace.

Knows a small part of a shell: lines that go on after a backslash or inside quotes, `&&`, pipes, redirection, `export` and
`NAME=value` before a command. `neox-lite` runs in this process, because starting one for each line would take seconds; every
other command runs in bash.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn

from neox_lite_app import server
from neox_lite_app.cli import build_parser, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
QUOTED = r""""(?:\\.|[^"\\])*"|'[^']*'"""


@dataclass(frozen=True)
class Block:
    """A fenced block. tag: its kind and what is said of it, as ("sh", "fails")."""

    page: str
    line: int
    tag: tuple[str, ...]
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^(`{3,})([^\n`]*)\n(.*?)^\1[ ]*$", text, re.MULTILINE | re.DOTALL)
    return [
        Block(page.name, text.count("\n", 0, match.start()) + 1, tuple(match[2].split()), match[3]) for match in found
    ]


def prose_of(page: Path) -> str:
    """What stands outside of fenced blocks."""
    return re.sub(r"^(`{3,})[^\n]*\n.*?^\1[ ]*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def split(text: str, operator: str) -> list[str]:
    """The parts of a text between an operator that stands outside of quotes."""
    parts = [""]
    for piece in re.findall(rf"{QUOTED}|{re.escape(operator)}|.", text, re.DOTALL):
        if piece == operator:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def commands_of(code: str) -> list[str]:
    """The single commands of a shell block, each with its pipes, without comments and with `.venv/bin/` taken off."""
    lines = (split(line, " #")[0].strip() for line in split(code.replace("\\\n", " "), "\n"))
    commands = (command.strip() for line in lines if not line.startswith("#") for command in split(line, "&&"))
    return [command.replace(".venv/bin/", "") for command in commands if command]


class Session:
    """One document, run from top to bottom in the current folder. Leave it with `close`."""

    def __init__(self, environment: dict[str, str]) -> None:
        """environment: what commands get beside this process's own."""
        self.names: dict[str, object] = {"__name__": "__main__"}
        self.environment = dict(environment)
        self.servers: dict[int, Server] = {}
        self.printed = ""

    def close(self) -> None:
        for running in self.servers.values():
            running.close()

    def python(self, block: Block) -> None:
        """Run a block of Python; what it prints is in `printed`."""
        with self._output() as out:
            exec(compile(self._addressed(block.code), str(block), "exec"), self.names)
        self.printed = out()

    def shell(self, command: str, fails: bool = False) -> None:
        """Run one command, which must end well, or with exit code 1; what it printed is added to `printed`."""
        out, err = "", ""
        stages = split(command, "|")
        for stage in stages:
            out, error, code = self._stage(stage.strip(), out)
            err += error
            expected = 1 if fails and stage is stages[-1] else 0
            if code != expected:
                pytest.fail(f"{stage}: exit code {code}, expected {expected}\n{out}\n{err}", pytrace=False)
        self.printed += out + (err if fails else "")

    def _stage(self, stage: str, given: str) -> tuple[str, str, int]:
        """stdout, stderr and exit code of one command of a pipe."""
        words = shlex.split(stage)
        extra = {}
        while words and re.match(r"[A-Z_0-9]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            extra[name] = value
        if words and words[0] == "export":
            self.environment |= dict(word.split("=", 1) for word in words[1:])
            os.environ |= self.environment
            return "", "", 0
        if words[0] != "neox-lite":
            stage = self._addressed(stage)
            if words[0] == "curl":
                stage = stage.replace("curl ", "curl -sS --fail-with-body ", 1)
            done = subprocess.run(
                ["bash", "-c", stage],
                input=given,
                capture_output=True,
                text=True,
                timeout=120,
                env={**os.environ, **self.environment},
            )
            return done.stdout, done.stderr, done.returncode
        return self._neox_lite(words[1:], extra, given)

    def _neox_lite(self, words: list[str], extra: dict[str, str], given: str) -> tuple[str, str, int]:
        target = None
        if ">" in words:
            words, (target,) = words[: words.index(">")], words[words.index(">") + 1 :]
        if "<" in words:
            words, (source,) = words[: words.index("<")], words[words.index("<") + 1 :]
            given = Path(source).read_text(encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch, self._output(separate=True) as output:
            for name, value in extra.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode()), encoding="utf-8"))
            try:
                code = self._serve(words) if words[0] == "serve" else main(words)
            except SystemExit as end:  # wrong usage, --help, --version
                code = int(end.code or 0)
        out, err = output()
        if target is not None:
            Path(target).write_text(out, encoding="utf-8")
            out = ""
        return out, err, code

    def _serve(self, words: list[str]) -> int:
        """Start a server that stays until the document ends, or until another one takes its port."""
        port = build_parser().parse_args(["serve", *words[1:]]).port
        if port in self.servers:
            self.servers.pop(port).close()
        started = Server(words)
        if started.url:
            self.servers[port] = started
        return started.code

    def _addressed(self, text: str) -> str:
        """Addresses of the document's servers are those at which the test's listen."""
        for port, running in self.servers.items():
            text = re.sub(rf"http://(127\.0\.0\.1|localhost):{port}\b", running.url, text)
        return text

    @contextlib.contextmanager
    def _output(self, separate: bool = False):
        """A function that gives what was printed: all together, or stdout and stderr."""
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) if separate else out
        texts = lambda: [stream.buffer.getvalue().decode() for stream in (out, err)]  # noqa: E731
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield (lambda: tuple(texts())) if separate else (lambda: texts()[0])


class Server:
    """`neox-lite serve` in a thread, at a port of its own, until it is closed. url: "" if it ended with `code`."""

    def __init__(self, words: list[str]) -> None:
        self.url, self.code = "", 0
        self._ready, self._uvicorn = threading.Event(), None
        self._thread = threading.Thread(target=self._main, args=(words,))
        with pytest.MonkeyPatch.context() as patch:
            bind = server._bind
            patch.setattr(server, "_bind", lambda host, port: bind("127.0.0.1", 0))
            patch.setattr(server, "_run", self._run)
            patch.setattr(server, "_mount_page", lambda *given: None)  # tests/test_page.py has a browser for it
            self._thread.start()
            self._ready.wait()

    def close(self) -> None:
        if self._uvicorn is not None:
            self._uvicorn.should_exit = self._uvicorn.force_exit = True
        self._thread.join()

    def _main(self, words: list[str]) -> None:
        try:
            self.code = main(words)
        finally:
            self._ready.set()

    def _run(self, guard, engine, listener, host) -> int:
        """In place of what handles signals, which only a main thread can."""
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(guard, http="h11", ws="none", log_level="critical", lifespan="off")
        self._uvicorn = uvicorn.Server(config)
        listener.listen()
        self._ready.set()
        self._uvicorn.run(sockets=[listener])
        return 0
