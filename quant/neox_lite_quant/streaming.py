"""A checkpoint on the hub whose weight files are fetched when they are needed and deleted when they have been used.

It knows files, and how often each of their tensors will be used; never what they mean. Two files at most are on the disk at
a time: the one in use and the next.
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
HELD = 2  # files on the disk at a time
AT_ONCE = 8  # headers that are asked for at a time


class Stream:
    """The weight files of a repository on their way through this machine. A context manager.

    Fetched files lie in a folder of their own. It goes at the end, and after an error too, but for those after which a new
    run goes on: an interrupt, and a hub that cannot be reached.
    """

    def __init__(self, remote: Remote, folder: Path) -> None:
        """Reads every file's header, no more. Raises HubError, CheckpointError."""
        self.remote, self.folder = remote, folder
        with ThreadPoolExecutor(AT_ONCE) as pool:
            self._infos = dict(zip(remote.sizes, pool.map(self._described, remote.sizes), strict=True))
        files = {name: _Streamed(self, name, self._infos[name]) for name in sorted(self._infos)}
        self.checkpoint = Checkpoint.of(remote.folder, files)
        self._file_of = {tensor: file for file, found in self._infos.items() for tensor in found}
        self._left: Counter[str] = Counter()  # file -> uses of its tensors still to come; in the order of need
        self._coming: dict[str, Future[SafetensorsFile]] = {}

    @property
    def scratch_bytes(self) -> int:
        """What fetched files take on the disk at most."""
        return sum(sorted(self.remote.sizes.values())[-HELD:])

    def expect(self, tensors: Iterable[str]) -> None:
        """These will be used, in this order, one of several uses for each time that it is named."""
        self._left.update(self._file_of[name] for name in tensors)

    def used(self, tensors: Iterable[str]) -> None:
        """These have been used, or need not be any more."""
        for file in map(self._file_of.__getitem__, tensors):
            self._left[file] -= 1
            if not self._left[file] and (fetched := self._coming.pop(file, None)) is not None:
                fetched.result()
                (self.folder / file).unlink()
                self._fetch_next()

    def file(self, name: str) -> SafetensorsFile:
        """A weight file, fetched now if it is not here; the next one is then on its way."""
        if name not in self._coming:
            self._start(name)
        self._fetch_next()
        return self._coming[name].result()

    def _fetch_next(self) -> None:
        following = next((file for file, left in self._left.items() if left > 0 and file not in self._coming), None)
        if following is not None and len(self._coming) < HELD:
            self._start(following)

    def _start(self, name: str) -> None:
        """In a thread that nobody waits for at an exit: a transfer cannot be interrupted, and the next run goes on with it."""
        future = self._coming[name] = Future()

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
