"""What Python costs a decode step on a GPU beside the kernels: measured without one, with every launch replaced by nothing.

    python -m benchmarks.gpu.launch_cost [--steps 30] [--out benchmarks/results/launch_cost.json]

The model has the shape of a real one and memory that nothing touches; its decode steps by the triton backend run on the host.
What is timed is all that Python does up to Triton's own launcher: that is left out, as is what the driver does then. Each
figure is the processor's time, the median of the fastest quarter of the steps. With a graph the host fills tables, gives two
copies and a replay to the device, and reads tokens; here the copies are the host's own, and the replay is nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.cache import Batch
from neox_lite.formats import make_format
from neox_lite.kernels.backend import DeviceSampling
from neox_lite.kernels.triton import operations, tile_configs
from neox_lite.layers import Linear

SHAPES = {  # layers, hidden size, heads, vocabulary
    "pythia-160m": (12, 768, 12, 50304),
    "pythia-1.4b": (24, 2048, 16, 50304),
    "gpt-neox-20b": (44, 6144, 64, 50432),
}
CONTEXT = 1000  # tokens before those that are timed
OPERATIONS = ("embed", "layer_norms", "grouped_linear", "attention", "linear_residual", "head")


class NoLaunch:
    """A kernel that counts how often it would have been launched."""

    def __init__(self, count: Counter[str]) -> None:
        self.count = count

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.count["launches"] += 1


class NoGraphs:
    """`steps.Graphs` whose replays are nothing."""

    def capture(self, step: Callable[[], object]) -> Callable[[], object]:
        step()
        return lambda: None

    def staging(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def mark(self) -> None: ...

    def wait(self, mark: None) -> None: ...


@contextmanager
def without_launches() -> Iterator[Counter[str]]:
    count: Counter[str] = Counter()
    kernels = triton.runtime.KernelInterface
    getitem, kernels.__getitem__ = kernels.__getitem__, lambda kernel, grid: NoLaunch(count)
    mm, operations._mm = operations._mm, NoLaunch(count)
    try:
        yield count
    finally:
        kernels.__getitem__, operations._mm = getitem, mm


def model_of(shape: str) -> GPTNeoXForCausalLM:
    """int4 with groups of 128, of memory that nothing touches."""
    layers, hidden, heads, vocabulary = SHAPES[shape]
    config = GPTNeoXConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden,
        vocab_size=vocabulary, max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config).half()
        for linear in (m for block in model.gpt_neox.blocks for m in block.modules() if isinstance(m, Linear)):
            linear.become(make_format("int4", 128), torch.float16)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    empty = torch.empty_like(tensor, device="cpu")
                    tensors[name] = torch.nn.Parameter(empty, False) if tensors is module._parameters else empty
    return model


def seconds(call: Callable[[], object], steps: int) -> float:
    taken = []
    for _ in range(steps):
        began = time.thread_time()
        call()
        taken.append(time.thread_time() - began)
    return statistics.median(sorted(taken)[: max(1, steps // 4)])


def measure(shape: str, steps: int) -> Iterator[dict[str, Any]]:
    """Microseconds of a step, launch by launch and as a graph, for one sequence and eight; then operation by operation."""
    model, ops = (
        model_of(shape),
        operations.Operations(False, lambda _: tile_configs.Machine((8, 0)), graphs=lambda _: NoGraphs()),
    )
    model.ops = ops
    with without_launches() as count:
        for rows in (1, 8):
            pool = model.new_pool(rows * 16)
            block_tables = [pool.new() for _ in range(rows)]
            Batch.reserve(pool, block_tables, [CONTEXT] * rows).commit()

            def eager(pool: Any = pool, block_tables: Any = block_tables, rows: int = rows) -> None:
                model.graph = False
                model.step(pool, block_tables, [[1]] * rows)

            def graph(pool: Any = pool, block_tables: Any = block_tables, rows: int = rows) -> None:
                model.graph = True
                flight = model.launch(pool, block_tables, [1] * rows, [DeviceSampling()] * rows)
                assert flight is not None
                flight.tokens()

            eager()
            count.clear()
            eager()
            row = {"shape": shape, "sequences": rows, "launches": count["launches"]}
            row["python_us"] = 1e6 * seconds(eager, steps)
            graph()
            row["python_us_with_graph"] = 1e6 * seconds(graph, steps)
            row["operations_us"] = by_operation(eager, ops, steps)
            yield row


def by_operation(eager: Callable[[], object], ops: Any, steps: int) -> dict[str, float]:
    """Of a step launched kernel by kernel: microseconds inside each operation, all layers together."""
    spent: Counter[str] = Counter()

    def timed(name: str) -> Callable[..., Any]:
        real = getattr(ops, name)

        def call(*given: Any) -> Any:
            began = time.thread_time()
            try:
                return real(*given)
            finally:
                spent[name] += time.thread_time() - began  # type: ignore[assignment]

        return call

    found: dict[str, list[float]] = {name: [] for name in OPERATIONS}
    for name in OPERATIONS:
        setattr(ops, name, timed(name))
    try:
        for _ in range(steps):
            spent.clear()
            eager()
            for name in OPERATIONS:
                found[name].append(spent[name])
    finally:
        for name in OPERATIONS:
            delattr(ops, name)
    return {name: 1e6 * statistics.median(sorted(taken)[: max(1, steps // 4)]) for name, taken in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="that are timed (default 30)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, help="write a JSON there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in args.shapes:
        for row in measure(shape, args.steps):
            rows.append(row)
            inside = ", ".join(f"{name} {us:.0f}" for name, us in row["operations_us"].items())
            print(
                f"{shape:13} {row['sequences']:2} sequences: {row['launches']} launches, Python {row['python_us']:.0f} µs "
                f"({inside}); with a graph {row['python_us_with_graph']:.0f} µs"
            )
    if args.out:
        about = {"what": "Python's time with launches replaced by nothing; no GPU", "processor": platform.processor()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(about | {"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
