"""The picture of `neox-lite compare`, as SVG written by hand: KL against bits per weight, and errors by layer.

It follows the reader's light or dark theme and needs no library. Knows rows and layers as --json has them, and no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

WIDTH, MARGIN, GAP = 1000, 28, 78
TALL, LOW, HEAD = 340, 150, 104  # heights of the two rows of panels, and of what stands above them
LIGHT = ("#1f6fd0", "#c8501e", "#0c8a63", "#a13f8f", "#9a7200", "#0e87a0", "#6b5bd0", "#b23a55")
DARK = ("#6aaeff", "#ff9466", "#3fcf9f", "#e58ad3", "#e3b83c", "#4fcbe6", "#a99bff", "#ff8095")
DASHES = ("", "6 3", "2 3")  # the colours once more, and once more
STYLE = """
svg { --paper: #ffffff; --ink: #1c2430; --soft: #5d6878; --grid: #e4e8ee; %s }
@media (prefers-color-scheme: dark) { svg { --paper: #12161c; --ink: #e8edf4; --soft: #9aa6b6; --grid: #2a323d; %s } }
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink) }
.title { font-weight: 600; font-size: 14px } .soft { fill: var(--soft) } .grid { stroke: var(--grid) }
.line { fill: none; stroke-width: 2; stroke-linejoin: round }
.halo { paint-order: stroke; stroke: var(--paper); stroke-width: 4px }
"""
TITLES = {
    "attention.query_key_value": "query_key_value",
    "attention.dense": "attention.dense",
    "mlp.dense_h_to_4h": "dense_h_to_4h",
    "mlp.dense_4h_to_h": "dense_4h_to_h",
}


@dataclass(frozen=True)
class Axis:
    """Numbers to pixels: `low` and `high` are where its ticks end. log: equal factors are equally far apart."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]
    log: bool

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def log_axis(values: Sequence[float], start: float, stop: float) -> Axis:
    """Ticks at 1, 2 and 5 of each power of ten, at powers alone where that would be too many."""
    low, high = min(values, default=0.01), max(values, default=0.01)
    powers = range(math.floor(math.log10(low)) - 1, math.floor(math.log10(high)) + 2)
    every = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    first = max(i for i, tick in enumerate(every) if tick <= low * 0.999 or not i)
    last = min(i for i, tick in enumerate(every) if tick >= high * 1.001 or i == len(every) - 1)
    ticks = every[first : last + 1]
    shown = ticks if len(ticks) <= 8 else [t for t in ticks if f"{t:e}".startswith("1.0")]
    return Axis(ticks[0], ticks[-1], start, stop, tuple(shown), True)


def linear_axis(low: float, high: float, start: float, stop: float, most: int = 8) -> Axis:
    """Ticks at round numbers, at most so many; `low` and `high` stay the ends."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
    first = math.ceil(low / step - 1e-9)
    ticks = [round(step * i, 9) for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, start, stop, tuple(ticks), False)


def draw(rows: Sequence[dict[str, Any]], layers: Sequence[Sequence[dict[str, Any]]]) -> str:
    """rows: of `compare --json`, the source first; layers: of each folder after it. -> the SVG's text."""
    names = _short([row["path"] for row in rows[1:]])
    height = HEAD + TALL + GAP + LOW + 62 + 18 * ((len(names) - 1) // 5)
    shift = 18 * ((len(names) - 1) // 5)  # room for further lines of the legend
    top, half = HEAD + shift, (WIDTH - 2 * MARGIN - GAP) / 2 - 18
    out = [
        _text(MARGIN, 30, f"What quantization costs {Path(rows[0]['path']).name}", "title", size=17),
        *_legend(names),
    ]
    out += _distances(rows[1:], names, MARGIN + 44, top, half)
    hidden = [[layer["hidden"] for layer in one] for one in layers]
    out += _lines("Error of hidden states after each layer", hidden, WIDTH - MARGIN - half, top, half, TALL)
    kinds = list(layers[0][0]["weights"]) if layers else []
    width = (WIDTH - 2 * MARGIN - 44 - 24 * 3) / 4
    found = [[[layer["weights"][kind]["error"] for layer in one] for one in layers] for kind in kinds]
    for i, (kind, errors) in enumerate(zip(kinds, found, strict=True)):
        left = MARGIN + 44 + i * (width + 24)
        out += _lines(f"Error of {TITLES.get(kind, kind)}", errors, left, top + TALL + GAP, width, LOW, found, i == 0)
    colours = ["; ".join(f"--c{i}: {c}" for i, c in enumerate(palette)) for palette in (LIGHT, DARK)]
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    style = STYLE % tuple(colours)
    paper = f'<rect width="{WIDTH}" height="{height}" rx="10" fill="var(--paper)"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>\n{paper}\n'
        + "\n".join(out)
        + "\n</svg>\n"
    )


def _short(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    parts = [Path(path).parts for path in paths]
    for count in range(1, max((len(p) for p in parts), default=0) + 1):
        short = ["/".join(p[-count:]) for p in parts]
        if len(set(short)) == len(short):
            return short
    return list(paths)


def _legend(names: Sequence[str]) -> list[str]:
    out, width = [], (WIDTH - 2 * MARGIN) / min(5, max(1, len(names)))
    for i, name in enumerate(names):
        x, y = MARGIN + i % 5 * width, 54 + 18 * (i // 5)
        out.append(f'<line x1="{x:.0f}" x2="{x + 22:.0f}" y1="{y - 4}" y2="{y - 4}" class="line" {_stroke(i)}/>')
        out.append(_text(x + 29, y, _cut(name, int(width / 7.2) - 5)))
    return out


def _distances(
    rows: Sequence[dict[str, Any]], names: Sequence[str], left: float, top: float, width: float
) -> list[str]:
    """KL, with two standard errors to either side, against bits per weight."""
    positive = [row["kl"] for row in rows if row["kl"] > 0 and math.isfinite(row["kl"])]
    floor = min(positive, default=1e-6) / 2  # where a distance of nothing stands
    values = [floor if row["kl"] <= 0 else row["kl"] for row in rows if math.isfinite(row["kl"])]
    bits = [row["bits_per_weight"] for row in rows]
    y = log_axis(values, top + TALL, top)
    x = linear_axis(min(bits) - 0.5, max(bits) + 0.5, left, left + width)
    out = [_text(left - 44, top - 14, "KL to the source, nats a token: lower is better", "title")]
    out += _grid(x, y, lambda v: f"{v:g}", lambda v: f"{v:g}".replace("e-0", "e-"), "bits a weight, linear layers")
    finite = [i for i, row in enumerate(rows) if math.isfinite(row["kl"])]
    points = {i: (x(bits[i]), y(max(rows[i]["kl"], floor))) for i in finite}
    for i, (at_x, at_y) in points.items():
        kl, spread = max(rows[i]["kl"], floor), 2 * (rows[i]["kl_error"] or 0.0)
        ends = f'y1="{y(min(kl + spread, y.high)):.1f}" y2="{y(max(kl - spread, y.low)):.1f}"'
        out.append(f'<line x1="{at_x:.1f}" x2="{at_x:.1f}" {ends} class="line" {_stroke(i)}/>')
        out.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="5" fill="var(--c{i % len(LIGHT)})"/>')
    labels = {i: _cut(names[i], 34) + ("" if rows[i]["kl"] > 0 else ": no distance") for i in finite}
    return out + _labels(points, labels, (left, top, left + width, top + TALL))


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _labels(points: dict[int, tuple[float, float]], labels: dict[int, str], within: Box) -> list[str]:
    """A name to the right or left of each point, where it hides nothing; elsewhere its colour in the legend must do."""
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in points.values()]
    out = []
    for i in sorted(points, key=lambda i: points[i][1]):
        (x, y), wide = points[i], 6.9 * len(labels[i])
        sides = [(left, y - 6, left + wide, y + 6) for left in (x + 11, x - 11 - wide)]
        box = next((b for b in sides if _inside(b, within) and not any(_meet(b, t) for t in taken)), None)
        if box is not None:
            taken.append(box)
            out.append(_text(box[0], y + 4, labels[i], "halo"))
    return out


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(a: Box, b: Box) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3]


def _lines(
    title: str,
    series: Sequence[Sequence[float]],
    left: float,
    top: float,
    width: float,
    height: float,
    together: Sequence[Sequence[Sequence[float]]] | None = None,
    scale: bool = True,
) -> list[str]:
    """Relative errors by layer, a line for each folder. together: of all panels on one scale; scale: show it."""
    every = [v for panel in together or [series] for one in panel for v in one if v > 0 and math.isfinite(v)]
    count = max((len(one) for one in series), default=1)
    y, x = log_axis(every, top + height, top), linear_axis(0, max(1, count - 1), left, left + width, min(10, count))
    out = [_text(left - (44 if together is None else 4), top - 14, title, "title", size=14 if together is None else 12)]
    out += _grid(x, y, lambda v: f"{v:g}", lambda v: f"{100 * v:g}%" if scale else "", "layer")
    for i, one in enumerate(series):
        points = [(x(n), y(v)) for n, v in enumerate(one) if v > 0 and math.isfinite(v)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        out.append(f'<polyline points="{path}" class="line" {_stroke(i)}/>')
        if count <= 16:
            out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="var(--c{i % len(LIGHT)})"/>' for a, b in points]
    return out


def _grid(x: Axis, y: Axis, say_x: Callable[[float], str], say_y: Callable[[float], str], below: str) -> list[str]:
    out = []
    for tick in y.ticks:
        at = y(tick)
        out.append(f'<line x1="{x.start:.1f}" x2="{x.stop:.1f}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        out.append(_text(x.start - 7, at + 4, say_y(tick), "soft", "end"))
    out += [_text(x(tick), y.start + 18, say_x(tick), "soft", "middle") for tick in x.ticks]
    return [*out, _text((x.start + x.stop) / 2, y.start + 36, below, "soft", "middle")]


def _stroke(i: int) -> str:
    dash = DASHES[i // len(LIGHT) % len(DASHES)]
    return f'style="stroke: var(--c{i % len(LIGHT)})"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start", size: int | None = None) -> str:
    style = f' style="font-size: {size}px"' if size else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}"{style}>{escape(text)}</text>'
