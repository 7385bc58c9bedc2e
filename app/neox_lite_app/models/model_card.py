"""The model card of a folder: what it is, how good it measured, how to run it. Knows no hub; nothing in it is a guess."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox_lite.checkpoint.manifest import read_manifest
from neox_lite.config import GPTNeoXConfig
from neox_lite.errors import ArgumentError
from neox_lite.files import read_json
from neox_lite.hub import MANIFEST

from ..load_for_command import common_label, formats_in

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")
COLUMNS = {
    "format": ("format", "{}"),
    "bits_per_weight": ("bits per weight", "{:.3f}"),
    "bytes": ("bytes", "{:,}"),
    "perplexity": ("perplexity", "{:.4f}"),
    "kl": ("KL", "{:.6f}"),
    "top1": ("top-1", "{:.2%}"),
}
UNMEASURED = (
    "Not measured. `neox-lite compare SOURCE DIR --text FILE --json > quality.json` measures it, and "
    "`neox-lite push DIR HUB_ID --compare quality.json` puts the table here."
)


@dataclass(frozen=True)
class Origin:
    """Where a folder came from, as far as that is known."""

    base_model: str | None = None
    license: str | None = None


def origin_of(folder: Path, base_model: str | None = None, license: str | None = None) -> Origin:
    """What the arguments say, else the manifest: the source's hub id. Raises ArgumentError for what is neither."""
    if base_model is None and (folder / MANIFEST).is_file():
        named = read_manifest(folder / MANIFEST).get("source_name")
        base_model = named if isinstance(named, str) and HUB_ID.fullmatch(named) else None
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise ArgumentError(f"--base-model is {base_model[:80]!r}, expected a hub id such as EleutherAI/gpt-neox-20b")
    if license is not None and not LICENSE.fullmatch(license):
        raise ArgumentError(f"--license is {license[:80]!r}, expected the hub's name of one, such as apache-2.0")
    return Origin(base_model, license)


def license_in(card: str) -> str | None:
    """The license that a model card's front matter names."""
    front = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([^\s\"'#]+)", front[1], re.MULTILINE) if front else None
    return found[1].lower() if found and LICENSE.fullmatch(found[1].lower()) else None


def card(folder: Path, hub_id: str, origin: Origin, rows: list[dict[str, Any]] | None, size: str) -> str:
    """README.md for a folder; size: of its weights, in words."""
    config = GPTNeoXConfig.from_pretrained(folder)
    name = common_label(formats_in(config), config.dtype or "plain")
    source = (
        f"[{origin.base_model}](https://huggingface.co/{origin.base_model})" if origin.base_model else "a checkpoint"
    )
    method = _method(folder)
    quantized = config.quantization_config is not None
    made = f"{source} in {name}{f', method {method}' if method and quantized else ''}, made with neox-lite. {size}."
    parts = [
        _front(origin, name, quantized),
        f"# {hub_id.partition('/')[2]}",
        made,
        "## Quality",
        _quality(rows),
        "## Run it",
    ]
    parts.append(f"```\npip install neox-lite\nneox-lite chat {hub_id}\n```")
    if (scheme := config.quantization_config) is not None and scheme["quant_method"] != "bitsandbytes":
        parts.append("The folder is in the compressed-tensors form `pack-quantized`, which transformers opens as well.")
    return "\n\n".join(parts) + "\n"


def _front(origin: Origin, name: str, quantized: bool) -> str:
    lines = ["---"]
    if origin.license is not None:
        lines.append(f"license: {origin.license}")
    if origin.base_model is not None:
        lines += [f"base_model: {origin.base_model}", *(["base_model_relation: quantized"] if quantized else [])]
    lines += ["pipeline_tag: text-generation", "tags:", "- gpt_neox", "- neox-lite"]
    lines += [f"- {tag}" for tag in name.split() if tag.isalnum()]
    return "\n".join([*lines, "---"])


def _method(folder: Path) -> str | None:
    if not (folder / MANIFEST).is_file():
        return None
    found = read_manifest(folder / MANIFEST).get("method")
    return found if isinstance(found, str) and found.replace("-", "").isalnum() else None


def _quality(rows: list[dict[str, Any]] | None) -> str:
    if rows is None:
        return UNMEASURED
    head = ["model", *(title for title, _ in COLUMNS.values())]
    lines = [head, ["---"] * len(head), *([_plain_name(row["path"]), *_cells(row)] for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\nKL to the first line in nats a token; top-1: tokens whose likeliest successor is the same."


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [_escaped(form.format(row[key])) for key, (_, form) in COLUMNS.items()]


def _plain_name(path: str) -> str:
    """A hub id as it is, of a path its last part only: where it lay is nobody's business."""
    return _escaped(path if HUB_ID.fullmatch(path) and not Path(path).exists() else Path(path).name)


def _escaped(text: str) -> str:
    return re.sub(r"([|\\`*_<>\[\]])", r"\\\1", " ".join(text.split()))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of what `neox-lite compare --json` printed. Raises ArgumentError for anything else."""
    try:
        rows = read_json(path, ArgumentError).get("rows")
    except ArgumentError as error:
        raise ArgumentError(f"--compare {error}") from None
    kinds = {"path": str, "format": str, "bytes": int} | dict.fromkeys(
        ("bits_per_weight", "perplexity", "kl", "top1"), float
    )
    rows = rows if isinstance(rows, list) else []
    good = [isinstance(row, dict) and all(_is(row.get(key), kind) for key, kind in kinds.items()) for row in rows]
    if not rows or not all(good):
        raise ArgumentError(f"--compare {path}: not what `neox-lite compare --json` prints; measure it again")
    return rows


def _is(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str)
    return type(value) in (int, kind) and math.isfinite(value)
