"""Loading and quantizing as the page starts them: one at a time, in a thread, with progress, and called off at any time."""

from __future__ import annotations

import argparse
import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neox_lite import GPTNeoXForCausalLM
from neox_lite.errors import NeoxLiteError
from neox_lite.offload.plan import largest_group

from ..load_for_command import describe, load
from ..models.plan import Model
from ..paths import DEMO, data_folder
from ..serving.engine import Busy, Engine
from .events import sentence, unforeseen

DEMO_NAME = "Shakespeare demo"
log = logging.getLogger(__name__)


def name_of(model: str) -> str:
    """What people call a folder or hub id."""
    return DEMO_NAME if Path(model).absolute() == DEMO else Path(model).name


class Cancelled(NeoxLiteError):
    """The page called it off."""


@dataclass
class Task:
    """A piece of work. state: "running", "done", "failed" or "cancelled". done, total: bytes, total 0 where unknown."""

    number: int
    kind: str
    title: str
    state: str = "running"
    done: int = 0
    total: int = 0
    message: str = ""
    result: str = ""  # a new folder
    cancelled: threading.Event = field(default_factory=threading.Event)

    def progress(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        if self.cancelled.is_set():
            raise Cancelled(f"{self.title}: called off")

    @property
    def figures(self) -> dict[str, Any]:
        names = ("number", "kind", "title", "state", "done", "total", "message", "result")
        running = self.state == "running"
        return {
            **{name: getattr(self, name) for name in names},
            "running": running,
            "cancelled": self.cancelled.is_set(),
        }


class Work:
    """The one piece of work at a time of an engine, for all browser tabs. args: those of `serve`, with the placement flags."""

    def __init__(self, engine: Engine, args: argparse.Namespace) -> None:
        self.engine, self.args = engine, args
        self.task: Task | None = None
        self.about: dict[str, str] = {}  # of models that were loaded: format, size and place in one line
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def load(self, model: str) -> None:
        """Start to load a folder or hub id."""
        self._start("load", f"Loading {name_of(model)}", lambda task: self._load(model, task))

    def quantize(self, source: str, format: str) -> None:
        """Start to quantize a folder or hub id into a folder among the user's models."""
        title = f"Quantizing {name_of(source)} to {format}"
        self._start("quantize", title, lambda task: self._quantize(source, format, task))

    def cancel(self) -> None:
        if (task := self.task) is not None and task.state == "running":
            task.cancelled.set()

    def dismiss(self) -> None:
        with self._lock:
            if self.task is not None and self.task.state != "running":
                self.task = None

    def _start(self, kind: str, title: str, do: Callable[[Task], None]) -> None:
        with self._lock:
            if self.task is not None and self.task.state == "running":
                if self.task.title == title:  # a double click
                    return
                raise Busy(f"{self.task.title} is still running; wait for it, or cancel it")
            self.task = task = Task(next(self._numbers), kind, title)
        threading.Thread(target=self._run, args=(task, do), name=f"neox-lite {kind}", daemon=True).start()

    def _run(self, task: Task, do: Callable[[Task], None]) -> None:
        try:
            do(task)
            state = "done"
        except Cancelled:
            task.message, state = "Called off.", "cancelled"
        except NeoxLiteError as error:
            task.message, state = sentence(error), "failed"
        except Exception as error:
            log.exception("%s failed", task.title)
            task.message, state = unforeseen(error), "failed"
        task.state = state

    def _load(self, model: str, task: Task) -> None:
        def loader() -> GPTNeoXForCausalLM:  # called again when the engine wakes up
            adapter = self.args.adapter if model == self.args.model else None
            loaded = load(model, self.args, self.args.head, revision=None, adapter=adapter)
            loaded.warm(task.progress)
            self.about[model] = describe(loaded)
            return loaded

        try:
            self.engine.load(model, loader)
        except Cancelled:
            self.engine.unload()
            raise
        task.message = "Ready."

    def _quantize(self, source: str, format: str, task: Task) -> None:
        from neox_lite_quant import convert  # heavy

        with_format = argparse.Namespace(**{**vars(self.args), "format": format, "revision": None})
        config = Model.of(source, with_format).config
        destination = data_folder("models") / f"{Path(source).name}-{format}"
        destination.parent.mkdir(parents=True, exist_ok=True)
        group = largest_group(config.hidden_size, config.intermediate_size) or 128  # if none fits, convert says so
        report = convert(source, destination, format=format, group_size=group, progress=task.progress)
        task.result = str(report.destination)
        task.message = f"It is in {report.destination}."
