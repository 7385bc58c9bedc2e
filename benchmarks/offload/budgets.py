"""What a plan predicts beside what happens: memory by the system's own counters, and tokens a second.

    python -m benchmarks.offload.budgets --scratch DIR [--shapes pythia-160m,20b] [--cpu-memory 3GiB] [--gpu-memory 8GiB,12GiB]

Each case is a process of its own that loads a model of random weights within its budgets, fills the context, and reads its
counters. Writes a JSON and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from itertools import product
from typing import Any

from benchmarks.common import command_line, environment, json_of, model_folder, module, status_bytes, words, write_json

DECODE_TOKENS = 16
SAMPLE_S = 0.02


def main() -> None:
    parser = command_line(__doc__, scratch="offload")
    parser.add_argument("--shapes", type=words, default=["pythia-160m", "pythia-1.4b", "pythia-6.9b", "20b"])
    parser.add_argument("--format", choices=("int4", "int8", "fp16"), default="int4")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--cpu-memory", type=words, default=[""], help="budgets, comma between; default: what is free")
    parser.add_argument("--gpu-memory", type=words, default=[""], help="likewise")
    parser.add_argument("--kv", choices=("fp16", "int8"))
    parser.add_argument("--decode", type=int, default=DECODE_TOKENS)
    parser.add_argument("--name", default="offload", help="of the JSON in the folder --out")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(**json.loads(args.case))))
        return
    rows = []
    for shape in args.shapes:
        folder = model_folder(shape, args.format, args.scratch)
        for gpu, cpu in product(args.gpu_memory, args.cpu_memory):
            case = {"folder": str(folder), "context": args.context, "kv": args.kv, "decode": args.decode}
            case["limits"] = {where: size for where, size in (("cuda", gpu), ("cpu", cpu)) if size}
            rows.append({"shape": shape, "format": args.format, **run(case), "folder": folder.name})
            print(line(rows[-1]), flush=True)
    if args.out:
        write_json(args.out / f"{args.name}.json", {"machine": machine(), "rows": rows})


def run(case: dict[str, Any]) -> dict[str, Any]:
    try:
        return {**case, **json_of(module("offload.budgets", "--case", json.dumps(case)), environment())}
    except RuntimeError as error:
        return {**case, "error": str(error)}


def measure(folder: str, context: int, kv: str | None, decode: int, limits: dict[str, str]) -> dict[str, Any]:
    """In a process of its own: load, fill the context in chunks of 512, decode; counters, and the plan's figures."""
    import torch

    from neox_lite import GPTNeoXForCausalLM
    from neox_lite_app.load_for_command import default_threads

    torch.set_num_threads(default_threads())
    began = time.perf_counter()
    model = GPTNeoXForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory=limits or None, context=context, kv=kv
    )
    load_s = time.perf_counter() - began
    with Counters() as counters:
        ids = torch.randint(model.config.vocab_size, (context - decode,), generator=torch.Generator().manual_seed(0))
        pool = model.new_pool(-(-context // 128))
        block_table = pool.new()
        model.step(pool, [block_table], [ids[:16].tolist()])  # compiles, and brings the weights into memory
        prefill, steps = [], []
        for part in ids[16:].split(512):
            prefill.append((len(part), seconds(lambda part=part: model.step(pool, [block_table], [part.tolist()]))))
        for _ in range(decode):
            steps.append(seconds(lambda: model.step(pool, [block_table], [[1]])))
    plan = model.plan
    whole = [n / s for n, s in prefill if n == 512]
    return {
        "load_s": load_s,
        "layers": {tier: plan.layers.count(tier) for tier in ("gpu", "cpu", "disk")},
        "kv": plan.kv,
        "head": plan.head,
        "predicted": {
            **plan.totals,
            "decode_tokens_per_s": 1 / plan.pass_s(1, context),
            "prefill_tokens_per_s": plan.prefill_tokens_per_s,
        },
        "parts": plan.parts,
        "measured": {
            **counters.found,
            "decode_tokens_per_s": 1 / statistics.median(steps[2:]),
            "prefill_tokens_per_s": statistics.median(whole) if whole else None,
        },
    }


def seconds(work: Any) -> float:
    began = time.perf_counter()
    work().argmax(-1).tolist()  # waits for a GPU
    return time.perf_counter() - began


class Counters:
    """The most memory that the system and the GPU's driver count for this process meanwhile."""

    def __enter__(self) -> Counters:
        self.found: dict[str, int] = {}
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self._look()

    def _look(self) -> None:
        found = status_bytes(anonymous="RssAnon", files="RssFile", shared="RssShmem")
        private = found["anonymous"] + found["shared"]
        now = {"cpu": private + found["files"], "cpu_anonymous": private, "cpu_files": found["files"]}
        self.found = {key: max(value, self.found.get(key, 0)) for key, value in now.items()}

    def __exit__(self, *_: object) -> None:
        import torch

        self._ended.set()
        self._watcher.join()
        self._look()
        if torch.cuda.is_available():
            from neox_lite.offload.profile import context_bytes

            self.found["gpu"] = torch.cuda.max_memory_reserved() + context_bytes()
            free, total = torch.cuda.mem_get_info()
            self.found["gpu_used_by_all"] = total - free


def line(row: dict[str, Any]) -> str:
    """One case as text."""
    where = ", ".join(f"{name} {size}" for name, size in row["limits"].items()) or "what is free"
    if "error" in row:
        return f"{row['shape']:<12} {where}: {row['error']}"
    predicted, measured, layers = row["predicted"], row["measured"], row["layers"]
    memory = [
        f"{tier} {predicted[tier] / 1e6:.0f} MB, {measured[tier] / 1e6:.0f} seen ({predicted[tier] / measured[tier] - 1:+.1%})"
        for tier in ("gpu", "cpu")
        if measured.get(tier) and predicted[tier]
    ]
    speeds = [
        f"{kind} {predicted[f'{kind}_tokens_per_s']:.2f}, measured {measured[f'{kind}_tokens_per_s'] or 0:.2f} tokens/s"
        for kind in ("decode", "prefill")
    ]
    kinds = f"{row['kv']} cache, {row['head']} head"
    placed = "/".join(str(layers[tier]) for tier in ("gpu", "cpu", "disk"))
    return f"{row['shape']:<12} within {where}: layers {placed}, {kinds}; {'; '.join(memory + speeds)}"


def machine() -> dict[str, Any]:
    from dataclasses import asdict

    from neox_lite.offload.profile import identity, load, measure

    return {**identity(), "rates": asdict(load() or measure()), "load_average": os.getloadavg()[0]}


if __name__ == "__main__":
    main()
