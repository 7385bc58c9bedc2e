"""The operations on GPUs: embedding, norms, attention, products, and a step as a CUDA graph. Knows tensors, no instruction."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from ...cache import Batch, PagePool
from ...formats import Weight
from ..backend import Forward, Norm, PassRunner
from ..graphs import EagerRunner
from . import activations, attention, device_calls, embed_and_sample, interpreted, tile_configs, tuning
from .batch_table import BatchTable
from .cuda_graph import CudaGraphs
from .device import DeviceProperties, properties_of
from .linear import DTYPES, EPILOGUE_BLOCK, Call, LinearKernels, layout_arguments
from .linear_method import Activation, tensor_of
from .steps import GraphDevice, GraphRunner, Inputs

# Attention is timed for tuning from contexts of so many pages, and from prompts of so many tokens, on: with less, it is all
# start and end.
MIN_PAGES_TO_TUNE, MIN_TOKENS_TO_TUNE = 4, 256
# Ids that a program of embed_and_sample.sample looks at together.
SAMPLE_BLOCK = 4096
# Splits that a program of attention.combine_splits takes at a time.
COMBINE_BLOCK = 16


@dataclass
class _Local(threading.local):
    """What a thread has to itself, for another may run another model: the last batch's table, scratch by device, the step that
    is being captured."""

    batch: tuple[Batch, torch.device, BatchTable] | None = None
    scratch: dict[torch.device, Tensor] = field(default_factory=dict)
    step: Inputs | None = None


class Operations:
    """The backend of one precision; exact: no product is summed in float16."""

    name = "triton"

    def __init__(
        self,
        exact: bool,
        properties: Callable[[torch.device], DeviceProperties] = properties_of,
        tuner: Callable[[torch.device], tuning.Tuner] = tuning.tuner,
        graphs: Callable[[torch.device], GraphDevice] | None = None,
    ) -> None:
        """properties: of a device. tuner: picks the sizes of tiles there. graphs: what captures steps there; None: CUDA, where
        kernels are compiled."""
        self.properties, self.tuner = properties, tuner
        self.linear = LinearKernels(exact, properties, tuner, self._scratch)
        self._graphs = graphs or (None if interpreted() else CudaGraphs)
        self._local = _Local()

    def activation_dtype(self, weights: torch.dtype, device: torch.device) -> torch.dtype:
        """The weights' own; float32 where the card has no bfloat16, announced."""
        if weights != torch.bfloat16 or self.properties(device).bfloat16:
            return weights
        warnings.warn("this card has no bfloat16, float32 is used instead; .half() is faster", stacklevel=3)
        return torch.float32

    # Operations -------------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """ids (tokens,) int64, weight (vocabulary, hidden) -> x (tokens, hidden) in `dtype`."""
        ids, step, features = ids.to(weight.device), self._local.step, weight.shape[1]
        x = torch.empty(len(ids), features, dtype=dtype, device=weight.device)
        if len(ids):
            device_calls.launch(
                embed_and_sample.embed, (len(ids), triton.cdiv(features, EPILOGUE_BLOCK)), ids, ids.stride(0),
                None if step is None else step.sampled, weight.contiguous(), x, features, EPILOGUE_BLOCK, num_warps=4,
            )  # fmt: skip
        return x

    def layer_norms(self, x: Tensor, lns: Sequence[Norm], next_weights: Sequence[Weight | None]) -> list[Activation]:
        """x (tokens, hidden) -> one LayerNorm of x for each (gain, bias, eps), as its next weight reads it."""
        outs = [self.linear.empty(w, x, x.shape[1]) for w in next_weights]
        for i in range(0, len(lns), 2):
            # One launch for two.
            self._layer_norms(x.contiguous(), lns[i : i + 2], outs[i : i + 2])
        return outs

    def grouped_linear(
        self,
        inputs: Sequence[Activation],
        weights: Sequence[Weight],
        addends: Sequence[Tensor | None],
        activations: Sequence[str | None],
        next_weights: Sequence[Weight | None],
    ) -> list[Activation]:
        """out[i] = activation[i](inputs[i] @ weights[i].T + addends[i]); addends (out,) or (tokens, out), or None."""
        present = [[] if a is None else [a] for a in addends]
        calls = map(Call, ([x] for x in inputs), ([w] for w in weights), present, activations, next_weights)
        return self.linear(list(calls))

    def attention(
        self, qkv: Activation, cache: PagePool, layer: int, batch: Batch, rotary: Tensor, next_weight: Weight | None
    ) -> Activation:
        """Rotary, append to the cache, causal attention: qkv (tokens, heads * 3 * head_dim) -> (tokens, heads * head_dim)."""
        assert isinstance(qkv, Tensor)
        heads, dim = _heads(cache.storage[layer])
        out = self.linear.empty(next_weight, qkv, heads * dim)
        if len(qkv):
            table = self._table(batch, qkv.device)
            attend = self._paged_decode if table.single else self._paged_prefill
            pool = cache.storage[layer], cache.scales[layer] if cache.scales else None
            attend(qkv.contiguous(), pool, table, rotary.to(qkv.device).contiguous(), out)
        return out

    def _paged_decode(
        self,
        qkv: Tensor,
        pool: tuple[Tensor, Tensor | None],
        table: BatchTable | Inputs,
        rotary: Tensor,
        out: Activation,
    ) -> None:
        """One new token a sequence: a program for each page of a head's context, then their sum."""
        heads, dim, block_d = *_heads(pool[0]), _block_d(pool[0])
        splits, int8 = table.splits, pool[1] is not None
        single = splits == 1
        shape = (0,) if single else (len(qkv), heads, splits)
        partial, stats = torch.empty(*shape, dim, device=qkv.device), torch.empty(*shape, 2, device=qkv.device)

        def launch(tile: tile_configs.DecodeTile) -> None:
            device_calls.launch(
                attention.paged_decode, (table.count, heads, splits),
                qkv, rotary, rotary.shape[1], *pool, table.sequences, table.pages, table.max_pages, table.tokens, dim**-0.5,
                partial, stats, tensor_of(out),
                heads, dim, rotary.shape[2], block_d, triton.cdiv(dim, block_d), tile.block_n, int8, single,
                *layout_arguments(out), num_warps=tile.num_warps,
            )  # fmt: skip

        candidates = tile_configs.decode_tiles(block_d, int8, qkv.dtype)
        launch(self.tuner(qkv.device).pick(candidates, launch if splits >= MIN_PAGES_TO_TUNE else None))
        if not single:
            device_calls.launch(
                attention.combine_splits, (len(qkv), heads), partial, stats, splits, tensor_of(out),
                heads, dim, triton.next_power_of_2(dim), COMBINE_BLOCK, *layout_arguments(out), num_warps=4,
            )  # fmt: skip

    def _paged_prefill(
        self,
        qkv: Tensor,
        pool: tuple[Tensor, Tensor | None],
        table: BatchTable | Inputs,
        rotary: Tensor,
        out: Activation,
    ) -> None:
        """Several new tokens a sequence: append all, then a program for each block of queries of a head."""
        assert isinstance(table, BatchTable)
        heads, dim, block_d = *_heads(pool[0]), _block_d(pool[0])
        num_blocks_d, int8 = triton.cdiv(dim, block_d), pool[1] is not None
        q = torch.empty(len(qkv), heads, dim, device=qkv.device)
        device_calls.launch(
            attention.append_kv, (len(qkv), heads), qkv, rotary, rotary.shape[1], *pool, table.tokens, dim**-0.5, q,
            heads, dim, rotary.shape[2], block_d, num_blocks_d, int8, num_warps=1,
        )  # fmt: skip

        def launch(tile: tile_configs.PrefillTile) -> None:
            device_calls.launch(
                attention.paged_prefill, (table.block_count, heads),
                q, *pool, table.sequences, table.pages, table.max_pages, table.blocks, tensor_of(out),
                heads, dim, block_d, num_blocks_d, table.block_m, tile.block_n, int8, DTYPES[qkv.dtype],
                *layout_arguments(out), num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip

        candidates = tile_configs.prefill_tiles(self.properties(qkv.device), dim, int8, qkv.dtype)
        launch(self.tuner(qkv.device).pick(candidates, launch if len(qkv) >= MIN_TOKENS_TO_TUNE else None))

    def linear_residual(
        self, inputs: Sequence[Activation], weights: Sequence[Weight], addends: Sequence[Tensor | None], x: Tensor
    ) -> Tensor:
        """x + sum of inputs[i] @ weights[i].T + sum of addends -> (tokens, hidden)."""
        present = [a for a in addends if a is not None]
        if len(inputs) > 2 or len(present) > 2:
            # A kernel takes two of each; the rest comes first.
            x = self.linear_residual(inputs[2:], weights[2:], present[2:], x)
        if not inputs:
            return x + sum(present[:2])
        (out,) = self.linear([Call(inputs[:2], weights[:2], present[:2], residual=x.contiguous())])
        assert isinstance(out, Tensor)
        return out

    def head(self, x: Tensor, rows: Tensor | None, norm: Norm, weight: Weight) -> Tensor:
        """Final norm and vocabulary projection of the chosen rows (None: all) -> (rows, vocabulary) float32 logits."""
        chosen = x if rows is None else x[rows.to(x.device, non_blocking=True)]
        inputs, step = self.layer_norms(chosen, [norm], [weight]), self._local.step
        logits = None if step is None else step.logits
        (out,) = self.linear([Call(inputs, [weight], dtype=torch.float32, out=logits)])
        assert isinstance(out, Tensor)
        return out

    def final_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """x (tokens, hidden) -> the last hidden state, for models without a vocabulary projection."""
        (out,) = self.layer_norms(x, [norm], [None])
        assert isinstance(out, Tensor)
        return out

    def pass_runner(
        self, forward: Forward, device: torch.device, limit: int, vocabulary: int | None = None
    ) -> PassRunner:
        """Steps as CUDA graphs, which have to end in logits."""
        if self._graphs is None:
            return EagerRunner(forward, "kernels run in Triton's interpreter, which knows no CUDA graphs")
        if vocabulary is None:
            return EagerRunner(forward, "a part of a model is not a step")
        return GraphRunner(forward, self._step(forward), self._graphs(device), device, vocabulary, limit)

    def _step(self, forward: Forward) -> Callable[[PagePool, Inputs], None]:
        """All of a step, launches and nothing else: from ids to the next ids."""

        def run(pool: PagePool, inputs: Inputs) -> None:
            with self._reading(inputs):
                logits = forward(inputs.ids, pool, inputs.batch)
            self._sample(logits, inputs)

        return run

    def _sample(self, logits: Tensor, inputs: Inputs) -> None:
        """Choose the next ids, from logits (rows, vocabulary)."""
        rows, vocabulary = logits.shape
        values, ids = torch.empty_like(logits), torch.empty_like(logits, dtype=torch.int32)
        device_calls.launch(
            embed_and_sample.sample, (rows,), logits, inputs.excluded,
            inputs.sequences, attention.SEQUENCE.value, inputs.sampling, values, ids, inputs.sampled,
            vocabulary, min(SAMPLE_BLOCK, triton.next_power_of_2(vocabulary)), num_warps=16,
        )  # fmt: skip

    @contextmanager
    def _reading(self, inputs: Inputs) -> Iterator[None]:
        """Take the batch, the tokens before it and the memory of logits from there."""
        self._local.step = inputs
        try:
            yield
        finally:
            self._local.step = None

    def _layer_norms(self, x: Tensor, lns: Sequence[Norm], outs: Sequence[Activation]) -> None:
        if not len(x):
            return
        pointers: list[object] = []
        shapes: list[object] = []
        for (gain, bias, eps), out in zip(lns, outs, strict=True):
            pointers += [gain.contiguous(), bias.contiguous(), eps, tensor_of(out)]
            shapes += layout_arguments(out)
        if len(lns) == 1:
            pointers += [None, None, 0.0, None]
            shapes += [1, 1, 1.0]
        block = triton.next_power_of_2(x.shape[1])
        warps = min(16, max(1, block // 512))
        device_calls.launch(
            activations.layer_norms, (len(x),), x, *pointers, x.shape[1], block, *shapes, num_warps=warps
        )

    def _table(self, batch: Batch, device: torch.device) -> BatchTable | Inputs:
        if self._local.step is not None:
            return self._local.step
        held = self._local.batch
        if held is None or held[0] is not batch or held[1] != device:
            table = BatchTable(batch, device, self.properties(device).prefill_block_m)
            self._local.batch = held = batch, device, table
        return held[2]

    def _scratch(self, like: Tensor, count: int) -> Tensor:
        """Memory for so many elements, the same again and again; a graph has its own, which nothing may replace."""
        if self._local.step is not None:
            return torch.empty(count, dtype=like.dtype, device=like.device)
        mine, nbytes = self._local.scratch, count * like.element_size()
        if (held := mine.get(like.device)) is None or held.nbytes < nbytes:
            mine[like.device] = held = torch.empty(nbytes, dtype=torch.uint8, device=like.device)
        return held.view(like.dtype)


def _heads(storage: Tensor) -> tuple[int, int]:
    """Heads and elements of a head."""
    return storage.shape[2], storage.shape[4]


def _block_d(storage: Tensor) -> int:
    """The largest power of two that divides a head; tl.dot takes no less than 16."""
    dim = storage.shape[4]
    return max(16, dim & -dim)
