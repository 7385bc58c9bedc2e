"""Greedy tokens of llama.cpp from an exported GGUF file beside ours from the folder, and our logits after a round trip.

    python -m benchmarks.peers.llama_cpp_tokens [--prompts 20] [--tokens 64] [--out benchmarks/results/llama_cpp_tokens.json]

Needs llama-cpp-python. The bundled model, plain and as int4 and int8 in groups of 32; prompts are 64 tokens of held-out text
each. llama.cpp has one GELU, the tanh form, and the model was trained with the other; so ours runs in three ways: as loaded
(8-bit activations, as llama.cpp's CPU kernels too have), with float32 activations, and so with llama.cpp's GELU.
Where the tokens part, the margin is how far the likeliest token's logit is above the next one's, ours and llama.cpp's; after
that the texts differ, so `same_choice` counts every token anew after llama.cpp's own text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite_app.paths import DEMO
from neox_lite_quant import convert, export_gguf, import_gguf

PROMPT = 64
WAYS: dict[str, dict[str, Any]] = {
    "as loaded": {},
    "float32 activations": {"exact": True},
    "float32 activations, llama.cpp's GELU": {"exact": True, "hidden_act": "gelu_fast"},
}


class LlamaCpp:
    """One file in llama.cpp, with float32 keys and values."""

    def __init__(self, path: Path, context: int) -> None:
        import llama_cpp

        self.peer = llama_cpp.Llama(str(path), n_ctx=context, n_threads=1, type_k=0, type_v=0, verbose=False)

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """The next tokens, and the margin of each."""
        import llama_cpp

        self.peer.reset()
        self.peer.eval(prompt)
        tokens, margins = [], []
        for _ in range(count):
            raw = llama_cpp.llama_get_logits_ith(self.peer.ctx, -1)
            logits = np.ctypeslib.as_array(raw, (self.peer.n_vocab(),))
            first, second = np.argsort(-logits, kind="stable")[:2]
            tokens.append(int(first))
            margins.append(float(logits[first] - logits[second]))
            self.peer.eval(tokens[-1:])
        return tokens, margins


def load(folder: Path, exact: bool = False, hidden_act: str | None = None) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig.from_pretrained(folder)
    config = config.copy(hidden_act=hidden_act) if hidden_act else config
    return GPTNeoXForCausalLM.from_pretrained(folder, exact=exact, config=config)


def beside(model: GPTNeoXForCausalLM, prompts: Tensor, theirs: list[tuple[list[int], list[float]]]) -> dict[str, Any]:
    """Our greedy tokens beside llama.cpp's."""
    count, width = len(theirs[0][0]), prompts.shape[1]
    partings, equal, same = [], 0, 0
    for number, (prompt, (tokens, margins)) in enumerate(zip(prompts, theirs, strict=True)):
        found = model.generate(prompt[None], max_new_tokens=count, min_new_tokens=count, do_sample=False)[
            0, width:
        ].tolist()
        after = model(torch.cat((prompt, torch.tensor(tokens)))[None]).logits[0, width - 1 : -1].float()
        same += int((after.argmax(-1) == torch.tensor(tokens)).sum())
        at = next((i for i in range(count) if found[i] != tokens[i]), count)
        equal += at
        if at < count:
            best = after[at].topk(2).values
            ours = round(float(best[0] - best[1]), 4)
            partings.append({"prompt": number, "token": at, "our_margin": ours, "their_margin": round(margins[at], 4)})
    return {
        "tokens": count * len(theirs),
        "equal_before_parting": equal,
        "prompts_equal_to_the_end": len(theirs) - len(partings),
        "same_choice": same,
        "partings": partings,
    }


def compare(folder: Path, scratch: Path, prompts: Tensor, count: int) -> dict[str, Any]:
    """One folder: export, llama.cpp, ours in every way, and back."""
    path, back = scratch / f"{folder.name}.gguf", scratch / f"{folder.name}-back"
    export_gguf(folder, path)
    import_gguf(path, back)
    peer = LlamaCpp(path, prompts.shape[1] + count)
    theirs = [peer.greedy(prompt.tolist(), count) for prompt in prompts]
    result: dict[str, Any] = {
        "ways": {name: beside(load(folder, **way), prompts, theirs) for name, way in WAYS.items()}
    }
    same = [
        torch.equal(load(folder, exact=exact)(prompts).logits, load(back, exact=exact)(prompts).logits)
        for exact in (False, True)
    ]
    return result | {"logits_identical_after_round_trip": all(same)}


def demo_prompts(count: int, width: int = PROMPT) -> Tensor:
    """Prompts (count, width) from all over the bundled model's held-out text."""
    tokenizer = GPTNeoXForCausalLM.from_pretrained(DEMO).tokenizer
    ids = tokenizer((DEMO / "heldout.txt").read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    step = (len(ids) - width) // count
    return torch.tensor([ids[i * step : i * step + width] for i in range(count)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    import llama_cpp

    warnings.simplefilter("ignore")
    prompts, rows = demo_prompts(args.prompts), {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        convert(DEMO, scratch / "int4", format="int4", group_size=32)
        convert(DEMO, scratch / "int8", format="int8", group_size=32)
        for label, folder in (
            ("int4 g32 as Q4_0", scratch / "int4"),
            ("int8 g32 as Q8_0", scratch / "int8"),
            ("F16", DEMO),
        ):
            rows[label] = compare(folder, scratch, prompts, args.tokens)
            for way, found in rows[label]["ways"].items():
                print(
                    f"{label:<18}{way:<40}{found['equal_before_parting']:>6} of {found['tokens']} before parting, "
                    f"{found['same_choice']} the same choice, {found['prompts_equal_to_the_end']} prompts to the end",
                    file=sys.stderr,
                )
    result = {"model": "bundled demo", "llama-cpp-python": llama_cpp.__version__, "prompt_tokens": PROMPT, "rows": rows}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
