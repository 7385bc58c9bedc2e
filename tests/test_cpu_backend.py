"""Whole models on the CPU's kernels: equal to the reference, or as near as 8-bit activations allow; captured, mapped, cached.

What single kernels compute is the business of test_cpu_kernels.py.
"""

import ctypes
import gc
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.cache import Batch, PagePool
from neox_lite.errors import ArgumentError, ContextLengthError
from neox_lite.formats import DENSE, Format, GroupInt
from neox_lite.kernels import cpu, dispatch
from neox_lite.kernels.cpu import compile, target
from neox_lite.kernels.cpu.code import Code
from neox_lite.kernels.graphs import MAX_GRAPHS, MAX_TOKENS
from neox_lite.layers import Linear, norm_of
from neox_lite.units import PAGE
from neox_lite_app.evaluation.quality import cut, log_probabilities
from neox_lite_app.models.random_model import RandomModel
from neox_lite_app.paths import DEMO
from neox_lite_quant import convert

ROOT = Path(__file__).parents[1]
SHAPE = {
    "vocab_size": 131,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "initializer_range": 0.09,  # about one over the root of the inputs: every part changes the logits
}
# Both sides compute in float32 from the same weights, with sums in another order, through three layers: some 40 roundings
# of the size of the largest logit, if they all add up.
EQUAL = 5e-6
# int8 activations: the largest of 32 numbers is about twice their rms, so a step is 2 / 127 of it and the rounding
# 2 / 127 / sqrt(12) = 0.5 %, once for each of the dozen products on a token's way.
COARSE = 0.02
IDS = torch.randint(1, 131, (1, 40), generator=torch.Generator().manual_seed(5))


# Models ---------------------------------------------------------------------------------------------------------------


def tiny(format: Format = DENSE, head: Format = DENSE, seed: int = 0, **config: Any) -> GPTNeoXForCausalLM:
    """A model with random gains, biases and weights, its blocks' linear layers in a format, exact."""
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**SHAPE, **config}))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    model.gpt_neox.embed_in.weight.normal_()
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            become(module, head if name == "embed_out" else format)
    model.exact = True
    return model


def become(module: Linear, format: Format) -> None:
    if not isinstance(format, GroupInt):
        return
    tensors = {**format.constants(module.shape), **format.encode(module.get_parameter("weight"), torch.float16)}
    module.become(format, torch.float16)
    for name, tensor in tensors.items():
        setattr(module, name, tensor)


def on(model: GPTNeoXForCausalLM, backend: str = "cpu", exact: bool = True) -> GPTNeoXForCausalLM:
    """The model, to run on a backend from here on."""
    model.version += 1
    model.exact, model.ops = exact, dispatch.load(backend).bind(exact)
    return model


@torch.no_grad()
def prefill_and_decode(model: GPTNeoXForCausalLM, lengths: Sequence[int] = (9, 3, 1), steps: int = 3) -> Tensor:
    """Logits of three prompts of different lengths in one pass, of a longer one, then of steps of them all."""
    pool = model.new_pool(pages=8)
    prompts = [IDS[0, 3 * i : 3 * i + n].tolist() for i, n in enumerate(lengths)]
    block_tables = [pool.new() for _ in prompts]
    out = [model.step(pool, block_tables, prompts)]
    out += [
        model.step(pool, block_tables, [[int(i)] for i in IDS[0, 20 + s : 20 + s + len(prompts)]]) for s in range(steps)
    ]
    return torch.stack(out)


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def relative(found: Tensor, truth: Tensor) -> float:
    """Size of the error relative to that of the logits, both rms."""
    return float((found - truth).square().mean().sqrt() / truth.square().mean().sqrt())


VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "int4-g128": {"format": GroupInt(4, 128)},
    "int8-g64-sequential": {"format": GroupInt(8, 64), "use_parallel_residual": False},
    "int4-g32-hidden160": {"format": GroupInt(4, 32), "hidden_size": 160, "num_attention_heads": 2, "rotary_pct": 0.4},
    "int8-g128-head8-tanh": {"format": GroupInt(8, 128), "head": GroupInt(8, 128), "hidden_act": "gelu_fast"},
    "int4-g64-tied-nobias": {"format": GroupInt(4, 64), "tie_word_embeddings": True, "attention_bias": False},
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> GPTNeoXForCausalLM:
    return tiny(**VARIANTS[request.param])


@pytest.fixture
def int4() -> GPTNeoXForCausalLM:
    return tiny(GroupInt(4, 128))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# Numbers --------------------------------------------------------------------------------------------------------------


def test_exact_logits_equal_the_reference_in_prefill_and_decode(model: GPTNeoXForCausalLM) -> None:
    for lengths in ((9, 3, 1), (1,), (2, 4)):  # up to 8 tokens from the words, more by torch
        expected = prefill_and_decode(on(model, "reference"), lengths)
        assert largest(prefill_and_decode(on(model), lengths) - expected) <= EQUAL * largest(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_dtypes_equal_the_reference(dtype: torch.dtype) -> None:
    """Weights, gains and biases in the dtype, and cached keys and values; between operations, float32."""
    model = tiny(GroupInt(4, 128)).to(dtype)
    expected = prefill_and_decode(on(model, "reference"))
    # Where keys are rounded to 16 bits, a rounding may fall the other way: a step of one element of a head, in few tokens.
    step = {torch.float64: 0.0}.get(dtype, torch.finfo(dtype).eps)
    assert largest(prefill_and_decode(on(model)) - expected) <= EQUAL * largest(expected) + step / 2


def test_logits_over_int8_pages_equal_the_reference() -> None:
    """But for codes whose rounding falls the other way: a step of one element of a head, in few tokens."""
    model = tiny(GroupInt(4, 128))
    model.kv = "int8"
    expected, found = (prefill_and_decode(on(model, name)) for name in ("reference", "cpu"))
    assert relative(found, expected) < 1e-3
    model.kv = "fp16"
    assert relative(expected, prefill_and_decode(on(model))) > 1e-3  # what the pages cost


def test_int8_activations_cost_what_their_rounding_does(model: GPTNeoXForCausalLM) -> None:
    exact, coarse = prefill_and_decode(on(model)), prefill_and_decode(on(model, exact=False))
    if model.gpt_neox.blocks[0].mlp.dense_h_to_4h.format == DENSE:
        assert torch.equal(exact, coarse)  # plain weights meet float32 activations in any case
    else:
        assert COARSE / 20 < relative(coarse, exact) < COARSE


def all_logits(model: GPTNeoXForCausalLM, ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """Logits of every token (tokens, vocabulary), the ids given in pieces."""
    cache, out = None, []
    for piece in ids.split(list(sizes), dim=1):
        found = model(piece, past_key_values=cache)
        cache = found.past_key_values
        out.append(found.logits[0])
    return torch.cat(out)


# Prefill and decode add up in different orders; where a number lies next to the middle between two codes, it is then
# rounded the other way. That is rare, and each time a code of one element: far less than what rounding all of them costs.
RARE = COARSE / 10


@pytest.mark.parametrize("sizes", [[1] * 40, [5] * 8, [13, 14, 13], [39, 1]], ids=str)
def test_pieces_of_any_size_give_what_one_prefill_gives(sizes: list[int], int4: GPTNeoXForCausalLM) -> None:
    for exact in (True, False):
        whole, pieces = all_logits(on(int4, exact=exact), IDS, [40]), all_logits(int4, IDS, sizes)
        if exact:
            assert largest(pieces - whole) <= EQUAL * largest(whole)
        else:
            assert relative(pieces, whole) < RARE


@pytest.mark.parametrize("rows", [2, 4, 7, 14])
def test_sequences_decoded_together_get_what_each_gets_alone(rows: int, int4: GPTNeoXForCausalLM) -> None:
    prompts = [IDS[0, i : i + 1 + i % 5].tolist() for i in range(rows)]
    for exact in (True, False):
        on(int4, exact=exact)

        def decoded(group: Sequence[list[int]]) -> Tensor:
            pool = int4.new_pool(pages=16)
            block_tables = [pool.new() for _ in group]
            for prompt, block_table in zip(group, block_tables, strict=True):
                int4.step(pool, [block_table], [prompt])
            steps = [int4.step(pool, block_tables, [[t + 3] for _ in group]) for t in range(3)]
            return torch.stack(steps, dim=1)  # (sequences, steps, vocabulary)

        together, alone = decoded(prompts), torch.cat([decoded([prompt]) for prompt in prompts])
        if exact:
            assert largest(together - alone) <= EQUAL * largest(alone)
        else:
            assert relative(together, alone) < RARE


# Captured steps -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def uncaptured(model: GPTNeoXForCausalLM, pool: PagePool, block_tables: Sequence[Any], ids: Sequence[int]) -> Tensor:
    """A decode step by the same operations, called one after another."""
    batch = Batch.reserve(pool, block_tables, [1] * len(ids))
    x = model.runner.hidden_states(model.runner.embed(torch.tensor(ids)), pool, batch)
    return model.ops.head(x, None, norm_of(model.gpt_neox.final_layer_norm), model.embed_out.handle)


def captured_equals_uncaptured(model: GPTNeoXForCausalLM, rows: int, length: int = 3, steps: int = 4) -> PagePool:
    """Runs both over forks of the same sequences; the pool they used."""
    pool = model.new_pool(pages=32)
    block_tables = [pool.new() for _ in range(rows)]
    model.step(pool, block_tables, [[(i + t) % 131 for t in range(length + i)] for i in range(rows)])
    twins = [pool.fork(s) for s in block_tables]
    for step in range(steps):
        ids = [(step * 7 + i) % 131 for i in range(rows)]
        found = model.step(pool, block_tables, [[i] for i in ids])
        assert torch.equal(found, uncaptured(model, pool, twins, ids))
    return pool


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "int8"])
def test_a_captured_step_is_bit_equal_to_its_operations(
    exact: bool, model: GPTNeoXForCausalLM, two_threads: None
) -> None:
    on(model, exact=exact)
    for rows in (1, 3, 6):
        captured_equals_uncaptured(model, rows)
    captured_equals_uncaptured(model, 2, length=PAGE - 3, steps=6)  # into the next page


def test_a_captured_step_works_on_int8_pages(int4: GPTNeoXForCausalLM) -> None:
    int4.kv = "int8"
    captured_equals_uncaptured(on(int4, exact=False), 2)


def test_a_step_that_torch_has_a_part_in_is_not_captured_and_right(int4: GPTNeoXForCausalLM) -> None:
    """More tokens than the exact kernels take."""
    pool = captured_equals_uncaptured(on(int4), 12)
    assert int4.runner.passes.graphs(pool) == {(12, 12): None}


def test_one_capture_serves_all_steps_until_the_pool_moves_its_pages(int4: GPTNeoXForCausalLM) -> None:
    on(int4, exact=False)
    pool = int4.new_pool()  # without pages: it grows, and moves them, as they are needed
    block_table, captures, sizes = pool.new(), [], []
    for step in range(12):
        if step % 4 == 3:  # to just before the next page
            int4.step(pool, [block_table], [[1] * (PAGE - 2 - block_table.length % PAGE)])
        twin = pool.fork(block_table)
        expected = uncaptured(int4, pool, [twin], [step])
        pool.free(twin)
        assert torch.equal(int4.step(pool, [block_table], [[step]]), expected)
        captures.append(int4.runner.passes.graphs(pool)[1, 1])
        sizes.append(pool.pages)
    assert len(set(sizes)) == 3
    for before, after in zip(range(11), range(1, 12), strict=True):
        assert (captures[before] is captures[after]) == (sizes[before] == sizes[after])


def test_each_number_of_sequences_has_its_own_capture(int4: GPTNeoXForCausalLM) -> None:
    on(int4, exact=False)
    pool = int4.new_pool(pages=16)
    block_tables = [pool.new() for _ in range(3)]
    for count in (3, 1, 2, 3, 1):
        twins = [pool.fork(s) for s in block_tables[:count]]
        found = int4.step(pool, block_tables[:count], [[5]] * count)
        assert torch.equal(found, uncaptured(int4, pool, twins, [5] * count))
    assert set(int4.runner.passes.graphs(pool)) == {(1, 1), (2, 2), (3, 3)}


@torch.no_grad()
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "int8"])
def test_a_captured_pass_of_several_tokens_serves_every_split_of_them_bit_equally(
    exact: bool, int4: GPTNeoXForCausalLM, two_threads: None
) -> None:
    on(int4, exact=exact)
    pool = int4.new_pool(pages=32)
    block_tables = [pool.new() for _ in range(3)]
    int4.step(pool, block_tables, [[5] * (PAGE - 9 + i) for i in range(3)])  # soon over the end of a page
    for counts in ([2, 1, 4], [1, 1, 5], [5, 1, 1], [3, 3, 1], [1, 4, 2]):
        tokens = [[(7 * i + t) % 131 for t in range(n)] for i, n in enumerate(counts)]
        twins = [pool.fork(s) for s in block_tables]
        found = int4.step(pool, block_tables, tokens, every=True)
        batch = Batch.reserve(pool, twins, counts)
        x = int4.runner.hidden_states(int4.runner.embed(torch.tensor([i for t in tokens for i in t])), pool, batch)
        expected = int4.ops.head(x, None, norm_of(int4.gpt_neox.final_layer_norm), int4.embed_out.handle)
        assert torch.equal(found, expected) and [s.length for s in block_tables] == [t.length for t in twins]
        for twin in twins:
            pool.free(twin)
    assert {shape: c is not None for shape, c in int4.runner.passes.graphs(pool).items()} == {(3, 7): True}


@torch.no_grad()
def test_captured_passes_are_few_and_small(int4: GPTNeoXForCausalLM) -> None:
    on(int4, exact=False)
    pool = int4.new_pool(pages=64)
    block_tables = [pool.new() for _ in range(40)]
    for count in range(1, 41):
        int4.step(pool, block_tables[:count], [[5]] * count)
    shapes = list(int4.runner.passes.graphs(pool))
    assert shapes == [(n, n) for n in range(41 - MAX_GRAPHS, 41)]
    int4.step(pool, block_tables[:9], [[5]] * 9)  # used again: it stays longest
    assert list(int4.runner.passes.graphs(pool))[-1] == (9, 9)
    for tokens in (MAX_TOKENS, MAX_TOKENS + 1):
        int4.step(pool, block_tables[:1], [[5] * tokens], every=True)
        int4.step(pool, block_tables[:1], [[5] * tokens])  # a prompt comes once
    assert [n for _, n in int4.runner.passes.graphs(pool) if n > 1][-1] == MAX_TOKENS


def test_a_capture_is_forgotten_with_its_pool(int4: GPTNeoXForCausalLM) -> None:
    on(int4, exact=False)
    pool = int4.new_pool(pages=2)
    int4.step(pool, [pool.new()], [[5]])
    passes = int4.runner.passes
    assert passes.pools == 1
    del pool
    assert passes.pools == 0


def test_moving_a_model_to_another_dtype_makes_captures_anew(int4: GPTNeoXForCausalLM) -> None:
    on(int4, exact=False)
    pool = int4.new_pool(pages=8)  # it stays, and keeps its dtype
    block_table, logits = pool.new(), []
    int4.step(pool, [block_table], [[1, 2, 3]])
    for move in (int4.float, int4.half, int4.bfloat16, int4.float):
        move()
        assert int4.runner.passes.pools == 0
        twins = [pool.fork(block_table) for _ in range(2)]
        logits.append(int4.step(pool, twins[:1], [[5]]))
        assert torch.equal(logits[-1], uncaptured(int4, pool, twins[1:], [5]))
    differences = [relative(later, logits[0]) for later in logits[1:]]
    assert all(0 < d < COARSE for d in differences), differences  # gains, biases and embedding have been rounded


def test_ids_outside_the_vocabulary_are_refused_by_captured_steps_too(int4: GPTNeoXForCausalLM) -> None:
    on(int4, exact=False)
    pool = int4.new_pool(pages=4)
    block_table = pool.new()
    for _ in range(2):  # before there is a capture, and after
        for wrong in (131, -1, 1 << 40):
            with pytest.raises(ArgumentError, match=f"input_ids: found {wrong}, expected 0 to 130"):
                int4.step(pool, [block_table], [[wrong]])
        length, twin = block_table.length, pool.fork(block_table)
        assert torch.equal(int4.step(pool, [block_table], [[7]]), uncaptured(int4, pool, [twin], [7]))
        assert block_table.length == length + 1


def test_results_of_captured_steps_are_the_callers_own(int4: GPTNeoXForCausalLM) -> None:
    on(int4, exact=False)
    pool = int4.new_pool(pages=4)
    block_table = pool.new()
    first = int4.step(pool, [block_table], [[1]])
    kept = first.clone()
    int4.step(pool, [block_table], [[2]])
    assert torch.equal(first, kept)


def test_two_python_threads_generate_what_one_does(int4: GPTNeoXForCausalLM, two_threads: None) -> None:
    on(int4, exact=False)
    prompts = [torch.tensor([[5, 6, 7]]), torch.tensor([[9, 8, 7, 6, 5], [3, 1, 4, 1, 5]])]

    found: dict[int, Tensor] = {}

    def generate(i: int) -> None:
        found[i] = int4.generate(prompts[i], max_new_tokens=40, do_sample=False, eos_token_id=-1)

    for i in range(2):
        generate(i)
    expected = dict(found)
    for _ in range(3):
        found.clear()
        threads = [threading.Thread(target=generate, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[i], expected[i]) for i in range(2))


# Weights in place -----------------------------------------------------------------------------------------------------


def mapping(file: Path) -> dict[str, int]:
    """Of the places where this process has a file mapped: the sums of what /proc/self/smaps says, in kB, and the ends."""
    sums: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file.resolve()))
            if inside:
                first, last = (int(end, 16) for end in line.split()[0].split("-"))
                sums["first"], sums["last"] = min(first, sums.get("first", first)), max(last, sums.get("last", last))
        elif inside and line.endswith(" kB"):
            key, _, count = line.partition(":")
            sums[key] = sums.get(key, 0) + int(count.split()[0])
    return sums


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "int8"])
def test_weights_are_read_where_the_file_is_mapped(exact: bool, tmp_path: Path) -> None:
    config = GPTNeoXConfig(**{**SHAPE, "hidden_size": 1024, "num_attention_heads": 32, "intermediate_size": 4096})
    RandomModel(config, GroupInt(4, 128)).write(tmp_path / "m", lambda done, total: None)
    file = tmp_path / "m" / "model.safetensors"

    def places(model: GPTNeoXForCausalLM) -> dict[str, int]:
        tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        return {name: t.data_ptr() for name, t in tensors.items() if not name.endswith("rotary.table")}

    def use(model: GPTNeoXForCausalLM) -> PagePool:
        """Read prompts and decode; the pool keeps the captured steps alive."""
        pool = model.new_pool(pages=2)
        block_tables = [pool.new(), pool.new()]
        for tokens in ([[1, 2, 3], [4]], [[5], [6]], [[7], [8]]):
            model.step(pool, block_tables, tokens)
        return pool

    # What modules, threads and compiling take for good: a model of the same kernels, for heads are as large.
    GPTNeoXForCausalLM.from_pretrained(tmp_path / "m")
    use(on(tiny(GroupInt(4, 128)).half(), exact=exact))
    gc.collect()
    held = private_kb()
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path / "m", exact=exact)
    before, pool = places(model), use(model)
    grown_kb, seen = private_kb() - held, mapping(file)
    assert grown_kb < file.stat().st_size / 1024 / 4  # pages of the cache and little else: no copy of the weights
    assert places(model) == before and pool.pages == 2
    assert all(seen["first"] <= place < seen["last"] for place in before.values())
    assert seen["Private_Dirty"] == 0 and seen["Rss"] > 0


def private_kb() -> int:
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])


# Compiled kernels on disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def object_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and another empty place for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "neox-lite" / "kernels"


class Process:
    """As a new process would, compile a function that returns a number, run it, and see what that took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.patch, self.captured, self.optimized = monkeypatch, capfd, compile._optimized

    def run(self, number: int = 7) -> tuple[int, int, str]:
        """-> (what the function returned, how often LLVM was at work, what was said)."""
        compiled: list[object] = []

        def optimized(*arguments: Any) -> Any:
            compiled.append(arguments)
            return self.optimized(*arguments)

        self.patch.setattr(compile, "_loaded", {})
        self.patch.setattr(compile, "_announced", False)
        self.patch.setattr(compile, "_optimized", optimized)
        self.captured.readouterr()

        def build(module: Any) -> None:
            Code(module, f"give_{number}", 0).ret(number)

        addresses = {compile.compiled(f"give_{number}", build, target.host()) for _ in range(2)}
        assert len(addresses) == 1
        result = ctypes.CFUNCTYPE(ctypes.c_int64)(addresses.pop())()
        return result, len(compiled), self.captured.readouterr().err


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Process:
    return Process(monkeypatch, capfd)


SAID = "neox-lite: compiling kernels for this processor (once; a few seconds)\n"


def test_a_kernel_is_compiled_once_and_found_by_the_next_process(object_cache: Path, process: Process) -> None:
    assert process.run(7) == (7, 1, SAID)
    (file,) = object_cache.iterdir()
    assert process.run(7) == (7, 0, "")
    assert process.run(8) == (8, 1, SAID)
    assert len(list(object_cache.iterdir())) == 2 and file.exists()
    assert list((object_cache.parents[2] / "tmp").iterdir()) == []


def test_another_processor_llvm_or_source_has_files_of_its_own(
    object_cache: Path, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert process.run()[1] == 1
    for changed in ("llvmlite.__version__", "source"):
        with monkeypatch.context() as patch:
            if changed == "source":
                patch.setattr(compile, "_source_hash", lambda: "another")
            else:
                patch.setattr(compile.llvmlite, "__version__", "another")
            process.patch = patch
            assert process.run()[1] == 1
        process.patch = monkeypatch
    assert process.run()[1] == 0
    assert len(list(object_cache.iterdir())) == 3


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-1], lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:], lambda b: b[32:]]
)
def test_a_damaged_file_is_made_anew(damage: Callable[[bytes], bytes], object_cache: Path, process: Process) -> None:
    process.run()
    (file,) = object_cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    assert process.run() == (7, 1, SAID)
    assert file.read_bytes() == whole
    assert process.run() == (7, 0, "")


def test_where_the_cache_cannot_be_written_a_temporary_folder_keeps_kernels(
    object_cache: Path, process: Process
) -> None:
    (object_cache.parents[1]).write_text("a file where the folder should be: not even root can write there")
    assert process.run() == (7, 1, SAID)
    (folder,) = (object_cache.parents[2] / "tmp").iterdir()
    assert len(list(folder.iterdir())) == 1 and folder.stat().st_mode & 0o777 == 0o700
    assert process.run() == (7, 0, "")


def test_where_nothing_can_be_written_kernels_are_compiled_each_time(
    tmp_path: Path, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(compile, "cache_folders", lambda: [tmp_path / "file" / "a", tmp_path / "file" / "b"])
    assert [process.run() for _ in range(2)] == [(7, 1, SAID)] * 2


@pytest.mark.parametrize("missing", ["home", "temporary folder"])
def test_systems_without_a_home_or_without_room_for_temporary_files_use_the_other(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setenv("XDG_CACHE_HOME", "~nosuchuser/cache" if missing == "home" else str(tmp_path))
    if missing != "home":
        monkeypatch.setattr(tempfile, "gettempdir", refuse)
    (folder,) = compile.cache_folders()
    assert folder.name == "kernels" if missing != "home" else folder.name.startswith("neox-lite-kernels-")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no user ids")
def test_a_folder_of_another_user_is_neither_read_nor_written(
    object_cache: Path, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.run()
    (file,) = object_cache.iterdir()
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert process.run() == (7, 1, SAID)
    assert process.run(8) == (8, 1, SAID)
    assert list(object_cache.iterdir()) == [file]


def test_a_second_start_compiles_nothing_and_says_nothing(tmp_path: Path) -> None:
    RandomModel(GPTNeoXConfig(**SHAPE), GroupInt(4, 128)).write(tmp_path / "m", lambda done, total: None)
    script = f"""
from neox_lite import GPTNeoXForCausalLM
import torch
model = GPTNeoXForCausalLM.from_pretrained({str(tmp_path / "m")!r})
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False).tolist())
"""
    runs = [run_python(script, XDG_CACHE_HOME=str(tmp_path / "xdg")) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert [said(run) for run in runs] == [SAID, ""]


def said(run: subprocess.CompletedProcess[str]) -> str:
    """Its stderr without warnings about this folder's lack of a tokenizer and the like."""
    return "".join(
        line + "\n" for line in run.stderr.splitlines() if "tokenizer" not in line and not line.startswith("  ")
    )


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "quant", ROOT / "app")))}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**known, **environment})


# Without llvmlite -----------------------------------------------------------------------------------------------------


def test_without_llvmlite_the_reference_runs_and_one_warning_says_why(tmp_path: Path) -> None:
    """Nothing of this package's top imports it."""
    script = """
import sys, warnings
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "llvmlite":
            raise ImportError(name)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "llvmlite" else found(name, *a)
sys.meta_path.insert(0, Blocked())
import torch
from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=131, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=64, max_position_embeddings=64))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)
print(model.ops.name)
for warning in seen:
    print(warning.message)
"""
    run = run_python(script)
    name, *seen = run.stdout.splitlines()
    assert (name, len(seen)) == ("reference", 1), run.stderr
    assert (
        seen[0] == "the cpu backend cannot be used, this will be slow: llvmlite is not installed; pip install llvmlite"
    )


def test_the_backend_declines_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.why_not(torch.device("cpu")) is None
    assert cpu.why_not(torch.device("cuda")) == "runs on the CPU only, this is cuda"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dispatch.reasons(torch.device("cpu"))["cpu"] == "llvmlite is not installed; pip install llvmlite"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert dispatch.choose(torch.device("cpu")).name == "reference"
    assert len(seen) == 1


# What callers do wrong, or at the same time ---------------------------------------------------------------------------


@torch.no_grad()
def test_steps_beyond_the_context_are_refused_and_append_nothing() -> None:
    model = on(tiny(GroupInt(4, 32), max_position_embeddings=128))
    pool = model.new_pool()
    block_table = pool.new()
    model.step(pool, [block_table], [[1] * 127])
    model.step(pool, [block_table], [[1]])
    for tokens in ([1], [1] * 200):
        with pytest.raises(ContextLengthError, match="after 128 cached ones do not fit: this model has 128 positions"):
            model.step(pool, [block_table], [tokens])
    assert block_table.length == 128


@torch.no_grad()
def test_memory_that_a_weight_gave_up_stays_while_a_captured_step_reads_it() -> None:
    model = on(tiny(GroupInt(4, 32)))
    pool = model.new_pool(pages=1)
    block_table = pool.new()
    first = model.step(pool, [block_table], [[5]])
    layer = model.gpt_neox.layers[0]
    before = layer.input_layernorm.weight.data_ptr()
    layer.input_layernorm.weight.data = layer.input_layernorm.weight.data.clone()
    taken = [torch.full_like(layer.input_layernorm.weight, torch.nan) for _ in range(1000)]  # what is free is now this
    assert before not in {t.data_ptr() for t in taken}
    pool.truncate(block_table, 0)
    assert torch.equal(model.step(pool, [block_table], [[5]]), first)


@torch.no_grad()
def test_threads_that_share_a_pool_get_their_own_tokens() -> None:
    model = on(tiny(GroupInt(4, 32)))
    alone = [greedy(model, model.new_pool(pages=8), i) for i in range(4)]
    pool, found = model.new_pool(pages=8), {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: greedy(model, pool, i)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == alone


def greedy(model: GPTNeoXForCausalLM, pool: PagePool, first: int, count: int = 60) -> list[int]:
    block_table, tokens = pool.new(), [first + 1]
    for _ in range(count):
        tokens.append(int(model.step(pool, [block_table], [tokens[-1:]]).argmax()))
    return tokens


# Quality --------------------------------------------------------------------------------------------------------------


def write_outliers(folder: Path) -> Path:
    """The demo model with some channels of its norms 30 times as large and the weights that read them as much smaller.

    It computes the same function, but for rounding: such channels are what trained models of more layers have.
    """
    model = GPTNeoXForCausalLM.from_pretrained(DEMO).float()
    chosen = torch.arange(5, model.config.hidden_size, 41)
    readers: list[tuple[Any, Any]] = [
        *((layer.input_layernorm, layer.attention.query_key_value) for layer in model.gpt_neox.blocks),
        *((layer.post_attention_layernorm, layer.mlp.dense_h_to_4h) for layer in model.gpt_neox.blocks),
        (model.gpt_neox.final_layer_norm, model.embed_out),
    ]
    with torch.no_grad():
        for norm, reader in readers:
            norm.weight[chosen] *= 30.0
            norm.bias[chosen] *= 30.0
            reader.weight[:, chosen] /= 30.0
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    return folder


def kl(truth: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Mean KL(truth || found) in nats a token."""
    return float(
        torch.cat([(t.exp().double() * (t - f).double()).sum(-1) for t, f in zip(truth, found, strict=True)]).mean()
    )


def distances(folder: Path, scratch: Path) -> dict[str, float]:
    """KL of int4 with exact activations to the dense model, and of int4 with int8 activations to either."""
    convert(folder, scratch / "int4", format="int4", group_size=128)
    dense = GPTNeoXForCausalLM.from_pretrained(folder)
    windows = cut(dense, (DEMO / "heldout.txt").read_text(encoding="utf-8"), 128)[:8]

    def scores(model: Any) -> list[Tensor]:
        return list(log_probabilities(model, windows))

    truth = scores(dense)
    exact, coarse = (scores(GPTNeoXForCausalLM.from_pretrained(scratch / "int4", exact=e)) for e in (True, False))
    return {"int4": kl(truth, exact), "activations": kl(exact, coarse), "both": kl(truth, coarse)}


@pytest.mark.parametrize("outliers", [False, True], ids=["demo", "outliers"])
def test_int8_activations_add_at_most_a_quarter_of_what_int4_costs(outliers: bool, tmp_path: Path) -> None:
    found = distances(write_outliers(tmp_path / "dense") if outliers else DEMO, tmp_path)
    assert 0 < found["activations"] <= found["int4"] / 4
    assert found["both"] <= found["int4"] * 1.25


def test_the_model_with_outliers_is_the_same_function(tmp_path: Path) -> None:
    """Else the test above would say nothing about outliers."""
    found, expected = (
        GPTNeoXForCausalLM.from_pretrained(folder).float()(IDS).logits
        for folder in (write_outliers(tmp_path / "m"), DEMO)
    )
    assert largest(found - expected) < 2e-4  # float32 rounding of logits of order ten
