"""What quantization costs the bundled model on text it has not seen: KL, perplexity and top-1, for every format and method.

    python benchmarks/quality.py [--out benchmarks/results/quality_demo.json]

Runs from a checkout without installing. Head and embedding are 16 bit in every row; bits per weight count the linear layers.
Activations are float32; `kl_int8_activations` is the same distance with activations rounded to 8 bits with a scale per 32, as
the CPU's kernels take them by default.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in (".", "quant", "app")]

import torch  # noqa: E402

from neox_lite import GPTNeoXForCausalLM  # noqa: E402
from neox_lite_app.demo import CONTEXT, FOLDER  # noqa: E402
from neox_lite_app.evaluate import cut, quality_of  # noqa: E402
from neox_lite_quant import convert  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    source = GPTNeoXForCausalLM.from_pretrained(FOLDER)
    windows = cut(source, (FOLDER / "heldout.txt").read_text(encoding="utf-8"), CONTEXT)
    rows = [asdict(quality_of(source, source, windows, "fp16")) | {"method": None}]
    with tempfile.TemporaryDirectory() as scratch:
        for format in ("int8", "int4"):
            for group_size in (32, 64, 128):
                for method in ("rtn", "mse"):
                    name = f"{format}-g{group_size}-{method}"
                    convert(FOLDER, Path(scratch) / name, format=format, group_size=group_size, method=method)
                    model = GPTNeoXForCausalLM.from_pretrained(Path(scratch) / name, exact=True)
                    row = asdict(quality_of(source, model, windows, name)) | {"method": method}
                    rounded = GPTNeoXForCausalLM.from_pretrained(Path(scratch) / name)
                    row["kl_int8_activations"] = quality_of(source, rounded, windows, name).kl
                    rows.append(row)
                    print(
                        f"{name:<14} KL {row['kl']:.6f}  with int8 activations {row['kl_int8_activations']:.6f}  "
                        f"perplexity {row['perplexity']:.4f}",
                        file=sys.stderr,
                    )
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    result = {"model": "bundled demo", "tokens": tokens, "context": CONTEXT, "torch": torch.__version__, "rows": rows}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
