"""Files: one writer that replaces a file as a whole, and one strict reader of JSON. Knows no model and no format.

Whoever opens a path while it is written sees what was there before. Errors of the system stay OSErrors unless a function says
otherwise; `disk_errors` turns them into one line that says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .errors import CheckpointError, NeoxLiteError, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What network and Windows drives answer to calls that they do not support.
UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
PARTIAL = ".partial"  # end of the name of a file that is not whole
MAX_JSON_BYTES = 16 << 20
MAX_DIGITS = 40  # of an integer: tokenizer_config.json has some of 31, and a message stays short with a hostile one

_PARTIAL_NAME = re.compile(r".+\.[0-9a-f]{16}\.partial", re.DOTALL)


# -- writing ----------------------------------------------------------------------------------------------------------


class AtomicFile:
    """A file that appears at its path whole or not at all. Bytes go to a new file beside it, which then takes its name.

        with AtomicFile(path) as file:
            file.write(content)

    durable: when the block ends, the bytes are on the disk and a loss of power does not take them back. private: only this
    user may read the file. Missing folders are made. An error in the block removes the new file; what a killed process left is
    removed when the next file of that folder is written.
    """

    file: BinaryIO

    def __init__(self, path: Path, durable: bool = True, private: bool = False) -> None:
        self.path = path
        self._durable, self._private = durable, private
        self._partial: Path | None = None

    def __enter__(self) -> BinaryIO:
        self.path.parent.mkdir(mode=0o700 if self._private else 0o777, parents=True, exist_ok=True)
        remove_stale_partials(self.path.parent)
        try:
            while not self._open(self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}{PARTIAL}")):
                self.file.close()
        except BaseException:
            self.discard()
            raise
        return self.file

    def _open(self, partial: Path) -> bool:
        """Create a file and hold its lock, which says that somebody writes it; False if it was removed before that."""
        # O_EXCL makes a new file or fails: neither a file nor a link of that name is written through.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(partial, flags, 0o600 if self._private else 0o666)
        self._partial = partial
        self.file = os.fdopen(descriptor, "w+b")
        return lock(self.file, partial) is not False

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self.discard()

    def _publish(self) -> None:
        assert self._partial is not None
        self.file.flush()
        if self._durable:
            os.fsync(self.file.fileno())
        if fcntl is None:  # Windows renames no open file; elsewhere the lock lasts until the file has its name
            self.file.close()
        self._partial.replace(self.path)
        self._partial = None
        if self._durable:
            sync_folder(self.path.parent)

    def discard(self) -> None:
        """Close the file, and remove it unless it has its name; harmless when done twice or before the file is open."""
        if hasattr(self, "file"):
            with contextlib.suppress(OSError):  # of bytes that are thrown away
                self.file.close()
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)
            self._partial = None


def write_atomically(path: Path, content: str | bytes, durable: bool = True, private: bool = False) -> None:
    """Replace a small file as a whole, as AtomicFile does; text is written as UTF-8, its line ends as they are."""
    with AtomicFile(path, durable, private) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def partials(folder: Path) -> list[Path]:
    """The files in a folder that AtomicFile began, here or in another process; [] where there is no folder."""
    try:
        return [path for path in folder.iterdir() if _PARTIAL_NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []


def remove_stale_partials(folder: Path) -> None:
    """Remove the files that killed processes left: nobody holds their locks. Where there are no locks, nothing is removed."""
    for path in partials(folder):
        with contextlib.suppress(OSError):  # it has its name by now, or is not ours: then it is none to be removed
            descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if lock(descriptor, path):
                    path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def lock(file: BinaryIO | int, path: Path) -> bool | None:
    """Lock an open file until it is closed; False if another process holds it or path names another file by now.

    None where the file system or the operating system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file if isinstance(file, int) else file.fileno()), path.lstat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, *UNSUPPORTED):
            raise
        return None


def sync_folder(folder: Path) -> None:
    """Make renames in the folder durable."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn the system's errors while writing path, of `size` bytes, into a CheckpointError of one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
        free = free_bytes(path)
        needs = "" if size is None else f"needs {size} bytes, "
        raise CheckpointError(f"{path}: disk full: {needs}{free} are free; choose another folder") from error


def free_bytes(path: Path) -> int:
    """The free space where path is or will be."""
    above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(above).free


# -- reading ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_regular(path: Path, error: type[NeoxLiteError] = CheckpointError) -> Iterator[BinaryIO]:
    """Open a file for reading. Raises `error` if it is a device or pipe, which could block, or if reading fails."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise error(f"{path}: not a regular file")
        with path.open("rb") as file:
            yield file
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror or reason}") from reason


def read_regular(path: Path, error: type[NeoxLiteError], max_bytes: int) -> bytes:
    """A file's bytes. Raises `error` where open_regular does, and for more than max_bytes."""
    with open_regular(path, error) as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise error(f"{path}: larger than {max_bytes} bytes")
    return raw


def read_json(
    path: Path, error: type[NeoxLiteError], max_bytes: int = MAX_JSON_BYTES, strict: bool = True
) -> dict[str, Any]:
    """The JSON object in a file. Raises `error`, one line with the path, where read_regular or parse_json does."""
    return parse_json(read_regular(path, error, max_bytes), str(path), error, strict)


def parse_json(raw: bytes | str, where: str, error: type[NeoxLiteError], strict: bool = True) -> dict[str, Any]:
    """The JSON object in a text that nobody may read in two ways. `where` names it in errors.

    Raises `error` for what is not UTF-8, no JSON, no object, or nested too deeply; for lone surrogates and integers of over 40
    digits; and, unless strict is False, for keys that appear twice, NaN, infinities and numbers too large for a float.
    """
    rules: dict[str, Any] = {"parse_int": _bounded_int}
    if strict:
        rules |= {"object_pairs_hook": _unique_keys, "parse_float": _finite, "parse_constant": _refuse_constant}
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        value = json.loads(text, **rules)
        if "\\u" in text:  # an escaped lone surrogate is legal JSON but not a legal text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise error(f"{where}: not valid JSON: nested too deeply") from None
    except MemoryError:
        raise error(f"{where}: JSON too large for this machine's memory") from None
    except UnicodeDecodeError as reason:
        raise error(f"{where}: not valid JSON: not UTF-8 text: byte {reason.start} is wrong") from None
    except ValueError as reason:
        raise error(f"{where}: not valid JSON: {shown(reason)}") from None
    if not isinstance(value, dict):
        raise error(f"{where}: found a JSON {type(value).__name__}, expected an object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(repr(repeated))} appears twice; keep one")
    return found


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"integer of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{shown(digits)} is too large for a float")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
