"""Whole models of random weights, made on the device: decode by context, time to the first token, memory. Knows no kernel."""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.kernels import Clock
from benchmarks.gpu.peers import PEERS, Transformers, substituted
from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.formats import DENSE, make_format
from neox_lite.kernels import dispatch
from neox_lite.kernels.triton import tuning
from neox_lite.loading.apply import apply
from neox_lite.offload.placement import decide
from neox_lite.offload.plan import PlacementRequest
from neox_lite.offload.profile import context_bytes
from neox_lite_app import bench
from neox_lite_app.models.random_model import RandomModel


@dataclass(frozen=True)
class Lengths:
    """Of what is measured, in tokens."""

    contexts: tuple[int, ...] = (0, 1024, 2000)
    batches: tuple[int, ...] = (4, 8, 16)
    prompt: int = 512
    steps: int = 24
    generated: int = 64
    warm_up: int = 4  # steps that are not counted
    runs: int = 3
    tuning_s: float = 60


SHORT = Lengths((0, 9), (2,), 5, 1, 2, 1, 1, 600)


class Models:
    """The measurements of one shape on one device, by the triton backend."""

    def __init__(self, clock: Clock, config: GPTNeoXConfig, lengths: Lengths) -> None:
        self.clock, self.config, self.lengths, self.device = clock, config, lengths, clock.device

    # Ours -------------------------------------------------------------------------------------------------------------

    def ours(self, format: str) -> Iterator[dict[str, Any]]:
        """Decode steps launch by launch, which can fail in fewer ways, and captured; then batches. The head of quantized ones
        is int8."""
        model = self.model(format)
        model.ops = self.ops()
        for graph in (False, True):
            model.graph = graph
            yield {"engine": "neox-lite", "format": format, **self.figures(model)}
        for batch in self.lengths.batches:
            if self.clock.late():
                return
            rate = batch * self.decode_rate(model, 0, batch)
            yield {"engine": "neox-lite", "format": format, "batch": batch, "tokens_per_s": {"0": rate}}

    def tuned(self) -> Iterator[dict[str, Any]]:
        """int4 with sizes of kernels timed on this card, and what each choice saves over the shipped one."""
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, NEOX_LITE_CACHE=folder):
            here = tuning.Tuner(self.card, None, self.timer, "always", self.lengths.tuning_s)
            model = self.model("int4")
            model.ops = self.ops(tuner=lambda device: here)
            yield {"engine": "neox-lite", "format": "int4", "sizes": "timed on this card", **self.figures(model)}
            for name, picked in here.tuned.items():
                yield {"table": "choices", "choice": name, **picked}

    def ops(self, **options: Any) -> Any:
        """The triton backend, with its own sizes of kernels where `tuner` is given."""
        return type(dispatch.load("triton").bind(False))(False, **options)

    @property
    def card(self) -> str:
        return tuning.card_of(self.device) if self.device.type == "cuda" else "none"

    @property
    def timer(self) -> tuning.Timer:
        return partial(tuning.seconds_on, self.device) if self.device.type == "cuda" else self.clock.elapsed

    def model(self, format: str) -> GPTNeoXForCausalLM:
        """A random model on the device. Raises FormatError for a format that this version lacks."""
        free_memory(self.device)
        made = DENSE if format == "fp16" else make_format(format)
        plan = RandomModel(self.config, made, small_head=format != "fp16")
        return plan.build(lambda done, total: None, self.device).to(self.device)

    def figures(self, model: GPTNeoXForCausalLM) -> dict[str, Any]:
        reset_peak(self.device)
        rates = {context: self.decode_rate(model, context) for context in self.lengths.contexts}
        prompt = bench.prefill_s(model, self.lengths.prompt, self.lengths.runs, lambda: None)
        weights = bench.weight_bytes(model)
        nbytes = weights + self.lengths.contexts[0] * bench.cache_bytes(model)
        reason = model.graph_reason
        return {
            **({"graph": True} if reason is None else {"graph": False, "why_no_graph": reason}),
            **self.speeds(rates, prompt),
            "generate_tokens_per_s": self.generate_rate(model),
            "weight_bytes": weights,
            "gb_per_s": nbytes * rates[self.lengths.contexts[0]] / 1e9,
            **peaks(self.device),
        }

    def speeds(self, rates: dict[int, float], prompt: list[float]) -> dict[str, Any]:
        """Tokens a second by context, and the median of the seconds to a first token."""
        by_context = {str(context): rate for context, rate in rates.items()}
        return {"tokens_per_s": by_context, "first_token_s": {str(self.lengths.prompt): statistics.median(prompt)}}

    def decode_rate(self, model: GPTNeoXForCausalLM, context: int, batch: int = 1) -> float:
        """Steps a second, the host's part and the wait for the token in them."""
        return self.rate_of(bench.decode_s(model, batch, context, self.lengths.warm_up + self.lengths.steps))

    def rate_of(self, times: Iterable[float]) -> float:
        return 1 / statistics.median(list(times)[self.lengths.warm_up :])

    def generate_rate(self, model: GPTNeoXForCausalLM) -> float:
        """Greedy tokens a second of `generate` after the first, as a user sees them."""
        ids = torch.arange(8, device=self.device)[None] + 5

        def seconds(count: int) -> float:
            return bench.seconds(lambda: model.generate(ids, eos_token_id=[], max_new_tokens=count).cpu())

        seconds(2)
        count = self.lengths.generated
        return (count - 1) / max(1e-9, seconds(count) - seconds(1))

    # Less memory --------------------------------------------------------------------------------------------------------

    def capped(self, gib: int) -> Iterator[dict[str, Any]]:
        """int4 within so much of the GPU's memory, the rest of the layers on the CPU; what was predicted stands beside it."""
        longest = self.lengths.contexts[-1] + self.lengths.warm_up + self.lengths.steps
        plan = RandomModel(self.config, make_format("int4"), small_head=True)
        cuda = self.device.type == "cuda"
        limits = {"cuda": gib << 30} if cuda else None
        request = PlacementRequest("auto" if cuda else "cpu", limits, longest)
        decision = decide(request, plan.sizes, ["embed_out"])
        model = plan.build(lambda done, total: None)
        apply(model, decision)
        rates = {context: self.decode_rate(model, context) for context in self.lengths.contexts}
        prompt = bench.prefill_s(model, self.lengths.prompt, self.lengths.runs, lambda: None)
        found, row = model.plan, {"engine": "neox-lite", "format": "int4", "gpu_gib": gib, "kv": model.kv}
        if found is not None:
            row |= {"layers": {tier: found.layers.count(tier) for tier in ("gpu", "cpu", "disk")}}
            row["predicted_tokens_per_s"] = {str(context): 1 / found.pass_s(1, context) for context in rates}
            row["predicted_gpu_bytes"] = found.totals["gpu"]
        if cuda:
            row["gpu_bytes"] = torch.cuda.max_memory_reserved(self.device) + context_bytes()
        yield row | self.speeds(rates, prompt)

    # Peers --------------------------------------------------------------------------------------------------------------

    def peer(self, name: str) -> Iterator[dict[str, Any]]:
        """The same int4 model with a peer's products."""
        peer = PEERS[name]
        model = self.model("int4").to(peer.dtype)
        model.ops = substituted(peer.make)
        figures = self.figures(model)
        # Our weights lie in memory beside theirs, so the counts say nothing.
        figures = {key: value for key, value in figures.items() if key not in ("tensor_bytes", "gpu_bytes")}
        yield {"engine": f"{name} in the same model", "format": "int4", "dtype": str(peer.dtype)[6:], **figures}

    def transformers(self) -> Iterator[dict[str, Any]]:
        free_memory(self.device)
        reset_peak(self.device)
        model = Transformers(self.config, self.device)
        steps = self.lengths.warm_up + self.lengths.steps
        rates = {context: self.rate_of(model.decode_s(context, steps)) for context in self.lengths.contexts}
        prompt = model.prefill_s(self.lengths.prompt, self.lengths.runs)
        row = {"engine": "transformers + bitsandbytes", "format": "nf4", **self.speeds(rates, prompt)}
        yield row | peaks(self.device)


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> dict[str, int]:
    """Most bytes of tensors, and most that the driver counts for this process."""
    if device.type != "cuda":
        return {}
    tensors, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"tensor_bytes": tensors, "gpu_bytes": reserved + context_bytes()}
