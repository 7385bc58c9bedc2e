"""A cache of a model's answers on the disk, so that a run that was interrupted goes on. Knows no task.

One SQLite file for each thing that answers: its name is a digest of all that an answer depends on. Answers are written
together, all or none, however the process ends.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from neox_lite import user_cache
from neox_lite.errors import ArgumentError

FOLDER = "eval"  # below user_cache.folder()


def digest(value: Any) -> str:
    """Of what is JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def stamps(folder: Path) -> list[tuple[str, int, int]]:
    """(path within, bytes, time of change in ns) of every file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


class AnswerCache:
    """Answers, each some JSON, by key. owner: all that they depend on beside the request, as JSON. fresh: delete older ones.

    Raises ArgumentError where the file cannot be read or written.
    """

    def __init__(self, owner: Any, fresh: bool = False) -> None:
        self.path = user_cache.folder() / FOLDER / f"{digest(owner)[:32]}.db"
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if fresh:
            with suppress(FileNotFoundError):
                self.path.unlink()
        with self._errors():
            self._database = sqlite3.connect(self.path)
            self._database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._database.commit()

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The answers that are in the cache."""
        found = {}
        with self._errors():
            for key in keys:
                for (value,) in self._database.execute("SELECT value FROM answers WHERE key = ?", (key,)):
                    found[key] = json.loads(value)
        return found

    def put(self, answers: Mapping[str, Any]) -> None:
        rows = [(key, json.dumps(value)) for key, value in answers.items()]
        with self._errors(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def close(self) -> None:
        self._database.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, json.JSONDecodeError) as error:
            raise ArgumentError(f"{self.path}: {error}; --fresh starts over with a new file") from error
