"""What the plan says of each model on this machine, in a few words. Reckoned in a thread, so that no page waits for it."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from neox_lite.errors import NeoxLiteError
from neox_lite.offload.plan import CPU, DISK, GPU, MIXED, make_plan
from neox_lite.units import format_bytes

from ..models.family import FAMILY
from ..models.plan import WHERE, Model, Target, request_of, speed_text
from ..serving.engine import Engine
from .events import sentence, unforeseen

FRESH_S = 60.0  # for so long free memory counts as what it was
LEVELS = {  # the badge's colour, and where the model would run
    GPU: ("fits", "fits GPU"),
    MIXED: ("offload", "GPU + CPU"),
    CPU: ("fits", "fits CPU"),
    DISK: ("disk", "from disk"),
}
Badge = dict[str, Any]
log = logging.getLogger(__name__)


def offered() -> tuple[str, ...]:
    """Formats that the page quantizes to: nf4 only beside the library that multiplies it fast."""
    nf4 = importlib.util.find_spec("bitsandbytes") is not None
    return ("int4", "int8", "nf4") if nf4 else ("int4", "int8")


class Badges:
    """Plans of the family and of local models. version counts up when there are new ones."""

    def __init__(self, engine: Engine, args: argparse.Namespace) -> None:
        self.engine, self.version = engine, 0
        self._args = argparse.Namespace(**{**vars(args), "card": None, "revision": None, "format": None})
        self._found: dict[tuple[str, str], Badge] = {}  # of a model and a format, "" for its own
        self._lock = threading.Lock()
        self._busy, self._when = False, float("-inf")

    def of(self, model: str, format: str = "") -> Badge | None:
        """None while it is being reckoned."""
        return self._found.get((model, format))

    def refresh(self, folders: Mapping[str, str | None]) -> None:
        """Reckon in a thread what is not known, and all of it where memory may have changed.

        folders: each with "fp16" where it is a plain checkpoint, that would run as it is, else None.
        """
        with self._lock:
            known = all((folder, "") in self._found for folder in folders)
            if self._busy or (known and time.monotonic() < self._when + FRESH_S):
                return
            self._busy = True
        threading.Thread(target=self._reckon, args=(dict(folders),), name="neox-lite badges", daemon=True).start()

    def _reckon(self, folders: dict[str, str | None]) -> None:
        found: dict[tuple[str, str], Badge] = {}
        try:
            target = self._target()
            for folder, format in folders.items():
                own = argparse.Namespace(**{**vars(self._args), "format": format})
                found[folder, ""] = self._badge(target, partial(Model.of, folder, own))
            for member, form in product(FAMILY, offered()):
                found[member.id, form] = self._badge(target, partial(Model.quantized, member.config(), form))
        except Exception as error:  # measuring the machine may fail in any way, and the page does without
            log.warning("no plans for the Model tab: %s", error)
            problem = {"error": sentence(error) if isinstance(error, NeoxLiteError) else unforeseen(error)}
            names = [(folder, "") for folder in folders] + [(m.id, f) for m, f in product(FAMILY, offered())]
            found = dict.fromkeys(names, problem)
        with self._lock:
            self._found, self._when, self._busy = found, time.monotonic(), False
            self.version += 1

    def _target(self) -> Target:
        """This machine; what the loaded model holds of it counts as free, for another one would take its place."""
        target = Target.of(self._args)
        memory = self.engine.status().memory
        cpu, gpu = target.budgets.cpu + memory.get("cache_cpu", 0), target.budgets.gpu
        gpu = None if gpu is None else gpu + sum(memory.get(f"{part}_gpu", 0) for part in ("weights", "cache"))
        return replace(target, budgets=replace(target.budgets, cpu=cpu, gpu=gpu))

    def _badge(self, target: Target, model: Callable[[], Model]) -> Badge:
        try:
            found = model()
            plan = make_plan(found.sizes, target.hardware, request_of(self._args, self._context(found)), target.budgets)
        except NeoxLiteError as error:
            return {"error": sentence(error)}
        total = format_bytes(found.sizes.total)
        if not plan.fits:
            short = f"{found.format} does not fit: {format_bytes(plan.short_by)} of memory short"
            return {"level": "no", "text": f"does not fit · {total}", "rate": "", "sentence": short}
        level, where = LEVELS[plan.level]
        rate, memory = plan.decode_tokens_per_s, sum(plan.totals.values())
        words = f"{found.format}, runs {WHERE[plan.level]} in {format_bytes(memory)}, predicted {speed_text(rate)}"
        short_rate = "" if rate is None else f"~{rate:.{0 if rate >= 10 else 1}f} tok/s"
        return {"level": level, "text": f"{where} · {total}", "rate": short_rate, "sentence": words}

    def _context(self, model: Model) -> int:
        return min(self._args.context or model.sizes.context, model.sizes.context)
