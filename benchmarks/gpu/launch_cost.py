"""What Python costs a decode step on a GPU beside the kernels: measured without one, with every launch replaced by nothing.

    python -m benchmarks.gpu.launch_cost [--steps 30] [--out benchmarks/results/launch_cost.json]

The model has the shape of a real one and memory that nothing touches; its decode steps by the triton backend run on the host.
What is timed is all that Python does up to Triton's own launcher: that is left out, as is what the driver does then. Each
figure is the processor's time, the median of the fastest quarter of the steps. With a graph the host fills tables, gives two
copies and a replay to the device, and reads tokens; here the copies are the host's own, and the replay is nothing.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks.common import command_line, machine, write_json
from neox_lite import GPTNeoXForCausalLM
from neox_lite.cache import Batch
from neox_lite.formats import make_format
from neox_lite.kernels.backend import DeviceSampling
from neox_lite.kernels.triton import device_calls, operations
from neox_lite.kernels.triton.device import DeviceProperties
from neox_lite.layers import Linear
from neox_lite_app.models.random_model import config_of

SHAPES = ("pythia-160m", "pythia-1.4b", "20b")
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
    mm, device_calls.mm = device_calls.mm, NoLaunch(count)
    try:
        yield count
    finally:
        kernels.__getitem__, device_calls.mm = getitem, mm


def model_of(shape: str) -> GPTNeoXForCausalLM:
    """int4 with groups of 128, of memory that nothing touches."""
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config_of(shape)).half()
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
    return statistics.median(fastest(taken))


def measure(shape: str, steps: int) -> Iterator[dict[str, Any]]:
    """Microseconds of a step, launch by launch and as a graph, for one sequence and eight; then operation by operation."""
    model = model_of(shape)
    card = DeviceProperties((8, 0))
    model.ops = ops = operations.Operations(False, lambda _: card, graphs=lambda _: NoGraphs())
    with without_launches() as count:
        for rows in (1, 8):
            pool = model.new_pool(rows * 16)
            block_tables = [pool.new() for _ in range(rows)]
            Batch.reserve(pool, block_tables, [CONTEXT] * rows).commit()
            steps_of = {
                False: partial(eager, model, pool, block_tables),
                True: partial(graph, model, pool, block_tables),
            }
            for step in steps_of.values():
                step()
            count.clear()
            steps_of[False]()
            row = {"shape": shape, "sequences": rows, "launches": count["launches"]}
            row["python_us"] = 1e6 * seconds(steps_of[False], steps)
            row["python_us_with_graph"] = 1e6 * seconds(steps_of[True], steps)
            row["operations_us"] = by_operation(steps_of[False], ops, steps)
            yield row


def eager(model: Any, pool: Any, block_tables: list[Any]) -> None:
    model.graph = False
    model.step(pool, block_tables, [[1]] * len(block_tables))


def graph(model: Any, pool: Any, block_tables: list[Any]) -> None:
    model.graph = True
    flight = model.launch(pool, block_tables, [1] * len(block_tables), [DeviceSampling()] * len(block_tables))
    assert flight is not None
    flight.tokens()


def by_operation(eager: Callable[[], object], ops: Any, steps: int) -> dict[str, float]:
    """Of a step launched kernel by kernel: microseconds inside each operation, all layers together."""
    spent: Counter[str] = Counter()

    def timed(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            began = time.thread_time_ns()
            try:
                return real(*given)
            finally:
                spent[name] += time.thread_time_ns() - began

        return call

    found: dict[str, list[int]] = {name: [] for name in OPERATIONS}
    with ExitStack() as stack:
        for name in OPERATIONS:
            stack.enter_context(mock.patch.object(ops, name, timed(name, getattr(ops, name))))
        for _ in range(steps):
            spent.clear()
            eager()
            for name, taken in found.items():
                taken.append(spent[name])
    return {name: statistics.median(fastest(taken)) / 1e3 for name, taken in found.items()}


def fastest(taken: list[Any]) -> list[Any]:
    """The fastest quarter."""
    return sorted(taken)[: max(1, len(taken) // 4)]


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=30, help="that are timed (default 30)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in args.shapes:
        for row in measure(shape, args.steps):
            rows.append(row)
            inside = ", ".join(f"{name} {us:.0f}" for name, us in row["operations_us"].items())
            eager, graph = row["python_us"], row["python_us_with_graph"]
            what = f"{shape:13} {row['sequences']:2} sequences: {row['launches']} launches"
            print(f"{what}, Python {eager:.0f} µs ({inside}); with a graph {graph:.0f} µs")
    if args.out:
        about = {"what": "Python's time with launches replaced by nothing; no GPU", "processor": machine()["cpu"]}
        write_json(args.out, about | {"torch": torch.__version__, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
