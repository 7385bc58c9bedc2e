"""Whether a mix of formats loses less than one format for all, at the same size: the bundled model, and its outlier variant.

    python benchmarks/mixed.py [--out benchmarks/results/mixed_demo.json]

Sizes are of whole folders. Between int4 g32 and int8 there is no single format; `kl_at_random` is what a mix of those two would
lose there if its layers were drawn by lot, since KL adds up over layers. Activations are float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in (".", "quant", "app")]

import torch  # noqa: E402
from quality import with_outliers  # noqa: E402

from neox_lite import GPTNeoXForCausalLM  # noqa: E402
from neox_lite_app.demo import CONTEXT, FOLDER  # noqa: E402
from neox_lite_app.evaluate import cut, quality_of  # noqa: E402
from neox_lite_quant import convert  # noqa: E402

UNIFORM = (("int4", 128), ("int4", 64), ("int4", 32), ("int8", 128))
BETWEEN = (0.1, 0.25, 0.5, 0.75)  # of the way from int4 g32 to int8 g128
METHODS = ("mse", "balance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        outliers = with_outliers(FOLDER, Path(scratch) / "outliers")
        models = {"bundled demo": FOLDER, "with outliers": outliers}
        rows = [
            {"model": name, "method": method, **row}
            for name, folder in models.items()
            for method in METHODS
            for row in measure(folder, method, Path(scratch) / "quantized")
        ]
    result = json.dumps({"context": CONTEXT, "torch": torch.__version__, "rows": rows}, indent=1)
    print(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(result + "\n")


def measure(folder: Path, method: str, out: Path) -> list[dict[str, Any]]:
    source = GPTNeoXForCausalLM.from_pretrained(folder)
    windows = cut(source, (FOLDER / "heldout.txt").read_text(encoding="utf-8"), CONTEXT)

    def row(name: str, **options: Any) -> dict[str, Any]:
        report = convert(folder, out, method=method, **options)
        quality = asdict(quality_of(source, GPTNeoXForCausalLM.from_pretrained(out, exact=True), windows, name))
        size = sum(file.stat().st_size for file in out.iterdir())
        print(f"{method:<8} {name:<24} {size} bytes  KL {quality['kl']:.6f}", file=sys.stderr, flush=True)
        found = {key: quality[key] for key in ("bits_per_weight", "kl", "kl_error", "perplexity", "top1")}
        return {"name": name, "folder_bytes": size, "mix": report.mix, **found}

    rows = [row(f"{format} g{size}", format=format, group_size=size) for format, size in UNIFORM]
    *_, small, large = rows
    for one in rows[1:3]:
        rows.append(row(f"mix no larger than {one['name']}", target_size=one["folder_bytes"]))
    for share in BETWEEN:
        between = small["folder_bytes"] + share * (large["folder_bytes"] - small["folder_bytes"])
        mixed = row(f"mix, {share:.0%} of the way", target_size=int(between))
        place = (mixed["bits_per_weight"] - 4.5) / (8.125 - 4.5)
        rows.append(mixed | {"kl_at_random": small["kl"] + place * (large["kl"] - small["kl"])})
    return rows


if __name__ == "__main__":
    main()
