"""Correctness of every backend that runs on a device, against float64 on the CPU. Knows no timing."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.cache import Batch, PagePool, quantize
from neox_lite.formats import DENSE, Weight, make_format
from neox_lite.kernels import dispatch, reference
from neox_lite.layers import Rotary
from neox_lite.units import dtype_name
from neox_lite_app.paths import DEMO
from neox_lite_quant.convert import convert

# Largest |error| / rms of the float64 result that sums of products and three roundings on the way explain.
BOUNDS = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}
INT8_CACHE = 5e-3  # where a key's code may round the other way
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
FORMATS = [("dense", 0), *((f, g) for f in ("int4", "int8") for g in (32, 64, 128))]


@dataclass(frozen=True)
class Case:
    """One check: a method of Checks and its arguments, for a backend and a dtype of activations."""

    backend: str
    dtype: torch.dtype
    method: str
    arguments: tuple[Any, ...] = ()


def cases_on_gpu() -> Iterator[Case]:
    """Every kernel in every format; widths, heads and other dtypes with the usual one. A few hundred kernels to compile."""
    products = [(HALF, f, g, 384, tokens) for f, g in FORMATS for tokens in (1, 2, 16, 300)]
    products += [
        (HALF, "int4", 128, width, tokens) for width in (1152, 6144) for tokens in (1, 2, 3, 8, 40, 64, 200, 300)
    ]
    products += [(d, f, 128, 384, t) for d in (BRAIN, FULL) for f in ("int4", "int8") for t in (1, 2, 16, 300)]
    for dtype, *arguments in products:
        yield Case("triton", dtype, "product", (*arguments, 1024))
        if arguments[3] == 1:
            yield Case("triton exact", dtype, "product", (*arguments, 1024))
    for head_dim in (32, 64, 80, 96, 128, 256):
        yield from (Case("triton", HALF, "attention", (head_dim, kv, (5, 150, 127))) for kv in (HALF, torch.int8))
    yield Case("triton", HALF, "attention", (96, HALF, (5,)))
    yield Case("triton", HALF, "attention", (96, HALF, (2100, 3)))
    for dtype in (BRAIN, FULL):
        yield from (Case("triton", dtype, "attention", (96, kv, (5, 150))) for kv in (dtype, torch.int8))
    for dtype in BOUNDS:
        yield from (Case(backend, dtype, "model", (384, 140)) for backend in ("triton", "reference"))
        yield Case("triton", dtype, "norms")
    yield Case("triton", HALF, "outliers")
    yield from (Case("triton", FULL, "greedy", (64, format)) for format in ("int4", "int8"))


def cases_first() -> Iterator[Case]:
    """What a decode step and a prompt of the 20B launch: checked before anything is timed."""
    for format, counts in (("int4", (1, 2, 16, 64, 300)), ("int8", (1, 16, 300))):
        yield from (Case("triton", HALF, "product", (format, 128, 6144, tokens, 1024)) for tokens in counts)
    yield Case("triton", HALF, "product", ("dense", 0, 384, 1, 1024))
    yield from (Case("triton", HALF, "attention", (96, kv, (5, 150, 127))) for kv in (HALF, torch.int8))
    yield Case("triton", HALF, "outliers")
    yield Case("triton", HALF, "norms")
    yield Case("triton", HALF, "model", (384, 140))
    yield Case("triton", FULL, "greedy", (64, "int4"))


def cases_interpreted() -> Iterator[Case]:
    """One of each kind, small."""
    for format, tokens in (("int4", 1), ("int4", 3), ("int8", 1), ("int8", 260), ("dense", 2)):
        yield Case("triton", HALF, "product", (format, 32, 96, tokens, 10))
    yield Case("triton exact", HALF, "product", ("int4", 32, 96, 1, 10))
    yield Case("triton", HALF, "attention", (96, torch.int8, (3, 5)))
    yield Case("triton", FULL, "model", (64, 9))
    yield Case("triton", HALF, "norms")
    yield Case("triton", HALF, "outliers")
    yield Case("triton", FULL, "greedy", (1, "int4"))


def cases_on_cpu() -> Iterator[Case]:
    """Of the reference, where there is no GPU and nothing is interpreted."""
    yield from (Case("reference", FULL, "product", (f, g, 384, 7, 512)) for f, g in FORMATS)
    yield from (Case("reference", FULL, "attention", (96, kv, (5, 150))) for kv in (FULL, torch.int8))
    yield Case("reference", FULL, "norms")
    yield Case("reference", FULL, "model", (384, 140))


def check_all(cases: Sequence[Case], device: torch.device, limit_s: float = 240) -> list[dict[str, Any]]:
    """The verdict of every case, by several processes: most of the time goes into compiling.

    A case that takes a process with it, or is not done in `limit_s` seconds, is a wrong one.
    """
    cores = os.cpu_count() or 1
    workers = max(1, min(12, cores - 2)) if device.type == "cuda" else min(2, cores)
    deadline, verdicts = time.monotonic() + limit_s, []
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    for case, future in [(case, pool.submit(check, case, device)) for case in cases]:
        try:
            verdicts.append(future.result(max(0.0, deadline - time.monotonic())))
        except (BrokenProcessPool, TimeoutError, FuturesTimeout) as error:
            verdicts.append(failed(case, error))
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:  # one that hangs would keep this program from ending
        process.kill()
    return verdicts


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """The verdict of one case; what a kernel raises is one too."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(2 if device.type == "cuda" else 1)
    torch.backends.cuda.matmul.allow_tf32 = False
    name = case.backend.split()[0]
    ops = dispatch.load(name).bind(name == "reference" or case.backend.endswith("exact"))
    try:
        return getattr(Checks(case.backend, ops, case.dtype, device), case.method)(*case.arguments)
    except Exception as error:
        return failed(case, error)


def failed(case: Case, error: BaseException) -> dict[str, Any]:
    message = f"{type(error).__name__}: {error}"[:400]
    what = f"{case.method} {' '.join(map(str, case.arguments))}"
    return {"backend": case.backend, "check": what, "dtype": str(case.dtype)[6:], "ok": False, "error": message}


@dataclass(frozen=True)
class Checks:
    """The checks of one backend with activations of one dtype."""

    backend: str
    ops: Any
    dtype: torch.dtype
    device: torch.device

    def verdict(self, check: str, found: Tensor, exact: Tensor, least: float = 0.0) -> dict[str, Any]:
        error = (found.double().cpu() - exact).abs().max().item() / exact.square().mean().sqrt().item()
        bound = max(BOUNDS[self.dtype], least)
        about = {"backend": self.backend, "check": check, "dtype": dtype_name(self.dtype)}
        return {**about, "max_error_over_rms": error, "bound": bound, "ok": error < bound}

    def here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def weight(self, format: str, group: int, rows: int, columns: int, seed: int) -> Weight:
        kind = DENSE if format == "dense" else make_format(format, group)
        made, method = random(rows, columns, seed=seed) / columns**0.5, "cast" if kind == DENSE else "rtn"
        stored = kind.encode(made, self.dtype, method)
        return Weight(kind, (rows, columns), {k: self.here(t) for k, t in stored.items()})

    def product(self, format: str, group: int, columns: int, tokens: int, rows: int) -> dict[str, Any]:
        """Norm, then two products beside each other, then a sum: the way activations go in a block."""
        rows = rows + 3 if format == "dense" else -(-rows // group) * group  # the second weight reads the first
        first, beside = self.weight(format, group, rows, columns, 1), self.weight(format, group, rows + 3, columns, 2)
        second = self.weight(format, group, 37, rows, 3)
        x = random(tokens, columns, seed=4).to(self.dtype)
        gains, shifts = (1 + random(2, columns, seed=5) / 4).to(self.dtype), random(2, columns, seed=6).to(self.dtype)
        bias, residual = random(rows, seed=7).to(self.dtype), random(tokens, 37, seed=8).to(self.dtype)
        norms = [(self.here(gain), self.here(shift), 1e-5) for gain, shift in zip(gains, shifts, strict=True)]
        inputs = self.ops.layer_norms(self.here(x), norms, [first, beside])
        addends, kinds, readers = [self.here(bias), None], ["erf", None], [second, None]
        inner, plain = self.ops.grouped_linear(inputs, [first, beside], addends, kinds, readers)
        found = self.ops.linear_residual([inner], [second], [None], self.here(residual))
        normed = [
            functional.layer_norm(x.double(), (columns,), gain.double(), shift.double(), 1e-5)
            for gain, shift in zip(gains, shifts, strict=True)
        ]
        middle = functional.gelu(normed[0] @ decoded(first).T + bias.double())
        exact = middle @ decoded(second).T + residual.double()
        error = self.verdict("", plain, normed[1] @ decoded(beside).T)["max_error_over_rms"]
        verdict = self.verdict(f"products {format} g{group} {rows}x{columns}, {tokens} tokens", found, exact)
        worst = max(error, verdict["max_error_over_rms"])
        return verdict | {"max_error_over_rms": worst, "ok": worst < verdict["bound"]}

    def outliers(self) -> dict[str, Any]:
        """Activations of thousands, where sums in halves could overflow."""
        weight, x = self.weight("int4", 128, 64, 1024, 1), random(1, 1024, seed=2).half()
        x[:, ::7] = 6000.0
        gain = torch.full((1024,), 3000.0).half()
        normed = functional.layer_norm(x.double(), (1024,), gain.double(), eps=1e-5)
        inputs = self.ops.layer_norms(self.here(x), [(self.here(gain), self.here(gain * 0), 1e-5)], [weight])
        (found,) = self.ops.grouped_linear(inputs, [weight], [None], [None], [None])
        return self.verdict("outliers", found, normed @ decoded(weight).T)

    def norms(self) -> dict[str, Any]:
        x, gain, bias = (random(*shape, seed=i).to(self.dtype) for i, shape in enumerate([(5, 384), (384,), (384,)]))
        exact = functional.layer_norm(x.double(), (384,), gain.double(), bias.double(), 1e-5)
        (found,) = self.ops.layer_norms(self.here(x), [(self.here(gain), self.here(bias), 1e-5)], [None])
        return self.verdict("norm", found, exact)

    def attention(self, head_dim: int, kv: torch.dtype, prompts: tuple[int, ...]) -> dict[str, Any]:
        """Prompts beside each other, a token of each, then of some, over memory full of NaN; for a weight that reads halves.

        Against float64 on what the cache keeps.
        """
        heads, count = 3, len(prompts)
        config = GPTNeoXConfig(
            hidden_size=heads * head_dim, num_attention_heads=heads, max_position_embeddings=4096, rotary_pct=0.25,
            intermediate_size=64, num_hidden_layers=1, vocab_size=11,
        )  # fmt: skip
        table = Rotary(config).table
        qkv = [random(p + 2, heads * 3 * head_dim, seed=i).to(self.dtype) for i, p in enumerate(prompts)]
        pool = PagePool(heads, head_dim, kv, [self.device])
        block_tables = [pool.new() for _ in prompts]
        for block_table, prompt in zip(block_tables, prompts, strict=True):
            pool.reserve(block_table, prompt + 2)
        for tensor in (*pool.storage, *pool.scales):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
        reader = self.weight("int4", 32, 8, heads * head_dim, 9)
        outs: list[list[Tensor]] = [[] for _ in prompts]
        for step in (prompts, [1] * count, [i % 2 for i in range(count)], [1 - i % 2 for i in range(count)]):
            held = [s.length for s in block_tables]
            rows = torch.cat([q[h : h + n] for q, h, n in zip(qkv, held, step, strict=True)])
            batch = Batch.reserve(pool, block_tables, step)
            found = natural(self.ops.attention(self.here(rows), pool, 0, batch, self.here(table), reader))
            batch.commit()
            for out, part in zip(outs, found.split(list(step)), strict=True):
                out.append(part)
        exact = torch.cat([exact_attention(q.double(), table.double(), heads, head_dim, kv) for q in qkv])
        what = f"attention, heads of {head_dim}, {str(kv)[6:]} cache, prompts of {', '.join(map(str, prompts))}"
        least = INT8_CACHE if kv == torch.int8 else 0.0
        return self.verdict(what, torch.cat([part for out in outs for part in out]), exact, least)

    def model(self, hidden: int, tokens: int) -> dict[str, Any]:
        """Logits of a small model against the same weights in float64, or float32 where that is the dtype."""
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            hidden_size=hidden,
            num_attention_heads=4,
            intermediate_size=4 * hidden,
            num_hidden_layers=2,
            vocab_size=1003,
        )
        model = GPTNeoXForCausalLM(config).to(self.dtype)
        ids = torch.randint(0, config.vocab_size, (2, tokens))
        model.ops = reference
        exact = model.float()(ids).logits.double()
        model = model.to(self.dtype).to(self.device)
        model.ops = self.ops
        return self.verdict("model logits", model(self.here(ids)).logits, exact)

    def greedy(self, count: int, format: str) -> dict[str, Any]:
        """Greedy text of the demo model: equal to the reference's, token for token."""
        with tempfile.TemporaryDirectory() as scratch:
            convert(DEMO, Path(scratch) / "quantized", format)
            model = GPTNeoXForCausalLM.from_pretrained(Path(scratch) / "quantized", torch_dtype=torch.float32)
            prompts = torch.tensor([[0, 40, 60], [0, 100, 7], [0, 300, 12]] if count > 1 else [[40]])
            model.ops = reference
            expected = model.generate(prompts, max_new_tokens=count)
            model = model.to(self.device)
            model.ops = self.ops
            same = torch.equal(model.generate(self.here(prompts), max_new_tokens=count).cpu(), expected)
        what = f"greedy tokens of the demo model as {format}: {count} for each of {len(prompts)}"
        return {"backend": self.backend, "check": what, "dtype": "float32", "ok": same}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def natural(x: Any) -> Tensor:
    """Activations of any backend as (tokens, features)."""
    if isinstance(x, Tensor):
        return x
    layout, (tokens, features) = x.layout, x.tensor.shape
    pack, planes = layout.pack_factor, layout.num_planes
    split = x.tensor.view(tokens, planes, features // pack, pack // planes)
    return split.permute(0, 2, 3, 1).reshape(tokens, features) / layout.scale


def decoded(weight: Weight) -> Tensor:
    return weight.decode(torch.float32).double().cpu()


def exact_attention(qkv: Tensor, table: Tensor, heads: int, head_dim: int, kv: torch.dtype) -> Tensor:
    """In float64, on keys and values as the cache keeps them."""
    tokens = len(qkv)
    q, k, v = qkv.view(tokens, heads, 3, head_dim).unbind(2)
    cos, sin = (t[:tokens, None] for t in table)
    half = cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]), -1)

    def cached(x: Tensor) -> Tensor:
        if kv != torch.int8:
            return x.to(kv).double()
        codes, scale = quantize(x)
        return codes.double() * scale.double().unsqueeze(-1)

    scores = torch.einsum("qhd,khd->hqk", rotate(q), cached(rotate(k))) / head_dim**0.5
    scores.masked_fill_(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), cached(v)).flatten(1)
