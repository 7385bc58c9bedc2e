"""A checkpoint on the hub whose weight files are fetched when they are needed and deleted when they have been used.

It knows files and how often each of their tensors will be used; never what they mean. At most two files are on the disk at a
time: the one in use and the next.
"""

from __future__ import annotations

import io
import shutil
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from neox_lite.checkpoint.reader import Checkpoint
from neox_lite.checkpoint.safetensors_file import (
    MAX_HEADER_BYTES,
    SafetensorsFile,
    TensorInfo,
    parse_header,
    read_header,
)
from neox_lite.errors import CheckpointError, HubError
from neox_lite.hub import Remote

FIRST_BYTES = 64 << 10  # of a weight file: most headers are shorter
MAX_FILES = 2  # on the disk at a time
MAX_REQUESTS = 8  # for headers, at a time


class Stream:
    """The weight files of a repository, fetched, used and deleted one after another. A context manager.

    Fetched files lie in a folder of their own. It is removed at the end and after an error, except after an interrupt or when
    the hub cannot be reached: then a new run resumes.
    """

    def __init__(self, remote: Remote, folder: Path) -> None:
        """Reads every file's header, no more. Raises HubError, CheckpointError."""
        self.remote, self.folder = remote, folder
        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            self._infos = dict(zip(remote.sizes, pool.map(self._described, remote.sizes), strict=True))
        files = {name: _Streamed(self, name, self._infos[name]) for name in sorted(self._infos)}
        self.checkpoint = Checkpoint.of(remote.folder, files)
        self._file_of = {tensor: file for file, found in self._infos.items() for tensor in found}
        self._uses: Counter[str] = Counter()  # file -> expected uses of its tensors, in the order of use
        self._fetched: dict[str, Future[SafetensorsFile]] = {}

    @property
    def scratch_bytes(self) -> int:
        """Disk space that fetched files use at most."""
        return sum(sorted(self.remote.sizes.values())[-MAX_FILES:])

    def expect(self, tensors: Iterable[str]) -> None:
        """Announce that these tensors will be used, in this order; one that is named twice is used twice."""
        self._uses.update(self._file_of[name] for name in tensors)

    def used(self, tensors: Iterable[str]) -> None:
        """Announce that these were used, or are not needed any more."""
        for file in map(self._file_of.__getitem__, tensors):
            self._uses[file] -= 1
            if not self._uses[file] and (fetched := self._fetched.pop(file, None)) is not None:
                fetched.result()
                (self.folder / file).unlink()
                self._fetch_next()

    def file(self, name: str) -> SafetensorsFile:
        """A weight file, fetched now if it is not here; starts to fetch the next one, too."""
        if name not in self._fetched:
            self._start(name)
        self._fetch_next()
        return self._fetched[name].result()

    def _fetch_next(self) -> None:
        following = next((file for file, uses in self._uses.items() if uses > 0 and file not in self._fetched), None)
        if following is not None and len(self._fetched) < MAX_FILES:
            self._start(following)

    def _start(self, name: str) -> None:
        """Fetch in a daemon thread: a transfer cannot be interrupted, so an exit does not wait; the next run resumes it."""
        future = self._fetched[name] = Future()

        def run() -> None:
            try:
                future.set_result(self._fetch(name))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name=f"fetch {name}", daemon=True).start()

    def _fetch(self, name: str) -> SafetensorsFile:
        file = SafetensorsFile(self.remote.fetch(name, self.folder))
        if file.infos != self._infos[name]:
            raise CheckpointError(
                f"{self.folder / name}: is not the file whose header the hub sent; delete it and run again"
            )
        return file

    def _described(self, name: str) -> dict[str, TensorInfo]:
        size = self.remote.sizes[name]
        start = self.remote.read(name, 0, min(size, FIRST_BYTES))
        stop = min(size, 8 + min(MAX_HEADER_BYTES, int.from_bytes(start[:8], "little")))
        if stop > len(start):
            start += self.remote.read(name, len(start), stop)
        header, data_start = read_header(io.BytesIO(start), size, self.folder / name)
        return parse_header(header, data_start, size, self.folder / name)[0]

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.checkpoint.close()
        if kind is None or not issubclass(kind, HubError | KeyboardInterrupt):
            shutil.rmtree(self.folder, ignore_errors=True)


class _Streamed:
    """A weight file that is fetched when it is read."""

    def __init__(self, stream: Stream, name: str, infos: dict[str, TensorInfo]) -> None:
        self.infos, self._stream, self._name = infos, stream, name

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        return self._stream.file(self._name).read(name, start, stop)
