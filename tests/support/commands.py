"""neox-lite and Python in processes of their own, which find the packages of this checkout. Without a process: conftest."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def environment(**changes):
    """This process's environment with the checkout's packages in it; a change to None takes a variable away."""
    rooms = os.pathsep.join(str(ROOT / room) for room in (".", "quant", "app", "tests"))
    return {k: v for k, v in {**os.environ, "PYTHONPATH": rooms, **changes}.items() if v is not None}


def command(*words):
    return [sys.executable, "-m", "neox_lite_app", *map(str, words)]


def start(*words, env=None, **options):
    """neox-lite as a process whose output can be read."""
    return subprocess.Popen(command(*words), env=env or environment(), **{**PIPES, **options})


def run_python(code, *arguments, timeout=120, **changes):
    """The completed process of a Python text; changes: of the environment."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(words, env=environment(**changes), timeout=timeout, check=False, **PIPES)
