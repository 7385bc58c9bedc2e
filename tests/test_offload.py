"""A model over several tiers: the same numbers wherever its parts are, on a simulated accelerator that punishes every race."""

import copy
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from weakref import WeakSet

import pytest
import torch
from support.simulated_accelerator import Race, SimulatedAccelerator

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification
from neox_lite.errors import ArgumentError, CheckpointError, UnsupportedError
from neox_lite.kernels import cpu, reference
from neox_lite.kernels.graphs import EagerRunner
from neox_lite.loading.apply import move_parts
from neox_lite.offload import placement as placing
from neox_lite.offload import plan, profile
from neox_lite.offload.plan import Card, HardwareProfile, Rates
from neox_lite.offload.run import Placement
from neox_lite.offload.stream import LayerLayout
from neox_lite_quant.convert import convert

LAYERS = 6
PAGES = 12
TIERS = {
    "gpu": "g" * LAYERS,
    "cpu": "c" * LAYERS,
    "disk": "d" * LAYERS,
    "cpu then gpu": "ccccgg",
    "disk then cpu": "ddcccc",
    "disk then gpu": "dddggg",
    "all three": "ddccgg",
    "gpu first": "ggcccc",
    "in turns": "gcdgcd",
}
NAMES = {"g": "gpu", "c": "cpu", "d": "disk"}


def placement(letters, embedding="cpu", head=None, stream_from=4):
    tiers = tuple(NAMES[letter] for letter in letters)
    head = head or ("gpu" if "gpu" in tiers else "cpu")
    return Placement(tiers, embedding, head, stream_from if "gpu" in {*tiers, embedding, head} else None)


@pytest.fixture(scope="module", params=[True, False], ids=["parallel", "sequential"])
def folder(request, tmp_path_factory):
    """A float32 checkpoint whose layers differ."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=64, num_attention_heads=4, intermediate_size=128, num_hidden_layers=LAYERS, vocab_size=96,
        max_position_embeddings=512, use_parallel_residual=request.param, initializer_range=0.3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    GPTNeoXForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    """The same as int4 in groups of 32, plain tensors in 16 bits."""
    path = tmp_path_factory.mktemp("quantized") / "int4"
    convert(folder, path, format="int4", group_size=32)
    return path


def load(folder, kv="fp16"):
    model = GPTNeoXForCausalLM.from_pretrained(folder, kv=kv)
    model.ops = reference
    return model


def placed(folder, where, kv="fp16", **options):
    """The model over tiers, and the device it is on."""
    model, device = GPTNeoXForCausalLM.from_pretrained(folder, kv=kv), SimulatedAccelerator(**options)
    put(model, where, device)
    return model, device


def put(model, where, device, ops=reference):
    """Place a model whose caches have PAGES pages; what of them is on the device counts as its memory."""
    move_parts(model, where, device)
    new_pool = model.new_pool
    model.new_pool = lambda pages=0, limit=None: adopted(device, where, new_pool(PAGES))
    if "cpu" in model.runner.layers.ops and ops is not None:
        model.runner.layers.ops["cpu"], model.runner.passes = ops, EagerRunner(model.runner._forward, None)


def adopted(device, where, pool):
    for tensors in (pool.storage, pool.scales):
        for tier, tensor in zip(where.layers, tensors, strict=False):
            if tier == "gpu":
                device.adopt(tensor)
    return pool


def all_equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def passes(model, seed=0):
    """Logits of a prompt, of single tokens and longer pieces, of several sequences, after a rewind and a fork."""
    draw, pool = torch.Generator().manual_seed(seed), model.new_pool(PAGES)

    def some(count):
        return torch.randint(96, (count,), generator=draw).tolist()

    a, b = pool.new(), pool.new()
    yield model.step(pool, [a], [some(150)])
    yield model.step(pool, [a], [some(1)])
    yield model.step(pool, [b], [some(3)])
    yield model.step(pool, [a, b], [some(1), some(1)])
    yield model.step(pool, [b, a], [some(130), some(2)])
    pool.truncate(a, 100)
    yield model.step(pool, [a], [some(5)])
    c = pool.fork(a)
    yield model.step(pool, [c, a], [some(7), some(1)])
    yield model.step(pool, [c], [some(1)])
    yield model.step(pool, [a, b, c], [some(1), some(30), some(2)])


@pytest.mark.parametrize("eager", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("kv", ["fp16", "int8"])
@pytest.mark.parametrize("letters", TIERS.values(), ids=TIERS)
def test_logits_do_not_depend_on_where_the_parts_are(folder, letters, kv, eager):
    model, _ = placed(folder, placement(letters), kv, eager=eager)
    assert all_equal(passes(model), passes(load(folder, kv)))


class Careless(SimulatedAccelerator):
    """Forgets to wait, in one of the ways there are."""

    def __init__(self, forgets, **options):
        super().__init__(**options)
        self._forgets = forgets

    def wait_event(self, queue, event):
        if self._forgets != queue:
            super().wait_event(queue, event)

    def synchronize(self, event):
        if self._forgets != "host":
            super().synchronize(event)


@pytest.mark.parametrize("eager", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("forgets", ["compute", "copy", "host"])
def test_every_wait_is_needed(folder, forgets, eager):
    model = GPTNeoXForCausalLM.from_pretrained(folder)
    put(model, placement("ccccgg"), Careless(forgets, eager=eager))
    with pytest.raises(Race):
        list(passes(model))


PAGE_BYTES = 2 * 4 * 128 * 16 * 4  # keys and values of 4 heads of 16 in float32


def layer_bytes(model):
    return LayerLayout(model.gpt_neox.blocks[0]).nbytes


def test_a_pass_uploads_each_layer_outside_the_gpu_once_and_decode_uploads_none(folder):
    model, device = placed(folder, placement("ddccgg"))
    pool, layer, page = model.new_pool(), layer_bytes(model), PAGE_BYTES
    settled, a = device.allocated, pool.new()
    for tokens, layers, pages_up, pages_down in (
        (list(range(90)), 4, 0, 4),  # an empty cache is not uploaded
        ([1], 4, 0, 4),
        (list(range(60)), 8, 4, 12),  # 91 cached, so into a second page
    ):
        model.step(pool, [a], [tokens])
        assert (device.bytes_up, device.bytes_down) == (layers * layer + pages_up * page, pages_down * page)
        if pages_up == 0:
            assert device.allocated - settled == 2 * page  # the buffers for weights were there before
            assert device.staged == 2 * (layer + page)


@pytest.mark.parametrize(
    ("letters", "prefill", "decode"), [("ccccgg", 1, 1), ("ggcccc", 1, 3), ("gcdgcd", 1, 5), ("gggggg", 1, 1)]
)
def test_activations_cross_once_at_each_boundary(folder, letters, prefill, decode):
    model, device = placed(folder, placement(letters, head="gpu"))
    pool = model.new_pool()
    a = pool.new()
    for tokens, crossings in (([1, 2, 3, 4, 5], prefill), ([6], decode)):
        before = device.crossings
        model.step(pool, [a], [tokens])
        assert device.crossings - before == crossings


def test_pages_that_were_planned_for_are_allocated_once(folder):
    model, device = placed(folder, Placement(("cpu",) * 4 + ("gpu",) * 2, "cpu", "gpu", 4, pages=PAGES))
    pool = model.new_pool()
    before, a = device.allocated, pool.new()
    for count in (5, 300, 5):
        model.step(pool, [a], [[1] * count])
        assert device.allocated - before == 2 * PAGES * PAGE_BYTES
        assert device.staged == 2 * (layer_bytes(model) + PAGES * PAGE_BYTES)


@pytest.mark.parametrize("letters", ["ddccgg", "gcdgcd", "dddddd"])
def test_generated_tokens_do_not_depend_on_where_the_parts_are(folder, letters):
    ids = torch.randint(96, (3, 40))
    options = {"max_new_tokens": 30, "do_sample": True, "temperature": 1.5, "seed": 3}
    expected = load(folder).generate(ids, **options)
    assert torch.equal(placed(folder, placement(letters))[0].generate(ids, **options), expected)


def test_hidden_states_and_embeddings_as_input_work_across_tiers(folder):
    plain, (model, _) = load(folder), placed(folder, placement("dcgcgd"))
    ids = torch.randint(96, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = plain(ids, attention_mask=mask, output_hidden_states=True)
    found = model(ids, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(found.logits, expected.logits)
    assert all_equal(found.hidden_states, expected.hidden_states)
    embedded = plain.gpt_neox.embed_in.weight[ids]
    assert torch.equal(model(inputs_embeds=embedded).logits, plain(ids).logits)


def test_heads_of_other_classes_are_placed_too(folder):
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="score"):
        plain = GPTNeoXForSequenceClassification.from_pretrained(folder)
    plain.ops = reference
    expected = plain(torch.arange(20)[None]).logits
    put(plain, placement("ccccgg"), SimulatedAccelerator())
    assert torch.equal(plain(torch.arange(20)[None]).logits, expected)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("letters", ["ddccgg", "gcdgcd", "cccccc", "dddddd"])
def test_kernels_of_the_cpu_compute_the_same_from_any_memory(quantized, letters, exact):
    """int4 layers, mapped, in a buffer of the host, or in the device's memory, which the CPU's kernels stand in for."""
    plain, model = (GPTNeoXForCausalLM.from_pretrained(quantized, exact=exact) for _ in range(2))
    put(model, placement(letters), SimulatedAccelerator(backend=cpu), ops=None)
    assert all_equal(passes(model), passes(plain))


def test_layers_that_stay_on_the_cpu_are_captured_beside_others(quantized):
    """Their kernels then run with no Python between them, as they do in a model that is all there."""
    model = GPTNeoXForCausalLM.from_pretrained(quantized)
    put(model, placement("dccggc"), SimulatedAccelerator(backend=cpu), ops=None)
    pool = model.new_pool()
    block_tables = [pool.new(), pool.new()]
    for tokens in ([[1], [2]], [[3], [4]]):
        model.step(pool, block_tables, tokens)
    segments = model.runner.layers._segments
    assert {s: list(c.graphs(pool)) for s, c in segments.items()} == {(1, 3): [(2, 2)], (3, 5): [], (5, 6): [(2, 2)]}
    assert segments[1, 3].graphs(pool)[2, 2] is not None


def test_a_file_that_changes_is_noticed_and_the_model_goes_on_once_it_is_back(folder, tmp_path):
    """A layer on the disk is read again for each pass, so it must be what was loaded."""
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    model, _ = placed(copied, placement("ddcccc"))
    generate = partial(model.generate, torch.arange(5)[None], max_new_tokens=3)
    expected, file = generate(), copied / "model.safetensors"
    content, times = file.read_bytes(), file.stat()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    model.rebind(model.placement, None)  # nothing is fetched ahead any more
    with pytest.raises(CheckpointError, match="has changed since the model was loaded"):
        generate()
    file.rename(copied / "away")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        generate()
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert torch.equal(generate(), expected)


@pytest.mark.parametrize("letters", ["ddccgg", "dddccc"])
def test_a_pass_that_fails_anywhere_leaves_the_cache_as_it_was(folder, letters, monkeypatch):
    """As when memory runs out, or at Ctrl-C: the same pass, made again, gives what it would have given."""
    model, _ = placed(folder, placement(letters))
    expected, attention, step = list(passes(load(folder))), reference.attention, model.step
    calls, failed, fails = 0, [], [3, 9, 14, 17, 22, 31, 40]

    def failing(*args):
        nonlocal calls
        calls += 1
        if calls in fails:
            raise KeyboardInterrupt
        return attention(*args)

    def until_it_works(*args):
        while True:
            try:
                return step(*args)
            except KeyboardInterrupt:
                failed.append(calls)

    monkeypatch.setattr(reference, "attention", failing)
    monkeypatch.setattr(model, "step", until_it_works)
    assert all_equal(passes(model), expected)
    assert failed == fails


def test_threads_that_generate_at_once_take_turns_at_the_buffers(folder):
    model, _ = placed(folder, placement("ddccgg"))
    prompts = [torch.randint(96, (1, n)) for n in (3, 40, 9, 70)]
    expected = [load(folder).generate(p, max_new_tokens=8) for p in prompts]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda p: model.generate(p, max_new_tokens=8), prompts * 3))
    assert all_equal(found, expected * 3)


def test_a_layer_that_no_file_holds_as_it_is_cannot_stay_on_the_disk(folder):
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype="bfloat16")
    move_parts(model, placement("dddddd"))
    with pytest.raises(ArgumentError, match="layer 0 is on the disk, but its weights differ from what its file holds"):
        model(torch.tensor([[1]]))


def doubled(layers):
    layers[0].mlp.dense_4h_to_h.weight.mul_(2)


def replaced(layers):
    layers[0].mlp.dense_4h_to_h.weight = torch.nn.Parameter(layers[0].mlp.dense_4h_to_h.weight * 2, False)


def swapped(layers):
    layers[0], layers[1] = layers[1], layers[0]
    layers[0].index, layers[1].index = 0, 1


@pytest.mark.parametrize("change", [doubled, replaced, swapped])
def test_weights_that_change_between_calls_count_wherever_they_are(folder, change):
    """On the disk they are refused, for the file has others."""
    plain, mixed, on_disk = load(folder), *(placed(folder, placement(w))[0] for w in ("cccccg", "dccccg"))
    ids = torch.arange(9)[None]
    for model in (plain, mixed, on_disk):
        model(ids)
        with torch.no_grad():
            change(model.gpt_neox.layers)
    expected = plain(ids).logits
    torch.testing.assert_close(mixed(ids).logits, expected, rtol=1e-4, atol=1e-4)  # by two backends
    assert float((expected - load(folder)(ids).logits).abs().max()) > 0.1
    if change is not swapped:
        with pytest.raises(ArgumentError, match="layer 0 is on the disk, but its weights differ"):
            on_disk(ids)


def test_a_placement_outlives_a_cast_and_a_copy(folder):
    model, expected = load(folder), load(folder)(torch.arange(9)[None]).logits
    move_parts(model, placement("cccccc"))
    for same in (model.double().float(), model.cpu(), copy.deepcopy(model)):
        assert same.placement == placement("cccccc")
        same.ops = reference
        assert torch.equal(same(torch.arange(9)[None]).logits, expected)


def test_what_else_changes_in_a_layer_counts_wherever_it_is(folder):
    """A norm's eps and a hook, after a first pass; layers that pass through buffers are run as twins."""
    ids, results, seen = torch.arange(9)[None], [], []
    for letters in ("c" * LAYERS, "dccccc", "ccccgg"):
        model, _ = placed(folder, placement(letters))
        model(ids)
        for layer in model.gpt_neox.layers:
            layer.input_layernorm.eps = 0.5
        model.gpt_neox.layers[0].register_forward_hook(lambda *_, where=letters: seen.append(where))
        results.append(model(ids).logits)
        assert seen.pop() == letters and not seen
        assert not torch.equal(results[-1], load(folder)(ids).logits)
    assert all_equal(results, results[:1] * 3)


def test_a_model_with_layers_on_the_disk_refuses_what_would_read_them_into_memory(folder):
    model, _ = placed(folder, placement("dccccc"))
    expected = model(torch.arange(9)[None]).logits
    with pytest.raises(UnsupportedError, match=r"layers on the disk stay torch.float32"):
        model.half()
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(UnsupportedError, match="cannot be copied or pickled; load it again"):
            copied(model)
    assert model.float().cpu().placement == placement("dccccc")
    model.ops = reference
    assert torch.equal(model(torch.arange(9)[None]).logits, expected)


CONTEXT_BYTES = 1 << 20  # of the simulated device's driver


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, which is simulated: budgets hold for it, and the plan's rates are given."""
    device = SimulatedAccelerator()
    card = Card("simulated", 1 << 34, Rates(1e12, 1e14), 2e10, CONTEXT_BYTES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(placing, "Cuda", lambda *_: device)
    monkeypatch.setattr(placing, "own_memory", lambda: {"Anon": 50 << 20})
    monkeypatch.setattr(placing, "PLANNED", WeakSet())
    monkeypatch.setattr(profile, "load", lambda: HardwareProfile(Rates(1e10, 1e11), 1e9, 100 << 20, card))
    monkeypatch.setattr(profile, "free_memory", lambda: (1 << 34, 1 << 34))
    monkeypatch.setattr(profile, "free_gpu", lambda gpu: (1 << 34, 1 << 34))
    for name in ("DECODED_SLICE", "CUBLAS_WORKSPACE", "GRAPHS", "TORCH_PRODUCT"):
        monkeypatch.setattr(plan, name, 0)
    return device


def within(folder, device, gpu_bytes, **options):
    """The model loaded by plan, with what its caches take counted as the device's, whose limit is the budget's rest."""
    limits = {"cuda": gpu_bytes, "cpu": 1 << 33}
    model = GPTNeoXForCausalLM.from_pretrained(folder, device_map="auto", max_memory=limits, **options)
    if model.placement is not None:
        model.runner.layers.ops["cpu"] = reference
        new_pool, where = model.new_pool, model.placement

        def counted(pages=0, limit=None):
            pool = new_pool(pages, limit)
            assert pool.pages == pages
            return adopted(device, where, pool)

        model.new_pool = counted
    return model


@pytest.mark.parametrize("kv", [None, "fp16", "int8"])
@pytest.mark.parametrize("context", [100, 512])
def test_what_a_plan_predicts_is_what_the_device_is_asked_for(folder, gpu, kv, context):
    """At every budget from nothing to plenty: the same bytes, never more than the budget, and the same tokens."""
    ids, options = torch.randint(96, (1, context - 4)), {"max_new_tokens": 4, "min_new_tokens": 4}
    expected = {cache: load(folder, cache).generate(ids, **options) for cache in ("fp16", "int8")}
    rounding = 256 * 20 * (LAYERS + 4)  # tensors start at multiples of 256 bytes
    table = 2 * 512 * 2 * 4  # rotary cosines and sines, which are uploaded like activations
    seen = set()
    for quarters in (4, 7, 8, 9, 10, 11, 12, 14, 28):  # of a MiB
        budget = quarters << 18
        gpu.__init__()
        model = within(folder, gpu, budget, kv=kv, context=context)
        parts, streamer = model.plan.parts["gpu"], model.runner.layers._streamer
        weights = gpu.allocated - sum(buffer.device.nbytes for buffer in (streamer._buffers if streamer else ()))
        assert torch.equal(model.generate(ids, **options), expected[model.kv])
        assert 0 <= weights + table * bool(parts) - parts.get("weights", 0) <= rounding
        planned = sum(parts.get(name, 0) for name in ("weights", "cache", "layer_buffers"))
        assert planned - table <= gpu.peak <= planned + 3 * rounding or not parts
        rest = sum(parts.get(name, 0) for name in ("context", "scratch", "graphs"))
        assert gpu.peak + rest <= budget + 3 * rounding
        seen.add(model.placement.layers.count("gpu") if model.placement else 0)
    assert {0, LAYERS} < seen  # and some between


def test_a_map_is_honoured_part_by_part(folder, gpu):
    where = {
        "": "cpu",
        "gpt_neox.layers.1": 0,
        "gpt_neox.layers.2": "cuda:0",
        "gpt_neox.layers.3": "disk",
        "embed_out": 0,
    }
    model = GPTNeoXForCausalLM.from_pretrained(folder, device_map={**where, "gpt_neox.final_layer_norm": "cuda"})
    assert model.placement.layers == ("cpu", "gpu", "gpu", "disk", "cpu", "cpu")
    assert (model.placement.embedding, model.placement.head) == ("cpu", "gpu")
    assert model.placement.stream_from is not None
    with pytest.raises(ArgumentError, match="the final norm goes where the head is"):
        GPTNeoXForCausalLM.from_pretrained(folder, device_map=where)
    with pytest.raises(ArgumentError, match="there are 1 CUDA devices"):
        GPTNeoXForCausalLM.from_pretrained(folder, device_map={"": 0, "embed_out": 1})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "bfloat16"}, "model.safetensors holds float32, and they are to be bfloat16"),
        ({"quantization": "int4"}, "run `neox-lite quantize` first"),
        ({}, "pytorch_model.bin is no safetensors file"),
    ],
)
def test_layers_that_no_file_holds_as_they_run_are_not_planned_for_the_disk(gpu, tmp_path, options, reason):
    """Not by a plan, which says by how much they do not fit and why; not by a map either."""
    torch.manual_seed(0)
    folder = tmp_path / "safetensors"
    shape = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512, "num_hidden_layers": 24}
    saved = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=96, **shape))
    saved.save_pretrained(folder)
    model = shutil.copytree(folder, tmp_path / "model")
    if not options:
        torch.save(saved.state_dict(), model / "pytorch_model.bin")
        for file in model.glob("*.safetensors*"):
            file.unlink()
    plenty = GPTNeoXForCausalLM.from_pretrained(folder, device_map="auto", max_memory={0: 0}, context=16).plan
    least = plenty.totals["cpu"] - sum(plenty.sizes.layers[2:])  # but two layers, which pass through buffers
    within_it = {"device_map": "cpu", "max_memory": {"cpu": least + 1000}, "context": 16, "kv": "fp16"}
    del plenty
    with pytest.raises(ArgumentError, match=f"the model does not fit: .* layers cannot stay on the disk: .*{reason}"):
        GPTNeoXForCausalLM.from_pretrained(model, **within_it, **options)
    assert GPTNeoXForCausalLM.from_pretrained(folder, **within_it).plan.disk_layers > 0  # safetensors, as they are
    with pytest.raises(ArgumentError, match=f"device_map: layers cannot stay on the disk: .*{reason}"):
        GPTNeoXForCausalLM.from_pretrained(model, device_map={"": "cpu", "gpt_neox.layers.0": "disk"}, **options)


def test_models_of_one_process_share_its_budget(folder, gpu):
    """The second is planned beside the first, whose cache from then on stays as planned; what is gone counts no more."""
    options = {"device_map": "cpu", "max_memory": {"cpu": 1 << 28}, "context": 128}
    first = GPTNeoXForCausalLM.from_pretrained(folder, **options)
    assert first.plan.hardware.process_bytes == 100 << 20 and first.cache_pages > first.plan.pages
    second = GPTNeoXForCausalLM.from_pretrained(folder, **options)
    assert second.plan.hardware.process_bytes == first.plan.totals["cpu"]
    assert first.cache_pages == first.plan.pages < second.cache_pages
    tight = {**options, "max_memory": {"cpu": second.plan.totals["cpu"]}}
    with pytest.raises(ArgumentError, match="the process with the models loaded before alone takes"):
        GPTNeoXForCausalLM.from_pretrained(folder, **tight)
    assert first.generate(torch.tensor([[1]]), max_new_tokens=2).shape == (1, 3)
    del first, second
    assert GPTNeoXForCausalLM.from_pretrained(folder, **tight).plan.hardware.process_bytes == 100 << 20
