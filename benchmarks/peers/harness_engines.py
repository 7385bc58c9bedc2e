"""One program that answers lm-evaluation-harness, in a process of its own: loads its form of the model, then is timed.

    python -m benchmarks.peers.harness_engines ENGINE HOME THREADS

`harness.py` runs this, and wrote the models and the tasks into HOME. A question is `TASK BATCH`; the answer is the seconds for
all log-likelihoods of a task, tokenizing included and metrics not, those of the processor, the tokens that went through the
layers, padding included, and the log-likelihoods.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"


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


ENGINES = {"neox-lite-int4": neox_lite, "hf-bfloat16": hf}


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


def main() -> None:
    name, home, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    out, sys.stdout = sys.stdout, sys.stderr
    logging.disable(logging.CRITICAL)
    import torch

    torch.set_num_threads(threads)
    requests = requests_of(home)
    lm = ENGINES[name](home)
    print(json.dumps({"requests": {task: len(found) for task, found in requests.items()}}), file=out, flush=True)
    for line in sys.stdin:
        task, batch = line.split()
        if name.startswith("hf"):
            lm.batch_size_per_gpu = int(batch)
        before, began, busy = lm.computed, time.perf_counter(), time.process_time()
        with torch.inference_mode(), open(os.devnull, "w") as null, contextlib.redirect_stderr(null):  # noqa: PTH123
            answers = lm.loglikelihood(requests[task], disable_tqdm=True)
        seconds = time.perf_counter() - began
        cpu = time.process_time() - busy
        found = {"seconds": seconds, "cpu_seconds": cpu, "tokens": lm.computed - before, "answers": answers}
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
