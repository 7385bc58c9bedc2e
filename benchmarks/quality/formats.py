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
import shutil
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.common import DEMO, command_line, write_json
from benchmarks.quality import peers
from neox_lite import GPTNeoXForCausalLM
from neox_lite.formats import make_format
from neox_lite_app.demo import CONTEXT
from neox_lite_app.evaluation import quality
from neox_lite_quant import convert

FACTOR, CHANNELS = 30.0, 6  # of the outlier variant: gains times this, of so many channels of each norm
METHODS = ("rtn", "mse", "balance", "gptq")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--text", type=Path, help="to score (default: the model folder's heldout.txt)")
    parser.add_argument("--outliers", action="store_true", help="of the same function with large channels")
    parser.add_argument("--peers", action="store_true", help="other tools' formats too")
    parser.add_argument("--windows", type=int, default=128, help="of 128 tokens that gptq is calibrated with")
    parser.add_argument("--scored", type=int, help="windows of 256 tokens to score (default: all)")
    parser.add_argument("--activations", action="store_true", help="measure int8 activations too")
    parser.add_argument("--calibration", type=Path, help="another gptq row for int4 g128, calibrated with this text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = with_outliers(args.model, Path(scratch) / "outliers") if args.outliers else args.model
        result = measure(folder, args, Path(scratch))
    if args.out:
        write_json(args.out, result)


def measure(folder: Path, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    source = GPTNeoXForCausalLM.from_pretrained(folder)
    text = (args.text or args.model / "heldout.txt").read_text(encoding="utf-8")
    windows = quality.cut(source, text, CONTEXT)[: args.scored]
    truth = torch.stack(list(quality.log_probabilities(source, windows)))
    rows = [{"name": "fp16", "method": None, "bits_per_weight": 16.0, **distance(truth, source, windows)}]
    for row, quantized in quantizations(folder, args, scratch):
        exact = GPTNeoXForCausalLM.from_pretrained(quantized, exact=True, dtype=torch.float32)
        row |= distance(truth, exact, windows)
        if args.activations and row["method"] in METHODS:
            rounded = GPTNeoXForCausalLM.from_pretrained(quantized)
            row["kl_int8_activations"] = distance(truth, rounded, windows)["kl"]
        rows.append(row)
        shutil.rmtree(quantized)
        print(f"{row['name']:<28} {row['bits_per_weight']:.3f} bits  KL {row['kl']:.6f}", flush=True)
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

    def row(name: str, method: str, bits: float) -> tuple[dict[str, Any], Path]:
        return {"name": name, "method": method, "bits_per_weight": bits}, out

    def bits_of(format: str, group_size: int) -> float:
        return make_format(format, group_size).bits_per_weight(torch.float16)

    for format, group_size, method in product(("int8", "int4"), (32, 64, 128), METHODS):
        count = args.windows if method == "gptq" else None
        convert(folder, out, format, group_size, method, calibration_windows=count)
        yield row(f"{format}-g{group_size}-{method}", method, bits_of(format, group_size))
    if args.calibration:
        convert(folder, out, "int4", 128, "gptq", calibration=args.calibration, calibration_windows=args.windows // 4)
        yield row(f"int4-g128-gptq, calibrated with {args.calibration.name}", "gptq", bits_of("int4", 128))
    for name, bits, note in peers.quantized(folder, out) if args.peers else ():
        yield row(name, note, bits)


def distance(truth: Tensor, model: GPTNeoXForCausalLM, windows: Tensor) -> dict[str, float]:
    """KL, perplexity and top-1 agreement on the windows, whose true log-probabilities are (n, context - 1, vocabulary)."""
    found = quality.measure(model, windows, quality.log_probabilities(model, windows), iter(truth), "")
    return {"perplexity": found.perplexity, "kl": found.kl, "top1": found.top1}


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
