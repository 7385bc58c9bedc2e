"""On a GPU: every kernel against float64, then its speed beside its peers; a JSON and a plot. Nine minutes, no network.

    python benchmarks/gpu.py [--out benchmarks/results] [--minutes 9] [--checks]
    python benchmarks/gpu.py --rehearse          without a GPU: every path once, interpreted, small; its times mean nothing
    python benchmarks/gpu.py --plot FILE.json    draw what was measured elsewhere

Runs from a checkout without installing. Where torch sees no CUDA device it makes the checks that also run on the CPU and exits
with 0 and `"device": null`. Times are medians of replays of a CUDA graph over copies of the weights that together exceed four
times the L2 cache. GB/s count the bytes of weights and scales alone, or of keys and values; the roof is a device-to-device
copy, read and write counted. Peers (torch fp16, torch tinygemm, bitsandbytes, gemlite) multiply the same int4 weights where
their format has them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in (".", "quant", "app")]
if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported

import gpu_checks  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from neox_lite.cache import Batch, PagePool  # noqa: E402
from neox_lite.formats import DENSE, Weight, make_format  # noqa: E402
from neox_lite.kernels import dispatch  # noqa: E402
from neox_lite.kernels.triton import choices  # noqa: E402


@dataclass(frozen=True)
class Sizes:
    """What is timed."""

    shapes: dict[str, tuple[int, int]]  # name -> hidden size, heads
    sweep: tuple[int, ...]
    prefill: tuple[int, ...]
    contexts: tuple[int, ...]
    copy_bytes: int = 1 << 30
    vocabulary: int = 50432


FULL = Sizes(
    {"gpt-neox-20b": (6144, 64), "pythia-6.9b": (4096, 32), "pythia-1.4b": (2048, 16), "pythia-160m": (768, 12)},
    (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64),
    (128, 256, 384, 512, 1024, 2048),
    (128, 1024, 2048),
)
REHEARSAL = Sizes({"small": (128, 2)}, (1, 3), (260,), (10, 130), 1 << 16, 200)


# Timing ---------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of a call, by CUDA graphs and events on a GPU, by the wall in a rehearsal."""

    def __init__(self, device: torch.device, deadline: float) -> None:
        self.device, self.deadline = device, deadline

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Of one call: `calls` do the same work on different memory, one after the other in a graph."""
        for call in calls:
            call()
        if self.device.type != "cuda":
            return self.elapsed(calls[0])
        torch.cuda.synchronize()
        once = self.elapsed(lambda: [call() for call in calls])
        repeats = max(1, min(32, round(3e-4 / once)))  # a graph takes so long that launching it does not show
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                for call in calls:
                    call()
        runs = 20 if once * repeats < 5e-3 else 8
        taken = [self.elapsed(graph.replay) for _ in range(runs + 3)][3:]
        return statistics.median(taken) / (repeats * len(calls))

    def elapsed(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def copy_bandwidth(self, size_bytes: int) -> dict[str, float]:
        """GB/s of a device-to-device copy, read and write counted: the roof that every kernel is compared with."""
        source = torch.empty(size_bytes, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        rates = [2 * size_bytes / self.elapsed(lambda: target.copy_(source)) / 1e9 for _ in range(23)][3:]
        return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def copies_for(device: torch.device, nbytes: int) -> int:
    """How many copies of so many bytes exceed four times the L2 cache, that none is found there when its turn comes again."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(128, -(-4 * cache // nbytes)))


# What is timed --------------------------------------------------------------------------------------------------------


def weight_of(format: str, rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float16) -> Weight:
    """Random codes and scales, made on the device."""
    if format == "dense":
        return Weight(DENSE, (rows, columns), {"weight": torch.randn(rows, columns, device=device, dtype=dtype)})
    kind = make_format(format, 128)
    specs = kind.specs((rows, columns), dtype)
    packed = torch.randint(-(2**31), 2**31 - 1, specs["weight_packed"][1], dtype=torch.int32, device=device)
    scale = (
        (torch.rand(specs["weight_scale"][1], device=device) + 0.5).div_(columns**0.5 * 2 ** (kind.bits - 1)).to(dtype)
    )
    return Weight(kind, (rows, columns), {"weight_packed": packed, "weight_scale": scale})


def read_bytes(*weights: Weight) -> int:
    return sum(t.nbytes for w in weights for t in w.tensors.values())


class Bench:
    """The measurements of one device, by the triton backend."""

    def __init__(self, clock: Clock, sizes: Sizes, ops: Any) -> None:
        self.clock, self.sizes, self.ops, self.device = clock, sizes, ops, clock.device

    def rate(self, calls: Sequence[Callable[[], object]], nbytes: int) -> dict[str, float]:
        seconds = self.clock.seconds(calls)
        return {"us": seconds * 1e6, "gb_per_s": nbytes / seconds / 1e9}

    def x(self, tokens: int, features: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.randn(tokens, features, device=self.device, dtype=dtype)

    def moved(self, x: Tensor, weight: Weight) -> Any:
        """x as the weight reads it; what moving costs belongs to the operation before, and is measured there."""
        return lay(x, self.ops._way(weight, x).layout)

    def pairs(self) -> Iterator[dict[str, Any]]:
        """The two launches of a decode step that read weights: qkv beside h to 4h, dense plus 4h to h; then the head."""
        for shape, (hidden, _) in self.sizes.shapes.items():
            for format in ("int4", "int8"):
                one = weight_of(format, hidden, hidden, self.device)
                copies = range(copies_for(self.device, 5 * read_bytes(one)))  # the smaller launch reads 5
                sets = [self.block(format, hidden) for _ in copies]
                x, residual = self.x(1, hidden), self.x(1, hidden)
                act = self.moved(x, one)
                wide = self.moved(self.x(1, 4 * hidden), sets[0][3])
                for name, calls, nbytes in (
                    (
                        "qkv beside h to 4h",
                        [
                            lambda w=w: self.ops.linears([act, act], w[:2], [None] * 2, [None, "erf"], [None, w[3]])
                            for w in sets
                        ],
                        read_bytes(*sets[0][:2]),
                    ),
                    (
                        "dense plus 4h to h",
                        [lambda w=w: self.ops.sum_linears([act, wide], w[2:], [None] * 2, residual) for w in sets],
                        read_bytes(*sets[0][2:]),
                    ),
                ):
                    yield {"shape": shape, "format": format, "launch": name, **self.rate(calls, nbytes)}
            for format in ("dense", "int8"):
                weights = [weight_of(format, self.sizes.vocabulary, hidden, self.device)]
                more = copies_for(self.device, read_bytes(*weights)) - 1
                weights += [weight_of(format, self.sizes.vocabulary, hidden, self.device) for _ in range(more)]
                ones = torch.ones(hidden, device=self.device).half()
                calls = [lambda w=w: self.ops.head(x, None, (ones, ones, 1e-5), w) for w in weights]
                yield {
                    "shape": shape,
                    "format": format,
                    "launch": "norm and head",
                    **self.rate(calls, read_bytes(weights[0])),
                }

    def block(self, format: str, hidden: int) -> list[Weight]:
        """qkv, h to 4h, dense, 4h to h."""
        rows_and_columns = ((3 * hidden, hidden), (4 * hidden, hidden), (hidden, hidden), (hidden, 4 * hidden))
        return [weight_of(format, *size, self.device) for size in rows_and_columns]

    def tokens(self) -> Iterator[dict[str, Any]]:
        """One weight, h to 4h of the largest shape, for more and more tokens, beside torch's product of plain matrices."""
        for format in ("int4", "int8"):
            weights = self.wide(format)
            for count in (*self.sizes.sweep, *self.sizes.prefill):
                x = self.x(count, weights[0].shape[1])
                for name, make in (("neox-lite", self.ours), ("torch fp16", torch_fp16)):
                    yield {
                        "format": format,
                        "tokens": count,
                        "engine": name,
                        **self.against([make(w) for w in weights], x, weights[0]),
                    }

    def peers(self) -> Iterator[dict[str, Any]]:
        """The same int4 weight by others, those that take longest to tune last."""
        weights = self.wide("int4")
        for name, (make, counts) in PEERS.items():
            try:
                calls = [make(w) for w in weights]
                for count in counts or (*self.sizes.sweep, *self.sizes.prefill):
                    if self.clock.late():
                        return
                    x = self.x(count, weights[0].shape[1])
                    yield {"format": "int4", "tokens": count, "engine": name, **self.against(calls, x, weights[0])}
            except Exception as error:  # not installed, or cannot run here: named with its reason
                yield {"engine": name, "left_out": f"{type(error).__name__}: {error}".splitlines()[0][:300]}

    def wide(self, format: str) -> list[Weight]:
        hidden = next(iter(self.sizes.shapes.values()))[0]
        first = weight_of(format, 4 * hidden, hidden, self.device)
        more = copies_for(self.device, read_bytes(first)) - 1
        return [first, *(weight_of(format, 4 * hidden, hidden, self.device) for _ in range(more))]

    def against(self, calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor, weight: Weight) -> dict[str, float]:
        """Microseconds of calls that take turns, and the error of the first, which has this weight."""
        row = {"us": self.clock.seconds([lambda call=call: call(x) for call in calls]) * 1e6}
        if len(x) <= 64:
            exact = x.double() @ weight.decode(torch.float32).double().T
            row["error_rms"] = float(
                (calls[0](x).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            )
        return row

    def ours(self, weight: Weight) -> Callable[[Tensor], Tensor]:
        moved = once_for_each(lambda x: self.moved(x, weight))
        return lambda x: self.ops.linears([moved(x)], [weight], [None], [None], [None])[0]

    def slices(self) -> Iterator[dict[str, Any]]:
        """How large a piece of a weight should be written out for cuBLAS at a time, and from how many tokens on."""
        hidden = next(iter(self.sizes.shapes.values()))[0]
        weight = weight_of("int4", 4 * hidden, hidden, self.device)
        plain = weight.decode(torch.float16)
        whole, kept = 2 * 4 * hidden * hidden, self.ops.slice_bytes
        machine = self.ops.machine(self.device)
        tiles = type(self.ops)(False, lambda device: TilesAlways(machine.capability))
        for count in self.sizes.prefill:
            x = self.x(count, hidden)
            row = {"tokens": count, "cublas fp16": self.clock.seconds([lambda x=x: torch.mm(x, plain.T)]) * 1e6}
            for name, size in (
                ("8 MB", 8 << 20),
                ("16 MB", 16 << 20),
                ("32 MB", 32 << 20),
                ("64 MB", 64 << 20),
                ("whole", whole),
            ):
                self.ops.slice_bytes = size
                row[f"written out, {name}"] = (
                    self.clock.seconds([lambda x=x: self.ops._by_torch(x, weight, x.dtype)]) * 1e6
                )
            self.ops.slice_bytes = kept
            if machine.tensor_core_dtypes:
                act = lay(x, tiles._way(weight, x).layout)
                calls = [lambda a=act: tiles.linears([a], [weight], [None], [None], [None])]
                row["tiles"] = self.clock.seconds(calls) * 1e6
            yield row

    def attention(self) -> Iterator[dict[str, Any]]:
        """Decode over a context and a prompt, at each shape's heads; bytes are those of keys and values."""
        for shape, (hidden, heads) in self.sizes.shapes.items():
            dim = hidden // heads
            rotary = torch.randn(2, 4096, max(1, dim // 8), device=self.device)
            for kv in (torch.float16, torch.int8):
                for context in self.sizes.contexts:
                    nbytes = 2 * context * hidden * (2 if kv == torch.float16 else 1)
                    layers = copies_for(self.device, nbytes)
                    pool = PagePool(heads, dim, kv, [self.device] * layers)
                    sequence = pool.new()
                    Batch.reserve(pool, [sequence], [context]).commit()
                    for tensor in (*pool.storage, *pool.scales):
                        tensor.fill_(1)
                    batch = Batch.reserve(pool, [sequence], [1])
                    qkv = self.x(1, 3 * hidden)
                    calls = [lambda i=i: self.ops.attend(qkv, pool, i, batch, rotary, None) for i in range(layers)]
                    yield {
                        "shape": shape,
                        "cache": str(kv)[6:],
                        "context": context,
                        "new": 1,
                        **self.rate(calls, nbytes),
                    }
            count = self.sizes.contexts[-1]
            pool = PagePool(heads, dim, torch.float16, [self.device])
            batch, qkv = Batch.reserve(pool, [pool.new()], [count]), self.x(count, 3 * hidden)
            q, k, v = qkv.view(1, count, heads, 3, dim).permute(3, 0, 2, 1, 4)
            row = {"shape": shape, "cache": "float16", "context": 0, "new": count}
            row["us"] = (
                self.clock.seconds([lambda q=qkv, p=pool, b=batch: self.ops.attend(q, p, 0, b, rotary, None)]) * 1e6
            )
            sdpa = [lambda q=q, k=k, v=v: functional.scaled_dot_product_attention(q, k, v, is_causal=True)]
            yield row | {"torch_sdpa_us": self.clock.seconds(sdpa) * 1e6}


class TilesAlways(choices.Machine):
    """A card for which no number of tokens is too large for tiles."""

    tiles_up_to = 1 << 30


def lay(x: Tensor, layout: Any) -> Any:
    """x (tokens, features) moved to where a kernel reads it; words.py has the rule."""
    from neox_lite.kernels.triton.operations import NATURAL, Laid  # imports triton, which a machine may lack

    if layout == NATURAL:
        return x
    features = x.shape[1]
    split = x.view(len(x), features // layout.codes, layout.codes // layout.planes, layout.planes)
    return Laid(layout, (split.permute(0, 3, 1, 2).reshape(len(x), features) * layout.scale).contiguous())


# Peers ----------------------------------------------------------------------------------------------------------------


def torch_fp16(weight: Weight) -> Callable[[Tensor], Tensor]:
    plain = weight.decode(torch.float16)
    return lambda x: torch.mm(x, plain.T)


def codes_of(weight: Weight) -> Tensor:
    """(out, in) uint8, 8 for zero."""
    from neox_lite.formats.group_int import unpack

    return (unpack(weight.tensors["weight_packed"], 4) + 8).to(torch.uint8)


def torch_tinygemm(weight: Weight) -> Callable[[Tensor], Tensor]:
    """torch's own int4 product: bfloat16, (code - 8) * scale + zero."""
    codes = codes_of(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], 8)
    scale = weight.tensors["weight_scale"].bfloat16().T
    scales_and_zeros = torch.stack((scale, torch.zeros_like(scale)), -1).contiguous()
    brain = once_for_each(lambda x: x.bfloat16())  # what makes x would make it so
    return lambda x: torch.ops.aten._weight_int4pack_mm(brain(x), packed, 128, scales_and_zeros)


def gemlite(weight: Weight) -> Callable[[Tensor], Tensor]:
    from gemlite import DType, GemLiteLinear

    rows, columns = weight.shape
    layer = GemLiteLinear(
        4, group_size=128, in_features=columns, out_features=rows, input_dtype=DType.FP16, output_dtype=DType.FP16
    )
    scale = weight.tensors["weight_scale"].contiguous()
    layer.pack(codes_of(weight), scale, torch.full_like(scale, 8), bias=None)
    return layer


def bitsandbytes_nf4(weight: Weight) -> Callable[[Tensor], Tensor]:
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(weight.decode(torch.float16), blocksize=64, quant_type="nf4")
    return lambda x: bitsandbytes.matmul_4bit(x, packed.t(), state)


PEERS: dict[str, tuple[Callable[[Weight], Callable[[Tensor], Tensor]], tuple[int, ...]]] = {
    "torch tinygemm": (torch_tinygemm, ()),  # () is every number of tokens
    "bitsandbytes nf4": (bitsandbytes_nf4, ()),  # its error is that of 16 other levels
    "gemlite": (gemlite, (2, 8, 16, 64, 1, 4, 32)),  # tunes itself for each
}


def once_for_each(make: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """`make`, computed again only for another tensor."""
    held: list[Any] = [None, None]

    def get(x: Tensor) -> Any:
        if held[0] is not x:
            held[:] = x, make(x)
        return held[1]

    return get


# The report -----------------------------------------------------------------------------------------------------------


def describe() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "device": None}
    found["packages"] = {name: version(name) for name in ("triton", "gemlite", "bitsandbytes")}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        driver = Path("/proc/driver/nvidia/version")
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        }
    return found


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def measure(result: dict[str, Any], bench: Bench, copy: dict[str, float], keep: Callable[[], object]) -> None:
    """Fill `result`, kept after each section; one that time runs out for, or that fails, is named in left_out."""
    result["copy_gb_per_s"] = copy
    for name in ("pairs", "attention", "slices", "tokens", "peers"):
        if bench.clock.late():
            result["left_out"][name] = "no time was left"
            continue
        start, rows = time.monotonic(), []
        result[name] = rows
        try:
            for row in getattr(bench, name)():
                if "gb_per_s" in row:
                    row["share_of_copy"] = row["gb_per_s"] / copy["median"]
                rows.append(row)
                print(f"{name}: {json.dumps(row)}", file=sys.stderr)
                if bench.clock.late():
                    result["left_out"][f"rest of {name}"] = "no time was left"
                    break
        except Exception as error:
            result["left_out"][f"rest of {name}"] = f"{type(error).__name__}: {error}"[:400]
            result["ok"] = False
        result["section_s"][name] = time.monotonic() - start
        keep()


def plot(result: dict[str, Any], path: Path) -> None:
    """Share of copy bandwidth at one token, tokens against time beside peers, prefill against cuBLAS."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(16, 5))
    rows = [r for r in result.get("pairs", []) if "share_of_copy" in r]
    names = [f"{r['shape']} {r['format']}\n{r['launch']}" for r in rows]
    left.barh(names[::-1], [100 * r["share_of_copy"] for r in rows][::-1], color="tab:orange")
    left.axvline(100, color="black", linewidth=0.8)
    left.set_title("one token: weight bytes a second,\n% of a device copy", fontsize=10)
    left.tick_params(axis="y", labelsize=6)
    measured = [*result.get("tokens", []), *result.get("peers", [])]
    found = sorted((r for r in measured if r.get("format") == "int4"), key=lambda r: r["tokens"])
    for engine in dict.fromkeys(r["engine"] for r in found):
        points = [(r["tokens"], r["us"]) for r in found if r["engine"] == engine]
        color = "tab:orange" if engine == "neox-lite" else None
        middle.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=engine, color=color)
    middle.set_title("int4 h to 4h: microseconds by tokens", fontsize=10)
    middle.legend(fontsize=8)
    slices = result.get("slices", [])
    for name in dict.fromkeys(key for row in slices for key in row if key != "tokens"):
        points = [(r["tokens"], r["cublas fp16"] / r[name]) for r in slices if name in r]
        right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    right.set_title("prompts: speed relative to cuBLAS fp16", fontsize=10)
    right.legend(fontsize=8)
    middle.set_xlabel("tokens")
    right.set_xlabel("tokens")
    figure.suptitle(f"{result['device']}, torch {result['torch']}, triton {result['packages']['triton']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the JSON and the plot")
    parser.add_argument(
        "--minutes", type=float, default=9, help="sections that would start later are left out (default 9)"
    )
    parser.add_argument("--checks", action="store_true", help="correctness only")
    parser.add_argument("--rehearse", action="store_true", help="every path once, in Triton's interpreter")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw this file's plot")
    args = parser.parse_args()
    if args.plot:
        plot(json.loads(args.plot.read_text()), args.plot.with_suffix(".png"))
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_grad_enabled(False)
    begun = time.monotonic()
    cuda = torch.cuda.is_available() and not args.rehearse
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    result = describe() | {"rehearsal": args.rehearse, "left_out": {}, "section_s": {}}
    if not cuda and not args.rehearse:
        print("no CUDA device: only the checks that also run on the CPU are made", file=sys.stderr)
    declined = dispatch.reasons(device)
    result["declined"] = {name: reason for name, reason in declined.items() if reason is not None}
    cases = (
        gpu_checks.cases_interpreted if args.rehearse else gpu_checks.cases_on_gpu if cuda else gpu_checks.cases_on_cpu
    )
    result["checks"] = gpu_checks.check_all(list(cases()), device)
    result["section_s"]["checks"] = time.monotonic() - begun
    result["ok"] = all(check["ok"] for check in result["checks"])
    for check in result["checks"]:
        if not check["ok"]:
            print(f"WRONG: {json.dumps(check)}", file=sys.stderr)
    path = None
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        name = "rehearsal" if args.rehearse else (result["device"] or "no device").lower().replace(" ", "_")
        path = args.out / f"gpu_{name}.json"

    def keep() -> str:
        text = json.dumps(result, indent=1)
        if path:
            path.write_text(text + "\n")
        return text

    keep()  # whatever befalls the rest
    if not args.checks and (args.rehearse or (cuda and "triton" not in result["declined"])):
        sizes, clock = REHEARSAL if args.rehearse else FULL, Clock(device, begun + 60 * args.minutes)
        bench = Bench(clock, sizes, dispatch.load("triton").bind(False))
        measure(result, bench, clock.copy_bandwidth(sizes.copy_bytes), keep)
    print(keep())
    if path and "copy_gb_per_s" in result:
        try:
            plot(result, path.with_suffix(".png"))
        except ImportError:
            print("no plot: matplotlib is not installed; --plot draws it elsewhere", file=sys.stderr)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
