"""What a plan says to its user: why it chose less than 16 bits, and which single change would lift it. Knows no tensor."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..units import PAGE, format_bytes
from .plan import CPU, DISK, GPU, MIXED, NO, Budgets, PlacementRequest, Plan, kinds, make_plan

SMALLER = {"kv": "int8 KV cache", "head": "int8 head"}  # what a plan may choose to save memory
GAINS = {
    GPU: "put the whole model on the GPU",
    MIXED: "keep every layer off the disk",
    CPU: "keep every layer off the disk",
    DISK: "make it run, with layers read from the disk",
    NO: "come nearest to running",
}


def notes(plan: Plan) -> list[str]:
    """What the plan chose of less than 16 bits, and why."""
    chosen = [n for option, n in SMALLER.items() if getattr(plan, option) != (getattr(plan.request, option) or "fp16")]
    return [f"{' and '.join(chosen)}, to {GAINS[plan.level]}"] if chosen else []


def advice(plan: Plan) -> list[str]:
    """One sentence for each single change that lifts the plan to a better level."""
    levels = ((text, _level(plan, request, budgets)) for text, request, budgets in _changes(plan))
    return [f"{text} would {GAINS[level]}" for text, level in levels if level > plan.level]


def _level(plan: Plan, request: PlacementRequest, budgets: Budgets) -> int:
    return make_plan(plan.sizes, plan.hardware, request, budgets).level


def _changes(plan: Plan) -> Iterator[tuple[str, PlacementRequest, Budgets]]:
    """Changes that may help, in words and as they would be asked for."""
    request, budgets = plan.request, plan.budgets
    for option, name in SMALLER.items():
        if getattr(request, option) == "fp16" and (option == "kv" or plan.sizes.small_head is not None):
            int8: dict[str, Any] = {option: "int8"}
            yield f"an {name} ({option})", replace(request, **int8), budgets
    # The longest context that helps; to a quarter or less nobody goes.
    contexts = range((plan.pages - 1) * PAGE, plan.context // (4 * PAGE) * PAGE, -PAGE)
    helps = bisect_left(contexts, True, key=lambda n: _level(plan, replace(request, context=n), budgets) > plan.level)
    for context in contexts[helps : helps + 1]:
        yield f"a context of {context}", replace(request, context=context), budgets
    for tier, needed in dict.fromkeys(_needed(plan)):
        if (more := needed - getattr(budgets, tier)) > 0:
            larger: dict[str, Any] = {tier: needed}
            size = f"{needed / 2**30:.1f}GiB of {tier.upper()} memory, {format_bytes(more)} more than the budget,"
            yield size, request, replace(budgets, **larger)


def _needed(plan: Plan) -> Iterator[tuple[str, int]]:
    """Budgets, in tenths of a GiB, that would hold the model on the GPU, or all layers of it in memory."""

    def smallest(tier: str, gpu_layers: int) -> int:
        in_memory = replace(plan, disk_layers=0, gpu_layers=gpu_layers, embedding_on="cpu")
        return min(replace(in_memory, kv=kv, head=head).totals[tier] for kv, head in kinds(plan.sizes, plan.request))

    if plan.budgets.gpu is not None:
        yield "gpu", _tenths(smallest("gpu", len(plan.sizes.layers)))
    if plan.level == NO:
        yield "cpu", _tenths(plan.budgets.cpu + plan.short_by)
    yield "cpu", _tenths(smallest("cpu", plan.gpu_layers))


def _tenths(count: int) -> int:
    """Rounded up, as far as a size is written."""
    return -(-count * 10 >> 30) * (1 << 30) // 10
