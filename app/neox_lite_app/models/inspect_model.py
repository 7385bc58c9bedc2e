"""neox-lite verify and info: what a folder holds, and whether all of it is there."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from neox_lite.checkpoint.adapter import Settings, open_weights
from neox_lite.checkpoint.reader import Checkpoint, verify_folder
from neox_lite.config import GPTNeoXConfig
from neox_lite.errors import ArgumentError, FormatError, NeoxLiteError
from neox_lite.formats import FORMATS
from neox_lite.hub import ADAPTER_CONFIG, MANIFEST, fetch_files, local_folder
from neox_lite.loading.skeleton import Skeleton
from neox_lite.modeling.heads import class_of
from neox_lite.offload.plan import sizes_of
from neox_lite.tokenizer import GPTNeoXTokenizerFast
from neox_lite.units import dtype_name

from ..load_for_command import MIXED, formats_in
from ..terminal import amount, bar, note, print_json
from .plan import Model

PROBE_TOKENS = 8


def verify(args: argparse.Namespace) -> int:
    problems = problems_of(Path(args.folder))
    if args.json:
        print_json({"ok": not problems, "problems": problems})
    else:
        print("\n".join(problems) if problems else f"{args.folder}: whole: what was checked is as it should be")
    return 1 if problems else 0


def problems_of(folder: Path) -> list[str]:
    """What is wrong with a model folder, one line each: its config, the shapes, hashes and values of its weights."""
    if not folder.is_dir():
        raise ArgumentError(f"{folder}: {'is a file; give its folder' if folder.exists() else 'no such folder'}")
    problems: list[str] = []
    try:
        config = GPTNeoXConfig.from_pretrained(folder)
        method = (config.quantization_config or {}).get("quant_method")
        ours = method == "compressed-tensors" or (folder / MANIFEST).exists()
        with Checkpoint.open(folder) as checkpoint:
            Skeleton(class_of(config), config, checkpoint).check_formats()
    except NeoxLiteError as error:
        problems, ours = [str(error)], True
    # Weights are read twice: for their hashes and for their values.
    total = 2 * sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    done = 0
    with bar("verify") as progress:

        def count(read: int) -> None:
            nonlocal done
            done += read
            progress(min(done, total), total)

        problems += [p for p in verify_folder(folder, count, needs_manifest=ours) if p not in problems]
        progress(total, total)
    if not problems and (problem := logits_problem(folder)) is not None:
        problems = [problem]
    if not ours:
        note(f"{folder}: has no {MANIFEST}, so shapes and values were checked, and no hashes")
    return problems


def logits_problem(folder: Path) -> str | None:
    """What is wrong with the outputs of a model for a few tokens; None where they are numbers."""
    config = GPTNeoXConfig.from_pretrained(folder)
    model: Any = class_of(config).from_pretrained(folder)
    ids = torch.arange(min(PROBE_TOKENS, config.vocab_size, config.max_position_embeddings))[None]
    if bool(model(ids, attention_mask=torch.ones_like(ids)).to_tuple()[0].isfinite().all()):
        return None
    dtype = dtype_name(model.dtype)
    advice = "; quantize the checkpoint with --dtype bfloat16" if dtype == "float16" else ""
    return f"{folder}: its outputs are not finite: activations exceed {dtype}{advice}"


def info(args: argparse.Namespace) -> None:
    local = local_folder(args.model, args.revision)
    names = ["config.json", "tokenizer.json", ADAPTER_CONFIG]
    folder = local or fetch_files(args.model, names, args.revision)
    if not (folder / "config.json").exists() and (folder / ADAPTER_CONFIG).exists():
        _adapter_info(args, folder, local is not None)
        return
    config = GPTNeoXConfig.from_pretrained(folder)
    formats = formats_in(config)
    format = next(iter(formats))
    result: dict[str, Any] = {
        "model": args.model,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "ffn": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "rotary": f"{config.rope_parameters['rope_type']}, {config.rotary_dim} of {config.head_dim} dimensions",
        "residual": "parallel" if config.use_parallel_residual else "sequential",
        "activation": config.hidden_act,
        "tied_head": config.tie_word_embeddings,
        "dtype": config.dtype,
        "parameters": config.num_parameters,
        "format": format.name if len(formats) == 1 else MIXED,
        "group_size": getattr(format, "group_size", None) if len(formats) == 1 else None,
        "kv_bytes_per_token": 4 * config.num_hidden_layers * config.hidden_size,
        "tokens_known": known_tokens(folder),
        "bytes": stored_bytes(config),
    }
    if local is not None:
        with Checkpoint.open(folder) as checkpoint:
            result["files"] = [f.name for f in checkpoint.files]
            result["stored_bytes"] = checkpoint.total_bytes
    if args.json:
        print_json(result)
    else:
        print(describe(result))


def _adapter_info(args: argparse.Namespace, folder: Path, is_local: bool) -> None:
    settings = Settings.read(folder)
    result: dict[str, Any] = {
        "adapter": args.model,
        "base": settings.base,
        "rank": settings.rank,
        "alpha": settings.alpha,
        "scale": settings.scale_of(""),
        "targets": settings.targets if isinstance(settings.targets, str) else sorted(settings.targets),
        "layers": list(settings.layers) if settings.layers else None,
        "heads": list(settings.heads),
    }
    if is_local:
        with open_weights(folder) as checkpoint:
            result["tensors"], result["stored_bytes"] = len(checkpoint.names()), checkpoint.total_bytes
    if args.json:
        print_json(result)
        return
    targets = result["targets"]
    own = "" if not settings.ranks and not settings.alphas else ", others for some modules"
    print(f"{args.model}: LoRA adapter, rank {settings.rank}, scale {result['scale']:.4g}{own}")
    print(f"  base        {settings.base or 'not named'}")
    print(f"  targets     {targets if isinstance(targets, str) else ', '.join(targets)}")
    if settings.layers:
        print(f"  layers      {', '.join(map(str, settings.layers))}")
    if is_local:
        print(f"  on disk     {amount(result['stored_bytes'], 'B')} in {result['tensors']} tensors")


def stored_bytes(config: GPTNeoXConfig) -> dict[str, int]:
    """Bytes of all tensors by format, in the largest groups that fit; formats that do not suit the shape are left out."""
    sizes = {"float16": sizes_of(config).total}
    for name in FORMATS:
        with suppress(FormatError):
            sizes[name] = Model.quantized(config, name).sizes.total
    return sizes


def known_tokens(folder: Path) -> int | None:
    try:
        return len(GPTNeoXTokenizerFast.from_pretrained(folder))
    except NeoxLiteError:
        return None


def describe(result: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {amount(size, 'B')}" for name, size in result["bytes"].items())
    group = f", groups of {result['group_size']}" if result["group_size"] else ""
    lines = [
        f"{result['model']}: {amount(result['parameters'])} parameters, {result['format']}{group}",
        f"  shape       {result['layers']} layers, hidden {result['hidden']}, {result['heads']} heads, ffn {result['ffn']}",
        f"  attention   {result['residual']} residual, rotary {result['rotary']}, {result['activation']}",
        f"  vocabulary  {result['vocabulary']} ids ({result['tokens_known'] or 'unknown'} in the tokenizer), "
        f"head {'tied' if result['tied_head'] else 'of its own'}",
        f"  context     {result['context']} tokens, KV cache {amount(result['kv_bytes_per_token'], 'B')} a token at 16 bits",
        f"  sizes       {sizes}",
    ]
    if "files" in result:
        names = result["files"]
        shown = ", ".join(names[:2]) + (f" … {len(names)} files" if len(names) > 2 else "")
        lines.append(
            f"  on disk     {amount(result['stored_bytes'], 'B')} in {shown}, dtype {result['dtype'] or 'as stored'}"
        )
    return "\n".join(lines)
