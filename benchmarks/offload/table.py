"""The table "GPT-NeoX-20B on cards and memories that people have": what goes where and how fast it will be, as Markdown.

    python -m benchmarks.offload.table [--out FILE]

Every figure is a prediction: cards by their specifications, the CPU and the disk as this machine's were measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from benchmarks.common import command_line
from neox_lite.formats import make_format
from neox_lite.offload import profile
from neox_lite.offload.plan import Budgets, HardwareProfile, PlacementRequest, Plan, make_plan, sizes_of
from neox_lite_app.load_for_command import default_threads
from neox_lite_app.models.family import FAMILY
from neox_lite_app.models.plan import CARDS

GPU_GIB, CPU_GIB = (8, 12, 16, 24), (16, 32)
SYSTEM_BYTES = 2 << 30
CONTEXT = 2048


def main() -> None:
    args = command_line(__doc__).parse_args()
    torch.set_num_threads(default_threads())
    here = profile.load() or profile.measure()
    text = "\n".join((*rows(here), "", *notes(here))) + "\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def rows(here: HardwareProfile) -> Iterator[str]:
    """One row for each pair of memories: what goes where, then the figures of each card."""
    sizes = sizes_of(next(m for m in FAMILY if m.name == "gpt-neox-20b").config(), make_format("int4"), small_head=True)
    titles = ["GPU", "host", "layers on GPU / CPU / disk", "KV cache, head", *CARDS]
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * len(titles)
    for gpu, cpu in product(GPU_GIB, CPU_GIB):
        request, budgets = (
            PlacementRequest(context=CONTEXT),
            Budgets((cpu << 30) - SYSTEM_BYTES, (gpu << 30) - profile.GPU_MARGIN),
        )
        plans = [make_plan(sizes, replace(here, card=card), request, budgets) for card in CARDS.values()]
        (placed,) = {placement(found) for found in plans}  # memory decides that, not speed
        yield f"| {gpu} GB | {cpu} GB | {placed} | {' | '.join(map(figures, plans))} |"


def placement(found: Plan) -> str:
    layers = " / ".join(str(found.layers.count(tier)) for tier in ("gpu", "cpu", "disk"))
    return f"{layers if found.fits else 'does not fit'} | {found.kv}, {found.head}"


def figures(found: Plan) -> str:
    """Decode and prompt in tokens/s, and the tokens from which on layers are streamed."""
    decode, prompt = found.decode_tokens_per_s, found.prefill_tokens_per_s
    if not found.fits or decode is None or prompt is None:
        return "-"
    return f"{decode:.1f}, {prompt:.0f}" + (f", {found.crossover_tokens}" if found.crossover_tokens else "")


def notes(here: HardwareProfile) -> Iterator[str]:
    cpu, disk = here.cpu, here.disk_bytes_per_s
    yield (
        f"GPT-NeoX-20B, int4 g128, context {CONTEXT}. For each card: tokens/s of decoding and of a prompt, and the length of a "
        "pass from which on the CPU's layers are streamed to the GPU. **Predictions**: cards by their specifications, whatever "
        f"memory they are sold with; {profile.GPU_MARGIN >> 20} MiB of it are left to the display, and "
        f"{SYSTEM_BYTES >> 30} GiB of the host's to the system."
    )
    yield (
        f"The CPU as measured on this machine ({profile.cpu_name()}, {torch.get_num_threads()} threads): "
        f"{cpu.read_bytes_per_s / 1e9:.1f} GB/s of int4 weights, {cpu.flops_per_s / 1e9:.0f} GFLOP/s at {profile.MANY} tokens; "
        f"disk {f'{disk / 1e9:.1f} GB/s' if disk else 'unknown'}."
    )


if __name__ == "__main__":
    main()
