"""Renders chat templates for templates.py, in a process of its own: JSON lines in, JSON lines out. Knows nothing else.

Run by its path, so that Python's own modules and Jinja2 are all that it imports. A template comes with a model from anywhere:
Jinja2's sandbox keeps it from Python's insides, and the system bounds the memory and the processor time that it takes.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # the app's own folder: its modules must not stand in for others of their names

import contextlib
import functools
import json
import signal
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Generation(Extension):
    """{% generation %} marks the answers that a model is trained on; here it renders what is in it."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PlainNamespace(Namespace):
    """namespace() without names that begin with an underscore, which are Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the names
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace: the name {name!r} begins with an underscore")


def raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja2's own, it leaves < and & as they are: prompts are no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=4)
def compiled(template: str) -> jinja2.Template:
    """A template with what transformers gives chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": PlainNamespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # the class itself has more to offer than is wanted
    }
    return environment.from_string(template)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """{"text": …} or {"error": one sentence}."""
    try:
        pieces, size = [], 0
        for piece in compiled(request["template"]).generate(**request["variables"]):
            pieces.append(piece)
            size += len(piece)
            if size > request["most_characters"]:
                return {"error": f"it makes a prompt of more than {request['most_characters']} characters"}
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as error:  # of any kind: what a template does is not ours to foresee
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}


def _bound(memory_bytes: int) -> None:
    """Where the system can: no more memory than this."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def _allow(seconds: float) -> None:
    """Where the system can: end this process after so much processor time; 0 for no bound."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # nobody handles its signal, so it ends the process


def main() -> None:
    """Answer each line of stdin until it is closed."""
    _bound(int(sys.argv[1]))
    for line in sys.stdin.buffer:
        _allow(float(sys.argv[2]))
        reply = json.dumps(answer(json.loads(line)))
        _allow(0)
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
