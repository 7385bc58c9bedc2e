"""Which of a kernel's candidates a card takes: the shipped one, one kept from before, or the fastest, timed on first use.

Choices lie in tuning.json (where: user_cache.py) by card and versions, then by kernel and class of shapes. NEOX_LITE_TUNE says
when candidates are timed: `auto`, on cards of a class without shipped choices; `always`; or `never`. docs/kernels.md says why
this is not triton.autotune.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any

import torch

from ... import user_cache
from ...errors import ArgumentError
from ...version import __version__
from . import interpreted
from .cuda_graph import CAPTURING
from .tile_configs import SHIPPED, Candidates

Launch = Callable[[Any], object]  # runs a kernel with a tile; again and again with the same result
Timer = Callable[[Callable[[], object]], float]  # seconds of a launch

FILE, VARIABLE = "tuning.json", "NEOX_LITE_TUNE"
LIMIT_S = 60.0  # of a process for timing, most of which goes into compiling; the next one times what is left
MARGIN = 0.02  # by which a candidate must beat the shipped one: less is noise


@dataclass(eq=False)
class Tuner:
    """The choices of one card.

    card: all that a kept choice depends on. shipped: the cards of its class, None where nothing is shipped for it. timer: None
    where nothing can be timed. busy: whether launches are being captured, when nothing may be timed. tuned: choices made by
    timing, by kernel and class of shapes: the tile's fields, the share of time that it saves, how many were timed.
    """

    card: str
    shipped: str | None
    timer: Timer | None
    when: str = "auto"
    limit_s: float = LIMIT_S
    busy: Callable[[], bool] = lambda: False
    report: Callable[[str], None] = lambda text: print(f"neox-lite: {text}", file=sys.stderr)
    tuned: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._spent_s, self._stopped, self._lock = 0.0, False, threading.Lock()
        self._tiles: dict[Candidates, Any] = {}
        try:
            self.tuned = _read().get(self.card, {})
        except ValueError as error:
            self.report(f"{FILE} is not used: {error}")

    def pick(self, candidates: Candidates, launch: Launch | None) -> Any:
        """The tile to launch with. launch: None where a timing now would not be typical of the class of shapes."""
        if (found := self._tiles.get(candidates)) is not None:
            return found
        with self._lock:
            tiles, before = candidates.tiles, self.tuned.get(candidates.key, {}).get("tile")
            found = self._tiles.get(candidates) or next((tile for tile in tiles if asdict(tile) == before), None)
            if found is None and self.enabled and not self._stopped and len(tiles) > 1:
                if launch is None or self.busy():
                    return tiles[0]  # for now
                found = self._fastest(candidates, launch)
            return self._tiles.setdefault(candidates, found or tiles[0])

    @property
    def enabled(self) -> bool:
        """Whether candidates are timed where the file has no choice."""
        return self.timer is not None and self.when != "never" and (self.when == "always" or self.shipped is None)

    def renew(self) -> None:
        """Time everything anew, whatever is shipped or kept."""
        with self._lock:
            self._tiles, self.tuned, self.when, self._spent_s, self._stopped = {}, {}, "always", 0.0, False

    def _fastest(self, candidates: Candidates, launch: Launch) -> Any:
        """The fastest candidate, kept; None where time or memory runs out before that is known."""
        from triton.errors import TritonError

        assert self.timer is not None
        if not self._spent_s:
            limit = f"at most {self.limit_s:.0f} s; {VARIABLE}=never leaves it out"
            self.report(f"timing sizes of kernels on {self.card}, once: {limit}")
        began, seconds = time.monotonic() - self._spent_s, list[float]()
        for tile in candidates.tiles:
            if seconds and self._spent_s > self.limit_s:
                return self._stop(f"{self.limit_s:.0f} s are used up; the next start goes on with it")
            try:
                seconds.append(self.timer(partial(launch, tile)))
            except torch.OutOfMemoryError:
                return self._stop("too little memory is free to time kernels; their shipped sizes are used")
            except (TritonError, RuntimeError) as error:
                # More than the card or the compiler can do; what the compiler's passes raise has no class of its own.
                if not isinstance(error, TritonError) and "PassManager" not in str(error):
                    raise
                seconds.append(math.inf)
            self._spent_s = time.monotonic() - began
        best = min(range(len(seconds)), key=seconds.__getitem__)
        best = best if seconds[best] < (1 - MARGIN) * seconds[0] else 0
        saved = 0.0 if best == 0 or math.isinf(seconds[0]) else 1 - seconds[best] / seconds[0]
        verdict = f"number {best + 1}, {saved:.0%} less time" if best else "the shipped size"
        self.report(f"{candidates.key}: {verdict}, of {len(seconds)}")
        picked = {"tile": asdict(candidates.tiles[best]), "saved": saved, "timed": len(seconds)}
        # Choices that another process has made meanwhile stay; a file that is not one of ours is replaced.
        every: dict[str, Any] = {}
        with suppress(ValueError):
            every = _read()
        self.tuned = {**every.get(self.card, {}), **self.tuned, candidates.key: picked}
        try:
            user_cache.write(FILE, {**every, self.card: self.tuned})
        except OSError as error:
            self._stop(f"sizes of kernels cannot be kept, so no more are timed: {error.strerror or error}")
        return candidates.tiles[best]

    def _stop(self, reason: str) -> None:
        self._stopped = True
        self.report(reason)


def _read() -> dict[str, dict[str, dict[str, Any]]]:
    """Kept choices by card. Raises ValueError for a file that holds anything else; tiles are compared where they are used."""
    found = user_cache.read(FILE) or {}
    cards = list(found.values()) if isinstance(found, dict) else [None]
    if not all(isinstance(own, dict) and all(isinstance(c, dict) for c in own.values()) for own in cards):
        raise ValueError(f"{user_cache.shown(found)} holds no choices")
    return found


def when() -> str:
    """auto, always or never, as the environment says. Raises ArgumentError for anything else."""
    found = os.environ.get(VARIABLE) or "auto"
    if found not in ("auto", "always", "never"):
        raise ArgumentError(f"{VARIABLE} is {found[:40]!r}, expected auto, always or never")
    return found


def card_of(device: torch.device) -> str:
    """All that a choice depends on."""
    import triton

    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return f"{name} ({major}.{minor}), Triton {triton.__version__}, neox-lite {__version__}"


def seconds_on(device: torch.device, launch: Callable[[], object]) -> float:
    """Median seconds of a launch on a GPU that finds nothing of its own in the L2 cache."""
    from triton.testing import do_bench

    # Waiting for a device breaks what another thread captures there; no plan counted the memory that timing takes.
    with CAPTURING, torch.cuda.device(device):
        found = do_bench(launch, warmup=5, rep=20, return_mode="median") / 1e3
        torch.cuda.empty_cache()
    return found


@cache
def tuner(device: torch.device) -> Tuner:
    """The choices of a device; the shipped ones where kernels are interpreted, or compiled for cards that are not there."""
    if interpreted() or device.type != "cuda":
        return Tuner("none", "interpreters", None, "never")
    shipped = SHIPPED.get(torch.cuda.get_device_capability(device), (None, 0))[0]
    timer = partial(seconds_on, device)
    return Tuner(card_of(device), shipped, timer, when(), busy=torch.cuda.is_current_stream_capturing)
