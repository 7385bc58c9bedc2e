"""What the kernels could reach on cards, by arithmetic, and beside it what was measured where there is a measurement.

    python -m benchmarks.gpu.roofline [--write docs/kernels.md] [--plot docs/images/roofline.png] [--results FOLDER]

Predictions come from three figures of a card's data sheet and from the instructions that the compiler makes of each kernel
(results/sass_triton-3.9.json). Measurements are the files that gpu.py has written. --write replaces the tables between the
page's marks; --plot needs matplotlib. Neither ever shares a column or a kind of point.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

REACHED = 0.92  # of the bandwidth, by a kernel that streams; what others' best kernels have reached
LAUNCH_S = 4e-6  # to start a kernel, fill the card and drain it
ISSUED = 0.85  # of the instructions that a card could issue
TENSOR = 0.7  # of its tensor cores' peak
HIDDEN, LAYERS, VOCABULARY, HEADS = 6144, 44, 50432, 64  # GPT-NeoX-20B
BITS = {"int4": 4 + 16 / 128, "int8": 8 + 16 / 128, "fp16": 16.0}  # of a weight, its share of a scale included
SMALL = 3  # launches of a layer that move little: norms, attention at the start of a context, its combining
EMPTY = "not yet"


@dataclass(frozen=True)
class Card:
    """By its data sheet. issue: lane-instructions a second; flops: of tensor cores, float16 summed in float32."""

    name: str
    sm: int
    bandwidth: float
    issue: float
    flops: float


def card(name: str, sm: int, gb: float, processors: int, ghz: float, tflops: float) -> Card:
    return Card(name, sm, gb * 1e9, processors * 128 * ghz * 1e9, tflops * 1e12)


CARDS = (
    card("RTX 3060", 86, 360, 28, 1.78, 25),
    card("RTX 4060 Ti", 89, 288, 34, 2.54, 44),
    card("RTX 3090", 86, 936, 82, 1.70, 71),
    card("RTX 4090", 89, 1008, 128, 2.52, 165),
    card("RTX 5090", 120, 1792, 170, 2.41, 210),
    card("A100", 80, 2039, 108, 1.41, 312),
    card("H100", 90, 3350, 132, 1.83, 989),
    card("H200", 90, 4800, 132, 1.83, 989),
)
SHOWN = "H200"  # the card of the kernels' table


@dataclass(frozen=True)
class Launch:
    """A launch of a decode step of the 20B. measured: where gpu.py's file has it."""

    name: str
    what: str
    nbytes: float
    times: int  # in a step
    measured: tuple[str, dict[str, Any]] | None = None


def weight_bytes(rows: int, columns: int, format: str) -> float:
    return rows * columns * BITS[format] / 8


def launches(format: str = "int4", context: int = 2048) -> list[Launch]:
    """With an int8 head, as quantized folders have it."""
    beside = weight_bytes(7 * HIDDEN, HIDDEN, format)
    down = weight_bytes(HIDDEN, 5 * HIDDEN, format)
    cache = 2 * 2 * HIDDEN * context
    shape = {"shape": "gpt-neox-20b", "format": format}
    attended = {"shape": "gpt-neox-20b", "cache": "float16", "context": context, "new": 1}
    head = {"shape": "gpt-neox-20b", "format": "int8", "launch": "norm and head"}
    pages = -(-context // 128)
    return [
        Launch("norms", "both LayerNorms in one pass, in the order in which their weights read them", 2 * 3 * HIDDEN, LAYERS),
        Launch("qkv and h→4h", "two products in one launch, biases, GELU", beside, LAYERS,
               ("pairs", {**shape, "launch": "qkv beside h to 4h"})),
        Launch(f"attention at {context}, and its splits combined", "rotary, the new key and value, one page a program",
               cache + 2 * 4 * pages * HIDDEN, LAYERS, ("attention", attended)),
        Launch("dense + 4h→h", "one sum over both inputs, biases, residual", down, LAYERS,
               ("pairs", {**shape, "launch": "dense plus 4h to h"})),
        Launch("norm and head", "the last LayerNorm and the logits, int8", weight_bytes(VOCABULARY, HIDDEN, "int8"), 1,
               ("pairs", head)),
    ]  # fmt: skip


def predicted_s(nbytes: float, card: Card) -> float:
    return nbytes / (REACHED * card.bandwidth) + LAUNCH_S


def step_bytes(format: str, context: int = 0) -> float:
    weights = LAYERS * weight_bytes(12 * HIDDEN, HIDDEN, format)
    head = weight_bytes(VOCABULARY, HIDDEN, "fp16" if format == "fp16" else "int8")
    return weights + head + LAYERS * 2 * 2 * HIDDEN * context


def step_s(format: str, card: Card) -> float:
    """Of a decode step at the start of a context, one graph: launches alone."""
    large = [launch for launch in launches(format) if launch.measured is not None and launch.measured[0] == "pairs"]
    return sum(launch.times * predicted_s(launch.nbytes, card) for launch in large) + LAYERS * SMALL * LAUNCH_S


# Tokens together ------------------------------------------------------------------------------------------------------


def instructions(sm: int) -> dict[int, float]:
    """Tokens that a weight's instructions serve -> instructions a weight, by the compiler, of qkv beside h→4h."""
    rows = json.loads((RESULTS / "sass_triton-3.9.json").read_text())["kernels"]

    def found(kernel: str, run: str) -> float:
        return next(r["per_weight"] for r in rows if (r["card"], r["kernel"], r["run"]) == (sm, kernel, run))

    return {1: found("grouped_gemv", "decode"), 16: found("gemm", "batch of 16"),
            64: found("gemm", "prefill 256")}  # fmt: skip


def product_s(tokens: int, card: Card, format: str = "int4") -> float:
    """Of h→4h alone, for so many tokens: the slowest of reading, issuing and multiplying, and a launch."""
    weights, by_tokens = 4 * HIDDEN * HIDDEN, instructions(card.sm)
    served = next((n for n in by_tokens if tokens <= n), max(by_tokens))
    issue = weights * by_tokens[served] * -(-tokens // served) / (ISSUED * card.issue)
    multiply = 2 * weights * tokens / (TENSOR * card.flops) if tokens > 2 else 0.0
    read = weight_bytes(4 * HIDDEN, HIDDEN, format) / (REACHED * card.bandwidth)
    return max(read, issue, multiply) + LAUNCH_S


# What was measured ----------------------------------------------------------------------------------------------------


def measurements(folder: Path) -> dict[str, dict[str, Any]]:
    """Card -> what gpu.py found on it."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu_*.json"))]
    real = [found for found in files if found.get("device") and not found.get("rehearsal")]
    return {c.name: found for found in real for c in CARDS if re.search(rf"\b{c.name}\b", found["device"])}


def measured_us(launch: Launch, found: dict[str, Any] | None) -> float | None:
    if found is None or launch.measured is None:
        return None
    table, want = launch.measured
    rows = [row for row in found.get(table, []) if all(row.get(key) == value for key, value in want.items())]
    return rows[0]["us"] if rows else None


def measured_rate(format: str, found: dict[str, Any] | None) -> float | None:
    """Tokens a second at the start of a context."""
    rows = [] if found is None else found.get("models", [])
    ours = [r for r in rows if r["engine"] == "neox-lite" and r["format"] == format and "batch" not in r]
    rates = [row["tokens_per_s"]["0"] for row in ours if "0" in row["tokens_per_s"] and row.get("section") != "tuned"]
    return max(rates, default=None)


# Tables ---------------------------------------------------------------------------------------------------------------


def head(titles: Sequence[str]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * len(titles)


def kernels_table(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    here = next(c for c in CARDS if c.name == SHOWN)
    titles = [
        f"launch, one token, {SHOWN}",
        "it does",
        "MB",
        "floor µs",
        "predicted µs",
        "predicted share of bandwidth",
    ]
    yield from head([*titles, "measured µs", "measured share of bandwidth"])
    for launch in launches():
        floor, predicted = launch.nbytes / here.bandwidth, predicted_s(launch.nbytes, here)
        us = measured_us(launch, found.get(SHOWN))
        size = f"{launch.nbytes / 1e6:.0f}" if launch.nbytes > 1e6 else f"{launch.nbytes / 1e6:.2f}"
        cells = [f"{1e6 * floor:.1f}", f"{1e6 * predicted:.1f}", f"{floor / predicted:.0%}"]
        cells += [EMPTY] * 2 if us is None else [f"{us:.1f}", f"{1e6 * floor / us:.0%}"]
        yield f"| {launch.name} | {launch.what} | {size} | {' | '.join(cells)} |"


def steps_table(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    kinds = [f"{format}: {what}" for format in ("int4", "int8") for what in ("floor ms", "predicted", "measured")]
    yield from head(["tokens/s by card", "GB/s", *kinds])
    for here in CARDS:
        cells = []
        for format in ("int4", "int8"):
            rate = measured_rate(format, found.get(here.name))
            cells += [f"{1e3 * step_bytes(format) / here.bandwidth:.1f}", f"{1 / step_s(format, here):.0f}"]
            cells += [EMPTY if rate is None else f"{rate:.0f}"]
        yield f"| {here.name} | {here.bandwidth / 1e9:.0f} | {' | '.join(cells)} |"


def status(found: dict[str, dict[str, Any]]) -> str:
    """What the measured columns are."""
    if not found:
        return "**No GPU has run these kernels: the measured columns are empty.**"
    devices = [f"{one['device']}, torch {one['torch']}, Triton {one['packages']['triton']}" for one in found.values()]
    return f"Measured by `benchmarks/gpu.py`: {'; '.join(devices)}."


def page(text: str, found: dict[str, dict[str, Any]]) -> str:
    """The page with its tables made anew."""
    parts = {"status": [status(found)], "kernels": kernels_table(found), "steps": steps_table(found)}
    for name, lines in parts.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = mark.subn(lambda hit, lines=lines: hit[1] + "\n".join(lines) + "\n" + hit[2], text)
        if count != 1:
            raise SystemExit(f"the page has {count} places marked <!-- {name} -->, expected one")
    return text


# Plot -----------------------------------------------------------------------------------------------------------------

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """TFLOP/s of h→4h as int4 by operations a byte: the card's roofs, what is predicted below them, what was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [c for c in CARDS if c.name in ("RTX 3060", "RTX 4090", "H200") or c.name in found]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5 * len(shown), 4.4), squeeze=False)
    weights, nbytes = 4 * HIDDEN * HIDDEN, weight_bytes(4 * HIDDEN, HIDDEN, "int4")
    intensity = [2 * weights * n / nbytes for n in TOKENS]
    for axis, here in zip(axes[0], shown, strict=True):
        roof = [min(x * here.bandwidth, here.flops) / 1e12 for x in intensity]
        axis.loglog(intensity, roof, color="black", linewidth=1, label="roof: bandwidth, tensor cores")
        reached = [2 * weights * n / product_s(n, here) / 1e12 for n in TOKENS]
        how = {"color": "tab:orange", "marker": "o", "linestyle": "--", "fillstyle": "none"}
        axis.loglog(intensity, reached, label="predicted", **how)
        rows = found.get(here.name, {}).get("tokens", [])
        rows = [r for r in rows if (r["engine"], r["format"]) == ("neox-lite", "int4")]
        if rows:
            points = [(2 * weights * r["tokens"] / nbytes, 2 * weights * r["tokens"] / r["us"] / 1e6) for r in rows]
            axis.loglog(*zip(*points, strict=True), "o", color="tab:orange", label="measured")
        axis.set_title(here.name + ("" if rows else ": nothing measured"), fontsize=10)
        axis.set_xlabel("operations a byte of weights (1 to 256 tokens)")
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("TFLOP/s")
    figure.suptitle("h→4h of GPT-NeoX-20B as int4", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of gpu.py's files")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace its tables")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    args = parser.parse_args()
    found = measurements(args.results)
    if args.write:
        args.write.write_text(page(args.write.read_text(), found))
    if args.plot:
        plot(found, args.plot)
    if not (args.write or args.plot):
        print("\n".join([*kernels_table(found), "", *steps_table(found)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
