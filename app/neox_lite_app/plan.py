"""neox-lite plan: what of a model goes where, what that takes, and how fast it will be. Every figure is a prediction."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from neox_lite.config import GPTNeoXConfig
from neox_lite.errors import ArgumentError, FormatError
from neox_lite.folder_writer import MANIFEST, read_manifest
from neox_lite.formats import GroupInt, formats_of
from neox_lite.hub import HEAD, fetch_files, local_folder
from neox_lite.loading import DTYPES
from neox_lite.offload import machine
from neox_lite.offload.place import sizes_in
from neox_lite.offload.plan import (
    CARDS,
    CPU,
    DISK,
    FORMAT_BITS,
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
from neox_lite.saving import parse_bytes

from .family import FAMILY
from .running import amount, bar, default_threads, print_json

WIDTH = 100  # of the picture, at most
BLOCKS, PLAIN = "█▓▒·", "#=-."  # weights, KV cache, the rest, free; plain where stdout's encoding lacks blocks
WHERE = {GPU: "on the GPU", MIXED: "on the GPU and the CPU", CPU: "on the CPU", DISK: "with layers read from the disk"}


def plan(args: argparse.Namespace) -> None:
    torch.set_num_threads(default_threads())
    place = Place.of(args)
    if args.model is None:
        family(args, place)
        return
    model = Model.of(args.model, args)
    found = make_plan(model.sizes, place.machine, place.request(args, args.context or model.sizes.context))
    if found.disk_layers and model.shard is not None:  # its own disk may be another than the one that was measured
        here = replace(place.machine, disk_bytes_per_s=machine.disk_rate(model.shard) or place.machine.disk_bytes_per_s)
        found = make_plan(model.sizes, here, found.request)
    advice = [*found.advice, *smaller_format(model, found)]
    if args.json:
        print_json({"model": args.model, "format": model.format, **place.identity, **figures(found), "advice": advice})
    else:
        print("\n".join(describe(args.model, model, place, found, advice)))


# What is planned, and for what ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model as it would run. format: "int4 g128", "fp16", …; shard: its largest weight file, where it is here."""

    sizes: Sizes
    format: str
    config: GPTNeoXConfig
    shard: Path | None = None

    @classmethod
    def of(cls, name: str, args: argparse.Namespace) -> Model:
        """A folder's or a hub id's; of a hub id only the configuration is fetched."""
        local = local_folder(name, args.revision)
        folder = local or fetch_files(name, ["config.json", MANIFEST], args.revision)
        config = GPTNeoXConfig.from_pretrained(folder)
        shards = sorted(local.glob("*.safetensors"), key=lambda f: f.stat().st_size) if local else []
        shard = shards[-1] if shards else None
        if config.quantization_config is None:
            return cls.quantized(config, args.format or "int4", shard)
        formats = formats_of(config.quantization_config)
        stored = formats("gpt_neox.layers.0.mlp.dense_h_to_4h")
        format = f"{stored.name} g{stored.group_size}" if isinstance(stored, GroupInt) else "fp16"
        if args.format not in (None, format.split()[0]):
            raise ArgumentError(f"{name}: is quantized already ({format}); leave --format out")
        files = read_manifest(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
        dtype = DTYPES[config.dtype or "float16"]
        sizes = sizes_in(config, formats, dtype, dtype, HEAD in files or (folder / HEAD).is_file())
        return cls(sizes, format, config, shard)

    @classmethod
    def quantized(cls, config: GPTNeoXConfig, format: str, shard: Path | None = None) -> Model:
        """What `neox-lite quantize` would make of a plain checkpoint, in the largest groups that fit; or it in fp16."""
        bits = FORMAT_BITS[format]
        if bits is None:
            return cls(sizes_of(config, None), format, config, shard)
        group = largest_group(config) or GROUP_SIZES[0]  # if none fits, sizes_of says so
        return cls(sizes_of(config, bits, group, small_head=True), f"{format} g{group}", config, shard)


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
        card = card_of(args.card) if args.card else None
        asked = {tier: parse_bytes(text) if (text := vars(args)[f"{tier}_memory"]) else None for tier in ("gpu", "cpu")}
        with bar("measure this machine", "step") as progress:
            here = machine.profile(progress)
        if card is not None:
            here = replace(here, card=card)
        if asked["gpu"] is not None and here.card is None:
            raise ArgumentError(f"--gpu-memory: there is no GPU here; plan for one with --card: {', '.join(CARDS)}")
        cpu_bytes, gpu_bytes = asked["cpu"], asked["gpu"]
        if cpu_bytes is None or (gpu_bytes is None and card is None and here.card is not None):
            free_cpu, free_gpu = machine.budgets(here)
            cpu_bytes = free_cpu if cpu_bytes is None else cpu_bytes
            gpu_bytes = free_gpu if gpu_bytes is None and card is None else gpu_bytes
        if card is not None and gpu_bytes is None:
            gpu_bytes = card.bytes - machine.GPU_MARGIN
        return cls(here, cpu_bytes, gpu_bytes, card is not None)

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
    formats = ("fp16", "int8", "int4")
    further = formats[formats.index(model.format.split()[0]) + 1 :] if model.config.quantization_config is None else ()
    for format in further:
        with suppress(FormatError):  # rows that no group divides
            smaller = make_plan(Model.quantized(model.config, format).sizes, found.machine, found.request)
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


def describe(name: str, model: Model, place: Place, found: Plan, advice: list[str]) -> Iterator[str]:
    """A picture of the memories, then speed, choices and advice."""
    verdict = f"runs {WHERE[found.level]}" if found.fits else f"does not fit, {gib(found.short_by)} of CPU memory short"
    made = ", once quantized" if model.config.quantization_config is None and model.format != "fp16" else ""
    yield f"{name}, {model.format}{made}, context {found.context}: {verdict}"
    yield ""
    yield from picture(place, found)
    yield ""
    if found.fits:
        yield from timing(place, found)
    yield f"kept as   {found.kv} KV cache, {found.head} head"
    yield from (f"chosen    {note}" for note in found.notes)
    yield from (f"{'advice' if not i else '':<9} {line}" for i, line in enumerate(advice))


def timing(place: Place, found: Plan) -> Iterator[str]:
    """How fast it will be, and which layers go over the bus when."""
    yield f"speed     {speed(found.decode_tokens_per_s)} decoding, {speed(found.prefill_tokens_per_s)} reading a prompt"
    yield f"          predicted from {source(place)}"
    if found.mixed:
        turn = found.crossover_tokens
        yield "streaming " + (
            f"a pass of {turn} tokens or more brings the CPU's layers to the GPU; a shorter one runs them in place"
            if turn
            else "never: the CPU runs its layers faster than the bus brings them to the GPU"
        )


def source(place: Place) -> str:
    """Where the rates behind a prediction come from."""
    if place.by_card and place.machine.card:
        return f"the specifications of the {place.machine.card.name} and this CPU's measured speed"
    return f"the measured speed of this CPU{' and GPU' if place.gpu_bytes is not None else ''}"


def picture(place: Place, found: Plan) -> Iterator[str]:
    """One bar for each memory: weights, KV cache, everything else, and what stays free of the budget."""
    blocks = BLOCKS if can_print(BLOCKS) else PLAIN
    budgets = {"gpu": place.gpu_bytes, "cpu": place.cpu_bytes, "disk": found.totals["disk"] or None}
    rows = [(tier, budget) for tier, budget in budgets.items() if budget is not None]
    texts = [(*usage(found, tier, budget), held(found, tier)) for tier, budget in rows]
    columns = [max(map(len, column)) for column in zip(*texts, strict=True)]
    width = max(10, min(WIDTH, shutil.get_terminal_size().columns) - sum(columns) - 10)
    for (tier, budget), (used, of, what) in zip(rows, texts, strict=True):
        filled = bar_of(found.parts[tier], budget, width, blocks)
        yield f"{tier.upper():<4}  {filled}  {used:>{columns[0]}}{of:<{columns[1]}}  {what}".rstrip()
    yield f"      {blocks[0]} weights  {blocks[1]} KV cache  {blocks[2]} slots, scratch, driver, process  {blocks[3]} free"


def usage(found: Plan, tier: str, budget: int) -> tuple[str, str]:
    """Used bytes, and of how many."""
    return f"{found.totals[tier] / 2**30:.1f}", " GiB" if tier == "disk" else f" of {budget / 2**30:.1f} GiB"


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


def gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"


def speed(rate: float | None) -> str:
    if rate is None:
        return "unknown (the disk's speed could not be measured)"
    return f"{rate:.{0 if rate >= 100 else 1 if rate >= 10 else 2}f} tokens/s"


# The family -----------------------------------------------------------------------------------------------------------


def family(args: argparse.Namespace, place: Place) -> None:
    """Every known checkpoint on this machine, in int4 and int8."""
    if args.format or args.revision:
        raise ArgumentError(f"--{'format' if args.format else 'revision'} goes with MODEL only")
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
        print("\n".join(table(rows, place)))


def table(rows: list[dict[str, Any]], place: Place) -> Iterator[str]:
    """One line for each checkpoint: where it runs in int4 and in int8, and how fast."""
    titles = ["checkpoint", "context", *(2 * ["size", "runs on", "tokens/s", "prompt"])]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    cells = [
        [a["model"].rpartition("/")[2], str(a["context"]), *(cell for row in (a, b) for cell in row_cells(row))]
        for a, b in pairs
    ]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    left = {0, 3, 7}

    def line(words: Iterable[str]) -> str:
        placed = [f"{w:<{n}}" if i in left else f"{w:>{n}}" for i, (w, n) in enumerate(zip(words, widths, strict=True))]
        return "  ".join(placed).rstrip()

    half = widths[0] + widths[1] + 4
    yield f"{'':<{half}}{'int4':<{sum(widths[2:6]) + 8}}int8"
    yield line(titles)
    yield from map(line, cells)
    memory = [
        f"{gib(count)} of {name}"
        for name, count in (("GPU", place.gpu_bytes), ("CPU memory", place.cpu_bytes))
        if count
    ]
    yield ""
    yield f"within {' and '.join(memory)}; tokens/s decoding, and reading a prompt, predicted from {source(place)}"
    yield "+ with an int8 KV cache, or int8 head, or both, because that is what makes it fit"


def row_cells(row: dict[str, Any]) -> list[str]:
    """Size, place and speed of one planned checkpoint."""
    layers = row["layers"]
    on = " + ".join(f"{tier.upper()} {layers[tier]}" for tier in TIERS if layers[tier])
    on = (on if " + " in on else on.split()[0]) + (" +" if row["notes"] else "") if row["fits"] else "no"
    rates = [row["decode_tokens_per_s"], row["prefill_tokens_per_s"]]
    shown = [
        "-" if rate is None or not row["fits"] else f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}" for rate in rates
    ]
    return [amount(row["bytes"], "B"), on, *shown]
