"""neox-lite generate: one prompt, streamed to stdout."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from neox_lite import GPTNeoXForCausalLM, Speculation
from neox_lite.errors import ArgumentError, ContextLengthError, NeoxLiteError
from neox_lite.generation.options import Options, as_dict
from neox_lite.generation.parameters import NEUTRAL, SAMPLED
from neox_lite.generation.speculative import MAX_DRAFT_TOKENS
from neox_lite.tokenizer import check_text

from .load_for_command import load, sampling
from .serving.token_clock import TokenClock
from .terminal import note, print_json, read_text


def generate(args: argparse.Namespace) -> None:
    prompt = read_text("-") if args.prompt == "-" else args.prompt
    options = _options(args)
    Options.parse({**options, "do_sample": True})  # bad values are refused before minutes of loading
    check_text(prompt, "--prompt")
    draft = _draft(args) if args.draft is not None else None  # first: the model is planned beside it
    model = load(args.model, args, args.head)
    ids, options["max_new_tokens"] = _lengths(model, prompt, args)
    options["do_sample"] = bool(model.generation_config.do_sample) if args.temperature is None else args.temperature > 0
    if not options["do_sample"]:
        idle = [name for name in options if name in SAMPLED and options[name] is not None and name != "temperature"]
        options = {name: value for name, value in options.items() if name not in SAMPLED}
        if idle:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            note(f"neox-lite: warning: {flags} without effect in greedy decoding; add --temperature 0.8")
    if draft is not None:
        options["assistant_model"] = draft
    clock, counts, pieces, reason = TokenClock(), Speculation(), [], None
    config = {**NEUTRAL, **as_dict(model.generation_config)}
    for event in model.stream(ids, speculation=counts, generation_config=config, **options):
        if event.token is not None:
            clock.tick()
        pieces.append(event.text)
        reason = event.finish_reason
        if not args.json:
            print(event.text, end="", flush=True)
    if args.json:
        figures = {"prompt_tokens": len(ids), "finish_reason": reason, "decode_tokens_per_s": clock.tokens_per_s}
        drafts = {"speculation": _speculation(counts)} if args.draft is not None or args.lookup else {}
        print_json({"text": "".join(pieces), "tokens": clock.tokens, **figures, **drafts})
        return
    print()
    sys.stdout.flush()
    pace = f", {clock.tokens_per_s:.1f} tokens/s" if clock.tokens_per_s else ""
    if counts.passes:
        pace += f", {counts.mean_tokens_per_pass:.2f} tokens a pass, {counts.accepted} of {counts.drafted} drafted ones right"
    note(f"{len(ids)} prompt tokens, {clock.tokens} new ones{pace} ({reason})")


def _draft(args: argparse.Namespace) -> GPTNeoXForCausalLM:
    """The model that guesses ahead; errors about it name the draft."""
    try:
        return load(args.draft, args, adapter=None)
    except NeoxLiteError as error:
        raise type(error)(f"--draft: {error}") from error


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the flags under the names of `generate`; None where a flag is not given."""
    return {
        **sampling(args),
        "stop_strings": args.stop,
        "prompt_lookup_num_tokens": MAX_DRAFT_TOKENS if args.lookup else None,
    }


def _lengths(model: GPTNeoXForCausalLM, prompt: str, args: argparse.Namespace) -> tuple[list[int], int]:
    """The prompt's ids and how many may follow. Raises ContextLengthError where they do not fit."""
    limit = model.config.max_position_embeddings
    if args.context and args.context > limit:
        raise ArgumentError(f"--context is {args.context}, but the model's own context is {limit}")
    context = args.context or limit
    ids = model.tokenizer(prompt).input_ids or [model.generation_config.bos_token_id]
    if ids == [None]:
        raise ArgumentError("the prompt is empty and the model names no token to start from; give --prompt some text")
    max_new_tokens = args.max_new_tokens if args.max_new_tokens is not None else max(context - len(ids), 0)
    if len(ids) + max(max_new_tokens, 1) > context:
        raise ContextLengthError(
            f"{len(ids)} prompt tokens and {max(max_new_tokens, 1)} new ones do not fit the context of {context}; "
            f"shorten the prompt or use --max-new-tokens {max(context - len(ids), 0)}"
        )
    return ids, max_new_tokens


def _speculation(counts: Speculation) -> dict[str, Any]:
    shown = {name: getattr(counts, name) for name in ("passes", "drafted", "accepted")}
    return {**shown, "mean_tokens_per_pass": counts.mean_tokens_per_pass}
