"""neox-lite and lm-evaluation-harness's own `hf` model on the same tasks and weights, on this CPU, in turns.

    python -m benchmarks.peers.harness --shape pythia-410m [--rounds 3] [--documents 8]

Random weights that int4 and bfloat16 both hold exactly (`model.py`), so the time is that of a trained model and the difference
in log-likelihoods that of the arithmetic; the tokenizer and the text are the bundled model's. neox-lite runs the int4 folder
with its default settings, hf a bfloat16 checkpoint with the best of --batches, found for each task in a run before. Each is a
process of its own, stopped while the other works. Tasks: `ends`, five-shot with four ends of several tokens; `letters`, the
same five examples for all and four answers of one token; `words`, the last word of a passage, without examples. With others on
the machine, seconds of the processor with --threads 1 are the ones to compare: threads that wait for each other count as work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import DEMO, RESULTS, Worker, answer_questions, command_line, machine, version, words, write_json
from benchmarks.peers.cpu import engine, write_form

ENGINES = ("neox-lite-int4", "hf-bfloat16")
PASSAGE, END = 200, 26  # characters: about 85 and 10 tokens
WORDS = 5  # times as many documents: they are shorter


# In a process of its own ----------------------------------------------------------------------------------------------


def work(name: str, home: Path, threads: int) -> None:
    """A question is `TASK BATCH`; the answer is the seconds for all log-likelihoods of a task, and the log-likelihoods.

    Tokenizing is included and metrics are not; tokens are those that went through the layers, padding included.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.CRITICAL)
    import torch

    torch.set_num_threads(threads)
    requests = requests_of(home)
    lm = neox_lite(home) if name == ENGINES[0] else hf(home)

    def answer(question: str) -> dict[str, Any]:
        task, batch = question.split()
        if name.startswith("hf"):
            lm.batch_size_per_gpu = int(batch)
        before, began, busy = lm.computed, time.perf_counter(), time.process_time()
        with torch.inference_mode(), Path(os.devnull).open("w") as null, contextlib.redirect_stderr(null):
            answers = lm.loglikelihood(requests[task], disable_tqdm=True)
        times = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - busy}
        return {**times, "tokens": lm.computed - before, "answers": answers}

    answer_questions({"requests": {task: len(found) for task, found in requests.items()}}, answer)


def neox_lite(home: Path) -> Any:
    from neox_lite import GPTNeoXForCausalLM
    from neox_lite_app.evaluation.harness import NeoxLiteLM

    return NeoxLiteLM(GPTNeoXForCausalLM.from_pretrained(home / "int4", device_map="cpu"))


def hf(home: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(home / "plain"), dtype="bfloat16", device="cpu")
    lm.computed, call = 0, lm._model_call

    def counted(inputs: Any, *args: Any, **options: Any) -> Any:
        lm.computed += inputs.numel()
        return call(inputs, *args, **options)

    lm._model_call = counted
    return lm


def requests_of(home: Path) -> dict[str, list[Any]]:
    """The requests of each task, as the harness makes them."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(home / "tasks"), include_defaults=False)
    found = {}
    for name in manager.all_tasks:
        (task,) = manager.load([name])["tasks"].values()
        task.set_fewshot_seed(seed=1234)
        task.build_all_requests()
        found[name] = task.instances
    return found


# The side that measures -----------------------------------------------------------------------------------------------


def write_tasks(folder: Path, documents: int) -> None:
    text = " ".join((DEMO / "heldout.txt").read_text(encoding="utf-8").split())
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)

    def passage(length: int) -> str:
        start = text.index(" ", draw.randrange(len(text) - 2 * length)) + 1
        return text[start : text.index(" ", start + length)]

    def last_word() -> dict[str, str]:
        start, _, word = passage(PASSAGE).rpartition(" ")
        return {"start": start, "word": word}

    ends, letters = [], []
    for _ in range(documents + 5):
        ends.append({"start": passage(PASSAGE), "ends": [passage(END) for _ in range(4)], "gold": draw.randrange(4)})
        letters.append({"start": passage(PASSAGE), "gold": draw.randrange(4)})
    lasts = [last_word() for _ in range(WORDS * documents)]
    choice = {"output_type": "multiple_choice", "doc_to_target": "{{gold}}", "num_fewshot": 5}
    same_five = {
        "doc_to_text": "{{start}}\nAnswer:",
        "doc_to_choice": list("ABCD"),
        "fewshot_config": {"sampler": "first_n"},
    }
    tasks: dict[str, tuple[list[Any], list[Any], dict[str, Any]]] = {  # documents, examples, settings
        "ends": (ends[5:], ends, {**choice, "doc_to_text": "{{start}}", "doc_to_choice": "{{ends}}"}),
        "letters": (letters[5:], letters[:5], {**choice, **same_five}),
        "words": (
            lasts,
            lasts,
            {"output_type": "loglikelihood", "doc_to_text": "{{start}}", "doc_to_target": " {{word}}"},
        ),
    }
    for name, (test, train, how) in tasks.items():
        files = {split: folder / f"{name}_{split}.jsonl" for split in ("test", "train")}
        for path, rows in zip(files.values(), (test, train), strict=True):
            path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
        task = {"task": name, "dataset_path": "json", "test_split": "test", "fewshot_split": "train", **how}
        task["dataset_kwargs"] = {"data_files": {split: str(path) for split, path in files.items()}}
        (folder / f"{name}.yaml").write_text(json.dumps({**task, "metric_list": [{"metric": "acc"}]}), encoding="utf-8")


def prepare(home: Path, args: argparse.Namespace) -> None:
    for what in ("int4", "plain"):
        if (why := write_form(what, home, args.shape)) is not None:
            raise SystemExit(f"{what}: {why}")
        for path in DEMO.glob("*token*.json"):
            shutil.copy(path, home / what)
    shutil.rmtree(home / "tasks", ignore_errors=True)
    write_tasks(home / "tasks", args.documents)


def measured(task: str, workers: dict[str, Worker], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a task: hf's batch size is found first, then both take turns."""
    ours, theirs = (workers[name] for name in ENGINES)
    # Kernels are compiled.
    ours.ask(f"{task} 0")
    tried = {batch: theirs.ask(f"{task} {batch}")["seconds"] for batch in args.batches}
    best = min(tried, key=lambda batch: tried[batch])
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
    times = (
        f"{row[ENGINES[0]]['seconds']:.2f} s, hf {row[ENGINES[1]]['seconds']:.2f} s: {row['times_faster']:.2f} times"
    )
    print(f"{task}: {row['requests']} requests, {times}, {row['times_less_cpu']:.2f} of processor time")
    return row


def main() -> int:
    parser = command_line(__doc__, rounds=3, threads=True, scratch="harness", out=RESULTS / "harness.json")
    parser.add_argument("--shape", default="pythia-410m", help="as of cpu.py (default pythia-410m)")
    parser.add_argument("--tasks", type=words, default=["ends", "letters", "words"], help="some of ends,letters,words")
    parser.add_argument("--documents", type=int, default=8, help="of ends and letters; words has five times as many")
    parser.add_argument("--batches", type=words, default=["1", "4", "8", "16"], help="batch sizes that hf tries")
    args = parser.parse_args()
    home = args.scratch / args.shape
    home.mkdir(parents=True, exist_ok=True)
    prepare(home, args)
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        workers = {name: engine(name, args, home, "peers.harness") for name in ENGINES}
        for worker in workers.values():
            stack.callback(worker.close)
        rows = {task: measured(task, workers, args) for task in args.tasks}
    packages = {name: version(name) for name in ("torch", "transformers", "lm-eval")}
    keys = {"shape": args.shape, "threads": args.threads, "rounds": args.rounds, "documents": args.documents}
    beside = {"machine": machine(), "python": platform.python_version(), "packages": packages}
    write_json(args.out, {**keys, **beside, "load_before": load, "tasks": rows})
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ENGINES:
        work(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main())
