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
from neox_lite.offload.placement import sizes_in
from neox_lite.offload.plan import (
    CARDS,
    CPU,
    DISK,
    GAINS,
    GPU,
    GROUP_SIZES,
    MIXED,
    TIERS,
    Card,
    Machine,
    Plan,
    Request,
    Sizes,
    largest_group,
    sizes_of,
)
from neox_lite.offload.plan import plan as make_plan
from neox_lite.units import DTYPES, dtype_name, format_bytes

from ..load_for_command import default_threads, measure_machine, memory_limit
from ..terminal import amount, fold, print_json, terminal_width
from .family import FAMILY

WEIGHT_FILES = (".safetensors", ".bin", ".index.json")
WIDTH = 100  # of the picture, at most
LEAST_BAR = 10  # columns; a narrower bar gets a line of its own
HANG = 10  # columns that stand before every text
BLOCKS, PLAIN = "█▓▒·", "#=-."  # weights, KV cache, the rest, free; plain where stdout's encoding lacks blocks
SMALLER_FORMATS: dict[str, tuple[str, ...]] = {"int4": (), **dict.fromkeys(("int8", "nf4", "nf4-double"), ("int4",))}
WHERE = {GPU: "on the GPU", MIXED: "on the GPU and the CPU", CPU: "on the CPU", DISK: "with layers read from the disk"}


def plan(args: argparse.Namespace) -> None:
    torch.set_num_threads(default_threads())
    place = Place.of(args)
    if args.model is None:
        family(args, place)
        return
    model = Model.of(args.model, args)
    request = replace(place.request(args, args.context or model.sizes.context), disk=model.disk)
    found = make_plan(model.sizes, place.machine, request)
    if found.disk_layers and model.shard is not None:  # its own disk may be another than the one that was measured
        here = replace(place.machine, disk_bytes_per_s=profile.disk_rate(model.shard) or place.machine.disk_bytes_per_s)
        found = make_plan(model.sizes, here, found.request)
    advice = [*found.advice, *smaller_format(model, found)]
    if args.json:
        print_json({"model": args.model, **model.identity, **place.identity, **figures(found), "advice": advice})
    else:
        print("\n".join(describe(args.model, model, place, found, advice, terminal_width())))


# What is planned, and for what ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model as it would run. format: "int4 g128", "fp16", "float32", …; dtype: of what is not quantized.

    made: quantized, as its checkpoint is not yet. has_weights: None for a hub id, of which only the configuration is fetched.
    shard: its largest weight file, where it is here. disk: whether layers can stay in the files, which hold them as they run.
    """

    sizes: Sizes
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
        if config.quantization_config is None:
            found = (
                cls.plain(config, dtype)
                if args.format == "fp16"
                else cls.quantized(config, args.format or "int4", dtype)
            )
        else:
            files = read_manifest(folder / MANIFEST)["files"] if (folder / MANIFEST).is_file() else {}
            formats, small_head = formats_of(config.quantization_config), HEAD in files or (folder / HEAD).is_file()
            format = label(formats("gpt_neox.layers.0.mlp.dense_h_to_4h"), name_of(dtype))
            if args.format not in (None, format.split()[0]):
                raise ArgumentError(f"{name}: is quantized already ({format}); leave --format out")
            found = cls(sizes_in(config, formats, dtype, stored.scales, small_head), format, dtype, config)
        has_weights = None if local is None else stored.shard is not None
        return replace(found, has_weights=has_weights, shard=stored.shard, disk=found.made or stored.as_they_run)

    @classmethod
    def plain(cls, config: GPTNeoXConfig, dtype: torch.dtype) -> Model:
        """A plain checkpoint as it is."""
        return cls(sizes_of(config, None, itemsize=dtype.itemsize), name_of(dtype), dtype, config)

    @classmethod
    def quantized(cls, config: GPTNeoXConfig, format: str, dtype: torch.dtype = torch.float16) -> Model:
        """What `neox-lite quantize` would make of a plain checkpoint in the largest groups that fit: the rest has 16 bits."""
        group = largest_group(config) or GROUP_SIZES[0]  # if none fits, sizes_in says so
        target = make_format(format, group if format in GROUPED else None)
        kept = dtype if dtype.itemsize == 2 else torch.float16
        sizes = sizes_in(config, lambda name: target, kept, kept, small_head=True)
        return cls(sizes, label(target, format), kept, config, made=True)

    @property
    def identity(self) -> dict[str, Any]:
        return {"format": self.format, "dtype": dtype_name(self.dtype), "has_weights": self.has_weights}


@dataclass(frozen=True)
class Stored:
    """What weight files tell: dtypes of plain tensors and of scales, as from_pretrained keeps them, and the largest file.

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
class Place:
    """The machine that is planned for and the most that may be taken of it; by_card: its GPU is known by specification."""

    machine: Machine
    cpu_bytes: int
    gpu_bytes: int | None
    by_card: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> Place:
        """This machine, measured if it was not before, with what is free now; or with the card that is asked for."""
        card = card_of(args.card) if args.card is not None else None
        gpu_bytes, cpu_bytes = memory_limit(args, "gpu"), memory_limit(args, "cpu")
        here = profile.profile(measure=False) or measure_machine()
        if card is not None:
            here = replace(here, card=card)
        if gpu_bytes == 0 and here.card is None:  # nothing of a GPU can be had anywhere
            gpu_bytes = None
        if gpu_bytes is not None and here.card is None:
            raise ArgumentError(f"--gpu-memory: there is no GPU here; plan for one with --card: {', '.join(CARDS)}")
        if card is not None and gpu_bytes is None:
            gpu_bytes = card.bytes - profile.GPU_MARGIN
        return cls(here, *profile.budgets(here, cpu_bytes, gpu_bytes), card is not None)

    def request(self, args: argparse.Namespace, context: int) -> Request:
        return Request(context, self.cpu_bytes, self.gpu_bytes, kv=args.kv, head=args.head)

    @property
    def identity(self) -> dict[str, Any]:
        card = self.machine.card
        return {
            "gpu": card.name if card and self.gpu_bytes is not None else None,
            "gpu_by_specification": self.by_card,
            "budgets": {"gpu": self.gpu_bytes, "cpu": self.cpu_bytes},
        }


def card_of(name: str) -> Card:
    """A card by its name, as people write it."""
    plain = {"".join(known.lower().split()): card for known, card in CARDS.items()}
    found = plain.get("".join(name.lower().split()))
    if found is None:
        raise ArgumentError(f"--card is {name!r}, expected one of {', '.join(CARDS)}")
    return found


def smaller_format(model: Model, found: Plan) -> Iterator[str]:
    """The advice to quantize further, where that helps."""
    if model.config.quantization_config is not None:
        return
    for format in SMALLER_FORMATS.get(model.format.split()[0], ("int8", "int4")):
        with suppress(FormatError):  # rows that no group divides
            request = replace(found.request, disk=True)
            smaller = make_plan(Model.quantized(model.config, format).sizes, found.machine, request)
            if smaller.level > found.level:
                yield f"--format {format} would {GAINS[smaller.level]}"
                return


# Figures --------------------------------------------------------------------------------------------------------------


def figures(found: Plan) -> dict[str, Any]:
    """A plan as one JSON object; bytes, and tokens a second."""
    return {
        "predicted": True,
        "fits": found.fits,
        "tiers": found.totals,
        "layers": {tier: found.layers.count(tier) for tier in TIERS},
        "embedding_on": found.embedding_on,
        "head_on": found.head_on,
        "kv": found.kv,
        "head": found.head,
        "context": found.context,
        "pages": found.pages,
        "decode_tokens_per_s": found.decode_tokens_per_s,
        "prefill_tokens_per_s": found.prefill_tokens_per_s,
        "crossover_tokens": found.crossover_tokens,
        "short_by": found.short_by,
        "parts": found.parts,
        "notes": list(found.notes),
        "advice": list(found.advice),
    }


def describe(name: str, model: Model, place: Place, found: Plan, advice: list[str], width: int | None) -> Iterator[str]:
    """A picture of the memories, then speed, choices and advice, in lines of at most `width`."""
    verdict = (
        f"runs {WHERE[found.level]}"
        if found.fits
        else f"does not fit, {format_bytes(found.short_by)} of CPU memory short"
    )
    made = ", once quantized" if model.made else ""
    yield from fold(f"{name}, {model.format}{made}, context {found.context}: {verdict}", width, HANG)
    yield ""
    yield from picture(place, found, width)
    yield ""
    texts = list(timing(place, found)) if found.fits else []
    kv, head = (name_of(model.dtype) if kind == "fp16" else kind for kind in (found.kv, found.head))
    texts.append(("kept as", f"{kv} KV cache, {head} head"))
    texts += [("chosen", note) for note in found.notes]
    if model.has_weights is False:
        texts.append(("missing", f"{name} has no weights; all this follows from its config.json"))
    if not (found.fits or model.disk):
        texts.append(("disk", "layers cannot stay there: the files do not hold them as they run"))
    texts += [("" if i else "advice", line) for i, line in enumerate(advice)]
    for title, text in texts:
        yield from fold(f"{title:<{HANG}}{text}", width, HANG)


def timing(place: Place, found: Plan) -> Iterator[tuple[str, str]]:
    """How fast it will be, and which layers go over the bus when: (title, text)."""
    decode, prompt = speed(found.decode_tokens_per_s), speed(found.prefill_tokens_per_s)
    yield "speed", f"{decode} decoding, {prompt} reading a prompt"
    yield "", f"predicted from {source(place)}"
    if found.mixed:
        turn = found.crossover_tokens
        yield (
            "streaming",
            f"a pass of {turn} tokens or more brings the CPU's layers to the GPU; a shorter one runs them in place"
            if turn
            else "never: the CPU runs its layers faster than the bus brings them to the GPU",
        )


def source(place: Place) -> str:
    """Where the rates behind a prediction come from, and how to renew them."""
    anew = "(neox-lite doctor --measure measures anew)"
    if place.by_card and place.machine.card:
        return f"the specifications of the {place.machine.card.name} and this CPU's measured speed {anew}"
    return f"the measured speed of this CPU{' and GPU' if place.gpu_bytes is not None else ''} {anew}"


def picture(place: Place, found: Plan, width: int | None) -> Iterator[str]:
    """One bar for each memory: weights, KV cache, everything else, and what stays free of the budget.

    Bars that would get too narrow beside their texts stand above them.
    """
    blocks = BLOCKS if can_print(BLOCKS) else PLAIN
    budgets = {"gpu": place.gpu_bytes, "cpu": place.cpu_bytes, "disk": found.totals["disk"] or None}
    rows = [(tier, budget) for tier, budget in budgets.items() if budget is not None]
    texts = [(*usage(found, tier, budget), held(found, tier)) for tier, budget in rows]
    columns = [max(map(len, column)) for column in zip(*texts, strict=True)]
    most = min(WIDTH, width or WIDTH)
    room = most - sum(columns) - 10
    beside = room >= LEAST_BAR
    for (tier, budget), (used, of, what) in zip(rows, texts, strict=True):
        filled = bar_of(found.parts[tier], budget, room if beside else max(1, most - 6), blocks)
        if beside:
            yield f"{tier.upper():<4}  {filled}  {used:>{columns[0]}}{of:<{columns[1]}}  {what}".rstrip()
        else:
            yield f"{tier.upper():<4}  {filled}"
            yield from fold(f"      {used}{of}{', ' if what else ''}{what}", width, 6)
    kinds = ("weights", "KV cache", "slots, scratch, driver, process", "free")
    legend = [f"{block} {kind}" for block, kind in zip(blocks, kinds, strict=True)]
    line = f"      {'  '.join(legend)}"
    yield from [line] if len(line) <= most else [part for entry in legend for part in fold(f"      {entry}", width, 8)]


def usage(found: Plan, tier: str, budget: int) -> tuple[str, str]:
    """Used bytes, and of how many."""
    used = format_bytes(found.totals[tier]) if found.totals[tier] else "0"
    return used, "" if tier == "disk" else f" of {format_bytes(budget)}"


def held(found: Plan, tier: str) -> str:
    """What of the model is on a tier, in words."""
    count = found.layers.count(tier)
    things = [f"{count} layer{'s' if count > 1 else ''}"] if count else []
    things += ["head"] if found.head_on == tier else []
    things += ["embedding"] if found.embedding_on == tier else []
    return ", ".join(things)


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


def speed(rate: float | None) -> str:
    if rate is None:
        return "unknown (the disk's speed could not be measured)"
    return f"{rate:.{0 if rate >= 100 else 1 if rate >= 10 else 2}f} tokens/s"


# The family -----------------------------------------------------------------------------------------------------------


def family(args: argparse.Namespace, place: Place) -> None:
    """Every known checkpoint on this machine, in int4 and int8."""
    for option in ("format", "revision"):
        if getattr(args, option) is not None:
            raise ArgumentError(f"--{option} goes with MODEL only")
    rows = []
    for member in FAMILY:
        for format in ("int4", "int8"):
            model = Model.quantized(member.config(), format)
            context = min(args.context or model.sizes.context, model.sizes.context)
            found = make_plan(model.sizes, place.machine, place.request(args, context))
            rows.append({"model": member.id, "format": model.format, "bytes": model.sizes.total, **figures(found)})
    if args.json:
        print_json({**place.identity, "rows": rows})
    else:
        print("\n".join(table(rows, place, terminal_width())))


def table(rows: list[dict[str, Any]], place: Place, width: int | None) -> Iterator[str]:
    """Every checkpoint in int4 and in int8: where it runs and how fast; side by side, or as `width` allows."""
    cells = [row_cells(row) for row in rows]
    layouts = (side_by_side(cells), stacked(cells, COLUMNS), stacked(cells, FEWER))
    fitting = (lines for lines in layouts if width is None or max(map(len, lines)) <= width)
    yield from next(fitting, None) or listed(cells, width or WIDTH)
    budgets = (("GPU", place.gpu_bytes), ("CPU memory", place.cpu_bytes))
    memory = " and ".join(f"{format_bytes(count)} of {name}" for name, count in budgets if count is not None)
    yield ""
    said = f"within {memory}; tokens/s decoding, and reading a prompt, predicted from {source(place)}"
    yield from fold(said, width)
    if any(cell["runs on"].endswith(" +") for cell in cells):
        yield from fold("+ with an int8 KV cache, or int8 head, or both, because that is what makes it fit", width)


FIGURES = ("size", "runs on", "tokens/s", "prompt")
COLUMNS = ("checkpoint", "context", "format", *FIGURES)
FEWER = ("checkpoint", "format", "size", "runs on", "tokens/s")


def side_by_side(cells: list[dict[str, str]]) -> list[str]:
    """One line for each checkpoint, int4 beside int8."""
    rows = [
        [a["checkpoint"], a["context"], *(row[title] for row in (a, b) for title in FIGURES)]
        for a, b in zip(cells[::2], cells[1::2], strict=True)
    ]
    lines = aligned(["checkpoint", "context", *FIGURES, *FIGURES], rows)
    # The columns at which "context" and "prompt" end.
    first, second = (lines[0].index(title) + len(title) + 2 for title in ("context", "prompt"))
    return [f"{'':<{first}}{'int4':<{second - first}}int8", *lines]


def stacked(cells: list[dict[str, str]], titles: Sequence[str]) -> list[str]:
    """Two lines for each checkpoint, int8 below int4."""
    again = {"checkpoint": "", "context": ""}
    every = ({**cell, **again} if i % 2 else cell for i, cell in enumerate(cells))
    return aligned(titles, [[cell[title] for title in titles] for cell in every])


def listed(cells: list[dict[str, str]], width: int) -> Iterator[str]:
    """A paragraph for each checkpoint."""
    for i, cell in enumerate(cells):
        if i % 2 == 0:
            yield cell["checkpoint"]
        on = "does not fit" if cell["runs on"] == "no" else f"{cell['runs on']}, {cell['tokens/s']} tokens/s"
        yield from fold(f"  {cell['format']}  {cell['size']}, {on}", width, 8)


def aligned(titles: Sequence[str], rows: list[list[str]]) -> list[str]:
    """Titles and rows in columns, words to the left and figures to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    sides = ["<" if title in ("checkpoint", "format", "runs on") else ">" for title in titles]
    placed = (zip(row, sides, widths, strict=True) for row in (titles, *rows))
    return ["  ".join(f"{word:{side}{width}}" for word, side, width in row).rstrip() for row in placed]


def row_cells(row: dict[str, Any]) -> dict[str, str]:
    """What the table says of one planned checkpoint."""
    layers = row["layers"]
    on = " + ".join(f"{tier.upper()} {layers[tier]}" for tier in TIERS if layers[tier])
    on = (on if " + " in on else on.split()[0]) + (" +" if row["notes"] else "") if row["fits"] else "no"
    rates = [row["decode_tokens_per_s"], row["prefill_tokens_per_s"]]
    shown = [
        "-" if rate is None or not row["fits"] else f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}" for rate in rates
    ]
    told = (
        row["model"].rpartition("/")[2],
        str(row["context"]),
        row["format"].split()[0],
        amount(row["bytes"], "B"),
        on,
    )
    return dict(zip(COLUMNS, (*told, *shown), strict=True))
