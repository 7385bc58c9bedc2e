"""neox-lite and lm-evaluation-harness's own `hf` model on the same tasks and weights, on this CPU, in turns.

    python -m benchmarks.peers.harness --shape pythia-410m [--rounds 3] [--documents 8]

Random weights that int4 and bfloat16 both hold exactly (`model.py`), so the time is that of a trained model and the
difference in log-likelihoods that of the arithmetic; the tokenizer and the text are the bundled model's. neox-lite runs the
int4 folder with its default settings, hf a bfloat16 checkpoint with the best of --batches, found for each task in a run before.
Each is a process of its own (`harness_engines.py`), stopped while the other works. Tasks: `ends`, five-shot with four ends of
several tokens; `letters`, the same five examples for all and four answers of one token; `words`, the last word of a passage,
without examples. Where others use the machine, seconds of the processor with --threads 1 are the ones to compare: threads that
wait for each other count as work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, Worker, environment, machine, module
from benchmarks.peers.cpu import engine

ENGINES = ("neox-lite-int4", "hf-bfloat16")
DEMO = ROOT / "app" / "neox_lite_app" / "demo_model"
PASSAGE, END = 200, 26  # characters: about 85 and 10 tokens
WORDS = 5  # times as many documents: they are shorter


def write_tasks(folder: Path, documents: int) -> None:
    text = " ".join((DEMO / "heldout.txt").read_text(encoding="utf-8").split())
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)

    def passage(length: int) -> str:
        start = text.index(" ", draw.randrange(len(text) - 2 * length)) + 1
        return text[start : text.index(" ", start + length)]

    ends, letters, words = [], [], []
    for _ in range(documents + 5):
        ends.append({"start": passage(PASSAGE), "ends": [passage(END) for _ in range(4)], "gold": draw.randrange(4)})
        letters.append({"start": passage(PASSAGE), "gold": draw.randrange(4)})
    for _ in range(WORDS * documents):
        start, _, word = passage(PASSAGE).rpartition(" ")
        words.append({"start": start, "word": word})
    choice = {"output_type": "multiple_choice", "doc_to_target": "{{gold}}", "num_fewshot": 5}
    first = {"sampler": "first_n"}
    tasks: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "ends": (ends, {**choice, "doc_to_text": "{{start}}", "doc_to_choice": "{{ends}}"}),
        "letters": (
            letters,
            {**choice, "doc_to_text": "{{start}}\nAnswer:", "doc_to_choice": list("ABCD"), "fewshot_config": first},
        ),
        "words": (words, {"output_type": "loglikelihood", "doc_to_text": "{{start}}", "doc_to_target": " {{word}}"}),
    }
    for name, (found, settings) in tasks.items():
        asked = found[5:] if name != "words" else found
        for split, part in (("test", asked), ("train", found[:5] if name == "letters" else found)):
            lines = "".join(json.dumps(one) + "\n" for one in part)
            (folder / f"{name}_{split}.jsonl").write_text(lines, encoding="utf-8")
        files = {split: str(folder / f"{name}_{split}.jsonl") for split in ("test", "train")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, **settings}
        task |= {"test_split": "test", "fewshot_split": "train", "metric_list": [{"metric": "acc"}]}
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")


def prepare(home: Path, args: argparse.Namespace) -> None:
    for what in ("int4", "plain"):
        if not (home / what).exists():
            print(f"write {what} ...", file=sys.stderr)
            subprocess.run(
                module("peers.model", what, home, args.shape), env=environment(), check=True, stdout=sys.stderr
            )
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(DEMO / name, home / what / name)
    shutil.rmtree(home / "tasks", ignore_errors=True)
    write_tasks(home / "tasks", args.documents)


def measure(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    workers = {}
    try:
        for name in ENGINES:
            print(f"load {name} ...", file=sys.stderr)
            workers[name] = engine(name, args, home, "peers.harness_engines")
        return {task: measured(task, workers, args) for task in args.tasks}
    finally:
        for worker in workers.values():
            worker.close()


def measured(task: str, workers: dict[str, Worker], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a task: hf's batch size is found first, then both take turns."""
    ours, theirs = (workers[name] for name in ENGINES)
    ours.ask(f"{task} 0")  # kernels are compiled
    tried = {batch: theirs.ask(f"{task} {batch}")["seconds"] for batch in args.batches}
    best = min(tried, key=lambda batch: tried[batch])
    print(f"{task}: hf by batch size: {tried}", file=sys.stderr)
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in ENGINES}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            samples[name].append(worker.ask(f"{task} {best}"))
    row: dict[str, Any] = {"hf_batch": best, "hf_seconds_by_batch": tried, "requests": ours.greeting["requests"][task]}
    for name, found in samples.items():
        seconds = [round(one["seconds"], 3) for one in found]
        others = round(max(one["others_cpu"] for one in found), 3)
        row[name] = {"seconds": statistics.median(seconds), "samples": seconds, "tokens": found[0]["tokens"]}
        row[name] |= {"cpu_seconds": statistics.median(one["cpu_seconds"] for one in found), "others_cpu_max": others}
    for key, name in (("seconds", "times_faster"), ("cpu_seconds", "times_less_cpu")):
        ratios = [b[key] / a[key] for a, b in zip(*samples.values(), strict=True)]
        row |= {name: statistics.median(ratios), f"{name}_samples": ratios}
    pairs = list(zip(*(samples[name][0]["answers"] for name in ENGINES), strict=True))
    row["log_likelihood_difference"] = statistics.mean(abs(a - b) for (a, _), (b, _) in pairs)
    row["log_likelihood_mean"] = statistics.mean(b for _, (b, _) in pairs)
    print(f"{task}: {row[ENGINES[0]]['seconds']} s, hf {row[ENGINES[1]]['seconds']} s", file=sys.stderr)
    return row


def table(rows: dict[str, Any]) -> str:
    lines = [
        f"{'task':<10}{'requests':>9}{'neox-lite s':>13}{'hf s':>9}{'times':>8}{'CPU times':>11}{'tokens':>9}{'hf tokens':>11}"
    ]
    for name, row in rows.items():
        ours, theirs = (row[engine] for engine in ENGINES)
        lines.append(
            f"{name:<10}{row['requests']:>9}{ours['seconds']:>13.2f}{theirs['seconds']:>9.2f}{row['times_faster']:>8.2f}"
            f"{row['times_less_cpu']:>11.2f}{ours['tokens']:>9}{theirs['tokens']:>11}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--shape", default="pythia-410m", help="as of cpu.py (default pythia-410m)")
    parser.add_argument("--tasks", type=names, default=["ends", "letters", "words"], help="some of ends,letters,words")
    parser.add_argument("--documents", type=int, default=8, help="of ends and letters; words has five times as many")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each figure (default 3)")
    parser.add_argument("--batches", type=names, default=["1", "4", "8", "16"], help="batch sizes that hf tries")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for both (default: all)")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()) / "neox-lite-harness", help="for models"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "harness.json", help="file of the result")
    args = parser.parse_args()
    home = args.scratch / args.shape
    home.mkdir(parents=True, exist_ok=True)
    prepare(home, args)
    load = os.getloadavg()[0]
    rows = measure(args, home)
    print(table(rows))
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "lm-eval")}
    keys = {"shape": args.shape, "threads": args.threads, "rounds": args.rounds, "documents": args.documents}
    beside = {"machine": machine(), "python": platform.python_version(), "packages": packages}
    args.out.write_text(json.dumps({**keys, **beside, "load_before": load, "tasks": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
