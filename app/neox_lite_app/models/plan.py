"""neox-lite plan: what of a model goes where, what that takes, and how fast it will be. Every figure is a prediction."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from neox_lite.checkpoint.manifest import read_manifest
from neox_lite.checkpoint.reader import Checkpoint
from neox_lite.config import GPTNeoXConfig
from neox_lite.errors import ArgumentError, FormatError
from neox_lite.formats import GROUPED, formats_of, label, make_format
from neox_lite.hub import HEAD, MANIFEST, fetch_files, local_folder
from neox_lite.offload import profile
from neox_lite.offload.advice import GAINS, advice, notes
from neox_lite.offload.plan import (
    CPU,
    DISK,
    GPU,
    MIXED,
    TIERS,
    Budgets,
    Card,
    HardwareProfile,
    ModelSizes,
    PlacementRequest,
    Plan,
    Rates,
    largest_group,
    make_plan,
    sizes_of,
)
from neox_lite.units import DTYPES, dtype_name, format_bytes

from ..load_for_command import default_threads, measure_hardware, memory_limit
from ..terminal import amount, fold, print_json, terminal_width
from .family import FAMILY

# Specifications, not measurements: GiB, GB/s of memory, dense fp16 TFLOP/s with float32 sums (NVIDIA's papers on GA102 and
# AD102, or by cores and clock in the same proportion), GB/s of PCIe 4.0 x16 (x8 on the 4060 Ti). 92 % of the bandwidth and
# 60 % of the operations are assumed to be reached.
DATA_SHEETS = {
    "RTX 3060": (12, 360, 25.5, 25),
    "RTX 3090": (24, 936, 71, 25),
    "RTX 4060 Ti": (16, 288, 44.1, 13),
    "RTX 4090": (24, 1008, 165.2, 25),
}
CARDS = {
    name: Card(name, gib << 30, Rates(0.92e9 * read, 0.6e12 * tensor), 1e9 * bus, 512 << 20)
    for name, (gib, read, tensor, bus) in DATA_SHEETS.items()
}
WEIGHT_FILES = (".safetensors", ".bin", ".index.json")
WIDTH = 100  # of a bar and its name, at most
HANG = 10  # columns that stand before every text
BLOCKS, PLAIN = "█▓▒·", "#=-."  # weights, KV cache, the rest, free; plain where stdout's encoding lacks blocks
LEGEND = ("weights", "KV cache", "buffers, scratch, driver, process", "free")
SMALLER_FORMATS: dict[str, tuple[str, ...]] = {"int4": (), **dict.fromkeys(("int8", "nf4", "nf4-double"), ("int4",))}
WHERE = {GPU: "on the GPU", MIXED: "on the GPU and the CPU", CPU: "on the CPU", DISK: "with layers read from the disk"}
COLUMNS = ("checkpoint", "context", "format", "size", "runs on", "tokens/s", "prompt")  # of the family's table
NARROW = ("checkpoint", "format", "size", "runs on", "tokens/s")


def plan(args: argparse.Namespace) -> None:
    torch.set_num_threads(default_threads())
    target = Target.of(args)
    if args.model is None:
        family(args, target)
        return
    model = Model.of(args.model, args)
    budgets = replace(target.budgets, disk=model.disk)
    found = make_plan(model.sizes, target.hardware, request_of(args), budgets)
    if found.disk_layers and model.shard is not None:  # its own disk may be another than the one that was measured
        rate = profile.disk_rate(model.shard) or target.hardware.disk_bytes_per_s
        found = make_plan(model.sizes, replace(target.hardware, disk_bytes_per_s=rate), found.request, budgets)
    advices = [*advice(found), *smaller_format(model, found)]
    if args.json:
        print_json({"model": args.model, **model.identity, **target.identity, **figures(found, advices)})
    else:
        print("\n".join(describe(args.model, model, target, found, advices, terminal_width())))


def request_of(args: argparse.Namespace, context: int | None = None) -> PlacementRequest:
    return PlacementRequest(context=args.context if context is None else context, kv=args.kv, head=args.head)


@dataclass(frozen=True)
class Model:
    """A model as it would run. format: "int4 g128", "fp16", "float32", …; dtype: of what is not quantized.

    made: quantized, as its checkpoint is not yet. has_weights: None for a hub id, of which only the configuration is fetched.
    shard: its largest weight file, where it is here. disk: whether layers can stay in the files, which hold them as they run.
    """

    sizes: ModelSizes
    format: str
    dtype: torch.dtype
    config: GPTNeoXConfig
    made: bool = False
    has_weights: bool | None = None
    shard: Path | None = None
    disk: bool = True

    @classmethod
    def of(cls, name: str, args: argparse.Namespace) -> Model:
        """A folder's or a hub id's; of a hub id only the configuration is fetched."""
        local = local_folder(name, args.revision)
        folder = local or fetch_files(name, ["config.json", MANIFEST], args.revision)
        config = GPTNeoXConfig.from_pretrained(folder)
        stored = Stored.of(local, config)
        dtype = stored.dtype
        if config.quantization_config is not None:
            files = read_manifest(folder / MANIFEST)["files"] if (folder / MANIFEST).is_file() else {}
            formats, small_head = formats_of(config.quantization_config), HEAD in files or (folder / HEAD).is_file()
            format = label(formats("gpt_neox.layers.0.mlp.dense_h_to_4h"), name_of(dtype))
            if args.format not in (None, format.split()[0]):
                raise ArgumentError(f"{name}: is quantized already ({format}); leave --format out")
            found = cls(sizes_of(config, formats, dtype, stored.scales, small_head), format, dtype, config)
        elif args.format == "fp16":
            found = cls(sizes_of(config, dtype=dtype), name_of(dtype), dtype, config)
        else:
            found = cls.quantized(config, args.format or "int4", dtype)
        has_weights = None if local is None else stored.shard is not None
        return replace(found, has_weights=has_weights, shard=stored.shard, disk=found.made or stored.as_they_run)

    @classmethod
    def quantized(cls, config: GPTNeoXConfig, format: str, dtype: torch.dtype = torch.float16) -> Model:
        """What `neox-lite quantize` would make of a plain checkpoint in the largest groups that fit: the rest has 16 bits."""
        group = largest_group(config.hidden_size, config.intermediate_size) if format in GROUPED else None
        target = make_format(format, group)
        plain = dtype if dtype.itemsize == 2 else torch.float16
        return cls(sizes_of(config, target, plain, small_head=True), label(target, format), plain, config, made=True)

    @property
    def identity(self) -> dict[str, Any]:
        return {"format": self.format, "dtype": dtype_name(self.dtype), "has_weights": self.has_weights}


@dataclass(frozen=True)
class Stored:
    """What weight files hold: dtypes of plain tensors and of scales, as from_pretrained keeps them, and the largest file.

    as_they_run: layers are mapped from there, neither unpickled nor converted.
    """

    dtype: torch.dtype
    scales: torch.dtype
    shard: Path | None = None
    as_they_run: bool = True

    @classmethod
    def of(cls, folder: Path | None, config: GPTNeoXConfig) -> Stored:
        """Without a weight file, as of a hub id, the dtype is the configuration's, or float16."""
        named = DTYPES.get(config.dtype or "")
        if folder is None or not any(file.name.endswith(WEIGHT_FILES) for file in folder.iterdir()):
            return cls(named or torch.float16, named or torch.float16)
        with Checkpoint.open(folder) as checkpoint:

            def dtype_of(suffix: str) -> torch.dtype | None:
                return next((checkpoint.info(n).dtype for n in checkpoint.names() if n.endswith(suffix)), None)

            dtype = named or dtype_of("embed_in.weight") or torch.float32
            shard = max(checkpoint.files, key=lambda file: file.stat().st_size)
            as_they_run = shard.suffix == ".safetensors" and dtype_of("mlp.dense_h_to_4h.weight") in (None, dtype)
            return cls(dtype, dtype_of(".weight_scale") or dtype, shard, as_they_run)


def name_of(dtype: torch.dtype) -> str:
    """As users write it: fp16, bfloat16, float32."""
    return "fp16" if dtype == torch.float16 else dtype_name(dtype)


@dataclass(frozen=True)
class Target:
    """The machine that is planned for and the most that may be taken of it; by_card: its GPU is known by specification."""

    hardware: HardwareProfile
    budgets: Budgets
    by_card: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> Target:
        """This machine, measured if it was not before, with what is free now; or with the card that is asked for."""
        cards = {"".join(name.lower().split()): card for name, card in CARDS.items()}
        card = None if args.card is None else cards.get("".join(args.card.lower().split()))
        if args.card is not None and card is None:
            raise ArgumentError(f"--card is {args.card!r}, expected one of {', '.join(CARDS)}")
        gpu_bytes, cpu_bytes = memory_limit(args, "gpu"), memory_limit(args, "cpu")
        here = profile.load() or measure_hardware()
        here = replace(here, card=card or here.card)
        if gpu_bytes == 0 and here.card is None:  # nothing of a GPU can be had anywhere
            gpu_bytes = None
        if gpu_bytes is not None and here.card is None:
            raise ArgumentError(f"--gpu-memory: there is no GPU here; plan for one with --card: {', '.join(CARDS)}")
        if card is not None and gpu_bytes is None:
            gpu_bytes = card.bytes - profile.GPU_MARGIN
        return cls(here, profile.budgets(here, cpu_bytes, gpu_bytes), card is not None)

    @property
    def identity(self) -> dict[str, Any]:
        card, budgets = self.hardware.card, self.budgets
        return {
            "gpu": card.name if card and budgets.gpu is not None else None,
            "gpu_by_specification": self.by_card,
            "budgets": {"gpu": budgets.gpu, "cpu": budgets.cpu},
        }

    @property
    def source(self) -> str:
        """Where the rates behind a prediction come from, and how to renew them."""
        anew = "(neox-lite doctor --measure measures anew)"
        if self.by_card and self.hardware.card:
            return f"the specifications of the {self.hardware.card.name} and this CPU's measured speed {anew}"
        return f"the measured speed of this CPU{' and GPU' if self.budgets.gpu is not None else ''} {anew}"


def smaller_format(model: Model, found: Plan) -> Iterator[str]:
    """The advice to quantize further, where that helps."""
    if model.config.quantization_config is not None:
        return
    for format in SMALLER_FORMATS.get(model.format.split()[0], ("int8", "int4")):
        with suppress(FormatError):  # rows that no group divides
            sizes = Model.quantized(model.config, format).sizes
            smaller = make_plan(sizes, found.hardware, found.request, replace(found.budgets, disk=True))
            if smaller.level > found.level:
                yield f"--format {format} would {GAINS[smaller.level]}"
                return


# Keys that scripts read keep their first names.
JSON_KEYS = {"layer_buffers": "ring"}


def figures(found: Plan, advices: list[str]) -> dict[str, Any]:
    """A plan as one JSON object; bytes, and tokens a second."""
    names = ("embedding_on", "head_on", "kv", "head", "context", "pages", "decode_tokens_per_s", "prefill_tokens_per_s")
    return {
        "predicted": True,
        "fits": found.fits,
        "tiers": found.totals,
        "layers": {tier: found.layers.count(tier) for tier in TIERS},
        **{name: getattr(found, name) for name in (*names, "crossover_tokens", "short_by")},
        "parts": {
            tier: {JSON_KEYS.get(kind, kind): n for kind, n in kinds.items()} for tier, kinds in found.parts.items()
        },
        "notes": notes(found),
        "advice": advices,
    }


def describe(
    name: str, model: Model, target: Target, found: Plan, advices: list[str], width: int | None
) -> Iterator[str]:
    """A picture of the memories, then speed, choices and advice, in lines of at most `width`."""
    verdict = (
        f"runs {WHERE[found.level]}"
        if found.fits
        else f"does not fit, {format_bytes(found.short_by)} of CPU memory short"
    )
    made = ", once quantized" if model.made else ""
    yield from fold(f"{name}, {model.format}{made}, context {found.context}: {verdict}", width, HANG)
    yield ""
    yield from picture(target.budgets, found, width)
    yield ""
    texts = []
    if found.fits:
        decode, prompt = speed_text(found.decode_tokens_per_s), speed_text(found.prefill_tokens_per_s)
        texts += [("speed", f"{decode} decoding, {prompt} reading a prompt"), ("", f"predicted from {target.source}")]
    if found.fits and found.mixed:
        how = (
            f"a pass of {found.crossover_tokens} tokens or more brings the CPU's layers to the GPU; a shorter one runs "
        )
        never = "never: the CPU runs its layers faster than the bus brings them to the GPU"
        texts.append(("streaming", f"{how}them in place" if found.crossover_tokens else never))
    kv, head = (name_of(model.dtype) if kind == "fp16" else kind for kind in (found.kv, found.head))
    texts.append(("kept as", f"{kv} KV cache, {head} head"))
    texts += [("chosen", note) for note in notes(found)]
    if model.has_weights is False:
        texts.append(("missing", f"{name} has no weights; all this follows from its config.json"))
    if not (found.fits or model.disk):
        texts.append(("disk", "layers cannot stay there: the files do not hold them as they run"))
    texts += [("" if i else "advice", line) for i, line in enumerate(advices)]
    for title, text in texts:
        yield from fold(f"{title:<{HANG}}{text}", width, HANG)


def picture(budgets: Budgets, found: Plan, width: int | None) -> Iterator[str]:
    """One bar for each memory: weights, KV cache, everything else, and what stays free; below it, what is there."""
    blocks = BLOCKS if can_print(BLOCKS) else PLAIN
    limits = {"gpu": budgets.gpu, "cpu": budgets.cpu, "disk": found.totals["disk"] or None}
    for tier, budget in limits.items():
        if budget is None:
            continue
        count, of = found.layers.count(tier), "" if tier == "disk" else f" of {format_bytes(budget)}"
        held = [f"{count} layer{'s' if count > 1 else ''}"] if count else []
        held += [part for part in ("head", "embedding") if getattr(found, f"{part}_on") == tier]
        yield f"{tier.upper():<6}{bar_of(found.parts[tier], budget, max(1, min(WIDTH, width or WIDTH) - 6), blocks)}"
        yield from fold(
            f"      {', '.join([f'{format_bytes(found.totals[tier]) if held else 0}{of}', *held])}", width, 6
        )
    yield from fold("      " + "  ".join(map(" ".join, zip(blocks, LEGEND, strict=True))), width, 6)


def bar_of(parts: dict[str, int], budget: int, width: int, blocks: str) -> str:
    """A bar of `width` characters for a whole budget; it is full where parts exceed that."""
    known = [parts.get("weights", 0), parts.get("cache", 0)]
    sums, total, out = [*known, sum(parts.values()) - sum(known)], 0, ""
    for count, block in zip(sums, blocks, strict=False):
        total += count
        out += block * (min(width, round(total / budget * width)) - len(out)) if budget else ""
    return out + blocks[3] * (width - len(out))


def can_print(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def speed_text(rate: float | None) -> str:
    if rate is None:
        return "unknown (the disk's speed could not be measured)"
    return f"{rate:.{0 if rate >= 100 else 1 if rate >= 10 else 2}f} tokens/s"


def family(args: argparse.Namespace, target: Target) -> None:
    """Every known checkpoint on this machine, in int4 and int8."""
    for option in ("format", "revision"):
        if getattr(args, option) is not None:
            raise ArgumentError(f"--{option} goes with MODEL only")
    rows = []
    for member in FAMILY:
        for format in ("int4", "int8"):
            model = Model.quantized(member.config(), format)
            context = min(args.context or model.sizes.context, model.sizes.context)
            found = make_plan(model.sizes, target.hardware, request_of(args, context), target.budgets)
            about = {"model": member.id, "format": model.format, "bytes": model.sizes.total}
            rows.append({**about, **figures(found, advice(found))})
    if args.json:
        print_json({**target.identity, "rows": rows})
    else:
        print("\n".join(table(rows, target, terminal_width())))


def table(rows: list[dict[str, Any]], target: Target, width: int | None) -> Iterator[str]:
    """Two lines for each checkpoint, int4 and int8: where it runs and how fast; paragraphs where those are too wide."""
    cells = [row_cells(row) for row in rows]
    layouts = [aligned(titles, cells) for titles in (COLUMNS, NARROW)]
    fitting = [lines for lines in layouts if width is None or max(map(len, lines)) <= width]
    yield from fitting[0] if fitting else ()
    for i, cell in enumerate(() if fitting else cells):
        yield from () if i % 2 else (cell["checkpoint"],)
        on = "does not fit" if cell["runs on"] == "no" else f"{cell['runs on']}, {cell['tokens/s']} tokens/s"
        yield from fold(f"  {cell['format']}  {cell['size']}, {on}", width, 8)
    budgets = (("GPU", target.budgets.gpu), ("CPU memory", target.budgets.cpu))
    memory = " and ".join(f"{format_bytes(count)} of {name}" for name, count in budgets if count is not None)
    yield ""
    what = f"within {memory}; tokens/s decoding, and reading a prompt, predicted from {target.source}"
    yield from fold(what, width)
    if any(cell["runs on"].endswith(" +") for cell in cells):
        yield from fold("+ with an int8 KV cache, or int8 head, or both, because that is what makes it fit", width)


def aligned(titles: Sequence[str], cells: list[dict[str, str]]) -> list[str]:
    """Titles and rows in columns, words to the left and figures to the right; what int8 repeats of int4 is left out."""
    shown = [{**cell, "checkpoint": "", "context": ""} if i % 2 else cell for i, cell in enumerate(cells)]
    rows = [list(titles), *([cell[title] for title in titles] for cell in shown)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if title in ("checkpoint", "format", "runs on") else ">" for title in titles]
    return ["  ".join(f"{v:{s}{w}}" for v, s, w in zip(row, sides, widths, strict=True)).rstrip() for row in rows]


def row_cells(row: dict[str, Any]) -> dict[str, str]:
    """The table's columns for one planned checkpoint."""
    layers = row["layers"]
    on = " + ".join(f"{tier.upper()} {layers[tier]}" for tier in TIERS if layers[tier])
    on = (on if " + " in on else on.split()[0]) + (" +" if row["notes"] else "") if row["fits"] else "no"
    rates = [
        "-" if rate is None or not row["fits"] else f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"
        for rate in (row["decode_tokens_per_s"], row["prefill_tokens_per_s"])
    ]
    name, format = row["model"].rpartition("/")[2], row["format"].split()[0]
    values = name, str(row["context"]), format, amount(row["bytes"], "B"), on, *rates
    return dict(zip(COLUMNS, values, strict=True))
