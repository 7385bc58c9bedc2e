"""neox-lite generate: one prompt, streamed to stdout."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from neox_lite.errors import ArgumentError, ContextLengthError
from neox_lite.generation import Clock, Options
from neox_lite.tokenizer import check_text

from .running import load, note, print_json, read_text


def generate(args: argparse.Namespace) -> None:
    prompt = read_text("-") if args.prompt == "-" else args.prompt
    given = {
        name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    }
    options: dict[str, Any] = {**given, "stop_strings": args.stop}
    Options.parse({**options, "do_sample": True})  # bad values are refused before minutes of loading
    check_text(prompt, "--prompt")
    model = load(args.model, args, args.head)
    limit = model.config.max_position_embeddings
    if args.context and args.context > limit:
        raise ArgumentError(f"--context is {args.context}, but the model's own context is {limit}")
    context = args.context or limit
    ids = model.tokenizer(prompt).input_ids or [model.generation_config.bos_token_id]
    if ids == [None]:
        raise ArgumentError("the prompt is empty and the model names no token to start from; give --prompt some text")
    wanted = args.max_new_tokens if args.max_new_tokens is not None else max(context - len(ids), 0)
    if len(ids) + max(wanted, 1) > context:
        raise ContextLengthError(
            f"{len(ids)} prompt tokens and {max(wanted, 1)} new ones do not fit the context of {context}; "
            f"shorten the prompt or use --max-new-tokens {max(context - len(ids), 0)}"
        )
    options["do_sample"] = bool(model.generation_config.do_sample) if args.temperature is None else args.temperature > 0
    if not options["do_sample"]:
        idle = [name for name in ("top_k", "top_p", "min_p", "seed") if options.pop(name) is not None]
        if idle:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            note(f"neox-lite: warning: {flags} without effect in greedy decoding; add --temperature 0.8")
    options["max_new_tokens"] = wanted
    clock, pieces, tokens, reason = Clock(), [], 0, None
    for event in model.stream(ids, **options):
        clock.tick()
        tokens += event.token is not None
        pieces.append(event.text)
        reason = event.finish_reason
        if not args.json:
            print(event.text, end="", flush=True)
    speed = clock.tokens_per_s
    if args.json:
        figures = {"prompt_tokens": len(ids), "finish_reason": reason, "decode_tokens_per_s": speed}
        print_json({"text": "".join(pieces), "tokens": tokens, **figures})
        return
    print()
    sys.stdout.flush()
    note(f"{len(ids)} prompt tokens, {tokens} new ones" + (f", {speed:.1f} tokens/s" if speed else "") + f" ({reason})")
