"""Is one checkout of neox-lite as fast as another? Both on this CPU, in turns, from processes that stay.

    python -m benchmarks.compare_checkouts --old DIR --new DIR [--rounds 8] [--only decode,serve] [--out FILE]

Each checkout is a process that keeps its models and makes one measurement at a time, while the other is stopped; rounds go old
new new old. A figure is the median over rounds; `speed` is the median of the rounds' own ratios, above 1 where the new one is
faster. Models are random int4 ones, written once below --scratch by this checkout. Measured, for every shape: seconds of a
decoded token, of a prompt, from loading to the first token; then `import neox_lite` in fresh processes; `serve` with --clients
that each stream --tokens; and `host`, the time of a token that is not kernels: a model with the layers of pythia-160m, but 128
channels and 512 words, whose kernels do almost nothing, so that a token takes what Python and starting kernels take.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Worker,
    command_line,
    environment,
    machine,
    model_folder,
    quartiles,
    some_of,
    threads_of,
    words,
    write_json,
)
from benchmarks.serving.load import Server, free_port, load, running

HOST_SHAPE, HOST_WORDS = "12x128x2", 512
WORDS = 24  # of a client's prompt
EVERY = ["host", "decode", "prefill", "first token", "import", "serve"]
Measure = Callable[
    [str, int], dict[str, float]
]  # checkout, round -> seconds, and the share of the CPU that others took


def measurements(args: argparse.Namespace, folders: dict[str, Path], log: Path) -> Iterator[tuple[str, Any]]:
    """(name, a context in which it can be measured) of what --only names."""
    if "host" in args.only:
        yield "host: decode", partial(resident, args, log, ["decode", str(folders["host"]), 4 * args.tokens])
    for shape in args.shapes:
        for verb, number in (("decode", args.tokens), ("prefill", args.prompt), ("first token", 0)):
            if verb in args.only:
                yield f"{shape}: {verb}", partial(resident, args, log, [verb, str(folders[shape]), number])
    if "import" in args.only:
        yield "import neox_lite", partial(resident, args, log, ["import", "", 0])
    if "serve" in args.only:
        yield f"{args.shapes[0]}: serve", partial(served, args, log, folders[args.shapes[0]])


def resident(
    args: argparse.Namespace, log: Path, question: list[Any], workers: dict[str, Worker], stack: ExitStack
) -> Measure:
    """Asks the checkouts' processes, which are started by the first who needs them."""
    for name in ("old", "new"):
        if name not in workers:
            command = [sys.executable, str(Path(__file__).with_name("checkout_worker.py")), str(args.threads)]
            env = environment(getattr(args, name), **threads_of(args.threads))
            workers[name] = Worker(name, command, env, log / f"{name}.log", getattr(args, name))
            assert Path(workers[name].greeting["package"]).is_relative_to(getattr(args, name))
            stack.callback(workers[name].close)
    return lambda name, turn: workers[name].ask(json.dumps(question))


def served(args: argparse.Namespace, log: Path, folder: Path, workers: dict[str, Worker], stack: ExitStack) -> Measure:
    """Two servers, one of them stopped; seconds a token of all clients together."""
    servers: dict[str, Server] = {}
    for name in ("old", "new"):
        port = free_port()
        command = [sys.executable, "-m", "neox_lite_app", "serve", str(folder), "--no-page", "--port", str(port)]
        command += ["--threads", str(args.threads), "--device", "cpu", "--head", "int8"]
        path = getattr(args, name)
        servers[name] = stack.enter_context(running(name, command, port, log / f"{name}-serve.log", path))
        servers[name].signal(signal.SIGSTOP)

    def measure(name: str, turn: int) -> dict[str, float]:
        servers[name].signal(signal.SIGCONT)
        found = asyncio.run(load(servers[name], args.clients, 0.0, WORDS, args.tokens, turn))
        servers[name].signal(signal.SIGSTOP)
        return {"seconds": 1 / found["tokens_per_s"], "first_p50_ms": found["first_p50_ms"]}

    return measure


def compared(measure: Measure, rounds: int) -> dict[str, Any]:
    """Both in turns: a round that is not counted, then old new, new old, old new, ..."""
    samples: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
    for turn in range(rounds + 1):
        for name in ("old", "new") if turn % 2 else ("new", "old"):
            found = measure(name, turn)
            if turn:
                samples[name].append(found)
    row: dict[str, Any] = {}
    for key in samples["old"][0]:
        values = {name: [sample[key] for sample in found] for name, found in samples.items()}
        if key == "others_cpu":
            row[key] = max(values["old"] + values["new"])
            continue
        ratios = [old / new for old, new in zip(values["old"], values["new"], strict=True)]
        speeds = quartiles(ratios)
        medians = {name: statistics.median(found) for name, found in values.items()}
        row[key] = {**medians, "speed": speeds["median"], "speed_quartiles": speeds["quartiles"], "samples": values}
    return row


def commit(path: Path) -> str:
    command = ["git", "-C", str(path), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    parser = command_line(__doc__, rounds=8, threads=True, scratch="checkouts")
    parser.add_argument("--old", type=Path, required=True, help="checkout, whose speed is 1")
    parser.add_argument("--new", type=Path, required=True, help="checkout, which is compared with it")
    parser.add_argument("--shapes", type=words, default=["pythia-160m", "pythia-1.4b"], help="the first is served, too")
    parser.add_argument("--only", type=some_of(EVERY), default=EVERY, help=f"some of {','.join(EVERY)}")
    parser.add_argument("--tokens", type=int, default=64, help="decoded in a measurement, and by each client")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default 512)")
    parser.add_argument("--clients", type=int, default=8, help="of a server at once (default 8)")
    args = parser.parse_args()
    args.old, args.new, args.scratch = args.old.resolve(), args.new.resolve(), args.scratch.resolve()
    folders = {shape: model_folder(shape, "int4", args.scratch) for shape in args.shapes}
    folders["host"] = model_folder(HOST_SHAPE, "int4", args.scratch, vocab_size=HOST_WORDS)
    result: dict[str, Any] = {"machine": machine(), "load_before": os.getloadavg()[0], "rounds": args.rounds}
    result |= {"threads": args.threads, "old": commit(args.old), "new": commit(args.new), "rows": {}}
    workers: dict[str, Worker] = {}
    with ExitStack() as all_along:
        for name, start in measurements(args, folders, args.scratch):
            with ExitStack() as stack:
                measure = start(workers, all_along if start.func is resident else stack)
                result["rows"][name] = row = compared(measure, args.rounds)
            s = row["seconds"]
            times = f"old {1e3 * s['old']:10.3f} ms, new {1e3 * s['new']:10.3f} ms"
            print(f"{name:24} {times}, {s['speed']:.3f} times as fast", flush=True)
            if args.out:
                write_json(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
