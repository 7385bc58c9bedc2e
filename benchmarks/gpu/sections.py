"""Parts of a long measurement in processes of their own, so that a fault or a hang costs one part. Knows no measurement.

A worker gets names of sections and prints, for each, a line that begins it, one for every row, and one that ends it; see
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


@dataclass(frozen=True)
class Worker:
    """The side that measures: runs sections and reports them on stdout. usable: raises where the device is lost."""

    usable: Callable[[], object]

    def run(self, sections: Iterable[tuple[str, Callable[[], Iterable[dict[str, Any]]]]]) -> None:
        for name, rows in sections:
            self._print(name, "begin")
            began = time.monotonic()
            try:
                for row in rows():
                    self._print(name, "row", row)
            except Exception as error:
                self._print(name, "fault", f"{type(error).__name__}: {error}".splitlines()[0][:400])
            self._print(name, "end", time.monotonic() - began)
            try:
                self.usable()
            except Exception as error:
                print(f"a new process goes on: {error}", file=sys.stderr)
                sys.stdout.flush()
                # A context that is broken would also break an ordinary exit.
                os._exit(1)

    def _print(self, name: str, what: str, value: Any = None) -> None:
        print(f"\n{MARK}{json.dumps([name, what, value])}", flush=True)


@dataclass(frozen=True)
class Supervisor:
    """The side that collects. command: of a worker for these sections that has so many seconds left.

    deadline: of time.monotonic(). row(section, row), fault(section, why) and done(section, seconds) are called on the way.
    """

    command: Callable[[Sequence[str], float], Sequence[str]]
    deadline: float
    row: Callable[[str, dict[str, Any]], object]
    fault: Callable[[str, str], object]
    done: Callable[[str, float], object]

    def run(self, sections: Sequence[Section]) -> None:
        """All sections, in as few processes as faults allow; those that would begin after the deadline are faults too."""
        left = list(sections)
        while left:
            if time.monotonic() > self.deadline:
                for section in left:
                    self.fault(section.name, "no time was left")
                return
            left = self._one_process(left)

    def _one_process(self, left: list[Section]) -> list[Section]:
        """The sections that are still to be run."""
        command = self.command([s.name for s in left], self.deadline - time.monotonic())
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        by_name = {s.name: s for s in left}
        # `running` is the section that is being run.
        begun, running, ends = False, None, time.monotonic() + START_S
        why = ""
        try:
            while (line := lines.get(timeout=max(0.0, ends - time.monotonic()))) is not None:
                if not line.startswith(MARK):
                    print(line.strip("\n"), end="\n" if line.strip() else "", file=sys.stderr)
                    continue
                name, what, value = json.loads(line[len(MARK) :])
                if what == "begin":
                    begun, running = True, by_name[name]
                    ends = min(time.monotonic() + running.limit_s, self.deadline) + GRACE_S
                elif what == "row":
                    self.row(name, value)
                elif what == "fault":
                    self.fault(name, value)
                else:
                    left = [s for s in left if s.name != name]
                    self.done(name, value)
                    running, ends = None, time.monotonic() + START_S
            code = process.wait()
            why = f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        except queue.Empty:
            why = "it hung and was ended"
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if running is None and not begun:
            # The worker got nowhere; without this section the next worker might.
            running = left[0]
        if running is not None:
            self.fault(running.name, why)
        return [s for s in left if s != running]


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)
