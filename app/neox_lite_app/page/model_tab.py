"""The Model tab and the status strip: what can be loaded, what is, and what the engine does."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neox_lite.errors import ArgumentError, NeoxLiteError
from neox_lite.formats import FORMATS

from ..conversations.prompt_forms import form_of
from ..load_for_command import MIXED
from ..models.family import FAMILY, Member
from ..models.local_models import LocalModel, local_models
from ..paths import DEMO
from ..serving.engine import Engine
from ..terminal import amount
from .badges import Badges, offered
from .components import part
from .events import Handler, PageEvent, Updates, as_sentence, listen
from .work import DEMO_NAME, Work, name_of

TIERS = ("gpu", "cpu", "disk")
MAX_PATH_CHARACTERS = 4096  # characters of a folder's path


class Tab:
    """Event handlers, as Gradio calls them, of the Model tab and the status strip."""

    def __init__(self, engine: Engine, args: argparse.Namespace) -> None:
        self.engine, self.args = engine, args
        self.work, self.badges = Work(engine, args), Badges(engine, args)

    def build(self) -> None:
        self.models = part("models", ("list", "start", "quantize", "cancel", "release", "dismiss"))

    def build_status(self) -> None:
        self.status = part("status", ("poll",))
        listen(self.models, "list", self.list)
        listen(self.status, "poll", self.poll)
        for name in ("start", "quantize", "cancel", "release", "dismiss"):
            listen(self.models, name, self._doing(getattr(self, name)))

    # What the browser shows -------------------------------------------------------------------------------------------

    async def poll(self, event: PageEvent) -> Updates:
        yield {"status": self.figures()}

    async def list(self, event: PageEvent) -> Updates:
        found = await asyncio.to_thread(local_models)
        models = [DEMO_CARD, *(local_card(model) for model in found if Path(model.path) != DEMO)]
        self.badges.refresh({m["id"]: "fp16" if m["plain"] else None for m in models if not m["problem"]})
        local = [{**m, "demo": m is DEMO_CARD, "plan": self.badges.of(m["id"])} for m in models]
        family = [self._member(member) for member in FAMILY]
        yield {"models": {"local": local, "family": family, "formats": offered()}}

    def _member(self, member: Member) -> dict[str, Any]:
        about = (
            f"{member.id.partition('/')[0]} · {member.layers} layers of {member.hidden:,} · context {member.context:,}"
        )
        plans = {format: self.badges.of(member.id, format) for format in offered()}
        return {"id": member.id, "name": member.name, "about": about, "plans": plans}

    def figures(self) -> dict[str, Any]:
        """The engine's status and the work under way, for the part `status`."""
        status, task = self.engine.status(), self.work.task
        memory = {
            tier: status.memory.get(f"weights_{tier}", 0) + status.memory.get(f"cache_{tier}", 0) for tier in TIERS
        }
        known: dict[str, Any] = {}
        if status.state in ("ready", "idle") and status.name is not None:
            known = self._about_model(status.name)
        return {
            "state": status.state,
            "name": name_of(status.name) if status.name else None,
            "active": status.active,
            "waiting": status.waiting,
            "memory": memory,
            "fault": status.fault,
            "task": task.figures if task is not None else None,
            "version": self.badges.version,
            **known,
        }

    def _about_model(self, name: str) -> dict[str, Any]:
        try:
            base = form_of(name, self.engine.tokenizer, self.args.form).name in ("dialogue", "completion")
            return {
                "base": base,
                "context": self.engine.context,
                "about": self.work.about.get(name, f"context {self.engine.context:,}"),
            }
        except NeoxLiteError:  # unloaded meanwhile, or without a tokenizer, which an error says where one is needed
            return {}

    # What it does -----------------------------------------------------------------------------------------------------

    def _doing(self, do: Callable[[PageEvent], None]) -> Handler:
        async def handler(event: PageEvent) -> Updates:
            do(event)
            yield {"status": self.figures()}

        return handler

    def start(self, event: PageEvent) -> None:
        self.work.load(_model(event))

    def quantize(self, event: PageEvent) -> None:
        format = event.text("format")
        if format not in offered():
            raise ArgumentError(f"format is {format[:20]!r}, expected {' or '.join(offered())}")
        self.work.quantize(_model(event), format)

    def cancel(self, event: PageEvent) -> None:
        self.work.cancel()

    def release(self, event: PageEvent) -> None:
        self.engine.unload()

    def dismiss(self, event: PageEvent) -> None:
        self.work.dismiss()


def _model(event: PageEvent) -> str:
    model = event.text("model")
    if not model or len(model) > MAX_PATH_CHARACTERS or not model.isprintable():
        raise ArgumentError("name a folder, or a hub id such as EleutherAI/pythia-70m")
    return model


def local_card(model: LocalModel) -> dict[str, Any]:
    """A model of this computer for the part `models`. plain: a checkpoint that can be quantized."""
    plain = model.format is not None and model.format.split()[0] not in (*FORMATS, MIXED)
    known = [f"{amount(model.parameters)} parameters" if model.parameters else None, model.format]
    known += [
        amount(model.bytes, "B") if model.bytes else None,
        {"hub": "fetched", "quantized": "kept"}.get(model.where),
    ]
    id = model.name if model.where == "hub" and model.revision is None else model.path
    about = " · ".join(filter(None, known))
    problem = model.problem or ("" if model.tokenizer else "it has no tokenizer.json; copy its checkpoint's into it")
    problem = as_sentence(problem)
    return {"id": id, "name": name_of(model.name), "about": about, "plain": plain, "problem": problem}


DEMO_CARD = {
    "id": str(DEMO),
    "name": DEMO_NAME,
    "about": "Bundled with neox-lite: a base model of 8 MB that writes plays",
    "plain": True,
    "problem": "",
}
