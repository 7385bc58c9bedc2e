"""neox-lite generate: one prompt, streamed to stdout."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from neox_lite.errors import ArgumentError, ContextLengthError
from neox_lite.generation import Clock

from .running import load, note, print_json, read_text


def generate(args: argparse.Namespace) -> None:
    prompt = read_text("-") if args.prompt == "-" else args.prompt
    model = load(args.model, args, args.head)
    context = min(args.context or model.config.max_position_embeddings, model.config.max_position_embeddings)
    ids = model.tokenizer(prompt).input_ids or [model.generation_config.bos_token_id]
    if ids == [None]:
        raise ArgumentError("the prompt is empty and the model names no token to start from; give --prompt some text")
    wanted = args.max_new_tokens if args.max_new_tokens is not None else max(context - len(ids), 0)
    if len(ids) + max(wanted, 1) > context:
        raise ContextLengthError(
            f"{len(ids)} prompt tokens and {max(wanted, 1)} new ones do not fit the context of {context}; "
            f"shorten the prompt or use --max-new-tokens {max(context - len(ids), 0)}"
        )
    options: dict[str, Any] = {"max_new_tokens": wanted, "stop_strings": args.stop, "seed": args.seed}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        options[name] = getattr(args, name)
    if args.temperature is not None:
        options["do_sample"] = args.temperature > 0
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
