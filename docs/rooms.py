"""Reads who imports whom, and draws the rooms of the house: `python docs/rooms.py` writes docs/images/rooms.svg."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "rooms.svg"
PACKAGES = {"neox_lite": ROOT, "neox_lite_quant": ROOT / "quant", "neox_lite_app": ROOT / "app"}

# Lowest floor first: a room imports only rooms above it in this list, and its own insides.
FLOORS = {
    "neox_lite.version": "the version",
    "neox_lite.errors": "one family of exceptions",
    "neox_lite.files": "atomic writes, strict JSON",
    "neox_lite.units": "bytes, dtypes, the page size",
    "neox_lite.hub": "files of a hub repository",
    "neox_lite.user_cache": "files kept between runs",
    "neox_lite.config": "GPTNeoXConfig",
    "neox_lite.tokenizer": "text and ids",
    "neox_lite.checkpoint": "weight files and adapters",
    "neox_lite.formats": "a weight on disk and in memory",
    "neox_lite.cache": "the paged KV cache",
    "neox_lite.kernels": "backends: reference, CPU, Triton",
    "neox_lite.layers": "modules that hold tensors",
    "neox_lite.generation": "sampling and scheduling",
    "neox_lite.offload": "GPU, CPU and disk",
    "neox_lite.core": "network, runner, packed inputs",
    "neox_lite.loading": "folders in and out",
    "neox_lite.modeling": "Hugging Face's classes",
    "neox_lite": "the public names",
    "neox_lite_quant": "offline quantization, GGUF",
    "neox_lite_app.paths": "where the app's files are",
    "neox_lite_app.terminal": "what commands print and read",
    "neox_lite_app.load_for_command": "how commands load a model",
    "neox_lite_app.conversations": "chats, prompt forms, templates",
    "neox_lite_app.models": "plan, quantize, info, verify",
    "neox_lite_app.evaluation": "perplexity, compare, eval",
    "neox_lite_app.serving": "the engine and the API",
    "neox_lite_app.page": "the page",
    "neox_lite_app": "the command line",
}


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module."""
    for package, folder in PACKAGES.items():
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = {module for module, _ in modules()}


def room(module: str) -> str | None:
    """The longest floor that a module belongs to; the package itself is the room of its __init__."""
    found = max((f for f in FLOORS if module == f or module.startswith(f + ".")), key=len, default=None)
    return None if found == "neox_lite" != module else found


def imports(module: str, path: Path) -> Iterator[tuple[str, bool, int]]:
    """(imported module, whether at the top of the file, line), those for type checkers too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(n) for node in tree.body for n in ([node] if not isinstance(node, ast.Try) else ast.walk(node))}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names]
            yield from ((name, id(node) in top, node.lineno) for name in dict.fromkeys(names))


def arrows() -> Iterator[tuple[str, int, str, str | None, str | None]]:
    """(module, line, imported module, room, room of that) for each import of a package of ours."""
    for module, path in modules():
        for name, _, line in imports(module, path):
            if name.partition(".")[0] in PACKAGES:
                yield module, line, name, room(module), room(name)


# The picture ----------------------------------------------------------------------------------------------------------

WIDTH, BOX, TALL, GAP = 1180, 182, 46, 74
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
  .what { font-size: 10.5px; fill: #59636e }
  rect { fill: #ffffff; stroke: #8c959f }
  .core { fill: #ddf4ff } .quant { fill: #fff8c5 } .app { fill: #dafbe1 }
  path { fill: none; stroke: #8c959f; stroke-width: 1.1 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .what { fill: #9198a1 } rect { stroke: #656c76 }
    .core { fill: #0c2d4a } .quant { fill: #3b2f00 } .app { fill: #0f3320 } path { stroke: #656c76 }
  }
"""


def needed() -> dict[str, set[str]]:
    """For each room the rooms that it imports and reaches in no other way."""
    direct: dict[str, set[str]] = {floor: set() for floor in FLOORS}
    for *_, here, there in arrows():
        if here != there and here is not None and there is not None:
            direct[here].add(there)
    reached: dict[str, set[str]] = {}
    for floor in FLOORS:
        reached[floor] = direct[floor].union(*(reached[other] for other in direct[floor]))
    return {
        floor: {other for other in others if not any(other in reached[through] for through in others - {other})}
        for floor, others in direct.items()
    }


def draw() -> str:
    """The rooms as an SVG, the ground below: an arrow from a room to each that it imports and reaches in no other way."""
    below = needed()
    level: dict[str, int] = {}
    for floor in FLOORS:
        level[floor] = max((level[other] + 1 for other in below[floor]), default=0)
    # Rooms of the app stand close under those that import them, whatever little they import themselves.
    for floor in reversed(FLOORS):
        above = [level[other] for other, others in below.items() if floor in others]
        if floor.startswith("neox_lite_app.") and above:
            level[floor] = max(level[floor], min(above) - 1)
    rows = [[floor for floor in FLOORS if level[floor] == i] for i in range(max(level.values()) + 1)]
    at: dict[str, tuple[float, float]] = {}
    for i, row in enumerate(rows):
        # Rooms stand near what they import, as far apart as boxes are wide.
        row.sort(key=lambda floor: round(sum(at[o][0] for o in sorted(below[floor])) / max(len(below[floor]), 1)))
        for j, floor in enumerate(row):
            at[floor] = (WIDTH * (2 * j + 1) / (2 * len(row)), (len(rows) - 1 - i) * (TALL + GAP) + TALL)
    height = len(rows) * (TALL + GAP) - GAP + TALL
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>Rooms: each imports those that its lines lead down to, and what those import</title>",
        f"<style>{STYLE}</style>",
    ]
    for floor, others in below.items():
        x, y = at[floor]
        for other in sorted(others):
            to_x, to_y = at[other][0], at[other][1] - TALL / 2
            middle = (y + TALL / 2 + to_y) / 2
            curve = f"M{x:.0f} {y + TALL / 2:.0f}C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}"
            lines.append(f'<path d="{curve}"/>')
    for floor, what in FLOORS.items():
        x, y = at[floor]
        kind = {"neox_lite_app": "app", "neox_lite_quant": "quant"}.get(floor.partition(".")[0], "core")
        name = floor.partition(".")[2] or floor
        lines.append(
            f'<rect class="{kind}" x="{x - BOX / 2:.0f}" y="{y - TALL / 2:.0f}" width="{BOX}" height="{TALL}" rx="6"/>'
            f'<text x="{x:.0f}" y="{y - 3:.0f}">{name}</text><text class="what" x="{x:.0f}" y="{y + 14:.0f}">{what}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
