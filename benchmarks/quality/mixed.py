"""Whether a mix of formats loses less than one format for all, at the same size: the bundled model, and its outlier variant.

    python -m benchmarks.quality.mixed [--out benchmarks/results/mixed_demo.json]

Sizes are of whole folders. Between int4 g32 and int8 there is no single format; `kl_at_random` is what a mix of those two would
lose there if its layers were chosen at random, since KL adds up over layers. Activations are float32.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import DEMO, command_line, write_json
from benchmarks.quality.formats import with_outliers
from neox_lite import GPTNeoXForCausalLM
from neox_lite.formats import GroupInt, label, make_format
from neox_lite.layers import Linear
from neox_lite.loading.quantize import encode
from neox_lite_app.demo import CONTEXT
from neox_lite_app.evaluation.quality import cut, log_probabilities, quality_of
from neox_lite_app.evaluation.quality import measure as measure_of
from neox_lite_quant import convert
from neox_lite_quant.mixed import FORMATS, choose, stored_bytes

UNIFORM = (("int4", 128), ("int4", 64), ("int4", 32), ("int8", 128))
BETWEEN = (0.1, 0.25, 0.5, 0.75)  # of the way from int4 g32 to int8 g128
METHODS = ("mse", "balance")
ALONE_WINDOWS = 24


def main() -> None:
    args = command_line(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = {"bundled demo": DEMO, "with outliers": with_outliers(DEMO, Path(scratch) / "outliers")}
        rows = [
            {"model": name, "method": method, **row}
            for name, folder in models.items()
            for method in METHODS
            for row in measure(folder, method, Path(scratch) / "quantized")
        ]
        added = [{"model": name, **adding(folder)} for name, folder in models.items()]
    if args.out:
        write_json(args.out, {"context": CONTEXT, "torch": torch.__version__, "rows": rows, "alone": added})


def measure(folder: Path, method: str, out: Path) -> list[dict[str, Any]]:
    source = GPTNeoXForCausalLM.from_pretrained(folder)
    windows = cut(source, (DEMO / "heldout.txt").read_text(encoding="utf-8"), CONTEXT)

    def row(name: str, **options: Any) -> dict[str, Any]:
        report = convert(folder, out, method=method, **options)
        quality = asdict(quality_of(source, GPTNeoXForCausalLM.from_pretrained(out, exact=True), windows, name))
        size = sum(file.stat().st_size for file in out.iterdir())
        print(f"{method:<8} {name:<24} {size} bytes  KL {quality['kl']:.6f}", flush=True)
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


def adding(folder: Path) -> dict[str, Any]:
    """KL with one layer quantized at a time, summed, beside that of all together; and the best mix that such figures give."""
    source, model = (GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    windows = cut(source, (DEMO / "heldout.txt").read_text(encoding="utf-8"), CONTEXT)[:ALONE_WINDOWS]
    truth = list(log_probabilities(source, windows))
    linears = {n: m for n, m in model.named_modules() if n.startswith("gpt_neox.layers.") and isinstance(m, Linear)}
    plain = {name: module.weight.clone() for name, module in linears.items()}

    def kl(format: GroupInt, names: Iterable[str]) -> float:
        for name in names:
            stored = encode(format, plain[name], torch.float16, "mse")
            linears[name].weight.copy_(format.decode(stored, torch.float32))
        found = measure_of(model, windows, log_probabilities(model, windows), iter(truth), "").kl
        for name in names:
            linears[name].weight.copy_(plain[name])
        return found

    formats = [make_format(*one) for one in UNIFORM]
    alone = {name: dict.fromkeys(FORMATS, math.inf) | {f: kl(f, [name]) for f in formats} for name in linears}
    found = {label(f, ""): {"sum": sum(one[f] for one in alone.values()), "together": kl(f, linears)} for f in formats}
    g64 = dict.fromkeys(linears, GroupInt(4, 64))
    best = choose(alone, model.config, torch.float16, stored_bytes(g64, model.config, torch.float16))
    gain = sum(alone[n][f] for n, f in best.items()) / found["int4 g64"]["sum"]
    print(f"best at the size of int4 g64: {gain:.3f} of its KL; {found}", flush=True)
    return {"windows": ALONE_WINDOWS, "method": "mse", "formats": found, "best_mix_at_int4_g64": gain}


if __name__ == "__main__":
    main()
