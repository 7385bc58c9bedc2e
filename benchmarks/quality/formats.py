"""What quantization costs: KL to the 16-bit model, perplexity and top-1, for every format and method, beside other tools'.

    python -m benchmarks.quality.formats [MODEL] [--outliers] [--peers] [--text FILE] [--out FILE]

MODEL is the bundled one unless given. --outliers: norm gains of some channels times 30 and their columns divided by
30, which is the same function. --peers: llama.cpp, bitsandbytes and HQQ too, as far as they are installed; their weights are
decoded and run here, so that nothing but weights differs. Head and embedding are 16 bit in every row; bits per weight count
the linear layers. Activations are float32; `kl_int8_activations` is the distance with activations rounded to 8 bits with a
scale per 32, as the CPU's kernels take them by default. `gptq` is calibrated with text that the model writes itself; nothing
sees the text that is scored. Runs from a checkout without installing.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality import peers
from neox_lite import GPTNeoXForCausalLM
from neox_lite.formats import make_format
from neox_lite_app.demo import CONTEXT
from neox_lite_app.evaluation.quality import cut, log_probabilities
from neox_lite_app.paths import DEMO
from neox_lite_quant import convert

FACTOR, CHANNELS = 30.0, 6  # of the outlier variant: gains times this, of so many channels of each norm
METHODS = ("rtn", "mse", "balance", "gptq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--text", type=Path, help="to score (default: the model folder's heldout.txt)")
    parser.add_argument("--outliers", action="store_true", help="of the same function with large channels")
    parser.add_argument("--peers", action="store_true", help="other tools' formats too")
    parser.add_argument(
        "--windows", type=int, default=128, help="of 128 tokens that gptq is calibrated with (default 128)"
    )
    parser.add_argument("--scored", type=int, help="windows of 256 tokens to score (default: all)")
    parser.add_argument("--activations", action="store_true", help="measure int8 activations too")
    parser.add_argument("--calibration", type=Path, help="another gptq row for int4 g128, calibrated with this text")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model
        if args.outliers:
            folder = with_outliers(args.model, Path(scratch) / "outliers")
        result = measure(folder, args, Path(scratch))
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


def measure(folder: Path, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    source = GPTNeoXForCausalLM.from_pretrained(folder)
    text = (args.text or args.model / "heldout.txt").read_text(encoding="utf-8")
    windows = cut(source, text, CONTEXT)[: args.scored]
    truth = torch.stack(list(log_probabilities(source, windows)))
    rows = [{"name": "fp16", "method": None, "bits_per_weight": 16.0, **distance(truth, source, windows)}]
    for row, quantized in quantizations(folder, args, scratch):
        exact = GPTNeoXForCausalLM.from_pretrained(quantized, exact=True, dtype=torch.float32)
        row |= distance(truth, exact, windows)
        if args.activations and row["method"] in METHODS:
            rounded = GPTNeoXForCausalLM.from_pretrained(quantized)
            row["kl_int8_activations"] = distance(truth, rounded, windows)["kl"]
        rows.append(row)
        shutil.rmtree(quantized)
        print(f"{row['name']:<28} {row['bits_per_weight']:.3f} bits  KL {row['kl']:.6f}", file=sys.stderr, flush=True)
    return {
        "model": "bundled demo" if args.model == DEMO else args.model.name,
        "outliers": f"{CHANNELS} channels of each norm times {FACTOR:.0f}" if args.outliers else None,
        "tokens": windows.shape[0] * (windows.shape[1] - 1),
        "context": CONTEXT,
        "calibration": f"gptq: {args.windows} windows of 128 tokens that the model wrote, unless a row says otherwise",
        "torch": torch.__version__,
        "rows": rows,
    }


def quantizations(folder: Path, args: argparse.Namespace, scratch: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """Each quantized folder, with what it is; the caller removes it."""
    out = scratch / "quantized"
    for format in ("int8", "int4"):
        for group_size in (32, 64, 128):
            bits = make_format(format, group_size).bits_per_weight(torch.float16)
            for method in METHODS:
                count = args.windows if method == "gptq" else None
                convert(folder, out, format, group_size, method, calibration_windows=count)
                yield {"name": f"{format}-g{group_size}-{method}", "method": method, "bits_per_weight": bits}, out
    if args.calibration:
        convert(folder, out, "int4", 128, "gptq", calibration=args.calibration, calibration_windows=args.windows // 4)
        bits = make_format("int4", 128).bits_per_weight(torch.float16)
        name = f"int4-g128-gptq, calibrated with {args.calibration.name}"
        yield {"name": name, "method": "gptq", "bits_per_weight": bits}, out
    if args.peers:
        for name, bits, note in peers.quantized(folder, out):
            yield {"name": name, "method": note, "bits_per_weight": bits}, out


def distance(truth: Tensor, model: GPTNeoXForCausalLM, windows: Tensor) -> dict[str, float]:
    """KL, perplexity and top-1 agreement on the windows, whose true log-probabilities are (n, context - 1, vocabulary)."""
    loss, kl, same, count = 0.0, 0.0, 0, 0
    for window, wanted, found in zip(windows, truth, log_probabilities(model, windows), strict=True):
        loss -= float(found.gather(1, window[1:, None]).double().sum())
        kl += float((wanted.exp().double() * (wanted.double() - found.double())).sum())
        same += int((wanted.argmax(1) == found.argmax(1)).sum())
        count += len(window) - 1
    return {"perplexity": math.exp(loss / count), "kl": kl / count, "top1": same / count}


def with_outliers(model: Path, out: Path) -> Path:
    """The same function with large channels: gains and biases of some channels times FACTOR, the columns divided."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    pairs = (("input_layernorm", "attention.query_key_value"), ("post_attention_layernorm", "mlp.dense_h_to_4h"))
    for norm in [name for name in tensors if name.endswith("layernorm.weight")]:
        block = norm.rsplit(".", 2)[0]
        linear = next(f"{block}.{to}.weight" for of, to in pairs if f".{of}." in norm)
        chosen = torch.randperm(len(tensors[norm]), generator=random)[:CHANNELS]
        tensors[norm][chosen] *= FACTOR
        tensors[norm.replace(".weight", ".bias")][chosen] *= FACTOR
        tensors[linear][:, chosen] /= FACTOR
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "neox_lite_manifest.json").unlink(missing_ok=True)
    return out


if __name__ == "__main__":
    main()
