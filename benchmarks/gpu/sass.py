"""What the compiler makes of the Triton kernels, for cards that need not be there: registers, spills, loads, instructions.

    python -m benchmarks.gpu.sass [--cards 75 80 86 89 90 120] [--all] [--candidates] [--out benchmarks/results/sass.json]

A layer of GPT-NeoX-20B and its head run on tensors without memory, once for each number of tokens. Every launch is compiled for
the card exactly as it would be there (same specialization, same options), not run; its machine code is then counted, and what
breaks a rule (`broken`) is named. Exits with 1 if anything does. --candidates does so with every size that tuning may pick, and
writes a summary.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.common import command_line, write_json
from neox_lite import GPTNeoXConfig
from neox_lite.cache import Batch, PagePool
from neox_lite.formats import DENSE, Weight, make_format
from neox_lite.kernels.triton import tile_configs
from neox_lite.kernels.triton.device import DeviceProperties
from neox_lite.kernels.triton.operations import Operations
from neox_lite.kernels.triton.steps import Inputs, Tables
from neox_lite.layers import GPTNeoXLayer, Linear, Rotary, norm_of

CARDS = (75, 80, 86, 89, 90, 120)
SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
META = torch.device("meta")
TENSOR_CORE_KERNELS = ("gemm", "paged_prefill")


@dataclass(frozen=True)
class Run:
    """What the model is given: `sequences` of `new` tokens after `old` ones, weights of a format, activations of a dtype."""

    name: str
    sequences: int = 1
    new: int = 1
    old: int = 0
    format: str = "int4"
    group: int = 128
    dtype: torch.dtype = torch.float16
    exact: bool = False
    kv: torch.dtype | None = None
    head: str = "fp16"
    config: str = "gpt-neox-20b"


SIZES = {  # hidden size, heads, vocabulary
    "gpt-neox-20b": (6144, 64, 50432),
    "pythia-160m": (768, 12, 50304),
    "pythia-1.4b": (2048, 16, 50304),
    "pythia-2.8b": (2560, 32, 50304),
    "dolly-v1": (4096, 16, 50400),
}
OTHERS = tuple(SIZES)[1:]
FEW = (
    Run("decode", old=100),
    Run("decode, long", old=2000),
    Run("batch of 16", sequences=16, old=2000),
    Run("prefill 256", new=256),
    Run("prefill 2048", new=2048),
)
INT8 = {"format": "int8", "head": "int8"}
ALL = (
    *FEW,
    Run("prefill 64", new=64),
    *(Run(f"decode, int4 g{g}", group=g, old=100) for g in (32, 64)),
    *(Run(f"batch of 16, int4 g{g}", sequences=16, group=g, old=100) for g in (32, 64)),
    *(Run(f"decode, int8 g{g}", group=g, old=100, **INT8) for g in (32, 64, 128)),
    *(Run(f"batch of 16, int8 g{g}", sequences=16, group=g, old=100, **INT8) for g in (32, 64, 128)),
    *(Run(f"prefill {n}, int8", new=n, **INT8) for n in (256, 2048)),
    Run("two sequences", sequences=2, old=2000),
    *(Run(f"batch of {n}", sequences=n, old=2000) for n in (4, 32, 64)),
    Run("decode, exact", exact=True, old=100),
    *(Run(f"decode, {d}", dtype=getattr(torch, d), old=100) for d in ("bfloat16", "float32")),
    Run("decode, bfloat16, long", dtype=torch.bfloat16, old=2000),
    Run("batch of 16, bfloat16", sequences=16, dtype=torch.bfloat16, old=100),
    Run("prefill 256, bfloat16", new=256, dtype=torch.bfloat16),
    Run("decode, int8 KV", kv=torch.int8, old=2000),
    Run("prefill 64, int8 KV", new=64, kv=torch.int8),
    *(Run(f"decode, {c}", config=c, old=2000) for c in OTHERS),
    *(Run(f"batch of 16, {c}", config=c, sequences=16, old=2000) for c in OTHERS),
    *(Run(f"prefill 64, {c}", config=c, new=64) for c in OTHERS),
)


class Card:
    """A driver, as Triton asks one, of a card that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return META


@contextmanager
def recorded(capability: int, found: Callable[[Any, dict[str, Any]], None]) -> Iterator[None]:
    """Launches inside are compiled for the card and given to `found` with their arguments by name; none is run."""
    real = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = real(self, *args, grid=grid, warmup=True, **kwargs)
        found(kernel, dict(zip(self.arg_names, args, strict=False)) | kwargs)
        return kernel

    driver.set_active(Card(capability))
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = real


@dataclass(frozen=True)
class Nth:
    """Picks the candidate of this number, counted round, for every kernel."""

    number: int

    def pick(self, candidates: tile_configs.Candidates, launch: object) -> Any:
        return candidates.tiles[self.number % len(candidates.tiles)]


def step(run: Run, ops: Operations) -> None:
    """One layer and the two ends, on tensors without memory."""
    hidden, heads, vocabulary = SIZES[run.config]
    config = GPTNeoXConfig(
        hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden, vocab_size=vocabulary,
        num_hidden_layers=1, max_position_embeddings=4096,
    )  # fmt: skip
    format, head_format = make_format(run.format, run.group), make_format("int8", 128) if run.head == "int8" else DENSE
    tokens = run.sequences * run.new
    with META:
        layer = GPTNeoXLayer(config, 0, lambda name: format).to(run.dtype)
        for linear in (m for m in layer.modules() if isinstance(m, Linear)):
            linear.become(format, run.dtype)
        norm = norm_of(torch.nn.LayerNorm(hidden, dtype=run.dtype))
        shape = (config.vocab_size, hidden)
        tensors = {k: torch.empty(s, dtype=d) for k, (d, s) in head_format.specs(shape, run.dtype).items()}
        ids, embedding = torch.empty(tokens, dtype=torch.long), torch.empty(shape, dtype=run.dtype)
    x = ops.embed(ids, embedding, ops.activation_dtype(run.dtype, META))
    pool = PagePool(config.num_attention_heads, config.head_dim, run.kv or x.dtype, [META])
    block_tables = [pool.new() for _ in range(run.sequences)]
    if run.old:
        Batch.reserve(pool, block_tables, [run.old] * run.sequences).commit()
    batch = Batch.reserve(pool, block_tables, [run.new] * run.sequences)
    x = layer(x, ops, pool, batch, Rotary(config).table.to(META))
    logits = ops.head(x[: run.sequences], None, norm, Weight(head_format, shape, tensors))
    if run.new == 1:
        tables = Tables.cut(torch.empty(Tables.bytes_for(1), dtype=torch.uint8, device=META), 1)
        chosen, excluded = torch.empty_like(ids), torch.empty(len(embedding), dtype=torch.int8, device=META)
        ops._sample(logits, Inputs(run.sequences, 1, 1, ids, *tables, chosen, excluded, logits))


@dataclass
class Facts:
    """Of one kernel's machine code. Loads, barriers and instructions a weight are those of its longest loop."""

    run: str
    kernel: str
    card: int
    warps: int
    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    instructions: int
    loop: int
    per_weight: float | None
    loads: dict[str, int]
    barriers: int
    tensor_core: int
    halves: bool  # one token as halves, the usual decode step
    float32: bool


def facts(run: str, card: int, kernel: Any, given: dict[str, Any]) -> Facts:
    """Count the instructions of a compiled kernel that was launched with the arguments `given`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        options = {"capture_output": True, "text": True, "check": True}
        text = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], **options).stdout
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], **options).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    code, loops = parse(text)
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    inside = code[first:last]
    weights = weights_of_iteration(inside, given)
    return Facts(
        run=run,
        kernel=kernel.metadata.name,
        card=card,
        warps=kernel.metadata.num_warps,
        registers=registers,
        spills=sum(name.startswith(("STL", "LDL")) for name in code),
        stack_bytes=stack,
        shared_bytes=kernel.metadata.shared,
        instructions=len(code),
        loop=len(inside),
        per_weight=round(len(inside) / weights, 2) if weights else None,
        loads=dict(Counter(name for name in inside if name.startswith(("LDG.", "LDGSTS")))),
        barriers=sum(name.startswith("BAR") for name in inside),
        tensor_core=sum(name.startswith(("HMMA", "HGMMA")) for name in code),
        halves=given.get("COMPUTE") == "half2" and given["BLOCK_M"] == 1,
        float32=given.get("COMPUTE_DTYPE") == triton.language.float32,
    )


def parse(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """nvdisasm's text -> the names of all instructions, and where loops begin and end."""
    labels: dict[str, int] = {}
    code: list[str] = []
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x?_?\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instruction = re.sub(r"^@!?U?P\w+\s+", "", found[1].strip())
            if instruction.startswith("BRA") and (target := re.search(r"`\((\.L_x?_?\d+)\)", instruction)):
                jumps.append((len(code), target[1]))
            code.append(instruction.split()[0])
    loops = [(labels[to], at + 1) for at, to in jumps if labels.get(to, at) < at]
    return code, [loop for loop in loops if loop[1] - loop[0] > 2]  # the jump to itself at the end is padding


def weights_of_iteration(loop: list[str], given: dict[str, Any]) -> float | None:
    """How many weights a thread multiplies in the loop of a product; None for other kernels, or where it is unrolled away."""
    if "BITS" not in given:
        return None
    streamed = [name for name in loop if name.startswith("LDG") and ".EF" in name]  # only weights are loaded so
    if streamed:
        bits = given["BITS"] or 8 * given["w1_ptr"].element_size()
        return sum(load_bits(name) for name in streamed) / bits
    if "BLOCK_K" in given and "BLOCK_M" in given:
        return given["BLOCK_N"] * given["BLOCK_K"] * (32 // given["BITS"]) / (32 * given["num_warps"])
    return None


def load_bits(name: str) -> int:
    """How many bits a load instruction brings to a thread."""
    width = re.search(r"\.U?(8|16|64|128)(\.|$)", name)
    return int(width[1]) if width else 32


def broken(row: Facts) -> list[str]:
    """The rules that a kernel breaks."""
    product = row.kernel in ("grouped_gemv", "gemv_residual")
    streamed = [name for name in row.loads if ".EF" in name]  # only weights are loaded so
    rules = {
        "registers spill": row.spills == 0 and row.stack_bytes == 0,
        "more shared memory than the card has": row.shared_bytes <= SHARED_BYTES[row.card],
        "a barrier in the loop": row.barriers == 0 or not (product or row.kernel == "paged_decode"),
        "weights loaded by less than 128 bits": not product or all(load_bits(name) == 128 for name in streamed),
        "no tensor cores": row.card < 80 or row.float32 or row.tensor_core or row.kernel not in TENSOR_CORE_KERNELS,
        "more than 3.3 instructions a weight as halves": not row.halves or (row.per_weight or 0) <= 3.3,
    }
    return [rule for rule, kept in rules.items() if not kept]


def compiled(card: int, runs: Sequence[Run], candidates: bool) -> list[Facts]:
    """Of every kernel that the runs launch on a card, once each."""
    found: dict[int, tuple[Any, Facts]] = {}
    properties = DeviceProperties((card // 10, card % 10))

    def note(run: Run, kernel: Any, given: dict[str, Any]) -> None:
        # The kernel is held, so that its id stays its own.
        if id(kernel) not in found:
            found[id(kernel)] = kernel, facts(run.name, card, kernel, given)

    for run in runs:
        for number in range(tile_configs.MAX_CANDIDATES if candidates else 1):
            with recorded(card, partial(note, run)):
                step(run, Operations(run.exact, lambda device: properties, lambda device, nth=Nth(number): nth))
    return [row for _, row in found.values()]


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--cards", type=int, nargs="+", default=list(CARDS), help="compute capabilities, as 86")
    parser.add_argument("--all", action="store_true", help="every format, dtype and shape, not only the usual ones")
    parser.add_argument("--candidates", action="store_true", help="every size of tile, not only the shipped ones")
    args = parser.parse_args()
    rows = [row for card in args.cards for row in compiled(card, ALL if args.all else FEW, args.candidates)]
    print(table(rows))
    if args.out:
        kernels = summary(rows) if args.candidates else [asdict(row) for row in rows]
        about = {"triton": triton.__version__, "torch": torch.__version__, "all": args.all}
        write_json(args.out, {**about, "kernels": kernels})
    faults = [f"{row.kernel} ({row.run}, sm_{row.card}): {rule}" for row in rows for rule in broken(row)]
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


def summary(rows: list[Facts]) -> list[dict[str, Any]]:
    """Of each kernel on each card: how many were compiled, those that spill, and the most that one takes."""
    found = []
    for card, kernel in dict.fromkeys((row.card, row.kernel) for row in rows):
        here = [row for row in rows if (row.card, row.kernel) == (card, kernel)]
        sizes = {"registers": max(r.registers for r in here), "shared_bytes": max(r.shared_bytes for r in here)}
        counts = {"compiled": len(here), "spill": sum(bool(r.spills or r.stack_bytes) for r in here)}
        found.append({"card": card, "kernel": kernel, **counts, **sizes})
    return found


def table(rows: list[Facts]) -> str:
    titles = f"{'kernel':16} {'first in':26} {'card':>6} {'regs':>4} {'spills':>6} {'shared':>6} {'inst/weight':>11}"
    lines = [f"{titles}  loads of the loop"]
    for row in rows:
        loads = ", ".join(f"{count} {name}" for name, count in sorted(row.loads.items()))
        marks = f"{loads}; {row.barriers} barriers" + (f"; {row.tensor_core} tensor core" if row.tensor_core else "")
        lines.append(
            f"{row.kernel:16} {row.run:26} sm_{row.card:<3} {row.registers:4} {row.spills:6} {row.shared_bytes:6} "
            f"{row.per_weight or '':>11}  {marks}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
