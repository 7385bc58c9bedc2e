"""Greedy tokens of llama.cpp from an exported GGUF file beside ours from the folder, and our logits after a round trip.

    python -m benchmarks.peers.llama_cpp_tokens [--prompts 20] [--tokens 64] [--out benchmarks/results/llama_cpp_tokens.json]

Needs llama-cpp-python. The bundled model, plain and as int4 and int8 in groups of 32; prompts are 64 tokens of held-out text
each. llama.cpp has one GELU, the tanh form, and the model was trained with the other; so ours runs in three ways: as loaded
(8-bit activations, as llama.cpp's CPU kernels too have), with float32 activations, and so with llama.cpp's GELU.
Where the tokens part, the margin is how far the likeliest token's logit is above the next one's, ours and llama.cpp's; after
that the texts differ, so `same_choice` counts every token anew after llama.cpp's own text.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import command_line, write_json
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
        out = model.generate(prompt[None], max_new_tokens=count, min_new_tokens=count, do_sample=False)
        found, expected = out[0, width:].tolist(), torch.tensor(tokens)
        after = model(torch.cat((prompt, expected))[None]).logits[0, width - 1 : -1].float()
        same += int((after.argmax(-1) == expected).sum())
        at = next((i for i in range(count) if found[i] != tokens[i]), count)
        equal += at
        if at < count:
            best = after[at].topk(2).values
            ours = round(float(best[0] - best[1]), 4)
            partings.append({"prompt": number, "token": at, "our_margin": ours, "their_margin": round(margins[at], 4)})
    counts = {"tokens": count * len(theirs), "equal_before_parting": equal, "same_choice": same}
    return {**counts, "prompts_equal_to_the_end": len(theirs) - len(partings), "partings": partings}


def compare(folder: Path, scratch: Path, prompts: Tensor, count: int) -> dict[str, Any]:
    """One folder: export, llama.cpp, ours in every way, and back."""
    path, back = scratch / f"{folder.name}.gguf", scratch / f"{folder.name}-back"
    export_gguf(folder, path)
    import_gguf(path, back)
    peer = LlamaCpp(path, prompts.shape[1] + count)
    theirs = [peer.greedy(prompt.tolist(), count) for prompt in prompts]
    ways = {name: beside(load(folder, **way), prompts, theirs) for name, way in WAYS.items()}
    logits = [[load(of, exact=exact)(prompts).logits for of in (folder, back)] for exact in (False, True)]
    return {"ways": ways, "logits_identical_after_round_trip": all(torch.equal(*pair) for pair in logits)}


def demo_prompts(count: int, width: int = PROMPT) -> Tensor:
    """Prompts (count, width) from all over the bundled model's held-out text."""
    tokenizer = GPTNeoXForCausalLM.from_pretrained(DEMO).tokenizer
    ids = tokenizer((DEMO / "heldout.txt").read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    step = (len(ids) - width) // count
    return torch.tensor([ids[i * step : i * step + width] for i in range(count)])


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    import llama_cpp

    warnings.simplefilter("ignore")
    prompts, rows = demo_prompts(args.prompts), {}
    with tempfile.TemporaryDirectory() as name:
        folders = {"int4 g32 as Q4_0": Path(name) / "int4", "int8 g32 as Q8_0": Path(name) / "int8", "F16": DEMO}
        for format in ("int4", "int8"):
            convert(DEMO, Path(name) / format, format=format, group_size=32)
        for label, folder in folders.items():
            rows[label] = compare(folder, Path(name), prompts, args.tokens)
            for way, found in rows[label]["ways"].items():
                counts = [found[key] for key in ("equal_before_parting", "same_choice", "prompts_equal_to_the_end")]
                print(f"{label}, {way}: {counts[0]} of {found['tokens']} tokens before parting, ", end="")
                print(f"{counts[1]} the same choice, {counts[2]} prompts to the end")
    about = {"model": "bundled demo", "llama-cpp-python": llama_cpp.__version__, "prompt_tokens": PROMPT}
    if args.out:
        write_json(args.out, {**about, "rows": rows})


if __name__ == "__main__":
    main()
