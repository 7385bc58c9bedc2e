"""Is one checkout of neox-lite as fast as another? Both on this CPU, in turns, from processes that stay.

    python -m benchmarks.compare_checkouts --old DIR --new DIR [--rounds 8] [--only decode,import] [--out FILE]

Each checkout is a process that keeps its models and makes one measurement at a time, while the other is stopped; rounds go old
new new old. A figure is the median over rounds; `speed` is the median of the rounds' own ratios, above 1 where the new one is
faster. Models are random int4 ones, written once below --scratch by this checkout. Measured, for every shape: seconds of a
decoded token, of a prompt, from loading to the first token; then `import neox_lite` in fresh processes. The shape
12x128x2, with 512 words, gives the time of a token that is not kernels. Servers are measured by serving/load.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack, closing
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

# Its kernels do almost nothing, so a token takes what Python and starting kernels take.
HOST_SHAPE, HOST_VOCABULARY = "12x128x2", 512
VERBS = ("decode", "prefill", "first token", "import")


def questions(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Name of a measurement -> what checkout_worker.py is asked: verb, folder, number."""
    numbers = {"decode": args.tokens, "prefill": args.prompt, "first token": 0}
    sizes = {HOST_SHAPE: {"vocab_size": HOST_VOCABULARY}}
    folders = {s: str(model_folder(s, "int4", args.scratch, **sizes.get(s, {}))) for s in args.shapes}
    found = {
        f"{shape}: {verb}": [verb, folder, numbers[verb]]
        for shape, folder in folders.items()
        for verb in numbers
        if verb in args.only
    }
    return found | ({"import neox_lite": ["import", "", 0]} if "import" in args.only else {})


def worker(name: str, checkout: Path, args: argparse.Namespace) -> Worker:
    command = [sys.executable, str(Path(__file__).with_name("checkout_worker.py")), str(args.threads)]
    env = environment(checkout, **threads_of(args.threads))
    found = Worker(name, command, env, args.scratch / f"{name}.log", checkout)
    assert Path(found.greeting["package"]).is_relative_to(checkout)
    return found


def compared(workers: list[Worker], question: list[Any], rounds: int) -> dict[str, Any]:
    """Both in turns: a round that is not counted, then old new, new old, old new, ..."""
    samples: dict[str, list[dict[str, float]]] = {worker.name: [] for worker in workers}
    for turn in range(rounds + 1):
        for worker in workers if turn % 2 else reversed(workers):
            found = worker.ask(json.dumps(question))
            if turn:
                samples[worker.name].append(found)
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
    parser.add_argument("--shapes", type=words, default=[HOST_SHAPE, "pythia-160m", "pythia-1.4b"])
    parser.add_argument("--only", type=some_of(VERBS), default=VERBS, help=f"some of {','.join(VERBS)}")
    parser.add_argument("--tokens", type=int, default=64, help="decoded in a measurement")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt (default 512)")
    args = parser.parse_args()
    args.old, args.new, args.scratch = args.old.resolve(), args.new.resolve(), args.scratch.resolve()
    result: dict[str, Any] = {"machine": machine(), "load_before": os.getloadavg()[0], "rounds": args.rounds}
    result |= {"threads": args.threads, "old": commit(args.old), "new": commit(args.new), "rows": {}}
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(worker(name, getattr(args, name), args))) for name in ("old", "new")]
        for name, question in questions(args).items():
            result["rows"][name] = row = compared(workers, question, args.rounds)
            s = row["seconds"]
            times = f"old {1e3 * s['old']:10.3f} ms, new {1e3 * s['new']:10.3f} ms"
            print(f"{name:24} {times}, {s['speed']:.3f} times as fast", flush=True)
            if args.out:
                write_json(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
