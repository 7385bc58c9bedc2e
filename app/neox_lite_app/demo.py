"""neox-lite demo: quantize the bundled model, measure what that costs, and let it speak. Needs no network and no GPU."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from neox_lite import GPTNeoXForCausalLM
from neox_lite_quant import convert

from .evaluation.quality import cut, quality_of, table
from .load_for_command import load, placement, placing
from .paths import DEMO
from .serving.token_clock import TokenClock
from .terminal import bar, note, print_json

CONTEXT, WINDOWS = 256, 40
PROMPT = "KING RICHARD III:\n"
NEW_TOKENS = 160
NEXT = """\
Next, with a real model (the hub id is fetched once; about 3 GB for this one):
  neox-lite quantize EleutherAI/pythia-1.4b pythia-1.4b-int4
  neox-lite generate pythia-1.4b-int4 --prompt "The sea was calm, and"
GPT-NeoX-20B is EleutherAI/gpt-neox-20b: 41 GB to fetch, 11 GB as int4. What this machine has: neox-lite doctor"""


def demo(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    note("The bundled model: GPT-NeoX architecture, trained on Shakespeare's plays, 16-bit weights.")
    source = load(str(DEMO), args, kv="fp16")
    windows = cut(source, (DEMO / "heldout.txt").read_text(encoding="utf-8"), CONTEXT)[:WINDOWS]
    with tempfile.TemporaryDirectory(prefix="neox-lite-demo-") as scratch:
        rows = []
        models = {"demo (16 bit)": source}
        for format in ("int8", "int4"):
            with bar(f"quantize to {format}") as progress:
                convert(DEMO, Path(scratch) / format, format=format, progress=progress)
            models[f"demo ({format})"] = GPTNeoXForCausalLM.from_pretrained(Path(scratch) / format, **placing(args))
        for name, model in models.items():
            with bar(f"score {name}", "window") as progress:
                rows.append(asdict(quality_of(source, model, windows, name, progress)))
        if not args.json:
            note(
                f"\nOn {windows.numel():,} tokens of text that it has not seen; KL is the distance from 16 bit in nats:"
            )
            print(table(rows))
            note(f"\nThe int4 model on {placement(model)}:\n")
        clock, pieces = TokenClock(), []
        sampling = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95, "seed": args.seed}
        for event in model.stream(PROMPT, max_new_tokens=NEW_TOKENS, **sampling):
            clock.tick()
            pieces.append(event.text)
            if not args.json:
                print((PROMPT if clock.tokens == 1 else "") + event.text, end="", flush=True)
        result = {
            "rows": rows,
            "text": "".join(pieces),
            "tokens": clock.tokens,
            "decode_tokens_per_s": clock.tokens_per_s,
            "backend": model.ops.name,
            "seconds": time.perf_counter() - began,
        }
    if args.json:
        print_json(result)
        return
    print("\n")
    note(
        f"{clock.tokens} tokens at {clock.tokens_per_s or 0:.0f} tokens/s; all of it took {result['seconds']:.0f} s.\n\n{NEXT}"
    )
