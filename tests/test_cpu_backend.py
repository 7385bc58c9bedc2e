"""Whole models on the CPU's kernels: as near to the reference as 8-bit activations allow; captured, mapped, cached.

That exact logits equal the reference's, and what single kernels compute, is in test_kernels.py.
"""

import ctypes
import gc
import importlib.util
import os
import re
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.commands import run_python
from support.models import INT4, MODELS, SHAPE, prefill_and_decode, tiny_model

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.cache import Batch
from neox_lite.errors import ArgumentError, ContextLengthError
from neox_lite.formats import DENSE, GroupInt
from neox_lite.kernels import cpu, dispatch
from neox_lite.kernels.cpu import compile, target
from neox_lite.kernels.cpu.code import Code
from neox_lite.kernels.graphs import MAX_GRAPHS, MAX_TOKENS
from neox_lite.layers import norm_of
from neox_lite.units import PAGE
from neox_lite_app.evaluation.quality import cut, log_probabilities
from neox_lite_app.models.random_model import RandomModel
from neox_lite_app.paths import DEMO
from neox_lite_quant import convert

# Both sides compute in float32 from the same weights, with sums in another order, through three layers: some 40 roundings
# of the size of the largest logit, if they all add up.
EQUAL = 5e-6
# int8 activations: the largest of 32 numbers is about twice their rms, so a step is 2 / 127 of it and the rounding
# 2 / 127 / sqrt(12) = 0.5 %, once for each of the dozen products on a token's way.
COARSE = 0.02
IDS = torch.randint(1, 131, (1, 40), generator=torch.Generator().manual_seed(5))


def on(model, backend="cpu", exact=True):
    """The model, to run on a backend from here on."""
    model.version += 1
    model.exact, model.ops = exact, dispatch.load(backend).bind(exact)
    return model


def largest(difference):
    return float(difference.abs().max())


def relative(found, truth):
    """Size of the error relative to that of the logits, both rms."""
    return float((found - truth).square().mean().sqrt() / truth.square().mean().sqrt())


@pytest.fixture(params=[name for name in MODELS if name != "nf4"])
def model(request):
    return tiny_model(**MODELS[request.param])


@pytest.fixture
def int4():
    return tiny_model(GroupInt(4, 128))


@pytest.fixture
def coarse(int4):
    """With int8 activations."""
    return on(int4, exact=False)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_dtypes_equal_the_reference(dtype):
    """Weights, gains and biases in the dtype, and cached keys and values; between operations, float32."""
    model = tiny_model(GroupInt(4, 128)).to(dtype)
    expected = prefill_and_decode(on(model, "reference"))
    # Where keys are rounded to 16 bits, a rounding may fall the other way: a step of one element of a head, in few tokens.
    step = {torch.float64: 0.0}.get(dtype, torch.finfo(dtype).eps)
    assert largest(prefill_and_decode(on(model)) - expected) <= EQUAL * largest(expected) + step / 2


def test_logits_over_int8_pages_equal_the_reference():
    """But for codes whose rounding falls the other way: a step of one element of a head, in few tokens."""
    model = tiny_model(GroupInt(4, 128))
    model.kv = "int8"
    expected, found = (prefill_and_decode(on(model, name)) for name in ("reference", "cpu"))
    assert relative(found, expected) < 1e-3
    model.kv = "fp16"
    assert relative(expected, prefill_and_decode(on(model))) > 1e-3  # what the pages cost


def test_int8_activations_cost_what_their_rounding_does(model):
    exact, coarse = prefill_and_decode(on(model)), prefill_and_decode(on(model, exact=False))
    if model.gpt_neox.blocks[0].mlp.dense_h_to_4h.format == DENSE:
        assert torch.equal(exact, coarse)  # plain weights meet float32 activations in any case
    else:
        assert COARSE / 20 < relative(coarse, exact) < COARSE


def all_logits(model, ids, sizes):
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
def test_pieces_of_any_size_give_what_one_prefill_gives(sizes, int4):
    for exact in (True, False):
        whole, pieces = all_logits(on(int4, exact=exact), IDS, [40]), all_logits(int4, IDS, sizes)
        if exact:
            assert largest(pieces - whole) <= EQUAL * largest(whole)
        else:
            assert relative(pieces, whole) < RARE


@pytest.mark.parametrize("rows", [2, 4, 7, 14])
def test_sequences_decoded_together_get_what_each_gets_alone(rows, int4):
    prompts = [IDS[0, i : i + 1 + i % 5].tolist() for i in range(rows)]
    for exact in (True, False):
        on(int4, exact=exact)

        def decoded(group):
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
def equal_step(model, pool, block_tables, tokens, twins=None):
    """A step's logits, bit-equal to those of its operations, called one after another over forks of the sequences."""
    forks = [pool.fork(s) for s in block_tables] if twins is None else twins
    batch = Batch.reserve(pool, forks, [len(t) for t in tokens])
    x = model.runner.embed(torch.tensor([i for t in tokens for i in t]))
    x = model.runner.hidden_states(x, pool, batch)
    expected = model.ops.head(x, None, norm_of(model.gpt_neox.final_layer_norm), model.embed_out.handle)
    lengths = [fork.length for fork in forks]
    for fork in forks if twins is None else ():
        pool.free(fork)
    found = model.step(pool, block_tables, tokens, every=True)
    assert torch.equal(found, expected) and [s.length for s in block_tables] == lengths
    return found


def equal_steps(model, rows, length=3, steps=4):
    """Runs both over sequences and twins of their own; the pool they used."""
    pool = model.new_pool(pages=32)
    block_tables = [pool.new() for _ in range(rows)]
    model.step(pool, block_tables, [[(i + t) % 131 for t in range(length + i)] for i in range(rows)])
    twins = [pool.fork(s) for s in block_tables]
    for step in range(steps):
        equal_step(model, pool, block_tables, [[(step * 7 + i) % 131] for i in range(rows)], twins)
    return pool


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "int8"])
def test_a_captured_step_is_bit_equal_to_its_operations(exact, model, two_threads):
    on(model, exact=exact)
    for rows in (1, 3, 6):
        equal_steps(model, rows)
    equal_steps(model, 2, length=PAGE - 3, steps=6)  # into the next page


def test_a_captured_step_works_on_int8_pages(coarse):
    coarse.kv = "int8"
    equal_steps(coarse, 2)


def test_a_step_that_torch_has_a_part_in_is_not_captured_and_right(int4):
    """More tokens than the exact kernels take."""
    pool = equal_steps(on(int4), 12)
    assert int4.runner.passes.graphs(pool) == {(12, 12): None}


def test_one_capture_serves_all_steps_until_the_pool_moves_its_pages(coarse):
    pool = coarse.new_pool()  # without pages: it grows, and moves them, as they are needed
    block_table, captures, sizes = pool.new(), [], []
    for step in range(12):
        if step % 4 == 3:  # to just before the next page
            coarse.step(pool, [block_table], [[1] * (PAGE - 2 - block_table.length % PAGE)])
        equal_step(coarse, pool, [block_table], [[step]])
        captures.append(coarse.runner.passes.graphs(pool)[1, 1])
        sizes.append(pool.pages)
    assert len(set(sizes)) == 3
    for before, after in pairwise(range(12)):
        assert (captures[before] is captures[after]) == (sizes[before] == sizes[after])


def test_each_number_of_sequences_has_its_own_capture(coarse):
    pool = coarse.new_pool(pages=16)
    block_tables = [pool.new() for _ in range(3)]
    for count in (3, 1, 2, 3, 1):
        equal_step(coarse, pool, block_tables[:count], [[5]] * count)
    assert set(coarse.runner.passes.graphs(pool)) == {(1, 1), (2, 2), (3, 3)}


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "int8"])
def test_a_captured_pass_of_several_tokens_serves_every_split_of_them_bit_equally(exact, int4, two_threads):
    pool = on(int4, exact=exact).new_pool(pages=32)
    block_tables = [pool.new() for _ in range(3)]
    int4.step(pool, block_tables, [[5] * (PAGE - 9 + i) for i in range(3)])  # soon over the end of a page
    for counts in ([2, 1, 4], [1, 1, 5], [5, 1, 1], [3, 3, 1], [1, 4, 2]):
        equal_step(int4, pool, block_tables, [[(7 * i + t) % 131 for t in range(n)] for i, n in enumerate(counts)])
    assert {shape: c is not None for shape, c in int4.runner.passes.graphs(pool).items()} == {(3, 7): True}


@torch.no_grad()
def test_captured_passes_are_few_and_small(coarse):
    pool = coarse.new_pool(pages=64)
    block_tables = [pool.new() for _ in range(40)]
    for count in range(1, 41):
        coarse.step(pool, block_tables[:count], [[5]] * count)
    shapes = list(coarse.runner.passes.graphs(pool))
    assert shapes == [(n, n) for n in range(41 - MAX_GRAPHS, 41)]
    coarse.step(pool, block_tables[:9], [[5]] * 9)  # used again: it stays longest
    assert list(coarse.runner.passes.graphs(pool))[-1] == (9, 9)
    for tokens in (MAX_TOKENS, MAX_TOKENS + 1):
        coarse.step(pool, block_tables[:1], [[5] * tokens], every=True)
        coarse.step(pool, block_tables[:1], [[5] * tokens])  # a prompt comes once
    assert [n for _, n in coarse.runner.passes.graphs(pool) if n > 1][-1] == MAX_TOKENS


def test_a_capture_is_forgotten_with_its_pool(coarse):
    pool = coarse.new_pool(pages=2)
    coarse.step(pool, [pool.new()], [[5]])
    passes = coarse.runner.passes
    assert passes.pools == 1
    del pool
    assert passes.pools == 0


def test_moving_a_model_to_another_dtype_makes_captures_anew(coarse):
    pool = coarse.new_pool(pages=8)  # it stays, and keeps its dtype
    block_table, logits = pool.new(), []
    coarse.step(pool, [block_table], [[1, 2, 3]])
    for move in (coarse.float, coarse.half, coarse.bfloat16, coarse.float):
        move()
        assert coarse.runner.passes.pools == 0
        logits.append(equal_step(coarse, pool, [pool.fork(block_table)], [[5]]))
    differences = [relative(later, logits[0]) for later in logits[1:]]
    assert all(0 < d < COARSE for d in differences), differences  # gains, biases and embedding have been rounded


def test_ids_outside_the_vocabulary_are_refused_by_captured_steps_too(coarse):
    pool = coarse.new_pool(pages=4)
    block_table = pool.new()
    for length in (0, 1):  # before there is a capture, and after
        for wrong in (131, -1, 1 << 40):
            with pytest.raises(ArgumentError, match=f"input_ids: found {wrong}, expected 0 to 130"):
                coarse.step(pool, [block_table], [[wrong]])
        assert block_table.length == length
        equal_step(coarse, pool, [block_table], [[7]])


def test_results_of_captured_steps_are_the_callers_own(coarse):
    pool = coarse.new_pool(pages=4)
    block_table = pool.new()
    first = coarse.step(pool, [block_table], [[1]])
    kept = first.clone()
    coarse.step(pool, [block_table], [[2]])
    assert torch.equal(first, kept)


@torch.no_grad()
def test_memory_that_a_weight_gave_up_stays_while_a_captured_step_reads_it(int4):
    pool = on(int4).new_pool(pages=1)
    block_table = pool.new()
    first, norm = int4.step(pool, [block_table], [[5]]), int4.gpt_neox.layers[0].input_layernorm
    before = norm.weight.data_ptr()
    norm.weight.data = norm.weight.data.clone()
    taken = [torch.full_like(norm.weight, torch.nan) for _ in range(1000)]  # what is free is now this
    assert before not in {t.data_ptr() for t in taken}
    pool.truncate(block_table, 0)
    assert torch.equal(int4.step(pool, [block_table], [[5]]), first)


# Threads and bounds ---------------------------------------------------------------------------------------------------


def in_threads(count, run):
    """run(i) of each, at the same time."""
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def test_two_python_threads_generate_what_one_does(coarse, two_threads):
    prompts = [torch.tensor([[5, 6, 7]]), torch.tensor([[9, 8, 7, 6, 5], [3, 1, 4, 1, 5]])]

    def generate(i):
        return coarse.generate(prompts[i], max_new_tokens=40, do_sample=False, eos_token_id=-1).tolist()

    expected = [generate(0), generate(1)]
    assert all(in_threads(2, generate) == expected for _ in range(3))


@torch.no_grad()
def test_threads_that_share_a_pool_get_their_own_tokens(int4):
    def greedy(pool, first):
        block_table, tokens = pool.new(), [first + 1]
        for _ in range(60):
            tokens.append(int(int4.step(pool, [block_table], [tokens[-1:]]).argmax()))
        return tokens

    alone = [greedy(on(int4).new_pool(pages=8), i) for i in range(4)]
    shared = int4.new_pool(pages=8)
    assert in_threads(4, lambda i: greedy(shared, i)) == alone


@torch.no_grad()
def test_steps_beyond_the_context_are_refused_and_append_nothing():
    model = on(tiny_model(INT4, max_position_embeddings=128))
    pool = model.new_pool()
    block_table = pool.new()
    model.step(pool, [block_table], [[1] * 127])
    model.step(pool, [block_table], [[1]])
    for tokens in ([1], [1] * 200):
        with pytest.raises(ContextLengthError, match="after 128 cached ones do not fit: this model has 128 positions"):
            model.step(pool, [block_table], [tokens])
    assert block_table.length == 128


# Weights in place -----------------------------------------------------------------------------------------------------


def mapping(file):
    """Of the places where this process has a file mapped: the sums of what /proc/self/smaps says, in kB, and the ends."""
    sums = {}
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
def test_weights_are_read_where_the_file_is_mapped(exact, tmp_path):
    config = GPTNeoXConfig(**{**SHAPE, "hidden_size": 1024, "num_attention_heads": 32, "intermediate_size": 4096})
    RandomModel(config, GroupInt(4, 128)).write(tmp_path / "m", lambda done, total: None)
    file = tmp_path / "m" / "model.safetensors"

    def places(model):
        tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        return {name: t.data_ptr() for name, t in tensors.items() if not name.endswith("rotary.table")}

    def use(model):
        """Read prompts and decode; the pool keeps the captured steps alive."""
        pool = model.new_pool(pages=2)
        block_tables = [pool.new(), pool.new()]
        for tokens in ([[1, 2, 3], [4]], [[5], [6]], [[7], [8]]):
            model.step(pool, block_tables, tokens)
        return pool

    # What modules, threads and compiling take for good: a model of the same kernels, for heads are as large.
    GPTNeoXForCausalLM.from_pretrained(tmp_path / "m")
    use(on(tiny_model(GroupInt(4, 128)).half(), exact=exact))
    gc.collect()
    held = private_kb()
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path / "m", exact=exact)
    before, pool = places(model), use(model)
    grown_kb, seen = private_kb() - held, mapping(file)
    assert grown_kb < file.stat().st_size / 1024 / 4  # pages of the cache and little else: no copy of the weights
    assert places(model) == before and pool.pages == 2
    assert all(seen["first"] <= place < seen["last"] for place in before.values())
    assert seen["Private_Dirty"] == 0 and seen["Rss"] > 0


def private_kb():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])


# Compiled kernels on disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def object_cache(tmp_path, monkeypatch):
    """An empty cache folder, and another empty place for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "neox-lite" / "kernels"


@pytest.fixture
def process(monkeypatch, capfd):
    """As a new process would, compile a function that returns a number, run it, and see what that took:
    -> what the function returned, how often LLVM was at work, what was said."""
    optimized, compiled = compile._optimized, []
    monkeypatch.setattr(compile, "_optimized", lambda *given: (compiled.append(given), optimized(*given))[1])

    def run(number=7):
        compiled.clear()
        monkeypatch.setattr(compile, "_loaded", {})
        monkeypatch.setattr(compile, "_announced", False)
        capfd.readouterr()
        name = f"give_{number}"
        addresses = {
            compile.compiled(name, lambda module: Code(module, name, 0).ret(number), target.host()) for _ in range(2)
        }
        assert len(addresses) == 1
        return ctypes.CFUNCTYPE(ctypes.c_int64)(addresses.pop())(), len(compiled), capfd.readouterr().err

    return run


SAID = "neox-lite: compiling kernels for this processor (once; a few seconds)\n"


def test_a_kernel_is_compiled_once_and_found_by_the_next_process(object_cache, process):
    assert process(7) == (7, 1, SAID)
    (file,) = object_cache.iterdir()
    assert process(7) == (7, 0, "")
    assert process(8) == (8, 1, SAID)
    assert len(list(object_cache.iterdir())) == 2 and file.exists()
    assert list((object_cache.parents[2] / "tmp").iterdir()) == []


def test_another_llvm_or_source_has_files_of_its_own(object_cache, process):
    assert process()[1] == 1
    for owner, name, other in (
        (compile, "_source_hash", lambda: "another"),
        (compile.llvmlite, "__version__", "another"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, other)
            assert process()[1] == 1
    assert process()[1] == 0
    assert len(list(object_cache.iterdir())) == 3


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-1], lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:], lambda b: b[32:]]
)
def test_a_damaged_file_is_made_anew(damage, object_cache, process):
    process()
    (file,) = object_cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    assert process() == (7, 1, SAID)
    assert file.read_bytes() == whole
    assert process() == (7, 0, "")


def test_where_the_cache_cannot_be_written_a_temporary_folder_keeps_kernels(object_cache, process):
    (object_cache.parents[1]).write_text("a file where the folder should be: not even root can write there")
    assert process() == (7, 1, SAID)
    (folder,) = (object_cache.parents[2] / "tmp").iterdir()
    assert len(list(folder.iterdir())) == 1 and folder.stat().st_mode & 0o777 == 0o700
    assert process() == (7, 0, "")


def test_where_nothing_can_be_written_kernels_are_compiled_each_time(tmp_path, process, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(compile, "cache_folders", lambda: [tmp_path / "file" / "a", tmp_path / "file" / "b"])
    assert [process() for _ in range(2)] == [(7, 1, SAID)] * 2


@pytest.mark.parametrize("missing", ["home", "temporary folder"])
def test_systems_without_a_home_or_without_room_for_temporary_files_use_the_other(missing, tmp_path, monkeypatch):
    def refuse():
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setenv("XDG_CACHE_HOME", "~nosuchuser/cache" if missing == "home" else str(tmp_path))
    if missing != "home":
        monkeypatch.setattr(tempfile, "gettempdir", refuse)
    (folder,) = compile.cache_folders()
    assert folder.name == "kernels" if missing != "home" else folder.name.startswith("neox-lite-kernels-")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no user ids")
def test_a_folder_of_another_user_is_neither_read_nor_written(object_cache, process, monkeypatch):
    process()
    (file,) = object_cache.iterdir()
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert process() == (7, 1, SAID)
    assert process(8) == (8, 1, SAID)
    assert list(object_cache.iterdir()) == [file]


def test_a_second_start_compiles_nothing_and_says_nothing(tmp_path):
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


def said(run):
    """Its stderr without warnings about this folder's lack of a tokenizer and the like."""
    return "".join(
        line + "\n" for line in run.stderr.splitlines() if "tokenizer" not in line and not line.startswith("  ")
    )


# Without llvmlite -----------------------------------------------------------------------------------------------------


def test_without_llvmlite_the_reference_runs_and_one_warning_says_why(tmp_path):
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


def test_the_backend_declines_with_the_reason(monkeypatch):
    assert cpu.why_not(torch.device("cpu")) is None
    assert cpu.why_not(torch.device("cuda")) == "runs on the CPU only, this is cuda"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dispatch.reasons(torch.device("cpu"))["cpu"] == "llvmlite is not installed; pip install llvmlite"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert dispatch.choose(torch.device("cpu")).name == "reference"
    assert len(seen) == 1


# Quality --------------------------------------------------------------------------------------------------------------


def write_outliers(folder):
    """The demo model with some channels of its norms 30 times as large and the weights that read them as much smaller.

    It computes the same function, but for rounding: such channels are what trained models of more layers have.
    """
    model = GPTNeoXForCausalLM.from_pretrained(DEMO).float()
    chosen = torch.arange(5, model.config.hidden_size, 41)
    readers = [
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


def kl(truth, found):
    """Mean KL(truth || found) in nats a token."""
    return float(
        torch.cat([(t.exp().double() * (t - f).double()).sum(-1) for t, f in zip(truth, found, strict=True)]).mean()
    )


def distances(folder, scratch):
    """KL of int4 with exact activations to the dense model, and of int4 with int8 activations to either."""
    convert(folder, scratch / "int4", format="int4", group_size=128)
    dense = GPTNeoXForCausalLM.from_pretrained(folder)
    windows = cut(dense, (DEMO / "heldout.txt").read_text(encoding="utf-8"), 128)[:8]

    def scores(model):
        return list(log_probabilities(model, windows))

    truth = scores(dense)
    exact, coarse = (scores(GPTNeoXForCausalLM.from_pretrained(scratch / "int4", exact=e)) for e in (True, False))
    return {"int4": kl(truth, exact), "activations": kl(exact, coarse), "both": kl(truth, coarse)}


@pytest.mark.parametrize("outliers", [False, True], ids=["demo", "outliers"])
def test_int8_activations_add_at_most_a_quarter_of_what_int4_costs(outliers, tmp_path):
    found = distances(write_outliers(tmp_path / "dense") if outliers else DEMO, tmp_path)
    assert 0 < found["activations"] <= found["int4"] / 4
    assert found["both"] <= found["int4"] * 1.25


def test_the_model_with_outliers_is_the_same_function(tmp_path):
    """Else the test above would say nothing about outliers."""
    found, expected = (
        GPTNeoXForCausalLM.from_pretrained(folder).float()(IDS).logits
        for folder in (write_outliers(tmp_path / "m"), DEMO)
    )
    assert largest(found - expected) < 2e-4  # float32 rounding of logits of order ten
