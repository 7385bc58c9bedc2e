"""Parts of a long measurement in processes of their own, so that a fault or a hang costs one part. Knows no measurement.

A worker is told names of sections and prints, for each, a line that begins it, one for every row, and one that ends it; see
`Worker`. The supervisor never touches the device.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

MARK = "@section "  # begins a worker's own lines; whatever else it or its libraries print goes to stderr
GRACE_S = 20.0  # beyond a section's limit, for a worker that is in the middle of something
START_S = 60.0  # for a worker to import and begin


@dataclass(frozen=True)
class Section:
    """A part of the measurement, and the seconds after which no more of it is begun."""

    name: str
    limit_s: float


class Worker:
    """The side that measures: runs sections and tells of them on stdout."""

    def __init__(self, usable: Callable[[], object]) -> None:
        """usable: raises where the device cannot be used any more in this process."""
        self._usable = usable

    def run(self, sections: Iterable[tuple[str, Callable[[], Iterable[dict[str, Any]]]]]) -> None:
        for name, rows in sections:
            self._tell(name, "begin")
            began = time.monotonic()
            try:
                for row in rows():
                    self._tell(name, "row", row)
            except Exception as error:
                self._tell(name, "fault", f"{type(error).__name__}: {error}".splitlines()[0][:400])
            self._tell(name, "end", time.monotonic() - began)
            try:
                self._usable()
            except Exception as error:
                print(f"a new process goes on: {error}", file=sys.stderr)
                sys.stdout.flush()
                os._exit(1)  # a context that is broken would also break the way out

    def _tell(self, name: str, what: str, value: Any = None) -> None:
        print(f"\n{MARK}{json.dumps([name, what, value])}", flush=True)


class Supervisor:
    """The side that collects: `tell(section, row)` for each row, `fault(section, why)`, `done(section, seconds)`."""

    def __init__(
        self,
        command: Callable[[Sequence[str], float], Sequence[str]],
        deadline: float,
        tell: Callable[[str, dict[str, Any]], object],
        fault: Callable[[str, str], object],
        done: Callable[[str, float], object],
    ) -> None:
        """command: of a worker for these sections that has so many seconds left. deadline: of time.monotonic()."""
        self._command, self._deadline = command, deadline
        self._tell, self._fault, self._done = tell, fault, done

    def run(self, sections: Sequence[Section]) -> None:
        """All sections, in as few processes as faults allow; those that would begin after the deadline are faults too."""
        left = list(sections)
        while left:
            if time.monotonic() > self._deadline:
                for section in left:
                    self._fault(section.name, "no time was left")
                return
            left = self._one_process(left)

    def _one_process(self, left: list[Section]) -> list[Section]:
        """-> the sections that are still to be run."""
        seconds = self._deadline - time.monotonic()
        process = subprocess.Popen(
            self._command([s.name for s in left], seconds), stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(process, lines), daemon=True).start()
        by_name = {s.name: s for s in left}
        begun, at, ends = False, None, time.monotonic() + START_S  # at: the section that is being run
        why = ""
        try:
            while (line := lines.get(timeout=max(0.0, ends - time.monotonic()))) is not None:
                if not line.startswith(MARK):
                    print(line.strip("\n"), end="\n" if line.strip() else "", file=sys.stderr)
                    continue
                name, what, value = json.loads(line[len(MARK) :])
                if what == "begin":
                    begun, at = True, by_name[name]
                    ends = min(time.monotonic() + at.limit_s, self._deadline) + GRACE_S
                elif what == "row":
                    self._tell(name, value)
                elif what == "fault":
                    self._fault(name, value)
                else:
                    left = [s for s in left if s.name != name]
                    self._done(name, value)
                    at, ends = None, time.monotonic() + START_S
            why = f"its process ended with {_named(process.wait())}"
        except queue.Empty:
            why = "it hung and was ended"
        finally:
            _end(process)
        if at is None and not begun:
            at = left[0]  # the worker got nowhere; without this one the next might
        if at is not None:
            self._fault(at.name, why)
        return [s for s in left if s != at]

    def _read(self, process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)


def _named(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _end(process: subprocess.Popen[str]) -> None:
    """The worker and what it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
