"""neox-lite and its peers on this CPU: one shape, the same weights, measured in turns.

    python -m benchmarks.peers.cpu --shape pythia-160m [--engines neox-lite-int4,llama.cpp-q4_0] [--rounds 5]

Each engine is a process of its own (`engines.py`) that loads the model once and then makes one measurement at a
time, while all others are stopped: nobody spins beside the one who works. Rounds go A B C A B C ..., a figure is the median
with its quartiles. What each engine needs is written once, below --scratch. An engine whose package is missing is left
out, saying so; pip install llama-cpp-python openvino optimum-intel nncf ctranslate2 bitsandbytes transformers matplotlib.
Seconds of loading count the library's own import, with the files in the page cache; the first token comes after 16 others.
Shapes that do not fit in memory twice are measured with --alone: an engine is loaded for each of its turns and ended after it.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    RESULTS,
    Worker,
    command_line,
    environment,
    last_line,
    machine,
    module,
    quartiles,
    some_of,
    threads_of,
    write_json,
)
from benchmarks.peers.engines import ENGINES, GROUP, PROMPT, REFERENCE
from benchmarks.peers.model import config_of
from neox_lite_app.models.random_model import SHAPES

METRICS = {  # what a worker is asked; {n} is --tokens
    "decode 1": "decode {n}",
    "decode 4": "batch 4 {n}",
    "decode 8": "batch 8 {n}",
    "prefill 128": "prefill 128",
    "prefill 512": "prefill 512",
}


QUIET, TRIES = 0.05, 6  # a sample during which others took more than this share of the CPU is taken again


def engine(name: str, args: argparse.Namespace, home: Path, program: str = "peers.engines", python: str = "") -> Worker:
    """A process that loads an engine, by another Python where that is given."""
    command = module(program, name, home, args.threads)
    command[0] = python or command[0]
    return Worker(name, command, environment(**threads_of(args.threads)), home / f"{name}.log")


def write_form(what: str, home: Path, shape: str) -> str | None:
    """Write a form of the model if it is not there; the reason where it cannot be written."""
    if (home / what).exists():
        return None
    print(f"write {what} ...", file=sys.stderr)
    pipes = {"stderr": subprocess.PIPE, "stdout": sys.stderr}
    done = subprocess.run(module("peers.model", what, home, shape), env=environment(), text=True, **pipes)
    return last_line(done.stderr) if done.returncode else None


def prepared(args: argparse.Namespace, home: Path) -> dict[str, str]:
    """Write what the engines need; returns the reasons of those that cannot have it."""
    needs = {name: ["int4", *ENGINES[name][2], ENGINES[name][1]] for name in args.engines}
    failed = {
        what: write_form(what, home, args.shape) for what in dict.fromkeys(f for forms in needs.values() for f in forms)
    }
    return {name: why for name, forms in needs.items() for what in forms if (why := failed[what]) is not None}


def measure(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    """All engines, all metrics, in turns."""
    left_out, workers, started = prepared(args, home), [], []
    try:
        if args.errors and not (home / "truth.npy").exists():
            started.append(reference := engine(REFERENCE, args, home))
            reference.ask("error")
            reference.close()
        for name in (n for n in args.engines if n not in left_out):
            print(f"load {name} ...", file=sys.stderr)
            try:
                started.append(worker := engine(name, args, home))
                worker.greeting["error"] = worker.ask("error")["error"] if args.errors else None
                workers.append(worker)
                if args.alone:
                    worker.close()
            except RuntimeError as error:
                left_out[name] = str(error)
        rows: dict[str, dict[str, Any]] = {w.name: {**w.greeting, "metrics": {}} for w in workers}
        loads: dict[str, list[float]] = {w.name: [w.greeting["load_s"]] for w in workers}
        for metric in args.metrics:
            question = METRICS[metric].format(n=args.tokens)
            samples: dict[str, list[dict[str, Any]]] = {w.name: [] for w in workers}
            for turn in range(int(args.alone), args.rounds + 1):  # turn 0 warms up: kernels compiled, contexts made
                for worker in (w for w in workers if w.name not in left_out):
                    try:
                        once = turn == 0 or args.alone  # loading has just moved all memory: the system is busy for long
                        found = {**worker.ask(question), "tries": 1} if once else undisturbed(worker, question)
                        samples[worker.name] += [found] if turn else []
                        loads[worker.name].append(worker.greeting["load_s"])
                        if args.alone:
                            worker.close()
                    except RuntimeError as error:  # most likely the machine ran out of memory
                        left_out[worker.name] = f"{metric}: {error}"
                        del rows[worker.name]
            for name, row in rows.items():
                row["metrics"][metric] = summary(samples[name])
                for key in (key for key in samples[name][0] if key.endswith("_bytes")):
                    row[key] = max(row.get(key, 0), *(sample[key] for sample in samples[name]))
            print(table(rows, [metric]), file=sys.stderr)
    finally:
        for worker in started:
            worker.close()
    for name, row in rows.items():
        row["load_s"] = round(statistics.median(loads[name]), 3)
    return {"engines": rows, "left_out": left_out}


def undisturbed(worker: Worker, question: str) -> dict[str, Any]:
    """A sample while nobody else worked; after TRIES, the one that was disturbed least. Its speed plays no part."""
    found: list[dict[str, Any]] = []
    while len(found) < TRIES and not (found and found[-1]["others_cpu"] <= QUIET):
        time.sleep(len(found))
        found.append(worker.ask(question))
    return {**min(found, key=lambda sample: sample["others_cpu"]), "tries": len(found)}


def summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [round(s["tokens_per_s"], 3) for s in samples]
    figures = quartiles(speeds)
    low, high = figures["quartiles"]
    others, tries = round(max(s["others_cpu"] for s in samples), 3), sum(s["tries"] for s in samples)
    figures |= {"spread": round((high - low) / figures["median"], 4), "samples": speeds}
    return {**figures, "tries": tries, "others_cpu_max": others}


def table(rows: dict[str, dict[str, Any]], metrics: list[str]) -> str:
    lines = []
    for metric in metrics:
        lines.append(f"{metric}, tokens/s: median, quartiles, spread, most CPU that others took")
        for name, row in sorted(rows.items(), key=lambda r: -r[1]["metrics"][metric]["median"]):
            m = row["metrics"][metric]
            low, high = m["quartiles"]
            numbers = f"{m['median']:9.2f}  {low:9.2f} - {high:9.2f}  {m['spread']:6.1%}  {m['others_cpu_max']:6.1%}"
            lines.append(f"  {name:26} {numbers}")
    return "\n".join(lines)


def overview(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["engine: load s, first token s, peak RSS GB, anonymous GB, rms error of prefill and decode, head"]
    for name, row in rows.items():
        sizes = f"{row['peak_rss_bytes'] / 1e9:6.2f} {row['anonymous_bytes'] / 1e9:6.2f}"
        wrong = row["error"] or {}
        errors = " ".join(f"{wrong[how]['rms']:9.1e}" if how in wrong else f"{'-':>9}" for how in ("prefill", "decode"))
        lines.append(f"  {name:26} {row['load_s']:6.2f} {row['first_token_s']:6.2f} {sizes} {errors}  {row['head']}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """One panel a metric, engines as bars, quartiles as whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, metrics = result["engines"], result["metrics"]
    figure, panels = pyplot.subplots(1, len(metrics), figsize=(3.6 * len(metrics), 1 + 0.32 * len(rows)), sharey=True)
    names = list(reversed(rows))
    for panel, metric in zip([panels] if len(metrics) == 1 else panels, metrics, strict=True):
        found = [rows[name]["metrics"][metric] for name in names]
        medians = [m["median"] for m in found]
        whiskers = [[m["median"] - m["quartiles"][0] for m in found], [m["quartiles"][1] - m["median"] for m in found]]
        colors = ["tab:orange" if name.startswith("neox-lite") else "tab:gray" for name in names]
        panel.barh(names, medians, xerr=whiskers, color=colors)
        panel.bar_label(panel.containers[-1], [f" {m:.{1 if m < 100 else 0}f}" for m in medians], fontsize=8)
        panel.set_title(f"{metric}, tokens/s", fontsize=10)
        panel.margins(x=0.3)
    title = f"{result['shape']}: {result['machine']['cpu']}, {result['threads']} threads; median and quartiles"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = command_line(__doc__, rounds=5, threads=True, scratch="peers", out=RESULTS)
    parser.add_argument("--shape", default="pythia-160m", help=f"{', '.join(SHAPES)}, or layers x hidden x heads")
    parser.add_argument("--engines", type=some_of(ENGINES), default=list(ENGINES), help=f"some of {','.join(ENGINES)}")
    parser.add_argument("--metrics", type=some_of(METRICS), default=list(METRICS), help=f"some of {','.join(METRICS)}")
    parser.add_argument("--tokens", type=int, default=32, help=f"decoded after {PROMPT} tokens (default 32)")
    parser.add_argument("--no-errors", dest="errors", action="store_false", help="skip the comparison with the truth")
    parser.add_argument("--alone", action="store_true", help="no engine stays loaded while another works")
    parser.add_argument("--force", action="store_true", help="measure although the machine is busy")
    args = parser.parse_args()
    home = args.scratch / args.shape
    home.mkdir(parents=True, exist_ok=True)
    if (load := os.getloadavg()[0]) > 0.3 and not args.force:
        raise SystemExit(f"the load average is {load:.2f}, expected at most 0.3; wait, or measure anyway with --force")
    keys = {
        "shape": args.shape,
        "settings": config_of(args.shape).to_dict(),
        "group_size": GROUP,
        "metrics": args.metrics,
    }
    keys |= {"threads": args.threads, "rounds": args.rounds, "prompt_tokens": PROMPT, "decode_tokens": args.tokens}
    result = {**keys, "machine": machine(), "python": platform.python_version(), **measure(args, home)}
    print(table(result["engines"], args.metrics), overview(result["engines"]), sep="\n")
    for name, reason in result["left_out"].items():
        print(f"left out: {name}: {reason}")
    path = args.out / f"peers_cpu_{args.shape}.json"
    write_json(path, result)
    try:
        plot(result, path.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
