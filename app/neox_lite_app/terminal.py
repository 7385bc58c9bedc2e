"""What commands read from and write to a terminal: text in, lines, numbers for people, bars, JSON. Knows no model."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from neox_lite.errors import ArgumentError

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def amount(count: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix: 7.90 MB, 20.6 billion (without a unit)."""
    prefixes = ("", "k", "M", "G", "T") if unit else ("", " thousand", " million", " billion", " trillion")
    power = min(max((len(str(int(count))) - 1) // 3, 0), 4)
    value = count / 1000**power
    digits = 0 if power == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}{' ' if unit else ''}{prefixes[power]}{unit}"


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is, or that COLUMNS names; None where nothing bounds a line."""
    return shutil.get_terminal_size((0, 0)).columns or None


def fold(line: str, width: int | None, hang: int = 0) -> list[str]:
    """A line for people as lines of at most `width`, those after the first `hang` columns in; longer words stay whole."""
    if width is None or len(line) <= width:
        return [line]
    hang = min(hang, width // 4)
    options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": " " * hang}
    return textwrap.wrap(line, width, **options)  # type: ignore[arg-type]


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr)


def printable(text: str) -> str:
    """Control characters as \\x1b and the like, but for line breaks and tabs."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))  # ASCII, so that it is JSON whatever stdout's encoding


@contextlib.contextmanager
def bar(label: str, unit: str = "B") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, as a function of (done, total). It appears with the first call: an early error stands alone."""
    from tqdm import tqdm

    scale, shown = unit == "B", None

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if shown is None:
            shown = tqdm(total=total, desc=label, unit=unit, unit_scale=scale, file=sys.stderr, dynamic_ncols=True)
        shown.update(done - shown.n)
        if done >= total:
            shown.close()  # so that a bar that follows takes a line of its own, without moves of the cursor

    try:
        yield progress
    finally:
        if shown is not None:
            shown.close()


def read_text(path: str) -> str:
    """A UTF-8 file, or stdin for "-"."""
    if path == "-" and sys.stdin is None:
        raise ArgumentError("-: stdin is closed; pipe the text in, or name a file")
    if path != "-" and Path(path).is_char_device():  # which may have no end
        raise ArgumentError(f"{path}: is a device; name a file, or - for stdin")
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{path}: not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from error
