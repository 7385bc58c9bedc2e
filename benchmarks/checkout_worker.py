"""One checkout in a process that answers with seconds: `compare_checkouts.py` runs it, with the checkout importable.

It uses public names alone, so that checkouts of any layout answer. A question is a JSON line, [verb, folder, number]:

    ["first token", folder, seed]   load the folder and generate one token
    ["decode", folder, tokens]      of a generation of so many tokens more, divided by them
    ["prefill", folder, tokens]     until the first token after a prompt of so many
    ["import", "", 0]               of `import neox_lite` in a fresh process, torch included; `after_torch`: without it
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import count
from typing import Any

PROMPT = 16
IMPORT = """
import time
began = time.perf_counter()
import torch
torch_s = time.perf_counter() - began
import neox_lite
print(time.perf_counter() - began, time.perf_counter() - began - torch_s)
"""


class Checkout:
    """Models stay loaded; every prompt is another, so no kept prefix helps."""

    def __init__(self) -> None:
        self.models: dict[str, Any] = {}
        self.seeds = count()

    def model(self, folder: str) -> Any:
        if folder not in self.models:
            self.models[folder] = self.load(folder)
        return self.models[folder]

    def load(self, folder: str) -> Any:
        from neox_lite import GPTNeoXForCausalLM

        return GPTNeoXForCausalLM.from_pretrained(folder, device_map="cpu", head="int8")

    def generate(self, model: Any, prompt: int, tokens: int) -> float:
        import torch

        generator = torch.Generator().manual_seed(next(self.seeds))
        ids = torch.randint(1, model.config.vocab_size, (1, prompt), generator=generator)
        began = time.perf_counter()
        out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=[])
        seconds = time.perf_counter() - began
        assert out.shape[1] == prompt + tokens
        return seconds

    def answer(self, verb: str, folder: str, number: int) -> dict[str, float]:
        if verb == "first token":
            began = time.perf_counter()
            self.generate(self.load(folder), PROMPT, 1)
            return {"seconds": time.perf_counter() - began}
        if verb == "decode":
            model = self.model(folder)
            short = self.generate(model, PROMPT, 1)
            return {"seconds": (self.generate(model, PROMPT, number + 1) - short) / number}
        if verb == "prefill":
            return {"seconds": self.generate(self.model(folder), number, 1)}
        words = subprocess.run(
            [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True
        ).stdout.split()
        return {"seconds": float(words[0]), "after_torch": float(words[1])}


def main() -> None:
    import torch

    import neox_lite

    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    torch.set_num_threads(int(sys.argv[1]))
    checkout = Checkout()
    print(json.dumps({"torch": torch.__version__, "package": neox_lite.__file__}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(checkout.answer(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
