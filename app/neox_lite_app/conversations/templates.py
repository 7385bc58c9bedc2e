"""Renders a chat template in a process of its own that is bounded in time and memory. Knows no model and no prompt form."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox_lite.errors import NeoxLiteError, UnsupportedError

MAX_TEMPLATE = 200_000  # characters; the longest that are in use have some 20,000
MAX_PROMPT = 20_000_000  # characters
CPU_S = 5.0  # processor time of one rendering; usual ones take a millisecond
WALL_S = 60.0  # for systems that cannot bound processor time
MEMORY_BYTES = 1 << 30  # for the process altogether; on Linux


class TemplateError(NeoxLiteError, ValueError):
    """A chat template is wrong, refuses the conversation, or takes too long."""


class _Worker:
    """The process. One rendering at a time; started with the first one, and again after it had to be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                self._process = process = self._start()
            assert process.stdin is not None and process.stdout is not None
            late = threading.Timer(WALL_S, process.kill)
            late.start()
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:  # it ended before it had read everything
                line = b""
            finally:
                late.cancel()
            if not line.endswith(b"\n"):
                self._end()
                return {"error": f"it took more than {CPU_S:g} seconds or {MEMORY_BYTES >> 20} MiB, and was stopped"}
            reply: dict[str, str] = json.loads(line)
            return reply

    def close(self) -> None:
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        path = Path(__file__).with_name("template_worker.py")
        return subprocess.Popen(
            [sys.executable, str(path), str(MEMORY_BYTES), str(CPU_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
        )

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


_worker = _Worker()
atexit.register(_worker.close)


def render_template(template: str, variables: Mapping[str, Any]) -> str:
    """What the template makes of the variables (JSON values). Raises TemplateError, one sentence that says why not."""
    try:
        import jinja2  # noqa: F401 - the process needs it
    except ImportError:
        raise UnsupportedError("chat templates need Jinja2; pip install 'neox-lite[page]'") from None
    if len(template) > MAX_TEMPLATE:
        raise TemplateError(f"chat template: {len(template)} characters, expected at most {MAX_TEMPLATE}")
    reply = _worker.ask({"template": template, "variables": dict(variables), "most_characters": MAX_PROMPT})
    if "error" in reply:
        raise TemplateError(f"chat template: {reply['error']}; choose another prompt form, as with --form")
    return reply["text"]
