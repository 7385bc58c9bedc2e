"""What kept prefixes and drafts are worth on this machine, with random weights in the shapes of real models.

    python -m benchmarks.serving.speculation turn --shape pythia-160m [--history 1500] [--out FILE]
    python -m benchmarks.serving.speculation drafts --shape pythia-6.9b --draft pythia-160m [--acceptance 0,0.6] [--out FILE]
    python -m benchmarks.serving.speculation lookup --shape pythia-1.4b [--out FILE]

turn: seconds to the first token of a chat's second turn, with the pages of the first one and without. drafts: tokens a second
without drafts and with those of a draft model that runs for its cost, while what it drafts is right with a given
probability; beside it what the formula gives for the times measured, with the best length known from the start. lookup: a
prompt that is copied with one token in twelve replaced, with drafts looked up in the prompt. Runs take turns; figures are
medians with their quartiles. `load` is the machine's load average before each round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import command_line, machine, quartiles, words, write_json
from neox_lite import GPTNeoXForCausalLM, Speculation
from neox_lite.cache import PrefixCache
from neox_lite.formats import DENSE, GroupInt
from neox_lite.generation.mixin import decode
from neox_lite.generation.options import Options
from neox_lite.generation.request import Sequence
from neox_lite.generation.speculative import (
    MAX_DRAFT_TOKENS,
    Drafter,
    Drafting,
    DraftModel,
    PassTimes,
    PromptLookup,
    estimate,
)
from neox_lite.units import PAGE
from neox_lite_app.load_for_command import default_threads
from neox_lite_app.models.random_model import RandomModel, config_of
from neox_lite_app.terminal import note

TURN = 6  # tokens of a run between those of the others
FORMATS = {"int4": GroupInt(4, 128), "int8": GroupInt(8, 128), "fp16": DENSE}


def main() -> None:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("what", choices=("turn", "drafts", "lookup"))
    parser.add_argument("--shape", default="pythia-160m")
    parser.add_argument("--draft", default="pythia-160m", help="shape of the draft model")
    parser.add_argument("--format", choices=FORMATS, default="int4", help="of both models")
    parser.add_argument("--acceptance", type=lambda text: [float(p) for p in words(text)], default=[0, 0.6, 0.8])
    parser.add_argument("--history", type=int, default=1500, help="tokens of the first turn's prompt")
    parser.add_argument("--context", type=int, default=128, help="tokens of the prompt before drafts are timed")
    parser.add_argument("--tokens", type=int, default=300, help="generated in a run with drafts")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads or default_threads())
    settings = {"what": args.what, "shape": args.shape, "format": args.format, "threads": torch.get_num_threads()}
    result = {**settings, "machine": machine(), "torch": torch.__version__, **globals()[args.what](args)}
    print(json.dumps(result, indent=1))
    if args.out:
        write_json(args.out, result)


def build(shape: str, format: str) -> GPTNeoXForCausalLM:
    model = RandomModel(config_of(shape), FORMATS[format], small_head=format != "fp16").build(lambda done, total: None)
    note(f"{shape} {format}: {model.get_memory_footprint() / 1e9:.2f} GB, {model.ops.name} backend")
    return model


def ids_of(model: GPTNeoXForCausalLM, count: int, seed: int) -> list[int]:
    return torch.randint(1, 50000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# A second turn --------------------------------------------------------------------------------------------------------


def turn(args: argparse.Namespace) -> dict[str, Any]:
    model = build(args.shape, args.format)
    times: dict[str, list[float]] = {"with": [], "without": []}
    loads = []
    for number in range(args.rounds + 1):  # the first compiles
        loads.append(os.getloadavg()[0])
        for name, seconds in times.items():
            model.reuse_prefix = name == "with"
            model.forget()
            first = first_tokens(model, ids_of(model, args.history, number), 16)
            question = ids_of(model, 30, 1000 + number)
            began = time.perf_counter()
            first_tokens(model, first + question, 1)
            seconds.append(time.perf_counter() - began)
    figures = {f"first_token_s_{name}_reuse": quartiles(seconds[1:]) for name, seconds in times.items()}
    medians = [figures[f"first_token_s_{name}_reuse"]["median"] for name in ("with", "without")]
    return {"history": args.history, "new": 30, **figures, "ratio": medians[1] / medians[0], "load": loads}


def first_tokens(model: GPTNeoXForCausalLM, ids: list[int], count: int) -> list[int]:
    return model.generate(torch.tensor([ids]), max_new_tokens=count, eos_token_id=[])[0].tolist()


# Drafts ---------------------------------------------------------------------------------------------------------------


class Script:
    """A text that the target is made to say, whatever its weights, and a draft model to know with some probability."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def force(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, float("-inf")).index_fill_(1, torch.tensor([self.ids[ids.shape[1]]]), 0.0)

    def guess(self, acceptance: float) -> Callable[[Any, torch.Tensor, torch.Tensor], int]:
        chance = random.Random(11)

        def choose(sequence: Any, history: torch.Tensor, logits: torch.Tensor) -> int:
            right = self.ids[len(history)]
            int(logits.numpy().argmax())  # what choosing costs
            return right if chance.random() < acceptance else right + 1

        return choose


class Run:
    """A generation that is advanced a few tokens at a time, and what its tokens took."""

    def __init__(self, target: GPTNeoXForCausalLM, sequence: Sequence, drafting: Drafting | None) -> None:
        self.sequence, self.drafting, self.seconds = sequence, drafting, 0.0
        prefixes = PrefixCache(target.new_pool(-(-(len(sequence.prompt) + sequence.max_tokens) // PAGE)), 0)
        self._steps = decode(target, prefixes, [sequence], drafting)
        next(self._steps)  # the prompt

    def advance(self, tokens: int) -> None:
        """So many more tokens; those that the last pass gives beyond them come at once the next time."""
        end = min(len(self.sequence.tokens) + tokens, self.sequence.max_tokens)
        began = time.perf_counter()
        while len(self.sequence.tokens) < end:
            next(self._steps)
        self.seconds += time.perf_counter() - began


def lookup(args: argparse.Namespace) -> dict[str, Any]:
    """A text that is copied with edits: every token of the prompt again, but for one in twelve, which is another."""
    target = build(args.shape, args.format)
    chance, prompt = random.Random(5), ids_of(target, args.tokens, 7)
    copied = [token if chance.random() > 1 / 12 else chance.randrange(1, 50000) for token in prompt]
    script = Script(prompt + copied + [0] * (MAX_DRAFT_TOKENS + 1))
    makers: dict[str, Callable[[], Drafter]] = {"lookup": PromptLookup}
    return race(args, target, script, len(prompt), makers)


def drafts(args: argparse.Namespace) -> dict[str, Any]:
    """A draft model that runs for its cost, whose drafts are right with a given probability."""
    target, draft = build(args.shape, args.format), build(args.draft, args.format)
    script = Script(ids_of(target, args.context + args.tokens + MAX_DRAFT_TOKENS + 1, 7))
    config, pages = draft.config, -(-(args.context + args.tokens) // PAGE)

    def maker(acceptance: float) -> Callable[[], Drafter]:
        def make() -> Drafter:
            prefixes, guess = PrefixCache(draft.new_pool(pages), 0), script.guess(acceptance)
            return DraftModel(draft, prefixes, guess, config.vocab_size, config.max_position_embeddings)

        return make

    found = race(args, target, script, args.context, {str(a): maker(a) for a in args.acceptance})
    known = {int(n): s for n, s in found["pass_s"].items()}
    for name, sequence in found["rows"].items():
        if name != "plain":
            sequence["formula_speedup"], sequence["formula_length"] = optimum(float(name), known, found["draft_s"])
    return {"draft": args.draft, **found}


def race(
    args: argparse.Namespace,
    target: GPTNeoXForCausalLM,
    script: Script,
    context: int,
    makers: dict[str, Callable[[], Drafter]],
) -> dict[str, Any]:
    """Plain decoding and each drafter, advanced in turns of a few tokens, so that what slows the machine slows all alike."""
    options, times = Options(logits_processor=(script.force,)), PassTimes()  # as a model keeps them from call to call
    names = ["plain", *makers]
    counts = {name: Speculation() for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    draft_s: list[float] = []
    loads = []
    for number in range(args.rounds + 1):  # the first compiles, captures and learns what passes cost
        loads.append(os.getloadavg()[0])
        runs = {}
        for name in names:
            counted = counts[name] if number else Speculation()
            made = makers[name]() if name in makers else None
            drafting = Drafting(made, MAX_DRAFT_TOKENS, times, counted, time.perf_counter) if made is not None else None
            runs[name] = Run(target, Sequence(script.ids[:context], args.tokens, 0, options=options), drafting)
        for turn in range(-(-args.tokens // TURN)):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                runs[name].advance(TURN)
        for name, run in runs.items():
            assert run.sequence.tokens == script.ids[context : context + args.tokens]
            seconds[name].append(run.seconds / (args.tokens - 1))
            if run.drafting is not None and run.drafting.controller.draft_s is not None:
                draft_s.append(run.drafting.controller.draft_s)
            speedup = seconds["plain"][-1] / seconds[name][-1]
            note(f"round {number}, {name}: {1 / seconds[name][-1]:.2f} tokens/s, {speedup:.3f} times plain")
    rows: dict[str, dict[str, Any]] = {}
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(seconds["plain"][1:], found[1:], strict=True)]
        rows[name] = {"tokens_per_s": quartiles([1 / s for s in found[1:]]), "speedup": quartiles(ratios)}
        if name != "plain":
            rows[name] |= {**vars(counts[name]), "mean_tokens_per_pass": counts[name].mean_tokens_per_pass}
    passes = {str(n): s for n, s in times.known.items()}
    per_draft = statistics.median(draft_s) if draft_s else None
    about = {"context": context, "tokens": args.tokens, "load": loads}
    return {**about, "rows": rows, "pass_s": passes, "draft_s": per_draft}


def optimum(acceptance: float, known: dict[int, float], draft_s: float) -> tuple[float, int]:
    """Best speed-up over plain decoding by E / (t(g + 1) + g d), and the length that gives it."""

    def speedup(g: int) -> float:
        expected = sum(acceptance**i for i in range(g + 1))
        return expected * estimate(known, 1) / (estimate(known, g + 1) + g * draft_s)

    return max((speedup(g), g) for g in range(MAX_DRAFT_TOKENS + 1))


if __name__ == "__main__":
    main()
