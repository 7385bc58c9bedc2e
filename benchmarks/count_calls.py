"""How much of the house one token walks through: calls of product functions, their files, and changes from file to file.

    python -m benchmarks.count_calls [--tree DIR] [--out FILE]

Two paths, on the bundled model: a token that `generate` decodes on the CPU (the difference of a call with one token more), and
a chat request of four tokens that `serve` streams over HTTP. A call is a function, or a generator that goes on, in one of our
files, whichever thread runs it; a change is a call in another file than the call before it in the same thread. Any checkout can
be counted: only its public classes and its commands are used.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

TOKENS = 4
STEADY = 40  # tokens before the one that is counted: steps are captured by then


class Calls:
    """Counts while `on`."""

    def __init__(self, tree: Path) -> None:
        self.rooms = tuple(f"{tree / room}/neox_lite" for room in (".", "quant", "app"))
        self.on = False
        self.files: Counter[str] = Counter()
        self.changes = 0
        self.last = threading.local()

    def note(self, frame: Any, event: str, argument: Any) -> None:
        if self.on and event == "call" and (name := frame.f_code.co_filename).startswith(self.rooms):
            self.files[name] += 1
            self.changes += name != getattr(self.last, "name", None)
            self.last.name = name

    def start(self) -> None:
        """In this thread, and in those that start later."""
        threading.setprofile(self.note)
        sys.setprofile(self.note)

    def reset(self) -> None:
        self.files, self.changes, self.last = Counter(), 0, threading.local()

    def found(self, tree: Path) -> dict[str, Any]:
        by_file = {str(Path(name).relative_to(tree)): count for name, count in self.files.most_common()}
        return {"calls": sum(by_file.values()), "files": len(by_file), "changes": self.changes, "by_file": by_file}


def decoded_token(tree: Path) -> dict[str, Any]:
    import torch

    from neox_lite import GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM.from_pretrained(tree / "app/neox_lite_app/demo_model", device_map="cpu")
    ids, found = torch.arange(3, 19)[None], []
    for count in (STEADY, STEADY, STEADY + 1):
        calls = Calls(tree)
        calls.start()
        calls.on = True
        model.generate(ids, max_new_tokens=count, eos_token_id=[])
        sys.setprofile(None)
        found.append(calls)
    _, shorter, longer = found
    longer.files -= shorter.files
    longer.changes -= shorter.changes
    return longer.found(tree)


def streamed_request(tree: Path) -> dict[str, Any]:
    """The server runs in this thread, as its signals want it; the client is another, and product code is the server's alone."""
    calls = Calls(tree)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    threading.Thread(target=client, args=(port, calls, tree), daemon=True).start()
    calls.start()
    from neox_lite_app.cli import main

    model = str(tree / "app/neox_lite_app/demo_model")
    main(["serve", model, "--no-page", "--port", str(port), "--device", "cpu"])
    raise SystemExit("the server ended before the request")


def client(port: int, calls: Calls, tree: Path) -> None:
    sys.setprofile(None)
    while True:
        try:
            ask(port)
            break
        except OSError:
            time.sleep(0.5)
    ask(port)
    calls.reset()
    calls.on = True
    ask(port)
    calls.on = False
    print(json.dumps(calls.found(tree)), flush=True)
    os._exit(0)


def ask(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"messages": [{"role": "user", "content": "Speak!"}], "max_tokens": TOKENS, "stream": True, "temperature": 0}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"status {answer.status}: {answer.read()[:300]!r}")
    answer.read()
    connection.close()
    time.sleep(0.3)  # what the server does after the last byte


PATHS = {"decoded token": decoded_token, "streamed request": streamed_request}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tree", type=Path, default=Path(__file__).parents[1], help="checkout to count (default: this one)"
    )
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--path", choices=PATHS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    tree = args.tree.resolve()
    if args.path:
        print(json.dumps(PATHS[args.path](tree)))
        return
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(tree / room) for room in (".", "quant", "app"))}
    found = {}
    for path in PATHS:
        command = [sys.executable, str(Path(__file__).resolve()), "--tree", str(tree), "--path", path]
        out = subprocess.run(command, env=env, cwd=tree, check=True, capture_output=True, text=True)
        found[path] = row = json.loads(out.stdout.splitlines()[-1])
        print(f"{path}: {row['calls']} calls in {row['files']} files, {row['changes']} changes of file")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
