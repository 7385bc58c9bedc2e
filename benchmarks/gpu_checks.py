"""Correctness of every backend that runs on a device, against float64 on the CPU. Knows no timing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.cache import Batch, PagePool
from neox_lite.formats import DENSE, Weight, make_format
from neox_lite.kernels import dispatch, reference
from neox_lite.layers import Rotary

# Largest |error| / rms of the float64 result that sums of products and three roundings on the way explain.
BOUNDS = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
INT8_CACHE = 5e-3  # where a key's code may round the other way
SHAPE = {
    "hidden_size": 384,
    "num_attention_heads": 4,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "vocab_size": 1003,
}


@dataclass(frozen=True)
class Scope:
    """How much is checked: everything on a GPU, a sample of each kind where kernels are interpreted."""

    tokens: tuple[int, ...] = (1, 2, 3, 8, 16, 40, 64, 200, 300)
    groups: tuple[int, ...] = (32, 64, 128)
    columns: tuple[int, ...] = (384, 1152, 6144)
    rows: int = 1027
    heads: tuple[int, ...] = (32, 64, 80, 96, 128, 256)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    prompt: int = 150
    greedy: int = 64


REHEARSAL = Scope((1, 3, 300), (32,), (96,), 10, (96,), (torch.float32, torch.float16), 20, 3)


def check_all(device: torch.device, scope: Scope, backends: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every operation, both ends and the model, by every backend (its name -> its operations, exact or not)."""
    for name, ops in backends.items():
        for dtype in scope.dtypes if name.startswith("triton") or device.type == "cuda" else [torch.float32]:
            here = Checks(name, ops, dtype, device, scope)
            yield from here.products()
            yield here.norms()
            yield from here.attentions()
            yield here.model()
        if device.type == "cuda" or name.startswith("triton"):
            yield Checks(name, ops, torch.float16, device, scope).outliers()
            yield Checks(name, ops, torch.float32, device, scope).greedy()


@dataclass(frozen=True)
class Checks:
    """The checks of one backend with activations of one dtype."""

    backend: str
    ops: Any
    dtype: torch.dtype
    device: torch.device
    scope: Scope

    def verdict(self, check: str, found: Tensor, exact: Tensor, least: float = 0.0) -> dict[str, Any]:
        error = (found.double().cpu() - exact).abs().max().item() / exact.square().mean().sqrt().item()
        bound = max(BOUNDS[self.dtype], least)
        name = str(self.dtype).removeprefix("torch.")
        return {
            "backend": self.backend,
            "check": check,
            "dtype": name,
            "max_error_over_rms": error,
            "bound": bound,
            "ok": error < bound,
        }

    def here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def weight(self, format: str, group: int, rows: int, columns: int) -> Weight:
        kind = DENSE if format == "dense" else make_format(format, group)
        stored = kind.encode(random(rows, columns) / columns**0.5, self.dtype, "cast" if kind == DENSE else "rtn")
        return Weight(kind, (rows, columns), {k: self.here(t) for k, t in stored.items()})

    def products(self) -> Iterator[dict[str, Any]]:
        """Norm, then two products beside each other, then their sum: the way activations go in a block."""
        formats = [("dense", 0), *((f, g) for f in ("int4", "int8") for g in self.scope.groups)]
        for format, group in formats:
            for columns in self.scope.columns if group != 0 else self.scope.columns[:1]:
                for tokens in self.scope.tokens:
                    yield self.product(format, group, columns, tokens)

    def product(self, format: str, group: int, columns: int, tokens: int) -> dict[str, Any]:
        rows = self.scope.rows if format == "dense" else -(-self.scope.rows // group) * group  # the second reads the first
        first, beside = self.weight(format, group, rows, columns), self.weight(format, group, rows + 3, columns)
        second = self.weight(format, group, 37, rows)
        x, gain = random(tokens, columns).to(self.dtype), torch.ones(columns, dtype=self.dtype)
        bias, residual = random(rows, seed=5).to(self.dtype), random(tokens, 37, seed=6).to(self.dtype)
        norm = self.here(gain), self.here(gain * 0), 1e-5
        acts = self.ops.norms(self.here(x), [norm, norm], [first, beside])
        addends, kinds, readers = [self.here(bias), None], ["erf", None], [second, None]
        inner, plain = self.ops.linears(acts, [first, beside], addends, kinds, readers)
        found = self.ops.sum_linears([inner], [second], [None], self.here(residual))
        normed = functional.layer_norm(x.double(), (columns,), eps=1e-5)
        middle = functional.gelu(normed @ decoded(first).T + bias.double())
        exact = middle @ decoded(second).T + residual.double()
        error = self.verdict("", plain, normed @ decoded(beside).T)["max_error_over_rms"]
        verdict = self.verdict(f"products {format} g{group} {rows}x{columns}, {tokens} tokens", found, exact)
        worst = max(error, verdict["max_error_over_rms"])
        return verdict | {"max_error_over_rms": worst, "ok": worst < verdict["bound"]}

    def outliers(self) -> dict[str, Any]:
        """Activations of thousands, where sums in halves could overflow."""
        weight, x = self.weight("int4", self.scope.groups[-1], 64, 1024), random(1, 1024).half()
        x[:, ::7] = 6000.0
        gain = torch.full((1024,), 3000.0).half()
        normed = functional.layer_norm(x.double(), (1024,), gain.double(), eps=1e-5)
        acts = self.ops.norms(self.here(x), [(self.here(gain), self.here(gain * 0), 1e-5)], [weight])
        (found,) = self.ops.linears(acts, [weight], [None], [None], [None])
        return self.verdict("outliers", found, normed @ decoded(weight).T)

    def norms(self) -> dict[str, Any]:
        x, gain, bias = (random(*shape, seed=i).to(self.dtype) for i, shape in enumerate([(5, 384), (384,), (384,)]))
        exact = functional.layer_norm(x.double(), (384,), gain.double(), bias.double(), 1e-5)
        (found,) = self.ops.norms(self.here(x), [(self.here(gain), self.here(bias), 1e-5)], [None])
        return self.verdict("norm", found, exact)

    def attentions(self) -> Iterator[dict[str, Any]]:
        for head_dim in self.scope.heads:
            for kv in (self.dtype, torch.int8):
                yield self.attention(head_dim, kv)

    def attention(self, head_dim: int, kv: torch.dtype) -> dict[str, Any]:
        """A prompt and then single tokens, over memory full of NaN, against float64 on what the cache keeps."""
        heads, prompt = 3, self.scope.prompt
        config = GPTNeoXConfig(
            hidden_size=heads * head_dim, num_attention_heads=heads, max_position_embeddings=512, rotary_pct=0.25,
            intermediate_size=64, num_hidden_layers=1, vocab_size=11,
        )  # fmt: skip
        table = Rotary(config).table
        qkv = random(prompt + 2, heads * 3 * head_dim).to(self.dtype)
        pool = PagePool(heads, head_dim, kv, [self.device])
        pool.reserve(sequence := pool.new(), prompt + 2)
        for tensor in (*pool.storage, *pool.scales):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
        outs, first = [], 0
        for count in (prompt, 1, 1):
            batch = Batch.reserve(pool, [sequence], [count])
            outs.append(self.ops.attend(self.here(qkv[first : first + count]), pool, 0, batch, self.here(table), None))
            batch.commit()
            first += count
        exact = exact_attention(qkv.double(), table.double(), heads, head_dim, kv)
        least = INT8_CACHE if kv == torch.int8 else 0.0
        return self.verdict(f"attention, heads of {head_dim}, {str(kv)[6:]} cache", torch.cat(outs), exact, least)

    def model(self) -> dict[str, Any]:
        """Logits of a small model against the same weights in float64, or float32 where that is the dtype."""
        torch.manual_seed(0)
        config = GPTNeoXConfig(**SHAPE) if self.device.type == "cuda" else GPTNeoXConfig(**SHAPE | {"hidden_size": 64})
        model = GPTNeoXForCausalLM(config).to(self.dtype)
        ids = torch.randint(0, config.vocab_size, (2, min(140, self.scope.prompt)))
        model._ops = reference
        exact = model.float()(ids).logits.double()
        model = model.to(self.dtype).to(self.device)
        model._ops = self.ops
        return self.verdict("model logits", model(self.here(ids)).logits, exact)

    def greedy(self) -> dict[str, Any]:
        """Greedy text of the demo model as int4: equal to the reference's, token for token."""
        from neox_lite_app import demo

        folder = Path(demo.__file__).parent / "demo_model"
        model = GPTNeoXForCausalLM.from_pretrained(folder, quantization="int4", torch_dtype=torch.float32)
        prompts = torch.tensor([[0, 40, 60], [0, 100, 7], [0, 300, 12]])
        model._ops = reference
        expected = model.generate(prompts, max_new_tokens=self.scope.greedy)
        model = model.to(self.device)
        model._ops = self.ops
        same = torch.equal(model.generate(self.here(prompts), max_new_tokens=self.scope.greedy).cpu(), expected)
        return {"backend": self.backend, "check": "greedy tokens of the demo model", "dtype": "float32", "ok": same}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoded(weight: Weight) -> Tensor:
    return weight.decode(torch.float32).double().cpu()


def exact_attention(qkv: Tensor, table: Tensor, heads: int, head_dim: int, kv: torch.dtype) -> Tensor:
    """In float64, on keys and values as the cache keeps them."""
    from neox_lite.cache import quantize

    tokens = len(qkv)
    q, k, v = qkv.view(tokens, heads, 3, head_dim).unbind(2)
    cos, sin = (t[:tokens, None] for t in table)
    half = cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]), -1)

    def kept(x: Tensor) -> Tensor:
        if kv != torch.int8:
            return x.to(kv).double()
        codes, scale = quantize(x)
        return codes.double() * scale.double().unsqueeze(-1)

    scores = torch.einsum("qhd,khd->hqk", rotate(q), kept(rotate(k))) / head_dim**0.5
    scores.masked_fill_(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), kept(v)).flatten(1)


def backends(device: torch.device, rehearsal: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Those that run here, by name, exact and, where it makes a difference, not; and why others do not."""
    found, reasons = {}, {}
    for name, reason in dispatch.reasons(device).items():
        if reason is not None:
            reasons[name] = reason
        elif name != "cpu":  # tests/test_cpu_kernels.py has them
            found[name] = dispatch.load(name).bind(name != "triton")
            if name == "triton":
                found["triton exact"] = dispatch.load(name).bind(True)
    if rehearsal:
        found["triton"] = dispatch.load("triton").bind(False)
    return found, reasons
