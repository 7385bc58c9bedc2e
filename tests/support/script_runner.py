"""Runs scripts one after another in this process, here and under transformers, and tells what came of each.

Usage: script_runner.py WHICH... with "name" or "transformers:name", for tests/scripts/name.py. It prints one JSON object:
WHICH -> {"out", "error", "warnings"}. Only the import differs: `from neox_lite import` becomes `from transformers import`.
"""

import contextlib
import io
import json
import sys
import traceback
import warnings
from pathlib import Path

import torch
import transformers

import neox_lite.core.network

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(which: str) -> dict[str, object]:
    peer, _, name = which.rpartition(":")
    path = SCRIPTS / f"{name}.py"
    source = path.read_text(encoding="utf-8")
    if peer:
        source = source.replace("from neox_lite import", "from transformers import")
    out, error = io.StringIO(), None
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as told, contextlib.redirect_stdout(out):
        warnings.simplefilter("always")
        try:
            exec(compile(source, str(path), "exec"), {"__name__": "__main__"})
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
            traceback.print_exc()  # to stderr, for those who look for what failed
    for_users = [str(w.message) for w in told if w.category is UserWarning]
    return {"out": out.getvalue(), "error": error, "warnings": for_users}


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    neox_lite.core.network.free_memory = lambda: (32 << 30, 16 << 30)  # whatever this machine has
    print(json.dumps({which: run(which) for which in sys.argv[1:]}))
