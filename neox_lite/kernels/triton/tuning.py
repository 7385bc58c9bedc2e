"""Which of a kernel's candidates a card takes: the shipped one, one kept from before, or the fastest, timed on first use.

Timing is passed in; knows no kernel and no tensor. Choices lie in tuning.json (where: kept.py), by all that they depend on:
the card, its driver, Triton and this program, then kernel and class of shapes. NEOX_LITE_TUNE says when candidates are timed:
`auto`, on cards of a class without shipped choices; `always`; or `never`.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from ... import user_cache
from ...errors import ArgumentError
from ...version import __version__
from . import interpreted
from .cuda_graph import CAPTURING
from .tile_configs import Candidates, Machine, machine

T = TypeVar("T")
Launch = Callable[[Any], object]  # runs a kernel with a tile; again and again with the same result
Timer = Callable[[Callable[[], object]], float]  # seconds of a launch

FILE = "tuning.json"
VARIABLE = "NEOX_LITE_TUNE"
LIMIT_S = 60.0  # of a process for timing, most of which goes into compiling; what is left is timed by the next one
MARGIN = 0.02  # by which a candidate must beat the shipped one: less is noise
MAX_CARDS = 8  # kept, drivers and versions counted apart
RUNS = 15  # launches of a candidate that are timed


@dataclass(frozen=True)
class Card:
    """What kept choices depend on."""

    name: str
    capability: str
    driver: str
    triton: str
    neox_lite: str = __version__


@dataclass(frozen=True)
class Picked:
    """A choice that was made by timing: the tile's fields, the share of the shipped one's time saved, how many were timed."""

    tile: dict[str, int]
    saved: float
    timed: int


class Tuning:
    """The choices of one card."""

    def __init__(
        self,
        machine: Machine,
        card: Callable[[], Card],
        timer: Timer | None,
        when: str = "auto",
        limit_s: float = LIMIT_S,
        busy: Callable[[], bool] = lambda: False,
        report: Callable[[str], None] = lambda text: print(f"neox-lite: {text}", file=sys.stderr),
    ) -> None:
        """timer: None where nothing can be timed. busy: whether launches are being recorded now, when nothing may be timed."""
        self._machine, self._card, self._timer, self._busy, self._report = machine, card, timer, busy, report
        self._when, self._limit_s, self._spent_s = when, limit_s, 0.0
        self._lock = threading.RLock()
        self._picked: dict[Candidates[Any], Any] = {}
        self._kept: dict[str, Picked] | None = None  # read when it is first asked for
        self._stopped: str | None = None  # why nothing more is timed

    def pick(self, candidates: Candidates[T], launch: Launch | None) -> T:
        """The tile to launch with. launch: None where a timing now would not be typical of the class of shapes."""
        found = self._picked.get(candidates)
        return self._decide(candidates, launch) if found is None else found

    def renew(self) -> None:
        """Time everything anew, whatever is shipped or kept."""
        with self._lock:
            self._picked.clear()
            self._kept, self._when, self._spent_s, self._stopped = {}, "always", 0.0, None

    @property
    def times(self) -> bool:
        """Whether candidates without a kept choice are timed."""
        wanted = self._when == "always" or (self._when == "auto" and self._machine.shipped is None)
        return wanted and self._timer is not None

    def why(self) -> str:
        """Which choices are used on this card, and why, in words."""
        shipped, count = self._machine.shipped, len(self.kept)
        kept_here = f"{count} timed on this card, kept in {_place()}" if count else ""
        if self.times:
            reason = "as asked" if self._when == "always" else "no choices are shipped for its class"
            rest = f"{'others' if count else 'candidates'} are timed on first use ({reason})"
        elif shipped is not None:
            rest = f"{'others' if count else 'all'} as shipped for {shipped.cards}"
        else:
            rest = f"{'others' if count else 'all'} as on most cards: its class is unknown, and {VARIABLE} is never"
        return "; ".join(part for part in (kept_here, rest) if part)

    @property
    def kept(self) -> dict[str, Picked]:
        """Choices made by timing on this card, by kernel and class of shapes."""
        with self._lock:
            if self._kept is None:
                self._kept = self._load()
            return self._kept

    def _decide(self, candidates: Candidates[T], launch: Launch | None) -> T:
        with self._lock:
            if (found := self._picked.get(candidates)) is not None:
                return found
            shipped = candidates.tiles[0]
            if (before := self.kept.get(_key(candidates))) is not None:
                found = next((tile for tile in candidates.tiles if _fields(tile) == before.tile), None)
            if found is None and self.times and self._stopped is None and len(candidates.tiles) > 1:
                if launch is None or self._busy():
                    return shipped  # for now
                found = self._time(candidates, launch)
            self._picked[candidates] = found = shipped if found is None else found
            return found

    def _time(self, candidates: Candidates[T], launch: Launch) -> T | None:
        """The fastest candidate, kept; None where time or memory runs out before that is known."""
        if not self._spent_s:
            limit = f"at most {self._limit_s:.0f} s; {VARIABLE}=never leaves it out"
            self._report(f"timing sizes of kernels on {self._card().name}, once: {limit}")
        began, seconds = time.monotonic(), list[float]()
        for tile in candidates.tiles:
            if seconds and self._spent_s + time.monotonic() - began > self._limit_s:
                self._stop(f"the time for that is used up after {self._limit_s:.0f} s; the next start goes on with it")
                break
            try:
                seconds.append(self._seconds(tile, launch))
            except torch.OutOfMemoryError:
                self._stop("too little memory is free to time kernels; their shipped sizes are used")
                break
        self._spent_s += time.monotonic() - began
        if len(seconds) < len(candidates.tiles):
            return None
        best = min(range(len(seconds)), key=seconds.__getitem__)
        if not seconds[best] < (1 - MARGIN) * seconds[0]:
            best = 0
        saved = 0.0 if best == 0 or math.isinf(seconds[0]) else 1 - seconds[best] / seconds[0]
        self._report(f"{candidates.kernel}, {candidates.shape}: {_verdict(best, len(seconds), saved)}")
        self._keep(_key(candidates), Picked(_fields(candidates.tiles[best]), saved, len(seconds)))
        return candidates.tiles[best]

    def _seconds(self, tile: Any, launch: Launch) -> float:
        """Infinite where a tile is more than the card or the compiler can do."""
        from triton.errors import TritonError

        assert self._timer is not None
        try:
            return self._timer(lambda: launch(tile))
        except TritonError:
            return math.inf
        except RuntimeError as error:  # what the compiler's own passes raise has no class of its own
            if "PassManager" not in str(error):
                raise
            return math.inf

    def _stop(self, reason: str) -> None:
        self._stopped = reason
        self._report(reason)

    # Kept between runs ------------------------------------------------------------------------------------------------

    def _load(self) -> dict[str, Picked]:
        """What is kept of this card; nothing, said in a line, where the file makes no sense."""
        try:
            cards = _cards()
            here = asdict(self._card()) if cards else {}  # asking for the driver takes a moment
            for one in cards:
                if user_cache.entry(one, "card") == here:
                    return dict(_parsed(user_cache.entry(one, "choices")))
        except ValueError as error:
            self._report(f"{_place()} is not used: {error}")
        return {}

    def _keep(self, key: str, picked: Picked) -> None:
        """Write a choice beside the others, also those that another process has made meanwhile."""
        card, others, mine = asdict(self._card()), [], {}
        with suppress(ValueError):  # a file that is not one of ours is replaced
            cards = [one for one in _cards() if isinstance(one, dict)]
            others = [one for one in cards if one.get("card") != card]
            mine = next(
                (dict(_parsed(user_cache.entry(one, "choices"))) for one in cards if one.get("card") == card), {}
            )
        self._kept = {**mine, **self.kept, key: picked}
        choices = {name: asdict(choice) for name, choice in self._kept.items()}
        try:
            user_cache.write(FILE, {"cards": [{"card": card, "choices": choices}, *others][:MAX_CARDS]})
        except OSError as error:
            self._stop(f"sizes of kernels cannot be kept, so no more are timed: {error.strerror or error}")


def _verdict(best: int, count: int, saved: float) -> str:
    return f"the shipped size, of {count}" if best == 0 else f"number {best + 1} of {count}, {saved:.0%} less time"


def _key(candidates: Candidates[Any]) -> str:
    return f"{candidates.kernel}: {candidates.shape}"


def _fields(tile: Any) -> dict[str, int]:
    return asdict(tile)


def _place() -> str:
    try:
        return str(user_cache.folder() / FILE)
    except OSError:
        return FILE


def _cards() -> list[Any]:
    found = user_cache.read(FILE)
    cards = [] if found is None else user_cache.entry(found, "cards")
    if not isinstance(cards, list):
        raise ValueError("cards is no list")
    return cards


def _parsed(choices: Any) -> Iterator[tuple[str, Picked]]:
    """Raises ValueError. Whether a tile is one of the candidates is seen where it is used."""
    if not isinstance(choices, dict):
        raise ValueError("choices is no object")
    for name, choice in choices.items():
        tile, saved, timed = (user_cache.entry(choice, key) for key in ("tile", "saved", "timed"))
        if not isinstance(tile, dict) or any(type(value) is not int for value in tile.values()):
            raise ValueError(f"tile is {user_cache.shown(tile)}, expected whole numbers by name")
        if type(saved) not in (int, float) or not 0 <= saved <= 1 or type(timed) is not int:
            raise ValueError(
                f"saved is {user_cache.shown(saved)}, expected 0 to 1, and timed {user_cache.shown(timed)}"
            )
        yield name, Picked(tile, saved, timed)


# On this machine ------------------------------------------------------------------------------------------------------


def of(device: torch.device) -> Tuning:
    """The choices of a device. Raises ArgumentError for a NEOX_LITE_TUNE that says nothing."""
    return _of(torch.device(device.type, device.index or 0) if device.type == "cuda" else device)


@cache
def _of(device: torch.device) -> Tuning:
    # There is nothing to time where kernels are interpreted, or compiled for cards that this machine does not have.
    if interpreted() or device.type != "cuda":
        return Tuning(Machine((8, 0)), lambda: Card("none", "8.0", "none", "none"), None, "never")
    timer = EventTimer(device)
    return Tuning(machine(device), lambda: card_of(device), timer, when(), busy=torch.cuda.is_current_stream_capturing)


def when() -> str:
    """auto, always or never, as the environment says."""
    found = os.environ.get(VARIABLE) or "auto"
    if found not in ("auto", "always", "never"):
        raise ArgumentError(f"{VARIABLE} is {found[:40]!r}, expected auto, always or never")
    return found


def card_of(device: torch.device) -> Card:
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    return Card(torch.cuda.get_device_name(device), f"{major}.{minor}", driver(), triton.__version__)


@cache
def driver() -> str:
    """The version of NVIDIA's driver, "unknown" where the system does not say."""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        if found := re.search(r"Module.*?\s(\d+\.[\d.]+)\s", text):
            return found[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return lines[0] if lines else "unknown"
    return "unknown"


class EventTimer:
    """Seconds of a launch on a GPU that finds nothing of its own in the L2 cache: the median of several."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, launch: Callable[[], object]) -> float:
        # Waiting for a device breaks a capture of another thread on it.
        with CAPTURING, torch.cuda.device(self._device):
            launch()  # compiles
            cache = torch.cuda.get_device_properties(self._device).L2_cache_size
            other = torch.empty(max(1 << 20, 2 * cache), dtype=torch.uint8, device=self._device)
            pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
            for begin, end in pairs:
                other.fill_(0)
                begin.record()
                launch()
                end.record()
            torch.cuda.synchronize()
            del other
            torch.cuda.empty_cache()  # no plan counted that memory
        return sorted(begin.elapsed_time(end) for begin, end in pairs)[RUNS // 2] / 1e3
