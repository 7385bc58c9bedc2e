"""Correctness of the GPU paths against float64, then the device's copy bandwidth; one JSON object on stdout and in a file.

    python benchmarks/gpu.py [--out benchmarks/results/gpu.json]

Runs from a checkout without installing. Where torch sees no CUDA device it says so and exits 0 with `"device": null`. Timings
are medians of CUDA-event measurements; bandwidth counts bytes read plus bytes written.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in (".", "quant", "app")]

import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM  # noqa: E402
from neox_lite.cache import Batch, PagePool  # noqa: E402
from neox_lite.formats import DENSE, FORMATS, Weight, make_format  # noqa: E402
from neox_lite.kernels import dispatch  # noqa: E402
from neox_lite.layers import Rotary  # noqa: E402

SHAPE = {
    "hidden_size": 384,
    "num_attention_heads": 4,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "vocab_size": 1003,
}
# Largest |error| / rms of the float64 result that sums of products in the dtype explain, with a factor of about 4 of slack.
BOUNDS = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    result: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "device": None}
    if torch.cuda.is_available():
        result |= describe_device()
    else:
        print("no CUDA device: only the checks that also run on the CPU are made", file=sys.stderr)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result["checks"] = check_all(device)
    result["ok"] = all(check["ok"] for check in result["checks"])
    if device.type == "cuda":
        result["copy_gb_per_s"] = copy_bandwidth(device)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    return 0 if result["ok"] else 1


def describe_device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "triton": package_version("triton"),
    }


def driver_version() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.exists() else None


def package_version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# Correctness ----------------------------------------------------------------------------------------------------------


def check_all(device: torch.device) -> list[dict[str, Any]]:
    """Every backend that runs on the device, every operation and the whole model, against float64 on the CPU."""
    found = []
    for name, reason in dispatch.reasons(device).items():
        if reason is not None:
            found.append({"backend": name, "check": "runs here", "ok": True, "skipped": reason})
            continue
        ops = dispatch.load(name).bind(exact=True)
        for dtype in BOUNDS if device.type == "cuda" else [torch.float32]:  # activations on the CPU are float32
            for format in ("dense", *FORMATS):
                found.append(check_linear(ops, name, format, dtype, device))
            found.append(check_attention(ops, name, dtype, device))
            found.append(check_norm(ops, name, dtype, device))
            found.append(check_model(name, dtype, device))
    return found


def verdict(backend: str, check: str, dtype: torch.dtype, found: torch.Tensor, exact: torch.Tensor) -> dict[str, Any]:
    error = (found.double().cpu() - exact).abs().max().item() / exact.square().mean().sqrt().item()
    return {
        "backend": backend,
        "check": check,
        "dtype": str(dtype).removeprefix("torch."),
        "max_error_over_rms": error,
        "ok": bool(error < BOUNDS[dtype]),
    }


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_linear(ops: Any, backend: str, format: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    weight, x = random(515, 384) / 20, random(7, 384, seed=1).to(dtype)
    kind = DENSE if format == "dense" else make_format(format, 128)
    stored = kind.encode(weight, dtype, kind.methods[0])
    exact = x.double() @ kind.decode(stored, torch.float32).double().T
    on_device = Weight(kind, (515, 384), {k: t.to(device) for k, t in stored.items()})
    (found,) = ops.linears([x.to(device)], [on_device], [None], [None], [None])
    return verdict(backend, f"linear {format}", dtype, found, exact)


def check_norm(ops: Any, backend: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    x, gain, bias = random(5, 384).to(dtype), random(384, seed=1).to(dtype), random(384, seed=2).to(dtype)
    exact = functional.layer_norm(x.double(), (384,), gain.double(), bias.double(), 1e-5)
    weight = Weight(DENSE, (1, 384), {"weight": torch.zeros(1, 384, dtype=dtype, device=device)})
    (found,) = ops.norms(x.to(device), [(gain.to(device), bias.to(device), 1e-5)], [weight])
    return verdict(backend, "norm", dtype, found, exact)


def check_attention(ops: Any, backend: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    heads, head_dim, tokens = 4, 96, 150
    config = GPTNeoXConfig(**SHAPE, max_position_embeddings=256)
    qkv = random(tokens, heads * 3 * head_dim).to(dtype)
    pool = PagePool(heads, head_dim, dtype, [device])
    pool.reserve(sequence := pool.new(), tokens)
    for storage in pool.storage:
        storage.fill_(float("nan"))  # reading a slot that was never written shows
    batch = Batch.reserve(pool, [sequence], [tokens])
    table = Rotary(config).table
    weight = Weight(DENSE, (384, 384), {"weight": torch.zeros(384, 384, dtype=dtype, device=device)})
    found = ops.attend(qkv.to(device), pool, 0, batch, table.to(device), weight)
    return verdict(backend, "attention", dtype, found, exact_attention(qkv.double(), table.double(), heads, head_dim))


def exact_attention(qkv: torch.Tensor, table: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    tokens = len(qkv)
    q, k, v = qkv.view(tokens, heads, 3, head_dim).unbind(2)
    cos, sin = (t[:tokens, None] for t in table)
    half = cos.shape[-1]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]), -1)

    scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / head_dim**0.5
    scores.masked_fill_(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def check_model(backend: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Logits of a small model on the device against the same weights in float64, or float32 where that is the dtype."""
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)).to(dtype)
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 140), generator=torch.Generator().manual_seed(1))
    exact = model.float()(ids).logits.double()
    found = model.to(dtype).to(device)(ids.to(device)).logits
    return verdict(backend, "model logits", dtype, found, exact)


# Speed ----------------------------------------------------------------------------------------------------------------


def copy_bandwidth(device: torch.device, size_bytes: int = 1 << 30, runs: int = 20) -> dict[str, float]:
    """GB/s of a device-to-device copy, read and write counted: the roof that every kernel is compared with."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    rates = []
    for i in range(runs + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            rates.append(2 * size_bytes / (start.elapsed_time(end) / 1e3) / 1e9)
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


if __name__ == "__main__":
    sys.exit(main())
