"""Ends of a run that no one plans: a kill before a system call, a full disk, a pickle with a payload. Knows no test."""

import contextlib
import errno
import os
import signal
import sys
import threading
from pathlib import Path

CALLS = [(os, "pwrite"), (os, "fsync"), (os, "posix_fallocate"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")]


class Bomb:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def at_call(k, act, real):
    """`real`, but before its k-th call, from whichever thread, comes `act()`."""
    lock, calls = threading.Lock(), 0

    def call(*args, **options):
        nonlocal calls
        with lock:
            calls += 1
            if calls == k:
                act()
        return real(*args, **options)

    return call


def die_before(k):
    """Arrange that this process is killed just before its k-th call that writes."""
    counted = at_call(k, lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: None)
    for owner, name in CALLS:
        real = getattr(owner, name)
        setattr(owner, name, lambda *args, real=real, **options: (counted(), real(*args, **options))[1])


@contextlib.contextmanager
def disk_full_at(k, owner, name):
    """Let the k-th call of that name find no space."""
    real = getattr(owner, name)

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    setattr(owner, name, at_call(k, full, lambda *args: real(*args)))
    try:
        yield
    finally:
        setattr(owner, name, real)


def forked(run, *arguments):
    """Run in a fork of this process, which must have no threads; its process id."""
    if (child := os.fork()) == 0:
        try:
            run(*arguments)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return child


def status_of(run, *arguments):
    """How a fork that runs it ends: 0, or the signal that killed it."""
    return os.waitpid(forked(run, *arguments), 0)[1]
